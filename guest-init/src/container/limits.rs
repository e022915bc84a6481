//! A container's cgroup in the guest: made, limited, joined, listed, removed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use a3s_box_proto::Container;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::unistd::Pid;

use crate::boot::{CGROUP_ROOT, set};
use crate::process::words;

/// A cgroup v2 directory of one container.
pub struct Cgroup {
    path: PathBuf,
    /// Its memory.events, which poll can wait for, where the kernel counts memory.
    events: Option<File>,
    /// Its cgroup.events, likewise.
    population: Option<File>,
    /// Kills for want of memory that were noted.
    noted: u64,
}

impl Cgroup {
    /// Makes it below the guest's root cgroup, with its limits.
    pub fn create(spec: &Container) -> Result<Self> {
        let path = PathBuf::from(CGROUP_ROOT).join(&spec.id);
        fs::create_dir(&path).with_context(|| format!("make the guest's cgroup {}", spec.id))?;
        let open = |file| File::open(path.join(file)).ok();
        let (events, population) = (open("memory.events"), open("cgroup.events"));
        let cgroup = Cgroup { path, events, population, noted: 0 };
        if let Err(error) = cgroup.bound(spec) {
            cgroup.remove();
            return Err(error);
        }
        Ok(cgroup)
    }

    fn bound(&self, spec: &Container) -> Result<()> {
        for (file, value) in &spec.limits {
            self.set(file, value)?;
        }
        let Some(rules) = &spec.device_rules else { return Ok(()) };
        let dir = File::open(&self.path).context("open the container's cgroup in the guest")?;
        a3s_box_devices::attach(&dir, rules).context("linux.resources.devices")
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        match set(self.path.join(file), value) {
            Ok(()) => Ok(()),
            // What cannot be limited has no limit, and what the guest has none of keeps every limit: swap, reservations of
            // huge pages apart from pages.
            Err(Errno::ENOENT) if value.starts_with("max") && file.ends_with(".max") => Ok(()),
            Err(Errno::ENOENT) if file == "memory.swap.max" || file.ends_with(".rsvd.max") => Ok(()),
            Err(errno) => bail!("linux.resources: set {file} to {value} in the guest: {}", words(errno)),
        }
    }

    /// Changes limits: all, or none.
    pub fn limit(&self, limits: &[(String, String)]) -> Result<()> {
        let mut held: Vec<(&str, String)> = Vec::new();
        for (file, value) in limits {
            let before = fs::read_to_string(self.path.join(file)).unwrap_or_default();
            if let Err(error) = self.set(file, value) {
                for (file, before) in held.iter().rev() {
                    let _ = self.set(file, before.trim_end());
                }
                return Err(error);
            }
            held.push((file, before));
        }
        Ok(())
    }

    /// What the kernel counts here, by file, or by file and key.
    pub fn stats(&self) -> BTreeMap<String, u64> {
        let counted = |file: &str| {
            let controller = file.split('.').next().unwrap_or_default();
            let kind = file.rsplit('.').next().unwrap_or_default();
            ["memory", "cpu", "pids", "hugetlb"].contains(&controller)
                && ["current", "peak", "max", "stat", "events", "failcnt"].contains(&kind)
        };
        let number = |text: &str| if text == "max" { Some(u64::MAX) } else { text.parse().ok() };
        let mut stats = BTreeMap::new();
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let files = entries.filter_map(|entry| entry.file_name().into_string().ok());
        for file in files.filter(|file| counted(file)) {
            let text = fs::read_to_string(self.path.join(&file)).unwrap_or_default();
            for line in text.lines() {
                match line.split_once(' ') {
                    None => stats.extend(number(line).map(|number| (file.clone(), number))),
                    Some((key, value)) => {
                        stats.extend(number(value).map(|number| (format!("{file}/{key}"), number)))
                    }
                }
            }
        }
        stats
    }

    /// For poll, by POLLPRI.
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().map(File::as_fd)
    }

    /// For poll, by POLLPRI: then [`Cgroup::is_deserted`] may have news.
    pub fn population(&self) -> Option<BorrowedFd<'_>> {
        self.population.as_ref().map(File::as_fd)
    }

    /// Whether no process is left in it and below it; one that is not has given up its namespaces.
    pub fn is_deserted(&self) -> bool {
        self.population.as_ref().is_none_or(|events| !text_of(events).contains("populated 1"))
    }

    /// Kills all that is in it and below it, those just forked as well.
    pub fn kill(&self) -> Result<(), Errno> {
        set(self.path.join("cgroup.kill"), "1")
    }

    /// Whether the kernel has killed here, or below, for want of memory since this was last asked.
    pub fn has_killed(&mut self) -> bool {
        let text = self.events.as_ref().map(text_of).unwrap_or_default();
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        let before = self.noted;
        self.noted = kills.unwrap_or(before);
        self.noted > before
    }

    /// A descriptor through which a process can [`join`] from any mount namespace.
    pub fn door(&self) -> Result<File> {
        let procs = self.path.join("cgroup.procs");
        File::options().write(true).open(procs).context("open the container's cgroup in the guest")
    }

    /// Doors for a further process: the cgroup `below` this one. Where that is this one itself, also the first
    /// process's, since a cgroup whose children have controllers of their own takes no process.
    pub fn doors(&self, below: &Path, init: Pid) -> Result<Vec<File>> {
        if below.as_os_str().is_empty() {
            let lines = fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap_or_default();
            let of_init = lines.trim_end().strip_prefix("0::/").map(|path| Path::new(CGROUP_ROOT).join(path));
            let procs = |dir: PathBuf| File::options().write(true).open(dir.join("cgroup.procs")).ok();
            return Ok([self.door()?].into_iter().chain(of_init.and_then(procs)).collect());
        }
        if below.components().any(|part| !matches!(part, Component::Normal(_))) {
            bail!("cgroup {}: not below the container's own", below.display());
        }
        let procs = self.path.join(below).join("cgroup.procs");
        let door = File::options().write(true).open(procs);
        Ok(vec![door.with_context(|| format!("cgroup {} in the container", below.display()))?])
    }

    /// The processes in it and below it, as pid 1 of the VM numbers them.
    pub fn pids(&self) -> Vec<Pid> {
        let mut pids = Vec::new();
        let mut dirs = vec![self.path.clone()];
        while let Some(dir) = dirs.pop() {
            let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(procs.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            dirs.extend(children(&dir));
        }
        pids
    }

    /// Removes it with whatever cgroups the container made below.
    pub fn remove(&self) {
        fn prune(dir: &PathBuf) {
            children(dir).iter().for_each(prune);
            let _ = fs::remove_dir(dir);
        }
        prune(&self.path);
    }
}

/// What a short file of the kernel's says by now.
fn text_of(file: &File) -> String {
    let mut text = [0; 512];
    let n = file.read_at(&mut text, 0).unwrap_or(0);
    String::from_utf8_lossy(&text[..n]).into_owned()
}

/// Moves the calling process into the first of these cgroups that takes it.
pub fn join(doors: &[File]) -> Result<()> {
    let mut result = Ok(());
    for mut door in doors {
        result = door.write_all(b"0");
        if result.is_ok() {
            break;
        }
    }
    result.context("join the container's cgroup in the guest")
}

fn children(dir: &PathBuf) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir())).map(|entry| entry.path()).collect()
}
