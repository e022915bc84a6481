//! The state directory: one directory a container, results only.
//!
//! `<root>/<id>/state.json` is written by rename under a lock; what a container *is* follows from what is observed
//! now: its pid with start time, the freezer. In: ids and records. Out: records and OCI status. Must not: believe
//! that something happened because it was asked for.

mod process_id;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use oci_spec::runtime::Process;
use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::net;
use crate::plan::Hooks;
use crate::shortage::is_shortage;
use crate::vmm;
pub use process_id::{ProcessId, boot_id};

const STATE: &str = "state.json";
const LOCK: &str = "lock";
const PROCESS: &str = "process.json";
/// Name of the root in a container's directory, where it has no other.
const ROOT: &str = "root";
/// Name of the VM's directory in a container's.
pub const VM_DIR: &str = "vm";

/// What is known of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Container id.
    pub id: String,
    /// `ociVersion` of its config.json.
    pub oci_version: String,
    /// Absolute path of its bundle.
    pub bundle: PathBuf,
    /// Absolute path of its root file system.
    pub rootfs: PathBuf,
    /// Annotations of its config.json.
    pub annotations: HashMap<String, String>,
    /// When it was created, RFC 3339, UTC.
    pub created: String,
    /// The container's pid on the host; `None` until there is one.
    pub monitor: Option<ProcessId>,
    /// The microVM it lives in; `None` until there is one.
    pub vm: Option<ProcessId>,
    /// The guest has confirmed `create`.
    pub ready: bool,
    /// The guest has confirmed `start`.
    pub started: bool,
    /// Virtual CPUs of its microVM.
    pub vcpus: u8,
    /// RAM of its microVM in MiB.
    pub memory_mib: u32,
    /// `linux.resources` as it holds now, devices apart.
    pub resources: serde_json::Value,
    /// Its host cgroup.
    pub cgroup: Cgroup,
    /// Its hooks: config.json may be another by the time they run.
    #[serde(default)]
    pub hooks: Hooks,
    /// What it has in its network namespace.
    #[serde(default)]
    pub network: Option<net::Site>,
    /// Its seat, where the VM is another container's.
    #[serde(default)]
    pub seat: Option<Seat>,
    /// Whether it is a sandbox that no engine has asked for, which goes with the last container in its VM.
    #[serde(default)]
    pub made: bool,
    /// How many containers have ever joined its VM.
    #[serde(default)]
    pub joined: u16,
    /// User that owns it.
    pub owner: u32,
    /// The boot of the host that it was created in ([`boot_id`]).
    #[serde(default)]
    pub boot: String,
}

/// A place in another container's VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// That container's id.
    pub sandbox: String,
    /// The place in the exported tree ([`crate::plan::exported`]); 0 until it has one.
    pub number: u16,
}

/// Status as runtime.md defines it, and `paused` as every runtime adds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `create` is at work.
    Creating,
    /// The process waits for `start`.
    Created,
    /// The process runs.
    Running,
    /// Its cgroup is frozen.
    Paused,
    /// The process has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

impl Record {
    /// As it is in this boot of the host: none of it outlives one, and its pids, its cgroup and its interfaces may be
    /// others' by now.
    fn in_boot(mut self, boot: &str) -> Self {
        if !self.boot.is_empty() && self.boot != boot {
            self.monitor = self.monitor.map(ProcessId::of_another_boot);
            self.vm = self.vm.map(ProcessId::of_another_boot);
            (self.cgroup, self.network) = (Cgroup::default(), None);
        }
        self
    }

    /// What the container is at this moment.
    pub fn status(&self) -> Status {
        match self.monitor {
            Some(monitor) if !monitor.is_alive() => Status::Stopped,
            None => Status::Creating,
            Some(_) if !self.ready => Status::Creating,
            Some(_) if self.cgroup.is_frozen() => Status::Paused,
            Some(_) if self.started => Status::Running,
            Some(_) => Status::Created,
        }
    }

    /// Whether a signal has stopped the container's process on the host (not its freezer).
    pub fn is_stopped_by_signal(&self) -> bool {
        let stat = self.monitor.and_then(|monitor| process_id::stat(monitor.pid).ok()?);
        stat.is_some_and(|(state, _)| state == 'T')
    }

