//! Options of mounts, each seen by its effect and in the container's mount table.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::{Config, mount};
use crate::container::Container;
use crate::process;
use crate::world::World;

/// Mounts of the host's own, gone when dropped.
#[derive(Default)]
pub struct HostMounts(Vec<PathBuf>);

impl HostMounts {
    /// Takes away at the end what somebody else mounts there.
    pub fn expect(&mut self, place: &Path) {
        self.0.push(place.to_path_buf());
    }

    /// Mounts once more.
    pub fn add(&mut self, args: &[&str], place: &Path) -> Result<()> {
        let mut command = Command::new("mount");
        command.args(args).arg(place);
        process::run(command, b"", std::time::Duration::from_secs(10))?.code(0)?;
        self.0.push(place.to_path_buf());
        Ok(())
    }
}

impl Drop for HostMounts {
    fn drop(&mut self) {
        for place in self.0.iter().rev() {
            let _ = Command::new("umount").arg("-l").arg(place).status();
        }
    }
}

/// A container with a mount for each option. `host` has a tmpfs at `sub`, mounted `noexec`.
struct Mounts {
    container: Container,
    host: PathBuf,
    shm: PathBuf,
    _mounts: HostMounts,
}

impl Mounts {
    fn set_up(world: &'static World) -> Result<Self> {
        let (host, shm) = (world.make_dir("host")?, world.make_dir("shm")?);
        let mut mounts = HostMounts::default();
        for dir in ["sub", "owned"] {
            fs::create_dir(host.join(dir))?;
        }
        mounts.add(&["-t", "tmpfs", "-o", "noexec", "tmpfs"], &host.join("sub"))?;
        mounts.add(&["-t", "tmpfs", "-o", "size=3m", "shm"], &shm)?;
        for place in ["word", "sub/word"] {
            fs::write(host.join(place), "from host\n")?;
        }
        symlink("word", host.join("link"))?;
        fs::write(host.join("owned/file"), "x")?;
        std::os::unix::fs::chown(host.join("owned/file"), Some(5), Some(6))?;
        std::os::unix::fs::chown(host.join("owned"), Some(5000), Some(5000))?;
        let bundle = world.own_bundle(&config(&host, &shm))?;
        furnish(&bundle.join("rootfs"))?;
        let container = Container::of_bundle(world, bundle)?;
        container.start()?;
        Ok(Mounts { container, host, shm, _mounts: mounts })
    }

    /// Per-mount options of the topmost mount at a place.
    fn options(&self, place: &str) -> Result<Vec<String>> {
        let table = self.container.sh("cat /proc/self/mountinfo")?;
        let line = table.lines().rev().find(|line| line.split(' ').nth(4) == Some(place));
        let line = line.with_context(|| format!("no mount at {place} in {table}"))?;
        Ok(line.split([' ', ',']).map(str::to_string).collect())
    }

    fn has(&self, place: &str, wanted: &[&str], unwanted: &[&str]) -> Result<()> {
        let options = self.options(place)?;
        for (names, there) in [(wanted, true), (unwanted, false)] {
            for name in names {
                ensure!(options.iter().any(|o| o == name) == there, "{place}: {name}: {options:?}");
            }
        }
        Ok(())
    }

    /// A script fails with these words.
    fn fails(&self, script: &str, words: &str) -> Result<()> {
        let output = self.container.exec(&["sh", "-c", script])?;
        ensure!(
            output.code != 0 && output.stderr.contains(words),
            "{script}: {} {:?}",
            output.code,
            output.stderr
        );
        Ok(())
    }
}

