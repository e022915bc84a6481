//! A container's file systems, seen from inside its new mount namespace.
//!
//! In: a planned container. Out: the calling process's root is the container's. Must not: follow a path of the
//! container's outside its root; every destination goes through [`a3s_box_mount`].

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use a3s_box_mount::{
    Errno, Kind, OFlags, Place, Root, attach, clone_tree, clone_tree_at, copy_tree, errno_words, file_system,
    is_directory, open_path, set_attributes, set_propagation,
};
use a3s_box_proto::{Attributes, Container, Mount, ROOTFS, Source};
use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::statfs::FUSE_SUPER_MAGIC;

use crate::shared_memory;
use crate::terminal::{self, Terminal};

/// Makes the container's tree and enters it. The caller is alone in a new mount namespace.
pub fn enter(container: &Container) -> Result<Option<Terminal>> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("make mounts private")?;
    let exported = Path::new("/").join(&container.place);
    let rootfs = exported.join(ROOTFS);
    let itself = MsFlags::MS_BIND | MsFlags::MS_REC;
    visit(&rootfs, &container.attributes)?;
    mount(Some(&rootfs), &rootfs, None::<&str>, itself, None::<&str>).context("bind the root file system")?;
    std::env::set_current_dir(&rootfs).context("enter the root file system")?;
    let root = Root::current_dir()?;
    set_below(&root, &container.attributes)?;
    for planned in &container.mounts {
        add(&root, planned, &exported).with_context(|| format!("mount {}", planned.destination.display()))?;
    }
    crate::devices::make(&root, &container.devices)?;
    let is_bound =
        |mount: &Mount| mount.destination == Path::new("/dev") && matches!(mount.source, Source::Export(_));
    if !container.mounts.iter().any(is_bound) {
        fill_dev(&root)?;
    }
    hide(&root, container)?;
    pivot()?;
    // As runc: a missing working directory is made, where the file system lets it.
    let _ = fs::create_dir_all(Path::new("/").join(&container.process.cwd));
    let terminal = terminal::of(&container.process)?;
    if let Some(terminal) = terminal.as_ref().filter(|_| has_own_dev()) {
        terminal.bind_console(&Root::current_dir()?)?;
    }
    let root = open_path(Path::new("/")).context("open the root")?;
    propagate(&root, container.propagation)?;
    set_attributes(root, container.attributes.own, false).context("the root's attributes")?;
    Ok(terminal)
}

/// Enters an empty root, for a process that needs none.
pub fn enter_nothing() -> Result<()> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("make mounts private")?;
    let hardened =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let empty = file_system("tmpfs", "none", &["mode=0555".into(), "size=4k".into()], hardened)?;
    attach(&empty, open_path(Path::new("/tmp")).context("open the mount point")?)?;
    nix::unistd::fchdir(&empty).context("enter the empty root")?;
    pivot()
}

/// Makes the current directory the root.
fn pivot() -> Result<()> {
    nix::unistd::pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("detach the guest's root")?;
    std::env::set_current_dir("/").context("enter the new root")
}

/// `exported` is where the container's exports lie.
fn add(root: &Root, planned: &Mount, exported: &Path) -> Result<()> {
    let destination = &planned.destination;
    let mount = match &planned.source {
        Source::Export(path) => {
            let (tree, kind) = copy_of(&exported.join(path), &planned.attributes)?;
            set_attributes(&tree, planned.attributes.own, false)?;
            attach(&tree, root.place(destination, kind)?)?;
            set_below(&Root::new(tree.try_clone().context("the mount")?), &planned.attributes)?;
            tree
        }
        Source::Device(path) => {
            let tree = clone_tree_at(open_path(Path::new("/"))?, path, false)?;
            set_attributes(&tree, planned.attributes.own, false)?;
            attach(&tree, root.place(destination, Kind::File)?)?;
            tree
        }
        Source::SharedMemory { name, .. } => {
            let tree = shared_memory::tree(name)?;
            set_attributes(&tree, planned.attributes.own, false)?;
            attach(&tree, root.place(destination, Kind::Directory)?)?;
            tree
        }
        Source::FileSystem { kind, name, options, copy_up } => {
            let place = root.place_for(destination, kind)?;
            let mount = guest_file_system(kind, name, &like_hidden(kind, options, &place, *copy_up)?)?;
            if *copy_up {
                copy_tree(&place, &mount).context("copy what is there")?;
            }
            set_attributes(&mount, planned.attributes.own, false)?;
            attach(&mount, place)?;
            mount
        }
    };
    propagate(&mount, planned.propagation)
}

/// Slaves of nobody and private mounts are the same: everything here is private from the start.
fn propagate(mount: &OwnedFd, flags: u64) -> Result<()> {
    if flags & libc::MS_UNBINDABLE == 0 { Ok(()) } else { set_propagation(mount, flags) }
}

/// A private copy of a place in the exported tree.
fn copy_of(path: &Path, attributes: &Attributes) -> Result<(OwnedFd, Kind)> {
    let mut source = open_path(path).context("open the exported source")?;
    let mut kind = Kind::File;
    if is_directory(&source)? {
        // O_PATH stops before the submount that virtiofs announces here; what is wanted is that one.
        source = File::open(path).context("open the exported source")?.into();
        visit(path, attributes)?;
        kind = Kind::Directory;
    }
    Ok((clone_tree(&source, true)?, kind))
}

