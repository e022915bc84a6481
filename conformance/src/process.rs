//! Runs commands so that none of them can hang the suite.
//!
//! In: a command. Out: what it printed and how it ended, or a failure once its time is up, and then its process group
//! is killed. Both pipes must reach their end: a process left behind that holds one fails the test like a hang.
//! Must not: wait for anything without a deadline.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process_group, pidfd_open, waitpid};

/// How a command ended.
#[derive(Debug)]
pub struct Output {
    /// What was run, for messages.
    pub shown: String,
    /// As a shell shows it: 128+n where signal n ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
    /// From its start to its end and the end of its pipes.
    pub took: Duration,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// What it said on standard error; of a line of logfmt, as runc prints it, its message.
    pub fn message(&self) -> String {
        let quoted = self.stderr.strip_prefix("time=").and_then(|line| line.split_once(" msg=\""));
        match quoted.and_then(|(_, rest)| rest.trim_end().strip_suffix('"')) {
            Some(text) => text.replace("\\\"", "\"").replace("\\\\", "\\"),
            None => self.stderr.clone(),
        }
    }

    /// Fails unless it ended with this code.
    pub fn code(self, expected: i32) -> Result<Self> {
        let (out, err) = (brief(&self.text()), brief(&self.stderr));
        ensure!(
            self.code == expected,
            "{}: ended with {}, not {expected}; stderr {err:?}, stdout {out:?}",
            self.shown,
            self.code
        );
        Ok(self)
    }

    /// Fails unless standard error has exactly one line, with every one of these words in it.
    pub fn one_line(self, words: &[&str]) -> Result<Self> {
        let lines = self.stderr.lines().count();
        ensure!(lines == 1, "{}: {lines} lines on stderr, not 1: {:?}", self.shown, brief(&self.stderr));
        ensure!(self.stderr.ends_with('\n'), "{}: no newline ends {:?}", self.shown, self.stderr);
        let message = self.message();
        let missing: Vec<_> = words.iter().filter(|word| !message.contains(**word)).collect();
        ensure!(missing.is_empty(), "{}: no {missing:?} in {:?}", self.shown, brief(&self.stderr));
        Ok(self)
    }

    /// Fails unless standard error is empty.
    pub fn quiet(self) -> Result<Self> {
        ensure!(self.stderr.is_empty(), "{}: stderr is not silent: {:?}", self.shown, brief(&self.stderr));
        Ok(self)
    }

    /// Fails unless it took no longer than this.
    pub fn within(self, limit: Duration) -> Result<Self> {
        ensure!(self.took <= limit, "{}: took {:.1?}, more than {limit:.1?}", self.shown, self.took);
        Ok(self)
    }
}

/// The beginning of a text, for messages.
pub fn brief(text: &str) -> String {
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

/// A command at work. Dropped, its process group is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pidfd: OwnedFd,
    stdin: Option<ChildStdin>,
    pipes: [Pipe; 2],
    ended: Option<ExitStatus>,
    shown: String,
    begin: Instant,
    patience: Duration,
}

#[derive(Debug)]
struct Pipe {
    file: Option<File>,
    text: Vec<u8>,
    paused: bool,
}

