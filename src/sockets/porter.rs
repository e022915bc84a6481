//! The process: looks, tells the guest, bears relays.
//!
//! One thread and one poll. In: the monitor's words, the guest's events. Out: orders for the guest, processes for its
//! clients, datagrams. Must not: keep more privilege than changing ids and looking into directories take.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use a3s_box_mount::Root;
use a3s_box_proto::sockets::{Event, Events, Order, Peer};
use a3s_box_proto::{Request, pack};
use anyhow::{Context, Result, anyhow, bail};
use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::look::{Found, Looker};
use super::peer::Ground;
use super::{BEGIN, Bound};
use crate::log::sentence;
use crate::{courier, jail, relay, vmm};

/// Clients at once; more wait in the guest.
const MOST_CLIENTS: usize = 128;
/// How often the host's files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Datagrams that wait for a receiver; more are lost, as with a network.
const MOST_LETTERS: usize = 64;
/// How often they are tried again.
const AGAIN: Duration = Duration::from_millis(20);

/// What it keeps: to be the peer, and to look where a peer might have something.
const KEPT: [Capability; 3] = [Capability::CAP_SETUID, Capability::CAP_SETGID, Capability::CAP_DAC_OVERRIDE];

/// The process's life. Its end ends every socket's service, and nothing else.
pub fn live(bound: Bound, monitor: OwnedFd) -> Result<()> {
    nix::unistd::setsid().context("session")?;
    let root = Root::new(std::fs::File::open("/").context("the container's root")?);
    for stream in 0..3 {
        courier::replace(bound.null.as_raw_fd(), stream)?;
    }
    let Bound { places, id, overrides, proc, null, vm } = bound;
    drop(null);
    let ground = Ground { root, proc, vm, overrides };
    jail::keep_only(&[
        monitor.as_raw_fd(),
        ground.root.as_fd().as_raw_fd(),
        ground.proc.as_raw_fd(),
        ground.vm.as_raw_fd(),
    ]);
    drop(relay::take_signals()?);
    give_up_privileges()?;
    jail::confine_porter()?;
    let mut porter = Porter {
        ground,
        monitor,
        places,
        id,
        looker: Looker::default(),
        looked: Instant::now(),
        shown: HashMap::new(),
        next: 0,
        link: None,
        clients: Vec::new(),
        letters: VecDeque::new(),
        is_settled: false,
        is_draining: false,
    };
    if !porter.hear_monitor() {
        return Ok(());
    }
    let begun = porter.begin();
    let words = begun.as_ref().err().map(sentence).unwrap_or_default();
    send(porter.monitor.as_raw_fd(), format!("n{words}").as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
    begun?;
    while !porter.is_over() {
        porter.step(LOOK)?;
    }
    Ok(())
}

fn give_up_privileges() -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("no_new_privs")?;
    let kept = KEPT.into_iter().collect();
    for capability in caps::runtime::thread_all_supported().difference(&kept) {
        caps::drop(None, CapSet::Bounding, *capability).context("drop from the bounding set")?;
    }
    for set in [CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).with_context(|| format!("clear capabilities ({set:?})"))?;
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).with_context(|| format!("limit capabilities ({set:?})"))?;
    }
    Ok(())
}

struct Porter {
    ground: Ground,
    monitor: OwnedFd,
    places: Vec<PathBuf>,
    id: String,
    looker: Looker,
    looked: Instant,
    shown: HashMap<u32, (PathBuf, Found)>,
    next: u32,
    /// To the guest's process for sockets, once there is a socket.
    link: Option<(UnixStream, Events)>,
    clients: Vec<Client>,
    letters: VecDeque<Letter>,
    is_settled: bool,
    is_draining: bool,
}

/// A process that goes on with a client.
struct Client {
    number: u64,
    pid: Pid,
    pidfd: OwnedFd,
}

struct Letter {
    path: PathBuf,
    peer: Peer,
    bytes: Vec<u8>,
}

