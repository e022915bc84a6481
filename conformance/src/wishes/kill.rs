//! `kill`: every form of a signal, in every state.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{eventually, is_alive};
use crate::world::World;

const SIGNALS: [&str; 12] =
    ["HUP", "INT", "QUIT", "USR1", "USR2", "PIPE", "ALRM", "TERM", "CONT", "TSTP", "WINCH", "URG"];

/// Wishes that share a container.
const WISHES: &[Wish<Container>] = &[
    ("kill/names-and-numbers-in-every-form", forms),
    ("kill/zero-only-asks", |container| {
        container.kill("0")?;
        container.expect_status("running")
    }),
    ("kill/term-is-the-default", |container| {
        let before = container.output().matches("got TERM").count();
        container.world.ok(&["kill", &container.id])?;
        eventually("TERM", container.world.patience(), || {
            Ok(container.output().matches("got TERM").count() == before + 1)
        })
    }),
    ("kill/what-is-no-signal-is-refused", |container| {
        let (world, id) = (container.world, &container.id);
        for word in ["65", "-1", "NOPE", "SIG", "", "9x", "1000000000000"] {
            world.refused(&["kill", id, word], &["signal"]).with_context(|| format!("{word:?}"))?;
        }
        container.expect_status("running")
    }),
    ("kill/all-reaches-every-process", |container| {
        let exec = container.spawn(&[
            "sh",
            "-c",
            "trap 'echo heard; exit 3' USR1; echo up; while :; do sleep 0.05; done",
        ]);
        let mut exec = exec?;
        exec.read_until("up")?;
        container.world.ok(&["kill", "--all", &container.id, "USR1"])?;
        same(&exec.finish()?.code(3)?.text(), &"up\nheard\n".into())
    }),
    ("kill/stop-and-continue", |container| {
        let state = "sed 's/.*) //' /proc/1/stat | cut -c 1";
        container.kill("STOP")?;
        eventually("the stop", container.world.patience(), || Ok(container.sh(state)? == "T"))?;
        container.kill("CONT")?;
        eventually("the go", container.world.patience(), || Ok(container.sh(state)? != "T"))
    }),
    ("kill/kill-ends-it-with-137", |container| {
        container.kill("KILL")?;
        same(&container.wait()?, &137)?;
        container.expect_status("stopped")?;
        container.delete(&[])
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, listener, WISHES),
        wish(At::Local, "kill/a-signal-sent-at-once-after-start-is-not-lost", at_once),
        wish(At::Local, "kill/signals-to-the-pid-itself-are-forwarded", to_pid),
        wish(At::Local, "kill/background-processes-end-with-the-first", background),
        wish(At::Local, "kill/realtime-signals-arrive", realtime),
    ]
}

fn listener(world: &'static World) -> Result<Container> {
    let traps: String = SIGNALS.iter().map(|name| format!("trap 'echo got {name}' {name}; ")).collect();
    let container =
        Container::running(world, &Config::sh(&format!("{traps} echo up; while :; do sleep 0.05; done")))?;
    eventually("the traps", world.patience(), || Ok(container.output().contains("up")))?;
    Ok(container)
}

fn forms(container: &mut Container) -> Result<()> {
    let heard = |container: &Container, form: &str, name: &str| -> Result<()> {
        let line = format!("got {name}\n");
        let before = container.output().matches(&line).count();
        container.kill(form)?;
        eventually(&format!("{name} by {form:?}"), container.world.patience(), || {
            Ok(container.output().matches(&line).count() == before + 1)
        })
    };
    for name in SIGNALS {
        heard(container, name, name)?;
    }
    for (form, name) in [
        ("SIGTERM", "TERM"),
        ("term", "TERM"),
        ("sigusr1", "USR1"),
        ("15", "TERM"),
        ("1", "HUP"),
        ("28", "WINCH"),
    ] {
        heard(container, form, name)?;
    }
    Ok(())
}

fn at_once(world: &'static World) -> Result<()> {
    // A program that dies of TERM though it is pid 1 only if a handler is there: so KILL, which must never be lost.
    for _ in 0..world.by_level(10, 1, 50) {
        let mut container = Container::create(world, &Config::idle())?;
        container.start()?;
        container.kill("KILL")?;
        same(&container.wait_for(Duration::from_secs(5))?, &137)?;
        container.delete(&[])?;
    }
    Ok(())
}

fn to_pid(world: &'static World) -> Result<()> {
    let mut container = listener(world)?;
    crate::process::signal(container.pid, rustix::process::Signal::USR1)?;
    eventually("USR1", world.patience(), || Ok(container.output().contains("got USR1")))?;
    crate::process::signal(container.pid, rustix::process::Signal::KILL)?;
    same(&container.wait_for(Duration::from_secs(5))?, &137)?;
    container.delete(&[])
}

fn background(world: &'static World) -> Result<()> {
    let before = crate::leaks::processes(world).len();
    let config = Config::sh("sleep 7654 & sleep 7655 & setsid sleep 7656 & echo up; exit 0");
    let mut container = Container::running(world, &config)?;
    same(&container.wait()?, &0)?;
    ensure!(!is_alive(container.pid), "it is alive");
    eventually("the end of its processes", Duration::from_secs(3), || {
        Ok(crate::leaks::processes(world).len() == before)
    })?;
    container.delete(&[])
}

fn realtime(world: &'static World) -> Result<()> {
    // No shell here traps real-time signals; their default action shows that they arrive.
    for (form, number) in [("34", 34), ("RTMIN", 34), ("SIGRTMIN+3", 37), ("RTMAX", 64), ("64", 64)] {
        let container = Container::running(world, &Config::idle().set("/process/rlimits", json!([])))?;
        let mut exec = container.spawn(&["sh", "-c", "echo up; exec sleep 100"])?;
        exec.read_until("up")?;
        container.world.ok(&["kill", "--all", &container.id, form])?;
        exec.finish()?.code(128 + number).with_context(|| form.to_string())?;
    }
    Ok(())
}
