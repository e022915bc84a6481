//! Limits of a host cgroup, and what they are called where: cgroup v2, v1, systemd.
//!
//! In: files and values as cgroup v2 names them. Out: what is written. Must not: pass over a limit that nothing but
//! the host could hold.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Version;
use super::systemd::{Properties, Value};
use crate::plan::host::Limits;

/// Writes limits to the cgroup's directories; all, or none.
pub fn write(limits: &Limits, dirs: &[PathBuf], version: Version) -> Result<Undo> {
    let mut undo = Undo(Vec::new());
    match try_write(limits, dirs, version, &mut undo) {
        Ok(()) => Ok(undo),
        Err(error) => {
            undo.run();
            Err(error)
        }
    }
}

fn try_write(limits: &Limits, dirs: &[PathBuf], version: Version, undo: &mut Undo) -> Result<()> {
    for (file, value) in limits.iter() {
        let names = if version == Version::V1 { v1(file, value) } else { v2(file, value) };
        let mut written = false;
        for (name, value) in &names {
            if let Some(path) = dirs.iter().map(|dir| dir.join(name)).find(|path| path.exists()) {
                let held = fs::read_to_string(&path).unwrap_or_default();
                undo.0.push((path.clone(), held.trim_end().to_string()));
                fs::write(&path, value).with_context(|| {
                    format!("linux.resources: set {name} to {value:?} in {}", shown(&path))
                })?;
                written = true;
            }
        }
        // What the guest holds as well need not hold twice where this host has no such controller.
        let is_in_guest = ["cpu.", "memory.", "pids."].iter().any(|prefix| file.starts_with(prefix));
        if !written && !is_in_guest {
            bail!(
                "linux.resources: {file} {value:?} is not supported: this host's cgroups have no such file"
            );
        }
    }
    Ok(())
}

/// What systemd knows of them.
pub fn properties(limits: &Limits) -> Properties {
    limits
        .iter()
        .flat_map(|(file, value)| property(file, value))
        .map(|(name, value)| (name.into(), value))
        .collect()
}

/// What the files held that were written.
#[must_use = "limits that were changed may have to be changed back"]
pub struct Undo(Vec<(PathBuf, String)>);

impl Undo {
    /// Writes it back, the last first.
    pub fn run(self) {
        for (path, held) in self.0.into_iter().rev() {
            // Files of many lines have no way back to none; the rest goes.
            let _ = fs::write(path, held);
        }
    }
}

fn shown(path: &Path) -> String {
    path.parent().unwrap_or(path).display().to_string()
}

