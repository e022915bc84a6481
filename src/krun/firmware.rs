//! libkrunfw: the library that holds the guest kernel.
//!
//! In: its path, or nothing. Out: the kernel as an ELF file, one shared by all VMs where some directory allows it, and its version.
//! Must not: open a library after the pivot.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags};

/// The name under which libkrun itself opens the guest kernel's library.
const FIRMWARE_SONAME: &str = "libkrunfw.so.5";
/// Where libkrunfw's own `make install` puts it, which ld.so often does not search.
const FIRMWARE_DIRS: [&str; 2] = ["/usr/local/lib64", "/usr/local/lib"];
/// How the dynamic linker's word for a missing library ends.
const NOT_THERE: &str = "No such file or directory";

/// The guest kernel's library, as `check` shows it.
#[derive(Debug)]
pub struct Firmware {
    /// The file that was loaded.
    pub path: PathBuf,
    /// The guest kernel's version, such as `6.12.91`.
    pub kernel_version: String,
}

/// Finds the guest kernel's library and reads the kernel's version out of its image.
pub fn find(explicit: Option<&Path>) -> anyhow::Result<Firmware> {
    const BANNER: &[u8] = b"Linux version ";
    let kernel = GuestKernel::open(explicit)?;
    let image = kernel.image;
    let found = image.windows(BANNER.len()).position(|window| window == BANNER);
    let version = found.and_then(|at| {
        let rest = image.get(at + BANNER.len()..)?;
        let end = rest.iter().take(64).position(|byte| *byte == b' ')?;
        std::str::from_utf8(&rest[..end]).ok()
    });
    let kernel_version = version.unwrap_or("unknown").to_owned();
    Ok(Firmware { path: kernel.path, kernel_version })
}

/// libkrunfw, loaded for the process's life, and the kernel image inside it.
pub struct GuestKernel {
    path: PathBuf,
    load: u64,
    entry: u64,
    image: &'static [u8],
}

