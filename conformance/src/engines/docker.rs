//! docker: dockerd with its own containerd, the runtime by daemon.json.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::engine::{Engine, IMAGE, SMALL, has_systemd};
use super::users;
use crate::apparmor;
use crate::cases::{At, Case, Wish, sharing};
use crate::process;
use crate::report::NotHere;
use crate::wishes::same;
use crate::world::World;

/// RUN with its file system, its user and its exit status; CMD tells what it was like.
pub const DOCKERFILE: &str = "FROM localhost/box:1\nCOPY file /file\nRUN uname -r >/release\nUSER 7\n\
    RUN id -u >/tmp/who\nCMD cat /release /tmp/who /file\n";

const WISHES: [Wish<Engine>; 7] = [
    ("docker/healthcheck-follows-the-container", users::healthcheck),
    ("docker/containers-outlive-a-killed-daemon", live_restore),
    ("docker/builds-by-buildkit-and-without", builds),
    ("docker/compose-up-and-down", compose),
    ("docker/its-own-socket-answers-in-a-container", own_socket),
    ("docker/its-apparmor-profile-confines", profiled),
    ("docker/info-tells-the-default-runtimes-version", info),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, set_up, &[&users::of!("docker")[..], &WISHES].concat())]
}

/// The engine, with its image.
pub fn set_up(world: &'static World) -> Result<Engine> {
    configured(world, &[])
}

/// The same with more in daemon.json.
pub fn configured(world: &'static World, more: &[(&str, &str)]) -> Result<Engine> {
    let dir = world.make_dir("docker")?;
    let mut settings = json!({
        "runtimes": { "box": { "path": world.runtime } },
        "default-runtime": "box",
        "features": { "containerd-snapshotter": false },
        "live-restore": true,
        "ip6tables": false,
    });
    if !has_systemd() {
        settings["exec-opts"] = json!(["native.cgroupdriver=cgroupfs"]);
    }
    more.iter().for_each(|(name, value)| settings[name] = json!(value));
    fs::write(dir.join("daemon.json"), settings.to_string())?;
    let program = ["docker".into(), "--host".into(), format!("unix://{}/sock", dir.display())];
    let mut engine = Engine {
        world,
        program: program.to_vec(),
        env: vec![("DOCKER_CONFIG".into(), dir.join("client").display().to_string())],
        runtime: "box".into(),
        daemon: None,
        pids: &["-eo", "pid,comm"],
        clear: &["system", "prune", "--all", "--force"],
        tidy: "ip link delete docker0",
        dir,
    };
    start(&mut engine)?;
    engine.import()?;
    Ok(engine)
}

/// On a busy machine its containerd may take longer to come up than it waits for: then once more.
fn start(engine: &mut Engine) -> Result<()> {
    match start_once(engine) {
        Err(error) if format!("{error:#}").contains("timeout waiting for containerd to start") => {
            start_once(engine)
        }
        started => started,
    }
}

fn start_once(engine: &mut Engine) -> Result<()> {
    let mut dockerd = Command::new("dockerd");
    let dir = engine.dir.display();
    dockerd
        .args(["--config-file", &format!("{dir}/daemon.json"), "--data-root", &format!("{dir}/data")])
        .args(["--exec-root", &format!("{dir}/exec"), "--pidfile", &format!("{dir}/pid")])
        .args(["--host", &format!("unix://{dir}/sock")])
        // BuildKit inside it does not know of runtimes.
        .env("DOCKER_BUILDKIT_RUNC_COMMAND", &engine.world.runtime);
    engine.start_daemon(dockerd, &["version"])
}

fn own_socket(engine: &mut Engine) -> Result<()> {
    let volume = format!("{}/sock:/var/run/docker.sock", engine.dir.display());
    let ask = "use IO::Socket::UNIX; $s = IO::Socket::UNIX->new('/var/run/docker.sock') or die $!;
        print $s \"GET /version HTTP/1.0\\r\\n\\r\\n\"; print <$s>";
    let asked = process::run(engine.perl(&["--volume", &volume], ask)?, b"", engine.world.patience())?;
    let said = asked.code(0)?.text();
    ensure!(said.contains(" 200 OK") && said.contains("\"ApiVersion\""), "{said}");
    Ok(())
}

