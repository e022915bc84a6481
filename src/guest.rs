//! The client's end of the control channel.
//!
//! In: a container's VM directory and the vmm that owns its socket. Out: a greeted [`Connection`], typed outcomes.
//! Must not: wait without a deadline, or trust a socket that is not the recorded vmm's.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use a3s_box_proto::{self as proto, Decoder, Frame, Greeting, Outcome, Reply, Request, pack, unpack};
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{getsockopt, sockopt};

use crate::shortage::is_shortage;

/// Name of the control socket in a VM's directory.
pub const SOCKET: &str = "control.sock";
/// How long the guest may take to greet: it does so at once, whatever else it has to do.
pub const GREETING: Duration = Duration::from_secs(10);
/// How long it may stay silent while it is asked for something: it says so where it takes longer ([`Reply::Working`]), as among
/// a hundred that ask at once. One that is frozen says nothing.
pub const ANSWER: Duration = Duration::from_secs(15);
/// How often as long it may work on one request: a guest that has lost its mind does not keep the caller for ever.
pub const ENDURANCE: u32 = 4;

/// Frames kept while a reply is awaited; the credit of three streams allows fewer.
const MOST_HELD: usize = 256;

/// A connection to guest-init.
pub struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    /// Frames that came before an awaited reply and belong to whoever reads on.
    held: VecDeque<Frame>,
    /// What the guest said first.
    pub greeting: Greeting,
}

/// Nobody greets there (yet): the guest is still booting, or gone.
#[derive(Debug)]
pub struct NotReady;

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the guest does not answer")
    }
}

impl std::error::Error for NotReady {}

/// Nobody listens yet, or any more. Waiting does not end a shortage.
pub fn unready(error: impl Into<anyhow::Error>) -> anyhow::Error {
    let error = error.into();
    if is_shortage(&error) { error.context("connect to the guest") } else { NotReady.into() }
}

/// Dials the VM whose directory is `dir`; `vmm` is the host pid that must own the socket. Not a byte of the guest's is
/// read yet.
pub fn dial(dir: &Path, vmm: i32) -> Result<UnixStream> {
    use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let dir = std::fs::File::options()
        .read(true)
        .custom_flags(flags)
        .open(dir)
        .context("open the VM's directory")?;
    // By way of the descriptor: no path grows beyond sun_path's 108 bytes, no component can be swapped.
    let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    let kind = std::fs::symlink_metadata(&path).map_err(unready)?.file_type();
    if !kind.is_socket() {
        bail!("the control socket is not a socket");
    }
    let stream = UnixStream::connect(&path).map_err(unready)?;
    let peer = getsockopt(&stream, sockopt::PeerCredentials).context("peer credentials")?.pid();
    if peer != vmm {
        bail!("the control socket belongs to pid {peer}, not to the VM's {vmm}");
    }
    Ok(stream)
}

impl Connection {
    /// Takes a fresh connection and waits for the greeting.
    pub fn greet(stream: UnixStream, wait: Duration) -> Result<Self> {
        let blank = Greeting { version: 0, kernel: String::new(), uptime_us: 0 };
        let mut connection =
            Connection { stream, decoder: Decoder::default(), held: VecDeque::new(), greeting: blank };
        match connection.reply(Instant::now() + wait) {
            Ok(Reply::Greeting(greeting)) if greeting.version == proto::VERSION => {
                connection.greeting = greeting
            }
            Ok(Reply::Greeting(greeting)) => {
                bail!(
                    "the guest speaks protocol version {}, this a3s-box {}",
                    greeting.version,
                    proto::VERSION
                )
            }
            Ok(_) => bail!("the guest did not greet"),
            Err(error) => return Err(unready(error)),
        }
        Ok(connection)
    }

    /// Sends a request and waits for its outcome: for as long as `wait` at a time while the guest works on it, [`ENDURANCE`]
    /// times that in all.
    pub fn call(&mut self, request: &Request, wait: Duration) -> Result<Outcome> {
        self.send(request)?;
        let latest = Instant::now() + wait.saturating_mul(ENDURANCE);
        let mut deadline = Instant::now() + wait;
        loop {
            match self.reply(deadline).context("the guest's answer")? {
                Reply::Outcome(outcome) => return Ok(outcome),
                Reply::Working => deadline = latest.min(Instant::now() + wait),
                other => bail!("the guest answered out of turn: {other:?}"),
            }
        }
    }

