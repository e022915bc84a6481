//! The container's tree on the host, twice: for the VM side by side, for engines as the container sees it.
//!
//! Sources are opened once, so both views show the same thing. In: the planned tree. Out: detached mounts for the
//! VM's export; the monitor's own root. Must not: write into the root file system anything but missing mount points.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use a3s_box_mount::{Kind, Root, attach, clone_tree, errno_words, file_system, open_path, set_attributes};
use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MntFlags, umount2};

use crate::plan::{Bind, Tree};

/// What the VMM's process must never be able to do with a container's files, whatever the guest asks.
const EXPORT: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;

/// The opened sources of a tree.
pub struct Sources {
    tree: Tree,
    rootfs: OwnedFd,
    binds: Vec<(OwnedFd, Kind)>,
}

/// Opens the root file system and every bind's source.
pub fn open(tree: Tree) -> Result<Sources> {
    let rootfs = open_path(&tree.rootfs)
        .map_err(|e| anyhow!("root.path {}: {}", tree.rootfs.display(), errno_words(e)))?;
    let binds = tree.binds.iter().map(open_bind).collect::<Result<_>>()?;
    Ok(Sources { rootfs, binds, tree })
}

fn open_bind(bind: &Bind) -> Result<(OwnedFd, Kind)> {
    let shown = format!("mount {} to {}", bind.source.display(), bind.destination.display());
    let metadata = std::fs::metadata(&bind.source).context(shown.clone())?;
    let kind = metadata.file_type();
    if kind.is_fifo() {
        bail!("{shown}: a FIFO cannot reach into a VM");
    }
    if kind.is_socket() {
        bail!("{shown}: a socket cannot reach into a VM");
    }
    let fd = open_path(&bind.source).map_err(|e| anyhow!("{shown}: {}", errno_words(e)))?;
    Ok((fd, if kind.is_dir() { Kind::Directory } else { Kind::File }))
}

/// A detached mount for the VM's export and its place there.
pub struct Export {
    /// Below the exported tree's root.
    pub place: PathBuf,
    /// Whether the place must be a directory.
    pub is_dir: bool,
    /// The mount.
    pub mount: OwnedFd,
}

impl Sources {
    /// Makes missing mount points, then the detached mounts of the VM's view. The root file system comes first.
    pub fn exports(&self) -> Result<Vec<Export>> {
        self.make_places()?;
        let mut exports = Vec::new();
        let root = clone_tree(&self.rootfs, true).context("root.path")?;
        set_attributes(&root, EXPORT, true)?;
        set_attributes(&root, read_only(self.tree.readonly), false)?;
        exports.push(Export { place: crate::plan::mounts::exported_rootfs(), is_dir: true, mount: root });
        for (bind, (source, kind)) in self.tree.binds.iter().zip(&self.binds) {
            let mount = self.bind_mount(bind, source)?;
            set_attributes(&mount, EXPORT, true)?;
            exports.push(Export { place: bind.export.clone(), is_dir: *kind == Kind::Directory, mount });
        }
        Ok(exports)
    }

    fn bind_mount(&self, bind: &Bind, source: &OwnedFd) -> Result<OwnedFd> {
        let shown = || format!("mount {} to {}", bind.source.display(), bind.destination.display());
        let mount = clone_tree(source, bind.recursive).with_context(shown)?;
        set_attributes(&mount, bind.attributes, false).with_context(shown)?;
        Ok(mount)
    }

    /// Mount points that lie in the root file system itself: those below an earlier mount are made in that one.
    fn make_places(&self) -> Result<()> {
        let root = Root::new(self.rootfs.try_clone().context("root.path")?);
        let mut covered: Vec<&Path> = Vec::new();
        let tree = &self.tree;
        for (index, bind) in tree.binds.iter().enumerate() {
            let earlier = if index == 0 { 0 } else { tree.binds[index - 1].after_places };
            for (place, _) in &tree.places[earlier..bind.after_places] {
                make_place(&root, place, Kind::Directory, &mut covered)?;
            }
            make_place(&root, &bind.destination, self.binds[index].1, &mut covered)?;
        }
        let rest = tree.binds.last().map_or(0, |bind| bind.after_places);
        tree.places[rest..]
            .iter()
            .try_for_each(|(place, _)| make_place(&root, place, Kind::Directory, &mut covered))
    }

    /// Builds the container as an engine expects it: every bind at its destination, procfs of the process's own pid
    /// namespace at /proc. `anchor` is a directory to build on; its mount namespace must be the process's own.
    pub fn assemble(self, anchor: &OwnedFd) -> Result<View> {
        let mount = clone_tree(&self.rootfs, true).context("root.path")?;
        attach(&mount, anchor).context("attach the root file system")?;
        nix::unistd::fchdir(&mount).context("enter the root file system")?;
        let root = Root::current_dir()?;
        let mut done = 0;
        for (bind, (source, kind)) in self.tree.binds.iter().zip(&self.binds) {
            add_places(&root, &self.tree.places[done..bind.after_places])?;
            done = bind.after_places;
            let shown = || format!("mount {} to {}", bind.source.display(), bind.destination.display());
            let place = root.place(&bind.destination, *kind).with_context(shown)?;
            attach(self.bind_mount(bind, source)?, place).with_context(shown)?;
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

fn read_only(readonly: bool) -> u64 {
    if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 }
}

fn make_place<'a>(root: &Root, path: &'a Path, kind: Kind, covered: &mut Vec<&'a Path>) -> Result<()> {
    if !covered.iter().any(|above| path.starts_with(above) && path != *above) {
        root.place(path, kind).with_context(|| format!("mount {}", path.display()))?;
    }
    covered.push(path);
    Ok(())
}

/// The guest's own file systems as the monitor's view needs them: procfs truly, tmpfs as an empty place for binds
/// below it. The rest exists in the guest alone.
fn add_places(root: &Root, places: &[(PathBuf, String)]) -> Result<()> {
    for (path, kind) in places {
        let mount = match kind.as_str() {
            "proc" => file_system("proc", "proc", &[], libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV),
            "tmpfs" => file_system("tmpfs", "tmpfs", &["mode=0755".into(), "size=64k".into()], 0),
            _ => continue,
        };
        // A place below a file system that only the guest has does not exist here, and nobody looks for it.
        if let Ok(place) = root.place(path, Kind::Directory) {
            mount
                .and_then(|mount| attach(mount, place))
                .with_context(|| format!("mount {}", path.display()))?;
        }
    }
    Ok(())
}
