//! Bad input: one clear error each, nothing left behind.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::bad_configs::CONFIGS;
use super::run::same;
use crate::cases::{At, Case, Check, Wish, group, sharing, wish};
use crate::config::Config;
use crate::leaks::Census;
use crate::process;
use crate::world::{World, make_fifo, write_config};

/// The table's own census, taken before its first line.
struct Table {
    world: &'static World,
    before: Census,
}

/// Wishes that no table holds.
const WISHES: &[Wish<&'static World>] = &[
    ("bad-input/no-config-json", |world| {
        let empty = world.make_dir("bundle")?;
        world.run(&empty, b"")?.code(1)?.one_line(&["config.json", "no such file or directory"])?;
        world
            .run(Path::new("/no/such/bundle"), b"")?
            .code(1)?
            .one_line(&["/no/such/bundle", "no such file"])
            .map(drop)
    }),
    ("bad-input/config-json-is-not-json", garbled),
    ("bad-input/the-root-file-system-is-missing", |world| {
        let bundle = world.make_dir("bundle")?;
        write_config(&bundle, &Config::sh("true"))?;
        world.run(&bundle, b"")?.code(1)?.one_line(&["root.path", "no such file or directory"])?;
        fs::write(bundle.join("rootfs"), "")?;
        world.run(&bundle, b"")?.code(1)?.one_line(&["root.path", "not a directory"]).map(drop)
    }),
    ("bad-input/an-id-that-is-a-path", bad_ids),
    ("bad-input/an-unknown-id-for-every-verb", unknown_id),
    ("bad-input/a-bound-fifo", a_fifo),
    ("bad-input/an-unwritable-state-directory", bad_root),
    ("bad-input/a-pid-file-nowhere", |world| {
        let bundle = world.bundle(&Config::idle())?;
        let id = world.name("c");
        let args = ["create", "--bundle", &bundle.to_string_lossy(), "--pid-file", "/no/such/dir/pid", &id];
        world.refused(&args, &["/no/such/dir/pid", "no such file or directory"])?;
        world.refused(&["state", &id], &["does not exist"]).map(drop)
    }),
    ("bad-input/flags-that-come-later-are-refused-in-words", later_flags),
    ("bad-input/a-command-line-that-makes-no-sense", nonsense),
    ("bad-input/a-full-disk-for-the-state", full_disk),
];

