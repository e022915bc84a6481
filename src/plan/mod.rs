//! From a trusted bundle to what is to be done.
//!
//! In: the bundle and its annotations. Out: a [`Plan`]: the VM's size, the tree the host assembles, the container
//! the guest builds. Touches no file, no process, no clock.

pub mod cgroup;
pub mod devices;
pub mod hooks;
pub mod host;
pub mod machine;
pub mod mounts;
pub mod network;
pub mod options;
pub mod pod;
pub mod process;
pub mod resources;
pub mod settings;
mod sysctl;
pub mod vm;

use std::path::{Path, PathBuf};

use a3s_box_proto as proto;
use anyhow::{Context, Result, bail};
use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, LinuxPersonalityDomain, Spec};

pub use hooks::Hooks;
pub use host::Limits;
pub use machine::Machine;
pub use mounts::{Bind, Tree};
pub use settings::Settings;
pub use vm::Vm;

use crate::sandbox::{self, Role};

/// Everything that `create` acts on. Each part moves to the stage that needs it.
#[derive(Debug)]
pub struct Plan {
    /// Which VM it lives in.
    pub role: Role,
    /// The virtual machine, if it starts one.
    pub vm: Vm,
    /// What the host assembles for it.
    pub tree: Tree,
    /// What is asked of the network.
    pub network: network::Wish,
    /// Host namespaces of the monitor.
    pub namespaces: Namespaces,
    /// What the guest builds.
    pub guest: proto::Container,
    /// Programs to run along the container's life.
    pub hooks: Hooks,
    /// Limits of the host cgroup.
    pub limits: Limits,
    /// The bundle's directory.
    pub bundle: PathBuf,
}

/// A host namespace of the monitor's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Namespace {
    /// The caller's.
    #[default]
    Inherit,
    /// A new one.
    New,
    /// The one behind this path.
    Join(PathBuf),
}

/// The monitor's namespaces, which engines find by its pid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// `network`
    pub network: Namespace,
    /// `ipc`
    pub ipc: Namespace,
    /// `uts`
    pub uts: Namespace,
    /// `user`
    pub user: Namespace,
    /// `pid`, which only the guest can share.
    pub pid: Namespace,
    /// User ids of a new user namespace.
    pub uids: Vec<IdMap>,
    /// Group ids of a new user namespace.
    pub gids: Vec<IdMap>,
}

