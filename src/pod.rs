//! A VM that is there already takes in one more container.
//!
//! Its tree is mounted into the running VMM's jail, at a place that was made for it beforehand; the guest builds it
//! beside the others. In: a member's plan, its sandbox's record. Out: a [`Home`], and on [`leave`] nothing of it. Must
//! not: share what config.json does not, or follow a path that a container could have laid.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_mount::{Kind, Root, attach, errno_words, file_system, open_path, set_attributes};
use a3s_box_proto::{Outcome, Request, Shared};
use anyhow::{Context, Result, anyhow, bail};
use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::bundle::Bundle;
use crate::guest::{self, Connection};
use crate::jail::{self, tree::Export};
use crate::monitor::{self, End};
use crate::net;
use crate::plan::vm::{MAX_VCPUS, fits};
use crate::plan::{MEMBERS, Machine, Namespace, Plan, exported};
use crate::sandbox::{Absent, Role};
use crate::store::{Entry, Error, ProcessId, Record, Seat, Status, Store, VM_DIR};
use crate::vmm;

/// How long a guest may take to greet, and again to forget a container, where its end cannot wait for it.
const GRACE: Duration = Duration::from_secs(1);

/// A sandbox whose VM takes a container in. Locked, so that no other gets the same seat.
pub struct Sandbox {
    entry: Entry,
    record: Record,
    monitor: ProcessId,
    vm: ProcessId,
}

/// A VM with a seat for a container.
pub struct Home {
    /// The seat.
    pub seat: Seat,
    /// The VMM.
    pub vm: ProcessId,
    vmm: OwnedFd,
    /// Dialled, and nothing read yet.
    stream: UnixStream,
}

/// The sandbox whose VM a container joins; `None` for one that gets a VM of its own.
pub fn joins(store: &Store, role: &Role) -> Result<Option<(String, Absent)>> {
    let Role::Member { sandbox: id, absent } = role else { return Ok(None) };
    match store.read(id) {
        Err(error) if is_not_found(&error) => match absent {
            Absent::Refused => Err(error).with_context(|| format!("sandbox {id}")),
            Absent::Alone => Ok(None),
            Absent::Made => Ok(Some((id.clone(), *absent))),
        },
        _ => Ok(Some((id.clone(), *absent))),
    }
}

/// Whether there is no such container.
pub fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Error::NotFound | Error::BadId(_)))
}

/// Locks a sandbox.
pub fn lock(store: &Store, id: &str) -> Result<(Entry, Record)> {
    let entry = store.open(id)?;
    let record = entry.read()?;
    Ok((entry, record))
}

impl Sandbox {
    /// Takes a locked sandbox whose VM runs.
    pub fn new((entry, record): (Entry, Record)) -> Result<Self> {
        let id = &record.id;
        if record.seat.is_some() {
            bail!("sandbox {id}: it lives in another container's VM itself");
        }
        match (record.status(), record.monitor, record.vm) {
            (Status::Created | Status::Running, Some(monitor), Some(vm)) => {
                Ok(Sandbox { entry, monitor, vm, record })
            }
            (status, ..) => Err(gone(id, status, entry.dir())),
        }
    }

    /// Whether an engine asked for it, and not a container that needed one.
    pub fn is_engines(&self) -> bool {
        !self.record.made
    }

