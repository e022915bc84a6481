//! Which sockets there are, and which of them somebody listens to.
//!
//! In: places in the container's view. Out: sockets by path. Must not: be noticed by a listener, follow a link at the end
//! of a path, or look further than its bounds whatever lies there.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use a3s_box_mount::{OFlags, Root};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use rustix::fs::{Dir, FileType, Stat, fstat};

/// Directories that are looked into, the nearest to a bind's root first.
pub const MOST_DIRS: usize = 64;
/// Names that are looked at in all of them.
const MOST_NAMES: usize = 8192;
/// Sockets.
pub const MOST_SOCKETS: usize = 128;

/// A socket that somebody listens to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whether it takes datagrams; else streams.
    pub datagrams: bool,
    /// Owner, group and permission bits.
    pub owner: (u32, u32, u32),
    /// Device, inode and time of its last change.
    identity: (u64, u64, i64, u64),
}

/// What was seen, so that only what changes is looked at again.
#[derive(Default)]
pub struct Looker {
    dirs: HashMap<PathBuf, Listing>,
}

#[derive(Clone)]
struct Listing {
    changed: (u64, u64, i64, u64),
    /// Whether it was read after the clock had left the moment of its last change.
    is_settled: bool,
    sockets: Vec<OsString>,
    dirs: Vec<OsString>,
}

impl Looker {
    /// Every socket at or below these places.
    pub fn look(
        &mut self,
        root: &Root,
        proc: BorrowedFd<'_>,
        places: &[PathBuf],
    ) -> BTreeMap<PathBuf, Found> {
        let mut found = BTreeMap::new();
        let mut dirs = HashMap::new();
        let mut queue: VecDeque<PathBuf> = places.iter().cloned().collect();
        let mut names = 0;
        while let Some(path) = queue.pop_front() {
            if dirs.contains_key(&path) || found.len() >= MOST_SOCKETS {
                continue;
            }
            let Ok(fd) = root.open_as(&path, OFlags::PATH) else { continue };
            let Ok(stat) = fstat(&fd) else { continue };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Socket => {
                    found.extend(probe(proc, &fd, &stat).map(|socket| (path, socket)));
                }
                FileType::Directory if dirs.len() < MOST_DIRS && names < MOST_NAMES => {
                    let known = self.dirs.remove(&path);
                    let Some(listing) = listing(root, &path, &stat, known, MOST_NAMES - names) else {
                        continue;
                    };
                    names += listing.sockets.len() + listing.dirs.len();
                    let below = listing.sockets.iter().chain(&listing.dirs);
                    queue.extend(below.map(|name| path.join(name)));
                    dirs.insert(path, listing);
                }
                _ => {}
            }
        }
        self.dirs = dirs;
        found
    }
}

fn identity(stat: &Stat) -> (u64, u64, i64, u64) {
    (stat.st_dev, stat.st_ino, stat.st_ctime, stat.st_ctime_nsec)
}

fn listing(root: &Root, path: &Path, stat: &Stat, known: Option<Listing>, most: usize) -> Option<Listing> {
    let changed = identity(stat);
    let is_same = known.as_ref().is_some_and(|known| known.changed == changed);
    if let Some(known) = known.filter(|known| is_same && known.is_settled) {
        return Some(known);
    }
    let fd = root.open_as(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK).ok()?;
    let mut listing = Listing { changed, is_settled: is_same, sockets: Vec::new(), dirs: Vec::new() };
    for entry in Dir::new(fd).ok()?.take(most).flatten() {
        let name = entry.file_name().to_bytes();
        let list = match entry.file_type() {
            FileType::Socket => &mut listing.sockets,
            FileType::Directory if !matches!(name, b"." | b"..") => &mut listing.dirs,
            _ => continue,
        };
        list.push(OsString::from_vec(name.to_vec()));
    }
    Some(listing)
}

/// Whether somebody listens, and to what. A connection for datagrams is nothing that the other side sees; refused as the
/// wrong type, it tells of a listener for streams.
fn probe(proc: BorrowedFd<'_>, file: &OwnedFd, stat: &Stat) -> Option<Found> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let own = socket(AddressFamily::Unix, SockType::Datagram, flags, None).ok()?;
    let datagrams = match address(proc, file).and_then(|address| connect(own.as_raw_fd(), &address)) {
        // It takes them from somebody else alone, which its clients will be told.
        Ok(()) | Err(Errno::EPERM) => true,
        Err(Errno::EPROTOTYPE) => false,
        Err(_) => return None,
    };
    let owner = (stat.st_uid, stat.st_gid, stat.st_mode & 0o777);
    Some(Found { datagrams, owner, identity: identity(stat) })
}

/// How a file that was opened is called where an address is a path; the calling process's current directory is procfs.
pub fn address(proc: BorrowedFd<'_>, file: impl AsFd) -> Result<UnixAddr, Errno> {
    nix::unistd::fchdir(proc)?;
    UnixAddr::new(format!("self/fd/{}", file.as_fd().as_raw_fd()).as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    #[test]
    fn listeners_are_found_and_do_not_notice() {
        let base = std::env::temp_dir().join(format!("a3s-box-look-{}", std::process::id()));
        std::fs::create_dir_all(base.join("dir/deeper")).unwrap();
        let listener = UnixListener::bind(base.join("dir/stream")).unwrap();
        let datagram = UnixDatagram::bind(base.join("dir/deeper/datagram")).unwrap();
        drop(UnixListener::bind(base.join("dir/left")).unwrap());
        symlink("stream", base.join("dir/link")).unwrap();
        std::fs::write(base.join("dir/file"), "").unwrap();
        // The test's current directory is every test's: paths of other tests are absolute.
        let proc: OwnedFd = File::open("/proc").unwrap().into();
        let root = Root::new(File::open(&base).unwrap());
        let mut looker = Looker::default();
        let mut look =
            || looker.look(&root, proc.as_fd(), &["/dir".into(), "/none".into(), "/dir/deeper".into()]);
        let kinds = |found: &BTreeMap<PathBuf, Found>| -> Vec<(String, bool)> {
            found.iter().map(|(path, found)| (path.display().to_string(), found.datagrams)).collect()
        };
        let first = look();
        assert_eq!(kinds(&first), [("/dir/deeper/datagram".into(), true), ("/dir/stream".into(), false)]);
        assert_eq!(look(), first);
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err());
        datagram.set_nonblocking(true).unwrap();
        assert!(datagram.recv(&mut [0]).is_err());
        drop(listener);
        let other = UnixListener::bind(base.join("dir/deeper/later")).unwrap();
        assert_eq!(
            kinds(&look()),
            [("/dir/deeper/datagram".into(), true), ("/dir/deeper/later".into(), false)]
        );
        std::fs::remove_file(base.join("dir/deeper/later")).unwrap();
        drop((datagram, other));
        assert_eq!(look(), BTreeMap::new());
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn a_tree_without_end_is_given_up() {
        let base = std::env::temp_dir().join(format!("a3s-box-look-far-{}", std::process::id()));
        for number in 0..2 * MOST_DIRS {
            std::fs::create_dir_all(base.join(format!("{number}"))).unwrap();
        }
        let _listener = UnixListener::bind(base.join("near")).unwrap();
        let proc: OwnedFd = File::open("/proc").unwrap().into();
        let root = Root::new(File::open(&base).unwrap());
        let mut looker = Looker::default();
        assert_eq!(looker.look(&root, proc.as_fd(), &["/".into()]).len(), 1);
        assert_eq!(looker.dirs.len(), MOST_DIRS);
        std::fs::remove_dir_all(base).unwrap();
    }
}
