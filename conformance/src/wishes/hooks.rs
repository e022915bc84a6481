//! Hooks: when they run, where, with what, and what follows when one fails (runtime-spec config.md "POSIX-platform
//! Hooks", runtime.md "Lifecycle").

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::process::{self, eventually, is_alive};
use crate::world::{World, write_config};

/// A container with a hook of every kind. Each leaves its traces in one directory, which is `/shared` in the container.
pub struct Hooked {
    container: Container,
    traces: PathBuf,
}

const HOST: [&str; 5] = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];

/// Wishes along one life, in its order.
const WISHES: &[Wish<Hooked>] = &[
    ("hooks/create-runs-its-three-kinds-in-order", create_order),
    ("hooks/those-of-create-get-the-state-creating", create_state),
    ("hooks/prestart-and-create-runtime-run-in-the-runtimes-namespaces", runtime_namespaces),
    ("hooks/create-container-runs-in-the-containers-namespaces", container_namespaces),
    ("hooks/create-container-sees-the-mounts-below-the-root", assembled),
    ("hooks/arguments-and-environment-are-those-given", given),
    ("hooks/start-runs-start-container-before-the-process-and-poststart-after-it", start_order),
    ("hooks/start-container-runs-in-the-container-with-its-processs-environment", start_container),
    ("hooks/poststart-gets-the-state-running", poststart_state),
    ("hooks/delete-runs-poststop-when-nothing-is-left", poststop),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, Hooked::create, WISHES),
        wish(At::Both, "hooks/a-failing-prestart-hook-fails-create", |world| fails_create(world, "prestart")),
        wish(At::Local, "hooks/a-failing-create-runtime-hook-fails-create", |world| {
            fails_create(world, "createRuntime")
        }),
        wish(At::Both, "hooks/a-failing-create-container-hook-fails-create", |world| {
            fails_create(world, "createContainer")
        }),
        wish(At::Both, "hooks/a-failing-start-container-hook-fails-start", start_container_fails),
        wish(At::Both, "hooks/a-failing-poststart-hook-ends-the-container", poststart_fails),
        wish(At::Local, "hooks/a-failing-poststart-hook-fails-run", poststart_fails_run),
        wish(At::Local, "hooks/a-failing-poststop-hook-keeps-no-other-from-running", poststop_fails),
        wish(At::Local, "hooks/a-missing-program-is-named", missing),
        wish(At::Both, "hooks/a-timeout-is-kept", timeout),
        wish(At::Local, "hooks/a-timeout-ends-what-a-hook-has-started", timeout_of_children),
        wish(At::Local, "hooks/a-timeout-is-kept-in-the-container", start_container_timeout),
        wish(At::Local, "hooks/a-mount-that-one-makes-is-refused", mounts),
        wish(At::Local, "hooks/without-an-environment-they-have-the-runtimes", inherited),
        wish(At::Local, "hooks/one-that-hangs-does-not-outlive-delete-by-force", |world| {
            hang(world, "createRuntime")
        }),
        wish(At::Local, "hooks/one-that-hangs-in-the-container-does-not-either", |world| {
            hang(world, "createContainer")
        }),
        wish(At::Local, "hooks/one-that-hangs-before-the-process-does-not-either", hang_start),
    ]
}

fn sh(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["hook-name", "-c", script], "env": ["PATH=/usr/bin:/bin", "OF_HOOK=yes"] })
}

/// The same for a shell that is busybox, which goes by its name.
fn inside(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script] })
}

/// Notes what it was given. `dir` is where the traces are for whoever runs it.
fn tracer(kind: &str, dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "cd {dir}; echo {kind} >>order; cat >{kind}.state; env >{kind}.env; tr '\\0' ' ' </proc/self/cmdline >{kind}.args
         for n in mnt net pid ipc uts; do readlink /proc/self/ns/$n; done >{kind}.ns 2>/dev/null
         [ -e {dir}/rootfs ] && ls \"$(cat {dir}/rootfs)/shared\" >{kind}.ls || true"
    )
}

