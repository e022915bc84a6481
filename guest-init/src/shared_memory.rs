//! Shared memory that containers of the VM have in common: a tmpfs each, below pid 1's /shm.
//!
//! In: a planned mount. Out: a place to be bound from. Must not: make one twice, or bigger for the second.

use std::fs;
use std::path::{Path, PathBuf};

use a3s_box_mount::{attach, clone_tree_at, file_system, open_path};
use a3s_box_proto::{Mount, Source};
use anyhow::{Context, Result, bail};
use std::os::fd::OwnedFd;

const BASE: &str = "/shm";

/// Makes what the mounts ask for and is not there. In pid 1, so that every container's mount namespace has it.
pub fn prepare(mounts: &[Mount]) -> Result<()> {
    let wanted = mounts.iter().filter_map(|mount| match &mount.source {
        Source::SharedMemory { name, options } => Some((name, options)),
        _ => None,
    });
    for (name, options) in wanted {
        make(name, options).with_context(|| format!("shared memory {name}"))?;
    }
    Ok(())
}

fn make(name: &str, options: &[String]) -> Result<()> {
    let path = place(name)?;
    if path.exists() {
        return Ok(());
    }
    let on = |path: &Path| open_path(path).context("open the mount point");
    if !is_base() {
        let base = file_system("tmpfs", "shm", &["mode=0755".into(), "size=64k".into()], 0)?;
        attach(base, on(Path::new(BASE))?)?;
    }
    fs::create_dir(&path).context("make the mount point")?;
    let made = file_system("tmpfs", "shm", options, 0).and_then(|memory| attach(memory, on(&path)?));
    made.inspect_err(|_| drop(fs::remove_dir(&path)))
}

/// Whether the base is there; the exported tree's root, which it hides, takes no directory.
fn is_base() -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &str| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    device(BASE) != device("/")
}

fn place(name: &str) -> Result<PathBuf> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        bail!("{name:?} is not a name");
    }
    Ok(Path::new(BASE).join(name))
}

/// A copy of it to be attached.
pub fn tree(name: &str) -> Result<OwnedFd> {
    let path = place(name)?;
    clone_tree_at(open_path(Path::new("/")).context("open the guest's root")?, path.strip_prefix("/")?, false)
}
