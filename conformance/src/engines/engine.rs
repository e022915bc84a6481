//! One engine: its command line, its daemon where it has one, its image.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::leaks;
use crate::process::{self, Output, Running, eventually};
use crate::pty::Terminal;
use crate::world::World;

/// The image that every engine is given: busybox.
pub const IMAGE: &str = "localhost/box:1";
/// A small VM; the same limits hold for a runtime without.
pub const SMALL: [&str; 4] = ["--memory", "128m", "--cpus", "1"];

/// An engine under test. Dropped, its containers are removed and its daemon ends.
pub struct Engine {
    /// The surroundings.
    pub world: &'static World,
    /// Everything of the engine's lies here.
    pub dir: PathBuf,
    /// Its command line up to the verb.
    pub program: Vec<String>,
    /// Variables for it.
    pub env: Vec<(String, String)>,
    /// How the runtime is named to it.
    pub runtime: String,
    /// Its daemon.
    pub daemon: Option<Running>,
    /// What follows `top NAME` for a table with host pids.
    pub pids: &'static [&'static str],
    /// What removes all its containers.
    pub clear: &'static [&'static str],
    /// A shell script that takes away what its daemon leaves even where all is well.
    pub tidy: &'static str,
}

impl Engine {
    /// A command of the engine.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).args(args).envs(self.env.iter().cloned()).current_dir(&self.dir);
        command
    }

    /// Runs one to its end.
    pub fn call<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Output> {
        process::run(self.command(args), b"", self.world.patience())
    }

    /// What one prints, which must succeed.
    pub fn ok<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String> {
        Ok(self.call(args)?.code(0)?.text().trim_end().to_string())
    }

    /// `run` of the image with these flags, without a network.
    pub fn run(&self, flags: &[&str], args: &[&str]) -> Result<Output> {
        self.call(&self.making("run", flags, args))
    }

    /// The arguments of `run` or `create` of the image.
    pub fn making<'a>(&'a self, verb: &'a str, flags: &[&'a str], args: &[&'a str]) -> Vec<&'a str> {
        let base = [verb, "--runtime", self.runtime.as_str(), "--network", "none"];
        [&base, &SMALL[..], flags, &[IMAGE], args].concat()
    }

    /// A command of the engine on a new terminal of this size.
    pub fn on_terminal(&self, args: &[&str], size: (u16, u16)) -> Result<(Terminal, Running, OwnedFd)> {
        Terminal::attach(&self.command(args), size, self.world.patience())
    }

    /// A detached container that is up, by a new name.
    pub fn up(&self, flags: &[&str], args: &[&str]) -> Result<String> {
        let name = self.world.name("box");
        self.run(&[&["--detach", "--name", &name], flags].concat(), args)?.code(0)?;
        Ok(name)
    }

    /// What a shell script prints in a container.
    pub fn sh(&self, name: &str, script: &str) -> Result<String> {
        self.ok(&["exec", name, "sh", "-c", script])
    }

    /// A field of `inspect`.
    pub fn inspect(&self, name: &str, field: &str) -> Result<String> {
        self.ok(&["inspect", "--format", &format!("{{{{{field}}}}}"), name])
    }

    /// Waits until a field of `inspect` is this.
    pub fn becomes(&self, name: &str, field: &str, wanted: &str) -> Result<()> {
        let mut last = String::new();
        let waited = eventually(&format!("{field} is {wanted}"), self.world.patience(), || {
            last = self.inspect(name, field)?;
            Ok(last == wanted)
        });
        waited.with_context(|| format!("{field} is {last}"))
    }

    /// Removes a container, which must leave nothing of the runtime's running.
    pub fn remove(&self, name: &str) -> Result<()> {
        let pid = self.inspect(name, ".State.Pid")?;
        self.ok(&["rm", "--force", name])?;
        let pid = pid.parse().unwrap_or(0);
        ensure!(pid == 0 || !process::is_alive(pid), "pid {pid} survives rm --force");
        Ok(())
    }

    /// `run` of a perl script, which the image has not: Debian's, from a volume.
    pub fn perl(&self, flags: &[&str], script: &str) -> Result<Command> {
        let volume = format!("{}:/debian:ro", self.world.debian()?.display());
        let flags = [flags, &["--rm", "--volume", &volume]].concat();
        let (lib, base) =
            ("/debian/usr/lib/x86_64-linux-gnu", "-I/debian/usr/lib/x86_64-linux-gnu/perl-base");
        let call = [
            &format!("{lib}/ld-linux-x86-64.so.2"),
            "--library-path",
            lib,
            "/debian/usr/bin/perl",
            base,
            "-e",
            script,
        ];
        Ok(self.command(&self.making("run", &flags, &call)))
    }

    /// Gives it the image.
    pub fn import(&self) -> Result<()> {
        let import = self.command(&["import", "--change", "CMD sh", "-", IMAGE]);
        process::run(import, &archive(self.world)?, self.world.patience())?
            .code(0)
            .context("import the image")?;
        Ok(())
    }

    /// Kills its daemon, which leaves the containers alone.
    pub fn kill_daemon(&mut self) -> Result<()> {
        let daemon = self.daemon.take().context("the daemon")?;
        daemon.signal(rustix::process::Signal::KILL)?;
        process::wait_gone(daemon.pid(), self.world.patience())
    }

    /// Starts the daemon and waits until `probe` succeeds.
    pub fn start_daemon(&mut self, mut command: Command, probe: &[&str]) -> Result<()> {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("daemon.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir(&self.dir);
        self.daemon = Some(process::start(command, false, Duration::from_secs(600))?);
        let begun = eventually("the daemon answers", Duration::from_secs(180), || {
            ensure!(
                !self.daemon.as_mut().is_none_or(|daemon| daemon.has_ended().unwrap_or(true)),
                "it ended"
            );
            Ok(self.call(probe).is_ok_and(|output| output.code == 0))
        });
        begun.with_context(|| format!("the daemon's log: {}", self.last_words()))
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.call(self.clear);
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.signal(rustix::process::Signal::TERM);
            let _ = process::wait_gone(daemon.pid(), Duration::from_secs(60));
        }
        // Shims, conmons and daemons of daemons that name our directory.
        for (pid, _) in leaks::processes(self.world) {
            let _ = process::signal(pid, rustix::process::Signal::KILL);
        }
        process::reap_orphans();
        let unmount = "grep -F \"$0/\" /proc/self/mountinfo | cut -d ' ' -f 5 | sort -r | xargs -r umount -l";
        for script in [self.tidy, unmount] {
            let mut shell = Command::new("sh");
            shell.args(["-c", script]).arg(&self.dir);
            let _ = process::run(shell, b"", Duration::from_secs(30));
        }
    }
}

/// The root file system of the image, as a tar archive.
pub fn archive(world: &World) -> Result<Vec<u8>> {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(world.shared_rootfs()).args(["-cf", "-", "."]);
    Ok(process::run(tar, b"", Duration::from_secs(60))?.code(0)?.stdout)
}

/// What was printed, by a log of CRI's form: its lines are time, stream, `P` for a part of a line or `F` for its rest, text.
pub fn logged(log: &str) -> Result<String> {
    let mut text = String::new();
    for line in log.split_terminator('\n') {
        let mut words = line.splitn(4, ' ').skip(2);
        let tag = words.next().with_context(|| format!("a line of the log: {line:?}"))?;
        text += words.next().unwrap_or_default();
        if tag == "F" {
            text.push('\n');
        }
    }
    Ok(text)
}

/// Whether systemd manages this host's cgroups.
pub fn has_systemd() -> bool {
    std::path::Path::new("/run/systemd/system").is_dir()
}
