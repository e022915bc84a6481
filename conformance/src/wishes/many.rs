//! Many at once: containers, and programs in one of them.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::exec;
use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::leaks::Census;
use crate::process::{self, Running};
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "many/containers-at-once-live-and-go", containers),
        wish(At::Both, "many/programs-at-once-keep-their-streams-and-statuses", programs),
    ]
}

/// As many as an emulated machine's memory holds, where they are VMs.
fn containers(world: &'static World) -> Result<()> {
    let count = world.by_level(50, 4, if world.is_vm() { 8 } else { 50 });
    let before = Census::take(world);
    let mut all = Vec::new();
    let mut creates = Vec::new();
    for number in 0..count {
        // A signal that it handles, and a status of its own.
        let script = format!("trap 'exit {number}' TERM; while :; do sleep 0.1; done");
        let bundle = world.bundle(&Config::sh(&script))?;
        let id = world.name("many");
        let mut create = create_command(world, &bundle, &id);
        create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        creates.push(process::start(create, false, world.patience() * 2)?);
        all.push((id, bundle.join("pid"), number));
    }
    ended(creates).context("create")?;
    let verb = |args: &[&str]| -> Result<()> {
        let commands = all.iter().map(|(id, ..)| world.start(&[&[args[0], id], &args[1..]].concat()));
        ended(commands.collect::<Result<_>>()?).context(args[0].to_string())
    };
    for (id, ..) in &all {
        ensure!(world.ok(&["state", id])?.text().contains("\"created\""), "{id} is not created");
    }
    verb(&["start"])?;
    // Each script's trap is set once its loop runs.
    let looks = all.iter().map(|(id, ..)| {
        world.start(&["exec", id, "sh", "-c", "until ps -o args | grep -q '^sleep'; do sleep 0.05; done"])
    });
    ended(looks.collect::<Result<_>>()?).context("exec")?;
    verb(&["kill", "TERM"])?;
    for (id, pid_file, number) in &all {
        let pid = fs::read_to_string(pid_file)?.parse()?;
        same(&process::wait_child(pid, world.patience())?, number).with_context(|| id.clone())?;
    }
    verb(&["delete"])?;
    let left = before.left_over(world);
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn ended(all: Vec<Running>) -> Result<()> {
    all.into_iter().try_for_each(|one| one.finish()?.code(0)?.quiet().map(drop))
}

fn programs(world: &'static World) -> Result<()> {
    let container = Container::running(world, &Config::idle())?;
    exec::parallel(&container, world.by_level(100, 30, 100))?;
    let left = container.sh("ps -o pid | tail -n +2 | wc -l")?;
    ensure!(left.parse::<u32>().is_ok_and(|left| left < 8), "{left} processes are left inside");
    Ok(())
}