impl GuestKernel {
    /// Loads the library from `explicit`, else from where ld.so and its own installer put it.
    pub fn open(explicit: Option<&Path>) -> anyhow::Result<GuestKernel> {
        let candidates = match explicit {
            Some(path) => vec![path.to_owned()],
            None => {
                let dirs = FIRMWARE_DIRS.iter().map(|dir| Path::new(dir).join(FIRMWARE_SONAME));
                std::iter::once(PathBuf::from(FIRMWARE_SONAME)).chain(dirs).collect()
            }
        };
        let mut reasons = Vec::new();
        for candidate in &candidates {
            // SAFETY: libkrunfw holds data and three getters; it has no initializer of its own.
            match unsafe { Library::open(Some(candidate), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => return Self::read(library),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        // Three times the same words say less than one's own.
        if explicit.is_none() && reasons.iter().all(|reason| reason.ends_with(NOT_THERE)) {
            reasons = vec![format!(
                "{FIRMWARE_SONAME} is neither where the dynamic linker looks nor in {}",
                FIRMWARE_DIRS.join(" or ")
            )];
        }
        bail!(
            "no guest kernel ({}): install libkrunfw (package libkrunfw5 in Debian forky and newer, libkrunfw in \
             Fedora, Arch and openSUSE; elsewhere build github.com/containers/libkrunfw), or configure the path of one \
             (libkrunfw in /etc/a3s-box/config.toml)",
            reasons.join("; ")
        )
    }

    /// Asks the library where its kernel lies. libkrun finds the library loaded, by its soname.
    fn read(library: Library) -> anyhow::Result<GuestKernel> {
        type GetKernel = unsafe extern "C" fn(*mut u64, *mut u64, *mut usize) -> *const u8;
        // SAFETY: the type is that of libkrunfw's ABI 5, which its soname promises.
        let get_kernel = unsafe { library.get::<GetKernel>(b"krunfw_get_kernel\0") }
            .context("libkrunfw has no krunfw_get_kernel")?;
        let (mut load, mut entry, mut size) = (0, 0, 0);
        // SAFETY: three places for three numbers, as the ABI says.
        let start = unsafe { get_kernel(&mut load, &mut entry, &mut size) };
        if start.is_null() || size == 0 {
            bail!("libkrunfw holds no kernel");
        }
        let path = file_of(start.cast())?;
        std::mem::forget(library);
        // SAFETY: the library maps `size` bytes at `start` and, forgotten, is never unloaded.
        let image = unsafe { std::slice::from_raw_parts(start, size) };
        Ok(GuestKernel { path, load, entry, image })
    }

    /// The kernel as an ELF file: shared with all VMs if some directory allows it, else in memory of this VM's own.
    pub fn file(&self) -> anyhow::Result<File> {
        if let Some(file) = self.shared_file() {
            return Ok(file);
        }
        let memory =
            rustix::fs::memfd_create("guest-kernel", MemfdFlags::CLOEXEC).context("create a memfd")?;
        let file = File::from(memory);
        self.write_elf(&file).context("copy the guest kernel")?;
        Ok(file)
    }

    /// Opens, or makes, the file of this very library in a directory that nobody else can write to.
    fn shared_file(&self) -> Option<File> {
        let name = self.file_name()?;
        let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| owned(dir));
        // Only root can have made the first one, so its owner, perhaps of another user namespace, needs no check.
        let dirs = std::iter::once(PathBuf::from("/run")).chain(own).map(|dir| dir.join("a3s-box-kernel"));
        for dir in dirs {
            let path = dir.join(&name);
            let file = File::open(&path).or_else(|_| self.create_shared(&dir, &path));
            if let Ok(file) = file {
                return Some(file);
            }
        }
        None
    }

    /// Writes a nameless file and names it when it is complete, so that no reader ever sees half of one.
    fn create_shared(&self, dir: &Path, path: &Path) -> io::Result<File> {
        if !dir.is_dir() {
            fs::DirBuilder::new().mode(0o755).create(dir)?;
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(dir, flags, Mode::from_raw_mode(0o444))?);
        self.write_elf(&file)?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        match rustix::fs::linkat(CWD, link, CWD, path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => File::open(path),
            Err(error) => Err(error.into()),
        }
    }

    /// Names the library's file as it is now. A file that has only just changed may not be the one that was loaded.
    fn file_name(&self) -> Option<String> {
        let stat = fs::metadata(&self.path).ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        let settled = stat.ctime().checked_add(2).and_then(|time| u64::try_from(time).ok())? < now;
        let (dev, ino, size) = (stat.dev(), stat.ino(), stat.size());
        let (sec, nsec) = (stat.mtime(), stat.mtime_nsec());
        settled.then(|| format!("{dev:x}-{ino:x}-{size:x}-{sec:x}.{nsec:x}.elf"))
    }

    /// Writes an ELF file with one segment: the image, at its load address.
    fn write_elf(&self, file: &File) -> io::Result<()> {
        const OFFSET: u64 = 4096;
        const HEADER: [u8; 24] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0";
        let size = self.image.len() as u64;
        let mut head = HEADER.to_vec();
        for word in [self.entry, 64, 0] {
            head.extend(word.to_le_bytes()); // e_entry, e_phoff, e_shoff
        }
        head.extend(0_u32.to_le_bytes()); // e_flags
        for half in [64_u16, 56, 1, 64, 0, 0] {
            head.extend(half.to_le_bytes()); // sizes and numbers of headers
        }
        head.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, rwx
        for word in [OFFSET, self.load, self.load, size, size, OFFSET] {
            head.extend(word.to_le_bytes());
        }
        file.write_all_at(&head, 0)?;
        file.write_all_at(self.image, OFFSET)
    }
}

/// Whether a directory is this user's and only this user can write to it.
fn owned(dir: &Path) -> bool {
    let user = nix::unistd::geteuid().as_raw();
    fs::symlink_metadata(dir)
        .is_ok_and(|stat| stat.is_dir() && stat.uid() == user && stat.mode() & 0o022 == 0)
}

/// The file whose mapping holds `address`.
fn file_of(address: *const libc::c_void) -> anyhow::Result<PathBuf> {
    // SAFETY: an all-zero `Dl_info` is a valid value of it.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: `dladdr` only compares the address and fills `info`.
    let found = unsafe { libc::dladdr(address, &mut info) };
    if found == 0 || info.dli_fname.is_null() {
        bail!("libkrunfw's kernel lies in no library");
    }
    // SAFETY: `dladdr` succeeded, so the name is the loader's own NUL-terminated string.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
    path.canonicalize().with_context(|| format!("resolve {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_becomes_one_elf_segment_at_its_load_address() {
        let image = b"a guest kernel";
        let kernel = GuestKernel { path: PathBuf::new(), load: 0x100_0000, entry: 0x100_0123, image };
        let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        kernel.write_elf(&file).unwrap();
        let mut bytes = vec![0; 4096 + image.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let (e_entry, e_phoff) = (word(24), word(32));
        assert_eq!((e_entry, e_phoff, file.metadata().unwrap().len()), (0x100_0123, 64, bytes.len() as u64));
        let [p_offset, _, p_paddr, p_filesz, p_memsz] = [72, 80, 88, 96, 104].map(word);
        assert_eq!((p_offset, p_paddr, p_filesz, p_memsz), (4096, 0x100_0000, 14, 14));
        assert_eq!(&bytes[4096..], image);
    }
}
