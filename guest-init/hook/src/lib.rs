//! Runs one hook (runtime-spec config.md, POSIX-platform hooks), on the host as in the guest.
//!
//! In: a hook, the state for its standard input. Out: success, or one line in runc's words. Must not: wait beyond the
//! hook's timeout or for what a hook leaves running, or keep more of its output than an error shows.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use a3s_box_proto::Hook;
use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, set_parent_process_death_signal,
};

/// How much of each output an error shows.
const SHOWN: usize = 1000;

/// What ends a hook before its time.
#[derive(Default)]
pub struct Watch<'a> {
    /// Descriptors that may become readable.
    pub fds: Vec<BorrowedFd<'a>>,
    /// Asked when one is: why to give up, if that is what it means. It must not stay readable where it is not.
    pub reason: Option<&'a dyn Fn() -> Option<String>>,
}

/// What a hook runs with.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    /// The container's state as JSON, for the hook's standard input.
    pub state: &'a str,
    /// Its working directory; the caller's where none is given.
    pub dir: Option<&'a Path>,
    /// The environment of a hook that gives none itself; the caller's where none is given.
    pub env: Option<&'a [String]>,
    /// When to give up.
    pub watch: &'a Watch<'a>,
}

/// Runs the hook that is number `index` of its kind.
pub fn run(kind: &str, index: usize, hook: &Hook, setting: Setting<'_>) -> Result<()> {
    attempt(hook, setting).map_err(|error| anyhow!("error running {kind} hook #{index}: {error:#}"))
}

fn attempt(hook: &Hook, setting: Setting<'_>) -> Result<()> {
    let mut running = Running::start(hook, setting)?;
    let begin = Instant::now();
    let timeout = hook.timeout.map(Duration::from_secs);
    loop {
        let left = timeout.map(|timeout| timeout.saturating_sub(begin.elapsed()));
        if left == Some(Duration::ZERO) {
            running.kill();
            bail!("hook ran past specified timeout of {:.1}s", timeout.unwrap_or_default().as_secs_f64());
        }
        let ready = running.wait(left, setting.watch)?;
        if ready.ended {
            return running.finish();
        }
        if ready.watched
            && let Some(reason) = setting.watch.reason.and_then(|reason| reason())
        {
            running.kill();
            bail!("{reason}");
        }
    }
}

struct Running {
    child: Child,
    pidfd: OwnedFd,
    outputs: [Output; 2],
}

#[derive(Default)]
struct Ready {
    ended: bool,
    watched: bool,
}

impl Running {
    fn start(hook: &Hook, setting: Setting<'_>) -> Result<Self> {
        let mut command = Command::new(&hook.path);
        if let Some((name, rest)) = hook.args.split_first() {
            command.arg0(name).args(rest);
        }
        if let Some(env) = hook.env.as_deref().or(setting.env) {
            // As execve passes it on: what holds no '=' is kept out, since no program could read it.
            command.env_clear().envs(env.iter().filter_map(|entry| entry.split_once('=')));
        }
        if let Some(dir) = setting.dir {
            command.current_dir(dir);
        }
        command.stdin(state(setting.state)?).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Of its own, so that what it has started ends with it when its time is up.
        command.process_group(0);
        // SAFETY: one system call, and nothing else, happens between fork and exec.
        unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
        let mut child = command
            .spawn()
            .map_err(|error| anyhow!("fork/exec {}: {}", hook.path.display(), words(&error)))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).context("pidfd_open")?;
        let stdout = Output::new(child.stdout.take().map(OwnedFd::from))?;
        let stderr = Output::new(child.stderr.take().map(OwnedFd::from))?;
        Ok(Running { child, pidfd, outputs: [stdout, stderr] })
    }

    fn wait(&mut self, left: Option<Duration>, watch: &Watch<'_>) -> Result<Ready> {
        let open: Vec<_> = (0..self.outputs.len()).filter(|n| self.outputs[*n].pipe.is_some()).collect();
        let pipes = open.iter().filter_map(|n| self.outputs[*n].pipe.as_ref()).map(|pipe| pipe.as_fd());
        let fds = [self.pidfd.as_fd()].into_iter().chain(pipes).chain(watch.fds.iter().copied());
        let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (n, _) in open.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            self.outputs[*n].take_in();
        }
        Ok(Ready { ended: ready[0], watched: ready[1 + open.len()..].contains(&true) })
    }

    /// Its outcome. What it left running may hold its pipes open: only what is in them by now counts.
    fn finish(mut self) -> Result<()> {
        let status = self.child.wait().context("wait")?;
        self.outputs.iter_mut().for_each(Output::take_in);
        if status.success() {
            return Ok(());
        }
        bail!("{}, stdout: {}, stderr: {}", how(status), self.outputs[0].shown(), self.outputs[1].shown())
    }

    fn kill(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// A file that holds the state: a hook that does not read it holds nobody up, and its end is where the state ends.
fn state(state: &str) -> Result<File> {
    let mut file = File::from(memfd_create(c"state", MemfdFlags::CLOEXEC).context("memfd")?);
    file.write_all(state.as_bytes()).and_then(|()| file.rewind()).context("write the state")?;
    Ok(file)
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) if signal == Signal::KILL.as_raw() => "signal: killed".into(),
        (None, signal) => format!("signal: {}", signal.unwrap_or_default()),
    }
}

