//! Demands of the spec and of engines that no other subject covers.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, eventually};
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "create/a-relative-bundle", relative),
        wish(At::Both, "create/a-root-mounted-for-create-alone", mounted_for_create),
        wish(At::Both, "create/any-version-1-and-unknown-fields", versions),
        wish(At::Both, "kill/in-each-state", kill_states),
        wish(At::Both, "pid/killed-ends-everything", killed),
    ]
}

fn silent(command: &mut Command) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
}

fn relative(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::idle())?;
    let name = bundle.file_name().context("a name")?.to_string_lossy().into_owned();
    let id = world.name("c");
    // `command` runs in the directory that bundles lie in.
    let pid_file = bundle.join("pid");
    let mut create =
        world.command(&["create", "--bundle", &name, "--pid-file", &pid_file.to_string_lossy(), &id]);
    silent(&mut create);
    let created = process::start(create, false, world.patience())?.finish();
    let state = world.ok(&["state", &id]).and_then(|output| Ok(serde_json::from_slice(&output.stdout)?));
    world.ok(&["delete", "--force", &id])?;
    created?.code(0)?;
    let state: serde_json::Value = state?;
    same(&state["bundle"], &json!(bundle))?;
    same(&json!(fs::read_to_string(pid_file)?.parse::<i32>()?), &state["pid"])
}

/// podman does so for some users: later verbs run outside the mount namespace of `create`.
fn mounted_for_create(world: &'static World) -> Result<()> {
    let bundle = world.make_dir("bundle")?;
    let rootfs = bundle.join("rootfs");
    fs::create_dir(&rootfs)?;
    let config =
        Config::sh("trap 'exit 9' TERM; touch /shared/ran; sleep 1000 & wait").bind(&bundle, "/shared", &[]);
    crate::world::write_config(&bundle, &config)?;
    let id = world.name("c");
    let (path, pid_file) = (bundle.to_string_lossy().into_owned(), bundle.join("pid"));
    let line = world.command(&["create", "--bundle", &path, "--pid-file", &pid_file.to_string_lossy(), &id]);
    let mut create = Command::new("unshare");
    create.args(["--mount", "sh", "-c", "mount --rbind \"$0\" \"$1\" && shift && exec \"$@\""]);
    create.arg(world.shared_rootfs()).arg(&rootfs).arg(line.get_program()).args(line.get_args());
    silent(&mut create);
    process::start(create, false, world.patience())?.finish()?.code(0)?;
    let started = world.ok(&["start", &id]);
    let ran = eventually("its process", world.patience(), || Ok(bundle.join("ran").exists()));
    let killed = world.ok(&["kill", &id, "TERM"]);
    let pid: i32 = fs::read_to_string(&pid_file)?.parse()?;
    let status = process::wait_child(pid, world.patience());
    world.ok(&["delete", "--force", &id])?;
    started?;
    ran?;
    killed?;
    same(&status?, &9)
}

/// config.md "Specification version" and "Extensibility": unknown properties MUST be ignored.
fn versions(world: &'static World) -> Result<()> {
    let all = ["1.0.0", "1.3.0", "1.0.2-dev", "1.1.0", "1.2.1"];
    for version in all.iter().take(world.by_level(5, 2, 5)) {
        let config = Config::sh("echo ran")
            .set("/ociVersion", json!(version))
            .set("/org.example.unknown", json!({ "a": [1] }))
            .set("/process/unknown", json!(true))
            .set("/linux/unknown", json!("x"));
        same(&world.run_config(&config)?, &"ran\n".into()).with_context(|| version.to_string())?;
    }
    Ok(())
}

/// runtime.md "Kill": an error, and no effect, where it is neither created nor running.
fn kill_states(world: &'static World) -> Result<()> {
    let mut container = Container::create(world, &Config::idle())?;
    container.kill("0")?;
    container.expect_status("created")?;
    container.kill("KILL")?;
    same(&container.wait()?, &137)?;
    container.expect_status("stopped")?;
    let output = world.call(&["kill", &container.id, "KILL"])?;
    ensure!(output.code != 0, "kill of a stopped container succeeds");
    container.expect_status("stopped")?;
    let output = world.call(&["start", &container.id])?;
    ensure!(output.code != 0, "start of a stopped container succeeds");
    container.expect_status("stopped")?;
    container.delete(&[])
}

fn killed(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    let mut exec = container.spawn(&["sh", "-c", "echo up; exec sleep 1000"])?;
    exec.read_until("up")?;
    process::signal(container.pid, Signal::KILL)?;
    same(&container.wait_for(Duration::from_secs(5))?, &137)?;
    ensure!(exec.finish()?.code != 0, "exec ended with 0");
    container.expect_status("stopped")?;
    container.delete(&[])
}
