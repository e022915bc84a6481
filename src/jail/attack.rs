//! What a process that was taken over can reach: everything without the jail, nothing with it.
//!
//! A guest's kernel sends names that libkrun hands to openat(2) as they are; whoever owns libkrun makes any call. Each
//! attack runs in a process of its own, once where the VMM would be without its jail, or the test would prove nothing,
//! and once in the very jail.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, openat};

use super::*;
use crate::jail::seccomp::Filter;

const REACHED: i32 = 77;
const SECRET: &str = "a secret of the host's";
/// How the container's tree is called in the export.
const PLACE: &str = "tree";

/// The host as an attacker would like to see it.
struct Host {
    dir: PathBuf,
    run: PathBuf,
    tree: PathBuf,
    port: u16,
    _listeners: (TcpListener, UnixListener),
}

impl Host {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("a3s-box-attack-{}-{name}", std::process::id()));
        let (run, tree, other) = (dir.join("run"), dir.join("tree"), dir.join("other"));
        for dir in [&run, &tree, &other, &dir.join("anchor")] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(dir.join("secret"), SECRET).unwrap();
        symlink(&dir, tree.join("link")).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let unix = UnixListener::bind(other.join("control.sock")).unwrap();
        Host { dir, run, tree, port, _listeners: (tcp, unix) }
    }

    /// A name that leads up from anywhere and down to the secret.
    fn up_to_secret(&self) -> PathBuf {
        let up: PathBuf = std::iter::repeat_n("..", 40).collect();
        up.join(self.dir.join("secret").strip_prefix("/").unwrap())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn says_secret(at: &OwnedFd, name: &Path) -> bool {
    let Ok(fd) = openat(at, name, OFlags::RDONLY, Mode::empty()) else { return false };
    let mut text = String::new();
    fs::File::from(fd).read_to_string(&mut text).is_ok() && text == SECRET
}

fn opens(at: &OwnedFd, name: &str) -> bool {
    openat(at, name, OFlags::RDONLY, Mode::empty()).is_ok()
}

type Attack = (&'static str, fn(&Host, &OwnedFd) -> bool);

const ATTACKS: &[Attack] = &[
    ("names that lead up", |host, tree| says_secret(tree, &host.up_to_secret())),
    ("up step by step", |host, tree| {
        let up = |at: OwnedFd, _| openat(&at, "..", OFlags::PATH, Mode::empty()).unwrap_or(at);
        let top = (0..40).fold(tree.try_clone().unwrap(), up);
        says_secret(&top, host.dir.join("secret").strip_prefix("/").unwrap())
    }),
    ("absolute names", |host, tree| says_secret(tree, &host.dir.join("secret"))),
    ("a symlink in the tree", |_, tree| says_secret(tree, Path::new("link/secret"))),
    ("a symlink made on the spot", |host, tree| {
        rustix::fs::symlinkat(&host.dir, tree, "fresh").unwrap();
        says_secret(tree, Path::new("fresh/secret"))
    }),
    ("the memory of processes", |_, tree| opens(tree, "/proc/self/mem")),
    ("its own program", |_, tree| opens(tree, "/proc/self/exe")),
    ("the first process's files", |_, tree| opens(tree, "/proc/1/status")),
    ("a device node of its making", |_, tree| {
        let made =
            mknodat(tree, "node", FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 5));
        made.is_ok() && opens(tree, "node")
    }),
    ("the control socket of another container", |host, _| {
        UnixStream::connect(host.dir.join("other/control.sock")).is_ok()
    }),
    ("the network", |host, _| TcpStream::connect(("127.0.0.1", host.port)).is_ok()),
    ("a program of the host's", |_, _| {
        let args = [c"sh", c"-c", c"exit 77"];
        nix::unistd::execv(c"/bin/sh", &args).is_ok()
    }),
    ("another process", |_, _| nix::sys::signal::kill(Pid::parent(), None).is_ok()),
    ("a new user namespace", |_, _| unshare(CloneFlags::CLONE_NEWUSER).is_ok()),
    ("the jail's own mounts", |_, _| {
        nix::mount::mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REMOUNT | MsFlags::MS_BIND,
            None::<&str>,
        )
        .is_ok()
    }),
];

/// Runs one attack in a process of its own, jailed or not.
fn run(host: &Host, attack: &Attack, jailed: bool) -> WaitStatus {
    // SAFETY: the child makes system calls and allocates, which glibc's fork leaves possible; then it ends.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        ForkResult::Child => {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            make_private().unwrap();
            let tree = if jailed { enter_jail(host) } else { open_tree(&host.tree) };
            let status = if attack.1(host, &tree) { REACHED } else { 0 };
            // SAFETY: _exit takes any status and does not return.
            unsafe { libc::_exit(status) }
        }
    }
}

fn open_tree(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

/// What the VMM does between its start and the guest's.
fn enter_jail(host: &Host) -> OwnedFd {
    keep_only(&[host._listeners.0.as_raw_fd(), host._listeners.1.as_raw_fd()]);
    let filter = Filter::compile(crate::plan::vm::Network::None).unwrap();
    let jail = Jail::build(&host.dir.join("anchor"), &host.run, &[], None).unwrap();
    let mount = clone_tree(open_path(&host.tree).unwrap(), true).unwrap();
    set_attributes(&mount, tree::EXPORT, true).unwrap();
    jail.attach(vec![Export { place: PLACE.into(), is_dir: true, mount }]).unwrap();
    jail.enter().unwrap();
    confine_vmm().unwrap();
    landlock::confine(&[], &[] as &[OwnedFd]).unwrap();
    let tree = open_tree(&Path::new(EXPORT).join(exported(0)).join(PLACE));
    filter.load().unwrap();
    tree
}

#[test]
fn without_the_jail_everything_is_reached_and_within_nothing() {
    // Mounts and device nodes take root, which has the tests of containers run.
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let mut wrong = Vec::new();
    for (number, attack) in ATTACKS.iter().enumerate() {
        for jailed in [false, true] {
            let host = Host::new(&format!("{number}-{jailed}"));
            let end = run(&host, attack, jailed);
            let reached = matches!(end, WaitStatus::Exited(_, REACHED));
            let held = matches!(
                end,
                WaitStatus::Exited(_, 0) | WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSYS, _)
            );
            if jailed == reached || !(reached || held) {
                wrong.push(format!("{}, jailed {jailed}: {end:?}", attack.0));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_jail_leaves_the_tree_itself_usable() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let host = Host::new("use");
    let attack: Attack = ("not an attack", |_, tree| {
        let flags = OFlags::CREATE | OFlags::WRONLY;
        let made = openat(tree, "file", flags, Mode::from_raw_mode(0o600));
        made.is_ok_and(|fd| rustix::io::write(&fd, b"x").is_ok())
            && rustix::fs::mkdirat(tree, "dir", Mode::from_raw_mode(0o700)).is_ok()
            && rustix::fs::renameat(tree, "file", tree, "dir/file").is_ok()
            && rustix::fs::linkat(tree, "dir/file", tree, "again", AtFlags::empty()).is_ok()
    });
    let end = run(&host, &attack, true);
    assert!(matches!(end, WaitStatus::Exited(_, REACHED)), "{end:?}");
    assert_eq!(fs::read(host.tree.join("again")).unwrap(), b"x");
}
