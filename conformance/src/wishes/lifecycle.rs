//! A container's life: created, running, stopped, gone.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::process::{self, eventually, parent};
use crate::world::World;

/// One container; each wish brings it as far as it needs it.
pub struct Life {
    container: Container,
    marker: std::path::PathBuf,
}

const SCRIPT: &str =
    "trap 'echo handled; exit 17' TERM; touch /shared/ran; echo up; while :; do sleep 0.05; done";

/// Wishes along one life.
const WISHES: &[Wish<Life>] = &[
    ("create/pid-file-holds-a-bare-number", pid_file),
    ("create/pid-is-its-callers-subreapers-child", child),
    ("create/own-session-and-group", own_session),
    ("create/state-is-created-and-nothing-has-run", created),
    ("create/the-same-id-twice-is-refused-and-harmless", twice),
    ("start/state-is-running", running),
    ("start/a-second-start-is-refused", start_twice),
    ("state/one-object-with-the-fields-of-runc", state_fields),
    ("delete/a-running-container-is-refused-and-unharmed", delete_running),
    ("kill/term-reaches-the-handler", term),
    ("create/config-json-is-read-once", |life| life.stopped()),
    ("state/stopped-has-no-pid", stopped_state),
    ("start/a-stopped-container-is-refused", start_stopped),
    ("kill/a-stopped-container-is-not-running", kill_stopped),
    ("exec/a-stopped-container-is-refused", exec_stopped),
    ("delete/leaves-nothing", delete),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, Life::begin, WISHES),
        wish(At::Both, "delete/a-created-container-is-ended", delete_created),
        wish(At::Local, "delete/force-ends-a-running-container", delete_force),
        wish(At::Local, "kill/a-created-container-can-be-killed", kill_created),
        wish(At::Both, "create/failure-leaves-no-pid-file", no_pid_file),
        wish(At::Local, "create/start-and-delete-in-parallel", parallel),
        wish(At::Local, "create/while-others-come-and-go", churn),
        wish(At::Local, "create/a-bundle-deleted-after-create-is-not-missed", bundle_gone),
        wish(At::Local, "create/an-id-can-be-used-again", reuse),
        wish(At::Local, "create/ids-of-two-hundred-characters", long_id),
        wish(At::Local, "state/stopped-while-the-pid-is-a-zombie", zombie),
    ]
}

impl Life {
    fn begin(world: &'static World) -> Result<Self> {
        let shared = world.make_dir("shared")?;
        let config = Config::sh(SCRIPT)
            .bind(&shared, "/shared", &[])
            .set("/annotations/org.example.key", "value".into());
        let container = Container::create(world, &config)?;
        // Whatever config.json says from here on must not matter.
        let bundle = container.bundle.join("config.json");
        fs::write(&bundle, "{\"ociVersion\": \"9\"}")?;
        Ok(Life { container, marker: shared.join("ran") })
    }

    fn started(&mut self) -> Result<&mut Container> {
        if self.container.status()? == "created" {
            self.container.start()?;
        }
        let container = &self.container;
        eventually("the workload's first words", container.world.patience(), || {
            Ok(container.output().contains("up"))
        })?;
        Ok(&mut self.container)
    }

    fn stopped(&mut self) -> Result<()> {
        let container = self.started()?;
        if container.status()? != "stopped" {
            container.kill("TERM")?;
            same(&container.wait()?, &17)?;
        }
        container.expect_status("stopped")?;
        same(&container.output(), &"up\nhandled\n".into())
    }
}

fn pid_file(life: &mut Life) -> Result<()> {
    let text = fs::read_to_string(life.container.pid_file())?;
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    ensure!(digits && !text.starts_with('0') && !text.is_empty(), "{text:?}");
    let beside: Vec<_> =
        fs::read_dir(&life.container.bundle)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(beside.len() == 4, "more than config.json, err, out and pid is in the bundle: {beside:?}");
    Ok(())
}

fn child(life: &mut Life) -> Result<()> {
    let above = parent(life.container.pid).context("no such process")?;
    ensure!(process::is_child(life.container.pid), "its parent is {above}");
    Ok(())
}

fn own_session(life: &mut Life) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(life.container.pid);
    ensure!(rustix::process::getpgid(pid)? != rustix::process::getpgid(None)?, "it is in our process group");
    ensure!(rustix::process::getsid(pid)? != rustix::process::getsid(None)?, "it is in our session");
    same(&rustix::process::getpgid(pid).map(Some)?, &pid)
}

fn created(life: &mut Life) -> Result<()> {
    life.container.expect_status("created")?;
    ensure!(!life.marker.exists(), "the workload has run before start");
    same(&life.container.state()?["pid"], &life.container.pid.into())
}

