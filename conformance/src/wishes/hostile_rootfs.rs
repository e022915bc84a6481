//! Root file systems laid as traps: whatever `create`, the mounts and `exec` meet there, nothing outside changes.
//!
//! The canary is a tree beside the bundle: its listing with modes, owners, times and contents has to stay the same, to
//! the nanosecond. A trap may make the runtime refuse, in one line, or run; it may not make it hang or crash.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::world::{World, make_fifo, remove_tree};

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Local, "hostile-rootfs/no-trap-reaches-outside", every_trap),
        wish(At::Local, "hostile-rootfs/procfs-and-sysfs-go-on-ordinary-directories-alone", ordinary),
        wish(At::Local, "hostile-rootfs/destinations-that-mean-harm", destinations),
        wish(At::Local, "hostile-rootfs/a-directory-and-a-link-that-change-places", exchange),
        wish(At::Both, "hostile-rootfs/every-trap-at-once-in-one-container", at_once),
    ]
}

/// A tree that must not change.
struct Canary {
    dir: PathBuf,
    before: String,
}

impl Canary {
    fn new(world: &World) -> Result<Self> {
        let dir = world.make_dir("canary")?;
        for name in ["dir", "dir/deep", "dev", "proc", "etc"] {
            fs::create_dir(dir.join(name))?;
        }
        for name in ["file", "dir/file", "etc/passwd", "etc/hosts"] {
            fs::write(dir.join(name), "canary\n")?;
        }
        let before = listing(&dir)?;
        Ok(Canary { dir, before })
    }

    fn is_unharmed(&self) -> Result<()> {
        same(&listing(&self.dir)?, &self.before)?;
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!table.contains(&*self.dir.to_string_lossy()), "something is mounted in it");
        Ok(())
    }

    /// Its name relative to any directory.
    fn upwards(&self, name: &str) -> PathBuf {
        let there = self.dir.join(name);
        Path::new("../../../../../../../../../../..").join(there.strip_prefix("/").unwrap_or(&there))
    }
}

fn listing(dir: &Path) -> Result<String> {
    let mut command = Command::new("find");
    command.arg(dir).args(["-printf", "%p %y %m %U:%G %n %s %T@ %C@ %l\n"]);
    Ok(process::run(command, b"", Duration::from_secs(30))?.code(0)?.text())
}

/// A root file system and a configuration that walks into it.
type Trap = (&'static str, fn(&Path, &Canary) -> Result<()>, fn(Config, &Path) -> Config);

/// Puts a link in the place of whatever is there.
fn link(rootfs: &Path, name: &str, target: impl AsRef<Path>) -> Result<()> {
    let place = rootfs.join(name);
    match fs::symlink_metadata(&place) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(&place)?,
        Ok(_) => fs::remove_file(&place)?,
        Err(_) => {}
    }
    symlink(target, &place).with_context(|| format!("{}", place.display()))
}

fn node(path: &Path, kind: &str, numbers: &[&str]) -> Result<()> {
    let _ = fs::remove_file(path);
    let mut make = Command::new("mknod");
    make.arg(path).arg(kind).args(numbers);
    process::run(make, b"", Duration::from_secs(10))?.code(0).map(drop)
}

fn as_it_is(config: Config, _: &Path) -> Config {
    config
}

fn binds(config: Config, host: &Path) -> Config {
    config
        .bind(host, "/data", &[])
        .bind(&host.join("word"), "/etc/hosts", &[])
        .mount("/scratch", "tmpfs", "tmpfs", &["tmpcopyup"])
        .mount("/deep/er", "tmpfs", "tmpfs", &[])
}

fn hides(config: Config, _: &Path) -> Config {
    config
        .set("/linux/maskedPaths", json!(["/etc", "/data", "/proc/kcore", "/data/file", "/loop"]))
        .set("/linux/readonlyPaths", json!(["/proc/sys", "/fixed", "/fixed/dir"]))
}

