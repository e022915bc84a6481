//! The host's configuration: what it decides, what annotations may decide, and mistakes in it.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Output};
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Local, "settings/check-says-which-file-decides", origins),
        wish(At::Local, "settings/a-file-to-start-from", example),
        wish(At::Local, "settings/mistakes-name-file-key-value-and-reason", mistakes),
        wish(At::Local, "settings/a-file-that-others-can-write-is-refused", writable),
        wish(At::Local, "settings/a-broken-file-does-not-keep-containers-from-ending", broken),
        wish(At::Both, "settings/annotations-act-where-the-host-allows-it", annotations),
        wish(At::Vm, "settings/a-vm-is-as-configured", sizes),
        wish(At::Vm, "settings/the-guest-kernel-lies-where-it-is-configured", firmware),
    ]
}

/// A configuration file.
fn file(world: &World, text: &str) -> Result<PathBuf> {
    let path = world.make_dir("settings")?.join("config.toml");
    fs::write(&path, text)?;
    fs::set_permissions(&path, Permissions::from_mode(0o644))?;
    Ok(path)
}

fn configured(world: &World, file: &Path, args: &[&str]) -> Result<Output> {
    world.call(&[&["--config", &file.to_string_lossy()], args].concat())
}

fn run(world: &World, file: &Path, config: &Config) -> Result<Output> {
    let (bundle, id) = (world.bundle(config)?, world.name("run"));
    configured(world, file, &["run", "--bundle", &bundle.to_string_lossy(), &id])
}

fn effective(output: &Output) -> Result<Vec<(String, Value, String)>> {
    let document: Value = serde_json::from_slice(&output.stdout).with_context(|| output.shown.clone())?;
    let list = document["configuration"].as_array().context("configuration")?;
    let text = |one: &Value, field: &str| one[field].as_str().unwrap_or_default().to_string();
    Ok(list.iter().map(|one| (text(one, "name"), one["value"].clone(), text(one, "from"))).collect())
}

fn origins(world: &'static World) -> Result<()> {
    let script =
        "mount -t tmpfs -o mode=0755 tmpfs /etc; umask 022; mkdir -p /etc/a3s-box/conf.d; cd /etc/a3s-box
        printf 'vcpus = 3\\nmemory-mib = 300\\nnics = 1\\n' >config.toml
        echo 'memory-mib = 400' >conf.d/10-more.toml
        echo 'memory-mib = 500' >conf.d/20-most.toml
        echo 'memory-mib = 600' >conf.d/30-not.toml.old
        exec \"$0\" check --timeout 1 --format \"$1\"";
    let check = |format: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", script]).arg(&world.runtime).arg(format);
        process::run(command, b"", Duration::from_secs(60))
    };
    let (main, most) = ("/etc/a3s-box/config.toml", "/etc/a3s-box/conf.d/20-most.toml");
    let json = check("json")?;
    let found = effective(&json).with_context(|| json.stderr.clone())?;
    let expected = [
        ("vcpus", json!(3), main),
        ("memory-mib", json!(500), most),
        ("nics", json!(1), main),
        ("network-mode", json!("auto"), "built-in"),
    ];
    for (found, (name, value, from)) in found.iter().zip(expected) {
        same(found, &(name.to_string(), value, from.to_string()))?;
    }
    ensure!(found.len() == 6, "{found:?}");
    let table = check("table")?.text();
    let line = |line: &str| line.split_whitespace().eq(["memory-mib", "500", most]);
    ensure!(table.lines().any(line), "{table}");
    Ok(())
}

fn example(world: &'static World) -> Result<()> {
    let text = world.ok(&["features", "--settings"])?.text();
    let found = effective(&configured(world, &file(world, &text)?, &["check", "--format", "json"])?)?;
    ensure!(found.iter().all(|(_, _, from)| from == "built-in"), "{found:?}");
    let all = file(world, &text.replace("\n#nics = 2\n", "\nnics = 5\n"))?;
    let found = effective(&configured(world, &all, &["check", "--format", "json"])?)?;
    let changed: Vec<_> = found.into_iter().filter(|(_, _, from)| from != "built-in").collect();
    same(&changed, &vec![("nics".into(), json!(5), all.to_string_lossy().into_owned())])
}

