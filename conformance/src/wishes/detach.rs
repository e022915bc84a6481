//! `exec --detach`: the process that stays behind and stands for the program.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, getpgid, getsid};
use serde_json::json;

use super::bench::{Bench, plain_process};
use super::run::same;
use crate::cases::{At, Case, Wish, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, eventually};
use crate::world::World;

/// How long what must be prompt may take.
const PROMPT: Duration = Duration::from_secs(5);

/// Wishes for the bench.
pub const SHARED: &[Wish<Bench>] = &[
    ("detach/the-pid-is-adopted-and-ends-with-the-programs-status", |bench| {
        for (script, status) in [("exit 42", 42), ("kill -KILL $$", 137), ("kill -TERM $$", 143), ("true", 0)]
        {
            let left = Detached::start(bench, &["sh", "-c", script])?;
            same(&process::wait_child(left.pid, bench.world().patience())?, &status).context(script)?;
        }
        Ok(())
    }),
    ("detach/streams-are-the-programs-to-their-end", |bench| {
        let left = Detached::start(bench, &["sh", "-c", "wc -c; echo err >&2; seq 20000 | tail -n 1"])?;
        same(&process::wait_child(left.pid, bench.world().patience())?, &0)?;
        same(&(left.output().trim(), left.errors().as_str()), &("5\n20000", "err\n"))
    }),
    ("detach/session-group-and-cgroup-are-not-the-callers", places),
    ("detach/nothing-of-the-callers-is-held-but-the-streams", descriptors),
    ("detach/every-signal-reaches-the-program", |bench| {
        for (signal, name) in [
            (Signal::TERM, "TERM"),
            (Signal::USR1, "USR1"),
            (Signal::INT, "INT"),
            (Signal::HUP, "HUP"),
            (Signal::PIPE, "PIPE"),
            (Signal::TSTP, "TSTP"),
            (Signal::WINCH, "WINCH"),
        ] {
            forward(bench, signal, name).context(name)?;
        }
        Ok(())
    }),
    ("detach/sigkill-of-the-pid-ends-the-program", |bench| {
        let left = Detached::start(bench, &["sh", "-c", "echo ready; exec sleep 54322"])?;
        left.await_output("ready", bench)?;
        ensure!(bench.container.sh("ps -o args")?.contains("sleep 54322"), "it does not run at all");
        process::signal(left.pid, Signal::KILL)?;
        let limit = if bench.world().is_vm() { PROMPT } else { Duration::from_secs(1) };
        eventually("the end of the killed pid's program", limit, || {
            Ok(!bench.container.sh("ps -o args")?.contains("sleep 54322"))
        })?;
        same(&process::wait_child(left.pid, PROMPT)?, &137)
    }),
    ("detach/the-process-file-is-read-before-it-returns", |bench| {
        let mut given = plain_process();
        given["args"] = json!(["sh", "-c", "sleep 0.3; echo read in time"]);
        let file = bench.process_file(&given)?;
        let left = Detached::with(bench, &["--process", &file], &[])?;
        fs::remove_file(&file)?;
        same(&process::wait_child(left.pid, bench.world().patience())?, &0)?;
        same(&left.output(), &"read in time\n".into())
    }),
    ("detach/what-does-not-start-leaves-no-pid-file", |bench| {
        for (args, words) in [
            (["no-such-program"].as_slice(), "executable file not found in $PATH"),
            (&["/no/such"], "no such file or directory"),
            (&["/opt/plain"], "permission denied"),
            (&["/opt"], "is a directory"),
        ] {
            refused(&bench.container, &[], args, &[words])?;
        }
        Ok(())
    }),
    ("exec/a-pid-file-in-the-foreground-names-the-command", foreground_pid_file),
    ("exec/cgroup-takes-paths-below-the-containers", cgroups),
    ("exec/labels-are-ignored-with-a-warning", |bench| {
        let id = bench.container.id.clone();
        for (flag, field) in [("--apparmor", "apparmorProfile"), ("--process-label", "selinuxLabel")] {
            let output = bench.world().call(&["exec", flag, "some:label", &id, "echo", "ran"])?.code(0)?;
            same(&output.text(), &"ran\n".into())?;
            output.one_line(&["warning", field, "some:label", "ignored"])?;
        }
        let mut labelled = plain_process();
        labelled["apparmorProfile"] = json!("engine-default");
        // An engine's exec has the program's own standard error.
        bench.process(&labelled)?.code(0)?.quiet().map(drop)
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "exec/cgroup-is-joined-where-the-container-made-it", sub_cgroup),
        wish(At::Both, "detach/ends-when-the-vm-does", ends_with_vm),
        wish(At::Local, "detach/works-in-a-created-container", in_created),
        wish(At::Both, "detach/paused-stopped-and-unknown-are-refused-without-a-pid-file", refusals),
        wish(At::Local, "detach/exec-killed-at-any-moment-leaves-what-delete-removes", killed_midway),
        wish(At::Local, "detach/an-ended-container-can-be-deleted-at-once", ended_container),
    ]
}

