//! `start`: the created container's process runs.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use super::Context;
use crate::guest::{self, Connection};
use crate::monitor::LAST_MESSAGE;
use crate::store::{Entry, Record, Status, VM_DIR};
use a3s_box_proto::{Outcome, Request};

/// How long the end of a container may take once its guest has stopped answering.
pub const ENDING: Duration = Duration::from_secs(2);

/// The verb.
pub fn start(context: &Context, id: &str) -> Result<i32> {
    let entry = context.store.open(id)?;
    let mut record = entry.read()?;
    release(&entry, &mut record)?;
    context.log.debug("started");
    Ok(0)
}

/// Has the guest start the process, and notes that it did.
pub fn release(entry: &Entry, record: &mut Record) -> Result<()> {
    match record.status() {
        Status::Created => {}
        Status::Running => bail!("cannot start an already running container"),
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Paused => bail!("cannot start a paused container"),
        Status::Creating => bail!("cannot start a container that is still being created"),
    }
    let mut connection = connect(entry.dir(), record, guest::ANSWER)?;
    let answer = connection.call(&Request::Start { container: record.id.clone() }, guest::ANSWER);
    match answer.or_else(|error| if ended(entry, record) { Ok(Outcome::Done) } else { Err(error) })? {
        Outcome::Done => {}
        Outcome::Failed { text } => bail!("unable to start container process: {}", guest::clean(&text)),
        Outcome::NotFound | Outcome::AlreadyExited => bail!("cannot start a container that has stopped"),
        Outcome::Busy { reason } => bail!("{}", guest::clean(&reason)),
        other => bail!("the guest did not start the container: {other:?}"),
    }
    record.started = true;
    entry.save(record)
}

/// Whether the container came to its own end. A short workload's VM may be gone before its guest's answer is through.
fn ended(entry: &Entry, record: &Record) -> bool {
    let message = std::fs::read(entry.dir().join(LAST_MESSAGE)).unwrap_or_default();
    record.ends_within(ENDING) && message.is_empty()
}

/// Connects to the guest that a container lives in, which has `wait` to greet.
pub fn connect(dir: &Path, record: &Record, wait: Duration) -> Result<Connection> {
    Connection::greet(dial(dir, record)?, wait)
}

/// Dials the guest that a container lives in.
pub fn dial(dir: &Path, record: &Record) -> Result<UnixStream> {
    let Some(vm) = record.vm.filter(|vm| vm.is_alive()) else { bail!("container not running") };
    guest::dial(&dir.join(VM_DIR), vm.pid)
}
