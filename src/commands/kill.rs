//! `kill`: a signal for the workload. SIGKILL works whatever state the guest is in.

use std::os::fd::AsFd;
use std::time::Duration;

use a3s_box_proto::{Outcome, Request, Target};
use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use super::{Context, start};
use crate::cli;
use crate::guest;
use crate::store::{ProcessId, Record, Status};
use crate::vmm;

/// A guest that does not greet, or has not taken a SIGKILL, or has not let go of the process by then each time, does
/// not get another chance.
const GRACE: Duration = Duration::from_secs(1);

/// The verb.
pub fn kill(context: &Context, args: &cli::Kill) -> Result<i32> {
    let record = context.store.read(&args.id)?;
    let signal = parse(&args.signal)?;
    match record.status() {
        Status::Stopped if args.all => Ok(0),
        Status::Stopped => bail!("container not running"),
        // A frozen guest answers nobody. The monitor keeps the signal until it thaws; SIGKILL ends it at once.
        Status::Paused => signal_paused(&record, signal),
        Status::Creating if signal == libc::SIGKILL => signal_monitor(&record, signal).map(|()| 0),
        Status::Creating => bail!("container is still being created"),
        Status::Created | Status::Running => {
            let dir = context.store.path(&args.id)?;
            let target = if args.all { Target::All } else { Target::Init };
            let (greeting, wait) =
                if signal == libc::SIGKILL { (GRACE, GRACE) } else { (guest::GREETING, guest::ANSWER) };
            let request = Request::Signal { container: record.id.clone(), signal, target };
            let asked = start::connect(&dir, &record, greeting).and_then(|mut connection| {
                // A workload that the signal ends may take the VM along before its guest's answer is through.
                let answer = connection.call(&request, wait);
                answer.or_else(|error| if record.ends_within(GRACE) { Ok(Outcome::Done) } else { Err(error) })
            });
            settle(&record, signal, args.all, asked)
        }
    }
}

fn signal_paused(record: &Record, signal: i32) -> Result<i32> {
    if [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal) {
        bail!("container is paused: it cannot be stopped by a signal as well");
    }
    signal_monitor(record, signal)?;
    if signal == libc::SIGKILL {
        // cgroup v1 keeps even a SIGKILL waiting while it is frozen.
        record.cgroup.freeze(false)?;
    }
    Ok(0)
}

fn settle(record: &Record, signal: i32, all: bool, asked: Result<Outcome>) -> Result<i32> {
    match asked {
        Ok(Outcome::Done) if signal == libc::SIGKILL && !all => end(record),
        Ok(Outcome::Done) => Ok(0),
        Ok(Outcome::NotFound | Outcome::AlreadyExited) if all => Ok(0),
        Ok(Outcome::NotFound | Outcome::AlreadyExited) => bail!("container not running"),
        Ok(Outcome::Failed { text }) => bail!("kill: {}", guest::clean(&text)),
        Ok(other) => bail!("kill: the guest answered {other:?}"),
        Err(_) if signal == libc::SIGKILL => signal_monitor(record, signal).map(|()| 0),
        Err(_) if record.status() == Status::Stopped => bail!("container not running"),
        Err(error) => Err(error),
    }
}

/// The guest took the SIGKILL. A guest kernel that then does not let go of the process loses its VM.
fn end(record: &Record) -> Result<i32> {
    if record.seat.is_some() {
        // The VM is others' as well: what it does not let go of has lost its monitor at least.
        if !record.ends_within(GRACE) {
            signal_monitor(record, libc::SIGKILL)?;
        }
        return Ok(0);
    }
    if let Some(vm) = record.vm
        && let Some(pidfd) = vm.open()?
        && !vmm::ends_within(pidfd.as_fd(), GRACE)
    {
        vmm::kill(pidfd.as_fd());
    }
    // It only has output to write then, unless somebody stopped it.
    if record.vm.is_some_and(|vm| !vm.is_alive()) && record.is_stopped_by_signal() {
        signal_monitor(record, libc::SIGKILL)?;
    }
    Ok(0)
}

fn signal_monitor(record: &Record, signal: i32) -> Result<()> {
    let Some(pidfd) = record.monitor.map_or(Ok(None), ProcessId::open)? else {
        bail!("container not running")
    };
    match vmm::signal(pidfd.as_fd(), signal) {
        Err(Errno::ESRCH) => bail!("container not running"),
        result => result.context("signal the monitor"),
    }
}

/// A number from 0 to 64, or a name with or without SIG, RTMIN+n and RTMAX-n included.
fn parse(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        if (0..=64).contains(&number) {
            return Ok(number);
        }
        bail!("unknown signal {text:?}");
    }
    let name = text.to_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Ok(signal) = format!("SIG{name}").parse::<nix::sys::signal::Signal>() {
        return Ok(signal as i32);
    }
    let offset = |rest: &str| if rest.is_empty() { Some(0) } else { rest.get(1..)?.parse::<i32>().ok() };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) if rest.is_empty() || rest.starts_with('+') => offset(rest).map(|n| 34 + n),
        (_, Some(rest)) if rest.is_empty() || rest.starts_with('-') => offset(rest).map(|n| 64 - n),
        _ => None,
    };
    match number {
        Some(number) if (34..=64).contains(&number) => Ok(number),
        _ => bail!("unknown signal {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names_and_numbers() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGTERM", 15),
            ("term", 15),
            ("sigusr1", 10),
            ("64", 64),
            ("0", 0),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("rtmax-1", 63),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["65", "-9", "", "SIG", "NOPE", "RTMIN+99", "RTMIN-1", "9x"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
