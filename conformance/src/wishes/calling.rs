//! How engines call: flags, logs, streams, environments.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::lifecycle::is_rfc3339_utc;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Output, eventually};
use crate::world::World;

/// Wishes that share a container.
const WISHES: &[Wish<Container>] = &[
    ("log/a-failure-is-one-json-line", json_line),
    ("log/a-failure-is-one-text-line", |container| {
        let (_, log) = logged(container, &["--log-format", "text"], &["state", "unknown"])?;
        let lines: Vec<&str> = log.lines().collect();
        same(&lines.len(), &1)?;
        ensure!(
            lines[0].starts_with("time=\"")
                && lines[0].contains(" level=error msg=\"container does not exist\""),
            "{log}"
        );
        Ok(())
    }),
    ("log/success-leaves-an-empty-file", |container| {
        for args in [
            &["state", &container.id.clone()][..],
            &["list"],
            &["exec", &container.id.clone(), "true"],
            &["delete", "--force", "unknown"],
        ] {
            let (output, log) = logged(container, &["--log-format", "json"], args)?;
            output.code(0)?.quiet()?;
            same(&log, &String::new())?;
        }
        Ok(())
    }),
    ("log/failed-exec-is-logged-too", |container| {
        let (output, log) =
            logged(container, &["--log-format=json"], &["exec", &container.id.clone(), "/no/such"])?;
        let output = output.code(255)?.one_line(&["no such file"])?;
        let record: Value = serde_json::from_str(&log)?;
        ensure!(output.stderr.contains(record["msg"].as_str().unwrap_or("-")), "{log} / {}", output.stderr);
        Ok(())
    }),
    ("log/is-appended-to", |container| {
        let log = container.bundle.join("appended");
        for _ in 0..3 {
            container
                .world
                .call(&["--log", &log.to_string_lossy(), "--log-format", "json", "state", "unknown"])?
                .code(1)?;
        }
        same(&fs::read_to_string(&log)?.lines().count(), &3)
    }),
    ("log/debug-tells-the-time-and-breaks-no-output", |container| {
        let (output, log) = logged(
            container,
            &["--debug", "--log-format", "json"],
            &["exec", &container.id.clone(), "echo", "x"],
        )?;
        same(&output.code(0)?.quiet()?.text(), &"x\n".into())?;
        ensure!(!log.is_empty() && !log.contains("\"error\""), "{log:?}");
        for line in log.lines() {
            serde_json::from_str::<Value>(line).with_context(|| line.to_string())?;
        }
        Ok(())
    }),
    ("log/that-cannot-be-opened-is-an-error", |container| {
        let world = container.world;
        world.refused(&["--log", "/no/such/dir/log", "list"], &["/no/such/dir/log", "no such file"]).map(drop)
    }),
    ("flags/every-global-one-in-every-form", global_flags),
    ("streams/of-the-caller-may-be-closed", |container| {
        every_verb(container, |command| redirected(command, "exec \"$@\" <&- >&- 2>&-"))
    }),
    ("streams/of-the-caller-may-be-read-only", |container| {
        every_verb(container, |command| {
            redirected(command, "exec \"$@\" 0</dev/null 1</dev/null 2</dev/null")
        })
    }),
    ("environment/may-be-empty", |container| {
        every_verb(container, |mut command| {
            command.env_clear();
            silent(command)
        })
    }),
    ("environment/an-empty-xdg-runtime-dir-is-none", |container| {
        every_verb(container, |mut command| {
            command.env_clear().env("XDG_RUNTIME_DIR", "");
            silent(command)
        })
    }),
    ("environment/a-deleted-working-directory", |container| {
        every_verb(container, |command| {
            redirected(command, "d=$(mktemp -d); cd $d; rmdir $d; exec \"$@\" </dev/null >/dev/null 2>&1")
        })
    }),
];

