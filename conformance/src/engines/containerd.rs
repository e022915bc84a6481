//! containerd by `ctr` and its runc shim, the runtime by the shim's option BinaryName.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use super::engine::{Engine, IMAGE, archive, has_systemd};
use super::terminals::{leave, sit};
use crate::cases::{At, Case, Wish, sharing};
use crate::process::{self, Output};
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Engine>] = &[
    ("containerd/run-ends-as-the-workload-does", exit_codes),
    ("containerd/flags-of-run-show-inside", surroundings),
    ("containerd/run-and-exec-have-terminals-that-follow", terminal),
    ("containerd/task-exec-pause-metrics-ps-kill-delete", life),
    ("containerd/containers-outlive-a-killed-daemon", killed_daemon),
    ("containerd/a-killed-shim-leaves-nothing", killed_shim),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, set_up, WISHES)]
}

/// The engine, with its image.
pub fn set_up(world: &'static World) -> Result<Engine> {
    let dir = world.make_dir("containerd")?;
    let at = |name: &str| dir.join(name).display().to_string();
    let settings = format!(
        "version = 3\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
        at("root"),
        at("state"),
        at("sock")
    );
    fs::write(dir.join("config.toml"), settings)?;
    let engine = serve(world, dir, &[], ":")?;
    import(&engine, IMAGE, &["sh"])?;
    Ok(engine)
}

/// containerd with the configuration in `dir`, asked by `ctr` with these flags.
pub fn serve(world: &'static World, dir: PathBuf, flags: &[&str], tidy: &'static str) -> Result<Engine> {
    let socket = dir.join("sock").display().to_string();
    let words = [&["ctr", "--address", &socket], flags].concat();
    let mut engine = Engine {
        world,
        program: words.into_iter().map(str::to_string).collect(),
        env: vec![],
        runtime: world.runtime.display().to_string(),
        daemon: None,
        pids: &[],
        clear: &["version"],
        tidy,
        dir,
    };
    start(&mut engine)?;
    Ok(engine)
}

/// Its daemon.
pub fn start(engine: &mut Engine) -> Result<()> {
    let mut containerd = Command::new("containerd");
    containerd.args(["--config", "config.toml"]);
    engine.start_daemon(containerd, &["version"])
}

/// containerd takes whole images alone: an OCI layout with one layer.
pub fn import(engine: &Engine, name: &str, command: &[&str]) -> Result<()> {
    let layer = engine.dir.join("layer.tar");
    if !layer.exists() {
        fs::write(&layer, archive(engine.world)?)?;
    }
    let script = "rm -rf image; umoci init --layout image && umoci new --image image:1 \
        && umoci raw add-layer --image image:1 layer.tar && umoci config --image image:1 \"$@\" && tar -C image -cf image.tar .";
    let mut make = Command::new("sh");
    make.args(["-ec", script, "sh"]).current_dir(&engine.dir);
    make.args(command.iter().map(|word| format!("--config.cmd={word}")));
    process::run(make, b"", engine.world.patience())?.code(0)?;
    // Under this name alone: CRI would also remember one of ctr's own, which the next import takes away.
    let base = name.strip_suffix(":1").unwrap_or(name);
    engine.ok(&["images", "import", "--base-name", base, "image.tar"]).map(drop)
}

/// `ctr run` of the image in a small VM.
pub fn run(engine: &Engine, flags: &[&str], id: &str, args: &[&str]) -> Result<Output> {
    // The systemd cgroup driver wants to be told where.
    let scope = format!("system.slice:ctr:{id}");
    let driver = if has_systemd() { &["--runc-systemd-cgroup", "--cgroup", &scope][..] } else { &[] };
    engine.call(&making(engine, &[driver, flags].concat(), id, args))
}

fn making<'a>(engine: &'a Engine, flags: &[&'a str], id: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    let limits = ["--memory-limit", "134217728", "--cpu-quota", "100000", "--cpu-period", "100000"];
    let base = ["run", "--runc-binary", engine.runtime.as_str()];
    [&base, &limits[..], flags, &[IMAGE, id], args].concat()
}

