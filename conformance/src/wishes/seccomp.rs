//! The filter of system calls: it binds every process of a container, and says what the profile says (config-linux.md,
//! "Seccomp").

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::world::World;

const DOCKER: &str = include_str!("../../profiles/docker.json");
const PODMAN: &str = include_str!("../../profiles/podman.json");

/// Wishes that share a container: everything is allowed but what [`profile`] singles out.
const WISHES: &[Wish<Container>] = &[
    ("seccomp/both-the-first-process-and-exec-are-filtered", |container| {
        let told = "Seccomp_filters:1 Seccomp:2 NoNewPrivs:1";
        let script = "grep -E '^(Seccomp|NoNewPrivs)' /proc/self/status | tr -d '\\t' | sort -r | xargs echo";
        same(&container.output().lines().next(), &Some(told))?;
        // What the first process is told about the host name it may not set.
        ensure!(container.output().contains("Protocol error"), "{:?}", container.output());
        same(&container.sh(script)?.as_str(), &told)?;
        // The same for a process that is not under no_new_privs and has no capability to load a filter.
        let process =
            json!({ "user": { "uid": 5, "gid": 5 }, "cwd": "/", "args": ["/bin/sh", "-c", script] });
        let path = container.bundle.join("process.json");
        std::fs::write(&path, process.to_string()).context("write the process file")?;
        let output = container.world.ok(&["exec", "--process", &path.to_string_lossy(), &container.id])?;
        same(&output.text().trim_end(), &"Seccomp_filters:1 Seccomp:2 NoNewPrivs:0")
    }),
    ("seccomp/errno-is-the-one-given", |container| says(container, "hostname x", 1, "Protocol error")),
    ("seccomp/errno-is-eperm-where-none-is-given", |container| {
        says(container, "mkfifo /tmp/fifo", 1, "Operation not permitted")
    }),
    ("seccomp/kill-process-ends-it-by-sigsys", |container| ends(container, "exec ln -s /a /tmp/b", 159)),
    ("seccomp/kill-thread-ends-it-by-sigsys", |container| ends(container, "exec ln /etc/passwd /tmp/b", 159)),
    ("seccomp/kill-ends-it-by-sigsys", |container| ends(container, "exec mkdir /tmp/dir", 159)),
    ("seccomp/trap-sends-sigsys", |container| {
        container.says("trap 'echo trapped' SYS; umask 077; echo on", "trapped\non")
    }),
    ("seccomp/trace-without-a-tracer-is-enosys", |container| {
        says(container, "rmdir /tmp/nothing", 1, "Function not implemented")
    }),
    ("seccomp/log-lets-it-through", |container| {
        container.says("renice 5 $$ && cut -d ' ' -f 19 /proc/$$/stat", "5")
    }),
    ("seccomp/a-name-nobody-knows-is-skipped", |container| container.says("echo here", "here")),
    ("seccomp/arguments-equal-less-and-greater", |container| {
        chown(container, &[("10", Some(PROTO)), ("4", Some(TIMER)), ("1001", Some(NODATA)), ("5", None)])?;
        chown(container, &[("11", None), ("1000", None)])
    }),
    ("seccomp/arguments-at-most-and-at-least", |container| {
        for (mode, error) in [("100", Some(TIMER)), ("101", None), ("3777", None), ("4000", Some(NODATA))] {
            outcome(container, &format!("chmod {mode} /tmp/file"), error)?;
        }
        Ok(())
    }),
    ("seccomp/arguments-not-equal", |container| {
        outcome(container, "chown -h 7 /tmp/owned", None)?;
        outcome(container, "chown -h 8 /tmp/owned", Some(PROTO))
    }),
    ("seccomp/arguments-under-a-mask", |container| {
        for (size, error) in [("66", Some(PROTO)), ("578", Some(PROTO)), ("65", None)] {
            outcome(container, &format!("truncate -s {size} /tmp/file"), error)?;
        }
        Ok(())
    }),
    ("seccomp/conditions-on-several-arguments-hold-together", |container| {
        chown(container, &[("20:30", Some(STREAM)), ("20:31", None), ("21:30", None)])
    }),
    ("seccomp/conditions-on-one-argument-are-alternatives", |container| {
        chown(container, &[("40", Some(SLOT)), ("50", Some(SLOT)), ("45", None)])
    }),
];

