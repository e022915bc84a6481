//! One container of the guest: its first process, further ones, its state.
//!
//! In: a planned container or process. Out: a child that builds itself and reports on its status pipe. Must not: do
//! in pid 1 what could block; every mount and every look into the container's files happens in the child.

mod limits;
mod shared;
mod user;

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use a3s_box_proto::{self as proto, Mount, Process, ProcessInfo, Seccomp, Source};
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{Pid, pipe2};

use crate::boot::set;
use crate::net;
use crate::process::{Pipes, Side, arrange, become_idle, become_workload, fork, leave, words};
use crate::shared_memory;
use crate::sockets::{self, Sockets};
use crate::stdio::{self, Stdio};
use crate::sysctl;
use crate::terminal::{self, Terminal};
use limits::Cgroup;
use shared::Shared;
use user::User;

/// How far a container has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its first process is still building.
    Creating,
    /// Its first process waits for the start.
    Created,
    /// Its first process runs the workload.
    Running,
    /// Its first process has ended.
    Stopped,
}

/// A container.
pub struct Container {
    /// Its first process, as pid 1 of the VM sees it.
    pub init: Pid,
    /// Where it stands.
    pub state: State,
    gate: Option<OwnedFd>,
    pidfd: OwnedFd,
    cgroup: Cgroup,
    /// Binds further processes as it does the first.
    seccomp: Option<Seccomp>,
    own_time: bool,
    personality: Option<u32>,
    /// Held until the container is forgotten. If its last process took the namespace along, virtiofs submounts would
    /// go while their files' releases are still under way, and the guest kernel stops at "Busy inodes after unmount".
    mounts: Option<File>,
    /// Parameters of interfaces, which may come as late as its start.
    late_sysctls: Vec<sysctl::Parameter>,
    /// What of the host's is mounted in it, where it lies in the exported tree.
    exports: Vec<PathBuf>,
    /// Its user namespace, where it has one.
    user: Option<OwnedFd>,
    /// Whether its processes live among another container's.
    is_among_others: bool,
    /// What stands in for sockets of the host's.
    sockets: Option<Sockets>,
}

/// A process just cloned: who it is, its streams, and the pipe on which it tells how it goes.
pub struct Born {
    /// Its pid, as pid 1 of the VM sees it.
    pub pid: Pid,
    /// Our ends of its streams.
    pub stdio: Stdio,
    /// Its story: `R`, `E…` or silence until execve.
    pub status: OwnedFd,
}

/// Clones the first process of a container into namespaces of its own, or those of `others` that it shares; there it
/// builds the rest.
pub fn create(spec: &proto::Container, others: &HashMap<String, Container>) -> Result<(Container, Born)> {
    let shared = Shared::open(spec, others)?;
    shared_memory::prepare(&spec.mounts)?;
    let cgroup = Cgroup::create(spec)?;
    let (born, gate, user) = bear(spec, &shared, &cgroup).inspect_err(|_| cgroup.remove())?;
    let container = Container {
        init: born.pid,
        state: State::Creating,
        gate: Some(gate),
        pidfd: pidfd_open(born.pid)?,
        cgroup,
        seccomp: spec.seccomp.clone(),
        own_time: spec.time_offsets.is_some(),
        personality: spec.personality,
        mounts: File::open(format!("/proc/{}/ns/mnt", born.pid)).ok(),
        late_sysctls: sysctl::of_interfaces(&spec.sysctls),
        exports: exports(spec),
        user,
        is_among_others: shared.has_pid(),
        sockets: None,
    };
    Ok((container, born))
}

