//! The container's tree on the host, twice: for the VM side by side, for engines as the container sees it.
//!
//! Sources are opened once, so both views show the same thing. In: the planned tree. Out: detached mounts for the
//! VM's export; the monitor's own root. Must not: write into the root file system anything but missing mount points.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use a3s_box_mount::{
    self as mount, Kind, Root, attach, change_attributes, clone_tree, errno_words, file_system, open_path,
    set_attributes, set_propagation,
};
use a3s_box_proto::{Container, Mount, ROOTFS, Source};
use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, umount2};

use super::idmap;
use super::source::{self, MountTable, Opened};
use crate::plan::mounts::Place;
use crate::plan::{Bind, Tree};
use crate::userns;

/// What the VMM's process must never be able to do with a container's files, whatever the guest asks.
pub const EXPORT: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;

const PROC: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// The opened sources of a tree.
pub struct Sources {
    tree: Tree,
    rootfs: OwnedFd,
    binds: Vec<Opened>,
}

/// Opens the root file system and every bind's source, and completes the guest's mounts with what is found.
pub fn open(tree: Tree, guest: &mut Container) -> Result<Sources> {
    let table = MountTable::read()?;
    let rootfs = source::open_root(&tree.rootfs, &mut guest.attributes, &table)?;
    guest.attributes.own |= read_only(tree.readonly);
    let binds = tree
        .binds
        .iter()
        .map(|bind| source::open(bind, &mut guest.mounts[bind.index], &table))
        .collect::<Result<_>>()?;
    Ok(Sources { rootfs, binds, tree })
}

/// A detached mount for the VM's export and its place there.
pub struct Export {
    /// Its name in the container's place.
    pub place: PathBuf,
    /// Whether the place must be a directory.
    pub is_dir: bool,
    /// The mount.
    pub mount: OwnedFd,
}

impl Sources {
    /// Makes missing mount points, then the detached mounts of the VM's view. The root file system comes first.
    /// Mount points that are made belong to `root`.
    pub fn exports(&self, guest: &mut [Mount], root: Option<userns::Root>) -> Result<Vec<Export>> {
        userns::as_root_of(root, || self.make_places(guest))?;
        let mut exports = Vec::new();
        let root = clone_tree(&self.rootfs, true).context("root.path")?;
        set_propagation(&root, libc::MS_PRIVATE | libc::MS_REC)?;
        set_attributes(&root, EXPORT, true)?;
        set_attributes(&root, read_only(self.tree.readonly), false)?;
        exports.push(Export { place: ROOTFS.into(), is_dir: true, mount: root });
        for (bind, source) in self.tree.binds.iter().zip(&self.binds).filter(|(_, source)| source.exported) {
            let mount = bind_mount(bind, source)?;
            set_attributes(&mount, EXPORT, true)?;
            let is_dir = source.kind == Kind::Directory;
            exports.push(Export { place: bind.export.clone(), is_dir, mount });
        }
        Ok(exports)
    }

    /// Where the container may find sockets of the host's: those that are bound, and directories.
    pub fn socket_places(&self) -> Vec<PathBuf> {
        let binds = self.tree.binds.iter().zip(&self.binds);
        let may_hold =
            |source: &Opened| source.exported && (source.is_socket || source.kind == Kind::Directory);
        binds.filter(|(_, source)| may_hold(source)).map(|(bind, _)| bind.destination.clone()).collect()
    }

    /// Mount points that lie in the root file system itself: those below an earlier mount are made in that one.
    fn make_places(&self, guest: &mut [Mount]) -> Result<()> {
        let root = Root::new(self.rootfs.try_clone().context("root.path")?);
        let mut makes = Makes { root, covered: Vec::new() };
        let tree = &self.tree;
        let mut done = 0;
        for (bind, source) in tree.binds.iter().zip(&self.binds) {
            makes.file_systems(&tree.places[done..bind.after_places], guest)?;
            done = bind.after_places;
            makes.place(&bind.destination, |root| root.place(&bind.destination, source.kind))?;
        }
        makes.file_systems(&tree.places[done..], guest)
    }

    /// Builds the container as an engine expects it: every bind at its destination, procfs of the process's own pid
    /// namespace at /proc. `anchor` is a directory to build on; its mount namespace must be the process's own.
    pub fn assemble(self, anchor: &OwnedFd) -> Result<View> {
        let mount = clone_tree(&self.rootfs, true).context("root.path")?;
        set_propagation(&mount, libc::MS_PRIVATE | libc::MS_REC)?;
        attach(&mount, anchor).context("attach the root file system")?;
        nix::unistd::fchdir(&mount).context("enter the root file system")?;
        let root = Root::current_dir()?;
        let mut done = 0;
        for (bind, source) in self.tree.binds.iter().zip(&self.binds) {
            add_places(&root, &self.tree.places[done..bind.after_places])?;
            done = bind.after_places;
            let shown = || format!("mount {} to {}", bind.source.display(), bind.destination.display());
            let place = root.place(&bind.destination, source.kind).with_context(shown)?;
            // The monitor's own processes are what its /proc shows.
            let mount = if bind.destination == Path::new("/proc") && !source.exported {
                file_system("proc", "proc", &[], PROC)?
            } else {
                bind_mount(bind, source)?
            };
            attach(mount, place).with_context(shown)?;
        }
        add_places(&root, &self.tree.places[done..])?;
        Ok(View { root: mount, readonly: self.tree.readonly })
    }
}

