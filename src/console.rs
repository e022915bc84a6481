//! The guest's console: drained from a FIFO into a bounded file.
//!
//! The guest kernel, guest-init and libkrun itself write to the FIFO; whoever holds the VM drains it. In: bytes that
//! a hostile guest chose. Out: the last of them in a file, its closing lines for an error. Must not: grow without
//! bound, or keep the VM waiting.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::stat::Mode;

use crate::userns::Root;

/// Name of the FIFO in the VM's directory.
pub const FIFO: &str = "console";
/// Name of the file in the VM's directory.
pub const LOG: &str = "console.log";
/// The file holds at least the last half of this many bytes, and never more than all.
const BOUND: usize = 256 << 10;

/// The reading end and the file.
pub struct Console {
    fifo: OwnedFd,
    log: File,
    kept: Vec<u8>,
}

impl Console {
    /// Makes the FIFO and the file in the VM's directory and opens both.
    ///
    /// With `root`, directory and FIFO are that user's, who is the VMM.
    pub fn create(dir: &Path, root: Option<Root>) -> Result<Self> {
        let path = dir.join(FIFO);
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).context("make the console FIFO")?;
        if let Some(Root { uid, gid }) = root {
            let give = |path: &Path| std::os::unix::fs::chown(path, Some(uid), Some(gid));
            give(&path).and_then(|()| give(dir)).context("give the VM's directory to the VMM's user")?;
        }
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        // Read and write, so that a writer's leaving is no end of file.
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(&path)
            .context("open the console")?;
        let log = File::options()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(dir.join(LOG))
            .context("console log")?;
        Ok(Console { fifo: fifo.into(), log, kept: Vec::new() })
    }

    /// A writing end, for the VMM's own standard output and error.
    pub fn writer(dir: &Path) -> Result<OwnedFd> {
        let file = File::options().read(true).write(true).open(dir.join(FIFO)).context("open the console")?;
        Ok(file.into())
    }

    /// Takes what is there.
    pub fn drain(&mut self) {
        let mut buffer = [0u8; 16 << 10];
        loop {
            match nix::unistd::read(&self.fifo, &mut buffer) {
                Ok(n @ 1..) => self.keep(&buffer[..n]),
                Err(Errno::EINTR) => {}
                Ok(_) | Err(_) => break,
            }
        }
    }

    /// Whether this was said, and is still kept.
    pub fn heard(&self, marker: &str) -> bool {
        self.kept.windows(marker.len()).any(|window| window == marker.as_bytes())
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
        if self.kept.len() <= BOUND {
            let _ = self.log.write_all(bytes);
            return;
        }
        self.kept.drain(..self.kept.len() - BOUND / 2);
        let _ = self.log.set_len(0).and_then(|()| self.log.seek(SeekFrom::Start(0)));
        let _ = self.log.write_all(&self.kept);
    }

    /// The last lines, fit to be shown.
    pub fn last_words(&self) -> String {
        last_lines(&self.kept)
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fifo.as_fd()
    }
}

/// What a kernel says of why and where it stops, above many lines of less use.
const TELLING: [&str; 2] = ["BUG", "RIP:"];

/// The last lines of a console log, joined into one, after the last telling ones before them.
fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let (before, last) = lines.split_at(lines.len().saturating_sub(5));
    let is_telling = |line: &&str| TELLING.iter().any(|word| line.contains(word));
    let telling: Vec<&str> = before.iter().copied().filter(is_telling).collect();
    let shown = [&telling[telling.len().saturating_sub(3)..], last].concat();
    crate::guest::clean(&shown.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_tells_its_cause() {
        let noise = "[    9.1] Call Trace:\n".repeat(40);
        let text = format!("[    9.0] kernel BUG at fs/super.c:650!\n{noise}[    9.2] Kernel panic\n\n");
        let words = last_lines(text.as_bytes());
        assert!(words.starts_with("[    9.0] kernel BUG at fs/super.c:650! | "), "{words}");
        assert!(words.ends_with(" | [    9.2] Kernel panic"), "{words}");
        assert_eq!(words.matches("Call Trace").count(), 4);
    }

    #[test]
    fn a_flood_keeps_its_end_and_stays_bounded() {
        let dir = std::env::temp_dir().join(format!("a3s-box-console-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut console = Console::create(&dir, None).unwrap();
        let mut writer = File::from(Console::writer(&dir).unwrap());
        for n in 0..20_000 {
            writer.write_all(format!("line {n} of a guest that talks too much\n").as_bytes()).unwrap();
            if n % 100 == 0 {
                console.drain();
            }
        }
        writer.write_all(b"panic: the end\n").unwrap();
        console.drain();
        assert!(console.heard("the end") && !console.heard("never said"));
        assert!(std::fs::metadata(dir.join(LOG)).unwrap().len() <= BOUND as u64);
        assert!(console.last_words().ends_with("panic: the end"));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
