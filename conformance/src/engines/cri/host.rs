//! containerd with its CRI plugin, as a node has it: two runtime handlers, a bridge by CNI, images that are there already.
//!
//! In: the runtime under test. Out: a [`Cri`] that makes pods. Must not: use a network, a cgroup or a state directory
//! that others use.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::containerd;
use super::super::engine::{Engine, IMAGE};
use super::pod::{Member, Pod};
use super::rpc::Client;
use crate::process::{self, eventually};
use crate::world::World;

/// What holds a pod where the runtime runs it.
const PAUSE: &str = "localhost/pause:1";
/// The kubelet waits as long for a new pod.
const PATIENCE: Duration = Duration::from_secs(240);
const BRIDGE: &str = "cni-cri";
/// The bridge's own address.
pub const GATEWAY: &str = "10.88.8.1";
/// The handler of the runtime under test.
pub const BOX: &str = "a3s-box";
/// The handler beside it.
pub const RUNC: &str = "runc";

/// A node.
pub struct Cri {
    /// Which handler runs the pods.
    pub handler: &'static str,
    /// The surroundings.
    pub world: &'static World,
    shared: Option<Shared>,
    /// The server.
    pub client: Arc<Client>,
    engine: Engine,
}

/// A pod for wishes that leave it as it was, and its two containers.
pub struct Shared {
    /// The pod.
    pub pod: Pod,
    /// One idle container.
    pub one: Member,
    /// Another.
    pub two: Member,
}

impl Cri {
    /// Starts containerd.
    pub fn set_up(world: &'static World, handler: &'static str) -> Result<Self> {
        let dir = world.make_dir("cri")?;
        let at = |name: &str| dir.join(name).display().to_string();
        fs::create_dir(dir.join("cni"))?;
        fs::write(dir.join("cni/10-cri.conflist"), network(world, &at("leases")).to_string())?;
        fs::write(dir.join("config.toml"), settings(world, &at))?;
        let tidy = "ip link delete cni-cri 2>/dev/null";
        let engine = containerd::serve(world, dir.clone(), &["--namespace", "k8s.io"], tidy)?;
        // Absolute: CRI gives a sandbox no PATH of its own.
        let pause = ["/bin/sh", "-c", "trap 'exit 0' TERM INT; sleep 1000000 & wait"];
        containerd::import(&engine, IMAGE, &["sh"])?;
        containerd::import(&engine, PAUSE, &pause)?;
        let client = Arc::new(Client::new(dir.join("sock"), PATIENCE)?);
        for name in [IMAGE, PAUSE] {
            eventually(&format!("CRI knows {name}"), world.patience(), || {
                let reply = client.call("ImageStatus", &json!({ "image": { "image": name } }))?;
                Ok(!reply["image"].is_null())
            })?;
        }
        fs::create_dir_all(cgroup(world))?;
        Ok(Cri { handler, world, shared: None, client, engine })
    }

    /// Whether its pods are VMs.
    pub fn is_vm(&self) -> bool {
        self.handler == BOX && self.world.runtime.file_name().is_some_and(|name| name != "runc")
    }

    /// The pod that wishes share.
    pub fn shared(&mut self) -> Result<&Shared> {
        let shared = match self.shared.take() {
            Some(shared) => shared,
            None => {
                let pod = self.pod()?;
                let (one, two) = (pod.idle()?, pod.idle()?);
                Shared { pod, one, two }
            }
        };
        Ok(self.shared.insert(shared))
    }

    /// A new pod.
    pub fn pod(&self) -> Result<Pod> {
        Pod::run(self, Pod::config(self.world)?)
    }

    /// Kills containerd and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.engine.kill_daemon()?;
        containerd::start(&mut self.engine)?;
        eventually("CRI is ready", self.world.patience(), || {
            let reply = self.client.call("Status", &json!({}));
            let ready = |reply: Value| {
                let conditions = reply["status"]["conditions"].as_array().cloned().unwrap_or_default();
                !conditions.is_empty() && conditions.iter().all(|condition| condition["status"] == true)
            };
            Ok(reply.is_ok_and(ready))
        })
    }

    /// Where the runtime keeps its state for a handler, by what the shim adds to what it is told.
    pub fn state(&self) -> PathBuf {
        self.engine.dir.join("runtime").join(self.handler).join("k8s.io")
    }
}

impl Drop for Cri {
    fn drop(&mut self) {
        self.shared = None;
        let _ = fs::remove_dir(cgroup(self.world));
    }
}

/// The cgroup above those of all pods, which on a node is the kubelet's to make.
fn cgroup(world: &World) -> PathBuf {
    PathBuf::from("/sys/fs/cgroup").join(format!("kubepods-{}", world.tag))
}

/// The cgroup for a new pod, with its name for CRI.
pub fn pod_cgroup(world: &World, uid: &str) -> Result<(PathBuf, String)> {
    let dir = cgroup(world).join(uid);
    fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
    Ok((dir, format!("/kubepods-{}/{uid}", world.tag)))
}

/// Fetches a URL from the host.
pub fn fetch(world: &World, url: &str) -> Result<String> {
    let fetched =
        process::host("curl", &["--silent", "--show-error", "--max-time", "20", url], world.patience())?;
    ensure!(!fetched.is_empty(), "{url}: nothing");
    Ok(fetched)
}

fn network(world: &World, leases: &str) -> Value {
    let ranges = json!([[{ "subnet": "10.88.8.0/24" }], [{ "subnet": "fd88:8::/64" }]]);
    let routes = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
    let bridge = json!({ "type": "bridge", "bridge": BRIDGE, "isGateway": true,
        "ipam": { "type": "host-local", "ranges": ranges, "routes": routes, "dataDir": leases } });
    json!({ "cniVersion": "1.0.0", "name": world.tag, "plugins": [bridge] })
}

fn settings(world: &World, at: &dyn Fn(&str) -> String) -> String {
    let cri = "[plugins.'io.containerd.cri.v1";
    let handler = |name: &str, binary: &str| {
        format!(
            "{cri}.runtime'.containerd.runtimes.{name}]\nruntime_type = 'io.containerd.runc.v2'\n\
             pod_annotations = ['a3s.box/*']\ncontainer_annotations = ['a3s.box/*']\n\
             privileged_without_host_devices = {}\n\
             {cri}.runtime'.containerd.runtimes.{name}.options]\nBinaryName = {binary:?}\nRoot = {:?}\n\
             SystemdCgroup = false\n",
            name == BOX,
            at(&format!("runtime/{name}"))
        )
    };
    [
        format!("version = 3\nroot = {:?}\nstate = {:?}\n", at("root"), at("state")),
        format!("[grpc]\naddress = {:?}\n", at("sock")),
        "[plugins.'io.containerd.grpc.v1.cri']\nstream_server_port = '0'\n".to_string(),
        format!("{cri}.images'.pinned_images]\nsandbox = {PAUSE:?}\n"),
        format!("{cri}.runtime']\nnetns_mounts_under_state_dir = true\n"),
        format!("{cri}.runtime'.cni]\nbin_dirs = ['/usr/lib/cni']\nconf_dir = {:?}\n", at("cni")),
        handler(BOX, &world.runtime.display().to_string()),
        handler(RUNC, "runc"),
    ]
    .concat()
}
