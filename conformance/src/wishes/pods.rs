//! Pods as containerd's CRI makes them: a sandbox first, whose namespaces the others get by path, all with its
//! annotations. Every other runtime makes a pod of them as well, so only what is said of VMs is this one's.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::death::vmm;
use super::mount_options::HostMounts;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::leaks::processes;
use crate::process::{self, eventually, is_alive};
use crate::world::World;

const SHARED: &[Wish<Pod>] = &[
    ("pods/containers-share-kernel-name-and-shared-memory", share_kernel),
    ("pods/list-names-the-console-log-of-each", consoles),
    ("pods/containers-talk-over-localhost", share_localhost),
    ("pods/containers-keep-files-and-processes-to-themselves", keep_apart),
    ("pods/a-container-exits-by-itself-and-starts-again", restart),
    ("pods/a-pid-namespace-by-path-is-shared", share_pids),
    ("pods/pausing-one-container-leaves-the-others-running", pause_one),
    ("pods/a-killed-container-leaves-the-others-running", kill_one),
    ("pods/a-container-killed-while-it-reads-leaves-the-others-running", kill_readers),
    ("pods/what-cannot-join-is-refused-by-name", refusals),
    ("pods/many-containers-come-at-once", many),
];

const IN_VM: &[Wish<Pod>] = &[
    ("pods/limits-hold-for-each-container", limits),
    ("pods/a-root-file-system-is-free-once-its-container-is-deleted", release),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, Pod::set_up, SHARED),
        sharing(At::Vm, Pod::set_up, IN_VM),
        wish(At::Both, "pods/the-sandbox-ends-by-sigterm-and-all-is-deleted", sandbox_ends),
        wish(At::Both, "pods/a-killed-vmm-ends-all-and-all-is-deleted", vmm_killed),
    ]
}

/// Which is that of their VM.
fn consoles(pod: &mut Pod) -> Result<()> {
    let listed: Vec<Value> = serde_json::from_str(&pod.world().ok(&["list", "--format", "json"])?.text())?;
    let log = |container: &Container| {
        let own = listed.iter().find(|one| one["id"] == container.id.as_str());
        own.and_then(|one| Some(PathBuf::from(one["console-log"].as_str()?)))
    };
    let path = log(&pod.sandbox).context("the sandbox has none")?;
    ensure!(path.is_file(), "{} is none", path.display());
    for member in [&pod.one, &pod.two] {
        let of_member = log(member).context("a member has none")?;
        same(&of_member.canonicalize()?, &path.canonicalize()?)?;
    }
    Ok(())
}

/// A sandbox and two containers.
struct Pod {
    sandbox: Container,
    one: Container,
    two: Container,
    shm: PathBuf,
    _mounts: HostMounts,
}

impl Pod {
    fn set_up(world: &'static World) -> Result<Self> {
        let (shm, mut mounts) = (world.make_dir("shm")?, HostMounts::default());
        mounts.add(&["-t", "tmpfs", "-o", "size=1m", "shm"], &shm)?;
        let sandbox = sandbox(world)?;
        let member = || Container::running(world, &member(&sandbox, &shm));
        Ok(Pod { one: member()?, two: member()?, sandbox, shm, _mounts: mounts })
    }

    fn world(&self) -> &'static World {
        self.sandbox.world
    }

    fn member(&self) -> Config {
        member(&self.sandbox, &self.shm)
    }

    /// That the others are as they were.
    fn lives(&self) -> Result<()> {
        for container in [&self.sandbox, &self.one, &self.two] {
            container.expect_status("running")?;
        }
        self.one.says("echo one", "one")?;
        self.two.says("echo two", "two")
    }
}

/// Its program does what the pause image's does, for runtimes that run it.
fn sandbox(world: &'static World) -> Result<Container> {
    let config = Config::idle()
        .set("/hostname", json!("the-pod"))
        .set("/annotations/io.kubernetes.cri.container-type", json!("sandbox"))
        .set("/annotations/io.kubernetes.cri.sandbox-id", json!("its-own"));
    Container::running(world, &config)
}

