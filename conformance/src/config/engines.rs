//! config.json as engines write it by default, so that what they send starts; each field as their sources have it.
//!
//! In: a script. Out: a document for a small VM. Left out: paths of the engine's own (root, binds, hooks), which a test
//! has no use for, and the seccomp profile, which has wishes of its own.

use serde_json::{Map, Value, json};

use super::Config;

const DOCKER_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
const PODMAN_CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// moby 28 and later (daemon/pkg/oci/defaults.go, daemon/oci_linux.go), `docker run -m 128m --pids-limit 60`.
pub fn docker(script: &str) -> Config {
    base(script, &DOCKER_CAPABILITIES, &["mount", "network", "uts", "pid", "ipc", "cgroup", "time"])
        .set("/process/noNewPrivileges", json!(false))
        .set("/process/oomScoreAdj", json!(0))
        .set("/process/apparmorProfile", json!("docker-default"))
        .set("/process/consoleSize", json!({ "height": 0, "width": 0 }))
        .set("/domainname", json!(""))
        .set("/hooks", json!({}))
        .set(
            "/linux/sysctl",
            json!({ "net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647" }),
        )
        .set("/linux/resources/devices", docker_rules())
        .set(
            "/linux/resources/memory",
            json!({ "limit": 128 << 20, "swap": 256 << 20, "disableOOMKiller": false }),
        )
        .set("/linux/resources/cpu", json!({}))
        .set("/linux/resources/pids", json!({ "limit": 60 }))
        .set("/linux/resources/blockIO", json!({}))
        .set("/linux/devices", json!([]))
}

/// What docker's containers may use.
pub fn docker_rules() -> Value {
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    for (major, minor) in [(1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1)] {
        rules.push(character(true, major, Some(minor)));
    }
    rules.push(character(false, 10, Some(229)));
    json!(rules)
}

/// podman 5 (pkg/specgen/generate/oci_linux.go over runtime-tools' defaults), `podman run --memory 128m`.
pub fn podman(script: &str) -> Config {
    base(script, &PODMAN_CAPABILITIES, &["pid", "network", "ipc", "uts", "mount", "cgroup"])
        .set(
            "/process/rlimits",
            json!([
                { "type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1_048_576 },
                { "type": "RLIMIT_NPROC", "hard": 4096, "soft": 4096 },
            ]),
        )
        .set(
            "/process/user",
            json!({ "uid": 0, "gid": 0, "umask": 18, "additionalGids": [0, 1, 2, 3, 4, 6, 10] }),
        )
        .set("/process/oomScoreAdj", json!(200))
        .set("/linux/resources/devices", json!([{ "allow": false, "access": "rwm" }]))
        .set("/linux/resources/memory", json!({ "limit": 128 << 20, "swap": 256 << 20 }))
        .set("/linux/resources/cpu", json!({}))
        .set("/linux/resources/pids", json!({ "limit": 2048 }))
        .set("/linux/sysctl", json!({ "net.ipv4.ping_group_range": "0 0" }))
        .set("/linux/rootfsPropagation", json!(""))
        .set("/annotations/io.container.manager", json!("libpod"))
        .set("/annotations/org.opencontainers.image.stopSignal", json!("15"))
}

/// containerd 2's CRI (internal/cri/server/container_create.go over pkg/oci/spec.go), a burstable container.
pub fn containerd(script: &str) -> Config {
    base(script, &DOCKER_CAPABILITIES, &["pid", "ipc", "uts", "mount", "network", "cgroup"])
        .set("/process/oomScoreAdj", json!(984))
        .set("/process/noNewPrivileges", json!(true))
        .set("/linux/resources/devices", default_rules(&[(5, Some(1))]))
        .set("/linux/resources/memory", json!({ "limit": 128 << 20, "swap": 128 << 20 }))
        .set("/linux/resources/cpu", json!({ "shares": 102, "quota": 90_000, "period": 100_000 }))
        .set("/linux/resources/unified", json!({ "memory.oom.group": "1", "memory.swap.max": "0" }))
        .set("/annotations/io.kubernetes.cri.container-name", json!("c"))
        .set("/annotations/io.kubernetes.cri.image-name", json!("busybox"))
}

/// CRI-O (server/container_create_linux.go over runtime-tools' defaults), a guaranteed container.
pub fn crio(script: &str) -> Config {
    base(script, &PODMAN_CAPABILITIES, &["pid", "network", "ipc", "uts", "mount", "cgroup"])
        .set("/process/oomScoreAdj", json!(-997))
        .set("/process/selinuxLabel", json!(""))
        .set("/linux/mountLabel", json!(""))
        .set("/linux/resources/devices", default_rules(&[(10, Some(200))]))
        .set("/linux/resources/memory", json!({ "limit": 128 << 20, "swap": 128 << 20 }))
        .set(
            "/linux/resources/cpu",
            json!({ "shares": 1024, "quota": 100_000, "period": 100_000, "cpus": "0" }),
        )
        .set("/linux/resources/hugepageLimits", json!([{ "pageSize": "2MB", "limit": 0 }]))
        .set("/linux/resources/unified", json!({ "memory.oom.group": "1" }))
        .set("/annotations/io.kubernetes.cri-o.LogPath", json!("/var/log/pods/p/c/0.log"))
        .set("/annotations/io.kubernetes.cri-o.TTY", json!("false"))
}

/// What containerd and CRI-O allow by default.
fn default_rules(more: &[(u32, Option<u32>)]) -> Value {
    let mknod = |kind: &str| json!({ "allow": true, "type": kind, "access": "m" });
    let mut rules = vec![json!({ "allow": false, "access": "rwm" }), mknod("c"), mknod("b")];
    let each = [1, 3, 5, 7, 8, 9].iter().skip(1).map(|minor| (1, Some(*minor)));
    let devices = each.chain([(5, Some(0)), (5, Some(2)), (136, None)]).chain(more.iter().copied());
    rules.extend(devices.map(|(major, minor)| character(true, major, minor)));
    json!(rules)
}

fn character(allow: bool, major: u32, minor: Option<u32>) -> Value {
    let mut rule = json!({ "allow": allow, "type": "c", "major": major, "access": "rwm" });
    if let Some(minor) = minor {
        rule["minor"] = json!(minor);
    }
    rule
}

/// What all of them write.
fn base(script: &str, capabilities: &[&str], namespaces: &[&str]) -> Config {
    let namespaces: Vec<Value> = namespaces.iter().map(|kind| json!({ "type": kind })).collect();
    let sets: Map<String, Value> = ["bounding", "effective", "permitted"]
        .map(|set| (set.to_string(), json!(capabilities)))
        .into_iter()
        .collect();
    Config::sh(script)
        .set("/process/capabilities", json!(sets))
        .without("/process/rlimits")
        .set("/linux/namespaces", json!(namespaces))
        .set("/linux/maskedPaths", json!(MASKED))
        .set("/linux/readonlyPaths", json!(READONLY))
}
