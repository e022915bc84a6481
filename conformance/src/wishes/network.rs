//! The network: the VM stands where a container would, or nowhere, or on the host's.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::lan::{A, B, BRIDGE, Lan, MTU, Netns, PLAIN};
use super::lan::{addresses, bridge, four, listens, on, ping, plug, privileged, six, stand};
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::world::World;

/// For multicast.
const GROUP: &str = "239.9.9.9";

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
            let own = lan.at_a.run(&show)?.replace(" scope link", " dev eth0");
            ensure!(own.contains("default via"), "{own:?}");
            let said = lan.a.sh(&format!("ip {family} route | grep eth0 | cut -d ' ' -f 1-3 | sort"))?;
            for line in own.lines() {
                ensure!(said.contains(line.trim_end()), "no {line:?} in {said:?}");
            }
        }
        // That it is there at all shows `onlink`: its gateway is on no network.
        lan.a.says("awk '$2 == \"0000D70A\" { print $1, $3, $7 }' /proc/net/route", "eth0 0100D80A 7")?;
        let direct = lan.a.sh("ip route get 10.217.0.8")?;
        ensure!(direct.contains(&format!("src 10.214.0.{A}")) && !direct.contains("via"), "{direct:?}");
        lan.a.says("awk '$1 == \"10.217.0.9\" { print $3, $4 }' /proc/net/arp", "0x6 02:00:00:00:00:99")
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
    ("net/multicast-reaches-the-guest-and-leaves-it", |lan| {
        let script = format!(
            "use Socket; socket(S, PF_INET, SOCK_DGRAM, 17) or die; bind(S, sockaddr_in(95, INADDR_ANY)) or die;
            $group = inet_aton('{GROUP}') . inet_aton('{}'); setsockopt(S, 0, 35, $group) or die; # IP_ADD_MEMBERSHIP
            $| = 1; print 'ready'; $SIG{{ALRM}} = sub {{ die }}; alarm 60; recv(S, $m, 99, 0); print \" $m\"",
            four(B)
        );
        let mut member = lan.b.spawn(&["perl", "-e", &script])?;
        member.read_until("ready")?;
        let from = four(BRIDGE);
        lan.bridge
            .run(&format!("printf inwards | socat -u - UDP4-DATAGRAM:{GROUP}:95,ip-multicast-if={from}"))?;
        same(&member.finish()?.code(0)?.text(), &"ready inwards".into())?;
        let member =
            lan.bridge.spawn(&format!("socat -u UDP4-RECVFROM:96,ip-add-membership={GROUP}:{from} -"))?;
        process::eventually("the bridge listens", Duration::from_secs(20), || {
            Ok(lan.bridge.run("cat /proc/net/udp")?.contains(":0060 "))
        })?;
        lan.b.exec(&["bash", "-c", &format!("printf outwards >/dev/udp/{GROUP}/96")])?.code(0)?;
        same(&member.finish()?.code(0)?.text(), &"outwards".into())
    }),
    ("net/jumbo-frames-pass-whole", |lan| {
        for host in [BRIDGE, B, PLAIN] {
            lan.a.sh(&format!("ping -c 1 -W 5 -s 8900 {}", four(host)))?;
        }
        let table = lan.a.sh("grep ^Ip: /proc/net/snmp")?;
        let mut rows = table.lines().map(|line| line.split_whitespace());
        let (names, counts) = rows.next().zip(rows.next()).context("a table")?;
        for (name, count) in
            names.zip(counts).filter(|(name, _)| ["ReasmReqds", "FragCreates"].contains(name))
        {
            ensure!(count == "0", "{name}: {count}");
        }
        Ok(())
    }),
    ("net/a-thousand-connections-at-once", |lan| {
        let script =
            "use IO::Socket::INET; $l = IO::Socket::INET->new(LocalPort => 97, Listen => 1024) or die;
            $| = 1; print 'ready'; $SIG{ALRM} = sub { die }; alarm 80;
            push @all, scalar $l->accept for 1..1000; for (@all) { sysread $_, $b, 99; syswrite $_, $b }";
        let mut server = lan.b.spawn(&["perl", "-e", script])?;
        server.read_until("ready")?;
        let client = format!(
            "import socket\nall = [socket.create_connection((\"{}\", 97), 60) for _ in range(1000)]\n\
             for n, one in enumerate(all): one.sendall(b\"%d\" % n)\n\
             print(sum(one.recv(99) == b\"%d\" % n for n, one in enumerate(all)))",
            four(B)
        );
        same(&lan.bridge.run(&format!("python3 -c '{client}'"))?, &"1000".into())?;
        server.finish()?.code(0).map(drop)
    }),
    ("net/a-frame-crosses-once", |lan| {
        let mut counter = lan.at_b.spawn(&format!("exec python3 -u -c '{COUNTER}'"))?;
        counter.read_until("ready")?;
        // Nobody answers these, so whatever comes back out of the namespace would come by itself.
        lan.bridge.run("ping -b -c 20 -i 0.2 -W 1 -p 6f6e6365 10.213.7.255; true")?;
        same(&counter.finish()?.code(0)?.text(), &"ready 20\n".into())
    }),
    ("net/sockets-inside-the-namespace-keep-working", |lan| {
        // As an engine asks name servers: its socket is in the namespace, the server is not.
        let _server = lan.bridge.spawn("socat UDP6-LISTEN:53,fork EXEC:'tr a-z A-Z'")?;
        listens(|| lan.bridge.run("ss -lun"), 53)?;
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
        let ports = lan.at_a.run("cat /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '")?;
        same(&ports, &"32768 60999".into())?;
        // The namespace's own stack answers again.
        lan.bridge.run(&format!("ping -c 1 -W 5 {}", four(A))).map(drop)
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Vm, Lan::set_up, SHARED),
        wish(At::Vm, "net/what-is-plugged-before-start-is-found", plugged_late),
        wish(At::Vm, "net/a-sysctl-of-an-interface-that-never-comes-is-named", never_plugged),
        wish(At::Vm, "net/interfaces-of-every-kind-at-once", every_kind),
        wish(At::Vm, "net/what-comes-and-goes-later-takes-a-spare-and-gives-it-back", comes_and_goes),
        wish(At::Vm, "net/without-interfaces-there-is-loopback-alone", alone),
        wish(At::Vm, "net/more-interfaces-than-nics-name-the-annotation", too_many),
        wish(At::Vm, "net/the-hosts-network-is-reached-by-its-sockets", host_network),
        wish(At::Vm, "net/a-namespace-of-another-process-is-refused", of_a_process),
        wish(At::Both, "net/annotations-are-checked", annotations),
    ]
}

