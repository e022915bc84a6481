//! The one file that names libkrun: a planned VM in, a running microVM out.
//!
//! In: `plan::Vm` (its size, the guest kernel's library) and, once the process sits in its jail, `Devices`.
//! Out: nothing. libkrun takes over the calling thread and ends the process with `_exit`; only a failure returns.
//! Must not: open a library after the pivot, let a path or a word of the container's reach the kernel command
//! line (the guest truncates it at 2048 bytes and then hangs), or map a guest port to a host socket.
#![allow(
    unused_unsafe,
    reason = "the libkrun crate calls safe some functions that krun-sys, like C, calls unsafe"
)]

#[path = "krun/firmware.rs"]
mod firmware;

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;

use anyhow::{Context, anyhow, bail};

#[cfg(feature = "libkrun")]
use ::krun as ffi;
#[cfg(not(feature = "libkrun"))]
use krun_sys as ffi;

use crate::plan;
use firmware::GuestKernel;

/// The virtiofs tag that the kernel mounts as its root.
const ROOT_TAG: &CStr = c"/dev/root";
/// The name of guest-init below that root; libkrun's `init=` says so.
const INIT_NAME: &CStr = c"init.krun";
/// libkrun's own words, then ours; nothing else was measured to help. An oops ends the VM, which would hang half dead.
/// Expedited grace periods let moves between cgroups, at every create and exec, take one millisecond instead of ten.
/// Two initcalls that take a tenth of the boot are left out: jitterentropy's, for the host's entropy comes by virtio-rng,
/// and loop devices made in advance, for /dev/loop-control makes them when they are wanted.
const KERNEL_COMMAND_LINE: &CStr =
    c"reboot=k panic=-1 panic_print=0 nomodule console=hvc0 rootfstype=virtiofs rw \
    quiet no-kvmapf init=/init.krun oops=panic rcupdate.rcu_expedited=1 \
    initcall_blacklist=jent_mod_init loop.max_loop=0";
/// The alignment at which host and guest can both use huge pages.
const HUGE_PAGE: usize = 2 << 20;
/// Where guest RAM makes room for devices; what lies above is a mapping of its own.
const DEVICE_GAP: usize = 0xd000_0000;
/// `sun_path` with its final NUL; libkrun only warns about a longer one, and the socket never appears.
const SOCKET_PATH_MAX: usize = 107;

/// A configured libkrun context, waiting for its devices.
pub struct Machine {
    context: u32,
    memory: usize,
    /// Only libkrun's own mapping needs none.
    kernel: Option<Kernel>,
}

impl Machine {
    /// The files of the guest kernel, which libkrun opens once more.
    pub fn files(&self) -> Vec<&File> {
        self.kernel.iter().flat_map(|kernel| [Some(&kernel.file), kernel.initrd.as_ref()]).flatten().collect()
    }
}

/// What the VM is given at the pivot; paths as the jail sees them.
pub struct Devices<'a> {
    /// The directory exported as the guest's root file system.
    pub export: &'a Path,
    /// guest-init's bytes, served once to the guest kernel as `/init.krun`.
    pub init: &'static [u8],
    /// Where the guest kernel's console goes: a FIFO or a file.
    pub console: &'a Path,
    /// The socket on which libkrun listens for the host's connections to guest-init.
    pub control_socket: &'a Path,
    /// The vsock port on which guest-init accepts them.
    pub control_port: u32,
    /// Taps of the NICs, in their order; names shorter than 16 bytes, which libkrun does not check.
    pub taps: &'a [String],
    /// Whether the guest's IP sockets are made on the host.
    pub tsi: bool,
}

/// libkrun's version: the crate's, or which library this build looks for.
pub fn version() -> &'static str {
    if cfg!(feature = "libkrun") { "1.19.7" } else { "system (libkrun.so.1)" }
}

/// Finds the guest kernel's library and reads the kernel's version out of its image.
pub fn firmware(explicit: Option<&Path>) -> anyhow::Result<firmware::Firmware> {
    firmware::find(explicit)
}

