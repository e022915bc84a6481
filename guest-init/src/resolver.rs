//! Names at 127.0.0.11, where a container's resolv.conf asks for them there.
//!
//! Engines serve names inside the host's network namespace, which the guest's loopback does not reach. In: queries of
//! the container by UDP and TCP. Out: the same on the process's output, numbered; answers come back on its input.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use crate::container::Born;
use crate::net::bear;
use crate::process::own;

const ADDRESS: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 11), 53);
/// Queries that wait for their answers; the oldest is forgotten for a new one.
const WAITING: u16 = 64;
const LONGEST_FILE: u64 = 64 << 10;

enum Client {
    Udp(SocketAddr),
    Tcp(TcpStream),
}

#[derive(Default)]
struct Waiting {
    next: u16,
    clients: HashMap<u16, Client>,
}

/// Clones a process that serves inside the network namespace of `pid`.
pub fn serve(pid: Pid) -> Result<Born> {
    let attempt = || {
        if !is_asked_for(pid) {
            bail!("its resolv.conf does not name {}", ADDRESS.0);
        }
        let udp = UdpSocket::bind(ADDRESS).context("serve names by UDP")?;
        let tcp = TcpListener::bind(ADDRESS).context("serve names by TCP")?;
        Ok((udp, tcp))
    };
    bear(pid, attempt, |(udp, tcp)| {
        let waiting = Mutex::new(Waiting::default());
        std::thread::scope(|scope| {
            scope.spawn(|| hear_datagrams(&udp, &waiting));
            scope.spawn(|| {
                while let Ok((stream, _)) = tcp.accept() {
                    scope.spawn(|| hear_stream(stream, &waiting));
                }
            });
            let _ = answer(&udp, &waiting);
            crate::process::leave(0)
        })
    })
}

fn is_asked_for(pid: Pid) -> bool {
    let file = File::open(format!("/proc/{pid}/root/etc/resolv.conf"));
    let mut text = String::new();
    let read = file.and_then(|file| file.take(LONGEST_FILE).read_to_string(&mut text));
    let names = |line: &str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver") && words.next() == Some("127.0.0.11")
    };
    read.is_ok() && text.lines().any(names)
}

fn hear_datagrams(udp: &UdpSocket, waiting: &Mutex<Waiting>) {
    let mut buffer = [0; 4096];
    while let Ok((length, client)) = udp.recv_from(&mut buffer) {
        let _ = pass_on(&buffer[..length], Client::Udp(client), waiting);
    }
}

fn hear_stream(mut stream: TcpStream, waiting: &Mutex<Waiting>) {
    let mut length = [0; 2];
    while stream.read_exact(&mut length).is_ok() {
        let mut query = vec![0; u16::from_be_bytes(length).into()];
        let Ok(client) = stream.try_clone() else { return };
        if stream.read_exact(&mut query).is_err() || pass_on(&query, Client::Tcp(client), waiting).is_err() {
            return;
        }
    }
}

fn pass_on(query: &[u8], client: Client, waiting: &Mutex<Waiting>) -> io::Result<()> {
    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
    let number = waiting.next;
    waiting.next = number.wrapping_add(1);
    waiting.clients.remove(&number.wrapping_sub(WAITING));
    let mut message = (query.len() as u16).to_be_bytes().to_vec();
    message.extend(number.to_be_bytes());
    message.push(matches!(client, Client::Tcp(_)).into());
    message.extend(query);
    waiting.clients.insert(number, client);
    // Under the lock, so that messages do not mix.
    own(1).write_all(&message)
}

fn answer(udp: &UdpSocket, waiting: &Mutex<Waiting>) -> io::Result<()> {
    let mut input = own(0);
    loop {
        let mut head = [0; 4];
        input.read_exact(&mut head)?;
        let mut answer = vec![0; u16::from_be_bytes([head[0], head[1]]).into()];
        input.read_exact(&mut answer)?;
        let number = u16::from_be_bytes([head[2], head[3]]);
        let client = waiting.lock().unwrap_or_else(PoisonError::into_inner).clients.remove(&number);
        // A client that is gone is none of the others' trouble.
        match client {
            Some(Client::Udp(client)) => drop(udp.send_to(&answer, client)),
            Some(Client::Tcp(mut stream)) => {
                let _ = stream.write_all(&head[..2]).and_then(|()| stream.write_all(&answer));
            }
            None => {}
        }
    }
}