impl Namespaces {
    /// Those that belong to the user namespace: each with its flag and the kernel's name.
    pub fn owned(&self) -> [(&Namespace, CloneFlags, &'static str); 3] {
        [
            (&self.network, CloneFlags::CLONE_NEWNET, "net"),
            (&self.ipc, CloneFlags::CLONE_NEWIPC, "ipc"),
            (&self.uts, CloneFlags::CLONE_NEWUTS, "uts"),
        ]
    }
}

/// A range of ids that are others outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// The first, as the container sees it.
    pub inside: u32,
    /// The first, as its creator sees it.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// Plans a container on a host with these settings. `rootfs` is the absolute path of its root file system there.
pub fn plan(
    id: &str,
    spec: &Spec,
    machine: &Machine,
    host: &Settings,
    rootfs: &Path,
    bundle: &Path,
) -> Result<Plan> {
    let annotations = spec.annotations().clone().unwrap_or_default();
    let role = sandbox::role(&annotations)?;
    let namespaces = namespaces(spec, &role)?;
    let (tree, mounts) = mounts::plan(spec, rootfs, bundle)?;
    let linux = spec.linux().as_ref();
    let profile = linux.and_then(|linux| linux.seccomp().as_ref());
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let (devices, device_rules) = devices::plan(spec)?;
    let process =
        spec.process().as_ref().context("process: config.json has none, there is nothing to run")?;
    let hooks = hooks::plan(spec)?;
    let guest = proto::Container {
        id: id.to_string(),
        place: exported(0),
        idle: role == Role::Sandbox,
        shared: None,
        attributes: proto::Attributes::default(),
        propagation: propagation(linux.and_then(|linux| linux.rootfs_propagation().as_deref()))?,
        hostname: spec.hostname().clone(),
        domainname: spec.domainname().clone(),
        mounts,
        limits: resources.map_or(Ok(Vec::new()), resources::limits)?,
        device_rules,
        devices,
        sysctls: sysctl::plan(spec)?,
        time_offsets: time_offsets(spec)?,
        personality: personality(spec)?,
        masked_paths: paths(linux.and_then(|linux| linux.masked_paths().as_ref())),
        readonly_paths: paths(linux.and_then(|linux| linux.readonly_paths().as_ref())),
        seccomp: profile.map(crate::seccomp::compile).transpose()?,
        process: process::plan(process)?,
        hooks: hooks.start_container.clone(),
        state: hooks::state(spec.version(), id, bundle, &annotations),
        user: None,
    };
    let asked = host.annotated(&annotations)?;
    let network = network::plan(&asked, host);
    let vm = vm::plan(spec, machine, &role, &asked, host)?;
    let limits = host::bounds(vm.memory_mib).and(resources.map_or(Ok(Limits::default()), host::limits)?);
    let bundle = bundle.to_path_buf();
    Ok(Plan { role, vm, tree, network, namespaces, guest, hooks, limits, bundle })
}

/// How many containers a VM has room for, besides the one that it was started for.
pub const MEMBERS: u16 = 64;

/// The place of a container in the exported tree of its VM, by number.
pub fn exported(number: u16) -> PathBuf {
    PathBuf::from(format!("c{number}"))
}

fn paths(list: Option<&Vec<String>>) -> Vec<PathBuf> {
    list.into_iter().flatten().map(PathBuf::from).collect()
}

fn propagation(word: Option<&str>) -> Result<u64> {
    match word {
        None | Some("") => Ok(0),
        Some(word) => options::propagation(word)
            .with_context(|| format!("linux.rootfsPropagation: {word:?} is not a type of propagation")),
    }
}

fn namespaces(spec: &Spec, role: &Role) -> Result<Namespaces> {
    let mut found = Namespaces::default();
    let mut seen = Vec::new();
    for entry in spec.linux().iter().filter_map(|linux| linux.namespaces().as_ref()).flatten() {
        let kind = entry.typ();
        if seen.contains(&kind) {
            bail!("linux.namespaces: {} is given twice", word(kind));
        }
        seen.push(kind);
        let wanted = match entry.path() {
            Some(path) if !path.is_absolute() => {
                bail!("linux.namespaces: path {} of {kind} is not absolute", path.display())
            }
            Some(path) => Namespace::Join(path.clone()),
            None => Namespace::New,
        };
        match kind {
            LinuxNamespaceType::Network => found.network = wanted,
            LinuxNamespaceType::Ipc => found.ipc = wanted,
            LinuxNamespaceType::Uts => found.uts = wanted,
            LinuxNamespaceType::User => found.user = wanted,
            // Another container's of the same VM.
            LinuxNamespaceType::Pid if matches!(role, Role::Member { .. }) => found.pid = wanted,
            // The guest makes these of its own for every container.
            LinuxNamespaceType::Pid
            | LinuxNamespaceType::Mount
            | LinuxNamespaceType::Cgroup
            | LinuxNamespaceType::Time
                if wanted == Namespace::New => {}
            kind if wanted == Namespace::New => bail!("linux.namespaces: {} is not supported", word(kind)),
            kind => bail!("linux.namespaces: {} by path is not supported", word(kind)),
        }
    }
    map_ids(spec, &mut found)?;
    Ok(found)
}

/// Lines for timens_offsets, where there is a time namespace.
fn time_offsets(spec: &Spec) -> Result<Option<String>> {
    let Some(linux) = spec.linux() else { return Ok(None) };
    let mut offsets: Vec<_> = linux.time_offsets().iter().flatten().collect();
    let own = linux.namespaces().iter().flatten().any(|one| one.typ() == LinuxNamespaceType::Time);
    if !own && !offsets.is_empty() {
        bail!(
            "linux.timeOffsets: time namespace offsets specified, but time namespace isn't enabled in the config"
        );
    }
    offsets.sort_by_key(|(clock, _)| *clock);
    let mut lines = String::new();
    for (clock, offset) in offsets {
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            bail!("linux.timeOffsets: {clock:?} is not \"monotonic\" or \"boottime\"");
        }
        let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        if nanoseconds > 999_999_999 {
            bail!("linux.timeOffsets.{clock}.nanosecs: {nanoseconds} is not less than a second");
        }
        lines.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
    }
    Ok(own.then_some(lines))
}

fn personality(spec: &Spec) -> Result<Option<u32>> {
    /// `PER_LINUX32` of linux/personality.h.
    const LINUX32: u32 = 8;
    let Some(personality) = spec.linux().as_ref().and_then(|linux| linux.personality().as_ref()) else {
        return Ok(None);
    };
    if let Some(flag) = personality.flags().iter().flatten().next() {
        bail!("linux.personality.flags: {flag:?} is not supported: the specification defines none");
    }
    Ok(Some(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => LINUX32,
    }))
}

fn map_ids(spec: &Spec, found: &mut Namespaces) -> Result<()> {
    let linux = spec.linux().as_ref();
    let map = |list: Option<&Vec<LinuxIdMapping>>| -> Vec<IdMap> {
        let given = list.into_iter().flatten().filter(|map| map.size() > 0);
        given
            .map(|map| IdMap { inside: map.container_id(), outside: map.host_id(), count: map.size() })
            .collect()
    };
    found.uids = map(linux.and_then(|linux| linux.uid_mappings().as_ref()));
    found.gids = map(linux.and_then(|linux| linux.gid_mappings().as_ref()));
    for (field, map) in [("uidMappings", &found.uids), ("gidMappings", &found.gids)] {
        match found.user {
            Namespace::New if map.is_empty() => {
                bail!("linux.{field}: there are none, which the user namespace in linux.namespaces needs")
            }
            Namespace::Inherit if !map.is_empty() => {
                bail!("linux.{field}: {map:?} without a user namespace in linux.namespaces")
            }
            _ => {}
        }
    }
    Ok(())
}

