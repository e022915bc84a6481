//! NICs of the VM become interfaces of a container.
//!
//! In: rtnetlink messages that the host has composed out of its own network namespace. Out: the same network in the
//! container's. Must not: stay in another network namespace than pid 1's own.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use a3s_box_proto::{Nic, Setting};
use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use nix::unistd::Pid;

use crate::container::Born;
use crate::process::{self, copy, own};

/// How long a connection may take to be made.
const PATIENCE: Duration = Duration::from_secs(5);
const HEADER: usize = 16;
/// The sizes of `struct ifinfomsg` and of an attribute's header.
const IFINFOMSG: usize = 16;
const ATTRIBUTE: usize = 4;
/// Where `struct ifinfomsg` has its index.
const INDEX: std::ops::Range<usize> = 4..8;

/// Moves NICs to the network namespace of `pid` and sets what goes with them.
pub fn plug(pid: Pid, nics: &[Nic], settings: &[Setting]) -> Result<()> {
    let mut here = Netlink::open()?;
    for nic in nics {
        move_nic(&mut here, pid, nic).with_context(|| format!("interface {}", nic.link.what))?;
    }
    let mut there = inside(pid, Netlink::open)?;
    for setting in settings {
        there.set(setting).with_context(|| setting.what.clone())?;
    }
    Ok(())
}

fn move_nic(netlink: &mut Netlink, pid: Pid, nic: &Nic) -> Result<()> {
    let name = spare_name(nic.slot);
    let index = nix::net::if_::if_nametoindex(CString::new(name.clone())?.as_c_str())
        .with_context(|| format!("the VM has no NIC {name}"))?;
    let mut link = nic.link.clone();
    let Some(place) = link.body.get_mut(INDEX) else { bail!("the message is too short") };
    place.copy_from_slice(&index.to_ne_bytes());
    link.body.extend(8_u16.to_ne_bytes());
    link.body.extend(libc::IFLA_NET_NS_PID.to_ne_bytes());
    link.body.extend(pid.as_raw().to_ne_bytes());
    Ok(netlink.set(&link)?)
}

/// Moves a NIC, which is an interface of `pid`'s network namespace, back here.
pub fn unplug(pid: Pid, slot: u8, index: u32) -> Result<()> {
    let mut body = vec![0; IFINFOMSG];
    body[INDEX].copy_from_slice(&index.to_ne_bytes());
    let name = CString::new(spare_name(slot))?;
    for (kind, value) in [
        (libc::IFLA_NET_NS_PID, &Pid::this().as_raw().to_ne_bytes()[..]),
        (libc::IFLA_IFNAME, name.to_bytes_with_nul()),
    ] {
        let length = ATTRIBUTE + value.len();
        body.extend((length as u16).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let what = format!("interface {index}");
    let link = Setting { what: what.clone(), kind: libc::RTM_NEWLINK, flags: 0, body };
    inside(pid, Netlink::open)?.set(&link).context(what)
}

/// What a NIC is called that is no container's interface.
fn spare_name(slot: u8) -> String {
    format!("eth{slot}")
}

/// Clones a process that does `attempt` in the network namespace of `pid` and, if that succeeds, goes on with `go`,
/// which talks over the process's streams.
pub fn bear<T>(pid: Pid, attempt: impl FnOnce() -> Result<T>, go: impl FnOnce(T)) -> Result<Born> {
    let attempt = |_| {
        let other = File::open(format!("/proc/{pid}/ns/net")).context("the container's network namespace")?;
        setns(other, CloneFlags::CLONE_NEWNET)?;
        attempt()
    };
    process::bear(Vec::new(), attempt, go)
}

/// Clones a process that connects to `address` and copies its own streams there and back.
pub fn dial(pid: Pid, address: SocketAddr) -> Result<Born> {
    let attempt = || {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).context(address)?;
        let other = stream.try_clone().context("connection")?;
        Ok((stream, other))
    };
    bear(pid, attempt, |(mut stream, mut other)| {
        std::thread::spawn(move || {
            let _ = copy(&mut *own(0), &mut stream);
            let _ = stream.shutdown(Shutdown::Write);
        });
        // When the server has said all, it is over.
        let _ = copy(&mut other, &mut *own(1));
    })
}

/// Runs `act` in the network namespace of `pid`.
pub fn inside<T>(pid: Pid, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let own = File::open("/proc/self/ns/net").context("own network namespace")?;
    let other = File::open(format!("/proc/{pid}/ns/net")).context("the container's network namespace")?;
    setns(&other, CloneFlags::CLONE_NEWNET).context("enter the container's network namespace")?;
    let result = act();
    setns(&own, CloneFlags::CLONE_NEWNET).context("leave the container's network namespace")?;
    result
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> Result<Self> {
        let route = SockProtocol::NetlinkRoute;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, route);
        Ok(Netlink(fd.context("rtnetlink socket")?))
    }

    /// Sends one message and waits for the kernel's answer, which it gives before `send` returns.
    fn set(&mut self, setting: &Setting) -> io::Result<()> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16 | setting.flags;
        let mut message = Vec::with_capacity(HEADER + setting.body.len());
        message.extend(((HEADER + setting.body.len()) as u32).to_ne_bytes());
        message.extend(setting.kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend([0; 8]); // sequence number, port: one request at a time needs neither
        message.extend(&setting.body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0u8; 4096];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        match answer[..length].get(HEADER..HEADER + 4) {
            Some(&[a, b, c, d]) => match i32::from_ne_bytes([a, b, c, d]) {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(-code)),
            },
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
