//! The table itself: every property of runtime-spec 1.3's config.json.
//!
//! A row covers what lies below its path; no row lies below another. `[]` stands for any element, and a row
//! `path=value` for one value of a field: of one that has a row too, for a value that fares otherwise; of one that has
//! none, each value that there is.

use super::Module::{AppArmor, SeLinux};
use super::Support::{self, Both, Guest, Host, Ignored, Label, Refused};

/// One row.
#[derive(Debug)]
pub struct Field {
    /// Where it stands in config.json.
    pub path: &'static str,
    /// What becomes of it.
    pub support: Support,
    /// What a reader should know besides; empty for most.
    pub note: &'static str,
}

impl Field {
    const fn note(mut self, note: &'static str) -> Self {
        self.note = note;
        self
    }
}

const fn field(path: &'static str, support: Support) -> Field {
    Field { path, support, note: "" }
}

const PLUGGED_BY_OTHERS: Support = Refused(
    "interfaces are not moved; what is in the container's network namespace before `start` is what the guest gets",
);
const NO_LSM: Support = Ignored("the guest kernel has no such security module");
const NO_LABEL: &str =
    "the guest kernel has no SELinux, and a VMM is confined at create, where the host has it";
const NO_PROFILE: &str =
    "the guest kernel has no AppArmor, and a VMM is confined at create, where the host has it";
const NO_NUMA: Support = Ignored("the guest has one memory node");
const NOT_IN_V2: Support = Ignored("cgroup v2 has no such control");
const HOST_HARDWARE: Support = Ignored("it is about hardware of the host that the guest does not see");
const NO_PASSTHROUGH: Support = Refused("hardware of the host cannot be passed into the VM");
const OTHER_SYSTEM: Support = Refused("this is a Linux runtime");
const NO_LISTENER: Support =
    Refused("the filter runs in the guest's kernel, no descriptor of it can cross to the host");

const ID_MAPS: &str = "binds of file systems that can be ID-mapped: not overlayfs, NFS, 9p";

