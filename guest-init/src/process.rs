//! From clone to execve: the steps of a process that becomes a workload.
//!
//! Pid 1 has one thread, so what it clones may run any code. The child tells its story on a status socket: `T` with the
//! ends of its terminal, `R` once everything that can fail has been tried, `E` and a text when something did; the pipe closes at execve.
//! In: an OCI process, the container's namespaces. Out: the workload. Must not: return.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use a3s_box_hook::{Setting, Watch};
use a3s_box_proto::{Hook, Process, Seccomp};
use anyhow::{Context, Result, anyhow, bail};
use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{Gid, Pid, Uid};
use serde_json::Value;

use crate::container::{self, Born};
use crate::stdio::{self, Ends};
use crate::terminal::Terminal;
use crate::{reap, seccomp};

const STATUS: RawFd = 3;
const GATE: RawFd = 4;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Which side of a clone this is.
pub enum Side {
    /// The caller, with the child's pid.
    Parent(Pid),
    /// The new process.
    Child,
}

/// fork(2) with namespace flags (clone(2)). Only for a process with one thread.
pub fn fork(flags: libc::c_int) -> Result<Side> {
    // SAFETY: without CLONE_VM and with no stack given, clone is fork; one thread means no lock can be held elsewhere.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    match Errno::result(pid).context("clone")? {
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent(Pid::from_raw(pid as i32))),
    }
}

/// What a new process holds besides its streams.
pub struct Pipes {
    /// Written by the child: its story.
    pub status: OwnedFd,
    /// Read by the child before execve: one byte opens it. `None` runs on at once.
    pub gate: Option<OwnedFd>,
    /// The user namespace that the workload belongs to.
    pub user: Option<OwnedFd>,
    /// Whatever else it takes along.
    pub kept: Vec<OwnedFd>,
}

/// The child's own view of its pipes.
pub struct Story {
    pipe: File,
    user: Option<OwnedFd>,
    kept: Vec<OwnedFd>,
}

impl Story {
    /// Gives pid 1 the ends of a terminal.
    fn hand_over(&self, terminal: &Terminal) -> Result<()> {
        let fds = [terminal.master.as_raw_fd(), terminal.slave.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let sent = sendmsg::<()>(
            self.pipe.as_raw_fd(),
            &[IoSlice::new(b"T")],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        sent.map(drop).context("hand the terminal to pid 1")
    }

    /// Reports that all is ready and waits for the start.
    fn wait_gate(&mut self) -> Result<()> {
        self.pipe.write_all(b"R").context("report")?;
        // SAFETY: `arrange` put the gate there, and nothing else owns that number.
        let mut gate = unsafe { File::from_raw_fd(GATE) };
        if gate.read(&mut [0]).context("wait for start")? == 0 {
            leave(1);
        }
        Ok(())
    }

    /// Reports a failure and ends.
    pub fn fail(mut self, error: &anyhow::Error) -> ! {
        let _ = self.pipe.write_all(format!("E{error:#}").as_bytes());
        leave(1)
    }
}

/// Ends a child without running pid 1's own exit handlers.
pub fn leave(status: i32) -> ! {
    // SAFETY: _exit takes any status and does not return.
    unsafe { libc::_exit(status) }
}

/// Copies until there is no more. Never by splice(2), as std's copy does: it holds a pipe while it waits for a socket, and
/// so whoever would read the pipe, which is pid 1.
pub fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 32 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// First steps of every child: streams at 0 to 2, pipes at fixed places, nothing else inherited.
pub fn arrange(ends: Ends, pipes: Pipes) -> Story {
    let gate = pipes.gate.as_ref().map(|gate| gate.as_raw_fd());
    let user = pipes.user.as_ref().map(|user| user.as_raw_fd());
    let kept = pipes.kept.iter().map(AsRawFd::as_raw_fd);
    let (has_user, count) = (user.is_some(), kept.len());
    // Above all targets first, so that none is overwritten before it is copied.
    let mut high = Vec::new();
    let streams = ends.iter().map(|end| end.as_raw_fd()).chain([pipes.status.as_raw_fd()]);
    for fd in streams.chain(gate).chain(user).chain(kept) {
        // SAFETY: F_DUPFD_CLOEXEC on a descriptor that this process owns.
        high.push(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) });
    }
    for (target, fd) in high.iter().enumerate() {
        let flags = if target < 3 { 0 } else { libc::O_CLOEXEC };
        // SAFETY: both numbers are descriptors of this process; the target is free or to be replaced.
        unsafe { libc::dup3(*fd, target as RawFd, flags) };
    }
    let first_unused = high.len() as RawFd;
    // SAFETY: closes everything above our own; the owners of those numbers are forgotten below, not dropped.
    unsafe { libc::close_range(first_unused as libc::c_uint, libc::c_uint::MAX, 0) };
    std::mem::forget((ends, pipes));
    let first_kept = first_unused - count as RawFd;
    // SAFETY: dup3 put them there, last of all, and nothing else owns those numbers.
    let kept = (first_kept..first_unused).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    // SAFETY: dup3 put it just before them, and nothing else owns that number.
    let user = has_user.then(|| unsafe { OwnedFd::from_raw_fd(first_kept - 1) });
    // SAFETY: dup3 put the status pipe there, and nothing else owns that number.
    Story { pipe: unsafe { File::from_raw_fd(STATUS) }, user, kept }
}

