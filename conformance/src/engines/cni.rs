//! containerd's network by CNI: the bridge plugin, set up between `create` and `start`.
//!
//! In: `ctr run --cni`. Out: the container's address from the host, and its loopback from inside its network namespace,
//! which is how a port is forwarded. Must not: leave a configuration for anybody else's containers.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::containerd;
use super::engine::Engine;
use crate::cases::{At, Case, Wish, sharing};
use crate::process;
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Pod>] = &[
    ("containerd/cni/the-containers-address-answers", answers),
    ("containerd/cni/a-port-is-forwarded-to-its-loopback", forwarded),
];

const CONFIGURATIONS: &str = "/etc/cni/net.d";
const PLUGINS: &str = "/opt/cni/bin";
const BRIDGE: &str = "cni-box";
const GATEWAY: &str = "10.88.7.1";

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, set_up, WISHES)]
}

/// A container on a bridge.
struct Pod {
    engine: Engine,
    id: String,
    configuration: String,
}

fn set_up(world: &'static World) -> Result<Pod> {
    let engine = containerd::set_up(world)?;
    let configuration = format!("{CONFIGURATIONS}/10-{}.conflist", world.tag);
    let ranges = json!([[{ "subnet": "10.88.7.0/24" }], [{ "subnet": "fd88:7::/64" }]]);
    let routes = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
    let bridge = json!({ "type": "bridge", "bridge": BRIDGE, "isGateway": true,
        "ipam": { "type": "host-local", "ranges": ranges, "routes": routes, "dataDir": engine.dir } });
    let network = json!({ "cniVersion": "1.0.0", "name": world.tag, "plugins": [bridge] });
    fs::create_dir_all(CONFIGURATIONS)?;
    fs::create_dir_all("/opt/cni")?;
    let _ = symlink("/usr/lib/cni", PLUGINS);
    fs::write(&configuration, network.to_string())?;
    let pod = Pod { engine, id: world.name("task"), configuration };
    let script = "mkdir /far /home; echo from afar >/far/word; echo at home >/home/word; httpd -p 80 -h /far; \
        exec httpd -f -p 127.0.0.1:8080 -h /home";
    containerd::run(&pod.engine, &["--detach", "--cni"], &pod.id, &["sh", "-c", script])?.code(0)?;
    Ok(pod)
}

impl Pod {
    fn inside(&self, script: &str) -> Result<String> {
        let exec = self.engine.world.name("exec");
        self.engine.ok(&["task", "exec", "--exec-id", &exec, &self.id, "sh", "-c", script])
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.engine.call(&["task", "kill", "--signal", "KILL", &self.id]);
        let _ = self.engine.call(&["task", "delete", "--force", &self.id]);
        let _ = self.engine.call(&["containers", "delete", &self.id]);
        let _ = fs::remove_file(&self.configuration);
        let _ = host("ip", &["link", "delete", BRIDGE]);
    }
}

fn host(program: &str, args: &[&str]) -> Result<String> {
    Ok(process::host(program, args, Duration::from_secs(60))?.trim_start().to_string())
}

fn answers(pod: &mut Pod) -> Result<()> {
    let shown = pod.inside("ip -4 addr show dev eth0; ip -6 addr show dev eth0 scope global")?;
    let address = |family: &str| {
        let mut words = shown.split_whitespace().skip_while(|word| *word != family).skip(1);
        words
            .next()
            .and_then(|word| word.split('/').next())
            .with_context(|| format!("no {family} in {shown:?}"))
    };
    let (four, six) = (address("inet")?, address("inet6")?);
    for address in [four, six] {
        host("ping", &["-c", "1", "-W", "10", address])?;
    }
    let word = ["--silent", "--max-time", "20", &format!("http://{four}/word")];
    same(&host("curl", &word)?, &"from afar".into())?;
    pod.inside(&format!("ping -c 1 -W 10 {GATEWAY}")).map(drop)
}

/// As containerd's port-forward does: it dials the loopback address inside the container's network namespace.
fn forwarded(pod: &mut Pod) -> Result<()> {
    let listed = pod.engine.ok(&["task", "ls"])?;
    let line = listed.lines().find(|line| line.starts_with(&pod.id));
    let pid = line.and_then(|line| line.split_whitespace().nth(1)).context("its pid")?;
    let word = ["--silent", "--max-time", "20", "http://127.0.0.1:8080/word"];
    same(&host("nsenter", &[&["-t", pid, "-n", "curl"], &word[..]].concat())?, &"at home".into())?;
    let refused =
        host("nsenter", &["-t", pid, "-n", "sh", "-c", "socat -u TCP:127.0.0.1:8081 - 2>&1; true"])?;
    ensure!(refused.contains("reset"), "{refused:?}");
    Ok(())
}
