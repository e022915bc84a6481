//! What users of docker and of podman do alike, and expect.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::engine::Engine;
use crate::process::{self, eventually};
use crate::wishes::same;

/// The wishes of both, under an engine's name.
macro_rules! of {
    ($engine:literal) => {
        [
            (concat!($engine, "/run-ends-as-the-workload-does"), $crate::engines::users::exit_codes),
            (concat!($engine, "/wait-tells-how-each-start-ended"), $crate::engines::users::waits),
            (concat!($engine, "/streams-arrive-whole-and-apart"), $crate::engines::users::streams),
            (concat!($engine, "/flags-of-run-show-inside"), $crate::engines::users::surroundings),
            (concat!($engine, "/run-and-exec-have-terminals-that-follow"), $crate::engines::terminals::both),
            (concat!($engine, "/exec-logs-cp-pause-top-stats-stop-wait"), $crate::engines::users::life),
            (concat!($engine, "/update-changes-limits-inside"), $crate::engines::users::update),
            (concat!($engine, "/out-of-memory-is-told"), $crate::engines::users::out_of_memory),
            (concat!($engine, "/init-and-restart"), $crate::engines::users::init_and_restart),
            (concat!($engine, "/killed-by-the-engine-and-by-others"), $crate::engines::users::deaths),
        ] as [$crate::cases::Wish<$crate::engines::engine::Engine>; 10]
    };
}
pub(super) use of;

/// `run --rm`: the workload's exit status, or why there is none.
pub fn exit_codes(engine: &mut Engine) -> Result<()> {
    for (args, code) in [
        (&["sh", "-c", "exit 42"][..], 42),
        (&["/no/such/program"], 127),
        (&["no-such-program"], 127),
        (&["/etc/passwd"], 126),
        (&["/etc"], 126),
    ] {
        engine.run(&["--rm"], args)?.code(code)?;
    }
    Ok(())
}

/// `create`, `cp` into what has never run, then `start` and `wait` again and again.
pub fn waits(engine: &mut Engine) -> Result<()> {
    let name = engine.world.name("box");
    let script = ["sh", "-c", "exit $(cat /root/status)"];
    engine.call(&engine.making("create", &["--name", &name], &script))?.code(0)?;
    let status = engine.world.make_dir("status")?.join("status");
    for code in ["0", "1", "127"] {
        fs::write(&status, code)?;
        engine.ok(&["cp", &status.display().to_string(), &format!("{name}:/root/status")])?;
        engine.ok(&["start", &name])?;
        same(&engine.ok(&["wait", &name])?.as_str(), &code)?;
    }
    engine.remove(&name)
}

/// `run --rm -i`: bytes in, bytes out, standard error apart.
pub fn streams(engine: &mut Engine) -> Result<()> {
    let script = ["sh", "-c", "md5sum; echo apart >&2"];
    let command = engine.command(&engine.making("run", &["--rm", "--interactive"], &script));
    let output = process::run(command, &vec![0; 2 << 20], engine.world.patience())?.code(0)?;
    same(&output.text(), &"b2d1236c286a3c0704224fe4105eca49  -\n".into())?;
    // docker itself warns where the host cannot limit swap.
    let lines: Vec<&str> = output.stderr.lines().filter(|line| !line.starts_with("WARNING: ")).collect();
    same(&lines, &vec!["apart"])
}

/// Flags of `run` that show inside.
pub fn surroundings(engine: &mut Engine) -> Result<()> {
    let dir = engine.world.make_dir("volume")?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
    fs::write(dir.join("file"), "from the host\n")?;
    let at = |rest: &str| format!("{}{rest}", dir.display());
    let (volume, fixed, file) = (at(":/data"), at(":/fixed:ro"), at("/file:/one:ro"));
    let flags = [
        "--rm",
        "--env",
        "A=b c",
        "--user",
        "1000:1001",
        "--workdir",
        "/tmp",
        "--hostname",
        "inside",
        "--volume",
        &volume,
        "--volume",
        &fixed,
        "--volume",
        &file,
        "--tmpfs",
        "/scratch:size=1m,mode=1777",
        "--read-only",
        "--ulimit",
        "nofile=77:88",
        "--cap-drop",
        "ALL",
    ];
    let script = "echo $A; id -u; id -g; pwd; hostname; cat /data/file /one; echo new >/data/new; \
        echo x 2>/dev/null >/one || echo file is read-only; echo x 2>/dev/null >/fixed/x || echo so is the directory; \
        echo x 2>/dev/null >/new || echo and the root; \
        echo x >/scratch/x && df -k /scratch | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2; ulimit -n; ulimit -Hn; \
        grep CapEff /proc/self/status | tr -s '\\t' ' '";
    let said = engine.run(&flags, &["sh", "-c", script])?.code(0)?.text();
    let expected = "b c\n1000\n1001\n/tmp\ninside\nfrom the host\nfrom the host\nfile is read-only\n\
        so is the directory\nand the root\n1024\n77\n88\nCapEff: 0000000000000000\n";
    same(&said, &expected.into())?;
    same(&fs::read_to_string(dir.join("new"))?, &"new\n".into())
}

