//! Small processes that carry one thing between a socket of the host's and the guest.
//!
//! Forked off one that has prepared what they need; each dials the guest, gives up everything else, and relays. In: a
//! socket, a request. Out: nothing but the bytes. Must not: read a byte of the guest's before it is confined.

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use a3s_box_proto::{Outcome, Request};
use anyhow::{Context, Result, bail};
use nix::unistd::{ForkResult, Pid, fork};

use crate::guest::{self, Connection};
use crate::jail;
use crate::relay::{self, Post};

/// Clones a process that does this, for one that has one thread.
pub fn bear(act: impl FnOnce() -> Result<()>) -> Result<Pid> {
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => leave(i32::from(act().is_err())),
    }
}

/// Ends such a process.
pub fn leave(status: i32) -> ! {
    // SAFETY: _exit takes any status and does not return.
    unsafe { libc::_exit(status) }
}

/// Makes `fd` what `from` is.
pub fn replace(from: RawFd, fd: RawFd) -> io::Result<()> {
    // SAFETY: 0 to 2 are nobody's in this process, which never returns to code that owns them.
    nix::errno::Errno::result(unsafe { libc::dup2(from, fd) }).map(drop).map_err(io::Error::from)
}

/// Makes a socket this process's input and output, and all that it holds besides what it keeps.
pub fn become_streams(socket: OwnedFd, kept: &[RawFd]) -> io::Result<()> {
    let socket = socket.into_raw_fd();
    replace(socket, 0)?;
    replace(socket, 1)?;
    jail::keep_only(kept);
    Ok(())
}

/// Connects to the VM whose directory is the current one. Not a byte of the guest's is read yet.
pub fn dial() -> Result<UnixStream> {
    UnixStream::connect(guest::SOCKET).context("the VM's socket")
}

/// Asks the guest, from a process that may do nothing but this and relay.
pub fn ask(stream: UnixStream, request: &Request) -> Result<Connection> {
    jail::confine_relay(&[])?;
    let mut connection = Connection::greet(stream, guest::GREETING)?;
    match connection.call(request, guest::ANSWER)? {
        Outcome::Done => Ok(connection),
        other => bail!("the guest refused: {other:?}"),
    }
}

/// Asks the guest for a process, and relays between it and this process's streams.
pub fn carry(stream: UnixStream, request: &Request, id: &str, half_closes: bool) -> Result<()> {
    let signals = relay::take_signals()?;
    let connection = ask(stream, request)?;
    let post = Post { container: id, half_closes, ..Post::default() };
    relay::run(connection, &signals, post).map(drop)
}

/// The same from nothing but an end of a socket, in the VM's directory.
pub fn carry_for(socket: OwnedFd, request: &Request, id: &str) -> Result<()> {
    let stream = dial();
    become_streams(socket, &stream.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>())?;
    carry(stream?, request, id, false)
}
