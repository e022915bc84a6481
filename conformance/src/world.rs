//! What every test works with: the runtime, a directory of its own, root file systems to copy.
//!
//! In: the command line's choices. Out: commands of the runtime with their results. Must not: touch the originals of
//! the root file systems, or any container that the suite did not make.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::config::Config;
use crate::options::{Level, Options};
use crate::process::{self, Output, Running};
use crate::report::NotHere;

/// The suite's surroundings.
#[derive(Debug)]
pub struct World {
    /// The runtime under test.
    pub runtime: PathBuf,
    /// How much a container costs.
    pub level: Level,
    /// Whether everything runs at full length.
    pub full: bool,
    /// What puts the runtime and engines' configuration in place, where it was given.
    pub installer: Option<PathBuf>,
    /// The runtime's Debian package, where it was given.
    pub package: Option<PathBuf>,
    /// Everything the suite makes lies here, apart from cgroups.
    pub dir: PathBuf,
    /// The state directory given to the runtime.
    pub root: PathBuf,
    /// A word in the name of everything that the suite has made.
    pub tag: String,
    /// Never written to, so that every copy of it is the same.
    original: PathBuf,
    busybox: PathBuf,
    debian: Option<PathBuf>,
    number: Cell<u32>,
}

impl World {
    /// Makes the directory and copies what tests may write to.
    pub fn new(options: &Options, runtime: &Path, level: Level) -> Result<Self> {
        let name = runtime.file_name().unwrap_or_default().to_string_lossy();
        let tag = format!("cf{}{}", std::process::id(), name.replace('-', ""));
        let dir = std::env::temp_dir().join(format!("a3s-box-conformance-{tag}"));
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let world = World {
            runtime: fs::canonicalize(runtime).with_context(|| format!("runtime {}", runtime.display()))?,
            level,
            full: options.full,
            installer: options.installer.clone(),
            package: options.package.clone(),
            root: dir.join("state"),
            original: options.busybox.clone(),
            busybox: dir.join("busybox"),
            debian: options.debian.clone(),
            number: Cell::new(0),
            dir,
            tag,
        };
        copy_tree(&world.original, &world.busybox)?;
        if world.is_vm() {
            // Elsewhere udev's static nodes load it.
            let mut tun = Command::new("modprobe");
            tun.arg("tun");
            let _ = process::run(tun, b"", Duration::from_secs(20));
        }
        Ok(world)
    }

    /// Whether containers are real VMs.
    pub fn is_vm(&self) -> bool {
        self.level != Level::Local
    }

    /// One of three values, by level and length.
    pub fn by_level<T>(&self, local: T, vm: T, full: T) -> T {
        match (self.full, self.is_vm()) {
            (true, _) => full,
            (false, true) => vm,
            (false, false) => local,
        }
    }

    /// How long a command may take before it counts as hanging: at full length it moves 100 MB where others move 4.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(match (self.is_vm(), self.full) {
            (false, _) => 20,
            (true, false) => 180,
            (true, true) => 400,
        })
    }

    /// A name that no other has.
    pub fn name(&self, hint: &str) -> String {
        self.number.set(self.number.get() + 1);
        format!("{hint}-{}-{}", self.tag, self.number.get())
    }

    /// A new directory.
    pub fn make_dir(&self, hint: &str) -> Result<PathBuf> {
        let dir = self.dir.join(self.name(hint));
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }

    /// The root file system that tests share and do not change.
    pub fn shared_rootfs(&self) -> &Path {
        &self.busybox
    }

    /// The Debian root file system, read-only.
    pub fn debian(&self) -> Result<&Path> {
        self.debian.as_deref().context(NotHere("no --rootfs debian=DIR was given"))
    }

    /// A fresh copy of the busybox root file system.
    pub fn own_rootfs(&self, bundle: &Path) -> Result<PathBuf> {
        let rootfs = bundle.join("rootfs");
        copy_tree(&self.original, &rootfs)?;
        Ok(rootfs)
    }

    /// Writes a bundle whose root file system is the shared one.
    pub fn bundle(&self, config: &Config) -> Result<PathBuf> {
        let dir = self.make_dir("bundle")?;
        write_config(&dir, &config.clone().set("/root/path", json!(self.busybox)))?;
        Ok(dir)
    }

    /// Writes a bundle with a root file system of its own, `rootfs`.
    pub fn own_bundle(&self, config: &Config) -> Result<PathBuf> {
        let dir = self.make_dir("bundle")?;
        self.own_rootfs(&dir)?;
        write_config(&dir, config)?;
        Ok(dir)
    }

    /// A command of the runtime.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.runtime);
        command.arg(format!("--root={}", self.root.display())).args(args).current_dir(&self.dir);
        command
    }

    /// Runs a command of the runtime to its end.
    pub fn call<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Output> {
        process::run(self.command(args), b"", self.patience())
    }

    /// The same for another directory of state.
    pub fn call_at<S: AsRef<std::ffi::OsStr>>(&self, root: &Path, args: &[S]) -> Result<Output> {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(root).args(args);
        process::run(command, b"", self.patience())
    }

    /// Starts a command of the runtime.
    pub fn start<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Running> {
        process::start(self.command(args), true, self.patience())
    }

    /// Runs a command that must succeed without a word on standard error.
    pub fn ok<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Output> {
        self.call(args)?.code(0)?.quiet()
    }

    /// Runs a command that must fail with status 1 and one line that holds these words.
    pub fn refused<S: AsRef<std::ffi::OsStr>>(&self, args: &[S], words: &[&str]) -> Result<Output> {
        self.call(args)?.code(1)?.one_line(words)
    }

    /// Runs a bundle to the end of its container, which is then gone.
    pub fn run(&self, bundle: &Path, input: &[u8]) -> Result<Output> {
        let id = self.name("run");
        let command = self.command(&["run", "--bundle", &bundle.to_string_lossy(), &id]);
        let output = process::run(command, input, self.patience())?;
        ensure!(!self.root.join(&id).exists(), "{}: its state is still there", output.shown);
        Ok(output)
    }

    /// What the container's script prints, where it ends well and says nothing on standard error.
    pub fn run_config(&self, config: &Config) -> Result<String> {
        Ok(self.run(&self.bundle(config)?, b"")?.code(0)?.quiet()?.text())
    }
}

/// Writes config.json.
pub fn write_config(bundle: &Path, config: &Config) -> Result<()> {
    let path = bundle.join("config.json");
    fs::write(&path, config.value().to_string()).with_context(|| format!("write {}", path.display()))
}

/// Copies a tree with everything that belongs to its files.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(from).arg(to);
    process::run(copy, b"", Duration::from_secs(120))?.code(0).map(drop)
}

/// Removes a tree, but nothing that is mounted in it: that may be the host's own.
pub fn remove_tree(path: &Path) -> Result<()> {
    let mut remove = Command::new("rm");
    remove.args(["-rf", "--one-file-system", "--"]).arg(path);
    process::run(remove, b"", Duration::from_secs(60))?.code(0).map(drop)
}

/// Makes a FIFO.
pub fn make_fifo(path: &Path) -> Result<()> {
    let mut make = Command::new("mkfifo");
    make.arg(path);
    process::run(make, b"", Duration::from_secs(10))?.code(0).map(drop)
}
