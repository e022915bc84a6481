//! `start`: the created container's process runs.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Error, Result, bail};

use super::Context;
use crate::guest::{self, Connection};
use crate::hooks;
use crate::monitor::{self, End};
use crate::net::{self, localhost};
use crate::pod;
use crate::store::{Entry, Record, Status};
use crate::timeline::{Mark, Timeline};
use crate::vmm;
use a3s_box_proto::{Outcome, Request};

/// How long the end of a container may take once its guest has stopped answering.
pub const ENDING: Duration = Duration::from_secs(2);

/// The verb.
pub fn start(context: &Context, id: &str) -> Result<i32> {
    let (entry, mut record) = context.store.open_checked(id, startable)?;
    release(&entry, &mut record)?;
    // Unlocked: a hook may act on the container.
    drop(entry);
    poststart(&record)?;
    context.log.debug("started");
    Ok(0)
}

/// Runs the `poststart` hooks. If one fails, the container is ended.
pub fn poststart(record: &Record) -> Result<()> {
    hooks::poststart(record).inspect_err(|_| {
        // That a hook failed is told; a container that cannot be killed is what `delete` tells.
        let _ = super::delete::kill(record);
    })
}

/// Only what is created can be started.
fn startable(record: &Record) -> Result<()> {
    match record.status() {
        Status::Created => Ok(()),
        Status::Running => bail!("cannot start an already running container"),
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Paused => bail!("cannot start a paused container"),
        Status::Creating => bail!("cannot start a container that is still being created"),
    }
}

/// Has the guest start the process, and notes that it did.
pub fn release(entry: &Entry, record: &mut Record) -> Result<()> {
    startable(record)?;
    let timeline = Timeline::open(entry.dir());
    timeline.mark(Mark::Start);
    let mut connection = connect(entry.dir(), record, guest::GREETING)?;
    plug(entry, record, &mut connection, &timeline)?;
    let answer = connection.call(&Request::Start { container: record.id.clone() }, patience(record));
    match answer.or_else(|error| ended(entry, record, error))? {
        Outcome::Done => {}
        Outcome::Failed { text } => bail!("unable to start container process: {}", guest::clean(&text)),
        Outcome::NotFound | Outcome::AlreadyExited => bail!("cannot start a container that has stopped"),
        Outcome::Busy { reason } => bail!("{}", guest::clean(&reason)),
        other => bail!("the guest did not start the container: {other:?}"),
    }
    timeline.mark(Mark::Started);
    record.started = true;
    entry.save(record)
}

/// How long the guest may take to start the process: `startContainer` hooks come first. One without a timeout may take
/// for ever; the VM's end ends the wait.
fn patience(record: &Record) -> Duration {
    const FOR_EVER: u64 = u32::MAX as u64;
    let hooks = record.hooks.start_container.iter();
    hooks.fold(guest::ANSWER, |sum, hook| {
        sum.saturating_add(Duration::from_secs(hook.timeout.unwrap_or(FOR_EVER).min(FOR_EVER)))
    })
}

/// Gives the container's NICs the places of the interfaces that its network namespace has by now.
fn plug(entry: &Entry, record: &mut Record, connection: &mut Connection, timeline: &Timeline) -> Result<()> {
    let (Some(mut site), Some(monitor)) = (record.network.clone(), record.monitor) else { return Ok(()) };
    let note = |site: &net::Site| {
        record.network = Some(site.clone());
        entry.save(record)
    };
    let Some(net::Plugged { nics, settings, standing }) = net::plug(&mut site, monitor, note)? else {
        return Ok(());
    };
    let request = Request::Plug { container: record.id.clone(), nics, settings };
    match connection.call(&request, guest::ANSWER)? {
        Outcome::Done => timeline.mark(Mark::Network),
        Outcome::Failed { text } => bail!("network: {}", guest::clean(&text)),
        other => bail!("the guest did not take the network: {other:?}"),
    }
    localhost::spawn(localhost::Place {
        id: &record.id,
        monitor: vmm::pidfd_open(monitor.pid)?,
        vm_dir: entry.open_vm_dir()?,
        cgroup: &record.cgroup,
        standing,
    })
}

/// What is to be made of an answer that did not come: a short workload's VM may be gone before it is through.
fn ended(entry: &Entry, record: &Record, error: Error) -> Result<Outcome> {
    if !record.ends_within(ENDING) {
        return Err(error);
    }
    match monitor::end(entry.dir()) {
        Some(End::Regular) => Ok(Outcome::Done),
        Some(End::Failed(text)) => bail!("{text}"),
        None => Err(error),
    }
}

/// Connects to the guest that a container lives in, which has `wait` to greet.
pub fn connect(dir: &Path, record: &Record, wait: Duration) -> Result<Connection> {
    Connection::greet(dial(dir, record)?, wait)
}

/// Dials the guest that a container lives in.
pub fn dial(dir: &Path, record: &Record) -> Result<UnixStream> {
    let Some(vm) = record.vm.filter(|vm| vm.is_alive()) else { bail!("container not running") };
    guest::dial(&pod::vm_dir(dir, record), vm.pid)
}