const PROTO: &str = "Protocol error";
const TIMER: &str = "Timer expired";
const NODATA: &str = "No data available";
const STREAM: &str = "Device not a stream";
const SLOT: &str = "Invalid slot";

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, filtered, WISHES),
        wish(At::Both, "seccomp/dockers-default-profile-bites", |world| engine(world, DOCKER, &DOCKER_SAYS)),
        wish(At::Both, "seccomp/podmans-default-profile-bites", |world| engine(world, PODMAN, &PODMAN_SAYS)),
        wish(At::Both, "seccomp/what-the-default-forbids-ends-the-first-process", forbidden),
    ]
}

fn filtered(world: &'static World) -> Result<Container> {
    let script = "grep -E '^(Seccomp|NoNewPrivs)' /proc/self/status | tr -d '\\t' | sort -r | xargs echo
        hostname x; trap 'exit 0' TERM; sleep 100000 & wait";
    let config = Config::new(&["sh", "-c", &format!("exec 2>&1; {script}")])
        .set("/process/noNewPrivileges", json!(true))
        .set("/linux/seccomp", profile())
        .mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]);
    let container = Container::running(world, &config)?;
    container.sh("touch /tmp/file /tmp/owned")?;
    crate::process::eventually("the first process's words", world.patience(), || {
        Ok(container.output().lines().count() >= 2)
    })?;
    Ok(container)
}

fn profile() -> Value {
    let plain = |names: &[&str], action: &str| json!({ "names": names, "action": action });
    let compare = |name: &str, errno: i32, arguments: Value| json!({ "names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": arguments });
    let on = |index: u32, op: &str, value: u64| json!({ "index": index, "value": value, "op": op });
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
        "syscalls": [
            compare("sethostname", 71, json!([])),
            plain(&["mknod", "mknodat"], "SCMP_ACT_ERRNO"),
            plain(&["symlink", "symlinkat"], "SCMP_ACT_KILL_PROCESS"),
            plain(&["link", "linkat"], "SCMP_ACT_KILL_THREAD"),
            plain(&["mkdir", "mkdirat"], "SCMP_ACT_KILL"),
            plain(&["umask"], "SCMP_ACT_TRAP"),
            plain(&["rmdir", "unlinkat"], "SCMP_ACT_TRACE"),
            plain(&["setpriority"], "SCMP_ACT_LOG"),
            plain(&["no_such_call"], "SCMP_ACT_KILL_PROCESS"),
            compare("chown", 71, json!([on(1, "SCMP_CMP_EQ", 10)])),
            compare("chown", 62, json!([on(1, "SCMP_CMP_LT", 5)])),
            compare("chown", 61, json!([on(1, "SCMP_CMP_GT", 1000)])),
            compare("chown", 60, json!([on(1, "SCMP_CMP_EQ", 20), on(2, "SCMP_CMP_EQ", 30)])),
            compare("chown", 57, json!([on(1, "SCMP_CMP_EQ", 40), on(1, "SCMP_CMP_EQ", 50)])),
            compare("lchown", 71, json!([on(1, "SCMP_CMP_NE", 7)])),
            compare("chmod", 62, json!([on(1, "SCMP_CMP_LE", 0o100)])),
            compare("chmod", 61, json!([on(1, "SCMP_CMP_GE", 0o4000)])),
            compare("ftruncate", 71, json!([
                { "index": 1, "value": 0xff, "valueTwo": 0x42, "op": "SCMP_CMP_MASKED_EQ" }
            ])),
        ]
    })
}

