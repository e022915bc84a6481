//! `update` and `events`: limits that change, and what a container uses, in the guest and on the host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Output};
use crate::report::NotHere;
use crate::world::World;

const MIB: u64 = 1 << 20;
/// What the VM of a container with a limit of 128 MiB has, and beside it monitor and VMM on the host.
const HOST_MEMORY: u64 = (128 + 2 + 64 + 64) * MIB;

/// Wishes that share a container with limits.
const WISHES: &[Wish<Container>] = &[
    ("host/limits-are-the-containers-and-the-overhead", |container| {
        same(&host(container, "memory.max")?, &HOST_MEMORY.to_string())?;
        same(&host(container, "pids.max")?, &"4096".into())?;
        same(&host(container, "cpu.max")?, &"90000 100000".into())?;
        same(&host(container, "cpu.weight")?, &"39".into())?;
        same(&host(container, "cpuset.cpus")?, &"0".into())
    }),
    ("update/memory-goes-down-and-up-again", |container| {
        update(container, &["--memory", "64m"])?;
        container.says("cat /sys/fs/cgroup/memory.max", &(64 * MIB).to_string())?;
        let document =
            json!({ "memory": { "limit": 128 * MIB }, "pids": { "limit": 0 }, "unknown": { "field": 1 } });
        by_stdin(container, &["--resources=-"], &document)?.code(0)?.quiet()?;
        container.says("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max", &format!("{}\n30", 128 * MIB))
    }),
    ("update/takes-resources-in-every-form", |container| {
        let file = container.bundle.join("resources.json").to_string_lossy().into_owned();
        let by_file = format!("--resources={file}");
        let forms: [&[&str]; 5] =
            [&["--resources=-"], &["--resources", "-"], &["-r", "-"], &[&by_file], &["--resources", &file]];
        for (limit, flags) in (41..).zip(forms) {
            let document = json!({ "pids": { "limit": limit }, "unknown": { "field": 1 } });
            fs::write(&file, document.to_string())?;
            by_stdin(container, flags, &document)?.code(0)?.quiet()?;
            container.says("cat /sys/fs/cgroup/pids.max", &limit.to_string())?;
        }
        update(container, &["--pids-limit", "30"])
    }),
    ("update/more-memory-than-the-vm-has-is-refused", |container| {
        let words = ["linux.resources.memory.limit 1073741824", "194 MiB", "cannot grow"];
        container.world.refused(&["update", "--memory", "1g", &container.id], &words)?;
        container.says("cat /sys/fs/cgroup/memory.max", &(128 * MIB).to_string())
    }),
    ("update/unlimited-is-all-of-the-vm", |container| {
        update(container, &["--memory=-1", "--pids-limit", "-1"])?;
        container.says("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max", "max\nmax")?;
        same(&host(container, "memory.max")?, &HOST_MEMORY.to_string())?;
        update(container, &["--memory", "128m", "--pids-limit", "40"])?;
        container.says("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max", &format!("{}\n40", 128 * MIB))
    }),
    ("update/cpu-changes-in-guest-and-host", |container| {
        update(container, &["--cpu-quota", "50000", "--cpu-share", "512"])?;
        container.says("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu.weight", "50000 100000\n20")?;
        same(&host(container, "cpu.max")?, &"50000 100000".into())?;
        same(&host(container, "cpu.weight")?, &"20".into())?;
        update(container, &["--cpu-period", "200000"])?;
        container.says("cat /sys/fs/cgroup/cpu.max", "50000 200000")?;
        let words = ["linux.resources.cpu.quota 900000", "1 vCPUs", "cannot grow"];
        container.world.refused(&["update", "--cpu-quota", "900000", &container.id], &words).map(drop)
    }),
    ("update/a-refusal-changes-nothing", |container| {
        let before = container.sh("cat /sys/fs/cgroup/pids.max")?;
        let args = ["update", "--pids-limit", "17", "--cpuset-cpus", "4000", &container.id];
        container.world.refused(&args, &["cpuset.cpus", "4000"])?;
        container.says("cat /sys/fs/cgroup/pids.max", &before)?;
        same(&host(container, "cpuset.cpus")?, &"0".into())?;
        by_stdin(
            container,
            &["-r=-"],
            &json!({ "unified": { "pids.max": "17", "memory.high": "nonsense" } }),
        )?
        .code(1)?
        .one_line(&["memory.high", "nonsense"])?;
        container.says("cat /sys/fs/cgroup/pids.max", &before)
    }),
    ("update/a-file-and-cpusets", |container| {
        let file = container.bundle.join("resources.json");
        // All of the host's, which may be one alone.
        let all = fs::read_to_string("/sys/devices/system/cpu/online")?.trim().to_owned();
        fs::write(&file, json!({ "cpu": { "cpus": all }, "pids": { "limit": 23 } }).to_string())?;
        update(container, &["--resources", &file.to_string_lossy()])?;
        same(&host(container, "cpuset.cpus")?, &all)?;
        container.says("cat /sys/fs/cgroup/pids.max", "23")
    }),
    ("update/a-paused-container-is-refused", |container| {
        container.world.ok(&["pause", &container.id])?;
        let refused = container.world.refused(&["update", "--pids-limit", "5", &container.id], &["paused"]);
        container.world.ok(&["resume", &container.id])?;
        refused.map(drop)
    }),
    ("events/stats-are-the-guests", |container| {
        let line = container.world.ok(&["events", "--stats", &container.id])?.text();
        let event: Value = serde_json::from_str(&line)?;
        same(&event["type"], &"stats".into())?;
        same(&event["id"], &container.id.clone().into())?;
        let data = &event["data"];
        same(&data["memory"]["usage"]["limit"], &(128 * MIB).into())?;
        let used = data["memory"]["usage"]["usage"].as_u64().context("memory usage")?;
        // The guest's kernel alone is larger.
        ensure!((1..16 * MIB).contains(&used), "{used} bytes for a sleeping shell");
        same(&data["pids"], &json!({ "current": 2, "limit": 23 }))?;
        let total = data["cpu"]["usage"]["total"].as_u64().context("cpu usage")?;
        ensure!(total > 1_000_000, "{total} ns of CPU time");
        ensure!(data["memory"]["raw"]["anon"].is_u64() && data["hugetlb"].is_object(), "{data}");
        Ok(())
    }),
    ("events/a-stream-with-oom-until-the-end", |container| {
        let mut stream = container.world.start(&["events", "--interval", "700ms", &container.id])?;
        stream.read_until("\"type\":\"stats\"")?;
        container.exec(&["sh", "-c", "awk 'BEGIN { s = \"x\"; while (1) s = s s }'"])?;
        stream.read_until("\"type\":\"oom\"")?;
        container.kill("KILL")?;
        stream.finish()?.code(0).map(drop)
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Vm, limited, WISHES),
        wish(At::Local, "host/cpusets-and-bounds-hold-in-every-hierarchy", in_every_hierarchy),
        wish(At::Local, "host/a-cpu-that-is-not-there-is-named", no_such_cpu),
        wish(At::Vm, "host/limits-of-disks-are-the-hosts", disk),
        wish(At::Local, "update/what-it-cannot-do-is-named", refusals),
        wish(At::Local, "events/mistakes-are-named", mistakes),
    ]
}

