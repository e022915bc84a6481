//! Sockets of the host's among a container's bind mounts.
//!
//! A process of its own, in the monitor's pid namespace, looks for them, tells the guest where they are, and for each
//! client there bears a relay that connects to the socket with the client's ids: as far as the host's kernel lets those.
//! In: places in the container's own view. Out: bytes both ways. Must not: connect to anything that the container could
//! not have named, or read of the guest's what it has not cut into numbers first.

mod look;
mod peer;
mod porter;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_mount::file_system;
use a3s_box_proto as proto;
use anyhow::{Context, Result, bail};
use caps::Capability;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use crate::courier;

/// How long the guest may take until sockets are in their places.
const BEGIN: Duration = Duration::from_secs(20);
/// How long what a container has sent before its end may take to arrive.
const DRAIN: Duration = Duration::from_secs(1);

/// What is prepared before the caller's root is the container's.
pub struct Bound {
    places: Vec<PathBuf>,
    id: String,
    /// Whether the container's root may use sockets that are not its own.
    overrides: bool,
    /// procfs of the pid namespace, attached nowhere: the one way to connect to a file that was looked at.
    proc: OwnedFd,
    null: File,
    /// The VM's directory.
    vm: OwnedFd,
}

impl Bound {
    /// `None` where the container cannot meet a socket.
    pub fn new(places: Vec<PathBuf>, guest: &proto::Container, vm_dir: &Path) -> Result<Option<Self>> {
        if places.is_empty() || guest.idle {
            return Ok(None);
        }
        let bounding = guest.process.capabilities.bounding;
        Ok(Some(Bound {
            places,
            id: guest.id.clone(),
            overrides: bounding >> Capability::CAP_DAC_OVERRIDE.index() & 1 != 0,
            proc: file_system("proc", "proc", &[], libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)?,
            null: File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?,
            vm: File::open(vm_dir).context("open the VM's directory")?.into(),
        }))
    }
}

/// The monitor's hold on the process.
pub struct Sockets(OwnedFd);

impl Sockets {
    /// Clones it, from a monitor whose root is the container's.
    pub fn spawn(bound: Bound) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .context("socketpair")?;
        courier::bear(|| porter::live(bound, theirs))?;
        Ok(Sockets(ours))
    }

    /// The guest has the container: returns once the sockets that there are can be connected to.
    pub fn begin(&self) -> Result<()> {
        let answer = self.ask(BEGIN).context("sockets of bind mounts")?;
        if answer.is_empty() { Ok(()) } else { bail!("sockets of bind mounts: {answer}") }
    }

    /// The container's process has ended: waits, but not for long, until what it has sent is delivered.
    pub fn drain(&self) {
        let _ = self.ask(DRAIN);
    }

    fn ask(&self, wait: Duration) -> Result<String> {
        send(self.0.as_raw_fd(), b"n", MsgFlags::MSG_NOSIGNAL).context("its process has ended")?;
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            bail!("no answer within {} s", wait.as_secs());
        }
        let mut answer = [0; 4096];
        match recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())? {
            0 => bail!("its process has ended"),
            count => Ok(crate::guest::clean(&String::from_utf8_lossy(&answer[1..count]))),
        }
    }
}
