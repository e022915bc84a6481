//! Terminals on the host's side, and the sockets over which descriptors go to a caller.
//!
//! In: paths that the caller gave. Out: descriptors sent. Must not: wait for whoever listens, who may only look once
//! the command has returned.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Connects to the socket behind `path`, which may be longer than a socket's address; `flag` named it.
pub fn dial(path: &Path, flag: &str) -> Result<UnixStream> {
    let shown = || format!("{flag} {}", path.display());
    let socket = File::options().read(true).custom_flags(libc::O_PATH).open(path).with_context(shown)?;
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).with_context(shown)
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
