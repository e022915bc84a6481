//! `exec` in the foreground, without a terminal.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::bench::{Bench, plain_process};
use super::run::same;
use crate::cases::{At, Case, Wish, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, brief, eventually};
use crate::world::World;

/// Wishes for the bench.
pub const SHARED: &[Wish<Bench>] = &[
    ("exec/output-errors-and-status-are-the-programs", |bench| {
        let output = bench.container.exec(&["sh", "-c", "echo out; echo err >&2; exit 7"])?.code(7)?;
        same(&(output.text().as_str(), output.stderr.as_str()), &("out\n", "err\n"))
    }),
    ("exec/stdin-reaches-the-program-to-its-end", |bench| {
        same(&bench.feed(b"one\ntwo\n", &["wc", "-l"])?.code(0)?.text().trim().to_string(), &"2".into())
    }),
    ("exec/a-conversation-goes-both-ways", conversation),
    ("exec/arguments-arrive-unchanged", arguments),
    ("exec/options-after-the-id-belong-to-the-program", |bench| {
        let output = bench.container.exec(&["echo", "--help", "-e", "A=1", "--", "-n"])?.code(0)?;
        same(&output.text(), &"--help -e A=1 -- -n\n".into())
    }),
    ("exec/death-by-a-signal-is-128-plus-its-number", |bench| {
        bench.container.exec(&["sh", "-c", "kill -KILL $$"])?.code(137)?;
        bench.container.exec(&["sh", "-c", "kill -TERM $$"])?.code(143).map(drop)
    }),
    ("exec/every-exit-status", |bench| {
        for status in [1, 42, 126, 127, 255] {
            bench.container.exec(&["sh", "-c", &format!("exit {status}")])?.code(status)?.quiet()?;
        }
        Ok(())
    }),
    ("exec/a-missing-program-is-an-error-in-runcs-words", missing_program),
    ("exec/flags-change-the-containers-own-process", flags),
    ("exec/a-process-file-is-the-whole-process", process_file),
    ("exec/a-bad-process-file-is-one-clear-error", bad_process_file),
    ("exec/what-comes-later-is-refused-in-words", refused_flags),
    ("exec/signals-are-forwarded", |bench| forward(bench, Signal::TERM, "TERM")),
    ("exec/killed-exec-takes-its-process-along", killed),
    ("exec/orphans-are-reaped", orphans),
    ("exec/a-background-process-does-not-hold-it-and-lives-on", background),
    ("exec/the-program-is-in-the-containers-namespaces", |bench| {
        let script =
            "for n in pid mnt uts ipc net cgroup; do readlink /proc/1/ns/$n; readlink /proc/self/ns/$n; done";
        let links = bench.container.sh(script)?;
        let lines: Vec<&str> = links.lines().collect();
        ensure!(lines.len() == 12 && lines.chunks(2).all(|pair| pair[0] == pair[1]), "{links}");
        Ok(())
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::All, "exec/works-in-a-created-container", in_created),
        wish(At::Local, "exec/more-signals-are-forwarded", more_signals),
        wish(At::Local, "exec/hundreds-leave-no-descriptor-behind", hundreds),
        wish(At::Local, "exec/ends-with-its-container", ends_with_container),
    ]
}

fn conversation(bench: &mut Bench) -> Result<()> {
    let mut cat = bench.spawn(&["cat"])?;
    for round in 0..20 {
        cat.feed(format!("line {round}\n").as_bytes())?;
        cat.read_until(&format!("line {round}\n"))?;
    }
    cat.finish()?.code(0).map(drop)
}

fn arguments(bench: &mut Bench) -> Result<()> {
    let words =
        ["", " ", "a b", "'", "\"", "\\", "$HOME", "*", "ä€😀", "line\nbreak", "\t", "-", "--", "a=b"];
    let args: Vec<&str> = ["printf", "[%s]"].into_iter().chain(words).collect();
    let expected: String = words.iter().map(|word| format!("[{word}]")).collect();
    same(&bench.container.exec(&args)?.code(0)?.text(), &expected)?;
    let long = "x".repeat(100_000);
    same(&bench.container.exec(&["sh", "-c", "echo ${#1}", "sh", &long])?.code(0)?.text(), &"100000\n".into())
}

/// So many at once, each with its own input, output, errors and status.
pub fn parallel(container: &Container, count: i32) -> Result<()> {
    let script = "cat; sleep 0.2; echo $1; echo $1 >&2; exit $1";
    let spawn = |number: i32| container.spawn(&["sh", "-c", script, "sh", &number.to_string()]);
    let mut all: Vec<_> = (1..=count).map(spawn).collect::<Result<_>>()?;
    for one in &mut all {
        one.feed(b"in ")?;
        one.close_stdin();
    }
    for (number, one) in (1..).zip(all) {
        let output = one.finish()?.code(number)?;
        same(&(output.text(), output.stderr), &(format!("in {number}\n"), format!("{number}\n")))?;
    }
    Ok(())
}

