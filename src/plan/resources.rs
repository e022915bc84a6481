//! `linux.resources` as files of cgroup v2.
//!
//! In: the limits of config.json or of `update`. Out: files and values for the container's cgroup in the guest, as runc
//! converts them. Numbers of host CPUs, memory nodes and disks mean nothing there: those limits are the host's. Must
//! not: look at any cgroup.

use anyhow::{Result, bail};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

/// Keys of `unified` that act on what only the host has.
pub const HOST_ALONE: [&str; 4] = ["cpuset.", "io.", "rdma.", "misc."];
const DEFAULT_PERIOD: u64 = 100_000;

/// The limits that hold in the guest, in the order in which they are written.
pub fn limits(resources: &LinuxResources) -> Result<Vec<(String, String)>> {
    let mut limits = Vec::new();
    let mut set = |file: &str, value: String| limits.push((file.to_string(), value));
    if let Some(memory) = resources.memory() {
        self::memory(memory, &mut set)?;
    }
    if let Some(cpu) = resources.cpu() {
        self::cpu(cpu, &mut set);
    }
    if let Some(pids) = resources.pids() {
        set("pids.max", if pids.limit() < 0 { "max".into() } else { pids.limit().to_string() });
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        let is_size = size.ends_with('B') && size.chars().all(|c| c.is_ascii_alphanumeric());
        if !is_size {
            bail!("linux.resources.hugepageLimits: {size:?} is not a page size such as \"2MB\"");
        }
        // config-linux.md: reservations too, where the kernel accounts for them.
        for what in ["max", "rsvd.max"] {
            set(&format!("hugetlb.{size}.{what}"), limit.limit().to_string());
        }
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (key, value) in unified {
        if key.contains('/') || !key.contains('.') {
            bail!("linux.resources.unified: {key:?} is not the name of a cgroup file");
        }
        if !HOST_ALONE.iter().any(|prefix| key.starts_with(prefix)) {
            set(key, value.clone());
        }
    }
    Ok(limits)
}

/// 0 leaves a limit as it is, -1 lifts it.
fn memory(memory: &LinuxMemory, set: &mut impl FnMut(&str, String)) -> Result<()> {
    let bytes = |field: &str, value: Option<i64>| match value {
        None | Some(0) => Ok(None),
        Some(-1) => Ok(Some("max".to_string())),
        Some(value) if value < 0 => bail!("linux.resources.memory.{field}: {value} is not a number of bytes"),
        Some(value) => Ok(Some(value.to_string())),
    };
    let limit = bytes("limit", memory.limit())?;
    let swap = swap(memory.limit().unwrap_or(0), memory.swap().unwrap_or(0))?;
    for (file, value) in [
        ("memory.swap.max", swap),
        ("memory.max", limit),
        ("memory.low", bytes("reservation", memory.reservation())?),
    ] {
        if let Some(value) = value {
            set(file, value);
        }
    }
    Ok(())
}

/// config.json counts memory and swap together, cgroup v2 swap alone.
fn swap(limit: i64, both: i64) -> Result<Option<String>> {
    match (limit, both) {
        (-1, 0) | (_, -1) => Ok(Some("max".into())),
        (_, 0) => Ok(None),
        (0 | -1, _) => bail!("linux.resources.memory.swap: unable to set swap limit without memory limit"),
        (limit, both) if both < limit => {
            bail!("linux.resources.memory.swap: {both}: memory+swap limit should be >= memory limit, {limit}")
        }
        (limit, both) => Ok(Some((both - limit).to_string())),
    }
}

fn cpu(cpu: &LinuxCpu, set: &mut impl FnMut(&str, String)) {
    if let Some(idle) = cpu.idle() {
        set("cpu.idle", idle.to_string());
    }
    // The kernel refuses a weight for an idle cgroup.
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        set("cpu.weight", weight(shares).to_string());
    }
    let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
    if quota != 0 || period != 0 {
        let quota = if quota > 0 { quota.to_string() } else { "max".into() };
        let period = if period == 0 { DEFAULT_PERIOD } else { period };
        set("cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        set("cpu.max.burst", burst.to_string());
    }
}

/// cgroup v1 shares (2 to 262144) as a cgroup v2 weight (1 to 10000), by the formula every runtime uses.
pub fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(resources: Value) -> Result<Vec<String>> {
        let limits = limits(&serde_json::from_value(resources).unwrap())?;
        Ok(limits.into_iter().map(|(file, value)| format!("{file}={value}")).collect())
    }

    #[test]
    fn limits_become_files_as_runc_writes_them() {
        let cases: [(Value, &[&str]); 14] = [
            (json!({}), &[]),
            (json!({"memory": {"limit": 1000}}), &["memory.max=1000"]),
            (
                json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 500, "swappiness": 5}}),
                &["memory.swap.max=500", "memory.max=1000", "memory.low=500"],
            ),
            (json!({"memory": {"limit": -1}}), &["memory.swap.max=max", "memory.max=max"]),
            (json!({"memory": {"limit": 9, "swap": -1}}), &["memory.swap.max=max", "memory.max=9"]),
            (json!({"memory": {"limit": 9, "swap": 9}}), &["memory.swap.max=0", "memory.max=9"]),
            (
                json!({"cpu": {"quota": 50, "period": 20, "shares": 1024}}),
                &["cpu.weight=39", "cpu.max=50 20"],
            ),
            (json!({"cpu": {"quota": -1}}), &["cpu.max=max 100000"]),
            (json!({"cpu": {"quota": 0, "period": 7, "shares": 0}}), &["cpu.max=max 7"]),
            (json!({"cpu": {"idle": 1, "shares": 9, "burst": 5}}), &["cpu.idle=1", "cpu.max.burst=5"]),
            (json!({"cpu": {"cpus": "5-7", "mems": "1"}}), &[]),
            (json!({"pids": {"limit": 0}}), &["pids.max=0"]),
            (json!({"pids": {"limit": -1}}), &["pids.max=max"]),
            (
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4}]}),
                &["hugetlb.2MB.max=4", "hugetlb.2MB.rsvd.max=4"],
            ),
        ];
        for (resources, expected) in cases {
            assert_eq!(translated(resources.clone()).unwrap(), expected, "{resources}");
        }
        let unified =
            json!({"unified": {"pids.max": "5", "memory.high": "max", "cpuset.cpus": "9", "io.weight": "7"}});
        assert_eq!(translated(unified).unwrap(), ["memory.high=max", "pids.max=5"]);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (resources, words) in [
            (json!({"memory": {"limit": -5}}), "memory.limit: -5"),
            (json!({"memory": {"reservation": -5}}), "memory.reservation: -5"),
            (json!({"memory": {"swap": 5}}), "swap limit without memory limit"),
            (json!({"memory": {"limit": 6, "swap": 5}}), "memory+swap limit should be >= memory limit"),
            (json!({"hugepageLimits": [{"pageSize": "../x", "limit": 4}]}), "\"../x\" is not a page size"),
            (json!({"unified": {"a/../pids.max": "1"}}), "\"a/../pids.max\" is not the name"),
        ] {
            let text = translated(resources).unwrap_err().to_string();
            assert!(text.starts_with("linux.resources.") && text.contains(words), "{text}");
        }
    }
}
