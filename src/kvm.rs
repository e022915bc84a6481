//! Whether /dev/kvm does its work, and what to do where it does not.
//!
//! In: the device node, what the processor says of itself. Out: nothing, or a reason with the next step. Must not: keep
//! the node open.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use crate::log::sentence;

/// Why it cannot be used.
pub struct Trouble {
    /// What was met.
    pub found: String,
    /// The next step.
    pub advice: &'static str,
}

/// Opens the node and asks it a question that any KVM can answer.
pub fn look(node: &str) -> Result<(), Trouble> {
    // linux/kvm.h: an ioctl without argument, whose answer never changed since Linux 2.6.22.
    const KVM_GET_API_VERSION: libc::Ioctl = 0xae00;
    const KVM_API_VERSION: libc::c_int = 12;
    let opened = File::options().read(true).write(true).open(node).map_err(|error| Trouble {
        advice: advice(error.kind(), &fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        found: format!("{node}: {}", sentence(&error.into())),
    })?;
    // KVM refuses an argument other than 0, which is what a register may hold that nobody set.
    // SAFETY: the ioctl takes a plain number and writes nowhere.
    if unsafe { libc::ioctl(opened.as_raw_fd(), KVM_GET_API_VERSION, 0) } != KVM_API_VERSION {
        let advice = "something else has its name: remove it, and let udev make the node (10:232) anew";
        return Err(Trouble { found: format!("{node}: it is not KVM"), advice });
    }
    Ok(())
}

/// By why it could not be opened, and what /proc/cpuinfo says.
fn advice(error: ErrorKind, cpuinfo: &str) -> &'static str {
    let has = |flag: &str| {
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        flags.split_whitespace().any(|word| word == flag)
    };
    if error == ErrorKind::PermissionDenied {
        "run as root, or join the group that owns it (`usermod -aG kvm USER`, then log in anew); where root is \
         refused too, a security module (SELinux: `ausearch -m avc`) or the device filter of a container around this forbids it"
    } else if has("vmx") {
        "load the module: `modprobe kvm_intel`; where that fails, `dmesg` says why (often: switched off in the firmware)"
    } else if has("svm") {
        "load the module: `modprobe kvm_amd`; where that fails, `dmesg` says why (often: switched off in the firmware)"
    } else if has("hypervisor") {
        "this machine is a VM itself: switch nested virtualization on at its host, or take a machine that has it"
    } else {
        "switch virtualization (VT-x, AMD-V, SVM) on in the firmware, then `modprobe kvm_intel` or `modprobe kvm_amd`"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_step_follows_from_what_is_there() {
        let cpu = |flags: &str| format!("processor\t: 0\nflags\t\t: fpu {flags} nx\nbugs\t\t: vmx\n");
        let missing = |flags: &str| advice(ErrorKind::NotFound, &cpu(flags));
        assert!(missing("vmx hypervisor").contains("modprobe kvm_intel`; where"));
        assert!(missing("svm").contains("modprobe kvm_amd`; where"));
        assert!(missing("hypervisor").contains("nested virtualization"));
        assert!(missing("").contains("firmware, then"));
        assert!(advice(ErrorKind::PermissionDenied, &cpu("vmx")).contains("usermod -aG kvm"));
    }

    #[test]
    fn what_is_not_kvm_is_found_out() {
        assert!(look("/dev/null").is_err_and(|trouble| trouble.found.ends_with("it is not KVM")));
        assert!(look("/no/such/node").is_err_and(|trouble| trouble.found.contains("no such file")));
        assert!(look("/dev/zero").is_err());
    }
}