    /// Completes a member's plan with what it shares, and gives it a seat. Out: the network namespace to join as well.
    pub fn admit(&mut self, store: &Store, bundle: &Bundle, plan: &mut Plan) -> Result<(Home, Option<File>)> {
        let id = &self.record.id;
        if bundle.machine != Machine::default() {
            bail!("vm: the VM is that of sandbox {id}, and there already");
        }
        let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let size = (self.record.vcpus, self.record.memory_mib);
        resources.map_or(Ok(()), |wanted| fits(&LinuxResources::default(), wanted, MAX_VCPUS, size.1))?;
        let neighbours: Vec<Record> =
            store.list()?.into_iter().filter(|record| record.vm == Some(self.vm)).collect();
        let namespaces = &plan.namespaces;
        let (network, joined) = self.shares(&namespaces.network, "network", "net")?;
        let shared = Shared {
            with: id.clone(),
            network,
            ipc: self.shares(&namespaces.ipc, "ipc", "ipc")?.0,
            uts: self.shares(&namespaces.uts, "uts", "uts")?.0,
            user: match &namespaces.user {
                Namespace::Join(_) => self.shares(&namespaces.user, "user", "user")?.0,
                _ => false,
            },
            pid: match &namespaces.pid {
                Namespace::Join(path) => Some(pid_neighbour(path, &neighbours)?),
                _ => None,
            },
        };
        let seat = self.seat(&neighbours)?;
        plan.guest.place = exported(seat.number);
        plan.guest.shared = Some(shared);
        plan.vm.vcpus = size.0;
        plan.vm.memory_mib = size.1;
        let Some(vmm) = self.vm.open()? else {
            return Err(gone(&seat.sandbox, Status::Stopped, self.entry.dir()));
        };
        let stream = guest::dial(&self.entry.dir().join(VM_DIR), self.vm.pid)?;
        Ok((Home { seat, vm: self.vm, vmm, stream }, joined))
    }

    /// Whether a namespace is to be the sandbox's, which is all that one by path, or none, can be.
    fn shares(&self, namespace: &Namespace, name: &str, file: &str) -> Result<(bool, Option<File>)> {
        let (path, joined) = match namespace {
            Namespace::New => return Ok((false, None)),
            Namespace::Join(path) => (path.clone(), true),
            Namespace::Inherit => (format!("/proc/self/ns/{file}").into(), false),
        };
        let shown = || if name == "network" { net::shown(&path) } else { named(name, &path) };
        let other = File::open(&path).with_context(shown)?;
        let own = std::fs::metadata(format!("/proc/{}/ns/{file}", self.monitor.pid)).with_context(shown)?;
        let found = other.metadata().with_context(shown)?;
        if (found.dev(), found.ino()) != (own.dev(), own.ino()) {
            bail!("{}: it is not that of sandbox {}, whose VM it lives in", shown(), self.record.id);
        }
        Ok((true, joined.then_some(other)))
    }

    /// Seats go round, so that one is not used again while a guest may still remember who sat there.
    fn seat(&mut self, neighbours: &[Record]) -> Result<Seat> {
        let taken: HashSet<u16> =
            neighbours.iter().filter_map(|record| record.seat.as_ref()).map(|seat| seat.number).collect();
        let mut numbers = (0..MEMBERS).map(|n| 1 + self.record.joined.wrapping_add(n) % MEMBERS);
        let Some(number) = numbers.find(|number| !taken.contains(number)) else {
            bail!("sandbox {} has {MEMBERS} containers in its VM, which is the most", self.record.id)
        };
        self.record.joined = number;
        self.entry.save(&self.record)?;
        Ok(Seat { sandbox: self.record.id.clone(), number })
    }
}

/// Why no more can join it: also what its monitor said last.
fn gone(sandbox: &str, status: Status, dir: &Path) -> anyhow::Error {
    let why = match monitor::end(dir) {
        Some(End::Failed(text)) => format!(": {text}"),
        _ => String::new(),
    };
    anyhow!("sandbox {sandbox} is {status}: its VM cannot be joined{why}")
}

fn named(name: &str, path: &Path) -> String {
    format!("linux.namespaces: join {name} namespace {}", path.display())
}

/// Which container of the VM a pid namespace is that of. The guest has it, and the host only the monitor's.
fn pid_neighbour(path: &Path, neighbours: &[Record]) -> Result<String> {
    let own = |record: &&Record| {
        record.live_pid() != 0 && path == Path::new(&format!("/proc/{}/ns/pid", record.live_pid()))
    };
    let found = neighbours.iter().find(own).map(|record| record.id.clone());
    found.with_context(|| format!("{}: it is not that of a container in the same VM", named("pid", path)))
}

