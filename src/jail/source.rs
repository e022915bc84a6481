//! What a bind's source is, and what the guest makes of it.
//!
//! In: a planned bind. Out: its source, opened once, and the guest's mount completed with what only the host can see:
//! flags of the mounts it comes from, devices and shared memory of which the guest has its own. Must not: resolve a
//! path twice, or hand the VM what would open the host to it.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use a3s_box_mount::{Kind, errno_words, open_path};
use a3s_box_proto::{Attributes, Mount, Source};
use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{FileType, Stat, StatFs, fstat, fstatfs, major, minor};

use crate::plan::{Bind, options};

/// A bind's source.
pub struct Opened {
    /// `O_PATH`
    pub fd: OwnedFd,
    /// What its mount point has to be.
    pub kind: Kind,
    /// Whether the VM sees it; else the guest has its own.
    pub exported: bool,
    /// Whether it is a socket.
    pub is_socket: bool,
}

/// linux/magic.h, and libc lacks some.
mod magic {
    pub const CGROUP: u64 = 0x27_e0eb;
    pub const CGROUP2: u64 = 0x6367_7270;
    pub const DEVPTS: u64 = 0x1cd1;
    pub const MQUEUE: u64 = 0x1980_0202;
    pub const PROC: u64 = 0x9fa0;
    pub const SYSFS: u64 = 0x6265_6572;
    pub const TMPFS: u64 = 0x0102_1994;
}

/// Where engines bind the host's kernel file systems when a container shares namespaces with the host.
const KERNEL: [(&str, u64, &str); 6] = [
    ("/proc", magic::PROC, "proc"),
    ("/sys", magic::SYSFS, "sysfs"),
    ("/sys/fs/cgroup", magic::CGROUP, "cgroup2"),
    ("/sys/fs/cgroup", magic::CGROUP2, "cgroup2"),
    ("/dev/pts", magic::DEVPTS, "devpts"),
    ("/dev/mqueue", magic::MQUEUE, "mqueue"),
];

/// Character devices that are the same in every kernel.
const DEVICES: [(u32, u32, &str); 6] =
    [(1, 3, "null"), (1, 5, "zero"), (1, 7, "full"), (1, 8, "random"), (1, 9, "urandom"), (5, 0, "tty")];

/// The root file system: a directory, and what is below it.
pub fn open_root(path: &Path, attributes: &mut Attributes, table: &MountTable) -> Result<OwnedFd> {
    let shown = || format!("root.path {}", path.display());
    let fd = open_path(path).map_err(|e| anyhow!("{}: {}", shown(), errno_words(e)))?;
    let stat = fstatfs(&fd).map_err(|e| anyhow!("{}: {}", shown(), errno_words(e)))?;
    attributes.own = flags(&stat);
    attributes.below = table.below(&fd).with_context(shown)?;
    Ok(fd)
}

/// Opens a bind's source and completes the guest's mount.
pub fn open(bind: &Bind, guest: &mut Mount, table: &MountTable) -> Result<Opened> {
    look(bind, guest, table)
        .with_context(|| format!("mount {} to {}", bind.source.display(), bind.destination.display()))
}

fn look(bind: &Bind, guest: &mut Mount, table: &MountTable) -> Result<Opened> {
    let words = |errno| anyhow!("{}", errno_words(errno));
    let fd = open_path(&bind.source).map_err(words)?;
    let stat = fstat(&fd).map_err(words)?;
    let volume = fstatfs(&fd).map_err(words)?;
    guest.attributes.own = bind.tree.of(bind.own.of(flags(&volume)));
    let mut opened = Opened { fd, kind: Kind::File, exported: true, is_socket: false };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            opened.kind = Kind::Directory;
            if let Some(own) = guests_own(&bind.destination, &stat, &volume) {
                guest.source = own;
                opened.exported = false;
                return Ok(opened);
            }
            if volume.f_type as u64 == magic::PROC {
                bail!("the host's procfs would open the VMM's own memory to the guest");
            }
        }
        FileType::Fifo => bail!("a FIFO cannot reach into a VM"),
        FileType::Socket => opened.is_socket = true,
        FileType::CharacterDevice => {
            guest.source = Source::Device(guests_device(stat.st_rdev)?);
            opened.exported = false;
        }
        FileType::BlockDevice => bail!("a block device cannot reach into a VM"),
        _ => {}
    }
    if bind.recursive && opened.kind == Kind::Directory {
        let below = table.below(&opened.fd)?;
        guest.attributes.below = below.into_iter().map(|(path, flags)| (path, bind.tree.of(flags))).collect();
    }
    Ok(opened)
}

fn guests_device(device: u64) -> Result<PathBuf> {
    let number = (major(device), minor(device));
    let known = DEVICES.iter().find(|(major, minor, _)| (*major, *minor) == number);
    let (_, _, name) = known
        .with_context(|| format!("the host's device {}:{} cannot reach into a VM", number.0, number.1))?;
    Ok(Path::new("dev").join(name))
}

