//! One connection of the host: frames in, frames out, never blocking.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use a3s_box_proto::{Decoder, Frame, Outcome, Reply, pack};
use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::Pid;

/// A peer that lets this much pile up is not reading; only answers to its own requests can get here.
const MAX_BACKLOG: usize = 8 << 20;

/// A connection and what it owns.
pub struct Connection {
    fd: OwnedFd,
    decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
    /// The process whose streams and exit belong to this connection.
    pub owns: Option<Pid>,
}

impl Connection {
    /// Takes over an accepted, non-blocking socket.
    pub fn new(fd: OwnedFd) -> Self {
        Connection { fd, decoder: Decoder::default(), out: Vec::new(), sent: 0, owns: None }
    }

    /// For poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether output waits for the socket.
    pub fn has_output(&self) -> bool {
        self.sent < self.out.len()
    }

    /// Reads what is there. False means that the peer is gone.
    pub fn receive(&mut self) -> Result<bool> {
        let mut buffer = [0u8; 64 << 10];
        match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE) => Ok(false),
            Ok(n) => {
                self.decoder.push(&buffer[..n]);
                Ok(true)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(true),
            Err(errno) => bail!("receive: {errno}"),
        }
    }

    /// The next whole frame received.
    pub fn next_frame(&mut self) -> Result<Option<Frame>> {
        Ok(self.decoder.next_frame()?)
    }

    /// Queues a frame.
    pub fn push(&mut self, frame: &Frame) {
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        frame.encode(&mut self.out);
    }

    /// Queues a message. One that is too long becomes a failure that says so.
    pub fn reply(&mut self, reply: &Reply) {
        match pack(reply) {
            Ok(frame) => self.push(&frame),
            Err(text) => {
                if let Ok(frame) = pack(&Reply::Outcome(Outcome::Failed { text })) {
                    self.push(&frame);
                }
            }
        }
    }

    /// Writes what the socket takes. An error means that the peer is gone or does not read.
    pub fn flush(&mut self) -> Result<()> {
        while self.has_output() {
            match send(self.fd.as_raw_fd(), &self.out[self.sent..], MsgFlags::MSG_NOSIGNAL) {
                Ok(n) => self.sent += n,
                Err(Errno::EAGAIN) if self.out.len() - self.sent < MAX_BACKLOG => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => bail!("send: {errno}"),
            }
        }
        Ok(())
    }
}