fn live_restore(engine: &mut Engine) -> Result<()> {
    let name = engine.up(&[], &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"])?;
    let before = engine.inspect(&name, ".State.Pid")?;
    engine.kill_daemon()?;
    // Collected, or its pid file would still name a process.
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

/// What RUN sees is what the built image's containers see: the runtime's kernel.
fn builds(engine: &mut Engine) -> Result<()> {
    let dir = engine.world.make_dir("context")?;
    fs::write(dir.join("Dockerfile"), DOCKERFILE)?;
    fs::write(dir.join("file"), "from the context\n")?;
    let kernel = engine.run(&["--rm"], &["uname", "-r"])?.code(0)?.text();
    for (buildkit, tag) in [("1", "localhost/built:1"), ("0", "localhost/built:0")] {
        let mut build = engine.command(&["build", "--network", "none", "--tag", tag, "."]);
        build.env("DOCKER_BUILDKIT", buildkit).current_dir(&dir);
        process::run(build, b"", engine.world.patience())?.code(0)?;
        let base = ["run", "--rm", "--network", "none"];
        let said = engine.ok(&[&base, &SMALL[..], &[tag]].concat())?;
        same(&said, &format!("{kernel}7\nfrom the context"))?;
    }
    Ok(())
}

fn compose(engine: &mut Engine) -> Result<()> {
    let dir = engine.world.make_dir("compose")?;
    let service = json!({
        "image": IMAGE, "network_mode": "none", "mem_limit": "128m", "cpus": 1,
        "command": ["sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done"],
    });
    let mut second = service.clone();
    second["depends_on"] = json!(["one"]);
    fs::write(
        dir.join("compose.yaml"),
        json!({ "name": engine.world.name("project"), "services": { "one": service, "two": second } })
            .to_string(),
    )?;
    let file = dir.join("compose.yaml").display().to_string();
    let compose = |args: &[&str]| engine.ok(&[&["compose", "--file", &file], args].concat());
    compose(&["up", "--detach"])?;
    let all = compose(&["ps", "--format", "{{.Service}} {{.State}}"])?;
    let mut lines: Vec<&str> = all.lines().collect();
    lines.sort_unstable();
    same(&lines, &vec!["one running", "two running"])?;
    same(&compose(&["exec", "-T", "two", "echo", "inside"])?, &"inside".into())?;
    same(&compose(&["logs", "--no-log-prefix", "one"])?, &"up".into())?;
    compose(&["down", "--timeout", "60"])?;
    same(&compose(&["ps", "--all", "--quiet"])?, &String::new())
}

/// dockerd calls the default runtime's `--version`, and every runtime's `features`.
fn info(engine: &mut Engine) -> Result<()> {
    let runtime = engine.ok(&["info", "--format", "{{.DefaultRuntime}} {{json .Runtimes}}"])?;
    ensure!(runtime.starts_with("box ") && runtime.contains("ociVersionMin"), "{runtime}");
    let version = engine.ok(&["version", "--format", "{{json .Server.Components}}"])?;
    let wanted = engine.world.ok(&["--version"])?.text();
    let wanted = wanted.lines().next().and_then(|line| line.rsplit(' ').next()).context("a version")?;
    ensure!(version.contains(&format!("\"Name\":\"box\",\"Version\":\"{wanted}\"")), "{version}");
    Ok(())
}

/// The process of the container, or the VMM below it.
fn profiled(engine: &mut Engine) -> Result<()> {
    if !apparmor::is_enabled() {
        return Err(NotHere("this host has no AppArmor").into());
    }
    let name = engine.up(&[], &["sleep", "1000"])?;
    let pid = engine.inspect(&name, ".State.Pid")?;
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let label = |pid: &str| fs::read_to_string(format!("/proc/{pid}/attr/apparmor/current"));
    let labels = children.split_whitespace().chain([&*pid]).map(label).collect::<Result<Vec<_>, _>>()?;
    let confined = labels.iter().filter(|label| label.trim_end() == "docker-default (enforce)").count();
    ensure!(confined == 1, "{labels:?}");
    engine.remove(&name)
}
