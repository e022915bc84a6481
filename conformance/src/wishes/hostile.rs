//! Root file systems and workloads that mean harm: nothing outside the container changes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::mounts::list;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::world::{World, make_fifo};

/// Wishes that share a container.
const WISHES: &[Wish<Container>] = &[
    ("hostile/output-cannot-forge-the-runtimes-words", |container| {
        let output = container
            .exec(&["/no/\u{1b}[31mred\nsecond line\u{7}"])?
            .code(255)?
            .one_line(&["no such file"])?;
        let control = output.stderr.trim_end_matches('\n').chars().find(|c| c.is_control());
        ensure!(control.is_none(), "{:?}", output.stderr);
        Ok(())
    }),
    ("hostile/a-process-name-cannot-break-the-table", |container| {
        let script = "cp /bin/busybox '/tmp/e\u{1b}[31m\nvil' && exec '/tmp/e\u{1b}[31m\nvil' sleep 100";
        let _ = container.spawn(&["sh", "-c", script])?;
        std::thread::sleep(Duration::from_millis(300));
        let text = container.world.ok(&["ps", &container.id])?.text();
        ensure!(!text.contains('\u{1b}') && text.lines().all(|line| !line.starts_with("vil")), "{text:?}");
        container.sh("rm -f /tmp/e*").map(drop)
    }),
    ("hostile/the-first-process-cannot-be-killed-from-inside", |container| {
        container.exec(&["sh", "-c", "kill -9 1; kill -STOP 1; sleep 0.1"])?;
        container.expect_status("running")?;
        container.says("echo well", "well")
    }),
    ("hostile/the-host-is-out-of-sight", |container| {
        let world = container.world;
        let path = world.dir.to_string_lossy().into_owned();
        container.says(
            &format!(
                "ls -d {path} /home /boot 2>/dev/null | wc -l; cat /proc/mounts | grep -c {} || true",
                world.tag
            ),
            "0\n0",
        )
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "hostile/links-at-mount-destinations-lead-nowhere", links),
        wish(At::Local, "hostile/every-link-at-every-place", every_link),
        wish(At::Local, "hostile/links-at-masked-paths-and-the-cwd", hidden_links),
        wish(At::Local, "hostile/a-root-file-system-full-of-surprises", surprises),
        wish(At::Local, "hostile/a-link-that-changes-while-it-is-followed", racing_link),
        sharing(At::Both, |world| Container::running(world, &Config::idle()), WISHES),
    ]
}

/// A directory that must stay as it is, and a look at it.
struct Outside {
    dir: PathBuf,
    before: Vec<String>,
}

impl Outside {
    fn new(world: &World) -> Result<Self> {
        let dir = world.make_dir("outside")?;
        fs::create_dir(dir.join("dir"))?;
        fs::write(dir.join("file"), "untouched\n")?;
        let before = list(&dir)?;
        Ok(Outside { dir, before })
    }

    fn is_untouched(&self) -> Result<()> {
        same(&list(&self.dir)?, &self.before)?;
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!table.contains(&*self.dir.to_string_lossy()), "something is mounted there on the host");
        Ok(())
    }

    /// Ways to name it by a link in a root file system.
    fn targets(&self, name: &str) -> Vec<PathBuf> {
        let there = self.dir.join(name);
        let up = Path::new("../../../../../../../../../..").join(there.strip_prefix("/").unwrap_or(&there));
        vec![there.clone(), up, Path::new("/proc/self/root").join(there.strip_prefix("/").unwrap_or(&there))]
    }
}

/// It ran, or was refused in one line; either way nobody was hurt.
fn ran_or_refused(world: &'static World, bundle: &Path) -> Result<bool> {
    let output = world.run(bundle, b"")?;
    match output.code {
        0 => Ok(true),
        1 => output.one_line(&[]).map(|_| false),
        other => bail!("ended with {other}: {:?}", output.stderr),
    }
}

fn links(world: &'static World) -> Result<()> {
    let outside = Outside::new(world)?;
    let host = world.make_dir("host")?;
    fs::write(host.join("word"), "from host\n")?;
    let config = Config::sh("cat /a/word /b/below/word /c 2>&1; true")
        .bind(&host, "/a", &[])
        .bind(&host, "/b/below", &[])
        .bind(&host.join("word"), "/c", &[])
        .mount("/d", "tmpfs", "tmpfs", &[])
        .mount("/e/f", "tmpfs", "tmpfs", &[]);
    let bundle = world.own_bundle(&config)?;
    let rootfs = bundle.join("rootfs");
    symlink(outside.dir.join("dir"), rootfs.join("a"))?;
    symlink(&outside.dir, rootfs.join("b"))?;
    symlink(outside.dir.join("file"), rootfs.join("c"))?;
    symlink(Path::new("../../../..").join(outside.dir.strip_prefix("/")?), rootfs.join("d"))?;
    symlink(outside.dir.join("dir"), rootfs.join("e"))?;
    ran_or_refused(world, &bundle)?;
    outside.is_untouched()
}

