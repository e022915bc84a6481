//! `pause` and `resume`: the host's freezer stops the whole VM.

use anyhow::{Result, bail};

use super::Context;
use crate::store::Status;

/// `pause`
pub fn pause(context: &Context, id: &str) -> Result<i32> {
    let entry = context.store.open(id)?;
    let record = entry.read()?;
    match record.status() {
        Status::Running | Status::Created => record.cgroup.freeze(true).map(|()| 0),
        Status::Paused => bail!("container already paused"),
        _ => bail!("container not running"),
    }
}

/// `resume`
pub fn resume(context: &Context, id: &str) -> Result<i32> {
    let entry = context.store.open(id)?;
    let record = entry.read()?;
    match record.status() {
        Status::Paused => record.cgroup.freeze(false).map(|()| 0),
        Status::Stopped | Status::Creating => bail!("container not running"),
        _ => bail!("container not paused"),
    }
}
