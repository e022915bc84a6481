//! The loop of pid 1: requests in, bytes both ways, exits out.
//!
//! One thread and one poll. In: connections of the host, status pipes and streams of processes, SIGCHLD. Out: frames.
//! Must not: block, or let one connection's trouble reach another.

use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use a3s_box_proto::{
    self as proto, Frame, Greeting, Nic, Outcome, Reply, Request, Setting, Size, Stream, Target, unpack,
};
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::Pid;

use crate::boot;
use crate::connection::Connection;
use crate::container::{self, Born, Container, State};
use crate::net;
use crate::reap::{self, Child, Progress, Role};
use crate::resolver;

struct Server {
    connections: HashMap<u64, Connection>,
    next_connection: u64,
    containers: HashMap<String, Container>,
    children: HashMap<Pid, Child>,
    /// Outputs whose owner is gone, read into nothing.
    drains: Vec<OwnedFd>,
    /// Set once a container was made: from then on an empty table ends the VM.
    used: bool,
}

#[derive(Clone, Copy)]
enum Token {
    Listener,
    Signals,
    Connection(u64),
    Status(Pid),
    Stream(Pid, Stream),
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
        used: false,
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
        for (index, drain) in self.drains.iter().enumerate() {
            tokens.push(Token::Drain(index));
            fds.push(PollFd::new(drain.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
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
            connection.flush();
            self.connections.insert(self.next_connection, connection);
            self.next_connection += 1;
        }
    }

    fn handle(&mut self, token: Token, events: PollFlags) {
        match token {
            Token::Listener | Token::Signals => {}
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
            alive = connection.receive().unwrap_or(false);
        }
        loop {
            let frame = match self.connections.get_mut(&id).map(Connection::next_frame) {
                Some(Ok(Some(frame))) => frame,
                Some(Ok(None)) => break,
                Some(Err(error)) => {
                    eprintln!("guest-init: connection {id}: {error:#}");
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

    /// `None` where the outcome comes later.
    fn serve(&mut self, id: u64, request: Request) -> Option<Outcome> {
        match request {
            Request::Create(spec) => self.create(id, &spec),
            Request::Start { container } => self.start(id, &container),
            Request::Plug { container, nics, settings } => Some(self.plug(&container, &nics, &settings)),
            Request::Dial { container, address } => {
                self.bear(id, &container, |container| net::dial(container.init, address))
            }
            Request::Resolve { container } => {
                self.bear(id, &container, |container| resolver::serve(container.init))
            }
            Request::Exec { container, process, cgroup } => {
                self.bear(id, &container, |container| container.exec(&process, &cgroup))
            }
            Request::Signal { container, signal, target } => {
                Some(self.signal(id, &container, signal, target))
            }
            Request::Resize(size) => Some(self.resize(id, size)),
            Request::Processes { container } => Some(match self.containers.get(&container) {
                Some(container) => Outcome::Processes(container.processes()),
                None => Outcome::NotFound,
            }),
            Request::Update { container, limits } => Some(match self.containers.get(&container) {
                Some(container) => match container.limit(&limits) {
                    Ok(()) => Outcome::Done,
                    Err(error) => Outcome::Failed { text: format!("{error:#}") },
                },
                None => Outcome::NotFound,
            }),
            Request::Stats { container } => Some(match self.containers.get(&container) {
                Some(container) => Outcome::Stats(container.stats()),
                None => Outcome::NotFound,
            }),
            Request::Acknowledge => {
                self.acknowledge(id);
                None
            }
        }
    }

    fn own(&mut self, id: u64, pid: Pid, child: Child) {
        self.children.insert(pid, child);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.owns = Some(pid);
        }
    }

    fn is_owner(&self, id: u64) -> bool {
        self.connections.get(&id).is_some_and(|c| c.owns.is_some())
    }

    fn create(&mut self, id: u64, spec: &proto::Container) -> Option<Outcome> {
        if self.is_owner(id) || self.containers.contains_key(&spec.id) {
            return Some(Outcome::Busy { reason: "container with given ID already exists".into() });
        }
        match container::create(spec) {
            Ok((container, born)) => {
                self.containers.insert(spec.id.clone(), container);
                self.used = true;
                let (pid, child) = Child::new(born, &spec.id, Role::Init, id);
                self.own(id, pid, child);
                None
            }
            Err(error) => Some(Outcome::Failed { text: format!("{error:#}") }),
        }
    }

    fn start(&mut self, id: u64, name: &str) -> Option<Outcome> {
        let Some(container) = self.containers.get_mut(name) else { return Some(Outcome::NotFound) };
        let reason = match container.state {
            State::Created => None,
            State::Creating => Some("the container is still being created"),
            State::Running => Some("cannot start an already running container"),
            State::Stopped => Some("cannot start a container that has stopped"),
        };
        if let Some(reason) = reason {
            return Some(Outcome::Busy { reason: reason.into() });
        }
        if let Err(error) = container.start() {
            return Some(Outcome::Failed { text: format!("{error:#}") });
        }
        container.state = State::Running;
        if let Some(child) = self.children.get_mut(&container.init) {
            child.asker = Some(id);
        }
        None
    }

    fn plug(&self, name: &str, nics: &[Nic], settings: &[Setting]) -> Outcome {
        match self.containers.get(name) {
            None => Outcome::NotFound,
            Some(container) if container.state == State::Stopped => Outcome::AlreadyExited,
            Some(container) => match net::plug(container.init, nics, settings) {
                Ok(()) => Outcome::Done,
                Err(error) => Outcome::Failed { text: format!("{error:#}") },
            },
        }
    }

    /// Adds a process that the connection owns.
    fn bear(
        &mut self,
        id: u64,
        name: &str,
        clone: impl FnOnce(&Container) -> Result<Born>,
    ) -> Option<Outcome> {
        if self.is_owner(id) {
            return Some(Outcome::Busy { reason: "the connection owns a process already".into() });
        }
        let Some(container) = self.containers.get(name) else { return Some(Outcome::NotFound) };
        match container.state {
            State::Stopped => return Some(Outcome::AlreadyExited),
            State::Creating => {
                return Some(Outcome::Busy { reason: "the container is still being created".into() });
            }
            State::Created | State::Running => {}
        }
        match clone(container) {
            Ok(born) => {
                let (pid, child) = Child::new(born, name, Role::Exec, id);
                self.own(id, pid, child);
                None
            }
            Err(error) => Some(Outcome::Failed { text: format!("{error:#}") }),
        }
    }

    fn signal(&mut self, id: u64, name: &str, signal: i32, target: Target) -> Outcome {
        let Some(container) = self.containers.get(name) else { return Outcome::NotFound };
        let init = container.init;
        if target == Target::All {
            return reap::signal_outcome(container.signal_all(signal));
        }
        let owned = self.connections.get(&id).and_then(|c| c.owns);
        let Some(pid) = (if target == Target::Init { Some(init) } else { owned }) else {
            return Outcome::NotFound;
        };
        let Some(child) = self.children.get_mut(&pid).filter(|child| !child.has_exited()) else {
            return Outcome::AlreadyExited;
        };
        // Before execve no handler of the workload's exists: what would end it, ends it.
        let waiting = child.role == Role::Init && matches!(container.state, State::Creating | State::Created);
        if waiting && reap::is_fatal(signal) && signal > 0 {
            child.ended_by = Some(signal as u8);
            return reap::signal_outcome(container::send(pid, libc::SIGKILL));
        }
        reap::signal_outcome(container::send(pid, signal))
    }

    fn resize(&mut self, id: u64, size: Size) -> Outcome {
        let owned = self.connections.get(&id).and_then(|c| c.owns);
        match owned.and_then(|pid| self.children.get(&pid)) {
            Some(child) => child.stdio.resize(size),
            None => Outcome::NotFound,
        }
    }

    fn progress(&mut self, pid: Pid) {
        let Some(child) = self.children.get_mut(&pid) else { return };
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
        if let Some(asker) = child.asker.take() {
            self.reply(Some(asker), &Reply::Outcome(outcome));
        }
    }

    fn note_exits(&mut self) {
        for (pid, status) in reap::collect() {
            let Some(child) = self.children.get_mut(&pid) else { continue };
            child.exited(status);
            if child.role == Role::Init
                && let Some(container) = self.containers.get_mut(&child.container)
            {
                container.state = State::Stopped;
            }
        }
    }

    /// Tells exits that are due, forgets what is over, writes what waits.
    fn settle(&mut self) {
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
        let lost: Vec<u64> = self
            .connections
            .iter_mut()
            .filter_map(|(id, connection)| (!connection.flush()).then_some(*id))
            .collect();
        lost.into_iter().for_each(|id| self.lose(id));
        let over: Vec<Pid> =
            self.children.iter().filter(|(_, c)| c.is_over() && c.owner.is_none()).map(|(p, _)| *p).collect();
        over.into_iter().for_each(|pid| self.forget(pid));
    }

    /// The owner knows of the exit: nothing is left to keep.
    fn acknowledge(&mut self, id: u64) {
        let Some(pid) = self.connections.get_mut(&id).and_then(|c| c.owns.take()) else { return };
        match self.children.get_mut(&pid) {
            Some(child) if child.is_over() => self.forget(pid),
            // Acknowledged before it was told: the peer makes no sense, the process stays its own.
            Some(_) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.owns = Some(pid);
                }
            }
            None => {}
        }
    }

    fn forget(&mut self, pid: Pid) {
        let Some(mut child) = self.children.remove(&pid) else { return };
        self.drains.extend(child.stdio.abandon());
        if child.role == Role::Init
            && let Some(container) = self.containers.remove(&child.container)
        {
            container.remove();
        }
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
