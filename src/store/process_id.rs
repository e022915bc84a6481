//! Pids that are kept for later commands.
//!
//! In: pids. Out: whose they are now. Must not: take what cannot be looked at for dead.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::vmm;

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Pid on the host.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of /proc/PID/stat.
    pub start_time: u64,
}

impl ProcessId {
    /// The process with this pid now, if there is one.
    pub fn of(pid: i32) -> Result<Option<Self>> {
        let found = stat(pid)?.filter(|(state, _)| !matches!(state, 'Z' | 'X'));
        Ok(found.map(|(_, start_time)| ProcessId { pid, start_time }))
    }

    /// The same, of a boot that has ended.
    pub fn of_another_boot(self) -> Self {
        ProcessId { start_time: u64::MAX, ..self }
    }

    /// Whether it still runs: a zombie does not. What cannot be looked at is taken for alive, for what is taken for dead
    /// is forgotten.
    pub fn is_alive(self) -> bool {
        !matches!(Self::of(self.pid), Ok(found) if found != Some(self))
    }

    /// A descriptor for it; `None` where it runs no more.
    pub fn open(self) -> Result<Option<OwnedFd>> {
        let pidfd = match vmm::pidfd_open(self.pid) {
            // Its number is nobody's by now, or a thread's.
            Err(error)
                if matches!(error.downcast_ref(), Some(Errno::ESRCH | Errno::EINVAL | Errno::ENOENT)) =>
            {
                return Ok(None);
            }
            pidfd => pidfd?,
        };
        // Looked at behind the descriptor: the number may have become another process's.
        Ok((Self::of(self.pid)? == Some(self)).then_some(pidfd))
    }
}

/// Which boot of the host this is (random(4)): looked at once, for every record is compared with it.
pub fn boot_id() -> io::Result<&'static str> {
    static KNOWN: OnceLock<String> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(known);
    }
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(KNOWN.get_or_init(|| text.trim_end().to_string()))
}

/// State letter and start time of a process, if there is one.
pub fn stat(pid: i32) -> Result<Option<(char, u64)>> {
    let path = format!("/proc/{pid}/stat");
    let stat = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        stat => stat.with_context(|| format!("read {path}"))?,
    };
    // The command name may hold anything, parentheses and spaces included.
    let parsed = stat.rsplit_once(") ").and_then(|(_, rest)| {
        let mut fields = rest.split(' ');
        let state = fields.next()?.chars().next()?;
        Some((state, fields.nth(18)?.parse().ok()?))
    });
    parsed.map(Some).with_context(|| format!("{path}: {stat:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_a_recycled_pid_is_not_it() {
        let me = ProcessId::of(std::process::id() as i32).unwrap().unwrap();
        assert!(me.is_alive() && me.open().unwrap().is_some());
        let other = ProcessId { start_time: me.start_time + 1, ..me };
        assert!(!other.is_alive() && other.open().unwrap().is_none());
        let gone = me.of_another_boot();
        assert!(!gone.is_alive() && gone.open().unwrap().is_none());
        let nobody = ProcessId { pid: i32::MAX, ..me };
        assert!(!nobody.is_alive() && nobody.open().unwrap().is_none());
    }
}