/// A shared container's life: exec, logs, cp, pause, top, stats, stop, wait.
pub fn life(engine: &mut Engine) -> Result<()> {
    let script = "trap 'echo stopping; exit 9' TERM; trap 'echo heard' USR1; echo started; echo complaint >&2; while :; do sleep 0.1; done";
    let name = engine.up(&[], &["sh", "-c", script])?;
    engine.becomes(&name, ".State.Status", "running")?;
    same(&engine.sh(&name, "echo $((6 * 7))")?, &"42".into())?;
    for (script, code) in [("exit 1", 1), ("exit 7", 7), ("kill -KILL $$", 137)] {
        engine.call(&["exec", &name, "sh", "-c", script])?.code(code)?;
    }
    engine.call(&["exec", &name, "/etc/passwd"])?.code(126)?;
    engine.call(&["exec", &name, "/no/such/program"])?.code(127)?;
    same(
        &engine.ok(&[
            "exec",
            "--user",
            "5",
            "--workdir",
            "/tmp",
            "--env",
            "E=f",
            &name,
            "sh",
            "-c",
            "id -u; pwd; echo $E",
        ])?,
        &"5\n/tmp\nf".into(),
    )?;
    logs(engine, &name)?;
    copies(engine, &name)?;
    pause(engine, &name)?;
    figures(engine, &name)?;
    engine.ok(&["kill", "--signal", "USR1", &name])?;
    let mut follower =
        process::start(engine.command(&["logs", "--follow", &name]), true, engine.world.patience())?;
    follower.read_until("heard\n")?;
    let begin = Instant::now();
    engine.ok(&["stop", "--time", "60", &name])?;
    ensure!(begin.elapsed() < Duration::from_secs(50), "TERM did not reach the workload");
    same(&engine.ok(&["wait", &name])?, &"9".into())?;
    let followed = follower.finish()?.code(0)?.text();
    ensure!(followed.ends_with("stopping\n"), "the last line is not in the logs: {followed:?}");
    engine.remove(&name)
}

fn logs(engine: &Engine, name: &str) -> Result<()> {
    eventually("both lines in the logs", engine.world.patience(), || {
        let output = engine.call(&["logs", name])?.code(0)?;
        Ok(output.text() == "started\n" && output.stderr == "complaint\n")
    })
}

fn copies(engine: &Engine, name: &str) -> Result<()> {
    let dir = engine.world.make_dir("copies")?;
    fs::create_dir_all(dir.join("to/deep"))?;
    fs::write(dir.join("to/deep/file"), "to and fro")?;
    let at = |path: &str| dir.join(path).display().to_string();
    engine.ok(&["cp", &at("to"), &format!("{name}:/root/copy")])?;
    same(&engine.sh(name, "cd /root/copy/deep; cat file; echo -n -changed >>file")?, &"to and fro".into())?;
    engine.ok(&["cp", &format!("{name}:/root/copy/deep/file"), &at("back")])?;
    same(&fs::read_to_string(dir.join("back"))?, &"to and fro-changed".into())
}

fn pause(engine: &Engine, name: &str) -> Result<()> {
    engine.ok(&["pause", name])?;
    engine.becomes(name, ".State.Status", "paused")?;
    let refused = engine.call(&["exec", name, "true"])?;
    ensure!(refused.code != 0, "exec into a paused container succeeds");
    let file = engine.world.make_dir("asleep")?.join("file");
    fs::write(&file, "came in its sleep")?;
    engine.ok(&["cp", &file.display().to_string(), &format!("{name}:/root/asleep")])?;
    engine.ok(&["unpause", name])?;
    same(&engine.sh(name, "cat /root/asleep")?, &"came in its sleep".into())
}

