//! Engines told of the runtime by the project's own script: they read what it has written where they look for it.
//!
//! In: `--installer`, a script that knows `[--prefix DIR] [--uninstall] ENGINE...`. Out: containers of engines that the
//! suite has told nothing. Must not: give an engine a configuration beyond where its state lies.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::engine::{Engine, has_systemd};
use crate::cases::{At, Case, Wish, sharing};
use crate::process;
use crate::wishes::same;
use crate::world::World;

/// Its name for engines.
const NAME: &str = "a3s-box";

const WISHES: &[Wish<Installed>] = &[
    ("install/docker-finds-the-runtime", docker),
    ("install/podman-finds-the-runtime", podman),
    ("install/containerd-finds-the-handler", containerd),
    ("install/containerd-1-keeps-what-it-had", containerd_1),
    ("install/uninstall-leaves-nothing", uninstall),
];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, Installed::set_up, WISHES)]
}

/// The runtime in a place of its own, engines' configuration in theirs.
struct Installed {
    world: &'static World,
    prefix: PathBuf,
    before: BTreeSet<PathBuf>,
}

impl Installed {
    fn set_up(world: &'static World) -> Result<Self> {
        let prefix = world.make_dir("prefix")?;
        let installed = Installed { world, before: configuration(&prefix), prefix };
        installed.script(&["docker", "podman", "containerd", "crio"])?;
        Ok(installed)
    }

    fn script(&self, args: &[&str]) -> Result<()> {
        self.script_with(args, Path::new("/"), &std::env::var("PATH")?)
    }

    /// The script takes the runtime from where a build leaves it.
    fn script_with(&self, args: &[&str], root: &Path, path: &str) -> Result<()> {
        let installer = self.world.installer.as_ref().context("--installer is missing")?;
        let target = self.world.dir.join("target");
        fs::create_dir_all(target.join("release"))?;
        let _ = std::os::unix::fs::symlink(&self.world.runtime, target.join("release").join(NAME));
        let mut script = Command::new(installer);
        script.args(args).arg("--prefix").arg(&self.prefix);
        if root != Path::new("/") {
            script.arg("--root").arg(root);
        }
        script.env("CARGO_TARGET_DIR", target).env("PATH", path);
        process::run(script, b"", self.world.patience())?.code(0).map(drop)
    }

    fn binary(&self) -> String {
        self.prefix.join("bin").join(NAME).display().to_string()
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = self.script(&["--uninstall"]);
    }
}

/// Files that are engines' configuration or the installed runtime.
fn configuration(prefix: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    let mut dirs = vec![prefix.to_path_buf()];
    dirs.extend(["docker", "containers", "containerd", "crio"].map(|name| Path::new("/etc").join(name)));
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => dirs.push(entry.path()),
                false => drop(all.insert(entry.path())),
            }
        }
    }
    all
}

/// What runs is what was installed: its kernel is that of a container of the runtime under test.
fn runs(engine: &Engine) -> Result<()> {
    let release = engine.run(&["--rm"], &["uname", "-r"])?.code(0)?.text();
    same(&release, &engine.world.run_config(&crate::config::Config::new(&["uname", "-r"]))?)
}

/// An engine that knows of the runtime by the machine's own configuration alone.
fn engine(world: &'static World, program: &str) -> Result<Engine> {
    Ok(Engine {
        world,
        dir: world.make_dir(program)?,
        program: vec![program.into()],
        env: vec![],
        runtime: NAME.into(),
        daemon: None,
        pids: &[],
        clear: &["--version"],
        tidy: "ip link delete docker0 2>/dev/null",
    })
}

/// docker with a daemon, a state of its own, and the image.
pub fn docker_engine(world: &'static World) -> Result<Engine> {
    let mut engine = engine(world, "docker")?;
    let dir = engine.dir.display().to_string();
    let socket = format!("unix://{dir}/sock");
    engine.env = vec![("DOCKER_HOST".into(), socket.clone())];
    let mut dockerd = Command::new("dockerd");
    dockerd.args(["--data-root", &format!("{dir}/data"), "--exec-root", &format!("{dir}/exec")]);
    dockerd.args(["--pidfile", &format!("{dir}/pid"), "--host", &socket, "--ip6tables=false"]);
    if !has_systemd() {
        dockerd.args(["--exec-opt", "native.cgroupdriver=cgroupfs"]);
    }
    engine.start_daemon(dockerd, &["version"])?;
    engine.import()?;
    Ok(engine)
}