/// A program that runs on after `exec` has returned.
struct Detached {
    pid: i32,
    dir: PathBuf,
}

impl Detached {
    fn start(bench: &Bench, args: &[&str]) -> Result<Self> {
        Self::with(bench, &[], args)
    }

    fn with(bench: &Bench, flags: &[&str], args: &[&str]) -> Result<Self> {
        Self::of(&bench.container, flags, args)
    }

    fn of(container: &Container, flags: &[&str], args: &[&str]) -> Result<Self> {
        let dir = container.world.make_dir("detached")?;
        let mut command = command(container, flags, args, &dir);
        fs::write(dir.join("in"), "input")?;
        command
            .stdin(File::open(dir.join("in"))?)
            .stdout(File::create(dir.join("out"))?)
            .stderr(File::create(dir.join("err"))?);
        let ended = process::start(command, false, container.world.patience())?.finish()?;
        let said = fs::read_to_string(dir.join("err"))?;
        ensure!(ended.code == 0, "{}: ended with {}: {said:?}", ended.shown, ended.code);
        let text = fs::read_to_string(dir.join("pid")).context("the pid file")?;
        ensure!(
            text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0'),
            "pid file {text:?}"
        );
        Ok(Detached { pid: text.parse().with_context(|| format!("pid file {text:?}"))?, dir })
    }

    fn output(&self) -> String {
        fs::read_to_string(self.dir.join("out")).unwrap_or_default()
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.dir.join("err")).unwrap_or_default()
    }

    fn await_output(&self, text: &str, bench: &Bench) -> Result<()> {
        eventually(text, bench.world().patience(), || Ok(self.output().contains(text)))
    }
}

fn command(container: &Container, flags: &[&str], args: &[&str], dir: &Path) -> Command {
    let pid_file = dir.join("pid").to_string_lossy().into_owned();
    let begin = ["exec", "--detach", "--pid-file", pid_file.as_str()];
    container.world.command(&[&begin, flags, &[container.id.as_str()], args].concat())
}

/// It must fail with 255, these words, and no pid file.
fn refused(container: &Container, flags: &[&str], args: &[&str], words: &[&str]) -> Result<()> {
    let dir = container.world.make_dir("refused")?;
    let output = process::run(command(container, flags, args, &dir), b"", container.world.patience())?;
    output.code(255)?.one_line(words)?;
    ensure!(!dir.join("pid").exists(), "a pid file after {words:?}");
    Ok(())
}

