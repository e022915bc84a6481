//! Mounts by descriptor, below a root that may be hostile.
//!
//! Every path inside a container is resolved by openat2(2) with `RESOLVE_IN_ROOT` and mounted on by descriptor, so no
//! symlink of an image can lead a mount, or a mount point that is made, out of its root. The host's assembled views
//! and the guest's containers both use this. In: descriptors and paths. Out: mounts. Must not: resolve a container's
//! path any other way.

mod copy;

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{CWD, FileType, Mode, ResolveFlags, fstat, mkdirat, openat, openat2, readlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

pub use copy::copy_tree;
pub use rustix::fs::OFlags;
pub use rustix::io::Errno;

/// How many links one path may lead through, as in the kernel.
const LINKS: usize = 40;
/// How often a walk is tried that the kernel gives up because something was renamed or mounted meanwhile.
const RACES: usize = 128;

/// A directory that bounds every path given to it.
pub struct Root(OwnedFd);

/// What a mount point has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// For a file system or a directory.
    Directory,
    /// For a file, socket or device.
    File,
}

impl Root {
    /// Bounds by this directory.
    pub fn new(dir: impl Into<OwnedFd>) -> Self {
        Root(dir.into())
    }

    /// Bounds by the directory that is the current one.
    pub fn current_dir() -> Result<Self> {
        Ok(Root(File::open(".").context("open the root directory")?.into()))
    }

    /// Opens a path as `O_PATH`, following symlinks as a process inside would.
    pub fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.open_as(path, OFlags::PATH)
    }

    /// The same with other flags. A directory that is opened to be read is one that virtiofs has mounted, where
    /// `O_PATH` would stop before.
    pub fn open_as(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = path.strip_prefix("/").unwrap_or(path);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0..RACES;
        loop {
            match openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(Errno::AGAIN) if tries.next().is_some() => {}
                result => return result,
            }
        }
    }

    /// Opens a mount point, making what is missing: directories, and for a file's mount an empty file at the end. A
    /// link to nowhere is followed as it reads, inside the root.
    pub fn place(&self, path: &Path, kind: Kind) -> Result<Place> {
        match self.open(path) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(anyhow!("{}", errno_words(errno))),
            Ok(found) => return fits(found, kind, false),
        }
        let mut path = path.to_path_buf();
        for _ in 0..LINKS {
            match self.make(&path, kind)? {
                None => return fits(self.open(&path).context("open mount point")?, kind, true),
                Some(other) => path = other,
            }
        }
        bail!("too many levels of symbolic links")
    }

    /// For procfs and sysfs: what is hidden below them later must not lie behind a link that may change
    /// (CVE-2019-19921). The words are runc's.
    fn ordinary_place(&self, path: &Path, kind: &str) -> Result<Place> {
        let made = self.place(path, Kind::Directory)?.made;
        match self.open_as(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY) {
            Ok(fd) => Ok(Place { fd, made }),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                bail!("filesystem {kind:?} must be mounted on ordinary directory")
            }
            Err(errno) => bail!("{}", errno_words(errno)),
        }
    }

    /// The mount point of a file system of this type.
    pub fn place_for(&self, path: &Path, kind: &str) -> Result<Place> {
        match kind {
            "proc" | "sysfs" => self.ordinary_place(path, kind),
            _ => self.place(path, Kind::Directory),
        }
    }

    /// Makes what is missing of a path, or says which path it means where a link to nowhere is in the way.
    fn make(&self, path: &Path, kind: Kind) -> Result<Option<PathBuf>> {
        let names: Vec<_> = path.components().filter(|c| !matches!(c, Component::RootDir)).collect();
        let mut done = PathBuf::new();
        for (index, name) in names.iter().enumerate() {
            let parent = self.open(&done).context("open parent")?;
            let above = done.clone();
            done.push(name);
            if self.open(&done).is_ok() {
                continue;
            }
            let name = name.as_os_str();
            let made = make_one(&parent, name, if index + 1 == names.len() { kind } else { Kind::Directory });
            match made {
                Ok(()) => {}
                Err(Errno::EXIST) => {
                    // What is there now and no link was made by somebody else in this moment.
                    let target = link_target(&parent, name).unwrap_or_else(|| name.into());
                    let rest = names[index + 1..].iter().map(Path::new);
                    return Ok(Some([above.as_path(), &target].into_iter().chain(rest).collect()));
                }
                Err(errno) => bail!("make mount point {}: {}", done.display(), errno_words(errno)),
            }
        }
        Ok(None)
    }
}

