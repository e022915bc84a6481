//! Networks as docker and podman make them: VMs and a container of the host's kernel, side by side.
//!
//! In: the engine of its own wishes. Out: what users of a network see, on both sides of it. Must not: need a name
//! server or an address of the world outside: the host has one of its own for this.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::engine::{Engine, IMAGE, SMALL};
use super::{docker, podman};
use crate::cases::{At, Case, Wish, sharing};
use crate::process::{self, Output, Running, eventually};
use crate::wishes::same;
use crate::world::World;

const DOCKER: &[Wish<Town>] = &[
    ("docker/network/containers-reach-each-other-by-name", by_name),
    ("docker/network/names-of-elsewhere-are-asked-elsewhere", forwarded_name),
    ("docker/network/published-ports-answer-on-the-host", published),
    ("docker/network/ipv6", ipv6),
    ("docker/network/stats-count-what-went-through", counters),
    ("docker/network/none-host-and-default", modes),
    ("docker/network/a-vms-network-is-not-lent", lent),
    ("docker/network/connect-takes-a-spare-nic-and-disconnect-gives-it-back", connected),
];

const PODMAN: &[Wish<Town>] = &[
    ("podman/network/containers-reach-each-other-by-name", by_name),
    ("podman/network/names-of-elsewhere-are-asked-elsewhere", forwarded_name),
    ("podman/network/published-ports-answer-on-the-host", published),
    ("podman/network/ipv6", ipv6),
];

/// Where the host's own name server listens: an address of nobody's, and not its loopback's.
const NAMES: &str = "192.0.2.53";
/// What it says of every name.
const ANSWER: &str = "203.0.113.9";
const TCP: &str = "18080";
/// Above where a namespace's own sockets have theirs: that range is the container's, not the host's.
const HIGH: &str = "65001";
const UDP: &str = "19090";

/// Asks a UDP server for an echo, more than once as the protocol demands.
const ECHO: &str = r#"
import socket, sys
asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asker.settimeout(5)
for attempt in range(8):
    asker.sendto(b"by udp", (sys.argv[1], int(sys.argv[2])))
    try:
        print(asker.recv(99).decode())
        break
    except TimeoutError:
        pass
"#;

pub fn cases() -> Vec<Case> {
    let docker = |world| Town::on(docker::set_up(world)?);
    let podman = |world| Town::on(podman::set_up(world)?);
    vec![sharing(At::Engines, docker, DOCKER), sharing(At::Engines, podman, PODMAN)]
}

/// A network and who is on it.
struct Town {
    engine: Engine,
    network: String,
    /// A VM that serves TCP on ports 80 (a greeting) and 81 (swallows all), and UDP on 90 (an echo).
    server: String,
    /// A VM that asks.
    asker: String,
    /// A container of runc's.
    plain: String,
    _names: Names,
}

