//! podman with conmon, the runtime by containers.conf.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::docker::DOCKERFILE;
use super::engine::{Engine, IMAGE, SMALL, has_systemd};
use super::users;
use crate::cases::{At, Case, Wish, sharing};
use crate::process;
use crate::wishes::same;
use crate::world::World;

const WISHES: [Wish<Engine>; 5] = [
    ("podman/containers-of-a-pod-live-in-its-vm", pod),
    ("podman/healthcheck-run-is-an-exec", healthcheck),
    ("podman/sdnotify-by-the-container-arrives", sdnotify),
    ("podman/a-container-outlives-a-killed-client", killed_client),
    ("podman/builds-and-buildah-run-by-it", builds),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, set_up, &[&users::of!("podman")[..], &WISHES].concat())]
}

/// The engine, with its image.
pub fn set_up(world: &'static World) -> Result<Engine> {
    let dir = world.make_dir("podman")?;
    let manager = if has_systemd() { "systemd" } else { "cgroupfs" };
    let at = |name: &str| dir.join(name).display().to_string();
    let program = [
        "podman".into(),
        format!("--root={}", at("root")),
        format!("--runroot={}", at("run")),
        format!("--tmpdir={}", at("tmp")),
    ];
    engine(world, dir, manager, program.to_vec(), Vec::new(), "umount /run/netns 2>/dev/null")
}

/// A podman with its image. Its containers.conf lies in `dir`; `program` and `env` say whose it is.
pub fn engine(
    world: &'static World,
    dir: PathBuf,
    cgroup_manager: &str,
    mut program: Vec<String>,
    mut env: Vec<(String, String)>,
    tidy: &'static str,
) -> Result<Engine> {
    let settings = format!(
        "[containers]\nlog_driver = \"k8s-file\"\n[engine]\ncgroup_manager = \"{cgroup_manager}\"\nevents_logger = \"file\"\n\
         runtime_supports_json = [\"crun\", \"runc\", \"box\"]\n[engine.runtimes]\nbox = [{:?}]\n",
        world.runtime
    );
    let file = dir.join("containers.conf");
    fs::write(&file, settings)?;
    program.push("--runtime=box".into());
    env.push(("CONTAINERS_CONF".into(), file.display().to_string()));
    let engine = Engine {
        world,
        dir,
        program,
        env,
        runtime: "box".into(),
        daemon: None,
        pids: &["hpid", "comm"],
        clear: &["rm", "--all", "--force", "--time", "0"],
        tidy,
    };
    engine.import()?;
    Ok(engine)
}

fn pod(engine: &mut Engine) -> Result<()> {
    let (pod, one, two) = (engine.world.name("pod"), engine.world.name("one"), engine.world.name("two"));
    engine.ok(&["pod", "create", "--name", &pod, "--network", "none"])?;
    for name in [&one, &two] {
        engine.ok(&["run", "--detach", "--pod", &pod, "--name", name, IMAGE, "sleep", "1000"])?;
    }
    let look = "cat /proc/sys/kernel/random/boot_id; readlink /proc/self/ns/net";
    same(&engine.sh(&two, look)?, &engine.sh(&one, look)?)?;
    engine.sh(&one, "echo shared > /dev/shm/word")?;
    same(&engine.sh(&two, "cat /dev/shm/word")?, &"shared".into())?;
    engine.remove(&one)?;
    same(&engine.sh(&two, "echo alone")?, &"alone".into())?;
    engine.ok(&["pod", "rm", "--force", "--time", "0", &pod]).map(drop)
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

/// The container says when it is ready, and conmon passes that on.
fn sdnotify(engine: &mut Engine) -> Result<()> {
    let socket = engine.dir.join("notify.sock");
    let manager = UnixDatagram::bind(&socket)?;
    manager.set_read_timeout(Some(engine.world.patience()))?;
    let say = "use Socket; socket S, AF_UNIX, SOCK_DGRAM, 0;
        send(S, 'READY=1', 0, pack_sockaddr_un($ENV{NOTIFY_SOCKET})) or die $!";
    let mut command = engine.perl(&["--sdnotify", "container"], say)?;
    command.env("NOTIFY_SOCKET", &socket);
    process::run(command, b"", engine.world.patience())?.code(0)?;
    let mut buffer = [0; 4096];
    let mut said = String::new();
    while !said.contains("READY=1") {
        let count = manager.recv(&mut buffer).with_context(|| format!("no READY=1 after {said:?}"))?;
        said += &String::from_utf8_lossy(&buffer[..count]);
    }
    Ok(())
}

/// podman has no daemon: whoever has called `run` may die.
fn killed_client(engine: &mut Engine) -> Result<()> {
    let name = engine.world.name("box");
    let script = ["sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"];
    let command = engine.command(&engine.making("run", &["--name", &name], &script));
    let mut client = process::start(command, true, engine.world.patience())?;
    client.read_until("up\n")?;
    client.signal(Signal::KILL)?;
    client.finish()?.code(137)?;
    same(&engine.sh(&name, "echo still here")?, &"still here".into())?;
    engine.ok(&["stop", &name])?;
    same(&engine.inspect(&name, ".State.ExitCode")?, &"3".into())?;
    engine.remove(&name)
}

/// buildah calls the runtime itself, as conmon does elsewhere.
fn builds(engine: &mut Engine) -> Result<()> {
    let dir = engine.world.make_dir("context")?;
    fs::write(dir.join("Dockerfile"), DOCKERFILE)?;
    fs::write(dir.join("file"), "from the context\n")?;
    let at = dir.display().to_string();
    let kernel = engine.run(&["--rm"], &["uname", "-r"])?.code(0)?.text();
    let isolated = ["--isolation", "oci", "--network", "none"];
    engine.ok(&[&["build"], &isolated[..], &["--tag", "localhost/built:1", &at]].concat())?;
    let base = ["run", "--rm", "--network", "none"];
    let said = engine.ok(&[&base, &SMALL[..], &["localhost/built:1"]].concat())?;
    same(&said, &format!("{kernel}7\nfrom the context"))?;
    let buildah = |args: &[&str]| {
        let mut buildah = Command::new("buildah");
        // Its storage is podman's: the flags that say where come first there too.
        buildah
            .args(&engine.program[1..3])
            .args(args)
            .envs(engine.env.iter().cloned())
            .current_dir(&engine.dir);
        process::run(buildah, b"", engine.world.patience())
    };
    let name = engine.world.name("working");
    buildah(&["from", "--pull-never", "--name", &name, IMAGE])?.code(0)?;
    let runtime = engine.world.runtime.display().to_string();
    let run = [&["run", "--runtime", &runtime], &isolated[..], &[&name, "--"]].concat();
    same(&buildah(&[&run[..], &["uname", "-r"]].concat())?.code(0)?.text(), &kernel)?;
    buildah(&[&run[..], &["sh", "-c", "exit 9"]].concat())?.code(9)?;
    buildah(&["rm", &name])?.code(0).map(drop)
}
