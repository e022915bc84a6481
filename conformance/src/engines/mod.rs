//! The runtime as real engines drive it: docker, podman, containerd, and CRI-O's way with conmon.
//!
//! Each engine runs with a state of its own below the suite's directory and is told of the runtime by its own
//! configuration. In: the engines' command lines. Out: what their users see. Must not: call the runtime but as the engine
//! whose place the suite takes.

mod cni;
mod conmon;
mod conmon_pods;
mod containerd;
mod cri;
mod docker;
mod engine;
mod install;
mod mapped;
mod networks;
mod package;
mod podman;
mod rootless;
mod terminals;
mod users;

use crate::cases::Case;

pub use engine::archive;

/// Every engine's wishes.
pub fn all() -> Vec<Case> {
    let engines = [docker::cases(), podman::cases(), containerd::cases(), conmon::cases(), install::cases()];
    let more = [
        networks::cases(),
        mapped::cases(),
        rootless::cases(),
        cni::cases(),
        package::cases(),
        conmon_pods::cases(),
        cri::cases(),
    ];
    engines.into_iter().chain(more).flatten().collect()
}
