//! The process on the host that runs the VM: what it could do if the guest had taken it over.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::run::same;
use crate::apparmor::{self, Profile};
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::report::NotHere;
use crate::world::World;

/// Wishes that share a container.
const WISHES: &[Wish<Container>] = &[
    ("jail/every-thread-of-the-vmm-is-confined", confined),
    ("jail/the-vmm-sees-its-export-and-nothing-else", sees),
    ("jail/the-vmm-holds-few-descriptors", descriptors),
    ("jail/the-vmm-has-limits-and-no-environment", surroundings),
    ("jail/the-teller-of-kills-has-one-right", teller),
    ("jail/the-monitor-is-confined", |container| {
        let status = Status::read(&format!("/proc/{}/status", container.pid))?;
        same(&status.field("CapEff")?, &"0000000000000000")?;
        same(&status.field("CapPrm")?, &"0000000000000000")?;
        same(&(status.field("NoNewPrivs")?, status.field("Seccomp")?), &("1", "2"))
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Vm, |world| Container::running(world, &Config::idle()), WISHES),
        wish(At::Vm, "jail/the-vmm-is-under-the-containers-apparmor-profile", profiled),
        wish(At::Vm, "jail/the-vmm-is-under-the-containers-selinux-label", labelled),
        wish(At::Both, "jail/what-connects-to-sockets-is-confined", porter),
        wish(At::Both, "jail/state-is-the-owners-alone", state),
        wish(At::Both, "jail/two-containers-share-nothing", nothing_shared),
        wish(At::Both, "jail/a-node-of-the-hosts-opens-nothing", devices),
    ]
}

fn profiled(world: &'static World) -> Result<()> {
    if !apparmor::is_enabled() {
        return Err(NotHere("this host has no AppArmor").into());
    }
    let name = world.name("profile");
    let config = Config::idle().set("/process/apparmorProfile", json!(name));
    // Not loaded yet.
    cannot_be_made(world, &config, &["process.apparmorProfile", &name])?;
    let _profile = Profile::load(world, &name)?;
    let mut container = Container::running(world, &config)?;
    let label = fs::read_to_string(format!("/proc/{}/attr/apparmor/current", children(&container)?.vmm))?;
    same(&label.trim_end_matches(['\0', '\n']), &format!("{name} (enforce)").as_str())?;
    container.says("echo inside > /tmp/file && cat /tmp/file", "inside")?;
    container.delete(&["--force"])
}

/// Where the policy is that of scripts/testvm.d/selinux.cil.
fn labelled(world: &'static World) -> Result<()> {
    let label_of = |pid: i32| fs::read_to_string(format!("/proc/{pid}/attr/current"));
    if !label_of(std::process::id() as i32).is_ok_and(|label| label.starts_with("u:r:base_t")) {
        return Err(NotHere("this host has no SELinux with the policy for tests").into());
    }
    let config = |label| Config::idle().set("/process/selinuxLabel", json!(label));
    cannot_be_made(world, &config("u:r:none_t"), &["process.selinuxLabel", "u:r:none_t"])?;
    cannot_be_made(world, &config("u:r:stuck_t"), &["/dev/kvm"])?;
    let mut container = Container::running(world, &config("u:r:vm_t"))?;
    same(&label_of(children(&container)?.vmm)?.trim_end_matches(['\0', '\n', ' ']), &"u:r:vm_t")?;
    container.says("echo inside > /tmp/file && cat /tmp/file", "inside")?;
    container.delete(&["--force"])
}

/// `create` fails with these words, and leaves no container.
fn cannot_be_made(world: &World, config: &Config, words: &[&str]) -> Result<()> {
    let (bundle, id) = (world.bundle(config)?, world.name("c"));
    world.refused(&["create", "-b", &bundle.to_string_lossy(), &id], words)?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

struct Status(String);

impl Status {
    fn read(path: &str) -> Result<Self> {
        Ok(Status(fs::read_to_string(path).with_context(|| path.to_string())?))
    }

    fn field(&self, name: &str) -> Result<&str> {
        let value = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(value.with_context(|| format!("no {name}"))?.trim())
    }
}

/// The monitor's children.
struct Children {
    vmm: i32,
    /// What tells engines of out-of-memory kills.
    teller: i32,
    /// What connects to sockets of the host's, where something is bound.
    porter: Option<i32>,
}

fn children(container: &Container) -> Result<Children> {
    let mut found = None;
    // They name themselves once they run, which `create` does not wait for.
    process::eventually("the monitor's children, known by their names", container.world.patience(), || {
        found = look(container)?;
        Ok(found.is_some())
    })?;
    found.context("the monitor's children")
}

fn look(container: &Container) -> Result<Option<Children>> {
    let path = format!("/proc/{0}/task/{0}/children", container.pid);
    let children = fs::read_to_string(&path).with_context(|| path.clone())?;
    let pids: Vec<i32> = children.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let is_vmm = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"a3s-box-vmm\0"))
    };
    let is_teller = |pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "a3s-box-oom")
    };
    let (vmms, others): (Vec<i32>, Vec<i32>) = pids.into_iter().partition(is_vmm);
    let (tellers, porters): (Vec<i32>, Vec<i32>) = others.into_iter().partition(is_teller);
    Ok(match (vmms.as_slice(), tellers.as_slice(), porters.as_slice()) {
        (&[vmm], &[teller], []) => Some(Children { vmm, teller, porter: None }),
        (&[vmm], &[teller], &[porter]) => Some(Children { vmm, teller, porter: Some(porter) }),
        _ => None,
    })
}