/// Counts the frames to the guest with `ping -p`'s pattern, until none has come for three seconds since the first.
const COUNTER: &str = r#"
import socket
frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
frames.bind(("a3s-tap0", 0))
frames.settimeout(30)
print("ready ", end="")
count = 0
try:
    while True:
        data, place = frames.recvfrom(2048)
        if place[2] == socket.PACKET_OUTGOING and b"onceonceonce" in data:
            count += 1
            frames.settimeout(3)
except TimeoutError:
    print(count)
"#;

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

/// As engines do whose network comes after `create`: into the namespace of the container's pid.
fn plugged_late(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let filter = json!({ "net.ipv4.conf.eth0.rp_filter": "2", "net/ipv4/conf/all/log_martians": "1" });
    let mut container = Container::create(world, &privileged(Config::idle()).set("/linux/sysctl", filter))?;
    let place = format!("/proc/{}/ns/net", container.pid);
    plug(&bridge, &container.pid.to_string(), A)?;
    let mut enter = Command::new("nsenter");
    enter.arg(format!("--net={place}")).args(["sh", "-c", &addresses(A)]);
    process::run(enter, b"", Duration::from_secs(10))?.code(0)?;
    container.start()?;
    container.says("ls /sys/class/net", "eth0\nlo")?;
    container.says("cd /proc/sys/net/ipv4/conf; cat eth0/rp_filter all/log_martians", "2\n1")?;
    ping(&container, &four(BRIDGE))?;
    ping(&container, &six(BRIDGE))?;
    container.delete(&["--force"])
}

