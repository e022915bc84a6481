//! Sizes of the VM and limits inside it, from `linux.resources` and annotations.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

use super::machine::{Kernel, Machine};
use super::pod;
use super::settings::Settings;
use crate::sandbox::Role;
use crate::support::Module;

/// vCPUs where nothing else says how many.
pub const DEFAULT_VCPUS: u8 = 2;
/// RAM in MiB where there is no memory limit.
pub const DEFAULT_MEMORY_MIB: u32 = 2048;
/// The guest kernel is built for this many CPUs.
pub const MAX_VCPUS: u8 = 16;
/// The guest kernel and guest-init do not come up with less RAM, in MiB.
pub const MIN_MEMORY_MIB: u32 = 96;
/// What the guest kernel (its image of 20 MiB included) and guest-init take out of the RAM, in MiB: 43 were measured.
pub const GUEST_OVERHEAD_MIB: u32 = 64;
/// One part in this many of the RAM goes to the guest kernel's page structures (64 bytes for 4 KiB), rounded up.
const PAGE_STRUCTURES: u64 = 50;

const MIB: i64 = 1 << 20;

/// How the VM is connected to the world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// Not at all.
    #[default]
    None,
    /// By this many NICs on taps.
    Tap(u8),
    /// Its IP sockets are made on the host.
    Tsi,
}

/// By what a security module confines the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// Which one.
    pub module: Module,
    /// The name it has there.
    pub text: String,
}

/// What the virtual machine is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Its network.
    pub network: Network,
    /// Where libkrunfw lies; `None` lets the dynamic linker find it.
    pub libkrunfw: Option<PathBuf>,
    /// A kernel of the container's own, or more words for that library's.
    pub kernel: Option<Kernel>,
    /// What confines the VMM, where the host has the module.
    pub labels: Vec<Label>,
    /// Whether the VMM logs what it does.
    pub debug: bool,
}

impl Default for Vm {
    fn default() -> Self {
        Vm {
            vcpus: DEFAULT_VCPUS,
            memory_mib: DEFAULT_MEMORY_MIB,
            network: Network::None,
            libkrunfw: None,
            kernel: None,
            labels: Vec::new(),
            debug: false,
        }
    }
}

/// Sizes a VM for one container, or for a pod's: what is asked for by annotations wins over the `vm` object, that one over
/// limits, and those over the host's defaults.
pub fn plan(spec: &Spec, machine: &Machine, role: &Role, asked: &Settings, host: &Settings) -> Result<Vm> {
    let none = HashMap::new();
    let annotations = spec.annotations().as_ref().unwrap_or(&none);
    let of_pod = if *role == Role::Sandbox { Some(pod::limits(annotations)?) } else { None };
    let resources = of_pod.as_ref().or_else(|| resources(spec));
    let vcpus = match (asked.vcpus, machine.vcpus()?) {
        (Some(vcpus), _) | (None, Some(vcpus)) => vcpus,
        (None, None) => vcpus(resources)?.or(host.vcpus).unwrap_or(DEFAULT_VCPUS),
    };
    let memory_mib = match (asked.memory_mib, machine.memory_mib()?) {
        (Some(mib), _) | (None, Some(mib)) => mib,
        (None, None) => memory_mib(resources)?.or(host.memory_mib).unwrap_or(DEFAULT_MEMORY_MIB),
    };
    let libkrunfw = asked.libkrunfw.as_ref().or(host.libkrunfw.as_ref()).cloned();
    let labels = spec.process().as_ref().map(labels).unwrap_or_default();
    Ok(Vm { vcpus, memory_mib, libkrunfw, kernel: machine.kernel().cloned(), labels, ..Vm::default() })
}

fn labels(process: &Process) -> Vec<Label> {
    let asked = [(Module::AppArmor, process.apparmor_profile()), (Module::SeLinux, process.selinux_label())];
    let label = |(module, text): (Module, &Option<String>)| Some(Label { module, text: text.clone()? });
    asked.into_iter().filter_map(label).filter(|label| !label.text.is_empty()).collect()
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

/// What limits say; `None` where there are none.
fn vcpus(resources: Option<&LinuxResources>) -> Result<Option<u8>> {
    let clamped = |vcpus: u64| Some(vcpus.clamp(1, MAX_VCPUS.into()) as u8);
    if let Some(vcpus) = unified(resources, "cpu.max").and_then(vcpus_of_cpu_max) {
        return Ok(clamped(vcpus));
    }
    let Some(cpu) = resources.and_then(|r| r.cpu().as_ref()) else { return Ok(None) };
    let wanted = match (cpu.quota(), cpu.period(), cpu.cpus()) {
        (Some(quota), period, _) if quota > 0 => (quota as u64).div_ceil(period.unwrap_or(100_000).max(1)),
        (_, _, Some(cpus)) if !cpus.trim().is_empty() => cpuset_size(cpus)?,
        _ => return Ok(None),
    };
    Ok(clamped(wanted))
}

/// `QUOTA PERIOD`, as cgroup v2 writes it.
fn vcpus_of_cpu_max(text: &str) -> Option<u64> {
    let (quota, period) = text.split_once(' ').unwrap_or((text, "100000"));
    Some(quota.parse::<u64>().ok()?.div_ceil(period.trim().parse::<u64>().ok()?.max(1)))
}

fn unified<'a>(resources: Option<&'a LinuxResources>, key: &str) -> Option<&'a str> {
    resources?.unified().as_ref()?.get(key).map(|value| value.trim())
}

