//! Fields of config.json that hold in the guest, each proved from inside.

use std::fs;
use std::os::unix::fs::FileTypeExt;

use anyhow::{Result, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::{Config, engines};
use crate::container::Container;
use crate::leaks::processes;
use crate::process;
use crate::world::World;

/// Wishes that share a container with a value in every field.
const FIELDS: &[Wish<Container>] = &[
    ("sysctl/parameters-hold-in-the-container", |container| {
        let files = "cd /proc/sys; cat net/ipv4/ping_group_range net/ipv4/ip_unprivileged_port_start kernel/shmmni | tr '\\t' ' '";
        container.says(files, "0 2147483647\n0\n99")
    }),
    ("time/offsets-hold-for-the-first-process-and-for-others", |container| {
        container.says("readlink /proc/1/ns/time", &container.sh("readlink /proc/self/ns/time")?)?;
        for uptime in [container.sh("cat /proc/uptime")?, container.output()] {
            let seconds: f64 = uptime.split_whitespace().next().unwrap_or_default().parse()?;
            ensure!((1_000_000.0..1_100_000.0).contains(&seconds), "up for {seconds} s");
        }
        Ok(())
    }),
    ("personality/linux32-is-what-all-processes-have", |container| {
        ensure!(container.output().contains("i686"), "the first process: {:?}", container.output());
        container.says("uname -m", "i686")
    }),
    ("process/scheduling-is-as-asked", |container| {
        // proc_pid_stat(5): 19 is nice, 41 the policy; SCHED_BATCH is 3.
        container.says("cut -d ' ' -f 19,41 /proc/1/stat", "7 3")?;
        container.says("ionice -p 1", "best-effort: prio 5")
    }),
    ("process/oom-score-holds-on-both-sides", |container| {
        container.says("cat /proc/1/oom_score_adj", "300")?;
        let ours = processes(container.world);
        let below = ours
            .iter()
            .filter(|(pid, _)| *pid == container.pid || process::parent(*pid) == Some(container.pid));
        for (pid, name) in below {
            let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
            same(&(name, score.trim()), &(name, "300"))?;
        }
        Ok(())
    }),
    ("devices/are-made-with-numbers-owner-and-mode", |container| {
        container.says("stat -c '%F %t:%T %u:%g %a' /dev/mine", "character special file 1:5 3:4 640")?;
        container.says("stat -c '%F %u:%g %a' /dev/fifo", "fifo 0:0 666")?;
        container.says("head -c 4 /dev/mine | od -An -tx1", " 00 00 00 00")
    }),
    ("devices/may-lie-anywhere-and-are-not-made-on-the-host", |container| {
        container.says("stat -c '%F %t:%T %a' /srv/deep/zero", "character special file 1:5 666")?;
        let made = fs::symlink_metadata(container.bundle.join("rootfs/srv/deep/zero"))?.file_type();
        ensure!(!made.is_char_device(), "a device was made in the root file system");
        Ok(())
    }),
    ("devices/one-that-no-rule-allows-cannot-be-opened", |container| {
        container.says("mknod /dev/other c 10 229 && echo made", "made")?;
        let output = container.exec(&["sh", "-c", ": < /dev/other"])?;
        ensure!(output.code != 0 && output.stderr.contains("not permitted"), "{:?}", output.stderr);
        container.says(": < /dev/urandom && echo x > /dev/null && echo open", "open")
    }),
    ("resources/every-limit-becomes-the-guests", |container| {
        let files = "cd /sys/fs/cgroup; cat memory.max memory.low pids.max cpu.max cpu.max.burst memory.high";
        container.says(files, "134217728\n67108864\n50\n90000 100000\n1000\n130023424")?;
        container.says("cat /sys/fs/cgroup/memory.swap.max 2>/dev/null || echo 0", "0")?;
        container.says("cd /sys/fs/cgroup; cat hugetlb.2MB.max hugetlb.2MB.rsvd.max", "4194304\n4194304")
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Vm, full, FIELDS),
        sharing(At::Local, without_limits, &FIELDS[..FIELDS.len() - 1]),
        wish(At::Both, "devices/a-privileged-container-has-what-the-guest-has", privileged),
        wish(At::Local, "devices/another-file-in-their-place-is-an-error", occupied),
        wish(At::Vm, "resources/no-more-processes-than-none", no_pids),
        wish(At::Local, "resources/ignored-ones-are-warned-about", ignored),
    ]
}

fn config() -> Config {
    let zero = |path: &str| json!({ "path": path, "type": "c", "major": 1, "minor": 5 });
    let mine = json!({ "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 3, "gid": 4 });
    let capabilities = json!(["CAP_MKNOD", "CAP_SYS_NICE", "CAP_DAC_OVERRIDE"]);
    Config::sh("cat /proc/uptime; uname -m; trap 'exit 0' TERM; sleep 100000 & wait")
        .set("/linux/namespaces/-", json!({ "type": "time" }))
        .set(
            "/linux/timeOffsets",
            json!({ "boottime": { "secs": 1_000_000 }, "monotonic": { "secs": 5, "nanosecs": 9 } }),
        )
        .set(
            "/linux/sysctl",
            json!({
                "net.ipv4.ping_group_range": "0 2147483647",
                "net/ipv4/ip_unprivileged_port_start": "0",
                "kernel.shmmni": "99",
            }),
        )
        .set("/linux/personality", json!({ "domain": "LINUX32" }))
        .set("/linux/devices", json!([mine, zero("/srv/deep/zero"), { "path": "/dev/fifo", "type": "p" }]))
        .set("/linux/resources/devices", engines::docker_rules())
        .set("/process/scheduler", json!({ "policy": "SCHED_BATCH", "nice": 7 }))
        .set("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_BE", "priority": 5 }))
        .set("/process/oomScoreAdj", json!(300))
        .set(
            "/process/capabilities",
            json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities }),
        )
}

