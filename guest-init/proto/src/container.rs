//! A container and its processes as guest-init builds them: results of the host's plan, not config.json.
//!
//! In and out: parts of [`crate::Request`]. Must not: do anything but describe.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A container as guest-init builds it: results of the host's plan, not config.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// Container id.
    pub id: String,
    /// Its place below the exported tree's root: its root file system is [`ROOTFS`] there, beside its
    /// [`Source::Export`]s.
    pub place: PathBuf,
    /// Whether it runs nothing and only holds what the containers of a pod share: its first process ends by SIGTERM or
    /// SIGINT. It has no file systems, and no program.
    pub idle: bool,
    /// What it shares with containers that are there already.
    pub shared: Option<Shared>,
    /// The root's attributes, set once all mount points exist.
    pub attributes: Attributes,
    /// The root's propagation: `MS_*` of mount(2), 0 for private.
    pub propagation: u64,
    /// UTS host name, if any was given.
    pub hostname: Option<String>,
    /// UTS domain name, if any was given.
    pub domainname: Option<String>,
    /// Mounts in the order of config.json.
    pub mounts: Vec<Mount>,
    /// Its cgroup's limits: file of cgroup v2 and the value to write.
    pub limits: Vec<(String, String)>,
    /// What its processes may do with which devices; of the rules that fit, the last one decides. `None` for all.
    pub device_rules: Option<Vec<DeviceRule>>,
    /// Devices and FIFOs to make.
    pub devices: Vec<Device>,
    /// Kernel parameters of its namespaces: path below /proc/sys and the value to write.
    pub sysctls: Vec<(PathBuf, String)>,
    /// Lines for /proc/self/timens_offsets, if it has a time namespace of its own.
    pub time_offsets: Option<String>,
    /// Execution domain of all its processes (personality(2)), if one was given.
    pub personality: Option<u32>,
    /// Paths hidden from the container.
    pub masked_paths: Vec<PathBuf>,
    /// Paths made read-only in the container.
    pub readonly_paths: Vec<PathBuf>,
    /// Filter of the system calls of every process of the container, if one was given.
    pub seccomp: Option<Seccomp>,
    /// The container's first process.
    pub process: Process,
    /// Its user namespace, if it has one of its own.
    pub user: Option<UserNamespace>,
    /// `startContainer` hooks: run before the first process's program, by that process, as its user.
    pub hooks: Vec<Hook>,
    /// The container's state for them, but for the pid.
    pub state: serde_json::Value,
}

/// The root file system's name in a container's place.
pub const ROOTFS: &str = "rootfs";

/// What a container shares with others of its VM. All else is its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shared {
    /// The container whose namespaces it may share.
    pub with: String,
    /// Whether it shares the network.
    pub network: bool,
    /// Whether it shares System V IPC and message queues.
    pub ipc: bool,
    /// Whether it shares host and domain name.
    pub uts: bool,
    /// Whether it shares the user namespace, where there is one.
    pub user: bool,
    /// The container whose processes it sees and is seen by.
    pub pid: Option<String>,
}

/// A hook: a program run at a point of the container's life.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Absolute path of the program.
    pub path: PathBuf,
    /// All its arguments, the name it is called by included; none means that its path is its name.
    pub args: Vec<String>,
    /// `NAME=VALUE`, all of its environment; without it, that of whoever runs it.
    pub env: Option<Vec<String>>,
    /// Seconds that it may take, if there is a limit.
    pub timeout: Option<u64>,
}

/// A rule about devices. What is `None` fits all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRule {
    /// Whether it allows or denies.
    pub allow: bool,
    /// Of which kind.
    pub kind: Option<DeviceKind>,
    /// Major number.
    pub major: Option<u32>,
    /// Minor number.
    pub minor: Option<u32>,
    /// What: the sum of 1 (mknod), 2 (read) and 4 (write), the kernel's `BPF_DEVCG_ACC_*`.
    pub access: u32,
}

/// Kind of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Block device.
    Block,
    /// Character device.
    Char,
}