/// The container as an engine expects it, assembled somewhere in the host's tree.
pub struct View {
    root: OwnedFd,
    readonly: bool,
}

impl View {
    /// Makes it the calling process's root.
    pub fn enter(self) -> Result<()> {
        nix::unistd::fchdir(&self.root).context("enter the root file system")?;
        nix::unistd::pivot_root(".", ".").context("pivot_root")?;
        umount2(".", MntFlags::MNT_DETACH).context("detach the host's root")?;
        std::env::set_current_dir("/").context("enter the new root")?;
        let root = open_path(Path::new("/")).map_err(|e| anyhow!("open the new root: {}", errno_words(e)))?;
        set_attributes(root, read_only(self.readonly), false)
    }
}

/// Mount points below a directory, as this process sees them.
pub fn mounts_below(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let dir = std::fs::canonicalize(dir).with_context(|| format!("root.path {}", dir.display()))?;
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    // proc_pid_mountinfo(5): these four are written in octal.
    let unescape = |text: &str| {
        [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
            .iter()
            .fold(text.to_string(), |text, (code, plain)| text.replace(code, plain))
    };
    let points =
        table.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| PathBuf::from(unescape(point)));
    Ok(points.filter(|point| point.starts_with(&dir) && *point != dir).collect())
}

fn read_only(readonly: bool) -> u64 {
    if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 }
}

/// A detached bind with everything that the host is to enforce.
fn bind_mount(bind: &Bind, source: &Opened) -> Result<OwnedFd> {
    let make = || {
        let mount = clone_tree(&source.fd, bind.recursive)?;
        if !bind.follows {
            set_propagation(&mount, libc::MS_PRIVATE | libc::MS_REC)?;
        }
        if let Some(map) = &bind.ids {
            idmap::apply(&mount, map)?;
        }
        change_attributes(&mount, bind.own.set, bind.own.clear, false)?;
        change_attributes(&mount, bind.tree.set, bind.tree.clear, true)?;
        anyhow::Ok(mount)
    };
    make().with_context(|| format!("mount {} to {}", bind.source.display(), bind.destination.display()))
}

/// Mount points in the making.
struct Makes<'a> {
    root: Root,
    covered: Vec<&'a Path>,
}

impl<'a> Makes<'a> {
    /// Makes one unless it lies below another mount. True if it was missing.
    fn place(&mut self, path: &'a Path, make: impl FnOnce(&Root) -> Result<mount::Place>) -> Result<bool> {
        let is_covered = self.covered.iter().any(|above| path.starts_with(above) && path != *above);
        self.covered.push(path);
        if is_covered {
            return Ok(false);
        }
        Ok(make(&self.root).with_context(|| format!("mount {}", path.display()))?.made)
    }

    fn file_systems(&mut self, places: &'a [Place], guest: &mut [Mount]) -> Result<()> {
        for place in places {
            let at = &place.destination;
            let made = self.place(at, |root| root.place_for(at, &place.kind))?;
            // A tmpfs takes the mode of the directory below, but one that nobody made has none.
            if let (true, "tmpfs", Source::FileSystem { options, .. }) =
                (made, place.kind.as_str(), &mut guest[place.index].source)
            {
                options.insert(0, "mode=1777".into());
            }
        }
        Ok(())
    }
}

/// The guest's own file systems as the monitor's view needs them: procfs truly, tmpfs as an empty place for binds
/// below it. The rest exists in the guest alone.
fn add_places(root: &Root, places: &[Place]) -> Result<()> {
    for Place { destination: path, kind, .. } in places {
        let mount = match kind.as_str() {
            "proc" => file_system("proc", "proc", &[], PROC),
            "tmpfs" => file_system("tmpfs", "tmpfs", &["mode=0755".into(), "size=64k".into()], 0),
            _ => continue,
        };
        // A place below a file system that only the guest has does not exist here, and nobody looks for it.
        if let Ok(place) = root.place_for(path, kind) {
            mount
                .and_then(|mount| attach(mount, place))
                .with_context(|| format!("mount {}", path.display()))?;
        }
    }
    Ok(())
}