fn make_one(parent: &OwnedFd, name: &OsStr, kind: Kind) -> Result<(), Errno> {
    match kind {
        Kind::Directory => mkdirat(parent, name, Mode::from_raw_mode(0o755)),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
            openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    }
}

fn link_target(parent: &OwnedFd, name: &OsStr) -> Option<PathBuf> {
    let target = readlinkat(parent, name, Vec::new()).ok()?;
    Some(OsString::from_vec(target.into_bytes()).into())
}

/// A mount point.
#[derive(Debug)]
pub struct Place {
    /// `O_PATH`
    fd: OwnedFd,
    /// Whether it was missing.
    pub made: bool,
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn fits(found: OwnedFd, kind: Kind, made: bool) -> Result<Place> {
    let is_dir = is_directory(&found)?;
    match kind {
        Kind::Directory if !is_dir => Err(anyhow!("the mount point is not a directory")),
        Kind::File if is_dir => Err(anyhow!("the source is not a directory, the mount point is a directory")),
        _ => Ok(Place { fd: found, made }),
    }
}

/// Whether a descriptor is a directory.
pub fn is_directory(fd: impl AsFd) -> Result<bool> {
    let stat = fstat(fd).map_err(|e| anyhow!("stat: {}", errno_words(e)))?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// An errno in lower-case words, as engines look for them.
pub fn errno_words(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

/// A detached copy of the mount that a descriptor lies in, from that place down.
pub fn clone_tree(place: impl AsFd, recursive: bool) -> Result<OwnedFd> {
    clone_tree_at(place, Path::new(""), recursive)
}

/// The same for a path below a descriptor.
pub fn clone_tree_at(place: impl AsFd, path: &Path, recursive: bool) -> Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let depth = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    open_tree(place, path, flags | depth).map_err(|e| anyhow!("clone mount: {}", errno_words(e)))
}

/// A path as `O_PATH`, by the caller's own root.
pub fn open_path(path: &Path) -> Result<OwnedFd, Errno> {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Sets `MOUNT_ATTR_*` bits; clears none but the atime mode it replaces.
pub fn set_attributes(mount: impl AsFd, attributes: u64, recursive: bool) -> Result<()> {
    change_attributes(mount, attributes, 0, recursive)
}

/// Clears `MOUNT_ATTR_*` bits, then sets others.
pub fn change_attributes(mount: impl AsFd, set: u64, clear: u64, recursive: bool) -> Result<()> {
    if set == 0 && clear == 0 {
        return Ok(());
    }
    // The access time's mode is one value in several bits: it is replaced as a whole.
    let atime = (set | clear) & libc::MOUNT_ATTR__ATIME != 0;
    let attr_clr = clear | if atime { libc::MOUNT_ATTR__ATIME } else { 0 };
    setattr(mount, &libc::mount_attr { attr_set: set, attr_clr, ..UNCHANGED }, recursive)
        .context("set mount attributes")
}

/// Sets the propagation: `MS_PRIVATE` and its like, with `MS_REC` for all mounts below.
pub fn set_propagation(mount: impl AsFd, flags: u64) -> Result<()> {
    let attr = libc::mount_attr { propagation: flags & !libc::MS_REC, ..UNCHANGED };
    setattr(mount, &attr, flags & libc::MS_REC != 0).context("set mount propagation")
}

/// Shows owners as a user namespace maps them. The mount must be detached.
pub fn map_ids(mount: impl AsFd, user_namespace: impl AsFd, recursive: bool) -> std::io::Result<()> {
    let userns_fd = user_namespace.as_fd().as_raw_fd() as u64;
    setattr(mount, &libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, userns_fd, ..UNCHANGED }, recursive)
}

const UNCHANGED: libc::mount_attr =
    libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: 0, userns_fd: 0 };

/// mount_setattr(2), which no library wraps.
fn setattr(mount: impl AsFd, attr: &libc::mount_attr, recursive: bool) -> std::io::Result<()> {
    let path = CString::default();
    let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is NUL-terminated, the attributes live until after the call and their size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            path.as_ptr(),
            libc::AT_EMPTY_PATH | depth,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A detached mount of a new file system. Options are `key=value` or flags, as fsconfig(2) takes them.
pub fn file_system(kind: &str, name: &str, options: &[String], attributes: u64) -> Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| match e {
        Errno::NODEV => anyhow!("the kernel has no file system {kind:?}"),
        e => anyhow!("fsopen {kind}: {}", errno_words(e)),
    })?;
    fsconfig_set_string(context.as_fd(), "source", name).context("mount source")?;
    for option in options {
        let set = match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value),
            None => fsconfig_set_flag(context.as_fd(), option.as_str()),
        };
        set.map_err(|e| anyhow!("mount option {option:?} of {kind}: {}", errno_words(e)))?;
    }
    fsconfig_create(context.as_fd()).map_err(|e| anyhow!("create {kind}: {}", errno_words(e)))?;
    let flags = MountAttrFlags::from_bits_retain(attributes as u32);
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
        .map_err(|e| anyhow!("mount {kind}: {}", errno_words(e)))
}

