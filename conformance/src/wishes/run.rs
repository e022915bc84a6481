//! `run`: one command from bundle to exit status.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::create_command;
use crate::process::{self, Output, eventually};
use crate::world::World;

/// Wishes for one run.
const WISHES: &[Wish<Output>] = &[
    ("run/exit-status-is-the-workloads", |output| same(&output.code, &42)),
    ("run/stdin-reaches-the-workload-to-its-end", |output| same(&output.text(), &"in 11\nout\n".into())),
    ("run/stderr-is-apart", |output| same(&output.stderr, &"err\n".into())),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::All, one_run, WISHES),
        wish(At::Local, "run/every-exit-status", every_status),
        wish(At::Both, "run/death-by-a-signal-is-128-plus-its-number", death_by_signal),
        wish(At::Both, "run/signals-are-forwarded", forwards_signals),
        wish(At::Local, "run/interrupt-hangup-and-user-signals-are-forwarded", forwards_more_signals),
        wish(At::Both, "run/keep-keeps-a-stopped-container", keep),
        wish(At::Both, "run/detach-returns-and-the-container-runs", detach),
        wish(At::Both, "run/state-shows-it-running", state_while_running),
        wish(At::Local, "run/bundle-is-the-working-directory-by-default", default_bundle),
        wish(At::Local, "run/killed-run-leaves-a-deletable-container", killed_run),
        wish(At::Local, "run/stdin-left-unread-does-not-block", unread_stdin),
        wish(At::Local, "run/output-of-a-short-life-is-whole", short_lives),
    ]
}

pub fn same<T: PartialEq + std::fmt::Debug>(found: &T, expected: &T) -> Result<()> {
    ensure!(found == expected, "{found:?}, not {expected:?}");
    Ok(())
}

fn one_run(world: &'static World) -> Result<Output> {
    let script = "echo in $(cat | wc -c); echo out; echo err >&2; exit 42";
    world.run(&world.bundle(&Config::sh(script))?, b"hello world")
}

fn every_status(world: &'static World) -> Result<()> {
    for status in [0, 1, 2, 125, 126, 127, 128, 137, 254, 255] {
        let bundle = world.bundle(&Config::sh(&format!("exit {status}")))?;
        world.run(&bundle, b"")?.code(status)?.quiet()?;
    }
    Ok(())
}

fn death_by_signal(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("echo up; exec sleep 1000"))?;
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("up")?;
    world.ok(&["kill", &id, "KILL"])?;
    run.finish()?.code(137)?;
    // Not pid 1, so that signals without a handler act.
    let inner = "(exec sh -c 'kill -SEGV $$'); exit $?";
    world.run(&world.bundle(&Config::sh(inner))?, b"")?.code(139).map(drop)
}

fn forward(world: &'static World, signal: Signal, name: &str) -> Result<()> {
    let id = world.name("run");
    let script = format!("trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 0.05; done");
    let bundle = world.bundle(&Config::sh(&script))?;
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("ready")?;
    run.signal(signal)?;
    let output = run.finish()?.code(7)?;
    same(&output.text(), &format!("ready\ngot {name}\n"))
}

fn forwards_signals(world: &'static World) -> Result<()> {
    forward(world, Signal::TERM, "TERM")
}

fn forwards_more_signals(world: &'static World) -> Result<()> {
    [
        (Signal::INT, "INT"),
        (Signal::HUP, "HUP"),
        (Signal::USR1, "USR1"),
        (Signal::QUIT, "QUIT"),
        (Signal::WINCH, "WINCH"),
    ]
    .into_iter()
    .try_for_each(|(signal, name)| forward(world, signal, name).context(name))
}