/// Clones a process of pid 1's own that does `attempt` with what it takes along and, if that succeeds, goes on with
/// `go`, which talks over the process's streams.
pub fn bear<T>(
    kept: Vec<OwnedFd>,
    attempt: impl FnOnce(Vec<OwnedFd>) -> Result<T>,
    go: impl FnOnce(T),
) -> Result<Born> {
    let (stdio, ends) = stdio::pipes()?;
    let (status, child_status) = container::status()?;
    if let Side::Parent(pid) = fork(0)? {
        return Ok(Born { pid, stdio, status });
    }
    let mut story = arrange(ends, Pipes { status: child_status, gate: None, user: None, kept });
    match attempt(std::mem::take(&mut story.kept)) {
        Ok(made) => {
            drop(story);
            go(made);
            leave(0)
        }
        Err(error) => story.fail(&error),
    }
}

/// One of such a process's own streams.
pub fn own(stream: RawFd) -> ManuallyDrop<File> {
    // SAFETY: 0 and 1 are open for the whole life of the process, and never closed by this owner.
    ManuallyDrop::new(unsafe { File::from_raw_fd(stream) })
}

/// Becomes the workload under the container's `filter`, or tells why not. With `start`, waits for the start byte just
/// before execve, and then runs these hooks with this state.
pub fn become_workload(
    process: &Process,
    terminal: Option<Terminal>,
    filter: Option<&Seccomp>,
    mut story: Story,
    start: Option<(&[Hook], &Value)>,
) -> ! {
    // Under no_new_privs anybody may load a filter: as the last step, so that it sees the workload alone. Without, it
    // takes a privilege that goes with the capabilities, and the steps from there on need the filter's leave.
    let (early, late) = if process.no_new_privileges { (None, filter) } else { (filter, None) };
    let error = match prepare(process, terminal, early, &story)
        .and_then(|command| wait_gate(command, &mut story, start))
    {
        Ok(command) => match late.map_or(Ok(()), seccomp::load).and_then(|()| command.run()) {
            Ok(never) => match never {},
            Err(error) => error,
        },
        Err(error) => error,
    };
    story.fail(&error)
}

/// Becomes the process that holds what a pod's containers share: without privilege, it waits for SIGTERM or SIGINT, and
/// for the processes that lose their parent in its pid namespace.
pub fn become_idle(mut story: Story) -> ! {
    if let Err(error) = become_user(&Process::default()).and_then(|()| story.wait_gate()) {
        story.fail(&error);
    }
    drop(story);
    // What is blocked is not ignored, even where it is pid 1 that gets it.
    let awaited: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD].into_iter().collect();
    let _ = awaited.thread_block();
    loop {
        match awaited.wait() {
            Ok(Signal::SIGCHLD) => drop(reap::collect()),
            Ok(_) => leave(0),
            Err(_) => {}
        }
    }
}

fn wait_gate(command: Command, story: &mut Story, start: Option<(&[Hook], &Value)>) -> Result<Command> {
    if let Some((hooks, state)) = start {
        story.wait_gate()?;
        run_hooks(hooks, state, &command.env)?;
    }
    Ok(command)
}

