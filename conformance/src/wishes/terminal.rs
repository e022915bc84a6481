//! Terminals: of `create`, `run` and `exec`, by console socket and by the caller's own.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::{Value, json};

use super::bench::{Bench, plain_process};
use super::run::same;
use crate::cases::{At, Case, Wish, wish};
use crate::config::Config;
use crate::process::{self, eventually};
use crate::pty::{ConsoleSocket, Terminal};
use crate::world::World;

/// A prompt that no command line echoes.
const PROMPT: &str = "PS1='pro''mpt> '; PS1=pro\"mpt> \"\n";

/// Wishes for the bench.
pub const SHARED: &[Wish<Bench>] = &[
    ("terminal/exec-hands-one-to-the-console-socket", |bench| {
        let (mut terminal, pid) =
            detached(bench, &shell("tty; test -t 0 && test -t 1 && test -t 2 && echo all; exit 7"))?;
        let said = terminal.rest()?;
        same(&said.as_str(), &"/dev/pts/0\r\nall\r\n")?;
        same(&process::wait_child(pid, bench.world().patience())?, &7)
    }),
    ("terminal/it-has-a-size-from-the-start-and-follows-the-callers", sizes),
    ("terminal/keys-and-jobs-work-as-on-any-terminal", job_control),
    ("terminal/the-last-line-arrives-and-no-newline-twice", last_line),
    ("terminal/its-hangup-reaches-the-program", |bench| {
        let script = "trap 'echo hup >/shared/hup; exit 3' HUP; echo ready; while :; do sleep 0.05; done";
        let (mut terminal, pid) = detached(bench, &shell(script))?;
        terminal.expect("ready")?;
        drop(terminal);
        same(&process::wait_child(pid, bench.world().patience())?, &3)?;
        same(&fs::read_to_string(bench.shared.join("hup"))?.as_str(), &"hup\n")
    }),
    ("terminal/execs-own-is-raw-and-as-before-in-the-end", own_terminal),
    ("terminal/a-process-file-may-want-the-callers-own", |bench| {
        // As CRI-O does for `kubectl exec`: no socket, the command's streams are the terminal.
        let file = bench.process_file(&shell("stty size; read line; echo got $line; exit 9"))?;
        let args = ["exec", "--process", &file, &bench.container.id];
        let (mut terminal, exec, _slave) = Terminal::spawn(bench.world(), &args, (31, 99))?;
        terminal.expect("31 99\r\n")?;
        terminal.say("hello\n")?;
        terminal.expect("hello\r\ngot hello\r\n")?;
        exec.finish()?.code(9).map(drop)
    }),
    ("terminal/control-d-on-the-callers-ends-the-input-of-a-program-without-one", |bench| {
        let args = ["exec", &bench.container.id, "sh", "-c", "cat; echo over"];
        let (mut terminal, exec, _slave) = Terminal::spawn(bench.world(), &args, (24, 80))?;
        terminal.say("line\n\x04")?;
        terminal.expect("line\r\nline\r\nover\r\n")?;
        exec.finish()?.code(0).map(drop)
    }),
    ("terminal/one-without-the-other-is-refused-in-words", refusals),
    ("terminal/a-console-socket-may-have-a-long-name", |bench| {
        let dir = bench.world().make_dir(&"long".repeat(40))?;
        let (mut terminal, pid) = detached_by(bench, &shell("echo there"), &dir.join("s".repeat(200)))?;
        same(&terminal.rest()?.as_str(), &"there\r\n")?;
        same(&process::wait_child(pid, bench.world().patience())?, &0)
    }),
    ("terminal/sigkill-of-the-pid-ends-the-program", |bench| {
        let (mut terminal, pid) = detached(bench, &shell("echo ready; exec sleep 54323"))?;
        terminal.expect("ready")?;
        process::signal(pid, Signal::KILL)?;
        eventually("the end of its program", Duration::from_secs(5), || {
            Ok(!bench.container.sh("ps -o args")?.contains("sleep 54323"))
        })?;
        same(&process::wait_child(pid, bench.world().patience())?, &137)
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "terminal/of-the-container-itself", of_container),
        wish(At::Both, "terminal/run-uses-the-callers-own", run),
        wish(At::Local, "terminal/run-detached-wants-a-console-socket", run_detached),
    ]
}

