//! `pause` and `resume`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{eventually, ticks};
use crate::world::World;

/// Wishes that share a container.
const WISHES: &[Wish<Container>] = &[
    ("pause/state-is-paused-and-nothing-moves", |container| {
        pause(container)?;
        container.expect_status("paused")?;
        same(&container.state()?["pid"], &container.pid.into())?;
        let before = container.output().len();
        std::thread::sleep(Duration::from_millis(400));
        same(&container.output().len(), &before)
    }),
    ("pause/exec-is-refused", |container| {
        pause(container)?;
        let words = "cannot exec in a paused container (use --ignore-paused to override)";
        container.exec(&["true"])?.code(255)?.one_line(&[words])?.within(Duration::from_secs(3)).map(drop)
    }),
    ("pause/a-second-pause-a-start-and-a-delete-are-refused", |container| {
        pause(container)?;
        let (world, id) = (container.world, &container.id);
        world.refused(&["pause", id], &["paused"])?;
        world.refused(&["start", id], &["cannot start"])?;
        world.refused(&["delete", id], &["that is not stopped: paused"])?;
        container.expect_status("paused")
    }),
    ("pause/list-and-ps-answer", |container| {
        pause(container)?;
        let (world, id) = (container.world, &container.id);
        let pids = world.ok(&["ps", "--format", "json", id])?.within(Duration::from_secs(3))?.text();
        ensure!(pids.contains(&container.pid.to_string()), "{pids}");
        let listed = world.ok(&["list"])?.text();
        let line =
            listed.lines().find(|line| line.starts_with(id.as_str())).context("not listed")?.to_string();
        ensure!(line.contains("paused"), "{line}");
        Ok(())
    }),
    ("pause/events-wait-without-work", |container| {
        let world = container.world;
        world.call(&["resume", &container.id])?;
        let mut events = world.start(&["events", "--interval", "200ms", &container.id])?;
        events.read_until("\"stats\"")?;
        pause(container)?;
        std::thread::sleep(Duration::from_millis(500));
        let before = ticks(events.pid()).context("its time")?;
        std::thread::sleep(Duration::from_secs(2));
        let used = ticks(events.pid()).context("its time")? - before;
        ensure!(used < 100, "{used} ticks of 200 while it had nothing to do");
        world.ok(&["resume", &container.id]).map(drop)
    }),
    ("resume/it-goes-on-where-it-was", |container| {
        pause(container)?;
        container.world.ok(&["resume", &container.id])?;
        container.expect_status("running")?;
        let before = container.output().len();
        eventually("output", container.world.patience(), || Ok(container.output().len() > before))?;
        container.says("echo well", "well")
    }),
    ("resume/a-running-container-is-refused", |container| {
        if container.status()? == "paused" {
            container.world.ok(&["resume", &container.id])?;
        }
        container.world.refused(&["resume", &container.id], &["container not paused"]).map(drop)
    }),
    ("pause/kill-works-on-a-paused-container", |container| {
        pause(container)?;
        container.kill("KILL")?;
        same(&container.wait_for(Duration::from_secs(4))?, &137)?;
        container.expect_status("stopped")?;
        container.world.refused(&["pause", &container.id], &["container not running"])?;
        container.world.refused(&["resume", &container.id], &["container not running"])?;
        container.delete(&[])
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, ticking, WISHES),
        wish(At::Both, "pause/delete-by-force-works-on-a-paused-container", delete_paused),
        wish(At::Vm, "resume/the-guests-clocks-are-right-at-once", clocks),
        wish(At::Local, "pause/a-signal-waits-for-resume", term_waits),
        wish(At::Local, "pause/many-times-in-a-row", many),
    ]
}

fn ticking(world: &'static World) -> Result<Container> {
    Container::running(
        world,
        &Config::sh("trap 'echo bye; exit 8' TERM; while :; do echo tick; sleep 0.05; done"),
    )
}

fn pause(container: &Container) -> Result<()> {
    if container.status()? != "paused" {
        container.world.ok(&["pause", &container.id])?;
    }
    Ok(())
}

fn delete_paused(world: &'static World) -> Result<()> {
    let mut container = ticking(world)?;
    pause(&container)?;
    world.ok(&["delete", "--force", &container.id])?.within(Duration::from_secs(4))?;
    same(&container.wait_for(Duration::from_secs(1))?, &137)
}

/// Wall clock and monotonic time: the host's go on while the guest does not.
fn clocks(world: &'static World) -> Result<()> {
    let container = ticking(world)?;
    let guest = || -> Result<(f64, f64)> {
        let text = container.sh("date +%s; cut -d ' ' -f 1 /proc/uptime")?;
        let mut numbers = text.lines().map(|line| line.parse().context("a clock"));
        let mut next = || numbers.next().context("a clock")?;
        Ok((next()?, next()?))
    };
    let host = || -> Result<(f64, f64)> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
        let uptime = std::fs::read_to_string("/proc/uptime")?;
        Ok((now, uptime.split(' ').next().context("uptime")?.parse()?))
    };
    let (guest_before, host_before) = (guest()?, host()?);
    pause(&container)?;
    std::thread::sleep(Duration::from_secs(8));
    world.ok(&["resume", &container.id])?;
    let (guest_after, host_after) = (guest()?, host()?);
    let off = guest_after.0 - host_after.0;
    ensure!((-3.0..=1.0).contains(&off), "the wall clock is off by {off} s");
    let (passed, of_host) = (guest_after.1 - guest_before.1, host_after.1 - host_before.1);
    ensure!((passed - of_host).abs() < 3.0, "{passed} s passed in the guest, {of_host} s on the host");
    Ok(())
}

fn term_waits(world: &'static World) -> Result<()> {
    let mut container = ticking(world)?;
    eventually("a tick", world.patience(), || Ok(container.output().contains("tick")))?;
    pause(&container)?;
    world.ok(&["kill", &container.id, "TERM"])?.within(Duration::from_secs(3))?;
    container.expect_status("paused")?;
    world.ok(&["resume", &container.id])?;
    same(&container.wait_for(Duration::from_secs(5))?, &8)?;
    ensure!(container.output().ends_with("bye\n"), "the handler did not run");
    container.delete(&[])
}

fn many(world: &'static World) -> Result<()> {
    let container = ticking(world)?;
    for _ in 0..world.by_level(30, 3, 100) {
        world.ok(&["pause", &container.id])?;
        container.expect_status("paused")?;
        world.ok(&["resume", &container.id])?;
        container.says("echo well", "well")?;
    }
    Ok(())
}
