//! Failures of this process's own, or of the host's, that say nothing of what was asked for.
//!
//! In: errors. Out: whether something was lacking. Must not: be asked where the answer changes nothing.

use std::io;

use nix::errno::Errno;

/// Whether a call failed for want of descriptors or memory, or because a disk does not work: what was looked for may
/// well be there, and whoever was asked may answer.
pub fn is_shortage(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref().and_then(io::Error::raw_os_error).map(Errno::from_raw);
    let errno = code.or_else(|| error.downcast_ref().copied());
    errno.is_some_and(|errno| [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EIO].contains(&errno))
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_shortage_is_seen_below_its_context() {
        let io = |errno: Errno| Err::<(), _>(io::Error::from(errno)).context("read x").unwrap_err();
        assert!(is_shortage(&io(Errno::EMFILE)) && !is_shortage(&io(Errno::ENOENT)));
        assert!(is_shortage(&anyhow::Error::new(Errno::ENOMEM).context("x")));
        assert!(!is_shortage(&anyhow::anyhow!("x")));
    }
}
