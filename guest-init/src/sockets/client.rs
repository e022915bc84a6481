//! Who uses a socket, and what becomes of them.
//!
//! In: a listening or datagram socket. Out: clients and datagrams with the ids that the kernel vouches for; a process for
//! each client that the host goes on with. Must not: read a byte of a client's before that.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use a3s_box_proto::sockets::{Event, MAX_DATAGRAM, MAX_GROUPS, Peer};
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockFlag, UnixCredentials, accept4, getsockopt, recvmsg, sockopt,
};

use super::fd_of;
use crate::container::Born;
use crate::process::{self, copy, leave, own};

/// Clients that wait for the host at once; more wait in the listeners' queues.
const MOST: usize = 64;

/// What came to a socket.
pub enum Heard {
    /// A client by its number.
    Client(u64, Peer),
    /// A datagram.
    Datagram(Peer, Vec<u8>),
}

impl Heard {
    /// As the host is told.
    pub fn into_event(self, socket: u32) -> Event {
        match self {
            Heard::Client(client, peer) => Event::Client { socket, client, peer },
            Heard::Datagram(peer, bytes) => Event::Datagram { socket, peer, bytes },
        }
    }
}

/// Clients that wait for the host.
#[derive(Default)]
pub struct Clients {
    waiting: HashMap<u64, OwnedFd>,
    next: u32,
}

impl Clients {
    /// Whether no more can be accepted.
    pub fn are_many(&self) -> bool {
        self.waiting.len() >= MOST
    }

    /// The next client of a listener.
    pub fn accept(&mut self, listener: BorrowedFd<'_>) -> Option<Heard> {
        loop {
            let fd = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                accepted => accepted.ok()?,
            };
            // SAFETY: accept4 just gave this descriptor to us.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let Ok(who) = getsockopt(&fd, sockopt::PeerCredentials) else { continue };
            let peer = Peer { uid: who.uid(), gid: who.gid(), groups: groups_of_peer(&fd) };
            let client = u64::from(self.next) << 32 | fd.as_raw_fd() as u64;
            self.next = self.next.wrapping_add(1);
            self.waiting.insert(client, fd);
            return Some(Heard::Client(client, peer));
        }
    }

    /// Forgets one: somebody else has it, or it is hung up on.
    pub fn forget(&mut self, client: u64) {
        self.waiting.remove(&client);
    }
}

/// Supplementary groups of whoever is at the other end, as of its connect(2).
fn groups_of_peer(fd: &OwnedFd) -> Vec<u32> {
    let mut groups = [0u32; MAX_GROUPS];
    let mut size = size_of_val(&groups) as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes, and says how many.
    let result = unsafe {
        let value = groups.as_mut_ptr().cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS, value, &raw mut size)
    };
    let count = if result == 0 { size as usize / size_of::<u32>() } else { 0 };
    groups[..count.min(MAX_GROUPS)].to_vec()
}

/// The next datagram at a socket. Descriptors that came along are closed: they cannot cross.
pub fn datagram(socket: BorrowedFd<'_>) -> Option<Heard> {
    let mut bytes = vec![0; MAX_DATAGRAM];
    let (count, who) = loop {
        let mut space = nix::cmsg_space!(UnixCredentials, [std::os::fd::RawFd; 253]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(Errno::EINTR) => continue,
            message => message.ok()?,
        };
        let mut who = None;
        for control in message.cmsgs().ok()? {
            match control {
                ControlMessageOwned::ScmCredentials(credentials) => who = Some(credentials),
                ControlMessageOwned::ScmRights(fds) => {
                    for fd in fds {
                        // SAFETY: the kernel just installed this descriptor for us.
                        drop(unsafe { OwnedFd::from_raw_fd(fd) });
                    }
                }
                _ => {}
            }
        }
        break (message.bytes, who);
    };
    bytes.truncate(count);
    let peer = who.map(|who| Peer { uid: who.uid(), gid: who.gid(), groups: groups_of(who.pid()) });
    Some(Heard::Datagram(peer.unwrap_or(NOBODY), bytes))
}

/// Whom the kernel does not vouch for.
const NOBODY: Peer = Peer { uid: 65_534, gid: 65_534, groups: Vec::new() };

/// Supplementary groups of a process; none where it has ended since.
fn groups_of(pid: i32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    line.split_whitespace().filter_map(|group| group.parse().ok()).take(MAX_GROUPS).collect()
}

/// Takes a client's descriptor from the process that holds it.
pub fn take(process: BorrowedFd<'_>, client: u64) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes plain numbers and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd_of(client), 0) };
    let fd = Errno::result(fd)? as i32;
    // SAFETY: the kernel just gave this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Clones a process that copies its own streams to a client and back.
pub fn serve(client: OwnedFd) -> Result<Born> {
    let attempt = |kept: Vec<OwnedFd>| {
        let stream = UnixStream::from(kept.into_iter().next().context("the client")?);
        let other = stream.try_clone().context("the client")?;
        Ok((stream, other))
    };
    process::bear(vec![client], attempt, |(mut stream, mut other)| {
        std::thread::spawn(move || {
            if copy(&mut *own(0), &mut stream).is_err() {
                leave(0);
            }
            let _ = stream.shutdown(Shutdown::Write);
        });
        if copy(&mut other, &mut *own(1)).is_ok() {
            // SAFETY: nobody writes there any more; the host's end reads end-of-file.
            unsafe { libc::close(1) };
            // It is over once the client has hung up, or neither side has anything more to say.
            let _ = poll(&mut [PollFd::new(other.as_fd(), PollFlags::empty())], PollTimeout::NONE);
        }
    })
}