/// Loads libkrunfw and configures a context. Call it once, in the host's view: no library is opened after the pivot.
pub fn prepare(vm: &plan::Vm) -> anyhow::Result<Machine> {
    let kernel = Kernel::open(vm)?;
    start_log(vm.debug)?;
    // SAFETY: takes nothing; it only registers a context.
    let id = unsafe { ffi::krun_create_ctx() };
    let context = u32::try_from(check(id, "create a libkrun context")?)?;
    // SAFETY: plain numbers about a context that exists.
    let status = unsafe { ffi::krun_set_vm_config(context, vm.vcpus, vm.memory_mib) };
    check(status, "size the VM")?;
    Ok(Machine { context, memory: (vm.memory_mib as usize) << 20, kernel })
}

/// Adds the devices and runs the VM. Returns only if it could not be started.
pub fn enter(machine: Machine, devices: &Devices) -> anyhow::Error {
    let kernel = machine.kernel.iter().try_for_each(|kernel| set_kernel(machine.context, kernel));
    let attached = kernel
        .and_then(|()| attach(machine.context, devices))
        .and_then(|()| connect(machine.context, devices));
    if let Err(error) = attached {
        return error;
    }
    align_next_mapping(machine.memory.min(DEVICE_GAP));
    // SAFETY: the context is complete; the call owns this thread from here on.
    let status = unsafe { ffi::krun_start_enter(machine.context) };
    match check(status, "start the VM") {
        Ok(_) => anyhow!("start the VM: libkrun returned without running it"),
        Err(error) => error,
    }
}

/// Gives the context what every VM has: root file system, guest-init, console.
fn attach(context: u32, devices: &Devices) -> anyhow::Result<()> {
    let export = c_path(devices.export)?;
    let console = c_path(devices.console)?;
    // No DAX window: the root is never mounted with it, and it would only cost address space.
    // SAFETY: both strings live through the call, which copies them.
    let status = unsafe { ffi::krun_add_virtiofs3(context, ROOT_TAG.as_ptr(), export.as_ptr(), 0, false) };
    check(status, "export the root file system")?;
    let (init, len) = (devices.init.as_ptr(), devices.init.len());
    // One-shot: the name is gone once the kernel has looked it up, so containers never see it.
    // SAFETY: libkrun keeps the pointer for the VM's life; the bytes are 'static.
    let status = unsafe {
        ffi::krun_fs_add_overlay_file(context, ROOT_TAG.as_ptr(), INIT_NAME.as_ptr(), init, len, 0o755, true)
    };
    check(status, "serve guest-init")?;
    // A path of our own also keeps libkrun away from stdin, terminals and SIGINT.
    // SAFETY: the string lives through the call, which copies it.
    let status = unsafe { ffi::krun_set_console_output(context, console.as_ptr()) };
    check(status, "set the console output").map(drop)
}

/// Gives the context vsock with the control port, and the network.
fn connect(context: u32, devices: &Devices) -> anyhow::Result<()> {
    const HIJACK_INET: u32 = 1;
    let socket = c_path(devices.control_socket)?;
    if socket.as_bytes().len() > SOCKET_PATH_MAX {
        bail!(
            "control socket {}: path longer than {SOCKET_PATH_MAX} bytes",
            devices.control_socket.display()
        );
    }
    // The implicit vsock device would hijack the guest's sockets (TSI) where there is no NIC.
    // SAFETY: plain numbers about a context that exists.
    let status = unsafe { ffi::krun_disable_implicit_vsock(context) };
    check(status, "disable the implicit vsock device")?;
    // Never Unix sockets: paths of the jail's are none of the guest's business.
    let hijacked = if devices.tsi { HIJACK_INET } else { 0 };
    // SAFETY: as above.
    let status = unsafe { ffi::krun_add_vsock(context, hijacked) };
    check(status, "add the vsock device")?;
    // SAFETY: the string lives through the call, which copies it; `true` means that the host dials.
    let status = unsafe { ffi::krun_add_vsock_port2(context, devices.control_port, socket.as_ptr(), true) };
    check(status, "map the control port")?;
    (0..).zip(devices.taps).try_for_each(|(slot, tap)| add_nic(context, slot, tap))
}

