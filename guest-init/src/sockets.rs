//! Sockets of the host's that a container uses: a process that stands in for them.
//!
//! A socket file of the host's shows in the guest as what it is, but nobody listens to it in this kernel. The process
//! binds sockets of its own on a file system that nobody sees and mounts them over those files; who connects waits there
//! until the host has connected as well. In: [`Order`]s of the host. Out: [`Event`]s for it. Must not: make the clients of
//! one container wait for another's, or change anything in the container but these mounts.

mod client;
mod place;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use a3s_box_proto::sockets::{Event, Order};
use a3s_box_proto::{Decoder, Frame, unpack};
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::Pid;

use crate::container::{self, Born, pidfd_open};
use crate::process::{self, own};
use client::Clients;
use place::{Place, Places};

/// How long a place may take to show what the host has made there: virtiofs remembers names for five seconds.
const CACHED: Duration = Duration::from_secs(6);
/// How often it is looked for meanwhile.
const LOOK: Duration = Duration::from_millis(250);

/// Pid 1's hold on the process.
pub struct Sockets {
    pid: Pid,
    pidfd: OwnedFd,
    released: OwnedFd,
}

/// Clones the process, for the container whose first process is `init`.
pub fn serve(init: Pid) -> Result<(Born, Sockets)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).context("socketpair")?;
    let attempt = |kept: Vec<OwnedFd>| {
        let released = kept.into_iter().next().context("the descriptor that came along")?;
        Ok(Server {
            places: Places::new(init)?,
            shown: HashMap::new(),
            clients: Clients::default(),
            released,
        })
    };
    let born = process::bear(vec![theirs], attempt, |mut server: Server| {
        // The host is gone, or makes no sense: so does this.
        let _ = server.run();
    })?;
    let pid = born.pid;
    Ok((born, Sockets { pid, pidfd: pidfd_open(pid)?, released: ours }))
}

impl Sockets {
    /// Clones a process that goes on with a client.
    pub fn accept(&self, client: u64) -> Result<Born> {
        let fd = client::take(self.pidfd.as_fd(), client)
            .with_context(|| format!("client {client:x} of process {}", self.pid))?;
        self.release(client)?;
        client::serve(fd)
    }

    /// Ends the process, and with it its hold on the container's mounts.
    pub fn end(self) {
        let _ = container::send(self.pid, libc::SIGKILL);
        let ended = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        let _ = nix::sys::wait::waitid(nix::sys::wait::Id::PIDFd(self.pidfd.as_fd()), ended);
    }

    /// Has the process forget a client that it has given away.
    fn release(&self, client: u64) -> Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(self.released.as_raw_fd(), &client.to_ne_bytes(), flags).map(drop).context("release a client")
    }
}

/// The process.
struct Server {
    places: Places,
    shown: HashMap<u32, Shown>,
    clients: Clients,
    released: OwnedFd,
}

struct Shown {
    place: Place,
    /// Until when it is looked at whether it is in its place.
    unsettled: Option<Instant>,
}

enum Ready {
    Orders,
    Released,
    Socket(u32),
}

impl Server {
    fn run(&mut self) -> Result<()> {
        let mut decoder = Decoder::default();
        loop {
            for ready in self.wait()? {
                match ready {
                    Ready::Orders => {
                        let mut buffer = [0; 16 << 10];
                        let count = own(0).read(&mut buffer).context("orders")?;
                        if count == 0 {
                            return Ok(());
                        }
                        decoder.push(&buffer[..count]);
                        while let Some(frame) = decoder.next_frame()? {
                            self.obey(frame)?;
                        }
                    }
                    Ready::Released => {
                        let mut number = [0; 8];
                        let count = recv(self.released.as_raw_fd(), &mut number, MsgFlags::MSG_DONTWAIT);
                        if count == Ok(number.len()) {
                            self.clients.forget(u64::from_ne_bytes(number));
                        }
                    }
                    Ready::Socket(socket) => {
                        if let Some(shown) = self.shown.get(&socket) {
                            hear(socket, &shown.place, &mut self.clients)?;
                        }
                    }
                }
            }
            self.look_again();
        }
    }

    fn wait(&self) -> Result<Vec<Ready>> {
        let streams_wait = self.clients.are_many();
        let input = own(0);
        let mut tokens = vec![Ready::Orders, Ready::Released];
        let mut fds = vec![
            PollFd::new(input.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.released.as_fd(), PollFlags::POLLIN),
        ];
        for (socket, shown) in &self.shown {
            if shown.place.datagrams || !streams_wait {
                tokens.push(Ready::Socket(*socket));
                fds.push(PollFd::new(shown.place.socket.as_fd(), PollFlags::POLLIN));
            }
        }
        let is_unsettled = self.shown.values().any(|shown| shown.unsettled.is_some());
        let timeout = if is_unsettled { PollTimeout::try_from(LOOK).ok() } else { None };
        match poll(&mut fds, timeout.unwrap_or(PollTimeout::NONE)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let states: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        Ok(tokens.into_iter().zip(states).filter(|(_, ready)| *ready).map(|(token, _)| token).collect())
    }

    fn obey(&mut self, frame: Frame) -> Result<()> {
        let Frame::Message(body) = frame else { bail!("an order is a message") };
        match unpack::<Order>(&body).map_err(|text| anyhow!(text))? {
            Order::Show { socket, path, datagrams, owner } => {
                let place = self.places.make(socket, path, datagrams, owner)?;
                // What is at a place that does not exist yet, is another's, or cannot be mounted on, is left as it is.
                let _ = self.places.cover(&place);
                self.shown.insert(socket, Shown { place, unsettled: Some(Instant::now() + CACHED) });
            }
            Order::Hide { socket } => {
                if let Some(shown) = self.shown.remove(&socket) {
                    self.places.uncover(shown.place);
                }
            }
            Order::Forget { client } => self.clients.forget(client),
            Order::Settle => {
                for (socket, shown) in &self.shown {
                    hear(*socket, &shown.place, &mut self.clients)?;
                }
                tell(&Event::Settled)?;
            }
        }
        Ok(())
    }

    /// Mounts go with what they are mounted on, once virtiofs finds that it is another file by now.
    fn look_again(&mut self) {
        for shown in self.shown.values_mut() {
            let Some(until) = shown.unsettled else { continue };
            let _ = self.places.cover(&shown.place);
            if Instant::now() > until {
                shown.unsettled = None;
            }
        }
    }
}

/// Tells everything that has come to a socket.
fn hear(socket: u32, place: &Place, clients: &mut Clients) -> Result<()> {
    while !clients.are_many() || place.datagrams {
        let fd = place.socket.as_fd();
        let heard = if place.datagrams { client::datagram(fd) } else { clients.accept(fd) };
        let Some(heard) = heard else { break };
        tell(&heard.into_event(socket))?;
    }
    Ok(())
}

fn tell(event: &Event) -> Result<()> {
    let mut bytes = Vec::new();
    event.encode(&mut bytes);
    own(1).write_all(&bytes).context("tell the host")
}

/// Descriptors' numbers are the lower half of a client's number.
fn fd_of(client: u64) -> RawFd {
    (client & u64::from(u32::MAX)) as RawFd
}