fn every_link(world: &'static World) -> Result<()> {
    let outside = Outside::new(world)?;
    let host = world.make_dir("host")?;
    fs::write(host.join("word"), "from host\n")?;
    for place in ["proc", "dev", "sys", "tmp", "data", "data-below", "etc"] {
        for target in outside.targets("dir").into_iter().chain(["/".into(), "..".into(), place.into()]) {
            let destination = match place {
                "data-below" => "/data-below/deep/er".to_string(),
                "etc" => "/etc/hosts".to_string(),
                place => format!("/{place}"),
            };
            let config = match place {
                "proc" | "dev" | "sys" => Config::sh("true"),
                "etc" => Config::sh("true").bind(&host.join("word"), &destination, &[]),
                _ => Config::sh("true").bind(&host, &destination, &[]),
            };
            let bundle = world.own_bundle(&config)?;
            let link = bundle.join("rootfs").join(place);
            let _ = fs::remove_dir_all(&link);
            symlink(&target, &link)?;
            ran_or_refused(world, &bundle).with_context(|| format!("{place} -> {}", target.display()))?;
            outside.is_untouched().with_context(|| format!("{place} -> {}", target.display()))?;
            crate::world::remove_tree(&bundle)?;
        }
    }
    Ok(())
}

fn hidden_links(world: &'static World) -> Result<()> {
    let outside = Outside::new(world)?;
    let config = Config::sh("true")
        .set("/linux/maskedPaths", json!(["/mask/file", "/mask-file"]))
        .set("/linux/readonlyPaths", json!(["/fix/dir", "/fix-dir"]))
        .set("/process/cwd", json!("/place/new/dir"));
    let bundle = world.own_bundle(&config)?;
    let rootfs = bundle.join("rootfs");
    for name in ["mask", "fix", "place"] {
        symlink(&outside.dir, rootfs.join(name))?;
    }
    symlink(outside.dir.join("file"), rootfs.join("mask-file"))?;
    symlink(outside.dir.join("dir"), rootfs.join("fix-dir"))?;
    ran_or_refused(world, &bundle)?;
    outside.is_untouched()
}

fn surprises(world: &'static World) -> Result<()> {
    let host = world.make_dir("host")?;
    type Surprise<'a> = (&'static str, &'a dyn Fn(&Path) -> Result<()>);
    let all: [Surprise; 8] = [
        ("a FIFO at a file's destination", &|rootfs| make_fifo(&rootfs.join("etc/special"))),
        ("a FIFO at passwd", &|rootfs| {
            fs::remove_file(rootfs.join("etc/passwd"))?;
            make_fifo(&rootfs.join("etc/passwd"))
        }),
        ("a link to itself", &|rootfs| Ok(symlink("special", rootfs.join("etc/special"))?)),
        ("an absolute link as the shell", &|rootfs| {
            fs::remove_file(rootfs.join("bin/sh"))?;
            Ok(symlink("/bin/busybox", rootfs.join("bin/sh"))?)
        }),
        ("a directory called passwd", &|rootfs| {
            fs::remove_file(rootfs.join("etc/passwd"))?;
            Ok(fs::create_dir(rootfs.join("etc/passwd"))?)
        }),
        ("a passwd without end", &|rootfs| {
            fs::remove_file(rootfs.join("etc/passwd"))?;
            Ok(symlink("/dev/zero", rootfs.join("etc/passwd"))?)
        }),
        ("a giant passwd", &|rootfs| Ok(fs::write(rootfs.join("etc/passwd"), vec![b'x'; 20 << 20])?)),
        ("an unreadable root", &|rootfs| {
            use std::os::unix::fs::PermissionsExt;
            Ok(fs::set_permissions(rootfs, fs::Permissions::from_mode(0o000))?)
        }),
    ];
    fs::write(host.join("word"), "from host\n")?;
    let mut failed = Vec::new();
    for (name, prepare) in all {
        let bundle = world.own_bundle(&Config::sh("true").bind(&host.join("word"), "/etc/special", &[]))?;
        prepare(&bundle.join("rootfs")).context(name)?;
        failed.extend(ran_or_refused(world, &bundle).err().map(|error| format!("{name}: {error:#}")));
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

fn racing_link(world: &'static World) -> Result<()> {
    let outside = Outside::new(world)?;
    let host = world.make_dir("host")?;
    fs::write(host.join("word"), "from host\n")?;
    let bundle = world.own_bundle(&Config::sh("true").bind(&host, "/swap/new/dir", &[]))?;
    let rootfs = bundle.join("rootfs");
    fs::create_dir(rootfs.join("real"))?;
    symlink("real", rootfs.join("swap"))?;
    let script = "cd \"$1\"; while :; do ln -s \"$2\" t && mv -T t swap; ln -s real t && mv -T t swap; done";
    let mut swapper = std::process::Command::new("sh");
    swapper.args(["-c", script, "sh"]).arg(&rootfs).arg(&outside.dir);
    let _swapper = process::start(swapper, true, world.patience())?;
    for _ in 0..world.by_level(40, 1, 200) {
        ran_or_refused(world, &bundle)?;
    }
    outside.is_untouched()
}
