//! `linux.resources` for the host's side: what holds around the VM, and what only the host has.
//!
//! In: the limits of config.json or of `update`, the VM's RAM. Out: files and values as cgroup v2 names them (with two
//! names of v1's for disk weights). Must not: look at any cgroup.

use anyhow::Result;
use oci_spec::runtime::{LinuxBlockIo, LinuxResources};

use super::resources::{self, HOST_ALONE};
/// What monitor and VMM may use beside the guest's RAM, in MiB.
pub const VMM_OVERHEAD_MIB: u32 = 64;
/// A bound on the host's tasks, for safety alone: the container's own limit holds in the guest, whose processes are
/// none of the host's. A VM with its exec proxies has dozens.
const TASKS: u32 = 4096;

/// Files of cgroup v2 with their values, in the order in which they are written. `blkio.weight` and
/// `blkio.weight_device` are v1's, from 10 to 1000.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits(Vec<(String, String)>);

impl<const N: usize> From<[(&str, String); N]> for Limits {
    fn from(list: [(&str, String); N]) -> Self {
        Limits(list.into_iter().map(|(file, value)| (file.to_string(), value)).collect())
    }
}

impl Limits {
    /// Adds a limit.
    pub fn set(&mut self, file: impl Into<String>, value: impl Into<String>) {
        self.0.push((file.into(), value.into()));
    }

    /// Each file and its value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(file, value)| (file.as_str(), value.as_str()))
    }

    /// Whether the guest holds every one of them by itself: then the host's cgroup bounds what a VMM takes that was taken over.
    pub fn are_the_guests_too(&self) -> bool {
        self.iter().all(|(file, _)| is_the_guests_too(file))
    }

    /// Both lists, one after the other.
    pub fn and(mut self, more: Limits) -> Self {
        self.0.extend(more.0);
        self
    }

    /// Those that hold from the first instant, and those that wait until the VM is up: a share of a CPU that is
    /// enough for a workload would make it boot for minutes.
    pub fn split(self) -> (Limits, Limits) {
        let (late, early) = self.0.into_iter().partition(|(file, _)| file.starts_with("cpu.max"));
        (Limits(early), Limits(late))
    }

    /// Those that are not in another list.
    pub fn without(mut self, others: &Limits) -> Self {
        self.0.retain(|limit| !others.0.contains(limit));
        self
    }
}

/// Whether the guest holds such a limit by itself.
pub fn is_the_guests_too(file: &str) -> bool {
    ["cpu.", "memory.", "pids."].iter().any(|its| file.starts_with(its))
}

/// The bounds of a new container's host cgroup.
pub fn bounds(memory_mib: u32) -> Limits {
    let bytes = (u64::from(memory_mib) + u64::from(VMM_OVERHEAD_MIB)) << 20;
    Limits::from([("memory.max", bytes.to_string()), ("pids.max", TASKS.to_string())])
}

/// The limits that hold on the host: CPU and swap as in the guest, CPU sets and disks here alone.
pub fn limits(resources: &LinuxResources) -> Result<Limits> {
    let mut limits = Limits::default();
    for (file, value) in resources::limits(resources)? {
        if file.starts_with("cpu.") || ["memory.low", "memory.swap.max"].contains(&file.as_str()) {
            limits.set(file, value);
        }
    }
    if let Some(cpu) = resources.cpu() {
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list.as_ref().filter(|list| !list.trim().is_empty()) {
                limits.set(file, list.trim());
            }
        }
    }
    if let Some(block_io) = resources.block_io() {
        disks(block_io, &mut limits);
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if HOST_ALONE.iter().any(|prefix| file.starts_with(prefix)) {
            limits.set(file, value);
        }
    }
    Ok(limits)
}

fn disks(block_io: &LinuxBlockIo, limits: &mut Limits) {
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        limits.set("blkio.weight", weight.to_string());
    }
    for device in block_io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            limits.set("blkio.weight_device", format!("{}:{} {weight}", device.major(), device.minor()));
        }
    }
    for (kind, devices) in [
        ("rbps", block_io.throttle_read_bps_device()),
        ("wbps", block_io.throttle_write_bps_device()),
        ("riops", block_io.throttle_read_iops_device()),
        ("wiops", block_io.throttle_write_iops_device()),
    ] {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
            limits.set("io.max", format!("{}:{} {kind}={rate}", device.major(), device.minor()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(resources: Value) -> Vec<String> {
        let limits = limits(&serde_json::from_value(resources).unwrap()).unwrap();
        limits.iter().map(|(file, value)| format!("{file}={value}")).collect()
    }

    #[test]
    fn what_the_guest_cannot_hold_is_the_hosts() {
        let cases: [(Value, &[&str]); 5] = [
            (json!({}), &[]),
            (json!({"memory": {"limit": 9}, "pids": {"limit": 7}, "hugepageLimits": []}), &[]),
            (
                json!({"cpu": {"quota": 50, "period": 20, "shares": 1024, "cpus": "0-1", "mems": "0"}}),
                &["cpu.weight=39", "cpu.max=50 20", "cpuset.cpus=0-1", "cpuset.mems=0"],
            ),
            (
                json!({"blockIO": {"weight": 500, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 7}],
                    "throttleWriteIOPSDevice": [{"major": 8, "minor": 1, "rate": 0}],
                    "weightDevice": [{"major": 8, "minor": 2, "weight": 10}]}}),
                &[
                    "blkio.weight=500",
                    "blkio.weight_device=8:2 10",
                    "io.max=8:0 rbps=7",
                    "io.max=8:1 wiops=max",
                ],
            ),
            (
                json!({"unified": {"io.weight": "default 5", "memory.high": "9", "cpuset.cpus": "1"}}),
                &["cpuset.cpus=1", "io.weight=default 5"],
            ),
        ];
        for (resources, expected) in cases {
            assert_eq!(translated(resources.clone()), expected, "{resources}");
        }
    }

    #[test]
    fn the_host_has_room_for_the_vm() {
        let bounds = bounds(256);
        assert_eq!(bounds.iter().next().unwrap(), ("memory.max", ((256 + 64) << 20).to_string().as_str()));
    }

    #[test]
    fn a_quota_waits_for_the_vm() {
        let limits =
            Limits::from([("memory.max", "1".into()), ("cpu.max", "2 3".into()), ("pids.max", "4".into())]);
        let (early, late) = limits.split();
        assert_eq!(early.iter().map(|(file, _)| file).collect::<Vec<_>>(), ["memory.max", "pids.max"]);
        assert_eq!(late.iter().collect::<Vec<_>>(), [("cpu.max", "2 3")]);
    }
}
