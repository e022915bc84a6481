//! What each request does.
//!
//! In: a request and the connection that made it. Out: its outcome, or nothing where it comes later or none is due.
//! Must not: wait.

use a3s_box_proto::{self as proto, Outcome, Reply, Request, Size, Target};
use anyhow::Result;
use nix::unistd::Pid;

use super::Server;
use crate::boot;
use crate::container::{self, Born, Container, State};
use crate::net;
use crate::reap::{self, Child, Role};
use crate::resolver;

impl Server {
    /// `None` where the outcome comes later.
    pub(super) fn serve(&mut self, id: u64, request: Request) -> Option<Outcome> {
        match request {
            Request::Create(spec) => self.create(id, &spec),
            Request::Start { container } => self.start(id, &container),
            Request::Plug { container, nics, settings } => {
                Some(self.network(&container, |pid| net::plug(pid, &nics, &settings)))
            }
            Request::Unplug { container, slot, index } => {
                Some(self.network(&container, |pid| net::unplug(pid, slot, index)))
            }
            Request::Dial { container, address } => {
                self.bear(id, &container, |container| net::dial(container.init, address))
            }
            Request::Resolve { container } => {
                self.bear(id, &container, |container| resolver::serve(container.init))
            }
            Request::Sockets { container } => self.bear(id, &container, Container::serve_sockets),
            Request::Accept { container, client } => {
                self.bear_anyway(id, &container, |container| container.sockets()?.accept(client))
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
            Request::Delete { container } => {
                self.delete(id, container);
                None
            }
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
        match container::create(spec, &self.containers) {
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

    /// Changes the network namespace of a container's process.
    fn network(&self, name: &str, change: impl FnOnce(Pid) -> Result<()>) -> Outcome {
        match self.containers.get(name) {
            None => Outcome::NotFound,
            Some(container) if container.state == State::Stopped => Outcome::AlreadyExited,
            Some(container) => match change(container.init) {
                Ok(()) => Outcome::Done,
                Err(error) => Outcome::Failed { text: format!("{error:#}") },
            },
        }
    }

    /// Adds a process that the connection owns, to a container that has not ended.
    fn bear(
        &mut self,
        id: u64,
        name: &str,
        clone: impl FnOnce(&mut Container) -> Result<Born>,
    ) -> Option<Outcome> {
        match self.containers.get(name).map(|container| container.state) {
            Some(State::Stopped) => Some(Outcome::AlreadyExited),
            Some(State::Creating) => {
                Some(Outcome::Busy { reason: "the container is still being created".into() })
            }
            _ => self.bear_anyway(id, name, clone),
        }
    }

    /// The same in any state: what a process has sent before its end must still arrive.
    fn bear_anyway(
        &mut self,
        id: u64,
        name: &str,
        clone: impl FnOnce(&mut Container) -> Result<Born>,
    ) -> Option<Outcome> {
        if self.is_owner(id) {
            return Some(Outcome::Busy { reason: "the connection owns a process already".into() });
        }
        let Some(container) = self.containers.get_mut(name) else { return Some(Outcome::NotFound) };
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

    fn delete(&mut self, id: u64, name: String) {
        if let Some(container) = self.containers.get(&name) {
            let _ = container.signal_all(libc::SIGKILL);
        }
        self.deletions.push((id, name));
    }

    /// Answers for containers that are forgotten by now.
    pub(super) fn conclude_deletions(&mut self) {
        let (waiting, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.deletions)
            .into_iter()
            .partition(|(_, name)| self.containers.contains_key(name));
        self.deletions = waiting;
        if !gone.is_empty() {
            boot::let_go();
        }
        for (id, _) in gone {
            self.reply(Some(id), &Reply::Outcome(Outcome::Done));
        }
    }

    fn resize(&mut self, id: u64, size: Size) -> Outcome {
        let owned = self.connections.get(&id).and_then(|c| c.owns);
        match owned.and_then(|pid| self.children.get(&pid)) {
            Some(child) => child.stdio.resize(size),
            None => Outcome::NotFound,
        }
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
}