fn missing_program(bench: &mut Bench) -> Result<()> {
    let start = "exec failed: unable to start container process: ";
    for (program, words) in [
        ("no-such", "exec: \"no-such\": executable file not found in $PATH"),
        ("/no/such", "exec: \"/no/such\": stat /no/such: no such file or directory"),
        ("/opt/plain", "exec: \"/opt/plain\": permission denied"),
        ("/etc", "is a directory"),
        ("/opt/plain/x", "not a directory"),
    ] {
        bench.container.exec(&[program])?.code(255)?.one_line(&[start, words])?;
    }
    let output = bench.container.exec(&["--help"]);
    ensure!(output.is_ok(), "{output:?}");
    let mut process = plain_process();
    process["cwd"] = json!("/no/such/dir");
    process["args"] = json!(["true"]);
    let words = "chdir to cwd (\"/no/such/dir\") set in config.json failed: no such file or directory";
    let output = bench.process(&process)?;
    // runc makes a missing directory for the first process only.
    output.code(255)?.one_line(&[words]).map(drop)
}

fn flags(bench: &mut Bench) -> Result<()> {
    let id = bench.container.id.clone();
    let world = bench.world();
    let call = |flags: &[&str], script: &str| -> Result<String> {
        let args = [&["exec"], flags, &[id.as_str(), "sh", "-c", script]].concat();
        Ok(world.ok(&args)?.text().trim_end().to_string())
    };
    same(&call(&[], "echo $FROM_CONFIG")?, &"yes".into())?;
    same(&call(&["--env", "A=1", "-e", "FROM_CONFIG=no"], "echo $A $FROM_CONFIG")?, &"1 no".into())?;
    same(&call(&["--cwd", "/opt/tools"], "pwd")?, &"/opt/tools".into())?;
    same(&call(&["--user", "1000"], "id -u")?, &"1000".into())?;
    same(
        &call(
            &["-u", "1000:1001", "--additional-gids", "7"],
            "id -u; id -g; id -G | tr ' ' '\\n' | grep -x 7",
        )?,
        &"1000\n1001\n7".into(),
    )?;
    same(
        &call(&["--no-new-privs"], "grep NoNewPrivs /proc/self/status | tr -d '\\t'")?,
        &"NoNewPrivs:1".into(),
    )?;
    let effective = u64::from_str_radix(
        &call(&["--cap", "CAP_SYS_PTRACE"], "grep CapEff /proc/self/status | cut -f 2")?,
        16,
    )?;
    ensure!(effective & (1 << 19) != 0, "CapEff {effective:x} is without CAP_SYS_PTRACE");
    for (flags, words) in [
        (["--user", "nobody"], "--user"),
        (["--env", "NOVALUE"], "NOVALUE"),
        (["--cap", "CAP_NONSENSE"], "CAP_NONSENSE"),
        (["--cwd", "relative"], "relative"),
    ] {
        world.call(&[&["exec"], &flags[..], &[&id, "true"]].concat())?.code(255)?.one_line(&[words])?;
    }
    Ok(())
}

fn process_file(bench: &mut Bench) -> Result<()> {
    let process = json!({
        "user": { "uid": 12, "gid": 34, "additionalGids": [56, 78], "umask": 0o77 },
        "env": ["PATH=/opt/tools:/bin", "ONLY=this"],
        "cwd": "/opt",
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 99, "soft": 77 }, { "type": "RLIMIT_CORE", "hard": 0, "soft": 0 }],
        "noNewPrivileges": true,
        "somethingUnknown": { "is": "ignored" },
        "terminal": false,
        "consoleSize": { "height": 1, "width": 2 }
    });
    let script = "id -u; id -g; id -G; umask; pwd; ulimit -n; ulimit -H -n; ulimit -c; env | sort; only-here";
    let expected = [
        "12",
        "34",
        "34 56 78",
        "0077",
        "/opt",
        "77",
        "99",
        "0",
        "HOME=/",
        "ONLY=this",
        "PATH=/opt/tools:/bin",
        "PWD=/opt",
        "SHLVL=1",
        "found only here",
    ];
    let said = bench.says_as(process, script)?;
    let lines: Vec<&str> = said.lines().filter(|line| !line.starts_with("OLDPWD")).collect();
    same(&lines, &expected.to_vec())
}

fn bad_process_file(bench: &mut Bench) -> Result<()> {
    let with = |change: fn(&mut Value)| {
        let mut process = plain_process();
        change(&mut process);
        process
    };
    for (process, words) in [
        (with(|p| p["args"] = json!([])), "process.args"),
        (with(|p| p["cwd"] = json!("relative")), "process.cwd"),
        (with(|p| p["args"] = json!("true")), "process"),
        (json!("nonsense"), "process"),
        (with(|p| p["capabilities"] = json!({ "bounding": ["CAP_NONSENSE"] })), "CAP_NONSENSE"),
    ] {
        bench.process(&process)?.code(255)?.one_line(&[words]).with_context(|| process.to_string())?;
    }
    let id = bench.container.id.clone();
    let missing = bench.world().call(&["exec", "--process", "/no/such/file", &id])?;
    missing.code(255)?.one_line(&["/no/such/file", "no such file or directory"])?;
    let garbled = bench.container.bundle.join("garbled");
    fs::write(&garbled, "{")?;
    let output = bench.world().call(&["exec", "--process", &garbled.to_string_lossy(), &id])?;
    output.code(255)?.one_line(&["garbled"]).map(drop)
}