/// config.json's word for a namespace, which the type shows only when it is serialized.
fn word(kind: LinuxNamespaceType) -> String {
    serde_json::to_value(kind).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub fn spec(change: impl FnOnce(&mut Value)) -> Spec {
        let mut value = json!({
            "ociVersion": "1.2.0",
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]}
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn planned(change: impl FnOnce(&mut Value)) -> Result<Plan> {
        let (machine, host) = (Machine::default(), Settings::default());
        plan("c1", &spec(change), &machine, &host, Path::new("/b/rootfs"), Path::new("/b"))
    }

    #[test]
    fn namespaces_are_made_or_joined_as_given() {
        let plan = planned(|v| {
            v["linux"]["namespaces"] =
                json!([{"type": "network", "path": "/run/netns/x"}, {"type": "ipc"}, {"type": "pid"}]);
        });
        let namespaces = plan.unwrap().namespaces;
        assert_eq!(namespaces.network, Namespace::Join("/run/netns/x".into()));
        assert_eq!(namespaces.ipc, Namespace::New);
        assert_eq!(namespaces.uts, Namespace::Inherit);
    }

    #[test]
    fn namespaces_that_cannot_be_given_are_refused_by_name() {
        for (list, word) in [
            (json!([{"type": "network"}, {"type": "network"}]), "twice"),
            (json!([{"type": "network"}, {"type": "pid", "path": "/proc/1/ns/pid"}]), "pid"),
            (json!([{"type": "network"}, {"type": "user"}]), "user"),
            (json!([{"type": "network", "path": "net"}]), "not absolute"),
        ] {
            let text = planned(|v| v["linux"]["namespaces"] = list).unwrap_err().to_string();
            assert!(text.contains("linux.namespaces") && text.contains(word), "{text}");
        }
    }

    #[test]
    fn time_offsets_need_a_namespace_and_known_clocks() {
        let offsets = |list: Value, offsets: Value| {
            planned(|v| {
                v["linux"]["namespaces"] = list;
                v["linux"]["timeOffsets"] = offsets;
            })
            .map(|plan| plan.guest.time_offsets)
        };
        let (with, without) = (json!([{"type": "network"}, {"type": "time"}]), json!([{"type": "network"}]));
        let given = json!({"monotonic": {"secs": -5, "nanosecs": 7}, "boottime": {"secs": 9}});
        let lines = "boottime 9 0\nmonotonic -5 7\n".to_string();
        assert_eq!(offsets(with.clone(), given.clone()).unwrap(), Some(lines));
        assert_eq!(offsets(with.clone(), json!({})).unwrap(), Some(String::new()));
        assert_eq!(offsets(without.clone(), json!({})).unwrap(), None);
        for (list, given, words) in [
            (without, given, "time namespace isn't enabled"),
            (with.clone(), json!({"realtime": {"secs": 1}}), "\"realtime\" is not"),
            (with.clone(), json!({"boottime": {"nanosecs": 1_000_000_000}}), "boottime.nanosecs: 1000000000"),
            (json!([{"type": "network"}, {"type": "time", "path": "/x"}]), json!({}), "time by path"),
        ] {
            let text = offsets(list, given).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn personalities() {
        let domain =
            |value: Value| planned(|v| v["linux"]["personality"] = value).map(|plan| plan.guest.personality);
        assert_eq!(domain(json!({"domain": "LINUX32"})).unwrap(), Some(8));
        assert_eq!(domain(json!({"domain": "LINUX"})).unwrap(), Some(0));
        assert_eq!(domain(Value::Null).unwrap(), None);
        let text = domain(json!({"domain": "LINUX", "flags": ["X"]})).unwrap_err().to_string();
        assert!(text.contains("personality.flags: \"X\""), "{text}");
    }

    #[test]
    fn what_the_fuzzer_starts_from_is_planned_or_refused_in_a_line() {
        let corpus = Path::new("fuzz/corpus/config");
        let mut planned = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read(&path).unwrap();
            let plan = crate::bundle::parse(&text, &path, &[]).and_then(|(spec, machine, _)| {
                let host = Settings::default();
                plan("c1", &spec, &machine, &host, Path::new("/b/rootfs"), Path::new("/b"))
            });
            match plan {
                Ok(_) => planned += 1,
                Err(error) => assert!(!format!("{error:#}").contains('\n'), "{}: {error:#}", path.display()),
            }
        }
        assert!(planned >= 3, "{planned} were planned");
    }

    #[test]
    fn a_config_without_a_program_is_refused() {
        assert!(
            planned(|v| v["process"]["args"] = json!([])).unwrap_err().to_string().contains("process.args")
        );
        assert!(planned(|v| v["process"] = Value::Null).unwrap_err().to_string().contains("process"));
    }
}
