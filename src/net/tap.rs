//! Taps: the host's ends of the VM's NICs.
//!
//! Made persistent beforehand and owned by the VMM's user, so that the VMM attaches to them without CAP_NET_ADMIN.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;

/// The device node through which taps are made and attached to.
pub const NODE: &str = "/dev/net/tun";
const PREFIX: &str = "a3s-tap";

/// A NIC's tap, which no namespace holds twice. Shorter than `IFNAMSIZ`, which libkrun does not check.
pub fn name(slot: u8) -> String {
    format!("{PREFIX}{slot}")
}

/// Which NIC's tap an interface is, if it is one.
pub fn slot(name: &str) -> Option<u8> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Whether this host has taps.
pub fn possible() -> bool {
    std::path::Path::new(NODE).exists()
}

/// Makes a NIC's tap in the calling thread's network namespace, for a VMM that runs as `owner`.
pub fn make(slot: u8, owner: u32) -> Result<()> {
    // linux/if_tun.h: fail if there is one of that name.
    const IFF_TUN_EXCL: libc::c_int = 0x8000;
    let shown = || format!("make network interface {}", name(slot));
    let tun = File::options().read(true).write(true).open(NODE);
    let tun = tun.map_err(|error| match error.kind() {
        // By the kernel's words podman takes an error for the workload's program missing (127).
        ErrorKind::NotFound => anyhow!("it is not there; load the kernel module tun"),
        _ => error.into(),
    });
    let tun = tun.with_context(|| format!("{NODE}: needed for every network interface of a VM"))?;
    // SAFETY: ifreq is plain data, for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name(slot).bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until after the call.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    match Errno::result(made) {
        Err(Errno::EBUSY) => return Err(anyhow!("it is there already, of another VM")).with_context(shown),
        result => result.with_context(shown)?,
    };
    let owner = libc::c_ulong::from(owner);
    for (request, value) in [(libc::TUNSETOWNER, owner), (libc::TUNSETPERSIST, 1)] {
        // SAFETY: both take a plain number.
        Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), request as _, value) }).with_context(shown)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_slot_and_fits_the_kernel() {
        assert_eq!(slot(&name(5)), Some(5));
        assert_eq!(slot("eth0"), None);
        assert_eq!(slot("a3s-tapx"), None);
        assert!(name(u8::MAX).len() < libc::IFNAMSIZ);
    }
}