fn limited(world: &'static World) -> Result<Container> {
    let resources = json!({
        "memory": { "limit": 128 * MIB },
        "pids": { "limit": 30 },
        "cpu": { "quota": 90_000, "period": 100_000, "shares": 1024, "cpus": "0" },
    });
    Container::running(world, &Config::idle().without("/annotations").set("/linux/resources", resources))
}

fn update(container: &Container, flags: &[&str]) -> Result<()> {
    container.world.ok(&[&["update"], flags, &[container.id.as_str()]].concat()).map(drop)
}

fn by_stdin(container: &Container, flags: &[&str], document: &Value) -> Result<Output> {
    let command = container.world.command(&[&["update"], flags, &[container.id.as_str()]].concat());
    process::run(command, document.to_string().as_bytes(), container.world.patience())
}

/// A file of the container's host cgroup, by its name in cgroup v2.
pub fn host(container: &Container, file: &str) -> Result<String> {
    let table = fs::read_to_string(format!("/proc/{}/cgroup", container.pid))?;
    let v1 = |controller: &str, file: &str| {
        let holds = |line: &&str| {
            line.split(':').nth(1).is_some_and(|list| list.split(',').any(|one| one == controller))
        };
        let path = table.lines().find(holds)?.splitn(3, ':').nth(2)?;
        fs::read_to_string(format!("/sys/fs/cgroup/{controller}{path}/{file}")).ok()
    };
    let unified = table.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let text = fs::read_to_string(format!("/sys/fs/cgroup{unified}/{file}")).ok().or_else(|| match file {
        "memory.max" => v1("memory", "memory.limit_in_bytes"),
        file => v1(file.split('.').next()?, file),
    });
    Ok(text.with_context(|| format!("no {file} on the host"))?.trim().to_string())
}