fn shell(script: &str) -> Value {
    let mut process = plain_process();
    process["terminal"] = json!(true);
    process["args"] = json!(["/bin/sh", "-c", script]);
    process
}

fn detached(bench: &mut Bench, process: &Value) -> Result<(Terminal, i32)> {
    let dir = bench.world().make_dir("console")?;
    detached_by(bench, process, &dir.join("pty.sock"))
}

/// The command's own pipes must end with it, for nobody else has them; what it sends is there by then.
fn detached_by(bench: &mut Bench, process: &Value, path: &Path) -> Result<(Terminal, i32)> {
    let socket = ConsoleSocket::listen(path)?;
    let file = bench.process_file(process)?;
    let pid_file = bench.container.bundle.join("terminal-pid");
    let console = path.to_string_lossy();
    let args = ["exec", "--process", &file, "--console-socket", &console, "--detach", "--pid-file"];
    let world = bench.world();
    world.ok(&[&args[..], &[&pid_file.to_string_lossy(), &bench.container.id]].concat())?;
    let pid = fs::read_to_string(&pid_file).context("the pid file")?.parse()?;
    Ok((Terminal::of(socket.receive()?, world.patience())?, pid))
}

fn sizes(bench: &mut Bench) -> Result<()> {
    let mut process = shell("stty size; trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done");
    process["consoleSize"] = json!({ "height": 40, "width": 132 });
    let (mut terminal, pid) = detached(bench, &process)?;
    same(&terminal.expect("ready\r\n")?.as_str(), &"40 132\r\nready\r\n")?;
    for (rows, columns) in [(25, 80), (3, 7), (50, 200)] {
        terminal.resize(rows, columns)?;
        terminal.expect(&format!("{rows} {columns}\r\n"))?;
    }
    process::signal(pid, Signal::WINCH)?;
    terminal.expect("50 200\r\n").context("a SIGWINCH that is no resize")?;
    process::signal(pid, Signal::TERM)?;
    same(&process::wait_child(pid, bench.world().patience())?, &143)?;
    let mut process = shell("true");
    process["consoleSize"] = json!({ "height": 70000, "width": 1 });
    bench.process(&process)?.code(255)?.one_line(&["process.consoleSize.height", "70000"]).map(drop)
}

/// A shell edits its line with a terminal that it has set up for that: what is typed before it has let go of it is
/// no key of the next program's.
fn settle() {
    std::thread::sleep(Duration::from_millis(700));
}

fn job_control(bench: &mut Bench) -> Result<()> {
    let mut process = shell("");
    process["args"] = json!(["/bin/sh"]);
    let (mut terminal, pid) = detached(bench, &process)?;
    terminal.expect("# ")?;
    terminal.say(PROMPT)?;
    terminal.expect("\nprompt> ")?;
    // Typed once, seen once.
    terminal.say("echo so\n")?;
    let seen = terminal.expect("prompt> ")?;
    ensure!(seen.ends_with("echo so\r\nso\r\nprompt> ") && seen.matches("echo").count() == 1, "{seen:?}");
    terminal.say("sleep 1000\n")?;
    terminal.expect("sleep 1000\r\n")?;
    settle();
    terminal.say("\x03")?;
    terminal.expect("prompt> ").context("control-C")?;
    terminal.say("echo status $?\n")?;
    terminal.expect("status 130\r\n")?;
    terminal.expect("prompt> ")?;
    terminal.say("sleep 1001\n")?;
    terminal.expect("sleep 1001\r\n")?;
    settle();
    terminal.say("\x1a")?;
    terminal.expect("Stopped")?;
    terminal.expect("prompt> ").context("control-Z")?;
    terminal.say("bg\n")?;
    terminal.expect("prompt> ")?;
    terminal.say("jobs\n")?;
    terminal.expect("Running")?;
    terminal.expect("prompt> ")?;
    terminal.say("kill %1; cat\n")?;
    terminal.expect("cat\r\n")?;
    settle();
    terminal.say("linx\x7fe\n")?;
    terminal.expect("linx\x08 \x08e\r\nline\r\n").context("editing of a line")?;
    terminal.say("\x04")?;
    terminal.expect("prompt> ").context("control-D")?;
    terminal.say("exit 5\n")?;
    terminal.rest()?;
    same(&process::wait_child(pid, bench.world().patience())?, &5)
}