/// A running container, to call the other verbs on.
pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, |world| Container::running(world, &Config::idle()), WISHES),
        wish(At::Both, "flags/creates-and-runs-in-every-form", create_flags),
        wish(At::Both, "create/with-closed-streams", |world| create_with(world, "exec \"$@\" <&- >&- 2>&-")),
        wish(At::Local, "create/with-read-only-streams", |world| {
            create_with(world, "exec \"$@\" 0</dev/null 1</dev/null 2</dev/null")
        }),
        wish(At::Local, "create/with-streams-that-fail", |world| {
            create_with(world, "exec \"$@\" </dev/null >/dev/full 2>/dev/full")
        }),
        wish(At::Local, "create/with-a-directory-as-stdin", |world| {
            create_with(world, "exec \"$@\" </ >/dev/null 2>&1")
        }),
        wish(At::Local, "create/with-further-descriptors-open", |world| {
            create_with(world, "exec 3</etc/passwd 7</ 9>/dev/null; exec \"$@\" </dev/null >/dev/null 2>&1")
        }),
        wish(At::Local, "create/with-an-empty-environment", |world| {
            create_with(world, "exec env -i \"$@\" </dev/null >/dev/null 2>&1")
        }),
        wish(At::Local, "create/from-a-deleted-directory", |world| {
            create_with(world, "d=$(mktemp -d); cd $d; rmdir $d; exec \"$@\" </dev/null >/dev/null 2>&1")
        }),
        wish(At::Local, "create/with-signals-blocked-or-ignored", |world| {
            create_with(world, "trap '' INT TERM HUP CHLD PIPE USR1; exec \"$@\" </dev/null >/dev/null 2>&1")
        }),
        wish(At::Local, "create/with-low-limits", |world| {
            create_with(
                world,
                "ulimit -S -n 64; ulimit -S -c 0; ulimit -S -l 64; ulimit -S -u 4000; exec \"$@\" </dev/null >/dev/null 2>&1",
            )
        }),
        wish(At::Local, "create/under-a-narrow-umask", |world| {
            create_with(world, "umask 777; exec \"$@\" </dev/null >/dev/null 2>&1")
        }),
        wish(At::Local, "root/is-made-and-belongs-to-its-owner-alone", private_root),
        wish(At::Local, "root/may-be-a-relative-path", relative_root),
        wish(At::Local, "root/the-default-works", default_root),
    ]
}

fn logged(container: &Container, global: &[&str], args: &[&str]) -> Result<(Output, String)> {
    let log = container.bundle.join("log");
    let _ = fs::remove_file(&log);
    let path = log.to_string_lossy();
    let output = container.world.call(&[&["--log", &path], global, args].concat())?;
    Ok((output, fs::read_to_string(&log).context("the log was not made")?))
}

fn json_line(container: &mut Container) -> Result<()> {
    for (args, code) in [
        (&["state", "unknown"][..], 1),
        (&["start", &container.id.clone()], 1),
        (&["kill", &container.id.clone(), "NOPE"], 1),
    ] {
        let (output, log) = logged(container, &["--log-format", "json"], args)?;
        let output = output.code(code)?.one_line(&[])?;
        same(&log.lines().count(), &1)?;
        let record: Value = serde_json::from_str(&log).with_context(|| log.clone())?;
        same(&record["level"], &"error".into())?;
        let message = record["msg"].as_str().context("no msg")?;
        ensure!(output.stderr.trim_end().ends_with(message), "{:?} is not {message:?}", output.stderr);
        ensure!(is_rfc3339_utc(record["time"].as_str().unwrap_or_default()), "{log}");
    }
    Ok(())
}

fn global_flags(container: &mut Container) -> Result<()> {
    let world = container.world;
    let root = world.root.to_string_lossy().into_owned();
    let log = container.bundle.join("flags-log").to_string_lossy().into_owned();
    let (root_is, log_is) = (format!("--root={root}"), format!("--log={log}"));
    let go_root = format!("-root={root}");
    for flags in [
        &["--root", &root][..],
        &[&root_is],
        &["-root", &root],
        &[&go_root],
        &[&root_is, "--log", &log, "--log-format", "json"],
        &[&root_is, &log_is, "--log-format=text", "--log-level", "warning"],
        &[&root_is, &log_is, "--debug"],
        &[&root_is, "--systemd-cgroup"],
        &[&root_is, "--cgroup-manager", "cgroupfs"],
        &[&root_is, "--cgroup-manager=systemd"],
        &[&root_is, "--cgroup-manager=disabled"],
        &[&root_is, "--rootless=auto"],
        &[&root_is, "--rootless=false"],
        &[&root_is, "--rootless=true"],
        &[&root_is, "--rootless"],
    ] {
        let mut command = Command::new(&world.runtime);
        command.args(flags).args(["state", &container.id]);
        let output = process::run(command, b"", world.patience())?;
        output.code(0)?.quiet().with_context(|| format!("{flags:?}"))?;
    }
    Ok(())
}

