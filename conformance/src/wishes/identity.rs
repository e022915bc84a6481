//! What engines find by the container's pid: namespaces, cgroup, root.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::lan::Netns;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::leaks::processes;
use crate::process::{self, Running};
use crate::world::World;

/// Two containers, and a network namespace for one of them.
struct Pair {
    plain: Container,
    joined: Container,
    netns: Netns,
    cgroup: String,
}

/// Wishes for a pair.
const WISHES: &[Wish<Pair>] = &[
    ("pid/namespaces-are-its-own", |pair| {
        for kind in ["net", "ipc", "uts", "pid", "mnt"] {
            let (a, host) = (link(pair.plain.pid, kind)?, link(own(), kind)?);
            ensure!(a != host, "{kind}: it is the host's");
            ensure!(a != link(pair.joined.pid, kind)?, "{kind}: two containers share it");
        }
        Ok(())
    }),
    ("pid/every-namespace-can-be-opened-and-entered", |pair| {
        for kind in ["net", "ipc", "uts", "pid", "mnt", "cgroup", "user"] {
            fs::File::open(format!("/proc/{}/ns/{kind}", pair.plain.pid))
                .with_context(|| kind.to_string())?;
        }
        let said = enter(pair.plain.pid, &["--uts", "--net", "--ipc", "hostname"])?;
        same(&said, &"conformance\n".into())
    }),
    ("pid/a-new-network-namespace-has-loopback-alone", |pair| {
        let said = enter(
            pair.plain.pid,
            &["--net", "sh", "-c", "tail -n +3 /proc/net/dev | cut -d : -f 1 | grep -v a3s-tap"],
        )?;
        same(&said.trim().to_string(), &"lo".into())
    }),
    ("pid/a-network-namespace-given-by-path-is-joined", |pair| {
        let inode = pair.netns.run("stat -L -c net:[%i] /proc/self/ns/net")?;
        same(&link(pair.joined.pid, "net")?, &inode)
    }),
    ("pid/its-cgroup-is-cgroups-path", |pair| {
        for path in cgroups(pair.joined.pid)? {
            same(&path, &pair.cgroup)?;
        }
        Ok(())
    }),
    ("pid/what-runs-below-it-is-in-its-cgroup", |pair| {
        let below = processes(pair.joined.world);
        let below = below.iter().filter(|(pid, _)| descends(*pid, pair.joined.pid));
        for (pid, name) in below {
            for path in cgroups(*pid)? {
                ensure!(path.starts_with(&pair.cgroup), "{pid} {name} is in {path}");
            }
        }
        Ok(())
    }),
    ("pid/a-cgroup-without-a-path-bears-the-id", |pair| {
        for path in cgroups(pair.plain.pid)? {
            ensure!(path.ends_with(&pair.plain.id), "{path} does not end in {}", pair.plain.id);
        }
        Ok(())
    }),
    ("pid/ps-as-json-holds-it", |pair| {
        let text = pair.plain.world.ok(&["ps", "--format", "json", &pair.plain.id])?.text();
        let pids: Vec<i32> = serde_json::from_str(&text)?;
        ensure!(text.ends_with("]\n"), "{text:?}");
        ensure!(pids.contains(&pair.plain.pid), "{pids:?} without {}", pair.plain.pid);
        let dead: Vec<_> = pids.iter().filter(|pid| !process::is_alive(**pid)).collect();
        ensure!(dead.is_empty(), "{dead:?} do not exist on the host");
        Ok(())
    }),
    ("pid/has-no-capability-and-no-new-privileges", |pair| {
        let status = fs::read_to_string(format!("/proc/{}/status", pair.plain.pid))?;
        for line in
            ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"]
        {
            ensure!(status.contains(line), "no {line:?}");
        }
        Ok(())
    }),
    ("pid/its-cgroup-is-removed-with-it", |pair| {
        pair.joined.delete(&["--force"])?;
        let name = pair.cgroup.rsplit('/').next().unwrap_or_default();
        let left = crate::leaks::Census::cgroups_named(name);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, Pair::set_up, WISHES),
        wish(At::Local, "namespaces/ipc-and-uts-given-by-path-are-joined", join_more),
        wish(At::Local, "namespaces/what-cannot-be-given-is-refused-by-name", refused),
        wish(At::Local, "cgroup/forms-of-cgroups-path", forms),
        wish(At::Local, "cgroup/one-that-others-live-in-is-refused", occupied),
        wish(At::Vm, "cgroup/disabled-leaves-the-callers", disabled),
    ]
}

impl Pair {
    fn set_up(world: &'static World) -> Result<Self> {
        let netns = Netns::new(world)?;
        let cgroup = format!("/{}/pod/{}", world.tag, world.name("cg"));
        let network = json!({ "type": "network", "path": netns.path() });
        let config =
            Config::idle().set("/linux/namespaces/1", network).set("/linux/cgroupsPath", json!(cgroup));
        let joined = Container::running(world, &config)?;
        let plain = Container::running(world, &Config::idle())?;
        Ok(Pair { plain, joined, netns, cgroup })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // cgroupsPath's parents are the engine's to remove: here, ours.
        let top = self.cgroup.split('/').nth(1).unwrap_or("").to_string();
        let _ = self.plain.world.call(&["delete", "--force", &self.joined.id]);
        remove_cgroups(&top);
    }
}

/// Removes empty cgroups below one of this name at the top of each hierarchy.
fn remove_cgroups(name: &str) {
    for dir in crate::leaks::Census::cgroups_named(name).iter().rev() {
        for below in ["pod", ""] {
            let _ = fs::remove_dir(dir.join(below));
        }
    }
}

