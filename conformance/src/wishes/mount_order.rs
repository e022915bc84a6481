//! Mounts among each other: one over another, below another, out of the root file system, a great many.

use std::fs;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::{Config, mount};
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Local, "mounts/rbind-brings-submounts-and-bind-does-not", submounts),
        wish(At::Both, "mounts/many-binds-in-one-container", many),
        wish(At::Local, "mounts/a-file-and-a-directory-never-cover-each-other", mismatch),
        wish(At::Both, "mounts/one-over-another-over-a-third", stacked),
        wish(At::Local, "mounts/a-bind-over-dev-is-left-as-it-is", bound_dev),
        wish(At::Local, "mounts/a-missing-mount-point-in-a-read-only-file-system", fixed_rootfs),
        wish(At::Local, "mounts/a-destination-may-be-relative-or-untidy", untidy),
    ]
}

fn submounts(world: &'static World) -> Result<()> {
    let host = world.make_dir("host")?;
    fs::create_dir(host.join("sub"))?;
    let config = Config::sh("cat /r/sub/word; ls /b/sub | wc -l").bind(&host, "/r", &[]).mount(
        "/b",
        "bind",
        &host.to_string_lossy(),
        &["bind"],
    );
    let bundle = world.bundle(&config)?;
    // The submount lives in a mount namespace of the caller's own, as an engine's may.
    let script = "mount -t tmpfs tmpfs \"$1/sub\" && echo deep >\"$1/sub/word\" && shift && exec \"$@\"";
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(&host).arg(&world.runtime);
    command.arg("--root").arg(&world.root).args(["run", "--bundle"]).arg(&bundle).arg(world.name("run"));
    let output = crate::process::run(command, b"", world.patience())?.code(0)?;
    same(&output.text(), &"deep\n0\n".into())
}

fn many(world: &'static World) -> Result<()> {
    let host = world.make_dir("host")?;
    let mut config = Config::sh("cat /many/*/word | wc -l; cat /many/file-* | wc -l");
    for n in 0..40 {
        let dir = host.join(n.to_string());
        fs::create_dir(&dir)?;
        fs::write(dir.join("word"), format!("{n}\n"))?;
        config = config.bind(&dir, &format!("/many/{n}"), &["ro"]).bind(
            &dir.join("word"),
            &format!("/many/file-{n}"),
            &[],
        );
    }
    let bundle = world.own_bundle(&config)?;
    same(&world.run(&bundle, b"")?.code(0)?.quiet()?.text(), &"40\n40\n".into())
}

fn mismatch(world: &'static World) -> Result<()> {
    let host = world.make_dir("host")?;
    fs::write(host.join("file"), "x")?;
    for (source, destination) in [(host.join("file"), "/etc"), (host.clone(), "/etc/hostname")] {
        let bundle = world.own_bundle(&Config::sh("true").bind(&source, destination, &[]))?;
        let output = world.run(&bundle, b"")?.code(1)?.one_line(&[destination, "directory"])?;
        if destination == "/etc/hostname" && !output.stderr.contains("not a directory") {
            bail!("{:?} does not say `not a directory`", output.stderr);
        }
    }
    Ok(())
}

fn untidy(world: &'static World) -> Result<()> {
    let host = world.make_dir("host")?;
    fs::write(host.join("word"), "here\n")?;
    let config = Config::sh("cat /rel/word /a/b/word /top/word")
        .bind(&host, "rel", &[])
        .bind(&host, "/x/../a/./b//", &[])
        .bind(&host, "/../../top", &[]);
    let bundle = world.own_bundle(&config)?;
    same(&world.run(&bundle, b"")?.code(0)?.quiet()?.text(), &"here\nhere\nhere\n".into())
}

fn stacked(world: &'static World) -> Result<()> {
    let (first, second) = (world.make_dir("first")?, world.make_dir("second")?);
    for (dir, text) in [(&first, "first\n"), (&second, "second\n")] {
        fs::create_dir(dir.join("below"))?;
        fs::write(dir.join("word"), text)?;
    }
    let config = Config::sh(
        "cat /stack/word; cat /tmpfs/a/word; cat /tmpfs/a/below/word; ls /tmpfs/a/below/below; \
         cat /file; echo x >/file; cat /inner/word; echo changed >/opt/inner/word; sleep 6; cat /inner/word",
    )
    .bind(&first, "/stack", &[])
    .mount("/stack", "tmpfs", "tmpfs", &[])
    .bind(&second, "/stack", &[])
    .mount("/tmpfs", "tmpfs", "tmpfs", &[])
    .bind(&first, "/tmpfs/a", &[])
    .bind(&second, "/tmpfs/a/below", &[])
    .bind(&first.join("word"), "/file", &[])
    .bind(&second.join("word"), "/file", &["ro"])
    .mount("/inner", "bind", "rootfs/opt/inner", &["bind"]);
    let bundle = world.own_bundle(&config)?;
    fs::create_dir_all(bundle.join("rootfs/opt/inner"))?;
    fs::write(bundle.join("rootfs/opt/inner/word"), "inner\n")?;
    let output = world.run(&bundle, b"")?.code(0)?;
    same(&output.text(), &"second\nfirst\nsecond\nsecond\ninner\nchanged\n".into())?;
    ensure!(output.stderr.contains("/file: Read-only file system"), "{:?}", output.stderr);
    same(&fs::read_to_string(second.join("word"))?, &"second\n".into())
}

fn bound_dev(world: &'static World) -> Result<()> {
    let dev = world.make_dir("dev")?;
    fs::write(dev.join("word"), "own\n")?;
    let bind = mount("/dev", "bind", &dev.to_string_lossy(), &["rbind"]);
    let config = Config::sh("ls /dev; cat /dev/word")
        .set("/mounts", json!([bind, mount("/proc", "proc", "proc", &[])]));
    same(&world.run_config(&config)?, &"word\nown\n".into())?;
    same(&fs::read_dir(&dev)?.count(), &1)
}

fn fixed_rootfs(world: &'static World) -> Result<()> {
    let bundle = world.own_bundle(&Config::sh("true").mount("/missing", "tmpfs", "tmpfs", &[]))?;
    let script = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && shift && exec \"$@\"";
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(bundle.join("rootfs")).arg(&world.runtime);
    command.arg("--root").arg(&world.root).args(["run", "--bundle"]).arg(&bundle).arg(world.name("run"));
    let output = crate::process::run(command, b"", world.patience())?.code(1)?;
    output.one_line(&["mount /missing", "read-only file system"]).map(drop)
}