/// The VMM.
pub fn vmm(container: &Container) -> Result<i32> {
    Ok(children(container)?.vmm)
}

/// It may spare the VM from the kernel's choice, and nothing else.
fn teller(container: &mut Container) -> Result<()> {
    let Children { teller, .. } = children(container)?;
    let status = Status::read(&format!("/proc/{teller}/status"))?;
    // SYS_RESOURCE
    for name in ["CapEff", "CapPrm", "CapBnd"] {
        same(&status.field(name)?, &"0000000001000000").context(name)?;
    }
    for name in ["CapInh", "CapAmb"] {
        same(&status.field(name)?, &"0000000000000000").context(name)?;
    }
    same(&(status.field("NoNewPrivs")?, status.field("Threads")?), &("1", "1"))?;
    let entries = fs::read_dir(format!("/proc/{teller}/fd"))?.flatten();
    let mut kinds: Vec<String> = entries
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| {
            let target = target.to_string_lossy();
            target.rsplit('/').next().unwrap_or_default().split(':').next().unwrap_or_default().to_string()
        })
        .collect();
    kinds.sort();
    // Its streams, three scores, the bundle, the cgroup and the monitor.
    let known = |kind: &str| kinds.iter().filter(|found| *found == kind).count();
    same(&(known("null"), known("oom_score_adj"), known("socket")), &(3, 3, 1))?;
    same(&kinds.len(), &9).with_context(|| format!("{kinds:?}"))
}

/// What connects to sockets of the host's can be somebody else and look, as root's programs may; no more.
fn porter(world: &'static World) -> Result<()> {
    // DAC_OVERRIDE, SETGID, SETUID
    const KEPT: &str = "00000000000000c2";
    let dir = world.make_dir("porter")?;
    let container = Container::running(world, &Config::idle().bind(&dir, "/bound", &[]))?;
    let porter = children(&container)?.porter.context("nothing connects to sockets")?;
    let status = Status::read(&format!("/proc/{}/status", porter))?;
    for name in ["CapEff", "CapPrm", "CapBnd"] {
        same(&status.field(name)?, &KEPT).context(name)?;
    }
    same(&(status.field("NoNewPrivs")?, status.field("Seccomp")?), &("1", "2"))?;
    let root = fs::metadata(format!("/proc/{}/root", porter))?;
    let container_root = fs::metadata(format!("/proc/{}/root", container.pid))?;
    same(&(root.dev(), root.ino()), &(container_root.dev(), container_root.ino()))
}

