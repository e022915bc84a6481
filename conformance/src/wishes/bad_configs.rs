//! config.json files that cannot be run, and why: the table behind `bad-input`.

use serde_json::{Value, json};

use crate::config::Config;

/// A bundle that cannot be run: what is wrong with it, and words of the error.
pub struct Bad {
    /// The wish.
    pub name: &'static str,
    /// What makes it bad.
    pub change: fn(Config) -> Config,
    /// What the error must say.
    pub words: &'static [&'static str],
}

const fn bad(name: &'static str, change: fn(Config) -> Config, words: &'static [&'static str]) -> Bad {
    Bad { name, change, words }
}

fn seccomp(rule: Value) -> Value {
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] })
}

/// Every one of them, refused before or after its VM has booted.
pub const CONFIGS: &[Bad] = &[
    bad("bad-input/oci-version-2", |c| c.set("/ociVersion", json!("2.0.0")), &["ociVersion", "2.0.0"]),
    bad("bad-input/oci-version-0", |c| c.set("/ociVersion", json!("0.9.1")), &["ociVersion", "0.9.1"]),
    bad(
        "bad-input/oci-version-nonsense",
        |c| c.set("/ociVersion", json!("latest")),
        &["ociVersion", "latest"],
    ),
    bad("bad-input/oci-version-missing", |c| c.without("/ociVersion"), &["ociVersion", "missing"]),
    bad("bad-input/oci-version-a-number", |c| c.set("/ociVersion", json!(1)), &["ociVersion"]),
    bad("bad-input/no-process", |c| c.without("/process"), &["process"]),
    bad("bad-input/no-args", |c| c.without("/process/args"), &["process.args"]),
    bad("bad-input/empty-args", |c| c.set("/process/args", json!([])), &["process.args"]),
    bad("bad-input/args-a-string", |c| c.set("/process/args", json!("sh")), &["process"]),
    bad("bad-input/args-of-numbers", |c| c.set("/process/args", json!([1])), &["process"]),
    bad("bad-input/an-argument-with-a-nul", |c| c.set("/process/args", json!(["echo", "a\u{0}b"])), &["NUL"]),
    bad("bad-input/a-relative-cwd", |c| c.set("/process/cwd", json!("tmp")), &["process.cwd", "tmp"]),
    bad("bad-input/no-cwd", |c| c.without("/process/cwd"), &["process", "cwd"]),
    bad("bad-input/a-negative-uid", |c| c.set("/process/user/uid", json!(-1)), &["process"]),
    bad(
        "bad-input/an-unknown-capability",
        |c| c.set("/process/capabilities/bounding", json!(["CAP_NONSENSE"])),
        &["CAP_NONSENSE"],
    ),
    bad(
        "bad-input/an-unknown-rlimit",
        |c| c.set("/process/rlimits/0/type", json!("RLIMIT_NONSENSE")),
        &["RLIMIT_NONSENSE"],
    ),
    bad("bad-input/no-root", |c| c.without("/root"), &["root"]),
    bad(
        "bad-input/memory-too-small",
        |c| c.set("/annotations/a3s.box~1memory-mib", json!("16")),
        &["a3s.box/memory-mib", "16"],
    ),
    bad(
        "bad-input/memory-not-a-number",
        |c| c.set("/annotations/a3s.box~1memory-mib", json!("lots")),
        &["a3s.box/memory-mib", "lots"],
    ),
    bad("bad-input/no-vcpu", |c| c.set("/annotations/a3s.box~1vcpus", json!("0")), &["a3s.box/vcpus", "0"]),
    bad(
        "bad-input/too-many-vcpus",
        |c| c.set("/annotations/a3s.box~1vcpus", json!("1000")),
        &["a3s.box/vcpus", "1000"],
    ),
    bad(
        "bad-input/a-negative-memory-limit",
        |c| c.set("/linux/resources/memory/limit", json!(-5)),
        &["memory.limit", "-5"],
    ),
    bad(
        "bad-input/a-relative-hook",
        |c| c.set("/hooks/prestart", json!([{ "path": "true" }])),
        &["hooks.prestart[0].path", "true"],
    ),
    bad(
        "bad-input/a-hook-without-time",
        |c| c.set("/hooks/poststop", json!([{ "path": "/bin/true", "timeout": 0 }])),
        &["hooks.poststop[0].timeout", "0"],
    ),
    bad(
        "bad-input/seccomp-that-notifies",
        |c| c.set("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_NOTIFY" })),
        &["linux.seccomp.defaultAction \"SCMP_ACT_NOTIFY\"", "no descriptor"],
    ),
    bad(
        "bad-input/a-seccomp-rule-that-notifies",
        |c| c.set("/linux/seccomp", seccomp(json!({ "names": ["sync"], "action": "SCMP_ACT_NOTIFY" }))),
        &["linux.seccomp.syscalls[0].action \"SCMP_ACT_NOTIFY\"", "no descriptor"],
    ),
    bad(
        "bad-input/a-seccomp-listener",
        |c| {
            c.set("/linux/seccomp/defaultAction", json!("SCMP_ACT_ALLOW"))
                .set("/linux/seccomp/listenerPath", json!("/run/agent.sock"))
        },
        &["linux.seccomp.listenerPath \"/run/agent.sock\"", "no descriptor"],
    ),
    bad(
        "bad-input/a-seccomp-flag-for-listeners",
        |c| {
            c.set("/linux/seccomp/defaultAction", json!("SCMP_ACT_ALLOW"))
                .set("/linux/seccomp/flags", json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]))
        },
        &["linux.seccomp.flags[0] \"SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV\""],
    ),
    bad(
        "bad-input/an-errno-for-a-seccomp-action-without",
        |c| {
            c.set(
                "/linux/seccomp",
                seccomp(json!({ "names": ["sync"], "action": "SCMP_ACT_KILL", "errnoRet": 5 })),
            )
        },
        &["linux.seccomp.syscalls[0]", "SCMP_ACT_KILL", "errno"],
    ),
    bad(
        "bad-input/a-seventh-argument-in-seccomp",
        |c| {
            let argument = json!({ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" });
            let rule = json!({ "names": ["sync"], "action": "SCMP_ACT_KILL", "args": [argument] });
            c.set("/linux/seccomp", seccomp(rule))
        },
        &["linux.seccomp.syscalls[0]", "index 6"],
    ),
    bad(
        "bad-input/a-seccomp-architecture-of-another-byte-order",
        |c| {
            c.set("/linux/seccomp/defaultAction", json!("SCMP_ACT_ALLOW"))
                .set("/linux/seccomp/architectures", json!(["SCMP_ARCH_S390X"]))
        },
        &["linux.seccomp.architectures", "SCMP_ARCH_S390X"],
    ),
    bad(
        "bad-input/an-unknown-seccomp-action",
        |c| c.set("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_NONSENSE" })),
        &["linux", "SCMP_ACT_NONSENSE"],
    ),
    bad(
        "bad-input/a-device-of-the-hosts",
        |c| {
            c.set(
                "/linux/devices",
                json!([{ "path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0 }]),
            )
        },
        &["linux.devices: /dev/nvidia0", "195:0"],
    ),
    bad(
        "bad-input/a-device-without-a-place",
        |c| c.set("/linux/devices", json!([{ "path": "dev/x", "type": "c", "major": 1, "minor": 3 }])),
        &["linux.devices[0]", "dev/x"],
    ),
    bad(
        "bad-input/a-device-rule-about-nothing",
        |c| c.set("/linux/resources/devices", json!([{ "allow": true, "access": "q" }])),
        &["linux.resources.devices[0]", "\"q\""],
    ),
    bad(
        "bad-input/a-sysctl-of-the-whole-kernel",
        |c| c.set("/linux/sysctl", json!({ "kernel.core_pattern": "|/x" })),
        &["linux.sysctl", "kernel.core_pattern", "is not in a separate kernel namespace"],
    ),
    bad(
        "bad-input/a-sysctl-that-does-not-exist",
        |c| c.set("/linux/sysctl", json!({ "net.ipv4.no_such_thing": "1" })),
        &["linux.sysctl", "net/ipv4/no_such_thing", "no such file"],
    ),
    bad(
        "bad-input/a-sysctl-that-climbs",
        |c| c.set("/linux/sysctl", json!({ "net/../kernel/core_pattern": "|/x" })),
        &["linux.sysctl", "is not the name of a parameter"],
    ),
    bad(
        "bad-input/swap-below-memory",
        |c| c.set("/linux/resources/memory", json!({ "limit": 1 << 29, "swap": 1 << 28 })),
        &["memory.swap", "memory+swap limit should be >= memory limit"],
    ),
    bad(
        "bad-input/swap-without-memory",
        |c| c.set("/linux/resources/memory/swap", json!(1 << 30)),
        &["memory.swap", "unable to set swap limit without memory limit"],
    ),
    bad(
        "bad-input/a-huge-page-size-that-makes-no-sense",
        |c| c.set("/linux/resources/hugepageLimits", json!([{ "pageSize": "2 MB", "limit": 1 }])),
        &["hugepageLimits", "2 MB"],
    ),
    bad(
        "bad-input/an-io-priority-out-of-range",
        |c| c.set("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_BE", "priority": 9 })),
        &["process.ioPriority", "9"],
    ),
    bad(
        "bad-input/a-unified-key-that-there-is-none-of",
        |c| c.set("/linux/resources/unified", json!({ "memory.no_such": "max" })),
        &["linux.resources", "memory.no_such", "no such file"],
    ),
    bad(
        "bad-input/a-unified-key-that-climbs",
        |c| c.set("/linux/resources/unified", json!({ "../memory.max": "1" })),
        &["linux.resources.unified", "../memory.max"],
    ),
    bad(
        "bad-input/a-scheduler-that-makes-no-sense",
        |c| c.set("/process/scheduler", json!({ "policy": "SCHED_OTHER", "nice": 50 })),
        &["process.scheduler", "50"],
    ),
    bad(
        "bad-input/an-oom-score-out-of-range",
        |c| c.set("/process/oomScoreAdj", json!(1001)),
        &["oomScoreAdj", "1001"],
    ),
    bad(
        "bad-input/uid-mappings",
        |c| c.set("/linux/uidMappings", json!([{ "containerID": 0, "hostID": 1000, "size": 1 }])),
        &["linux.uidMappings"],
    ),
    bad(
        "bad-input/a-personality-with-flags",
        |c| c.set("/linux/personality", json!({ "domain": "LINUX", "flags": ["X"] })),
        &["linux.personality.flags", "X"],
    ),
    bad(
        "bad-input/time-offsets",
        |c| c.set("/linux/timeOffsets", json!({ "monotonic": { "secs": 1 } })),
        &["linux.timeOffsets"],
    ),
    bad(
        "bad-input/a-network-device-of-the-hosts",
        |c| c.set("/linux/netDevices", json!({ "eth9": { "name": "eth0" } })),
        &["linux.netDevices", "eth9", "interfaces are not moved"],
    ),
    bad("bad-input/windows", |c| c.set("/windows", json!({ "layerFolders": ["x"] })), &["windows"]),
    bad(
        "bad-input/a-hypervisor",
        |c| c.set("/vm/hypervisor", json!({ "path": "/usr/bin/qemu" })),
        &["vm.hypervisor", "libkrun"],
    ),
    bad(
        "bad-input/a-kernel-parameter-that-is-not-theirs",
        |c| c.set("/vm/kernel", json!({ "path": "", "parameters": ["init=/bin/sh"] })),
        &["vm.kernel.parameters", "init=/bin/sh"],
    ),
    bad(
        "bad-input/too-many-vcpus-of-hardware",
        |c| c.set("/vm/hwConfig/vcpus", json!(99)).without("/annotations"),
        &["vm.hwConfig.vcpus", "99"],
    ),
    bad(
        "bad-input/an-id-mapped-mount",
        |c| c.set("/mounts/0/uidMappings", json!([{ "containerID": 0, "hostID": 1, "size": 1 }])),
        &["mounts[0].gidMappings", "missing"],
    ),
    bad("bad-input/a-mount-of-unknown-type", |c| c.mount("/x", "nfs", "host:/x", &[]), &["mounts[7]", "nfs"]),
    bad(
        "bad-input/a-mount-with-an-unknown-option",
        |c| c.mount("/x", "tmpfs", "tmpfs", &["nonsense=1"]),
        &["/x"],
    ),
    bad(
        "bad-input/a-bind-with-a-tmpfs-option",
        |c| c.mount("/x", "bind", "/", &["bind", "size=1m"]),
        &["mounts[7]", "size=1m"],
    ),
    bad(
        "bad-input/a-shared-bind",
        |c| c.mount("/x", "bind", "/", &["rbind", "rshared"]),
        &["mounts[7]", "rshared"],
    ),
    bad(
        "bad-input/the-hosts-procfs-in-a-bind",
        |c| c.mount("/x", "bind", "/", &["rbind", "rro"]),
        &["mount / to /x", "the procfs at /proc would open the VMM's own memory"],
    ),
    bad("bad-input/a-mount-over-the-root", |c| c.mount("/", "tmpfs", "tmpfs", &[]), &["mounts[7]"]),
    bad(
        "bad-input/a-mount-of-a-missing-source",
        |c| c.mount("/x", "bind", "/no/such/source", &["bind"]),
        &["/no/such/source", "no such file or directory"],
    ),
    bad(
        "bad-input/a-missing-program",
        |c| c.set("/process/args", json!(["/no/such"])),
        &["exec: \"/no/such\": stat /no/such: no such file or directory"],
    ),
    bad(
        "bad-input/a-program-not-in-the-path",
        |c| c.set("/process/args", json!(["no-such"])),
        &["exec: \"no-such\": executable file not found in $PATH"],
    ),
    bad(
        "bad-input/a-program-that-cannot-be-executed",
        |c| c.set("/process/args", json!(["/etc/hostname"])),
        &["exec: \"/etc/hostname\": permission denied"],
    ),
    bad(
        "bad-input/a-program-that-is-a-directory",
        |c| c.set("/process/args", json!(["/etc"])),
        &["exec: \"/etc\":", "is a directory"],
    ),
    bad(
        "bad-input/a-cwd-that-is-a-file",
        |c| c.set("/process/cwd", json!("/etc/hostname")),
        &["chdir to cwd (\"/etc/hostname\") set in config.json failed", "not a directory"],
    ),
];
