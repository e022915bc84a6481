//! An out-of-memory kill in the guest, told on the host where engines look for it.
//!
//! They watch the host cgroup's count of such kills, which only the kernel raises. So a process of its own, which the
//! monitor forks before it gives up its rights, bears a victim into that cgroup, lowers the limit to what is used and
//! a little more, lets the victim allocate until the kernel kills it, and restores the limit; and it makes the file
//! `oom` in the bundle. In: a byte of the monitor's for each time. Out: a byte once it is done. Must not: read a byte
//! of the guest's, touch a cgroup that is not the container's alone, or put the VM in the killer's way.

use std::fs::{self, File};
use std::io::{PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use caps::Capability;
use nix::sys::signal::SigSet;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork};
use rustix::fs::{Mode, OFlags, openat};

use crate::{cgroup, jail, monitor, vmm};

/// The file in the bundle that says it, as conmon makes it and CRI-O reads it.
const FILE: &str = "oom";
/// The process's name, as `ps` shows it.
const NAME: &std::ffi::CStr = c"a3s-box-oom";
/// What may be allocated, in bytes, before the lowered limit is reached: the VM goes on meanwhile.
const ROOM: u64 = 4 << 20;
/// What the victim takes at once, in bytes.
const BITE: usize = 1 << 20;
/// How long the kernel may take to kill it.
const KILL: Duration = Duration::from_secs(2);
/// How long the monitor waits for all of it.
const TOLD: Duration = Duration::from_secs(4);
/// The score of a process that the kernel takes first.
const FIRST: &str = "1000";
/// The score of one that it does not take.
const NEVER: &str = "-1000";

/// The monitor's end.
pub struct Teller(UnixStream);

impl Teller {
    /// Forks the process. `before` is what [`cgroups`] said before this process was moved, `vmm` its own VMM. For a
    /// process with one thread that has its rights and the host's root.
    pub fn start(before: &str, bundle: &Path, vmm: Option<BorrowedFd<'_>>) -> Result<Self> {
        let now = cgroups()?;
        // In the caller's own it would lower the caller's limit.
        let cgroup = if now == before { None } else { cgroup::memory_dir(&now) };
        let cgroup = cgroup.and_then(|dir| File::open(dir).ok());
        let bundle = File::open(bundle).context("open the bundle")?;
        let vmm = vmm.map(|vmm| monitor::pid_of(vmm).context("the VMM's pid")).transpose()?;
        let spared = ["self".to_string()].into_iter().chain(vmm.map(|pid| pid.to_string()));
        let spared = spared.map(|process| score(&process)).collect::<Result<Vec<File>>>()?;
        let (mut ours, mut theirs) = UnixStream::pair().context("socketpair")?;
        // SAFETY: this process has one thread, so the child may run any code; it ends by _exit.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { .. } => {
                drop(theirs);
                // What it opens by path goes away when this process changes the root, which is the root of both.
                ours.set_read_timeout(Some(TOLD))
                    .and_then(|()| ours.read_exact(&mut [0]))
                    .context("its start")?;
                Ok(Teller(ours))
            }
            ForkResult::Child => {
                let served = score("self").and_then(|own| {
                    let work = Work { cgroup, bundle, spared, own };
                    work.confine(&theirs)?;
                    theirs.write_all(b"r").context("tell the monitor")?;
                    work.serve(theirs)
                });
                vmm::quit(i32::from(served.is_err()))
            }
        }
    }

    /// Has it told, and waits until it is. Where that fails nobody is told, and the workload goes on all the same.
    pub fn tell(&mut self) {
        let _ = self.0.set_read_timeout(Some(TOLD)).and_then(|()| self.0.write_all(b"o"));
        let _ = self.0.read(&mut [0]);
    }
}

/// The calling process's cgroups, as procfs shows them.
pub fn cgroups() -> Result<String> {
    fs::read_to_string("/proc/self/cgroup").context("the monitor's cgroup")
}

fn score(process: &str) -> Result<File> {
    let path = format!("/proc/{process}/oom_score_adj");
    File::options().read(true).write(true).open(&path).context(path)
}

/// All that the process holds.
struct Work {
    /// The directory that accounts the container's memory.
    cgroup: Option<File>,
    bundle: File,
    /// Scores of the monitor and its VMM.
    spared: Vec<File>,
    /// This process's score.
    own: File,
}

