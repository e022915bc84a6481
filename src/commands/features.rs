//! `features`: what holds for a container in the guest (runtime-spec features.md), and the tables of every field and setting.

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::cli::{self, MatrixFormat};
use crate::plan::settings;
use crate::seccomp;
use crate::support::{self, honoured, is_honoured};

/// Newest runtime-spec version that is understood.
pub const SPEC_VERSION: &str = "1.3.0";

/// The verb.
pub fn features(args: &cli::Features) -> Result<i32> {
    let text = match (args.matrix, args.settings, args.format) {
        (true, _, MatrixFormat::Text) => support::text(),
        (true, _, MatrixFormat::Markdown) => support::markdown(),
        (_, true, MatrixFormat::Text) => settings::text(),
        (_, true, MatrixFormat::Markdown) => settings::markdown(),
        (false, false, _) => document()?,
    };
    super::write_out(&text)?;
    Ok(0)
}

fn document() -> Result<String> {
    let known_flags = [&seccomp::FLAGS[..], &[seccomp::LISTENER_FLAG]].concat();
    let document = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": honoured("hooks."),
        "mountOptions": crate::plan::options::names(),
        "linux": {
            "namespaces": honoured("linux.namespaces[].type="),
            "capabilities": capabilities(),
            "cgroup": { "v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": is_honoured("linux.seccomp.defaultAction"),
                "actions": seccomp::ACTIONS,
                "operators": seccomp::OPERATORS,
                "archs": seccomp::architectures(),
                "knownFlags": known_flags,
                "supportedFlags": seccomp::FLAGS
            },
            "apparmor": { "enabled": is_honoured("process.apparmorProfile") },
            "selinux": { "enabled": is_honoured("process.selinuxLabel") },
            "intelRdt": { "enabled": is_honoured("linux.intelRdt") },
            "memoryPolicy": { "modes": [], "flags": [] },
            "mountExtensions": { "idmap": { "enabled": is_honoured("mounts[].uidMappings") } },
            "netDevices": { "enabled": is_honoured("linux.netDevices") }
        },
        "annotations": {
            "org.opencontainers.runc.checkpoint.enabled": "false",
            "a3s.box/version": env!("CARGO_PKG_VERSION"),
            "a3s.box/libkrun.version": crate::vmm::library()
        },
        // Whoever may set those of CRI says whose VM a container shares.
        "potentiallyUnsafeConfigAnnotations": ["a3s.box/", "io.kubernetes.cri.", "io.kubernetes.cri-o."]
    });
    let text = serde_json::to_string_pretty(&document).context("encode features")?;
    Ok(format!("{text}\n"))
}

fn capabilities() -> Vec<String> {
    let mut names: Vec<String> = caps::all().into_iter().map(|capability| capability.to_string()).collect();
    names.sort();
    names
}
