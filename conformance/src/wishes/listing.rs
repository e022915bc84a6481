//! What the runtime prints for programs and for people.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::lifecycle::is_rfc3339_utc;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::pty::Terminal;
use crate::world::World;

/// Wishes that share a container.
const WISHES: &[Wish<Container>] = &[
    ("list/as-a-table", table),
    ("list/as-json", json_list),
    ("list/ids-alone", |container| {
        same(&container.world.ok(&["list", "-q"])?.text(), &format!("{}\n", container.id))
    }),
    ("list/what-is-not-ours-is-passed-over", foreign),
    ("list/json-says-where-the-guests-console-log-is", |container| {
        let all: Value = serde_json::from_str(&container.world.ok(&["list", "--format", "json"])?.text())?;
        let own = all.as_array().into_iter().flatten().find(|one| one["id"] == *container.id);
        let path = own.and_then(|one| one["console-log"].as_str()).unwrap_or_default();
        ensure!(fs::metadata(path).is_ok_and(|stat| stat.is_file()), "console-log: {path:?}");
        Ok(())
    }),
    ("timeline/shows-each-part-of-a-start", |container| {
        let (world, id) = (container.world, container.id.clone());
        let text = world.ok(&["timeline", &id])?.quiet()?.text();
        ensure!(text.starts_with(&format!("{id}: ")), "{text}");
        for part in
            ["plan", "monitor", "guest kernel", "guest-init", "container", "waiting for start", "process"]
        {
            ensure!(text.lines().any(|line| line.starts_with(part)), "no {part}: {text}");
        }
        let trace = world.ok(&["timeline", "--format", "trace", &id])?.text();
        let trace: Value = serde_json::from_str(&trace)?;
        let parts = trace["traceEvents"].as_array().map_or(0, Vec::len);
        let picture = world.ok(&["timeline", "--format", "svg", &id])?.text();
        ensure!(parts >= 8 && picture.matches("ms</text>").count() == parts, "{trace} {picture}");
        Ok(())
    }),
    ("ps/as-a-table-of-the-guests-processes", |container| {
        process::eventually("its start", container.world.patience(), || {
            Ok(container.output().contains("up"))
        })?;
        let text = container.world.ok(&["ps", &container.id])?.text();
        let mut lines = text.lines();
        let header: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
        ensure!(header.contains(&"PID") && header.last() == Some(&"CMD"), "{text}");
        ensure!(text.lines().any(|line| line.contains("sleep 7777")), "{text}");
        same(
            &container.world.ok(&["ps", "-f", "table", &container.id, "-ef"])?.text().lines().count(),
            &text.lines().count(),
        )
    }),
    ("ps/of-a-stopped-container", |container| {
        container.kill("KILL")?;
        container.wait()?;
        same(&container.world.ok(&["ps", "--format", "json", &container.id])?.text(), &"[]\n".into())?;
        container.world.refused(&["ps", &container.id], &["container not running"]).map(drop)
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::All, "version/in-runcs-form", version),
        wish(At::All, "features/json-that-depends-on-nothing", features),
        wish(At::Both, "features/no-property-that-the-spec-does-not-know", known_properties),
        wish(At::Both, "features/what-is-not-honoured-is-not-promised", promises),
        wish(At::Local, "features/seccomp-is-what-the-guest-can-filter", seccomp),
        wish(At::Local, "features/a-matrix-of-every-field", matrix),
        wish(At::Both, "check/answers", check),
        wish(At::Both, "checkpoint/and-restore-are-refused-at-once", checkpoint),
        wish(At::Local, "spec/writes-a-config-that-runs", spec),
        wish(At::Local, "list/of-nothing", empty_list),
        wish(At::Local, "completions/complete-verbs-in-each-shell", completions),
        sharing(
            At::Both,
            |world| Container::running(world, &Config::sh("sleep 7777 & trap 'exit 0' TERM; echo up; wait")),
            WISHES,
        ),
    ]
}

fn version(world: &'static World) -> Result<()> {
    let quick = Duration::from_secs(if world.is_vm() { 5 } else { 2 });
    for flag in ["--version", "-v"] {
        let output = world.ok(&[flag])?.within(quick)?;
        let text = output.text();
        let first: Vec<&str> = text.lines().next().unwrap_or_default().split(' ').collect();
        ensure!(first.len() == 3 && first[1] == "version", "{text:?}");
        ensure!(first[2].split('.').count() == 3, "{text:?}");
        ensure!(text.lines().any(|line| line.starts_with("commit: ") && line.len() > 8), "{text:?}");
        ensure!(text.lines().any(|line| line.starts_with("spec: 1.")), "{text:?}");
    }
    Ok(())
}

