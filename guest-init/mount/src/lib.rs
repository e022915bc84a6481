//! Mounts by descriptor, below a root that may be hostile.
//!
//! Every path inside a container is resolved by openat2(2) with `RESOLVE_IN_ROOT` and mounted on by descriptor, so no
//! symlink of an image can lead a mount, or a mount point that is made, out of its root. The host's assembled views
//! and the guest's containers both use this. In: descriptors and paths. Out: mounts. Must not: resolve a container's
//! path any other way.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

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
        let path = path.strip_prefix("/").unwrap_or(path);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.0, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Opens a mount point, making what is missing: directories, and for a file's mount an empty file at the end.
    pub fn place(&self, path: &Path, kind: Kind) -> Result<OwnedFd> {
        match self.open(path) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(anyhow!("{}", errno_words(errno))),
            Ok(found) => return fits(found, kind),
        }
        let names: Vec<_> = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
        let mut done = PathBuf::new();
        for (index, name) in names.iter().enumerate() {
            let parent = self.open(&done).context("open parent")?;
            done.push(name);
            if self.open(&done).is_ok() {
                continue;
            }
            let last = index + 1 == names.len();
            let made = if last && kind == Kind::File {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
                openat(&parent, name.as_os_str(), flags, Mode::from_raw_mode(0o644)).map(drop)
            } else {
                mkdirat(&parent, name.as_os_str(), Mode::from_raw_mode(0o755))
            };
            made.map_err(|e| anyhow!("make mount point {}: {}", done.display(), errno_words(e)))?;
        }
        fits(self.open(path).context("open mount point")?, kind)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn fits(found: OwnedFd, kind: Kind) -> Result<OwnedFd> {
    let is_dir = is_directory(&found)?;
    match kind {
        Kind::Directory if !is_dir => Err(anyhow!("the mount point is not a directory")),
        Kind::File if is_dir => Err(anyhow!("the source is not a directory, the mount point is a directory")),
        _ => Ok(found),
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

/// Sets `MOUNT_ATTR_*` bits (mount_setattr(2), which no library wraps); clears none but the atime mode it replaces.
pub fn set_attributes(mount: impl AsFd, attributes: u64, recursive: bool) -> Result<()> {
    if attributes == 0 {
        return Ok(());
    }
    let atime = attributes & libc::MOUNT_ATTR__ATIME != 0;
    let attr = libc::mount_attr {
        attr_set: attributes,
        attr_clr: if atime { libc::MOUNT_ATTR__ATIME } else { 0 },
        propagation: 0,
        userns_fd: 0,
    };
    let path = CString::default();
    let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is NUL-terminated, the attributes live until after the call and their size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            path.as_ptr(),
            libc::AT_EMPTY_PATH | depth,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("set mount attributes");
    }
    Ok(())
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
}
