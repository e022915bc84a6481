//! What the spec and engines offer, and not every runtime can give. One that cannot says so in the words that its
//! profile has: there a refusal is an expected result, and one that has gone, or has other words, is a failure.

use std::fs;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process;
use crate::pty::ConsoleSocket;
use crate::world::{World, make_fifo};

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "devices/of-the-host-are-made", host_device),
        wish(At::Both, "mounts/a-bound-fifo-reaches-the-host", fifo),
        wish(At::Both, "mounts/root-propagation-may-be-shared", shared_root),
        wish(At::Both, "mounts/a-shared-bind-brings-mounts-back-to-the-host", shared_bind),
        wish(At::Both, "namespaces/pid-given-by-path-is-joined", given_pid),
        wish(At::Both, "seccomp/notify-hands-the-listener-over", notify),
        wish(At::Both, "create/preserved-descriptors-reach-the-process", descriptors),
        wish(At::Both, "create/a-pidfd-is-sent-to-its-socket", pidfd),
        wish(At::Vm, "update/memory-may-grow", grow),
    ]
}

/// config-linux.md, Devices.
fn host_device(world: &'static World) -> Result<()> {
    let device = json!({ "path": "/dev/mine", "type": "c", "major": 195, "minor": 0 });
    let config = Config::sh("stat -c %t:%T /dev/mine").set("/linux/devices", json!([device]));
    same(&world.run_config(&config)?, &"c3:0\n".into())
}

/// config.md, Mounts: any file may be bound.
fn fifo(world: &'static World) -> Result<()> {
    let dir = world.make_dir("fifo")?;
    let fifo = dir.join("fifo");
    make_fifo(&fifo)?;
    let config = Config::sh("read line </tmp/fifo; echo got $line").bind(&fifo, "/tmp/fifo", &[]);
    let mut writer = Command::new("timeout");
    writer.args(["60", "sh", "-c", "echo word >\"$0\""]).arg(&fifo);
    let writer = process::start(writer, true, world.patience())?;
    let said = world.run_config(&config);
    writer.signal(rustix::process::Signal::KILL)?;
    same(&said?, &"got word\n".into())
}

/// config-linux.md, Rootfs Mount Propagation.
fn shared_root(world: &'static World) -> Result<()> {
    let config = Config::sh("awk '$5 == \"/\"' /proc/self/mountinfo | grep -c shared:")
        .set("/linux/rootfsPropagation", json!("shared"));
    let said = world.run_config(&config)?;
    ensure!(said.trim() != "0", "no mount of the root is shared");
    Ok(())
}

fn shared_bind(world: &'static World) -> Result<()> {
    let dir = world.make_dir("shared")?;
    let script = format!(
        "mount --bind '{0}' '{0}' && mount --make-shared '{0}' && mkdir '{0}/in' && \"$@\" && \
         grep -c '{0}/in ' /proc/self/mountinfo",
        dir.display()
    );
    let all = json!(["CAP_SYS_ADMIN"]);
    let config = Config::sh("mount -t tmpfs none /tmp/shared/in")
        .set("/process/capabilities", json!({ "bounding": all, "effective": all, "permitted": all }))
        .set("/linux/rootfsPropagation", json!("shared"))
        .mount("/tmp/shared", "bind", &dir.to_string_lossy(), &["rbind", "rshared"]);
    let bundle = world.bundle(&config)?;
    let inner = world.command(&["run", "--bundle", &bundle.to_string_lossy(), &world.name("run")]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).arg(inner.get_program()).args(inner.get_args());
    let output = process::run(command, b"", world.patience())?.code(0)?;
    same(&output.text().trim(), &"1")
}

