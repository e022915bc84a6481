//! The states of runtime.md where they are hard to keep: two callers at once, too early, config.json gone.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::process::{self, Output, Running, eventually};
use crate::world::{World, write_config};

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "create/twice-at-once-one-wins", create_twice),
        wish(At::Both, "start/twice-at-once-one-wins", start_twice),
        wish(At::Both, "state/created-is-the-time-of-create", created_time),
        wish(At::Local, "state/creating-is-too-early-for-every-verb", creating),
        wish(At::Local, "exec/flags-need-no-config-json", exec_flags),
    ]
}

fn quietly(world: &World, mut command: Command) -> Result<Running> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    process::start(command, false, world.patience())
}

/// What became of several commands: exactly one has succeeded.
fn one_of(all: Vec<Running>) -> Result<(usize, Vec<Output>)> {
    let all = all.into_iter().map(Running::finish).collect::<Result<Vec<_>>>()?;
    let codes: Vec<i32> = all.iter().map(|output| output.code).collect();
    ensure!(codes.iter().filter(|code| **code == 0).count() == 1, "ended with {codes:?}");
    Ok((codes.iter().position(|code| *code == 0).context("none")?, all))
}

fn create_twice(world: &'static World) -> Result<()> {
    for _ in 0..world.by_level(5, 1, 20) {
        let id = world.name("twin");
        let bundles: Vec<_> = (0..3).map(|_| world.bundle(&Config::idle())).collect::<Result<_>>()?;
        let begun = bundles.iter().map(|bundle| {
            let mut create = create_command(world, bundle, &id);
            create.stderr(fs::File::create(bundle.join("err"))?);
            quietly(world, create)
        });
        let (winner, _) = one_of(begun.collect::<Result<_>>()?)?;
        for (index, bundle) in bundles.iter().enumerate().filter(|(index, _)| *index != winner) {
            let said = fs::read_to_string(bundle.join("err"))?;
            ensure!(said.contains("already exists"), "{index}: {said:?}");
            ensure!(!bundle.join("pid").exists(), "{index} wrote a pid file");
        }
        let state: serde_json::Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
        same(&state["status"], &"created".into())?;
        same(&state["bundle"], &json!(bundles[winner]))?;
        world.ok(&["delete", "--force", &id])?;
    }
    Ok(())
}

fn start_twice(world: &'static World) -> Result<()> {
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo poststart >>\"$0\"", "TOLD"], "env": ["PATH=/bin:/usr/bin"] }]);
    for _ in 0..world.by_level(5, 1, 20) {
        let told = world.make_dir("told")?.join("told");
        let config = Config::idle()
            .set("/hooks/poststart", hook.clone())
            .set("/hooks/poststart/0/args/3", json!(told));
        let mut container = Container::create(world, &config)?;
        let errors: Vec<_> = (0..3).map(|n| told.with_file_name(format!("err{n}"))).collect();
        let begun = errors.iter().map(|path| {
            let mut start = world.command(&["start", &container.id]);
            start.stderr(fs::File::create(path)?);
            quietly(world, start)
        });
        let (winner, _) = one_of(begun.collect::<Result<_>>()?)?;
        for (_, path) in errors.iter().enumerate().filter(|(index, _)| *index != winner) {
            let said = fs::read_to_string(path)?;
            ensure!(said.contains("cannot start an already running container"), "{said:?}");
        }
        container.expect_status("running")?;
        same(&fs::read_to_string(&told)?, &"poststart\n".into())?;
        container.delete(&["--force"])?;
    }
    Ok(())
}

fn created_time(world: &'static World) -> Result<()> {
    let now = || -> Result<String> {
        let mut date = Command::new("date");
        date.args(["-u", "+%Y-%m-%dT%H:%M:%S"]);
        Ok(process::run(date, b"", world.patience())?.code(0)?.text().trim().to_string())
    };
    let before = now()?;
    let mut container = Container::create(world, &Config::idle())?;
    let after = now()?;
    let told = container.state()?["created"].clone();
    let second = told.as_str().and_then(|text| text.get(..before.len())).context("no time")?.to_string();
    ensure!((&before..=&after).contains(&&second), "{told}, between {before} and {after}");
    std::thread::sleep(std::time::Duration::from_millis(10));
    container.start()?;
    same(&container.state()?["created"], &told).context("once started")?;
    container.kill("KILL")?;
    container.wait()?;
    same(&container.state()?["created"], &told).context("once stopped")
}

/// A hook keeps `create` from its end until it is told.
fn creating(world: &'static World) -> Result<()> {
    let dir = world.make_dir("gate")?;
    let (here, go) = (dir.join("here"), dir.join("go"));
    let script = "touch \"$0\"; until [ -e \"$1\" ]; do sleep 0.02; done";
    let hook =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script, here, go], "env": ["PATH=/bin:/usr/bin"] }]);
    let bundle = world.bundle(&Config::idle().set("/hooks/createRuntime", hook))?;
    let id = world.name("early");
    let mut create = create_command(world, &bundle, &id);
    create.stderr(Stdio::null());
    let create = quietly(world, create)?;
    eventually("the hook", world.patience(), || Ok(here.exists()))?;
    let refused = (|| {
        let state: serde_json::Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
        same(&state["status"], &"creating".into())?;
        for (args, words) in [
            (&["start", &id][..], "still being created"),
            (&["kill", &id, "TERM"], "still being created"),
            (&["delete", &id], "that is not stopped: creating"),
            (&["pause", &id], "not running"),
            (&["resume", &id], "not running"),
            (&["update", "--pids-limit", "9", &id], "not running"),
        ] {
            world.refused(args, &[words]).with_context(|| format!("{args:?}"))?;
        }
        let create = create_command(world, &bundle, &id);
        process::run(create, b"", world.patience())?.code(1)?.one_line(&["already exists"])?;
        world.call(&["exec", &id, "true"])?.code(255)?.one_line(&["still being created"]).map(drop)
    })();
    fs::write(&go, "")?;
    create.finish()?.code(0)?;
    refused?;
    world.ok(&["start", &id])?;
    same(&world.ok(&["exec", &id, "echo", "well"])?.text(), &"well\n".into())?;
    world.ok(&["delete", "--force", &id]).map(drop)
}

/// "Any updates to config.json after this step MUST NOT affect the container" (runtime.md, Lifecycle).
fn exec_flags(world: &'static World) -> Result<()> {
    let config = Config::idle().set("/process/cwd", json!("/tmp")).set("/process/user/umask", json!(0o27));
    let container = Container::running(world, &config)?;
    let asks = |when: &str| {
        let args = ["--env", "MORE=yes", &container.id, "sh", "-c", "echo $FROM_CONFIG $MORE $PWD $(umask)"];
        let output = world.ok(&[&["exec"], &args[..]].concat())?;
        same(&output.text(), &"yes yes /tmp 0027\n".into()).with_context(|| when.to_string())
    };
    asks("as it was")?;
    write_config(&container.bundle, &config.set("/process/env", json!(["FROM_CONFIG=other"])))?;
    asks("edited")?;
    fs::remove_file(container.bundle.join("config.json"))?;
    asks("deleted")
}
