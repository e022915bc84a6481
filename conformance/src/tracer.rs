//! Watches every system call of a command and of what it starts, and lets one of them fail.
//!
//! In: a command, and a [`Point`] where a call is to fail. Out: the command's status, and a [`Trace`]. It is a process
//! of its own (the suite's hidden `--trace`), for what it waits for is none of the suite's. It ends with the command;
//! what that has started goes on untraced. Must not: change anything but that one call.
//!
//! strace's `inject=CALL:when=N` counts in every process, so the command's own N-th call hides those of the processes
//! that it starts. Here a point names the process too.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::process::WaitOptions;

/// The word on the suite's command line.
pub const WORD: &str = "--trace";
/// The tracer's own status where it does not work; no runtime ends with it.
pub const BROKEN: u8 = 99;
/// The stop of a system call, told apart from a breakpoint's.
const CALL_STOP: i32 = libc::SIGTRAP | 0x80;
/// Stops itself, to be seized before anything of the command's happens.
const STOPPER: &str = "kill -STOP $$; exec \"$@\"";

/// A system call that is to fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// Whose: `0` is the command, `0.2` the second process or thread that it starts, and so on.
    pub role: String,
    /// The call's number.
    pub call: u64,
    /// Its how manyth of this process.
    pub nth: u32,
    /// What it fails with.
    pub errno: i32,
    /// Whether all later ones of this process fail too.
    pub on: bool,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {} {}", self.role, self.call, self.nth, self.errno, self.on)
    }
}

impl Point {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        Some(Point {
            role: words.next()?.to_string(),
            call: words.next()?.parse().ok()?,
            nth: words.next()?.parse().ok()?,
            errno: words.next()?.parse().ok()?,
            on: words.next()?.parse().ok()?,
        })
    }
}

/// What came of a command.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// How often each process made each call.
    pub calls: BTreeMap<(String, u64), u32>,
    /// The name of the process whose call has failed.
    pub hit: Option<String>,
    /// How processes ended that did so before the command, as a shell shows it.
    pub ends: Vec<(String, i32)>,
}

impl Trace {
    fn write(&self, path: &Path) -> Result<()> {
        let calls = self.calls.iter().map(|((role, call), count)| format!("call {role} {call} {count}\n"));
        let hit = self.hit.iter().map(|name| format!("hit {name}\n"));
        let ends = self.ends.iter().map(|(role, status)| format!("end {role} {status}\n"));
        let text: String = calls.chain(hit).chain(ends).collect();
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Reads what [`main`] wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let mut trace = Trace::default();
        for line in text.lines() {
            match line.split(' ').collect::<Vec<_>>().as_slice() {
                ["call", role, call, count] => {
                    trace.calls.insert((role.to_string(), call.parse()?), count.parse()?);
                }
                ["hit", ..] => trace.hit = Some(line["hit ".len()..].to_string()),
                ["end", role, status] => trace.ends.push((role.to_string(), status.parse()?)),
                _ => bail!("{}: {line:?}", path.display()),
            }
        }
        Ok(trace)
    }
}

/// `command`, to be run by [`main`] of this program; its streams have to be set anew.
pub fn traced(command: &Command, point: Option<&Point>, report: &Path) -> Result<Command> {
    let mut tracer = Command::new(std::env::current_exe().context("our own path")?);
    tracer.arg(WORD).arg(report).arg(point.map_or(String::new(), Point::to_string));
    tracer.arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        tracer.current_dir(dir);
    }
    Ok(tracer)
}

/// The tracer. Ends as the command does.
pub fn main(args: impl Iterator<Item = OsString>) -> Result<ExitCode> {
    Ok(ExitCode::from(u8::try_from(follow(args)?).context("its status")?))
}

/// Of a report's path, a point or nothing, and a command: its status.
fn follow(mut args: impl Iterator<Item = OsString>) -> Result<i32> {
    let report = args.next().context("no report")?;
    let point = args.next().context("no point")?.into_string().unwrap_or_default();
    let child = Command::new("/bin/sh").args(["-c", STOPPER, "sh"]).args(args).spawn().context("start sh")?;
    let root = i32::try_from(child.id()).context("its pid")?;
    let stopped = wait(Some(root))?;
    ensure!(stopped == (root, (libc::SIGSTOP << 8) | 0x7f), "sh did not stop: {stopped:?}");
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC;
    ptrace::seize(Pid::from_raw(root), options).context("seize")?;
    nix::sys::signal::kill(Pid::from_raw(root), Signal::SIGCONT).context("let sh go on")?;
    let mut tracer = Tracer { root, point: Point::parse(&point), ..Tracer::default() };
    tracer.tasks.insert(root, Task::new("0".into()));
    let status = tracer.follow()?;
    tracer.trace.write(report.as_ref())?;
    Ok(status)
}