    /// Whether the container's process is gone, at the latest after `wait`.
    pub fn ends_within(&self, wait: Duration) -> bool {
        let Some(monitor) = self.monitor else { return true };
        monitor.open().is_ok_and(|found| found.is_none_or(|pidfd| vmm::ends_within(pidfd.as_fd(), wait)))
    }

    /// The container's pid, 0 once it has stopped.
    pub fn live_pid(&self) -> i32 {
        self.monitor.filter(|monitor| monitor.is_alive()).map_or(0, |monitor| monitor.pid)
    }
}

/// Why a container's directory cannot be used.
#[derive(Debug)]
pub enum Error {
    /// No such container.
    NotFound,
    /// The id is taken.
    Exists,
    /// The id is not one.
    BadId(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NotFound => f.write_str("container does not exist"),
            Error::Exists => f.write_str("container with given ID already exists"),
            Error::BadId(id) => write!(
                f,
                "invalid container ID format: {id:?} (1 to 255 of letters, digits, '_', '+', '-', '.')"
            ),
        }
    }
}

impl std::error::Error for Error {}

/// A root of state directories.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// A container's directory, locked.
#[derive(Debug)]
pub struct Entry {
    dir: PathBuf,
    _lock: Lock,
}

impl Store {
    /// Names a root; nothing is made yet.
    pub fn new(root: PathBuf) -> Self {
        Store { root }
    }

    /// Where a container's directory is or would be.
    fn dir(&self, id: &str) -> Result<PathBuf, Error> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
        if id.is_empty() || id.len() > 255 || id == "." || id == ".." || !id.chars().all(allowed) {
            return Err(Error::BadId(id.to_string()));
        }
        Ok(self.root.join(id))
    }

    /// Makes a new container's directory and locks it.
    pub fn create(&self, id: &str) -> Result<Entry> {
        let dir = self.dir(id)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .with_context(|| format!("make state directory {}", self.root.display()))?;
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(Error::Exists.into()),
            Err(error) => {
                return Err(error).with_context(|| format!("make {}", dir.display()));
            }
        }
        match lock(&dir) {
            Ok(lock) => Ok(Entry { dir, _lock: lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                Err(error)
            }
        }
    }

    /// Locks an existing container's directory.
    pub fn open(&self, id: &str) -> Result<Entry> {
        let dir = self.dir(id)?;
        loop {
            let lock = lock(&dir)?;
            // While we waited the container may have been deleted, and its id be another's by now.
            match fs::metadata(dir.join(LOCK)) {
                Ok(found) if lock.0.metadata().is_ok_and(|held| held.ino() == found.ino()) => {
                    return Ok(Entry { dir, _lock: lock });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NotFound.into()),
                Err(error) => return Err(error).with_context(|| format!("look at {}", dir.display())),
            }
        }
    }

    /// Locks a container that `check` takes, before the lock as well as behind it: `create` holds it until its hooks have
    /// run and its guest has booted, and whoever cannot use what is being created need not wait for that.
    pub fn open_checked(&self, id: &str, check: fn(&Record) -> Result<()>) -> Result<(Entry, Record)> {
        check(&self.read(id)?)?;
        let entry = self.open(id)?;
        let record = entry.read()?;
        check(&record)?;
        Ok((entry, record))
    }

    /// Reads a record without waiting for its lock: it is replaced whole, so it is always one of its versions.
    pub fn read(&self, id: &str) -> Result<Record> {
        read(&self.dir(id)?)
    }

    /// A container's own process, as its config.json had it at `create`.
    pub fn process(&self, id: &str) -> Result<Process> {
        let path = self.dir(id)?.join(PROCESS);
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))
    }

    /// A container's directory, by path.
    pub fn path(&self, id: &str) -> Result<PathBuf> {
        Ok(self.dir(id)?)
    }

    /// Where [`Entry::make_root`] makes a directory.
    pub fn root_of(&self, id: &str) -> Result<PathBuf> {
        Ok(self.dir(id)?.join(ROOT))
    }

    /// Every record below the root, by id. Directories that are not ours, or not whole, are passed over.
    pub fn list(&self) -> Result<Vec<Record>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("read {}", self.root.display())),
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("read {}", self.root.display()))?;
            match read(&entry.path()) {
                Ok(record) => records.push(record),
                Err(error) if is_shortage(&error) => return Err(error),
                Err(_) => {}
            }
        }
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(records)
    }
}

