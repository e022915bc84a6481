//! containerd by `ctr` and its runc shim, the runtime by the shim's option BinaryName.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};

use super::engine::{Engine, IMAGE, archive, has_systemd};
use crate::cases::{At, Case, Wish, sharing};
use crate::process::{self, Output};
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Engine>] = &[
    ("containerd/run-ends-as-the-workload-does", exit_codes),
    ("containerd/task-exec-pause-metrics-ps-kill-delete", life),
    ("containerd/a-killed-shim-leaves-nothing", killed_shim),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, set_up, WISHES)]
}

fn set_up(world: &'static World) -> Result<Engine> {
    let dir = world.make_dir("containerd")?;
    let at = |name: &str| dir.join(name).display().to_string();
    let settings = format!(
        "version = 3\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
        at("root"),
        at("state"),
        at("sock")
    );
    fs::write(dir.join("config.toml"), settings)?;
    let program = ["ctr".into(), "--address".into(), at("sock")];
    let mut engine = Engine {
        world,
        program: program.to_vec(),
        env: vec![],
        runtime: world.runtime.display().to_string(),
        daemon: None,
        clear: &["version"],
        tidy: ":",
        dir,
    };
    let mut containerd = Command::new("containerd");
    containerd.args(["--config", "config.toml"]);
    engine.start_daemon(containerd, &["version"])?;
    import(&engine)?;
    Ok(engine)
}

/// containerd takes whole images alone: an OCI layout with one layer.
fn import(engine: &Engine) -> Result<()> {
    fs::write(engine.dir.join("layer.tar"), archive(engine.world)?)?;
    let script = "umoci init --layout image && umoci new --image image:1 && umoci raw add-layer --image image:1 layer.tar \
        && umoci config --image image:1 --config.cmd sh && tar -C image -cf image.tar .";
    let mut make = Command::new("sh");
    make.args(["-ec", script]).current_dir(&engine.dir);
    process::run(make, b"", engine.world.patience())?.code(0)?;
    engine.ok(&["images", "import", "--index-name", IMAGE, "image.tar"]).map(drop)
}

fn run(engine: &Engine, flags: &[&str], id: &str, args: &[&str]) -> Result<Output> {
    let driver = if has_systemd() { &["--runc-systemd-cgroup"][..] } else { &[] };
    let limits = ["--memory-limit", "134217728", "--cpu-quota", "100000", "--cpu-period", "100000"];
    let base = ["run", "--runc-binary", engine.runtime.as_str()];
    engine.call(&[&base, driver, &limits, flags, &[IMAGE, id], args].concat())
}

fn exit_codes(engine: &mut Engine) -> Result<()> {
    for (script, code) in [("exit 0", 0), ("echo hello; exit 42", 42)] {
        let id = engine.world.name("task");
        let output = run(engine, &["--rm"], &id, &["sh", "-c", script])?.code(code)?;
        ensure!(code == 0 || output.text() == "hello\n", "it printed {:?}", output.text());
    }
    let id = engine.world.name("task");
    let output = run(engine, &["--rm"], &id, &["/no/such/program"])?;
    ensure!(output.code != 0 && output.stderr.contains("no such file or directory"), "{}", output.stderr);
    let _ = engine.call(&["containers", "delete", &id]);
    Ok(())
}

fn life(engine: &mut Engine) -> Result<()> {
    let id = engine.world.name("task");
    let script = "trap 'exit 9' TERM; while :; do sleep 0.1; done";
    run(engine, &["--detach"], &id, &["sh", "-c", script])?.code(0)?;
    same(&engine.ok(&["task", "exec", "--exec-id", "e1", &id, "echo", "inside"])?, &"inside".into())?;
    engine.call(&["task", "exec", "--exec-id", "e2", &id, "sh", "-c", "exit 7"])?.code(7)?;
    ensure!(engine.ok(&["task", "ps", &id])?.lines().count() >= 2, "task ps lists no process");
    ensure!(engine.ok(&["task", "metrics", &id])?.contains("memory"), "no memory among the metrics");
    engine.ok(&["task", "pause", &id])?;
    ensure!(engine.ok(&["task", "ls"])?.contains("PAUSED"), "task ls does not show it paused");
    engine.ok(&["task", "resume", &id])?;
    engine.ok(&["task", "kill", "--signal", "SIGTERM", &id])?;
    process::eventually("it stops", engine.world.patience(), || {
        Ok(engine.ok(&["task", "ls"])?.contains("STOPPED"))
    })?;
    let deleted = engine.call(&["task", "delete", &id])?.code(0)?;
    ensure!(deleted.stderr.contains("non-zero exit code 9"), "its status: {}", deleted.stderr);
    engine.ok(&["containers", "delete", &id]).map(drop)
}

/// The shim is killed as a whole: containerd has the runtime clean up after it.
fn killed_shim(engine: &mut Engine) -> Result<()> {
    let id = engine.world.name("task");
    run(engine, &["--detach"], &id, &["sleep", "1000"])?.code(0)?;
    let listed = engine.ok(&["task", "ls"])?;
    let line = listed.lines().find(|line| line.starts_with(&id));
    let pid = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|pid| pid.parse().ok());
    let pid: i32 = pid.ok_or_else(|| anyhow::anyhow!("no pid in {listed:?}"))?;
    let shim = process::parent(pid).ok_or_else(|| anyhow::anyhow!("pid {pid} has no parent"))?;
    process::signal(shim, rustix::process::Signal::KILL)?;
    process::eventually("the container is gone", engine.world.patience(), || Ok(!process::is_alive(pid)))?;
    process::eventually("its task is gone", engine.world.patience(), || {
        Ok(!engine.ok(&["task", "ls"])?.lines().any(|line| line.starts_with(&id) && line.contains("RUNNING")))
    })?;
    let _ = engine.call(&["task", "delete", "--force", &id]);
    engine.ok(&["containers", "delete", &id]).map(drop)
}