impl Hooked {
    fn create(world: &'static World) -> Result<Self> {
        let traces = world.make_dir("traces")?;
        let mut config = Config::sh("trap 'exit 3' TERM; echo process >>/shared/order; sleep 1000 & wait")
            .bind(&traces, "/shared", &[])
            .set("/annotations/org.example.key", "value".into());
        for kind in HOST {
            config = config.set(&format!("/hooks/{kind}"), json!([sh(&tracer(kind, &traces))]));
        }
        let inside = inside(&tracer("startContainer", Path::new("/shared")));
        let config = config.set("/hooks/startContainer", json!([inside]));
        fs::write(traces.join("rootfs"), world.shared_rootfs().as_os_str().as_encoded_bytes())?;
        let container = Container::create(world, &config)?;
        // From here on these must not matter any more.
        write_config(&container.bundle, &config.without("/hooks"))?;
        Ok(Hooked { container, traces })
    }

    fn started(&self) -> Result<()> {
        if self.container.status()? == "created" {
            self.container.start()?;
        }
        let world = self.container.world;
        eventually("the process", world.patience(), || Ok(self.read("order")?.contains("process\n")))
    }

    fn read(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.traces.join(name)).with_context(|| format!("the traces: {name}"))
    }

    fn state(&self, kind: &str) -> Result<Value> {
        let text = self.read(&format!("{kind}.state"))?;
        serde_json::from_str(&text).with_context(|| format!("{kind} got {text:?}"))
    }

    /// runtime.md "State": what every state holds.
    fn expect_state(&self, kind: &str, status: &str, pid: Option<i32>) -> Result<()> {
        let state = self.state(kind)?;
        let expected = json!({
            "ociVersion": state["ociVersion"], "id": self.container.id, "status": status,
            "bundle": self.container.bundle, "annotations": state["annotations"],
        });
        let version = state["ociVersion"].as_str().unwrap_or_default();
        ensure!(version.starts_with("1."), "{kind}: ociVersion {version:?}");
        same(&state["annotations"]["org.example.key"], &json!("value"))?;
        for (name, value) in expected.as_object().context("an object")? {
            same(&state[name], value).with_context(|| format!("{kind}: {name}"))?;
        }
        match pid {
            Some(pid) => same(&state["pid"], &json!(pid)).with_context(|| format!("{kind}: pid")),
            None => {
                ensure!(matches!(state["pid"].as_i64(), None | Some(0)), "{kind}: {state}");
                Ok(())
            }
        }
    }

    /// Namespaces in the order of the tracer: mnt, net, pid, ipc, uts.
    fn namespaces(&self, kind: &str) -> Result<Vec<String>> {
        Ok(self.read(&format!("{kind}.ns"))?.lines().map(str::to_string).collect())
    }
}

fn namespaces_of(pid: &str) -> Result<Vec<String>> {
    let link =
        |name: &str| Ok(fs::read_link(format!("/proc/{pid}/ns/{name}"))?.to_string_lossy().into_owned());
    ["mnt", "net", "pid", "ipc", "uts"].iter().map(|name| link(name)).collect()
}

fn create_order(hooked: &mut Hooked) -> Result<()> {
    same(&hooked.read("order")?, &"prestart\ncreateRuntime\ncreateContainer\n".into())
}

fn create_state(hooked: &mut Hooked) -> Result<()> {
    let pid = hooked.container.pid;
    hooked.expect_state("prestart", "creating", Some(pid))?;
    hooked.expect_state("createRuntime", "creating", Some(pid))?;
    // As its own pid namespace numbers it.
    hooked.expect_state("createContainer", "creating", Some(1))
}

fn runtime_namespaces(hooked: &mut Hooked) -> Result<()> {
    for kind in ["prestart", "createRuntime"] {
        same(&hooked.namespaces(kind)?, &namespaces_of("self")?).context(kind)?;
    }
    Ok(())
}

