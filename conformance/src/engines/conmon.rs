//! CRI-O's way: conmon with CRI-O's arguments, then the runtime itself for everything after `create`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::engine::logged;
use super::terminals::{leave, sit};
use crate::cases::{At, Case, Wish, sharing};
use crate::config::Config;
use crate::process::{self, Output, eventually};
use crate::pty::Terminal;
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Pod>] = &[
    ("crio/create-start-log-state", created),
    ("crio/exec-sync-by-conmon", exec_sync),
    ("crio/exec-sync-that-times-out", timed_out),
    ("crio/exec-in-the-foreground", exec),
    ("crio/exec-with-a-terminal-follows-its-size", exec_on_terminal),
    ("crio/stop-leaves-an-exit-file", stopped),
    ("crio/a-refused-create-tells-conmon-why", refused),
    ("crio/a-container-with-a-terminal", terminal),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, Pod::set_up, WISHES)]
}

/// A container as CRI-O has one. Dropped, it is deleted by force.
pub struct Pod {
    /// The surroundings.
    pub world: &'static World,
    /// Its id.
    pub id: String,
    bundle: PathBuf,
}

impl Pod {
    fn set_up(world: &'static World) -> Result<Self> {
        let config =
            Config::sh("trap 'exit 9' TERM; echo started; echo complaint >&2; while :; do sleep 0.1; done");
        Pod::start(world, world.name("crio"), &config)
    }

    /// Makes one and starts it.
    pub fn start(world: &'static World, id: String, config: &Config) -> Result<Self> {
        let pod = Pod { world, id, bundle: world.bundle(config)? };
        let output = pod.conmon(&pod.bundle, &[])?.code(0)?;
        let told = pod.told(&pod.bundle)?;
        ensure!(told["pid"].as_i64().is_some_and(|pid| pid > 0), "conmon told {told}; {}", output.stderr);
        pod.ok(&["start", &pod.id])?;
        Ok(pod)
    }

    /// conmon as CRI-O calls it. Its sync pipe is a file.
    fn conmon(&self, bundle: &Path, more: &[&str]) -> Result<Output> {
        let at = |name: &str| bundle.join(name).display().to_string();
        for dir in ["exits", "persist", "sockets"] {
            fs::create_dir_all(bundle.join(dir))?;
        }
        let bundle_dir = bundle.display().to_string();
        let mut conmon = Command::new("sh");
        conmon
            .args(["-c", "sync=$1; shift; _OCI_SYNCPIPE=3 exec conmon \"$@\" 3>\"$sync\"", "sh", &at("sync")])
            .args(["-b", &bundle_dir, "-c", &self.id, "--exit-dir", &at("exits"), "-l", &at("log")])
            .args(["--log-level", "info", "-n", &self.id, "-P", &at("conmon-pidfile"), "-p", &at("pidfile")])
            .args(["--persist-dir", &at("persist"), "-r"])
            .arg(&self.world.runtime)
            .args(["--runtime-arg", &format!("--root={}", self.world.root.display())])
            .args(["--socket-dir-path", &at("sockets"), "-u", &self.id])
            .args(more);
        process::run(conmon, b"", self.world.patience())
    }

    /// What conmon wrote to its sync pipe.
    fn told(&self, bundle: &Path) -> Result<Value> {
        let path = bundle.join("sync");
        eventually(
            "conmon speaks",
            self.world.patience(),
            || Ok(fs::read_to_string(&path)?.ends_with('\n')),
        )?;
        let text = fs::read_to_string(&path)?;
        serde_json::from_str(text.lines().next().unwrap_or_default())
            .with_context(|| format!("conmon told {text:?}"))
    }

    fn ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.world.call(args)?.code(0)?.text())
    }

    /// Runs a script in it as `kubectl exec` does.
    pub fn sh(&self, script: &str, input: &str, code: i32) -> Result<Output> {
        let dir = self.world.make_dir("exec")?;
        let file = process_file(&dir, &["sh", "-c", script])?;
        let mut command = self.world.command(&["exec", "--process", &file, &self.id]);
        command.env_clear().env("XDG_RUNTIME_DIR", "/run");
        process::run(command, input.as_bytes(), self.world.patience())?.code(code)
    }

    /// What conmon leaves at its end: the exit status.
    pub fn exit_file(&self) -> Result<String> {
        let exit = self.bundle.join("exits").join(&self.id);
        eventually("an exit file", self.world.patience(), || Ok(exit.exists()))?;
        Ok(fs::read_to_string(exit)?)
    }

    /// What conmon has logged.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.bundle.join("log"))?)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.world.call(&["delete", "--force", &self.id]);
        let pid = fs::read_to_string(self.bundle.join("conmon-pidfile")).unwrap_or_default();
        if let Ok(pid) = pid.trim().parse() {
            let _ = process::wait_gone(pid, self.world.patience());
            let _ = process::signal(pid, Signal::KILL);
        }
        process::reap_orphans();
    }
}

fn created(pod: &mut Pod) -> Result<()> {
    let state: Value = serde_json::from_str(&pod.ok(&["state", &pod.id])?)?;
    same(&state["status"], &json!("running"))?;
    let pid = fs::read_to_string(pod.bundle.join("pidfile"))?;
    same(&state["pid"].to_string(), &pid)?;
    eventually("both lines in the log", pod.world.patience(), || {
        let log = fs::read_to_string(pod.bundle.join("log"))?;
        Ok(log.contains(" stdout F started\n") && log.contains(" stderr F complaint\n"))
    })
}

