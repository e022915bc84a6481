//! docker: dockerd with its own containerd, the runtime by daemon.json.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::engine::{Engine, IMAGE, archive, has_systemd};
use super::users;
use crate::cases::{At, Case, Wish, sharing};
use crate::process;
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Engine>] = &[
    ("docker/run-ends-as-the-workload-does", users::exit_codes),
    ("docker/streams-arrive-whole-and-apart", users::streams),
    ("docker/flags-of-run-show-inside", users::surroundings),
    ("docker/exec-logs-cp-pause-top-stats-stop-wait", users::life),
    ("docker/init-and-restart", users::init_and_restart),
    ("docker/killed-by-the-engine-and-by-others", users::deaths),
    ("docker/healthcheck-follows-the-container", users::healthcheck),
    ("docker/containers-outlive-a-killed-daemon", live_restore),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, set_up, WISHES)]
}

fn set_up(world: &'static World) -> Result<Engine> {
    let dir = world.make_dir("docker")?;
    let mut settings = json!({
        "runtimes": { "box": { "path": world.runtime } },
        "features": { "containerd-snapshotter": false },
        "live-restore": true,
        "ip6tables": false,
    });
    if !has_systemd() {
        settings["exec-opts"] = json!(["native.cgroupdriver=cgroupfs"]);
    }
    fs::write(dir.join("daemon.json"), settings.to_string())?;
    let program = ["docker".into(), "--host".into(), format!("unix://{}/sock", dir.display())];
    let mut engine = Engine {
        world,
        program: program.to_vec(),
        env: vec![("DOCKER_CONFIG".into(), dir.join("client").display().to_string())],
        runtime: "box".into(),
        daemon: None,
        clear: &["system", "prune", "--all", "--force"],
        tidy: "ip link delete docker0",
        dir,
    };
    start(&mut engine)?;
    let import = engine.command(&["import", "--change", "CMD sh", "-", IMAGE]);
    process::run(import, &archive(world)?, world.patience())?.code(0).context("import the image")?;
    Ok(engine)
}

fn start(engine: &mut Engine) -> Result<()> {
    let mut dockerd = Command::new("dockerd");
    let dir = engine.dir.display();
    dockerd
        .args(["--config-file", &format!("{dir}/daemon.json"), "--data-root", &format!("{dir}/data")])
        .args(["--exec-root", &format!("{dir}/exec"), "--pidfile", &format!("{dir}/pid")])
        .args(["--host", &format!("unix://{dir}/sock")]);
    engine.start_daemon(dockerd, &["version"])
}

fn live_restore(engine: &mut Engine) -> Result<()> {
    let name = engine.up(&[], &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"])?;
    let before = engine.inspect(&name, ".State.Pid")?;
    let daemon = engine.daemon.take().context("the daemon")?;
    daemon.signal(Signal::KILL)?;
    process::wait_gone(daemon.pid(), engine.world.patience())?;
    // Collected, or its and its containerd's pid files would still name a process.
    drop(daemon);
    process::eventually("its containerd is gone", engine.world.patience(), || {
        process::reap_orphans();
        let pid = fs::read_to_string(engine.dir.join("exec/containerd/containerd.pid")).unwrap_or_default();
        Ok(pid.is_empty() || !Path::new("/proc").join(pid.trim()).exists())
    })?;
    start(engine)?;
    same(&engine.inspect(&name, ".State.Pid")?, &before)?;
    same(&engine.sh(&name, "echo still here")?, &"still here".into())?;
    engine.ok(&["stop", &name])?;
    let code = engine.inspect(&name, ".State.ExitCode")?;
    ensure!(code == "3", "exit code {code} after the daemon's return");
    engine.remove(&name)
}