/// Gives the context a NIC on its tap, with checksums and segmentation left to whoever comes last.
pub fn add_nic(context: u32, slot: u8, tap: &str) -> anyhow::Result<()> {
    // linux/virtio_net.h: CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6.
    const FEATURES: u32 = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
    let name = CString::new(tap)?;
    // Never on the wire: the NIC is down until it takes an interface's own.
    let mac = [2, 0xa3, 0x5b, 0, 0, slot];
    // SAFETY: a string and six bytes that live through the call, which copies them.
    let status = unsafe { ffi::krun_add_net_tap(context, name.as_ptr(), mac.as_ptr(), FEATURES, 0) };
    check(status, "add a NIC").map(drop)
}

/// What libkrun is to load instead of mapping libkrunfw's own pages.
struct Kernel {
    file: File,
    format: u32,
    initrd: Option<File>,
    command_line: CString,
}

impl Kernel {
    /// Opens config.json's kernel, or libkrunfw's; `None` where libkrunfw's is loaded best by libkrun itself.
    fn open(vm: &plan::Vm) -> anyhow::Result<Option<Self>> {
        let own = vm.kernel.clone().unwrap_or_default();
        let words =
            [KERNEL_COMMAND_LINE.to_str()?].into_iter().chain(own.parameters.iter().map(String::as_str));
        let command_line = CString::new(words.collect::<Vec<_>>().join(" "))?;
        let named = |path: &&Path| !path.as_os_str().is_empty();
        let initrd_path = own.initrd.as_deref().filter(named);
        let initrd = initrd_path.map(|path| open_plain(path, "vm.kernel.initrd")).transpose()?;
        let (file, format) = if let Some(path) = Some(own.path.as_path()).filter(named) {
            let file = open_plain(path, "vm.kernel.path")?;
            let format = format(&file).with_context(|| format!("vm.kernel.path {}", path.display()))?;
            (file, format)
        } else {
            let library = GuestKernel::open(vm.libkrunfw.as_deref())?;
            // Elsewhere libkrun copies the kernel into aligned memory by itself, and takes no ELF.
            if !cfg!(target_arch = "x86_64") {
                if vm.kernel.is_some() {
                    bail!(
                        "vm.kernel.parameters and initrd: not supported without vm.kernel.path on this architecture"
                    );
                }
                return Ok(None);
            }
            (library.file()?, ELF)
        };
        let kernel = Kernel { file, format, initrd, command_line };
        initrd_path.map_or(Ok(()), |path| kernel.takes_initrd(path))?;
        Ok(Some(kernel))
    }

    /// Refuses an initial RAM disk that the kernel would pass over, as libkrunfw's does. What a packed kernel takes
    /// cannot be told.
    fn takes_initrd(&self, path: &Path) -> anyhow::Result<()> {
        // A parameter that only kernels with CONFIG_BLK_DEV_INITRD know.
        const SIGN: &[u8] = b"noinitrd";
        let mut image = Vec::new();
        io::Read::read_to_end(&mut &self.file, &mut image).context("read the guest kernel")?;
        if self.format == ELF && !image.windows(SIGN.len()).any(|window| window == SIGN) {
            bail!(
                "vm.kernel.initrd {}: this kernel takes no initial RAM disk, as libkrunfw's does not",
                path.display()
            );
        }
        Ok(())
    }
}

fn open_plain(path: &Path, field: &str) -> anyhow::Result<File> {
    let file = File::open(path).with_context(|| format!("{field}: open {}", path.display()))?;
    if !file.metadata()?.is_file() {
        bail!("{field} {}: not a regular file", path.display());
    }
    Ok(file)
}

/// libkrun's number for an ELF file.
const ELF: u32 = 1;