fn works_in(config: Config, _: &Path) -> Config {
    config.set("/process/cwd", json!("/place/new/dir"))
}

const TRAPS: &[Trap] = &[
    ("proc is a link outside", |r, c| link(r, "proc", c.dir.join("proc")), as_it_is),
    ("proc leads upwards", |r, c| link(r, "proc", c.upwards("proc")), as_it_is),
    ("dev is a link outside", |r, c| link(r, "dev", c.dir.join("dev")), as_it_is),
    ("dev leads upwards", |r, c| link(r, "dev", c.upwards("dev")), as_it_is),
    ("sys is a link to proc", |r, _| link(r, "sys", "/proc"), as_it_is),
    (
        "dev, proc and sys are one place",
        |r, _| {
            link(r, "dev", "/etc")?;
            link(r, "proc", "/etc")?;
            link(r, "sys", "etc")
        },
        as_it_is,
    ),
    (
        "proc is a file",
        |r, _| {
            fs::remove_dir_all(r.join("proc"))?;
            Ok(fs::write(r.join("proc"), "")?)
        },
        as_it_is,
    ),
    ("etc is a link outside", |r, c| link(r, "etc", c.dir.join("etc")), binds),
    ("hosts is a link outside", |r, c| link(r, "etc/hosts", c.dir.join("etc/hosts")), binds),
    ("hosts leads upwards", |r, c| link(r, "etc/hosts", c.upwards("etc/hosts")), binds),
    ("a bind's place is a link outside", |r, c| link(r, "data", &c.dir), binds),
    ("a bind's place is a link to nothing outside", |r, c| link(r, "data", c.upwards("new/dir")), binds),
    ("a tmpfs's place is a link outside", |r, c| link(r, "scratch", c.dir.join("dir")), binds),
    (
        "what is copied up links outside",
        |r, c| {
            fs::create_dir(r.join("scratch"))?;
            link(r, "scratch/absolute", c.dir.join("file"))?;
            link(r, "scratch/upwards", c.upwards("dir"))
        },
        binds,
    ),
    (
        "what is copied up is special",
        |r, _| {
            fs::create_dir(r.join("scratch"))?;
            make_fifo(&r.join("scratch/fifo"))?;
            node(&r.join("scratch/zero"), "c", &["1", "5"])
        },
        binds,
    ),
    ("a parent is a link outside", |r, c| link(r, "deep", c.dir.join("dir")), binds),
    ("a parent is a magic link", |r, _| link(r, "deep", "/proc/self/root/tmp"), binds),
    ("a place is a magic link", |r, _| link(r, "data", "/proc/self/cwd"), binds),
    ("a file's place is a magic link", |r, _| link(r, "etc/hosts", "/proc/self/exe"), binds),
    ("a file's place is a descriptor", |r, _| link(r, "etc/hosts", "/proc/self/fd/3"), binds),
    (
        "a loop",
        |r, _| {
            link(r, "data", "loop")?;
            link(r, "loop", "data")
        },
        binds,
    ),
    ("a link to itself below itself", |r, _| link(r, "deep", "deep/er"), binds),
    (
        "a FIFO for a file's place",
        |r, _| {
            let _ = fs::remove_file(r.join("etc/hosts"));
            make_fifo(&r.join("etc/hosts"))
        },
        binds,
    ),
    ("a FIFO for a directory's place", |r, _| make_fifo(&r.join("data")), binds),
    ("a device for a file's place", |r, _| node(&r.join("etc/hosts"), "c", &["1", "5"]), binds),
    ("a disk for a directory's place", |r, _| node(&r.join("scratch"), "b", &["7", "0"]), binds),
    (
        "masked paths are links outside",
        |r, c| {
            link(r, "etc", &c.dir)?;
            link(r, "data", c.upwards("dir"))
        },
        hides,
    ),
    ("fixed paths are links outside", |r, c| link(r, "fixed", &c.dir), hides),
    ("a masked path is a loop", |r, _| link(r, "loop", "loop"), hides),
    ("the working directory is a link outside", |r, c| link(r, "place", &c.dir), works_in),
    ("the working directory leads upwards", |r, c| link(r, "place", c.upwards("dir")), works_in),
    ("the working directory is a magic link", |r, _| link(r, "place", "/proc/1/root"), works_in),
    (
        "passwd is a FIFO",
        |r, _| {
            fs::remove_file(r.join("etc/passwd"))?;
            make_fifo(&r.join("etc/passwd"))
        },
        as_it_is,
    ),
    (
        "passwd and group are links outside",
        |r, c| {
            link(r, "etc/passwd", c.dir.join("etc/passwd"))?;
            link(r, "etc/group", c.upwards("etc/passwd"))
        },
        as_it_is,
    ),
    ("passwd is a device", |r, _| node(&r.join("etc/passwd"), "c", &["1", "5"]), as_it_is),
    ("the program is a link outside", |r, c| link(r, "bin/sh", c.dir.join("file")), as_it_is),
    (
        "the program is a FIFO",
        |r, _| {
            fs::remove_file(r.join("bin/sh"))?;
            make_fifo(&r.join("bin/sh"))
        },
        as_it_is,
    ),
];

