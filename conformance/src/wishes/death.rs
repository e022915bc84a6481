//! Things that die, or hang, and must not take anything else along or leave anything behind.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::leaks::processes;
use crate::process::{self, Running, eventually, parent};
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "death/of-the-containers-pid-ends-the-vm-and-its-execs", pid_killed),
        wish(At::Both, "death/of-the-vmm-is-told-within-a-second", vmm_killed),
        wish(
            At::Both,
            "death/of-the-vmm-makes-run-say-so-with-the-consoles-last-words",
            vmm_killed_under_run,
        ),
        wish(At::Both, "death/a-hung-vmm-can-be-deleted", |world| hung(world, "delete")),
        wish(At::Both, "death/a-hung-vmm-can-be-killed", |world| hung(world, "kill")),
        wish(At::Local, "death/a-hung-vmm-keeps-state-and-list-answering", hung_state),
        wish(At::Local, "death/a-hung-vmm-makes-start-and-exec-fail-in-time", hung_exec),
        wish(At::Local, "death/a-hung-containers-pid-can-be-deleted", hung_pid),
        wish(At::Local, "death/of-the-pid-under-run-ends-run", pid_killed_under_run),
        wish(At::Local, "death/of-the-vmm-before-start", vmm_killed_created),
        wish(At::Local, "death/of-the-host-leaves-what-delete-forgets", host_died),
    ]
}