/// Has virtiofs mount what the host has mounted below: a mount made later would take over its parent's attributes.
fn visit(path: &Path, attributes: &Attributes) -> Result<()> {
    if attributes.below.is_empty() {
        return Ok(());
    }
    let root = Root::new(File::open(path).context("open the exported tree")?);
    attributes.below.iter().try_for_each(|(path, _)| visited(&root, path).map(drop))
}

/// A mount below; `None` for a file, which is no mount of its own here, or one that is gone by now.
fn visited(root: &Root, path: &Path) -> Result<Option<OwnedFd>> {
    match root.open_as(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOTDIR | Errno::NOENT) => Ok(None),
        Err(errno) => Err(anyhow!("{}: {}", path.display(), errno_words(errno))),
    }
}

fn set_below(root: &Root, attributes: &Attributes) -> Result<()> {
    for (path, flags) in &attributes.below {
        if let Some(mount) = visited(root, path)? {
            set_attributes(mount, *flags, false).with_context(|| format!("{}", path.display()))?;
        }
    }
    Ok(())
}

/// As runc: without a mode of its own, a tmpfs has that of the directory it hides, and as a copy of it its owner too.
fn like_hidden(kind: &str, options: &[String], place: &Place, copy: bool) -> Result<Vec<String>> {
    let mut options = options.to_vec();
    if kind != "tmpfs" || place.made {
        return Ok(options);
    }
    let stat = nix::sys::stat::fstat(place).context("look at the mount point")?;
    let own = [("mode=", format!("{:o}", stat.st_mode & 0o7777))];
    let owner = [("uid=", stat.st_uid.to_string()), ("gid=", stat.st_gid.to_string())];
    for (name, value) in own.into_iter().chain(owner.into_iter().filter(|_| copy)) {
        if !options.iter().any(|option| option.starts_with(name)) {
            options.push(format!("{name}{value}"));
        }
    }
    Ok(options)
}

/// Whether the kernel has file systems of this type.
fn is_known(kind: &str) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.lines().any(|line| line.split_whitespace().last() == Some(kind))
}

fn guest_file_system(kind: &str, name: &str, options: &[String]) -> Result<OwnedFd> {
    match file_system(kind, name, options, 0) {
        // Some guest kernels lack POSIX message queues, which every engine's default mounts ask for.
        Err(_) if kind == "mqueue" && !is_known(kind) => file_system("tmpfs", name, options, 0),
        result => result,
    }
}

/// The devices and links that config-linux.md promises, where /dev is a file system of the guest's own.
fn fill_dev(root: &Root) -> Result<()> {
    let Ok(dev) = root.open(Path::new("dev")) else { return Ok(()) };
    if !is_guests(&dev) {
        return Ok(());
    }
    let dir = PathBuf::from(format!("/proc/self/fd/{}", dev.as_raw_fd()));
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        let path = dir.join(name);
        match mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor)) {
            Err(nix::errno::Errno::EEXIST) => continue,
            made => made.with_context(|| format!("make /dev/{name}"))?,
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).context("mode of device")?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        match symlink(target, dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("link /dev/{name}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a directory lies in a file system of the guest's own, where devices and mount points can be made.
fn is_guests(dir: &impl AsFd) -> bool {
    nix::sys::statfs::fstatfs(dir).is_ok_and(|on| on.filesystem_type() != FUSE_SUPER_MAGIC)
}

fn has_own_dev() -> bool {
    open_path(Path::new("/dev")).is_ok_and(|dev| is_guests(&dev))
}

/// Masked paths vanish below an empty thing of their kind; read-only paths become so.
fn hide(root: &Root, container: &Container) -> Result<()> {
    let guest = open_path(Path::new("/")).context("open the guest's root")?;
    for path in &container.masked_paths {
        let Some(target) = hidden(root, path)? else { continue };
        let cover = if is_directory(&target)? {
            file_system("tmpfs", "tmpfs", &["mode=0555".into()], libc::MOUNT_ATTR_RDONLY)
        } else {
            clone_tree_at(&guest, Path::new("dev/null"), false)
        };
        cover.and_then(|cover| attach(cover, target)).with_context(|| format!("mask {}", path.display()))?;
    }
    for path in &container.readonly_paths {
        let Some(target) = hidden(root, path)? else { continue };
        let tree = clone_tree(&target, true).with_context(|| format!("clone {}", path.display()))?;
        set_attributes(&tree, libc::MOUNT_ATTR_RDONLY, false)
            .and_then(|()| attach(tree, target))
            .with_context(|| format!("make {} read-only", path.display()))?;
    }
    Ok(())
}

/// What is to be hidden or fixed. What is not there needs no hiding; what cannot be looked at must not be left as it is.
fn hidden(root: &Root, path: &Path) -> Result<Option<OwnedFd>> {
    match root.open(path) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(anyhow!("hide {}: {}", path.display(), errno_words(errno))),
    }
}