fn refused_flags(bench: &mut Bench) -> Result<()> {
    let id = bench.container.id.clone();
    let output = bench.world().call(&["exec", "--preserve-fds", "1", &id, "true"])?;
    output.code(255)?.one_line(&["--preserve-fds 1", "cannot"])?;
    bench.world().ok(&["exec", "--preserve-fds", "0", &id, "true"]).map(drop)
}

fn forward(bench: &Bench, signal: Signal, name: &str) -> Result<()> {
    let script = format!("trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done");
    let mut exec = bench.spawn(&["sh", "-c", &script])?;
    exec.read_until("ready")?;
    exec.signal(signal)?;
    same(&exec.finish()?.code(9)?.text(), &format!("ready\ngot {name}\n"))
}

fn more_signals(world: &'static World) -> Result<()> {
    let bench = Bench::set_up(world)?;
    [
        (Signal::INT, "INT"),
        (Signal::HUP, "HUP"),
        (Signal::USR2, "USR2"),
        (Signal::QUIT, "QUIT"),
        (Signal::ALARM, "ALRM"),
    ]
    .into_iter()
    .try_for_each(|(signal, name)| forward(&bench, signal, name).context(name))
}

fn killed(bench: &mut Bench) -> Result<()> {
    let mut exec = bench.spawn(&["sh", "-c", "echo ready; exec sleep 54321"])?;
    exec.read_until("ready")?;
    same(&bench.container.sh("pidof sleep | wc -w")?, &"2".into())?;
    exec.signal(Signal::KILL)?;
    let limit = Duration::from_secs(if bench.world().is_vm() { 5 } else { 1 });
    eventually("the end of the killed exec's process", limit, || {
        Ok(!bench.container.sh("ps -o args")?.contains("sleep 54321"))
    })?;
    exec.finish()?.code(137).map(drop)
}

fn orphans(bench: &mut Bench) -> Result<()> {
    for _ in 0..5 {
        bench.container.sh("(sleep 0.1 </dev/null >/dev/null 2>&1 &); (true &); exit 0")?;
    }
    let zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z '";
    let limit = bench.world().patience();
    eventually("the reaping of orphans", limit, || {
        Ok(bench.container.exec(&["sh", "-c", zombies])?.text().trim() == "0")
    })
}

fn background(bench: &mut Bench) -> Result<()> {
    let script = "(until [ -e /shared/enough ]; do echo tick; echo tock >&2; sleep 0.2; done; touch /shared/lived) & echo started";
    let output = bench.container.exec(&["sh", "-c", script])?.code(0)?;
    ensure!(
        output.text().starts_with("started") || output.text().starts_with("tick"),
        "{:?}",
        brief(&output.text())
    );
    ensure!(output.text().contains("started"), "{:?}", brief(&output.text()));
    // Only now may what it has left in the background end: it was not waited for.
    fs::write(bench.shared.join("enough"), "")?;
    let marker = bench.shared.join("lived");
    eventually("the background process's end of work", bench.world().patience(), || Ok(marker.exists()))
}

fn in_created(world: &'static World) -> Result<()> {
    let mut container = Container::create(world, &Config::sh("echo started; exit 0"))?;
    container.says("cat /proc/1/comm >/dev/null; echo inside", "inside")?;
    container.expect_status("created")?;
    same(&container.output(), &String::new())?;
    container.start()?;
    same(&container.wait()?, &0)?;
    same(&container.output(), &"started\n".into())?;
    container.delete(&[])
}

fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn hundreds(world: &'static World) -> Result<()> {
    let bench = Bench::set_up(world)?;
    let count = || -> Vec<usize> {
        let family = crate::leaks::processes(world).into_iter();
        family.map(|(pid, _)| descriptors(pid)).collect()
    };
    parallel(&bench.container, 3)?;
    let mut before = count();
    eventually("the execs' end", Duration::from_secs(5), || {
        std::thread::sleep(Duration::from_millis(100));
        let now = count();
        Ok(std::mem::replace(&mut before, now.clone()) == now)
    })?;
    for _ in 0..world.by_level(5, 1, 25) {
        parallel(&bench.container, 20)?;
    }
    eventually("as few descriptors as before", Duration::from_secs(5), || Ok(count() == before))
        .with_context(|| format!("{:?}, not {before:?}", count()))
}

fn ends_with_container(world: &'static World) -> Result<()> {
    let mut bench = Bench::set_up(world)?;
    let mut exec = bench.spawn(&["sh", "-c", "echo ready; exec sleep 1000"])?;
    exec.read_until("ready")?;
    bench.container.kill("KILL")?;
    same(&bench.container.wait()?, &137)?;
    let output = exec.finish()?.within(Duration::from_secs(3))?;
    ensure!(output.code != 0, "exec ended with 0 as its container was killed");
    let mut exec = process::start(bench.container.exec_command(&["true"]), true, world.patience())?;
    exec.close_stdin();
    exec.finish()?.code(255).map(drop)
}