/// A locked file. Unlocked when dropped: a process that was cloned meanwhile may still hold the descriptor.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

fn lock(dir: &Path) -> Result<Lock> {
    let path = dir.join(LOCK);
    let file = File::options()
        .create(dir.is_dir())
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path);
    let file = file.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::NotFound.into(),
        _ => anyhow::Error::new(error).context(format!("open {}", path.display())),
    })?;
    retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
        .map_err(io::Error::from)
        .with_context(|| format!("lock {}", path.display()))?;
    Ok(Lock(file))
}

fn read(dir: &Path) -> Result<Record> {
    let path = dir.join(STATE);
    match fs::read(&path) {
        Ok(bytes) => {
            let record: Record =
                serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
            Ok(record.in_boot(boot_id().context("the host's boot id")?))
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(Error::NotFound.into())
        }
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

impl Entry {
    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its record; [`Error::NotFound`] where `create` never got so far.
    pub fn read(&self) -> Result<Record> {
        read(&self.dir)
    }

    /// Writes the record so that a reader sees the old one or the new one.
    pub fn save(&self, record: &Record) -> Result<()> {
        let bytes = serde_json::to_vec(record).context("encode state")?;
        replace(&self.dir.join(STATE), &bytes, 0o600)
    }

    /// Keeps the container's own process for [`Store::process`]: config.json may be another, or gone, by then.
    pub fn save_process(&self, process: &Process) -> Result<()> {
        let bytes = serde_json::to_vec(process).context("encode the process")?;
        replace(&self.dir.join(PROCESS), &bytes, 0o600)
    }

    /// Makes the VM's directory, which only the owner may enter: libkrun binds its socket with a mode of 0777.
    pub fn make_vm_dir(&self) -> Result<OwnedFd> {
        let path = self.dir.join(VM_DIR);
        DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("make {}", path.display()))?;
        self.open_vm_dir()
    }

    /// Makes an empty directory, the root of a container that has none.
    pub fn make_root(&self) -> Result<()> {
        let path = self.dir.join(ROOT);
        DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("make {}", path.display()))
    }

    /// The VM's directory.
    pub fn open_vm_dir(&self) -> Result<OwnedFd> {
        let path = self.dir.join(VM_DIR);
        Ok(File::open(&path).with_context(|| format!("open {}", path.display()))?.into())
    }

    /// Removes everything about the container.
    pub fn remove(self) -> Result<()> {
        // Whoever waits for the lock may make the file anew in between.
        const TRIES: usize = 10;
        for _ in 0..TRIES {
            match fs::remove_dir_all(&self.dir) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && !self.dir.exists() => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => return result.with_context(|| format!("remove {}", self.dir.display())),
            }
        }
        fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))
    }
}

/// Writes a file by rename.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    // Not made of the name, which may be as long as names can be.
    let temporary = path.with_file_name(format!(".a3s-box.{}", std::process::id()));
    let written = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(mode)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        anyhow::Error::new(error).context(format!("write {}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_not_paths() {
        let store = Store::new("/r".into());
        for good in ["a", "web_1+2-3.4", &"x".repeat(255), ".hidden", "..."] {
            assert!(store.dir(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "/a", "a b", "a\n", "ä", &"x".repeat(256)] {
            assert!(matches!(store.dir(bad), Err(Error::BadId(_))), "{bad}");
        }
    }

    #[test]
    fn a_directory_without_record_does_not_exist_as_container_but_its_id_is_taken() {
        let root = std::env::temp_dir().join(format!("a3s-box-store-{}", std::process::id()));
        let store = Store::new(root.clone());
        let entry = store.create("c1").unwrap();
        assert!(matches!(entry.read().unwrap_err().downcast_ref(), Some(Error::NotFound)));
        assert!(matches!(store.create("c1").unwrap_err().downcast_ref(), Some(Error::Exists)));
        assert!(matches!(store.open("c2").unwrap_err().downcast_ref(), Some(Error::NotFound)));
        assert!(store.list().unwrap().is_empty());
        entry.remove().unwrap();
        fs::remove_dir_all(root).unwrap();
    }
}