fn every_trap(world: &'static World) -> Result<()> {
    let host = host_dir(world)?;
    let mut failed = Vec::new();
    for (name, prepare, change) in TRAPS {
        let spring = || {
            let canary = Canary::new(world)?;
            let bundle = world.own_bundle(&change(Config::sh("true"), &host))?;
            prepare(&bundle.join("rootfs"), &canary)?;
            ran_or_refused(world, &bundle)?;
            canary.is_unharmed()?;
            remove_tree(&bundle)
        };
        failed.extend(spring().err().map(|error| format!("{name}: {error:#}")));
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

fn host_dir(world: &World) -> Result<PathBuf> {
    let host = world.make_dir("host")?;
    fs::write(host.join("word"), "from host\n")?;
    Ok(host)
}

/// It ran, or was refused in one line; status 1 is the runtime's.
fn ran_or_refused(world: &'static World, bundle: &Path) -> Result<()> {
    let output = world.run(bundle, b"")?;
    match output.code {
        0 => Ok(()),
        1 => output.one_line(&[]).map(drop),
        other => bail!("ended with {other}: {:?}", output.stderr),
    }
}

/// What is hidden below them must be found below them, whoever changes the link.
fn ordinary(world: &'static World) -> Result<()> {
    for place in ["proc", "sys"] {
        let bundle = world.own_bundle(&Config::sh("true"))?;
        link(&bundle.join("rootfs"), place, "/tmp")?;
        let words = format!("mount /{place}");
        world.run(&bundle, b"")?.code(1)?.one_line(&[&words, "must be mounted on ordinary directory"])?;
    }
    Ok(())
}

/// Destinations of config.json's that no engine would write, on a root file system that is none of the worst.
fn destinations(world: &'static World) -> Result<()> {
    let (canary, host) = (Canary::new(world)?, host_dir(world)?);
    let deep = "/d".repeat(150);
    let long = format!("/{}", "n".repeat(255));
    for (destination, runs) in [
        (canary.upwards("dir").to_string_lossy().as_ref(), true),
        (&format!("/../..{}", canary.dir.display()), true),
        ("/proc/self/root/tmp", false),
        ("/proc/1/root/tmp", false),
        ("/proc/self/cwd", false),
        ("/proc/no-such-place", false),
        ("/sys/no-such-place", false),
        ("/etc/hostname/below-a-file", false),
        (&format!("{long}n"), false),
        (&long, true),
        (&deep, true),
        ("/with blank/and\\backslash/and\ttab\nand line", true),
        ("//double//slashes///", true),
    ] {
        let bundle = world.own_bundle(&Config::sh("true").bind(&host, destination, &[]))?;
        let output = world.run(&bundle, b"")?;
        let shown = || format!("{destination:?}: {} {:?}", output.code, output.stderr);
        ensure!((output.code == 0) == runs && (runs || output.code == 1), "{}", shown());
        canary.is_unharmed().with_context(shown)?;
        remove_tree(&bundle)?;
    }
    Ok(())
}

/// What engines cannot rule out: another container with the same volume, changing it while this one is created.
fn exchange(world: &'static World) -> Result<()> {
    let (canary, host) = (Canary::new(world)?, host_dir(world)?);
    let config = Config::sh("true")
        .bind(&host, "/swap/new/dir", &[])
        .bind(&host.join("word"), "/swap/file", &[])
        .mount("/swap/tmp", "tmpfs", "tmpfs", &["tmpcopyup"])
        .set("/linux/maskedPaths", json!(["/swap/deep"]))
        .set("/process/cwd", json!("/swap/cwd"));
    let bundle = world.own_bundle(&config)?;
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(rootfs.join("swap/deep"))?;
    symlink(canary.dir.join("dir"), rootfs.join("trap"))?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let (a, b) = (rootfs.join("swap"), rootfs.join("trap"));
                let _ = renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE);
            }
        });
        let rounds = world.by_level(30, 1, 200);
        let result = (0..rounds).try_for_each(|_| ran_or_refused(world, &bundle));
        done.store(true, Ordering::Relaxed);
        result
    })?;
    canary.is_unharmed()
}