fn silent(mut command: Command) -> Command {
    super::identity::silent(&mut command);
    command
}

/// The command run by a shell script as "$@".
fn redirected(command: Command, script: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        shell.current_dir(dir);
    }
    silent(shell)
}

/// Calls what can be called on a running container without a stream to look at.
fn every_verb(container: &Container, wrap: impl Fn(Command) -> Command) -> Result<()> {
    let world = container.world;
    let id = container.id.as_str();
    let mut verbs = vec![
        (vec!["state", id], 0),
        (vec!["list"], 0),
        (vec!["kill", id, "0"], 0),
        (vec!["pause", id], 0),
        (vec!["resume", id], 0),
        (vec!["exec", id, "sh", "-c", "echo out; echo err >&2; exit 5"], 5),
        (vec!["exec", id, "cat"], 0),
        (vec!["state", "unknown"], 1),
        (vec!["delete", id], 1),
        (vec!["delete", "--force", "unknown"], 0),
    ];
    if !world.is_vm() {
        verbs.push((vec!["ps", id], 0));
    }
    for (args, code) in verbs {
        let output = process::start(wrap(world.command(&args)), false, world.patience())?.finish()?;
        let documents = ["state", "list", "ps"].contains(&args[0]);
        // A document that cannot be printed may be an error; a crash may not.
        ensure!(
            output.code == code || documents && output.code == 1,
            "{args:?}: {}, not {code}",
            output.code
        );
    }
    container.expect_status("running")
}

fn create_flags(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("exit 6"))?;
    let path = bundle.to_string_lossy().into_owned();
    let pid = bundle.join("pid").to_string_lossy().into_owned();
    let (bundle_is, pid_is) = (format!("--bundle={path}"), format!("--pid-file={pid}"));
    let go_bundle = format!("-bundle={path}");
    let all: [&[&str]; 3] = [
        &[
            "--rootless=auto",
            "create",
            "--bundle",
            &path,
            "--pid-file",
            &pid,
            "--no-pivot",
            "--no-new-keyring",
        ],
        &["create", &bundle_is, &pid_is, "--preserve-fds", "0", "-no-subreaper"],
        &[
            "--cgroup-manager=cgroupfs",
            "create",
            &go_bundle,
            "-pid-file",
            &pid,
            "--no-subreaper",
            "--preserve-fds=0",
        ],
    ];
    for args in all.iter().take(world.by_level(3, 2, 3)) {
        let id = world.name("c");
        let command = silent(world.command(&[args, &[id.as_str()][..]].concat()));
        process::start(command, false, world.patience())?
            .finish()?
            .code(0)
            .with_context(|| format!("{args:?}"))?;
        world.ok(&["start", &id])?;
        let pid: i32 = fs::read_to_string(&pid)?.parse()?;
        same(&process::wait_child(pid, world.patience())?, &6)?;
        world.ok(&["delete", &id])?;
    }
    let run: [&[&str]; 2] = [
        &["run", "-b", &path, "--no-pivot", "--no-new-keyring", "--no-subreaper"],
        &["run", &bundle_is, "-no-subreaper", "--preserve-fds=0"],
    ];
    for args in run.iter().take(world.by_level(2, 1, 2)) {
        world.call(&[args, &[world.name("run").as_str()][..]].concat())?.code(6)?.quiet()?;
    }
    Ok(())
}

