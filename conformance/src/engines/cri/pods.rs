//! What a pod is: one kernel, one address, one localhost, one life.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::OfPods;
use super::host::{Cri, GATEWAY, fetch};
use super::pod::{IDLE, Pod};
use super::stream::{STDIN, STDOUT};
use crate::leaks::{Census, processes};
use crate::process::{self, eventually};
use crate::wishes::same;

pub const WISHES: &[OfPods] = &[
    ("cri/containers-share-kernel-name-localhost-and-shared-memory", share),
    ("cri/the-pods-address-answers-the-host", address),
    ("cri/a-port-is-forwarded-to-the-pods-loopback", forwarded),
    ("cri/stats-have-sane-numbers", stats),
    ("cri/containers-outlive-containerd", outlive),
    ("cri/a-killed-container-leaves-the-others", killed),
    ("cri/process-ids-are-shared-where-asked", pids),
    ("cri/sysctls-of-the-pod-hold", sysctls),
    ("cri/a-pod-in-the-hosts-network", host_network),
    ("cri/a-removed-pod-leaves-nothing", removed),
    ("cri/many-pods-at-once", many),
];

pub const OF_VMS: &[OfPods] = &[("cri/a-dead-vm-is-noticed-and-removed", dead)];

const BOOT: &str = "/proc/sys/kernel/random/boot_id";

fn share(cri: &mut Cri) -> Result<()> {
    let (is_vm, world) = (cri.is_vm(), cri.world);
    let shared = cri.shared()?;
    let (one, two) = (&shared.one, &shared.two);
    let look = format!("cat {BOOT}; hostname; readlink /proc/self/ns/ipc; readlink /proc/self/ns/net");
    let seen = one.sh(&look)?;
    same(&two.sh(&look)?, &seen)?;
    ensure!(seen.contains("the-pod"), "the host name is not the pod's: {seen}");
    one.sh("echo by one >/dev/shm/word")?;
    two.says("cat /dev/shm/word", "by one")?;
    one.sh("(echo by localhost | nc -l -p 99) >/dev/null 2>&1 &")?;
    eventually("the other is heard", world.patience(), || {
        Ok(two.sh("nc -w 5 127.0.0.1 99 </dev/null 2>/dev/null || true")? == "by localhost")
    })?;
    two.says("ps -o args | grep -c 'sleep 100000$'", "1")?;
    let own = fs::read_to_string(BOOT)?;
    same(&seen.contains(own.trim()), &!is_vm)?;
    same(&vmms(cri), &usize::from(is_vm))
}

fn vmms(cri: &Cri) -> usize {
    processes(cri.world).iter().filter(|(_, name)| name.contains("a3s-box-vmm")).count()
}

fn address(cri: &mut Cri) -> Result<()> {
    let world = cri.world;
    let shared = cri.shared()?;
    shared.one.sh("mkdir /www && echo from afar >/www/word && httpd -p 80 -h /www")?;
    let status = shared.pod.status()?;
    let six = status["network"]["additional_ips"][0]["ip"].as_str();
    let six = six.with_context(|| format!("no second address in {status}"))?.to_string();
    for address in [shared.pod.ip()?, format!("[{six}]")] {
        same(&fetch(world, &format!("http://{address}/word"))?, &"from afar".into())?;
    }
    shared.two.says("wget -qO - http://127.0.0.1/word", "from afar")?;
    shared.two.sh(&format!("ping -c 1 -W 10 {GATEWAY} && cat /etc/resolv.conf"))?;
    let resolver = shared.two.sh("cat /etc/resolv.conf")?;
    ensure!(resolver.contains("search cluster.local\n"), "{resolver}");
    ensure!(resolver.contains(&format!("nameserver {GATEWAY}")), "{resolver}");
    Ok(())
}

fn forwarded(cri: &mut Cri) -> Result<()> {
    let shared = cri.shared()?;
    shared.one.sh("mkdir /home; echo at home >/home/word && httpd -p 127.0.0.1:8080 -h /home")?;
    let mut stream = shared.pod.forward(8080)?;
    // The channels of a port's data and errors are 0 and 1, and begin with its number.
    stream.send(STDIN, b"GET /word HTTP/1.0\r\n\r\n")?;
    stream.read_until(STDIN, "at home")?;
    let mut refused = shared.pod.forward(8081)?;
    refused.send(STDIN, b"GET / HTTP/1.0\r\n\r\n")?;
    let mut heard = [0, 0];
    while let Some((channel, bytes)) = refused.next()? {
        heard[usize::from(channel == STDOUT)] += bytes.len();
    }
    ensure!(heard[0] <= 2, "a port that nobody listens on said {} bytes", heard[0]);
    shared.one.lives()
}

