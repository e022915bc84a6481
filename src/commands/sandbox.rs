//! The sandbox of a pod whose engine makes none: whoever comes first makes it, and it leaves with the last.
//!
//! CRI-O gives every container the pod's namespaces by path and starts no container for the pod itself. A sandbox as
//! containerd would ask for takes its place, under the pod's id. In: a member's bundle. Out: a locked sandbox. Must not:
//! hold anything of the member's that the pod does not have.

use anyhow::{Context as _, Result};
use nix::sys::signalfd::SignalFd;

use super::create::{Attendance, bear};
use super::{Context, delete, start};
use crate::bundle::Bundle;
use crate::cli::Engine;
use crate::config;
use crate::plan::vm::{DEFAULT_MEMORY_MIB, DEFAULT_VCPUS};
use crate::plan::{self, Machine, Vm};
use crate::pod::{self, Sandbox};
use crate::sandbox::Absent;
use crate::store::{Error, Status};
use crate::timeline;

/// Finds the sandbox with this id, and makes it where that is due.
pub fn find(
    context: &Context,
    id: &str,
    absent: Absent,
    member: (&Bundle, &Vm),
    signals: Option<&SignalFd>,
) -> Result<Sandbox> {
    let shown = || format!("sandbox {id}");
    loop {
        match pod::lock(&context.store, id) {
            // What its VM died of has ended its containers; their engine starts them anew.
            Ok((entry, record)) if record.made && record.status() == Status::Stopped => {
                delete::remove(context, entry, &record).with_context(shown)?;
            }
            Err(error) if pod::is_not_found(&error) && absent == Absent::Made => {
                match make(context, id, member, signals) {
                    // Another container's `create` was first, and holds the lock until it is there.
                    Err(error) if matches!(error.downcast_ref(), Some(Error::Exists)) => {}
                    made => made.with_context(shown)?,
                }
            }
            locked => return Sandbox::new(locked.with_context(shown)?),
        }
    }
}

fn make(context: &Context, id: &str, member: (&Bundle, &Vm), signals: Option<&SignalFd>) -> Result<()> {
    let (bundle, vm) = member;
    let host = config::load(context.config.as_deref())?.settings();
    // Room for what the member asks for, and no less than for any container.
    let vcpus = vm.vcpus.max(host.vcpus.unwrap_or(DEFAULT_VCPUS));
    let memory_mib = vm.memory_mib.max(host.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB));
    let holder = Bundle {
        dir: bundle.dir.clone(),
        spec: plan::pod::sandbox_of(&bundle.spec, id)?,
        machine: Machine::of_size(vcpus, memory_mib),
        rootfs: context.store.root_of(id)?,
        warnings: Vec::new(),
    };
    let engine = Engine { pid_file: None, console_socket: None, pidfd_socket: None, preserve_fds: 0 };
    let attendance = Attendance { signals, detached: true, made: true, called: timeline::now() };
    bear(context, id, &holder, &engine, attendance)?.start(start::release).map(drop)
}
