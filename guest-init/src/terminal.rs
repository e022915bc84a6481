//! A process's terminal: a pty in the container's own devpts, whose line discipline is the only one on the way.
//!
//! The child that becomes the process opens it, once it is in the container's mounts, and hands both ends to pid 1.
//! In: a size. Out: the process's controlling terminal. Must not: take anything but a pty for one, whatever the
//! container has put in its place.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use a3s_box_mount::{Kind, Root, attach, clone_tree};
use a3s_box_proto::{Process, Size};
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat, makedev};

/// Both ends of a pty.
pub struct Terminal {
    /// What pid 1 reads and writes, without ever blocking.
    pub master: OwnedFd,
    /// What the process has.
    pub slave: OwnedFd,
}

/// The terminal that a process asks for, opened in the caller's mounts.
pub fn of(process: &Process) -> Result<Option<Terminal>> {
    process.terminal.map(open).transpose().context("process.terminal")
}

fn open(size: Size) -> Result<Terminal> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    let open = |path| File::options().read(true).write(true).custom_flags(flags).open(path);
    let master: OwnedFd =
        open("/dev/pts/ptmx").or_else(|_| open("/dev/ptmx")).context("open /dev/pts/ptmx")?.into();
    let stat = fstat(&master).context("look at /dev/pts/ptmx")?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFCHR
        || stat.st_rdev != makedev(5, 2)
    {
        bail!("/dev/pts/ptmx is no pty");
    }
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int that outlives the call.
    let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) };
    Errno::result(result).context("unlock the pty")?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // By the master, not by a path: it is the other end whatever lies at /dev/pts.
    // SAFETY: TIOCGPTPEER takes flags and returns a new descriptor or an error.
    let slave = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })
        .context("open the pty's other end")?;
    // SAFETY: the kernel just gave this descriptor to us.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    resize(master.as_fd(), size).context("size of the terminal")?;
    Ok(Terminal { master, slave })
}

impl Terminal {
    /// Binds it at /dev/console, as runc does.
    pub fn bind_console(&self, root: &Root) -> Result<()> {
        let tree = clone_tree(&self.slave, false)?;
        attach(tree, root.place(Path::new("/dev/console"), Kind::File)?).context("mount /dev/console")
    }

    /// Makes it the calling process's streams and its session's controlling terminal.
    pub fn take(self) -> Result<()> {
        for target in 0..3 {
            // SAFETY: both numbers are descriptors of this process, and the target is to be replaced.
            Errno::result(unsafe { libc::dup2(self.slave.as_raw_fd(), target) }).context("terminal")?;
        }
        // SAFETY: TIOCSCTTY takes a plain number.
        Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }).context("controlling terminal")?;
        Ok(())
    }
}

/// Sets a terminal's size; its foreground processes get SIGWINCH where it is another.
pub fn resize(master: BorrowedFd<'_>, size: Size) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize that outlives the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}