/// A system error in the lower-case words that engines look for.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

struct Output {
    pipe: Option<File>,
    text: Vec<u8>,
}

impl Output {
    fn new(pipe: Option<OwnedFd>) -> Result<Self> {
        if let Some(pipe) = &pipe {
            fcntl_setfl(pipe, OFlags::NONBLOCK).context("fcntl")?;
        }
        Ok(Output { pipe: pipe.map(File::from), text: Vec::new() })
    }

    /// Reads what is there; of what is more than an error shows, nothing is kept.
    fn take_in(&mut self) {
        let mut buffer = [0; 4096];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(n) => {
                    let room = SHOWN.saturating_sub(self.text.len());
                    self.text.extend_from_slice(&buffer[..n.min(room)]);
                    // One chunk a turn: a hook that never stops writing must not keep the clock from being read.
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// On one line, as an error has to be.
    fn shown(&self) -> String {
        let text = String::from_utf8_lossy(&self.text);
        let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
        text.trim_end().chars().map(escape).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str) -> Hook {
        let args = ["sh", "-c", script].map(str::to_string).to_vec();
        Hook { path: "/bin/sh".into(), args, env: None, timeout: None }
    }

    fn outcome(hook: &Hook, watch: &Watch) -> String {
        let setting = Setting { state: "{\"id\":\"c1\"}", dir: None, env: None, watch };
        match run("prestart", 3, hook, setting) {
            Ok(()) => "ok".into(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_state_is_on_stdin_and_ends_there() {
        let checks = hook("[ \"$(cat)\" = '{\"id\":\"c1\"}' ]");
        assert_eq!(outcome(&checks, &Watch::default()), "ok");
        assert_eq!(outcome(&hook(":"), &Watch::default()), "ok");
    }

    #[test]
    fn failures_speak_runcs_words_on_one_line() {
        let text = outcome(&hook("echo out; echo err; echo err >&2; exit 7"), &Watch::default());
        let expected = "error running prestart hook #3: exit status 7, stdout: out\\nerr, stderr: err";
        assert_eq!(text, expected);
        let text = outcome(&hook("kill -9 $$"), &Watch::default());
        assert!(text.contains("hook #3: signal: killed, stdout: , stderr: "), "{text}");
        let missing = Hook { path: "/no/such".into(), ..hook("") };
        let text = outcome(&missing, &Watch::default());
        assert_eq!(text, "error running prestart hook #3: fork/exec /no/such: no such file or directory");
    }

    #[test]
    fn output_is_bounded_and_does_not_block() {
        let text = outcome(&hook("head -c 1000000 /dev/zero | tr '\\0' x; exit 1"), &Watch::default());
        assert!(text.len() < SHOWN + 200, "{}", text.len());
    }

    #[test]
    fn a_timeout_ends_it_with_what_it_started() {
        let begin = Instant::now();
        let slow = Hook { timeout: Some(1), ..hook("sleep 100; :") };
        let text = outcome(&slow, &Watch::default());
        assert!(text.ends_with("hook ran past specified timeout of 1.0s"), "{text}");
        let endless = Hook { timeout: Some(1), ..hook("yes") };
        assert!(outcome(&endless, &Watch::default()).contains("past specified timeout"));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_it_leaves_running_holds_nobody_up() {
        let begin = Instant::now();
        assert_eq!(outcome(&hook("sleep 20 & echo started"), &Watch::default()), "ok");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn its_environment_is_the_one_given() {
        let clean = Hook { env: Some(vec!["A=1".into()]), ..hook("[ \"$A$HOME\" = 1 ]") };
        assert_eq!(outcome(&clean, &Watch::default()), "ok");
        let none = Hook { env: Some(vec![]), ..hook("[ -z \"$HOME$CARGO\" ]") };
        assert_eq!(outcome(&none, &Watch::default()), "ok");
        assert_eq!(outcome(&hook("[ -n \"$PATH\" ]"), &Watch::default()), "ok");
    }

    #[test]
    fn a_watched_descriptor_gives_it_up() {
        let (reader, writer) = io::pipe().unwrap();
        drop(writer);
        let reason = || Some("given up".to_string());
        let watch = Watch { fds: vec![reader.as_fd()], reason: Some(&reason) };
        let text = outcome(&hook("sleep 100"), &watch);
        assert_eq!(text, "error running prestart hook #3: given up");
    }
}
