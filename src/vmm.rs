//! The VMM: a child of the monitor that becomes the microVM.
//!
//! It is our own binary once more, executed while the host's root is still there: libraries are loaded, then it parks
//! until its tree has arrived, pivots, and never comes back from libkrun. In: an [`Order`], the tree's mounts. Out: a
//! running VM, or one line that says why not. Must not: run or open anything by a path that a container's tree could
//! have laid (no exec, no dlopen after the pivot).

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use nix::sys::wait::{WaitStatus, waitpid};
use serde::{Deserialize, Serialize};

use crate::console::{self, Console};
use crate::guest::SOCKET;
use crate::jail::seccomp::Filter;
use crate::jail::tree::Export;
use crate::jail::{self, Jail};
use crate::kvm::{self, Trouble};
use crate::log::{say, sentence};
use crate::net;
use crate::plan::{self, Vm, vm::Network};
use crate::userns::{self, Root, UserNamespace};

#[cfg(not(feature = "local-guest"))]
use crate::krun;
#[cfg(feature = "local-guest")]
use crate::local as krun;

/// NICs that a VM can have; the stand-in for tests has none.
pub const MOST_NICS: u8 = if cfg!(feature = "local-guest") { 0 } else { plan::network::MOST_NICS };

/// The name of the VMM's process; engines' `ps` shows it.
pub const NAME: &str = "a3s-box-vmm";
/// guest-init, embedded: it is served to the guest kernel and never written to a disk.
static GUEST_INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-init"));
/// Device nodes that libkrun opens after the pivot.
const NODES: &[&str] = if cfg!(feature = "local-guest") { &[] } else { &["/dev/kvm"] };
/// Whether the VMM gives up its privileges: what stands in for a VM in tests needs them to make namespaces.
pub const CONFINED: bool = !cfg!(feature = "local-guest");
/// Of the caller's environment: where libraries and the shared kernel image lie. The rest is none of the VMM's business.
const KEPT_ENV: [&str; 2] = ["LD_LIBRARY_PATH", "XDG_RUNTIME_DIR"];
/// Descriptors in one message; the kernel's own bound is 253.
const BATCH: usize = 128;

/// What the monitor tells the VMM.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// First: what to prepare, a directory that the jail may hide, the VM's directory, and whose root the VMM becomes;
    /// the user namespace comes along. Paths, because a mount namespace takes no descriptors from another.
    Prepare { vm: Vm, anchor: PathBuf, dir: PathBuf, root: Option<Root> },
    /// Mounts of the exported tree: place and whether it is a directory, one descriptor each.
    Attach(Vec<(PathBuf, bool)>),
    /// The tree is whole: boot.
    Boot,
}

/// The monitor's handle on a VMM.
pub struct Vmm {
    pidfd: OwnedFd,
    channel: OwnedFd,
    child: std::process::Child,
}

/// How a VMM ended.
pub struct Death {
    /// 128 plus the signal, or 255: what a VMM exits with by itself proves nothing.
    pub status: i32,
    /// In words.
    pub how: String,
}

/// Starts a VMM that parks, to live in `user`. `dir` is the VM's directory, `anchor` one that its jail may hide.
pub fn spawn(vm: &Vm, dir: &Path, anchor: &Path, user: Option<&UserNamespace>) -> Result<Vmm> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).context("socketpair")?;
    let output = Console::writer(dir)?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).context("hand over the channel")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(NAME)
        .arg(theirs.as_raw_fd().to_string())
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| KEPT_ENV.iter().any(|kept| name == kept)))
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("console")?)
        .stderr(output);
    let prepare = || {
        die_with_parent()?;
        // The monitor's terminal is none of its business.
        nix::unistd::setsid()?;
        // Its mount namespace is its own before it does anything: the monitor's pivot must not take it along.
        Ok(unshare(CloneFlags::CLONE_NEWNS)?)
    };
    // SAFETY: three system calls and nothing else happen between fork and exec.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn().context("start the VMM")?;
    drop(theirs);
    let pidfd = pidfd_open(child.id() as i32)?;
    let vmm = Vmm { pidfd, channel: ours, child };
    let root = user.map(|user| user.root);
    let order = Order::Prepare { vm: vm.clone(), anchor: anchor.to_path_buf(), dir: dir.to_path_buf(), root };
    vmm.order(&order, &user.iter().map(|user| user.fd.as_fd()).collect::<Vec<_>>())?;
    Ok(vmm)
}

/// The VMM ends with the process that holds it, whatever becomes of that one's pid namespace. A new user forgets it.
fn die_with_parent() -> nix::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
}

/// A descriptor for a process that is our child, or another that cannot end meanwhile.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    // SAFETY: pidfd_open takes plain numbers and returns a new descriptor or an error.
    let fd = nix::errno::Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
        .context("pidfd_open")?;
    // SAFETY: the kernel just gave this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Signals a process by descriptor.
