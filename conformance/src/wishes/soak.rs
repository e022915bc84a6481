//! Hundreds of containers, a few at a time, beside one that lives long: nothing is left, and nothing grows.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::death::family;
use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::leaks::Census;
use crate::process::{self, Running, reap_orphans};
use crate::world::{World, remove_tree};

pub fn cases() -> Vec<Case> {
    vec![wish(At::Both, "soak/hundreds-come-and-go-beside-one-that-lives", soak)]
}

/// Containers at once, beside the one that stays.
const LANES: u32 = 4;
/// Along one life; each step is a command.
const STEPS: [&str; 5] = ["create", "start", "exec", "kill", "delete"];
/// What a process may hold more of at the end: a descriptor of an exec that is just ending, and what an allocator keeps.
const MORE_DESCRIPTORS: usize = 1;
const MORE_KIB: u64 = 1024;
/// A mapping from this size on is a VM's memory: it fills as its guest sees fit.
const GUEST_KIB: u64 = 64 << 10;

fn soak(world: &'static World) -> Result<()> {
    let cycles = world.by_level(100, 6, if world.is_vm() { 50 } else { 500 });
    let before = Census::take(world);
    let lasting = Container::running(world, &Config::idle())?;
    let mut lanes: VecDeque<Lane> =
        (0..LANES).map(|number| Lane::begin(world, number)).collect::<Result<_>>()?;
    let (mut begun, mut done, mut early) = (LANES, 0, None);
    while let Some(lane) = lanes.pop_front() {
        let exec = lasting.spawn(&["sh", "-c", "echo $((6 * 7)); exit 9"])?;
        let shown = lane.shown();
        match lane.advance(world).with_context(|| shown)? {
            Some(lane) => lanes.push_back(lane),
            None => done += 1,
        }
        same(&exec.finish()?.code(9)?.quiet()?.text(), &"42\n".into())?;
        if begun < cycles && lanes.len() < LANES as usize {
            lanes.push_back(Lane::begin(world, begun)?);
            begun += 1;
        }
        if done >= cycles.div_ceil(10) && early.is_none() {
            early = Some(holdings(world, &lasting)?);
        }
    }
    compare(&early.context("no early look")?, &holdings(world, &lasting)?)?;
    drop(lasting);
    reap_orphans();
    let left = before.left_over(world);
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// One container of many, and the command that is at work on it.
struct Lane {
    number: u32,
    id: String,
    bundle: PathBuf,
    step: usize,
    command: Running,
}

impl Lane {
    fn begin(world: &World, number: u32) -> Result<Self> {
        // A signal that it handles, and a status of its own.
        let script = format!("trap 'exit {}' TERM; while :; do sleep 0.1; done", status(number));
        let bundle = world.bundle(&Config::sh(&script))?;
        let id = world.name("soak");
        let mut create = create_command(world, &bundle, &id);
        create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(bundle.join("err"))?);
        let command = process::start(create, false, world.patience() * 2)?;
        Ok(Lane { number, id, bundle, step: 0, command })
    }

    fn shown(&self) -> String {
        format!("{} of number {}", STEPS[self.step], self.number)
    }

    /// Waits for its command, and begins the next; None where that was the last.
    fn advance(self, world: &'static World) -> Result<Option<Self>> {
        let Lane { number, id, bundle, step, command } = self;
        let expected = if STEPS[step] == "exec" { 5 } else { 0 };
        command.finish()?.code(expected)?.quiet()?;
        if STEPS[step] == "create" {
            same(&fs::read_to_string(bundle.join("err"))?, &String::new())?;
        }
        if STEPS[step] == "kill" {
            let pid = fs::read_to_string(bundle.join("pid"))?.parse().context("the pid file")?;
            same(&process::wait_child(pid, world.patience())?, &status(number))?;
        }
        let args: &[&str] = match STEPS.get(step + 1) {
            // The script's trap is set once its loop runs.
            Some(&"exec") => {
                &["exec", &id, "sh", "-c", "until ps -o args | grep -q '^sleep'; do sleep 0.05; done; exit 5"]
            }
            Some(verb) => &[verb, &id],
            None => {
                remove_tree(&bundle)?;
                return Ok(None);
            }
        };
        let command = world.start(args)?;
        Ok(Some(Lane { number, id, bundle, step: step + 1, command }))
    }
}

fn status(number: u32) -> i32 {
    (number % 100) as i32 + 1
}

/// What a process holds: descriptors, and KiB of memory.
type Holding = (usize, u64);

/// Of the container's pid and everything below it. Twice, and the less of it: what is just ending does not count.
fn holdings(world: &World, container: &Container) -> Result<BTreeMap<i32, Holding>> {
    let look = || -> BTreeMap<i32, Holding> {
        let pids = family(world, container.pid).into_iter().chain([container.pid]);
        pids.filter_map(|pid| Some((pid, (descriptors(pid)?, memory(pid)?)))).collect()
    };
    let first = look();
    std::thread::sleep(Duration::from_millis(500));
    let second = look();
    let both = first.iter().filter_map(|(pid, (fds, kib))| {
        let (fds_then, kib_then) = second.get(pid)?;
        Some((*pid, (*fds.min(fds_then), *kib.min(kib_then))))
    });
    let both: BTreeMap<_, _> = both.collect();
    ensure!(both.contains_key(&container.pid), "pid {} is gone", container.pid);
    Ok(both)
}

fn descriptors(pid: i32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// Memory that is no file's, but for a guest's. Not what smaps calls private: a program's own pages become that when the
/// last other process that runs it ends.
fn memory(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (mut sum, mut size) = (0, 0);
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let Some(kib) = value.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()) else {
            continue;
        };
        match key {
            "Size" => size = kib,
            "Anonymous" if size < GUEST_KIB => sum += kib,
            _ => {}
        }
    }
    Some(sum)
}

fn compare(early: &BTreeMap<i32, Holding>, late: &BTreeMap<i32, Holding>) -> Result<()> {
    for (pid, (fds, kib)) in early {
        let Some((fds_now, kib_now)) = late.get(pid) else { continue };
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let name = name.trim_end();
        println!("# {name}: {fds} descriptors, then {fds_now}; {kib} KiB, then {kib_now}");
        ensure!(*fds_now <= fds + MORE_DESCRIPTORS, "{name}: {fds} descriptors, then {fds_now}");
        ensure!(*kib_now <= kib + MORE_KIB, "{name}: {kib} KiB of memory, then {kib_now}");
    }
    Ok(())
}
