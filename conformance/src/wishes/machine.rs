//! What only a real machine shows: its kernel, what it needs of the host, a Debian in it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Output};
use crate::world::{World, write_config};

/// Wishes that share a container.
const WISHES: &[Wish<Container>] = &[
    ("machine/the-kernel-is-the-guests", |container| {
        let guest = container.sh("uname -r")?;
        let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        ensure!(guest != host.trim(), "both are {guest}");
        Ok(())
    }),
    ("machine/vcpus-and-memory-are-as-annotated", |container| {
        container.says("nproc", "1")?;
        let kib: u64 = container.sh("grep MemTotal /proc/meminfo | tr -s ' ' | cut -d ' ' -f 2")?.parse()?;
        ensure!((180_000..=262_144).contains(&kib), "{kib} KiB of 256 MiB");
        Ok(())
    }),
    ("machine/the-clock-is-right", |container| {
        let guest: u64 = container.sh("date +%s")?.parse()?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(guest) <= 5, "guest {guest}, host {now}");
        Ok(())
    }),
    ("machine/randomness-is-there-at-once", |container| {
        let twice = container.sh("head -c 16 /dev/random | sha256sum; head -c 16 /dev/random | sha256sum")?;
        let lines: Vec<&str> = twice.lines().collect();
        ensure!(lines.len() == 2 && lines[0] != lines[1], "{twice}");
        Ok(())
    }),
    ("machine/only-loopback-without-interfaces", |container| {
        container.says("tail -n +3 /proc/net/dev | cut -d : -f 1 | tr -d ' '", "lo")
    }),
    ("machine/debian-tools-of-the-host-see-no-guest-process", |container| {
        let marker = "31415926";
        let mut exec = container.spawn(&["sh", "-c", &format!("echo up; exec sleep {marker}")])?;
        exec.read_until("up")?;
        let seen = std::fs::read_dir("/proc")?
            .flatten()
            .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        let needle = format!("sleep\0{marker}\0");
        ensure!(!seen.into_iter().any(|line| line == needle.as_bytes()), "the guest's process is the host's");
        Ok(())
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Vm, |world| Container::running(world, &Config::idle()), WISHES),
        wish(At::All, "debian/one-run-shows-it-all", debian),
        wish(At::Vm, "bad-input/dev-kvm-is-missing", |world| without_kvm(world, HIDE)),
        wish(At::Vm, "bad-input/dev-kvm-is-forbidden", |world| {
            without_kvm(world, "mount --bind /dev/kvm /dev/kvm && mount -o remount,bind,nodev /dev/kvm")
        }),
        wish(At::Vm, "bad-input/dev-kvm-is-something-else", |world| {
            without_kvm(world, "mount --bind /dev/null /dev/kvm")
        }),
        wish(At::Vm, "bad-input/libkrunfw-is-missing-or-broken", without_firmware),
        wish(At::Vm, "machine/two-at-once", two),
        wish(At::Vm, "machine/a-panic-is-told", panic),
    ]
}

/// A /dev without kvm: the caller's own, node by node.
const HIDE: &str = "d=$(mktemp -d); mount -t tmpfs tmpfs $d; mkdir $d/net
    for n in null zero full random urandom tty net/tun vhost-vsock; do
        if [ -e /dev/$n ]; then touch $d/$n; mount --bind /dev/$n $d/$n; fi
    done
    mount --rbind $d /dev; umount -l $d; rmdir $d; test ! -e /dev/kvm";

fn debian(world: &'static World) -> Result<()> {
    let rootfs = world.debian()?;
    let script =
        "uname -r; tr '\\0' ' ' </proc/1/cmdline; echo; id; umask; . /etc/os-release; echo $ID; exit 42";
    let config = Config::new(&["/bin/bash", "-c", script])
        .set("/process/user", json!({ "uid": 1000, "gid": 1001, "additionalGids": [4, 24], "umask": 0o27 }))
        .set("/root/readonly", json!(true))
        .set("/root/path", json!(rootfs));
    let bundle = world.make_dir("bundle")?;
    write_config(&bundle, &config)?;
    let output = world.run(&bundle, b"")?.code(42)?.quiet()?;
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(!world.is_vm() || lines[0] != host.trim(), "the kernel is the host's");
    ensure!(lines[1].starts_with("/bin/bash -c uname -r"), "{}", lines[1]);
    same(&lines[2], &"uid=1000 gid=1001 groups=1001,4(adm),24(cdrom)")?;
    same(&lines[3..].to_vec(), &vec!["0027", "debian"])
}