fn last_line(bench: &mut Bench) -> Result<()> {
    let rounds = bench.world().by_level(5, 2, 30);
    for _ in 0..rounds {
        let (mut terminal, pid) = detached(bench, &shell("seq 3000; printf the-end"))?;
        terminal.set_onlcr()?;
        let expected: String = (1..=3000).map(|n| format!("{n}\r\n")).chain(["the-end".into()]).collect();
        let said = terminal.rest()?;
        ensure!(
            said == expected,
            "{} bytes instead of {}: {:?}",
            said.len(),
            expected.len(),
            process::brief(&said)
        );
        same(&process::wait_child(pid, bench.world().patience())?, &0)?;
    }
    Ok(())
}

fn own_terminal(bench: &mut Bench) -> Result<()> {
    let script = "stty size; read -r line; echo got $line; trap 'stty size; exit 11' WINCH; echo ready; \
                  while :; do sleep 0.05; done";
    let args = ["exec", "--tty", &bench.container.id, "sh", "-c", script];
    let (mut terminal, exec, slave) = Terminal::spawn(bench.world(), &args, (33, 77))?;
    let before = tcgetattr(&slave)?;
    terminal.expect("33 77\r\n")?;
    ensure!(
        !tcgetattr(&slave)?.local_modes.contains(LocalModes::ECHO),
        "the caller's terminal echoes as well"
    );
    terminal.say("word\n")?;
    terminal.expect("word\r\ngot word\r\nready")?;
    terminal.resize(20, 60)?;
    terminal.expect("20 60\r\n")?;
    exec.finish()?.code(11)?;
    let after = tcgetattr(&slave)?;
    same(&(after.local_modes, after.output_modes), &(before.local_modes, before.output_modes))?;
    // One that does not start leaves the terminal as it was, and says so on it.
    let args = ["exec", "--tty", &bench.container.id, "no-such-program"];
    let (mut terminal, exec, slave) = Terminal::spawn(bench.world(), &args, (24, 80))?;
    exec.finish()?.code(255)?;
    same(&tcgetattr(&slave)?.local_modes, &before.local_modes)?;
    terminal.expect("executable file not found in $PATH").map(drop)
}

fn refusals(bench: &mut Bench) -> Result<()> {
    let dir = bench.world().make_dir("refused")?;
    let socket = dir.join("pty.sock");
    let _listener = ConsoleSocket::listen(&socket)?;
    let (socket, id) = (socket.to_string_lossy().into_owned(), bench.container.id.clone());
    let missing = dir.join("missing").to_string_lossy().into_owned();
    let file = bench.process_file(&shell("true"))?;
    for (flags, words) in [
        (vec!["--tty"], "is a terminal"),
        (
            vec!["--tty", "--detach"],
            "cannot allocate tty if a3s-box will detach without setting console socket",
        ),
        (vec!["--console-socket", &socket], "cannot use console socket"),
        (vec!["--console-socket", &socket, "--detach"], "cannot use console socket"),
        (vec!["--console-socket", &missing, "--detach", "--tty"], "no such file or directory"),
        (vec!["--console-socket", &file, "--detach", "--tty"], "connection refused"),
    ] {
        let args = [&["exec"], flags.as_slice(), &[&id, "true"]].concat();
        bench.world().call(&args)?.code(255)?.one_line(&[words])?;
    }
    Ok(())
}