fn container_namespaces(hooked: &mut Hooked) -> Result<()> {
    let found = hooked.namespaces("createContainer")?;
    let own = namespaces_of("self")?;
    ensure!(found.iter().zip(&own).all(|(found, own)| found != own), "{found:?}, the runtime's: {own:?}");
    same(&found, &namespaces_of(&hooked.container.pid.to_string())?)
}

/// "before the pivot_root operation … but after the mount namespace was created and configured".
fn assembled(hooked: &mut Hooked) -> Result<()> {
    let listed = hooked.read("createContainer.ls")?;
    ensure!(listed.lines().any(|name| name == "order"), "/shared below the root: {listed:?}");
    same(&hooked.read("prestart.ls")?, &String::new())
}

fn given(hooked: &mut Hooked) -> Result<()> {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let env = hooked.read(&format!("{kind}.env"))?;
        let mut names: Vec<_> = env.lines().filter_map(|line| line.split('=').next()).collect();
        // Shells add these of their own.
        names.retain(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name));
        names.sort_unstable();
        same(&names, &vec!["OF_HOOK", "PATH"]).context(kind)?;
        let args = hooked.read(&format!("{kind}.args"))?;
        ensure!(args.starts_with("hook-name -c "), "{kind}: {args:?}");
    }
    Ok(())
}

fn start_order(hooked: &mut Hooked) -> Result<()> {
    hooked.started()?;
    let order = hooked.read("order")?;
    let place = |word: &str| {
        order.lines().position(|line| line == word).with_context(|| format!("{word}: {order:?}"))
    };
    ensure!(place("startContainer")? == 3 && place("process")? > 3 && place("poststart")? > 3, "{order:?}");
    same(&order.lines().count(), &6)
}

fn start_container(hooked: &mut Hooked) -> Result<()> {
    hooked.started()?;
    hooked.expect_state("startContainer", "created", Some(1))?;
    let env = hooked.read("startContainer.env")?;
    ensure!(env.lines().any(|line| line == "FROM_CONFIG=yes"), "{env:?}");
    let inside = hooked.container.sh("for n in mnt net pid ipc uts; do readlink /proc/self/ns/$n; done")?;
    same(&hooked.read("startContainer.ns")?.trim_end().to_string(), &inside)
}

fn poststart_state(hooked: &mut Hooked) -> Result<()> {
    hooked.started()?;
    hooked.expect_state("poststart", "running", Some(hooked.container.pid))?;
    same(&hooked.namespaces("poststart")?, &namespaces_of("self")?)
}

fn poststop(hooked: &mut Hooked) -> Result<()> {
    hooked.started()?;
    hooked.container.kill("TERM")?;
    same(&hooked.container.wait()?, &3)?;
    ensure!(!hooked.read("order")?.contains("poststop"), "it ran before delete");
    hooked.container.delete(&[])?;
    ensure!(hooked.read("order")?.ends_with("\npoststop\n"), "{:?}", hooked.read("order")?);
    hooked.expect_state("poststop", "stopped", None)
}

/// A bundle with a hook that fails and a `poststop` hook that tells that it ran.
fn failing(world: &'static World, kind: &str, hook: Value) -> Result<(PathBuf, PathBuf)> {
    let told = world.make_dir("told")?.join("poststop");
    let config = Config::idle()
        .set("/hooks/poststop", json!([sh(&format!("cat >{}", told.display()))]))
        .set(&format!("/hooks/{kind}"), json!([hook]));
    Ok((world.bundle(&config)?, told))
}

/// runtime.md "Lifecycle" 3 to 5: generate an error, stop the container, go on with the end of its life.
fn fails_create(world: &'static World, kind: &str) -> Result<()> {
    let (bundle, told) = failing(world, kind, sh("echo to-out; echo to-err >&2; exit 7"))?;
    let words = format!("error running {kind} hook #0: exit status 7, stdout: to-out");
    refuse_create(world, &bundle, &[&words, "stderr: to-err"])?;
    let state: Value = serde_json::from_str(&fs::read_to_string(&told).context("poststop did not run")?)?;
    same(&state["status"], &json!("stopped"))
}

