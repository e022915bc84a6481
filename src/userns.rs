//! A container's user namespace on the host: ids are mapped once, here.
//!
//! A short-lived child makes or joins it together with the namespaces that belong to it; descriptors are all that stays.
//! The monitor and the VMM build with the caller's privileges, whose mounts no process in the namespace has a say in,
//! and enter last. The guest sees ids as they are inside. In: planned namespaces. Out: descriptors, the ids of its root.
//! Must not: have more than one thread when it clones or enters.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};

use a3s_box_proto as proto;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Pid, Uid, pipe2};

use crate::plan::{IdMap, Namespace, Namespaces};

/// Which user a host's id 0 is inside, by the host's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Root {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Whether the caller is root of the whole host: no other user, and not the root of a user namespace.
pub fn is_hosts_root() -> bool {
    nix::unistd::geteuid().is_root() && is_first()
}

/// Whether this is the user namespace that the host began with.
fn is_first() -> bool {
    use std::os::unix::fs::MetadataExt;
    // Linux, include/linux/proc_ns.h: PROC_USER_INIT_INO
    fs::metadata("/proc/self/ns/user").is_ok_and(|namespace| namespace.ino() == 0xEFFF_FFFD)
}

/// A user namespace and what was made in it.
pub struct UserNamespace {
    /// The namespace itself.
    pub fd: OwnedFd,
    /// New namespaces that belong to it.
    pub owned: Vec<(CloneFlags, OwnedFd)>,
    /// Its root.
    pub root: Root,
    /// Mapped user ids.
    pub uids: Vec<IdMap>,
    /// Mapped group ids.
    pub gids: Vec<IdMap>,
}

impl UserNamespace {
    /// Makes or joins what was planned; `None` for the caller's own namespace.
    pub fn open(planned: &Namespaces) -> Result<Option<Self>> {
        let shown = || "linux.namespaces: user namespace";
        let joined = match &planned.user {
            Namespace::Inherit => return Ok(None),
            Namespace::New => None,
            Namespace::Join(path) => {
                Some(File::open(path).with_context(|| format!("{} {}", shown(), path.display()))?)
            }
        };
        let mut owned = CloneFlags::empty();
        for (namespace, flag, _) in planned.owned() {
            if *namespace == Namespace::New {
                owned |= flag;
            }
        }
        let (told, tell) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
        let (held, hold) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
        let new = if joined.is_none() { owned | CloneFlags::CLONE_NEWUSER } else { CloneFlags::empty() };
        // SAFETY: without CLONE_VM and with no stack given, clone is fork; this process has one thread.
        let pid = unsafe { libc::syscall(libc::SYS_clone, new.bits() | libc::SIGCHLD, 0, 0, 0, 0) };
        let pid = match Errno::result(pid).with_context(shown)? {
            0 => {
                drop(hold);
                wait_inside(joined, owned, &tell, &held)
            }
            pid => Pid::from_raw(pid as i32),
        };
        drop((tell, held));
        let opened = is_inside(&told).and_then(|()| Self::of(pid, planned, owned));
        drop(hold);
        let _ = waitpid(pid, None);
        opened.map(Some).with_context(shown)
    }

    /// What the guest is told: its ids are the inner ones.
    pub fn for_guest(&self) -> proto::UserNamespace {
        let ranges = |map: &[IdMap]| map.iter().map(|range| (range.inside, range.count)).collect();
        proto::UserNamespace { uids: ranges(&self.uids), gids: ranges(&self.gids) }
    }

    /// Takes hold of what the child lives in, mapping ids where it is new.
    fn of(child: Pid, planned: &Namespaces, owned: CloneFlags) -> Result<Self> {
        if planned.user == Namespace::New {
            for (file, map) in [("uid_map", &planned.uids), ("gid_map", &planned.gids)] {
                let text: String =
                    map.iter().map(|m| format!("{} {} {}\n", m.inside, m.outside, m.count)).collect();
                fs::write(format!("/proc/{child}/{file}"), text)
                    .with_context(|| format!("map ids ({file} {map:?})"))?;
            }
        }
        let uids = read_map(child, "uid_map")?;
        let gids = read_map(child, "gid_map")?;
        let (Some(uid), Some(gid)) = (outside(&uids, 0), outside(&gids, 0)) else {
            bail!("id 0 is not mapped, and nobody else could set the container up");
        };
        let open = |name: &str| File::open(format!("/proc/{child}/ns/{name}")).map(OwnedFd::from);
        let mut fds = Vec::new();
        for (_, flag, name) in planned.owned().into_iter().filter(|(_, flag, _)| owned.contains(*flag)) {
            fds.push((flag, open(name).with_context(|| format!("{name} namespace"))?));
        }
        Ok(UserNamespace { fd: open("user")?, owned: fds, root: Root { uid, gid }, uids, gids })
    }
}