/// `startContainer` hooks, which are the container's own programs and have its user's rights.
fn run_hooks(hooks: &[Hook], state: &Value, env: &[CString]) -> Result<()> {
    let mut state = state.clone();
    state["status"] = "created".into();
    state["pid"] = std::process::id().into();
    let state = state.to_string();
    let env: Vec<String> = env.iter().map(|entry| entry.to_string_lossy().into_owned()).collect();
    let setting = Setting { state: &state, dir: None, env: Some(&env), watch: &Watch::default() };
    hooks.iter().enumerate().try_for_each(|(n, hook)| a3s_box_hook::run("startContainer", n, hook, setting))
}

struct Command {
    program: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Command {
    fn run(self) -> Result<Infallible> {
        let errno = match nix::unistd::execve(&self.program, &self.args, &self.env) {
            Ok(never) => match never {},
            Err(errno) => errno,
        };
        Err(anyhow!("exec {}: {}", self.program.to_string_lossy(), words(errno)))
    }
}

/// An errno in the lower-case words that engines look for.
pub fn words(errno: Errno) -> String {
    match errno {
        Errno::ENOEXEC => "exec format error".into(),
        errno => errno.desc().to_lowercase(),
    }
}

fn prepare(
    process: &Process,
    terminal: Option<Terminal>,
    filter: Option<&Seccomp>,
    story: &Story,
) -> Result<Command> {
    // Fails only for a process that leads a session already.
    let _ = nix::unistd::setsid();
    if let Some(terminal) = terminal {
        story.hand_over(&terminal)?;
        terminal.take()?;
    }
    own_streams(process.uid);
    set_limits(process)?;
    if let Some(score) = process.oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", score.to_string()).context("process.oomScoreAdj")?;
    }
    schedule(process)?;
    let entered = nix::unistd::chdir(&process.cwd);
    if let Some(user) = &story.user {
        // Full of capabilities there, and without any outside of it.
        nix::sched::setns(user, nix::sched::CloneFlags::CLONE_NEWUSER).context("enter the user namespace")?;
    }
    filter.map_or(Ok(()), seccomp::load)?;
    become_user(process)?;
    // Root may be kept out of a directory that the user may enter, and the other way round.
    if let Err(errno) = entered.or_else(|_| nix::unistd::chdir(&process.cwd)) {
        bail!("chdir to cwd ({:?}) set in config.json failed: {}", process.cwd, words(errno));
    }
    if process.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().context("process.noNewPrivileges")?;
    }
    let env = environment(process);
    let program = find_program(process, &env)?;
    reset_signals()?;
    let to_c =
        |text: &String| CString::new(text.as_str()).with_context(|| format!("{text:?} holds a NUL byte"));
    Ok(Command {
        program: CString::new(program)?,
        args: process.args.iter().map(to_c).collect::<Result<_>>()?,
        env: env.iter().map(to_c).collect::<Result<_>>()?,
    })
}

/// The pipes belong to the workload's user, so that it can open /dev/stdout anew.
fn own_streams(uid: u32) {
    for fd in 0..3 {
        // SAFETY: fchown on this process's own streams; a failure leaves them as they were.
        unsafe { libc::fchown(fd, uid, u32::MAX) };
    }
}

fn set_limits(process: &Process) -> Result<()> {
    for limit in &process.rlimits {
        let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: the value lives until after the call; the kernel checks the number.
        let result = unsafe { libc::setrlimit(limit.resource, &raw const value) };
        Errno::result(result).with_context(|| format!("process.rlimits: set resource {}", limit.resource))?;
    }
    Ok(())
}

/// sched_setattr(2) and ioprio_set(2), which no library wraps; both may need the privilege that root still has here.
fn schedule(process: &Process) -> Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    if let Some(scheduler) = &process.scheduler {
        let attributes = libc::sched_attr {
            size: size_of::<libc::sched_attr>() as u32,
            sched_policy: scheduler.policy,
            sched_flags: scheduler.flags,
            sched_nice: scheduler.nice,
            sched_priority: scheduler.priority,
            sched_runtime: scheduler.runtime,
            sched_deadline: scheduler.deadline,
            sched_period: scheduler.period,
        };
        // SAFETY: the attributes live until after the call and say their size; 0 is this process.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        Errno::result(result).map_err(|e| anyhow!("process.scheduler: {}", words(e)))?;
    }
    if let Some(priority) = process.io_priority {
        // SAFETY: plain numbers; 0 is this process.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
        Errno::result(result).map_err(|e| anyhow!("process.ioPriority: {}", words(e)))?;
    }
    Ok(())
}

