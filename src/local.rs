//! Test-only stand-in for libkrun: guest-init as a local process in fresh namespaces.
//!
//! Same calls as [`crate::krun`], so that everything but the VM is tested without KVM. It gives no isolation worth the
//! name and cannot be built for release.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::wait::waitpid;

use crate::plan;

#[cfg(not(debug_assertions))]
compile_error!("feature local-guest is for tests: it cannot be built for release");

/// Nothing to configure.
pub struct Machine;

impl Machine {
    /// There are none.
    pub fn files(&self) -> Vec<&File> {
        Vec::new()
    }
}

/// See [`crate::krun`].
pub struct Devices<'a> {
    /// The exported tree: guest-init's root.
    pub export: &'a Path,
    /// guest-init's bytes.
    pub init: &'static [u8],
    /// Its standard output and error.
    pub console: &'a Path,
    /// Where it listens.
    pub control_socket: &'a Path,
    /// Without meaning where there is no vsock.
    #[allow(dead_code, reason = "the VM has it")]
    pub control_port: u32,
    /// It has no NICs.
    #[allow(dead_code, reason = "the VM has them")]
    pub taps: &'a [String],
    /// Its sockets are its own.
    #[allow(dead_code, reason = "the VM has it")]
    pub tsi: bool,
}

/// No guest kernel is involved.
pub struct Firmware {
    /// Nowhere.
    pub path: PathBuf,
    /// The host's.
    pub kernel_version: String,
}

/// The host's kernel stands in for the guest's.
pub fn firmware(_: Option<&Path>) -> Result<Firmware> {
    let release = nix::sys::utsname::uname().context("uname")?.release().to_string_lossy().into_owned();
    Ok(Firmware { path: PathBuf::new(), kernel_version: release })
}

/// What stands in for libkrun.
pub fn version() -> &'static str {
    "none (local-guest test build)"
}

/// Nothing to prepare.
pub fn prepare(_: &plan::Vm) -> Result<Machine> {
    Ok(Machine)
}

/// Runs guest-init until it ends, then ends as libkrun does: with a status that proves nothing.
pub fn enter(_: Machine, devices: &Devices) -> anyhow::Error {
    match start(devices) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn start(devices: &Devices) -> Result<Infallible> {
    let listener = UnixListener::bind(devices.control_socket).context("bind the control socket")?;
    let console = File::options().read(true).write(true).open(devices.console).context("open the console")?;
    let init = memfd_create(c"guest-init", MFdFlags::MFD_CLOEXEC).context("memfd")?;
    let mut init = File::from(init);
    init.write_all(devices.init).context("memfd")?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).context("namespaces")?;
    // SAFETY: this process has one thread.
    match unsafe { nix::unistd::fork() }.context("fork")? {
        nix::unistd::ForkResult::Parent { child } => {
            drop(listener);
            let _ = waitpid(child, None);
            // SAFETY: _exit takes any status and does not return.
            unsafe { libc::_exit(0) }
        }
        nix::unistd::ForkResult::Child => {
            let error = become_init(devices.export, &listener.into(), &console.into(), &init.into());
            let error = error.err().unwrap_or_else(|| anyhow!("not started"));
            crate::log::say(&format!("guest-init: {error:#}"));
            // SAFETY: as above.
            unsafe { libc::_exit(1) }
        }
    }
}

/// Becomes pid 1 of the stand-in, which dies with its VMM as a VM's processes do.
fn become_init(export: &Path, listener: &OwnedFd, console: &OwnedFd, init: &OwnedFd) -> Result<Infallible> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).context("parent death signal")?;
    crate::jail::make_private()?;
    let here = nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(Some(export), export, None::<&str>, here, None::<&str>).context("bind the export")?;
    std::env::set_current_dir(export).context("enter the export")?;
    nix::unistd::pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("detach")?;
    for (target, source) in [(0, console), (1, console), (2, console), (3, listener)] {
        // Descriptors below 4 are the console's or free: the vmm's own channel was closed before.
        duplicate(source.as_raw_fd(), target)?;
    }
    let empty: [CString; 0] = [];
    Ok(nix::unistd::fexecve(init, &[c"/init.krun"], &empty)?)
}

fn duplicate(from: RawFd, to: RawFd) -> Result<()> {
    if from == to {
        // SAFETY: a descriptor of this process; its close-on-exec flag must go.
        unsafe { libc::fcntl(from, libc::F_SETFD, 0) };
        return Ok(());
    }
    // SAFETY: `from` is open, and what `to` was is no longer needed.
    nix::errno::Errno::result(unsafe { libc::dup3(from, to, 0) }).map(drop).context("dup")
}
