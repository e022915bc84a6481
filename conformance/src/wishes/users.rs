//! User namespaces: who is who inside, on disk, and on the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::jail::vmm;
use super::run::same;
use super::sockets::{CONNECT, with_perl};
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Vm, "users/ids-are-mapped-once", mapped),
        wish(At::Vm, "users/sockets-of-the-host-see-mapped-ids", sockets),
        wish(At::Both, "users/mappings-that-cannot-be-are-refused", refused),
    ]
}

const FIRST: u32 = 100_000;
const COUNT: u32 = 65_536;

/// With a user namespace whose ids are `FIRST` and up outside.
pub fn with_users(config: Config) -> Config {
    let map = json!([{ "containerID": 0, "hostID": FIRST, "size": COUNT }]);
    config
        .set("/linux/namespaces/-", json!({ "type": "user" }))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map)
}

/// Gives a tree to the user namespace of [`with_users`].
pub fn shift(path: &Path) -> Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    let (uid, gid) = (metadata.uid() + FIRST, metadata.gid() + FIRST);
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))?;
    if metadata.is_dir() {
        fs::read_dir(path)?.flatten().try_for_each(|entry| shift(&entry.path()))?;
    }
    Ok(())
}

/// A client's ids are the container's there, the host's here; and the host decides by those.
fn sockets(world: &'static World) -> Result<()> {
    let dir = world.make_dir("sockets")?;
    let open = |name: &str, owner: u32, mode: u32| -> Result<UnixListener> {
        let listener = UnixListener::bind(dir.join(name))?;
        std::os::unix::fs::chown(dir.join(name), Some(owner), Some(owner))?;
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode))?;
        Ok(listener)
    };
    let all = open("all", 0, 0o666)?;
    let _mapped = open("mapped", FIRST + 1000, 0o600)?;
    let _roots = open("roots", 0, 0o600)?;
    let config = with_users(with_perl(Config::idle())).bind(&dir, "/sockets", &[]);
    let bundle = world.own_bundle(&config)?;
    shift(&bundle.join("rootfs"))?;
    let container = Container::of_bundle(world, bundle)?;
    container.start()?;
    let connect = |user: &str, name: &str| -> Result<String> {
        let args = ["--user", user, &container.id, "perl", "-e", CONNECT, &format!("/sockets/{name}")];
        let exec = world.command(&[&["exec"], &args[..]].concat());
        Ok(process::run(exec, b"", world.patience())?.stderr.trim_end().to_string())
    };
    same(&connect("1000:1001", "all")?.as_str(), &"")?;
    let who = rustix::net::sockopt::socket_peercred(&all.accept()?.0)?;
    same(&(who.uid.as_raw(), who.gid.as_raw()), &(FIRST + 1000, FIRST + 1001))?;
    same(&connect("1000:1001", "mapped")?.as_str(), &"")?;
    same(&connect("1001:1001", "mapped")?.as_str(), &"Permission denied")?;
    same(&connect("0:0", "roots")?.as_str(), &"Permission denied")
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let metadata = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    Ok((metadata.uid(), metadata.gid()))
}

