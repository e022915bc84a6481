//! The process that stays behind `exec --detach` and stands for one guest process.
//!
//! A child of `exec` in a session of its own, reparented to the caller's subreaper when `exec` has returned; in the
//! container's cgroup. It relays as a monitor does and exits with the guest process's status; its own end, however it
//! comes, is the guest process's. In: a dialled guest, what to run. Out: a running process's pid, later its status.
//! Must not: hold anything of the caller's but the streams of the process, or keep a privilege once it talks to the
//! guest.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use a3s_box_proto::{Outcome, Request};
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use crate::cgroup::Cgroup;
use crate::guest::{self, Connection};
use crate::jail;
use crate::log::sentence;
use crate::relay::{self, Post};
use crate::{terminal, vmm};

/// How long the guest may take to greet and to start the process, and a little more.
const START: Duration =
    Duration::from_secs(guest::GREETING.as_secs() + guest::ANSWER.as_secs() * guest::ENDURANCE as u64 + 2);
/// What an exec's process is told to have died of when its VM took it along.
const KILLED: i32 = 128 + libc::SIGKILL;
/// The longest report: a guest's text is cut well below.
const REPORT: usize = 16 << 10;

/// A process to run.
pub struct Job<'a> {
    /// The dialled guest, of which nothing is read yet.
    pub stream: UnixStream,
    /// [`Request::Exec`]
    pub request: Request,
    /// Container id.
    pub container: &'a str,
    /// The other end of a pty that takes the place of the caller's streams.
    pub slave: Option<OwnedFd>,
}

/// Asks the guest to run a process. The connection returned owns it.
pub fn begin(stream: UnixStream, request: &Request) -> Result<Connection> {
    let mut connection = Connection::greet(stream, guest::GREETING)?;
    match connection.call(request, guest::ANSWER)? {
        Outcome::Done => Ok(connection),
        Outcome::Failed { text } => {
            bail!("exec failed: unable to start container process: {}", guest::clean(&text))
        }
        Outcome::AlreadyExited | Outcome::NotFound => bail!("cannot exec in a stopped container"),
        other => bail!("exec failed: the guest answered {other:?}"),
    }
}

/// A proxy whose process runs. Dropped before it is released, it ends, and the process with it.
pub struct Proxy {
    /// Its pid, which stands for the process.
    pub pid: i32,
    pidfd: OwnedFd,
    channel: OwnedFd,
}

/// Clones a proxy; returns once its process runs.
pub fn spawn(job: Job, cgroup: &Cgroup) -> Result<Proxy> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .context("socketpair")?;
    // SAFETY: without CLONE_VM and with no stack given, clone is fork; this process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    match Errno::result(pid).context("clone the proxy")? {
        0 => {
            let slave = job.slave.as_ref().map(AsRawFd::as_raw_fd);
            let kept = [job.stream.as_raw_fd(), theirs.as_raw_fd()];
            jail::keep_only(&kept.into_iter().chain(slave).collect::<Vec<_>>());
            let status = live(job, cgroup, &theirs);
            // SAFETY: _exit takes any status and does not return; no exit handler of the parent's may run here.
            unsafe { libc::_exit(status) }
        }
        pid => {
            let proxy = Proxy { pid: pid as i32, pidfd: vmm::pidfd_open(pid as i32)?, channel: ours };
            drop(theirs);
            proxy.await_start()?;
            Ok(proxy)
        }
    }
}

impl Proxy {
    fn await_start(&self) -> Result<()> {
        // It has deadlines of its own, but a cgroup that is frozen meanwhile holds it up.
        if !vmm::ends_within(self.channel.as_fd(), START) {
            bail!("exec failed: the process does not start");
        }
        let mut report = vec![0u8; REPORT];
        let n = recv(self.channel.as_raw_fd(), &mut report, MsgFlags::empty()).unwrap_or(0);
        match report[..n].split_first() {
            Some((b'R', _)) => Ok(()),
            Some((_, text)) => Err(anyhow!("{}", String::from_utf8_lossy(text))),
            None => bail!("exec failed: the process that stands for it ended early"),
        }
    }

    /// A descriptor for it.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Lets it live on without its parent.
    pub fn release(self) {
        // One that was killed meanwhile has an end like any other, for its parent by adoption to see.
        let _ = send(self.channel.as_raw_fd(), b"n", MsgFlags::MSG_NOSIGNAL);
        std::mem::forget(self);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        vmm::kill(self.pidfd());
        // Not a zombie for whoever is left: this process may go on.
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
    }
}

/// The proxy's life. Returns its exit status.
fn live(job: Job, cgroup: &Cgroup, channel: &OwnedFd) -> i32 {
    let report = |text: &[u8]| send(channel.as_raw_fd(), text, MsgFlags::MSG_NOSIGNAL);
    let (container, terminal) = (job.container, job.slave.as_ref().map(|_| 0));
    let begun = settle_in(cgroup, job.slave)
        .and_then(|signals| Ok((signals, begin(job.stream, &job.request)?)))
        .and_then(|begun| report(b"R").map(|_| begun).context("report"));
    let (signals, connection) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            let _ = report(format!("E{}", sentence(&error)).as_bytes());
            return 255;
        }
    };
    // One that has no number yet belongs to nobody, and must not outlive `exec`.
    if !matches!(recv(channel.as_raw_fd(), &mut [0u8; 1], MsgFlags::empty()), Ok(1)) {
        return KILLED;
    }
    let post = Post { container, terminal, ..Post::default() };
    relay::run(connection, &signals, post).map_or(KILLED, |status| status.code())
}

fn settle_in(cgroup: &Cgroup, slave: Option<OwnedFd>) -> Result<SignalFd> {
    nix::unistd::setsid().context("session")?;
    slave.map_or(Ok(()), terminal::take)?;
    nix::unistd::chdir("/").context("leave the caller's directory")?;
    cgroup.join()?;
    let signals = relay::take_signals()?;
    jail::drop_privileges()?;
    jail::confine_relay(&[])?;
    Ok(signals)
}