/// Of a VM the host sees only what the whole of it takes.
fn stats(cri: &mut Cri) -> Result<()> {
    let (world, client) = (cri.world, cri.client.clone());
    let shared = cri.shared()?;
    shared.one.sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")?;
    let mut seen = Value::Null;
    let found = eventually("statistics", world.patience(), || {
        seen = json!({
            "container": shared.one.ask("ContainerStats", json!({}))?["stats"],
            "pods": client.call("ListPodSandboxStats", &json!({}))?["stats"],
        });
        let pods = seen["pods"].as_array().context("no pods")?;
        let pod = pods.iter().find(|pod| pod["attributes"]["id"] == shared.pod.id.as_str());
        let Some(pod) = pod.map(|pod| &pod["linux"]) else { return Ok(false) };
        let number =
            |of: &Value, pointer: &str| of.pointer(pointer).and_then(|value| value["value"].as_u64());
        let sane = |of: &Value, pointer: &str, least: u64, most: u64| {
            number(of, pointer).is_some_and(|number| (least..=most).contains(&number))
        };
        let (cpu, memory) = ("/cpu/usage_core_nano_seconds", "/memory/working_set_bytes");
        Ok(sane(&seen["container"], cpu, 1_000_000, 600_000_000_000)
            && sane(&seen["container"], memory, 100_000, 600 << 20)
            && sane(pod, cpu, number(&seen["container"], cpu).unwrap_or(0), 900_000_000_000)
            && sane(pod, memory, 1 << 20, 900 << 20)
            && sane(pod, "/process/process_count", 2, 500)
            && pod["network"]["default_interface"]["name"] == "eth0"
            && sane(pod, "/network/default_interface/rx_bytes", 1, 1 << 30)
            && sane(pod, "/network/default_interface/tx_bytes", 1, 1 << 30)
            && pod["containers"].as_array().is_some_and(|all| all.len() >= 2))
    });
    found.with_context(|| seen.to_string())
}

fn outlive(cri: &mut Cri) -> Result<()> {
    let script = "trap 'echo bye; exit 9' TERM; while :; do echo tick; sleep 0.5; done";
    let shared = cri.shared()?;
    let member = shared.pod.start(&shared.pod.member(script))?;
    cri.restart()?;
    let shared = cri.shared()?;
    same(&shared.pod.status()?["state"], &json!(0))?;
    shared.one.lives()?;
    member.lives()?;
    member.stop(30)?;
    same(&member.wait()?["exit_code"], &json!(9))?;
    ensure!(member.log()?.ends_with("bye\n"), "the log ends with {:?}", member.log()?);
    member.remove()
}

/// By SIGKILL of what the host sees of it.
fn killed(cri: &mut Cri) -> Result<()> {
    let shared = cri.shared()?;
    let member = shared.pod.idle()?;
    process::signal(member.pid()?, Signal::KILL)?;
    let status = member.wait()?;
    ensure!(status["exit_code"] == 137 && status["reason"] == "Error", "it ended with {status}");
    member.remove()?;
    same(&shared.pod.status()?["state"], &json!(0))?;
    shared.one.lives()?;
    shared.two.lives()
}

fn pids(cri: &mut Cri) -> Result<()> {
    let place = "/linux/security_context/namespace_options/pid";
    let shared = cri.shared()?;
    let script = "trap 'exit 0' TERM; sleep 200000 & wait";
    let target = shared.pod.start(&shared.pod.member(script))?;
    let debugger = shared
        .pod
        .member(script)
        .set(place, json!(3))
        .set("/linux/security_context/namespace_options/target_id", json!(target.id));
    let debugger = shared.pod.start(&debugger)?;
    for member in [&target, &debugger] {
        member.says("ps -o args | grep -c '^sleep 200000'", "2")?;
    }
    debugger.stop(5)?;
    target.says("ps -o args | grep -c '^sleep 200000'", "1")?;
    debugger.remove()?;
    target.stop(5)?;
    target.remove()?;
    let pod = Pod::run(cri, Pod::config(cri.world)?.set(place, json!(0)))?;
    let member = || pod.start(&pod.member(script).set(place, json!(0)));
    let (one, two) = (member()?, member()?);
    for member in [&one, &two] {
        member.says("ps -o args | grep -c '^sleep 200000'", "2")?;
    }
    one.stop(5)?;
    two.says("ps -o args | grep -c '^sleep 200000'", "1")?;
    pod.remove()
}

