//! Memory that runs out: in the guest, told to engines, and on the host.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::run::same;
use super::update::host;
use super::users::{shift, with_users};
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::world::World;

const MIB: u64 = 1 << 20;
/// A process that takes more and more memory.
const HOARD: &str = "awk 'BEGIN { s = \"x\"; while (1) s = s s }'";

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Vm, "oom/a-first-process-that-is-killed-is-told-to-engines", of_init),
        wish(At::Vm, "oom/kills-of-others-are-counted-and-the-vm-goes-on", of_others),
        wish(At::Vm, "oom/a-high-score-does-not-put-the-vm-in-the-way", with_score),
        wish(At::Vm, "oom/is-told-from-a-user-namespace", in_user_namespace),
        wish(At::Vm, "oom/without-a-limit-the-guests-end-is-told", without_limit),
        wish(At::Vm, "oom/without-a-cgroup-the-callers-own-is-left-alone", without_cgroup),
        wish(At::Vm, "oom/a-vmm-that-the-hosts-killer-takes-ends-as-137", of_vmm),
    ]
}

fn limited() -> Config {
    let memory = json!({ "memory": { "limit": 48 * MIB } });
    Config::idle().without("/annotations").set("/linux/resources", memory)
}

/// How often the kernel has killed in the container's host cgroup.
fn kills(container: &Container) -> Result<u64> {
    kills_at(&events_of(container)?)
}

fn kills_at(path: &str) -> Result<u64> {
    let events = fs::read_to_string(path)?;
    let line = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    Ok(line.context("oom_kill")?.parse()?)
}

fn events_of(container: &Container) -> Result<String> {
    let table = fs::read_to_string(format!("/proc/{}/cgroup", container.pid))?;
    let path = table.lines().find_map(|line| line.strip_prefix("0::")).context("cgroup v2")?;
    Ok(format!("/sys/fs/cgroup{path}/memory.events"))
}

fn is_marked(container: &Container) -> bool {
    container.bundle.join("oom").exists()
}

fn of_init(world: &'static World) -> Result<()> {
    let config = limited().set("/process/args", json!(["sh", "-c", &format!("echo up; exec {HOARD}")]));
    let mut container = Container::create(world, &config)?;
    let events = events_of(&container)?;
    same(&kills_at(&events)?, &0)?;
    ensure!(!is_marked(&container), "the file oom is there before anything ran");
    container.start()?;
    same(&container.wait()?, &137)?;
    same(&container.output(), &"up\n".into())?;
    same(&kills_at(&events)?, &1)?;
    ensure!(is_marked(&container), "there is no file oom in the bundle");
    container.expect_status("stopped")?;
    container.delete(&[])
}

fn of_others(world: &'static World) -> Result<()> {
    let container = Container::running(world, &limited())?;
    let before = (host(&container, "memory.max")?, host(&container, "memory.swap.max").ok());
    let pids = container.world.ok(&["ps", "--format", "json", &container.id])?.text();
    let pids: Vec<i32> = serde_json::from_str(&pids)?;
    let scores = || -> Result<Vec<String>> {
        pids.iter().map(|pid| Ok(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?)).collect()
    };
    let held = scores()?;
    for round in 1..=world.by_level(3, 3, 10) {
        container.exec(&["sh", "-c", HOARD])?.code(137)?;
        let told = || Ok(kills(&container)? == round);
        process::eventually("the kill is counted", Duration::from_secs(20), told)?;
    }
    ensure!(is_marked(&container), "there is no file oom in the bundle");
    process::eventually("the limit is back", Duration::from_secs(10), || {
        Ok((host(&container, "memory.max")?, host(&container, "memory.swap.max").ok()) == before)
    })?;
    same(&scores()?, &held)?;
    let begin = Instant::now();
    container.says("echo well", "well")?;
    ensure!(begin.elapsed() < Duration::from_secs(30), "it answered after {:?}", begin.elapsed());
    container.expect_status("running")
}

/// As Kubernetes gives one to what may burst.
fn with_score(world: &'static World) -> Result<()> {
    for score in [999, 1000] {
        let container = Container::running(world, &limited().set("/process/oomScoreAdj", json!(score)))?;
        container.exec(&["sh", "-c", HOARD])?.code(137)?;
        process::eventually("the kill is counted", Duration::from_secs(20), || Ok(kills(&container)? == 1))?;
        container.says("echo well", "well")?;
        same(&fs::read_to_string(format!("/proc/{}/oom_score_adj", container.pid))?, &format!("{score}\n"))?;
    }
    Ok(())
}

fn in_user_namespace(world: &'static World) -> Result<()> {
    let bundle = world.own_bundle(&with_users(limited()))?;
    shift(&bundle.join("rootfs"))?;
    let container = Container::of_bundle(world, bundle)?;
    container.start()?;
    container.exec(&["sh", "-c", HOARD])?.code(137)?;
    process::eventually("the kill is counted", Duration::from_secs(20), || Ok(kills(&container)? == 1))?;
    ensure!(is_marked(&container), "there is no file oom in the bundle");
    container.says("echo well", "well")
}

/// The guest's kernel kills because the VM has no more.
fn without_limit(world: &'static World) -> Result<()> {
    let config = Config::idle().set("/annotations/a3s.box~1memory-mib", json!("128"));
    let container = Container::running(world, &config)?;
    container.exec(&["sh", "-c", HOARD])?.code(137)?;
    process::eventually("the kill is counted", Duration::from_secs(20), || Ok(kills(&container)? == 1))?;
    container.says("echo well", "well")
}

fn without_cgroup(world: &'static World) -> Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_string();
    let container = Container::flagged(world, &["--cgroup-manager", "disabled"], &limited())?;
    container.exec(&["sh", "-c", HOARD])?.code(137)?;
    process::eventually("the file is there", Duration::from_secs(20), || Ok(is_marked(&container)))?;
    container.says("echo well", "well")?;
    // The root's cgroup has no such file, and no limit.
    match fs::read_to_string(format!("/sys/fs/cgroup{own}/memory.events")) {
        Ok(events) => ensure!(events.contains("oom_kill 0"), "{own}: {events}"),
        Err(_) => same(&own, &"/".to_string())?,
    }
    Ok(())
}

fn of_vmm(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &limited())?;
    let events = events_of(&container)?;
    fs::write(events.replace("memory.events", "memory.max"), (8 * MIB).to_string())?;
    same(&container.wait_for(Duration::from_secs(20))?, &137)?;
    ensure!(kills_at(&events)? >= 1, "the host's kernel did not kill");
    container.expect_status("stopped")
}