fn exit_codes(engine: &mut Engine) -> Result<()> {
    for (script, code) in [("exit 0", 0), ("exit 1", 1), ("echo hello; exit 42", 42)] {
        let id = engine.world.name("task");
        let output = run(engine, &["--rm"], &id, &["sh", "-c", script])?.code(code)?;
        ensure!(code != 42 || output.text() == "hello\n", "it printed {:?}", output.text());
    }
    let id = engine.world.name("task");
    let output = run(engine, &["--rm"], &id, &["/no/such/program"])?;
    ensure!(output.code != 0 && output.stderr.contains("no such file or directory"), "{}", output.stderr);
    let _ = engine.call(&["containers", "delete", &id]);
    Ok(())
}

fn surroundings(engine: &mut Engine) -> Result<()> {
    let dir = engine.world.make_dir("volume")?;
    fs::write(dir.join("file"), "from the host\n")?;
    let mount =
        |to: &str, kind: &str| format!("type=bind,src={},dst={to},options=rbind:{kind}", dir.display());
    let (data, fixed) = (mount("/data", "rw"), mount("/fixed", "ro"));
    let mut flags = vec!["--rm", "--env", "A=b c", "--cwd", "/tmp", "--user", "0:1001", "--read-only"];
    flags.extend([
        "--mount",
        &data,
        "--mount",
        &fixed,
        "--mount",
        "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1048576",
    ]);
    let script = "echo $A; id -u; id -g; pwd; cat /data/file; echo new >/data/new; \
        echo x 2>/dev/null >/fixed/x || echo read-only; echo x 2>/dev/null >/new || echo and the root; \
        df -k /scratch | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2";
    let said = run(engine, &flags, &engine.world.name("task"), &["sh", "-c", script])?.code(0)?.text();
    same(&said.as_str(), &"b c\n0\n1001\n/tmp\nfrom the host\nread-only\nand the root\n1024\n")?;
    same(&fs::read_to_string(dir.join("new"))?, &"new\n".into())
}

fn terminal(engine: &mut Engine) -> Result<()> {
    let id = engine.world.name("task");
    let args = making(engine, &["--rm", "--tty"], &id, &["sh"]);
    let (mut terminal, client, _slave) = engine.on_terminal(&args, (31, 99))?;
    sit(&mut terminal, (31, 99))?;
    let exec = ["task", "exec", "--tty", "--exec-id", "e1", &id, "sh"];
    let (mut beside, exec, _its_slave) = engine.on_terminal(&exec, (40, 132))?;
    sit(&mut beside, (40, 132))?;
    leave(beside, exec, 6)?;
    leave(terminal, client, 5)
}

/// Its shims stay, and the new one finds them.
fn killed_daemon(engine: &mut Engine) -> Result<()> {
    let id = engine.world.name("task");
    run(engine, &["--detach"], &id, &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"])?
        .code(0)?;
    engine.kill_daemon()?;
    start(engine)?;
    same(&engine.ok(&["task", "exec", "--exec-id", "e1", &id, "echo", "still here"])?, &"still here".into())?;
    engine.ok(&["task", "kill", "--signal", "SIGTERM", &id])?;
    deleted(engine, &id, 3)
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
    deleted(engine, &id, 9)?;
    run(engine, &["--detach"], &id, &["sleep", "1000"])?.code(0)?;
    engine.ok(&["task", "kill", "--signal", "SIGKILL", &id])?;
    deleted(engine, &id, 137)
}

/// Waits for the task's end, which must have this status, and deletes it.
fn deleted(engine: &Engine, id: &str, status: i32) -> Result<()> {
    process::eventually("it stops", engine.world.patience(), || {
        Ok(engine.ok(&["task", "ls"])?.contains("STOPPED"))
    })?;
    let deleted = engine.call(&["task", "delete", id])?.code(0)?;
    ensure!(
        deleted.stderr.contains(&format!("non-zero exit code {status}")),
        "its status: {}",
        deleted.stderr
    );
    engine.ok(&["containers", "delete", id]).map(drop)
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
