//! The monitor: the container's pid.
//!
//! Pid 1 of a fresh pid namespace, so that its end is the VM's; reparented to the caller's subreaper; in the
//! container's cgroup and its host namespaces; its root is the container. It starts the VMM, builds the tree, has the
//! guest create the container, and then relays until the process ends. In: a [`Plan`]. Out: reports to `create`, at
//! last an exit status. Must not: hold anything of `create`'s but the container's stdio, or keep a privilege once it
//! talks to the guest.

mod arrival;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_proto::{Hook, Outcome, Request};
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::console::Console;
use crate::guest::{self, Connection};
use crate::hooks;
use crate::jail::{self, tree};
use crate::log::sentence;
use crate::net;
use crate::oom::{self, Teller};
use crate::plan::{Namespace, Plan};
use crate::pod::{self, Home};
use crate::relay::{self, Post, Vm, VmDied};
use crate::sockets::{self, Sockets};
use crate::stdio::Pumps;
use crate::store::VM_DIR;
use crate::timeline::{Mark, Timeline};
use crate::userns::{self, UserNamespace};
use crate::{terminal, vmm};

/// The file in the container's directory that holds the monitor's last message: an [`End`], or nothing where the
/// monitor was killed.
const LAST_MESSAGE: &str = "last-message";
/// How long the guest may take to build a container.
const CREATE: Duration = Duration::from_secs(30);

/// What a monitor tells `create`.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The VMM is there; its pidfd comes along.
    Vmm,
    /// Namespaces, cgroup and tree are there, and nothing runs yet: hooks are due. An acknowledgement lets it go on.
    Environment,
    /// A stage of the boot was reached.
    Phase(String),
    /// The container is created.
    Ready,
    /// It is not, and the monitor ends.
    Failed(String),
}

/// How a monitor came to its own end.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// Its process ended.
    Regular,
    /// Something else did.
    Failed(String),
}

/// The last message of the monitor whose container's directory this is.
pub fn end(dir: &Path) -> Option<End> {
    serde_json::from_slice(&std::fs::read(dir.join(LAST_MESSAGE)).ok()?).ok()
}

/// `create`'s end.
pub struct Handle {
    /// The monitor's pid, which is the container's.
    pub pid: i32,
    pidfd: OwnedFd,
    channel: OwnedFd,
}

/// Clones a monitor, which waits to be told to go on. `network` is the network namespace to join, `dir` the container's
/// directory, `home` the VM that it lives in where that is another's, `slave` the other end of a pty that takes the
/// place of the caller's streams.
pub fn spawn(
    mut plan: Plan,
    network: Option<File>,
    dir: &Path,
    home: Option<Home>,
    slave: Option<OwnedFd>,
) -> Result<Handle> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .context("socketpair")?;
    let mut joined = Joined::open(&plan, network)?;
    let mut user = UserNamespace::open(&plan.namespaces)?;
    let mut flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    match &mut user {
        Some(user) => {
            plan.guest.user = Some(user.for_guest());
            joined.0.extend(user.owned.drain(..).map(|(flag, fd)| (flag, fd, "linux.namespaces".into())));
        }
        None => {
            let new = plan.namespaces.owned().into_iter().filter(|owned| *owned.0 == Namespace::New);
            flags |= new.fold(0, |flags, (_, flag, _)| flags | flag.bits());
        }
    }
    // SAFETY: without CLONE_VM and with no stack given, clone is fork; this process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    match Errno::result(pid).context("clone the monitor")? {
        0 => {
            let user_fd = user.as_ref().map(|user| &user.fd);
            let fds = joined.0.iter().map(|(_, fd, _)| fd).chain([&theirs]).chain(&slave).chain(user_fd);
            let homes = home.iter().flat_map(Home::descriptors);
            jail::keep_only(&fds.map(AsRawFd::as_raw_fd).chain(homes).collect::<Vec<_>>());
            let status = live(plan, dir, (joined, user, home), slave, theirs);
            // SAFETY: _exit takes any status and does not return; no exit handler of the parent's may run here.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Handle { pid: pid as i32, pidfd: vmm::pidfd_open(pid as i32)?, channel: ours }),
    }
}

/// What the monitor enters.
type Opened = (Joined, Option<UserNamespace>, Option<Home>);

/// Namespaces to join, opened while their paths mean what the caller meant.
struct Joined(Vec<(CloneFlags, OwnedFd, String)>);