fn places(bench: &mut Bench) -> Result<()> {
    let left = Detached::start(bench, &["sleep", "1000"])?;
    let pid = Pid::from_raw(left.pid).context("pid 0")?;
    same(&getsid(Some(pid))?, &pid)?;
    same(&getpgid(Some(pid))?, &pid)?;
    let cgroup = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    same(&cgroup(left.pid)?, &cgroup(bench.container.pid)?)?;
    same(&fs::read_link(format!("/proc/{}/cwd", left.pid))?, &PathBuf::from("/"))?;
    let pids = bench.world().ok(&["ps", "--format", "json", &bench.container.id])?.text();
    let pids: Vec<i32> = serde_json::from_str(&pids)?;
    ensure!(pids.contains(&left.pid), "{} is not among {pids:?}", left.pid);
    process::signal(left.pid, Signal::KILL)?;
    process::wait_child(left.pid, PROMPT).map(drop)
}

fn descriptors(bench: &mut Bench) -> Result<()> {
    let dir = bench.world().make_dir("held")?;
    fs::write(dir.join("secret"), "")?;
    let line = command(&bench.container, &[], &["sh", "-c", "echo ready; exec sleep 1000"], &dir);
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("cd \"$0\" && exec 7<secret && exec \"$@\"").arg(&dir).arg(line.get_program());
    let out = dir.join("out");
    shell.args(line.get_args()).stdin(Stdio::null()).stdout(File::create(&out)?).stderr(Stdio::null());
    same(&process::start(shell, false, bench.world().patience())?.finish()?.code, &0)?;
    let pid: i32 = fs::read_to_string(dir.join("pid"))?.parse()?;
    // runc's own set-up, with descriptors of its own, may outlast the command: the program has none of them.
    eventually("the program", bench.world().patience(), || Ok(fs::read_to_string(&out)? == "ready\n"))?;
    let targets = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().map(|entry| fs::read_link(entry.path()));
    let held: Vec<String> = targets.flatten().map(|target| target.to_string_lossy().into_owned()).collect();
    let streams = ["/dev/null", &out.to_string_lossy()].map(str::to_string);
    let files: Vec<_> = held.iter().filter(|name| name.starts_with('/') && !streams.contains(name)).collect();
    process::signal(pid, Signal::KILL)?;
    process::wait_child(pid, PROMPT)?;
    ensure!(files.is_empty(), "it holds {files:?}");
    Ok(())
}

fn forward(bench: &Bench, signal: Signal, name: &str) -> Result<()> {
    let script = format!("trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done");
    let left = Detached::start(bench, &["sh", "-c", &script])?;
    left.await_output("ready", bench)?;
    process::signal(left.pid, signal)?;
    same(&process::wait_child(left.pid, bench.world().patience())?, &9)?;
    same(&left.output(), &format!("ready\ngot {name}\n"))
}

fn foreground_pid_file(bench: &mut Bench) -> Result<()> {
    let pid_file = bench.container.bundle.join("foreground-pid");
    let args = ["exec", "--pid-file", &pid_file.to_string_lossy(), &bench.container.id, "sleep", "1000"]
        .map(str::to_string);
    let exec = bench.world().start(&args)?;
    eventually("the pid file", bench.world().patience(), || Ok(pid_file.exists()))?;
    same(&fs::read_to_string(&pid_file)?, &exec.pid().to_string())?;
    ensure!(bench.container.sh("ps -o args")?.contains("sleep 1000"), "a pid file, and no program");
    exec.signal(Signal::TERM)?;
    exec.finish()?.code(143)?;
    fs::remove_file(&pid_file)?;
    let args = ["exec", "--pid-file", &pid_file.to_string_lossy(), &bench.container.id, "no-such"]
        .map(str::to_string);
    bench.world().call(&args)?.code(255)?.one_line(&["executable file not found"])?;
    ensure!(!pid_file.exists(), "a pid file of a program that did not start");
    Ok(())
}

fn cgroups(bench: &mut Bench) -> Result<()> {
    let id = bench.container.id.clone();
    let own = bench.world().ok(&["exec", "--cgroup", "/", &id, "cat", "/proc/self/cgroup"])?.text();
    ensure!(own.lines().any(|line| line == "0::/"), "{own}");
    for (path, words) in [
        ("cpu:/x", "cgroup v2"),
        ("../x", "not below"),
        ("a/../../x", "not below"),
        ("/no/such", "cgroup no/such"),
    ] {
        bench.world().call(&["exec", "--cgroup", path, &id, "true"])?.code(255)?.one_line(&[words])?;
    }
    Ok(())
}