fn cpuset_size(cpus: &str) -> Result<u64> {
    let mut total = 0;
    for range in cpus.trim().split(',') {
        let parsed = match range.split_once('-') {
            Some((first, last)) => first.trim().parse::<u64>().ok().zip(last.trim().parse::<u64>().ok()),
            None => range.trim().parse().ok().map(|n| (n, n)),
        };
        match parsed {
            Some((first, last)) if first <= last && last < 1 << 20 => total += last - first + 1,
            _ => bail!("linux.resources.cpu.cpus: {cpus:?} is not a list of CPUs"),
        }
    }
    Ok(total)
}

fn memory_limit(resources: Option<&LinuxResources>) -> Result<Option<i64>> {
    if let Some(limit) = unified(resources, "memory.max").and_then(|text| text.parse().ok()) {
        return Ok(Some(limit));
    }
    match resources.and_then(|r| r.memory().as_ref()).and_then(|m| m.limit()) {
        None | Some(-1 | 0) => Ok(None),
        Some(limit) if limit < -1 => bail!("linux.resources.memory.limit: {limit} is not a number of bytes"),
        Some(limit) => Ok(Some(limit)),
    }
}

fn memory_mib(resources: Option<&LinuxResources>) -> Result<Option<u32>> {
    let Some(limit) = memory_limit(resources)? else { return Ok(None) };
    let limit_mib = (limit as u64).div_ceil(MIB as u64);
    let mib = limit_mib + limit_mib / PAGE_STRUCTURES + u64::from(GUEST_OVERHEAD_MIB);
    match u32::try_from(mib) {
        Ok(mib) => Ok(Some(mib.max(MIN_MEMORY_MIB))),
        Err(_) => bail!("linux.resources.memory.limit: {limit} bytes are more than a VM can have"),
    }
}