/// podman with a state of its own, and the image.
pub fn podman_engine(world: &'static World) -> Result<Engine> {
    let mut engine = engine(world, "podman")?;
    let at = |name: &str| engine.dir.join(name).display().to_string();
    let manager = if has_systemd() { "systemd" } else { "cgroupfs" };
    // Only what this machine lacks; whatever else it reads is where it is by default.
    let settings = format!(
        "[containers]\nlog_driver = \"k8s-file\"\n[engine]\ncgroup_manager = \"{manager}\"\nevents_logger = \"file\"\n\
         tmp_dir = {:?}\n",
        at("tmp")
    );
    fs::write(engine.dir.join("override.conf"), settings)?;
    let storage =
        format!("[storage]\ndriver = \"overlay\"\ngraphroot = {:?}\nrunroot = {:?}\n", at("root"), at("run"));
    fs::write(engine.dir.join("storage.conf"), storage)?;
    engine.env = vec![
        ("CONTAINERS_CONF_OVERRIDE".into(), at("override.conf")),
        ("CONTAINERS_STORAGE_CONF".into(), at("storage.conf")),
    ];
    // Its networks' namespaces lie there.
    engine.tidy = "umount /run/netns 2>/dev/null; ip link delete podman0 2>/dev/null";
    engine.import()?;
    Ok(engine)
}

fn docker(installed: &mut Installed) -> Result<()> {
    let engine = docker_engine(installed.world)?;
    let known = engine.ok(&["info", "--format", "{{json .Runtimes}}"])?;
    ensure!(known.contains(&installed.binary()), "it knows {known}");
    runs(&engine)
}

fn podman(installed: &mut Installed) -> Result<()> {
    let mut engine = podman_engine(installed.world)?;
    runs(&engine)?;
    engine.program.push(format!("--runtime={NAME}"));
    let info = engine.ok(&["info", "--format", "{{.Host.OCIRuntime.Path}}"])?;
    same(&info, &installed.binary())
}

/// Its CRI plugin is what the handler is for; `ctr` names the binary itself.
fn containerd(installed: &mut Installed) -> Result<()> {
    let engine = engine(installed.world, "containerd")?;
    let settings = engine.ok(&["config", "dump"])?;
    // What the machine's own file says still holds.
    ensure!(settings.contains("'/usr/lib/cni'"), "its CNI plugins are elsewhere: {settings}");
    let handler = settings.split("runtimes.a3s-box.options]").nth(1).context("no handler a3s-box")?;
    let handler = handler.split("\n\n").next().unwrap_or_default();
    for line in [&format!("BinaryName = '{}'", installed.binary()), "SystemdCgroup = true"] {
        ensure!(handler.contains(line), "no {line:?} in {handler}");
    }
    Ok(())
}

/// Its main file gets the handler, for an import would take the place of all that it says of the plugin. containerd 2 reads
/// that file too.
fn containerd_1(installed: &mut Installed) -> Result<()> {
    let world = installed.world;
    let (root, tools) = (world.make_dir("root")?, world.make_dir("tools")?);
    fs::write(
        tools.join("containerd"),
        "#!/bin/sh\necho containerd github.com/containerd/containerd v1.7.24\n",
    )?;
    fs::set_permissions(tools.join("containerd"), fs::Permissions::from_mode(0o755))?;
    let main = root.join("etc/containerd/config.toml");
    fs::create_dir_all(main.parent().context("/etc/containerd")?)?;
    let before = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndefault_runtime_name = \"other\"\n\
                  [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.other]\nruntime_type = \"io.containerd.runc.v2\"\n";
    fs::write(&main, before)?;
    let path = format!("{}:{}", tools.display(), std::env::var("PATH")?);
    let script = |args: &[&str]| installed.script_with(args, &root, &path);
    for _ in 0..2 {
        script(&["containerd"])?;
        let mut dump = Command::new("containerd");
        dump.arg("--config").arg(&main).args(["config", "dump"]);
        let settings = process::run(dump, b"", world.patience())?.code(0)?.text();
        for line in ["runtimes.other]", "default_runtime_name = 'other'", "runtimes.a3s-box.options]"] {
            ensure!(settings.matches(line).count() == 1, "no {line:?} in {settings}");
        }
        let binary = format!("BinaryName = '{}'", installed.binary());
        ensure!(settings.contains(&binary), "no {binary} in {settings}");
    }
    script(&["--uninstall"])?;
    same(&fs::read_to_string(&main)?.as_str(), &before)
}

fn uninstall(installed: &mut Installed) -> Result<()> {
    let with = configuration(&installed.prefix);
    ensure!(with.len() >= installed.before.len() + 5, "it has installed {with:?}");
    installed.script(&["--uninstall"])?;
    let left: Vec<_> = configuration(&installed.prefix).difference(&installed.before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    for path in &installed.before {
        let settings = fs::read_to_string(path).unwrap_or_default();
        ensure!(!settings.contains(NAME), "{} still has {settings}", path.display());
    }
    installed.script(&["docker", "podman", "containerd", "crio"])
}