fn sub_cgroup(world: &'static World) -> Result<()> {
    let config = Config::idle().mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev"]);
    let container = Container::running(world, &config)?;
    container.sh("mkdir -p /sys/fs/cgroup/part/of")?;
    for path in ["part/of", "/part/of"] {
        let said = world.ok(&["exec", "--cgroup", path, &container.id, "cat", "/proc/self/cgroup"])?.text();
        ensure!(said.lines().any(|line| line == "0::/part/of"), "{path}: {said}");
    }
    // As a service manager inside leaves it: the first process has moved down, the cgroup itself takes nobody.
    let moved = container.exec(&[
        "sh",
        "-c",
        "cd /sys/fs/cgroup && mkdir init && for p in $(cat cgroup.procs); do echo $p >init/cgroup.procs; done; \
         echo +pids >cgroup.subtree_control && cat cgroup.subtree_control",
    ])?;
    if world.is_vm() {
        moved.code(0)?;
        let said = container.sh("grep ^0:: /proc/self/cgroup")?;
        ensure!(said == "0::/init", "{said}");
    }
    Ok(())
}

fn ends_with_vm(world: &'static World) -> Result<()> {
    let mut bench = Bench::set_up(world)?;
    let left = Detached::start(&bench, &["sleep", "1000"])?;
    let flags = ["--process", "/no/such/file"];
    refused(&bench.container, &flags, &[], &["/no/such/file"])?;
    process::signal(bench.container.pid, Signal::KILL)?;
    same(&process::wait_child(left.pid, Duration::from_secs(3))?, &137)?;
    same(&bench.container.wait()?, &137)?;
    bench.container.delete(&[])
}

fn in_created(world: &'static World) -> Result<()> {
    let mut container = Container::create(world, &Config::sh("echo started; exit 0"))?;
    let left = Detached::of(&container, &[], &["sh", "-c", "echo inside; exit 3"])?;
    same(&process::wait_child(left.pid, world.patience())?, &3)?;
    same(&left.output(), &"inside\n".into())?;
    container.expect_status("created")?;
    container.start()?;
    same(&container.wait()?, &0)?;
    container.delete(&[])
}

fn refusals(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    world.ok(&["pause", &container.id])?;
    let words = "cannot exec in a paused container (use --ignore-paused to override)";
    refused(&container, &[], &["true"], &[words])?;
    refused(&container, &["--ignore-paused"], &["true"], &["--ignore-paused", "frozen"])?;
    world.ok(&["resume", &container.id])?;
    container.kill("KILL")?;
    same(&container.wait()?, &137)?;
    refused(&container, &[], &["true"], &["cannot exec in a stopped container"])?;
    container.delete(&[])?;
    refused(&container, &[], &["true"], &["container does not exist"])
}

fn killed_midway(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::idle())?;
    for round in 0..world.by_level(25, 5, 100) {
        let dir = world.make_dir("midway")?;
        let mut line = command(&container, &[], &["sleep", "1000"], &dir);
        line.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let exec = process::start(line, false, world.patience())?;
        std::thread::sleep(Duration::from_millis(round * 2));
        let _ = exec.signal(Signal::KILL);
        let _ = exec.finish();
    }
    container.says("echo well", "well")?;
    container.delete(&["--force"])
}

fn ended_container(world: &'static World) -> Result<()> {
    let mut container = Container::running(world, &Config::sh("sleep 0.5; exit 4"))?;
    let left = Detached::of(&container, &[], &["sleep", "1000"])?;
    same(&container.wait()?, &4)?;
    container.delete(&[])?;
    ensure!(process::wait_child(left.pid, Duration::from_secs(1))? != 0, "it ended with 0 as its VM ended");
    Ok(())
}