impl Town {
    fn on(engine: Engine) -> Result<Self> {
        let world = engine.world;
        let [network, server, asker, plain] =
            ["net", "server", "asker", "plain"].map(|name| world.name(name));
        let subnets = ["--ipv6", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64"];
        let town = Town { engine, network, server, asker, plain, _names: Names::serve(world)? };
        town.engine.ok(&[&["network", "create"], &subnets[..], &[&town.network]].concat())?;
        let ports = [TCP, HIGH].map(|port| format!("{port}:80"));
        let udp = format!("{UDP}:90/udp");
        let published = ["--publish", &ports[0], "--publish", &ports[1], "--publish", &udp];
        let serve = "socat TCP6-LISTEN:80,fork,reuseaddr SYSTEM:'echo by tcp' & socat -u TCP6-LISTEN:81,fork,reuseaddr \
            OPEN:/dev/null & exec socat UDP6-LISTEN:90,fork EXEC:cat";
        town.up(&town.server, &town.engine.runtime, &published, serve)?;
        town.up(&town.asker, &town.engine.runtime, &[], "exec sleep 1000")?;
        town.up(&town.plain, "runc", &[], "exec sleep 1000")?;
        eventually("the server listens", world.patience(), || {
            let table = town.engine.sh(&town.server, "cat /proc/net/tcp6 /proc/net/udp6")?;
            Ok([":0050 ", ":0051 ", ":005A "].iter().all(|port| table.contains(port)))
        })?;
        Ok(town)
    }

    /// Starts a container that has the host's programs as well.
    fn up(&self, name: &str, runtime: &str, flags: &[&str], script: &str) -> Result<()> {
        let base = ["run", "--detach", "--name", name, "--runtime", runtime, "--network", &self.network];
        let programs =
            ["--volume", "/usr:/usr:ro", "--volume", "/usr/lib:/lib:ro", "--volume", "/usr/lib64:/lib64:ro"];
        let tools = [&programs[..], &["--dns", NAMES, "--cap-add", "NET_RAW"]].concat();
        let program = [IMAGE, "sh", "-c", script];
        self.engine.ok(&[&base, &SMALL[..], &tools, flags, &program].concat()).map(drop)
    }

    /// What a script prints in the VM that asks.
    fn ask(&self, script: &str) -> Result<String> {
        self.engine.sh(&self.asker, script).with_context(|| script.to_string())
    }

    fn run(&self, network: &str, script: &str) -> Result<Output> {
        let base = ["run", "--rm", "--runtime", &self.engine.runtime, "--network", network];
        self.engine.call(&[&base, &SMALL[..], &["--cap-add", "NET_RAW", IMAGE, "sh", "-c", script]].concat())
    }

    /// An address of a container on the network.
    fn address(&self, name: &str, field: &str) -> Result<String> {
        let field = format!("(index .NetworkSettings.Networks \"{}\").{field}", self.network);
        let address = self.engine.inspect(name, &field)?;
        ensure!(!address.is_empty(), "{name} has no {field}");
        Ok(address)
    }
}

impl Drop for Town {
    fn drop(&mut self) {
        let _ = self.engine.call(&["rm", "--force", &self.server, &self.asker, &self.plain]);
        let _ = self.engine.call(&["network", "rm", &self.network]);
    }
}

/// A name server of the host's that knows one address for all names.
struct Names {
    _server: Running,
}

const SERVER: &str = r#"
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 53))
print("ready", flush=True)
while True:
    query, peer = server.recvfrom(4096)
    end = 12
    while query[end]:
        end += query[end] + 1
    kind = query[end + 2]
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(sys.argv[2]) if kind == 1 else b""
    counts = b"\0\1" + (b"\0\1" if answer else b"\0\0") + bytes(4)
    server.sendto(query[:2] + b"\x81\x80" + counts + query[12:end + 5] + answer, peer)
"#;

impl Names {
    fn serve(world: &World) -> Result<Self> {
        let _ = Self::address("del");
        Self::address("add")?.code(0)?;
        let file = world.make_dir("names")?.join("server.py");
        fs::write(&file, SERVER)?;
        let mut python = Command::new("python3");
        python.arg(file).args([NAMES, ANSWER]);
        let mut server = process::start(python, true, Duration::from_secs(1000))?;
        server.read_until("ready")?;
        Ok(Names { _server: server })
    }

    fn address(verb: &str) -> Result<Output> {
        let mut ip = Command::new("ip");
        ip.args(["address", verb, &format!("{NAMES}/32"), "dev", "lo"]);
        process::run(ip, b"", Duration::from_secs(10))
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        let _ = Self::address("del");
    }
}

fn by_name(town: &mut Town) -> Result<()> {
    for name in [&town.server, &town.plain] {
        town.ask(&format!("ping -c 1 -W 10 {name}"))?;
    }
    same(&town.ask(&format!("nc -w 20 {} 80", town.server))?, &"by tcp".into())?;
    for name in [&town.server, &town.asker] {
        town.engine.sh(&town.plain, &format!("ping -c 1 -W 10 {name}"))?;
    }
    let echo = town.engine.ok(&["exec", &town.plain, "python3", "-c", ECHO, &town.server, "90"])?;
    same(&echo, &"by udp".into())
}

/// docker's server dials out of the container's network namespace.
fn forwarded_name(town: &mut Town) -> Result<()> {
    let said = town.ask("nslookup elsewhere.example.com")?;
    ensure!(said.contains(ANSWER), "{said}");
    // Asked by the container itself, past the engine's server.
    let said = town.ask(&format!("nslookup elsewhere.example.com {NAMES}"))?;
    ensure!(said.contains(ANSWER), "{said}");
    Ok(())
}