/// Clones the first process. Out: that, its gate and its user namespace.
fn bear(
    spec: &proto::Container,
    shared: &Shared,
    cgroup: &Cgroup,
) -> Result<(Born, OwnedFd, Option<OwnedFd>)> {
    let (stdio, ends) = stdio::of(&spec.process)?;
    let (status, child_status) = status()?;
    let (child_gate, gate) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
    let own_user = spec.user.as_ref().filter(|_| shared.user.is_none()).map(User::create).transpose()?;
    let user = own_user.as_ref().map(|user| &user.fd).or(shared.user.as_ref());
    let user = user.map(OwnedFd::try_clone).transpose().context("user namespace")?;
    let child_user = user.as_ref().map(OwnedFd::try_clone).transpose().context("user namespace")?;
    if let Side::Parent(pid) = shared.fork(own_user.is_none())? {
        return Ok((Born { pid, stdio, status }, gate, user));
    }
    let entered = own_user.as_ref().map_or(Ok(()), User::enter_owned).and_then(|()| shared.enter());
    let story = arrange(
        ends,
        Pipes { status: child_status, gate: Some(child_gate), user: child_user, kept: Vec::new() },
    );
    let start = Some((spec.hooks.as_slice(), &spec.state));
    match entered.and_then(|()| build(spec, cgroup)) {
        Ok(_) if spec.idle => become_idle(story),
        Ok(terminal) => become_workload(&spec.process, terminal, spec.seccomp.as_ref(), story, start),
        Err(error) => story.fail(&error),
    }
}

/// A socket rather than a pipe, for a terminal's ends travel on it. It ends at execve as a pipe would.
pub fn status() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).context("socketpair")
}

fn build(spec: &proto::Container, cgroup: &Cgroup) -> Result<Option<Terminal>> {
    limits::join(&[cgroup.door()?])?;
    // After joining, so that the container's cgroup is the root that it sees.
    unshare(CloneFlags::CLONE_NEWCGROUP).context("cgroup namespace")?;
    crate::boot::loopback_up().context("bring lo up")?;
    if let Some(hostname) = &spec.hostname {
        nix::unistd::sethostname(hostname).context("hostname")?;
    }
    if let Some(domainname) = &spec.domainname {
        std::fs::write("/proc/sys/kernel/domainname", domainname).context("domainname")?;
    }
    sysctl::set_present(&spec.sysctls)?;
    if let Some(offsets) = &spec.time_offsets {
        own_time(offsets).context("time namespace")?;
    }
    set_personality(spec.personality)?;
    if spec.idle { crate::rootfs::enter_nothing().map(|()| None) } else { crate::rootfs::enter(spec) }
}

/// Moves the calling process into a time namespace of its own: unshare alone does so for children only, and the
/// offsets can be set as long as nobody is in it.
fn own_time(offsets: &str) -> Result<()> {
    unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)).context("make it")?;
    if !offsets.is_empty() {
        set("/proc/self/timens_offsets", offsets).map_err(|e| anyhow!("linux.timeOffsets: {}", words(e)))?;
    }
    let namespace = File::open("/proc/self/ns/time_for_children").context("open it")?;
    setns(namespace, CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)).context("enter it")
}

fn exports(spec: &proto::Container) -> Vec<PathBuf> {
    let path = |mount: &Mount| match &mount.source {
        Source::Export(path) => Some(Path::new("/").join(&spec.place).join(path)),
        _ => None,
    };
    spec.mounts.iter().filter_map(path).collect()
}

fn look_anew(path: &Path) {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return };
    // SAFETY: an all-zero `statx` is a valid value of it.
    let mut seen: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_STATX_FORCE_SYNC;
    // SAFETY: the path ends with NUL, and both live until after the call. One that is gone has no size.
    unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_BASIC_STATS, &raw mut seen) };
}

fn set_personality(domain: Option<u32>) -> Result<()> {
    let Some(domain) = domain else { return Ok(()) };
    // SAFETY: personality takes a plain number and touches no memory of ours.
    Errno::result(unsafe { libc::personality(domain.into()) }).context("linux.personality").map(drop)
}

