//! Unix sockets of the host's among the bind mounts.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::socket_peercred;

use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::process::{self, Output, eventually};
use crate::world::World;

/// A container to which a socket is bound, and a directory with more of them.
struct Fixture {
    container: Container,
    dir: PathBuf,
    servers: Vec<UnixListener>,
    datagrams: UnixDatagram,
}

const WISHES: &[Wish<Fixture>] = &[
    ("sockets/a-bound-socket-carries-a-megabyte-both-ways", |f| megabyte(f, "/run/bound.sock")),
    ("sockets/those-in-a-bound-directory-do-too", |f| megabyte(f, "/sockets/stream")),
    ("sockets/deep-in-a-directory-they-are-found", |f| echo(f, "/sockets/deep/er/stream")),
    ("sockets/datagrams-arrive-whole-and-in-order", datagrams),
    ("sockets/fifty-clients-at-once", fifty),
    ("sockets/the-host-sees-the-clients-ids", ids),
    ("sockets/refusals-are-those-of-linux", refusals),
    ("sockets/one-made-later-is-found", later),
    ("sockets/one-made-anew-takes-over", anew),
    ("sockets/whoever-ends-the-connection-the-other-side-knows", ends),
];

/// Where the container's kernel is not the host's, which else serves its sockets itself.
const APART: &[Wish<Fixture>] = &[("sockets/the-containers-own-work-in-a-bound-directory", own)];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, set_up, WISHES),
        sharing(At::Vm, set_up, APART),
        wish(At::Both, "sockets/what-was-sent-before-the-end-arrives", before_the_end),
        wish(At::Both, "sockets/a-killed-container-hangs-up", killed),
        wish(At::Both, "sockets/the-callers-notify-socket-is-the-containers", notify),
    ]
}

/// The host's perl, which every test machine has.
pub fn with_perl(config: Config) -> Config {
    let places = ["/usr", "/lib", "/lib64"].iter().filter(|place| Path::new(place).is_dir());
    places.fold(config, |config, place| config.bind(Path::new(place), place, &["ro"]))
}

fn set_up(world: &'static World) -> Result<Fixture> {
    let dir = world.make_dir("sockets")?;
    fs::create_dir_all(dir.join("deep/er"))?;
    let servers = ["bound", "stream", "deep/er/stream"].map(|name| serve(&dir.join(name)));
    let servers = servers.into_iter().collect::<Result<_>>()?;
    let datagrams = UnixDatagram::bind(dir.join("datagram"))?;
    datagrams.set_read_timeout(Some(world.patience()))?;
    let config = Config::idle().bind(&dir, "/sockets", &[]).bind(&dir.join("bound"), "/run/bound.sock", &[]);
    let container = Container::running(world, &with_perl(config))?;
    Ok(Fixture { container, dir, servers, datagrams })
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for server in &self.servers {
            let _ = rustix::net::shutdown(server, rustix::net::Shutdown::Both);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Fixture {
    /// One more server.
    fn serve(&mut self, name: &str) -> Result<()> {
        self.servers.push(serve(&self.dir.join(name))?);
        Ok(())
    }
}

/// A server that sends back what it gets, says who one is that begins with `i`, and hangs up on `q`.
fn serve(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    let other = listener.try_clone()?;
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            thread::spawn(move || -> Result<()> {
                let (mut from, mut to) = (client.try_clone()?, client);
                let mut first = [0; 1];
                from.read_exact(&mut first)?;
                match first[0] {
                    b'i' => {
                        let who = socket_peercred(&to)?;
                        write!(to, "{}:{}", who.uid.as_raw(), who.gid.as_raw())?;
                    }
                    b'q' => {}
                    _ => drop(to.write_all(&first).and_then(|()| std::io::copy(&mut from, &mut to))),
                }
                Ok(())
            });
        }
    });
    Ok(other)
}

/// Connects to what the first argument names, or says why not.
pub const CONNECT: &str = "use IO::Socket::UNIX; $s = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $ARGV[0]) or die \"$!\\n\"; $s->autoflush(1);";

