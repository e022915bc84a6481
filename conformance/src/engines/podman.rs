//! podman with conmon, the runtime by containers.conf.

use std::fs;

use anyhow::{Context, Result};

use super::engine::{Engine, IMAGE, archive, has_systemd};
use super::users;
use crate::cases::{At, Case, Wish, sharing};
use crate::process;
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Engine>] = &[
    ("podman/run-ends-as-the-workload-does", users::exit_codes),
    ("podman/streams-arrive-whole-and-apart", users::streams),
    ("podman/flags-of-run-show-inside", users::surroundings),
    ("podman/exec-logs-cp-pause-top-stats-stop-wait", users::life),
    ("podman/init-and-restart", users::init_and_restart),
    ("podman/killed-by-the-engine-and-by-others", users::deaths),
    ("podman/healthcheck-run-is-an-exec", healthcheck),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, set_up, WISHES)]
}

fn set_up(world: &'static World) -> Result<Engine> {
    let dir = world.make_dir("podman")?;
    let manager = if has_systemd() { "systemd" } else { "cgroupfs" };
    let settings = format!(
        "[containers]\nlog_driver = \"k8s-file\"\n[engine]\ncgroup_manager = \"{manager}\"\nevents_logger = \"file\"\n\
         runtime_supports_json = [\"crun\", \"runc\", \"box\"]\n[engine.runtimes]\nbox = [{:?}]\n",
        world.runtime
    );
    fs::write(dir.join("containers.conf"), settings)?;
    let at = |name: &str| dir.join(name).display().to_string();
    let program = [
        "podman".into(),
        format!("--root={}", at("root")),
        format!("--runroot={}", at("run")),
        format!("--tmpdir={}", at("tmp")),
        "--runtime=box".into(),
    ];
    let engine = Engine {
        world,
        program: program.to_vec(),
        env: vec![("CONTAINERS_CONF".into(), at("containers.conf"))],
        runtime: "box".into(),
        daemon: None,
        clear: &["rm", "--all", "--force", "--time", "0"],
        tidy: ":",
        dir,
    };
    let import = engine.command(&["import", "--change", "CMD sh", "-", IMAGE]);
    process::run(import, &archive(world)?, world.patience())?.code(0).context("import the image")?;
    Ok(engine)
}

/// Without systemd podman has nothing that runs health checks by itself.
fn healthcheck(engine: &mut Engine) -> Result<()> {
    let flags = ["--health-cmd", "test -e /tmp/well", "--health-interval", "disable"];
    let name = engine.up(&flags, &["sleep", "1000"])?;
    engine.call(&["healthcheck", "run", &name])?.code(1)?;
    engine.sh(&name, "touch /tmp/well")?;
    engine.call(&["healthcheck", "run", &name])?.code(0)?;
    same(&engine.sh(&name, "echo well")?, &"well".into())?;
    engine.remove(&name)
}