fn completions(world: &'static World) -> Result<()> {
    let scripts = [
        (
            "bash",
            "source /dev/stdin; COMP_WORDS=(a3s-box sta) COMP_CWORD=1; _a3s__box a3s-box sta a3s-box; echo \"${COMPREPLY[@]}\"",
        ),
        ("fish", "source; complete --do-complete 'a3s-box sta'"),
        ("zsh", "autoload -U compinit; compinit -D; source /dev/stdin; whence -f _a3s-box_commands"),
    ];
    for (shell, script) in scripts {
        let text = world.ok(&["completions", shell])?.text();
        let mut command = std::process::Command::new(shell);
        command.args(["-c", script]);
        let output = process::run(command, text.as_bytes(), world.patience())?.code(0)?;
        for verb in ["start", "state"] {
            ensure!(output.text().contains(verb), "{shell} offers {:?}", output.text());
        }
    }
    let output = world.call(&["completions", "tcsh"])?.code(1)?;
    ensure!(output.message().contains("invalid value 'tcsh'"), "{:?}", output.message());
    Ok(())
}

fn features(world: &'static World) -> Result<()> {
    let mut bare = std::process::Command::new(&world.runtime);
    bare.arg("features").env_clear().current_dir("/");
    let output = process::run(bare, b"", world.patience())?.code(0)?.quiet()?;
    let document: Value = serde_json::from_slice(&output.stdout).context("not JSON")?;
    ensure!(document["ociVersionMin"] == "1.0.0" && document["ociVersionMax"].is_string(), "{document}");
    ensure!(document["linux"].is_object(), "no linux object: containerd would fail");
    ensure!(
        document["mountOptions"].as_array().is_some_and(|all| all.contains(&json!("ro"))),
        "no mount options"
    );
    let namespaces = document["linux"]["namespaces"].as_array().context("no namespaces")?;
    ensure!(["pid", "user"].iter().all(|name| namespaces.contains(&json!(name))), "{namespaces:?}");
    let known = |name: &str| name.starts_with("CAP_") && !name.starts_with("CAP_CAP_");
    let capabilities = document["linux"]["capabilities"].as_array().context("no capabilities")?;
    ensure!(capabilities.iter().all(|name| name.as_str().is_some_and(known)), "{capabilities:?}");
    same(&world.ok(&["features"])?.stdout, &output.stdout)
}

/// "The document MUST NOT have properties that ociVersionMax does not define" (features.md); runtime-spec 1.3's.
fn known_properties(world: &'static World) -> Result<()> {
    const TOP: [&str; 7] = [
        "ociVersionMin",
        "ociVersionMax",
        "hooks",
        "mountOptions",
        "linux",
        "annotations",
        "potentiallyUnsafeConfigAnnotations",
    ];
    const LINUX: [(&str, &[&str]); 11] = [
        ("namespaces", &[]),
        ("capabilities", &[]),
        ("cgroup", &["v1", "v2", "systemd", "systemdUser", "rdma"]),
        ("seccomp", &["enabled", "actions", "operators", "archs", "knownFlags", "supportedFlags"]),
        ("apparmor", &["enabled"]),
        ("selinux", &["enabled"]),
        ("intelRdt", &["enabled", "schemata", "monitoring"]),
        ("memoryPolicy", &["modes", "flags"]),
        ("mountExtensions", &["idmap"]),
        ("mountExtensions.idmap", &["enabled"]),
        ("netDevices", &["enabled"]),
    ];
    let document: Value = serde_json::from_slice(&world.ok(&["features"])?.stdout)?;
    let names =
        |value: &Value| value.as_object().into_iter().flat_map(|o| o.keys().cloned()).collect::<Vec<_>>();
    let linux: Vec<&str> = LINUX.iter().map(|(name, _)| *name).collect();
    let mut unknown: Vec<_> =
        names(&document).into_iter().filter(|name| !TOP.contains(&name.as_str())).collect();
    unknown.extend(names(&document["linux"]).into_iter().filter(|name| !linux.contains(&name.as_str())));
    for (path, known) in LINUX {
        let value = path.split('.').fold(&document["linux"], |value, name| &value[name]);
        unknown.extend(names(value).into_iter().filter(|name| !known.contains(&name.as_str())));
    }
    ensure!(unknown.is_empty(), "{unknown:?}");
    Ok(())
}