/// The guest's own file system in the place of the host's: namespaces are never shared with a VM.
fn guests_own(destination: &Path, stat: &Stat, volume: &StatFs) -> Option<Source> {
    let kind = volume.f_type as u64;
    let file_system = |kind: &str, options| Source::FileSystem {
        kind: kind.into(),
        name: kind.into(),
        options,
        copy_up: false,
    };
    if destination == Path::new("/dev/shm") && kind == magic::TMPFS {
        let size = volume.f_blocks.saturating_mul(volume.f_bsize as u64);
        let mut options = vec!["mode=1777".to_string()];
        // A tmpfs without a bound says 0.
        options.extend((size > 0).then(|| format!("size={size}")));
        // Containers that are given the same on the host have the same in their VM.
        let name = format!("{}-{}", stat.st_dev, stat.st_ino);
        return Some(Source::SharedMemory { name, options });
    }
    let (_, _, name) = KERNEL.iter().find(|(at, magic, _)| destination == Path::new(at) && kind == *magic)?;
    Some(file_system(name, Vec::new()))
}

/// A mount's flags, which statfs shows by numbers of its own (linux/statfs.h).
fn flags(volume: &StatFs) -> u64 {
    const NOSYMFOLLOW: u64 = 0x2000;
    const PAIRS: [(u64, u64); 7] = [
        (libc::ST_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (libc::ST_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (libc::ST_NODEV, libc::MOUNT_ATTR_NODEV),
        (libc::ST_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (libc::ST_NOATIME, libc::MOUNT_ATTR_NOATIME),
        (libc::ST_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        (NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ];
    let found = volume.f_flags as u64;
    PAIRS.iter().filter(|(bit, _)| found & bit != 0).fold(0, |all, (_, attribute)| all | attribute)
}

/// The mounts of the calling process's namespace.
pub struct MountTable(Vec<(PathBuf, String, u64)>);

impl MountTable {
    /// Reads it.
    pub fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
        Ok(MountTable(text.lines().filter_map(parse).collect()))
    }

    /// Path below a directory, and flags, of every mount there, parents first.
    fn below(&self, dir: &OwnedFd) -> Result<Vec<(PathBuf, u64)>> {
        let dir = fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).context("read link")?;
        let mut found: Vec<(PathBuf, u64)> = Vec::new();
        for (path, kind, flags) in &self.0 {
            let Ok(path) = path.strip_prefix(&dir) else { continue };
            if path.as_os_str().is_empty() {
                continue;
            }
            if kind == "proc" {
                bail!(
                    "the procfs at {} would open the VMM's own memory to the guest",
                    dir.join(path).display()
                );
            }
            // A mount over another is what is seen there.
            found.retain(|(hidden, _)| !hidden.starts_with(path));
            found.push((path.to_path_buf(), *flags));
        }
        Ok(found)
    }
}

/// Place, type and flags in a line of mountinfo (proc_pid_mountinfo(5)).
fn parse(line: &str) -> Option<(PathBuf, String, u64)> {
    let (mount, volume) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(4);
    let (path, own) = (unescape(fields.next()?), fields.next()?);
    let mut fields = volume.split(' ');
    let (kind, all) = (fields.next()?, fields.nth(1)?);
    let read_only = if all.split(',').next() == Some("ro") { libc::MOUNT_ATTR_RDONLY } else { 0 };
    Some((path, kind.to_string(), options::attributes(own) | read_only))
}

/// Blanks and backslashes are `\` and three octal digits there.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => (bytes.push(byte), rest = &after[3..]).1,
            None => (bytes.push(*first), rest = after).1,
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo() {
        let line =
            r"36 35 98:0 /mnt1 /a\040b\134/c rw,noatime,nosuid master:1 - ext4 /dev/root ro,errors=continue";
        let (path, kind, flags) = parse(line).unwrap();
        assert_eq!((path, kind.as_str()), (PathBuf::from("/a b\\/c"), "ext4"));
        assert_eq!(flags, libc::MOUNT_ATTR_NOATIME | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_RDONLY);
    }

    #[test]
    fn mounts_below_a_directory_are_those_that_are_seen() {
        let mount = |path: &str, kind: &str, flags| (PathBuf::from(path), kind.to_string(), flags);
        let dir: OwnedFd = fs::File::open("/tmp").unwrap().into();
        let table = MountTable(vec![
            mount("/", "ext4", 0),
            mount("/tmp", "tmpfs", 0),
            mount("/tmp/a", "tmpfs", 1),
            mount("/tmp/a/b", "tmpfs", 0),
            mount("/tmpx", "tmpfs", 0),
            mount("/tmp/a", "tmpfs", 2),
        ]);
        assert_eq!(table.below(&dir).unwrap(), [(PathBuf::from("a"), 2)]);
        let table = MountTable(vec![mount("/tmp/a/proc", "proc", 0)]);
        assert!(table.below(&dir).unwrap_err().to_string().contains("/tmp/a/proc"));
    }

    #[test]
    fn devices_of_every_kernel_are_the_guests_own() {
        assert_eq!(guests_device(rustix::fs::makedev(1, 9)).unwrap(), Path::new("dev/urandom"));
        let refused = guests_device(rustix::fs::makedev(10, 229)).unwrap_err().to_string();
        assert!(refused.contains("10:229"), "{refused}");
    }
}
