//! Connecting for somebody else: with the ids of a process in the guest.
//!
//! In: a path in the container's view, a peer. Out: a connected socket, or a datagram sent. Must not: resolve a path
//! twice, or as anybody but the peer.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use a3s_box_mount::{OFlags, Root};
use a3s_box_proto::Request;
use a3s_box_proto::sockets::Peer;
use anyhow::{Context, Result};
use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, connect, sendmsg, socket,
};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid, setgroups, setresgid, setresuid};

use super::look::address;
use crate::{courier, jail};

/// Where paths start, and what its processes stand on.
pub struct Ground {
    /// The container's root.
    pub root: Root,
    /// See [`super::Bound`].
    pub proc: OwnedFd,
    /// The VM's directory.
    pub vm: OwnedFd,
    /// See [`super::Bound`].
    pub overrides: bool,
}

impl Ground {
    /// Whether the peer may use what belongs to others, as far as its kernel lets it.
    fn may_override(&self, peer: &Peer) -> bool {
        self.overrides && peer.uid == 0
    }

    /// As `O_PATH`; no link at the end is followed.
    fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let opened = self.root.open_as(path, OFlags::PATH | OFlags::NOFOLLOW);
        opened.map_err(|errno| Errno::from_raw(errno.raw_os_error()))
    }

    /// A process's whole life: goes on with one client.
    pub fn serve(&self, path: &Path, peer: &Peer, client: u64, id: &str) -> Result<()> {
        nix::unistd::fchdir(&self.vm).context("enter the VM's directory")?;
        let stream = courier::dial()?;
        self.become_peer(peer)?;
        let socket = self.connect(path)?;
        jail::drop_privileges()?;
        courier::become_streams(socket, &[stream.as_raw_fd()])?;
        courier::carry(stream, &Request::Accept { container: id.to_string(), client }, id, true)
    }

    /// For good.
    fn become_peer(&self, peer: &Peer) -> Result<()> {
        let may_override = self.may_override(peer);
        setgroups(&groups(peer)).context("supplementary groups")?;
        let (uid, gid) = (Uid::from_raw(peer.uid), Gid::from_raw(peer.gid));
        setresgid(gid, gid, gid).context("group")?;
        setresuid(uid, uid, uid).context("user")?;
        if !may_override {
            caps::clear(None, CapSet::Effective).context("capabilities")?;
        }
        Ok(())
    }

    fn connect(&self, path: &Path) -> Result<OwnedFd> {
        let file = self.open(path)?;
        let own = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        connect(own.as_raw_fd(), &address(self.proc.as_fd(), &file)?)?;
        Ok(own)
    }

    /// Sends a datagram that tells of the peer's user and group, without waiting.
    pub fn send(&self, path: &Path, peer: &Peer, bytes: &[u8]) -> Result<(), Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let own = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        let credentials = libc::ucred { pid: std::process::id() as i32, uid: peer.uid, gid: peer.gid };
        let credentials = credentials.into();
        let control = [ControlMessage::ScmCredentials(&credentials)];
        self.as_peer(peer, || {
            let file = self.open(path)?;
            let address = address(self.proc.as_fd(), &file)?;
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            sendmsg(own.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, Some(&address)).map(drop)
        })
    }

    /// Does something with the rights of the peer's ids, and comes back.
    fn as_peer(&self, peer: &Peer, act: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        const OVERRIDE: Capability = Capability::CAP_DAC_OVERRIDE;
        // The kernel takes it from, and gives it back to, a user id of the file system's that is not 0.
        let set_override = |on: bool| {
            let set = if on { caps::raise } else { caps::drop };
            set(None, CapSet::Effective, OVERRIDE).map_err(|_| Errno::EPERM)
        };
        let (uid, gid) = (Uid::from_raw(peer.uid), Gid::from_raw(peer.gid));
        let become_peer = || {
            setgroups(&groups(peer))?;
            setfsgid(gid);
            setfsuid(uid);
            // They fail by staying what they were.
            let nobody = (Uid::from_raw(u32::MAX), Gid::from_raw(u32::MAX));
            if (setfsuid(nobody.0), setfsgid(nobody.1)) != (uid, gid) {
                return Err(Errno::EPERM);
            }
            if self.may_override(peer) { Ok(()) } else { set_override(false) }
        };
        let done = become_peer().and_then(|()| act());
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
        if set_override(true).is_err() {
            courier::leave(1);
        }
        done
    }
}

fn groups(peer: &Peer) -> Vec<Gid> {
    peer.groups.iter().map(|group| Gid::from_raw(*group)).collect()
}
