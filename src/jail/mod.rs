//! What the long-lived processes may see and do.
//!
//! The vmm's root holds the exported tree, its own socket directory and the few nodes that libkrun opens; a guest that
//! breaks out lands there. Monitors and exec relays give up every privilege before the first byte from a guest.

#[cfg(test)]
mod attack;
mod idmap;
pub mod label;
pub mod landlock;
pub mod seccomp;
mod source;
pub mod tree;

use std::collections::HashSet;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use a3s_box_mount::{
    Kind, Root, attach, clone_tree, clone_tree_at, errno_words, file_system, open_path, set_attributes,
};
use anyhow::{Context, Result, anyhow};
use caps::{CapSet, Capability};
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, chownat, mkdirat, mknodat};
use rustix::io::Errno;

use tree::Export;

use crate::plan::{MEMBERS, exported};
use crate::userns;

/// Paths inside the vmm's jail.
pub const EXPORT: &str = "/export";
/// The VM's directory: control socket and console.
pub const RUN: &str = "/run";

/// The vmm's future root, built while the host's is still there.
pub struct Jail {
    root: OwnedFd,
    /// Whether its device nodes were made for it.
    pub has_own_nodes: bool,
}

impl Jail {
    /// Makes the root on `anchor`, a directory that it hides; the caller's mount namespace is its own.
    /// `run` becomes [`RUN`], each of `devices` is there at its own path: as the host's, or for a user namespace as a
    /// node that belongs to its `owner`.
    pub fn build(anchor: &Path, run: &Path, devices: &[&str], owner: Option<userns::Root>) -> Result<Self> {
        make_private()?;
        let options = ["mode=0755".into(), "size=1m".into(), "nr_inodes=4096".into()];
        let base = file_system("tmpfs", "jail", &options, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)?;
        let open =
            |path: &Path| open_path(path).map_err(|e| anyhow!("{}: {}", path.display(), errno_words(e)));
        let run = clone_tree(open(run)?, false).context("the VM's directory")?;
        attach(&base, open(anchor)?).context("attach the jail's root")?;
        nix::unistd::fchdir(&base).context("enter the jail's root")?;
        let root = Root::current_dir()?;
        // The guest's root: mount points for its own file systems, and a place for each container.
        for dir in ["export/dev", "export/proc", "export/shm", "export/sys", "export/tmp"] {
            root.place(Path::new(dir), Kind::Directory)?;
        }
        for number in 0..=MEMBERS {
            let place = Path::new("export").join(exported(number));
            mkdirat(&base, place, Mode::from_raw_mode(0o755)).context("make a container's place")?;
        }
        attach(run, root.place(Path::new(RUN), Kind::Directory)?)?;
        // libkrun reopens files by /proc/self/fd; no other part of procfs is needed or wanted.
        bind(&root, "/proc/self/fd", Kind::Directory)?;
        let nodes = match owner {
            Some(owner) => own_nodes(&root, devices, owner)?,
            None => None,
        };
        let has_own_nodes = nodes.is_some();
        for (device, node) in devices.iter().zip(nodes.into_iter().flatten()) {
            attach(node, root.place(Path::new(device), Kind::File)?).with_context(|| device.to_string())?;
        }
        for device in devices.iter().filter(|_| !has_own_nodes) {
            bind(&root, device, Kind::File)?;
        }
        Ok(Jail { root: base, has_own_nodes })
    }

    /// Attaches a container's mounts below the exported tree.
    pub fn attach(&self, exports: Vec<Export>) -> Result<()> {
        let root = Root::current_dir()?;
        for export in exports {
            let kind = if export.is_dir { Kind::Directory } else { Kind::File };
            let path = Path::new(EXPORT).join(exported(0)).join(&export.place);
            attach(export.mount, root.place(&path, kind)?)
                .with_context(|| format!("export {}", path.display()))?;
        }
        Ok(())
    }

    /// Makes it the root, read-only, with nothing else of the host in reach.
    pub fn enter(self) -> Result<Self> {
        nix::unistd::fchdir(&self.root).context("enter the jail's root")?;
        nix::unistd::pivot_root(".", ".").context("pivot_root")?;
        umount2(".", MntFlags::MNT_DETACH).context("detach the host's root")?;
        std::env::set_current_dir("/").context("enter the jail")?;
        let root = open_path(Path::new("/")).map_err(|e| anyhow!("open the jail's root: {e}"))?;
        set_attributes(root, libc::MOUNT_ATTR_RDONLY, false)?;
        Ok(self)
    }
}