/// The child's life: it enters what is joined, says so, and stays until it was looked at.
fn wait_inside(joined: Option<File>, owned: CloneFlags, tell: &OwnedFd, held: &OwnedFd) -> ! {
    let entered = match joined {
        Some(fd) => setns(fd, CloneFlags::CLONE_NEWUSER).and_then(|()| unshare(owned)),
        None => Ok(()),
    };
    let errno = entered.err().map_or(0, |errno| errno as i32);
    let _ = nix::unistd::write(tell, &errno.to_ne_bytes());
    let _ = nix::unistd::read(held, &mut [0]);
    // SAFETY: _exit takes any status and does not return.
    unsafe { libc::_exit(0) }
}

fn is_inside(told: &OwnedFd) -> Result<()> {
    let mut bytes = [0; 4];
    match nix::unistd::read(told, &mut bytes).context("pipe")? {
        4 if bytes == [0; 4] => Ok(()),
        4 => Err(std::io::Error::from_raw_os_error(i32::from_ne_bytes(bytes)).into()),
        _ => bail!("the process that makes it ended early"),
    }
}

fn read_map(child: Pid, file: &str) -> Result<Vec<IdMap>> {
    let text = fs::read_to_string(format!("/proc/{child}/{file}")).context(file.to_string())?;
    let map = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(IdMap { inside: next()?, outside: next()?, count: next()? })
    };
    text.lines().map(map).collect::<Option<_>>().with_context(|| format!("{file}: {text:?}"))
}

fn outside(map: &[IdMap], inside: u32) -> Option<u32> {
    map.iter().find_map(|range| {
        let offset = inside.checked_sub(range.inside).filter(|offset| *offset < range.count)?;
        range.outside.checked_add(offset)
    })
}

/// Makes the calling process the root of a user namespace and nobody outside it. With `keep_groups`, what its groups may
/// open it still may.
pub fn enter(fd: impl AsFd, keep_groups: bool) -> Result<()> {
    let shown = || "enter the user namespace";
    setns(fd, CloneFlags::CLONE_NEWUSER).with_context(shown)?;
    if !keep_groups {
        nix::unistd::setgroups(&[]).with_context(shown)?;
    }
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    nix::unistd::setresgid(gid, gid, gid).with_context(shown)?;
    nix::unistd::setresuid(uid, uid, uid).with_context(shown)
}

/// Makes files as their owner-to-be would.
pub fn as_root_of<T>(root: Option<Root>, act: impl FnOnce() -> Result<T>) -> Result<T> {
    use nix::unistd::{setfsgid, setfsuid};
    let Some(Root { uid, gid }) = root else { return act() };
    let (own_gid, own_uid) = (setfsgid(Gid::from_raw(gid)), setfsuid(Uid::from_raw(uid)));
    // As root inside could: engines' root directories often have a mode of 0555.
    let _ = caps::raise(None, caps::CapSet::Effective, caps::Capability::CAP_DAC_OVERRIDE);
    let result = act();
    setfsuid(own_uid);
    setfsgid(own_gid);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_looked_up_in_every_range() {
        let map =
            [IdMap { inside: 5, outside: 1000, count: 1 }, IdMap { inside: 0, outside: 100_000, count: 5 }];
        assert_eq!(outside(&map, 0), Some(100_000));
        assert_eq!(outside(&map, 4), Some(100_004));
        assert_eq!(outside(&map, 5), Some(1000));
        assert_eq!(outside(&map, 6), None);
        let all = [IdMap { inside: 0, outside: 0, count: u32::MAX }];
        assert_eq!(outside(&all, u32::MAX - 1), Some(u32::MAX - 1));
    }
}
