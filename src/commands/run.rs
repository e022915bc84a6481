//! `run`: create, start, and in the foreground wait, forward signals, clean up.

use std::os::fd::AsFd;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use super::{Context, create, delete, start};
use crate::cli;
use crate::log::sentence;
use crate::monitor::{self, End, Handle};
use crate::relay;
use crate::terminal::Raw;
use crate::vmm;

/// The verb.
pub fn run(context: &Context, args: &cli::Run) -> Result<i32> {
    let signals = relay::take_signals()?;
    let born = create::birth(context, &args.create, Some(&signals), args.detach)?;
    let raw = if born.has_terminal() && !args.detach { Some(Raw::own()?) } else { None };
    let (mut record, handle) = born.start(start::release)?;
    if let Err(error) = start::poststart(&record) {
        // Nobody else knows of it.
        let _ = handle.wait();
        if let Ok(entry) = context.store.open(&record.id) {
            delete::remove(context, entry, &record)?;
        }
        return Err(error);
    }
    context.log.debug("started");
    if args.detach {
        return Ok(0);
    }
    let status = wait(&handle, &signals)?;
    drop(raw);
    context.log.debug("ended");
    // Somebody else may have deleted it meanwhile.
    let Ok(entry) = context.store.open(&record.id) else { return Ok(status) };
    if let Some(End::Failed(message)) = monitor::end(entry.dir()) {
        context.log.error(&message);
    }
    if !args.keep {
        record.monitor = None;
        if let Err(error) = delete::remove(context, entry, &record) {
            // The workload's status is what the caller came for.
            context.log.warn(&sentence(&error));
        }
    }
    Ok(status)
}

/// Waits for the monitor, which does the relaying; what signals come meanwhile are the container's.
fn wait(handle: &Handle, signals: &SignalFd) -> Result<i32> {
    let pidfd = vmm::pidfd_open(handle.pid)?;
    loop {
        let mut fds =
            [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        if fds[0].any().unwrap_or(false) {
            return handle.wait();
        }
        while let Ok(Some(info)) = signals.read_signal() {
            let signal = info.ssi_signo as i32;
            if signal == libc::SIGTSTP {
                // The terminal stops this process; the container goes on, as one that runs elsewhere would.
                nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).context("stop")?;
                continue;
            }
            // SAFETY: kill takes plain numbers; the pid is our own child's, not yet waited for.
            if unsafe { libc::kill(handle.pid, signal) } < 0 {
                bail!("forward signal {signal}: {}", nix::errno::Errno::last());
            }
        }
    }
}