pub fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    // SAFETY: no pointer but a null siginfo, which means plain kill.
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, 0usize, 0usize) };
    nix::errno::Errno::result(sent).map(drop)
}

/// Kills a process by descriptor; one that is gone already is as good as killed.
pub fn kill(pidfd: BorrowedFd<'_>) {
    let _ = signal(pidfd, libc::SIGKILL);
}

/// Whether a process is gone, at the latest after `wait`.
pub fn ends_within(pidfd: BorrowedFd<'_>, wait: Duration) -> bool {
    let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], timeout).is_ok_and(|ready| ready > 0)
}

impl Vmm {
    fn order(&self, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let bytes = serde_json::to_vec(order).context("encode order")?;
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.channel.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None);
        match sent {
            Ok(_) => Ok(()),
            // It has given up already; why, it has said.
            Err(_) => Err(self.complaint().unwrap_or_else(|| anyhow!("the VMM ended while it was set up"))),
        }
    }

    /// Hands over a container's tree and lets the VM boot.
    pub fn boot(&self, exports: &[Export]) -> Result<()> {
        for batch in exports.chunks(BATCH) {
            let places = batch.iter().map(|export| (export.place.clone(), export.is_dir)).collect();
            let fds: Vec<_> = batch.iter().map(|export| export.mount.as_fd()).collect();
            self.order(&Order::Attach(places), &fds)?;
        }
        self.order(&Order::Boot, &[])
    }

    /// Why it could not boot, if it said so.
    pub fn complaint(&self) -> Option<anyhow::Error> {
        let mut buffer = [0u8; 4096];
        let mut receive =
            || nix::sys::socket::recv(self.channel.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
        // Orders that it left unread reset the connection, which is told first and once.
        let n = receive().or_else(|_| receive()).ok()?;
        (n > 0).then(|| anyhow!("{}", String::from_utf8_lossy(&buffer[..n])))
    }

    /// For poll and kill.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for its end, which must be certain.
    pub fn reap(&mut self) -> Death {
        use std::os::unix::process::ExitStatusExt;
        match self.child.wait().map(|status| (status.code(), status.signal())) {
            Ok((_, Some(signal))) => {
                Death { status: 128 + signal, how: format!("killed by signal {signal}") }
            }
            Ok((Some(code), _)) => Death { status: 255, how: format!("exit status {code}") },
            _ => Death { status: 255, how: "unknown end".into() },
        }
    }
}

/// Whether this host lets us try: the node is there, may be opened, and is KVM's.
pub fn usable() -> Result<()> {
    look().map_err(|trouble| {
        anyhow!(
            "{}, and no VM runs without it: {} (`a3s-box check` looks further)",
            trouble.found,
            trouble.advice
        )
    })
}

/// The same, in two parts.
pub fn look() -> std::result::Result<(), Trouble> {
    NODES.iter().try_for_each(|node| kvm::look(node))
}

/// Takes the device nodes out of a VMM's jail, from outside: it has opened what it needs by the time a guest greets.
/// For a process with one thread.
pub fn close_nodes(pid: i32) -> Result<()> {
    if NODES.is_empty() {
        return Ok(());
    }
    let detach = |node: &str| detach(Path::new(node));
    inside(pidfd_open(pid)?.as_fd(), || {
        // Only a VM with NICs has this one.
        let _ = detach(net::NODE);
        NODES.iter().try_for_each(|node| Ok(detach(node)?))
    })
    .context("take the device nodes away from the VMM")
}

/// Takes a mount away, with all below it, once nothing uses it any more.
pub fn detach(path: &Path) -> nix::Result<()> {
    umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
}

/// Runs `act` in a VMM's mount namespace, below its root. For a process with one thread.
pub fn inside(vmm: BorrowedFd<'_>, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let (mut told, mut tell) = std::io::pipe().context("pipe")?;
    // Entering a mount namespace changes the root: only a child of ours may.
    // SAFETY: this process has one thread, so the child may run any code; it ends by _exit.
    match unsafe { nix::unistd::fork() }.context("fork")? {
        nix::unistd::ForkResult::Child => {
            let entered = setns(vmm, CloneFlags::CLONE_NEWNS).context("enter the VMM's mount namespace");
            let Err(error) = entered.and_then(|()| act()) else { quit(0) };
            let _ = tell.write_all(sentence(&error).as_bytes());
            quit(1)
        }
        nix::unistd::ForkResult::Parent { child } => {
            drop(tell);
            let mut text = String::new();
            let _ = told.read_to_string(&mut text);
            match waitpid(child, None).context("wait")? {
                WaitStatus::Exited(_, 0) => Ok(()),
                WaitStatus::Exited(..) => Err(anyhow!(text)),
                status => bail!("the process that enters the VMM's jail: {status:?}"),
            }
        }
    }
}

