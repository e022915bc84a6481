//! Mounts: the guest's own file systems, binds from the host, hidden and fixed paths.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::bench::Bench;
use super::run::same;
use crate::cases::{At, Case, Wish, sharing, wish};
use crate::config::Config;
use crate::container::Container;
use crate::world::World;

/// Wishes for the bench.
pub const SHARED: &[Wish<Bench>] = &[
    ("mounts/each-file-system-is-there-with-its-options", kinds),
    ("mounts/order-is-that-of-config-json", |bench| {
        let said = bench.container.sh("cut -d ' ' -f 5 /proc/self/mountinfo")?;
        let wanted = [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/shm",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
            "/scratch",
            "/shared",
        ];
        let mut found: Vec<&str> = said.lines().filter(|line| wanted.contains(line)).collect();
        // A bind may be one mount over another at the same place.
        found.dedup();
        same(&found, &wanted.to_vec())
    }),
    ("mounts/tmpfs-has-the-size-and-mode-asked-for", |bench| {
        bench.container.says(
            "stat -c '%a %F' /scratch; df -k /scratch | tail -1 | tr -s ' ' | cut -d ' ' -f 2",
            "1770 directory\n1024",
        )?;
        let full = bench.container.exec(&[
            "sh",
            "-c",
            "head -c 2000000 /dev/zero >/scratch/big; stat -c %s /scratch/big; rm /scratch/big",
        ])?;
        same(&full.text(), &"1048576\n".into())?;
        bench.container.says(
            "stat -c '%a' /dev/shm; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d ' ' -f 2",
            "1777\n65536",
        )
    }),
    ("mounts/noexec-bars-programs", |bench| {
        let script = "cp /bin/busybox /scratch/true; chmod 755 /scratch/true; /scratch/true; echo $?; rm /scratch/true";
        let output = bench.container.exec(&["sh", "-c", script])?;
        same(&output.text(), &"126\n".into())
    }),
    ("mounts/devices-and-links-every-program-expects", |bench| {
        let nodes =
            "cd /dev; for n in null zero full random urandom tty; do stat -c '%n %t:%T %a %F' $n; done";
        let expected = "null 1:3 666 character special file\nzero 1:5 666 character special file\n\
                        full 1:7 666 character special file\nrandom 1:8 666 character special file\n\
                        urandom 1:9 666 character special file\ntty 5:0 666 character special file";
        bench.container.says(nodes, expected)?;
        bench.container.says(
            "cd /dev; readlink fd; readlink stdin; readlink stdout; readlink stderr; readlink ptmx",
            "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx",
        )?;
        bench.container.says("echo x >/dev/null; head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; head -c 3 /dev/random | wc -c", "3\n3\n3")
    }),
    ("mounts/masked-paths-are-empty", |bench| {
        bench.container.says("wc -c </opt/secret-file; ls /opt/secret; ls /sys/firmware | wc -l", "0\n0")?;
        bench.container.says("[ ! -e /proc/kcore ] || head -c 10 /proc/kcore", "")?;
        let output = bench.container.exec(&["sh", "-c", "cat /opt/secret/word; echo x >/opt/secret/new"])?;
        ensure!(output.code != 0, "a masked directory can be written to");
        Ok(())
    }),
    ("mounts/readonly-paths-cannot-be-changed", |bench| {
        bench.container.says("cat /opt/fixed/file", "as it was")?;
        for script in [
            "echo x >/opt/fixed/file",
            "echo x >/opt/fixed/new",
            "echo x >/proc/sys/kernel/core_pattern",
            "rm /opt/fixed/file",
        ] {
            let output = bench.container.exec(&["sh", "-c", script])?;
            ensure!(
                output.code != 0 && output.stderr.contains("Read-only file system"),
                "{script}: {:?}",
                output.stderr
            );
        }
        Ok(())
    }),
    ("mounts/a-bound-directory-is-seen-from-both-sides", bound_directory),
    ("mounts/sysfs-is-read-only-where-asked", |bench| {
        let output = bench.container.exec(&["sh", "-c", "echo x >/sys/kernel/profiling"])?;
        ensure!(output.code != 0, "/sys is writable");
        bench.container.says("grep -c ' /sys sysfs ro' /proc/self/mounts", "1")
    }),
    ("mounts/cgroup-shows-the-containers-own", |bench| {
        bench.container.says(
            "cat /proc/1/cgroup | sed 's/.*://'  | sort -u; cat /sys/fs/cgroup/cgroup.procs | grep -c '^1$'",
            "/\n1",
        )
    }),
    ("mounts/proc-shows-no-process-but-the-containers", |bench| {
        let said = bench
            .container
            .sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo; ls -d /proc/[0-9]* | wc -l")?;
        ensure!(!said.contains("krun") && !said.contains("a3s"), "{said}");
        let count: usize = said.lines().last().unwrap_or_default().trim().parse()?;
        ensure!(count < 10, "{count} processes: {said}");
        Ok(())
    }),
];