/// Whether other limits fit into a VM, whose size is fixed when it is created.
pub fn fits(before: &LinuxResources, after: &LinuxResources, vcpus: u8, memory_mib: u32) -> Result<()> {
    let (held, limit) = (memory_limit(Some(before))?, memory_limit(Some(after))?);
    if let Some(bytes) = limit.filter(|_| limit != held)
        && self::memory_mib(Some(after))? > Some(memory_mib)
    {
        let room = u64::from(memory_mib.saturating_sub(GUEST_OVERHEAD_MIB)) * PAGE_STRUCTURES
            / (PAGE_STRUCTURES + 1);
        bail!(
            "linux.resources.memory.limit {bytes}: the container's VM was created with {memory_mib} MiB, which cannot grow: it has room for {} bytes",
            room << 20
        );
    }
    let (held, wanted) = (self::vcpus(Some(before))?, self::vcpus(Some(after))?);
    let quota = after.cpu().as_ref().and_then(|cpu| cpu.quota()).filter(|quota| *quota > 0);
    if let Some(quota) = quota
        && wanted != held
        && let Some(wanted) = wanted.filter(|wanted| *wanted > vcpus)
    {
        bail!(
            "linux.resources.cpu.quota {quota}: the container's VM was created with {vcpus} vCPUs, which cannot grow: this takes {wanted}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use crate::sandbox;
    use serde_json::{Value, json};

    fn sized(resources: Value, annotations: Value) -> Result<(u8, u32)> {
        let spec = spec(|v| {
            v["linux"]["resources"] = resources;
            v["annotations"] = annotations;
        });
        let annotations = spec.annotations().clone().unwrap_or_default();
        let role = sandbox::role(&annotations).unwrap();
        let host = Settings::default();
        let asked = host.annotated(&annotations)?;
        plan(&spec, &Machine::default(), &role, &asked, &host).map(|vm| (vm.vcpus, vm.memory_mib))
    }

    #[test]
    fn sizes_follow_limits() {
        for (resources, expected) in [
            (json!({}), (2, 2048)),
            (json!({"cpu": {"quota": 150_000, "period": 100_000}}), (2, 2048)),
            (json!({"cpu": {"quota": 250_000}}), (3, 2048)),
            (json!({"cpu": {"quota": -1, "cpus": "0-3,8"}}), (5, 2048)),
            (json!({"cpu": {"quota": 100_000_000}}), (16, 2048)),
            (json!({"cpu": {"quota": 1000}}), (1, 2048)),
            (json!({"memory": {"limit": 536_870_912}}), (2, 586)),
            (json!({"memory": {"limit": 4096}}), (2, 96)),
            (json!({"memory": {"limit": -1}}), (2, 2048)),
            (json!({"unified": {"memory.max": "536870912", "cpu.max": "250000 100000"}}), (3, 586)),
            (json!({"unified": {"memory.max": "max", "cpu.max": "max"}}), (2, 2048)),
        ] {
            assert_eq!(sized(resources.clone(), json!({})).unwrap(), expected, "{resources}");
        }
    }

    #[test]
    fn a_sandboxs_vm_has_room_for_its_pod() {
        let pause = json!({"cpu": {"shares": 2, "quota": 800_000}});
        let mut pod = json!({"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-memory": "536870912"});
        assert_eq!(sized(pause.clone(), pod.clone()).unwrap(), (2, 586));
        pod["io.kubernetes.cri.sandbox-cpu-quota"] = json!("300001");
        assert_eq!(sized(pause, pod).unwrap(), (4, 586));
    }

    #[test]
    fn what_nothing_says_is_the_hosts() {
        let host = Settings {
            vcpus: Some(5),
            memory_mib: Some(777),
            libkrunfw: Some("/host.so".into()),
            ..Settings::default()
        };
        let sized = |config: Value, asked: &Settings| {
            let machine = Machine::read(Some(config["vm"].clone())).unwrap();
            let vm =
                plan(&spec(|v| v["linux"] = config["linux"].clone()), &machine, &Role::Alone, asked, &host)
                    .unwrap();
            (vm.vcpus, vm.memory_mib, vm.libkrunfw.unwrap())
        };
        let none = Settings::default();
        assert_eq!(sized(json!({}), &none), (5, 777, "/host.so".into()));
        let limits = json!({"resources": {"cpu": {"quota": 300_000}, "memory": {"limit": 536_870_912}}});
        assert_eq!(sized(json!({"linux": limits}), &none), (3, 586, "/host.so".into()));
        let vm = json!({"linux": limits, "vm": {"hwConfig": {"vcpus": 1, "memory": 134_217_728}}});
        assert_eq!(sized(vm.clone(), &none), (1, 128, "/host.so".into()));
        let asked = Settings { memory_mib: Some(99), libkrunfw: Some("/own.so".into()), ..none };
        assert_eq!(sized(vm, &asked), (1, 99, "/own.so".into()));
    }

    #[test]
    fn annotations_win() {
        let limits = json!({"memory": {"limit": 1 << 30}, "cpu": {"quota": 800_000}});
        let wanted = json!({"a3s.box/vcpus": "1", "a3s.box/memory-mib": "256"});
        assert_eq!(sized(limits, wanted).unwrap(), (1, 256));
    }

    #[test]
    fn senseless_sizes_name_field_and_value() {
        for (resources, annotations, words) in [
            (json!({"cpu": {"cpus": "3-1"}}), json!({}), "cpu.cpus: \"3-1\""),
            (json!({"memory": {"limit": -5}}), json!({}), "memory.limit: -5"),
            (json!({"memory": {"limit": i64::MAX}}), json!({}), "more than a VM"),
        ] {
            let text = sized(resources, annotations).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn a_vm_does_not_grow() {
        let check = |before: Value, after: Value| {
            let typed = |value: Value| serde_json::from_value(value).unwrap();
            fits(&typed(before), &typed(after), 2, 586).map_err(|error| error.to_string())
        };
        let limit = |bytes: i64| json!({"memory": {"limit": bytes}});
        let half = 512 << 20;
        for after in
            [limit(half), limit(1 << 20), limit(-1), json!({"cpu": {"quota": 200_000, "cpus": "0-9"}})]
        {
            assert_eq!(check(limit(half), after), Ok(()));
        }
        assert_eq!(check(limit(1 << 40), limit(1 << 40)), Ok(()), "it was like that from the start");
        let text = check(limit(half), limit(half + (1 << 20))).unwrap_err();
        assert!(text.starts_with("linux.resources.memory.limit 537919488"), "{text}");
        assert!(
            check(limit(half), json!({"cpu": {"quota": 200_001}})).unwrap_err().contains("cpu.quota 200001")
        );
    }
}