pub fn cases() -> Vec<Case> {
    let setup = |world: &'static World| Ok(Table { world, before: Census::take(world) });
    let mut wishes: Vec<(&'static str, Check<Table>)> = Vec::new();
    for line in CONFIGS {
        let check =
            |table: &mut Table| refuse(table.world, &(line.change)(Config::sh("echo ran")), line.words);
        wishes.push((line.name, Box::new(check)));
    }
    wishes.push((
        "bad-input/leaves-nothing-behind",
        Box::new(|table| {
            let left = table.before.left_over(table.world);
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        }),
    ));
    vec![
        group(At::Both, setup, wishes),
        sharing(At::Both, Ok, WISHES),
        wish(At::Local, "bad-input/a-disk-that-fills-up-at-any-moment", filling_disk),
        wish(At::Local, "bad-input/empty-fields-count-as-absent", |world| {
            let config = Config::sh("echo ran")
                .set("/hooks", json!({ "prestart": [] }))
                .set("/linux/seccomp", Value::Null)
                .set("/linux/devices", json!([]))
                .set("/linux/sysctl", json!({}))
                .set("/linux/resources/devices", json!([{ "allow": false, "access": "rwm" }]))
                .set("/process/terminal", json!(false))
                .set("/process/consoleSize", json!({ "height": 0, "width": 0 }))
                .set("/x-unknown", json!({ "anything": [1, 2] }));
            same(&world.run_config(&config)?, &"ran\n".into())
        }),
        wish(At::Local, "bad-input/every-1.x-version-is-taken", |world| {
            for version in ["1.0.0", "1.0.2-dev", "1.1.0", "1.2.1", "1.3.0", "1.99.0"] {
                let said = world.run_config(&Config::sh("echo ran").set("/ociVersion", json!(version)))?;
                same(&said, &"ran\n".into()).context(version)?;
            }
            Ok(())
        }),
        wish(At::Local, "bad-input/an-ignored-field-is-warned-about-once", |world| {
            let config = Config::sh("echo ran").set("/process/selinuxLabel", json!("label"));
            let output =
                world.run(&world.bundle(&config)?, b"")?.code(0)?.one_line(&["selinuxLabel", "ignored"])?;
            same(&output.text(), &"ran\n".into())
        }),
    ]
}

fn refuse(world: &'static World, config: &Config, words: &[&str]) -> Result<()> {
    let config = if config.value().get("root").is_some() {
        config.clone().set("/root/path", json!(world.shared_rootfs()))
    } else {
        config.clone()
    };
    let bundle = world.make_dir("bundle")?;
    write_config(&bundle, &config)?;
    let output = world.run(&bundle, b"")?.code(1)?.one_line(words)?;
    ensure!(output.stdout.is_empty(), "{:?} on stdout", output.text());
    Ok(())
}

fn garbled(world: &mut &'static World) -> Result<()> {
    for text in ["", "{", "[]", "null", "\"text\"", "{\"ociVersion\": \"1.0.0\",}", "\u{0}\u{1}\u{2}", "{}"] {
        let bundle = world.make_dir("bundle")?;
        fs::write(bundle.join("config.json"), text)?;
        world.run(&bundle, b"")?.code(1)?.one_line(&["config.json"]).with_context(|| format!("{text:?}"))?;
    }
    let bundle = world.make_dir("bundle")?;
    fs::create_dir(bundle.join("config.json"))?;
    world.run(&bundle, b"")?.code(1)?.one_line(&["config.json", "is a directory"]).map(drop)
}

fn bad_ids(world: &mut &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ran"))?;
    let path = bundle.to_string_lossy();
    for id in ["a/b", "/etc", "../x", "..", ".", "a b", "a\nb", "ä", "", "a\\b", "a$b"] {
        for args in [
            &["create", "-b", &path, id][..],
            &["run", "-b", &path, id],
            &["state", id],
            &["delete", id],
            &["delete", "--force", id],
            &["kill", id],
        ] {
            world.refused(args, &["invalid container ID format"]).with_context(|| format!("{args:?}"))?;
        }
        world.call(&["exec", id, "true"])?.code(255)?.one_line(&["invalid container ID format"])?;
    }
    Ok(())
}

fn unknown_id(world: &mut &'static World) -> Result<()> {
    let id = world.name("unknown");
    for args in [
        &["start", &id][..],
        &["state", &id],
        &["kill", &id],
        &["kill", &id, "9"],
        &["kill", "--all", &id, "KILL"],
        &["delete", &id],
        &["pause", &id],
        &["resume", &id],
        &["ps", &id],
        &["ps", "--format", "json", &id],
    ] {
        let output =
            world.refused(args, &["container does not exist"]).with_context(|| format!("{args:?}"))?;
        ensure!(output.stdout.is_empty(), "{args:?}: {:?} on stdout", output.text());
    }
    world.call(&["exec", &id, "true"])?.code(255)?.one_line(&["container does not exist"])?;
    world.ok(&["delete", "--force", &id])?;
    world.ok(&["delete", "-f", &id]).map(drop)
}

fn a_fifo(world: &mut &'static World) -> Result<()> {
    let path = world.make_dir("special")?.join("fifo");
    make_fifo(&path)?;
    let bundle = world.bundle(&Config::sh("true").bind(&path, "/etc/special", &[]))?;
    world.run(&bundle, b"")?.code(1)?.one_line(&["FIFO", &path.to_string_lossy(), "/etc/special"])?;
    ensure!(!world.shared_rootfs().join("etc/special").exists(), "a refused bind left its mount point");
    Ok(())
}

fn bad_root(world: &mut &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ran"))?;
    let file = bundle.join("a-file");
    fs::write(&file, "")?;
    for (root, word) in [
        ("/proc/a3s", "no such file"),
        (&file.to_string_lossy(), "exist"),
        (&file.join("x").to_string_lossy(), "not a directory"),
    ] {
        let mut command = std::process::Command::new(&world.runtime);
        command.args(["--root", root, "run", "-b"]).arg(&bundle).arg(world.name("run"));
        let output = process::run(command, b"", world.patience())?.code(1)?;
        let output = output.one_line(&[root])?;
        ensure!(
            output.stderr.contains(word) || output.stderr.contains("not a directory"),
            "{:?}",
            output.stderr
        );
    }
    Ok(())
}

fn later_flags(world: &mut &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ran"))?;
    let path = bundle.to_string_lossy();
    let id = world.name("c");
    world.refused(&["create", "-b", &path, "--preserve-fds", "2", &id], &["--preserve-fds", "cannot"])?;
    // Systemd's protocol names the process that is meant, here by way of a shell that becomes it.
    let create = world.command(&["create", "-b", &path, &id]);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "LISTEN_FDS=2 LISTEN_PID=$$ exec \"$0\" \"$@\""]).arg(create.get_program());
    shell.args(create.get_args());
    process::run(shell, b"", world.patience())?.code(1)?.one_line(&["LISTEN_FDS=2", "cannot cross"])?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn nonsense(world: &mut &'static World) -> Result<()> {
    for args in [
        &["frobnicate"][..],
        &["create"],
        &["create", "--no-such-flag", "x"],
        &["state"],
        &["state", "a", "b"],
        &["--log-format", "xml", "list"],
    ] {
        let output = world.call(args)?;
        ensure!(output.code != 0, "{args:?} succeeded");
        ensure!(
            !output.stderr.is_empty() && output.stdout.is_empty(),
            "{args:?}: {:?} / {:?}",
            output.stderr,
            output.text()
        );
    }
    Ok(())
}

