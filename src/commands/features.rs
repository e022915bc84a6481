//! `features`: what holds for a container in the guest (runtime-spec features.md).

use anyhow::{Context as _, Result};
use serde_json::json;

/// Newest runtime-spec version that is understood.
pub const SPEC_VERSION: &str = "1.3.0";

/// The verb.
pub fn features() -> Result<i32> {
    let document = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": [],
        "mountOptions": crate::plan::mounts::OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": capabilities(),
            "cgroup": { "v1": true, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": false },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
            "netDevices": { "enabled": false }
        },
        "annotations": {
            "org.opencontainers.runc.checkpoint.enabled": "false",
            "a3s.box/version": env!("CARGO_PKG_VERSION"),
            "a3s.box/libkrun.version": crate::vmm::library()
        },
        "potentiallyUnsafeConfigAnnotations": ["a3s.box/"]
    });
    let text = serde_json::to_string_pretty(&document).context("encode features")?;
    super::write_out(&format!("{text}\n"))?;
    Ok(0)
}

fn capabilities() -> Vec<String> {
    let mut names: Vec<String> = caps::all().into_iter().map(|capability| capability.to_string()).collect();
    names.sort();
    names
}