/// Nodes like the host's on a file system of their own, which no directory shows; `None` for a caller who may not make
/// any, being in a user namespace already.
fn own_nodes(root: &Root, devices: &[&str], owner: userns::Root) -> Result<Option<Vec<OwnedFd>>> {
    let options = ["mode=0700".into(), "size=64k".into()];
    let base = file_system("tmpfs", "devices", &options, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC)?;
    // The kernel clones attached mounts only.
    attach(&base, root.place(Path::new("dev"), Kind::Directory)?).context("device nodes")?;
    let mut nodes = Vec::new();
    for (name, device) in devices.iter().enumerate() {
        let (name, mode) = (name.to_string(), Mode::from_raw_mode(0o600));
        let number = rustix::fs::stat(*device).with_context(|| device.to_string())?.st_rdev;
        match mknodat(&base, &*name, FileType::CharacterDevice, mode, number) {
            Err(Errno::PERM) => break,
            made => made.with_context(|| format!("make a node for {device}"))?,
        }
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        chownat(&base, &*name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .context("give a node away")?;
        nodes.push(clone_tree_at(&base, Path::new(&name), false)?);
    }
    umount2("dev", MntFlags::MNT_DETACH).context("hide the device nodes")?;
    Ok((nodes.len() == devices.len()).then_some(nodes))
}

fn bind(root: &Root, path: &str, kind: Kind) -> Result<()> {
    let source = open_path(Path::new(path)).map_err(|e| anyhow!("{path}: {}", errno_words(e)))?;
    let place = root.place(Path::new(path), kind)?;
    clone_tree(source, false).and_then(|tree| attach(tree, place)).with_context(|| format!("bind {path}"))
}

/// Keeps mounts made from here on to this namespace.
pub fn make_private() -> Result<()> {
    propagate(MsFlags::MS_PRIVATE)
}

/// The same, but what the host mounts still arrives, so that copies of its mounts can follow them.
pub fn make_slave() -> Result<()> {
    propagate(MsFlags::MS_SLAVE)
}

fn propagate(flags: MsFlags) -> Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | flags, None::<&str>)
        .context("keep mounts to this namespace")
}

/// Closes every descriptor from 3 up that is not listed. For a process that was cloned and goes on without exec:
/// what its parent held (locks above all) must not live on in it.
pub fn keep_only(wanted: &[RawFd]) {
    let wanted: HashSet<RawFd> = wanted.iter().copied().collect();
    let mut kept: Vec<RawFd> = wanted.into_iter().filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept.into_iter().map(|fd| fd as u32).chain([u32::MAX]) {
        if fd > first {
            // SAFETY: the owners of these numbers live in code of the parent's that this process never returns to.
            unsafe { libc::close_range(first, if fd == u32::MAX { fd } else { fd - 1 }, 0) };
        }
        first = fd.saturating_add(1);
    }
}

/// Limits of a VMM: high where libkrun needs them (a descriptor for every inode the guest knows, locked memory for
/// KVM), none of its memory in a core dump.
pub fn set_limits() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // Where guest-init is a process of this host, it and its workloads inherit this and could not raise it again.
    if !cfg!(feature = "local-guest") {
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    }
    let most_files =
        std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    for (resource, most) in
        [(Resource::RLIMIT_NOFILE, most_files), (Resource::RLIMIT_MEMLOCK, Some(libc::RLIM_INFINITY))]
    {
        let highest = most.is_some_and(|most| setrlimit(resource, most, most).is_ok());
        if let (false, Ok((_, hard))) = (highest, getrlimit(resource)) {
            // The hard limit is as far as it goes without privilege.
            let _ = setrlimit(resource, hard, hard);
        }
    }
}

/// Gives up capabilities and the way to new ones.
pub fn drop_privileges() -> Result<()> {
    drop_privileges_but(&[])
}

