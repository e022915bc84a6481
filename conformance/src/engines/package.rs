//! The Debian package on a machine that has nothing else of the runtime's: installed, used as README says, purged.
//!
//! In: `--package`. Out: containers by the lines of README as they stand there. Must not: let the runtime under test be
//! found meanwhile, or take the machine's own configuration away for good.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::containerd;
use super::engine::{Engine, IMAGE, archive};
use super::install;
use super::terminals::leave;
use crate::cases::{At, Case, Wish, sharing};
use crate::documents::{OF_ENGINES, examples, quoted};
use crate::process::{self, Output};
use crate::pty::Terminal;
use crate::report::NotHere;
use crate::wishes::same;
use crate::world::World;

const WISHES: &[Wish<Packaged>] = &[
    ("package/installs-what-there-is-to-read-and-run", installed),
    ("package/docker-runs-by-it", docker),
    ("package/podman-runs-by-it", podman),
    ("package/ctr-runs-by-it", ctr),
    ("package/a-bundle-runs-by-it", bundle),
    ("package/purge-leaves-nothing", purge),
];

/// The host's decisions about VMs, which the purge takes away.
const SETTINGS: &str = "/etc/a3s-box";

pub fn cases() -> Vec<Case> {
    vec![sharing(At::Engines, Packaged::set_up, WISHES)]
}

struct Packaged {
    world: &'static World,
    /// Where the runtime under test is meanwhile.
    hidden: PathBuf,
    settings: Vec<(PathBuf, Vec<u8>)>,
    before: BTreeSet<String>,
    /// What `uname -r` says in a microVM.
    kernel: String,
}

impl Packaged {
    fn set_up(world: &'static World) -> Result<Self> {
        let package = world.package.as_ref().context(NotHere("no --package was given"))?;
        let kernel = world.run_config(&crate::config::Config::new(&["uname", "-r"]))?;
        let hidden = world.runtime.with_extension("out-of-sight");
        let settings =
            files(SETTINGS).into_iter().filter_map(|path| Some((path.clone(), fs::read(path).ok()?)));
        let settings = settings.collect();
        fs::rename(&world.runtime, &hidden)?;
        let mut packaged = Packaged { world, hidden, settings, before: BTreeSet::new(), kernel };
        packaged.before = packaged.traces()?;
        ensure!(packaged.sh("command -v a3s-box", &[])?.code != 0, "a3s-box is still found");
        packaged.install(package)?;
        Ok(packaged)
    }

    /// As README says it, beside where a build leaves the package.
    fn install(&self, package: &Path) -> Result<()> {
        let dir = self.world.make_dir("source")?;
        fs::create_dir_all(dir.join("target/packages"))?;
        fs::copy(package, dir.join("target/packages/a3s-box_1_any.deb"))?;
        // Nobody is there to say yes, and this machine leaves documentation out of packages.
        let settings = "APT::Get::Assume-Yes \"true\";\nDPkg::Options { \"--path-include=/usr/share/man/*\"; \
                        \"--path-include=/usr/share/doc/*\"; };\n";
        fs::write(dir.join("apt.conf"), settings)?;
        let line = quoted("apt-get install ./target/packages/a3s-box_*.deb")?;
        let env = [("APT_CONFIG", dir.join("apt.conf")), ("DEBIAN_FRONTEND", "noninteractive".into())];
        let mut shell = Command::new("sh");
        shell.args(["-ec", line]).envs(env).current_dir(&dir);
        process::run(shell, b"", self.world.patience())?.code(0).map(drop)
    }

    /// A shell's work, in the machine's own PATH.
    fn sh(&self, script: &str, env: &[(String, String)]) -> Result<Output> {
        let mut shell = Command::new("sh");
        shell.args(["-ec", script]).envs(env.iter().cloned()).current_dir(&self.world.dir);
        process::run(shell, b"", self.world.patience())
    }

    /// What a line of README prints, which must be in it just so.
    fn readme(&self, line: &str, env: &[(String, String)]) -> Result<String> {
        Ok(self.sh(quoted(line)?, env)?.code(0)?.text())
    }

    /// Files that bear the runtime's name, and configuration that holds it.
    fn traces(&self) -> Result<BTreeSet<String>> {
        let script = "find /etc /opt /root /run /usr /var -xdev -name '*a3s*' -not -path '/var/log/*' || true; \
                      grep -rlI a3s-box /etc /usr/lib/systemd /var/lib/dpkg/info || true";
        Ok(self.sh(script, &[])?.text().lines().map(str::to_string).collect())
    }

    fn runs(&self, engine: &Engine, line: &str) -> Result<()> {
        same(&self.readme(line, &engine.env)?, &self.kernel)
    }
}

