//! The runtime as real engines drive it: docker, podman, containerd, and CRI-O's way with conmon.
//!
//! Each engine runs with a state of its own below the suite's directory and is told of the runtime by its own
//! configuration. In: the engines' command lines. Out: what their users see. Must not: call the runtime but as the engine
//! whose place the suite takes.

mod conmon;
mod containerd;
mod docker;
mod engine;
mod install;
mod podman;
mod terminals;
mod users;

use crate::cases::Case;

/// Every engine's wishes.
pub fn all() -> Vec<Case> {
    [docker::cases(), podman::cases(), containerd::cases(), conmon::cases(), install::cases()]
        .into_iter()
        .flatten()
        .collect()
}
