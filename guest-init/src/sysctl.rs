//! `linux.sysctl`: kernel parameters of a container's namespaces.
//!
//! In: files below /proc/sys and their values. Out: the parameters set, those of an interface once it is there: the host's
//! interfaces become the container's only at its start. Must not: set any in another network namespace than the container's.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};

use crate::boot;
use crate::process::words;

/// A file below /proc/sys and its value.
pub type Parameter = (PathBuf, String);

/// Sets all but those that wait for their interface, in the namespaces of the calling process.
pub fn set_present(parameters: &[Parameter]) -> Result<()> {
    parameters.iter().filter(|(path, _)| !is_awaited(path)).try_for_each(set)
}

/// Those of an interface: whether they have been set depends on what was there before.
pub fn of_interfaces(parameters: &[Parameter]) -> Vec<Parameter> {
    parameters.iter().filter(|(path, _)| interface(path).is_some()).cloned().collect()
}

/// Sets one, in the namespaces of the calling process.
pub fn set((path, value): &Parameter) -> Result<()> {
    boot::set(Path::new("/proc/sys").join(path), value).map_err(|errno| {
        anyhow!("linux.sysctl: set /proc/sys/{} to {value:?}: {}", path.display(), words(errno))
    })
}

fn is_awaited(path: &Path) -> bool {
    interface(path).is_some_and(|directory| !Path::new("/proc/sys").join(directory).exists())
}

/// The directory of the interface whose parameter this is; "all", "default" and "lo" are always there.
fn interface(path: &Path) -> Option<PathBuf> {
    let parts: Vec<&str> = path.iter().filter_map(|part| part.to_str()).collect();
    match parts[..] {
        ["net", "ipv4" | "ipv6", "conf" | "neigh", name, _] if !["all", "default", "lo"].contains(&name) => {
            path.parent().map(Path::to_path_buf)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_told_from_what_is_always_there() {
        let all = [
            ("net/ipv4/conf/eth0/rp_filter", Some("net/ipv4/conf/eth0")),
            ("net/ipv6/neigh/eth0.1/gc_stale_time", Some("net/ipv6/neigh/eth0.1")),
            ("net/ipv4/conf/all/rp_filter", None),
            ("net/ipv4/neigh/default/gc_thresh1", None),
            ("net/ipv4/conf/lo/rp_filter", None),
            ("net/ipv4/ip_forward", None),
            ("kernel/shm_rmid_forced", None),
        ];
        for (path, expected) in all {
            assert_eq!(interface(Path::new(path)), expected.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn one_of_no_interface_yet_is_awaited() {
        assert!(is_awaited(Path::new("net/ipv4/conf/none7/rp_filter")));
        assert!(!is_awaited(Path::new("net/ipv4/no_such_thing")));
    }
}
