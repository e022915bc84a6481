//! The network when something is refused, missing, or goes away: an error that says so, and nothing left behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::lan::{A, BRIDGE, Netns, bridge, four, on, ping, stand};
use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::process;
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Vm, "net/fault/a-tap-that-is-refused-is-told", no_tap),
        wish(At::Vm, "net/fault/without-the-capability-is-told", no_capability),
        wish(At::Both, "net/fault/a-namespace-that-is-none-is-told", no_namespace),
        wish(At::Vm, "net/fault/an-interface-that-goes-before-start-is-none", gone_before_start),
        wish(At::Vm, "net/fault/a-container-outlives-its-interface-and-namespace", gone_while_running),
        wish(At::Vm, "net/fault/a-killed-create-leaves-a-namespace-clean", killed_creates),
        wish(At::Vm, "net/fault/killed-relays-take-nothing-along", killed_relays),
    ]
}

/// Nothing of a VM's is in the namespace.
fn is_clean(netns: &Netns) -> Result<()> {
    let left = netns.run(
        "ls /sys/class/net; tc qdisc show | grep -c clsact; tr '\\t' ' ' </proc/sys/net/ipv4/ip_local_port_range",
    )?;
    same(&left, &"eth0\nlo\n0\n32768 60999".into())
}

/// Runs a bundle under a program that changes its surroundings first.
fn run_under(world: &World, program: &[&str], config: &Config, words: &[&str]) -> Result<()> {
    let bundle = world.bundle(config)?;
    let run = world.command(&["run", "--bundle", &bundle.to_string_lossy(), &world.name("fault")]);
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).arg(run.get_program()).args(run.get_args());
    process::run(command, b"", world.patience())?.code(1)?.one_line(words).map(drop)
}

fn no_tap(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let netns = stand(world, &bridge, A)?;
    let hide =
        ["unshare", "--mount", "sh", "-c", "mount --bind /dev/null /dev/net/tun && exec \"$0\" \"$@\""];
    for config in [on(&netns), Config::idle()] {
        run_under(world, &hide, &config, &["make network interface a3s-tap0"])?;
    }
    is_clean(&netns)
}

fn no_capability(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let netns = stand(world, &bridge, A)?;
    let drop = ["setpriv", "--inh-caps", "-net_admin", "--bounding-set", "-net_admin"];
    for config in [on(&netns), Config::idle()] {
        run_under(world, &drop, &config, &["make network interface a3s-tap0", "not permitted"])?;
    }
    is_clean(&netns)
}

fn no_namespace(world: &'static World) -> Result<()> {
    let plain = world.make_dir("plain")?.join("file");
    fs::write(&plain, "")?;
    for (path, word) in [(Path::new("/no/such/netns"), "no such file"), (&plain, "nvalid argument")] {
        let config = Config::idle().set("/linux/namespaces/1", json!({ "type": "network", "path": path }));
        let words = ["linux.namespaces", &*path.to_string_lossy(), word];
        world.run(&world.bundle(&config)?, b"")?.code(1)?.one_line(&words)?;
    }
    Ok(())
}

fn gone_before_start(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let netns = stand(world, &bridge, A)?;
    let mut container = Container::create(world, &on(&netns))?;
    netns.run("ip link delete eth0")?;
    container.start()?;
    container.says("ls /sys/class/net", "lo")?;
    container.delete(&["--force"])?;
    same(&netns.run("ls /sys/class/net")?, &"lo".into())
}

fn gone_while_running(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let netns = stand(world, &bridge, A)?;
    let mut container = Container::running(world, &on(&netns))?;
    ping(&container, &four(BRIDGE))?;
    netns.run("ip link delete eth0")?;
    container.says("ping -c 1 -W 1 10.213.7.1 >/dev/null || echo nobody", "nobody")?;
    // Its namespace lives on without a name.
    drop(netns);
    container.says("echo well", "well")?;
    container.delete(&["--force"])
}

/// Wherever it is when it is killed, `delete` finds all of it.
fn killed_creates(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let netns = stand(world, &bridge, A)?;
    for moment in 0..world.by_level(1, 5, 20) {
        let id = world.name("killed");
        let bundle = world.bundle(&on(&netns))?;
        let create = process::start(create_command(world, &bundle, &id), false, world.patience())?;
        std::thread::sleep(Duration::from_millis(120 * moment));
        create.signal(Signal::KILL)?;
        create.finish()?;
        world.call(&["delete", "--force", &id])?.code(0)?;
        is_clean(&netns).with_context(|| format!("killed after {} ms", 120 * moment))?;
    }
    Ok(())
}

/// Every process in the namespace but the container's own two.
fn killed_relays(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let netns = stand(world, &bridge, A)?;
    let mut container = Container::running(world, &on(&netns))?;
    let inode = fs::metadata(&netns.path)?.ino();
    let inhabitants = || -> BTreeSet<i32> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|at| at.ino() == inode))
            .collect()
    };
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let relays: Vec<i32> = inhabitants()
        .into_iter()
        .filter(|pid| *pid != container.pid && !name(*pid).contains("vmm"))
        .collect();
    ensure!(!relays.is_empty(), "no relay");
    for relay in relays {
        // One may end with another.
        let _ = process::signal(relay, Signal::KILL);
    }
    ping(&container, &four(BRIDGE))?;
    container.expect_status("running")?;
    let vmm = inhabitants().into_iter().find(|pid| name(*pid).contains("vmm")).context("no VMM")?;
    process::signal(vmm, Signal::KILL)?;
    container.wait()?;
    container.delete(&["--force"])?;
    is_clean(&netns)
}
