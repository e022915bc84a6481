//! What pid 1 does once: control port, kernel file systems, cgroup controllers; and the reset at the end.

use std::convert::Infallible;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

/// Root of the guest's cgroup v2 hierarchy.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Opens the control port. First of all, so that the host's connection meets a listener as early as can be.
#[cfg(not(feature = "local"))]
pub fn listen() -> Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;

    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None).context("vsock socket")?;
    grow_buffers(&fd);
    bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, a3s_box_proto::CONTROL_PORT))
        .context("bind control port")?;
    listen(&fd, Backlog::new(128).context("backlog")?).context("listen on control port")?;
    Ok(fd)
}

/// Kernels from 6.12.92 drop a connection when many small packets exceed its buffer (libkrun issue 795).
#[cfg(not(feature = "local"))]
fn grow_buffers(fd: &OwnedFd) {
    use std::os::fd::AsRawFd;
    // linux/vm_sockets.h: the maximum first, it bounds the size.
    const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
    const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;
    let size: u64 = 8 << 20;
    for option in [SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE] {
        // SAFETY: the option value is a u64 that outlives the call, and its length is given.
        unsafe {
            libc::setsockopt(fd.as_raw_fd(), libc::AF_VSOCK, option, (&raw const size).cast(), 8);
        }
    }
}

/// Takes the listener that the test backend left at descriptor 3.
#[cfg(feature = "local")]
pub fn listen() -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the backend that starts this process hands over descriptor 3, and nothing else uses it.
    let fd = unsafe { OwnedFd::from_raw_fd(3) };
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
        .context("listener")?;
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .context("listener")?;
    Ok(fd)
}

/// A line on the console, where it takes one: without, pid 1 lives on, which `println!` would not let it.
pub fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Mounts what the kernel offers, hands the cgroup controllers down.
pub fn prepare() -> Result<()> {
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_one("proc", "/proc", hardened)?;
    mount_one("sysfs", "/sys", hardened)?;
    if fs::metadata("/dev/null").is_err() {
        mount_one("devtmpfs", "/dev", MsFlags::MS_NOSUID)?;
    }
    mount_one("cgroup2", CGROUP_ROOT, hardened)?;
    delegate_controllers(CGROUP_ROOT);
    // The guest kernel starts with a bound of 4096; workloads expect a host's.
    #[cfg(not(feature = "local"))]
    let _ = fs::write("/proc/sys/kernel/pid_max", "4194304");
    #[cfg(not(feature = "local"))]
    raise_read_ahead();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    Ok(())
}

fn mount_one(kind: &str, target: &str, flags: MsFlags) -> Result<()> {
    mount(Some(kind), target, Some(kind), flags, None::<&str>)
        .with_context(|| format!("mount {kind} on {target}"))
}

/// Makes every controller of `cgroup` available to its children, all at once: each write moves every process anew.
/// Best effort by design: a container's limits are checked where they are set.
pub fn delegate_controllers(cgroup: &str) {
    let available = fs::read_to_string(format!("{cgroup}/cgroup.controllers")).unwrap_or_default();
    let wanted: Vec<String> = available.split_whitespace().map(|name| format!("+{name}")).collect();
    let _ = fs::write(format!("{cgroup}/cgroup.subtree_control"), wanted.join(" "));
}

/// Asks for all of this program at once. It comes over virtiofs, where each page fault waits for a round trip.
#[cfg(not(feature = "local"))]
pub fn fetch_program() {
    unsafe extern "C" {
        // The linker's marks around what the file holds.
        static __executable_start: u8;
        static etext: u8;
    }
    let (start, end) = (&raw const __executable_start, &raw const etext);
    // SAFETY: the range is this program's own mapping, and the advice changes nothing in it.
    unsafe { libc::madvise(start.cast_mut().cast(), end.addr() - start.addr(), libc::MADV_WILLNEED) };
}

/// Has programs and files come over virtiofs in its largest requests (1 MiB) instead of 128 KiB at a time.
#[cfg(not(feature = "local"))]
fn raise_read_ahead() {
    use std::os::unix::fs::MetadataExt;
    let Ok(root) = fs::metadata("/") else { return };
    let (major, minor) = (libc::major(root.dev()), libc::minor(root.dev()));
    // Failing, it only costs time.
    let _ = fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), "1024");
}

/// Gives back what no longer is in use of the exported tree, so that the host can take it away.
pub fn let_go() {
    // Where guest-init is a process of the host's, these caches are everybody's, and hold nothing up.
    #[cfg(not(feature = "local"))]
    let _ = fs::write("/proc/sys/vm/drop_caches", "2");
    // The device answers in order: once it has answered this, it has taken every release before it.
    let _ = nix::sys::statfs::statfs("/");
}

/// Sets a value that the kernel shows as a file.
pub fn set(path: impl AsRef<Path>, value: &str) -> Result<(), Errno> {
    // fs::write would ask to create what is missing, and be told something else.
    let file = fs::File::options().write(true).open(path);
    let set = file.and_then(|mut file| file.write_all(value.as_bytes()));
    set.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// Brings up the loopback interface of the caller's network namespace.
pub fn loopback_up() -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: ifreq is plain data, for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until after the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) })?;
    Ok(())
}

/// Ends the VM. A reset is the one way that libkrun notices: it has no power-off device.
pub fn reset() -> ! {
    nix::unistd::sync();
    let result: nix::Result<Infallible> = reboot(RebootMode::RB_AUTOBOOT);
    // Only a lack of privilege gets here, which pid 1 of a VM does not have.
    panic!("reset failed: {result:?}");
}