/// What CRI acts on must be true of this runtime.
fn promises(world: &'static World) -> Result<()> {
    let document: Value = serde_json::from_slice(&world.ok(&["features"])?.stdout)?;
    same(&document["linux"]["netDevices"]["enabled"], &json!(false))?;
    same(&document["annotations"]["org.opencontainers.runc.checkpoint.enabled"], &json!("false"))?;
    same(&document["linux"]["mountExtensions"]["idmap"]["enabled"], &json!(true))?;
    let unsafe_prefixes = document["potentiallyUnsafeConfigAnnotations"].as_array().context("no prefixes")?;
    ensure!(unsafe_prefixes.contains(&json!("a3s.box/")), "{unsafe_prefixes:?}");
    Ok(())
}

/// features-linux.md, "Seccomp".
fn seccomp(world: &'static World) -> Result<()> {
    let document: Value = serde_json::from_slice(&world.ok(&["features"])?.stdout)?;
    let seccomp = &document["linux"]["seccomp"];
    same(&seccomp["enabled"], &json!(true))?;
    let has = |list: &str, name: &str| seccomp[list].as_array().is_some_and(|all| all.contains(&json!(name)));
    for (list, name, expected) in [
        ("actions", "SCMP_ACT_ERRNO", true),
        ("actions", "SCMP_ACT_KILL_PROCESS", true),
        ("actions", "SCMP_ACT_NOTIFY", false),
        ("operators", "SCMP_CMP_MASKED_EQ", true),
        ("archs", "SCMP_ARCH_X86_64", true),
        ("archs", "SCMP_ARCH_S390X", false),
        ("knownFlags", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", true),
        ("supportedFlags", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", false),
        ("supportedFlags", "SECCOMP_FILTER_FLAG_LOG", true),
    ] {
        ensure!(has(list, name) == expected, "{list}: {name} in {}", seccomp[list]);
    }
    Ok(())
}

fn matrix(world: &'static World) -> Result<()> {
    let text = world.ok(&["features", "--matrix"])?.text();
    let table = world.ok(&["features", "--matrix", "--format", "markdown"])?.text();
    let refused = |line: &str| {
        line.contains("linux.seccomp.{listenerPath, listenerMetadata}") && line.contains("refused")
    };
    ensure!(text.lines().any(refused) && table.lines().any(refused), "{text}");
    ensure!(table.lines().all(|line| line.starts_with('|') && line.ends_with('|')), "{table}");
    same(&table.lines().count(), &(text.lines().count() + 2))?;
    let output = world.call(&["features", "--format", "markdown"])?;
    ensure!(output.code != 0 && output.stderr.contains("--matrix"), "{}: {:?}", output.code, output.stderr);
    Ok(())
}

fn check(world: &'static World) -> Result<()> {
    let table = world.call(&["check"])?;
    let json = world.call(&["check", "--format", "json"])?;
    let document: Value =
        serde_json::from_slice(&json.stdout).context("check --format json printed no JSON")?;
    ensure!(document.is_object() || document.is_array(), "{document}");
    let rows = document["findings"].as_array().context("findings")?;
    for name in ["host kernel", "/dev/kvm", "guest kernel", "probe VM", "vsock", "memory"] {
        let row = rows.iter().find(|row| row["name"] == name).with_context(|| format!("no row {name}"))?;
        let (ok, found) = (row["ok"].as_bool().context("ok")?, row["found"].as_str().context("found")?);
        ensure!(ok || !world.is_vm(), "{row}");
        ensure!(table.text().contains(name) && !found.is_empty(), "{row}");
        ensure!(ok || row["advice"] != "", "no advice: {row}");
    }
    same(&table.code, &json.code)?;
    let expected = if world.is_vm() { 0..=0 } else { 0..=1 };
    ensure!(expected.contains(&table.code), "{} {}: {}", table.code, table.stderr, table.text());
    Ok(())
}

fn checkpoint(world: &'static World) -> Result<()> {
    for args in [
        &["checkpoint", "x"][..],
        &["checkpoint", "--help"],
        &["checkpoint", "--image-path", "/x", "--work-path", "/y", "--leave-running", "x"],
        &["restore", "--help"],
        &["restore", "--lsm-mount-context"],
        &[
            "restore",
            "--bundle",
            "/b",
            "--image-path",
            "/i",
            "--detach",
            "--pid-file",
            "/p",
            "-no-subreaper",
            "x",
        ],
    ] {
        let output = world.refused(args, &[args[0], "not supported"])?.within(Duration::from_secs(3))?;
        ensure!(output.stdout.is_empty(), "{}", output.text());
    }
    Ok(())
}

fn spec(world: &'static World) -> Result<()> {
    let bundle = world.make_dir("bundle")?;
    let mut command = world.command(&["spec"]);
    command.current_dir(&bundle);
    process::run(command, b"", world.patience())?.code(0)?.quiet()?;
    let text = fs::read_to_string(bundle.join("config.json"))?;
    let config: Value = serde_json::from_str(&text)?;
    same(&config["process"]["args"], &json!(["sh"]))?;
    ensure!(text.contains("\n\t\"process\""), "it is not indented by tabs");
    world.refused(
        &["spec", "--bundle", &bundle.to_string_lossy()],
        &["File config.json exists. Remove it first"],
    )?;
    same(&fs::read_to_string(bundle.join("config.json"))?, &text)?;
    world.own_rootfs(&bundle)?;
    let id = world.name("run");
    let args = ["run", "--bundle", &bundle.to_string_lossy(), &id];
    let (mut terminal, run, _slave) = Terminal::spawn(world, &args, (24, 80))?;
    terminal.expect("# ")?;
    terminal.say("echo $((6*7)); exit 5\n")?;
    terminal.expect("\r\n42\r\n")?;
    run.finish()?.code(5)?;
    world.refused(&["spec", "-b", "/no/such/dir"], &["/no/such/dir", "no such file or directory"]).map(drop)
}

fn empty_list(world: &'static World) -> Result<()> {
    let nothing = world.make_dir("nothing")?;
    let call = |args: &[&str]| world.call_at(&nothing, args)?.code(0);
    same(&call(&["list", "--format", "json"])?.quiet()?.text(), &"null\n".into())?;
    same(&call(&["list", "-q"])?.text(), &String::new())?;
    ensure!(call(&["list"])?.text().starts_with("ID "), "no header");
    let missing = nothing.join("missing");
    let words = [&*missing.to_string_lossy(), "no such file or directory"];
    world.call_at(&missing, &["list", "-q"])?.code(1)?.one_line(&words)?;
    ensure!(!missing.exists(), "list made its root");
    Ok(())
}

fn table(container: &mut Container) -> Result<()> {
    let text = container.world.ok(&["list"])?.text();
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    same(&header, &vec!["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"])?;
    let row: Vec<&str> = lines.next().context("no row")?.split_whitespace().collect();
    let pid = container.pid.to_string();
    let bundle = container.bundle.to_string_lossy().into_owned();
    same(&row[..4].to_vec(), &vec![container.id.as_str(), &pid, "running", &bundle])?;
    ensure!(is_rfc3339_utc(row[4]) && row[5] == "root", "{row:?}");
    same(&lines.next(), &None)
}

fn json_list(container: &mut Container) -> Result<()> {
    let output = container.world.ok(&["list", "--format", "json"])?;
    let text = output.text();
    ensure!(text.lines().count() == 1 && text.ends_with("]\n"), "{text:?}");
    let mut list: Value = serde_json::from_str(&text)?;
    // One field more than `state` has, whose readers would take it for theirs.
    ensure!(list[0].as_object_mut().is_some_and(|one| one.remove("console-log").is_some()), "{text:?}");
    same(&list, &json!([container.state()?]))?;
    same(&container.world.ok(&["list", "-f", "json"])?.text(), &text)
}

fn foreign(container: &mut Container) -> Result<()> {
    // docker shares its root with runc, CRI-O with crun.
    let root = &container.world.root;
    let alien = root.join("alien");
    fs::create_dir(&alien)?;
    fs::write(alien.join("state.json"), "{\"id\":\"alien\",\"init_process_pid\":1}")?;
    fs::create_dir(root.join("empty"))?;
    fs::write(root.join("a-file"), "x")?;
    let listed = container.world.ok(&["list", "-q"]);
    let state = container.world.refused(&["state", "empty"], &["does not exist"]);
    fs::remove_dir_all(&alien)?;
    fs::remove_dir_all(root.join("empty"))?;
    fs::remove_file(root.join("a-file"))?;
    same(&listed?.text(), &format!("{}\n", container.id))?;
    state.map(drop)
}