/// Bounding set, ids, then the remaining sets: each step still has the privilege it needs.
fn become_user(process: &Process) -> Result<()> {
    let wanted = &process.capabilities;
    for capability in caps::runtime::thread_all_supported() {
        if wanted.bounding & capability.bitmask() == 0 {
            caps::drop(None, CapSet::Bounding, capability).context("process.capabilities.bounding")?;
        }
    }
    nix::sys::prctl::set_keepcaps(true).context("keep capabilities")?;
    let groups: Vec<Gid> = process.groups.iter().copied().map(Gid::from_raw).collect();
    nix::unistd::setgroups(&groups).context("process.user.additionalGids")?;
    let gid = Gid::from_raw(process.gid);
    nix::unistd::setresgid(gid, gid, gid).context("process.user.gid")?;
    let uid = Uid::from_raw(process.uid);
    nix::unistd::setresuid(uid, uid, uid).context("process.user.uid")?;
    nix::sys::prctl::set_keepcaps(false).context("keep capabilities")?;
    if let Some(umask) = process.umask {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
    }
    // Inheritable while the right to it is still in force; effective within permitted; ambient last, as it needs both.
    for (kind, mask, field) in [
        (CapSet::Inheritable, wanted.inheritable, "inheritable"),
        (CapSet::Effective, wanted.effective & wanted.permitted, "effective"),
        (CapSet::Permitted, wanted.permitted, "permitted"),
        (CapSet::Ambient, wanted.ambient, "ambient"),
    ] {
        caps::set(None, kind, &set_of(mask)).map_err(|e| anyhow!("process.capabilities.{field}: {e}"))?;
    }
    Ok(())
}

fn set_of(mask: u64) -> CapsHashSet {
    caps::all().into_iter().filter(|capability: &Capability| mask & capability.bitmask() != 0).collect()
}

/// The process's own environment, with HOME where it has none: from the container's passwd file, as runc does.
fn environment(process: &Process) -> Vec<String> {
    let mut env = process.env.clone();
    if !env.iter().any(|entry| entry.starts_with("HOME=") && entry.len() > 5) {
        env.retain(|entry| !entry.starts_with("HOME="));
        env.push(format!("HOME={}", home(process.uid)));
    }
    env
}

fn home(uid: u32) -> String {
    let uid = uid.to_string();
    let passwd = passwd().unwrap_or_default();
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() >= 6 && fields[2] == uid)
        .map_or_else(|| "/".into(), |fields| fields[5].to_string())
}

/// The image's passwd file, if it is one: a FIFO would block, a device would never end.
fn passwd() -> Option<String> {
    const LONGEST: u64 = 1 << 20;
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/etc/passwd").ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Looks the program up as a shell would, with the texts that engines map to 126 and 127.
fn find_program(process: &Process, env: &[String]) -> Result<String> {
    let name = process.args.first().context("process.args is empty")?;
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.clone()),
            Err(Errno::ENOENT) => bail!("exec: {name:?}: stat {name}: no such file or directory"),
            Err(errno) => bail!("exec: {name:?}: {}", words(errno)),
        };
    }
    let path = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for dir in path.split(':').filter(|dir| !dir.is_empty() && !name.is_empty()) {
        let candidate = format!("{dir}/{name}");
        match executable(Path::new(&candidate)) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        bail!("exec: {name:?}: permission denied");
    }
    bail!("exec: {name:?}: executable file not found in $PATH")
}

fn executable(path: &Path) -> Result<(), Errno> {
    let metadata =
        std::fs::metadata(path).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK)
}

/// Handlers do not survive execve, but ignored signals and the mask do.
fn reset_signals() -> Result<()> {
    // The kernel's own struct, all zero: default action. glibc keeps two of the numbers from its callers.
    let default = [0u64; 4];
    for number in 1..=64 {
        // SAFETY: the struct lives until after the call and the mask's size is given; no handler is installed.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, number, default.as_ptr(), 0usize, 8usize) };
    }
    SigSet::empty().thread_set_mask().context("signal mask")
}
