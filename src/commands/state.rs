//! `state`: what a container is, as JSON. Never asks the guest, which may hang.

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::Context;
use crate::plan::settings::SANDBOX;
use crate::store::Record;

/// The verb.
pub fn state(context: &Context, id: &str) -> Result<i32> {
    let record = context.store.read(id)?;
    super::write_out(&serde_json::to_string_pretty(&document(&record)).context("encode state")?)?;
    Ok(0)
}

/// The document of runc's `state`, which `list` shows too.
pub fn document(record: &Record) -> Value {
    let status = record.status();
    let mut document = Map::new();
    let mut put = |name: &str, value: Value| document.insert(name.into(), value);
    put("ociVersion", json!(record.oci_version));
    put("id", json!(record.id));
    put("pid", json!(record.live_pid()));
    put("status", json!(status.to_string()));
    put("bundle", json!(record.bundle));
    put("rootfs", json!(record.rootfs));
    put("created", json!(record.created));
    let mut annotations = record.annotations.clone();
    if let Some(seat) = &record.seat {
        annotations.insert(SANDBOX.into(), seat.sandbox.clone());
    }
    if !annotations.is_empty() {
        put("annotations", json!(annotations));
    }
    if let Some(scope) = record.cgroup.scope() {
        put("systemd-scope", json!(scope));
    }
    put("owner", json!(owner(record.owner)));
    Value::Object(document)
}

/// The owner's name, or the number of one without.
pub fn owner(uid: u32) -> String {
    match nix::unistd::User::from_uid(uid.into()) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}