fn member(sandbox: &Container, shm: &std::path::Path) -> Config {
    let by_path =
        |kind: &str, file: &str| json!({ "type": kind, "path": format!("/proc/{}/ns/{file}", sandbox.pid) });
    Config::idle()
        .without("/hostname")
        .set("/annotations/io.kubernetes.cri.container-type", json!("container"))
        .set("/annotations/io.kubernetes.cri.sandbox-id", json!(sandbox.id))
        .set(
            "/mounts/3",
            crate::config::mount("/dev/shm", "bind", &shm.to_string_lossy(), &["rbind", "rprivate"]),
        )
        .set(
            "/linux/namespaces",
            json!([
                { "type": "pid" }, { "type": "mount" }, { "type": "cgroup" },
                by_path("network", "net"), by_path("ipc", "ipc"), by_path("uts", "uts"),
            ]),
        )
}

fn share_kernel(pod: &mut Pod) -> Result<()> {
    let look = "cat /proc/sys/kernel/random/boot_id; hostname; readlink /proc/self/ns/ipc; readlink /proc/self/ns/net";
    same(&pod.two.sh(look)?, &pod.one.sh(look)?)?;
    ensure!(pod.one.sh(look)?.contains("the-pod"), "the host name is not the sandbox's");
    pod.one.sh("echo by one > /dev/shm/word")?;
    pod.two.says("cat /dev/shm/word", "by one")?;
    if pod.world().is_vm() {
        let own = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("boot id")?;
        ensure!(!pod.one.sh(look)?.contains(own.trim()), "it is the host's kernel");
    }
    Ok(())
}

/// How many VMMs run below this process.
pub fn vmms(world: &World) -> usize {
    processes(world).iter().filter(|(_, name)| name.contains("a3s-box-vmm")).count()
}

fn share_localhost(pod: &mut Pod) -> Result<()> {
    let server = pod.one.spawn(&["sh", "-c", "echo by localhost | nc -l -p 99"])?;
    eventually("the other is heard", pod.world().patience(), || {
        Ok(pod.two.sh("nc -w 5 127.0.0.1 99 < /dev/null 2>/dev/null || true")? == "by localhost")
    })?;
    server.finish()?.code(0).map(drop)
}

fn keep_apart(pod: &mut Pod) -> Result<()> {
    same(&vmms(pod.world()), &1)?;
    let bundle = pod.world().own_bundle(&pod.member())?;
    fs::write(bundle.join("rootfs/only-mine"), "x")?;
    let mut third = Container::of_bundle(pod.world(), bundle)?;
    third.start()?;
    third.says("ls /only-mine", "/only-mine")?;
    pod.one.says("ls /only-mine 2>/dev/null || true", "")?;
    for container in [&pod.one, &third] {
        ensure!(
            container.sh("ls /proc | grep -c '^[0-9]'")?.parse::<u32>()? < 8,
            "it sees others' processes"
        );
    }
    let shown = third.state()?;
    same(&shown["annotations"]["a3s.box/sandbox"], &json!(pod.sandbox.id))?;
    third.delete(&["--force"])?;
    pod.lives()
}

fn limits(pod: &mut Pod) -> Result<()> {
    let limited = pod
        .member()
        .set("/linux/resources", json!({ "memory": { "limit": 20 << 20 }, "pids": { "limit": 7 } }));
    let container = Container::running(pod.world(), &limited)?;
    container.says("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max", "20971520\n7")?;
    pod.one.says("cat /sys/fs/cgroup/memory.max", "max")?;
    let hungry = container.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=40M count=1"])?;
    ensure!(hungry.code != 0, "it got more memory than it may have");
    pod.lives()
}

fn restart(pod: &mut Pod) -> Result<()> {
    let bundle = pod
        .world()
        .own_bundle(&pod.member().set("/process/args", json!(["sh", "-c", "echo $$ >> /count; exit 5"])))?;
    let count = bundle.join("rootfs/count");
    for number in 1..=pod.world().by_level(5, 3, 70) {
        let mut container = Container::of_bundle(pod.world(), copy_of(pod.world(), &bundle)?)?;
        container.start()?;
        same(&container.wait()?, &5)?;
        container.delete(&[])?;
        same(&fs::read_to_string(&count)?.lines().count(), &number)?;
    }
    pod.lives()
}

/// Another bundle with the same root file system.
fn copy_of(world: &World, bundle: &std::path::Path) -> Result<PathBuf> {
    let dir = world.make_dir("bundle")?;
    let text = fs::read_to_string(bundle.join("config.json"))?;
    let mut config: serde_json::Value = serde_json::from_str(&text)?;
    config["root"]["path"] = json!(bundle.join("rootfs"));
    fs::write(dir.join("config.json"), config.to_string())?;
    Ok(dir)
}

