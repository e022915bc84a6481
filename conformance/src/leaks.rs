//! What a runtime could leave behind: processes, mounts, cgroups, links, sockets, directories.
//!
//! In: a look before and a look after. Out: what is new, by name. Must not: blame the runtime for what others on the
//! same host do meanwhile, where that can be told apart.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::process::{is_alive, parent, reap_orphans, signal};
use crate::world::World;

/// The kernel takes back a VM's memory and its cgroup a little after its process is gone.
const SETTLE: Duration = Duration::from_secs(3);

/// Everything that counts, by name.
///
/// What a runtime makes once for all containers (a cache, its default state directory) is in the first look, which
/// comes after a first container.
#[derive(Debug)]
pub struct Census(BTreeSet<String>);

impl Census {
    /// Looks around.
    pub fn take(world: &World) -> Self {
        let mut all = BTreeSet::new();
        all.extend(processes(world).into_iter().map(|(pid, name)| format!("process {pid} {name}")));
        all.extend(mounts());
        all.extend(cgroups(world).iter().map(|dir| format!("cgroup {}", dir.display())));
        all.extend(entries("/sys/class/net").into_iter().map(|name| format!("link {name}")));
        all.extend(sockets(world));
        all.extend(directories(world));
        Census(all)
    }

    /// What is there now and was not before. What the kernel is still taking away gets a little time.
    pub fn left_over(&self, world: &World) -> Vec<String> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = Census::take(world);
            let left: Vec<String> = now.0.difference(&self.0).cloned().collect();
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
            reap_orphans();
        }
    }

    /// Cgroups of this name, in any hierarchy.
    pub fn cgroups_named(name: &str) -> Vec<PathBuf> {
        let mut all = Vec::new();
        collect_cgroups(Path::new("/sys/fs/cgroup"), &mut all);
        all.retain(|dir| dir.file_name().is_some_and(|last| last == name));
        all
    }

    /// Deletes every container by force.
    pub fn delete_all(&self, world: &World) {
        for name in entries(&world.root.to_string_lossy()) {
            let _ = world.call(&["delete", "--force", &name]);
        }
        reap_orphans();
    }

    /// Ends what is left of one test, so that the next begins as the first did.
    pub fn clean_up(&self, world: &World) {
        for (pid, name) in processes(world) {
            if !self.0.contains(&format!("process {pid} {name}")) {
                let _ = signal(pid, Signal::KILL);
            }
        }
        self.delete_all(world);
        for name in entries(&world.root.to_string_lossy()) {
            let _ = crate::world::remove_tree(&world.root.join(name));
        }
        for dir in cgroups(world).iter().rev() {
            if !self.0.contains(&format!("cgroup {}", dir.display())) {
                let _ = fs::remove_dir(dir);
            }
        }
    }
}

fn entries(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Every process below this one, which adopts what loses its parent, and any other that names our directory.
pub fn processes(world: &World) -> Vec<(i32, String)> {
    let own = std::process::id() as i32;
    let pids = entries("/proc").into_iter().filter_map(|name| name.parse::<i32>().ok());
    let ours = |pid: i32, name: &str| descends(pid, own) || name.contains(&*world.dir.to_string_lossy());
    pids.filter(|pid| *pid != own && is_alive(*pid))
        .map(|pid| (pid, command_line(pid)))
        .filter(|(pid, name)| ours(*pid, name) && *pid != own)
        .collect()
}

fn descends(mut pid: i32, from: i32) -> bool {
    while let Some(above) = parent(pid) {
        if above == from {
            return true;
        }
        pid = above;
    }
    false
}

fn command_line(pid: i32) -> String {
    let text = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&text).replace('\0', " ").trim_end().to_string()
}

/// By what is mounted where, not by number: numbers of mounts are used again.
fn mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let point = |line: &str| Some(format!("mount {} {}", line.split(' ').nth(4)?, line.split(" - ").nth(1)?));
    table.lines().filter_map(point).collect()
}

/// Cgroups that bear our tag, and the runtime's parent of them where nobody is left in it.
fn cgroups(world: &World) -> Vec<PathBuf> {
    let mut all = Vec::new();
    collect_cgroups(Path::new("/sys/fs/cgroup"), &mut all);
    let is_empty_parent = |dir: &Path| {
        let mut below = Vec::new();
        collect_cgroups(dir, &mut below);
        dir.ends_with("a3s-box") && below.is_empty()
    };
    all.retain(|dir| dir.to_string_lossy().contains(&world.tag) || is_empty_parent(dir));
    all
}

fn collect_cgroups(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // Hierarchies are also reached by links; each counts once.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.push(entry.path());
            collect_cgroups(&entry.path(), all);
        }
    }
}

fn sockets(world: &World) -> Vec<String> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let own = world.dir.to_string_lossy().into_owned();
    let path = |line: &str| line.split_whitespace().nth(7).map(str::to_string);
    table
        .lines()
        .filter_map(path)
        .filter(|path| path.contains(&own))
        .map(|path| format!("socket {path}"))
        .collect()
}

/// The state directory, the runtime's default one, and what could be named after it elsewhere.
fn directories(world: &World) -> Vec<String> {
    // A hidden one is no container's: the suite gives none such a name.
    let states = entries(&world.root.to_string_lossy()).into_iter().filter(|name| !name.starts_with('.'));
    let mut all: Vec<String> = states.map(|name| format!("state of {name}")).collect();
    let suspicious =
        |name: &String| name.contains("a3s") || name.contains("krun") || name.contains(&world.tag);
    let mut found: Vec<String> = Vec::new();
    for dir in ["/run", "/tmp", "/var/tmp", "/dev/shm"] {
        let names = entries(dir).into_iter().filter(|name| suspicious(name) && !name.contains("conformance"));
        found.extend(names.map(|name| format!("{dir}/{name}")));
    }
    for dir in found {
        all.extend(entries(&dir).into_iter().map(|name| format!("{dir}/{name}")));
        // The default state directory itself stays, as every runtime's does.
        if dir != "/run/a3s-box" {
            all.push(dir);
        }
    }
    all
}
