//! The host's pure modules, from bytes to a plan, for the fuzzer: `scripts/fuzz` (or `cargo fuzz run config`).
#![allow(dead_code)]

#[path = "../../src/bundle.rs"]
pub mod bundle;
#[path = "../../src/cli.rs"]
pub mod cli;
#[path = "../../src/log.rs"]
pub mod log;
#[path = "../../src/patience.rs"]
pub mod patience;
#[path = "../../src/plan/mod.rs"]
pub mod plan;
#[path = "../../src/sandbox.rs"]
pub mod sandbox;
#[path = "../../src/seccomp.rs"]
pub mod seccomp;
#[path = "../../src/support/mod.rs"]
pub mod support;
