//! The systemd cgroup driver: a transient scope, found by its name, gone with its container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::jail::opens_few_devices;
use super::machine::in_private_view;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, eventually};
use crate::report::NotHere;
use crate::world::World;

const FLAG: &[&str] = &["--systemd-cgroup"];

/// A running container in a scope, and where that must lie.
struct Scoped {
    container: Container,
    unit: String,
    path: String,
}

/// Wishes that share a container.
const WISHES: &[Wish<Scoped>] = &[
    ("systemd/monitor-and-vmm-are-in-the-scope-of-cgroups-path", |scoped| {
        let world = scoped.container.world;
        let pids = world.ok(&["ps", "--format", "json", &scoped.container.id])?.text();
        let pids: Vec<i32> = serde_json::from_str(&pids)?;
        ensure!(pids.len() >= 2 && pids.contains(&scoped.container.pid), "{pids:?}");
        for pid in pids {
            same(&cgroup(pid)?, &scoped.path)?;
        }
        Ok(())
    }),
    ("systemd/the-scope-is-delegated-and-collected", |scoped| {
        for (name, value) in [
            ("ActiveState", "active"),
            ("Delegate", "yes"),
            ("DefaultDependencies", "no"),
            ("CollectMode", "inactive-or-failed"),
            ("Slice", "a3sconf-pod.slice"),
        ] {
            same(&show(&scoped.unit, name)?, &value.to_string()).context(name)?;
        }
        Ok(())
    }),
    ("systemd/state-names-the-scope", |scoped| {
        same(&scoped.container.state()?["systemd-scope"], &scoped.unit.clone().into())
    }),
    ("systemd/pause-exec-and-resume-work", |scoped| {
        let (world, id) = (scoped.container.world, &scoped.container.id);
        world.ok(&["pause", id])?;
        scoped.container.expect_status("paused")?;
        world.ok(&["resume", id])?;
        scoped.container.says("echo well", "well")
    }),
    ("systemd/a-reload-changes-nothing", |scoped| {
        systemctl(&["daemon-reload"])?;
        same(&cgroup(scoped.container.pid)?, &scoped.path)?;
        opens_few_devices(scoped.container.world, scoped.container.pid)?;
        scoped.container.says("echo well", "well")
    }),
    ("systemd/delete-without-the-flag-takes-the-scope-along", |scoped| {
        scoped.container.world.ok(&["delete", "--force", &scoped.container.id])?;
        ensure!(!dir(&scoped.path).exists(), "{} is still there", scoped.path);
        same(&show(&scoped.unit, "LoadState")?, &"not-found".into())
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Systemd, scoped, WISHES),
        wish(At::Systemd, "systemd/without-a-path-it-is-in-the-systems-slice", by_default),
        wish(At::Systemd, "systemd/a-name-can-be-used-again-at-once", again),
        wish(At::Systemd, "systemd/a-scope-that-others-live-in-is-refused", inhabited),
        wish(At::Systemd, "systemd/a-failed-create-leaves-no-scope", failed),
        wish(At::Systemd, "systemd/delete-by-force-does-not-wait-for-a-bus-that-hangs", hung),
        wish(At::Systemd, "systemd/warnings-of-create-without-a-log-are-in-the-journal", warned),
        wish(At::Local, "systemd/a-path-of-another-form-is-refused", other_forms),
        wish(At::Both, "systemd/where-there-is-none-it-is-said", absent),
    ]
}

fn scoped(world: &'static World) -> Result<Scoped> {
    // sd_booted(3).
    if !Path::new("/run/systemd/system").is_dir() {
        return Err(NotHere("systemd does not run this host").into());
    }
    let name = world.name("s");
    let config =
        Config::idle().set("/linux/cgroupsPath", json!(format!("a3sconf-pod.slice:conformance:{name}")));
    let container = Container::flagged(world, FLAG, &config)?;
    let unit = format!("conformance-{name}.scope");
    let path = format!("/a3sconf.slice/a3sconf-pod.slice/{unit}");
    Ok(Scoped { container, unit, path })
}

fn by_default(world: &'static World) -> Result<()> {
    let container = Container::flagged(world, &["--cgroup-manager", "systemd"], &Config::idle())?;
    same(&cgroup(container.pid)?, &format!("/system.slice/a3s-box-{}.scope", container.id))
}

fn again(world: &'static World) -> Result<()> {
    let name = world.name("s");
    let config = Config::idle().set("/linux/cgroupsPath", json!(format!("system.slice:conformance:{name}")));
    for _ in 0..world.by_level(3, 2, 10) {
        let mut container = Container::flagged(world, FLAG, &config)?;
        process::signal(container.pid, Signal::KILL)?;
        same(&container.wait_for(Duration::from_secs(5))?, &137)?;
        container.delete(&[])?;
    }
    same(&show(&format!("conformance-{name}.scope"), "LoadState")?, &"not-found".into())
}