impl Home {
    /// What a process that uses it has to keep open.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [self.vmm.as_raw_fd(), self.stream.as_raw_fd()]
    }

    /// Mounts a container's tree into the VM. Out: the way to its guest.
    pub fn furnish(self, exports: Vec<Export>) -> Result<UnixStream> {
        let floor = floor(&exports)?;
        let seat = seat_path(self.seat.number);
        vmm::inside(self.vmm.as_fd(), || {
            attach(&floor, open_seat(&seat)?)?;
            let root = Root::new(floor.try_clone().context("the container's place")?);
            for export in exports {
                let kind = if export.is_dir { Kind::Directory } else { Kind::File };
                attach(export.mount, root.place(&export.place, kind)?)
                    .with_context(|| format!("export {}", export.place.display()))?;
            }
            set_attributes(&floor, libc::MOUNT_ATTR_RDONLY, false)
        })
        .with_context(|| format!("mount into the VM of sandbox {}", self.seat.sandbox))?;
        Ok(self.stream)
    }
}

/// A file system with a mount point for each export.
fn floor(exports: &[Export]) -> Result<OwnedFd> {
    let options = ["mode=0755".into(), "size=64k".into()];
    let floor = file_system("tmpfs", "pod", &options, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)?;
    for export in exports {
        let (place, mode) = (&export.place, Mode::from_raw_mode(0o755));
        let made = if export.is_dir {
            rustix::fs::mkdirat(&floor, place, mode)
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&floor, place, flags, mode).map(drop)
        };
        made.map_err(|errno| anyhow!("make a mount point for {}: {}", place.display(), errno_words(errno)))?;
    }
    Ok(floor)
}

/// Where a seat is, below the root of the VMM's mount namespace. What stands in for a VM in tests has gone further.
fn seat_path(number: u16) -> PathBuf {
    let export = if vmm::CONFINED { Path::new(jail::EXPORT) } else { Path::new("/") };
    export.join(exported(number))
}

/// Opens a seat that nothing is mounted on, and nothing but the jail's own file system leads to.
fn open_seat(path: &Path) -> Result<OwnedFd> {
    let shown = |errno| anyhow!("{}: {}", path.display(), errno_words(errno));
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("{}: no seat", path.display())
    };
    let above = open_path(above).map_err(shown)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(above, name, flags, Mode::empty(), resolve).map_err(shown)
}

/// Takes what a member has in its VM away. Its processes on the host are gone. A guest that does not answer in time
/// keeps what it uses until its end.
pub fn leave(dir: &Path, record: &Record) -> Result<()> {
    // One whose making did not come so far has a sandbox, but no VM yet.
    let (Some(seat), Some(vm)) = (&record.seat, record.vm) else { return Ok(()) };
    let Some(vmm) = vm.open()? else { return Ok(()) };
    let _ = forget(dir, record, vm);
    let path = seat_path(seat.number);
    let left = vmm::inside(vmm.as_fd(), || match vmm::detach(&path) {
        // Nothing is mounted there.
        Ok(()) | Err(nix::errno::Errno::EINVAL) => Ok(()),
        Err(errno) => Err(errno.into()),
    });
    if vm.is_alive() { left.context("unmount from the sandbox's VM") } else { Ok(()) }
}

fn forget(dir: &Path, record: &Record, vm: ProcessId) -> Result<Outcome> {
    let stream = guest::dial(&vm_dir(dir, record), vm.pid)?;
    Connection::greet(stream, GRACE)?.call(&Request::Delete { container: record.id.clone() }, GRACE)
}

/// The directory of the VM that the container lives in whose directory is `dir`.
pub fn vm_dir(dir: &Path, record: &Record) -> PathBuf {
    match &record.seat {
        None => dir.join(VM_DIR),
        Some(seat) => seat_dir(dir, seat),
    }
}

/// The same for a seat.
pub fn seat_dir(dir: &Path, seat: &Seat) -> PathBuf {
    dir.with_file_name(&seat.sandbox).join(VM_DIR)
}
