//! What a container in a pod does: it runs, is looked into, ends, and starts again.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::OfPods;
use super::host::Cri;
use super::pod::Member;
use super::stream::{RESIZE, STDERR, STDIN, STDOUT};
use crate::process::eventually;
use crate::wishes::same;

pub const WISHES: &[OfPods] = &[
    ("cri/exec-sync-gives-streams-and-status", exec_sync),
    ("cri/exec-sync-that-times-out-ends-its-program", timed_out),
    ("cri/ten-exec-syncs-at-once", storm),
    ("cri/exec-streams-and-has-a-terminal", streams),
    ("cri/attach-finds-the-containers-streams", attach),
    ("cri/a-container-starts-again-beside-the-others", restart),
    ("cri/logs-have-every-line-and-can-be-rotated", logs),
    ("cri/stop-asks-and-then-kills", grace),
    ("cri/out-of-memory-is-told", oom),
    ("cri/limits-can-be-changed", update),
    ("cri/a-command-that-is-missing-is-told", refused),
];

fn exec_sync(cri: &mut Cri) -> Result<()> {
    let one = &cri.shared()?.one;
    let reply = one.exec(&["sh", "-c", "echo out; echo err >&2; exit 5"])?;
    same(&reply, &json!({ "stdout": "out\n", "stderr": "err\n", "exit_code": 5 }))?;
    let long = one.sh("head -c 1000000 /dev/zero | tr '\\0' x")?;
    same(&long.len(), &1_000_000)?;
    let refused = one.exec(&["/no/such/program"]);
    let text = refused.err().context("a program that is not there ran")?;
    ensure!(format!("{text:#}").contains("no such file or directory"), "{text:#}");
    Ok(())
}

fn timed_out(cri: &mut Cri) -> Result<()> {
    let world = cri.world;
    let one = &cri.shared()?.one;
    let reply = one.ask("ExecSync", json!({ "cmd": ["sleep", "54321"], "timeout": 2 }));
    let text = format!("{:#}", reply.err().context("it did not time out")?);
    ensure!(text.contains("timeout 2s exceeded"), "{text}");
    eventually("the end of its program", world.patience(), || {
        Ok(!one.sh("ps -o args")?.contains("sleep 54321"))
    })
}

fn storm(cri: &mut Cri) -> Result<()> {
    let client = cri.client.clone();
    let one = cri.shared()?.one.id.clone();
    let exec = |number: usize| {
        let script = format!("echo {number}; echo {number} >&2; exit {number}");
        client.call("ExecSync", &json!({ "container_id": one, "cmd": ["sh", "-c", script], "timeout": 60 }))
    };
    let exec = &exec;
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..10).map(|number| scope.spawn(move || exec(number))).collect();
        for (number, call) in calls.into_iter().enumerate() {
            let Ok(reply) = call.join() else { bail!("a call panicked") };
            let said = format!("{number}\n");
            same(&reply?, &json!({ "stdout": said, "stderr": said, "exit_code": number }))?;
        }
        Ok(())
    })
}

