//! ID-mapped mounts: a mapping becomes a user namespace for as long as it takes to put it on a mount.
//!
//! In: a detached mount. Out: the same, its owners mapped. Must not: leave a process behind.

use std::fs::{self, File};
use std::os::fd::AsFd;

use a3s_box_mount::map_ids;
use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::plan::mounts::IdMap;
use crate::vmm;

/// Maps a mount's owners.
pub fn apply(mount: impl AsFd, map: &IdMap) -> Result<()> {
    let namespace = user_namespace(map)?;
    map_ids(mount, namespace, map.recursive).map_err(|error| match error.raw_os_error() {
        // overlayfs, NFS, 9p and FUSE among others.
        Some(libc::EINVAL) => anyhow!("the source's file system does not let its owners be mapped"),
        _ => anyhow::Error::from(error).context("map owners"),
    })
}

fn user_namespace(map: &IdMap) -> Result<File> {
    let child = Child::clone()?;
    let proc = format!("/proc/{}", child.pid_in_proc()?);
    for (name, lines) in [("uid_map", &map.uids), ("gid_map", &map.gids)] {
        fs::write(format!("{proc}/{name}"), lines)
            .with_context(|| format!("{name} {:?}", lines.trim_end().replace('\n', ", ")))?;
    }
    File::open(format!("{proc}/ns/user")).context("open the user namespace")
}

/// A process that only holds a new user namespace, and ends with this.
struct Child {
    pid: Pid,
    pidfd: std::os::fd::OwnedFd,
}

impl Child {
    fn clone() -> Result<Self> {
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        // SAFETY: without CLONE_VM and with no stack given, clone is fork; this process has one thread.
        let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })
            .context("clone a user namespace")?;
        if pid == 0 {
            loop {
                // SAFETY: it takes nothing and touches nothing.
                unsafe { libc::pause() };
            }
        }
        Ok(Child { pid: Pid::from_raw(pid as i32), pidfd: vmm::pidfd_open(pid as i32)? })
    }

    /// As the procfs at /proc numbers it, which may be that of a parent pid namespace.
    fn pid_in_proc(&self) -> Result<i32> {
        crate::monitor::pid_of(&self.pidfd).context("find the user namespace's process")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        vmm::kill(self.pidfd.as_fd());
        let _ = waitpid(self.pid, None);
    }
}
