//! rtnetlink, one request at a time.
//!
//! In: messages, and a network namespace to send them in. Out: the kernel's answers. Must not: leave the calling
//! thread in another namespace.

use std::io;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, anyhow, bail};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};

/// How often a dump is asked for whose objects change meanwhile.
const ATTEMPTS: u8 = 10;

/// Acts in a network namespace, which a thread of its own enters.
pub fn inside<T: Send>(namespace: BorrowedFd<'_>, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let enter = || {
            setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            act()
        };
        scope.spawn(enter).join().map_err(|_| anyhow!("enter the network namespace: no thread"))?
    })
}

/// A socket that stays in the network namespace in which it was opened.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// In the caller's network namespace.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("rtnetlink socket")?;
        socket.bind_auto().context("rtnetlink socket")?;
        socket.connect(&SocketAddr::new(0, 0)).context("rtnetlink socket")?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// In another one.
    pub fn open_in(namespace: BorrowedFd<'_>) -> Result<Self> {
        inside(namespace, Self::open)
    }

    /// Sends a request and waits until the kernel has done it.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_ACK | flags)?;
        loop {
            for answer in self.receive()? {
                if let NetlinkPayload::Error(error) = answer.payload {
                    return if error.code.is_none() { Ok(()) } else { Err(error.to_io()) };
                }
            }
        }
    }

    /// Asks for all objects of a kind, as they are at one time.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..ATTEMPTS {
            if let Some(found) = self.try_dump(message.clone())? {
                return Ok(found);
            }
        }
        bail!("rtnetlink: what was asked for keeps changing")
    }

    fn try_dump(&mut self, message: RouteNetlinkMessage) -> Result<Option<Vec<RouteNetlinkMessage>>> {
        self.send(message, NLM_F_DUMP)?;
        let (mut found, mut changed) = (Vec::new(), false);
        loop {
            for answer in self.receive()? {
                changed |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) => return Ok((!changed).then_some(found)),
                    NetlinkPayload::Error(error) => return Err(error.to_io().into()),
                    _ => bail!("rtnetlink: unexpected answer to a dump"),
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    fn receive(&mut self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut messages = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let message =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4).clamp(4, rest.len());
            rest = &rest[length..];
            if message.header.sequence_number == self.sequence {
                messages.push(message);
            }
        }
        Ok(messages)
    }
}
