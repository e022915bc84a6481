//! A pod and its containers, as the kubelet asks for them.
//!
//! In: their configurations, as CRI's documents. Out: what CRI says of them, and what their programs say. Must not: call
//! the runtime.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::engine::{IMAGE, logged};
use super::host::{Cri, GATEWAY, pod_cgroup};
use super::rpc::Client;
use super::stream::Stream;
use crate::config::Config;
use crate::process::{brief, eventually};
use crate::world::World;

/// CRI's numbers of a container's states.
pub const RUNNING: i64 = 1;
const EXITED: i64 = 2;
/// A script that waits for SIGTERM.
pub const IDLE: &str = "trap 'exit 0' TERM; sleep 100000 & wait";
/// How long the kubelet's probes may take here.
const PROBE: Duration = Duration::from_secs(60);

/// A pod that runs. Dropped, it is stopped and removed with all its containers.
pub struct Pod {
    client: Arc<Client>,
    /// The surroundings.
    pub world: &'static World,
    /// Its id.
    pub id: String,
    config: Config,
    cgroup: PathBuf,
    logs: PathBuf,
    number: Cell<u32>,
}

/// A container of a pod.
pub struct Member {
    client: Arc<Client>,
    world: &'static World,
    /// Its id.
    pub id: String,
    log: PathBuf,
}

impl Pod {
    /// What every pod is asked for with.
    pub fn config(world: &World) -> Result<Config> {
        let name = world.name("pod");
        let logs = world.make_dir("logs")?;
        Ok(Config::of(json!({
            "metadata": { "name": name, "uid": name, "namespace": "default" },
            "hostname": "the-pod",
            "log_directory": logs,
            "dns_config": { "servers": [GATEWAY], "searches": ["cluster.local"] },
            "labels": { "app": "box" },
            "annotations": { "a3s.box/memory-mib": "256", "a3s.box/vcpus": "1" },
            "linux": { "security_context": { "namespace_options": { "pid": 1 }, "seccomp": { "profile_type": 0 } } },
        })))
    }

    /// Runs one.
    pub fn run(cri: &Cri, config: Config) -> Result<Self> {
        let pod = Pod::prepare(cri, config)?;
        let reply = pod.client.call("RunPodSandbox", &pod.request(cri))?;
        pod.known_as(&reply)
    }

    /// One that is to be asked for.
    pub fn prepare(cri: &Cri, config: Config) -> Result<Self> {
        let text =
            |pointer: &str| config.value().pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (uid, logs) = (text("/metadata/uid").to_string(), PathBuf::from(text("/log_directory")));
        let (cgroup, parent) = pod_cgroup(cri.world, &uid)?;
        let config = config.set("/linux/cgroup_parent", json!(parent));
        let (client, world) = (cri.client.clone(), cri.world);
        Ok(Pod { client, world, id: String::new(), config, cgroup, logs, number: Cell::new(0) })
    }

    /// What asks for it.
    pub fn request(&self, cri: &Cri) -> Value {
        json!({ "config": self.config.value(), "runtime_handler": cri.handler })
    }

    /// Takes its id from the reply.
    pub fn known_as(mut self, reply: &Value) -> Result<Self> {
        self.id = reply["pod_sandbox_id"].as_str().context("no id")?.to_string();
        Ok(self)
    }

    /// What every container is asked for with.
    pub fn member(&self, script: &str) -> Config {
        self.number.set(self.number.get() + 1);
        let name = format!("c{}", self.number.get());
        let masked = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"];
        let readonly = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
        Config::of(json!({
            "metadata": { "name": name },
            "image": { "image": IMAGE },
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {
                "resources": { "cpu_period": 100_000, "cpu_shares": 102, "oom_score_adj": 1000 },
                "security_context": {
                    "namespace_options": { "pid": 1 }, "masked_paths": masked, "readonly_paths": readonly,
                    "seccomp": { "profile_type": 0 },
                },
            },
        }))
    }

    /// Makes a container.
    pub fn create(&self, config: &Config) -> Result<Member> {
        let request = json!({
            "pod_sandbox_id": self.id, "config": config.value(), "sandbox_config": self.config.value(),
        });
        let reply = self.client.call("CreateContainer", &request)?;
        let log = config.value()["log_path"].as_str().unwrap_or_default();
        Ok(Member {
            client: self.client.clone(),
            world: self.world,
            id: reply["container_id"].as_str().context("no id")?.to_string(),
            log: self.logs.join(log),
        })
    }

    /// Makes a container and starts it.
    pub fn start(&self, config: &Config) -> Result<Member> {
        let member = self.create(config)?;
        member.start()?;
        Ok(member)
    }

    /// A container that waits for SIGTERM.
    pub fn idle(&self) -> Result<Member> {
        self.start(&self.member(IDLE))
    }

