//! What the guest's loopback cannot see of the namespace's, relayed.
//!
//! Connections made to 127.0.0.1 or ::1 inside the namespace (an engine's port-forward, a probe) go on to the guest's
//! own; queries to 127.0.0.11 in the guest go to the engine's server in the namespace. A process of its own, without
//! privilege, in the monitor's pid namespace: it dies with the container. In: a started container. Out: relays. Must
//! not: hold anything of `start`'s, or read a byte of the guest's outside a child that is confined.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use a3s_box_proto::Request;
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::steer::{Steering, steer};
use super::watch::{self, Standing};
use crate::cgroup::Cgroup;
use crate::courier::{self, bear, leave, replace};
use crate::{jail, relay};

/// Connections relayed at once; more wait in the listener's queue.
const MOST: usize = 256;
/// Name queries of the guest's that are asked at once.
const MOST_QUERIES: usize = 64;
/// How long a name server may take.
const NAMES: Duration = Duration::from_secs(10);
/// Where engines serve names inside a network namespace.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// What the process needs of its container.
pub struct Place<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The monitor, which the process must not outlive.
    pub monitor: OwnedFd,
    /// The VM's directory, with its control socket.
    pub vm_dir: OwnedFd,
    /// The container's cgroup.
    pub cgroup: &'a Cgroup,
    /// For [`watch`], which lives beside.
    pub standing: Option<Standing>,
}

/// Starts the process, and the watch. What goes wrong after that is its own: the container works without it.
pub fn spawn(mut place: Place) -> Result<()> {
    // A process can only be born into another pid namespace: a helper enters it and bears the relay there.
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => ended_well(child),
        ForkResult::Child => leave(i32::from(enter_and_bear(&mut place).is_err())),
    }
}

pub(super) fn ended_well(child: Pid) -> Result<()> {
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        _ => bail!("the relay for localhost did not start"),
    }
}

fn enter_and_bear(place: &mut Place) -> Result<()> {
    place.cgroup.join()?;
    setns(&place.monitor, CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET)?;
    // Only a child of one that lives there is the monitor's when it is orphaned; any other would be the caller's to
    // reap, and hold up the monitor's end until it is.
    let there = bear(|| bear(|| live(place)).map(drop))?;
    ended_well(there)
}

fn live(place: &mut Place) -> Result<()> {
    nix::unistd::setsid().context("session")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let null = null.into_raw_fd();
    (0..3).try_for_each(|fd| replace(null, fd))?;
    nix::unistd::fchdir(&place.vm_dir).context("enter the VM's directory")?;
    jail::keep_only(&[]);
    let watch = place.standing.take().map(|standing| bear(|| watch::live(place.id, standing))).transpose()?;
    let namespace = File::open("/proc/self/ns/net").context("network namespace")?;
    let four = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
    let six = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok();
    // A host that does not allow it has no relay for connections.
    let steering = steer(namespace.as_fd(), four.as_raw_fd(), six.as_ref().map(AsRawFd::as_raw_fd));
    jail::drop_privileges()?;
    relay::take_signals()?;
    let resolver = bear(|| resolve(place.id))?;
    let listeners = std::iter::once(four).chain(six).collect();
    serve(place.id, listeners, steering, [Some(resolver), watch].into_iter().flatten().collect())
}

/// Relays connections, where they can be steered here.
fn serve(id: &str, listeners: Vec<TcpListener>, steering: Result<Steering>, others: Vec<Pid>) -> Result<()> {
    let Ok(_steering) = steering else {
        for pid in others {
            waitpid(pid, None)?;
        }
        return Ok(());
    };
    let mut children = others.len();
    loop {
        let mut fds: Vec<_> = listeners.iter().map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut fds, PollTimeout::NONE)?;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for (listener, _) in listeners.iter().zip(ready).filter(|(_, ready)| *ready) {
            children -= reap(children >= MOST)?;
            let Ok((socket, _)) = listener.accept() else { continue };
            // A connection for which there is no process is one that is refused.
            children += usize::from(bear(|| connect(id, socket)).is_ok());
        }
    }
}

/// How many children have ended; with `wait`, one at least.
fn reap(wait: bool) -> Result<usize> {
    let mut ended = 0;
    loop {
        let flags = if wait && ended == 0 { WaitPidFlag::empty() } else { WaitPidFlag::WNOHANG };
        match waitpid(None, Some(flags)) {
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => return Ok(ended),
            Ok(_) => ended += 1,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Relays one connection to the same port in the guest.
fn connect(id: &str, socket: TcpStream) -> Result<()> {
    let address = socket.local_addr()?;
    let request = Request::Dial { container: id.into(), address };
    let relayed = courier::carry_for(socket.into(), &request, id);
    if relayed.is_err() {
        // As the peer of a port that nobody listens on would see it.
        let abort = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: the option's value lives until after the call, and its size is given.
        unsafe {
            let size = size_of::<libc::linger>() as libc::socklen_t;
            libc::setsockopt(0, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const abort).cast(), size);
        }
    }
    relayed
}

/// Answers the guest's queries, which come as a stream: length, number, whether by TCP, query.
fn resolve(id: &str) -> Result<()> {
    jail::keep_only(&[]);
    let (ours, theirs) = UnixStream::pair()?;
    bear(|| courier::carry_for(theirs.try_clone()?.into(), &Request::Resolve { container: id.into() }, id))?;
    drop(theirs);
    jail::confine_relay(&["socket", "bind", "connect"])?;
    let answers = Arc::new(Mutex::new(ours.try_clone()?));
    let mut queries = ours;
    loop {
        let mut head = [0; 5];
        queries.read_exact(&mut head)?;
        let mut query = vec![0; u16::from_be_bytes([head[0], head[1]]).into()];
        queries.read_exact(&mut query)?;
        // One for each thread: a guest that asks for more at once asks again later, as resolvers do.
        if Arc::strong_count(&answers) > MOST_QUERIES {
            continue;
        }
        let (answers, tcp) = (answers.clone(), head[4] != 0);
        std::thread::Builder::new().spawn(move || {
            let Ok(answer) = ask(&query, tcp) else { return };
            let mut message = (answer.len() as u16).to_be_bytes().to_vec();
            message.extend(&head[2..4]);
            message.extend(answer);
            let _ = answers.lock().unwrap_or_else(PoisonError::into_inner).write_all(&message);
        })?;
    }
}

fn ask(query: &[u8], tcp: bool) -> io::Result<Vec<u8>> {
    let server = SocketAddr::from((RESOLVER, 53));
    if !tcp {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(server)?;
        socket.set_read_timeout(Some(NAMES))?;
        socket.send(query)?;
        let mut answer = vec![0; u16::MAX.into()];
        let length = socket.recv(&mut answer)?;
        answer.truncate(length);
        return Ok(answer);
    }
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(NAMES))?;
    stream.write_all(&(query.len() as u16).to_be_bytes())?;
    stream.write_all(query)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}
