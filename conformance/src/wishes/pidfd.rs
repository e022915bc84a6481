//! `--pidfd-socket`: a descriptor of the process that stands for what was asked for, sent to the caller.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Signal;

use super::bench::Bench;
use super::run::same;
use crate::cases::{At, Case, Wish, wish};
use crate::config::Config;
use crate::process::{self, wait_for};
use crate::pty::ConsoleSocket;
use crate::world::World;

/// Wishes for the bench.
pub const SHARED: &[Wish<Bench>] = &[
    ("pidfd/a-detached-execs-goes-to-the-socket", detached),
    ("pidfd/a-foreground-execs-is-the-commands", foreground),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "pidfd/the-containers-goes-to-the-socket", container),
        wish(At::Local, "pidfd/a-socket-that-nobody-minds-is-given-up", unminded),
    ]
}

fn detached(bench: &mut Bench) -> Result<()> {
    let (dir, world) = (bench.world().make_dir("pidfd")?, bench.world());
    let socket = ConsoleSocket::listen(&dir.join("socket"))?;
    let (path, pid_file) = (dir.join("socket"), dir.join("pid"));
    let (path, file) = (path.display().to_string(), pid_file.display().to_string());
    let id = bench.container.id.as_str();
    let args =
        ["exec", "--detach", "--pidfd-socket", &path, "--pid-file", &file, id, "sh", "-c", "sleep 1; exit 4"];
    world.ok(&args)?;
    let pid = fs::read_to_string(pid_file)?.parse()?;
    let pidfd = socket.receive()?;
    same(&names(&pidfd)?, &pid)?;
    same(&process::wait_child(pid, world.patience())?, &4)?;
    wait_for(&mut [PollFd::new(&pidfd, PollFlags::IN)], Duration::from_secs(1))?;
    ensure!(!process::is_alive(pid), "what the descriptor names still runs");
    Ok(())
}

fn foreground(bench: &mut Bench) -> Result<()> {
    let dir = bench.world().make_dir("pidfd")?;
    let socket = ConsoleSocket::listen(&dir.join("socket"))?;
    let path = dir.join("socket").display().to_string();
    let args =
        ["exec", "--pidfd-socket", &path, &bench.container.id, "sh", "-c", "echo ready; exec sleep 1000"];
    let mut exec = bench.world().start(&args)?;
    exec.read_until("ready")?;
    let pidfd = socket.receive()?;
    same(&names(&pidfd)?, &exec.pid())?;
    rustix::process::pidfd_send_signal(&pidfd, Signal::TERM).context("signal it")?;
    exec.finish()?.code(143).map(drop)
}

fn container(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::idle())?;
    let socket = ConsoleSocket::listen(&bundle.join("socket"))?;
    let (id, at) = (world.name("c"), |name: &str| bundle.join(name).display().to_string());
    let dir = bundle.display().to_string();
    let args = ["create", "--bundle", &dir, "--pid-file", &at("pid"), "--pidfd-socket", &at("socket"), &id];
    let mut create = world.command(&args);
    let stream = || fs::File::options().read(true).write(true).open("/dev/null");
    create.stdin(stream()?).stdout(stream()?).stderr(stream()?);
    process::start(create, false, world.patience())?.finish()?.code(0)?;
    let pid = fs::read_to_string(bundle.join("pid"))?.parse()?;
    let named = socket.receive().and_then(|pidfd| names(&pidfd));
    world.ok(&["delete", "--force", &id])?;
    let _ = process::wait_child(pid, world.patience());
    same(&named?, &pid)
}

/// Its queue is full, as that of a caller that hangs.
fn unminded(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::idle())?;
    let path = bundle.join("full");
    let _held = full(&path)?;
    let (dir, id) = (bundle.display().to_string(), world.name("c"));
    let begin = Instant::now();
    let path = path.display().to_string();
    let output = world.call(&["create", "--bundle", &dir, "--pidfd-socket", &path, &id])?.code(1)?;
    ensure!(begin.elapsed() < Duration::from_secs(10), "it waited for {:.1?}", begin.elapsed());
    output.one_line(&["--pidfd-socket", "nobody has accepted"])?;
    world.refused(&["state", &id], &["does not exist"]).map(drop)
}

/// A listener with room for nobody more.
fn full(path: &Path) -> Result<(OwnedFd, Vec<OwnedFd>)> {
    let new = |flags| rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let listener = new(SocketFlags::CLOEXEC).context("socket")?;
    let address = SocketAddrUnix::new(path)?;
    rustix::net::bind(&listener, &address).context("bind")?;
    rustix::net::listen(&listener, 0).context("listen")?;
    let mut waiting = Vec::new();
    loop {
        let caller = new(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).context("socket")?;
        match rustix::net::connect(&caller, &address) {
            Ok(()) => waiting.push(caller),
            Err(rustix::io::Errno::AGAIN) => return Ok((listener, waiting)),
            Err(errno) => return Err(errno).context("connect"),
        }
    }
}

/// The pid of the process that a descriptor names.
fn names(pidfd: &OwnedFd) -> Result<i32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd()))?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    Ok(pid.with_context(|| format!("no pidfd: {info}"))?.trim().parse()?)
}
