//! Pods as CRI-O makes them: every container gets the pod's namespaces by path and names the pod, and there is no sandbox.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::chaos::Dice;
use super::mount_options::HostMounts;
use super::pods::vmms;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::leaks::{Census, processes};
use crate::process;
use crate::world::World;

const PINNED: &[Wish<Pinned>] = &[
    ("pods/without-a-sandbox-containers-that-come-at-once-share-a-vm", pinned_at_once),
    ("pods/without-a-sandbox-a-container-outlives-the-first", pinned_outlives),
    ("pods/without-a-sandbox-a-dead-vm-is-replaced", pinned_vmm_killed),
    ("pods/without-a-sandbox-a-refused-container-leaves-none", pinned_refused),
    ("pods/without-a-sandbox-a-create-killed-at-any-moment-leaves-nothing", pinned_create_killed),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Both, Pinned::set_up, PINNED)]
}

/// Namespaces that are kept by files, as CRI-O keeps those of a pod.
pub struct Pinned {
    /// The surroundings.
    pub world: &'static World,
    dir: PathBuf,
    /// The pod's id.
    pub id: String,
    _mounts: HostMounts,
}

impl Pinned {
    /// Makes them.
    pub fn set_up(world: &'static World) -> Result<Self> {
        let dir = world.make_dir("namespaces")?;
        let mut mounts = HostMounts::default();
        let mut unshare = std::process::Command::new("unshare");
        for kind in ["net", "ipc", "uts"] {
            let path = dir.join(kind);
            fs::write(&path, "")?;
            unshare.arg(format!("--{kind}={}", path.display()));
            mounts.expect(&path);
        }
        unshare.arg("true");
        process::run(unshare, b"", world.patience())?.code(0)?;
        Ok(Pinned { world, dir, id: world.name("pod"), _mounts: mounts })
    }

    /// A container's configuration.
    pub fn config(&self, script: &str) -> Config {
        let by_path = |kind: &str, file: &str| json!({ "type": kind, "path": self.dir.join(file) });
        Config::sh(script)
            .set("/hostname", json!("the-pod"))
            .set("/annotations/io.kubernetes.cri-o.ContainerType", json!("container"))
            .set("/annotations/io.kubernetes.cri-o.SandboxID", json!(self.id))
            .set(
                "/linux/namespaces",
                json!([
                    { "type": "pid" }, { "type": "mount" }, { "type": "cgroup" },
                    by_path("network", "net"), by_path("ipc", "ipc"), by_path("uts", "uts"),
                ]),
            )
    }

    fn idle(&self) -> Result<Container> {
        Container::running(self.world, &self.config("trap 'exit 0' TERM; sleep 100000 & wait"))
    }

    /// That nothing runs for the pod any more.
    pub fn is_gone(&self) -> Result<()> {
        same(&vmms(self.world), &0)?;
        self.world.refused(&["state", &self.id], &["does not exist"]).map(drop)
    }
}

fn pinned_at_once(pod: &mut Pinned) -> Result<()> {
    let look = "cat /proc/sys/kernel/random/boot_id; readlink /proc/self/ns/ipc; hostname";
    let config = pod.config(&format!("{look}; sleep 2"));
    let start = |_| {
        let bundle = pod.world.bundle(&config)?;
        pod.world.start(&["run", "--bundle", &bundle.to_string_lossy(), &pod.world.name("pinned")])
    };
    let runs: Vec<_> = (0..4).map(start).collect::<Result<_>>()?;
    let said =
        runs.into_iter().map(|run| Ok(run.finish()?.code(0)?.quiet()?.text())).collect::<Result<Vec<_>>>()?;
    ensure!(said[0].contains("the-pod"), "{}", said[0]);
    // The last may come when all others are gone, and then makes a VM of its own; the first two meet.
    ensure!(said.iter().filter(|one| **one == said[0]).count() >= 2, "{said:?}");
    pod.is_gone()
}

fn pinned_outlives(pod: &mut Pinned) -> Result<()> {
    let (mut one, mut two) = (pod.idle()?, pod.idle()?);
    same(&vmms(pod.world), &1)?;
    one.kill("TERM")?;
    same(&one.wait()?, &0)?;
    one.delete(&[])?;
    two.says("echo still here", "still here")?;
    let mut again = pod.idle()?;
    same(&again.sh("readlink /proc/self/ns/ipc")?, &two.sh("readlink /proc/self/ns/ipc")?)?;
    two.delete(&["--force"])?;
    again.says("echo and here", "and here")?;
    again.delete(&["--force"])?;
    pod.is_gone()
}

fn pinned_vmm_killed(pod: &mut Pinned) -> Result<()> {
    let (mut one, mut two) = (pod.idle()?, pod.idle()?);
    let vmms = processes(pod.world).into_iter().filter(|(_, name)| name.contains("a3s-box-vmm"));
    vmms.for_each(|(pid, _)| drop(process::signal(pid, Signal::KILL)));
    ensure!(one.wait()? != 0 && two.wait()? != 0, "one ended with 0");
    one.delete(&[])?;
    let mut three = pod.idle()?;
    three.says("echo anew", "anew")?;
    two.delete(&[])?;
    three.says("echo still", "still")?;
    three.delete(&["--force"])?;
    pod.is_gone()
}

fn pinned_create_killed(pod: &mut Pinned) -> Result<()> {
    let config = pod.config("sleep 1000");
    let mut dice = Dice::new();
    let begin = Instant::now();
    drop(pod.idle()?);
    let whole = begin.elapsed();
    for number in 0..pod.world.by_level(40, 2, 40) {
        let before = Census::take(pod.world);
        let (id, bundle) = (pod.world.name("chaos"), pod.world.bundle(&config)?);
        let mut create = create_command(pod.world, &bundle, &id);
        create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let create = process::start(create, false, pod.world.patience())?;
        let after = Duration::from_micros(dice.roll(whole.as_micros() as u64 * 6 / 5));
        std::thread::sleep(after);
        let _ = create.signal(Signal::KILL);
        create.finish()?;
        pod.world.ok(&["delete", "--force", &id])?;
        process::reap_orphans();
        let left = before.left_over(pod.world);
        ensure!(
            left.is_empty(),
            "round {number}, killed after {after:.1?} of {whole:.1?}: left behind: {left:?}"
        );
    }
    pod.is_gone()
}

fn pinned_refused(pod: &mut Pinned) -> Result<()> {
    let config = pod.config("true").set("/process/args", json!(["/no/such"]));
    let bundle = pod.world.bundle(&config)?;
    let id = pod.world.name("refused");
    pod.world.refused(&["create", "--bundle", &bundle.to_string_lossy(), &id], &["/no/such"])?;
    pod.is_gone()
}