fn mistakes(world: &'static World) -> Result<()> {
    for (text, words) in [
        ("vcpus = 0", &["vcpus: 0 is not a number from 1 to 16"][..]),
        ("memory-mib = 95", &["memory-mib: 95 is not a number of MiB from 96"]),
        ("nics = \"two\"", &["nics: \"two\" is not a number from 0 to 6"]),
        ("network-mode = \"bridge\"", &["network-mode: \"bridge\" is not one of auto, tap, tsi, none"]),
        ("libkrunfw = \"lib.so\"", &["libkrunfw: \"lib.so\" is not an absolute path"]),
        ("allowed-annotations = [\"all\"]", &["allowed-annotations: [\"all\"] is not a list of keys"]),
        ("vcpu = 2", &["vcpu: is none of the keys that there are (vcpus, memory-mib, nics"]),
        ("nics = 1\nvcpus 2", &["line 2: "]),
    ] {
        let path = file(world, text)?;
        let shown = path.to_string_lossy();
        let words: Vec<&str> = words.iter().copied().chain([&*shown]).collect();
        configured(world, &path, &["check"])?.code(1)?.one_line(&words)?;
        run(world, &path, &Config::new(&["true"]))?.code(1)?.one_line(&words)?;
    }
    let words = ["/does/not/exist.toml", "no such file"];
    configured(world, Path::new("/does/not/exist.toml"), &["check"])?.code(1)?.one_line(&words).map(drop)
}

fn writable(world: &'static World) -> Result<()> {
    let text = "vcpus = 1\n";
    let refused = |path: &Path, words: &[&str]| {
        let shown = path.to_string_lossy();
        let words = [words, &[&*shown]].concat();
        run(world, path, &Config::new(&["true"]))?.code(1)?.one_line(&words).map(drop)
    };
    for mode in [0o666, 0o664, 0o646] {
        let path = file(world, text)?;
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
        refused(&path, &["others can write to it", &format!("{mode:04o}"), "chmod go-w"])?;
    }
    let path = file(world, text)?;
    chown(&path, Some(4711), None)?;
    refused(&path, &["belongs to user 4711"])?;
    let path = file(world, text)?;
    let dir = path.parent().context("directory")?;
    fs::set_permissions(dir, Permissions::from_mode(0o777))?;
    refused(&path, &["its directory", "others can write to it"])?;
    fs::set_permissions(dir, Permissions::from_mode(0o1777))?;
    run(world, &path, &Config::new(&["true"]))?.code(0)?.quiet()?;
    refused(dir, &["not a regular file"])
}

fn broken(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    let path = file(world, "nonsense")?;
    for args in [&["state", &container.id][..], &["list"], &["exec", &container.id, "true"]] {
        configured(world, &path, args)?.code(0)?.quiet()?;
    }
    configured(world, &path, &["delete", "--force", &container.id])?.code(0)?.quiet()?;
    container.delete(&["--force"])
}

fn annotations(world: &'static World) -> Result<()> {
    let asks = |name: &str, value: &str| {
        Config::new(&["true"]).set(&format!("/annotations/a3s.box~1{name}"), json!(value))
    };
    let (tsi, library) = (asks("network-mode", "tsi"), asks("libkrunfw", "/does/not/exist.so"));
    let none = file(world, "")?;
    for (config, words) in [
        (&tsi, ["a3s.box/network-mode: \"tsi\" is not allowed", "allowed-annotations in /etc/a3s-box"]),
        (&library, ["a3s.box/libkrunfw: \"/does/not/exist.so\" is not allowed", "allowed-annotations"]),
    ] {
        run(world, &none, config)?.code(1)?.one_line(&words)?;
    }
    let unknown = run(world, &none, &asks("memory", "512"))?.code(0)?;
    ensure!(unknown.stderr.contains("a3s.box/memory is ignored: those that act are"), "{:?}", unknown.stderr);
    let sizes = file(
        world,
        "allowed-annotations = [\"vcpus\", \"memory-mib\", \"network-mode=tsi\", \"libkrunfw\"]",
    )?;
    run(world, &sizes, &tsi)?.code(0)?.quiet()?;
    let tap = asks("network-mode", "tap");
    run(world, &sizes, &tap)?.code(1)?.one_line(&["a3s.box/network-mode: \"tap\" is not allowed"])?;
    // What stands in for a VM in tests has no kernel to look for.
    if world.is_vm() {
        run(world, &sizes, &library)?.code(1)?.one_line(&["/does/not/exist.so"])?;
    }
    Ok(())
}

