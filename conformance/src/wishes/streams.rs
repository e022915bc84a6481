//! Standard streams: every byte arrives, none holds up another's.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::bench::Bench;
use super::run::same;
use crate::cases::{At, Case, Wish, wish};
use crate::config::Config;
use crate::container::{Container, create_command};
use crate::process::{self, brief, eventually};
use crate::sha256;
use crate::world::World;

/// Wishes for the bench.
pub const SHARED: &[Wish<Bench>] = &[
    ("streams/execs-stdin-arrives-whole", |bench| {
        let bytes = noise(bench.world().by_level(20, 4, 100) << 20);
        let output = bench.feed(&bytes, &["sha256sum"])?.code(0)?.quiet()?;
        same(&output.text(), &format!("{}  -\n", sha256::hex(&bytes)))
    }),
    ("streams/execs-stdout-arrives-whole-with-stderr-apart", |bench| {
        let bytes = noise(bench.world().by_level(20, 4, 100) << 20);
        fs::write(bench.shared.join("noise"), &bytes)?;
        let script =
            "i=0; while [ $i -lt 50 ]; do echo line $i >&2; i=$((i+1)); done & cat /shared/noise; wait";
        let output = bench.container.exec(&["sh", "-c", script])?.code(0)?;
        fs::remove_file(bench.shared.join("noise"))?;
        same(&output.stdout.len(), &bytes.len())?;
        ensure!(output.stdout == bytes, "stdout is as long as it should be, and different");
        let expected: String = (0..50).map(|i| format!("line {i}\n")).collect();
        same(&output.stderr, &expected)
    }),
    ("streams/every-byte-value-passes-both-ways", |bench| {
        let bytes: Vec<u8> = (0..=255).cycle().take(4096).collect();
        let output = bench.feed(&bytes, &["cat"])?.code(0)?;
        ensure!(output.stdout == bytes, "{:?}", brief(&output.text()));
        Ok(())
    }),
    ("streams/a-reader-that-stops-stalls-only-its-own", stalled_reader),
    ("streams/a-reader-that-leaves-does-not-hang-exec", |bench| {
        let mut exec = bench.spawn(&["sh", "-c", "yes; echo yes ended with $? >&2"])?;
        exec.read_until("y\ny\n")?;
        exec.close_stdout();
        let output = exec.finish()?.code(0)?;
        ensure!(output.stderr.starts_with("yes ended with "), "{:?}", output.stderr);
        Ok(())
    }),
    ("streams/a-program-that-closes-stdin-early-does-not-hang-exec", |bench| {
        let output = bench.feed(&noise(4 << 20), &["sh", "-c", "exec <&-; echo closed"])?.code(0)?;
        same(&output.text(), &"closed\n".into())
    }),
    ("streams/stdout-can-be-opened-again-by-any-user", |bench| {
        let mut process = super::bench::plain_process();
        process["user"] = serde_json::json!({ "uid": 4242, "gid": 4242 });
        let said = bench
            .says_as(process, "echo once >/dev/stdout; echo more >>/proc/self/fd/1; readlink /dev/stdout")?;
        ensure!(said.starts_with("once\nmore\n"), "{said}");
        Ok(())
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "streams/runs-stdin-arrives-whole", run_stdin),
        wish(At::Both, "streams/runs-stdout-arrives-whole-with-stderr-apart", run_stdout),
        wish(At::Local, "streams/through-cat-and-back", loop_back),
        wish(At::Both, "streams/run-ends-when-its-reader-leaves", reader_leaves),
        wish(At::Both, "streams/a-created-containers-own-pipes-carry-everything", pipes_of_create),
        wish(At::Local, "streams/an-unread-stdout-of-the-first-process-stalls-nobody-else", stalled_init),
        wish(At::Local, "streams/output-to-a-closed-pipe-does-not-end-the-container", broken_pipe),
        wish(At::Local, "streams/many-short-execs-lose-nothing", short_execs),
    ]
}

/// Bytes that do not compress and do not repeat (xorshift).
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn run_stdin(world: &'static World) -> Result<()> {
    let bytes = noise(world.by_level(20, 8, 100) << 20);
    let output = world.run(&world.bundle(&Config::new(&["sha256sum"]))?, &bytes)?.code(0)?.quiet()?;
    same(&output.text(), &format!("{}  -\n", sha256::hex(&bytes)))
}

fn run_stdout(world: &'static World) -> Result<()> {
    let bytes = noise(world.by_level(20, 8, 100) << 20);
    let data = world.make_dir("data")?;
    fs::write(data.join("noise"), &bytes)?;
    let script = "cat /data/noise; sha256sum </data/noise >&2; exit 3";
    let output =
        world.run(&world.bundle(&Config::sh(script).bind(&data, "/data", &["ro"]))?, b"")?.code(3)?;
    fs::remove_file(data.join("noise"))?;
    same(&output.stdout.len(), &bytes.len())?;
    ensure!(output.stdout == bytes, "stdout is as long as it should be, and different");
    same(&output.stderr, &format!("{}  -\n", sha256::hex(&bytes)))
}

