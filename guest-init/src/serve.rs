//! The loop of pid 1: requests in, bytes both ways, exits out.
//!
//! One thread and one poll. In: connections of the host, status pipes and streams of processes, SIGCHLD. Out: frames.
//! Must not: block, or let one connection's trouble reach another.

mod requests;

use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use a3s_box_proto::{self as proto, Frame, Greeting, Outcome, Reply, Request, Stream, unpack};
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::Pid;

use crate::boot;
use crate::connection::Connection;
use crate::container::{self, Container, State};
use crate::reap::{self, Child, Progress, Role};

struct Server {
    connections: HashMap<u64, Connection>,
    next_connection: u64,
    containers: HashMap<String, Container>,
    children: HashMap<Pid, Child>,
    /// Outputs whose owner is gone, read into nothing.
    drains: Vec<OwnedFd>,
    /// Containers whose first process is forgotten, and which others may still be leaving.
    leaving: Vec<String>,
    /// Containers to be forgotten, and the connections that wait for it.
    deletions: Vec<(u64, String)>,
    /// Set once a container was made: from then on an empty table ends the VM.
    used: bool,
    /// When connections that wait for an outcome last heard that it is worked on.
    reassured: Instant,
}

#[derive(Clone, Copy)]
enum Token {
    Listener,
    Signals,
    Connection(u64),
    Status(Pid),
    Stream(Pid, Stream),
    /// Memory of the container with this first process.
    Memory(Pid),
    /// Processes leave a container.
    Population,
    Drain(usize),
}

/// Serves until the last container is gone, then ends the VM.
pub fn run(listener: OwnedFd) -> Result<Infallible> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block().context("block SIGCHLD")?;
    let signals =
        SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")?;
    let mut server = Server {
        connections: HashMap::new(),
        next_connection: 0,
        containers: HashMap::new(),
        children: HashMap::new(),
        drains: Vec::new(),
        leaving: Vec::new(),
        deletions: Vec::new(),
        used: false,
        reassured: Instant::now(),
    };
    loop {
        for (token, events) in server.wait(&listener, &signals)? {
            match token {
                Token::Listener => server.accept(&listener),
                Token::Signals => while let Ok(Some(_)) = signals.read_signal() {},
                token => server.handle(token, events),
            }
        }
        server.note_exits();
        server.settle();
        server.reassure();
        if server.used && server.containers.is_empty() && server.connections.values().all(|c| !c.has_output())
        {
            boot::reset();
        }
    }
}