fn sizes(world: &'static World) -> Result<()> {
    let path = file(world, "vcpus = 3\nmemory-mib = 200\nnetwork-mode = \"none\"\n")?;
    let script = "nproc; grep MemTotal /proc/meminfo | tr -dc 0-9; echo";
    let size = |config: &Config| -> Result<(String, u64)> {
        let text = run(world, &path, config)?.code(0)?.quiet()?.text();
        let mut lines = text.lines().map(str::to_owned);
        let (cpus, kib) = (lines.next().context("nproc")?, lines.next().context("MemTotal")?);
        Ok((cpus, kib.parse()?))
    };
    let bare = Config::sh(script).without("/annotations");
    let (cpus, kib) = size(&bare)?;
    ensure!(cpus == "3" && (130_000..=204_800).contains(&kib), "{cpus} CPUs, {kib} KiB");
    let limits = json!({ "cpu": { "quota": 100_000, "period": 100_000 }, "memory": { "limit": 256 << 20 } });
    let (cpus, kib) = size(&bare.clone().set("/linux/resources", limits))?;
    ensure!(cpus == "1" && (256 << 10..=340 << 10).contains(&kib), "{cpus} CPUs, {kib} KiB by limits");
    let (cpus, kib) = size(&bare.set("/annotations/a3s.box~1memory-mib", json!("192")))?;
    ensure!(cpus == "3" && (120_000..=196_608).contains(&kib), "{cpus} CPUs, {kib} KiB by annotation");
    // A container in the host's network would have sockets there.
    let others = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let dial =
        format!("nc -w 2 127.0.0.1 {} </dev/null 2>/dev/null || echo refused", listener.local_addr()?.port());
    let alone = Config::sh(&dial).set("/linux/namespaces", json!(others));
    same(&run(world, &path, &alone)?.code(0)?.quiet()?.text().trim(), &"refused")
}

fn firmware(world: &'static World) -> Result<()> {
    let kept = || -> BTreeSet<PathBuf> {
        fs::read_dir("/run/a3s-box-kernel")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect()
    };
    let before = kept();
    let result = with_copy(world);
    // The copy's kernel, which stays until the next boot.
    kept().difference(&before).try_for_each(fs::remove_file)?;
    result
}

fn with_copy(world: &'static World) -> Result<()> {
    let check = |path: &Path| -> Result<String> {
        let output = configured(world, path, &["check", "--format", "json", "--timeout", "80"])?.code(0)?;
        let document: Value = serde_json::from_slice(&output.stdout)?;
        let findings = document["findings"].as_array().context("findings")?;
        let kernel =
            findings.iter().find(|finding| finding["name"] == "guest kernel").context("guest kernel")?;
        Ok(kernel["found"].as_str().unwrap_or_default().to_string())
    };
    let found = check(&file(world, "")?)?;
    let (library, version) = found.split_once(": ").context("path and version")?;
    let copy = world.make_dir("firmware")?.join("kernel.so");
    fs::copy(library, &copy)?;
    let path = file(world, &format!("libkrunfw = {:?}\n", copy))?;
    same(&check(&path)?, &format!("{}: {version}", copy.display()))?;
    run(world, &path, &Config::new(&["true"]))?.code(0)?.quiet()?;
    fs::remove_file(&copy)?;
    run(world, &path, &Config::new(&["true"]))?.code(1)?.one_line(&[&copy.to_string_lossy()]).map(drop)
}