fn config(host: &Path, shm: &Path) -> Config {
    let host_text = host.to_string_lossy();
    let bind =
        |config: Config, place: &str, options: &[&str]| config.mount(place, "none", &host_text, options);
    let below = host.join("sub");
    let ids = json!([{ "containerID": 0, "hostID": 1000, "size": 100 }, { "containerID": 5000, "hostID": 0, "size": 1 }]);
    let mut mapped = mount("/mapped", "bind", &host.join("owned").to_string_lossy(), &["bind"]);
    (mapped["uidMappings"], mapped["gidMappings"]) = (ids.clone(), ids);
    let everything = ["rbind", "rnosuid", "rnodev", "rnoexec", "rnosymfollow", "rnoatime", "rnodiratime"];
    let config = bind(Config::idle(), "/ro", &["rbind", "ro"]);
    let config = bind(config, "/rro", &["rbind", "rro"]);
    let config = bind(config, "/r-all", &everything);
    let config = bind(config, "/rrw", &["rbind", "ro", "rrw"]);
    let config =
        bind(config, "/nosymfollow", &["bind", "nosymfollow", "sync", "silent", "iversion", "defaults"]);
    let config = bind(config, "/remounted", &["rbind"]);
    let config = bind(config, "/remounted", &["bind", "remount", "ro", "nosuid"]);
    config
        .mount("/kept", "bind", &below.to_string_lossy(), &["bind"])
        .mount("/cleared", "bind", &below.to_string_lossy(), &["bind", "exec"])
        .mount(
            "/flags",
            "tmpfs",
            "tmpfs",
            &["lazytime", "dirsync", "sync", "loud", "noiversion", "nomand", "ro"],
        )
        .mount("/async", "tmpfs", "tmpfs", &["sync", "async"])
        .mount("/copied", "tmpfs", "tmpfs", &["rw", "rprivate", "nosuid", "nodev", "tmpcopyup"])
        .mount("/moded", "tmpfs", "tmpfs", &["size=1m"])
        .mount("/brand-new", "tmpfs", "tmpfs", &[])
        .mount("/belongs", "tmpfs", "tmpfs", &["uid=7", "gid=8", "mode=750"])
        .mount("/sized", "tmpfs", "tmpfs", &["size=1m"])
        .mount("/sized", "tmpfs", "tmpfs", &["remount", "size=2m", "noexec"])
        .mount("/unbindable", "tmpfs", "tmpfs", &["unbindable"])
        .mount("/slave", "tmpfs", "tmpfs", &["rslave"])
        .mount("/dev/shm", "bind", &shm.to_string_lossy(), &["bind", "rprivate", "nosuid", "noexec", "nodev"])
        .mount("/nodes/null", "bind", "/dev/null", &["bind", "nosuid", "noexec"])
        .mount("/nodes/random", "bind", "/dev/urandom", &["bind"])
        .set("/mounts/-", mapped)
        .set("/linux/rootfsPropagation", json!("unbindable"))
}

fn furnish(rootfs: &Path) -> Result<()> {
    fs::create_dir_all(rootfs.join("copied/deep"))?;
    fs::write(rootfs.join("copied/deep/word"), "of the image\n")?;
    std::os::unix::fs::chown(rootfs.join("copied/deep/word"), Some(12), Some(34))?;
    fs::set_permissions(rootfs.join("copied/deep/word"), fs::Permissions::from_mode(0o4754))?;
    symlink("/no/such", rootfs.join("copied/link"))?;
    fs::create_dir(rootfs.join("moded"))?;
    fs::set_permissions(rootfs.join("moded"), fs::Permissions::from_mode(0o2711))?;
    Ok(())
}