fn perl(fixture: &Fixture, flags: &[&str], script: &str, args: &[&str]) -> Result<Output> {
    let program = ["perl", "-e", script];
    let exec = fixture
        .container
        .world
        .command(&[&["exec"], flags, &[fixture.container.id.as_str()], &program, args].concat());
    process::run(exec, b"", fixture.container.world.patience())
}

/// What a script prints that is connected to `path` as `$s`.
fn talk(fixture: &Fixture, path: &str, script: &str) -> Result<String> {
    Ok(perl(fixture, &[], &format!("{CONNECT} {script}"), &[path])?.code(0)?.quiet()?.text())
}

fn echo(fixture: &mut Fixture, path: &str) -> Result<()> {
    same(&talk(fixture, path, "print $s 'hello'; $s->shutdown(1); print <$s>")?, &"hello".to_string())
}

fn megabyte(fixture: &mut Fixture, path: &str) -> Result<()> {
    let script = "$d = join '', map { pack 'N', $_ * 2654435761 % 4294967296 } 1 .. 262144;
        if (!fork) { print $s $d; $s->shutdown(1); exit }
        { local $/; $b = <$s> } wait; print length $b, ' ', $b eq $d ? 'same' : 'different'";
    same(&talk(fixture, path, script)?, &"1048576 same".to_string())
}

const SEND: &str = "use Socket; socket S, AF_UNIX, SOCK_DGRAM, 0; $to = pack_sockaddr_un($ARGV[0]); sub out { send(S, $_[0], 0, $to) // die \"$!\\n\" }";

fn datagrams(fixture: &mut Fixture) -> Result<()> {
    let script = format!("{SEND} out('READY=1'); out('x' x 60000); out(''); out($_) for 1 .. 30");
    perl(fixture, &[], &script, &["/sockets/datagram"])?.code(0)?.quiet()?;
    let mut buffer = vec![0; 100_000];
    let mut next = || -> Result<Vec<u8>> {
        let count = fixture.datagrams.recv(&mut buffer).context("a datagram")?;
        Ok(buffer[..count].to_vec())
    };
    same(&next()?, &b"READY=1".to_vec())?;
    same(&next()?.len(), &60_000)?;
    same(&next()?.len(), &0)?;
    (1..=30).try_for_each(|number| same(&next()?, &number.to_string().into_bytes()))
}

