//! Boots a microVM whose init restarts it at once: the least that any runtime on libkrun has to take.
//!
//! In: `--mapping bundled|elf` (libkrun's own way with the guest kernel, or a3s-box's), the VM's size, perhaps `--hold`;
//! for another guest `--export DIR`, its root file system, whose `/start` it runs, and `--tap NAME`, its NIC's.
//! Out: exit status 0 when the guest has reset itself; with `--hold` the guest sleeps, to have its memory looked at.
//! Must not: do less than a3s-box has to: both mappings have its four devices.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

#[path = "../../../src/krun.rs"]
#[allow(dead_code, reason = "floor needs no answers for `check`")]
mod krun;

/// What src/krun.rs takes from the host crate.
mod plan {
    /// Another kernel than libkrunfw's.
    #[derive(Clone, Default)]
    pub struct Kernel {
        /// Where it lies.
        pub path: std::path::PathBuf,
        /// More words for its command line.
        pub parameters: Vec<String>,
        /// Its initial RAM disk.
        pub initrd: Option<std::path::PathBuf>,
    }

    /// The size of the VM.
    pub struct Vm {
        /// Virtual CPUs.
        pub vcpus: u8,
        /// RAM in MiB.
        pub memory_mib: u32,
        /// Where libkrunfw lies.
        pub libkrunfw: Option<std::path::PathBuf>,
        /// Another kernel: never here.
        pub kernel: Option<Kernel>,
        /// Whether libkrun logs more than errors.
        pub debug: bool,
    }
}

/// One ELF segment that is all of the file, at 4 MiB; the code follows the headers.
const INIT_HEAD: &[u8; 0x78] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\
    \x02\0\x3e\0\x01\0\0\0\x78\0\x40\0\0\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
    \0\0\0\0\x40\0\x38\0\x01\0\x40\0\0\0\0\0\
    \x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\x40\0\0\0\0\0\
    \x9e\0\0\0\0\0\0\0\x9e\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0";
/// `reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART)`.
const RESTART: &[u8] =
    b"\xb8\xa9\0\0\0\xbf\xad\xde\xe1\xfe\xbe\x69\x19\x12\x28\xba\x67\x45\x23\x01\x0f\x05\xf4";
/// `for (;;) pause()`.
const SLEEP: &[u8] = b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7";
/// `execve("/start", NULL, NULL)`, the string behind the code.
const START: &[u8] = b"\xb8\x3b\0\0\0\xbf\x88\0\x40\0\x31\xf6\x31\xd2\x0f\x05/start\0";
/// The code's room as the head tells it; what is not used is zero.
const CODE_ROOM: usize = 0x9e - 0x78;

struct Options {
    vm: plan::Vm,
    bundled: bool,
    hold: bool,
    export: Option<PathBuf>,
    taps: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let dir = std::env::temp_dir().join(format!("a3s-box-floor-{}", std::process::id()));
    let export = options.export.clone().unwrap_or_else(|| dir.join("export"));
    for dir in [&dir, &export] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let (console, socket) = (dir.join("console"), dir.join("control"));
    let devices = krun::Devices {
        export: &export,
        init: init(match (&options.export, options.hold) {
            (Some(_), _) => START,
            (None, true) => SLEEP,
            (None, false) => RESTART,
        }),
        console: &console,
        control_socket: &socket,
        control_port: 1,
        taps: &options.taps,
        tsi: false,
    };
    let error = if options.bundled {
        bundled(&options.vm, &devices)
    } else {
        krun::prepare(&options.vm).map(|machine| krun::enter(machine, &devices))
    };
    Err(error.unwrap_or_else(|error| error))
}

fn options() -> anyhow::Result<Options> {
    let vm = plan::Vm { vcpus: 1, memory_mib: 256, libkrunfw: None, kernel: None, debug: false };
    let mut options = Options { vm, bundled: true, hold: false, export: None, taps: Vec::new() };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        if name == "--hold" {
            options.hold = true;
            continue;
        }
        let value =
            args.next().with_context(|| format!("{name}: no such option, or its value is missing"))?;
        match (name.as_str(), value.as_str()) {
            ("--mapping", "bundled") => options.bundled = true,
            ("--mapping", "elf") => options.bundled = false,
            ("--vcpus", n) => options.vm.vcpus = n.parse().context("--vcpus")?,
            ("--memory-mib", n) => options.vm.memory_mib = n.parse().context("--memory-mib")?,
            ("--export", path) => options.export = Some(PathBuf::from(path)),
            ("--tap", name) => options.taps.push(name.into()),
            ("--libkrunfw", path) => options.vm.libkrunfw = Some(PathBuf::from(path)),
            _ => bail!("{name} {value}: no such option"),
        }
    }
    Ok(options)
}

fn init(code: &[u8]) -> &'static [u8] {
    let mut bytes = INIT_HEAD.to_vec();
    bytes.extend_from_slice(code);
    bytes.resize(INIT_HEAD.len() + CODE_ROOM, 0);
    bytes.leak()
}

/// Bare libkrun: it finds libkrunfw by itself and makes the library's own pages guest memory.
fn bundled(vm: &plan::Vm, devices: &krun::Devices) -> anyhow::Result<anyhow::Error> {
    let (export, console) = (c_string(devices.export)?, c_string(devices.console)?);
    let socket = c_string(devices.control_socket)?;
    let context = ::krun::krun_create_ctx() as u32;
    let (init, len) = (devices.init.as_ptr(), devices.init.len());
    let (root, name) = (c"/dev/root".as_ptr(), c"init.krun".as_ptr());
    // SAFETY: every string lives until the end of this function, and guest-init's bytes are never freed.
    let results = unsafe {
        [
            ::krun::krun_init_log(2, 1, 2, 1),
            ::krun::krun_set_vm_config(context, vm.vcpus, vm.memory_mib),
            ::krun::krun_add_virtiofs3(context, root, export.as_ptr(), 0, false),
            ::krun::krun_fs_add_overlay_file(context, root, name, init, len, 0o755, true),
            ::krun::krun_set_console_output(context, console.as_ptr()),
            ::krun::krun_disable_implicit_vsock(context),
            ::krun::krun_add_vsock(context, 0),
            ::krun::krun_add_vsock_port2(context, devices.control_port, socket.as_ptr(), true),
        ]
    };
    ensure!(results.iter().all(|result| *result >= 0), "configure the VM: {results:?}");
    (0..).zip(devices.taps).try_for_each(|(slot, tap)| krun::add_nic(context, slot, tap))?;
    Ok(anyhow::anyhow!("start the VM: {}", ::krun::krun_start_enter(context)))
}

fn c_string(path: &Path) -> anyhow::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).with_context(|| format!("path {}", path.display()))
}