fn twice(life: &mut Life) -> Result<()> {
    let world = life.container.world;
    let bundle = world.bundle(&Config::idle())?;
    let create = create_command(world, &bundle, &life.container.id);
    process::run(create, b"", world.patience())?
        .code(1)?
        .one_line(&["container with given ID already exists"])?;
    ensure!(!bundle.join("pid").exists(), "it wrote a pid file");
    life.container.expect_status("created")?;
    same(&life.container.state()?["pid"], &life.container.pid.into())
}

fn running(life: &mut Life) -> Result<()> {
    life.started()?.expect_status("running")?;
    ensure!(life.marker.exists(), "the workload has not run");
    same(&life.container.state()?["pid"], &life.container.pid.into())
}

fn start_twice(life: &mut Life) -> Result<()> {
    let container = life.started()?;
    container.world.refused(&["start", &container.id], &["cannot start an already running container"])?;
    container.expect_status("running")
}

fn state_fields(life: &mut Life) -> Result<()> {
    let container = life.started()?;
    let state = container.state()?;
    let fields: Vec<&str> = state.as_object().context("no object")?.keys().map(String::as_str).collect();
    let allowed = [
        "ociVersion",
        "id",
        "pid",
        "status",
        "bundle",
        "rootfs",
        "created",
        "annotations",
        "owner",
        "systemd-scope",
    ];
    let foreign: Vec<_> = fields.iter().filter(|field| !allowed.contains(field)).collect();
    ensure!(foreign.is_empty(), "fields that engines would mistake for their own: {foreign:?}");
    same(&state["id"], &container.id.clone().into())?;
    same(&state["bundle"], &container.bundle.to_string_lossy().into_owned().into())?;
    same(&state["rootfs"], &container.world.shared_rootfs().to_string_lossy().into_owned().into())?;
    same(&state["annotations"]["org.example.key"], &"value".into())?;
    // "the version of the spec with which the state complies": the config's, or the runtime's own.
    ensure!(state["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")), "{state}");
    let created = state["created"].as_str().unwrap_or_default();
    ensure!(is_rfc3339_utc(created), "created: {created:?} is not RFC 3339 in UTC");
    same(&state["owner"], &Value::from("root"))
}

/// `2026-08-20T10:11:12Z`, with or without a fraction.
pub fn is_rfc3339_utc(text: &str) -> bool {
    let Some(text) = text.strip_suffix('Z') else { return false };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let pattern = "0000-00-00T00:00:00";
    let fits =
        |(found, wanted): (char, char)| if wanted == '0' { found.is_ascii_digit() } else { found == wanted };
    whole.len() == pattern.len()
        && whole.chars().zip(pattern.chars()).all(fits)
        && !fraction.is_empty()
        && fraction.len() <= 9
        && fraction.chars().all(|digit| digit.is_ascii_digit())
}

fn delete_running(life: &mut Life) -> Result<()> {
    let container = life.started()?;
    let words = format!("cannot delete container {} that is not stopped: running", container.id);
    container.world.refused(&["delete", &container.id], &[&words])?;
    container.expect_status("running")
}

fn term(life: &mut Life) -> Result<()> {
    life.stopped()
}

fn stopped_state(life: &mut Life) -> Result<()> {
    life.stopped()?;
    same(&life.container.state()?["pid"], &0.into())
}

fn start_stopped(life: &mut Life) -> Result<()> {
    life.stopped()?;
    life.container
        .world
        .refused(&["start", &life.container.id], &["cannot start a container that has stopped"])
        .map(drop)
}

fn kill_stopped(life: &mut Life) -> Result<()> {
    life.stopped()?;
    let (world, id) = (life.container.world, &life.container.id);
    for signal in ["TERM", "9", "0"] {
        world.refused(&["kill", id, signal], &["container not running"])?;
    }
    world.ok(&["kill", "--all", id, "9"])?;
    world.ok(&["kill", "-a", id, "KILL"]).map(drop)
}

fn exec_stopped(life: &mut Life) -> Result<()> {
    life.stopped()?;
    let output = life.container.exec(&["true"])?.code(255)?;
    output.one_line(&["cannot exec in a stopped container"]).map(drop)
}

fn delete(life: &mut Life) -> Result<()> {
    life.stopped()?;
    life.container.delete(&[])?;
    let id = &life.container.id;
    life.container.world.refused(&["delete", id], &["container does not exist"])?;
    life.container.world.ok(&["delete", "--force", id]).map(drop)
}

fn delete_created(world: &'static World) -> Result<()> {
    let mut container = Container::create(world, &Config::idle())?;
    container.delete(&[])
}