/// Wishes for a tree of binds.
const TREE: &[Wish<Tree>] = &[
    ("mounts/a-read-only-bind-cannot-be-changed", read_only),
    ("mounts/a-single-file-is-bound", single_file),
    ("mounts/a-bind-below-a-tmpfs", |tree| {
        tree.container.says("cat /volatile/deep/below/word; ls /volatile", "from host\ndeep")?;
        tree.container.says("touch /volatile/x && echo made", "made")?;
        ensure!(!tree.rootfs().join("volatile/deep").exists(), "its place was made in the root file system");
        Ok(())
    }),
    ("mounts/a-tmpfs-over-a-bind", |tree| {
        tree.container.says(
            "ls /over/hidden | wc -l; cat /over/word; touch /over/hidden/x && echo made",
            "0\nfrom host\nmade",
        )?;
        ensure!(!tree.host.join("hidden/x").exists(), "what was written to the tmpfs is on the host");
        Ok(())
    }),
    ("mounts/missing-mount-points-are-made", |tree| {
        let rootfs = tree.rootfs();
        ensure!(rootfs.join("brand/new/dir").is_dir(), "no directory");
        ensure!(rootfs.join("brand/new.file").is_file(), "no file");
        same(&fs::metadata(rootfs.join("brand/new.file"))?.len(), &0)?;
        tree.container.says("cat /brand/new/dir/word; cat /brand/new.file", "from host\nfrom host")
    }),
    ("mounts/a-destination-through-a-link-stays-inside", |tree| {
        tree.container.says("cat /linked/word; cat /opt/real/word", "from host\nfrom host")
    }),
    ("mounts/nothing-but-mount-points-is-in-the-root-file-system", only_mount_points),
    ("mounts/the-pids-root-is-the-containers", pids_root),
    ("mounts/owners-and-modes-are-the-hosts", |tree| {
        let path = tree.host.join("owned");
        fs::write(&path, "x")?;
        std::os::unix::fs::chown(&path, Some(4321), Some(1234))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
        tree.container.says("stat -c '%u %g %a' /rw/owned", "4321 1234 640")
    }),
    ("mounts/links-and-renames-work-in-a-bind", |tree| {
        tree.container.says(
                        "cd /rw; echo 1 >a; ln a b; ln -s a c; mv a d; cat b c 2>/dev/null; stat -c %h d; mkdir e; rmdir e; rm b c d; ls | wc -l",
                        &format!("1\n2\n{}", fs::read_dir(&tree.host)?.count()),
                    )
    }),
    ("mounts/leave-no-trace-on-the-host", |tree| {
        tree.container.delete(&["--force"])?;
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(
            !table.contains(&*tree.container.bundle.to_string_lossy()),
            "mounts below the bundle are left"
        );
        Ok(())
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        sharing(At::Both, Tree::set_up, TREE),
        wish(At::Both, "mounts/a-read-only-root-cannot-be-changed", readonly_root),
        wish(At::Both, "mounts/files-filled-between-create-and-start-are-seen-whole", filled),
    ]
}

fn kinds(bench: &mut Bench) -> Result<()> {
    let said = bench.container.sh("cut -d ' ' -f 2-4 /proc/self/mounts")?;
    for (point, kind, options) in [
        ("/proc", "proc", &["nosuid", "nodev", "noexec"][..]),
        ("/dev", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", &["nosuid", "noexec", "gid=5", "mode=620", "ptmxmode=666"]),
        ("/dev/shm", "tmpfs", &["nosuid", "nodev", "noexec", "size=65536k"]),
        ("/dev/mqueue", "mqueue", &["nosuid", "nodev", "noexec"]),
        ("/sys", "sysfs", &["ro", "nosuid", "nodev", "noexec"]),
        ("/sys/fs/cgroup", "cgroup", &["ro", "nosuid", "nodev", "noexec"]),
        ("/scratch", "tmpfs", &["rw", "nosuid", "noexec", "size=1024k", "mode=1770"]),
    ] {
        let start = format!("{point} {kind}");
        let line = said
            .lines()
            .find(|line| line.starts_with(&start))
            .with_context(|| format!("no {start} in {said}"))?;
        let found: Vec<&str> = line.rsplit(' ').next().unwrap_or_default().split(',').collect();
        let missing: Vec<_> = options.iter().filter(|option| !found.contains(option)).collect();
        ensure!(missing.is_empty(), "{line}: no {missing:?}");
    }
    ensure!(!said.contains("/dev tmpfs rw,nosuid,relatime"), "strictatime is lost");
    let used = "echo x >/dev/shm/a && cat /dev/shm/a && rm /dev/shm/a; touch /dev/mqueue/q && ls /dev/mqueue && rm /dev/mqueue/q";
    bench.container.says(used, "x\nq")
}

fn bound_directory(bench: &mut Bench) -> Result<()> {
    fs::write(bench.shared.join("from-host"), "host\n")?;
    bench.container.says("cat /shared/from-host; echo guest >/shared/from-guest; mkdir /shared/dir; echo appended >>/shared/from-host", "host")?;
    let made = bench.shared.join("from-guest");
    same(&fs::read_to_string(&made)?, &"guest\n".into())?;
    same(&fs::read_to_string(bench.shared.join("from-host"))?, &"host\nappended\n".into())?;
    let metadata = fs::metadata(&made)?;
    same(&(metadata.uid(), metadata.gid()), &(0, 0))?;
    ensure!(bench.shared.join("dir").is_dir(), "no directory");
    // What the host changes later is seen, also a file that is replaced.
    fs::write(bench.shared.join("new"), "replaced\n")?;
    fs::rename(bench.shared.join("new"), bench.shared.join("from-host"))?;
    crate::process::eventually("the guest's sight of a replaced file", bench.world().patience(), || {
        Ok(bench.container.sh("cat /shared/from-host")? == "replaced")
    })?;
    bench.container.says(
        "rm -r /shared/dir /shared/from-host /shared/from-guest; ls /shared/dir 2>/dev/null | wc -l",
        "0",
    )?;
    ensure!(!made.exists(), "what the guest removed is there");
    Ok(())
}

/// A container with every sort of bind, on a root file system of its own.
struct Tree {
    container: Container,
    host: PathBuf,
    before: Vec<String>,
}

impl Tree {
    fn set_up(world: &'static World) -> Result<Self> {
        let host = world.make_dir("host")?;
        fs::write(host.join("word"), "from host\n")?;
        fs::create_dir(host.join("hidden"))?;
        fs::write(host.join("hidden/below"), "x")?;
        let word = host.join("word");
        let config = Config::idle()
            .bind(&host, "/rw", &[])
            .bind(&host, "/ro", &["ro"])
            .bind(&word, "/etc/word", &[])
            .bind(&word, "/etc/fixed-word", &["ro"])
            .mount("/volatile", "tmpfs", "tmpfs", &["mode=755"])
            .bind(&host, "/volatile/deep/below", &["ro"])
            .bind(&host, "/over", &[])
            .mount("/over/hidden", "tmpfs", "tmpfs", &[])
            .bind(&host, "/brand/new/dir", &[])
            .bind(&word, "/brand/new.file", &[])
            .bind(&host, "/linked", &[]);
        let bundle = world.own_bundle(&config)?;
        let rootfs = bundle.join("rootfs");
        fs::create_dir_all(rootfs.join("opt/real"))?;
        std::os::unix::fs::symlink("opt/real", rootfs.join("linked"))?;
        let before = list(&rootfs)?;
        let container = Container::of_bundle(world, bundle)?;
        container.start()?;
        Ok(Tree { container, host, before })
    }

    fn rootfs(&self) -> PathBuf {
        self.container.bundle.join("rootfs")
    }
}

/// Every path below a directory, with its kind and size.
pub fn list(dir: &std::path::Path) -> Result<Vec<String>> {
    let mut command = std::process::Command::new("find");
    command.arg(dir).args(["-xdev", "-printf", "%P %y %m %U:%G %s %l\n"]);
    let output = crate::process::run(command, b"", std::time::Duration::from_secs(30))?.code(0)?;
    let mut lines: Vec<String> = output.text().lines().map(str::to_string).collect();
    lines.sort();
    Ok(lines)
}

fn read_only(tree: &mut Tree) -> Result<()> {
    tree.container.says("cat /ro/word", "from host")?;
    for script in [
        "echo x >/ro/word",
        "echo x >/ro/new",
        "rm /ro/word",
        "mkdir /ro/dir",
        "touch /ro/word",
        "chmod 777 /ro/word",
    ] {
        let output = tree.container.exec(&["sh", "-c", script])?;
        ensure!(
            output.code != 0 && output.stderr.contains("Read-only"),
            "{script}: {} {:?}",
            output.code,
            output.stderr
        );
    }
    same(&fs::read_to_string(tree.host.join("word"))?, &"from host\n".into())
}

fn single_file(tree: &mut Tree) -> Result<()> {
    tree.container
        .says("cat /etc/word /etc/fixed-word; ls -d /etc/passwd", "from host\nfrom host\n/etc/passwd")?;
    let output = tree.container.exec(&["sh", "-c", "echo x >/etc/fixed-word"])?;
    ensure!(output.code != 0 && output.stderr.contains("Read-only"), "{:?}", output.stderr);
    tree.container.says("echo guest >/etc/word; cat /etc/fixed-word", "guest")?;
    same(&fs::read_to_string(tree.host.join("word"))?, &"guest\n".into())?;
    fs::write(tree.host.join("word"), "from host\n")?;
    crate::process::eventually(
        "the guest's sight of the host's write",
        tree.container.world.patience(),
        || Ok(tree.container.sh("cat /etc/word")? == "from host"),
    )
}

fn only_mount_points(tree: &mut Tree) -> Result<()> {
    let after = list(&tree.rootfs())?;
    let stat = |line: &str| line.split(' ').next().unwrap_or_default().to_string();
    let new: Vec<String> =
        after.iter().filter(|line| !tree.before.contains(line)).map(|line| stat(line)).collect();
    let allowed = [
        "",
        "rw",
        "ro",
        "etc",
        "etc/word",
        "etc/fixed-word",
        "volatile",
        "over",
        "brand",
        "brand/new",
        "brand/new/dir",
        "brand/new.file",
        "dev",
        "proc",
        "sys",
        "opt",
        "opt/real",
    ];
    let foreign: Vec<_> = new.iter().filter(|path| !allowed.contains(&path.as_str())).collect();
    ensure!(foreign.is_empty(), "new or changed in the root file system: {foreign:?}");
    let gone: Vec<_> = tree
        .before
        .iter()
        .map(|line| stat(line))
        .filter(|path| !after.iter().any(|a| stat(a) == *path))
        .collect();
    ensure!(gone.is_empty(), "gone from the root file system: {gone:?}");
    Ok(())
}

fn pids_root(tree: &mut Tree) -> Result<()> {
    let root = PathBuf::from(format!("/proc/{}/root", tree.container.pid));
    same(&fs::read_to_string(root.join("marker"))?, &fs::read_to_string(tree.rootfs().join("marker"))?)?;
    for path in [
        "rw/word",
        "ro/word",
        "etc/word",
        "brand/new/dir/word",
        "opt/real/word",
        "volatile/deep/below/word",
        "over/word",
    ] {
        same(&fs::read_to_string(root.join(path)).with_context(|| path.to_string())?, &"from host\n".into())?;
    }
    let written = fs::write(root.join("ro/new"), "x");
    ensure!(written.is_err(), "a read-only bind is writable through the pid's root");
    ensure!(root.join("proc/self").symlink_metadata().is_ok(), "there is no procfs at its /proc");
    // As `podman cp` does it: by entering the namespace.
    let mut enter = std::process::Command::new("nsenter");
    enter.args([
        "--mount",
        "--root",
        "--wd",
        "--target",
        &tree.container.pid.to_string(),
        "/bin/cat",
        "/etc/hostname",
    ]);
    let output = crate::process::run(enter, b"", tree.container.world.patience())?.code(0)?;
    same(&output.text(), &"localhost\n".into())
}

fn readonly_root(world: &'static World) -> Result<()> {
    let script = "echo x >/new; echo x >/etc/hostname; mkdir /dir; echo y >/tmp/free && cat /tmp/free; chmod 700 /etc; ls /made";
    let config = Config::sh(script)
        .set("/root/readonly", json!(true))
        .mount("/tmp", "tmpfs", "tmpfs", &[])
        .mount("/made", "tmpfs", "tmpfs", &[]);
    let bundle = world.own_bundle(&config)?;
    let output = world.run(&bundle, b"")?.code(0)?;
    same(&output.text(), &"y\n".into())?;
    same(&output.stderr.matches("Read-only file system").count(), &4)?;
    ensure!(!bundle.join("rootfs/new").exists(), "it was written to");
    Ok(())
}

/// As engines do with /etc/hosts.
fn filled(world: &'static World) -> Result<()> {
    let dir = world.make_dir("filled")?;
    let file = dir.join("hosts");
    fs::write(&file, "")?;
    let config =
        Config::sh("cat /etc/hosts /dir/late").bind(&file, "/etc/hosts", &[]).bind(&dir, "/dir", &[]);
    let mut container = Container::create(world, &config)?;
    fs::write(&file, "10.0.0.1 late\n")?;
    fs::write(dir.join("late"), "too\n")?;
    container.start()?;
    same(&container.wait()?, &0)?;
    same(&container.output(), &"10.0.0.1 late\ntoo\n".into())?;
    container.delete(&[])
}