/// libkrun's number for a kernel's format: ELF, or on x86 a bzImage by how the ELF in it is packed, elsewhere a raw
/// image or one packed in a PE.
fn format(file: &File) -> anyhow::Result<u32> {
    let mut head = [0; 4096];
    let length = file.read_at(&mut head, 0)?;
    let head = &head[..length];
    let is_bzimage = head.get(0x202..0x206) == Some(b"HdrS");
    if head.starts_with(b"\x7fELF") {
        return Ok(ELF);
    }
    if cfg!(target_arch = "x86_64") && is_bzimage {
        let mut image = Vec::new();
        io::Read::read_to_end(&mut &*file, &mut image)?;
        let holds = |magic: &[u8]| image.windows(magic.len()).any(|window| window == magic);
        for (magic, format) in [(&b"\x1f\x8b\x08"[..], 4), (b"\x28\xb5\x2f\xfd", 5), (b"BZh91AY&SY", 3)] {
            if holds(magic) {
                return Ok(format);
            }
        }
    }
    if cfg!(target_arch = "aarch64") {
        match head {
            [b'M', b'Z', _, _, b'z', b'i', b'm', b'g', ..] => return Ok(2),
            _ if head.get(0x38..0x3c) == Some(b"ARM\x64") => return Ok(0),
            _ => {}
        }
    }
    bail!("not a kernel image of a known format")
}

/// Has libkrun load the kernel from a file, which it opens anew by `/proc/self/fd`, instead of mapping libkrunfw's own
/// pages, whose size and alignment keep huge pages away from all the guest RAM behind them. The boot is a third shorter
/// where the host has huge pages.
fn set_kernel(context: u32, kernel: &Kernel) -> anyhow::Result<()> {
    let by_number = |file: &File| c_path(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())));
    let path = by_number(&kernel.file)?;
    let initrd = kernel.initrd.as_ref().map(by_number).transpose()?;
    let initrd = initrd.as_ref().map_or(ptr::null(), |path| path.as_ptr());
    let line = kernel.command_line.as_ptr();
    // SAFETY: all strings live through the call, which copies them; no initial RAM disk is a null pointer.
    let status = unsafe { ffi::krun_set_kernel(context, path.as_ptr(), kernel.format, initrd, line) };
    check(status, "set the guest kernel").map(drop)
}

/// Makes the next `mmap` of `len` bytes, libkrun's of the guest's RAM, start on a huge page's boundary, as only some
/// kernels do by themselves: takes the odd bytes at the end of the hole into which it is going to fall.
fn align_next_mapping(len: usize) {
    const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, which nobody else knows of.
    let probe = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, FLAGS, -1, 0) };
    if probe == libc::MAP_FAILED {
        return;
    }
    // SAFETY: exactly the mapping just made.
    unsafe { libc::munmap(probe, len) };
    let odd = probe.addr() % HUGE_PAGE;
    if odd > 0 && odd < len {
        let end = probe.wrapping_byte_add(len - odd);
        // SAFETY: NOREPLACE keeps it off every other mapping; failing, it only costs speed.
        unsafe { libc::mmap(end, odd, libc::PROT_NONE, FLAGS | libc::MAP_FIXED_NOREPLACE, -1, 0) };
    }
}

/// Routes libkrun's log to fd 2. Its warnings are left out by default: every closed vsock connection is one.
fn start_log(debug: bool) -> anyhow::Result<()> {
    const ERROR: u32 = 1;
    const INFO: u32 = 3;
    const NO_COLOUR: u32 = 2;
    const NO_ENVIRONMENT: u32 = 1;
    let level = if debug { INFO } else { ERROR };
    // SAFETY: fd 2 is ours to write to for the process's life.
    let status = unsafe { ffi::krun_init_log(2, level, NO_COLOUR, NO_ENVIRONMENT) };
    check(status, "set up libkrun's log").map(drop)
}

fn c_path(path: &Path) -> anyhow::Result<CString> {
    let text = path.to_str().with_context(|| format!("path {} is not UTF-8", path.display()))?;
    CString::new(text).with_context(|| format!("path {} holds a NUL", path.display()))
}

/// Turns libkrun's negative errno into words. Nearly all are "invalid argument"; its log on fd 2 knows more.
fn check(status: i32, action: &str) -> anyhow::Result<i32> {
    if status >= 0 {
        return Ok(status);
    }
    let error = io::Error::from_raw_os_error(-status);
    Err(error).with_context(|| format!("{action} (libkrun's log may say why)"))
}