/// config-linux.md, Namespaces: `path` is for every type.
fn given_pid(world: &'static World) -> Result<()> {
    let mut holder = Command::new("unshare");
    holder.args(["--pid", "--fork", "--mount-proc", "sh", "-c", "echo ready; exec sleep 10000"]);
    let mut holder = process::start(holder, true, Duration::from_secs(20))?;
    holder.read_until("ready")?;
    let path = format!("/proc/{}/ns/pid_for_children", holder.pid());
    let wanted = fs::read_link(&path)?.to_string_lossy().into_owned();
    let config = Config::sh("readlink /proc/self/ns/pid")
        .set("/linux/namespaces/0", json!({ "type": "pid", "path": path }));
    same(&world.run_config(&config)?.trim(), &wanted.as_str())
}

/// config-linux.md, Seccomp: `listenerPath`.
fn notify(world: &'static World) -> Result<()> {
    let dir = world.make_dir("agent")?;
    let path = dir.join("s");
    let listener = UnixListener::bind(&path)?;
    let agent = std::thread::spawn(move || agent(&listener));
    let rule = json!({ "names": ["sethostname"], "action": "SCMP_ACT_NOTIFY" });
    let config = Config::sh("echo ran").set(
        "/linux/seccomp",
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path, "listenerMetadata": "for it", "syscalls": [rule] }),
    );
    let said = world.run_config(&config);
    // Lets it end where nobody else has called.
    drop(UnixStream::connect(&path));
    let told = agent.join().map_err(|_| anyhow::anyhow!("the agent panicked"))?;
    fs::remove_file(&path)?;
    same(&said?, &"ran\n".into())?;
    let (state, fds) = told?;
    same(&(state["metadata"].as_str(), fds), &(Some("for it"), 1))
}

/// The container process state that came, and how many descriptors with it.
fn agent(listener: &UnixListener) -> Result<(Value, usize)> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut space = [MaybeUninit::uninit(); 256];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; 65536];
    let message =
        recvmsg(&stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    bytes.truncate(message.bytes);
    stream.read_to_end(&mut bytes)?;
    Ok((serde_json::from_slice(&bytes).context("the container process state")?, fds.len()))
}

/// `--preserve-fds`, as systemd's sockets and `podman --preserve-fds` come.
fn descriptors(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::sh("cat <&3"))?;
    let inner = world.command(&[
        "run",
        "--preserve-fds",
        "1",
        "--bundle",
        &bundle.to_string_lossy(),
        &world.name("run"),
    ]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 3<\"$0\"; exec \"$@\""]).arg(bundle.join("config.json"));
    shell.arg(inner.get_program()).args(inner.get_args());
    let output = process::run(shell, b"", world.patience())?.code(0)?.quiet()?;
    ensure!(output.text().contains("ociVersion"), "{:?}", output.text());
    Ok(())
}

/// `--pidfd-socket`, for who would not trust a number.
fn pidfd(world: &'static World) -> Result<()> {
    let bundle = world.bundle(&Config::idle())?;
    let (path, id, pid_file) = (bundle.join("pidfd"), world.name("c"), bundle.join("pid"));
    let socket = ConsoleSocket::listen(&path)?;
    let mut create = world.command(&["create", "--pidfd-socket", &path.to_string_lossy()]);
    create.arg("--pid-file").arg(&pid_file).arg("--bundle").arg(&bundle).arg(&id);
    let null = std::process::Stdio::null;
    create.stdin(null()).stdout(null()).stderr(null());
    process::start(create, false, world.patience())?.finish()?.code(0)?;
    let pid = fs::read_to_string(&pid_file)?;
    let told = socket
        .receive()
        .and_then(|fd| Ok(fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?));
    world.ok(&["delete", "--force", &id])?;
    let told = told?;
    let line = told.lines().find_map(|line| line.strip_prefix("Pid:\t"));
    same(&line, &Some(pid.as_str()))
}

/// `update` takes any limit.
fn grow(world: &'static World) -> Result<()> {
    let config =
        Config::idle().without("/annotations").set("/linux/resources/memory", json!({ "limit": 128 << 20 }));
    let container = Container::running(world, &config)?;
    world.ok(&["update", "--memory", "1073741824", &container.id])?;
    container.says("cat /sys/fs/cgroup/memory.max", "1073741824")
}
