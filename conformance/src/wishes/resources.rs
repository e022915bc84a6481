//! `linux.resources`: the VM's size, and the exact limits inside it.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::world::World;

const MIB: u64 = 1 << 20;

/// Wishes that share a container with limits and without annotations.
const LIMITED: &[Wish<Container>] = &[
    ("resources/vcpus-are-the-quota-rounded-up", |container| container.says("nproc", "1")),
    ("resources/memory-is-the-limit-and-room-for-the-guest", |container| {
        let kib: u64 = container.sh("grep MemTotal /proc/meminfo | tr -s ' ' | cut -d ' ' -f 2")?.parse()?;
        ensure!((96 * 1024..320 * 1024).contains(&kib), "{kib} KiB for a limit of 128 MiB");
        container.says("cat /sys/fs/cgroup/memory.max", &(128 * MIB).to_string())
    }),
    ("resources/cpu-and-pids-hold-in-the-guest", |container| {
        let files = "cd /sys/fs/cgroup; cat cpu.max; cat cpu.weight; cat pids.max";
        container.says(files, "90000 100000\n39\n30")
    }),
    ("resources/too-much-memory-kills-the-taker-and-not-the-container", |container| {
        // Twice as much each time: it is stopped by the limit, long before the kernel could refuse to promise more.
        let taker = "awk 'BEGIN { s = \"x\"; while (1) s = s s }'; echo $?";
        same(&container.exec(&["sh", "-c", taker])?.text(), &"137\n".into())?;
        container.expect_status("running")?;
        container.says("echo well", "well")
    }),
    ("resources/too-many-processes-are-refused-and-it-lives-on", |container| {
        let bomb = "i=0; while [ $i -lt 60 ]; do sleep 30 & i=$((i+1)); done; wait";
        let output = container.exec(&["sh", "-c", bomb])?;
        ensure!(output.code != 0 && output.stderr.contains("fork"), "60 processes fit: {:?}", output.stderr);
        container.says("echo well", "well")
    }),
];

/// Every case of this subject.
pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Vm, limited, LIMITED),
        wish(At::Vm, "resources/defaults-are-two-vcpus-and-two-gib", defaults),
        wish(At::Local, "resources/no-limit-in-every-spelling", unlimited),
        wish(At::Vm, "resources/thousands-of-directories-listed-twice", directories),
    ]
}

fn limited(world: &'static World) -> Result<Container> {
    let resources = json!({
        "memory": { "limit": 128 * MIB },
        "pids": { "limit": 30 },
        "cpu": { "quota": 90_000, "period": 100_000, "shares": 1024 },
    });
    Container::running(world, &Config::idle().without("/annotations").set("/linux/resources", resources))
}

fn defaults(world: &'static World) -> Result<()> {
    let script = "nproc; grep MemTotal /proc/meminfo | tr -s ' ' | cut -d ' ' -f 2";
    let unlimited = json!({ "memory": { "limit": -1 }, "pids": { "limit": -1 }, "cpu": { "quota": -1 } });
    let config = Config::sh(script).without("/annotations").set("/linux/resources", unlimited);
    let said = world.run_config(&config)?;
    let lines: Vec<&str> = said.lines().collect();
    same(&lines[0], &"2")?;
    let kib: u64 = lines[1].parse()?;
    ensure!((1_800_000..=2_097_152).contains(&kib), "{kib} KiB");
    Ok(())
}

fn unlimited(world: &'static World) -> Result<()> {
    for resources in [
        json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1 } }),
        json!({ "memory": { "limit": 0 }, "pids": { "limit": -1 }, "cpu": { "quota": 0, "shares": 0 } }),
        json!({ "memory": {}, "cpu": {} }),
        json!({}),
    ] {
        let config = Config::sh("echo ran").set("/linux/resources", resources);
        same(&world.run_config(&config)?, &"ran\n".into())?;
    }
    Ok(())
}

fn directories(world: &'static World) -> Result<()> {
    // Each directory that is listed costs the VMM a descriptor.
    let count = world.by_level(100, 2_000, 20_000);
    let host = world.make_dir("many")?;
    for number in 0..count {
        fs::create_dir(host.join(number.to_string()))?;
    }
    let container = Container::running(world, &Config::idle().bind(&host, "/many", &["ro"]))?;
    for _ in 0..2 {
        container.says("ls -R /many | grep -c '^/many/'", &count.to_string())?;
    }
    drop(container);
    crate::world::remove_tree(&host)
}
