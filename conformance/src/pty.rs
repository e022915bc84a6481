//! Terminals as callers have them: one end of a pty to type on, and the socket at which a runtime hands one over.
//!
//! In: what to type. Out: what appears. Must not: wait for anything without a deadline.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, OutputModes, Winsize, isatty, tcgetattr, tcsetattr, tcsetwinsize};

use crate::process::{self, Running, brief, wait_for};
use crate::world::World;

/// A terminal, seen from the side of the one who types.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    /// Everything that has appeared so far.
    text: String,
    patience: Duration,
}

impl Terminal {
    /// A master that came from elsewhere.
    pub fn of(master: OwnedFd, patience: Duration) -> Result<Self> {
        ensure!(isatty(&master), "what was sent is no terminal");
        rustix::fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK).context("fcntl")?;
        Ok(Terminal { master: master.into(), text: String::new(), patience })
    }

    /// Runs a command of the runtime on a new terminal.
    pub fn spawn<S: AsRef<std::ffi::OsStr>>(
        world: &World,
        args: &[S],
        size: (u16, u16),
    ) -> Result<(Self, Running, OwnedFd)> {
        Self::attach(&world.command(args), size, world.patience())
    }

    /// Runs a command whose streams are a new terminal, which is also its session's.
    pub fn attach(inner: &Command, size: (u16, u16), patience: Duration) -> Result<(Self, Running, OwnedFd)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        unlockpt(&master)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let terminal = Terminal::of(master, patience)?;
        terminal.resize(size.0, size.1)?;
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(inner.get_program()).args(inner.get_args());
        command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if let Some(dir) = inner.get_current_dir() {
            command.current_dir(dir);
        }
        let stream = || slave.try_clone().map(Stdio::from);
        command.stdin(stream()?).stdout(stream()?).stderr(stream()?);
        Ok((terminal, process::start(command, false, patience)?, slave))
    }

    /// Types something.
    pub fn say(&mut self, text: &str) -> Result<()> {
        let mut bytes = text.as_bytes();
        while !bytes.is_empty() {
            match self.master.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait_for(&mut [PollFd::new(&self.master, PollFlags::OUT)], self.patience)?
                }
                Err(error) => return Err(error).context("type"),
            }
        }
        Ok(())
    }

    /// Waits until this appears, and takes away everything up to its end.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.expect_within(self.patience, text)
    }

    fn expect_within(&mut self, patience: Duration, text: &str) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(at) = self.text.find(text) {
                let rest = self.text.split_off(at + text.len());
                return Ok(std::mem::replace(&mut self.text, rest));
            }
            if !self.read(deadline).with_context(|| format!("waiting {patience:.0?} for {text:?}"))? {
                bail!("the terminal ended without {text:?}: {:?}", brief(&self.text));
            }
        }
    }

    /// Makes it another size and waits until this appears. The size is told again now and then: docker's client hears of
    /// a new one only some time after the program has begun.
    pub fn expect_at_size(&mut self, (rows, columns): (u16, u16), text: &str) -> Result<String> {
        const TRIES: u32 = 10;
        self.resize(rows, columns)?;
        for _ in 1..TRIES {
            let said = self.expect_within(self.patience / TRIES, text);
            if said.is_ok() {
                return said;
            }
            self.resize(rows + 1, columns)?; // the same again would be no news
            self.resize(rows, columns)?;
        }
        self.expect_within(self.patience / TRIES, text)
    }

    /// Everything that appears until the other end is closed.
    pub fn rest(&mut self) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        while self
            .read(deadline)
            .with_context(|| format!("waiting {:.0?} for the terminal's end", self.patience))?
        {}
        Ok(std::mem::take(&mut self.text))
    }

    /// False once the other end is closed.
    fn read(&mut self, deadline: Instant) -> Result<bool> {
        let mut buffer = [0; 4096];
        loop {
            match self.master.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => {
                    self.text.push_str(&String::from_utf8_lossy(&buffer[..n]));
                    return Ok(true);
                }
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                    return Ok(false);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    ensure!(!left.is_zero(), "not in time: {:?}", brief(&self.text));
                    wait_for(&mut [PollFd::new(&self.master, PollFlags::IN)], left)?;
                }
                Err(error) => return Err(error).context("read the terminal"),
            }
        }
    }

    /// Makes it another size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).context("resize")
    }

    /// What conmon does with a master that it gets.
    pub fn set_onlcr(&self) -> Result<()> {
        let mut settings = tcgetattr(&self.master).context("settings of the terminal")?;
        settings.output_modes |= OutputModes::ONLCR;
        tcsetattr(&self.master, OptionalActions::Now, &settings).context("settings of the terminal")
    }
}

/// A console socket.
#[derive(Debug)]
pub struct ConsoleSocket(UnixListener);

impl ConsoleSocket {
    /// Listens at this path, which may be longer than a socket's address.
    pub fn listen(path: &Path) -> Result<Self> {
        let dir = path.parent().context("a directory")?;
        let dir = File::open(dir).with_context(|| format!("open {}", dir.display()))?;
        let short = format!("/proc/self/fd/{}/short", std::os::fd::AsRawFd::as_raw_fd(&dir));
        let listener = UnixListener::bind(&short).context("bind the console socket")?;
        std::fs::rename(&short, path).context("rename the console socket")?;
        listener.set_nonblocking(true)?;
        Ok(ConsoleSocket(listener))
    }

    /// Takes what a command that has returned must have sent: one descriptor and a few bytes.
    pub fn receive(&self) -> Result<OwnedFd> {
        let (stream, _) = self.0.accept().context("nobody has connected to the console socket")?;
        let mut space = [std::mem::MaybeUninit::uninit(); 256];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 8192];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = recvmsg(&stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
            .context("nothing is on the console socket")?;
        ensure!((1..4096).contains(&message.bytes), "a payload of {} bytes", message.bytes);
        let mut fds: Vec<OwnedFd> = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        ensure!(fds.len() == 1, "{} descriptors, not 1", fds.len());
        fds.pop().context("a descriptor")
    }
}