fn process_file(dir: &Path, args: &[&str]) -> Result<String> {
    let process = json!({ "args": args, "cwd": "/", "user": { "uid": 0, "gid": 0 },
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] });
    let path = dir.join("process.json");
    fs::write(&path, process.to_string())?;
    Ok(path.display().to_string())
}

/// Probes and lifecycle hooks: output from conmon's log, the exit status from its sync pipe.
fn exec_sync(pod: &mut Pod) -> Result<()> {
    let dir = pod.world.make_dir("exec")?;
    let file = process_file(&dir, &["sh", "-c", "echo probed; exit 5"])?;
    pod.conmon(&dir, &["-e", "--exec-process-spec", &file, "--sync"])?;
    let sync = dir.join("sync");
    eventually("the exit status", pod.world.patience(), || {
        Ok(fs::read_to_string(&sync)?.contains("exit_code"))
    })?;
    let told = fs::read_to_string(&sync)?;
    ensure!(told.contains("\"exit_code\": 5") || told.contains("\"exit_code\":5"), "conmon told {told}");
    let log = fs::read_to_string(dir.join("log"))?;
    ensure!(log.contains(" stdout F probed\n"), "conmon logged {log:?}");
    Ok(())
}

/// conmon kills the process group of the pid; the program in the container goes with it.
fn timed_out(pod: &mut Pod) -> Result<()> {
    let dir = pod.world.make_dir("exec")?;
    let file = process_file(&dir, &["sleep", "54321"])?;
    pod.conmon(&dir, &["-e", "--exec-process-spec", &file, "--sync", "-T", "2"])?;
    eventually("conmon tells of the time", pod.world.patience(), || {
        Ok(fs::read_to_string(dir.join("sync"))?.contains("command timed out"))
    })?;
    eventually("the end of its program", pod.world.patience(), || {
        Ok(!pod.ok(&["exec", &pod.id, "ps", "-o", "args"])?.contains("sleep 54321"))
    })
}

/// The streams are a terminal of CRI-O's own.
fn exec_on_terminal(pod: &mut Pod) -> Result<()> {
    let file = pod.bundle.join("shell.json");
    let process = json!({ "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "terminal": true,
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] });
    fs::write(&file, process.to_string())?;
    let args = ["exec", "--process", &file.display().to_string(), &pod.id];
    let (mut terminal, exec, _slave) = Terminal::spawn(pod.world, &args, (31, 99))?;
    sit(&mut terminal, (31, 99))?;
    leave(terminal, exec, 6)
}

/// The log has what appears on it; the size comes through conmon's control FIFO.
fn terminal(pod: &mut Pod) -> Result<()> {
    let script =
        "test -t 0 && echo is one; trap 'stty size; exit 8' WINCH; echo ready; while :; do sleep 0.1; done";
    let config = Config::sh(script).set("/process/terminal", json!(true));
    let seated = Pod { world: pod.world, id: pod.world.name("crio"), bundle: pod.world.bundle(&config)? };
    seated.conmon(&seated.bundle, &["-t"])?.code(0)?;
    let told = seated.told(&seated.bundle)?;
    ensure!(told["pid"].as_i64().is_some_and(|pid| pid > 0), "conmon told {told}");
    seated.ok(&["start", &seated.id])?;
    let says = |words: &str| {
        let mut log = String::new();
        let found = eventually(&format!("{words:?} in the log"), pod.world.patience(), || {
            // One that is half written says nothing yet.
            log = logged(&fs::read_to_string(seated.bundle.join("log"))?).unwrap_or_default();
            Ok(log.contains(words))
        });
        found.with_context(|| format!("the log says {log:?}"))
    };
    says("is one\r\n")?;
    says("ready\r\n")?;
    fs::write(seated.bundle.join("ctl"), "1 43 121\n")?;
    says("43 121\r\n")?;
    same(&seated.exit_file()?, &"8".into())
}

fn exec(pod: &mut Pod) -> Result<()> {
    let output = pod.sh("cat; echo err >&2; exit 6", "typed", 6)?;
    same(&output.text(), &"typed".into())?;
    same(&output.stderr, &"err\n".into())
}

fn stopped(pod: &mut Pod) -> Result<()> {
    pod.ok(&["kill", &pod.id, "15"])?;
    same(&pod.exit_file()?, &"9".into())?;
    let again = pod.world.call(&["kill", &pod.id, "15"])?;
    ensure!(again.code != 0 && again.stderr.contains("container not running"), "{}", again.stderr);
    pod.ok(&["delete", "--force", &pod.id])?;
    pod.ok(&["delete", "--force", &pod.id]).map(drop)
}

fn refused(pod: &mut Pod) -> Result<()> {
    let bundle = pod.world.bundle(&Config::new(&["/no/such/program"]))?;
    let failed = Pod { world: pod.world, id: pod.world.name("crio"), bundle };
    failed.conmon(&failed.bundle, &[])?;
    let told = failed.told(&failed.bundle)?;
    let message = told["message"].as_str().unwrap_or_default();
    ensure!(told["pid"] == -1 || told["data"] == -1, "conmon told {told}");
    ensure!(message.contains("no such file or directory"), "conmon told {told}");
    Ok(())
}