fn keep(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("exit 3"))?;
    world.call(&["run", "--keep", "--bundle", &bundle.to_string_lossy(), &id])?.code(3)?.quiet()?;
    let state: serde_json::Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
    same(&state["status"], &"stopped".into())?;
    same(&state["pid"], &0.into())?;
    world.ok(&["delete", &id])?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn detach(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("trap 'exit 9' TERM; while :; do sleep 0.05; done"))?;
    let pid_file = bundle.join("pid");
    let log = bundle.join("output");
    let mut command = world.command(&[
        "run",
        "-d",
        "-b",
        &bundle.to_string_lossy(),
        "--pid-file",
        &pid_file.to_string_lossy(),
        &id,
    ]);
    let file = std::fs::File::create(&log)?;
    command.stdin(std::process::Stdio::null()).stdout(file.try_clone()?).stderr(file);
    process::start(command, false, world.patience())?.finish()?.code(0)?;
    same(&std::fs::read_to_string(&log)?, &String::new())?;
    let pid: i32 = std::fs::read_to_string(&pid_file)?.parse().context("pid file")?;
    let state: serde_json::Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
    same(&state["status"], &"running".into())?;
    same(&state["pid"], &pid.into())?;
    // The shell may not have set its trap yet, and pid 1 without a handler is not killed by TERM.
    eventually("its end by TERM", world.patience(), || {
        let _ = world.call(&["kill", &id, "TERM"])?;
        Ok(!process::is_alive(pid))
    })?;
    same(&process::wait_child(pid, Duration::from_secs(5))?, &9)?;
    world.ok(&["delete", &id]).map(drop)
}

fn state_while_running(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("echo up; cat"))?;
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), "--keep", &id])?;
    run.read_until("up")?;
    let mut state = serde_json::Value::Null;
    // It is noted once the program has been executed: a state that is a little late is none that is false.
    eventually("the state running", world.patience(), || {
        state = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
        ensure!(["created", "running"].iter().any(|status| state["status"] == *status), "{state}");
        Ok(state["status"] == "running")
    })?;
    ensure!(run.pid() != state["pid"].as_i64().unwrap_or(0) as i32, "the container's pid is run's own");
    run.finish()?.code(0)?;
    world.ok(&["delete", &id]).map(drop)
}

fn default_bundle(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo here"))?;
    let mut command = world.command(&["run", &world.name("run")]);
    command.current_dir(&bundle);
    same(&process::run(command, b"", world.patience())?.code(0)?.text(), &"here\n".to_string())?;
    let mut command = world.command(&["run", "-b", "sub/../.", &world.name("run")]);
    command.current_dir(&bundle);
    std::fs::create_dir(bundle.join("sub"))?;
    same(&process::run(command, b"", world.patience())?.code(0)?.text(), &"here\n".to_string())
}

fn killed_run(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("echo up; exec sleep 1000"))?;
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("up")?;
    run.signal(Signal::KILL)?;
    eventually("run's end", world.patience(), || run.has_ended())?;
    world.ok(&["delete", "--force", &id])?;
    run.finish()?.code(137).map(drop)
}

fn unread_stdin(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("sleep 0.2; echo done"))?;
    let input = vec![b'x'; 4 << 20];
    let output = world.run(&bundle, &input)?.code(0)?;
    same(&output.text(), &"done\n".to_string())
}

fn short_lives(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("printf '%070000d' 1; printf '%05000d' 2 >&2"))?;
    for _ in 0..world.by_level(20, 3, 100) {
        let output = world.run(&bundle, b"")?.code(0)?;
        same(&output.stdout.len(), &70_000)?;
        same(&output.stderr.len(), &5_000)?;
    }
    // The same where the output goes to a file that `create` leaves to the container.
    let id = world.name("c");
    let mut create = create_command(world, &bundle, &id);
    let path = bundle.join("output");
    create
        .stdin(std::process::Stdio::null())
        .stdout(std::fs::File::create(&path)?)
        .stderr(std::process::Stdio::null());
    process::start(create, false, world.patience())?.finish()?.code(0)?;
    world.ok(&["start", &id])?;
    let pid: i32 = std::fs::read_to_string(bundle.join("pid"))?.parse()?;
    same(&process::wait_child(pid, world.patience())?, &0)?;
    same(&std::fs::metadata(&path)?.len(), &70_000)?;
    world.ok(&["delete", &id]).map(drop)
}