fn inhabited(world: &'static World) -> Result<()> {
    let name = world.name("s");
    let unit = format!("conformance-{name}.scope");
    let mut other = Command::new("systemd-run");
    other.args(["--quiet", "--scope", "--unit", &unit, "sleep", "1000"]);
    let other = process::start(other, false, world.patience())?;
    eventually("the other's scope", Duration::from_secs(10), || Ok(show(&unit, "ActiveState")? == "active"))?;
    let config = Config::idle().set("/linux/cgroupsPath", json!(format!("system.slice:conformance:{name}")));
    let bundle = world.bundle(&config)?;
    let args = ["--systemd-cgroup", "create", "-b", &bundle.to_string_lossy(), &name];
    world.refused(&args, &[&unit, "UnitExists"])?;
    same(&show(&unit, "ActiveState")?, &"active".into())?;
    world.refused(&["state", &name], &["does not exist"])?;
    other.signal(Signal::KILL)?;
    other.finish().map(drop)
}

fn failed(world: &'static World) -> Result<()> {
    let name = world.name("s");
    let path = json!(format!("system.slice:conformance:{name}"));
    let bundle = world.bundle(&Config::new(&["/no/such/program"]).set("/linux/cgroupsPath", path))?;
    let args = ["--systemd-cgroup", "run", "-b", &bundle.to_string_lossy(), &name];
    world.refused(&args, &["no such file"])?;
    same(&show(&format!("conformance-{name}.scope"), "LoadState")?, &"not-found".into())
}

/// Stopped until it is dropped.
struct Stopped(i32);

impl Stopped {
    fn stop(pid: i32) -> Result<Self> {
        process::signal(pid, Signal::STOP)?;
        Ok(Stopped(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = process::signal(self.0, Signal::CONT);
    }
}

/// An engine whose shim has died gives the whole clean-up five seconds.
fn hung(world: &'static World) -> Result<()> {
    let name = world.name("s");
    let config = Config::idle().set("/linux/cgroupsPath", json!(format!("system.slice:conformance:{name}")));
    let mut container = Container::flagged(world, FLAG, &config)?;
    let path = cgroup(container.pid)?;
    let mut pidof = Command::new("pidof");
    pidof.arg("dbus-daemon");
    let pids = process::run(pidof, b"", Duration::from_secs(10))?.code(0)?.text();
    let stopped =
        pids.split_whitespace().map(|pid| Stopped::stop(pid.parse()?)).collect::<Result<Vec<_>>>()?;
    world.ok(&["delete", "--force", &container.id])?.within(Duration::from_secs(5))?;
    ensure!(!dir(&path).exists(), "{path} is still there");
    same(&container.wait_for(Duration::from_secs(1))?, &137)?;
    drop(stopped);
    let unit = format!("conformance-{name}.scope");
    eventually(
        "systemd collects the scope",
        world.patience(),
        || Ok(show(&unit, "LoadState")? == "not-found"),
    )
}

/// The standard error of `create` is the container's, and its log may be what users read.
fn warned(world: &'static World) -> Result<()> {
    let label = world.name("label");
    let config = Config::idle().set("/process/selinuxLabel", json!(label));
    let container = Container::create(world, &config)?;
    same(&container.errors(), &String::new())?;
    eventually("the warning in the journal", world.patience(), || {
        let mut journal = Command::new("journalctl");
        journal.args(["--quiet", "--output", "cat", "--identifier", "a3s-box"]);
        let said = process::run(journal, b"", Duration::from_secs(60))?.text();
        Ok(said.lines().any(|line| line.contains(&label) && line.contains("is ignored")))
    })
}

fn other_forms(world: &'static World) -> Result<()> {
    for path in ["/docker/abc", "a.slice:b", "system:docker:abc", "a.slice:b:"] {
        let bundle = world.bundle(&Config::idle().set("/linux/cgroupsPath", json!(path)))?;
        let args = ["--systemd-cgroup", "create", "-b", &bundle.to_string_lossy(), &world.name("c")];
        world.refused(&args, &["linux.cgroupsPath", path])?;
    }
    Ok(())
}

fn absent(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::idle())?;
    let id = world.name("c");
    let args = ["--systemd-cgroup", "create", "-b", &bundle.to_string_lossy(), &id];
    let output =
        in_private_view(world, "mkdir -p /run/dbus; mount -t tmpfs none /run/dbus", &args)?.code(1)?;
    output.one_line(&["the systemd cgroup driver", "D-Bus does not answer"])?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

/// A process's cgroup in the unified hierarchy.
fn cgroup(pid: i32) -> Result<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let line = table.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(line.context("no unified hierarchy")?.to_string())
}

fn dir(path: &str) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'))
}

fn systemctl(args: &[&str]) -> Result<String> {
    let mut command = Command::new("systemctl");
    command.args(args);
    Ok(process::run(command, b"", Duration::from_secs(60))?.code(0)?.text().trim().to_string())
}

fn show(unit: &str, property: &str) -> Result<String> {
    systemctl(&["show", "--value", "--property", property, unit])
}