impl Container {
    /// Opens the gate before execve, once the kernel has asked the host what size files are by now: engines fill /etc/hosts
    /// and others after `create`, which has looked at them, and what it saw would hold for seconds.
    pub fn start(&mut self) -> Result<()> {
        if !self.late_sysctls.is_empty() {
            net::inside(self.init, || self.late_sysctls.iter().try_for_each(sysctl::set))?;
        }
        let gate = self.gate.take().context("the container was started before")?;
        let open = || nix::unistd::write(&gate, b"s").context("open the gate").map(drop);
        if self.exports.is_empty() {
            return open();
        }
        if let Side::Child = fork(0)? {
            self.exports.iter().for_each(|path| look_anew(path));
            leave(i32::from(open().is_err()));
        }
        Ok(())
    }

    /// Clones a further process into the container.
    pub fn exec(&self, process: &Process, cgroup: &Path) -> Result<Born> {
        let (stdio, ends) = stdio::of(process)?;
        let (status, child_status) = status()?;
        let (pid_in, pid_out) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
        let Side::Parent(helper) = fork(0)? else {
            // Entering a pid namespace takes effect for children only: the helper clones a sibling of its own.
            // It stays out of the container's cgroup, where a freezer could hold it and pid 1 with it.
            let error = match self
                .cgroup
                .doors(cgroup, self.init)
                .and_then(|doors| Ok((doors, self.enter()?, fork(libc::CLONE_PARENT)?)))
            {
                Ok((doors, user, Side::Child)) => {
                    let joined = limits::join(&doors).and_then(|()| set_personality(self.personality));
                    let story =
                        arrange(ends, Pipes { status: child_status, gate: None, user, kept: Vec::new() });
                    match joined.and_then(|()| terminal::of(process)) {
                        Ok(terminal) => {
                            become_workload(process, terminal, self.seccomp.as_ref(), story, None)
                        }
                        Err(error) => story.fail(&error),
                    }
                }
                Ok((_, _, Side::Parent(pid))) => {
                    let told = nix::unistd::write(&pid_out, &pid.as_raw().to_ne_bytes());
                    leave(i32::from(told.is_err()))
                }
                Err(error) => error,
            };
            let text = format!("{error:#}");
            let _ = nix::unistd::write(&child_status, format!("E{text}").as_bytes());
            leave(1)
        };
        drop((pid_out, ends, child_status));
        let pid = await_pid(&pid_in);
        let _ = nix::sys::wait::waitpid(helper, None);
        match pid {
            Some(pid) => Ok(Born { pid, stdio, status }),
            None => bail!("{}", read_story(&status)),
        }
    }

    /// Enters all but the user namespace, which comes last and is handed back.
    fn enter(&self) -> Result<Option<OwnedFd>> {
        let user = self.user.as_ref().map(OwnedFd::try_clone).transpose().context("user namespace")?;
        let mut namespaces = CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP;
        if self.own_time {
            namespaces |= CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
        }
        setns(&self.pidfd, namespaces).context("enter the container's namespaces")?;
        Ok(user)
    }

    /// Clones the process that stands in for sockets of the host's.
    pub fn serve_sockets(&mut self) -> Result<Born> {
        let (born, sockets) = sockets::serve(self.init)?;
        self.sockets = Some(sockets);
        Ok(born)
    }

    /// The process for sockets.
    pub fn sockets(&self) -> Result<&Sockets> {
        self.sockets.as_ref().context("no process stands in for sockets")
    }

    /// Sends a signal to every process of the container.
    pub fn signal_all(&self, signal: i32) -> Result<(), Errno> {
        // An older kernel knows signals alone, which miss what is forked meanwhile.
        if signal == libc::SIGKILL && self.cgroup.kill().is_ok() {
            return Ok(());
        }
        for pid in self.cgroup.pids() {
            match send(pid, signal) {
                Err(Errno::ESRCH) | Ok(()) => {}
                other => return other,
            }
        }
        Ok(())
    }

    /// Its first process has ended. Among another container's processes that does not end its others.
    pub fn stopped(&mut self) {
        self.state = State::Stopped;
        if self.is_among_others {
            let _ = self.signal_all(libc::SIGKILL);
        }
    }