fn mapped(world: &'static World) -> Result<()> {
    let host = world.make_dir("host")?;
    let config = with_users(Config::idle())
        .set(
            "/process/capabilities/bounding",
            json!(["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_NET_ADMIN"]),
        )
        .set(
            "/process/capabilities/permitted",
            json!(["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_NET_ADMIN"]),
        )
        .set(
            "/process/capabilities/effective",
            json!(["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_NET_ADMIN"]),
        )
        .bind(&host, "/new/place", &[]);
    let bundle = world.own_bundle(&config)?;
    let rootfs = bundle.join("rootfs");
    shift(&rootfs)?;
    let container = Container::of_bundle(world, bundle)?;
    container.start()?;
    inside(&container)?;
    same(&owner(&rootfs.join("made"))?, &(FIRST, FIRST))?;
    same(&owner(&rootfs.join("given"))?, &(FIRST + 5, FIRST + 6))?;
    same(&owner(&rootfs.join("new"))?, &(FIRST, FIRST)).context("a mount point")?;
    let output = container.exec(&["--user", "1000:1001", "sh", "-c", "id -u; touch /tmp/users"]);
    same(&output?.code(0)?.text(), &"1000\n".to_string())?;
    same(&owner(&rootfs.join("tmp/users"))?, &(FIRST + 1000, FIRST + 1001))?;
    outside(&container)?;
    // Another container may live in the same namespace.
    let path = format!("/proc/{}/ns/user", container.pid);
    let joining = Config::idle().set("/linux/namespaces/-", json!({ "type": "user", "path": path }));
    let second = Container::running(world, &joining)?;
    second.says("tr -s ' ' </proc/self/uid_map", &format!(" 0 0 {COUNT}"))?;
    let users = |container: &Container| fs::read_link(format!("/proc/{}/ns/user", container.pid));
    same(&users(&second)?, &users(&container)?)
}

fn inside(container: &Container) -> Result<()> {
    let map = format!(" 0 0 {COUNT}");
    container
        .says("tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map", &format!("{map}\n{map}"))?;
    container.says("id -u; stat -c %u:%g / /bin/busybox", "0\n0:0\n0:0")?;
    container.says("touch /made /given && chown 5:6 /given && stat -c %u:%g /given", "5:6")?;
    // What belongs to the user namespace obeys its root, what belongs to the guest does not.
    container.says("ip link set lo down && ip link set lo up && echo mine", "mine")?;
    container.says("echo 1 2>/dev/null >/proc/sys/kernel/sysrq || echo not mine", "not mine")?;
    container.says(
        "head -c 1 /dev/zero | wc -c; echo x >/dev/null; test -w /dev/full && echo devices",
        "1\ndevices",
    )
}

fn outside(container: &Container) -> Result<()> {
    let own = fs::read_link("/proc/self/ns/user")?;
    for pid in [container.pid, vmm(container)?] {
        let map = fs::read_to_string(format!("/proc/{pid}/uid_map"))?;
        same(&map.split_whitespace().collect::<Vec<_>>(), &vec!["0", "100000", "65536"])?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let ids = format!("\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}");
        for name in ["Uid:", "Gid:"] {
            ensure!(status.contains(&format!("{name}{ids}")), "{pid} is somebody on the host: {status}");
        }
        let theirs = fs::read_link(format!("/proc/{pid}/ns/user"))?;
        ensure!(theirs != own, "{pid} has the host's capabilities");
    }
    // Its network namespace belongs to it.
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["--user", "--net", "-t", &container.pid.to_string(), "ip", "link", "set", "lo", "up"]);
    process::run(nsenter, b"", container.world.patience())?.code(0).map(drop)
}

fn refused(world: &'static World) -> Result<()> {
    let map = |inside: u32, count: u32| json!([{ "containerID": inside, "hostID": FIRST, "size": count }]);
    let user = Config::idle().set("/linux/namespaces/-", json!({ "type": "user" }));
    for (config, words) in [
        (user.clone(), vec!["linux.uidMappings", "none"]),
        (user.clone().set("/linux/uidMappings", map(0, 10)), vec!["linux.gidMappings", "none"]),
        (
            Config::idle().set("/linux/uidMappings", map(0, 10)),
            vec!["linux.uidMappings", "without a user namespace"],
        ),
        (
            user.clone().set("/linux/uidMappings", map(1, 10)).set("/linux/gidMappings", map(0, 10)),
            vec!["user namespace", "id 0 is not mapped"],
        ),
        (
            Config::idle().set("/linux/namespaces/-", json!({ "type": "user", "path": "/no/such/ns" })),
            vec!["/no/such/ns", "no such file"],
        ),
    ] {
        let bundle = world.bundle(&config)?;
        world.refused(&["create", "--bundle", &bundle.to_string_lossy(), &world.name("c")], &words)?;
    }
    Ok(())
}
