//! CRI-O's pods: conmon with its arguments, the annotations and namespaces that it gives, and no infra container.
//!
//! In: pinned namespaces. Out: containers that share a VM, whichever comes or goes first. Must not: make a sandbox.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::conmon::Pod as Container;
use crate::cases::{At, Case, Wish, sharing};
use crate::config::{Config, mount};
use crate::process::eventually;
use crate::wishes::mount_options::HostMounts;
use crate::wishes::pods_without_sandbox::Pinned;
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Pod>] = &[
    ("crio/pods/containers-come-and-go-in-any-order", any_order),
    ("crio/pods/a-container-starts-again", restart),
    ("crio/pods/exec-in-the-foreground-finds-the-right-one", exec),
];

const IDLE: &str = "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done";

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, Pod::set_up, WISHES)]
}

/// What CRI-O makes before the first container.
struct Pod {
    namespaces: Pinned,
    shm: PathBuf,
    /// The kubelet's to make.
    cgroup: PathBuf,
    _mounts: HostMounts,
}

impl Drop for Pod {
    fn drop(&mut self) {
        for dir in self.cgroup.ancestors().take(2) {
            let _ = fs::remove_dir(dir);
        }
    }
}

impl Pod {
    fn set_up(world: &'static World) -> Result<Self> {
        let (namespaces, shm) = (Pinned::set_up(world)?, world.make_dir("shm")?);
        let mut mounts = HostMounts::default();
        mounts.add(&["-t", "tmpfs", "-o", "size=1m", "shm"], &shm)?;
        let cgroup = PathBuf::from(format!("/sys/fs/cgroup/kubepods-{}/{}", world.tag, namespaces.id));
        fs::create_dir_all(&cgroup)?;
        Ok(Pod { namespaces, shm, cgroup, _mounts: mounts })
    }

    /// With everything that CRI-O writes down beside what counts.
    fn config(&self, name: &str, script: &str) -> Config {
        let pod = &self.namespaces.id;
        let words = [
            ("ContainerName", name),
            ("Created", "2026-01-01T00:00:00.000000000Z"),
            ("KubeName", "the-pod"),
            ("Namespace", "default"),
            ("SandboxName", "k8s_POD_the-pod_default_1_0"),
            ("Image", "0123456789abcdef"),
            ("ImageName", "localhost/box:1"),
            ("RuntimeHandler", "a3s-box"),
            ("Annotations", r#"{"io.kubernetes.container.restartCount":"0"}"#),
            ("Labels", r#"{"io.kubernetes.pod.name":"the-pod"}"#),
            ("Metadata", r#"{"name":"c"}"#),
            ("Volumes", "[]"),
            ("TTY", "false"),
            ("Stdin", "false"),
            ("StdinOnce", "false"),
            ("ContainerManager", "libpod"),
            ("IP.0", "10.0.0.2"),
        ];
        let config =
            self.namespaces.config(script).set("/annotations/io.kubernetes.pod.name", json!("the-pod"));
        let config = words.iter().fold(config, |config, (key, value)| {
            config.set(&format!("/annotations/io.kubernetes.cri-o.{key}"), json!(value))
        });
        let tag = &self.namespaces.world.tag;
        config
            .set("/mounts/3", mount("/dev/shm", "bind", &self.shm.to_string_lossy(), &["rw", "bind"]))
            .set("/linux/cgroupsPath", json!(format!("/kubepods-{tag}/{pod}/crio-{name}")))
    }

    fn start(&self, script: &str) -> Result<Container> {
        let world = self.namespaces.world;
        let id = world.name("crio");
        Container::start(world, id.clone(), &self.config(&id, script))
    }

    /// One that SIGTERM ends.
    fn idle(&self) -> Result<Container> {
        let container = self.start(IDLE)?;
        heard(&container, "up")?;
        Ok(container)
    }

    fn end(&self, container: &Container) -> Result<()> {
        let world = self.namespaces.world;
        world.call(&["kill", &container.id, "15"])?.code(0)?;
        same(&container.exit_file()?, &"9".into())?;
        world.call(&["delete", "--force", &container.id])?.code(0).map(drop)
    }
}

fn heard(container: &Container, words: &str) -> Result<()> {
    let line = format!(" stdout F {words}\n");
    eventually("a line in its log", container.world.patience(), || Ok(container.log()?.contains(&line)))
}

fn says(container: &Container, script: &str) -> Result<String> {
    Ok(container.sh(script, "", 0)?.quiet()?.text().trim_end().to_string())
}

fn any_order(pod: &mut Pod) -> Result<()> {
    let look = "cat /proc/sys/kernel/random/boot_id; hostname; readlink /proc/self/ns/net";
    let (one, two) = (pod.idle()?, pod.idle()?);
    let seen = says(&one, look)?;
    same(&says(&two, look)?, &seen)?;
    says(&one, "echo by one >/dev/shm/word")?;
    same(&says(&two, "cat /dev/shm/word")?, &"by one".into())?;
    pod.end(&one)?;
    let three = pod.idle()?;
    same(&says(&three, look)?, &seen)?;
    pod.end(&two)?;
    same(&says(&three, "cat /dev/shm/word")?, &"by one".into())?;
    let four = pod.idle()?;
    pod.end(&four)?;
    same(&says(&three, look)?, &seen)?;
    pod.end(&three)?;
    pod.namespaces.is_gone()
}

fn restart(pod: &mut Pod) -> Result<()> {
    let world = pod.namespaces.world;
    let other = pod.idle()?;
    for attempt in 0..3 {
        let again = pod.start(&format!("echo attempt {attempt}; exit {attempt}"))?;
        same(&again.exit_file()?, &attempt.to_string())?;
        heard(&again, &format!("attempt {attempt}"))?;
        world.call(&["delete", "--force", &again.id])?.code(0)?;
    }
    same(&says(&other, "echo here")?, &"here".into())?;
    pod.end(&other)?;
    pod.namespaces.is_gone()
}

fn exec(pod: &mut Pod) -> Result<()> {
    let (one, two) = (pod.idle()?, pod.start("echo up; sleep 100000")?);
    for (container, number) in [(&one, 5), (&two, 6)] {
        let script = format!("cat; ps -o args | grep -c '^sleep 100000'; echo err >&2; exit {number}");
        let output = container.sh(&script, "typed\n", number)?;
        same(&output.text(), &format!("typed\n{}\n", number - 5))?;
        same(&output.stderr, &"err\n".into())?;
        heard(container, "up")?;
    }
    drop(two);
    pod.end(&one)?;
    pod.namespaces.is_gone()
}