impl Work {
    /// Gives up what is not needed: streams, signals, rights.
    fn confine(&self, monitor: &UnixStream) -> Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
        dup2_stdin(&null)
            .and_then(|()| dup2_stdout(&null))
            .and_then(|()| dup2_stderr(&null))
            .context("streams")?;
        drop(null);
        let files = [&self.bundle, &self.own].into_iter().chain(&self.spared).chain(&self.cgroup);
        let kept = files.map(AsRawFd::as_raw_fd).chain([monitor.as_raw_fd()]);
        jail::keep_only(&kept.collect::<Vec<RawFd>>());
        nix::sys::prctl::set_name(NAME).context("name")?;
        SigSet::all().thread_block().context("block signals")?;
        // To spare the VM, whose score an engine may have raised.
        jail::drop_privileges_but(&[Capability::CAP_SYS_RESOURCE])
    }

    fn serve(&self, mut monitor: UnixStream) -> Result<()> {
        while matches!(monitor.read(&mut [0]), Ok(1)) {
            // Each is of use without the other.
            let (_, _) = (self.mark(), self.count());
            monitor.write_all(b"d").context("tell the monitor")?;
        }
        Ok(())
    }

    fn mark(&self) -> Result<()> {
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.bundle, FILE, flags, Mode::from_raw_mode(0o644)).map(drop).context(FILE)
    }

    /// Makes the kernel kill a process in the cgroup.
    fn count(&self) -> Result<()> {
        let Some(cgroup) = &self.cgroup else { return Ok(()) };
        let mut held = Held(Vec::new());
        for score in &self.spared {
            held.change(score.try_clone().context("score")?, NEVER).or_else(|error| {
                // One that does not count for more than its size is smaller than the victim's.
                if read(score)?.starts_with(['-', '0']) { Ok(()) } else { Err(error) }
            })?;
        }
        let (mut gate, victim) = self.bear_victim()?;
        let pidfd = vmm::pidfd_open(victim.as_raw())?;
        let lowered = lower(cgroup, &mut held).and_then(|()| gate.write_all(b"g").context("the victim"));
        drop(gate);
        if !vmm::ends_within(pidfd.as_fd(), KILL) {
            vmm::kill(pidfd.as_fd());
        }
        let _ = waitpid(victim, None);
        lowered
    }

    /// A process that allocates without end once its gate is opened, and ends when that is closed.
    fn bear_victim(&self) -> Result<(PipeWriter, Pid)> {
        let mut held = Held(Vec::new());
        held.change(self.own.try_clone().context("score")?, FIRST)?;
        let (mut gate, ours) = std::io::pipe().context("pipe")?;
        // SAFETY: this process has one thread, so the child may run any code; it ends by _exit.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => Ok((ours, child)),
            ForkResult::Child => {
                drop(ours);
                if !matches!(gate.read(&mut [0]), Ok(1)) {
                    vmm::quit(0)
                }
                let mut hoard = Vec::new();
                loop {
                    hoard.push(vec![1u8; BITE]);
                }
            }
        }
    }
}

/// Lowers the limit, and keeps other ways out of it shut.
fn lower(cgroup: &File, held: &mut Held) -> Result<()> {
    let open = |name: &str| -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        Ok(openat(cgroup, name, flags, Mode::empty()).context(name.to_string())?.into())
    };
    let (used, limit) = match open("memory.max") {
        Ok(limit) => ("memory.current", limit),
        Err(_) => ("memory.usage_in_bytes", open("memory.limit_in_bytes")?),
    };
    // Nobody but the victim is to be killed, and nothing of the VM's swapped out; v1 calls the latter otherwise.
    for name in ["memory.oom.group", "memory.swap.max", "memory.swappiness"] {
        // A kernel that has no such file needs none.
        open(name).map_or(Ok(()), |file| held.change(file, "0"))?;
    }
    let used = openat(cgroup, used, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).context(used)?;
    let used: u64 = read(&used.into())?.parse().context("memory in use")?;
    held.change(limit, &(used + ROOM).to_string())
}

/// What files held that were changed; they are changed back on drop, the last first.
struct Held(Vec<(File, String)>);

fn read(file: &File) -> Result<String> {
    let mut bytes = [0; 64];
    let n = file.read_at(&mut bytes, 0).context("read")?;
    Ok(String::from_utf8_lossy(&bytes[..n]).trim_end().to_string())
}

impl Held {
    fn change(&mut self, file: File, value: &str) -> Result<()> {
        let before = read(&file)?;
        file.write_all_at(value.as_bytes(), 0).context("write")?;
        self.0.push((file, before));
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for (file, before) in self.0.drain(..).rev() {
            let _ = file.write_all_at(before.as_bytes(), 0);
        }
    }
}
