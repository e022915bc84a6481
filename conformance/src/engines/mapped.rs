//! Containers whose users are others on the host: docker's userns-remap, podman's --userns.
//!
//! Both take the ids from /etc/subuid and /etc/subgid, which have a line for this, and so have /etc/passwd and /etc/group
//! where they lack their user; all are put back as they were.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};

use super::engine::Engine;
use super::{docker, podman};
use crate::cases::{At, Case, Wish, sharing};
use crate::wishes::same;
use crate::world::World;

const DOCKER: &[Wish<Mapped>] = &[
    ("docker/remapped/users-are-others-on-the-host", identity),
    ("docker/remapped/life-is-as-without", life),
    ("docker/remapped/the-network-is-there", network),
];

const PODMAN: &[Wish<Mapped>] = &[
    ("podman/mapped/users-are-others-on-the-host", identity),
    ("podman/mapped/life-is-as-without", life),
    ("podman/mapped/the-network-is-there", network),
];

/// The first id on the host, and how many there are: more than any other line of Debian's files has.
pub const FIRST: u32 = 1_000_000;
const COUNT: u32 = 1_000_000;
const FILES: [&str; 4] = ["/etc/subuid", "/etc/subgid", "/etc/passwd", "/etc/group"];

pub fn cases() -> Vec<Case> {
    let docker = |world| {
        Mapped::on(world, "daemon", |world| docker::configured(world, &[("userns-remap", "daemon")]), &[])
    };
    // The user whose ids it shares out: containers-storage.conf(5).
    let podman = |world| Mapped::on(world, "containers", podman::set_up, &["--userns", "auto:size=65536"]);
    vec![sharing(At::Engines, docker, DOCKER), sharing(At::Engines, podman, PODMAN)]
}

/// An engine that maps.
struct Mapped {
    engine: Engine,
    /// What `run` needs for it.
    flags: &'static [&'static str],
    _ids: SubordinateIds,
}

impl Mapped {
    fn on(
        world: &'static World,
        user: &str,
        set_up: impl FnOnce(&'static World) -> Result<Engine>,
        flags: &'static [&'static str],
    ) -> Result<Self> {
        let ids = SubordinateIds::give(user, 59_999, Path::new("/"))?;
        Ok(Mapped { engine: set_up(world)?, flags, _ids: ids })
    }

    fn up(&self, flags: &[&str], script: &str) -> Result<String> {
        self.engine.up(&[self.flags, flags].concat(), &["sh", "-c", script])
    }
}

/// Lines in these files. Dropped, the files are as they were.
pub struct SubordinateIds([String; 4]);

impl SubordinateIds {
    /// Gives a user ids, and makes it, with a home, where it is unknown.
    pub fn give(user: &str, uid: u32, home: &Path) -> Result<Self> {
        let before = FILES.map(|file| fs::read_to_string(file).unwrap_or_default());
        let ids = format!("{user}:{FIRST}:{COUNT}\n");
        let known = before[2].lines().any(|line| line.starts_with(&format!("{user}:")));
        let new = |line: String| if known { String::new() } else { line };
        let account = new(format!("{user}:x:{uid}:{uid}::{}:/bin/false\n", home.display()));
        let group = new(format!("{user}:x:{uid}:\n"));
        for ((file, text), line) in FILES.iter().zip(&before).zip([&ids, &ids, &account, &group]) {
            fs::write(file, format!("{text}{line}"))?;
        }
        Ok(SubordinateIds(before))
    }
}

impl Drop for SubordinateIds {
    fn drop(&mut self) {
        for (file, text) in FILES.iter().zip(&self.0) {
            let _ = fs::write(file, text);
        }
    }
}

/// Root inside is nobody of the host's, to its files and to its process.
fn identity(mapped: &mut Mapped) -> Result<()> {
    let engine = &mapped.engine;
    let dir = engine.world.make_dir("volume")?;
    let volume = format!("{}:/data", dir.display());
    let name = mapped.up(&["--volume", &volume], "sleep 1000")?;
    let map = fs::read_to_string(format!("/proc/{}/uid_map", engine.inspect(&name, ".State.Pid")?))?;
    let map: Vec<u32> = map.split_whitespace().take(3).map(str::parse).collect::<Result<_, _>>()?;
    ensure!(map[0] == 0 && map[1] >= FIRST && map[2] >= 65536, "its process' uid_map is {map:?}");
    std::os::unix::fs::chown(&dir, Some(map[1]), Some(map[1]))?;
    let script = "id -u; touch /data/root; chown 7:8 /data/root; stat -c '%u %g' /data /data/root /bin/busybox; tr -s ' ' </proc/self/uid_map";
    same(&engine.sh(&name, script)?, &format!("0\n0 0\n7 8\n0 0\n 0 0 {}", map[2]))?;
    let owner = fs::metadata(dir.join("root"))?;
    same(&(owner.uid(), owner.gid()), &(map[1] + 7, map[1] + 8))?;
    same(&engine.ok(&["exec", "--user", "5", &name, "id", "-u"])?, &"5".into())?;
    engine.remove(&name)
}

fn life(mapped: &mut Mapped) -> Result<()> {
    let engine = &mapped.engine;
    let name = mapped.up(&[], "trap 'exit 9' TERM; echo started; while :; do sleep 0.1; done")?;
    let copies = engine.world.make_dir("copies")?;
    engine.ok(&["pause", &name])?;
    engine.ok(&["unpause", &name])?;
    copied_and_stopped(engine, &name, &copies)
}

/// A container that says `started` and ends with 9 at TERM, to its end; `dir` is the user's.
pub fn copied_and_stopped(engine: &Engine, name: &str, dir: &Path) -> Result<()> {
    let file = dir.join("file");
    fs::write(&file, "to and fro")?;
    engine.ok(&["cp", &file.display().to_string(), &format!("{name}:/root/file")])?;
    same(&engine.sh(name, "cat /root/file; stat -c ' %u' /root")?, &"to and fro 0".into())?;
    same(&engine.ok(&["logs", name])?, &"started".into())?;
    engine.ok(&["stop", "--time", "60", name])?;
    same(&engine.inspect(name, ".State.ExitCode")?, &"9".into())?;
    engine.remove(name)
}

/// The engine's own network, whose gateway is the host.
fn network(mapped: &mut Mapped) -> Result<()> {
    let server = TcpListener::bind("0.0.0.0:0")?;
    let port = server.local_addr()?.port();
    let greeter = thread::spawn(move || server.accept()?.0.write_all(b"from the host\n"));
    let run = ["run", "--rm", "--runtime", &mapped.engine.runtime];
    let script = format!("nc $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p') {port} </dev/null");
    let image = [super::engine::IMAGE, "sh", "-c", &script];
    let said = mapped.engine.ok(&[&run, mapped.flags, &super::engine::SMALL, &image[..]].concat())?;
    same(&said.as_str(), &"from the host")?;
    greeter.join().ok().context("the greeter")?.map_err(Into::into)
}
