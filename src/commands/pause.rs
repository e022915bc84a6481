//! `pause` and `resume`: the host's freezer stops the whole VM, or the guest's one container of several.

use a3s_box_proto::{Outcome, Request};
use anyhow::{Result, bail};

use super::{Context, start};
use crate::guest;
use crate::store::{Record, Status};

/// `pause`
pub fn pause(context: &Context, id: &str) -> Result<i32> {
    let (_entry, record) = context.store.open_checked(id, pausable)?;
    freeze_inside(context, &record, true)?;
    record.cgroup.freeze(true).inspect_err(|_| drop(freeze_inside(context, &record, false)))?;
    Ok(0)
}

/// `resume`
pub fn resume(context: &Context, id: &str) -> Result<i32> {
    let (_entry, record) = context.store.open_checked(id, resumable)?;
    record.cgroup.freeze(false)?;
    freeze_inside(context, &record, false).map(|()| 0)
}

fn pausable(record: &Record) -> Result<()> {
    match record.status() {
        Status::Running | Status::Created => Ok(()),
        Status::Paused => bail!("container already paused"),
        Status::Creating | Status::Stopped => bail!("container not running"),
    }
}

fn resumable(record: &Record) -> Result<()> {
    match record.status() {
        Status::Paused => Ok(()),
        Status::Creating | Status::Stopped => bail!("container not running"),
        Status::Created | Status::Running => bail!("container not paused"),
    }
}

/// Where the VM is another container's, this one's processes are frozen in the guest, and its monitor on the host.
fn freeze_inside(context: &Context, record: &Record, frozen: bool) -> Result<()> {
    if record.seat.is_none() {
        return Ok(());
    }
    let limits = vec![("cgroup.freeze".to_string(), u8::from(frozen).to_string())];
    let request = Request::Update { container: record.id.clone(), limits };
    let mut connection = start::connect(&context.store.path(&record.id)?, record, guest::GREETING)?;
    match connection.call(&request, guest::ANSWER)? {
        Outcome::Done => Ok(()),
        Outcome::Failed { text } => bail!("{}", guest::clean(&text)),
        other => bail!("the guest did not freeze the container: {other:?}"),
    }
}