fn refuse_create(world: &'static World, bundle: &Path, words: &[&str]) -> Result<process::Output> {
    let id = world.name("c");
    let output =
        process::run(create_command(world, bundle, &id), b"", world.patience())?.code(1)?.one_line(words)?;
    ensure!(!bundle.join("pid").exists(), "it left a pid file");
    world.refused(&["state", &id], &["does not exist"])?;
    Ok(output)
}

fn start_container_fails(world: &'static World) -> Result<()> {
    let (bundle, told) = failing(world, "startContainer", inside("echo no >&2; exit 3"))?;
    let mut container = Container::of_bundle(world, bundle)?;
    let words = "error running startContainer hook #0: exit status 3, stdout: , stderr: no";
    world.refused(&["start", &container.id], &[words])?;
    ensure!(container.wait()? != 0, "its pid ended with 0");
    container.expect_status("stopped")?;
    container.delete(&[])?;
    ensure!(told.exists(), "poststop did not run");
    Ok(())
}

/// runtime.md "Lifecycle" 10, since version 1.3.
fn poststart_fails(world: &'static World) -> Result<()> {
    let (bundle, told) = failing(world, "poststart", sh("exit 4"))?;
    let mut container = Container::of_bundle(world, bundle)?;
    world.refused(&["start", &container.id], &["error running poststart hook #0: exit status 4"])?;
    same(&container.wait_for(Duration::from_secs(5))?, &137)?;
    container.expect_status("stopped")?;
    container.delete(&[])?;
    ensure!(told.exists(), "poststop did not run");
    Ok(())
}

fn poststart_fails_run(world: &'static World) -> Result<()> {
    let (bundle, told) = failing(world, "poststart", sh("exit 4"))?;
    world.run(&bundle, b"")?.code(1)?.one_line(&["error running poststart hook #0: exit status 4"])?;
    ensure!(told.exists(), "poststop did not run");
    Ok(())
}

/// runtime.md "Lifecycle" 14: a warning, and the rest goes on.
fn poststop_fails(world: &'static World) -> Result<()> {
    let told = world.make_dir("told")?.join("second");
    let hooks = json!([sh("exit 5"), sh(&format!("touch {}", told.display()))]);
    let mut container = Container::create(world, &Config::idle().set("/hooks/poststop", hooks))?;
    container.kill("KILL")?;
    container.wait()?;
    let output = world.call(&["delete", &container.id])?.code(0)?;
    let output = output.one_line(&["warning", "error running poststop hook #0: exit status 5"])?;
    ensure!(output.stdout.is_empty() && told.exists(), "the second did not run");
    world.refused(&["state", &container.id], &["does not exist"]).map(drop)
}

fn missing(world: &'static World) -> Result<()> {
    let (bundle, _) = failing(world, "createRuntime", json!({ "path": "/no/such/hook" }))?;
    let words = ["error running createRuntime hook #0: ", "/no/such/hook: no such file or directory"];
    refuse_create(world, &bundle, &words).map(drop)
}

fn timeout(world: &'static World) -> Result<()> {
    let mut hook = sh("exec sleep 5000");
    hook["timeout"] = json!(1);
    let (bundle, _) = failing(world, "createRuntime", hook)?;
    let words = "error running createRuntime hook #0: hook ran past specified timeout of 1.0s";
    let limit = Duration::from_secs(if world.is_vm() { 15 } else { 4 });
    refuse_create(world, &bundle, &[words])?.within(limit).map(drop)
}

