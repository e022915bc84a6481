//! A container under test, from `create` to `delete`.
//!
//! In: a bundle. Out: its states and what runs in it. Dropped, it is deleted by force. Must not: assume anything about
//! the runtime's state directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::config::Config;
use crate::process::{self, Output, Running};
use crate::world::World;

/// A container that `create` has made.
#[derive(Debug)]
pub struct Container {
    /// The surroundings.
    pub world: &'static World,
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The pid in its pid file.
    pub pid: i32,
    reaped: bool,
}

impl Container {
    /// Creates a container on the shared root file system.
    pub fn create(world: &'static World, config: &Config) -> Result<Self> {
        Self::of_bundle(world, world.bundle(config)?)
    }

    /// Creates and starts a container on the shared root file system.
    pub fn running(world: &'static World, config: &Config) -> Result<Self> {
        let container = Self::create(world, config)?;
        container.start()?;
        Ok(container)
    }

    /// Creates a container; its output goes to the files `out` and `err` in its bundle, its input is /dev/null.
    pub fn of_bundle(world: &'static World, bundle: PathBuf) -> Result<Self> {
        Self::with_input(world, bundle, Stdio::null())
    }

    /// The same, with another input.
    pub fn with_input(world: &'static World, bundle: PathBuf, input: Stdio) -> Result<Self> {
        Self::make(world, &[], bundle, input)
    }

    /// Creates and starts a container, by `create` with these flags before it.
    pub fn flagged(world: &'static World, flags: &[&str], config: &Config) -> Result<Self> {
        let container = Self::make(world, flags, world.bundle(config)?, Stdio::null())?;
        container.start()?;
        Ok(container)
    }

    fn make(world: &'static World, flags: &[&str], bundle: PathBuf, input: Stdio) -> Result<Self> {
        let id = world.name("c");
        let mut command = flagged_create(world, flags, &bundle, &id);
        command
            .stdin(input)
            .stdout(File::create(bundle.join("out"))?)
            .stderr(File::create(bundle.join("err"))?);
        let created = process::start(command, false, world.patience())?.finish();
        // From here on there may be something to delete.
        let mut container = Container { world, id, bundle, pid: 0, reaped: false };
        let created = created?;
        ensure!(
            created.code == 0,
            "{}: ended with {}: {:?}",
            created.shown,
            created.code,
            container.errors()
        );
        ensure!(container.errors().is_empty(), "{}: not silent: {:?}", created.shown, container.errors());
        let text = fs::read_to_string(container.pid_file()).context("the pid file")?;
        container.pid = text.parse().with_context(|| format!("pid file {text:?}"))?;
        Ok(container)
    }

    /// Where its pid file is.
    pub fn pid_file(&self) -> PathBuf {
        self.bundle.join("pid")
    }

    /// What came out of it.
    pub fn output(&self) -> String {
        fs::read_to_string(self.bundle.join("out")).unwrap_or_default()
    }

    /// What came out of it as errors, from the runtime or from the workload.
    pub fn errors(&self) -> String {
        fs::read_to_string(self.bundle.join("err")).unwrap_or_default()
    }

    /// `start`, which must succeed silently.
    pub fn start(&self) -> Result<()> {
        self.world.ok(&["start", &self.id]).map(drop)
    }

    /// The document that `state` prints.
    pub fn state(&self) -> Result<Value> {
        let output = self.world.ok(&["state", &self.id])?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("state printed {:?}", output.text()))
    }

    /// Its status.
    pub fn status(&self) -> Result<String> {
        Ok(self.state()?["status"].as_str().unwrap_or_default().to_string())
    }

    /// Fails unless it has this status now.
    pub fn expect_status(&self, expected: &str) -> Result<()> {
        let status = self.status()?;
        ensure!(status == expected, "status is {status}, not {expected}");
        Ok(())
    }

    /// Sends a signal by `kill`.
    pub fn kill(&self, signal: &str) -> Result<()> {
        self.world.ok(&["kill", &self.id, signal]).map(drop)
    }

    /// A command for `exec`.
    pub fn exec_command(&self, args: &[&str]) -> Command {
        self.world.command(&[&["exec", self.id.as_str()], args].concat())
    }

    /// Runs a program in it by `exec`.
    pub fn exec(&self, args: &[&str]) -> Result<Output> {
        process::run(self.exec_command(args), b"", self.world.patience())
    }

    /// Starts a program in it by `exec`.
    pub fn spawn(&self, args: &[&str]) -> Result<Running> {
        process::start(self.exec_command(args), true, self.world.patience())
    }

    /// What a shell script in it prints, where it ends well and says nothing on standard error.
    pub fn sh(&self, script: &str) -> Result<String> {
        Ok(self.exec(&["sh", "-c", script])?.code(0)?.quiet()?.text().trim_end().to_string())
    }

    /// Fails unless a shell script in it prints this.
    pub fn says(&self, script: &str, expected: &str) -> Result<()> {
        let said = self.sh(script)?;
        ensure!(said == expected, "{script}: {:?}, not {expected:?}", process::brief(&said));
        Ok(())
    }

    /// Waits for its pid as its parent by adoption.
    pub fn wait(&mut self) -> Result<i32> {
        self.wait_for(self.world.patience())
    }

    /// The same, with a time limit.
    pub fn wait_for(&mut self, limit: Duration) -> Result<i32> {
        let status = process::wait_child(self.pid, limit)?;
        self.reaped = true;
        Ok(status)
    }

    /// `delete` with these flags; it must succeed silently and leave nothing.
    pub fn delete(&mut self, flags: &[&str]) -> Result<()> {
        self.world.ok(&[&["delete"], flags, &[self.id.as_str()]].concat())?;
        ensure!(!process::is_alive(self.pid), "pid {} survives delete", self.pid);
        self.world.refused(&["state", &self.id], &["does not exist"]).map(drop)
    }
}

/// `create` with a pid file, without its streams.
pub fn create_command(world: &World, bundle: &Path, id: &str) -> Command {
    flagged_create(world, &[], bundle, id)
}

fn flagged_create(world: &World, flags: &[&str], bundle: &Path, id: &str) -> Command {
    let (dir, pid_file) = (bundle.to_string_lossy(), bundle.join("pid"));
    let create = ["create", "--bundle", &dir, "--pid-file", &pid_file.to_string_lossy(), id];
    world.command(&[flags, &create].concat())
}

impl Drop for Container {
    fn drop(&mut self) {
        // Tests have their say about deletion elsewhere; what this leaves is found by the leak check.
        let _ = self.world.call(&["delete", "--force", &self.id]);
        if !self.reaped && process::is_child(self.pid) {
            let _ = process::signal(self.pid, Signal::KILL);
            let _ = process::wait_child(self.pid, Duration::from_secs(5));
        }
        let _ = crate::world::remove_tree(&self.bundle);
    }
}