/// An overlay whose upper directory is in use cannot be mounted again. A directory that was listed stays in use for as
/// long as a VM runs (libkrun), so this lists none.
fn release(pod: &mut Pod) -> Result<()> {
    let dir = pod.world().make_dir("overlay")?;
    let mut mounts = HostMounts::default();
    mounts.add(&["-t", "tmpfs", "tmpfs"], &dir)?;
    for name in ["upper", "work", "merged"] {
        fs::create_dir(dir.join(name))?;
    }
    let at = |name: &str| dir.join(name).display().to_string();
    let options = format!(
        "index=on,lowerdir={},upperdir={},workdir={}",
        pod.world().shared_rootfs().display(),
        at("upper"),
        at("work")
    );
    for round in 0..3 {
        let mut overlay = HostMounts::default();
        overlay.add(&["-t", "overlay", "-o", &options, "overlay"], &dir.join("merged"))?;
        let config = pod.member().set("/root/path", json!(at("merged")));
        let bundle = pod.world().make_dir("bundle")?;
        crate::world::write_config(&bundle, &config)?;
        let mut container = Container::of_bundle(pod.world(), bundle)?;
        container.start()?;
        container.says("cat /round 2>/dev/null; echo x >> /round", "x\n".repeat(round).trim_end())?;
        container.kill("KILL")?;
        container.wait()?;
        container.delete(&[])?;
    }
    pod.lives()
}

fn share_pids(pod: &mut Pod) -> Result<()> {
    let path = |of: &Container| json!({ "type": "pid", "path": format!("/proc/{}/ns/pid", of.pid) });
    let seen = "ps -o args | grep -v grep | grep -c 'sleep 100000'";
    let alone: u32 = pod.one.sh(seen)?.parse()?;
    // So many that some are still ending when the first one's end is known.
    let script = "trap 'exit 7' TERM; for i in $(seq 300); do sleep 200000 & done; touch /dev/all; wait";
    let config =
        pod.member().set("/linux/namespaces/0", path(&pod.one)).set("/process/args/2", json!(script));
    let mut guest = Container::running(pod.world(), &config)?;
    same(&guest.sh(seen)?.parse()?, &alone)?;
    let others = "ps -o args | grep -c '^sleep 200000' || true";
    eventually("all its processes are seen", pod.world().patience(), || {
        Ok(guest.exec(&["test", "-e", "/dev/all"])?.code == 0 && pod.one.sh(others)? == "300")
    })?;
    guest.kill("TERM")?;
    same(&guest.wait()?, &7)?;
    guest.delete(&[])?;
    // A guest that is busy with their ends may take longer than `delete` waits for it.
    eventually("the end of them all", pod.world().patience(), || Ok(pod.one.sh(others)? == "0"))?;
    pod.lives()
}

fn pause_one(pod: &mut Pod) -> Result<()> {
    let world = pod.world();
    let counter = Config::sh("while :; do echo x; sleep 0.1; done").value()["process"].clone();
    let container = Container::running(world, &pod.member().set("/process", counter))?;
    world.ok(&["pause", &container.id])?;
    container.expect_status("paused")?;
    std::thread::sleep(Duration::from_millis(300));
    let written = container.output().len();
    pod.lives()?;
    std::thread::sleep(Duration::from_millis(500));
    same(&container.output().len(), &written)?;
    world.ok(&["resume", &container.id])?;
    eventually("it goes on", world.patience(), || Ok(container.output().len() > written))?;
    world.ok(&["pause", &container.id])?;
    drop(container);
    pod.lives()
}

fn kill_one(pod: &mut Pod) -> Result<()> {
    let mut container = Container::running(pod.world(), &pod.member())?;
    process::signal(container.pid, Signal::KILL)?;
    same(&container.wait()?, &137)?;
    container.expect_status("stopped")?;
    container.delete(&[])?;
    let mut container = Container::running(pod.world(), &pod.member())?;
    container.kill("KILL")?;
    same(&container.wait()?, &137)?;
    pod.lives()?;
    container.delete(&[])
}