impl Server {
    fn wait(&self, listener: &OwnedFd, signals: &SignalFd) -> Result<Vec<(Token, PollFlags)>> {
        let mut tokens = vec![Token::Listener, Token::Signals];
        let mut fds = vec![
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        for (id, connection) in &self.connections {
            let output = if connection.has_output() { PollFlags::POLLOUT } else { PollFlags::empty() };
            tokens.push(Token::Connection(*id));
            fds.push(PollFd::new(connection.fd(), PollFlags::POLLIN | output));
        }
        for (pid, child) in &self.children {
            if let Some(status) = &child.status {
                tokens.push(Token::Status(*pid));
                fds.push(PollFd::new(status.as_fd(), PollFlags::POLLIN));
            }
            // The outcome of `exec` comes before the first byte of what it started.
            if child.asker.is_some() && child.asker == child.owner {
                continue;
            }
            for (stream, fd, flags) in child.stdio.interests() {
                tokens.push(Token::Stream(*pid, stream));
                fds.push(PollFd::new(fd, flags));
            }
        }
        for container in self.containers.values() {
            if let Some(events) = container.events() {
                tokens.push(Token::Memory(container.init));
                fds.push(PollFd::new(events, PollFlags::POLLPRI));
            }
        }
        for container in self.leaving.iter().filter_map(|name| self.containers.get(name)) {
            if let Some(population) = container.population() {
                tokens.push(Token::Population);
                fds.push(PollFd::new(population, PollFlags::POLLPRI));
            }
        }
        for (index, drain) in self.drains.iter().enumerate() {
            tokens.push(Token::Drain(index));
            fds.push(PollFd::new(drain.as_fd(), PollFlags::POLLIN));
        }
        let timeout = if self.waiting().next().is_some() {
            PollTimeout::try_from(proto::WORKING).context("poll")?
        } else {
            PollTimeout::NONE
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let ready =
            |(token, fd): (Token, &PollFd)| fd.revents().filter(|r| !r.is_empty()).map(|r| (token, r));
        let mut ready: Vec<_> = tokens.into_iter().zip(&fds).filter_map(ready).collect();
        // Drains are removed by index: the highest first.
        ready.reverse();
        Ok(ready)
    }

    /// Connections whose request has no outcome yet.
    fn waiting(&self) -> impl Iterator<Item = u64> {
        let askers = self.children.values().filter_map(|child| child.asker);
        askers.chain(self.deletions.iter().map(|(id, _)| *id))
    }

    /// Tells those who wait that their requests are worked on: a busy guest must not be taken for a frozen one.
    fn reassure(&mut self) {
        if self.reassured.elapsed() < proto::WORKING {
            return;
        }
        self.reassured = Instant::now();
        for id in self.waiting().collect::<Vec<_>>() {
            self.reply(Some(id), &Reply::Working);
        }
    }

    fn accept(&mut self, listener: &OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        while let Ok(fd) = accept4(listener.as_raw_fd(), flags) {
            // SAFETY: accept4 just gave this descriptor to us.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            if !is_host(&fd) {
                continue;
            }
            let mut connection = Connection::new(fd);
            connection.reply(&Reply::Greeting(greeting()));
            let _ = connection.flush();
            self.connections.insert(self.next_connection, connection);
            self.next_connection += 1;
        }
    }

    fn handle(&mut self, token: Token, events: PollFlags) {
        match token {
            Token::Listener | Token::Signals | Token::Population => {}
            Token::Connection(id) => self.receive(id, events),
            Token::Status(pid) => self.progress(pid),
            Token::Stream(pid, stream) => {
                if let Some(child) = self.children.get_mut(&pid) {
                    let mut out = Vec::new();
                    child.stdio.ready(stream, &mut out);
                    let owner = child.owner;
                    self.send(owner, &out);
                }
            }
            Token::Memory(init) => self.tell_of_memory(init),
            Token::Drain(index) => {
                let mut sink = [0u8; 16 << 10];
                if !matches!(nix::unistd::read(&self.drains[index], &mut sink), Ok(1..) | Err(Errno::EAGAIN))
                {
                    self.drains.remove(index);
                }
            }
        }
    }

    fn send(&mut self, connection: Option<u64>, frames: &[Frame]) {
        if let Some(connection) = connection.and_then(|id| self.connections.get_mut(&id)) {
            frames.iter().for_each(|frame| connection.push(frame));
        }
    }

    fn reply(&mut self, connection: Option<u64>, reply: &Reply) {
        if let Some(connection) = connection.and_then(|id| self.connections.get_mut(&id)) {
            connection.reply(reply);
        }
    }

    fn receive(&mut self, id: u64, events: PollFlags) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut alive = true;
        if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            alive = connection.receive().unwrap_or_else(|error| {
                complain(id, &error);
                false
            });
        }
        loop {
            let frame = match self.connections.get_mut(&id).map(Connection::next_frame) {
                Some(Ok(Some(frame))) => frame,
                Some(Ok(None)) => break,
                Some(Err(error)) => {
                    complain(id, &error);
                    alive = false;
                    break;
                }
                None => return,
            };
            self.take(id, frame);
        }
        if !alive {
            self.lose(id);
        }
    }

    fn take(&mut self, id: u64, frame: Frame) {
        let owns = self.connections.get(&id).and_then(|c| c.owns);
        match frame {
            Frame::Message(body) => match unpack::<Request>(&body) {
                Ok(request) => {
                    if let Some(outcome) = self.serve(id, request) {
                        self.reply(Some(id), &Reply::Outcome(outcome));
                    }
                }
                Err(text) => {
                    let text = format!("request not understood: {text}");
                    self.reply(Some(id), &Reply::Outcome(Outcome::Failed { text }));
                }
            },
            frame => {
                if let Some(child) = owns.and_then(|pid| self.children.get_mut(&pid)) {
                    let mut out = Vec::new();
                    child.stdio.accept(frame, &mut out);
                    self.send(Some(id), &out);
                }
            }
        }
    }

    fn progress(&mut self, pid: Pid) {
        let Some(child) = self.children.get_mut(&pid) else { return };
        let owner = child.owner;
        let outcome = match child.read_status() {
            Progress::None => return,
            Progress::Ready => {
                if let Some(container) = self.containers.get_mut(&child.container) {
                    container.state = State::Created;
                }
                Outcome::Done
            }
            Progress::Running => Outcome::Done,
            Progress::Failed(text) => Outcome::Failed { text },
        };
        match (child.asker.take(), outcome) {
            (None, Outcome::Failed { text }) => self.reply(owner, &Reply::Stillborn(text)),
            (asker, outcome) => self.reply(asker, &Reply::Outcome(outcome)),
        }
    }

    /// Tells the owner of a container's first process of kills for want of memory.
    fn tell_of_memory(&mut self, init: Pid) {
        let mut containers = self.containers.values_mut();
        if containers.find(|container| container.init == init).is_some_and(Container::has_killed) {
            let owner = self.children.get(&init).and_then(|child| child.owner);
            self.reply(owner, &Reply::OutOfMemory);
        }
    }

    fn note_exits(&mut self) {
        for (pid, status) in reap::collect() {
            let Some(child) = self.children.get_mut(&pid) else { continue };
            child.exited(status);
            if child.role == Role::Init
                && let Some(container) = self.containers.get_mut(&child.container)
            {
                container.stopped();
            }
        }
    }

    /// Tells exits that are due, forgets what is over, writes what waits.
    fn settle(&mut self) {
        // News of the kernel's comes late; an exit must not overtake it.
        let ended = self.children.iter().filter(|(_, child)| child.role == Role::Init && child.has_exited());
        ended
            .map(|(init, _)| *init)
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|init| self.tell_of_memory(init));
        let mut told = Vec::new();
        for child in self.children.values_mut().filter(|child| child.has_exited()) {
            let mut out = Vec::new();
            let farewell = child.farewell(&mut out);
            told.push((child.owner, out, farewell));
        }
        for (owner, out, farewell) in told {
            self.send(owner, &out);
            if let Some((status, left)) = farewell {
                self.reply(owner, &Reply::Exited(status));
                self.drains.extend(left);
            }
        }
        let failed = |(id, connection): (&u64, &mut Connection)| Some((*id, connection.flush().err()?));
        let lost: Vec<_> = self.connections.iter_mut().filter_map(failed).collect();
        for (id, error) in lost {
            complain(id, &error);
            self.lose(id);
        }
        let over: Vec<Pid> =
            self.children.iter().filter(|(_, c)| c.is_over() && c.owner.is_none()).map(|(p, _)| *p).collect();
        over.into_iter().for_each(|pid| self.forget(pid));
        self.remove_deserted();
        self.conclude_deletions();
    }

    fn forget(&mut self, pid: Pid) {
        let Some(mut child) = self.children.remove(&pid) else { return };
        self.drains.extend(child.stdio.abandon());
        if child.role == Role::Init {
            self.leaving.push(child.container);
        }
    }

    fn remove_deserted(&mut self) {
        let is_deserted =
            |name: &String| self.containers.get(name).is_none_or(|container| container.is_deserted());
        let (gone, leaving): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.leaving).into_iter().partition(is_deserted);
        self.leaving = leaving;
        gone.iter().filter_map(|name| self.containers.remove(name)).for_each(Container::remove);
    }

    /// The connection is gone: what it owns must not outlive it.
    fn lose(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else { return };
        let Some(child) = connection.owns.and_then(|pid| self.children.get_mut(&pid)) else { return };
        child.owner = None;
        let left = child.stdio.abandon();
        if !child.has_exited()
            && let Some(pid) = connection.owns
        {
            let _ = container::send(pid, libc::SIGKILL);
        }
        self.drains.extend(left);
    }
}

/// Says on the console why a connection ends.
fn complain(id: u64, error: &anyhow::Error) {
    boot::say(&format!("guest-init: connection {id}: {error:#}"));
}

fn greeting() -> Greeting {
    let kernel = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned());
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    Greeting {
        version: proto::VERSION,
        kernel: kernel.unwrap_or_default(),
        uptime_us: now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000,
    }
}

/// vsock loopback lets a workload dial this port; only the host has CID 2.
#[cfg(not(feature = "local"))]
fn is_host(fd: &OwnedFd) -> bool {
    use nix::sys::socket::{VsockAddr, getpeername};
    getpeername::<VsockAddr>(fd.as_raw_fd()).is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST)
}

#[cfg(feature = "local")]
fn is_host(_: &OwnedFd) -> bool {
    true
}
