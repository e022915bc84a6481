//! What a container shares with others of the VM: their namespaces, entered on the way to its own.
//!
//! In: a planned container, those that are there. Out: descriptors, and a clone that is in the right pid namespace. Must
//! not: leave pid 1 in another's.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use a3s_box_proto as proto;
use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::{Container, State, user};
use crate::process::{self, Side};

/// Descriptors of what is shared.
#[derive(Default)]
pub struct Shared {
    /// A process whose namespaces of these kinds they are.
    namespaces: Option<(OwnedFd, CloneFlags)>,
    /// One whose pid namespace it is.
    pid: Option<OwnedFd>,
    /// The user namespace.
    pub user: Option<OwnedFd>,
}

impl Shared {
    /// Opens what `spec` shares.
    pub fn open(spec: &proto::Container, others: &HashMap<String, Container>) -> Result<Self> {
        let Some(wanted) = &spec.shared else { return Ok(Shared::default()) };
        let find = |id: &String| match others.get(id) {
            Some(other) if !matches!(other.state, State::Stopped | State::Creating) => Ok(other),
            _ => bail!("container {id}, with which this one shares namespaces, is not there"),
        };
        let duplicate = |fd: &OwnedFd| fd.try_clone().context("namespaces");
        let other = find(&wanted.with)?;
        let kinds = [
            (wanted.network, CloneFlags::CLONE_NEWNET),
            (wanted.ipc, CloneFlags::CLONE_NEWIPC),
            (wanted.uts, CloneFlags::CLONE_NEWUTS),
        ];
        let flags = kinds
            .iter()
            .filter(|(shared, _)| *shared)
            .fold(CloneFlags::empty(), |all, (_, flag)| all | *flag);
        let user = other.user.as_ref().filter(|_| wanted.user);
        Ok(Shared {
            namespaces: if flags.is_empty() { None } else { Some((duplicate(&other.pidfd)?, flags)) },
            pid: wanted.pid.as_ref().map(|id| duplicate(&find(id)?.pidfd)).transpose()?,
            user: user.map(duplicate).transpose()?,
        })
    }

    /// Whether the container's processes live among another's.
    pub fn has_pid(&self) -> bool {
        self.pid.is_some()
    }

    /// Clones a process with the namespaces of its own that it does not share; `owned` says whether those that may
    /// belong to a user namespace are made here as well.
    pub fn fork(&self, owned: bool) -> Result<Side> {
        let shared = self.namespaces.as_ref().map_or(0, |(_, flags)| flags.bits());
        let new = libc::CLONE_NEWNS | if owned { user::OWNED & !shared } else { 0 };
        let Some(pid) = &self.pid else { return process::fork(new | libc::CLONE_NEWPID) };
        let own = File::open("/proc/self/ns/pid").context("own pid namespace")?;
        // It takes effect for children alone, so one thread can go there and back.
        setns(pid.as_fd(), CloneFlags::CLONE_NEWPID).context("enter the shared pid namespace")?;
        let forked = process::fork(new);
        if !matches!(forked, Ok(Side::Child)) {
            setns(own, CloneFlags::CLONE_NEWPID).context("leave the shared pid namespace")?;
        }
        forked
    }

    /// Moves the calling process into the shared namespaces.
    pub fn enter(&self) -> Result<()> {
        let Some((pidfd, flags)) = &self.namespaces else { return Ok(()) };
        setns(pidfd, *flags).context("enter the shared namespaces")
    }
}