    /// Sends a request; its outcome comes as a frame.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        let frame = pack(request).map_err(|text| anyhow!(text))?;
        self.push(&frame).context("send to the guest")
    }

    /// Sends a frame.
    pub fn push(&mut self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.stream.set_write_timeout(Some(ANSWER))?;
        self.stream.write_all(&bytes)
    }

    /// Reads once. False means that the guest is gone.
    pub fn receive(&mut self) -> io::Result<bool> {
        let mut buffer = [0u8; 64 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(n) => {
                self.decoder.push(&buffer[..n]);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The next whole frame received.
    pub fn next_frame(&mut self) -> Result<Option<Frame>> {
        match self.held.pop_front() {
            Some(frame) => Ok(Some(frame)),
            None => Ok(self.decoder.next_frame()?),
        }
    }

    fn reply(&mut self, deadline: Instant) -> Result<Reply> {
        loop {
            match self.decoder.next_frame()? {
                Some(Frame::Message(body)) => {
                    return unpack(&body).map_err(|text| anyhow!("not understood: {}", clean(&text)));
                }
                // A short process's output may come before the news that it started.
                Some(frame) if self.held.len() < MOST_HELD => {
                    self.held.push_back(frame);
                    continue;
                }
                Some(_) => bail!("too much output before a reply"),
                None => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("timed out");
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.receive() {
                Ok(true) => {}
                Ok(false) => bail!("the guest closed the connection"),
                // Its time is over, which is seen above.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A guest's text made fit for a terminal or a log: one line, no control characters, bounded.
pub fn clean(text: &str) -> String {
    const LONGEST: usize = 2000;
    let shown = text.trim_end().chars().take(LONGEST);
    shown.map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_text_cannot_drive_a_terminal() {
        assert_eq!(clean("no\x1b[2Jtrick\n"), "no\u{fffd}[2Jtrick");
        assert_eq!(clean(&"x".repeat(5000)).len(), 2000);
    }

    #[test]
    fn a_connection_that_closes_before_greeting_is_not_ready() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = Connection::greet(ours, Duration::from_secs(1)).err().unwrap();
        assert!(error.is::<NotReady>());
    }

    #[test]
    fn another_protocol_version_is_named() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let greeting = Reply::Greeting(Greeting { version: 99, kernel: "k".into(), uptime_us: 0 });
        let mut bytes = Vec::new();
        pack(&greeting).unwrap().encode(&mut bytes);
        theirs.write_all(&bytes).unwrap();
        let text = Connection::greet(ours, Duration::from_secs(1)).err().unwrap().to_string();
        assert!(text.contains("version 99"), "{text}");
    }

    /// What a caller is told by a guest that greets well and then answers a request with these bytes, over and over.
    fn answered_with(bytes: Vec<u8>, pause: Duration) -> String {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let peer = std::thread::spawn(move || {
            let greeting = Greeting { version: proto::VERSION, kernel: "k".into(), uptime_us: 0 };
            let mut first = Vec::new();
            pack(&Reply::Greeting(greeting)).unwrap().encode(&mut first);
            theirs.write_all(&first).unwrap();
            while !bytes.is_empty() && theirs.write_all(&bytes).is_ok() {
                std::thread::sleep(pause);
            }
        });
        let mut connection = Connection::greet(ours, Duration::from_secs(5)).unwrap();
        let begin = Instant::now();
        let result = connection.call(&Request::Acknowledge, Duration::from_millis(500));
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(connection);
        peer.join().unwrap();
        crate::log::sentence(&result.unwrap_err())
    }

    #[test]
    fn a_busy_guest_is_waited_for_but_not_for_ever() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut say = move |reply: Reply| {
            let mut bytes = Vec::new();
            pack(&reply).unwrap().encode(&mut bytes);
            theirs.write_all(&bytes)
        };
        say(Reply::Greeting(Greeting { version: proto::VERSION, kernel: "k".into(), uptime_us: 0 })).unwrap();
        let mut connection = Connection::greet(ours, Duration::from_secs(5)).unwrap();
        let wait = Duration::from_millis(300);
        let peer = std::thread::spawn(move || {
            for _ in 0..4 {
                std::thread::sleep(wait / 2);
                say(Reply::Working).unwrap();
            }
            say(Reply::Outcome(Outcome::Done)).unwrap();
            while say(Reply::Working).is_ok() {
                std::thread::sleep(wait / 3);
            }
        });
        assert_eq!(connection.call(&Request::Acknowledge, wait).unwrap(), Outcome::Done);
        let begin = Instant::now();
        let error = connection.call(&Request::Acknowledge, wait).unwrap_err();
        assert_eq!(crate::log::sentence(&error), "the guest's answer: timed out");
        assert!(begin.elapsed() >= wait * ENDURANCE);
        drop(connection);
        peer.join().unwrap();
    }

    #[test]
    fn a_hostile_guest_ends_its_own_connection_and_harms_nobody() {
        let framed = |frame: Frame| {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            bytes
        };
        let flood = Frame::Data(proto::Stream::Stdout, vec![b'x'; 1000]);
        let trick = Frame::Message(b"{\"\x1b[2Jno\\u001b[2Jreply\":1}".to_vec());
        let nested = Frame::Message([&[b'['; 100_000][..], b"1"].concat());
        for (bytes, pause, words) in [
            (vec![0xff, 0xff, 0xff, 0xff, 1], 0, "over the limit"),
            (vec![1, 0, 0, 0, 99], 0, "unknown frame kind"),
            (vec![0; 64], 0, "frame"),
            (framed(flood), 0, "too much output"),
            (framed(trick), 0, "not understood"),
            (framed(nested), 0, "not understood"),
            (framed(Frame::Message(b"{}".to_vec()))[..5].to_vec(), 20, "the guest's answer"),
            (Vec::new(), 0, "the guest"),
        ] {
            let shown = format!("{:?}", &bytes[..bytes.len().min(20)]);
            let said = answered_with(bytes, Duration::from_millis(pause));
            assert!(said.contains(words), "{shown}: {said}");
            assert!(!said.contains('\x1b') && said.len() < 3000, "{shown}: {said:?}");
        }
    }
}
