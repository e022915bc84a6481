//! Where a socket is bound, and where the container sees it.
//!
//! In: a path in the container. Out: a socket of the guest's mounted over it. Must not: mount over anything but a socket,
//! or leave the process in the container's mounts.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use a3s_box_mount::{Kind, OFlags, Root, attach, clone_tree_at, errno_words, file_system};
use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat};
use nix::unistd::{Gid, Pid, Uid, fchdir, fchownat};

/// Clients that wait to be noticed; more wait in connect(2), as with any server.
const QUEUE: i32 = 128;

/// The two mount namespaces of the process, and the file system that its sockets are on.
pub struct Places {
    own: File,
    container: File,
    dir: OwnedFd,
    device: libc::dev_t,
}

/// A socket and the place it is for.
pub struct Place {
    /// The socket.
    pub socket: OwnedFd,
    /// Whether it takes datagrams; else it listens.
    pub datagrams: bool,
    name: String,
    path: PathBuf,
}

impl Places {
    /// Moves the calling process to mounts of its own.
    pub fn new(init: Pid) -> Result<Self> {
        let container = File::open(format!("/proc/{init}/ns/mnt")).context("the container's mounts")?;
        unshare(CloneFlags::CLONE_NEWNS).context("mount namespace")?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("make mounts private")?;
        let own = File::open("/proc/self/ns/mnt").context("own mounts")?;
        let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        let options = ["mode=0700".into(), "size=64k".into()];
        let dir = file_system("tmpfs", "sockets", &options, attributes)?;
        // The kernel clones attached mounts only.
        let root = Root::new(File::open("/").context("open the root")?);
        attach(&dir, root.place(Path::new("tmp"), Kind::Directory)?)?;
        let device = fstat(&dir).context("stat")?.st_dev;
        Ok(Places { own, container, dir, device })
    }

    /// Binds a socket that belongs to this user and group, with this mode.
    pub fn make(
        &self,
        number: u32,
        path: PathBuf,
        datagrams: bool,
        (uid, gid, mode): (u32, u32, u32),
    ) -> Result<Place> {
        fchdir(&self.dir).context("enter the file system for sockets")?;
        let name = number.to_string();
        let kind = if datagrams { SockType::Datagram } else { SockType::Stream };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, kind, flags, None).context("socket")?;
        bind(socket.as_raw_fd(), &UnixAddr::new(name.as_str())?).context("bind")?;
        let follow = FchmodatFlags::FollowSymlink;
        let mode = Mode::from_bits_truncate(mode);
        fchmodat(AT_FDCWD, name.as_str(), mode, follow).context("mode of a socket")?;
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        fchownat(AT_FDCWD, name.as_str(), uid, gid, nix::fcntl::AtFlags::empty())
            .context("owner of a socket")?;
        if datagrams {
            setsockopt(&socket, sockopt::PassCred, &true).context("credentials")?;
        } else {
            listen(&socket, Backlog::new(QUEUE)?).context("listen")?;
        }
        Ok(Place { socket, datagrams, name, path })
    }

    /// Mounts a socket over its place, where it is not there already.
    pub fn cover(&self, place: &Place) -> Result<()> {
        let mount = clone_tree_at(&self.dir, Path::new(&place.name), false)?;
        self.inside(|root| {
            let found = root.open(&place.path).map_err(|errno| anyhow!("{}", errno_words(errno)))?;
            let stat = fstat(&found).context("stat")?;
            if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK {
                bail!("no socket");
            }
            if stat.st_dev == self.device { Ok(()) } else { attach(&mount, &found) }
        })
    }

    /// Takes it away. What the container has made of its mounts meanwhile is its own trouble.
    pub fn uncover(&self, place: Place) {
        let _ = self.inside(|root| {
            let (Some(parent), Some(name)) = (place.path.parent(), place.path.file_name()) else {
                return Ok(());
            };
            let parent = root.open_as(parent, OFlags::PATH | OFlags::DIRECTORY);
            let parent = parent.map_err(|errno| anyhow!("{}", errno_words(errno)))?;
            if self.is_own(&parent, name) {
                fchdir(&parent)?;
                umount2(name, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
            }
            Ok(())
        });
        let _ = fchdir(&self.dir).and_then(|()| nix::unistd::unlink(place.name.as_str()));
    }

    fn is_own(&self, parent: impl AsFd, name: &OsStr) -> bool {
        let stat = nix::sys::stat::fstatat(parent, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW);
        stat.is_ok_and(|stat| stat.st_dev == self.device)
    }

    /// Does something with the container's root, in its mounts.
    fn inside<T>(&self, act: impl FnOnce(&Root) -> Result<T>) -> Result<T> {
        setns(&self.container, CloneFlags::CLONE_NEWNS).context("enter the container's mounts")?;
        let result = File::open("/").context("open the root").and_then(|root| act(&Root::new(root)));
        setns(&self.own, CloneFlags::CLONE_NEWNS).context("leave the container's mounts")?;
        result
    }
}
