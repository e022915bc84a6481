//! The guest's ends of one process's streams: pipes or a terminal here, data frames there.
//!
//! In: frames of the owner, readiness of the pipes. Out: frames for the owner. Must not: read more from a pipe than
//! the window lets it send, or lose what a process wrote before it ended.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use a3s_box_proto::credit::{WINDOW, Window, cost};
use a3s_box_proto::{Frame, Outcome, Process, Size, Stream};
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::unistd::{pipe2, read, write};

use crate::terminal::{self, Terminal};

/// How much input is held for a process that does not read yet, beyond the window: the next bytes travel meanwhile.
const AHEAD: usize = WINDOW as usize;

/// The process's ends, to become its descriptors 0, 1 and 2.
pub type Ends = [OwnedFd; 3];

/// Host-facing ends of the three streams; `None` once a stream is over.
pub struct Stdio {
    stdin: Option<Sink>,
    stdout: Option<Source>,
    stderr: Option<Source>,
    terminal: Option<Terminal>,
}

struct Sink {
    fd: OwnedFd,
    pending: Vec<u8>,
    /// Credit owed for what is pending.
    owed: u32,
    ended: bool,
}

struct Source {
    fd: OwnedFd,
    window: Window,
}

/// Streams for a process. One with a terminal starts without any: it sends its terminal once it has opened it.
pub fn of(process: &Process) -> Result<(Stdio, Ends)> {
    if process.terminal.is_none() {
        return pipes();
    }
    let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let ends = [null(), null(), null()].map(|end| end.context("open /dev/null"));
    let [a, b, c] = ends;
    Ok((Stdio { stdin: None, stdout: None, stderr: None, terminal: None }, [a?, b?, c?]))
}

