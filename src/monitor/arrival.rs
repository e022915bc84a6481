//! The wait for a guest that boots, until it greets.
//!
//! In: a VM that was told to boot. Out: a greeted connection, or what the VM died of. Must not: outlast the caller, or a
//! signal by which it gives up.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use a3s_box_proto::LISTENING;
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use super::Reporter;
use crate::guest::{self, Connection, NotReady};
use crate::relay::{self, Vm};
use crate::timeline::{self, Mark, Timeline};
use crate::vmm;

/// How long a guest may take from the VMM's start to its greeting.
const BOOT: Duration = Duration::from_secs(60);
/// How often the socket is tried where the console said nothing (a kernel without one).
const RETRY: Duration = Duration::from_millis(250);

/// Dials the guest by a path relative to the VM's directory, which is the current one.
fn dial() -> Result<Connection> {
    Connection::greet(UnixStream::connect(guest::SOCKET).map_err(guest::unready)?, guest::GREETING)
}

/// Waits for the greeting.
pub(super) fn connect(
    vm: &mut Vm,
    signals: &SignalFd,
    reporter: &Reporter,
    timeline: &Timeline,
) -> Result<Connection> {
    let deadline = Instant::now() + BOOT;
    let mut listening = false;
    loop {
        let quiet = !wait(vm, signals, reporter)?;
        vm.console.drain();
        if !listening && vm.console.heard(LISTENING) {
            listening = true;
            timeline.mark(Mark::Listening);
            reporter.phase("guest-init listens");
        }
        if listening || quiet {
            match dial() {
                Err(error) if error.is::<NotReady>() => {}
                Ok(connection) => {
                    // Its console may not have said so yet, or there is none.
                    if !listening {
                        timeline.mark(Mark::Listening);
                    }
                    let age = connection.greeting.uptime_us;
                    timeline.mark_at(Mark::Kernel, timeline::now().saturating_sub(age));
                    return Ok(connection);
                }
                Err(error) => return Err(error),
            }
        }
        if Instant::now() > deadline {
            vm.console.drain();
            let words = vm.console.last_words();
            bail!("the guest did not come up within {} s; its console said: {words:?}", BOOT.as_secs());
        }
    }
}

/// Waits for a sign of life, but not for long: false if there was none. Fails when the VMM or the caller is gone.
fn wait(vm: &mut Vm, signals: &SignalFd, reporter: &Reporter) -> Result<bool> {
    let timeout = PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::ZERO);
    let mut fds = [
        PollFd::new(vm.console.as_fd(), PollFlags::POLLIN),
        PollFd::new(vm.vmm.pidfd(), PollFlags::POLLIN),
        PollFd::new(reporter.0.as_fd(), PollFlags::POLLIN),
        PollFd::new(signals.as_fd(), PollFlags::POLLIN),
    ];
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("poll"),
    }
    let [console, vmm, caller, signal] = fds.map(|fd| fd.any().unwrap_or(false));
    if caller {
        bail!("create was given up");
    }
    if signal
        && let Ok(Some(info)) = signals.read_signal()
        && relay::ENDING.contains(&(info.ssi_signo as i32))
    {
        bail!("create was ended by signal {}", info.ssi_signo);
    }
    if vmm { Err(death(vm).unwrap_or_else(|| anyhow!("the VM died"))) } else { Ok(console) }
}

/// What the VM died of, if it did.
pub(super) fn death(vm: &mut Vm) -> Option<anyhow::Error> {
    if !vmm::ends_within(vm.vmm.pidfd(), Duration::ZERO) {
        return None;
    }
    if let Some(complaint) = vm.vmm.complaint() {
        return Some(complaint);
    }
    vm.console.drain();
    let death = vm.vmm.reap();
    Some(anyhow!(relay::died(&death.how, &vm.console.last_words())))
}