fn never_plugged(world: &'static World) -> Result<()> {
    let filter = json!({ "net.ipv4.conf.eth0.rp_filter": "2" });
    let mut container = Container::create(world, &Config::idle().set("/linux/sysctl", filter))?;
    let words = ["linux.sysctl", "net/ipv4/conf/eth0/rp_filter", "no such file or directory"];
    world.refused(&["start", &container.id], &words)?;
    same(&container.status()?.as_str(), &"created")?;
    container.delete(&["--force"])
}

/// What CNI's bridge, macvlan and ipvlan plugins make, in one namespace.
fn every_kind(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    let netns = stand(world, &bridge, A)?;
    for (kind, net) in [("macvlan", 220), ("ipvlan", 221)] {
        let mode = if kind == "macvlan" { "bridge" } else { "l2" };
        bridge.run(&format!(
            "ip link add parent{net} type dummy && ip link set parent{net} up &&
            ip link add peer{net} link parent{net} type {kind} mode {mode} &&
            ip addr add 10.{net}.0.1/24 dev peer{net} && ip link set peer{net} up &&
            ip link add net{net} link parent{net} netns {} type {kind} mode {mode}",
            netns.path()
        ))?;
        netns.run(&format!("ip addr add 10.{net}.0.2/24 dev net{net} && ip link set net{net} up"))?;
    }
    let mut container = Container::running(world, &on(&netns))?;
    container.says("ls /sys/class/net", "eth0\nlo\nnet220\nnet221")?;
    for peer in [four(BRIDGE), "10.220.0.1".into(), "10.221.0.1".into()] {
        ping(&container, &peer)?;
    }
    for net in [220, 221] {
        bridge.run(&format!("ping -c 1 -W 5 10.{net}.0.2"))?;
    }
    container.delete(&["--force"])
}

/// As `docker network connect` and `disconnect` do, which call no runtime.
fn comes_and_goes(world: &'static World) -> Result<()> {
    let bridge = bridge(world)?;
    bridge.run("ip addr add 10.217.0.1/24 dev br0")?;
    let mut container = Container::create(world, &privileged(Config::idle()))?;
    let inside = |script: &str| {
        let mut enter = Command::new("nsenter");
        enter.arg(format!("--net=/proc/{}/ns/net", container.pid)).args(["sh", "-c", script]);
        process::run(enter, b"", Duration::from_secs(10))?.code(0).map(drop)
    };
    plug(&bridge, &container.pid.to_string(), A)?;
    inside(&addresses(A))?;
    container.start()?;
    for _ in 0..2 {
        bridge.run(&format!(
            "ip link add later type veth peer name eth1 netns {} && ip link set later master br0 up",
            container.pid
        ))?;
        inside(
            "ip link set eth1 up && ip addr add 10.217.0.2/24 dev eth1 && ip route add 10.218.0.0/16 via 10.217.0.1",
        )?;
        process::eventually("the guest has it", Duration::from_secs(20), || {
            Ok(container.sh("ip addr show; ip route")?.contains("10.218.0.0/16 via 10.217.0.1 dev eth1"))
        })?;
        ping(&container, "10.217.0.1")?;
        bridge.run("ip link delete later")?;
        process::eventually("the guest has it no longer", Duration::from_secs(20), || {
            Ok(container.sh("ls /sys/class/net")? == "eth0\nlo")
        })?;
    }
    ping(&container, &four(BRIDGE))?;
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