/// Starts a command with pipes, unless it was given other streams before, in a process group of its own.
pub fn start(mut command: Command, piped: bool, patience: Duration) -> Result<Running> {
    let shown = show(&command);
    if piped {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let begin = Instant::now();
    let mut child = command.process_group(0).spawn().with_context(|| format!("start {shown}"))?;
    // The descriptors of the child's ends live in `command`: with them open no pipe would ever end.
    drop(command);
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
    let stdin = child.stdin.take();
    if let Some(stdin) = &stdin {
        rustix::fs::fcntl_setfl(stdin, rustix::fs::OFlags::NONBLOCK).context("fcntl")?;
    }
    let out = child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    let err = child.stderr.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    let pipes = [out, err].map(|file| Pipe { file, text: Vec::new(), paused: false });
    Ok(Running { child, pidfd, stdin, pipes, ended: None, shown, begin, patience })
}

/// Runs a command to its end, with `input` on its standard input.
pub fn run(command: Command, input: &[u8], patience: Duration) -> Result<Output> {
    let mut running = start(command, true, patience)?;
    running.feed(input)?;
    running.finish()
}

fn show(command: &Command) -> String {
    let args = command.get_args().map(|arg| arg.to_string_lossy());
    // The first two name the state directory, and are the same everywhere.
    let words: Vec<_> = args.filter(|arg| !arg.starts_with("--root")).collect();
    brief(&words.join(" ").replace('\n', "; "))
}

impl Running {
    /// Its pid.
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        rustix::process::pidfd_send_signal(&self.pidfd, signal)
            .with_context(|| format!("signal {}", self.shown))
    }

    /// Writes all of it to its standard input; what it prints meanwhile is kept. Its end before that is no error.
    pub fn feed(&mut self, mut input: &[u8]) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        while !input.is_empty() && self.stdin.is_some() {
            if self.turn(deadline, true).context("writing to its stdin")?
                && let Some(stdin) = &mut self.stdin
            {
                match stdin.write(input) {
                    Ok(n) => input = &input[n..],
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(e) if e.kind() == ErrorKind::BrokenPipe => self.stdin = None,
                    Err(e) => return Err(e).context("write to its stdin"),
                }
            }
        }
        Ok(())
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Stops reading its standard output, or goes on.
    pub fn stop_reading(&mut self, stop: bool) {
        self.pipes[0].paused = stop;
    }

    /// Closes our end of its standard output.
    pub fn close_stdout(&mut self) {
        self.pipes[0].file = None;
    }

    /// Whether it has ended already.
    pub fn has_ended(&mut self) -> Result<bool> {
        self.ended = self.child.try_wait().context("wait")?;
        Ok(self.ended.is_some())
    }

    /// Reads until its standard output holds this text; returns all of it so far.
    pub fn read_until(&mut self, text: &str) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        loop {
            let so_far = String::from_utf8_lossy(&self.pipes[0].text).into_owned();
            if so_far.contains(text) {
                return Ok(so_far);
            }
            if self.pipes[0].file.is_none() {
                let err = String::from_utf8_lossy(&self.pipes[1].text).into_owned();
                bail!(
                    "{}: stdout ended without {text:?}: {:?}, stderr {:?}",
                    self.shown,
                    brief(&so_far),
                    brief(&err)
                );
            }
            self.turn(deadline, false)
                .with_context(|| format!("waiting for {text:?} in {:?}", brief(&so_far)))?;
        }
    }

    /// Ends its standard input and waits for its end and that of its pipes.
    pub fn finish(mut self) -> Result<Output> {
        self.stdin = None;
        self.pipes[0].paused = false;
        let deadline = Instant::now() + self.patience;
        let status = loop {
            let open = self.pipes.iter().any(|pipe| pipe.file.is_some());
            match self.ended {
                Some(status) if !open => break status,
                Some(_) => {
                    self.turn(deadline, false).context("it has ended, but something holds its output")?
                }
                None => self.turn(deadline, false)?,
            };
        };
        let took = self.begin.elapsed();
        let code = status.code().or(status.signal().map(|signal| 128 + signal));
        let code = code.ok_or_else(|| anyhow!("{}: neither status nor signal", self.shown))?;
        let [stdout, stderr] = self.pipes.each_mut().map(|pipe| std::mem::take(&mut pipe.text));
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        Ok(Output { shown: std::mem::take(&mut self.shown), code, stdout, stderr, took })
    }

    /// Waits for one event and takes it in. True when its standard input can be written.
    fn turn(&mut self, deadline: Instant, wants_to_write: bool) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.give_up();
            let said = self.pipes.each_ref().map(|pipe| brief(&String::from_utf8_lossy(&pipe.text)));
            bail!(
                "{}: no end after {:.0?}; stdout {:?}, stderr {:?}",
                self.shown,
                self.patience,
                said[0],
                said[1]
            );
        }
        let mut kinds = Vec::new();
        let mut fds = Vec::new();
        for (index, pipe) in self.pipes.iter().enumerate().filter(|(_, pipe)| !pipe.paused) {
            if let Some(file) = &pipe.file {
                fds.push(PollFd::new(file, PollFlags::IN));
                kinds.push(Event::Output(index));
            }
        }
        if self.ended.is_none() {
            fds.push(PollFd::new(&self.pidfd, PollFlags::IN));
            kinds.push(Event::End);
        }
        if let Some(stdin) = self.stdin.as_ref().filter(|_| wants_to_write) {
            fds.push(PollFd::new(stdin, PollFlags::OUT));
            kinds.push(Event::Input);
        }
        wait_for(&mut fds, left)?;
        let happened: Vec<Event> = kinds
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(kind, _)| kind)
            .collect();
        for event in &happened {
            match event {
                Event::Output(index) => self.pipes[*index].take_in()?,
                Event::End => self.ended = self.child.try_wait().context("wait")?,
                Event::Input => {}
            }
        }
        Ok(happened.contains(&Event::Input))
    }

    fn give_up(&mut self) {
        if self.ended.is_none() {
            // What is left of it is found by the leak check.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            self.ended = self.child.wait().ok();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.give_up();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Output(usize),
    End,
    Input,
}

impl Pipe {
    fn take_in(&mut self) -> Result<()> {
        let mut buffer = [0; 64 << 10];
        let Some(file) = &mut self.file else { return Ok(()) };
        match file.read(&mut buffer).context("read its output")? {
            0 => self.file = None,
            n => self.text.extend_from_slice(&buffer[..n]),
        }
        Ok(())
    }
}

/// Waits for descriptors, at most so long.
pub fn wait_for(fds: &mut [PollFd<'_>], limit: Duration) -> Result<()> {
    let limit = Timespec::try_from(limit).context("a time limit")?;
    match poll(fds, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno).context("poll"),
    }
}

/// Waits for a process that is our child by adoption; its status as a shell shows it.
pub fn wait_child(pid: i32, limit: Duration) -> Result<i32> {
    let pid = Pid::from_raw(pid).context("pid 0")?;
    let shown = pid.as_raw_nonzero();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("pid {shown} is gone"))?;
    wait_for(&mut [PollFd::new(&pidfd, PollFlags::IN)], limit)?;
    match waitpid(Some(pid), WaitOptions::NOHANG).with_context(|| format!("pid {shown} is not our child"))? {
        Some((_, status)) => status
            .exit_status()
            .or(status.terminating_signal().map(|signal| 128 + signal))
            .with_context(|| format!("pid {shown}: neither status nor signal")),
        None => bail!("pid {shown} does not end within {limit:.1?}"),
    }
}

