//! What users of docker and of podman do alike, and expect.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::engine::Engine;
use crate::process::{self, eventually};
use crate::wishes::same;

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

/// `run --rm -i`: bytes in, bytes out, standard error apart.
pub fn streams(engine: &mut Engine) -> Result<()> {
    let base = ["run", "--rm", "-i", "--runtime", engine.runtime.as_str(), "--network", "none"];
    let script = ["sh", "-c", "md5sum; echo apart >&2"];
    let command =
        engine.command(&[&base, &super::engine::SMALL[..], &[super::engine::IMAGE], &script].concat());
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
    let (volume, file) = (format!("{}:/data", dir.display()), format!("{}/file:/one:ro", dir.display()));
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
        echo x 2>/dev/null >/one || echo file is read-only; echo x 2>/dev/null >/new || echo root is read-only; \
        echo x >/scratch/x && df -k /scratch | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2; ulimit -n; ulimit -Hn; \
        grep CapEff /proc/self/status | tr -s '\\t' ' '";
    let said = engine.run(&flags, &["sh", "-c", script])?.code(0)?.text();
    let expected = "b c\n1000\n1001\n/tmp\ninside\nfrom the host\nfrom the host\nfile is read-only\n\
        root is read-only\n1024\n77\n88\nCapEff: 0000000000000000\n";
    same(&said, &expected.into())?;
    same(&fs::read_to_string(dir.join("new"))?, &"new\n".into())
}

/// A shared container's life: exec, logs, cp, pause, top, stats, stop, wait.
pub fn life(engine: &mut Engine) -> Result<()> {
    let script =
        "trap 'echo stopping; exit 9' TERM; echo started; echo complaint >&2; while :; do sleep 0.1; done";
    let name = engine.up(&[], &["sh", "-c", script])?;
    engine.becomes(&name, ".State.Status", "running")?;
    same(&engine.sh(&name, "echo $((6 * 7))")?, &"42".into())?;
    engine.call(&["exec", &name, "sh", "-c", "exit 7"])?.code(7)?;
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
    let begin = Instant::now();
    engine.ok(&["stop", "--time", "60", &name])?;
    ensure!(begin.elapsed() < Duration::from_secs(50), "TERM did not reach the workload");
    same(&engine.ok(&["wait", &name])?, &"9".into())?;
    ensure!(engine.ok(&["logs", &name])?.contains("stopping"), "the last line is not in the logs");
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
    let (file, back) = (dir.join("file"), dir.join("back"));
    fs::write(&file, "to and fro")?;
    let file = file.display().to_string();
    engine.ok(&["cp", &file, &format!("{name}:/root/copy")])?;
    same(&engine.sh(name, "cat /root/copy; echo -n -changed >>/root/copy")?, &"to and fro".into())?;
    engine.ok(&["cp", &format!("{name}:/root/copy"), &back.display().to_string()])?;
    same(&fs::read_to_string(back)?, &"to and fro-changed".into())
}

fn pause(engine: &Engine, name: &str) -> Result<()> {
    engine.ok(&["pause", name])?;
    engine.becomes(name, ".State.Status", "paused")?;
    let refused = engine.call(&["exec", name, "true"])?;
    ensure!(refused.code != 0, "exec into a paused container succeeds");
    engine.ok(&["unpause", name])?;
    same(&engine.sh(name, "echo awake")?, &"awake".into())
}

fn figures(engine: &Engine, name: &str) -> Result<()> {
    let top = engine.ok(&["top", name])?;
    ensure!(top.lines().count() >= 2, "top: {top}");
    let stats = engine.ok(&["stats", "--no-stream", "--format", "{{.MemUsage}}", name])?;
    ensure!(stats.contains('B') && !stats.starts_with("0B"), "stats: {stats}");
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

/// SIGKILL by the engine, and by somebody else.
pub fn deaths(engine: &mut Engine) -> Result<()> {
    let name = engine.up(&[], &["sleep", "1000"])?;
    engine.ok(&["kill", &name])?;
    engine.becomes(&name, ".State.Status", "exited")?;
    same(&engine.inspect(&name, ".State.ExitCode")?, &"137".into())?;
    engine.ok(&["start", &name])?;
    engine.becomes(&name, ".State.Status", "running")?;
    let pid: i32 = engine.inspect(&name, ".State.Pid")?.parse()?;
    process::signal(pid, Signal::KILL)?;
    engine.becomes(&name, ".State.Status", "exited")?;
    same(&engine.inspect(&name, ".State.ExitCode")?, &"137".into())?;
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