/// Every field, in the order in which people look for them.
pub const FIELDS: &[Field] = &[
    field("ociVersion", Host).note("1.x"),
    field("root.path", Host),
    field("root.readonly", Both),
    field("mounts[].destination", Both),
    field("mounts[].type", Both),
    field("mounts[].source", Host),
    field("mounts[].options", Both).note("see `mountOptions` of `a3s-box features`"),
    field("mounts[].uidMappings", Host).note(ID_MAPS),
    field("mounts[].gidMappings", Host).note(ID_MAPS),
    field("process.args", Guest),
    field("process.env", Guest),
    field("process.cwd", Guest),
    field("process.user.uid", Guest),
    field("process.user.gid", Guest),
    field("process.user.additionalGids", Guest),
    field("process.user.umask", Guest),
    field("process.user.username", Ignored("it is for Windows")),
    field("process.commandLine", Ignored("it is for Windows")),
    field("process.capabilities.bounding", Guest),
    field("process.capabilities.effective", Guest),
    field("process.capabilities.inheritable", Guest),
    field("process.capabilities.permitted", Guest),
    field("process.capabilities.ambient", Guest),
    field("process.rlimits", Guest),
    field("process.noNewPrivileges", Guest),
    field("process.oomScoreAdj", Both),
    field("process.terminal", Both).note("`--console-socket`, or the caller's own terminal"),
    field("process.consoleSize", Both),
    field("process.apparmorProfile", Label(AppArmor, NO_PROFILE))
        .note("it confines the VMM, where the host has AppArmor; else ignored"),
    field("process.selinuxLabel", Label(SeLinux, NO_LABEL))
        .note("it confines the VMM, where the host has SELinux; else ignored"),
    field("process.scheduler", Guest),
    field("process.ioPriority", Guest),
    field("process.execCPUAffinity", Ignored("the guest has CPUs of its own")),
    field("hostname", Both),
    field("domainname", Guest),
    field("annotations", Host).note("`a3s.box/…` act, all are shown by `state`"),
    field("hooks.prestart", Host),
    field("hooks.createRuntime", Host),
    field("hooks.createContainer", Host),
    field("hooks.startContainer", Guest),
    field("hooks.poststart", Host),
    field("hooks.poststop", Host),
    field("linux.namespaces[].type=cgroup", Guest),
    field("linux.namespaces[].type=ipc", Both),
    field("linux.namespaces[].type=mount", Guest),
    field("linux.namespaces[].type=network", Both),
    field("linux.namespaces[].type=pid", Guest),
    field("linux.namespaces[].type=uts", Both),
    field("linux.namespaces[].type=user", Both),
    field("linux.namespaces[].type=time", Guest),
    field("linux.namespaces[].path", Host).note("network, ipc, uts and user; the guest's are its own"),
    field("linux.uidMappings", Host),
    field("linux.gidMappings", Host),
    field("linux.timeOffsets", Guest),
    field("linux.devices", Guest).note("devices of the guest kernel, FIFOs"),
    field("linux.netDevices", PLUGGED_BY_OTHERS),
    field("linux.cgroupsPath", Host),
    field("linux.rootfsPropagation=private", Guest),
    field("linux.rootfsPropagation=rprivate", Guest),
    field("linux.rootfsPropagation=slave", Guest),
    field("linux.rootfsPropagation=rslave", Guest),
    field("linux.rootfsPropagation=unbindable", Guest),
    field("linux.rootfsPropagation=runbindable", Guest),
    field("linux.rootfsPropagation=shared", Refused("a guest's mounts cannot propagate to the host")),
    field("linux.rootfsPropagation=rshared", Refused("a guest's mounts cannot propagate to the host")),
    field("linux.maskedPaths", Guest),
    field("linux.readonlyPaths", Guest),
    field("linux.mountLabel", NO_LSM),
    field("linux.sysctl", Guest).note("what belongs to the container's namespaces"),
    field("linux.personality", Guest),
    field("linux.seccomp.defaultAction", Guest),
    field("linux.seccomp.defaultErrnoRet", Guest),
    field("linux.seccomp.architectures", Guest),
    field("linux.seccomp.flags[]", Guest),
    field("linux.seccomp.syscalls[].names", Guest).note("unknown ones are skipped, as runc does"),
    field("linux.seccomp.syscalls[].action", Guest),
    field("linux.seccomp.syscalls[].errnoRet", Guest),
    field("linux.seccomp.syscalls[].args", Guest),
    field("linux.seccomp.defaultAction=SCMP_ACT_NOTIFY", NO_LISTENER),
    field("linux.seccomp.syscalls[].action=SCMP_ACT_NOTIFY", NO_LISTENER),
    field("linux.seccomp.flags[]=SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", NO_LISTENER),
    field("linux.seccomp.listenerPath", NO_LISTENER),
    field("linux.seccomp.listenerMetadata", NO_LISTENER),
    field("linux.intelRdt", HOST_HARDWARE),
    field("linux.memoryPolicy", NO_NUMA),
    field("linux.resources.devices", Guest).note("a device filter of the container's cgroup"),
    field("linux.resources.memory.limit", Both),
    field("linux.resources.memory.reservation", Both),
    field("linux.resources.memory.swap", Both),
    field("linux.resources.memory.kernel", NOT_IN_V2),
    field("linux.resources.memory.kernelTCP", NOT_IN_V2),
    field("linux.resources.memory.swappiness", NOT_IN_V2),
    field("linux.resources.memory.disableOOMKiller", NOT_IN_V2),
    field("linux.resources.memory.useHierarchy", NOT_IN_V2),
    field("linux.resources.memory.checkBeforeUpdate", Guest),
    field("linux.resources.cpu.quota", Both),
    field("linux.resources.cpu.period", Both),
    field("linux.resources.cpu.cpus", Host).note("also the number of vCPUs"),
    field("linux.resources.cpu.shares", Both),
    field("linux.resources.cpu.burst", Both),
    field("linux.resources.cpu.idle", Both),
    field("linux.resources.cpu.mems", Host),
    field("linux.resources.cpu.realtimePeriod", NOT_IN_V2),
    field("linux.resources.cpu.realtimeRuntime", NOT_IN_V2),
    field("linux.resources.pids.limit", Guest),
    field("linux.resources.blockIO.weight", Host).note("the VMM's input and output"),
    field("linux.resources.blockIO.leafWeight", NOT_IN_V2),
    field("linux.resources.blockIO.weightDevice[].major", Host),
    field("linux.resources.blockIO.weightDevice[].minor", Host),
    field("linux.resources.blockIO.weightDevice[].weight", Host),
    field("linux.resources.blockIO.weightDevice[].leafWeight", NOT_IN_V2),
    field("linux.resources.blockIO.throttleReadBpsDevice", Host),
    field("linux.resources.blockIO.throttleWriteBpsDevice", Host),
    field("linux.resources.blockIO.throttleReadIOPSDevice", Host),
    field("linux.resources.blockIO.throttleWriteIOPSDevice", Host),
    field("linux.resources.hugepageLimits", Guest),
    field("linux.resources.network", NOT_IN_V2),
    field("linux.resources.rdma", HOST_HARDWARE),
    field("linux.resources.unified", Both).note("`cpuset.`, `io.`, `rdma.`, `misc.` on the host"),
    field("vm.hypervisor", Refused("the hypervisor is libkrun, linked into a3s-box")),
    field("vm.kernel.path", Host)
        .note("ELF, or on x86 a bzImage (gzip, bzip2, zstd); empty: the configured kernel"),
    field("vm.kernel.parameters", Guest).note("added to a3s-box's own"),
    field("vm.kernel.initrd", Guest).note("with a kernel that takes one: libkrunfw's does not"),
    field("vm.image", Refused("the VM's root file system is the container's")),
    field("vm.hwConfig.vcpus", Host),
    field("vm.hwConfig.memory", Host).note("bytes"),
    field("vm.hwConfig.deviceTree", NO_PASSTHROUGH),
    field("vm.hwConfig.dtdevs", NO_PASSTHROUGH),
    field("vm.hwConfig.iomems", NO_PASSTHROUGH),
    field("vm.hwConfig.irqs", NO_PASSTHROUGH),
    field("solaris", OTHER_SYSTEM),
    field("windows", OTHER_SYSTEM),
    field("zos", OTHER_SYSTEM),
    field("freebsd", OTHER_SYSTEM),
];
