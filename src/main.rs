//! a3s-box: an OCI runtime in which every container runs in its own libkrun microVM.
//!
//! # Layout
//! Words into intent: [`cli`] → [`bundle`] (with [`support`]) → [`plan`] (with [`config`], [`seccomp`], [`sandbox`]) →
//! [`store`].
//! Intent into processes: [`monitor`] (the container's pid) → [`hooks`], [`jail`], [`userns`], [`cgroup`] → [`vmm`] →
//! [`krun`], or [`pod`] (a VM that is there); [`oom`] beside the monitor; [`proxy`] (the pid of a detached `exec`).
//! Talk with the guest: [`guest`], [`relay`], [`stdio`], [`terminal`], [`console`]; [`courier`], [`sockets`].
//! [`commands`] strings them together, one file a verb. [`log`] is the one voice, [`timeline`] remembers a start, [`patience`]
//! bounds what may hang, [`kvm`] says what a host lacks, [`shortage`] that it lacks something now.

mod bundle;
mod cgroup;
mod cli;
mod commands;
mod config;
mod console;
mod courier;
mod guest;
mod hooks;
mod jail;
#[cfg(not(feature = "local-guest"))]
mod krun;
mod kvm;
#[cfg(feature = "local-guest")]
mod local;
mod log;
mod monitor;
mod net;
mod oom;
mod patience;
mod plan;
mod pod;
mod proxy;
mod relay;
mod sandbox;
mod seccomp;
mod shortage;
mod sockets;
mod stdio;
mod store;
mod support;
mod terminal;
mod timeline;
mod userns;
mod vmm;

use std::ffi::OsStr;
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    if args.next().as_deref() == Some(OsStr::new(vmm::NAME)) {
        vmm::main(args.next().and_then(|arg| arg.into_string().ok()));
    }
    // The caller's may be anything; what is made here has modes of its own.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let cli = match cli::Cli::try_parse_from(cli::normalize(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    ExitCode::from(commands::run(cli))
}