/// The same, but for those of these capabilities that it has.
pub fn drop_privileges_but(kept: &[Capability]) -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("no_new_privs")?;
    let supported = caps::runtime::thread_all_supported();
    // Without CAP_SETPCAP the bounding set stays, and means nothing: no_new_privs bars every gain.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        for capability in supported.into_iter().filter(|capability| !kept.contains(capability)) {
            caps::drop(None, CapSet::Bounding, capability).context("drop from the bounding set")?;
        }
    }
    for set in [CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).with_context(|| format!("clear capabilities ({set:?})"))?;
    }
    let held = caps::read(None, CapSet::Permitted).context("read capabilities")?;
    let kept = kept.iter().copied().filter(|capability| held.contains(capability)).collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).with_context(|| format!("set capabilities ({set:?})"))?;
    }
    Ok(())
}

/// What faithful virtiofs needs, each because guests may do this to files of the root file system and its binds:
const VMM: [Capability; 8] = [
    // give files away
    Capability::CAP_CHOWN,
    // reach what belongs to any of its users; its own kernel has checked who may
    Capability::CAP_DAC_OVERRIDE,
    // change modes, times and attributes of files of any user
    Capability::CAP_FOWNER,
    // keep set-id bits that its kernel did not mean to clear
    Capability::CAP_FSETID,
    // make files as any of its groups and users
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    // install programs with file capabilities
    Capability::CAP_SETFCAP,
    // make device nodes, which no mount of the jail lets anybody open
    Capability::CAP_MKNOD,
];

/// Leaves the VMM the capabilities of [`VMM`] alone, and no way to others. Its threads act for guest users by changing
/// their ids, which must not change their capabilities (a user's supplementary groups are not told to virtiofs).
pub fn confine_vmm() -> Result<()> {
    // linux/securebits.h, SECBIT_NO_SETUID_FIXUP
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: prctl with a plain number.
    let set = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP) };
    nix::errno::Errno::result(set).context("secure bits")?;
    // Nobody but root looks into it, nor does it into another VMM of the same user.
    nix::sys::prctl::set_dumpable(false).context("not dumpable")?;
    nix::sys::prctl::set_no_new_privs().context("no_new_privs")?;
    for capability in caps::runtime::thread_all_supported() {
        if !VMM.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).context("drop from the bounding set")?;
        }
    }
    caps::clear(None, CapSet::Ambient).context("clear ambient capabilities")?;
    caps::clear(None, CapSet::Inheritable).context("clear inheritable capabilities")?;
    let wanted = VMM.into_iter().collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &wanted).with_context(|| format!("limit capabilities ({set:?})"))?;
    }
    Ok(())
}

/// System calls of a process that only moves bytes between descriptors it has, and dials the guest.
const RELAY: &[&str] = &[
    "read",
    "write",
    "readv",
    "writev",
    "pread64",
    "pwrite64",
    "lseek",
    "ftruncate",
    "close",
    "poll",
    "ppoll",
    "recvfrom",
    "recvmsg",
    "sendto",
    "sendmsg",
    "shutdown",
    "getsockopt",
    "setsockopt",
    "getpeername",
    "fstat",
    "newfstatat",
    "statx",
    "fcntl",
    "futex",
    "exit",
    "exit_group",
    "wait4",
    "waitid",
    "pidfd_send_signal",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sigaltstack",
    "restart_syscall",
    "mmap",
    "munmap",
    "mremap",
    "mprotect",
    "madvise",
    "brk",
    "getpid",
    "gettid",
    "getuid",
    "geteuid",
    "getrandom",
    "clock_gettime",
    "clock_nanosleep",
    "nanosleep",
    "sched_yield",
    "sched_getaffinity",
    "set_robust_list",
    "rseq",
    "prctl",
    "eventfd2",
];

/// `ioctl` requests of a relay: settings and size of the terminal it has. TIOCSTI would type on the caller's.
const TERMINAL: [libc::Ioctl; 10] = [
    libc::TCGETS,
    libc::TCGETS2,
    libc::TCSETS,
    libc::TCSETS2,
    libc::TCSETSW,
    libc::TCSETSW2,
    libc::TCSETSF,
    libc::TCSETSF2,
    libc::TIOCGWINSZ,
    libc::FIONBIO,
];

/// What a process does besides that finds sockets of the host's for a guest, and bears relays to them.
const PORTER: &[&str] = &[
    // look
    "openat2",
    "getdents64",
    "fchdir",
    "socket",
    "connect",
    // bear
    "socketpair",
    "pidfd_open",
    "signalfd4",
    "dup2",
    "dup3",
    "close_range",
    "seccomp",
    // be somebody else
    "setresuid",
    "setresgid",
    "setgroups",
    "setfsuid",
    "setfsgid",
    "capget",
    "capset",
];