/// A status as the kernel gives it.
fn wait(pid: Option<i32>) -> Result<(i32, i32)> {
    loop {
        let found = match pid.and_then(rustix::process::Pid::from_raw) {
            Some(pid) => rustix::process::waitpid(Some(pid), WaitOptions::UNTRACED),
            None => rustix::process::wait(WaitOptions::UNTRACED),
        };
        match found {
            Ok(Some((pid, status))) => return Ok((pid.as_raw_nonzero().get(), status.as_raw())),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("wait"),
        }
    }
}

/// A process or thread.
#[derive(Debug)]
struct Task {
    role: String,
    children: u32,
    /// Between the two stops of a call.
    inside: bool,
    /// What that call is to end with.
    failing: Option<i32>,
}

impl Task {
    fn new(role: String) -> Self {
        Task { role, children: 0, inside: false, failing: None }
    }
}

#[derive(Debug, Default)]
struct Tracer {
    root: i32,
    /// Whether `sh` has become the command.
    begun: bool,
    tasks: HashMap<i32, Task>,
    /// Those that stopped before their parent said whose they are.
    early: HashSet<i32>,
    point: Option<Point>,
    trace: Trace,
}

impl Tracer {
    /// Until the command's end; its status as a shell shows it.
    fn follow(&mut self) -> Result<i32> {
        loop {
            let (pid, status) = wait(None)?;
            if status & 0xff == 0x7f {
                self.stopped(pid, (status >> 8) & 0xff, status >> 16);
                continue;
            }
            let status = if status & 0x7f == 0 { (status >> 8) & 0xff } else { 128 + (status & 0x7f) };
            if pid == self.root {
                return Ok(status);
            }
            if let Some(task) = self.tasks.remove(&pid) {
                self.trace.ends.push((task.role, status));
            }
        }
    }

    fn stopped(&mut self, pid: i32, signal: i32, event: i32) {
        if !self.tasks.contains_key(&pid) {
            self.early.insert(pid);
            return;
        }
        let mut passed_on = None;
        match event {
            0 if signal == CALL_STOP => self.at_call(pid),
            0 => {
                passed_on = Signal::try_from(signal).ok();
                // The kernel keeps it from a pid 1 that is traced, which would crash for ever.
                if [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE].contains(&signal) {
                    passed_on = Some(Signal::SIGKILL);
                    self.trace.ends.push((self.tasks[&pid].role.clone(), 128 + signal));
                }
            }
            libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => self.adopt(pid),
            libc::PTRACE_EVENT_EXEC if pid == self.root => self.begun = true,
            _ => {}
        }
        resume(pid, passed_on);
    }

    fn adopt(&mut self, parent: i32) {
        let Some(child) =
            ptrace::getevent(Pid::from_raw(parent)).ok().and_then(|pid| i32::try_from(pid).ok())
        else {
            return;
        };
        let Some(task) = self.tasks.get_mut(&parent) else { return };
        task.children += 1;
        let role = format!("{}.{}", task.role, task.children);
        self.tasks.insert(child, Task::new(role));
        if self.early.remove(&child) {
            resume(child, None);
        }
    }

    fn at_call(&mut self, pid: i32) {
        let Some(task) = self.tasks.get_mut(&pid) else { return };
        if task.inside {
            task.inside = false;
            if let Some(errno) = task.failing.take() {
                registers::end_with(pid, errno);
            }
            return;
        }
        let Some(call) = registers::entered(pid) else { return };
        task.inside = true;
        if !self.begun {
            return;
        }
        let count = self.trace.calls.entry((task.role.clone(), call)).or_default();
        *count += 1;
        let is_it = |point: &&Point| {
            (&point.role, point.call) == (&task.role, call)
                && (point.nth == *count || (point.on && point.nth < *count))
        };
        if let Some(point) = self.point.as_ref().filter(is_it) {
            if registers::cannot_fail(pid) {
                self.trace.hit.get_or_insert("spared".into());
                return;
            }
            task.failing = Some(point.errno);
            registers::skip(pid);
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            self.trace.hit.get_or_insert(name.trim_end().to_string());
        }
    }
}

