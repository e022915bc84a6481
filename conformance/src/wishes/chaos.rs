//! Deaths at random moments: whatever is left, `delete --force` takes it away.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::create_command;
use crate::leaks::{Census, processes};
use crate::process::{self, is_alive, reap_orphans, wait_child};
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "chaos/create-killed-at-any-moment", |world| rounds(world, kill_create)),
        wish(At::Both, "chaos/run-killed-at-any-moment", |world| rounds(world, kill_run)),
        wish(At::Both, "chaos/any-process-killed-at-any-moment", |world| rounds(world, kill_any)),
        wish(At::Both, "chaos/start-and-exec-killed-at-any-moment", |world| rounds(world, kill_later)),
        wish(At::Local, "chaos/kill-and-delete-while-create-is-at-work", |world| rounds(world, delete_early)),
        wish(At::Local, "chaos/a-storm-of-verbs-on-one-container", storm),
        wish(At::Local, "chaos/terminated-create-cleans-up-after-itself", |world| {
            rounds(world, terminate_create)
        }),
    ]
}

/// Numbers that differ from run to run, without a crate (splitmix64).
pub struct Dice(u64);

impl Dice {
    /// Seeded by the clock; the seed is shown where a round fails.
    pub fn new() -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Dice(now.map_or(1, |now| now.as_nanos() as u64))
    }

    /// A number below this.
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }
}