impl Porter {
    /// Has what is there now in its place before the container's process runs.
    fn begin(&mut self) -> Result<()> {
        self.look()?;
        let deadline = Instant::now() + BEGIN;
        if self.link.is_some() {
            self.order(&Order::Settle)?;
        }
        while self.link.is_some() && !self.is_settled {
            if Instant::now() > deadline {
                bail!("the guest does not answer");
            }
            self.step(LOOK)?;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let is_done = self.is_settled && self.clients.is_empty() && self.letters.is_empty();
        self.is_draining && (self.link.is_none() || is_done)
    }

    /// Waits for something to do, but not for long, and does it.
    fn step(&mut self, patience: Duration) -> Result<()> {
        let patience = if self.letters.is_empty() { patience } else { AGAIN };
        let has_room = self.clients.len() < MOST_CLIENTS;
        let mut fds = vec![PollFd::new(self.monitor.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(client.pidfd.as_fd(), PollFlags::POLLIN)));
        let link = self.link.as_ref().filter(|_| has_room);
        fds.extend(link.map(|(stream, _)| PollFd::new(stream.as_fd(), PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let is_ready = |fd: Option<&PollFd>| fd.and_then(PollFd::any).unwrap_or(false);
        let (monitor, guest) = (is_ready(fds.first()), link.is_some() && is_ready(fds.last()));
        drop(fds);
        if monitor {
            if !self.hear_monitor() {
                courier::leave(0);
            }
            self.drain()?;
        }
        let failed = self.reap()?;
        if guest {
            self.hear_guest()?
        } else {
            self.take_events()?
        }
        self.post();
        if failed || self.looked.elapsed() >= LOOK { self.look() } else { Ok(()) }
    }

    /// False where the monitor is gone.
    fn hear_monitor(&self) -> bool {
        recv(self.monitor.as_raw_fd(), &mut [0; 8], MsgFlags::empty()) == Ok(1)
    }

    fn drain(&mut self) -> Result<()> {
        self.is_draining = true;
        self.is_settled = false;
        if self.link.is_some() { self.order(&Order::Settle) } else { Ok(()) }
    }

    /// Whether a client could not be served, of which the guest is told: its socket may be gone.
    fn reap(&mut self) -> Result<bool> {
        let mut failed = Vec::new();
        self.clients.retain(|client| match waitpid(client.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => true,
            Ok(WaitStatus::Exited(_, 0)) => false,
            _ => {
                failed.push(client.number);
                false
            }
        });
        failed.iter().try_for_each(|client| self.order(&Order::Forget { client: *client }))?;
        Ok(!failed.is_empty())
    }

    /// Tells the guest of what has changed on the host.
    fn look(&mut self) -> Result<()> {
        let mut found = self.looker.look(&self.ground.root, self.ground.proc.as_fd(), &self.places);
        self.looked = Instant::now();
        let mut orders = Vec::new();
        self.shown.retain(|socket, (path, before)| {
            let is_same = found.get(path) == Some(before);
            if is_same {
                found.remove(path);
            } else {
                orders.push(Order::Hide { socket: *socket });
            }
            is_same
        });
        for (path, found) in found {
            let (socket, datagrams, owner) = (self.next, found.datagrams, found.owner);
            self.next += 1;
            orders.push(Order::Show { socket, path: path.clone(), datagrams, owner });
            self.shown.insert(socket, (path, found));
        }
        orders.iter().try_for_each(|order| self.order(order))
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        if self.link.is_none() {
            self.link = Some((self.start_link()?, Events::default()));
        }
        let mut bytes = Vec::new();
        pack(order).map_err(|text| anyhow!(text))?.encode(&mut bytes);
        self.link.as_mut().map_or(Ok(()), |(stream, _)| stream.write_all(&bytes)).context("tell the guest")
    }

    /// A process that relays between the guest's process for sockets and this one.
    fn start_link(&self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair().context("socketpair")?;
        courier::bear(|| {
            nix::unistd::fchdir(&self.ground.vm)?;
            jail::drop_privileges()?;
            courier::carry_for(
                theirs.try_clone()?.into(),
                &Request::Sockets { container: self.id.clone() },
                &self.id,
            )
        })?;
        Ok(ours)
    }

    fn hear_guest(&mut self) -> Result<()> {
        let Some((stream, events)) = &mut self.link else { return Ok(()) };
        let mut buffer = vec![0; 64 << 10];
        match stream.read(&mut buffer).context("the guest's events")? {
            0 => bail!("the guest's process for sockets has ended"),
            count => events.push(&buffer[..count]),
        }
        self.take_events()
    }

    fn take_events(&mut self) -> Result<()> {
        while self.clients.len() < MOST_CLIENTS
            && let Some((_, events)) = &mut self.link
        {
            match events.next_event().map_err(|_| anyhow!("the guest's events make no sense"))? {
                Some(event) => self.take(event)?,
                None => break,
            }
        }
        Ok(())
    }

    fn take(&mut self, event: Event) -> Result<()> {
        let place = |socket| self.shown.get(&socket).map(|(path, _)| path.clone());
        match event {
            Event::Client { socket, client, peer } => {
                let Some(path) = place(socket) else { return self.order(&Order::Forget { client }) };
                let (ground, id) = (&self.ground, &self.id);
                let pid = courier::bear(|| ground.serve(&path, &peer, client, id))?;
                let pidfd = vmm::pidfd_open(pid.as_raw())?;
                self.clients.push(Client { number: client, pid, pidfd });
            }
            Event::Datagram { socket, peer, bytes } => {
                if let Some(path) = place(socket).filter(|_| self.letters.len() < MOST_LETTERS) {
                    self.letters.push_back(Letter { path, peer, bytes });
                }
            }
            Event::Settled => self.is_settled = true,
        }
        Ok(())
    }

    /// Sends what can be sent, each receiver's in order.
    fn post(&mut self) {
        let mut full = Vec::new();
        self.letters.retain(|letter| {
            if full.contains(&letter.path) {
                return true;
            }
            let is_full = self.ground.send(&letter.path, &letter.peer, &letter.bytes) == Err(Errno::EAGAIN);
            if is_full {
                full.push(letter.path.clone());
            }
            is_full
        });
    }
}