fn streams(cri: &mut Cri) -> Result<()> {
    let one = &cri.shared()?.one;
    let script = ["sh", "-c", "read line; echo \"got $line\"; echo err >&2; exit 7"];
    let mut plain =
        one.stream("Exec", json!({ "cmd": script, "stdin": true, "stdout": true, "stderr": true }))?;
    plain.send(STDIN, b"typed\n")?;
    let ended = plain.finish()?;
    same(&(ended.stdout.as_str(), ended.stderr.as_str(), ended.code), &("got typed\n", "err\n", 7))?;
    let mut terminal =
        one.stream("Exec", json!({ "cmd": ["sh"], "tty": true, "stdin": true, "stdout": true }))?;
    terminal.send(RESIZE, br#"{"Width":99,"Height":31}"#)?;
    terminal.send(STDIN, b"until [ \"$(stty size)\" = '31 99' ]; do sleep 0.1; done; echo it \"fits\"\n")?;
    terminal.read_until(STDOUT, "it fits")?;
    terminal.send(RESIZE, br#"{"Width":132,"Height":40}"#)?;
    terminal
        .send(STDIN, b"until [ \"$(stty size)\" = '40 132' ]; do sleep 0.1; done; echo it \"follows\"\n")?;
    terminal.read_until(STDOUT, "it follows")?;
    terminal.send(STDIN, b"exit 6\n")?;
    same(&terminal.finish()?.code, &6)
}

fn attach(cri: &mut Cri) -> Result<()> {
    let pod = &cri.shared()?.pod;
    let script =
        "while read line; do echo \"got $line\"; echo \"err $line\" >&2; [ $line != end ] || exit 4; done";
    let member = pod.start(&pod.member(script).set("/stdin", json!(true)))?;
    let open = || member.stream("Attach", json!({ "stdin": true, "stdout": true, "stderr": true }));
    let mut first = open()?;
    first.send(STDIN, b"one\n")?;
    first.read_until(STDOUT, "got one\n")?;
    drop(first);
    let mut second = open()?;
    second.send(STDIN, b"two\n")?;
    second.read_until(STDERR, "err two\n")?;
    second.send(STDIN, b"end\n")?;
    second.read_until(STDOUT, "got end\n")?;
    same(&member.wait()?["exit_code"], &json!(4))?;
    ensure!(member.log()?.contains("got one\n"), "its log: {:?}", member.log()?);
    member.remove()
}

fn restart(cri: &mut Cri) -> Result<()> {
    let shared = cri.shared()?;
    let first = shared.pod.member("echo first; exit 3");
    let second = first
        .clone()
        .set("/metadata/attempt", json!(1))
        .set("/command/2", json!("echo second"))
        .set("/log_path", json!("second.log"));
    let first = shared.pod.start(&first)?;
    let status = first.wait()?;
    ensure!(status["exit_code"] == 3 && status["reason"] == "Error", "the first: {status}");
    let second = shared.pod.start(&second)?;
    let status = second.wait()?;
    ensure!(status["exit_code"] == 0 && status["reason"] == "Completed", "the second: {status}");
    same(&status["metadata"]["attempt"], &json!(1))?;
    let times = |key: &str| status[key].as_i64().unwrap_or_default();
    ensure!(times("created_at") < times("started_at"), "{status}");
    ensure!(times("started_at") < times("finished_at"), "{status}");
    same(&(first.log()?, second.log()?), &("first\n".into(), "second\n".into()))?;
    first.remove()?;
    second.remove()?;
    same(&shared.pod.status()?["state"], &json!(0))?;
    shared.one.lives()
}

fn heard(member: &Member, cri: &'static crate::world::World, words: &str) -> Result<()> {
    eventually(&format!("{words:?} in the log"), cri.patience(), || Ok(member.log()?.contains(words)))
}

fn logs(cri: &mut Cri) -> Result<()> {
    let world = cri.world;
    let pod = &cri.shared()?.pod;
    let script = "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; echo \"é end\"; \
        trap 'echo after; exit 0' TERM; while :; do sleep 0.1; done";
    let member = pod.start(&pod.member(script))?;
    heard(&member, world, "end\n")?;
    let raw = member.raw_log()?;
    for words in [" stdout F out\n", " stderr F err\n", " stdout P xxx", " stdout F é end\n"] {
        ensure!(raw.contains(words), "no {words:?} in {:?}", crate::process::brief(&raw));
    }
    ensure!(member.log()?.contains(&format!("{}\n", "x".repeat(40_000))), "the long line is not whole");
    let kept = member.log_path().with_extension("old");
    fs::rename(member.log_path(), &kept)?;
    member.ask("ReopenContainerLog", json!({}))?;
    member.stop(30)?;
    heard(&member, world, "after\n")?;
    same(&fs::read_to_string(kept)?, &raw)?;
    member.remove()
}

fn grace(cri: &mut Cri) -> Result<()> {
    let world = cri.world;
    let pod = &cri.shared()?.pod;
    let polite =
        pod.start(&pod.member("trap 'echo told; exit 9' TERM; echo set; while :; do sleep 0.1; done"))?;
    let deaf = pod.start(&pod.member("trap 'echo told' TERM; echo set; while :; do sleep 0.1; done"))?;
    heard(&polite, world, "set")?;
    polite.stop(60)?;
    same(&(polite.wait()?["exit_code"].clone(), polite.log()?), &(json!(9), "set\ntold\n".into()))?;
    heard(&deaf, world, "set")?;
    let begin = Instant::now();
    deaf.stop(3)?;
    let took = begin.elapsed();
    ensure!(took >= Duration::from_secs(3) && took < Duration::from_secs(20), "it took {took:.1?}");
    same(&(deaf.wait()?["exit_code"].clone(), deaf.log()?), &(json!(137), "set\ntold\n".into()))?;
    polite.remove()?;
    deaf.remove()
}

fn oom(cri: &mut Cri) -> Result<()> {
    let shared = cri.shared()?;
    let limit = "/linux/resources/memory_limit_in_bytes";
    let config = shared.pod.member("exec tail /dev/zero").set(limit, json!(48 << 20));
    let member = shared.pod.start(&config)?;
    let status = member.wait()?;
    ensure!(status["reason"] == "OOMKilled" && status["exit_code"] == 137, "it ended with {status}");
    member.remove()?;
    shared.one.lives()
}

fn update(cri: &mut Cri) -> Result<()> {
    let shared = cri.shared()?;
    let limit = "/linux/resources/memory_limit_in_bytes";
    let member = shared.pod.start(&shared.pod.member("sleep 100000").set(limit, json!(64 << 20)))?;
    member.says("cat /sys/fs/cgroup/memory.max", &(64 << 20).to_string())?;
    let more = json!({ "memory_limit_in_bytes": 80 << 20, "cpu_period": 100_000, "cpu_quota": 50_000 });
    member.ask("UpdateContainerResources", json!({ "linux": more }))?;
    member.says(
        "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max",
        &format!("{}\n50000 100000", 80 << 20),
    )?;
    member.remove()
}

fn refused(cri: &mut Cri) -> Result<()> {
    let shared = cri.shared()?;
    let member = shared.pod.create(&shared.pod.member("").set("/command", json!(["/no/such/program"])))?;
    let text = format!("{:#}", member.start().err().context("it started")?);
    ensure!(text.contains("no such file or directory"), "{text}");
    let status = member.status()?;
    ensure!(status["reason"] == "StartError" && status["exit_code"] == 128, "{status}");
    member.remove()?;
    shared.one.lives()
}