/// One container for the level where they are dear: created, started, entered by `exec` and left.
fn at_once(world: &'static World) -> Result<()> {
    let (canary, host) = (Canary::new(world)?, host_dir(world)?);
    let config = binds(Config::idle(), &host)
        .set("/linux/maskedPaths", json!(["/mask", "/proc/kcore"]))
        .set("/linux/readonlyPaths", json!(["/fixed", "/proc/sys"]));
    let bundle = world.own_bundle(&config)?;
    let rootfs = bundle.join("rootfs");
    for (name, target) in [
        ("dev", canary.upwards("dev")),
        ("etc/hosts", canary.dir.join("etc/hosts")),
        ("data", canary.upwards("new/dir")),
        ("scratch", canary.dir.join("dir")),
        ("deep", canary.upwards("dir")),
        ("mask", canary.dir.join("proc")),
        ("fixed", canary.dir.join("dir")),
        ("place", canary.dir.join("dir")),
        ("bin/outside", canary.dir.join("file")),
        ("bin/magic", "/proc/1/root/bin/busybox".into()),
    ] {
        link(&rootfs, name, target)?;
    }
    make_fifo(&rootfs.join("bin/fifo"))?;
    fs::remove_file(rootfs.join("etc/passwd"))?;
    make_fifo(&rootfs.join("etc/passwd"))?;
    let mut container = Container::of_bundle(world, bundle)?;
    container.start()?;
    container.says("cat /data/word /etc/hosts; pwd", "from host\nfrom host\n/")?;
    // What the links name exists now, inside; the guest's own root is read-only and out of sight.
    container.says(
        &format!(
            "ls {0}/new/dir; ls /export /c0 /init.krun 2>/dev/null | wc -l; cat {0}/file 2>/dev/null | wc -l",
            canary.dir.display()
        ),
        "word\n0\n0",
    )?;
    for program in ["/bin/outside", "/bin/fifo", "/etc", "/dev/null", "/bin/no-such"] {
        container.exec(&[program])?.code(255)?.one_line(&[program])?;
    }
    for cwd in ["/place", "/mask", "/bin/magic", "/proc/1/root/tmp"] {
        let command = world.command(&["exec", "--cwd", cwd, &container.id, "pwd"]);
        let output = process::run(command, b"", world.patience())?;
        ensure!(output.code == 0 || output.code == 255, "{cwd}: {} {:?}", output.code, output.stderr);
    }
    container.expect_status("running")?;
    container.says("echo well", "well")?;
    container.delete(&["--force"])?;
    canary.is_unharmed()
}