/// A process that does nothing in namespaces of its own.
fn hold(kinds: &[&str]) -> Result<Running> {
    let mut command = Command::new("unshare");
    command.args(kinds).args(["sh", "-c", "hostname held 2>/dev/null; echo ready; exec sleep 10000"]);
    let mut holder = process::start(command, true, Duration::from_secs(10))?;
    holder.read_until("ready")?;
    Ok(holder)
}

fn own() -> i32 {
    std::process::id() as i32
}

fn link(pid: i32, kind: &str) -> Result<String> {
    let path = format!("/proc/{pid}/ns/{kind}");
    Ok(fs::read_link(&path).context(path)?.to_string_lossy().into_owned())
}

fn descends(mut pid: i32, from: i32) -> bool {
    while pid != from {
        match process::parent(pid) {
            Some(above) => pid = above,
            None => return false,
        }
    }
    true
}

fn enter(pid: i32, args: &[&str]) -> Result<String> {
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string()]).args(args);
    Ok(process::run(command, b"", Duration::from_secs(20))?.code(0)?.text())
}

/// A process's cgroup in each hierarchy where it is not at the top.
fn cgroups(pid: i32) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).context("its cgroup")?;
    let paths: Vec<String> =
        text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(str::to_string).collect();
    ensure!(!paths.is_empty(), "no cgroup at all");
    Ok(paths)
}

fn join_more(world: &'static World) -> Result<()> {
    let holder = hold(&["--ipc", "--uts"])?;
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", holder.pid());
    let config = Config::idle()
        .set("/linux/namespaces/2", json!({ "type": "ipc", "path": path("ipc") }))
        .set("/linux/namespaces/3", json!({ "type": "uts", "path": path("uts") }))
        .without("/hostname");
    let container = Container::running(world, &config)?;
    for kind in ["ipc", "uts"] {
        same(&link(container.pid, kind)?, &link(holder.pid(), kind)?)?;
    }
    Ok(())
}

fn refused(world: &'static World) -> Result<()> {
    let network = json!({ "type": "network" });
    let mine = |kind: &str| format!("/proc/{}/ns/{kind}", own());
    for (list, words) in [
        (json!([network, { "type": "user" }]), "user"),
        (json!([network, { "type": "time", "path": mine("time") }]), "time"),
        (json!([network, { "type": "pid", "path": mine("pid") }]), "pid"),
        (json!([network, { "type": "mount", "path": mine("mnt") }]), "mount"),
        (json!([network, { "type": "cgroup", "path": mine("cgroup") }]), "cgroup"),
        (json!([network, network]), "twice"),
        (json!([network, { "type": "nonsense" }]), "nonsense"),
        (json!([{ "type": "network", "path": "relative" }]), "relative"),
        (json!([{ "type": "network", "path": "/no/such/netns" }]), "no such file"),
        (json!([{ "type": "network", "path": "/etc/hostname" }]), "network"),
    ] {
        let bundle = world.bundle(&Config::idle().set("/linux/namespaces", list.clone()))?;
        let output =
            world.run(&bundle, b"")?.code(1)?.one_line(&[words]).with_context(|| list.to_string())?;
        ensure!(output.stderr.contains("namespaces"), "{:?} does not name linux.namespaces", output.stderr);
    }
    Ok(())
}

fn forms(world: &'static World) -> Result<()> {
    let tag = &world.tag;
    for (given, ending) in [
        (format!("/{tag}"), format!("/{tag}")),
        (format!("/{tag}/a/b"), format!("/{tag}/a/b")),
        (format!("{tag}-relative"), format!("/{tag}-relative")),
    ] {
        let mut container =
            Container::running(world, &Config::idle().set("/linux/cgroupsPath", json!(given)))?;
        for path in cgroups(container.pid)? {
            ensure!(path.ends_with(&ending), "{given} became {path}");
        }
        container.delete(&["--force"])?;
        for dir in crate::leaks::Census::cgroups_named(tag).iter().rev() {
            let _ = fs::remove_dir(dir.join("a"));
            let _ = fs::remove_dir(dir);
        }
    }
    for given in ["/", "..", "/a/../../b", "../x"] {
        let bundle = world.bundle(&Config::idle().set("/linux/cgroupsPath", json!(given)))?;
        world.run(&bundle, b"")?.code(1)?.one_line(&["cgroupsPath"]).with_context(|| given.to_string())?;
    }
    Ok(())
}

fn occupied(world: &'static World) -> Result<()> {
    let path = format!("/{}-busy", world.tag);
    let mut first = Container::running(world, &Config::idle().set("/linux/cgroupsPath", json!(path)))?;
    let bundle = world.bundle(&Config::idle().set("/linux/cgroupsPath", json!(path)))?;
    world.run(&bundle, b"")?.code(1)?.one_line(&["cgroup", "not empty"])?;
    first.expect_status("running")?;
    first.delete(&["--force"])
}

fn disabled(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("echo up; cat"))?;
    let mut run =
        world.start(&["--cgroup-manager", "disabled", "run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("up")?;
    let state: Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
    let pid = state["pid"].as_i64().context("no pid")? as i32;
    same(&cgroups(pid)?, &cgroups(own())?)?;
    let pids: Vec<i32> = serde_json::from_slice(&world.ok(&["ps", "-f", "json", &id])?.stdout)?;
    ensure!(pids.contains(&pid), "{pids:?}");
    world.refused(&["pause", &id], &["cgroup"])?;
    run.finish()?.code(0).map(drop)
}

/// A child whose streams go nowhere, for tests that want none.
pub fn silent(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}
