//! `linux.devices`: special files for devices that the guest kernel has.
//!
//! In: the list, the container's root before it is entered. Out: the files. On a file system of the guest's own they
//! are made in place; anywhere else they are mounted, for nothing of the kind may be made on the host through the
//! exported tree. Must not: follow a path of the container's outside its root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use a3s_box_mount::{Kind, Root, attach, clone_tree_at, file_system, open_path};
use a3s_box_proto::{Device, DeviceKind};
use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknodat};
use nix::unistd::{Gid, Uid, fchownat};

/// Where this mount namespace can spare a place of the guest's root, which it is about to leave.
const WORKSHOP: &str = "/sys/kernel";

/// Makes them, in order.
pub fn make(root: &Root, devices: &[Device]) -> Result<()> {
    let mut workshop = None;
    for (index, device) in devices.iter().enumerate() {
        one(root, device, index, &mut workshop)
            .with_context(|| format!("linux.devices: {}", device.path.display()))?;
    }
    Ok(())
}

fn one(root: &Root, device: &Device, index: usize, workshop: &mut Option<OwnedFd>) -> Result<()> {
    if let Some((kind, major, minor)) = device.number
        && !is_known(kind, major, minor, &device.path)
    {
        if device.optional {
            return Ok(());
        }
        bail!("the guest kernel has no device {major}:{minor}, and the host's cannot be passed into the VM");
    }
    match root.open(&device.path) {
        Ok(found) => return same(&found, device),
        Err(errno) if errno.raw_os_error() == libc::ENOENT => {}
        Err(errno) => bail!("{}", a3s_box_mount::errno_words(errno)),
    }
    let (parent, name) =
        device.path.parent().zip(device.path.file_name()).context("it is not the path of a file")?;
    let parent = root.place(parent, Kind::Directory)?;
    let on = nix::sys::statfs::fstatfs(&parent).context("look at its directory")?;
    if on.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC {
        return node(parent.as_fd(), Path::new(name), device);
    }
    let shop = match workshop {
        Some(shop) => shop,
        None => workshop.insert(open_workshop()?),
    };
    let name = PathBuf::from(index.to_string());
    node(shop.as_fd(), &name, device)?;
    attach(clone_tree_at(&*shop, &name, false)?, root.place(&device.path, Kind::File)?)
}

fn open_workshop() -> Result<OwnedFd> {
    let place = open_path(Path::new(WORKSHOP)).context("open a place for devices")?;
    attach(file_system("tmpfs", "devices", &["mode=0755".into()], 0)?, place)?;
    open_path(Path::new(WORKSHOP)).context("open a place for devices")
}

fn node(dir: BorrowedFd<'_>, name: &Path, device: &Device) -> Result<()> {
    let (kind, number) = match device.number {
        Some((DeviceKind::Block, major, minor)) => (SFlag::S_IFBLK, makedev(major.into(), minor.into())),
        Some((DeviceKind::Char, major, minor)) => (SFlag::S_IFCHR, makedev(major.into(), minor.into())),
        None => (SFlag::S_IFIFO, 0),
    };
    mknodat(dir, name, kind, Mode::from_bits_truncate(0o600), number).context("make it")?;
    let owner = (Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)));
    fchownat(dir, name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW).context("set its owner")?;
    let mode = Mode::from_bits_truncate(device.mode);
    fchmodat(dir, name, mode, FchmodatFlags::FollowSymlink).context("set its mode")
}

/// As config-linux.md: what is there already has to be the device that is wanted.
fn same(found: &OwnedFd, device: &Device) -> Result<()> {
    let stat = nix::sys::stat::fstat(found).context("look at what is there")?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    let fits = match device.number {
        Some((DeviceKind::Block, major, minor)) => {
            kind == SFlag::S_IFBLK && stat.st_rdev == makedev(major.into(), minor.into())
        }
        Some((DeviceKind::Char, major, minor)) => {
            kind == SFlag::S_IFCHR && stat.st_rdev == makedev(major.into(), minor.into())
        }
        None => kind == SFlag::S_IFIFO,
    };
    if fits { Ok(()) } else { Err(anyhow!("another file is there already")) }
}

/// Whether the guest kernel has this device. Where kernels give out numbers as they come, the name has to be the same.
fn is_known(kind: DeviceKind, major: u32, minor: u32, path: &Path) -> bool {
    const TERMINALS: std::ops::RangeInclusive<u32> = 136..=143;
    let (dir, at_random) = match kind {
        DeviceKind::Block => ("block", matches!(major, 240..=254 | 259)),
        DeviceKind::Char => {
            let misc = major == 10 && !matches!(minor, 64..=255);
            ("char", misc || matches!(major, 234..=254 | 384..=511))
        }
    };
    if kind == DeviceKind::Char && TERMINALS.contains(&major) {
        return true;
    }
    let Ok(event) = std::fs::read_to_string(format!("/sys/dev/{dir}/{major}:{minor}/uevent")) else {
        return false;
    };
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    !at_random || name.is_some_and(|name| path == Path::new("/dev").join(name))
}