/// Creates a container through a shell script, runs it to its end and looks at what it did.
fn create_with(world: &'static World, script: &str) -> Result<()> {
    let shared = world.make_dir("shared")?;
    let work = "head -c 10 >/shared/in; while [ ! -e /shared/go ]; do sleep 0.02; done; echo out; echo err >&2; echo done >/shared/did; exit 4";
    let bundle = world.bundle(&Config::sh(work).bind(&shared, "/shared", &[]))?;
    let pid_file = bundle.join("pid");
    let id = world.name("c");
    let create = world.command(&[
        "create",
        "-b",
        &bundle.to_string_lossy(),
        "--pid-file",
        &pid_file.to_string_lossy(),
        &id,
    ]);
    let output = process::start(redirected(create, script), false, world.patience())?.finish()?;
    ensure!(output.code == 0, "create ended with {}", output.code);
    same(&fs::read_to_string(&pid_file)?.parse::<i32>().is_ok(), &true)?;
    let start = process::start(redirected(world.command(&["start", &id]), script), false, world.patience())?
        .finish()?;
    ensure!(start.code == 0, "start ended with {}", start.code);
    let pid: i32 = fs::read_to_string(&pid_file)?.parse()?;
    let held =
        |link: &fs::DirEntry| fs::read_link(link.path()).is_ok_and(|path| path == Path::new("/etc/passwd"));
    let held = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |all| all.flatten().filter(held).count());
    fs::write(shared.join("go"), "")?;
    same(&held, &0).context("descriptors of the caller's that the container's pid holds")?;
    same(&process::wait_child(pid, world.patience())?, &4)?;
    same(&fs::read_to_string(shared.join("did"))?, &"done\n".into())?;
    let delete =
        process::start(redirected(world.command(&["delete", &id]), script), false, world.patience())?
            .finish()?;
    ensure!(delete.code == 0, "delete ended with {}", delete.code);
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn at_root(world: &World, root: &str, cwd: &PathBuf, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(&world.runtime);
    command.arg("--root").arg(root).args(args).current_dir(cwd);
    process::run(command, b"", world.patience())
}

fn private_root(world: &'static World) -> Result<()> {
    let dir = world.make_dir("roots")?;
    let root = dir.join("not/yet/there");
    let bundle = world.bundle(&Config::sh("echo up; cat"))?;
    let mut command = Command::new(&world.runtime);
    command.arg("--root").arg(&root).args(["run", "-b"]).arg(&bundle).arg("private");
    let mut run = process::start(command, true, world.patience())?;
    run.read_until("up")?;
    for path in [root.clone(), root.join("private")] {
        let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
        ensure!(mode & 0o066 == 0, "{}: mode {mode:o}", path.display());
    }
    run.finish()?.code(0)?;
    same(&fs::read_dir(&root)?.count(), &0)
}

fn relative_root(world: &'static World) -> Result<()> {
    let dir = world.make_dir("roots")?;
    let bundle = world.bundle(&Config::sh("trap 'exit 0' TERM; sleep 1000 & wait"))?;
    let path = bundle.to_string_lossy();
    let log = fs::File::create(bundle.join("output"))?;
    let mut command = Command::new(&world.runtime);
    command.args(["--root", "state/here", "run", "-d", "-b", &path, "rel"]).current_dir(&dir);
    command.stdin(std::process::Stdio::null()).stdout(log.try_clone()?).stderr(log);
    process::start(command, false, world.patience())?.finish()?.code(0)?;
    let state = at_root(world, "state/here", &dir, &["state", "rel"])?.code(0)?;
    let document: Value = serde_json::from_slice(&state.stdout)?;
    same(&document["status"], &json!("running"))?;
    let absolute = dir.join("state/here").to_string_lossy().into_owned();
    at_root(world, &absolute, &world.dir, &["exec", "rel", "true"])?.code(0)?.quiet()?;
    at_root(world, &absolute, &world.dir, &["delete", "--force", "rel"])?.code(0)?.quiet()?;
    eventually("its end", world.patience(), || Ok(fs::read_dir(&absolute)?.count() == 0))
}

fn default_root(world: &'static World) -> Result<()> {
    let there = fs::exists("/run/a3s-box")?;
    let bundle = world.bundle(&Config::sh("exit 3"))?;
    let id = world.name("default");
    for runtime_dir in [None, Some("")] {
        let mut command = Command::new(&world.runtime);
        command.env_clear().args(["run", "-b"]).arg(&bundle).arg(&id);
        if let Some(dir) = runtime_dir {
            command.env("XDG_RUNTIME_DIR", dir);
        }
        process::run(command, b"", world.patience())?.code(3)?.quiet()?;
    }
    ensure!(!fs::exists(format!("/run/a3s-box/{id}"))?, "its state is left");
    if !there {
        // Like the directory of any runtime it stays; ours goes where nobody else needs it.
        let _ = fs::remove_dir("/run/a3s-box");
    }
    Ok(())
}
