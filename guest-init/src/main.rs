//! guest-init: pid 1 of the microVM.
//!
//! # Layout
//! - [`boot`]: the kernel's own file systems, the control port.
//! - [`serve`]: the loop that takes requests and moves bytes; one thread, nothing in it blocks.
//! - [`connection`]: one host connection: frames in, frames out.
//! - [`stdio`]: the guest's ends of one process's streams.
//! - [`terminal`]: a pty instead of them.
//! - [`container`]: one container: its processes, state and cgroup.
//! - [`devices`]: special files of a container; [`sysctl`]: kernel parameters.
//! - [`net`]: NICs of the VM that become a container's interfaces.
//! - [`resolver`]: names at 127.0.0.11, from the host's network namespace.
//! - [`rootfs`]: mounts of a container, in its own mount namespace; [`shared_memory`]: those it shares.
//! - [`sockets`]: stands in for sockets of the host's.
//! - [`process`]: from clone to execve; [`seccomp`]: the filter on its way.
//! - [`reap`]: exits, and when they may be told.
//!
//! In: requests on the control port. Out: processes, their bytes, their exit statuses. Must not: write to the
//! exported tree for its own sake, run anything in pid 1 that a container could hold up, or accept a peer that is
//! not the host.

mod boot;
mod connection;
mod container;
mod devices;
mod net;
mod process;
mod reap;
mod resolver;
mod rootfs;
mod seccomp;
mod serve;
mod shared_memory;
mod sockets;
mod stdio;
mod sysctl;
mod terminal;

fn main() {
    #[cfg(not(feature = "local"))]
    boot::fetch_program();
    let Err(error) = boot::listen().and_then(|listener| {
        boot::say(a3s_box_proto::LISTENING);
        boot::prepare()?;
        serve::run(listener)
    });
    boot::say(&format!("guest-init: {error:#}"));
    boot::reset();
}