fn fifty(fixture: &mut Fixture) -> Result<()> {
    let script = "use IO::Socket::UNIX;
        @s = map { IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $ARGV[0]) or die \"$_: $!\\n\" } 1 .. 50;
        $_->autoflush(1) for @s;
        for (0 .. 49) { print { $s[$_] } \"client $_\\n\" }
        for (0 .. 49) { $f = $s[$_]; $l = <$f>; $l eq \"client $_\\n\" or die \"$_: $l\" } print 'well'";
    same(&perl(fixture, &[], script, &["/sockets/stream"])?.code(0)?.quiet()?.text(), &"well".to_string())
}

fn ids(fixture: &mut Fixture) -> Result<()> {
    for (user, wanted) in [("0:0", "0:0"), ("1000:2000", "1000:2000")] {
        let script = format!("{CONNECT} print $s 'i'; print <$s>");
        let said = perl(fixture, &["--user", user], &script, &["/run/bound.sock"])?.code(0)?.quiet()?.text();
        same(&said.as_str(), &wanted)?;
    }
    Ok(())
}

/// What connecting fails with, in Linux's words; empty where it does not.
fn refused(fixture: &Fixture, flags: &[&str], path: &str) -> Result<String> {
    Ok(perl(fixture, flags, CONNECT, &[path])?.stderr.trim_end().to_string())
}

fn refusals(fixture: &mut Fixture) -> Result<()> {
    drop(UnixListener::bind(fixture.dir.join("left"))?);
    fixture.serve("private")?;
    fs::set_permissions(fixture.dir.join("private"), fs::Permissions::from_mode(0o600))?;
    fixture.serve("group")?;
    fs::set_permissions(fixture.dir.join("group"), fs::Permissions::from_mode(0o660))?;
    chown(fixture.dir.join("group"), Some(0), Some(2000))?;
    let patience = fixture.container.world.patience();
    for (user, path, words) in [
        ("0:0", "none", "No such file or directory"),
        ("0:0", "left", "Connection refused"),
        ("0:0", "datagram", "Protocol wrong type for socket"),
        ("0:0", "private", ""),
        ("1000:1000", "private", "Permission denied"),
        ("1000:1000", "group", "Permission denied"),
        ("1000:2000", "group", ""),
        ("1000:1000", "stream", ""),
    ] {
        let mut said = String::new();
        let path = format!("/sockets/{path}");
        // What the host has just made may take a moment.
        eventually("the right refusal", patience, || {
            said = refused(fixture, &["--user", user], &path)?;
            Ok(said == words)
        })
        .with_context(|| format!("{path} as {user}: {said:?}, not {words:?}"))?;
    }
    // Groups of the peer's, not its first alone.
    let flags = ["--user", "1000:1000", "--additional-gids", "2000"];
    same(&refused(fixture, &flags, "/sockets/group")?, &String::new())
}

fn later(fixture: &mut Fixture) -> Result<()> {
    same(&refused(fixture, &[], "/sockets/new/later")?.as_str(), &"No such file or directory")?;
    fs::create_dir(fixture.dir.join("new"))?;
    fixture.serve("new/later")?;
    let patience = fixture.container.world.patience();
    eventually("a connection", patience, || Ok(refused(fixture, &[], "/sockets/new/later")?.is_empty()))?;
    echo(fixture, "/sockets/new/later")
}

/// A server that ends leaves its file, and one that begins again makes it anew.
fn anew(fixture: &mut Fixture) -> Result<()> {
    let path = fixture.dir.join("restarted");
    let patience = fixture.container.world.patience();
    for round in 0..3 {
        let server = UnixDatagram::bind(&path)?;
        server.set_read_timeout(Some(Duration::from_millis(100)))?;
        let word = format!("round {round}");
        eventually("a datagram arrives", patience, || {
            let sent = perl(fixture, &[], &format!("{SEND} out('{word}')"), &["/sockets/restarted"])?;
            let mut buffer = [0; 100];
            Ok(sent.code == 0
                && server.recv(&mut buffer).is_ok_and(|count| &buffer[..count] == word.as_bytes()))
        })?;
        drop(server);
        eventually("its end is noticed", patience, || {
            let sent = perl(fixture, &[], &format!("{SEND} out('x')"), &["/sockets/restarted"])?;
            Ok(sent.stderr.contains("Connection refused"))
        })?;
        fs::remove_file(&path)?;
        // Long enough for the guest to have seen neither, or both.
        thread::sleep(Duration::from_millis(700 * round));
    }
    Ok(())
}

fn ends(fixture: &mut Fixture) -> Result<()> {
    // The server hangs up: end of file, and no more can be written.
    let script = "print $s 'q'; print 'end' unless defined <$s>; $SIG{PIPE} = 'IGNORE';
        for (1 .. 1000) { syswrite($s, 'x' x 1000) // do { print \" $!\"; exit }; select undef, undef, undef, 0.005 }";
    same(&talk(fixture, "/sockets/stream", script)?, &"end Broken pipe".to_string())?;
    // The client does, without a word: the server reads it.
    let listener = UnixListener::bind(fixture.dir.join("heard"))?;
    fs::set_permissions(fixture.dir.join("heard"), fs::Permissions::from_mode(0o666))?;
    let patience = fixture.container.world.patience();
    eventually("a connection", patience, || Ok(refused(fixture, &[], "/sockets/heard")?.is_empty()))?;
    let (mut client, _) = listener.accept()?;
    client.set_read_timeout(Some(patience))?;
    same(&client.read(&mut [0; 8]).context("the client's end")?, &0)
}

/// What listens in the container is for the container, whatever is on the host.
fn own(fixture: &mut Fixture) -> Result<()> {
    let script = "use IO::Socket::UNIX; $p = '/sockets/own';
        for (1 .. 2) {
            unlink $p; $l = IO::Socket::UNIX->new(Type => SOCK_STREAM, Local => $p, Listen => 5) or die \"bind: $!\\n\";
            sleep 2;
            if (!fork) { $s = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $p) or die \"$!\\n\"; print $s \"to itself\\n\"; exit }
            $c = $l->accept; print <$c>; wait
        }";
    let said = perl(fixture, &[], script, &[])?.code(0)?.quiet()?.text();
    same(&said.as_str(), &"to itself\nto itself\n")
}

/// The container's end may come right after: nothing of what it has sent is lost.
fn before_the_end(world: &'static World) -> Result<()> {
    let dir = world.make_dir("last")?;
    let server = UnixDatagram::bind(dir.join("datagram"))?;
    server.set_read_timeout(Some(world.patience()))?;
    let listener = UnixListener::bind(dir.join("stream"))?;
    let script = format!(
        "{CONNECT} print $s 'x' x 100000; @ARGV = ('/run/last/datagram'); {SEND} out($_) for 1 .. 8; exit 3"
    );
    for _ in 0..world.by_level(5, 1, 10) {
        let config = Config::new(&["perl", "-e", &script, "/run/last/stream"]).bind(&dir, "/run/last", &[]);
        let reader = {
            let listener = listener.try_clone()?;
            thread::spawn(move || -> Result<usize> {
                let mut bytes = Vec::new();
                Ok(listener.accept()?.0.read_to_end(&mut bytes)?)
            })
        };
        world.run(&world.bundle(&with_perl(config))?, b"")?.code(3)?;
        for number in 1..=8 {
            let mut buffer = [0; 100];
            let count = server.recv(&mut buffer).with_context(|| format!("datagram {number}"))?;
            same(&String::from_utf8_lossy(&buffer[..count]).as_ref(), &number.to_string().as_str())?;
        }
        same(&reader.join().ok().context("the reader")??, &100_000)?;
    }
    fs::remove_dir_all(&dir)?;
    Ok(())
}

fn killed(world: &'static World) -> Result<()> {
    let dir = world.make_dir("killed")?;
    let listener = UnixListener::bind(dir.join("stream"))?;
    let script = format!("{CONNECT} print $s 'here'; sleep 1000");
    let config = Config::new(&["perl", "-e", &script, "/run/killed/stream"]).bind(&dir, "/run/killed", &[]);
    let mut container = Container::running(world, &with_perl(config))?;
    let (mut client, _) = listener.accept()?;
    client.set_read_timeout(Some(world.patience()))?;
    client.read_exact(&mut [0; 4])?;
    process::signal(container.pid, rustix::process::Signal::KILL)?;
    let end = client.read(&mut [0; 8]);
    ensure!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    container.wait()?;
    container.delete(&["--force"])?;
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// sd_notify(3), where whoever calls the runtime has a service manager.
fn notify(world: &'static World) -> Result<()> {
    let dir = world.make_dir("notify")?;
    let manager = UnixDatagram::bind(dir.join("manager"))?;
    manager.set_read_timeout(Some(world.patience()))?;
    let script = format!("@ARGV = ($ENV{{NOTIFY_SOCKET}}); {SEND} out('READY=1'); sleep 1");
    let bundle = world.bundle(&with_perl(Config::new(&["perl", "-e", &script])))?;
    let run = |socket: &Path| {
        let mut command =
            world.command(&["run", "--bundle", &bundle.display().to_string(), &world.name("c")]);
        command.env("NOTIFY_SOCKET", socket);
        process::run(command, b"", world.patience())
    };
    run(&dir.join("manager"))?.code(0)?;
    let mut buffer = [0; 100];
    let count = manager.recv(&mut buffer).context("a datagram")?;
    same(&String::from_utf8_lossy(&buffer[..count]).trim_end(), &"READY=1")?;
    let missing = run(&dir.join("nobody"))?;
    ensure!(missing.code != 0 && missing.stderr.contains("nobody"), "{}", missing.stderr);
    fs::remove_dir_all(&dir)?;
    Ok(())
}