/// What the guest kernel reads ahead keeps a file open beyond the end of who read it.
fn kill_readers(pod: &mut Pod) -> Result<()> {
    let world = pod.world();
    let volume = world.make_dir("volume")?;
    fs::write(volume.join("file"), vec![0; 8 << 20])?;
    let script = "echo reads; while :; do cat /volume/file >/dev/null; done";
    let config = pod.member().bind(&volume, "/volume", &["ro"]).set("/process/args/2", json!(script));
    for _ in 0..world.by_level(2, 6, 30) {
        let mut container = Container::running(world, &config)?;
        eventually("it reads", world.patience(), || Ok(container.output().contains("reads")))?;
        container.kill("KILL")?;
        same(&container.wait()?, &137)?;
        container.delete(&[])?;
    }
    pod.lives()
}

fn refusals(pod: &mut Pod) -> Result<()> {
    let sandbox_id = "/annotations/io.kubernetes.cri.sandbox-id";
    let other = Container::create(pod.world(), &Config::idle())?;
    let foreign = json!({ "type": "network", "path": format!("/proc/{}/ns/net", other.pid) });
    let foreign_pid = json!({ "type": "pid", "path": format!("/proc/{}/ns/pid", other.pid) });
    for (config, words) in [
        (pod.member().set(sandbox_id, json!("nobody")), &["sandbox nobody", "does not exist"][..]),
        (pod.member().set(sandbox_id, json!("../x")), &["sandbox ../x"]),
        (pod.member().set(sandbox_id, json!(pod.one.id)), &["lives in another container's VM"]),
        (pod.member().without(sandbox_id), &["io.kubernetes.cri.sandbox-id: missing"]),
        (pod.member().set("/linux/namespaces/3", foreign), &["linux.namespaces", "not that of sandbox"]),
        (
            pod.member().set("/linux/namespaces/0", foreign_pid),
            &["linux.namespaces: join pid", "not that of a container"],
        ),
        (
            pod.member().set("/linux/resources/memory/limit", json!(1_u64 << 40)),
            &["linux.resources.memory.limit 1099511627776", "256 MiB"],
        ),
        (pod.member().set("/vm/hwConfig/vcpus", json!(2)), &["vm: the VM is that of sandbox"]),
        (pod.member().set("/process/args", json!(["/no/such"])), &["/no/such", "no such file"]),
    ] {
        let bundle = pod.world().bundle(&config)?;
        let id = pod.world().name("refused");
        pod.world().refused(&["create", "--bundle", &bundle.to_string_lossy(), &id], words)?;
        pod.world().refused(&["state", &id], &["does not exist"])?;
    }
    pod.lives()
}

fn many(pod: &mut Pod) -> Result<()> {
    let world = pod.world();
    let config = pod.member().set("/process/args", json!(["echo", "hello"]));
    let runs: Vec<_> = (0..world.by_level(12, 6, 24))
        .map(|_| {
            let bundle = world.bundle(&config)?;
            world.start(&["run", "--bundle", &bundle.to_string_lossy(), &world.name("many")])
        })
        .collect::<Result<_>>()?;
    for run in runs {
        same(&run.finish()?.code(0)?.quiet()?.text().as_str(), &"hello\n")?;
    }
    same(&vmms(world), &1)?;
    pod.lives()
}

fn sandbox_ends(world: &'static World) -> Result<()> {
    let mut pod = Pod::set_up(world)?;
    for kind in ["net", "ipc", "uts"] {
        let link = fs::read_link(format!("/proc/{}/ns/{kind}", pod.sandbox.pid))?;
        ensure!(link != fs::read_link(format!("/proc/self/ns/{kind}"))?, "{kind} is the host's");
    }
    pod.one.kill("TERM")?;
    same(&pod.one.wait()?, &0)?;
    pod.one.delete(&[])?;
    pod.sandbox.kill("TERM")?;
    same(&pod.sandbox.wait()?, &0)?;
    ensure!(pod.two.wait()? != 0, "a container that lost its VM ended with 0");
    pod.two.delete(&[])?;
    pod.sandbox.delete(&[])
}

fn vmm_killed(world: &'static World) -> Result<()> {
    let mut pod = Pod::set_up(world)?;
    process::signal(vmm(world, pod.sandbox.pid)?, Signal::KILL)?;
    let Pod { sandbox, one, two, .. } = &mut pod;
    for container in [sandbox, one, two] {
        let status = container.wait_for(Duration::from_secs(3))?;
        ensure!(status != 0, "{} ended with 0", container.id);
        container.expect_status("stopped")?;
    }
    // In the order that nobody would choose.
    pod.sandbox.delete(&[])?;
    pod.one.delete(&[])?;
    pod.two.delete(&["--force"])?;
    ensure!(!is_alive(pod.two.pid), "it lives on");
    Ok(())
}