fn without_limits(world: &'static World) -> Result<Container> {
    running(world, &config())
}

fn full(world: &'static World) -> Result<Container> {
    let config = config()
        .set(
            "/linux/resources/memory",
            json!({ "limit": 128 << 20, "reservation": 64 << 20, "swap": 128 << 20, "checkBeforeUpdate": true }),
        )
        .set("/linux/resources/pids", json!({ "limit": 50 }))
        .set("/linux/resources/cpu", json!({ "quota": 90_000, "period": 100_000, "burst": 1000 }))
        .set("/linux/resources/hugepageLimits", json!([{ "pageSize": "2MB", "limit": 4 << 20 }]))
        .set("/linux/resources/unified", json!({ "memory.high": "130023424" }));
    running(world, &config)
}

fn running(world: &'static World, config: &Config) -> Result<Container> {
    let container = Container::of_bundle(world, world.own_bundle(config)?)?;
    container.start()?;
    Ok(container)
}

/// As docker and podman ask for one: everything is allowed, and every device of the host is listed.
fn privileged(world: &'static World) -> Result<()> {
    let device = |path: &str, kind: &str, major: u32, minor: u32| json!({ "path": path, "type": kind, "major": major, "minor": minor });
    let config = Config::sh(
        "stat -c %t:%T /dev/kmsg /dev/fuse; ls /dev/nvidia0 /dev/sda; (: < /dev/fuse) && echo opened",
    )
    .set("/linux/resources/devices", json!([{ "allow": true, "access": "rwm" }]))
    .set(
        "/linux/devices",
        json!([
            device("/dev/kmsg", "c", 1, 11),
            device("/dev/fuse", "c", 10, 229),
            device("/dev/nvidia0", "c", 195, 0),
            device("/dev/sda", "b", 8, 4095),
        ]),
    );
    let output = world.run(&world.bundle(&config)?, b"")?.code(0)?;
    same(&output.text(), &"1:b\na:e5\nopened\n".into())
}

fn occupied(world: &'static World) -> Result<()> {
    let device = json!({ "path": "/etc/passwd", "type": "c", "major": 1, "minor": 3 });
    let config = Config::sh("echo ran").set("/linux/devices", json!([device]));
    world.run(&world.bundle(&config)?, b"")?.code(1)?.one_line(&["/etc/passwd", "another file"]).map(drop)
}

fn no_pids(world: &'static World) -> Result<()> {
    let config =
        Config::sh("echo ran; (echo child); echo more").set("/linux/resources/pids", json!({ "limit": 0 }));
    let output = world.run(&world.bundle(&config)?, b"")?;
    ensure!(
        output.text() == "ran\n" && output.stderr.contains("fork"),
        "{:?} {:?}",
        output.text(),
        output.stderr
    );
    Ok(())
}

/// Each of them once, with its reason, whatever its value.
fn ignored(world: &'static World) -> Result<()> {
    const FIELDS: [(&str, &str); 11] = [
        ("linux.resources.memory.swappiness", "10"),
        ("linux.resources.memory.kernel", "1000000"),
        ("linux.resources.cpu.realtimeRuntime", "1000"),
        ("linux.resources.blockIO.leafWeight", "100"),
        ("linux.resources.network", r#"{"classID": 7}"#),
        ("linux.resources.rdma", r#"{"mlx5_1": {"hcaHandles": 3}}"#),
        ("linux.intelRdt", r#"{"closID": "x"}"#),
        ("linux.memoryPolicy", r#"{"mode": "MPOL_BIND", "nodes": "0"}"#),
        ("linux.mountLabel", r#""label""#),
        ("process.selinuxLabel", r#""label""#),
        ("process.execCPUAffinity", r#"{"initial": "0"}"#),
    ];
    let config = FIELDS.iter().try_fold(Config::sh("echo ran"), |config, (field, value)| {
        anyhow::Ok(config.set(&format!("/{}", field.replace('.', "/")), serde_json::from_str(value)?))
    })?;
    let output = world.run(&world.bundle(&config)?, b"")?.code(0)?;
    same(&output.text(), &"ran\n".into())?;
    for (field, _) in FIELDS {
        let told =
            output.stderr.lines().filter(|line| line.contains(field) && line.contains("ignored")).count();
        ensure!(told == 1, "{field} is told of {told} times: {:?}", output.stderr);
    }
    same(&output.stderr.lines().count(), &FIELDS.len())
}