/// Which libkrun this binary uses.
pub fn library() -> &'static str {
    krun::version()
}

/// The guest kernel's library, where its path is given at that, and version.
pub fn firmware(path: Option<&Path>) -> Result<(PathBuf, String)> {
    krun::firmware(path).map(|firmware| (firmware.path, firmware.kernel_version))
}

/// The VMM's process: never returns.
pub fn main(channel: Option<String>) -> ! {
    let fd = channel.and_then(|text| text.parse::<RawFd>().ok()).filter(|fd| *fd > 2);
    let Some(fd) = fd else {
        say(&format!("{NAME}: started by a3s-box itself, not by hand"));
        quit(1)
    };
    // SAFETY: the monitor left this descriptor for us, and nothing else here owns it.
    let channel = unsafe { OwnedFd::from_raw_fd(fd) };
    let error = match run(&channel) {
        Ok(stage) => {
            // The monitor's end reads end-of-file: on its way to the guest. What goes wrong now is on the console.
            drop(channel);
            let error = stage.enter();
            say(&format!("{NAME}: {}", sentence(&error)));
            quit(1)
        }
        Err(error) => sentence(&error),
    };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let _ = nix::sys::socket::send(channel.as_raw_fd(), error.as_bytes(), flags);
    quit(1)
}

/// Ends a forked process, without running an exit handler of its parent's.
pub fn quit(status: i32) -> ! {
    // SAFETY: _exit takes any status and does not return.
    unsafe { libc::_exit(status) }
}

struct Stage {
    machine: krun::Machine,
    network: Network,
    filter: Option<Filter>,
}

impl Stage {
    fn enter(self) -> anyhow::Error {
        if let Some(Err(error)) = self.filter.map(Filter::load) {
            return error;
        }
        let run = Path::new(jail::RUN);
        let taps: Vec<_> = match self.network {
            Network::Tap(nics) => (0..nics).map(net::name).collect(),
            Network::None | Network::Tsi => Vec::new(),
        };
        krun::enter(
            self.machine,
            &krun::Devices {
                export: Path::new(jail::EXPORT),
                init: GUEST_INIT,
                console: &run.join(console::FIFO),
                control_socket: &run.join(SOCKET),
                control_port: a3s_box_proto::CONTROL_PORT,
                taps: &taps,
                tsi: self.network == Network::Tsi,
            },
        )
    }
}

fn run(channel: &OwnedFd) -> Result<Stage> {
    fcntl(channel, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("channel")?;
    jail::set_limits();
    let (Order::Prepare { vm, anchor, dir, root }, user) = receive(channel)? else {
        bail!("out of turn: no Prepare")
    };
    let machine = krun::prepare(&vm)?;
    let mut nodes = NODES.to_vec();
    if matches!(vm.network, Network::Tap(_)) {
        nodes.push(net::NODE);
    }
    let jail = Jail::build(&anchor, &dir, &nodes, root)?;
    // While the monitor puts the tree together.
    let filter = if CONFINED { Some(Filter::compile(vm.network)?) } else { None };
    loop {
        match receive(channel)? {
            (Order::Attach(places), fds) if places.len() == fds.len() => {
                let export = |((place, is_dir), mount)| Export { place, is_dir, mount };
                jail.attach(places.into_iter().zip(fds).map(export).collect())?;
            }
            (Order::Boot, _) => break,
            _ => bail!("out of turn: neither Attach nor Boot"),
        }
    }
    let labels = vm.labels.into_iter().filter(|label| CONFINED && jail::label::is_enabled(label.module));
    let doors = labels.map(jail::label::Door::open).collect::<Result<Vec<_>>>()?;
    let jail = jail.enter()?;
    if CONFINED {
        for user in user {
            // Where nodes are the host's own, a group's membership may be what opens them.
            userns::enter(user, !jail.has_own_nodes)?;
            die_with_parent()?;
        }
        doors.into_iter().try_for_each(jail::label::Door::pass)?;
        jail::confine_vmm()?;
        jail::landlock::confine(&nodes, &machine.files())?;
    }
    Ok(Stage { machine, network: vm.network, filter })
}

fn receive(channel: &OwnedFd) -> Result<(Order, Vec<OwnedFd>)> {
    let mut buffer = vec![0u8; 128 << 10];
    let mut space = cmsg_space!([RawFd; BATCH]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        recvmsg::<()>(channel.as_raw_fd(), &mut slices, Some(&mut space), flags).context("orders")?;
    let mut fds = Vec::new();
    for control in message.cmsgs().context("orders")? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel just installed these descriptors for us.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let n = message.bytes;
    if n == 0 {
        // The monitor is gone; so is the reason to be.
        quit(1);
    }
    Ok((serde_json::from_slice(&buffer[..n]).context("decode order")?, fds))
}