/// Allows [`RELAY`] alone. Before the first byte from the guest: a parser's bug must not be worth much.
/// `more` names system calls that this relay needs besides.
pub fn confine_relay(more: &[&str]) -> Result<()> {
    let thread = libc::CLONE_THREAD as u64;
    confine(more, ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(thread), thread))
}

/// Allows [`RELAY`] and [`PORTER`] alone, processes without namespaces of their own among it.
pub fn confine_porter() -> Result<()> {
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    confine(PORTER, ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(namespaces as u64), 0))
}

fn confine(more: &[&str], clone_flags: ScmpArgCompare) -> Result<()> {
    let mut filter = ScmpFilterContext::new(ScmpAction::Errno(libc::EPERM)).context("seccomp filter")?;
    for name in RELAY.iter().chain(more) {
        if let Ok(syscall) = ScmpSyscall::from_name(name) {
            filter
                .add_rule(ScmpAction::Allow, syscall)
                .with_context(|| format!("seccomp rule for {name}"))?;
        }
    }
    relay_by_arguments(&mut filter)?;
    // clone3's flags lie in memory that a filter cannot see; glibc falls back to clone, whose flags can be seen.
    let clone3 = ScmpSyscall::from_name("clone3").context("seccomp rule for clone3")?;
    filter.add_rule(ScmpAction::Errno(libc::ENOSYS), clone3).context("seccomp rule for clone3")?;
    let clone = ScmpSyscall::from_name("clone").context("seccomp rule for clone")?;
    filter
        .add_rule_conditional(ScmpAction::Allow, clone, &[clone_flags])
        .context("seccomp rule for clone")?;
    filter.load().context("load the seccomp filter")
}

/// Calls of a relay whose arguments decide.
fn relay_by_arguments(filter: &mut ScmpFilterContext) -> Result<()> {
    let is = |argument, value| ScmpArgCompare::new(argument, ScmpCompareOp::Equal, value);
    let requests = TERMINAL.iter().map(|request| ("ioctl", is(1, *request)));
    // raise(3) and abort(3): as root it might signal anybody's processes, without any capability.
    let own = [("tgkill", is(0, std::process::id().into()))];
    for (name, condition) in requests.chain(own) {
        let shown = || format!("seccomp rule for {name}");
        let syscall = ScmpSyscall::from_name(name).with_context(shown)?;
        filter.add_rule_conditional(ScmpAction::Allow, syscall, &[condition]).with_context(shown)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// What a relay's system call fails with, 0 where it does not.
    fn errno(syscall: libc::c_long, arguments: [libc::c_long; 3]) -> i32 {
        // SAFETY: the child makes system calls and allocates, which glibc's fork leaves possible; then it ends.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
                WaitStatus::Exited(_, errno) => errno,
                other => panic!("{other:?}"),
            },
            ForkResult::Child => {
                nix::sys::prctl::set_no_new_privs().unwrap();
                confine_relay(&[]).unwrap();
                let [a, b, c] = arguments;
                // SAFETY: plain numbers, or pointers that the kernel checks; nothing of it is kept.
                let failed = unsafe { libc::syscall(syscall, a, b, c) } < 0;
                // SAFETY: _exit takes any status and does not return.
                unsafe { libc::_exit(if failed { nix::errno::Errno::last_raw() } else { 0 }) }
            }
        }
    }

    #[test]
    fn a_relay_can_neither_type_on_a_terminal_nor_signal_others() {
        let ioctl = |request: libc::Ioctl| errno(libc::SYS_ioctl, [-1, request as libc::c_long, 0]);
        assert_eq!([libc::TIOCSTI, libc::TIOCLINUX].map(ioctl), [libc::EPERM; 2]);
        assert_eq!([libc::TIOCGWINSZ, libc::TCSETSW].map(ioctl), [libc::EBADF; 2]);
        let parent = std::process::id().into();
        assert_eq!(errno(libc::SYS_kill, [parent, 0, 0]), libc::EPERM);
        assert_eq!(errno(libc::SYS_tgkill, [parent, parent, 0]), libc::EPERM);
    }
}