fn confined(container: &mut Container) -> Result<()> {
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP
    const KEPT: &str = "00000000880000db";
    let vmm = vmm(container)?;
    let tasks: Vec<PathBuf> =
        fs::read_dir(format!("/proc/{vmm}/task"))?.flatten().map(|entry| entry.path()).collect();
    ensure!(tasks.len() >= 4, "only {} threads", tasks.len());
    for task in tasks {
        let status = Status::read(&task.join("status").to_string_lossy())?;
        for name in ["CapEff", "CapPrm", "CapBnd"] {
            same(&status.field(name)?, &KEPT).with_context(|| format!("{name} of {}", task.display()))?;
        }
        for name in ["CapInh", "CapAmb"] {
            same(&status.field(name)?, &"0000000000000000").context(name)?;
        }
        same(&(status.field("NoNewPrivs")?, status.field("Seccomp")?), &("1", "2"))?;
    }
    Ok(())
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn sees(container: &mut Container) -> Result<()> {
    let vmm = vmm(container)?;
    let root = PathBuf::from(format!("/proc/{vmm}/root"));
    same(&names(&root)?, &["dev", "export", "proc", "run"].map(String::from).to_vec())?;
    same(&names(&root.join("dev"))?, &["kvm", "net"].map(String::from).to_vec())?;
    same(&names(&root.join("dev/net"))?, &vec!["tun".to_string()])?;
    same(&names(&root.join("proc"))?, &vec!["self".to_string()])?;
    same(&names(&root.join("proc/self"))?, &vec!["fd".to_string()])?;
    for node in ["kvm", "net/tun"] {
        let kind = fs::symlink_metadata(root.join("dev").join(node))?.file_type();
        ensure!(!kind.is_char_device(), "/dev/{node} can be opened although the guest runs");
    }
    let mounts = fs::read_to_string(format!("/proc/{vmm}/mountinfo"))?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let foreign: Vec<&str> = points
        .filter(|point| !["/", "/run", "/proc/self/fd"].contains(point) && !point.starts_with("/export/"))
        .collect();
    ensure!(foreign.is_empty(), "mounted in the jail: {foreign:?}");
    let loose: Vec<&str> = mounts
        .lines()
        .filter(|line| line.split(' ').nth(4).is_some_and(|point| point.starts_with("/export/")))
        .filter(|line| !line.contains("nodev") || !line.contains("nosuid"))
        .collect();
    ensure!(loose.is_empty(), "devices or set-id programs in the export: {loose:?}");
    let outside = format!("/proc/{}/root", std::process::id());
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        let own = fs::read_link(format!("/proc/{vmm}/ns/{kind}"))?;
        let ours = fs::read_link(format!("/proc/self/ns/{kind}"))?;
        ensure!(own != ours, "it shares the {kind} namespace with {outside}");
    }
    Ok(())
}

fn descriptors(container: &mut Container) -> Result<()> {
    let vmm = vmm(container)?;
    let expected = |target: &str| {
        let anonymous = ["anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:kvm-", "socket:["];
        anonymous.iter().any(|start| target.starts_with(start))
            || target.starts_with("/export/")
            || ["/export", "/run/console", "/dev/kvm", "/dev/null", "/proc/self/fd"].contains(&target)
            || target.contains("a3s-box-kernel/")
            || target.ends_with("/vm/console")
            || target.starts_with("/memfd:guest-kernel")
    };
    let mut strange = BTreeSet::new();
    let entries = fs::read_dir(format!("/proc/{vmm}/fd"))?.flatten();
    let targets: Vec<PathBuf> = entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    for target in &targets {
        let target = target.to_string_lossy();
        // What was opened before the pivot, or has lost its mount since, is shown from its own mount's root.
        if !expected(&target) && !matches!(&*target, "/" | "/kvm" | "/null" | "/fd" | "/console") {
            strange.insert(target.into_owned());
        }
    }
    ensure!(targets.len() > 20, "only {} descriptors", targets.len());
    ensure!(strange.is_empty(), "unexpected: {strange:?}");
    Ok(())
}

fn surroundings(container: &mut Container) -> Result<()> {
    let vmm = vmm(container)?;
    let environment = fs::read(format!("/proc/{vmm}/environ"))?;
    let kept = [&b"LD_LIBRARY_PATH="[..], b"XDG_RUNTIME_DIR="];
    let mut entries = environment.split(|byte| *byte == 0).filter(|entry| !entry.is_empty());
    ensure!(entries.all(|entry| kept.iter().any(|name| entry.starts_with(name))), "it has an environment");
    let limits = fs::read_to_string(format!("/proc/{vmm}/limits"))?;
    let limit = |name: &str| -> Result<Vec<String>> {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).context("no such limit")?;
        Ok(line.split_whitespace().take(2).map(str::to_string).collect())
    };
    same(&limit("Max core file size")?, &vec!["0".to_string(), "0".to_string()])?;
    let files = limit("Max open files")?;
    ensure!(files[0] == files[1], "not the most descriptors: {files:?}");
    Ok(())
}

fn state(world: &'static World) -> Result<()> {
    let container = Container::running(world, &Config::idle())?;
    let mut left = vec![world.root.clone()];
    let me = fs::metadata("/proc/self")?.uid();
    let mut files = 0;
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path)?;
        let kind = metadata.file_type();
        let mode = metadata.mode() & 0o7777;
        same(&metadata.uid(), &me).with_context(|| path.display().to_string())?;
        if kind.is_dir() {
            ensure!(mode == 0o700, "{}: mode {mode:o}", path.display());
            left.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
        } else if !kind.is_socket() {
            files += 1;
            ensure!(mode == 0o600, "{}: mode {mode:o}", path.display());
        }
    }
    ensure!(files >= 3, "only {files} files");
    container.says("echo well", "well")
}