fn v2(file: &str, value: &str) -> Vec<(String, String)> {
    let names = match file {
        // To whichever policy there is; bfq's weights have v1's range.
        "blkio.weight" => vec![("io.bfq.weight", value.into()), ("io.weight", io_weight(value))],
        "blkio.weight_device" => vec![("io.bfq.weight", value.into())],
        file => vec![(file, value.into())],
    };
    names.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

fn v1(file: &str, value: &str) -> Vec<(String, String)> {
    let number = if value == "max" { "-1" } else { value };
    let names = match file {
        "memory.max" => vec![("memory.limit_in_bytes", number.into())],
        "memory.low" => vec![("memory.soft_limit_in_bytes", number.into())],
        // v1 counts memory and swap together; the guest, which has no swap, is bounded by its RAM.
        "memory.swap.max" => vec![],
        "cpu.weight" => vec![("cpu.shares", shares(value))],
        "cpu.max.burst" => vec![("cpu.cfs_burst_us", value.into())],
        "cpu.max" => {
            let (quota, period) = value.split_once(' ').unwrap_or((value, "100000"));
            let quota = if quota == "max" { "-1" } else { quota };
            vec![("cpu.cfs_period_us", period.into()), ("cpu.cfs_quota_us", quota.into())]
        }
        "blkio.weight" => vec![("blkio.weight", value.into()), ("blkio.bfq.weight", value.into())],
        "blkio.weight_device" => {
            vec![("blkio.weight_device", value.into()), ("blkio.bfq.weight_device", value.into())]
        }
        "io.max" => throttle(value),
        file => vec![(file, value.into())],
    };
    names.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// `8:0 rbps=1048576` as v1 spells it; `max`, which lifts it, is 0 there.
fn throttle(value: &str) -> Vec<(&'static str, String)> {
    let mut words = value.split(' ');
    let device = words.next().unwrap_or_default();
    let file = |kind: &str| match kind {
        "rbps" => Some("blkio.throttle.read_bps_device"),
        "wbps" => Some("blkio.throttle.write_bps_device"),
        "riops" => Some("blkio.throttle.read_iops_device"),
        "wiops" => Some("blkio.throttle.write_iops_device"),
        _ => None,
    };
    let pair = |word: &str| {
        let (kind, rate) = word.split_once('=')?;
        Some((file(kind)?, format!("{device} {}", if rate == "max" { "0" } else { rate })))
    };
    words.filter_map(pair).collect()
}

/// The inverse of the way from v1's shares to a weight.
fn shares(weight: &str) -> String {
    let weight = weight.parse::<u64>().unwrap_or(39).clamp(1, 10_000);
    (2 + (weight - 1) * 262_142 / 9999).to_string()
}

/// v1's range of 10 to 1000 as v2's of 1 to 10000.
fn io_weight(weight: &str) -> String {
    weight.parse::<u64>().map_or(weight.into(), |weight| (1 + (weight.max(10) - 10) * 9999 / 990).to_string())
}

fn property(file: &str, value: &str) -> Vec<(&'static str, Value)> {
    let number = if value == "max" { Some(u64::MAX) } else { value.parse().ok() };
    let name = match file {
        "memory.max" => "MemoryMax",
        "memory.low" => "MemoryLow",
        "memory.swap.max" => "MemorySwapMax",
        "pids.max" => "TasksMax",
        "cpu.weight" => "CPUWeight",
        "cpu.max" => return quota(value),
        "cpuset.cpus" => return vec![("AllowedCPUs", Value::Bytes(mask(value)))],
        "cpuset.mems" => return vec![("AllowedMemoryNodes", Value::Bytes(mask(value)))],
        "blkio.weight" => {
            return io_weight(value)
                .parse()
                .map(|weight| ("IOWeight", Value::Number(weight)))
                .into_iter()
                .collect();
        }
        _ => return Vec::new(),
    };
    number.map(|number| (name, Value::Number(number))).into_iter().collect()
}

/// systemd keeps whole hundredths of a CPU.
fn quota(value: &str) -> Vec<(&'static str, Value)> {
    const HUNDREDTH: u64 = 10_000;
    let (quota, period) = value.split_once(' ').unwrap_or((value, "100000"));
    let Ok(period) = period.parse::<u64>() else { return Vec::new() };
    let per_second = match quota.parse::<u64>() {
        Ok(quota) => (quota * 1_000_000).div_ceil(period.max(1)).next_multiple_of(HUNDREDTH),
        Err(_) => u64::MAX,
    };
    vec![("CPUQuotaPerSecUSec", Value::Number(per_second)), ("CPUQuotaPeriodUSec", Value::Number(period))]
}

/// `0-2,8` as a little-endian bit mask. What is no such list the kernel refuses in its own words.
fn mask(list: &str) -> Vec<u8> {
    const MOST: usize = 8192;
    let mut mask = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>()) else {
            continue;
        };
        for bit in first..=last.min(MOST) {
            mask.resize(mask.len().max(bit / 8 + 1), 0);
            mask[bit / 8] |= 1 << (bit % 8);
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(names: Vec<(String, String)>) -> String {
        names.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn v1_has_other_names() {
        for (file, value, expected) in [
            ("memory.max", "max", "memory.limit_in_bytes=-1"),
            ("memory.low", "7", "memory.soft_limit_in_bytes=7"),
            ("memory.swap.max", "0", ""),
            ("cpu.max", "50 20", "cpu.cfs_period_us=20 cpu.cfs_quota_us=50"),
            ("cpu.max", "max 20", "cpu.cfs_period_us=20 cpu.cfs_quota_us=-1"),
            ("cpu.weight", "1", "cpu.shares=2"),
            ("cpu.weight", "10000", "cpu.shares=262144"),
            ("io.max", "8:0 rbps=5", "blkio.throttle.read_bps_device=8:0 5"),
            ("io.max", "8:0 wiops=max", "blkio.throttle.write_iops_device=8:0 0"),
            ("cpuset.cpus", "1", "cpuset.cpus=1"),
            ("pids.max", "9", "pids.max=9"),
        ] {
            assert_eq!(text(v1(file, value)), expected, "{file} {value}");
        }
    }

    #[test]
    fn v2_takes_weights_in_its_own_range() {
        assert_eq!(text(v2("blkio.weight", "500")), "io.bfq.weight=500 io.weight=4950");
        assert_eq!((io_weight("10"), io_weight("1000")), ("1".into(), "10000".into()));
        assert_eq!(text(v2("memory.max", "5")), "memory.max=5");
    }

    #[test]
    fn systemd_has_properties() {
        let shown = |file, value| format!("{:?}", property(file, value));
        assert_eq!(shown("memory.max", "5"), "[(\"MemoryMax\", Number(5))]");
        assert_eq!(shown("pids.max", "max"), format!("[(\"TasksMax\", Number({}))]", u64::MAX));
        assert_eq!(
            shown("cpu.max", "1234 100000"),
            "[(\"CPUQuotaPerSecUSec\", Number(20000)), (\"CPUQuotaPeriodUSec\", Number(100000))]"
        );
        assert_eq!(shown("cpuset.cpus", "0-1,9"), "[(\"AllowedCPUs\", Bytes([3, 2]))]");
        assert_eq!(shown("misc.max", "5"), "[]");
    }
}
