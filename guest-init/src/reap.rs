//! Exits: collected as they come, told only after the last byte of output.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use a3s_box_proto::{ExitStatus, Frame, Outcome};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;

use crate::container::Born;
use crate::process::words;
use crate::stdio::Stdio;

/// What a process is to its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its first process.
    Init,
    /// One that exec added.
    Exec,
}

/// A process that some connection owns or owned.
pub struct Child {
    /// Container id.
    pub container: String,
    /// First or added.
    pub role: Role,
    /// The connection that its streams and exit belong to; `None` once that is lost.
    pub owner: Option<u64>,
    /// The connection that waits for the outcome of its present step.
    pub asker: Option<u64>,
    /// Our ends of its streams.
    pub stdio: Stdio,
    /// Open until execve.
    pub status: Option<OwnedFd>,
    /// A signal that ended it before it could run, to be told instead of the SIGKILL that did it.
    pub ended_by: Option<u8>,
    story: Vec<u8>,
    exit: Option<ExitStatus>,
    told: bool,
}

/// What a child's status socket brought.
pub enum Progress {
    /// Nothing to act on yet.
    None,
    /// It waits at the gate.
    Ready,
    /// It runs the workload.
    Running,
    /// It gave up.
    Failed(String),
}

impl Child {
    /// A newborn process that `owner` asked for.
    pub fn new(born: Born, container: &str, role: Role, owner: u64) -> (Pid, Self) {
        let child = Child {
            container: container.to_string(),
            role,
            owner: Some(owner),
            asker: Some(owner),
            stdio: born.stdio,
            status: Some(born.status),
            ended_by: None,
            story: Vec::new(),
            exit: None,
            told: false,
        };
        (born.pid, child)
    }

    /// Reads on in its story. At the end of the socket the story is over.
    pub fn read_status(&mut self) -> Progress {
        let Some(status) = &self.status else { return Progress::None };
        let mut buffer = [0u8; 4096];
        match hear(status, &mut buffer) {
            Ok((0, _)) => {
                self.status = None;
                self.conclude()
            }
            Ok((_, Some([master, slave]))) => {
                self.stdio = Stdio::terminal(master, slave);
                Progress::None
            }
            Ok((n, None)) => {
                self.story.extend_from_slice(&buffer[..n]);
                if self.story == b"R" {
                    return Progress::Ready;
                }
                Progress::None
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Progress::None,
            // Nothing more can be heard of it: to wait for that would be to wait for ever.
            Err(errno) => {
                self.status = None;
                Progress::Failed(format!("what it tells of itself: {}", words(errno)))
            }
        }
    }

    fn conclude(&self) -> Progress {
        let ready = self.story.first() == Some(&b'R');
        let rest = if ready { &self.story[1..] } else { &self.story[..] };
        match (rest.split_first(), self.role, ready) {
            (Some((b'E', text)), ..) => Progress::Failed(String::from_utf8_lossy(text).into_owned()),
            (None, Role::Exec, _) | (None, Role::Init, true) => Progress::Running,
            _ => Progress::Failed("the container's first process ended while it was set up".into()),
        }
    }

    /// Whether it has ended.
    pub fn has_exited(&self) -> bool {
        self.exit.is_some()
    }

    /// Notes its end.
    pub fn exited(&mut self, status: ExitStatus) {
        self.exit = Some(self.ended_by.map_or(status, ExitStatus::Signal));
    }

    /// Once ended and drained: its status, and what other processes still write to. Told once.
    pub fn farewell(&mut self, out: &mut Vec<Frame>) -> Option<(ExitStatus, Vec<OwnedFd>)> {
        let exit = self.exit?;
        if self.told || self.status.is_some() {
            return None;
        }
        let left = self.stdio.finish(out)?;
        self.told = true;
        Some((exit, left))
    }

    /// Whether its exit was told (or nobody is there to tell).
    pub fn is_over(&self) -> bool {
        self.exit.is_some() && self.status.is_none() && (self.told || self.owner.is_none())
    }
}

/// One message of a status socket, and the descriptors that came along.
fn hear(status: &OwnedFd, buffer: &mut [u8]) -> Result<(usize, Option<[OwnedFd; 2]>), Errno> {
    let mut space = nix::cmsg_space!([RawFd; 2]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<()>(status.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel just installed these descriptors for us.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds.try_into().ok()))
}

/// Every process that has ended since the last call.
pub fn collect() -> Vec<(Pid, ExitStatus)> {
    let mut ended = Vec::new();
    let mut status = 0;
    loop {
        // nix cannot express a death by a real-time signal. SAFETY: `status` outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return ended;
        }
        let exit = if libc::WIFSIGNALED(status) {
            ExitStatus::Signal(libc::WTERMSIG(status) as u8)
        } else {
            ExitStatus::Code(libc::WEXITSTATUS(status) as u8)
        };
        ended.push((Pid::from_raw(pid), exit));
    }
}

/// Whether a signal's default action ends a process.
pub fn is_fatal(signal: i32) -> bool {
    match Signal::try_from(signal) {
        Ok(signal) => !matches!(
            signal,
            Signal::SIGCHLD
                | Signal::SIGCONT
                | Signal::SIGSTOP
                | Signal::SIGTSTP
                | Signal::SIGTTIN
                | Signal::SIGTTOU
                | Signal::SIGURG
                | Signal::SIGWINCH
        ),
        Err(_) => signal > 31,
    }
}

/// The refusal for a signal to a process that is gone, or the kernel's word.
pub fn signal_outcome(result: Result<(), Errno>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(Errno::ESRCH) => Outcome::AlreadyExited,
        Err(errno) => Outcome::Failed { text: words(errno) },
    }
}
