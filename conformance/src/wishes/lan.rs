//! A bridge and what stands on it: two microVMs, a container of runc's, and network namespaces to look from.
//!
//! In: the suite's world. Out: addresses and places for wishes about networks. Must not: touch the host's own network
//! namespace.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Running};
use crate::world::World;

/// Of every interface: more than a NIC has by itself.
pub const MTU: &str = "9000";

/// A bridge in a namespace of its own, and three things on it that know nothing of each other.
pub struct Lan {
    /// Of busybox.
    pub a: Container,
    /// Of Debian.
    pub b: Container,
    /// A container of the host's kernel, by runc.
    pub plain: Plain,
    /// Where the bridge is.
    pub bridge: Netns,
    /// The place of `a`.
    pub at_a: Netns,
    /// The place of `b`.
    pub at_b: Netns,
}

/// Addresses on the bridge end in these.
pub const BRIDGE: u8 = 1;
/// The first VM's.
pub const A: u8 = 2;
/// The second's.
pub const B: u8 = 3;
/// The container's.
pub const PLAIN: u8 = 4;

/// An IPv4 address on the bridge.
pub fn four(host: u8) -> String {
    format!("10.213.7.{host}")
}

/// An IPv6 address on the bridge.
pub fn six(host: u8) -> String {
    format!("fd13:7::{host}")
}

/// A network namespace bound to a file, without a process.
pub struct Netns {
    /// The file.
    pub path: PathBuf,
}

impl Netns {
    /// Makes one.
    pub fn new(world: &World) -> Result<Self> {
        let path = world.dir.join(world.name("netns"));
        fs::write(&path, "")?;
        let mut command = Command::new("unshare");
        command.arg(format!("--net={}", path.display())).args(["ip", "link", "set", "lo", "up"]);
        process::run(command, b"", Duration::from_secs(10))?.code(0)?;
        Ok(Netns { path })
    }

    /// For config.json.
    pub fn path(&self) -> Value {
        json!(self.path)
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        // sysfs shows the network namespace of whoever mounts it.
        let sysfs = format!("mount -t sysfs sysfs /sys && {script}");
        command
            .arg(format!("--net={}", self.path.display()))
            .args(["unshare", "--mount", "sh", "-c", &sysfs]);
        command
    }

    /// Runs a script in it.
    pub fn run(&self, script: &str) -> Result<String> {
        let output = process::run(self.command(script), b"", Duration::from_secs(60))?;
        Ok(output.code(0)?.text().trim().to_string())
    }

    /// Starts a script in it.
    pub fn spawn(&self, script: &str) -> Result<Running> {
        process::start(self.command(script), true, Duration::from_secs(60))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        let _ = process::run(
            {
                command.arg(&self.path);
                command
            },
            b"",
            Duration::from_secs(10),
        );
        let _ = fs::remove_file(&self.path);
    }
}

/// Puts an interface into `place` and its other end on the bridge.
pub fn plug(bridge: &Netns, place: &str, host: u8) -> Result<()> {
    bridge.run(&format!(
        "ip link add p{host} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {place} &&
        ip link set p{host} master br0 up"
    ))?;
    Ok(())
}

/// What gives an interface its addresses and routes.
pub fn addresses(host: u8) -> String {
    format!(
        "ip addr add {}/24 dev eth0 && ip addr add {}/64 dev eth0 nodad && ip link set eth0 up &&
        ip addr add 10.214.0.{host}/32 dev eth0 && ip route add default via {} &&
        ip -6 route add default via {} && ip route add 10.215.0.0/16 via 10.216.0.1 dev eth0 onlink metric 7 &&
        ip route add 10.217.0.0/16 dev eth0 scope link src 10.214.0.{host} &&
        ip neigh add 10.217.0.9 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
        four(host),
        six(host),
        four(BRIDGE),
        six(BRIDGE)
    )
}

/// Makes the bridge.
pub fn bridge(world: &World) -> Result<Netns> {
    let bridge = Netns::new(world)?;
    bridge.run(&format!(
        "ip link add br0 type bridge && ip addr add {}/24 dev br0 && ip addr add {}/64 dev br0 nodad && ip link set br0 up",
        four(BRIDGE), six(BRIDGE)
    ))?;
    Ok(bridge)
}