impl Joined {
    fn open(plan: &Plan, network: Option<File>) -> Result<Self> {
        let mut joined = Vec::new();
        if let (Some(file), Namespace::Join(path)) = (network, &plan.namespaces.network) {
            joined.push((CloneFlags::CLONE_NEWNET, file.into(), net::shown(path)));
        }
        for (namespace, name, flag) in [
            (&plan.namespaces.ipc, "ipc", CloneFlags::CLONE_NEWIPC),
            (&plan.namespaces.uts, "uts", CloneFlags::CLONE_NEWUTS),
        ] {
            let Namespace::Join(path) = namespace else { continue };
            let shown = format!("linux.namespaces: join {name} namespace {}", path.display());
            let fd = File::open(path).context(shown.clone())?;
            joined.push((flag, fd.into(), shown));
        }
        Ok(Joined(joined))
    }

    fn enter(self) -> Result<()> {
        for (flag, fd, shown) in self.0 {
            setns(fd, flag).context(shown)?;
        }
        Ok(())
    }
}

impl Handle {
    /// For poll.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// A descriptor for the monitor.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The next report; a monitor that is gone without one has failed. [`Report::Vmm`] comes with the VMM's pid.
    pub fn report(&self) -> Result<(Report, Option<i32>)> {
        let mut buffer = vec![0u8; 64 << 10];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.channel.as_raw_fd(), &mut slices, Some(&mut space), flags);
        let message = message.context("the monitor's report")?;
        let mut pid = None;
        for control in message.cmsgs().context("the monitor's report")? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                for fd in fds {
                    // SAFETY: the kernel just installed this descriptor for us.
                    pid = pid_of(&unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        let n = message.bytes;
        if n == 0 {
            bail!("the monitor ended without a word");
        }
        Ok((serde_json::from_slice(&buffer[..n]).context("the monitor's report")?, pid))
    }

    /// Lets the monitor go on: once it is in its cgroup, and once its report [`Report::Environment`] or
    /// [`Report::Ready`] was acted on.
    pub fn go_on(&self) -> Result<()> {
        nix::sys::socket::send(self.channel.as_raw_fd(), b"n", MsgFlags::MSG_NOSIGNAL)
            .context("tell the monitor")?;
        Ok(())
    }

    /// Ends the monitor, and with it the VM; returns once both are gone.
    pub fn kill(&self) {
        vmm::kill(self.pidfd.as_fd());
        let _ = self.wait();
    }

    /// Waits for its end: the status as a shell shows it.
    pub fn wait(&self) -> Result<i32> {
        use nix::sys::wait::{WaitStatus, waitpid};
        loop {
            match waitpid(nix::unistd::Pid::from_raw(self.pid), None) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(code),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("wait for the monitor"),
            }
        }
    }
}

/// The pid behind a pidfd, as this process's procfs numbers it.
pub fn pid_of(pidfd: impl AsFd) -> Option<i32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()
}

struct Reporter(OwnedFd);

impl Reporter {
    fn send(&self, report: &Report, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let bytes = serde_json::to_vec(report).context("encode report")?;
        let raw: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let slices = [std::io::IoSlice::new(&bytes)];
        sendmsg::<()>(self.0.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None)
            .context("report")?;
        Ok(())
    }

    /// Waits for the caller's [`Handle::go_on`]; false where the caller is gone, and with it who would start or
    /// delete the container.
    fn may_go_on(&self) -> bool {
        let mut byte = [0u8; 1];
        matches!(nix::sys::socket::recv(self.0.as_raw_fd(), &mut byte, MsgFlags::empty()), Ok(1))
    }

    fn phase(&self, text: &str) {
        // Whoever asked may be gone; that is noticed where it matters.
        let _ = self.send(&Report::Phase(text.into()), None);
    }
}