const WISHES: &[Wish<Mounts>] = &[
    ("mount-options/ro-leaves-mounts-below-as-they-are", |m| {
        m.fails("echo x >/ro/new", "Read-only")?;
        m.container.says("echo x >/ro/sub/new && cat /ro/sub/new", "x")?;
        same(&fs::read_to_string(m.host.join("sub/new"))?, &"x\n".into())?;
        m.has("/ro", &["ro"], &[])
    }),
    ("mount-options/rro-holds-for-mounts-below", |m| {
        for script in
            ["echo x >/rro/new", "echo x >/rro/sub/new", "echo x >/rro/sub/word", "rm /rro/sub/word"]
        {
            m.fails(script, "Read-only")?;
        }
        m.has("/rro", &["ro"], &[])?;
        m.has("/rro/sub", &["ro"], &[])?;
        let root = PathBuf::from(format!("/proc/{}/root/rro/sub/new", m.container.pid));
        ensure!(fs::write(root, "x").is_err(), "the host would let it be written");
        m.container.says("echo x >/rrw/word-2 && rm /rrw/word-2 && echo done", "done")
    }),
    ("mount-options/recursive-attributes-hold-for-mounts-below", |m| {
        let all = ["nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow"];
        m.has("/r-all", &all, &["ro"])?;
        m.container.says("ls /r-all/sub/word", "/r-all/sub/word")?;
        m.has("/r-all/sub", &all, &["ro"])
    }),
    ("mount-options/nosymfollow-follows-no-link", |m| {
        m.has("/nosymfollow", &["nosymfollow"], &[])?;
        m.container.says("readlink /nosymfollow/link; cat /nosymfollow/word", "word\nfrom host")?;
        m.fails("cat /nosymfollow/link", "symbolic links")
    }),
    ("mount-options/a-bind-keeps-the-sources-flags-unless-cleared", |m| {
        m.has("/kept", &["noexec"], &[])?;
        m.has("/cleared", &[], &["noexec"])?;
        m.has("/rro/sub", &["noexec"], &[])
    }),
    ("mount-options/flags-of-file-systems", |m| {
        m.has("/flags", &["lazytime", "dirsync", "sync", "ro"], &["mand"])?;
        m.has("/async", &["rw"], &["sync"])?;
        m.fails("echo x >/flags/new", "Read-only")
    }),
    ("mount-options/tmpcopyup-begins-with-what-is-there", |m| {
        m.container.says(
            "cd /copied; stat -c '%a %u %g' deep/word; cat deep/word; readlink link; rm deep/word; ls | wc -l",
            "4754 12 34\nof the image\n/no/such\n2",
        )?;
        m.has("/copied", &["tmpfs", "nosuid", "nodev"], &[])?;
        let original = m.container.bundle.join("rootfs/copied/deep/word");
        same(&fs::read_to_string(original)?, &"of the image\n".into())
    }),
    ("mount-options/a-tmpfs-takes-the-mode-of-what-it-hides", |m| {
        m.container.says("stat -c %a /moded /brand-new /copied", "2711\n1777\n755")
    }),
    ("mount-options/a-tmpfs-belongs-to-whom-it-should", |m| {
        m.container.says("stat -c '%u:%g %a' /belongs", "7:8 750")
    }),
    ("mount-options/propagation-stays-inside", |m| {
        m.has("/unbindable", &["unbindable"], &[])?;
        m.has("/", &["unbindable"], &[])?;
        let table = m.container.sh("cat /proc/self/mountinfo")?;
        ensure!(!table.contains("shared:") && !table.contains("master:"), "{table}");
        Ok(())
    }),
    ("mount-options/a-remount-changes-what-is-there", |m| {
        m.has("/remounted", &["ro", "nosuid"], &[])?;
        m.fails("echo x >/remounted/new", "Read-only")?;
        m.has("/sized", &["size=2048k", "noexec"], &[])?;
        let count = m.container.sh("grep -c ' /sized ' /proc/self/mountinfo")?;
        same(&count, &"1".into())
    }),
    ("mount-options/shared-memory-is-the-guests-of-the-same-size", |m| {
        m.container.says(
            "stat -c %a /dev/shm; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d ' ' -f 2; echo x >/dev/shm/a; cat /dev/shm/a",
            "1777\n3072\nx",
        )?;
        m.has("/dev/shm", &["tmpfs", "nosuid", "noexec", "nodev"], &[])?;
        same(&fs::read_dir(&m.shm)?.count(), &0)
    }),
    ("mount-options/a-bound-device-is-the-guests", |m| {
        m.container.says(
            "stat -c '%t:%T %F' /nodes/null; echo x >/nodes/null; head -c 3 /nodes/random | wc -c",
            "1:3 character special file\n3",
        )
    }),
    ("mount-options/owners-are-mapped", mapped),
];