fn nothing_shared(world: &'static World) -> Result<()> {
    let one = Container::running(world, &Config::idle())?;
    let other = Container::running(world, &Config::idle())?;
    let identities = |container: &Container| -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for pid in [container.pid, vmm(container)?] {
            for line in fs::read_to_string(format!("/proc/{pid}/cgroup"))?.lines() {
                // A v1 hierarchy that is mounted nowhere has one cgroup.
                all.extend(line.rsplit(':').next().filter(|path| *path != "/").map(str::to_string));
            }
            for kind in ["mnt", "pid", "net", "ipc", "uts"] {
                all.insert(fs::read_link(format!("/proc/{pid}/ns/{kind}"))?.to_string_lossy().into_owned());
            }
        }
        let dir = world.root.join(&container.id);
        for path in [dir.clone(), dir.join("vm"), dir.join("vm/control.sock")] {
            let metadata = fs::metadata(&path).with_context(|| path.display().to_string())?;
            all.insert(format!("file {}:{}", metadata.dev(), metadata.ino()));
        }
        Ok(all)
    };
    let (first, second) = (identities(&one)?, identities(&other)?);
    let shared: Vec<_> = first.intersection(&second).collect();
    ensure!(shared.is_empty(), "both have {shared:?}");
    ensure!(process::is_alive(one.pid) && process::is_alive(other.pid), "one has ended");
    Ok(())
}

/// Whoever has taken a VMM over may make nodes: its cgroup opens none that is not needed.
fn devices(world: &'static World) -> Result<()> {
    let container = Container::running(world, &Config::idle())?;
    // Where none opens for others, that none opens there would prove nothing.
    let outside = opened(world, None)?;
    let opens = |(node, answer): &(String, String)| node != "null" && answer == "opens";
    ensure!(outside.iter().any(opens), NotHere("this host's devices open for nobody here"));
    opens_few_devices(world, vmm(&container)?)
}

/// A process in this one's cgroup can make nodes of the host's devices, and not use them.
pub fn opens_few_devices(world: &World, pid: i32) -> Result<()> {
    for (node, answer) in opened(world, Some(pid))? {
        let expected = if node == "null" { "opens" } else { "Operation not permitted" };
        ensure!(answer.ends_with(expected), "{node}: {answer}");
    }
    Ok(())
}

/// What becomes of nodes that a process makes and opens, in the cgroup of `pid` or where this one is.
fn opened(world: &World, pid: Option<i32>) -> Result<Vec<(String, String)>> {
    const SCRIPT: &str = r#"
        mount -t tmpfs nodes "$1" && cd "$1" || exit 97
        [ -z "$2" ] || echo $$ >"$2/cgroup.procs" || exit 98
        shift 2
        while [ $# -gt 0 ]; do
          mknod "$1" "$2" "${3%:*}" "${3#*:}" || exit 99
          echo "$1 $( (: <"$1") 2>&1 && echo opens)"
          shift 3
        done"#;
    let (dir, cgroup) = (world.make_dir("nodes")?, pid.map(devices_cgroup).transpose()?.unwrap_or_default());
    let mut command = Command::new("unshare");
    command.env("LC_ALL", "C").args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(dir).arg(cgroup);
    command.args(["null", "c", "1:3", "kmsg", "c", "1:11"]);
    let disks = fs::read_dir("/sys/block")?.flatten().map(|entry| entry.path());
    let number = |disk: PathBuf| fs::read_to_string(disk.join("dev")).ok();
    if let Some(disk) = disks.filter(|disk| disk.join("device").exists()).find_map(number) {
        command.args(["disk", "b", disk.trim()]);
    }
    let output = process::run(command, b"", world.patience())?.code(0)?.quiet()?.text();
    let line = |line: &str| line.split_once(' ').map(|(node, answer)| (node.into(), answer.into()));
    Ok(output.lines().filter_map(line).collect())
}

/// The directory of a process's cgroup that has a say about devices.
fn devices_cgroup(pid: i32) -> Result<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = |lists: &str| {
        table.lines().find_map(|line| {
            let (list, path) = line.split_once(':')?.1.split_once(':')?;
            (list == lists).then(|| path.trim_start_matches('/'))
        })
    };
    let v1 = Path::new("/sys/fs/cgroup/devices");
    match path("devices").filter(|_| v1.is_dir()) {
        Some(path) => Ok(v1.join(path)),
        None => Ok(Path::new("/sys/fs/cgroup").join(path("").context("no cgroup")?)),
    }
}