/// A state directory that outlives the host's boot names pids and cgroups that are others' by now.
fn host_died(world: &'static World) -> Result<()> {
    let container = Container::running(world, &Config::idle())?;
    let other = world.make_dir("after")?;
    let (from, to) = (world.root.join(&container.id), other.join(&container.id));
    fs::create_dir(&to)?;
    for entry in fs::read_dir(&from)?.flatten().filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    let path = to.join("state.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    ensure!(record["boot"].as_str().is_some_and(|boot| boot.len() == 36), "{record}");
    record["boot"] = "another".into();
    fs::write(&path, record.to_string())?;
    let call = |args: &[&str]| world.call_at(&other, args)?.code(0);
    ensure!(call(&["state", &container.id])?.text().contains("\"status\": \"stopped\""), "it claims to run");
    call(&["delete", "--force", &container.id])?;
    ensure!(!to.exists(), "its directory is left");
    container.says("echo alive", "alive")
}

/// The VMM's pid: the container's child by that name.
pub fn vmm(world: &World, container: i32) -> Result<i32> {
    let all = processes(world);
    let found =
        all.iter().find(|(pid, name)| name.contains("a3s-box-vmm") && parent(*pid) == Some(container));
    found.map(|(pid, _)| *pid).with_context(|| format!("no a3s-box-vmm below {container}: {all:?}"))
}

/// Everything below a process.
pub fn family(world: &World, root: i32) -> Vec<i32> {
    let below = |mut pid: i32| {
        while let Some(above) = parent(pid) {
            if above == root {
                return true;
            }
            pid = above;
        }
        false
    };
    processes(world).into_iter().map(|(pid, _)| pid).filter(|pid| below(*pid)).collect()
}

fn sleeper(container: &Container) -> Result<Running> {
    let mut exec = container.spawn(&["sh", "-c", "echo up; exec sleep 1000"])?;
    exec.read_until("up")?;
    Ok(exec)
}

fn pid_killed(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    let execs = [sleeper(&container)?, sleeper(&container)?];
    let below = family(world, container.pid);
    ensure!(below.contains(&vmm(world, container.pid)?), "{below:?}");
    process::signal(container.pid, Signal::KILL)?;
    same(&container.wait_for(Duration::from_secs(3))?, &137)?;
    for pid in below {
        process::wait_gone(pid, Duration::from_secs(3))?;
    }
    for exec in execs {
        let output = exec.finish()?.within(Duration::from_secs(15))?;
        ensure!(output.code != 0, "exec ended with 0");
    }
    container.expect_status("stopped")?;
    container.world.refused(&["kill", &container.id, "KILL"], &["container not running"])?;
    container.exec(&["true"])?.code(255)?.one_line(&["cannot exec in a stopped container"])?;
    container.delete(&[])
}

fn vmm_killed(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    let exec = sleeper(&container)?;
    let vmm = vmm(world, container.pid)?;
    process::signal(vmm, Signal::KILL)?;
    let status = container.wait_for(Duration::from_millis(1500))?;
    ensure!(status != 0, "the container's pid ended with 0");
    let output = exec.finish()?;
    ensure!(output.code != 0, "exec ended with 0");
    let output = output.one_line(&["VM"])?;
    ensure!(!output.stderr.contains('\u{fffd}'), "{:?}", output.stderr);
    container.expect_status("stopped")?;
    container.delete(&[])
}

fn vmm_killed_under_run(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("echo up; exec sleep 1000"))?;
    let log = bundle.join("log");
    let args = [
        "--log",
        &log.to_string_lossy(),
        "--log-format",
        "json",
        "run",
        "--bundle",
        &bundle.to_string_lossy(),
        &id,
    ];
    let mut run = world.start(&args)?;
    run.read_until("up")?;
    let state: serde_json::Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
    let pid = state["pid"].as_i64().context("no pid")? as i32;
    process::signal(vmm(world, pid)?, Signal::KILL)?;
    let output = run.finish()?;
    ensure!(output.code != 0, "run ended with 0");
    let output = output.one_line(&["the VM died", "console"])?;
    let lines = fs::read_to_string(&log)?;
    same(&lines.lines().filter(|line| line.contains("\"error\"")).count(), &1)?;
    ensure!(lines.contains("the VM died"), "{lines} does not hold {:?}", output.stderr);
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

/// A container whose VMM is stopped, as one that hangs; the guest is thawed by nothing but its death.
fn hang(world: &'static World) -> Result<Container> {
    let container = Container::running(world, &Config::idle())?;
    let vmm = vmm(world, container.pid)?;
    // Locally the guest is a child of its own, so it has to be stopped too.
    for pid in family(world, vmm).into_iter().chain([vmm]) {
        process::signal(pid, Signal::STOP)?;
    }
    Ok(container)
}

fn hung(world: &'static World, verb: &str) -> Result<()> {
    let mut container = hang(world)?;
    if verb == "kill" {
        world.ok(&["kill", &container.id, "KILL"])?.within(Duration::from_millis(3500))?;
        same(&container.wait_for(Duration::from_secs(2))?, &137)?;
        return container.delete(&[]);
    }
    world.ok(&["delete", "--force", &container.id])?.within(Duration::from_millis(3500))?;
    same(&container.wait_for(Duration::from_millis(100))?, &137)
}

fn hung_state(world: &'static World) -> Result<()> {
    let container = hang(world)?;
    let quick = Duration::from_secs(1);
    world.ok(&["state", &container.id])?.within(quick)?;
    world.ok(&["list"])?.within(quick)?;
    world.ok(&["ps", "--format", "json", &container.id])?.within(quick)?;
    container.expect_status("running")
}

fn hung_exec(world: &'static World) -> Result<()> {
    let container = hang(world)?;
    let id = container.id.as_str();
    let calls = [(&["exec", id, "true"][..], 255), (&["kill", id, "TERM"], 1), (&["ps", id], 1)];
    // All at once: each may wait its ten seconds.
    let all: Vec<_> = calls.iter().map(|(args, _)| world.start(args)).collect::<Result<_>>()?;
    for (one, (_, code)) in all.into_iter().zip(calls) {
        one.finish()?.code(code)?.one_line(&[])?.within(Duration::from_secs(15))?;
    }
    Ok(())
}

fn hung_pid(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    process::signal(container.pid, Signal::STOP)?;
    container.expect_status("running")?;
    world.ok(&["delete", "--force", &container.id])?.within(Duration::from_millis(3500))?;
    same(&container.wait_for(Duration::from_millis(100))?, &137)
}

fn pid_killed_under_run(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("echo up; exec sleep 1000"))?;
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("up")?;
    let state: serde_json::Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
    process::signal(state["pid"].as_i64().context("no pid")? as i32, Signal::KILL)?;
    run.finish()?.code(137)?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn vmm_killed_created(world: &'static World) -> Result<()> {
    let mut container = Container::create(world, &Config::idle())?;
    process::signal(vmm(world, container.pid)?, Signal::KILL)?;
    let status = container.wait_for(Duration::from_millis(1500))?;
    ensure!(status != 0, "the container's pid ended with 0");
    eventually("stopped", Duration::from_secs(1), || Ok(container.status()? == "stopped"))?;
    world.refused(&["start", &container.id], &["cannot start a container that has stopped"])?;
    container.delete(&[])
}