/// A namespace on the bridge, ready before any container.
pub fn stand(world: &World, bridge: &Netns, host: u8) -> Result<Netns> {
    let netns = Netns::new(world)?;
    plug(bridge, &netns.path.to_string_lossy(), host)?;
    netns.run(&addresses(host))?;
    Ok(netns)
}

/// An idle container in a namespace.
pub fn on(netns: &Netns) -> Config {
    privileged(Config::idle()).set("/linux/namespaces/1", json!({ "type": "network", "path": netns.path() }))
}

/// ping needs it.
pub fn privileged(config: Config) -> Config {
    let set = json!(["CAP_NET_RAW", "CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN"]);
    config.set("/process/capabilities", json!({ "bounding": set, "effective": set, "permitted": set }))
}

impl Lan {
    /// Makes it all.
    pub fn set_up(world: &'static World) -> Result<Self> {
        let bridge = bridge(world)?;
        let (at_a, at_b, at_plain) =
            (stand(world, &bridge, A)?, stand(world, &bridge, B)?, stand(world, &bridge, PLAIN)?);
        Ok(Lan {
            a: Container::running(world, &on(&at_a))?,
            b: of_debian(world, on(&at_b))?,
            plain: Plain::running(world, at_plain)?,
            bridge,
            at_a,
            at_b,
        })
    }
}

/// A root file system with more tools, whose names come from an engine.
pub fn of_debian(world: &'static World, config: Config) -> Result<Container> {
    let dir = world.make_dir("debian")?;
    let file = dir.join("resolv.conf");
    fs::write(&file, "nameserver 127.0.0.11\n")?;
    let debian = world.debian()?;
    let files = json!([{ "type": "RLIMIT_NOFILE", "hard": 4096, "soft": 4096 }]);
    let config =
        config.set("/root", json!({ "path": debian, "readonly": true })).set("/process/rlimits", files);
    crate::world::write_config(&dir, &config.bind(&file, "/etc/resolv.conf", &["ro"]))?;
    let container = Container::of_bundle(world, dir)?;
    container.start()?;
    Ok(container)
}
/// A container of runc's.
pub struct Plain {
    id: String,
    root: PathBuf,
    _netns: Netns,
}

impl Plain {
    fn running(world: &'static World, netns: Netns) -> Result<Self> {
        let plain = Plain { id: world.name("runc"), root: world.make_dir("runc")?, _netns: netns };
        let bundle =
            world.bundle(&on(&plain._netns).set("/linux/cgroupsPath", json!(format!("/{}", plain.id))))?;
        let mut run = plain.command(&["run", "--detach", "--bundle", &bundle.to_string_lossy(), &plain.id]);
        let out = || fs::File::create(bundle.join("out"));
        run.stdin(Stdio::null()).stdout(out()?).stderr(out()?);
        let ran = process::start(run, false, Duration::from_secs(60))?.finish()?;
        ensure!(ran.code == 0, "runc: {:?}", fs::read_to_string(bundle.join("out")));
        Ok(plain)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.root).args(args);
        command
    }

    fn runc(&self, args: &[&str], script: &str) -> Result<String> {
        let mut command = self.command(args);
        if !script.is_empty() {
            command.args(["sh", "-c", script]);
        }
        Ok(process::run(command, b"", Duration::from_secs(60))?.code(0)?.text().trim().to_string())
    }

    /// What a script prints in it.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.runc(&["exec", &self.id], script)
    }

    /// Starts a script in it.
    pub fn spawn(&self, script: &str) -> Result<Running> {
        process::start(self.command(&["exec", &self.id, "sh", "-c", script]), true, Duration::from_secs(60))
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", &self.id], "");
    }
}

/// Asks for an echo.
pub fn ping(from: &Container, to: &str) -> Result<()> {
    from.sh(&format!("ping -c 1 -W 5 {to}")).map(drop).with_context(|| format!("ping {to}"))
}

/// Waits until a TCP port is listened on.
pub fn listens(mut netstat: impl FnMut() -> Result<String>, port: u16) -> Result<()> {
    process::eventually("the server listens", Duration::from_secs(20), || {
        Ok(netstat()?.contains(&format!(":{port} ")))
    })
}