/// Makes three pipes.
pub fn pipes() -> Result<(Stdio, Ends)> {
    let (stdin_child, stdin) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
    let (stdout, stdout_child) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
    let (stderr, stderr_child) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
    for ours in [&stdin, &stdout, &stderr] {
        fcntl(ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("pipe flags")?;
    }
    let source = |fd| Some(Source { fd, window: Window::default() });
    let stdio = Stdio {
        stdin: Some(Sink { fd: stdin, pending: Vec::new(), owed: 0, ended: false }),
        stdout: source(stdout),
        stderr: source(stderr),
        terminal: None,
    };
    Ok((stdio, [stdin_child, stdout_child, stderr_child]))
}

impl Stdio {
    /// A terminal's. Its other end is held as well: a process that closes its own for a while is not gone.
    pub fn terminal(master: OwnedFd, slave: OwnedFd) -> Self {
        let copy = || master.try_clone().ok();
        Stdio {
            stdin: copy().map(|fd| Sink { fd, pending: Vec::new(), owed: 0, ended: false }),
            stdout: copy().map(|fd| Source { fd, window: Window::default() }),
            stderr: None,
            terminal: Some(Terminal { master, slave }),
        }
    }

    /// Sets the terminal's size.
    pub fn resize(&self, size: Size) -> Outcome {
        let Some(terminal) = &self.terminal else { return Outcome::NotFound };
        match terminal::resize(terminal.master.as_fd(), size) {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed { text: error.to_string() },
        }
    }

    /// Closes a terminal's every end that is ours, so that its processes get SIGHUP.
    fn hang_up(&mut self, out: &mut Vec<Frame>) {
        if self.stdout.is_some() {
            out.push(Frame::End(Stream::Stdout));
        }
        (self.stdin, self.stdout, self.terminal) = (None, None, None);
    }

    fn source(&mut self, stream: Stream) -> &mut Option<Source> {
        if stream == Stream::Stdout { &mut self.stdout } else { &mut self.stderr }
    }

    /// What to poll for.
    pub fn interests(&self) -> impl Iterator<Item = (Stream, BorrowedFd<'_>, PollFlags)> {
        // A terminal's end has nothing to tell that its output does not.
        let worth = |sink: &&Sink| self.terminal.is_none() || !sink.pending.is_empty();
        let stdin = self.stdin.as_ref().filter(worth).map(|sink| {
            // Even with nothing to write, POLLERR tells that the process closed its end.
            let flags = if sink.pending.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            (Stream::Stdin, sink.fd.as_fd(), flags)
        });
        let readable = |source: &Option<Source>| source.as_ref().is_some_and(|s| s.window.allowance() > 0);
        let stdout = self.stdout.as_ref().filter(|_| readable(&self.stdout));
        let stderr = self.stderr.as_ref().filter(|_| readable(&self.stderr));
        stdin
            .into_iter()
            .chain(stdout.map(|s| (Stream::Stdout, s.fd.as_fd(), PollFlags::POLLIN)))
            .chain(stderr.map(|s| (Stream::Stderr, s.fd.as_fd(), PollFlags::POLLIN)))
    }

    /// Takes a frame of the owner's.
    pub fn accept(&mut self, frame: Frame, out: &mut Vec<Frame>) {
        match frame {
            Frame::Data(Stream::Stdin, bytes) => self.feed(&bytes, out),
            Frame::End(Stream::Stdin) => {
                if let Some(sink) = &mut self.stdin {
                    sink.ended = true;
                }
                self.pump_stdin(out);
                if self.terminal.is_some() {
                    self.hang_up(out);
                }
            }
            Frame::Credit(stream, credit) => {
                if let Some(source) = self.source(stream) {
                    source.window.credited(credit);
                }
            }
            // Nobody reads any more: closing our end lets the process meet SIGPIPE, as on a plain pipe.
            Frame::End(_) if self.terminal.is_some() => self.hang_up(out),
            Frame::End(stream) => *self.source(stream) = None,
            Frame::Data(..) | Frame::Message(_) => {}
        }
    }

    fn feed(&mut self, bytes: &[u8], out: &mut Vec<Frame>) {
        match &mut self.stdin {
            Some(sink) if sink.owed.saturating_add(cost(bytes.len())) <= WINDOW => {
                sink.pending.extend_from_slice(bytes);
                sink.owed += cost(bytes.len());
                self.pump_stdin(out);
            }
            // A sender beyond its window has lost its manners, not its bytes' right to order: end the stream.
            Some(_) => self.stdin = None,
            None => {}
        }
    }

    /// A pipe is ready (or its other end is gone).
    pub fn ready(&mut self, stream: Stream, out: &mut Vec<Frame>) {
        match stream {
            Stream::Stdin => self.pump_stdin(out),
            output => {
                self.pump_output(output, out);
            }
        }
    }

    fn pump_stdin(&mut self, out: &mut Vec<Frame>) {
        let Some(sink) = &mut self.stdin else { return };
        let mut done = 0;
        let mut broken =
            self.terminal.is_none() && sink.pending.is_empty() && !sink.ended && peer_closed(&sink.fd);
        while done < sink.pending.len() && !broken {
            match write(&sink.fd, &sink.pending[done..]) {
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => broken = true,
            }
        }
        sink.pending.drain(..done);
        if sink.pending.len() <= AHEAD && sink.owed > 0 {
            out.push(Frame::Credit(Stream::Stdin, sink.owed));
            sink.owed = 0;
        }
        if broken {
            out.push(Frame::End(Stream::Stdin));
        }
        if broken || (sink.ended && sink.pending.is_empty()) {
            self.stdin = None;
        }
    }

    /// Moves one frame's worth; true when the pipe has no more for now.
    fn pump_output(&mut self, stream: Stream, out: &mut Vec<Frame>) -> bool {
        let slot = self.source(stream);
        let Some(source) = slot else { return true };
        let mut buffer = vec![0u8; source.window.allowance()];
        if buffer.is_empty() {
            return false;
        }
        match read(&source.fd, &mut buffer) {
            Ok(0) => {
                out.push(Frame::End(stream));
                *slot = None;
                true
            }
            Ok(n) => {
                buffer.truncate(n);
                source.window.sent(n);
                out.push(Frame::Data(stream, buffer));
                false
            }
            Err(Errno::EINTR) => false,
            Err(Errno::EAGAIN) => true,
            Err(_) => {
                out.push(Frame::End(stream));
                *slot = None;
                true
            }
        }
    }

    /// After the process's end: sends what its pipes hold and, when they are empty, ends the streams. Ends that
    /// other processes still write to are returned, to be drained so that those do not meet SIGPIPE.
    /// `None` while the window is closed.
    pub fn finish(&mut self, out: &mut Vec<Frame>) -> Option<Vec<OwnedFd>> {
        self.stdin = None;
        for stream in [Stream::Stdout, Stream::Stderr] {
            // The kernel hands a pty's last bytes on before it says that there are no more.
            while let Some(source) = self.source(stream) {
                if source.window.allowance() == 0 {
                    return None;
                }
                if self.pump_output(stream, out) {
                    break;
                }
            }
        }
        // Whoever else still has this terminal loses it, as with the end of any session's first process.
        if self.terminal.is_some() {
            self.hang_up(out);
        }
        let mut left = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            if let Some(source) = self.source(stream).take() {
                out.push(Frame::End(stream));
                left.push(source.fd);
            }
        }
        Some(left)
    }

    /// The owner is gone: what the process still writes goes nowhere.
    pub fn abandon(&mut self) -> Vec<OwnedFd> {
        self.stdin = None;
        if self.terminal.take().is_some() {
            self.stdout = None;
        }
        [self.stdout.take(), self.stderr.take()].into_iter().flatten().map(|source| source.fd).collect()
    }
}

fn peer_closed(fd: &OwnedFd) -> bool {
    let mut fds = [nix::poll::PollFd::new(fd.as_fd(), PollFlags::empty())];
    let polled = nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO);
    polled.is_ok() && fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR))
}
