//! podman as a user who is nobody special: all it has is /dev/kvm, and its network is pasta's.
//!
//! The user is made for this, with ids of its own, and the device nodes are opened to it; all is put back as it was.

use std::fs::{self, Permissions};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::engine::{Engine, IMAGE};
use super::mapped::{FIRST, SubordinateIds, copied_and_stopped};
use super::podman;
use crate::cases::{At, Case, Wish, sharing};
use crate::process::eventually;
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Rootless>] = &[
    ("podman/rootless/root-inside-is-the-user", identity),
    ("podman/rootless/life-is-as-without", life),
    ("podman/rootless/limits-hold-without-a-cgroup-of-the-hosts", limits),
    ("podman/rootless/pastas-network-reaches-out-and-is-reached", network),
];

const USER: &str = "box-rootless";
const UID: u32 = 59_998;
/// Who may use KVM.
const GROUP: u32 = 59_997;
/// What a user may open where it may use KVM, with the modes that udev gives them.
const NODES: [(&str, u32); 2] = [("/dev/kvm", 0o660), ("/dev/net/tun", 0o666)];

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, Rootless::on, WISHES)]
}

struct Rootless {
    engine: Engine,
    _nodes: Nodes,
    _ids: SubordinateIds,
}

impl Rootless {
    fn on(world: &'static World) -> Result<Self> {
        let dir = world.make_dir("rootless")?;
        let ids = SubordinateIds::give(USER, UID, &dir)?;
        let nodes = Nodes::open(GROUP)?;
        let at = |name: &str| dir.join(name).display().to_string();
        for dir in [&dir, &dir.join("session")] {
            fs::create_dir_all(dir)?;
            chown(dir, Some(UID), Some(UID))?;
            fs::set_permissions(dir, Permissions::from_mode(0o700))?;
        }
        let program = vec![
            "setpriv".into(),
            format!("--reuid={UID}"),
            format!("--regid={UID}"),
            format!("--groups={GROUP}"),
            "podman".into(),
        ];
        let env = vec![
            ("XDG_RUNTIME_DIR".into(), at("session")),
            ("HOME".into(), at("")),
            ("USER".into(), USER.into()),
        ];
        // The process that keeps the user's namespaces.
        let tidy = "kill $(cat \"$0\"/session/libpod/tmp/pause.pid) 2>/dev/null";
        let engine = podman::engine(world, dir, "cgroupfs", program, env, tidy)?;
        Ok(Rootless { engine, _nodes: nodes, _ids: ids })
    }

    /// A detached container, of which no limit is asked that runc would want a cgroup for.
    fn up(&self, flags: &[&str], script: &str) -> Result<String> {
        let name = self.engine.world.name("box");
        let run = ["run", "--detach", "--name", &name];
        self.engine.ok(&[&run, flags, &[IMAGE, "sh", "-c", script]].concat())?;
        Ok(name)
    }
}

/// Device nodes that belong to a group. Dropped, they are as they were.
struct Nodes(Vec<(&'static str, fs::Metadata)>);

impl Nodes {
    fn open(group: u32) -> Result<Self> {
        let mut nodes = Nodes(Vec::new());
        for (node, mode) in NODES {
            nodes.0.push((node, fs::metadata(node).context(node)?));
            chown(node, None, Some(group))?;
            fs::set_permissions(node, Permissions::from_mode(mode))?;
        }
        Ok(nodes)
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for (node, before) in &self.0 {
            let _ = chown(node, None, Some(before.gid()));
            let _ = fs::set_permissions(node, before.permissions());
        }
    }
}

fn identity(rootless: &mut Rootless) -> Result<()> {
    let engine = &rootless.engine;
    let dir = engine.dir.join("volume");
    fs::create_dir(&dir)?;
    chown(&dir, Some(UID), Some(UID))?;
    let name = rootless.up(&["--volume", &format!("{}:/data", dir.display())], "sleep 1000")?;
    let script = "id -u; touch /data/root /data/other; chown 7:8 /data/other; stat -c '%u %g' /data /data/root /data/other";
    same(&engine.sh(&name, script)?, &"0\n0 0\n0 0\n7 8".into())?;
    let owner = |name: &str| fs::metadata(dir.join(name)).map(|file| (file.uid(), file.gid()));
    same(&owner("root")?, &(UID, UID))?;
    let first = FIRST - 1;
    same(&owner("other")?, &(first + 7, first + 8))?;
    same(&engine.ok(&["exec", "--user", "5", &name, "id", "-u"])?, &"5".into())?;
    engine.remove(&name)?;
    let keep = ["run", "--rm", "--userns", "keep-id", "--volume", &format!("{}:/data", dir.display()), IMAGE];
    let said = engine.ok(&[&keep[..], &["sh", "-c", "id -u; stat -c %u /data/root"]].concat())?;
    same(&said, &format!("{UID}\n{UID}"))
}

fn life(rootless: &mut Rootless) -> Result<()> {
    let engine = &rootless.engine;
    let name = rootless.up(&[], "trap 'exit 9' TERM; echo started; while :; do sleep 0.1; done")?;
    engine.call(&["exec", &name, "sh", "-c", "exit 42"])?.code(42)?;
    copied_and_stopped(engine, &name, &engine.dir)
}

/// The guest holds them; what only the host's cgroup can is refused.
fn limits(rootless: &mut Rootless) -> Result<()> {
    let engine = &rootless.engine;
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max";
    let said = engine.run(&["--rm", "--pids-limit", "50"], &["sh", "-c", script])?.code(0)?.text();
    same(&said.as_str(), &format!("{}\n50\n", 128 << 20).as_str())?;
    let refused = engine.run(&["--rm", "--cpuset-cpus", "0"], &["true"])?.code(126)?;
    ensure!(refused.message().contains("permission denied"), "{}", refused.message());
    Ok(())
}

fn network(rootless: &mut Rootless) -> Result<()> {
    let engine = &rootless.engine;
    let server = TcpListener::bind("0.0.0.0:0")?;
    let port = server.local_addr()?.port();
    let greeter = thread::spawn(move || server.accept()?.0.write_all(b"from the host\n"));
    let published = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let publish = format!("127.0.0.1:{published}:80");
    // pasta would make a connection from loopback one inside the namespace, which no interface of the VM's sees.
    let flags = ["--publish", &publish, "--network", "pasta:--no-splice"];
    let name = rootless.up(&flags, "while :; do echo from the guest | nc -l -p 80; done")?;
    let address = "sed -n 's/[[:space:]].*host.containers.internal.*//p' /etc/hosts";
    let out = format!("nc $({address}) {port} </dev/null");
    same(&engine.sh(&name, &out)?, &"from the host".into())?;
    greeter.join().ok().context("the greeter")??;
    eventually("the published port answers", engine.world.patience(), || {
        let mut said = String::new();
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", published)) else { return Ok(false) };
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let _ = std::io::Read::read_to_string(&mut stream, &mut said);
        Ok(said == "from the guest\n")
    })?;
    engine.remove(&name)
}