/// The monitor's life. Returns its exit status.
fn live(plan: Plan, dir: &Path, opened: Opened, slave: Option<OwnedFd>, channel: OwnedFd) -> i32 {
    let reporter = Reporter(channel);
    let outside = oom::cgroups();
    // Not a process is started, nor memory taken, before this one is in its cgroup.
    if !reporter.may_go_on() {
        return 1;
    }
    let born = begin_session(slave, plan.guest.idle).and(outside).and_then(|outside| {
        let mut stage = prepare(plan, dir, opened, &outside, &reporter)?;
        let connection = stage.create(&reporter)?;
        let pumps = Pumps::start(stage.terminal.is_some())?;
        Ok((stage, connection, pumps))
    });
    let (stage, connection, pumps) = match born {
        Ok(born) => born,
        Err(error) => {
            let _ = reporter.send(&Report::Failed(guest::clean(&sentence(&error))), None);
            return 1;
        }
    };
    if reporter.send(&Report::Ready, None).is_err() || !reporter.may_go_on() {
        return 1;
    }
    drop(reporter);
    let Stage { id, mut vm, mut teller, sockets, signals, last_message, timeline, terminal, .. } = stage;
    let (teller, sockets) = (Some(&mut teller), sockets.as_ref());
    let (pumps, timeline) = (Some(pumps), Some(timeline));
    let vm = vm.as_mut();
    let post = Post { container: &id, vm, teller, sockets, terminal, pumps, timeline, ..Post::default() };
    match relay::run(connection, &signals, post) {
        Ok(status) => {
            leave_word(last_message, &End::Regular);
            status.code()
        }
        Err(error) => {
            leave_word(last_message, &End::Failed(guest::clean(&sentence(&error))));
            error.downcast_ref::<VmDied>().map_or(255, |died| died.status)
        }
    }
}

/// What is left once the tree is built: the guest has still to create the container.
struct Stage {
    id: String,
    /// Its own VM.
    vm: Option<Vm>,
    /// Another's, dialled.
    door: Option<UnixStream>,
    teller: Teller,
    /// What connects to sockets of the host's for it.
    sockets: Option<Sockets>,
    signals: SignalFd,
    last_message: File,
    timeline: Timeline,
    /// See [`Post`].
    terminal: Option<RawFd>,
    request: Request,
}

fn begin_session(slave: Option<OwnedFd>, idle: bool) -> Result<()> {
    nix::unistd::setsid().context("session")?;
    if idle {
        // It outlives the engine's interest in whatever streams it came with.
        let null = File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
        nix::unistd::dup2_stdin(&null).context("streams")?;
        nix::unistd::dup2_stdout(&null).context("streams")?;
        nix::unistd::dup2_stderr(&null).context("streams")?;
    }
    slave.map_or(Ok(()), terminal::take)
}

/// `outside` is what [`oom::cgroups`] said before this process was moved into its own.
fn prepare(mut plan: Plan, dir: &Path, opened: Opened, outside: &str, reporter: &Reporter) -> Result<Stage> {
    let (joined, user, home) = opened;
    let root = user.as_ref().map(|user| user.root);
    set_oom_score(plan.guest.process.oom_score_adj)?;
    joined.enter()?;
    jail::make_slave()?;
    match &plan.guest.hostname {
        Some(hostname) if plan.namespaces.uts == Namespace::New => {
            nix::unistd::sethostname(hostname).context("hostname")?;
        }
        // What it would have here: the host's, or that of the namespace that it joins.
        None if home.is_none() => {
            let name = nix::sys::utsname::uname().context("hostname")?;
            plan.guest.hostname = Some(name.nodename().to_string_lossy().into_owned());
        }
        _ => {}
    }
    let own = if home.is_none() { Some(start_vm(&plan, dir, user.as_ref(), reporter)?) } else { None };
    let vmm = own.as_ref().map(|vm| vm.vmm.pidfd());
    let teller = Teller::start(outside, &plan.bundle, vmm).context("the teller of OOM kills")?;
    let vm_dir = home.as_ref().map_or(dir.join(VM_DIR), |home| pod::seat_dir(dir, &home.seat));
    let (rootfs, hooked) = (plan.tree.rootfs.clone(), plan.hooks.any_at_create());
    let sources = tree::open(plan.tree, &mut plan.guest)?;
    let exports = if plan.guest.idle { Vec::new() } else { sources.exports(&mut plan.guest.mounts, root)? };
    let (last_message, timeline) = (open_last_message(dir)?, Timeline::open(dir));
    let place = own.as_ref().map(|_| open(&dir.join(VM_DIR))).transpose()?;
    let bound = sockets::Bound::new(sources.socket_places(), &plan.guest, &vm_dir)?;
    // Hooks look for the container's tree at root.path, and may change what is in it.
    let view = sources.assemble(&open(if hooked { &rootfs } else { dir })?)?;
    if hooked {
        run_hooks(&plan.hooks.create_container, &plan.guest.state, &rootfs, reporter)?;
    }
    if let Some(vm) = &own {
        vm.vmm.boot(&exports)?;
    }
    let door = home.map(|home| home.furnish(exports)).transpose()?;
    timeline.mark(Mark::Tree);
    reporter.phase("tree handed to the VMM");
    view.enter()?;
    if let Some(place) = place {
        // Sockets of the VM are reached from here, whatever the root is now.
        nix::unistd::fchdir(&place).context("enter the VM's directory")?;
    }
    if let Some(user) = user.filter(|_| vmm::CONFINED) {
        userns::enter(user.fd, false)?;
    }
    let sockets = bound.map(Sockets::spawn).transpose()?;
    let signals = relay::take_signals()?;
    jail::drop_privileges()?;
    jail::confine_relay(&["socket", "connect"])?;
    let id = plan.guest.id.clone();
    let terminal = plan.guest.process.terminal.and_then(|_| terminal::own());
    let request = Request::Create(Box::new(plan.guest));
    Ok(Stage { id, vm: own, door, teller, sockets, signals, last_message, timeline, terminal, request })
}