fn in_every_hierarchy(world: &'static World) -> Result<()> {
    let resources = json!({ "cpu": { "cpus": "0", "mems": "0" } });
    let container = Container::running(world, &Config::idle().set("/linux/resources", resources))?;
    same(&host(&container, "cpuset.cpus")?, &"0".into())?;
    same(&host(&container, "cpuset.mems")?, &"0".into())?;
    same(&host(&container, "pids.max")?, &"4096".into())?;
    same(&host(&container, "memory.max")?, &((256 + 64) * MIB).to_string())?;
    update(&container, &["--cpuset-cpus", "0-1"])?;
    same(&host(&container, "cpuset.cpus")?, &"0-1".into())
}

/// The guest has no disk: its files come through the VMM, which the limit holds back.
fn disk(world: &'static World) -> Result<()> {
    let disks = fs::read_dir("/sys/block")?.flatten().map(|entry| entry.path());
    let disk = disks
        .filter(|path| path.join("device").exists())
        .find_map(|path| fs::read_to_string(path.join("dev")).ok());
    let disk = disk.context(NotHere("this host has no disk"))?.trim().to_string();
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    ensure!(controllers.contains("io"), NotHere("this host has no cgroup v2 controller for disks"));
    let (major, minor) = disk.split_once(':').context("major:minor")?;
    let rate = |rate: u64| json!([{ "major": major.parse::<u64>().ok(), "minor": minor.parse::<u64>().ok(), "rate": rate }]);
    let limits = json!({ "throttleReadBpsDevice": rate(1 << 20), "throttleWriteIOPSDevice": rate(100) });
    let container = Container::running(world, &Config::idle().set("/linux/resources/blockIO", limits))?;
    same(&host(&container, "io.max")?, &format!("{disk} rbps=1048576 wbps=max riops=max wiops=100"))
}

fn no_such_cpu(world: &'static World) -> Result<()> {
    let bundle =
        world.bundle(&Config::idle().set("/linux/resources", json!({ "cpu": { "cpus": "4000" } })))?;
    let id = world.name("c");
    world.refused(&["create", "-b", &bundle.to_string_lossy(), &id], &["cpuset.cpus", "4000"])?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn refusals(world: &'static World) -> Result<()> {
    let container = Container::running(world, &Config::idle())?;
    let id = container.id.as_str();
    for (args, words) in [
        (&["--l3-cache-schema", "L3:0=f"][..], ["--l3-cache-schema L3:0=f", "not supported"]),
        (&["--mem-bw-schema", "MB:0=20"], ["--mem-bw-schema MB:0=20", "not supported"]),
        (&["--memory", "lots"], ["--memory \"lots\"", "number of bytes"]),
        (&["--resources", "/no/such/file"], ["--resources /no/such/file", "no such file"]),
        (&["--memory", "8g"], ["linux.resources.memory.limit 8589934592", "cannot grow"]),
    ] {
        world.refused(&[&["update"], args, &[id]].concat(), &words)?;
    }
    by_stdin(&container, &["--resources=-"], &json!([]))?
        .code(1)?
        .one_line(&["--resources -", "not an object"])?;
    let wrong = json!({ "pids": { "limit": "many" } });
    by_stdin(&container, &["--resources=-"], &wrong)?.code(1)?.one_line(&["--resources -", "many"])?;
    container.kill("KILL")?;
    let mut container = container;
    same(&container.wait_for(Duration::from_secs(5))?, &137)?;
    world.refused(&["update", "--pids-limit", "5", &container.id], &["container not running"])?;
    world.refused(&["update", "--pids-limit", "5", "nobody"], &["does not exist"]).map(drop)
}

fn mistakes(world: &'static World) -> Result<()> {
    world.refused(&["events", "--stats", "nobody"], &["does not exist"])?;
    for interval in ["0", "-1s", "soon"] {
        let flag = format!("--interval={interval}");
        world.refused(&["events", &flag, "nobody"], &["--interval", interval])?;
    }
    Ok(())
}