/// Attaches a detached mount to a place.
pub fn attach(mount: impl AsFd, place: impl AsFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", place, "", flags).map_err(|e| anyhow!("attach: {}", errno_words(e)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_hostile_root_cannot_lead_a_mount_point_outside() {
        let base = std::env::temp_dir().join(format!("a3s-box-mount-{}", std::process::id()));
        let rootfs = base.join("rootfs");
        std::fs::create_dir_all(rootfs.join("real")).unwrap();
        std::fs::create_dir(base.join("outside")).unwrap();
        symlink("../outside", rootfs.join("up")).unwrap();
        symlink(base.join("outside"), rootfs.join("absolute")).unwrap();
        symlink("/proc/self/root/tmp", rootfs.join("magic")).unwrap();
        let root = Root::new(File::open(&rootfs).unwrap());
        for hostile in ["up/a", "absolute/b", "real/../../outside/c", "/up/d/e", "magic/f"] {
            let _ = root.place(Path::new(hostile), Kind::Directory);
        }
        assert_eq!(std::fs::read_dir(base.join("outside")).unwrap().count(), 0);
        assert!(root.place(Path::new("real/x/y"), Kind::File).is_ok());
        assert!(rootfs.join("real/x/y").is_file());
        let wrong = root.place(Path::new("real/x/y"), Kind::Directory).unwrap_err().to_string();
        assert!(wrong.contains("not a directory"), "{wrong}");
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn links_to_nowhere_are_followed_inside_and_loops_end() {
        let base = std::env::temp_dir().join(format!("a3s-box-links-{}", std::process::id()));
        std::fs::create_dir_all(base.join("a")).unwrap();
        for (target, link) in [("/run", "a/absolute"), ("../up", "a/relative"), ("b", "c"), ("c/x", "b")] {
            symlink(target, base.join(link)).unwrap();
        }
        let root = Root::new(File::open(&base).unwrap());
        assert!(root.place(Path::new("a/absolute/secrets"), Kind::Directory).unwrap().made);
        assert!(!root.place(Path::new("run/secrets"), Kind::Directory).unwrap().made);
        assert!(root.place(Path::new("a/relative"), Kind::File).unwrap().made);
        assert!(base.join("run/secrets").is_dir() && base.join("up").is_file());
        assert!(root.place(Path::new("b/d"), Kind::Directory).is_err());
        std::fs::remove_dir_all(base).unwrap();
    }
}
