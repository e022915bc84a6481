//! `delete`: nothing of the container is left. Never waits for a guest.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Result, bail};

use super::Context;
use crate::cli;
use crate::hooks;
use crate::net;
use crate::pod;
use crate::shortage::is_shortage;
use crate::store::{Entry, Error, Record, Seat, Status};
use crate::vmm;

/// How long a killed monitor may take to be gone. The kernel frees a VM's memory before it is.
const GONE: Duration = Duration::from_secs(3);

/// The verb.
pub fn delete(context: &Context, args: &cli::Delete) -> Result<i32> {
    // Before the lock, which a `create` holds for as long as its hooks run and its guest boots.
    match context.store.read(&args.id) {
        Ok(record) if args.force => kill(&record)?,
        Ok(record) => deletable(&record)?,
        Err(_) => {}
    }
    let entry = match context.store.open(&args.id) {
        Err(error) if args.force && matches!(error.downcast_ref(), Some(Error::NotFound)) => return Ok(0),
        entry => entry?,
    };
    let record = match entry.read() {
        Ok(record) => record,
        // `create` died before it wrote anything: its directory is all there is.
        Err(error) if matches!(error.downcast_ref(), Some(Error::NotFound)) => {
            entry.remove()?;
            return if args.force { Ok(0) } else { Err(Error::NotFound.into()) };
        }
        // Nothing can be learned from it. What cannot be read for want of something may be whole.
        Err(error) if args.force && !is_shortage(&error) => {
            entry.remove()?;
            return Ok(0);
        }
        Err(error) => return Err(error),
    };
    if !args.force {
        deletable(&record)?;
    }
    remove(context, entry, &record)?;
    Ok(0)
}

/// Without force, what runs stays.
fn deletable(record: &Record) -> Result<()> {
    match record.status() {
        Status::Stopped | Status::Created => Ok(()),
        status => bail!("cannot delete container {} that is not stopped: {status}", record.id),
    }
}

/// Ends what still runs, removes every trace, and runs the `poststop` hooks.
pub fn remove(context: &Context, entry: Entry, record: &Record) -> Result<()> {
    kill(record)?;
    record.cgroup.kill();
    record.cgroup.remove()?;
    let left = pod::leave(entry.dir(), record);
    // What it could not clean is still known then, for another attempt.
    record.network.as_ref().map_or(Ok(()), net::clean)?;
    entry.remove()?;
    hooks::poststop(record, &context.log);
    left.and(retire(context, record))
}

/// Removes the sandbox that a container lived in, where no engine knows of it and nobody lives there any more.
pub fn retire(context: &Context, record: &Record) -> Result<()> {
    let Some(Seat { sandbox, .. }) = &record.seat else { return Ok(()) };
    let entry = match context.store.open(sandbox) {
        Err(error) if pod::is_not_found(&error) => return Ok(()),
        entry => entry?,
    };
    let lives_there = |other: &Record| other.seat.as_ref().is_some_and(|seat| seat.sandbox == *sandbox);
    match entry.read() {
        Ok(record) if record.made && !context.store.list()?.iter().any(lives_there) => {
            remove(context, entry, &record)
        }
        // Its maker died before it wrote anything.
        Err(error) if pod::is_not_found(&error) => entry.remove(),
        _ => Ok(()),
    }
}

/// Ends the monitor, and its VM with it.
pub fn kill(record: &Record) -> Result<()> {
    let Some(monitor) = record.monitor else { return Ok(()) };
    let Some(pidfd) = monitor.open()? else { return Ok(()) };
    vmm::kill(pidfd.as_fd());
    thaw(record);
    if !vmm::ends_within(pidfd.as_fd(), GONE) {
        bail!("container {} cannot be killed: pid {} does not end", record.id, monitor.pid);
    }
    Ok(())
}

/// cgroup v1 keeps even a SIGKILL waiting while it is frozen.
fn thaw(record: &Record) {
    if record.cgroup.is_frozen() {
        let _ = record.cgroup.freeze(false);
    }
}
