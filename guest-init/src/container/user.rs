//! A container's user namespace, and the namespaces that belong to it.
//!
//! Ids were mapped on the host: here each is itself, and what is not mapped does not exist. A short-lived child brings
//! the namespaces about, so that the container is still built with pid 1's privileges and enters last. In: ranges of
//! ids. Out: descriptors. Must not: be what the container's mounts belong to.

use std::fs::{self, File};
use std::os::fd::OwnedFd;

use a3s_box_proto::UserNamespace;
use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Pid, pipe2, read};

use crate::process::{Side, fork, leave};

/// Namespaces that belong to the user namespace, which decides who may configure them.
pub const OWNED: libc::c_int = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// A user namespace and what belongs to it.
pub struct User {
    /// The namespace itself.
    pub fd: OwnedFd,
    owned: Vec<(CloneFlags, OwnedFd)>,
}

impl User {
    /// Makes the namespaces.
    pub fn create(spec: &UserNamespace) -> Result<Self> {
        let (held, hold) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
        let Side::Parent(child) = fork(libc::CLONE_NEWUSER | OWNED).context("user namespace")? else {
            drop(hold);
            let _ = read(&held, &mut [0]);
            leave(0)
        };
        let user = Self::of(child, spec).context("user namespace");
        drop(hold);
        let _ = nix::sys::wait::waitpid(child, None);
        user
    }

    fn of(child: Pid, spec: &UserNamespace) -> Result<Self> {
        for (file, ranges) in [("uid_map", &spec.uids), ("gid_map", &spec.gids)] {
            let map: String =
                ranges.iter().map(|(first, count)| format!("{first} {first} {count}\n")).collect();
            fs::write(format!("/proc/{child}/{file}"), map).context(file)?;
        }
        let open = |name: &str| -> Result<OwnedFd> {
            Ok(File::open(format!("/proc/{child}/ns/{name}")).context(name.to_string())?.into())
        };
        let owned = vec![
            (CloneFlags::CLONE_NEWNET, open("net")?),
            (CloneFlags::CLONE_NEWIPC, open("ipc")?),
            (CloneFlags::CLONE_NEWUTS, open("uts")?),
        ];
        Ok(User { fd: open("user")?, owned })
    }

    /// Moves the calling process into what belongs to the namespace.
    pub fn enter_owned(&self) -> Result<()> {
        self.owned.iter().try_for_each(|(flag, fd)| setns(fd, *flag)).context("enter the new namespaces")
    }
}