fn loop_back(world: &'static World) -> Result<()> {
    let bytes = noise(world.by_level(20, 8, 100) << 20);
    let output = world.run(&world.bundle(&Config::new(&["cat"]))?, &bytes)?.code(0)?.quiet()?;
    same(&output.stdout.len(), &bytes.len())?;
    ensure!(output.stdout == bytes, "what came back is as long as it should be, and different");
    Ok(())
}

fn stalled_reader(bench: &mut Bench) -> Result<()> {
    let mut stalled = bench.spawn(&["sh", "-c", "echo ready; head -c 3000000 /dev/zero; echo error >&2"])?;
    stalled.read_until("ready")?;
    stalled.stop_reading(true);
    // Others go on, with more bytes than any buffer on the way holds.
    let bytes = noise(3 << 20);
    for _ in 0..2 {
        let output = bench.feed(&bytes, &["cat"])?.code(0)?;
        ensure!(output.stdout == bytes, "another exec's bytes went wrong");
    }
    bench.container.says("echo well", "well")?;
    ensure!(!stalled.has_ended()?, "3 MB fit somewhere without being read");
    let output = stalled.finish()?.code(0)?;
    same(&(output.stdout.len(), output.stderr.as_str()), &(3_000_006, "error\n"))
}

fn reader_leaves(world: &'static World) -> Result<()> {
    let id = world.name("run");
    let bundle = world.bundle(&Config::sh("yes; exit 5"))?;
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("y\ny\n")?;
    run.close_stdout();
    run.finish()?.code(5).map(drop)
}

fn pipes_of_create(world: &'static World) -> Result<()> {
    // `create` is the one that has the pipes; afterwards the container holds them, and nobody else.
    let bytes = noise(world.by_level(8, 2, 50) << 20);
    let bundle = world.bundle(&Config::sh("cat; echo end >&2"))?;
    let id = world.name("c");
    let mut create = process::start(create_command(world, &bundle, &id), true, world.patience())?;
    eventually("create's end", world.patience(), || create.has_ended())?;
    let pid: i32 = fs::read_to_string(bundle.join("pid")).context("the pid file")?.parse()?;
    world.ok(&["start", &id])?;
    // In pieces, as what comes back has to be read in between.
    for piece in bytes.chunks(1 << 20) {
        create.feed(piece)?;
    }
    let output = create.finish()?.code(0)?;
    ensure!(
        output.stdout == bytes,
        "{} bytes came back, not {}, or others",
        output.stdout.len(),
        bytes.len()
    );
    same(&output.stderr, &"end\n".into())?;
    same(&process::wait_child(pid, world.patience())?, &0)?;
    world.ok(&["delete", &id]).map(drop)
}

fn stalled_init(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("echo ready; yes"))?;
    let id = world.name("run");
    let mut run = world.start(&["run", "--bundle", &bundle.to_string_lossy(), &id])?;
    run.read_until("ready")?;
    run.stop_reading(true);
    for _ in 0..5 {
        same(&world.ok(&["exec", &id, "echo", "well"])?.text(), &"well\n".to_string())?;
        let state: Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
        same(&state["status"], &"running".into())?;
    }
    // Nobody reads its last words, and yet it can be ended and deleted.
    world.ok(&["kill", &id, "KILL"])?.within(Duration::from_secs(4))?;
    world.ok(&["delete", "--force", &id])?.within(Duration::from_secs(4))?;
    run.stop_reading(false);
    run.finish()?.code(137).map(drop)
}

fn broken_pipe(world: &'static World) -> Result<()> {
    // `trap ''` lets the shell survive the SIGPIPE that it deserves.
    let script = "trap '' PIPE; trap 'exit 0' TERM; while [ ! -e /shared/go ]; do sleep 0.02; done; \
                  echo lost; echo lost; touch /shared/went; while :; do sleep 0.05; done";
    let shared = world.make_dir("shared")?;
    let bundle = world.bundle(&Config::sh(script).bind(&shared, "/shared", &[]))?;
    let id = world.name("c");
    let mut create = create_command(world, &bundle, &id);
    create.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut created = process::start(create, false, world.patience())?;
    eventually("create's end", world.patience(), || created.has_ended())?;
    created.close_stdout();
    drop(created);
    world.ok(&["start", &id])?;
    fs::write(shared.join("go"), "")?;
    eventually("writing to nobody", world.patience(), || Ok(shared.join("went").exists()))?;
    let state: Value = serde_json::from_slice(&world.ok(&["state", &id])?.stdout)?;
    same(&state["status"], &"running".into())?;
    world.ok(&["delete", "--force", &id]).map(drop)
}

fn short_execs(world: &'static World) -> Result<()> {
    let container = Container::running(world, &Config::idle())?;
    for _ in 0..world.by_level(200, 20, 1000) {
        let output = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"])?.code(3)?;
        same(&(output.text().as_str(), output.stderr.as_str()), &("out\n", "err\n"))?;
    }
    Ok(())
}