/// Collects children by adoption that have ended.
pub fn reap_orphans() {
    while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
}

/// What a program of the host's prints.
pub fn host(program: &str, args: &[&str], patience: Duration) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    Ok(run(command, b"", patience)?.code(0)?.text().trim_end().to_string())
}

/// Waits until `check` is true; asks again every 20 ms, for conditions that no descriptor announces.
pub fn eventually(what: &str, limit: Duration, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !check()? {
        if Instant::now() > deadline {
            bail!("{what}: not within {limit:.1?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Whether a process runs: a zombie does not.
pub fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|fields| !["Z", "X"].contains(&&*fields[0]))
}

/// Whether a process is a child of this one, by birth or by adoption.
pub fn is_child(pid: i32) -> bool {
    parent(pid) == i32::try_from(std::process::id()).ok()
}

/// Pid of a process's parent.
pub fn parent(pid: i32) -> Option<i32> {
    stat(pid)?.get(1)?.parse().ok()
}

/// Processor time that a process has used, in ticks of 10 ms.
pub fn ticks(pid: i32) -> Option<u64> {
    let fields = stat(pid)?;
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(number(11)? + number(12)?)
}

/// What /proc/PID/stat says behind the program's name, the state first.
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.split(' ').map(str::to_string).collect())
}

/// Waits until a process no longer runs.
pub fn wait_gone(pid: i32, limit: Duration) -> Result<()> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    wait_for(&mut [PollFd::new(&pidfd, PollFlags::IN)], limit)?;
    let pid = pid.as_raw_nonzero().get();
    ensure!(!is_alive(pid), "pid {pid} still runs after {limit:.1?}");
    Ok(())
}

/// Sends a signal to any process.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    let target = Pid::from_raw(pid).context("pid 0")?;
    rustix::process::kill_process(target, signal).with_context(|| format!("signal pid {pid}"))
}
