//! Copies a tree by descriptors, following no link.
//!
//! In: two directories. Out: owners, modes, times, links and special files of one in the other. Must not: open
//! anything but directories and regular files.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chmodat, chownat, mkdirat,
    mknodat, openat, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::errno_words;

/// Copies what lies in `from` into `to`, which keeps its own owner and mode.
pub fn copy_tree(from: impl AsFd, to: impl AsFd) -> Result<()> {
    let readable = |fd: BorrowedFd<'_>| openat(fd, ".", DIRECTORY, Mode::empty());
    let (from, to) = (words(readable(from.as_fd()))?, words(readable(to.as_fd()))?);
    copy_entries(from.as_fd(), to.as_fd())
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn copy_entries(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    for entry in words(Dir::read_from(from))? {
        let entry = words(entry)?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from, to, name).with_context(|| format!("{}", name.to_string_lossy()))?;
        }
    }
    Ok(())
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let stat = words(statat(from, name, AtFlags::SYMLINK_NOFOLLOW))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        FileType::Directory => {
            let source = words(openat(from, name, DIRECTORY, Mode::empty()))?;
            words(mkdirat(to, name, Mode::RWXU))?;
            let copy = words(openat(to, name, DIRECTORY, Mode::empty()))?;
            copy_entries(source.as_fd(), copy.as_fd())?;
        }
        FileType::RegularFile => copy_file(from, to, name)?,
        FileType::Symlink => {
            let target = words(readlinkat(from, name, Vec::new()))?;
            words(symlinkat(&target, to, name))?;
        }
        _ => words(mknodat(to, name, kind, Mode::RUSR, stat.st_rdev))?,
    }
    copy_metadata(to, name, &stat, kind)
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    // What was a file a moment ago may be a FIFO by now.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut source = File::from(words(openat(from, name, flags, Mode::empty()))?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut copy = File::from(words(openat(to, name, flags, Mode::RUSR | Mode::WUSR))?);
    std::io::copy(&mut source, &mut copy).context("copy").map(drop)
}

fn copy_metadata(to: BorrowedFd<'_>, name: &CStr, stat: &Stat, kind: FileType) -> Result<()> {
    let link = AtFlags::SYMLINK_NOFOLLOW;
    words(chownat(to, name, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)), link))?;
    if kind != FileType::Symlink {
        // After the owner: a change of owner takes the set-id bits away.
        words(chmodat(to, name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty()))?;
    }
    let times = Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    };
    words(utimensat(to, name, &times, link))
}

fn words<T>(result: Result<T, Errno>) -> Result<T> {
    result.map_err(|errno| anyhow!("{}", errno_words(errno)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_copy_is_like_its_original_and_follows_no_link() {
        let base = std::env::temp_dir().join(format!("a3s-box-copy-{}", std::process::id()));
        let (from, to) = (base.join("from"), base.join("to"));
        std::fs::create_dir_all(from.join("dir/deep")).unwrap();
        std::fs::create_dir(&to).unwrap();
        std::fs::write(base.join("outside"), "secret").unwrap();
        std::fs::write(from.join("dir/file"), "word").unwrap();
        std::fs::set_permissions(from.join("dir/file"), std::fs::Permissions::from_mode(0o4711)).unwrap();
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o1777)).unwrap();
        symlink(base.join("outside"), from.join("link")).unwrap();
        copy_tree(File::open(&from).unwrap(), File::open(&to).unwrap()).unwrap();
        assert_eq!(std::fs::read(to.join("dir/file")).unwrap(), b"word");
        assert_eq!(to.metadata().unwrap().mode() & 0o7777, 0o1777);
        for path in ["dir", "dir/file", "dir/deep", "link"] {
            let (a, b) = (from.join(path).symlink_metadata(), to.join(path).symlink_metadata());
            let (a, b) = (a.unwrap(), b.unwrap());
            assert_eq!((a.mode(), a.uid(), a.mtime()), (b.mode(), b.uid(), b.mtime()), "{path}");
        }
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), base.join("outside"));
        std::fs::remove_dir_all(base).unwrap();
    }
}
