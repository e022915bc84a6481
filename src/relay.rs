//! The host process that stands for one guest process: its bytes, its signals, its exit.
//!
//! A container's monitor and every foreground `exec` run this loop. In: a connection that owns a guest process, this
//! process's descriptors 0 to 2, its signals. Out: the exit status, after the last byte of output. Must not: trust a
//! byte of the guest's, or end while output waits to be written.

use std::os::fd::{AsFd, RawFd};

use a3s_box_proto::credit::{WINDOW, cost};
use a3s_box_proto::{ExitStatus, Frame, Reply, Request, Size, Stream, Target, unpack};
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};

use crate::console::Console;
use crate::guest::{Connection, clean};
use crate::oom::Teller;
use crate::sockets::Sockets;
use crate::stdio::{Event, Pumps};
use crate::terminal;
use crate::timeline::{Mark, Timeline};
use crate::vmm::{self, Vmm};

/// The VM, for the one relay that holds it.
pub struct Vm {
    /// Its VMM.
    pub vmm: Vmm,
    /// Its console.
    pub console: Console,
}

/// What a relay stands for.
#[derive(Default)]
pub struct Post<'a> {
    /// Container id.
    pub container: &'a str,
    /// The VM, for the one relay that holds it.
    pub vm: Option<&'a mut Vm>,
    /// Who tells the host of the container's out-of-memory kills, for the one relay that hears of them.
    pub teller: Option<&'a mut Teller>,
    /// What connects to sockets of the host's for the container, for its monitor.
    pub sockets: Option<&'a Sockets>,
    /// The one of descriptors 0 to 2 that says what size the process's terminal has, if it has one.
    pub terminal: Option<RawFd>,
    /// Whether the end of the output is told to whoever has it while input goes on: for a socket that is this relay's
    /// alone.
    pub half_closes: bool,
    /// Whether this process is a shell's job, to be stopped by its terminal instead of the guest's process.
    pub is_job: bool,
    /// The pumps, where they had to run before the process was promised to anybody.
    pub pumps: Option<Pumps>,
    /// Who wants to know of the first byte of output.
    pub timeline: Option<Timeline>,
}

/// How much of an output this process holds for a slow reader before the guest has to wait for that; credit that waited for
/// each write would let the guest run one window a round trip. A terminal's output must not lag behind its Control-C.
const AHEAD: u32 = 256 << 10;

/// Signals by which a caller gives up on what it waits for.
pub const ENDING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Blocks every signal that can be forwarded and makes them readable. Before any thread is started.
pub fn take_signals() -> Result<SignalFd> {
    let mut mask = SigSet::all();
    mask.remove(Signal::SIGCHLD);
    mask.thread_block().context("block signals")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")
}

struct Relay<'a> {
    connection: Connection,
    post: Post<'a>,
    pumps: Pumps,
    /// The guest process's end, once it is known.
    exit: Option<ExitStatus>,
    /// Outputs with bytes yet to come or to be written.
    outputs: u8,
    /// What of stdout and stderr is on its way, by stream.
    flows: [Flow; 3],
    connected: bool,
    vm_ended: bool,
    /// What the process's terminal was told last.
    size: Option<Size>,
}

/// Relays until the guest process has ended and its output is written.
pub fn run(connection: Connection, signals: &SignalFd, mut post: Post) -> Result<ExitStatus> {
    let has_terminal = post.terminal.is_some();
    let mut pumps = post.pumps.take().map_or_else(|| Pumps::start(has_terminal), Ok)?;
    if has_terminal {
        pumps.end(Stream::Stderr);
    }
    let mut relay = Relay {
        connection,
        post,
        pumps,
        exit: None,
        outputs: 2,
        flows: Default::default(),
        connected: true,
        vm_ended: false,
        size: None,
    };
    // It may have got another one since it was planned.
    relay.resize();
    // What came along with the last reply.
    relay.take_frames()?;
    loop {
        if let Some(status) = relay.exit.filter(|_| relay.outputs == 0) {
            return Ok(status);
        }
        let ready = relay.wait(signals)?;
        if ready.console
            && let Some(vm) = &mut relay.post.vm
        {
            vm.console.drain();
        }
        if ready.guest {
            relay.receive()?;
        }
        while let Some(event) = relay.pumps.next_event() {
            relay.handle(event);
        }
        if ready.signals && relay.forward(signals) {
            return relay.exit.context("ended by a signal");
        }
        if ready.vm {
            relay.vm_ended()?;
        }
    }
}

/// One output between the guest and its reader, in credit.
#[derive(Default)]
struct Flow {
    /// Received and not yet written.
    held: u32,
    /// Of the guest's window, not yet granted back.
    owed: u32,
}

