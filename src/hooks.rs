//! Hooks of the host: which run when, with which state, and what it means that one fails.
//!
//! In: a record, the hooks planned for it. Out: success, or the first failure in runc's words. Must not: run anything
//! in a process whose root is a container's.

use std::os::fd::BorrowedFd;
use std::path::Path;

use a3s_box_hook::{Setting, Watch, run};
use a3s_box_proto::Hook;
use anyhow::Result;
use nix::sys::signalfd::SignalFd;
use serde_json::{Value, json};

use crate::log::{Log, sentence};
use crate::plan::hooks;
use crate::relay;
use crate::store::{Record, Status};

/// Runs a list up to its first failure.
fn all(kind: &str, list: &[Hook], state: &Value, dir: Option<&Path>, watch: &Watch<'_>) -> Result<()> {
    let state = state.to_string();
    let setting = Setting { state: &state, dir, env: None, watch };
    list.iter().enumerate().try_for_each(|(index, hook)| run(kind, index, hook, setting))
}

/// `prestart` and `createRuntime`. They end when the monitor does (somebody has killed what is being created), or with
/// `signals` when one comes by which the caller gives up.
pub fn at_create(record: &Record, monitor: BorrowedFd<'_>, signals: Option<&SignalFd>) -> Result<()> {
    use std::os::fd::AsFd;
    let reason = || {
        if crate::vmm::ends_within(monitor, std::time::Duration::ZERO) {
            return Some("the container was killed".to_string());
        }
        std::iter::from_fn(|| signals?.read_signal().ok().flatten())
            .map(|info| info.ssi_signo as i32)
            .find(|signal| relay::ENDING.contains(signal))
            .map(|signal| format!("given up: signal {signal}"))
    };
    let fds = [monitor].into_iter().chain(signals.map(|signals| signals.as_fd())).collect();
    let watch = Watch { fds, reason: Some(&reason) };
    let state = state(record, Status::Creating, record.live_pid());
    let dir = Some(record.bundle.as_path());
    all(hooks::KINDS[0], &record.hooks.prestart, &state, dir, &watch)?;
    all(hooks::KINDS[1], &record.hooks.create_runtime, &state, dir, &watch)
}

/// `createContainer`, in the monitor; `state` has neither status nor pid yet. They end when `create` does.
pub fn in_container(list: &[Hook], state: &Value, rootfs: &Path, create: BorrowedFd<'_>) -> Result<()> {
    let reason = || Some("create was given up".to_string());
    let watch = Watch { fds: vec![create], reason: Some(&reason) };
    let mut state = state.clone();
    state["status"] = json!(Status::Creating.to_string());
    state["pid"] = json!(std::process::id());
    all(hooks::KINDS[2], list, &state, Some(rootfs), &watch)
}

/// `poststart`.
pub fn poststart(record: &Record) -> Result<()> {
    let state = state(record, Status::Running, record.live_pid());
    all(hooks::KINDS[4], &record.hooks.poststart, &state, None, &Watch::default())
}

/// `poststop`: one that fails keeps no other from running.
pub fn poststop(record: &Record, log: &Log) {
    let state = state(record, Status::Stopped, 0).to_string();
    let setting = Setting { state: &state, dir: None, env: None, watch: &Watch::default() };
    for (index, hook) in record.hooks.poststop.iter().enumerate() {
        if let Err(error) = run(hooks::KINDS[5], index, hook, setting) {
            log.warn(&sentence(&error));
        }
    }
}

/// What runtime.md says that a hook gets; the pid is left out once there is no process.
fn state(record: &Record, status: Status, pid: i32) -> Value {
    let version = &record.oci_version;
    let mut state = hooks::state(version, &record.id, &record.bundle, &record.annotations);
    state["status"] = json!(status.to_string());
    if pid > 0 {
        state["pid"] = json!(pid);
    }
    state
}
