//! The container that most wishes share: idle, with a root file system of its own, its process asked by `exec`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Output, Running};
use crate::world::World;

/// The container and what its tests need to know of it.
pub struct Bench {
    /// Idle.
    pub container: Container,
    /// Host directory that is bound at /shared.
    pub shared: PathBuf,
    number: u32,
}

impl Bench {
    /// Makes it and starts it.
    pub fn set_up(world: &'static World) -> Result<Self> {
        let shared = world.make_dir("shared")?;
        let config = config().bind(&shared, "/shared", &[]);
        let bundle = world.own_bundle(&config)?;
        furnish(&bundle.join("rootfs"))?;
        let container = Container::with_input(world, bundle, Stdio::null())?;
        container.start()?;
        Ok(Bench { container, shared, number: 0 })
    }

    /// The surroundings.
    pub fn world(&self) -> &'static World {
        self.container.world
    }

    /// Runs a process given as JSON by `exec --process`.
    pub fn process(&mut self, process: &Value) -> Result<Output> {
        let path = self.process_file(process)?;
        let command = self.container.world.command(&["exec", "--process", &path, &self.container.id]);
        process::run(command, b"", self.world().patience())
    }

    /// Writes a process file and says where.
    pub fn process_file(&mut self, process: &Value) -> Result<String> {
        self.number += 1;
        let path = self.container.bundle.join(format!("process-{}", self.number));
        fs::write(&path, process.to_string()).context("write the process file")?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// What a script prints as this process, whose args it becomes.
    pub fn says_as(&mut self, process: Value, script: &str) -> Result<String> {
        let mut process = process;
        process["args"] = json!(["/bin/sh", "-c", script]);
        Ok(self.process(&process)?.code(0)?.quiet()?.text().trim_end().to_string())
    }

    /// Starts a program by `exec` with pipes.
    pub fn spawn(&self, args: &[&str]) -> Result<Running> {
        self.container.spawn(args)
    }

    /// Runs a program by `exec` with this input.
    pub fn feed(&self, input: &[u8], args: &[&str]) -> Result<Output> {
        process::run(self.container.exec_command(args), input, self.world().patience())
    }
}

/// The least a process needs.
pub fn plain_process() -> Value {
    json!({ "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"], "cwd": "/", "args": ["true"] })
}

fn config() -> Config {
    Config::idle()
        .set("/process/user/additionalGids", json!([10, 20]))
        .set("/process/user/umask", json!(0o027))
        .set("/process/oomScoreAdj", json!(100))
        .set("/domainname", json!("example.org"))
        .set("/process/noNewPrivileges", json!(true))
        .set(
            "/linux/maskedPaths",
            json!([
                "/proc/kcore",
                "/proc/acpi",
                "/sys/firmware",
                "/opt/secret",
                "/opt/secret-file",
                "/no/such/path"
            ]),
        )
        .set("/linux/readonlyPaths", json!(["/proc/sys", "/opt/fixed", "/no/such/path"]))
        .mount("/scratch", "tmpfs", "tmpfs", &["nosuid", "noexec", "size=1m", "mode=1770"])
}

/// Files that tests look for.
fn furnish(rootfs: &std::path::Path) -> Result<()> {
    for dir in ["opt/tools", "opt/secret", "opt/fixed", "opt/locked"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    fs::write(rootfs.join("opt/tools/only-here"), "#!/bin/sh\necho found only here\n")?;
    fs::set_permissions(rootfs.join("opt/tools/only-here"), fs::Permissions::from_mode(0o755))?;
    fs::write(rootfs.join("opt/plain"), "not a program\n")?;
    fs::write(rootfs.join("opt/secret/word"), "hidden\n")?;
    fs::write(rootfs.join("opt/secret-file"), "hidden\n")?;
    fs::write(rootfs.join("opt/fixed/file"), "as it was\n")?;
    Ok(())
}