impl Flow {
    /// What to grant now, so that not more than a window and `ahead` can be held.
    fn grant(&mut self, ahead: u32) -> u32 {
        let granted = self.owed.min((self.owed + ahead).saturating_sub(self.held));
        self.owed -= granted;
        granted
    }
}

#[derive(Default)]
struct Ready {
    guest: bool,
    signals: bool,
    console: bool,
    vm: bool,
}

impl Relay<'_> {
    fn wait(&self, signals: &SignalFd) -> Result<Ready> {
        let input = |wanted: bool| if wanted { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(self.pumps.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        if self.connected {
            fds.push(PollFd::new(self.connection.as_fd(), input(true)));
        }
        if let Some(vm) = &self.post.vm {
            fds.push(PollFd::new(vm.console.as_fd(), input(true)));
            if !self.vm_ended {
                fds.push(PollFd::new(vm.vmm.pidfd(), input(true)));
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let mut states = fds.iter().map(|fd| fd.any().unwrap_or(false)).skip(1);
        let mut next = |there: bool| there && states.next().unwrap_or(false);
        Ok(Ready {
            signals: next(true),
            guest: next(self.connected),
            console: next(self.post.vm.is_some()),
            vm: next(self.post.vm.is_some() && !self.vm_ended),
        })
    }

    fn receive(&mut self) -> Result<()> {
        let received = self.connection.receive();
        self.take_frames()?;
        match received {
            Ok(true) => Ok(()),
            Ok(false) => self.lost("connection closed"),
            Err(error) => self.lost(&error.to_string()),
        }
    }

    /// Nothing more will come from the guest.
    fn lost(&mut self, how: &str) -> Result<()> {
        self.connected = false;
        if self.exit.is_none() && self.post.vm.is_none() {
            bail!("the VM ended before the process did ({how})");
        }
        self.end(Stream::Stdout);
        self.end(Stream::Stderr);
        Ok(())
    }

    fn take_frames(&mut self) -> Result<()> {
        while let Some(frame) = self.connection.next_frame()? {
            match frame {
                Frame::Data(stream, bytes) => self.receive_output(stream, bytes)?,
                Frame::Credit(_, credit) => self.pumps.credit(credit),
                Frame::End(stream) => self.end(stream),
                Frame::Message(body) => self.note(&body)?,
            }
        }
        self.grant();
        Ok(())
    }

    /// A guest that sends beyond its credit would fill this process's memory.
    fn receive_output(&mut self, stream: Stream, bytes: Vec<u8>) -> Result<()> {
        let flow = &mut self.flows[stream as usize];
        flow.owed += cost(bytes.len());
        flow.held += cost(bytes.len());
        if stream == Stream::Stdin || flow.owed > WINDOW {
            bail!("the guest sends more than it may");
        }
        if let Some(timeline) = self.post.timeline.take() {
            timeline.mark(Mark::Output);
        }
        self.pumps.write(stream, bytes);
        Ok(())
    }

    /// Lets the guest send more where it may.
    fn grant(&mut self) {
        let ahead = if self.post.terminal.is_some() { 0 } else { AHEAD };
        for stream in [Stream::Stdout, Stream::Stderr] {
            let granted = self.flows[stream as usize].grant(ahead);
            if granted > 0 {
                self.push(&Frame::Credit(stream, granted));
            }
        }
    }

    fn push(&mut self, frame: &Frame) {
        if self.connected && self.exit.is_none() {
            let _ = self.connection.push(frame);
        }
    }

    fn end(&mut self, stream: Stream) {
        if stream != Stream::Stdin {
            self.pumps.end(stream);
        }
    }

    fn note(&mut self, body: &[u8]) -> Result<()> {
        match unpack(body)
            .map_err(|text| anyhow!("the guest's message is not understood: {}", clean(&text)))?
        {
            Reply::Exited(status) => {
                self.exit = Some(status);
                if let Some(sockets) = self.post.sockets {
                    sockets.drain();
                }
                self.send(&Request::Acknowledge);
                // Files were written through, nothing is left in the guest that must be kept: no need to wait for
                // its orderly end.
                if let Some(vm) = &self.post.vm {
                    vmm::kill(vm.vmm.pidfd());
                }
            }
            // Before the exit that may follow, so that nobody who hears of that has missed it.
            Reply::OutOfMemory => {
                if let Some(teller) = &mut self.post.teller {
                    teller.tell();
                }
            }
            Reply::Stillborn(text) => bail!("unable to start container process: {}", clean(&text)),
            // Outcomes of forwarded signals: a process that has ended is not an error.
            Reply::Outcome(_) | Reply::Working | Reply::Greeting(_) => {}
        }
        Ok(())
    }

    fn send(&mut self, request: &Request) {
        // A guest that is gone shows itself on the next read.
        let _ = self.connection.send(request);
    }

    /// Tells the process's terminal the size that the caller's has. False where that is no news, or there is none.
    fn resize(&mut self) -> bool {
        let Some(size) = self.post.terminal.and_then(terminal::size) else { return false };
        let is_news = self.size != Some(size);
        if is_news {
            self.size = Some(size);
            self.send(&Request::Resize(size));
        }
        is_news
    }

    fn handle(&mut self, event: Event) {
        let frame = match event {
            Event::Input(bytes) => Frame::Data(Stream::Stdin, bytes),
            // To a terminal it means that it is hung up, which the end of a file or a pipe is not.
            Event::InputEnded if self.post.terminal.is_some_and(|fd| fd != 0) => return,
            Event::InputEnded => Frame::End(Stream::Stdin),
            Event::Consumed(stream, credit) => {
                let held = &mut self.flows[stream as usize].held;
                *held = held.saturating_sub(credit);
                self.grant();
                return;
            }
            Event::Closed(stream) => Frame::End(stream),
            Event::Drained(stream) => {
                if self.post.half_closes && stream == Stream::Stdout {
                    let _ = nix::sys::socket::shutdown(1, nix::sys::socket::Shutdown::Write);
                }
                self.outputs = self.outputs.saturating_sub(1);
                return;
            }
        };
        self.push(&frame);
    }

    /// Passes signals on. True when one came after the process's end: then output that nobody reads is given up.
    fn forward(&mut self, signals: &SignalFd) -> bool {
        let mut give_up = false;
        while let Ok(Some(info)) = signals.read_signal() {
            let signal = info.ssi_signo as i32;
            let exit = self.exit;
            match exit {
                Some(_) => give_up |= ENDING.contains(&signal),
                // A reader left: its pump has noticed.
                None if signal == libc::SIGPIPE && info.ssi_pid == std::process::id() => {}
                // What the end of input tells the whole session in the guest.
                None if self.post.terminal == Some(0) && is_hangup(&info) => {}
                None if signal == libc::SIGWINCH && self.resize() => {}
                // The caller's terminal stops a foreground exec, not the process in the guest.
                None if self.post.is_job
                    && [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal) =>
                {
                    let _ = nix::sys::signal::raise(Signal::SIGSTOP);
                }
                None => {
                    let container = self.post.container.to_string();
                    self.send(&Request::Signal { container, signal, target: Target::Own });
                }
            }
        }
        give_up
    }

    /// The VMM has ended. Expected after the process's exit; before that, the VM took the process with it.
    fn vm_ended(&mut self) -> Result<()> {
        self.vm_ended = true;
        while self.connected {
            self.receive()?;
        }
        let Some(vm) = &mut self.post.vm else { return Ok(()) };
        let death = vm.vmm.reap();
        if self.exit.is_some() {
            return Ok(());
        }
        vm.console.drain();
        Err(anyhow::Error::new(VmDied {
            status: death.status,
            text: died(&death.how, &vm.console.last_words()),
        }))
    }
}

/// Whether the kernel sent this because this process's terminal is gone.
fn is_hangup(info: &siginfo) -> bool {
    info.ssi_code == libc::SI_KERNEL && [libc::SIGHUP, libc::SIGCONT].contains(&(info.ssi_signo as i32))
}

/// The sentence about a VM that ended before its time.
pub fn died(how: &str, last_words: &str) -> String {
    match last_words {
        "" => format!("the VM died ({how}); its console is silent"),
        words => format!("the VM died ({how}); its console said: {words}"),
    }
}

/// The VM ended before its container's process did.
#[derive(Debug)]
pub struct VmDied {
    /// What the monitor exits with; never 0.
    pub status: i32,
    text: String,
}

impl std::fmt::Display for VmDied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for VmDied {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_reader_is_waited_for_once_as_much_is_held_as_may_be() {
        for ahead in [0, 3000, AHEAD] {
            let mut flow = Flow::default();
            let mut left = WINDOW;
            while left > 0 {
                let sent = left.min(1000);
                left -= sent;
                (flow.held, flow.owed) = (flow.held + sent, flow.owed + sent);
                left += flow.grant(ahead);
            }
            assert_eq!(flow.held, WINDOW + ahead);
            flow.held -= 700;
            assert_eq!(flow.grant(ahead), 700);
            flow.held = 0;
            assert_eq!((flow.grant(ahead), flow.owed), (WINDOW - 700, 0));
        }
    }
}