fn mapped(m: &mut Mounts) -> Result<()> {
    m.container.says("stat -c '%u %g' /mapped/file", "1005 1006")?;
    m.container.says("echo x >/mapped/mine; stat -c '%u %g' /mapped/mine", "0 0")?;
    let mine = fs::metadata(m.host.join("owned/mine"))?;
    same(&(mine.uid(), mine.gid()), &(5000, 5000))?;
    m.container.says("chown 1007:1008 /mapped/mine; stat -c '%u %g' /mapped/mine", "1007 1008")?;
    let mine = fs::metadata(m.host.join("owned/mine"))?;
    same(&(mine.uid(), mine.gid()), &(7, 8))?;
    // An owner that nobody mapped is nobody.
    std::os::unix::fs::chown(m.host.join("owned/mine"), Some(2000), Some(2000))?;
    fs::rename(m.host.join("owned/mine"), m.host.join("owned/theirs"))?;
    m.container.says("stat -c '%u %g' /mapped/theirs", "65534 65534")
}

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, Mounts::set_up, WISHES),
        wish(At::Vm, "mount-options/a-slave-follows-the-host", slave),
        wish(At::Both, "mount-options/podmans-mounts", podman),
        wish(At::Both, "mount-options/a-kubelets-mounts", kubelet),
        wish(At::Local, "mount-options/what-cannot-be-is-refused-in-words", refused),
    ]
}

fn slave(world: &'static World) -> Result<()> {
    let host = world.make_dir("host")?;
    let mut mounts = HostMounts::default();
    for dir in ["early", "late"] {
        fs::create_dir(host.join(dir))?;
    }
    mounts.add(&["--bind", &host.to_string_lossy()], &host)?;
    process::run(
        {
            let mut c = Command::new("mount");
            c.arg("--make-shared").arg(&host);
            c
        },
        b"",
        world.patience(),
    )?
    .code(0)?;
    let config = Config::idle()
        .mount("/follows", "bind", &host.to_string_lossy(), &["rbind", "rslave"])
        .mount("/stays", "bind", &host.to_string_lossy(), &["rbind", "rprivate"]);
    let container = Container::running(world, &config)?;
    mounts.add(&["-t", "tmpfs", "tmpfs"], &host.join("late"))?;
    fs::write(host.join("late/word"), "late\n")?;
    process::eventually("the guest's sight of the host's mount", world.patience(), || {
        Ok(container.sh("cat /follows/late/word 2>/dev/null || true")? == "late")
    })?;
    container.says("ls /stays/late | wc -l", "0")
}

/// Files that engines bind over those of an image.
fn engine_files(world: &World) -> Result<PathBuf> {
    let dir = world.make_dir("engine")?;
    for name in ["resolv.conf", "hosts", "hostname", "containerenv", "termination-log"] {
        fs::write(dir.join(name), format!("{name}\n"))?;
    }
    for name in ["shm", "volume", "secrets"] {
        fs::create_dir(dir.join(name))?;
        fs::write(dir.join(name).join("word"), format!("{name}\n"))?;
    }
    Ok(dir)
}

fn podman(world: &'static World) -> Result<()> {
    let dir = engine_files(world)?;
    let from = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let plain = ["nosuid", "noexec", "nodev"];
    let mut mounts = HostMounts::default();
    mounts.add(&["-t", "tmpfs", "-o", "size=64000k,mode=1777", "shm"], &dir.join("shm"))?;
    let tmpfs = ["rw", "rprivate", "nosuid", "nodev", "tmpcopyup"];
    let config = Config::sh(
        "cat /etc/resolv.conf /etc/hosts /run/.containerenv /data/word; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d ' ' -f 2; \
         stat -c %a /tmp; echo x >/tmp/a && cat /tmp/a; grep -c ' /sys/fs/cgroup cgroup2 ro' /proc/mounts",
    )
    .set("/root/readonly", json!(true))
    .set(
        "/mounts",
        json!([
            mount("/proc", "proc", "proc", &plain),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &plain),
            mount("/etc/resolv.conf", "bind", &from("resolv.conf"), &["bind", "rprivate"]),
            mount("/etc/hosts", "bind", &from("hosts"), &["bind", "rprivate"]),
            mount("/dev/shm", "bind", &from("shm"), &["bind", "rprivate", "nosuid", "noexec", "nodev"]),
            mount("/run", "tmpfs", "tmpfs", &tmpfs),
            mount("/run/.containerenv", "bind", &from("containerenv"), &["bind", "rprivate"]),
            mount("/tmp", "tmpfs", "tmpfs", &tmpfs),
            mount("/var/tmp", "tmpfs", "tmpfs", &tmpfs),
            mount("/data", "bind", &from("volume"), &["rw", "rprivate", "nosuid", "nodev", "rbind"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["rprivate", "nosuid", "noexec", "nodev", "relatime", "ro"]),
        ]),
    );
    let bundle = world.own_bundle(&config)?;
    fs::set_permissions(bundle.join("rootfs/tmp"), fs::Permissions::from_mode(0o1777))?;
    let output = world.run(&bundle, b"")?.code(0)?.quiet()?;
    same(&output.text(), &"resolv.conf\nhosts\ncontainerenv\nvolume\n64000\n1777\nx\n1\n".into())
}