/// With those that containerd sets of itself: low ports are anybody's.
fn sysctls(cri: &mut Cri) -> Result<()> {
    let wanted = json!({ "net.core.somaxconn": "777", "kernel.shm_rmid_forced": "1" });
    let pod = Pod::run(cri, Pod::config(cri.world)?.set("/linux/sysctls", wanted))?;
    let config = pod.member(IDLE).set("/linux/security_context/run_as_user/value", json!(1000));
    let member = pod.start(&config)?;
    member.says("cd /proc/sys; cat net/core/somaxconn kernel/shm_rmid_forced", "777\n1")?;
    member.says("cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?;
    member.sh("httpd -p 81 -h /etc")?;
    ensure!(fetch(cri.world, &format!("http://{}:81/passwd", pod.ip()?))?.contains("root"), "no answer");
    pod.remove()
}

fn host_network(cri: &mut Cri) -> Result<()> {
    let world = cri.world;
    let place = "/linux/security_context/namespace_options/network";
    let pod = Pod::run(cri, Pod::config(world)?.without("/hostname").set(place, json!(2)))?;
    let dir = world.make_dir("www")?;
    fs::write(dir.join("word"), "of the host\n")?;
    let mut server = Command::new("busybox");
    server.args(["httpd", "-f", "-p", "127.0.0.1:18081", "-h"]).arg(&dir);
    let server = process::start(server, true, world.patience())?;
    let script = "mkdir /www; echo of the pod >/www/word; exec httpd -f -p 18080 -h /www";
    let member = pod.start(&pod.member(script).set(place, json!(2)))?;
    member.says("wget -qO - http://127.0.0.1:18081/word", "of the host")?;
    drop(server);
    eventually("it answers on the host", world.patience(), || {
        Ok(fetch(world, "http://127.0.0.1:18080/word").is_ok_and(|word| word == "of the pod"))
    })?;
    let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
    member.says("hostname", name.trim())?;
    pod.remove()
}

fn removed(cri: &mut Cri) -> Result<()> {
    let listed = |dir| fs::read_dir(dir).map(|all| all.flatten().count()).unwrap_or(0);
    // Of the first pod the bridge stays.
    cri.shared()?;
    let (before, states) = (Census::take(cri.world), listed(cri.state()));
    let pod = cri.pod()?;
    let members = [pod.idle()?, pod.idle()?, pod.start(&pod.member("exit 1"))?];
    members[2].wait()?;
    pod.create(&pod.member("never started"))?;
    // Those that run: containerd deletes what has ended, and makes what has not started later.
    same(&listed(cri.state()), &(states + 3))?;
    let id = pod.id.clone();
    pod.remove()?;
    let left = before.left_over(cri.world);
    ensure!(left.is_empty(), "left behind: {left:?}");
    same(&listed(cri.state()), &states)?;
    let pods = cri.client.call("ListPodSandbox", &json!({}))?;
    ensure!(!pods.to_string().contains(&id), "it is still listed: {pods}");
    Ok(())
}

fn many(cri: &mut Cri) -> Result<()> {
    let number = cri.world.by_level(10, 4, 10);
    let small =
        |_| Pod::prepare(cri, Pod::config(cri.world)?.set("/annotations/a3s.box~1memory-mib", json!("128")));
    let prepared = (0..number).map(small).collect::<Result<Vec<_>>>()?;
    let client = &*cri.client;
    let requests: Vec<Value> = prepared.iter().map(|pod| pod.request(cri)).collect();
    let replies: Vec<Result<Value>> = std::thread::scope(|scope| {
        let calls = requests.iter().map(|request| scope.spawn(move || client.call("RunPodSandbox", request)));
        let calls: Vec<_> = calls.collect();
        calls
            .into_iter()
            .map(|call| call.join().unwrap_or_else(|_| anyhow::bail!("a call panicked")))
            .collect()
    });
    let known = prepared.into_iter().zip(replies).map(|(pod, reply)| pod.known_as(&reply?));
    let pods = known.collect::<Result<Vec<_>>>()?;
    let members = pods.iter().map(|pod| pod.idle()).collect::<Result<Vec<_>>>()?;
    let mut boots =
        members.iter().map(|member| member.sh(&format!("cat {BOOT}"))).collect::<Result<Vec<_>>>()?;
    boots.sort();
    boots.dedup();
    same(&boots.len(), &if cri.is_vm() { number } else { 1 })?;
    let mut addresses = pods.iter().map(Pod::ip).collect::<Result<Vec<_>>>()?;
    addresses.sort();
    addresses.dedup();
    same(&addresses.len(), &number)?;
    pods.into_iter().try_for_each(Pod::remove)
}

fn dead(cri: &mut Cri) -> Result<()> {
    let before: Vec<i32> = processes(cri.world).into_iter().map(|(pid, _)| pid).collect();
    let pod = cri.pod()?;
    let member = pod.idle()?;
    let new = processes(cri.world).into_iter();
    let mut vmm = new.filter(|(pid, name)| name.contains("a3s-box-vmm") && !before.contains(pid));
    process::signal(vmm.next().context("no VMM")?.0, Signal::KILL)?;
    let status = member.wait()?;
    ensure!(status["exit_code"] != 0, "it ended with {status}");
    eventually("the pod is not ready", cri.world.patience(), || Ok(pod.status()?["state"] == 1))?;
    pod.remove()
}
