//! The container's host cgroup: made, joined, frozen, read, removed.
//!
//! cgroup v2 where /sys/fs/cgroup is that, else every v1 hierarchy that is mounted; by directories of our own or by
//! [`systemd`]'s scopes. In: a planned place. Out: a [`Cgroup`] that is kept in the state. Must not: leave a directory
//! behind, or take one that others live in.

pub mod devices;
mod limits;
pub mod systemd;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::plan::cgroup::{OWN_PARENT, Place, Scope};
use crate::plan::host::Limits;
use crate::userns;
pub use limits::Undo;

const ROOT: &str = "/sys/fs/cgroup";

/// One cgroup, in one v2 hierarchy or in all v1 hierarchies.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its directories; none where cgroups are disabled, or systemd has not made them yet.
    dirs: Vec<PathBuf>,
    /// systemd's name for it, where that made it.
    scope: Option<Scope>,
    /// Whether its parent is the one that this runtime makes for containers without a path of their own.
    own_parent: bool,
}

/// Which hierarchy a host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One unified hierarchy.
    V2,
    /// One for each controller.
    V1,
    /// None is mounted.
    None,
}

/// What this host has.
pub fn version() -> Result<Version> {
    let stat = match nix::sys::statfs::statfs(ROOT) {
        Err(Errno::ENOENT) => return Ok(Version::None),
        stat => stat.with_context(|| format!("look at {ROOT}"))?,
    };
    Ok(match stat.filesystem_type() {
        nix::sys::statfs::CGROUP2_SUPER_MAGIC => Version::V2,
        _ if v1_roots()?.is_empty() => Version::None,
        _ => Version::V1,
    })
}

/// Mount points of the v1 controllers, and of the controller-less v2 hierarchy beside them.
fn v1_roots() -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let cgroup = |line: &str| {
        let (fields, kind) = line.split_once(" - ")?;
        let point = fields.split(' ').nth(4)?;
        (kind.starts_with("cgroup ") || kind.starts_with("cgroup2 ")).then(|| PathBuf::from(point))
    };
    let mut roots: Vec<PathBuf> = table.lines().filter_map(cgroup).filter(|p| p.starts_with(ROOT)).collect();
    roots.sort();
    roots.dedup();
    Ok(roots)
}

impl Cgroup {
    /// Names the cgroup. One that others live in is refused.
    pub fn plan(place: &Place) -> Result<Self> {
        // A scope is nobody's until systemd has made it for us.
        let Place::Path(path) = place else { return Ok(Cgroup::default()) };
        let own_parent = path.parent() == Some(Path::new(OWN_PARENT));
        let cgroup = Cgroup { dirs: dirs(path)?, own_parent, scope: None };
        for dir in &cgroup.dirs {
            // What cannot be looked at may be others', and would be killed with the container.
            let pids = tree_pids(dir).with_context(|| format!("look into cgroup {}", dir.display()))?;
            if !pids.is_empty() {
                bail!("container's cgroup {} is not empty", dir.display());
            }
        }
        Ok(cgroup)
    }

    /// Makes it, with what is missing above, these limits and few of the host's devices ([`devices::confine`]: whether
    /// that was possible), and moves a process in, with whatever that starts from now on.
    pub fn enter(&mut self, place: &Place, pid: i32, limits: &Limits) -> Result<bool> {
        let version = version()?;
        if let Place::Scope(scope) = place {
            // On v1 it has other properties for limits, and leaves those of a scope that is delegated alone.
            let known =
                if version == Version::V2 { limits::properties(limits) } else { devices::properties() };
            scope.start(pid, known)?;
            self.scope = Some(scope.clone());
            self.dirs = dirs(&path_of(pid, &scope.unit)?)?;
        }
        self.dirs.iter().try_for_each(|dir| make(dir))?;
        let _ = limits::write(limits, &self.dirs, version)?;
        let confined = devices::confine(&self.dirs)?;
        for dir in &self.dirs {
            if !pids(dir).is_ok_and(|pids| pids.contains(&pid)) {
                fs::write(dir.join("cgroup.procs"), pid.to_string())
                    .with_context(|| format!("join cgroup {}", dir.display()))?;
            }
        }
        Ok(confined)
    }

    /// After [`Self::enter`] failed: whether the container can do without. That is so where nobody named a cgroup, the caller
    /// is not the host's root and may make none, and these limits are those that the guest holds as well.
    pub fn is_dispensable(&self, error: &anyhow::Error, limits: &Limits) -> bool {
        use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        let kind = error.root_cause().downcast_ref::<io::Error>().map(io::Error::kind);
        let is_denied = matches!(kind, Some(PermissionDenied | ReadOnlyFilesystem));
        self.own_parent && is_denied && !userns::is_hosts_root() && limits.are_the_guests_too()
    }