fn figures(engine: &Engine, name: &str) -> Result<()> {
    let pid = engine.inspect(name, ".State.Pid")?;
    let top = engine.ok(&[&["top", name], engine.pids].concat())?;
    ensure!(top.split_whitespace().any(|word| word == pid), "top has no pid {pid}: {top}");
    let stats = engine.ok(&["stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}", name])?;
    let (memory, pids) = stats.split_once('|').unwrap_or_default();
    ensure!(memory.contains('B') && !memory.starts_with("0B"), "stats: {stats}");
    ensure!(pids.trim().parse::<u32>().is_ok_and(|pids| pids > 0), "stats: {stats}");
    Ok(())
}

/// `update` of a running container.
pub fn update(engine: &mut Engine) -> Result<()> {
    let name = engine.up(&[], &["sleep", "1000"])?;
    let limits = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max | tr '\\n' ' '";
    same(&engine.sh(&name, limits)?.replace(" 2048 ", " max "), &"134217728 max 100000 100000".into())?;
    let flags = ["--memory", "96m", "--memory-swap", "96m", "--pids-limit", "50", "--cpus", "0.5"];
    engine.ok(&[&["update"], &flags[..], &[&name]].concat())?;
    same(&engine.sh(&name, limits)?, &"100663296 50 50000 100000".into())?;
    engine.remove(&name)
}

/// The limit's victim ends as killed and the engine says by what; somebody else's victim does the first alone.
pub fn out_of_memory(engine: &mut Engine) -> Result<()> {
    let killed = engine.up(&[], &["sleep", "1000"])?;
    engine.ok(&["kill", &killed])?;
    let starved = engine.up(&[], &["tail", "/dev/zero"])?;
    for (name, for_memory) in [(&killed, "false"), (&starved, "true")] {
        same(&engine.ok(&["wait", name])?.as_str(), &"137")?;
        engine.becomes(name, ".State.OOMKilled", for_memory)?;
        engine.remove(name)?;
    }
    Ok(())
}

/// `--init` in front, and `restart`.
pub fn init_and_restart(engine: &mut Engine) -> Result<()> {
    let name = engine.up(&["--init"], &["sh", "-c", "echo up; sleep 1000"])?;
    let first = engine.sh(&name, "tr '\\0' ' ' </proc/1/cmdline")?;
    ensure!(first.contains("init") && first.contains("sleep"), "the first process is {first}");
    engine.ok(&["restart", "--time", "1", &name])?;
    engine.becomes(&name, ".State.Status", "running")?;
    same(&engine.sh(&name, "echo again")?, &"again".into())?;
    eventually("it was up twice", engine.world.patience(), || Ok(engine.ok(&["logs", &name])? == "up\nup"))?;
    engine.remove(&name)
}

/// SIGKILL by the engine, at once and after the grace, and by somebody else.
pub fn deaths(engine: &mut Engine) -> Result<()> {
    let name = engine.up(&[], &["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])?;
    let ended = || {
        engine.becomes(&name, ".State.Status", "exited")?;
        same(&engine.inspect(&name, ".State.ExitCode")?, &"137".into())
    };
    let again = || {
        engine.ok(&["start", &name])?;
        engine.becomes(&name, ".State.Status", "running")
    };
    engine.ok(&["kill", &name])?;
    ended()?;
    again()?;
    // So that the trap is set by now.
    engine.sh(&name, "true")?;
    let begin = Instant::now();
    engine.ok(&["stop", "--time", "3", &name])?;
    ensure!(begin.elapsed() >= Duration::from_secs(3), "killed after {:.1?} of grace", begin.elapsed());
    ended()?;
    again()?;
    process::signal(engine.inspect(&name, ".State.Pid")?.parse()?, Signal::KILL)?;
    ended()?;
    same(&engine.ok(&["wait", &name])?, &"137".into())?;
    engine.remove(&name)
}

/// A health check is an exec of the engine's.
pub fn healthcheck(engine: &mut Engine) -> Result<()> {
    let flags = ["--health-cmd", "test -e /tmp/well", "--health-interval", "1s", "--health-retries", "1"];
    let name = engine.up(&flags, &["sleep", "1000"])?;
    let health = ".State.Health.Status";
    engine.becomes(&name, health, "unhealthy")?;
    engine.sh(&name, "touch /tmp/well")?;
    engine.becomes(&name, health, "healthy")?;
    engine.remove(&name)
}