    /// Whether it can be removed: a process that took the mounts along would do so in the midst of its files' releases.
    pub fn is_deserted(&self) -> bool {
        self.cgroup.is_deserted()
    }

    /// For poll, by POLLPRI: then [`Container::is_deserted`] may have news.
    pub fn population(&self) -> Option<BorrowedFd<'_>> {
        self.cgroup.population()
    }

    /// The container's processes.
    pub fn processes(&self) -> Vec<ProcessInfo> {
        self.cgroup.pids().into_iter().filter_map(describe).collect()
    }

    /// Changes limits: all, or none.
    pub fn limit(&self, limits: &[(String, String)]) -> Result<()> {
        self.cgroup.limit(limits)
    }

    /// For poll, by POLLPRI: then [`Container::has_killed`] may have news.
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.cgroup.events()
    }

    /// Whether the kernel has killed one of its processes for want of memory since this was last asked.
    pub fn has_killed(&mut self) -> bool {
        self.cgroup.has_killed()
    }

    /// What its cgroup counts.
    pub fn stats(&self) -> BTreeMap<String, u64> {
        self.cgroup.stats()
    }

    /// Removes what the container leaves in the guest.
    pub fn remove(self) {
        if let Some(sockets) = self.sockets {
            sockets.end();
        }
        // The device answers in order: once it has answered this, it has answered every release before it. And what was
        // read ahead for a process that was killed puts its file's release off until it is answered: hence twice.
        for _ in 0..2 {
            let _ = nix::sys::statfs::statfs("/");
        }
        drop(self.mounts);
        self.cgroup.remove();
    }
}

/// kill(2) with any number that the kernel knows, real-time signals included.
pub fn send(pid: Pid, signal: i32) -> Result<(), Errno> {
    // SAFETY: kill takes plain numbers and touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid.as_raw(), signal) }).map(drop)
}

fn await_pid(pipe: &OwnedFd) -> Option<Pid> {
    let mut bytes = [0u8; 4];
    match nix::unistd::read(pipe, &mut bytes) {
        Ok(4) => Some(Pid::from_raw(i32::from_ne_bytes(bytes))),
        _ => None,
    }
}

fn read_story(status: &OwnedFd) -> String {
    let mut bytes = [0u8; 4096];
    let n = nix::unistd::read(status, &mut bytes).unwrap_or(0);
    match bytes[..n].split_first() {
        Some((b'E', text)) => String::from_utf8_lossy(text).into_owned(),
        _ => "the helper that enters the container ended early".into(),
    }
}

/// A descriptor for a child of this process.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: pidfd_open takes plain numbers and returns a new descriptor or an error.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
        .context("pidfd_open")?;
    // SAFETY: the kernel just gave this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// One line about a process; `None` once it is gone.
fn describe(pid: Pid) -> Option<ProcessInfo> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |text: &str, name: &str, last: bool| -> Option<i64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned))?;
        let mut numbers = line.split_whitespace();
        (if last { numbers.next_back() } else { numbers.next() })?.parse().ok()
    };
    let parent = field(&status, "PPid:", false)?;
    let parent_status = std::fs::read_to_string(format!("/proc/{parent}/status")).unwrap_or_default();
    // A parent outside the container's pid namespace has one number less.
    let depth = |text: &str| {
        text.lines().find(|l| l.starts_with("NSpid:")).map_or(0, |l| l.split_whitespace().count())
    };
    let ppid =
        if depth(&parent_status) == depth(&status) { field(&parent_status, "NSpid:", true)? } else { 0 };
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<_> =
        command.split(|b| *b == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
    let name = || std::fs::read_to_string(format!("/proc/{pid}/comm")).map(|c| format!("[{}]", c.trim_end()));
    Some(ProcessInfo {
        pid: field(&status, "NSpid:", true)? as i32,
        ppid: ppid as i32,
        uid: field(&status, "Uid:", false)? as u32,
        command: if words.is_empty() { name().ok()? } else { words.join(" ") },
    })
}