fn published(town: &mut Town) -> Result<()> {
    let said = town.engine.ok(&["port", &town.server, "80"])?;
    ensure!(said.contains(TCP) && said.contains(HIGH), "{said}");
    for address in ["127.0.0.1", NAMES] {
        for port in [TCP, HIGH] {
            same(
                &host("socat", &["-u", &format!("TCP:{address}:{port},connect-timeout=10"), "-"])?,
                &"by tcp".into(),
            )
            .with_context(|| format!("{address}:{port}"))?;
        }
        same(&host("python3", &["-c", ECHO, address, UDP])?, &"by udp".into()).with_context(|| address)?;
    }
    Ok(())
}

fn host(program: &str, args: &[&str]) -> Result<String> {
    process::host(program, args, Duration::from_secs(60))
}

fn ipv6(town: &mut Town) -> Result<()> {
    let server = town.address(&town.server, "GlobalIPv6Address")?;
    let asker = town.address(&town.asker, "GlobalIPv6Address")?;
    town.ask(&format!("ping -c 1 -W 10 {server}"))?;
    // The host, by the network's gateway.
    let gateway = town.address(&town.asker, "IPv6Gateway")?;
    town.ask(&format!("ping -c 1 -W 10 {gateway}"))?;
    town.engine.sh(&town.plain, &format!("ping -c 1 -W 10 {asker}"))?;
    same(&town.ask(&format!("socat -u TCP6:[{server}]:80 -"))?, &"by tcp".into())?;
    same(&host("socat", &["-u", &format!("TCP6:[{server}]:80,connect-timeout=10"), "-"])?, &"by tcp".into())
}

fn counters(town: &mut Town) -> Result<()> {
    town.ask(&format!("head -c 2000000 /dev/zero | socat -u - TCP:{}:81", town.server))?;
    for (name, way) in [(&town.asker, 1), (&town.server, 0)] {
        let said = town.engine.ok(&["stats", "--no-stream", "--format", "{{.NetIO}}", name])?;
        let bytes = said.split(" / ").nth(way).context("two counts")?;
        // Headers are more; counted twice it would be too many.
        let counted = bytes.strip_suffix("MB").and_then(|number| number.parse::<f64>().ok());
        ensure!(
            counted.is_some_and(|mb| (2.0..3.0).contains(&mb)),
            "2 MB went through, said of {name}: {said}"
        );
    }
    Ok(())
}

fn modes(town: &mut Town) -> Result<()> {
    same(&town.run("none", "ls /sys/class/net")?.code(0)?.text(), &"lo\n".into())?;
    let script = format!("nc -w 20 127.0.0.1 {TCP}");
    same(&town.run("host", &script)?.code(0)?.text(), &"by tcp\n".into())?;
    let script = format!("ping -c 1 -W 10 {NAMES} && nslookup elsewhere.example.com {NAMES}");
    let said = town.run("bridge", &script)?.code(0)?.text();
    ensure!(said.contains(ANSWER), "{said}");
    Ok(())
}

fn connected(town: &mut Town) -> Result<()> {
    let (network, gateway) = (town.engine.world.name("other"), "172.31.0.1");
    town.engine.ok(&["network", "create", "--subnet", "172.31.0.0/24", &network])?;
    for _ in 0..2 {
        town.engine.ok(&["network", "connect", &network, &town.asker])?;
        eventually("the guest has it", town.engine.world.patience(), || {
            Ok(town.ask("ip addr show")?.contains(" 172.31.0."))
        })?;
        town.ask(&format!("ping -c 1 -W 10 {gateway}"))?;
        town.engine.ok(&["network", "disconnect", &network, &town.asker])?;
        eventually("the guest has it no longer", town.engine.world.patience(), || {
            Ok(town.ask("ls /sys/class/net")? == "eth0\nlo")
        })?;
    }
    town.engine.ok(&["network", "rm", &network])?;
    by_name(town)
}

/// Neither a VM's nor that of a container whose traffic a VM would cut off.
fn lent(town: &mut Town) -> Result<()> {
    for name in [&town.server, &town.plain] {
        let output = town.run(&format!("container:{name}"), "true")?;
        ensure!(output.code != 0, "it joins the network of {name}");
        for word in ["join network namespace", "a3s.box/network-mode"] {
            ensure!(output.stderr.contains(word), "{}", output.stderr);
        }
    }
    by_name(town)
}
