//! What a container finds: volumes as the kubelet makes them, its user, its rights.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::OfPods;
use super::host::Cri;
use super::pod::{IDLE, Pod};
use crate::config::Config;
use crate::process::eventually;
use crate::wishes::same;

pub const WISHES: &[OfPods] = &[
    ("cri/a-config-map-changes-in-a-running-container", config_map),
    ("cri/volumes-are-shared-read-only-or-single-files", volumes),
    ("cri/a-security-context-holds", security),
    ("cri/a-privileged-container-has-its-kernel-to-itself", privileged),
];

fn mount(config: Config, host: &Path, container: &str, readonly: bool) -> Config {
    let mount = json!({ "host_path": host, "container_path": container, "readonly": readonly });
    let mut mounts = config.value()["mounts"].as_array().cloned().unwrap_or_default();
    mounts.push(mount);
    config.set("/mounts", Value::Array(mounts))
}

/// The kubelet writes a new directory and turns one link.
fn config_map(cri: &mut Cri) -> Result<()> {
    let world = cri.world;
    let dir = world.make_dir("config-map")?;
    let publish = |version: &str| -> Result<()> {
        let data = format!("..{version}");
        fs::create_dir(dir.join(&data))?;
        fs::write(dir.join(&data).join("key"), version)?;
        symlink(&data, dir.join("..data_tmp"))?;
        Ok(fs::rename(dir.join("..data_tmp"), dir.join("..data"))?)
    };
    publish("old")?;
    symlink("..data/key", dir.join("key"))?;
    let pod = &cri.shared()?.pod;
    let member = pod.start(&mount(pod.member(IDLE), &dir, "/config", true))?;
    for version in ["new", "newer"] {
        member.sh("cat /config/key; ls -lR /config")?;
        publish(version)?;
        eventually(&format!("it is {version}"), world.patience(), || {
            Ok(member.sh("cat /config/key")? == version)
        })?;
    }
    fs::remove_dir_all(dir.join("..old"))?;
    member.says("ls -A /config | sort | tr '\\n' ' '", "..data ..new ..newer key")?;
    member.remove()
}

fn volumes(cri: &mut Cri) -> Result<()> {
    let world = cri.world;
    let (empty, files) = (world.make_dir("empty-dir")?, world.make_dir("files")?);
    for name in ["hosts", "log", "sub"] {
        fs::write(files.join(name), format!("{name} of the host\n"))?;
    }
    let pod = &cri.shared()?.pod;
    let one = mount(pod.member(IDLE), &empty, "/cache", false);
    let one = mount(one, &files.join("log"), "/dev/termination-log", false);
    let one = mount(one, &files.join("hosts"), "/etc/hosts", false);
    let one = mount(one, &files.join("sub"), "/etc/app/sub.conf", true);
    let one = pod.start(&one)?;
    let two = pod.start(&mount(pod.member(IDLE), &empty, "/read/only", true))?;
    one.sh("echo by one >/cache/word; echo last words >/dev/termination-log; echo 10.0.0.1 x >>/etc/hosts")?;
    two.says("cat /read/only/word", "by one")?;
    two.says("touch /read/only/x 2>/dev/null || echo no", "no")?;
    one.says("cat /etc/app/sub.conf", "sub of the host")?;
    one.says("echo x 2>/dev/null >/etc/app/sub.conf || echo no", "no")?;
    fs::write(files.join("sub"), "changed\n")?;
    eventually("the single file follows", world.patience(), || {
        Ok(one.sh("cat /etc/app/sub.conf")? == "changed")
    })?;
    same(&fs::read_to_string(files.join("log"))?.as_str(), &"last words\n")?;
    same(&fs::read_to_string(files.join("hosts"))?.as_str(), &"hosts of the host\n10.0.0.1 x\n")?;
    fs::write(empty.join("word"), "by the host\n")?;
    eventually("what the host writes", world.patience(), || Ok(one.sh("cat /cache/word")? == "by the host"))?;
    two.says("rm /read/only/word 2>/dev/null || echo no", "no")?;
    one.sh("rm /cache/word")?;
    one.remove()?;
    two.remove()?;
    ensure!(fs::read_dir(&empty)?.next().is_none(), "something is left in the volume");
    Ok(())
}

fn security(cri: &mut Cri) -> Result<()> {
    let pod = &cri.shared()?.pod;
    let context = "/linux/security_context";
    let set = |config: Config, name: &str, value: Value| config.set(&format!("{context}/{name}"), value);
    let strict = set(pod.member(IDLE), "run_as_user", json!({ "value": 1000 }));
    let strict = set(strict, "run_as_group", json!({ "value": 2000 }));
    let strict = set(strict, "supplemental_groups", json!([3000, 3001]));
    let strict = set(strict, "readonly_rootfs", json!(true));
    let strict = set(strict, "no_new_privs", json!(true));
    let strict = set(
        strict,
        "capabilities",
        json!({ "drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"] }),
    );
    let member = pod.start(&strict)?;
    member.says("id -u; id -g; id -G", "1000\n2000\n2000 3000 3001")?;
    let status = "grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/1/status | tr -s '\\t ' ' '";
    member.says(status, "CapBnd: 0000000000000400\nNoNewPrivs: 1\nSeccomp: 2")?;
    member.says("echo x 2>/dev/null >/x || echo no", "no")?;
    member.says("unshare -U true 2>/dev/null || echo no", "no")?;
    member.says("echo x 2>/dev/null >/proc/sys/kernel/panic || echo no", "no")?;
    member.says("ls -A /sys/firmware | wc -l", "0")?;
    member.remove()?;
    let loose = set(pod.member(IDLE), "seccomp", json!({ "profile_type": 1 }));
    let member = pod.start(&loose)?;
    member.says("grep Seccomp: /proc/1/status | tr -s '\\t ' ' '; id -u", "Seccomp: 0\n0")?;
    member.remove()
}

fn privileged(cri: &mut Cri) -> Result<()> {
    let (world, is_vm) = (cri.world, cri.is_vm());
    let place = "/linux/security_context/privileged";
    let pod = Pod::run(cri, Pod::config(world)?.set(place, json!(true)))?;
    let member = pod.start(&pod.member(IDLE).set(place, json!(true)))?;
    member.says(
        "mkdir -p /mnt; mount -t tmpfs x /mnt && echo y >/mnt/y && umount /mnt && ls /mnt | wc -l",
        "0",
    )?;
    member.says("grep Seccomp: /proc/1/status | tr -s '\\t ' ' '", "Seccomp: 0")?;
    if is_vm {
        let before = fs::read_to_string("/proc/sys/kernel/panic")?;
        member.says("echo 77 >/proc/sys/kernel/panic; cat /proc/sys/kernel/panic", "77")?;
        same(&fs::read_to_string("/proc/sys/kernel/panic")?, &before)?;
        member.says("ls /dev/kvm /dev/vda 2>/dev/null | wc -l", "0")?;
    }
    pod.remove()
}
