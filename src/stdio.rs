//! Pumps between this process's own descriptors 0, 1, 2 and a guest process's streams.
//!
//! The descriptors are the caller's and may be shared, so they are neither made non-blocking nor trusted to be ready:
//! each has a thread that blocks on it, and buffers are bounded by the protocol's credit. In: stream bytes of the
//! guest. Out: [`Event`]s. Must not: let one stream's slow reader hold up another stream.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use a3s_box_proto::credit::cost;
use a3s_box_proto::{Stream, Window};
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::terminal;

/// Control-D.
const END_OF_TRANSMISSION: u8 = 4;

/// What a pump has to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes from standard input.
    Input(Vec<u8>),
    /// Standard input has ended.
    InputEnded,
    /// This much credit of an output was consumed.
    Consumed(Stream, u32),
    /// Nobody reads this output any more.
    Closed(Stream),
    /// All bytes of an ended output were written.
    Drained(Stream),
}

/// The three pumps.
pub struct Pumps {
    outputs: [Option<Sender<Vec<u8>>>; 2],
    input: Arc<Gate>,
    events: Receiver<Event>,
    wake: Arc<EventFd>,
}

#[derive(Default)]
struct Gate {
    window: Mutex<Window>,
    opened: Condvar,
}

#[derive(Clone)]
struct Voice {
    events: Sender<Event>,
    wake: Arc<EventFd>,
}

impl Voice {
    fn say(&self, event: Event) {
        if self.events.send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

impl Pumps {
    /// Starts the threads. Signals must be blocked already, so that none is delivered to them. `to_terminal` says
    /// whether input goes to a terminal of the process's own.
    pub fn start(to_terminal: bool) -> Result<Self> {
        let wake =
            Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("eventfd")?);
        let (sender, events) = channel();
        let voice = Voice { events: sender, wake: wake.clone() };
        let input = Arc::new(Gate::default());
        let (gate, input_voice) = (input.clone(), voice.clone());
        thread::Builder::new()
            .name("stdin".into())
            .spawn(move || pump_input(to_terminal, &gate, &input_voice))
            .context("thread")?;
        let mut outputs = [None, None];
        for (slot, stream) in outputs.iter_mut().zip([Stream::Stdout, Stream::Stderr]) {
            let (sender, bytes) = channel();
            let voice = voice.clone();
            thread::Builder::new()
                .name(format!("{stream:?}").to_lowercase())
                .spawn(move || pump_output(stream, &bytes, &voice))
                .context("thread")?;
            *slot = Some(sender);
        }
        Ok(Pumps { outputs, input, events, wake })
    }

    /// Hands bytes to an output.
    pub fn write(&self, stream: Stream, bytes: Vec<u8>) {
        if let Some(output) = self.output(stream) {
            // An output that is closed has said so; what still comes for it is dropped.
            let _ = output.send(bytes);
        }
    }

    fn output(&self, stream: Stream) -> Option<&Sender<Vec<u8>>> {
        self.outputs[usize::from(stream == Stream::Stderr)].as_ref()
    }

    /// No more bytes will come for an output.
    pub fn end(&mut self, stream: Stream) {
        self.outputs[usize::from(stream == Stream::Stderr)] = None;
    }

    /// The guest has consumed input.
    pub fn credit(&self, credit: u32) {
        self.input.window.lock().unwrap_or_else(PoisonError::into_inner).credited(credit);
        self.input.opened.notify_one();
    }

    /// The next event, if there is one.
    pub fn next_event(&self) -> Option<Event> {
        match self.events.try_recv() {
            Ok(event) => Some(event),
            Err(_) => {
                let _ = self.wake.read();
                // One may have come between the look and the reset.
                self.events.try_recv().ok()
            }
        }
    }
}

impl AsFd for Pumps {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn pump_input(to_terminal: bool, gate: &Gate, voice: &Voice) {
    loop {
        let mut window = gate.window.lock().unwrap_or_else(PoisonError::into_inner);
        while window.allowance() == 0 {
            window = gate.opened.wait(window).unwrap_or_else(PoisonError::into_inner);
        }
        let mut buffer = vec![0u8; window.allowance()];
        drop(window);
        match nix::unistd::read(io::stdin(), &mut buffer) {
            // A terminal that is not raw yet has made this of the character.
            Ok(0) if to_terminal && terminal::is_terminal(0) => {
                gate.window.lock().unwrap_or_else(PoisonError::into_inner).sent(1);
                voice.say(Event::Input(vec![END_OF_TRANSMISSION]));
            }
            Ok(0) => break,
            Ok(n) => {
                buffer.truncate(n);
                gate.window.lock().unwrap_or_else(PoisonError::into_inner).sent(n);
                voice.say(Event::Input(buffer));
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => await_ready(0, nix::poll::PollFlags::POLLIN),
            Err(_) => break,
        }
    }
    voice.say(Event::InputEnded);
}

fn pump_output(stream: Stream, bytes: &Receiver<Vec<u8>>, voice: &Voice) {
    let fd = stream as RawFd;
    for chunk in bytes {
        if write_all(fd, &chunk) == Err(Errno::EPIPE) {
            voice.say(Event::Closed(stream));
            break;
        }
        voice.say(Event::Consumed(stream, cost(chunk.len())));
    }
    voice.say(Event::Drained(stream));
}

/// Any error but a reader that left loses these bytes alone: engines hand out read-only descriptors for output that
/// they do not want.
fn write_all(fd: RawFd, mut bytes: &[u8]) -> Result<(), Errno> {
    // SAFETY: descriptors 0 to 2 are open for the whole life of the process (std sees to it at its start).
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    while !bytes.is_empty() {
        match nix::unistd::write(fd, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => await_ready(fd_number(fd), nix::poll::PollFlags::POLLOUT),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn fd_number(fd: BorrowedFd<'_>) -> RawFd {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd()
}

/// For a descriptor that the caller made non-blocking.
fn await_ready(fd: RawFd, flags: nix::poll::PollFlags) {
    // SAFETY: as in `write_all`.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = nix::poll::poll(&mut [nix::poll::PollFd::new(fd, flags)], nix::poll::PollTimeout::NONE);
}