fn delete_force(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    container.delete(&["--force"])?;
    same(&container.wait()?, &137)?;
    let mut container = Container::running(world, &Config::idle())?;
    container.delete(&["-f"])
}

fn kill_created(world: &'static World) -> Result<()> {
    let mut container = Container::create(world, &Config::idle())?;
    container.kill("KILL")?;
    same(&container.wait()?, &137)?;
    container.expect_status("stopped")?;
    container.delete(&[])
}

fn no_pid_file(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::new(&["/no/such/program"]))?;
    let id = world.name("c");
    process::run(create_command(world, &bundle, &id), b"", world.patience())?
        .code(1)?
        .one_line(&["no such file"])?;
    let names: Vec<_> = fs::read_dir(&bundle)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(names.len() == 1, "{names:?} in the bundle");
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn parallel(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("exit 5"))?;
    for _ in 0..world.by_level(1, 1, 3) {
        let ids: Vec<String> = (0..30).map(|_| world.name("par")).collect();
        let all = |verb: &str| -> Result<()> {
            let create = ["create", "--bundle", &bundle.to_string_lossy()].map(str::to_string);
            let started: Vec<_> = ids
                .iter()
                .map(|id| {
                    let mut args = if verb == "create" { create.to_vec() } else { vec![verb.to_string()] };
                    args.push(id.clone());
                    let mut command = world.command(&args);
                    command.stdin(std::process::Stdio::null());
                    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
                    process::start(command, false, world.patience() * 3)
                })
                .collect::<Result<_>>()?;
            started.into_iter().try_for_each(|one| one.finish()?.code(0).map(drop))
        };
        all("create")?;
        let listed = world.ok(&["list", "--quiet"])?.text();
        same(&listed.lines().filter(|line| ids.iter().any(|id| id == line)).count(), &30)?;
        all("start")?;
        eventually("all to stop", world.patience(), || {
            let list: Value = serde_json::from_slice(&world.ok(&["list", "--format", "json"])?.stdout)?;
            Ok(list.as_array().is_some_and(|all| all.iter().all(|one| one["status"] == "stopped")))
        })?;
        all("delete")?;
    }
    Ok(())
}

/// Six at a time, each at another point of its life: what they share must not be taken from under them.
fn churn(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("exit 5"))?;
    let path = bundle.to_string_lossy().into_owned();
    let begin = || world.start(&["run", "--bundle", &path, &world.name("churn")]);
    let mut running = (0..6).map(|_| begin()).collect::<Result<std::collections::VecDeque<_>>>()?;
    for _ in 0..world.by_level(60, 1, 400) {
        if let Some(oldest) = running.pop_front() {
            oldest.finish()?.code(5)?.quiet()?;
        }
        running.push_back(begin()?);
    }
    running.into_iter().try_for_each(|one| one.finish()?.code(5)?.quiet().map(drop))
}

fn bundle_gone(world: &'static World) -> Result<()> {
    let bundle = world
        .own_bundle(&Config::sh("trap 'exit 0' TERM; echo $(cat /etc/hostname) up; sleep 1000 & wait"))?;
    let mut container = Container::of_bundle(world, bundle)?;
    let moved = world.dir.join(world.name("moved"));
    fs::rename(&container.bundle, &moved)?;
    container.start()?;
    let output = moved.join("out");
    eventually("output", world.patience(), || Ok(fs::read_to_string(&output)?.contains("localhost up")))?;
    container.kill("TERM")?;
    same(&container.wait()?, &0)?;
    container.delete(&[])
}

fn reuse(world: &'static World) -> Result<()> {
    let id = world.name("again");
    let bundle = world.bundle(&Config::sh("exit 4"))?;
    for _ in 0..3 {
        world.call(&["run", "--bundle", &bundle.to_string_lossy(), &id])?.code(4)?.quiet()?;
    }
    Ok(())
}

fn long_id(world: &'static World) -> Result<()> {
    let id = format!("{}-{}", "x".repeat(199 - world.tag.len()), world.tag);
    same(&id.len(), &200)?;
    let bundle = world.bundle(&Config::sh("echo up; cat"))?;
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("up")?;
    same(&world.ok(&["exec", &id, "echo", "in"])?.text(), &"in\n".to_string())?;
    run.finish()?.code(0)?.quiet().map(drop)
}

fn zombie(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::sh("exit 6"))?;
    process::wait_gone(container.pid, Duration::from_secs(20))?;
    ensure!(
        std::path::Path::new(&format!("/proc/{}", container.pid)).exists(),
        "something else has reaped it"
    );
    container.expect_status("stopped")?;
    container.delete(&[])?;
    same(&container.wait()?, &6)
}