/// A special file of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where, inside the container.
    pub path: PathBuf,
    /// Kind and numbers; `None` for a FIFO.
    pub number: Option<(DeviceKind, u32, u32)>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Whether it is left out, rather than an error, where the guest kernel has no such device.
    pub optional: bool,
}

/// Ids that exist in a user namespace. Virtiofs and the host's mapping made them what they are; the guest keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserNamespace {
    /// Ranges of user ids: the first and how many.
    pub uids: Vec<(u32, u32)>,
    /// Ranges of group ids.
    pub gids: Vec<(u32, u32)>,
}

/// A process as the guest starts it: config.json's, checked and in the kernel's own terms.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Program and arguments; never empty.
    pub args: Vec<String>,
    /// `NAME=VALUE`
    pub env: Vec<String>,
    /// Absolute working directory.
    pub cwd: PathBuf,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Further group ids.
    pub groups: Vec<u32>,
    /// File mode creation mask, if one was given.
    pub umask: Option<u32>,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// Set no_new_privs.
    pub no_new_privileges: bool,
    /// Value for oom_score_adj, if one was given.
    pub oom_score_adj: Option<i32>,
    /// How it is scheduled, if that was given.
    pub scheduler: Option<Scheduler>,
    /// Priority of its I/O, class included (ioprio_set(2)), if one was given.
    pub io_priority: Option<u32>,
    /// The first size of its terminal, if it has one: then stdin and stdout are that, and there is no stderr. The end
    /// of stdin hangs it up.
    pub terminal: Option<Size>,
}

/// Scheduling policy and attributes (sched_setattr(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheduler {
    /// `SCHED_*` number.
    pub policy: u32,
    /// `SCHED_FLAG_*` bits.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// Nanoseconds of `SCHED_DEADLINE`.
    pub runtime: u64,
    /// Nanoseconds of `SCHED_DEADLINE`.
    pub deadline: u64,
    /// Nanoseconds of `SCHED_DEADLINE`.
    pub period: u64,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Height.
    pub rows: u16,
    /// Width.
    pub columns: u16,
}

/// Most instructions that the kernel takes in one filter (BPF_MAXINSNS).
pub const MAX_FILTER: usize = 4096;

/// A seccomp filter as seccomp(2) takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seccomp {
    /// `SECCOMP_FILTER_FLAG_*`
    pub flags: u32,
    /// One `struct sock_filter` each, from the low bits up: code (16), jt (8), jf (8), k (32).
    pub program: Vec<u64>,
}

/// A resource limit (getrlimit(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// `RLIMIT_*` number.
    pub resource: u32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Capability sets (capabilities(7)) as bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    /// Bound of what execve can give.
    pub bounding: u64,
    /// In force.
    pub effective: u64,
    /// Kept over execve of a file that has them inheritable.
    pub inheritable: u64,
    /// May be brought into force.
    pub permitted: u64,
    /// Kept over execve of an ordinary file.
    pub ambient: u64,
}

/// One mount of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Where, inside the container.
    pub destination: PathBuf,
    /// What.
    pub source: Source,
    /// What to set on it.
    pub attributes: Attributes,
    /// `MS_*` of mount(2), 0 for private.
    pub propagation: u64,
}

/// `MOUNT_ATTR_*` bits to set (mount_setattr(2)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attributes {
    /// On the mount itself.
    pub own: u64,
    /// On mounts of the host's below it, by their path in it, parents first: they may differ from its own.
    pub below: Vec<(PathBuf, u64)>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Source {
    /// A place in the exported tree, below the container's own.
    Export(PathBuf),
    /// Shared memory, which all containers of the VM that name it have in common.
    SharedMemory {
        /// Which: a single component of a path.
        name: String,
        /// Options of the tmpfs, for the first that names it.
        options: Vec<String>,
    },
    /// A device of the guest's own, by its path below the guest's root.
    Device(PathBuf),
    /// A file system of the guest's own.
    FileSystem {
        /// Type as the kernel knows it.
        kind: String,
        /// The name shown as its source.
        name: String,
        /// `key=value` and flag options for fsconfig(2).
        options: Vec<String>,
        /// Whether it starts with a copy of what lies at its destination.
        copy_up: bool,
    },
}