/// Runs the runtime in a mount namespace of its own, prepared by a script.
/// Runs the runtime after `prepare` in a mount namespace of its own.
pub fn in_private_view(world: &'static World, prepare: &str, args: &[&str]) -> Result<Output> {
    let script = format!("{{ {prepare}; }} >/dev/null 2>&1 || exit 97; exec \"$@\"");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(&world.runtime)
        .arg("--root")
        .arg(&world.root)
        .args(args);
    process::run(command, b"", world.patience())
}

fn without_kvm(world: &'static World, prepare: &str) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ran"))?;
    let output =
        in_private_view(world, prepare, &["run", "--bundle", &bundle.to_string_lossy(), &world.name("run")])?;
    output.code(1)?.one_line(&["/dev/kvm"])?;
    let check = in_private_view(world, prepare, &["check"])?.code(1)?;
    ensure!(check.text().contains("/dev/kvm"), "{}", check.text());
    Ok(())
}

fn firmware_files() -> Result<Vec<PathBuf>> {
    let mut find = Command::new("find");
    find.args(["/usr/lib", "/usr/lib64", "/usr/local", "/lib", "/lib64", "/opt", "/var/lib"]);
    find.args(["-name", "libkrunfw.so*", "-not", "-type", "d"]);
    let output = process::run(find, b"", std::time::Duration::from_secs(60))?;
    let found: Vec<PathBuf> = output.text().lines().map(PathBuf::from).collect();
    ensure!(!found.is_empty(), "no libkrunfw on this host");
    Ok(found)
}

fn without_firmware(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ran"))?;
    let empty = bundle.join("empty");
    std::fs::write(&empty, "not a library")?;
    let files = firmware_files()?;
    let over = |what: &str| -> String {
        let each =
            files.iter().map(|file| format!("mount --bind {what} \"$(readlink -f {})\"", file.display()));
        each.collect::<Vec<_>>().join(" && ")
    };
    // A library that cannot be opened is as good as missing; one that is none must be told from one that is missing.
    for prepare in [over(&empty.to_string_lossy()), over("/dev/null")] {
        let args = ["run", "--bundle", &bundle.to_string_lossy(), &world.name("run")];
        let output = in_private_view(world, &prepare, &args)?.code(1)?;
        output.one_line(&["libkrunfw"]).with_context(|| prepare.clone())?;
    }
    Ok(())
}

fn two(world: &'static World) -> Result<()> {
    let one = Container::running(world, &Config::idle())?;
    let other = Container::running(world, &Config::idle().set("/hostname", json!("other")))?;
    one.says("hostname; touch /dev/shm/mine", "conformance")?;
    other.says("hostname; ls /dev/shm | wc -l", "other\n0")?;
    drop(one);
    other.says("echo well", "well")
}

fn panic(world: &'static World) -> Result<()> {
    // A workload with every capability may end its own kernel; that is a death of the VM, not an exit with 0.
    let all = json!(["CAP_SYS_ADMIN", "CAP_SYS_BOOT"]);
    let capabilities = json!({ "bounding": all, "permitted": all, "effective": all });
    let config = Config::sh("echo up; echo c >/proc/sysrq-trigger; sleep 5; echo no sysrq; exit 9")
        .set("/process/capabilities", capabilities);
    let output = world.run(&world.bundle(&config)?, b"")?;
    if output.text().contains("no sysrq") {
        return output.code(9).map(drop);
    }
    ensure!(output.code != 0, "a panic ended as success");
    output.one_line(&["the VM died", "console"]).map(drop)
}