fn of_container(world: &'static World) -> Result<()> {
    let script = "tty; stty size; test -c /dev/console && echo console; trap 'exit 6' TERM; read line; echo got $line; \
                  while :; do sleep 0.05; done";
    let config = Config::sh(script)
        .set("/process/terminal", json!(true))
        .set("/process/consoleSize", json!({ "height": 22, "width": 66 }))
        .set("/root/readonly", json!(true));
    let bundle = world.bundle(&config)?;
    let path = bundle.join("pty.sock");
    let socket = ConsoleSocket::listen(&path)?;
    let id = world.name("c");
    let pid_file = bundle.join("pid").to_string_lossy().into_owned();
    let (bundle, console) = (bundle.to_string_lossy().into_owned(), path.to_string_lossy().into_owned());
    let create = ["create", "--bundle", &bundle, "--pid-file", &pid_file, "--console-socket", &console, &id];
    // Its pipes end with it: only the terminal is left.
    world.ok(&create)?;
    let pid: i32 = fs::read_to_string(&pid_file)?.parse()?;
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}"))?;
        ensure!(target.to_string_lossy().contains("pts"), "descriptor {fd} is {}", target.display());
    }
    let mut terminal = Terminal::of(socket.receive()?, world.patience())?;
    world.ok(&["start", &id])?;
    terminal.expect("/dev/pts/0\r\n22 66\r\nconsole\r\n")?;
    terminal.say("a line\n")?;
    terminal.expect("a line\r\ngot a line\r\n")?;
    terminal.resize(10, 20)?;
    world.ok(&["kill", &id, "TERM"])?;
    same(&process::wait_child(pid, world.patience())?, &6)?;
    same(&terminal.rest()?.as_str(), &"")?;
    world.ok(&["delete", &id])?;
    let refused = ["create", "--bundle", &bundle, &id];
    world.refused(&refused, &["cannot allocate tty if ", " will detach without setting console socket"])?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

fn run(world: &'static World) -> Result<()> {
    let script = "tty; stty size; read line; echo got $line; trap 'stty size; exit 12' WINCH; echo ready; \
                  while :; do sleep 0.05; done";
    let bundle = world.bundle(&Config::sh(script).set("/process/terminal", json!(true)))?;
    let id = world.name("run");
    let args = ["run", "--bundle", &bundle.to_string_lossy(), &id];
    let (mut terminal, run, slave) = Terminal::spawn(world, &args, (44, 55))?;
    let before = tcgetattr(&slave)?.local_modes;
    terminal.expect("/dev/pts/0\r\n44 55\r\n")?;
    terminal.say("x\n")?;
    terminal.expect("x\r\ngot x\r\nready")?;
    terminal.resize(20, 60)?;
    terminal.expect("20 60\r\n")?;
    run.finish()?.code(12)?;
    same(&tcgetattr(&slave)?.local_modes, &before)?;
    // A hung-up terminal ends what reads from it.
    let config = Config::sh("echo ready; cat; exit 1").set("/process/terminal", json!(true));
    let bundle = world.bundle(&config)?;
    let args = ["run", "--bundle", &bundle.to_string_lossy(), &id];
    let (mut terminal, run, slave) = Terminal::spawn(world, &args, (24, 80))?;
    terminal.expect("ready")?;
    drop((terminal, slave));
    let code = run.finish()?.code;
    ensure!(code != 0, "its terminal was hung up, and it ended with 0");
    Ok(())
}

fn run_detached(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo hi").set("/process/terminal", json!(true)))?;
    let id = world.name("run");
    let dir = bundle.to_string_lossy().into_owned();
    world.refused(&["run", "--detach", "--bundle", &dir, &id], &["cannot allocate tty"])?;
    let mut foreground = world.command(&["run", "--bundle", &dir, &id]);
    foreground.stdin(Stdio::null());
    process::run(foreground, b"", world.patience())?.code(1)?.one_line(&["is a terminal"])?;
    let path = bundle.join("pty.sock");
    let socket = ConsoleSocket::listen(&path)?;
    let console = path.to_string_lossy().into_owned();
    world.refused(
        &["run", "--console-socket", &console, "--bundle", &dir, &id],
        &["cannot use console socket"],
    )?;
    world.ok(&["run", "--detach", "--console-socket", &console, "--bundle", &dir, &id])?;
    let mut terminal = Terminal::of(socket.receive()?, world.patience())?;
    same(&terminal.rest()?.as_str(), &"hi\r\n")?;
    world.ok(&["delete", "--force", &id]).map(drop)
}