fn says(container: &Container, script: &str, code: i32, words: &str) -> Result<()> {
    container.exec(&["sh", "-c", script])?.code(code)?.one_line(&[words]).map(drop)
}

fn ends(container: &Container, script: &str, code: i32) -> Result<()> {
    container.exec(&["sh", "-c", script])?.code(code)?.quiet().map(drop)
}

fn outcome(container: &Container, script: &str, error: Option<&str>) -> Result<()> {
    match error {
        Some(words) => says(container, script, 1, words),
        None => ends(container, script, 0),
    }
    .with_context(|| script.to_string())
}

fn chown(container: &Container, owners: &[(&str, Option<&str>)]) -> Result<()> {
    owners
        .iter()
        .try_for_each(|(owner, error)| outcome(container, &format!("chown {owner} /tmp/owned"), *error))
}

const EPERM: i32 = 1;
const EINVAL: i32 = 22;
const ENOSYS: i32 = 38;

/// Calls by number on x86-64, with the errno of each: 0 where it succeeds.
type Says = [(&'static str, &'static str, i32); 8];

const DOCKER_SAYS: Says = [
    ("clone3", "435, 0, 0", ENOSYS),
    ("unshare(CLONE_NEWUSER)", "272, 0x10000000", EPERM),
    ("keyctl", "250, 0, 0", EPERM),
    ("personality(ADDR_NO_RANDOMIZE)", "135, 0x40000", EPERM),
    ("personality(PER_LINUX32)", "135, 8", 0),
    ("userfaultfd", "323, 0", EPERM),
    ("newer than the profile", "462, 0, 0, 0", ENOSYS),
    ("getpid", "39", 0),
];

const PODMAN_SAYS: Says = [
    ("unshare(CLONE_NEWUSER)", "272, 0x10000000", 0),
    ("sethostname", "170, 0, 0", EPERM),
    ("kexec_load", "246, 0, 0, 0, 0", EPERM),
    ("socket(NETLINK, AUDIT)", "41, 16, 3, 9", EINVAL),
    ("personality(ADDR_NO_RANDOMIZE)", "135, 0x40000", ENOSYS),
    ("personality(PER_LINUX32)", "135, 8", 0),
    ("io_uring_setup", "425, 0, 0", ENOSYS),
    ("getpid", "39", 0),
];

/// Debian's perl makes the calls, as docker and podman run it: without no_new_privs.
fn engine(world: &'static World, profile: &str, says: &Says) -> Result<()> {
    let rootfs = world.debian()?;
    let calls = says.map(|(_, call, _)| format!("[{call}]")).join(", ");
    let script = format!(
        "for my $c ({calls}) {{ $! = 0; my $r = syscall($$c[0], @$c[1..$#$c]); print $r == -1 ? $!+0 : 0, \"\\n\" }}"
    );
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_SETFCAP"
    ]);
    let sets = json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities });
    let config = Config::new(&["perl", "-e", &script])
        .set("/linux/seccomp", serde_json::from_str(profile)?)
        .set("/process/capabilities", sets)
        .set("/root/readonly", json!(true))
        .set("/root/path", json!(rootfs));
    let bundle = world.make_dir("bundle")?;
    crate::world::write_config(&bundle, &config)?;
    let output = world.run(&bundle, b"")?.code(0)?.quiet()?.text();
    let found: Vec<String> =
        says.iter().zip(output.lines()).map(|(call, line)| format!("{}: {line}", call.0)).collect();
    let wanted: Vec<String> = says.iter().map(|(name, _, errno)| format!("{name}: {errno}")).collect();
    same(&found, &wanted)
}

fn forbidden(world: &'static World) -> Result<()> {
    let config = Config::sh("echo ran")
        .set("/process/noNewPrivileges", json!(true))
        .set("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_KILL_PROCESS" }));
    let output = world.run(&world.bundle(&config)?, b"")?.code(159)?.quiet()?;
    ensure!(output.stdout.is_empty(), "it ran: {:?}", output.text());
    Ok(())
}