/// Runs a container with its state on a tmpfs of this size; tells how it ended and what is left on it.
fn on_small_disk(
    world: &'static World,
    bundle: &Path,
    size: &str,
    fill: bool,
) -> Result<(process::Output, String)> {
    let disk = world.make_dir("disk")?;
    let script = "mount -t tmpfs -o \"$2\" tmpfs \"$1\" || exit 99; disk=$1; fill=$3; shift 3
        if [ $fill = yes ]; then head -c 100M /dev/zero >\"$disk/filling\" 2>/dev/null; fi
        \"$@\"; status=$?; ls -A \"$disk/state\" >\"$disk.left\" 2>/dev/null; exit $status";
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(&disk)
        .args([size, if fill { "yes" } else { "no" }]);
    command.arg(&world.runtime).arg("--root").arg(disk.join("state")).args(["run", "--bundle"]).arg(bundle);
    command.arg(world.name("run"));
    let output = process::run(command, b"", world.patience())?;
    Ok((output, fs::read_to_string(disk.with_extension("left")).unwrap_or_default()))
}

fn full_disk(world: &mut &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ran"))?;
    let (output, left) = on_small_disk(world, &bundle, "size=16k", true)?;
    output.code(1)?.one_line(&["no space left on device"])?;
    same(&left, &String::new())
}

fn filling_disk(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ran"))?;
    let sizes = (1..12).map(|pages| format!("size={}k", 4 * pages));
    for size in sizes.chain((2..14).map(|inodes| format!("size=1m,nr_inodes={inodes}"))) {
        let (output, left) = on_small_disk(world, &bundle, &size, false)?;
        match output.code {
            0 => same(&output.text(), &"ran\n".into())?,
            _ => drop(output.code(1)?.one_line(&["no space left on device"]).with_context(|| size.clone())?),
        }
        same(&left, &String::new()).context(size)?;
    }
    Ok(())
}