impl Drop for Packaged {
    fn drop(&mut self) {
        let _ = self.sh("dpkg --purge a3s-box", &[]);
        let _ = fs::rename(&self.hidden, &self.world.runtime);
        for (path, text) in &self.settings {
            let _ = path.parent().map(fs::create_dir_all);
            let _ = fs::write(path, text);
        }
    }
}

fn files(dir: &str) -> Vec<PathBuf> {
    let (mut dirs, mut files) = (vec![PathBuf::from(dir)], Vec::new());
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_dir { dirs.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    files
}

fn installed(packaged: &mut Packaged) -> Result<()> {
    same(&packaged.sh("command -v a3s-box", &[])?.code(0)?.text(), &"/usr/bin/a3s-box\n".into())?;
    // Everything that the package lists is there and as it was packed.
    packaged.sh("dpkg --verify a3s-box | grep . && exit 1; dpkg --listfiles a3s-box | while read -r f; do test -e \"$f\"; done", &[])?.code(0)?;
    let look = "zcat /usr/share/man/man8/a3s-box.8.gz | grep -c '^.SH NAME'; ls /usr/share/man/man[578]/a3s-box* | grep -vc 'gz$' || true; \
                bash -n /usr/share/bash-completion/completions/a3s-box; grep -c libkrun /usr/share/doc/a3s-box/LICENSES";
    let said = packaged.sh(look, &[])?.code(0)?.text();
    ensure!(said.starts_with("1\n0\n"), "{said}");
    let checked = packaged.readme("a3s-box check", &[])?;
    ensure!(checked.contains("This host can run microVMs."), "{checked}");
    Ok(())
}

fn docker(packaged: &mut Packaged) -> Result<()> {
    packaged.readme("a3s-box-engines docker", &[])?;
    let engine = install::docker_engine(packaged.world)?;
    engine.ok(&["tag", IMAGE, "alpine"])?;
    let first = "docker run --rm --runtime a3s-box alpine uname -r";
    packaged.runs(&engine, first)?;
    for (page, text) in OF_ENGINES.iter().filter(|(_, text)| examples(text).trim_end() != first) {
        packaged.sh(&examples(text), &engine.env)?.code(0).with_context(|| format!("man/{page}"))?;
    }
    Ok(())
}

fn podman(packaged: &mut Packaged) -> Result<()> {
    packaged.readme("a3s-box-engines podman", &[])?;
    let engine = install::podman_engine(packaged.world)?;
    engine.ok(&["tag", IMAGE, "docker.io/library/alpine:latest"])?;
    packaged.runs(&engine, "podman --runtime a3s-box run --rm alpine uname -r")
}

fn ctr(packaged: &mut Packaged) -> Result<()> {
    let image = "docker.io/library/alpine:latest";
    let mut engine = containerd::set_up(packaged.world)?;
    engine.ok(&["images", "tag", IMAGE, image])?;
    engine.env.push(("CONTAINERD_ADDRESS".into(), engine.dir.join("sock").display().to_string()));
    packaged.runs(&engine, &format!("ctr run --rm --runc-binary /usr/bin/a3s-box {image} box uname -r"))
}

/// With a terminal, as who types these lines has one.
fn bundle(packaged: &mut Packaged) -> Result<()> {
    let dir = packaged.world.make_dir("by-hand")?;
    fs::write(dir.join("rootfs.tar"), archive(packaged.world)?)?;
    let lines = [
        "mkdir -p box/rootfs && tar -C box/rootfs -xf rootfs.tar",
        "cd box && a3s-box spec",
        "a3s-box run web",
    ];
    let lines = lines.into_iter().map(quoted).collect::<Result<Vec<_>>>()?;
    let mut shell = Command::new("sh");
    shell.args(["-ec", &lines.join("\n")]).current_dir(&dir);
    let (mut terminal, running, _slave) = Terminal::attach(&shell, (24, 80), packaged.world.patience())?;
    terminal.say("echo kernel $(uname -r)\n")?;
    terminal.expect(&format!("kernel {}", packaged.kernel.trim_end()))?;
    let mut shell = Command::new("sh");
    shell.args(["-ec", quoted("a3s-box exec --tty web sh")?]).current_dir(&dir);
    let (beside, exec, _its_slave) = Terminal::attach(&shell, (24, 80), packaged.world.patience())?;
    leave(beside, exec, 5)?;
    leave(terminal, running, 7)
}

fn purge(packaged: &mut Packaged) -> Result<()> {
    packaged.sh("a3s-box-engines docker podman containerd crio", &[])?.code(0)?;
    packaged.sh("DEBIAN_FRONTEND=noninteractive apt-get purge -y a3s-box", &[])?.code(0)?;
    let left: Vec<String> = packaged.traces()?.difference(&packaged.before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}
