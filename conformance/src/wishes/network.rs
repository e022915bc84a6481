//! The network: the VM stands where a container would, or nowhere, or on the host's.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Running};
use crate::world::World;

const MTU: &str = "1400";

/// A bridge in a namespace of its own, and three things on it that know nothing of each other.
struct Lan {
    a: Container,
    b: Container,
    /// A container of the host's kernel, by runc.
    plain: Plain,
    bridge: Netns,
    at_a: Netns,
    at_b: Netns,
}

/// Addresses on the bridge end in these.
const BRIDGE: u8 = 1;
const A: u8 = 2;
const B: u8 = 3;
const PLAIN: u8 = 4;

const SHARED: &[Wish<Lan>] = &[
    ("net/the-guest-has-the-interfaces-name-mac-and-mtu", |lan| {
        let mac = lan.at_a.run("cat /sys/class/net/eth0/address")?;
        lan.a.says("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu", &format!("{mac}\n{MTU}"))?;
        lan.a.says("ls /sys/class/net", "eth0\nlo")
    }),
    ("net/the-guest-has-every-address-and-no-other", |lan| {
        let said = lan.a.sh("ip addr show dev eth0 | grep inet | tr -s ' ' | cut -d ' ' -f 3 | sort")?;
        let own = lan.at_a.run("ip addr show dev eth0 | grep inet | tr -s ' ' | cut -d ' ' -f 3 | sort")?;
        ensure!(own.lines().count() >= 4, "{own:?}");
        same(&said, &own)?;
        lan.a.says("ip addr show dev eth0 | grep -c tentative; true", "0")
    }),
    ("net/the-guest-has-every-route", |lan| {
        for family in ["-4", "-6"] {
            let show = format!(
                "ip {family} route show dev eth0 | grep -v 'proto kernel' | cut -d ' ' -f 1-3 | sort"
            );
            let own = lan.at_a.run(&show)?;
            ensure!(own.contains("default via"), "{own:?}");
            let said = lan.a.sh(&format!("ip {family} route | grep eth0 | cut -d ' ' -f 1-3 | sort"))?;
            for line in own.lines() {
                ensure!(said.contains(line.trim_end()), "no {line:?} in {said:?}");
            }
        }
        Ok(())
    }),
    ("net/echoes-come-back-in-all-directions", |lan| {
        for host in [BRIDGE, B, PLAIN] {
            ping(&lan.a, &four(host))?;
            ping(&lan.a, &six(host))?;
        }
        lan.bridge.run(&format!("ping -c 1 -W 5 {}", four(B)))?;
        lan.bridge.run(&format!("ping -c 1 -W 5 {}", four(A)))?;
        lan.bridge.run(&format!("ping -c 1 -W 5 {}", six(A)))?;
        lan.plain.sh(&format!("ping -c 1 -W 5 {}", four(A))).map(drop)
    }),
    ("net/tcp-carries-much-in-both-directions", |lan| {
        const SEND: &str = "head -c 2000000 /dev/zero";
        let server = lan.a.spawn(&["sh", "-c", &format!("{SEND} | nc -l -p 80")])?;
        listens(|| lan.a.sh("netstat -ltn"), 80)?;
        let count = lan.bridge.run(&format!("socat -u TCP:{}:80 - | wc -c", four(A)))?;
        same(&count, &"2000000".into())?;
        server.finish()?.code(0)?;
        let server = lan.plain.spawn("nc -l -p 81 | wc -c")?;
        listens(|| lan.plain.sh("netstat -ltn"), 81)?;
        lan.a.sh(&format!("{SEND} | nc -w 10 {} 81", four(PLAIN)))?;
        same(&server.finish()?.code(0)?.text().trim().to_string(), &"2000000".into())
    }),
    ("net/tcp-over-ipv6-between-two-vms", |lan| {
        let server = lan.a.spawn(&["sh", "-c", "echo over six | nc -l -p 82"])?;
        listens(|| lan.a.sh("netstat -ltn"), 82)?;
        lan.b.says(&format!("exec bash -c 'cat </dev/tcp/{}/82'", six(A)), "over six")?;
        server.finish()?.code(0).map(drop)
    }),
    ("net/udp-in-both-directions", |lan| {
        const SERVER: &str =
            "use IO::Socket::INET; $s = IO::Socket::INET->new(Proto => 'udp', LocalPort => 90) or die;
            $SIG{ALRM} = sub { die }; alarm 40; $s->recv($m, 99); $s->send(\"answer to $m\")";
        let server = lan.b.spawn(&["perl", "-e", SERVER])?;
        process::eventually("the server listens", Duration::from_secs(20), || {
            Ok(lan.b.sh("cat /proc/net/udp")?.contains(":005A "))
        })?;
        let said = lan.bridge.run(&format!("printf question | socat -t 5 - UDP:{}:90", four(B)))?;
        same(&said, &"answer to question".into())?;
        server.finish()?.code(0)?;
        let _server = lan.bridge.spawn("socat UDP-LISTEN:91,fork EXEC:cat")?;
        let ask = format!(
            "exec 3<>/dev/udp/{}/91; echo there and back >&3; timeout 20 head -c 15 <&3",
            four(BRIDGE)
        );
        same(&lan.b.exec(&["bash", "-c", &ask])?.code(0)?.text(), &"there and back\n".into())
    }),
    ("net/sockets-inside-the-namespace-keep-working", |lan| {
        // As an engine asks name servers: its socket is in the namespace, the server is not.
        let _server = lan.bridge.spawn("socat UDP6-LISTEN:53,fork EXEC:'tr a-z A-Z'")?;
        for server in [four(BRIDGE), format!("[{}]", six(BRIDGE))] {
            let ask = format!("echo forwarded | socat -t 5 - UDP:{server}:53");
            same(&lan.at_a.run(&ask)?, &"FORWARDED".into()).with_context(|| server)?;
        }
        let server = lan.plain.spawn("echo by tcp | nc -l -p 54")?;
        listens(|| lan.plain.sh("netstat -ltn"), 54)?;
        same(&lan.at_a.run(&format!("socat -u TCP:{}:54 -", four(PLAIN)))?, &"by tcp".into())?;
        server.finish()?.code(0).map(drop)
    }),
    ("net/the-namespaces-localhost-is-the-guests", |lan| {
        for (name, address) in [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")] {
            let script = format!(
                "use IO::Socket::IP; $l = IO::Socket::IP->new(LocalHost => '{name}', LocalPort => 8080, Listen => 5) or die;
                $| = 1; print 'ready'; $s = $l->accept; $w = <$s>; print $s \"heard $w\""
            );
            let mut server = lan.b.spawn(&["perl", "-e", &script])?;
            server.read_until("ready")?;
            let said = lan.at_b.run(&format!("echo word | socat -t 10 - TCP:{address}:8080"))?;
            same(&said, &"heard word".into()).with_context(|| name)?;
            server.finish()?.code(0)?;
        }
        let refused = lan.at_b.run("socat -u TCP:127.0.0.1:8081 - 2>&1; true")?;
        ensure!(refused.contains("reset"), "{refused:?}");
        Ok(())
    }),
    ("net/names-at-127.0.0.11-come-from-the-namespace", |lan| {
        lan.b.says("cat /etc/resolv.conf", "nameserver 127.0.0.11")?;
        let mut server = lan.at_b.spawn(&format!("exec python3 -u -c '{NAME_SERVER}'"))?;
        server.read_until("ready")?;
        let udp = "exec 3<>/dev/udp/127.0.0.11/53; printf name >&3; timeout 20 head -c 4 <&3";
        same(&lan.b.exec(&["bash", "-c", udp])?.code(0)?.text(), &"NAME".into())?;
        let tcp = "exec 3<>/dev/tcp/127.0.0.11/53; printf '\\0\\4word' >&3; head -c 6 <&3 | tail -c 4";
        same(&lan.b.exec(&["bash", "-c", tcp])?.code(0)?.text(), &"WORD".into())
    }),
    ("net/a-vms-namespace-is-not-shared-with-another", |lan| {
        let config = on(&lan.at_a);
        let words = ["linux.namespaces", "another container", "network-mode"];
        lan.a.world.run(&lan.a.world.bundle(&config)?, b"")?.code(1)?.one_line(&words).map(drop)
    }),
    ("net/nothing-of-it-outlives-the-container", |lan| {
        ensure!(lan.at_a.run("ip link")?.contains("a3s-tap0"), "there is no tap to remove");
        process::signal(lan.a.pid, Signal::KILL)?;
        lan.a.wait()?;
        lan.a.delete(&["--force"])?;
        let left = lan.at_a.run("ls /sys/class/net; tc qdisc show | grep -c clsact; true")?;
        same(&left, &"eth0\nlo\n0".into())?;
        // The namespace's own stack answers again.
        lan.bridge.run(&format!("ping -c 1 -W 5 {}", four(A))).map(drop)
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Vm, Lan::set_up, SHARED),
        wish(At::Vm, "net/what-is-plugged-before-start-is-found", plugged_late),
        wish(At::Vm, "net/without-interfaces-there-is-loopback-alone", alone),
        wish(At::Vm, "net/more-interfaces-than-nics-name-the-annotation", too_many),
        wish(At::Vm, "net/the-hosts-network-is-reached-by-its-sockets", host_network),
        wish(At::Vm, "net/a-namespace-of-another-process-is-refused", of_a_process),
        wish(At::Both, "net/annotations-are-checked", annotations),
    ]
}

fn four(host: u8) -> String {
    format!("10.213.7.{host}")
}

fn six(host: u8) -> String {
    format!("fd13:7::{host}")
}

/// A network namespace bound to a file, without a process.
pub struct Netns {
    path: PathBuf,
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

    fn spawn(&self, script: &str) -> Result<Running> {
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
fn plug(bridge: &Netns, place: &str, host: u8) -> Result<()> {
    bridge.run(&format!(
        "ip link add p{host} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {place} &&
        ip link set p{host} master br0 up"
    ))?;
    Ok(())
}

fn addresses(host: u8) -> String {
    format!(
        "ip addr add {}/24 dev eth0 && ip addr add {}/64 dev eth0 nodad && ip link set eth0 up &&
        ip addr add 10.214.0.{host}/32 dev eth0 && ip route add default via {} &&
        ip -6 route add default via {} && ip route add 10.215.0.0/16 via 10.216.0.1 dev eth0 onlink metric 7",
        four(host),
        six(host),
        four(BRIDGE),
        six(BRIDGE)
    )
}

fn bridge(world: &World) -> Result<Netns> {
    let bridge = Netns::new(world)?;
    bridge.run(&format!(
        "ip link add br0 type bridge && ip addr add {}/24 dev br0 && ip addr add {}/64 dev br0 nodad && ip link set br0 up",
        four(BRIDGE), six(BRIDGE)
    ))?;
    Ok(bridge)
}

/// A namespace on the bridge, ready before any container.
fn stand(world: &World, bridge: &Netns, host: u8) -> Result<Netns> {
    let netns = Netns::new(world)?;
    plug(bridge, &netns.path.to_string_lossy(), host)?;
    netns.run(&addresses(host))?;
    Ok(netns)
}

fn on(netns: &Netns) -> Config {
    privileged(Config::idle()).set("/linux/namespaces/1", json!({ "type": "network", "path": netns.path() }))
}

/// ping needs it.
fn privileged(config: Config) -> Config {
    let set = json!(["CAP_NET_RAW", "CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN"]);
    config.set("/process/capabilities", json!({ "bounding": set, "effective": set, "permitted": set }))
}

impl Lan {
    fn set_up(world: &'static World) -> Result<Self> {
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
fn of_debian(world: &'static World, config: Config) -> Result<Container> {
    let dir = world.make_dir("debian")?;
    let file = dir.join("resolv.conf");
    fs::write(&file, "nameserver 127.0.0.11\n")?;
    let debian = world.debian().context("--rootfs debian=DIR is needed")?;
    let config = config.set("/root", json!({ "path": debian, "readonly": true }));
    crate::world::write_config(&dir, &config.bind(&file, "/etc/resolv.conf", &["ro"]))?;
    let container = Container::of_bundle(world, dir)?;
    container.start()?;
    Ok(container)
}

/// Serves what is no DNS, but framed like it: words come back in capitals.
const NAME_SERVER: &str = r#"
import socket, threading
at = ("127.0.0.11", 53)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(at)
tcp = socket.create_server(at)
def streams():
    while True:
        peer = tcp.accept()[0]
        size = int.from_bytes(peer.recv(2), "big")
        peer.sendall(size.to_bytes(2, "big") + peer.recv(size).upper())
threading.Thread(target=streams, daemon=True).start()
print("ready")
while True:
    query, peer = udp.recvfrom(4096)
    udp.sendto(query.upper(), peer)
"#;

/// A container of runc's.
struct Plain {
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

    fn sh(&self, script: &str) -> Result<String> {
        self.runc(&["exec", &self.id], script)
    }

    fn spawn(&self, script: &str) -> Result<Running> {
        process::start(self.command(&["exec", &self.id, "sh", "-c", script]), true, Duration::from_secs(60))
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", &self.id], "");
    }
}

fn ping(from: &Container, to: &str) -> Result<()> {
    from.sh(&format!("ping -c 1 -W 5 {to}")).map(drop).with_context(|| format!("ping {to}"))
}

fn listens(mut netstat: impl FnMut() -> Result<String>, port: u16) -> Result<()> {
    process::eventually("the server listens", Duration::from_secs(20), || {
        Ok(netstat()?.contains(&format!(":{port} ")))
    })
}

/// As engines do whose network comes after `create`: into the namespace of the container's pid.
fn plugged_late(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let mut container = Container::create(world, &privileged(Config::idle()))?;
    let place = format!("/proc/{}/ns/net", container.pid);
    plug(&bridge, &container.pid.to_string(), A)?;
    let mut enter = Command::new("nsenter");
    enter.arg(format!("--net={place}")).args(["sh", "-c", &addresses(A)]);
    process::run(enter, b"", Duration::from_secs(10))?.code(0)?;
    container.start()?;
    container.says("ls /sys/class/net", "eth0\nlo")?;
    ping(&container, &four(BRIDGE))?;
    ping(&container, &six(BRIDGE))?;
    container.delete(&["--force"])
}

fn alone(world: &'static World) -> Result<()> {
    for config in [Config::idle(), Config::idle().set("/annotations/a3s.box~1network-mode", json!("none"))] {
        let mut container = Container::running(world, &config)?;
        // An interface that is down would leave 127.0.0.1 unreachable, not refused.
        let script = "ls /sys/class/net; ip route; nc -w 2 127.0.0.1 1 2>&1 | grep -o refused";
        container.says(script, "lo\nrefused")?;
        container.delete(&["--force"])?;
    }
    Ok(())
}

fn too_many(world: &'static World) -> Result<()> {
    let dummies = |count: u8| {
        (0..count)
            .map(|n| format!("ip link add d{n} type dummy && ip link set d{n} up"))
            .collect::<Vec<_>>()
            .join(" && ")
    };
    let netns = Netns::new(world)?;
    netns.run(&dummies(7))?;
    world
        .run(&world.bundle(&on(&netns))?, b"")?
        .code(1)?
        .one_line(&["7 network interfaces", "a3s.box/nics"])?;
    let one = Config::idle().set("/annotations/a3s.box~1nics", json!("1"));
    let container = Container::create(world, &one)?;
    let mut enter = Command::new("nsenter");
    enter.arg(format!("--net=/proc/{}/ns/net", container.pid)).args(["sh", "-c", &dummies(2)]);
    process::run(enter, b"", Duration::from_secs(10))?.code(0)?;
    world.refused(&["start", &container.id], &["2 network interfaces", "1 NICs", "a3s.box/nics"]).map(drop)
}

fn host_network(world: &'static World) -> Result<()> {
    let others = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        use std::io::Write;
        listener.accept()?.0.write_all(b"from the host\n")
    });
    let container = Container::running(world, &Config::idle().set("/linux/namespaces", json!(others)))?;
    container.says(&format!("nc -w 5 127.0.0.1 {port}"), "from the host")?;
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    // Only where it is asked for.
    let apart = Container::running(world, &Config::idle())?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    apart.says(&format!("nc -w 2 127.0.0.1 {port} </dev/null 2>/dev/null || echo refused"), "refused")
}

fn of_a_process(world: &'static World) -> Result<()> {
    let mut holder = Command::new("unshare");
    holder.args(["--net", "sh", "-c", "echo ready; exec sleep 1000"]);
    let mut holder = process::start(holder, true, Duration::from_secs(60))?;
    holder.read_until("ready")?;
    let path = format!("/proc/{}/ns/net", holder.pid());
    let config = Config::idle().set("/linux/namespaces/1", json!({ "type": "network", "path": path }));
    let words = ["linux.namespaces", &*path, "network-mode"];
    world.run(&world.bundle(&config)?, b"")?.code(1)?.one_line(&words).map(drop)
}

fn annotations(world: &'static World) -> Result<()> {
    let host = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let with =
        |name: &str, value: &str| Config::idle().set(&format!("/annotations/a3s.box~1{name}"), json!(value));
    for (config, words) in [
        (with("network-mode", "bridge"), ["a3s.box/network-mode", "\"bridge\""]),
        (with("nics", "7"), ["a3s.box/nics", "\"7\""]),
        (
            with("network-mode", "tap").set("/linux/namespaces", json!(host)),
            ["a3s.box/network-mode", "\"tap\""],
        ),
    ] {
        world.run(&world.bundle(&config)?, b"")?.code(1)?.one_line(&words)?;
    }
    Ok(())
}
