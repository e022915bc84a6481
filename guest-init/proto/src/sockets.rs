//! What the host and the guest's process for sockets say to each other about bound sockets.
//!
//! The host tells where sockets are ([`Order`]s, JSON bodies of [`crate::Frame::Message`] on the process's input), the
//! guest who uses them ([`Event`]s on its output). Events come from whoever runs the guest: fixed numbers and bounded
//! bytes, cut here without looking into them. In: bytes and typed values. Out: the same. Must not: allocate for a length
//! it has not checked.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest datagram carried; Linux's default send buffer holds less.
pub const MAX_DATAGRAM: usize = 256 << 10;
/// Supplementary groups told of a peer; what is beyond is left out.
pub const MAX_GROUPS: usize = 256;
/// kind, socket, client, uid, gid, how many groups, how many bytes.
const HEADER: usize = 1 + 4 + 8 + 4 + 4 + 2 + 4;
const CLIENT: u8 = 1;
const DATAGRAM: u8 = 2;
const SETTLED: u8 = 3;

/// What the host asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Order {
    /// Stand in for a socket.
    Show {
        /// A number that no other has had.
        socket: u32,
        /// Where it is in the container.
        path: PathBuf,
        /// Whether it takes datagrams; else streams.
        datagrams: bool,
        /// Its owner, group and permission bits.
        owner: (u32, u32, u32),
    },
    /// Nobody listens there any more.
    Hide {
        /// Its number.
        socket: u32,
    },
    /// Hang up on a client, where nobody goes on with it.
    Forget {
        /// As [`Event::Client`] called it.
        client: u64,
    },
    /// Tell everything that has come so far, then [`Event::Settled`].
    Settle,
}

/// Who uses a socket: ids as the guest's kernel vouches for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What the guest tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody has connected, and waits for [`crate::Request::Accept`] or [`Order::Forget`].
    Client {
        /// To which socket.
        socket: u32,
        /// A number that no other has.
        client: u64,
        /// Who.
        peer: Peer,
    },
    /// Somebody has sent a datagram.
    Datagram {
        /// To which socket.
        socket: u32,
        /// Who.
        peer: Peer,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// The answer to [`Order::Settle`].
    Settled,
}

impl Event {
    /// Appends the event's bytes to `out`. Groups and bytes beyond the bounds are left out.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let nobody = Peer::default();
        let (kind, socket, client, peer, bytes) = match self {
            Event::Client { socket, client, peer } => (CLIENT, *socket, *client, peer, &[][..]),
            Event::Datagram { socket, peer, bytes } => (DATAGRAM, *socket, 0, peer, &bytes[..]),
            Event::Settled => (SETTLED, 0, 0, &nobody, &[][..]),
        };
        let groups = &peer.groups[..peer.groups.len().min(MAX_GROUPS)];
        let bytes = &bytes[..bytes.len().min(MAX_DATAGRAM)];
        out.push(kind);
        out.extend_from_slice(&socket.to_le_bytes());
        out.extend_from_slice(&client.to_le_bytes());
        out.extend_from_slice(&peer.uid.to_le_bytes());
        out.extend_from_slice(&peer.gid.to_le_bytes());
        out.extend_from_slice(&(groups.len() as u16).to_le_bytes());
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        groups.iter().for_each(|group| out.extend_from_slice(&group.to_le_bytes()));
        out.extend_from_slice(bytes);
    }
}

/// Cuts a byte stream into events.
#[derive(Debug, Default)]
pub struct Events(Vec<u8>);

/// Bytes that are no event; nothing after them is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Garbled;

impl Events {
    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole event, or `None` until more bytes come.
    pub fn next_event(&mut self) -> Result<Option<Event>, Garbled> {
        let mut rest = &self.0[..];
        let mut take = |count: usize| rest.split_off(..count);
        let Some(header) = take(HEADER) else { return Ok(None) };
        let number = |at: usize, count: usize| {
            header[at..at + count].iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte))
        };
        let (groups, length) = (number(21, 2) as usize, number(23, 4) as usize);
        let kind = header[0];
        let may_hold = |kind, bound| kind || bound == 0;
        if !(CLIENT..=SETTLED).contains(&kind)
            || groups > MAX_GROUPS
            || length > MAX_DATAGRAM
            || !may_hold(kind != SETTLED, groups)
            || !may_hold(kind == DATAGRAM, length)
        {
            return Err(Garbled);
        }
        let (Some(group_bytes), Some(bytes)) = (take(4 * groups), take(length)) else { return Ok(None) };
        let group = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |all, byte| all << 8 | u32::from(*byte));
        let peer = Peer {
            uid: number(13, 4) as u32,
            gid: number(17, 4) as u32,
            groups: group_bytes.chunks(4).map(group).collect(),
        };
        let socket = number(1, 4) as u32;
        let event = match kind {
            CLIENT => Event::Client { socket, client: number(5, 8), peer },
            DATAGRAM => Event::Datagram { socket, peer, bytes: bytes.to_vec() },
            _ => Event::Settled,
        };
        self.0.drain(..HEADER + 4 * groups + length);
        Ok(Some(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Vec<Event> {
        let peer = Peer { uid: 1000, gid: u32::MAX, groups: vec![4, 27, 1 << 31] };
        vec![
            Event::Client { socket: 7, client: u64::MAX - 1, peer: peer.clone() },
            Event::Datagram { socket: 0, peer: Peer::default(), bytes: Vec::new() },
            Event::Datagram { socket: u32::MAX, peer, bytes: vec![255; MAX_DATAGRAM] },
            Event::Settled,
        ]
    }

    #[test]
    fn events_survive_any_cut() {
        let mut bytes = Vec::new();
        events().iter().for_each(|event| event.encode(&mut bytes));
        for step in [1000, 999_999] {
            let mut cutter = Events::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(step) {
                cutter.push(piece);
                while let Some(event) = cutter.next_event().unwrap() {
                    seen.push(event);
                }
            }
            assert_eq!(seen, events());
        }
    }

    #[test]
    fn lengths_beyond_the_bounds_are_refused_before_they_are_awaited() {
        let header = |kind: u8, groups: u16, length: u32| {
            let numbers = [0u8; 20];
            [&[kind][..], &numbers, &groups.to_le_bytes(), &length.to_le_bytes()].concat()
        };
        for bytes in [
            header(0, 0, 0),
            header(4, 0, 0),
            header(CLIENT, MAX_GROUPS as u16 + 1, 0),
            header(CLIENT, 0, 1),
            header(SETTLED, 1, 0),
            header(DATAGRAM, 0, MAX_DATAGRAM as u32 + 1),
            header(DATAGRAM, 0, u32::MAX),
        ] {
            let mut cutter = Events::default();
            cutter.push(&bytes);
            assert_eq!(cutter.next_event(), Err(Garbled), "{bytes:?}");
        }
    }

    #[test]
    fn what_is_too_much_is_cut_when_it_is_packed() {
        let peer = Peer { groups: vec![9; MAX_GROUPS + 5], ..Peer::default() };
        let mut bytes = Vec::new();
        Event::Datagram { socket: 1, peer, bytes: vec![1; MAX_DATAGRAM + 5] }.encode(&mut bytes);
        let mut cutter = Events::default();
        cutter.push(&bytes);
        let Ok(Some(Event::Datagram { peer, bytes, .. })) = cutter.next_event() else {
            panic!("no datagram")
        };
        assert_eq!((peer.groups.len(), bytes.len()), (MAX_GROUPS, MAX_DATAGRAM));
    }
}