/// Starts a VMM in this process's namespaces.
fn start_vm(plan: &Plan, dir: &Path, user: Option<&UserNamespace>, reporter: &Reporter) -> Result<Vm> {
    let (root, vm_dir) = (user.map(|user| user.root), dir.join(VM_DIR));
    let console = Console::create(&vm_dir, root)?;
    let vmm = vmm::spawn(&plan.vm, &vm_dir, dir, user)?;
    reporter.send(&Report::Vmm, Some(vmm.pidfd()))?;
    net::prepare(&plan.vm.network, root)?;
    Ok(Vm { vmm, console })
}

/// `prestart` and `createRuntime` hooks by the caller, then `createContainer` hooks: this process's root is the host's
/// still, its namespaces are the container's.
fn run_hooks(list: &[Hook], state: &Value, rootfs: &Path, reporter: &Reporter) -> Result<()> {
    let before = tree::mounts_below(rootfs)?;
    reporter.send(&Report::Environment, None)?;
    if !reporter.may_go_on() {
        bail!("create was given up");
    }
    hooks::in_container(list, state, rootfs, reporter.0.as_fd())?;
    match tree::mounts_below(rootfs)?.difference(&before).next() {
        Some(path) => bail!("hooks: the mount that one made on {} cannot reach into the VM", path.display()),
        None => Ok(()),
    }
}

/// The whole VM counts as the process that config.json speaks of. A caller without privilege may only raise the score.
fn set_oom_score(score: Option<i32>) -> Result<()> {
    let Some(score) = score else { return Ok(()) };
    match std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        result => result.context("process.oomScoreAdj"),
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    let dir = File::open(path);
    Ok(dir.with_context(|| format!("open {}", path.display()))?.into())
}

fn open_last_message(dir: &Path) -> Result<File> {
    let path: PathBuf = dir.join(LAST_MESSAGE);
    File::options()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .context("make the last message's file")
}

fn leave_word(mut last_message: File, end: &End) {
    // Who reads it takes nothing for a death by a signal, which is the worst that this can mean.
    if let Ok(bytes) = serde_json::to_vec(end) {
        let _ = last_message.write_all(&bytes);
    }
}

impl Stage {
    /// Has the guest create the container. The connection owns it.
    fn create(&mut self, reporter: &Reporter) -> Result<Connection> {
        let mut connection = match (self.door.take(), &mut self.vm) {
            (None, Some(vm)) => arrival::connect(vm, &self.signals, reporter, &self.timeline)?,
            (Some(stream), _) => Connection::greet(stream, guest::GREETING)?,
            (None, None) => bail!("there is no VM"),
        };
        self.timeline.mark(Mark::Greeted);
        reporter.phase(&format!(
            "guest greeted: kernel {}, {} ms after its start",
            guest::clean(&connection.greeting.kernel),
            connection.greeting.uptime_us / 1000
        ));
        match connection.call(&self.request, CREATE) {
            Ok(Outcome::Done) => {
                self.sockets.as_ref().map_or(Ok(()), Sockets::begin)?;
                Ok(connection)
            }
            Ok(Outcome::Failed { text }) => {
                bail!("unable to start container process: {}", guest::clean(&text))
            }
            Ok(other) => bail!("the guest refused to create the container: {other:?}"),
            Err(error) => Err(self.vm.as_mut().and_then(arrival::death).unwrap_or(error)),
        }
    }
}
