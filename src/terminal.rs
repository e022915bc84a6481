//! Terminals on the host's side, and the sockets over which descriptors go to a caller.
//!
//! The line discipline that counts is the guest's. What lies between the caller and it, a pty made for the caller or
//! the caller's own terminal, is raw: nothing is echoed, edited or translated twice. In: sizes, paths that the caller
//! gave. Out: raw terminals, descriptors sent. Must not: wait for whoever listens, who may only look once the command
//! has returned.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use a3s_box_proto::Size;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::time::{TimeVal, TimeValLike};

/// Checks that a process has a terminal where one is given, and the other way round, in runc's words.
pub fn check(wanted: bool, detached: bool, socket: Option<&Path>) -> Result<()> {
    match socket {
        None if detached && wanted => {
            bail!("cannot allocate tty if a3s-box will detach without setting console socket")
        }
        Some(_) if !detached || !wanted => {
            bail!("cannot use console socket if a3s-box will not detach or allocate tty")
        }
        None if wanted && own().is_none() => {
            bail!(
                "process.terminal true: none of standard input, output and error is a terminal (false in config.json goes without)"
            )
        }
        _ => Ok(()),
    }
}

/// The first of this process's own streams that is a terminal.
pub fn own() -> Option<RawFd> {
    (0..3).find(|fd| is_terminal(*fd))
}

/// Whether a descriptor is a terminal that nobody has hung up.
pub fn is_terminal(fd: RawFd) -> bool {
    size(fd).is_some()
}

/// A terminal's size.
pub fn size(fd: RawFd) -> Option<Size> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize that outlives the call.
    let result = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut size) };
    (result == 0).then_some(Size { rows: size.ws_row, columns: size.ws_col })
}

/// The caller's own terminal, raw until this is dropped.
pub struct Raw {
    fd: RawFd,
    before: Termios,
}

impl Raw {
    /// Makes the terminal raw that [`own`] finds.
    pub fn own() -> Result<Self> {
        let fd = own().context("process.terminal: there is no terminal any more")?;
        let before = make_raw(borrow(fd))?;
        Ok(Raw { fd, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // One that is hung up needs no settings.
        let _ = tcsetattr(borrow(self.fd), SetArg::TCSADRAIN, &self.before);
    }
}

fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: descriptors 0 to 2 are open for the whole life of the process (std sees to it at its start).
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn make_raw(fd: impl AsFd) -> Result<Termios> {
    let before = tcgetattr(&fd).context("settings of the terminal")?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    tcsetattr(&fd, SetArg::TCSANOW, &raw).context("make the terminal raw")?;
    Ok(before)
}

/// A raw pty for a caller, and the way to it.
pub struct Pty {
    /// What the process that relays holds.
    pub slave: OwnedFd,
    master: OwnedFd,
    socket: UnixStream,
}

impl Pty {
    /// Opens a pty of this size, and the socket that is to receive it.
    pub fn open(size: Size, socket: &Path) -> Result<Self> {
        let socket = dial(socket, "--console-socket")?;
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = nix::pty::posix_openpt(flags).context("open /dev/ptmx")?;
        nix::pty::unlockpt(&master).context("unlock the pty")?;
        // SAFETY: TIOCGPTPEER takes flags and returns a new descriptor or an error.
        let slave =
            Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) });
        // SAFETY: the kernel just gave this descriptor to us.
        let slave = unsafe { OwnedFd::from_raw_fd(slave.context("open the pty's other end")?) };
        make_raw(&slave)?;
        let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads one winsize that outlives the call.
        Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
            .context("size of the terminal")?;
        Ok(Pty { slave, master: master.into(), socket })
    }

    /// Sends the master to the caller; this process keeps nothing of the pty.
    pub fn send(self) -> Result<()> {
        let name = nix::unistd::ttyname(&self.slave).map(|path| path.to_string_lossy().into_owned());
        send(&self.socket, self.master.as_fd(), &name.unwrap_or_else(|_| "terminal".into()))
    }
}

/// Makes the other end of a caller's pty the calling process's streams and its session's controlling terminal.
pub fn take(slave: OwnedFd) -> Result<()> {
    for target in 0..3 {
        // SAFETY: both numbers are descriptors of this process, and the target is to be replaced.
        Errno::result(unsafe { libc::dup2(slave.as_raw_fd(), target) }).context("terminal")?;
    }
    // SAFETY: TIOCSCTTY takes a plain number.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }).context("controlling terminal")?;
    Ok(())
}

/// How long a listener may take to have room for one more connection.
const ROOM: i64 = 5;

/// Connects to the socket behind `path`, which may be longer than a socket's address; `flag` named it.
pub fn dial(path: &Path, flag: &str) -> Result<UnixStream> {
    let shown = || format!("{flag} {}", path.display());
    let place = File::options().read(true).custom_flags(libc::O_PATH).open(path).with_context(shown)?;
    let address =
        UnixAddr::new(format!("/proc/self/fd/{}", place.as_raw_fd()).as_str()).with_context(shown)?;
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // It holds for connecting as well.
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(ROOM)).with_context(shown)?;
    match connect(socket.as_raw_fd(), &address) {
        Err(Errno::EAGAIN) => bail!("{}: nobody has accepted a connection for {ROOM} seconds", shown()),
        connected => connected.with_context(shown)?,
    }
    Ok(socket.into())
}

/// Sends a descriptor with its name, and does not wait for anybody to take it.
pub fn send(socket: &UnixStream, fd: BorrowedFd<'_>, name: &str) -> Result<()> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(name.as_bytes())], &rights, flags, None)
        .with_context(|| format!("send {name}"))?;
    Ok(())
}