fn kubelet(world: &'static World) -> Result<()> {
    let dir = engine_files(world)?;
    let from = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let mut mounts = HostMounts::default();
    mounts.add(&["-t", "tmpfs", "-o", "size=64m", "shm"], &dir.join("shm"))?;
    let config = Config::sh(
        "cat /etc/hosts /etc/hostname /var/run/secrets/kubernetes.io/serviceaccount/word /data/word; \
         echo ended >/dev/termination-log; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d ' ' -f 2",
    )
    .mount("/etc/hosts", "bind", &from("hosts"), &["rbind", "rprivate", "rw"])
    .mount("/dev/termination-log", "bind", &from("termination-log"), &["rbind", "rprivate", "rw"])
    .mount("/etc/hostname", "bind", &from("hostname"), &["rbind", "rprivate", "rw"])
    .mount("/dev/shm", "bind", &from("shm"), &["rbind", "rprivate", "rw"])
    .mount(
        "/var/run/secrets/kubernetes.io/serviceaccount",
        "bind",
        &from("secrets"),
        &["rbind", "rprivate", "ro", "rro"],
    )
    .mount("/data", "bind", &from("volume"), &["rbind", "rslave", "rw"]);
    let bundle = world.own_bundle(&config)?;
    fs::create_dir_all(bundle.join("rootfs/var"))?;
    // As in most images; here the link leads to nowhere.
    symlink("/run", bundle.join("rootfs/var/run"))?;
    let output = world.run(&bundle, b"")?.code(0)?.quiet()?;
    same(&output.text(), &"hosts\nhostname\nsecrets\nvolume\n65536\n".into())?;
    same(&fs::read_to_string(dir.join("termination-log"))?, &"ended\n".into())
}

fn refused(world: &'static World) -> Result<()> {
    let fifo = world.make_dir("host")?.join("fifo");
    crate::world::make_fifo(&fifo)?;
    let fifo = fifo.to_string_lossy().into_owned();
    let node = world.make_dir("host")?.join("fuse");
    let mut make = Command::new("mknod");
    make.arg(&node).args(["c", "10", "229"]);
    process::run(make, b"", world.patience())?.code(0)?;
    let node = node.to_string_lossy().into_owned();
    for (kind, source, options, words) in [
        ("bind", fifo.as_str(), &["bind"][..], "a FIFO cannot reach into a VM"),
        ("bind", &node, &["bind"], "the host's device 10:229 cannot reach into a VM"),
        ("bind", "/proc", &["bind", "ro"], "the host's procfs would open"),
        ("bind", "/", &["bind", "shared"], "cannot propagate to the host"),
        ("tmpfs", "tmpfs", &["rshared"], "cannot propagate to the host"),
        ("tmpfs", "tmpfs", &["remount"], "none before is at /x"),
        ("bind", "/", &["bind", "idmap"], "needs uidMappings"),
        ("tmpfs", "tmpfs", &["idmap"], "needs uidMappings"),
        ("bind", "/", &["bind", "tmpcopyup"], "tmpcopyup"),
        ("overlay", "overlay", &["lowerdir=/a"], "\"overlay\" is not supported"),
        ("devtmpfs", "devtmpfs", &[], "\"devtmpfs\" is not supported"),
    ] {
        let bundle = world.bundle(&Config::sh("true").mount("/x", kind, source, options))?;
        world.run(&bundle, b"")?.code(1)?.one_line(&[words])?;
    }
    for word in ["shared", "rshared", "sideways"] {
        let bundle = world.bundle(&Config::sh("true").set("/linux/rootfsPropagation", json!(word)))?;
        world.run(&bundle, b"")?.code(1)?.one_line(&["linux.rootfsPropagation", word])?;
    }
    Ok(())
}