fn timeout_of_children(world: &'static World) -> Result<()> {
    let pid = world.make_dir("told")?.join("pid");
    let mut hook = sh(&format!("sleep 5000 & echo $! >{}; wait", pid.display()));
    hook["timeout"] = json!(1);
    let (bundle, _) = failing(world, "createRuntime", hook)?;
    let words = "error running createRuntime hook #0: hook ran past specified timeout of 1.0s";
    refuse_create(world, &bundle, &[words])?.within(Duration::from_secs(4))?;
    let child: i32 = fs::read_to_string(&pid)?.trim().parse()?;
    eventually("the end of what it started", Duration::from_secs(3), || Ok(!is_alive(child)))
}

fn start_container_timeout(world: &'static World) -> Result<()> {
    let mut hook = inside("sleep 5000");
    hook["timeout"] = json!(1);
    let (bundle, _) = failing(world, "startContainer", hook)?;
    let mut container = Container::of_bundle(world, bundle)?;
    let words = "error running startContainer hook #0: hook ran past specified timeout of 1.0s";
    world.refused(&["start", &container.id], &[words])?.within(Duration::from_secs(4))?;
    container.wait()?;
    container.delete(&[])
}

/// In a VM it could not be seen.
fn mounts(world: &'static World) -> Result<()> {
    let rootfs = world.shared_rootfs().display();
    for kind in ["createContainer", "createRuntime"] {
        let enter = if kind == "createRuntime" {
            "nsenter -m -t $(grep -o '\"pid\":[0-9]*' | cut -d: -f2)"
        } else {
            ""
        };
        let (bundle, told) = failing(world, kind, sh(&format!("{enter} mount -t tmpfs made {rootfs}/tmp")))?;
        refuse_create(world, &bundle, &["hooks", &format!("{rootfs}/tmp"), "cannot reach into the VM"])
            .context(kind)?;
        ensure!(told.exists(), "poststop did not run");
    }
    Ok(())
}

fn inherited(world: &'static World) -> Result<()> {
    let told = world.make_dir("told")?;
    let script = |kind: &str| json!({ "path": "/bin/sh", "args": ["sh", "-c", format!("echo $OF_CALLER >{}", told.join(kind).display())] });
    let mut config = Config::sh("exit 0");
    for kind in HOST {
        config = config.set(&format!("/hooks/{kind}"), json!([script(kind)]));
    }
    let bundle = world.bundle(&config)?;
    let mut run = world.command(&["run", "--bundle", &bundle.to_string_lossy(), &world.name("run")]);
    run.env("OF_CALLER", "seen");
    process::run(run, b"", world.patience())?.code(0)?.quiet()?;
    for kind in HOST {
        same(&fs::read_to_string(told.join(kind))?, &"seen\n".into()).context(kind)?;
    }
    Ok(())
}

/// A hook without a timeout may take for ever, but not longer than its container exists.
fn hang(world: &'static World, kind: &str) -> Result<()> {
    let pid = world.make_dir("told")?.join("pid");
    let (bundle, _) = failing(world, kind, sh(&format!("echo $$ >{}; sleep 5000; :", pid.display())))?;
    let id = world.name("c");
    let create = process::start(create_command(world, &bundle, &id), true, world.patience())?;
    eventually("the hook", world.patience(), || Ok(pid.exists()))?;
    let state: Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
    same(&state["status"], &json!("creating"))?;
    world.refused(&["start", &id], &["cannot start"])?.within(Duration::from_secs(3))?;
    world.refused(&["delete", &id], &["not stopped: creating"])?.within(Duration::from_secs(3))?;
    world.ok(&["delete", "--force", &id])?.within(Duration::from_millis(3500))?;
    create.finish()?.code(1)?.one_line(&[])?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn hang_start(world: &'static World) -> Result<()> {
    let (bundle, _) = failing(world, "startContainer", inside("sleep 5000"))?;
    let mut container = Container::of_bundle(world, bundle)?;
    let start = world.start(&["start", &container.id])?;
    std::thread::sleep(Duration::from_millis(300));
    container.expect_status("created")?;
    world.ok(&["delete", "--force", &container.id])?.within(Duration::from_millis(3500))?;
    start.finish()?.code(1)?.one_line(&[])?;
    same(&container.wait()?, &137)
}
