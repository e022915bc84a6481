//! Memory as the host sees it: given as it is used, taken back when it is not.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::death::vmm;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::eventually;
use crate::world::World;

/// What the guest uses for a while, in MiB: far more than an idle VM's own swing, and no more than that, for each page of it is an
/// exit that an emulated processor takes a quarter of a millisecond or more for.
const USED: u64 = 120;

pub fn cases() -> Vec<Case> {
    vec![wish(At::Vm, "memory/what-the-guest-frees-goes-back-to-the-host", given_back)]
}

/// MiB of the host's memory in a process.
fn resident(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
}

fn given_back(world: &'static World) -> Result<()> {
    let big = json!({ "destination": "/big", "type": "tmpfs", "options": ["size=400m"] });
    let config = Config::idle().set("/annotations/a3s.box~1memory-mib", json!("512")).set("/mounts/-", big);
    let container = Container::running(world, &config)?;
    let vmm = vmm(world, container.pid)?;
    let idle = resident(vmm)?;
    ensure!(idle < 200, "{idle} MiB of an idle VM with 512 MiB");
    for round in 1..=world.by_level(1, 1, 2) {
        container.sh(&format!("head -c {USED}m /dev/zero >/big/file"))?;
        let used = resident(vmm)?;
        ensure!(used >= USED, "{used} MiB, of which the guest uses {USED}");
        container.sh("rm /big/file")?;
        let mut left = used;
        let fell = eventually("the memory is back", Duration::from_secs(60), || {
            left = resident(vmm)?;
            Ok(left < idle + USED / 5)
        });
        fell.with_context(|| format!("round {round}: {idle} MiB before, {used} in use, {left} left"))?;
    }
    Ok(())
}