    /// Changes limits.
    pub fn limit(&self, limits: &Limits) -> Result<Undo> {
        let version = version()?;
        let undo = limits::write(limits, &self.dirs, version)?;
        let properties = limits::properties(limits);
        if let Some(scope) = self.scope.as_ref().filter(|_| version == Version::V2 && !properties.is_empty())
            && let Err(error) = scope.set(properties)
        {
            undo.run();
            return Err(error);
        }
        Ok(undo)
    }

    /// Moves the calling process in, with whatever it starts from now on.
    pub fn join(&self) -> Result<()> {
        for dir in &self.dirs {
            fs::write(dir.join("cgroup.procs"), "0")
                .with_context(|| format!("join cgroup {}", dir.display()))?;
        }
        Ok(())
    }

    /// The scope's name, where systemd made it.
    pub fn scope(&self) -> Option<&str> {
        self.scope.as_ref().map(|scope| scope.unit.as_str())
    }

    /// Freezes or thaws every process in it, and waits until the kernel says so.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let Some((file, on, off)) = self.freezer() else { bail!("the container has no cgroup to freeze") };
        fs::write(&file, if frozen { on } else { off })
            .with_context(|| format!("write {}", file.display()))?;
        let deadline = Instant::now() + Duration::from_secs(2);
        // The v1 freezer tells nobody when it is done, so both are asked.
        while self.is_frozen() != frozen {
            if Instant::now() > deadline {
                let _ = fs::write(&file, off);
                bail!("cgroup {} does not {}", file.display(), if frozen { "freeze" } else { "thaw" });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Whether it is frozen now.
    pub fn is_frozen(&self) -> bool {
        let events = |dir: &PathBuf| fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
        self.dirs.iter().any(|dir| {
            fs::read_to_string(dir.join("freezer.state")).is_ok_and(|state| state.trim() == "FROZEN")
                || events(dir).lines().any(|line| line == "frozen 1")
        })
    }

    fn freezer(&self) -> Option<(PathBuf, &'static str, &'static str)> {
        let v1 = self.dirs.iter().map(|dir| dir.join("freezer.state")).find(|file| file.exists());
        let v2 = || self.dirs.iter().map(|dir| dir.join("cgroup.freeze")).find(|file| file.exists());
        v1.map(|file| (file, "FROZEN", "THAWED")).or_else(|| v2().map(|file| (file, "1", "0")))
    }

    /// Every process in it and below it.
    pub fn pids(&self) -> Vec<i32> {
        let mut all: Vec<i32> = self.dirs.iter().filter_map(|dir| tree_pids(dir).ok()).flatten().collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Its io.stat: one line a disk. cgroup v1 has none.
    pub fn io(&self) -> String {
        self.dirs.iter().find_map(|dir| fs::read_to_string(dir.join("io.stat")).ok()).unwrap_or_default()
    }

    /// Kills every process in it and below it.
    pub fn kill(&self) {
        for pid in self.pids() {
            // One that has ended meanwhile is what was wanted.
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }

    /// Removes it with everything below. Its processes must have been killed; the kernel lets go of them a little
    /// later than of their parent, so a busy directory is tried again for up to two seconds.
    pub fn remove(&self) -> Result<()> {
        if let Some(scope) = &self.scope {
            // Where systemd does not answer, its directories still go; it collects a scope that is empty.
            let _ = scope.stop();
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut removed = Ok(());
        for dir in &self.dirs {
            let mut pruned = prune(dir);
            while pruned.is_err() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
                pruned = prune(dir);
            }
            let pruned = pruned.with_context(|| format!("remove cgroup {}", dir.display()));
            removed = removed.and(pruned.and_then(|()| self.leave_parent(dir)));
        }
        removed
    }

    /// Others may still live there; then it stays.
    fn leave_parent(&self, dir: &Path) -> Result<()> {
        let Some(parent) = dir.parent().filter(|_| self.own_parent) else { return Ok(()) };
        match fs::remove_dir(parent) {
            Err(error) if !is_in_use(&error) && error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove cgroup {}", parent.display()))
            }
            _ => Ok(()),
        }
    }
}

/// A path below each hierarchy's root.
fn dirs(path: &Path) -> Result<Vec<PathBuf>> {
    let roots = roots()?;
    if roots.is_empty() {
        bail!("linux.cgroupsPath {}: no cgroup hierarchy is mounted at {ROOT}", path.display());
    }
    Ok(roots.iter().map(|root| root.join(path)).collect())
}

/// Mount points of what this host has.
fn roots() -> Result<Vec<PathBuf>> {
    Ok(match version()? {
        Version::V2 => vec![PathBuf::from(ROOT)],
        Version::V1 => v1_roots()?,
        Version::None => Vec::new(),
    })
}

/// Where systemd has put a process, below the hierarchy's root: its scope must be the last name of that.
fn path_of(pid: i32, scope: &str) -> Result<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup")).context("the monitor's cgroup")?;
    let path = |line: &str| Some(PathBuf::from(line.splitn(3, ':').nth(2)?.strip_prefix('/')?));
    let found = table.lines().filter_map(path).find(|path| path.ends_with(scope));
    found.with_context(|| format!("systemd did not put pid {pid} into {scope}"))
}

/// The directory that accounts the memory of a process whose /proc/PID/cgroup says this.
pub fn memory_dir(table: &str) -> Option<PathBuf> {
    let has_memory = |list: &str| list.split(',').any(|controller| controller == "memory");
    let entries: Vec<_> = table
        .lines()
        .filter_map(|line| {
            let (list, path) = line.split_once(':')?.1.split_once(':')?;
            Some((list, path.strip_prefix('/')?))
        })
        .collect();
    let v1 =
        entries.iter().find(|(list, _)| has_memory(list)).map(|(_, path)| Path::new("memory").join(path));
    let v2 = || entries.iter().find(|(list, _)| list.is_empty()).map(|(_, path)| PathBuf::from(path));
    Some(Path::new(ROOT).join(v1.or_else(v2)?))
}

fn make(dir: &Path) -> Result<()> {
    // Another container's end may take the common parent away, empty as it is, between its making and its use.
    const TRIES: usize = 100;
    let shown = || format!("make cgroup {}", dir.display());
    for _ in 0..TRIES {
        match make_once(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result.with_context(shown),
        }
    }
    make_once(dir).with_context(shown)
}

fn make_once(dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|above| above.starts_with(ROOT)).collect();
    for dir in missing.into_iter().rev() {
        match fs::create_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            // One that is there already may be another creator's who has not come so far yet.
            _ => inherit_cpuset(dir),
        }
    }
    dir.ancestors().skip(1).take_while(|above| above.starts_with(ROOT)).for_each(delegate);
    Ok(())
}