    /// What CRI knows of it.
    pub fn status(&self) -> Result<Value> {
        let request = json!({ "pod_sandbox_id": self.id });
        Ok(self.client.call("PodSandboxStatus", &request)?["status"].take())
    }

    /// Its address.
    pub fn ip(&self) -> Result<String> {
        let status = self.status()?;
        let ip = status["network"]["ip"].as_str().filter(|ip| !ip.is_empty());
        ip.map(str::to_string).with_context(|| format!("no address in {status}"))
    }

    /// A stream to one of its ports.
    pub fn forward(&self, port: u16) -> Result<Stream> {
        let request = json!({ "pod_sandbox_id": self.id, "port": [port] });
        Stream::open(&self.client.call("PortForward", &request)?, self.world.patience())
    }

    /// Stops and removes it.
    pub fn remove(mut self) -> Result<()> {
        let request = json!({ "pod_sandbox_id": self.id });
        self.client.call("StopPodSandbox", &request)?;
        self.client.call("RemovePodSandbox", &request)?;
        self.id.clear();
        fs::remove_dir(&self.cgroup).context("remove the pod's cgroup")
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if !self.id.is_empty() {
            let request = json!({ "pod_sandbox_id": self.id });
            let _ = self.client.call("StopPodSandbox", &request);
            let _ = self.client.call("RemovePodSandbox", &request);
        }
        let _ = fs::remove_dir(&self.cgroup);
    }
}

impl Member {
    fn call(&self, method: &str) -> Result<Value> {
        self.ask(method, json!({}))
    }

    /// Starts it.
    pub fn start(&self) -> Result<()> {
        self.call("StartContainer").map(drop)
    }

    /// Stops it: SIGTERM, and SIGKILL after so many seconds.
    pub fn stop(&self, grace: u32) -> Result<()> {
        self.ask("StopContainer", json!({ "timeout": grace })).map(drop)
    }

    /// Removes it, which ends it.
    pub fn remove(&self) -> Result<()> {
        self.call("RemoveContainer").map(drop)
    }

    /// Any call about it with more than its id.
    pub fn ask(&self, method: &str, more: Value) -> Result<Value> {
        let mut request = more;
        request["container_id"] = json!(self.id);
        self.client.call(method, &request)
    }

    /// Runs a program in it: what ExecSync returns.
    pub fn exec(&self, cmd: &[&str]) -> Result<Value> {
        let reply = self.ask("ExecSync", json!({ "cmd": cmd, "timeout": PROBE.as_secs() }));
        reply.with_context(|| {
            let (status, log) = (self.status().unwrap_or_default(), self.raw_log().unwrap_or_default());
            format!("the container is {status}, its log {log:?}")
        })
    }

    /// What a shell script prints, where it ends well and says nothing on standard error.
    pub fn sh(&self, script: &str) -> Result<String> {
        let reply = self.exec(&["sh", "-c", script])?;
        let stdout = reply["stdout"].as_str().unwrap_or_default();
        ensure!(reply["exit_code"] == 0 && reply["stderr"] == "", "{script}: {reply}");
        Ok(stdout.trim_end().to_string())
    }

    /// Fails unless a shell script in it prints this.
    pub fn says(&self, script: &str, expected: &str) -> Result<()> {
        let said = self.sh(script)?;
        ensure!(said == expected, "{script}: {:?}, not {expected:?}", brief(&said));
        Ok(())
    }

    /// A program in it, with streams.
    pub fn stream(&self, method: &str, more: Value) -> Result<Stream> {
        Stream::open(&self.ask(method, more)?, self.world.patience())
    }

    /// What CRI knows of it.
    pub fn status(&self) -> Result<Value> {
        Ok(self.call("ContainerStatus")?["status"].take())
    }

    /// Fails unless it runs.
    pub fn lives(&self) -> Result<()> {
        let status = self.status()?;
        ensure!(status["state"] == RUNNING, "it does not run: {status}");
        self.says("echo here", "here")
    }

    /// Its pid on the host.
    pub fn pid(&self) -> Result<i32> {
        let reply = self.ask("ContainerStatus", json!({ "verbose": true }))?;
        let info = reply["info"]["info"].as_str().context("no info")?;
        let info: Value = serde_json::from_str(info)?;
        let pid = info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.filter(|pid| *pid > 0).context("no pid in its info")
    }

    /// Waits for its end. Out: its status.
    pub fn wait(&self) -> Result<Value> {
        let mut status = Value::Null;
        eventually("its end", self.world.patience(), || {
            status = self.status()?;
            Ok(status["state"] == EXITED)
        })
        .with_context(|| status.to_string())?;
        Ok(status)
    }

    /// Its log, as CRI keeps it.
    pub fn raw_log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| self.log.display().to_string())
    }

    /// What it has printed, without when and where.
    pub fn log(&self) -> Result<String> {
        logged(&self.raw_log()?)
    }

    /// Where its log is.
    pub fn log_path(&self) -> &Path {
        &self.log
    }
}