/// A round: begins something, and ends it after this long.
type Round = fn(&'static World, &str, Duration, &mut Dice) -> Result<()>;

fn rounds(world: &'static World, round: Round) -> Result<()> {
    let count = world.by_level(50, 3, if world.is_vm() { 10 } else { 200 });
    let mut dice = Dice::new();
    let whole = duration_of_create(world)?;
    for number in 0..count {
        let before = Census::take(world);
        let id = world.name("chaos");
        let after = Duration::from_micros(dice.roll(whole.as_micros() as u64 * 6 / 5));
        let shown = format!("round {number}, killed after {after:.1?} of {whole:.1?}");
        round(world, &id, after, &mut dice).with_context(|| shown.clone())?;
        // Two seconds are enough for anything alive: the engine behind a dead shim has five.
        let limit = Duration::from_secs(if world.is_vm() { 5 } else { 4 });
        world.ok(&["delete", "--force", &id])?.within(limit).with_context(|| shown.clone())?;
        reap_orphans();
        let left = before.left_over(world);
        ensure!(left.is_empty(), "{shown}: left behind: {left:?}");
    }
    Ok(())
}

fn duration_of_create(world: &'static World) -> Result<Duration> {
    let begin = Instant::now();
    let container = crate::container::Container::create(world, &Config::idle())?;
    let took = begin.elapsed();
    drop(container);
    Ok(took)
}

fn bundle(world: &World) -> Result<std::path::PathBuf> {
    world.bundle(&Config::sh("sleep 1000 & exec sleep 1000"))
}

fn start_create(world: &World, id: &str) -> Result<process::Running> {
    let mut create = create_command(world, &bundle(world)?, id);
    create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    process::start(create, false, world.patience())
}

fn kill_create(world: &'static World, id: &str, after: Duration, _: &mut Dice) -> Result<()> {
    let create = start_create(world, id)?;
    std::thread::sleep(after);
    let _ = create.signal(Signal::KILL);
    create.finish().map(drop)
}

fn terminate_create(world: &'static World, id: &str, after: Duration, _: &mut Dice) -> Result<()> {
    let create = start_create(world, id)?;
    std::thread::sleep(after);
    let _ = create.signal(Signal::TERM);
    create.finish().map(drop)
}

fn kill_run(world: &'static World, id: &str, after: Duration, _: &mut Dice) -> Result<()> {
    let bundle = bundle(world)?;
    let mut command = world.command(&["run", "--bundle", &bundle.to_string_lossy(), id]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let run = process::start(command, false, world.patience())?;
    std::thread::sleep(after);
    run.signal(Signal::KILL)?;
    run.finish()?.code(137).map(drop)
}

/// Any process of the family but the command itself, which must then end in time, however it ends.
fn kill_any(world: &'static World, id: &str, after: Duration, dice: &mut Dice) -> Result<()> {
    let before: Vec<i32> = processes(world).into_iter().map(|(pid, _)| pid).collect();
    let create = start_create(world, id)?;
    std::thread::sleep(after);
    let own = create.pid();
    let family: Vec<_> =
        processes(world).into_iter().filter(|(pid, _)| *pid != own && !before.contains(pid)).collect();
    let victim = family.get(dice.roll(family.len() as u64) as usize);
    if let Some((pid, _)) = victim {
        let _ = process::signal(*pid, Signal::KILL);
    }
    let created = create.finish().with_context(|| format!("create, as {victim:?} was killed"))?;
    if created.code == 0
        && let Some((pid, name)) = victim
    {
        // The container may be there and whole or be stopped, but it must not claim to live without a VM.
        process::wait_gone(*pid, Duration::from_secs(2))?;
        let started = world.call(&["start", id])?;
        ensure!(started.code == 0 || started.stderr.lines().count() == 1, "{name}: {:?}", started.stderr);
        process::eventually("a container that runs takes an exec", Duration::from_secs(5), || {
            let state = world.call(&["state", id])?;
            let runs = state.code == 0 && state.text().contains("\"status\": \"running\"");
            Ok(!runs || world.call(&["exec", id, "true"])?.code == 0)
        })
        .context(name.clone())?;
    }
    Ok(())
}

/// `start`, `exec`, a proxy, the monitor or the VMM, while a created container is started and programs run in it.
fn kill_later(world: &'static World, id: &str, after: Duration, dice: &mut Dice) -> Result<()> {
    let before: Vec<i32> = processes(world).into_iter().map(|(pid, _)| pid).collect();
    start_create(world, id)?.finish()?.code(0)?;
    let commands =
        [&["start", id][..], &["exec", "--detach", id, "sleep", "1000"], &["exec", id, "sleep", "0.05"]];
    let spawn = |args: &&[&str]| {
        let mut command = world.command(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        process::start(command, false, world.patience())
    };
    let running: Vec<_> = commands.iter().map(spawn).collect::<Result<_>>()?;
    std::thread::sleep(after / 2);
    let family: Vec<_> = processes(world).into_iter().filter(|(pid, _)| !before.contains(pid)).collect();
    let victim = family.get(dice.roll(family.len() as u64) as usize);
    if let Some((pid, _)) = victim {
        let _ = process::signal(*pid, Signal::KILL);
    }
    for command in running {
        command.finish().with_context(|| format!("as {victim:?} was killed"))?;
    }
    Ok(())
}

fn delete_early(world: &'static World, id: &str, after: Duration, dice: &mut Dice) -> Result<()> {
    let create = start_create(world, id)?;
    std::thread::sleep(after);
    if dice.roll(2) == 0 {
        let killed = world.call(&["kill", id, "KILL"])?;
        ensure!(killed.code == 0 || killed.stderr.lines().count() == 1, "kill: {:?}", killed.stderr);
    }
    world.call(&["delete", "--force", id])?.within(Duration::from_secs(4))?;
    create.finish().map(drop)
}

fn storm(world: &'static World) -> Result<()> {
    for _ in 0..world.by_level(3, 1, 10) {
        let container = crate::container::Container::create(world, &Config::idle())?;
        let id = container.id.as_str();
        let verbs = [
            &["start", id][..],
            &["state", id],
            &["exec", id, "true"],
            &["kill", id, "0"],
            &["pause", id],
            &["resume", id],
            &["ps", id],
            &["list"],
            &["delete", id],
        ];
        let all: Vec<_> = (0..40).map(|n| world.start(verbs[n % verbs.len()])).collect::<Result<Vec<_>>>()?;
        for one in all {
            let output = one.finish()?;
            ensure!(
                !output.stderr.contains("panicked") && output.code < 128 || output.code == 255,
                "{output:?}"
            );
        }
        if container.status().is_ok_and(|status| status == "paused") {
            world.ok(&["resume", id])?;
        }
        world.ok(&["delete", "--force", id])?;
        ensure!(!is_alive(container.pid), "{} survives", container.pid);
        let _ = wait_child(container.pid, Duration::from_secs(1));
    }
    Ok(())
}