/// v2: lets children use every controller there is. A cgroup that holds processes itself cannot, and need not.
fn delegate(dir: &Path) {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// v1: an empty cpuset accepts no process.
fn inherit_cpuset(dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = fs::read_to_string(dir.join(file)).unwrap_or_default();
        if own.trim().is_empty()
            && let Some(parent) = dir.parent()
            && let Ok(value) = fs::read_to_string(parent.join(file))
        {
            let _ = fs::write(dir.join(file), value);
        }
    }
}

/// None where there is no such directory.
fn subdirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in present(fs::read_dir(dir))?.into_iter().flatten() {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            all.push(entry.path());
        }
    }
    Ok(all)
}

fn pids(dir: &Path) -> io::Result<Vec<i32>> {
    let procs = present(fs::read_to_string(dir.join("cgroup.procs")))?.unwrap_or_default();
    Ok(procs.lines().filter_map(|line| line.parse().ok()).collect())
}

fn tree_pids(dir: &Path) -> io::Result<Vec<i32>> {
    let mut all = pids(dir)?;
    for sub in subdirs(dir)? {
        all.extend(tree_pids(&sub)?);
    }
    Ok(all)
}

/// `None` for a cgroup that is not there, or is just being removed.
fn present<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// Removes the directory and those below.
fn prune(dir: &Path) -> io::Result<()> {
    for sub in subdirs(dir)? {
        prune(&sub)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether a directory stays because of what is in it.
fn is_in_use(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_accounted_where_the_controller_is() {
        for (table, expected) in [
            ("0::/a3s-box/c1\n", Some("/sys/fs/cgroup/a3s-box/c1")),
            ("9:cpu,cpuacct:/x\n4:memory:/a3s-box/c1\n0::/y\n", Some("/sys/fs/cgroup/memory/a3s-box/c1")),
            ("3:name=memory:/x\n0::/a:b\n", Some("/sys/fs/cgroup/a:b")),
            ("0::/\n", Some("/sys/fs/cgroup")),
            ("", None),
        ] {
            assert_eq!(memory_dir(table).as_deref(), expected.map(Path::new), "{table:?}");
        }
    }
}