/// It may have been killed meanwhile; then its end comes next.
fn resume(pid: i32, signal: Option<Signal>) {
    let _ = ptrace::syscall(Pid::from_raw(pid), signal);
}

mod registers {
    use nix::libc;
    use nix::sys::ptrace::{getregs, setregs};
    use nix::unistd::Pid;

    /// The call that begins at this stop. None where the stop is not one of a beginning.
    pub fn entered(pid: i32) -> Option<u64> {
        let registers = getregs(Pid::from_raw(pid)).ok()?;
        (registers.rax as i64 == -i64::from(libc::ENOSYS)).then_some(registers.orig_rax)
    }

    /// Whether it is a read or write of an eventfd, or what Rust's `Command` hears of its child by: eight bytes, at whose
    /// failure it waits for the child, which may be for ever, and panics.
    pub fn cannot_fail(pid: i32) -> bool {
        let Ok(registers) = getregs(Pid::from_raw(pid)) else { return false };
        let target = std::fs::read_link(format!("/proc/{pid}/fd/{}", registers.rdi));
        let is_counter = target.is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]");
        is_counter || (registers.orig_rax == libc::SYS_recvfrom as u64 && registers.rdx == 8)
    }

    /// Keeps the call from being made.
    pub fn skip(pid: i32) {
        if let Ok(mut registers) = getregs(Pid::from_raw(pid)) {
            registers.orig_rax = u64::MAX;
            let _ = setregs(Pid::from_raw(pid), registers);
        }
    }

    /// At its end, what it ends with.
    pub fn end_with(pid: i32, errno: i32) {
        if let Ok(mut registers) = getregs(Pid::from_raw(pid)) {
            registers.rax = (-i64::from(errno)) as u64;
            let _ = setregs(Pid::from_raw(pid), registers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the tracer in a process of its own: this test once more, with the command in its environment.
    fn trace(script: &str, point: Option<&Point>) -> (i32, Trace) {
        let report = std::env::temp_dir().join(format!("tracer-{}-{}", std::process::id(), script.len()));
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tracer::tests::child", "--nocapture", "--include-ignored"])
            .env("TRACER_REPORT", &report)
            .env("TRACER_POINT", point.map_or(String::new(), Point::to_string))
            .env("TRACER_SCRIPT", script)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        let code = text.lines().find_map(|line| line.strip_prefix("ended with "));
        let trace = Trace::read(&report).unwrap_or_else(|error| panic!("{error:#}: {text}"));
        fs::remove_file(report).unwrap();
        (code.unwrap_or_else(|| panic!("{text}")).parse().unwrap(), trace)
    }

    #[test]
    #[ignore = "the other half of the test below"]
    fn child() {
        let var = |name| std::env::var_os(name).unwrap_or_default();
        let args =
            [var("TRACER_REPORT"), var("TRACER_POINT"), "/bin/sh".into(), "-c".into(), var("TRACER_SCRIPT")];
        if !args[0].is_empty() {
            println!("\nended with {}", follow(args.into_iter()).unwrap());
        }
    }

    #[test]
    fn counts_by_process_and_lets_one_call_fail() {
        let chdir = libc::SYS_chdir as u64;
        let script = "cd /; (cd /tmp; cd /; exit 3); [ $? = 3 ] && exit 7";
        let (status, whole) = trace(script, None);
        assert_eq!(status, 7);
        assert_eq!(whole.calls[&("0".to_string(), chdir)], 1);
        assert_eq!(whole.calls[&("0.1".to_string(), chdir)], 2);
        assert_eq!((&whole.hit, &whole.ends), (&None, &vec![("0.1".to_string(), 3)]));
        // The second of the subshell's fails, and so does the shell's own `cd` nowhere.
        let point = Point { role: "0.1".into(), call: chdir, nth: 2, errno: libc::EIO, on: false };
        let script = "cd /; (cd /tmp; cd / && exit 3; exit 4); exit $?";
        let (status, failed) = trace(script, Some(&point));
        assert_eq!((status, failed.hit.as_deref()), (4, Some("sh")));
    }

    #[test]
    fn a_point_is_text_and_back() {
        let point = Point { role: "0.1.2".into(), call: 257, nth: 3, errno: 5, on: true };
        assert_eq!(Point::parse(&point.to_string()), Some(point));
        assert_eq!(Point::parse(""), None);
    }
}
