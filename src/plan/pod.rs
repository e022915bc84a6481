//! The VM that holds a pod: what engines say that its containers need together, and the sandbox where they make none.
//!
//! In: a sandbox's annotations, or a member's config.json. Out: limits, or the config.json of a sandbox. Must not: read
//! the limits of a member whose VM is there already.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use oci_spec::runtime::{LinuxResources, Spec};
use serde_json::{Map, Value, json};

use super::cgroup::OWN_PARENT;
use super::host::{Limits, is_the_guests_too};
use super::vm::Vm;
use crate::sandbox;

const CONTAINERD: &str = "io.kubernetes.cri.sandbox-";
/// CRI's LinuxContainerResources, by its newer name and its older one.
const CRIO: [&str; 2] = ["pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources"];

/// The sum of a pod's limits; what nobody has limited is left out.
pub fn limits(annotations: &HashMap<String, String>) -> Result<LinuxResources> {
    let crio = CRIO.iter().find_map(|name| Some((name, annotations.get(*name)?)));
    let [memory, quota, period] = match crio {
        Some((name, text)) => {
            let found: Value = serde_json::from_str(text).with_context(|| format!("annotation {name}"))?;
            ["memory_limit_in_bytes", "cpu_quota", "cpu_period"].map(|key| found[key].as_i64().unwrap_or(0))
        }
        None => {
            let number = |key: &str| match annotations
                .get(&format!("{CONTAINERD}{key}"))
                .map(|text| (text, text.parse()))
            {
                None => Ok(0),
                Some((_, Ok(number))) => Ok(number),
                Some((text, Err(_))) => bail!("annotation {CONTAINERD}{key}: {text:?} is not a number"),
            };
            [number("memory")?, number("cpu-quota")?, number("cpu-period")?]
        }
    };
    let mut limits = json!({});
    if memory > 0 {
        limits["memory"] = json!({ "limit": memory });
    }
    if quota > 0 {
        limits["cpu"] = json!({ "quota": quota, "period": if period > 0 { period } else { 100_000 } });
    }
    serde_json::from_value(limits).context("the pod's limits")
}

/// config.json of the sandbox that a member's engine does not make.
pub fn sandbox_of(member: &Spec, id: &str) -> Result<Spec> {
    let mut spec = serde_json::to_value(member).context("config.json")?;
    let take = |value: &mut Value, name: &str| value.get_mut(name).map(Value::take).unwrap_or_default();
    let mut annotations: Map<String, Value> = match take(&mut spec, "annotations") {
        Value::Object(all) => all.into_iter().filter(|(name, _)| name.starts_with("a3s.box/")).collect(),
        _ => Map::new(),
    };
    annotations.insert(sandbox::CRIO_TYPE.into(), "sandbox".into());
    annotations.insert(sandbox::CRIO_ID.into(), id.into());
    let mut linux = take(&mut spec, "linux");
    let mut namespaces = take(&mut linux, "namespaces");
    for namespace in
        namespaces.as_array_mut().into_iter().flatten().filter(|namespace| namespace["type"] == "pid")
    {
        *namespace = json!({ "type": "pid" });
    }
    let path = linux["cgroupsPath"].as_str().map(|path| beside(path, id));
    let theirs = &spec["process"];
    let process = json!({
        "args": ["pause"], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "oomScoreAdj": theirs["oomScoreAdj"],
        // Its VMM is the only one that there will be.
        "apparmorProfile": theirs["apparmorProfile"], "selinuxLabel": theirs["selinuxLabel"],
    });
    serde_json::from_value(json!({
        "ociVersion": spec["ociVersion"], "hostname": spec["hostname"], "annotations": annotations,
        "root": { "path": "/", "readonly": true }, "process": process,
        "linux": {
            "namespaces": namespaces, "cgroupsPath": path,
            "uidMappings": linux["uidMappings"], "gidMappings": linux["gidMappings"],
        },
    }))
    .context("the sandbox's config.json")
}

/// A line for each thing that a member's config.json asks of the host for its VM, which is its sandbox's.
pub fn without_effect(vm: &Vm, limits: &Limits) -> Vec<String> {
    let labels = vm.labels.iter().map(|label| format!("process.{} {:?}", label.module.field(), label.text));
    let limits = limits.iter().filter(|(file, _)| !is_the_guests_too(file));
    let limits = limits.map(|(file, value)| format!("linux.resources: {file} {value:?}"));
    labels.chain(limits).map(|what| format!("{what} is ignored: the VM is the sandbox's")).collect()
}

/// A cgroup in the same place as a member's, named after the sandbox.
fn beside(path: &str, id: &str) -> String {
    match path.split_once(':') {
        Some((slice, _)) => format!("{slice}:{OWN_PARENT}:{id}"),
        None => Path::new(path).with_file_name(format!("{OWN_PARENT}-{id}")).to_string_lossy().into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::super::vm::Label;
    use super::*;
    use crate::support::Module;

    #[test]
    fn a_sandbox_of_our_own_has_the_pods_namespaces_and_nothing_of_a_container() {
        let member = spec(|v| {
            v["annotations"] =
                json!({"a3s.box/memory-mib": "300", "io.kubernetes.cri-o.ContainerType": "container"});
            v["mounts"] = json!([{"destination": "/data", "source": "/s", "options": ["bind"]}]);
            v["hooks"] = json!({"prestart": [{"path": "/bin/x"}]});
            v["process"]["selinuxLabel"] = "x_t".into();
            v["linux"] = json!({
                "cgroupsPath": "/kubepods/pod1/crio-abc", "resources": {"memory": {"limit": 5}},
                "namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "network", "path": "/run/netns/x"}],
            });
        });
        let sandbox = sandbox_of(&member, "s1").unwrap();
        let value = serde_json::to_value(&sandbox).unwrap();
        assert_eq!(sandbox::role(sandbox.annotations().as_ref().unwrap()).unwrap(), sandbox::Role::Sandbox);
        assert_eq!(value["annotations"]["a3s.box/memory-mib"], "300");
        assert_eq!(value["process"]["selinuxLabel"], "x_t");
        assert_eq!(value["linux"]["cgroupsPath"], "/kubepods/pod1/a3s-box-s1");
        assert_eq!(
            value["linux"]["namespaces"],
            json!([{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}])
        );
        assert!(sandbox.mounts().as_ref().is_none_or(Vec::is_empty) && sandbox.hooks().is_none());
        assert_eq!(beside("kubepods-pod1.slice:crio:abc", "s1"), "kubepods-pod1.slice:a3s-box:s1");
    }

    #[test]
    fn what_acts_on_the_sandboxs_vm_alone_is_named() {
        let label = Label { module: Module::SeLinux, text: "x_t".into() };
        let vm = Vm { labels: vec![label], ..Vm::default() };
        let limits = Limits::from([("memory.max", "5".into()), ("cpuset.cpus", "0-1".into())]);
        let expected = [
            "process.selinuxLabel \"x_t\" is ignored: the VM is the sandbox's",
            "linux.resources: cpuset.cpus \"0-1\" is ignored: the VM is the sandbox's",
        ];
        assert_eq!(without_effect(&vm, &limits), expected);
    }

    fn found(list: &[(&str, &str)]) -> Result<(Option<i64>, Option<i64>, Option<u64>)> {
        let annotations = list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let limits = limits(&annotations)?;
        let cpu = limits.cpu().as_ref();
        let memory = limits.memory().as_ref().and_then(|memory| memory.limit());
        Ok((memory, cpu.and_then(|cpu| cpu.quota()), cpu.and_then(|cpu| cpu.period())))
    }

    #[test]
    fn engines_sums_are_limits() {
        let containerd = [
            ("io.kubernetes.cri.sandbox-memory", "1048576"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "250000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ];
        assert_eq!(found(&containerd).unwrap(), (Some(1 << 20), Some(250_000), Some(100_000)));
        let crio = r#"{"cpu_period":50000,"cpu_quota":70000,"memory_limit_in_bytes":2097152}"#;
        assert_eq!(found(&[(CRIO[0], crio)]).unwrap(), (Some(2 << 20), Some(70_000), Some(50_000)));
        let none = [("io.kubernetes.cri.sandbox-memory", "0"), ("io.kubernetes.cri.sandbox-cpu-quota", "-1")];
        assert_eq!(found(&none).unwrap(), (None, None, None));
        assert_eq!(found(&[]).unwrap(), (None, None, None));
    }

    #[test]
    fn what_is_no_number_is_named() {
        for (name, value) in [("io.kubernetes.cri.sandbox-memory", "2Gi"), (CRIO[1], "lots")] {
            assert!(found(&[(name, value)]).unwrap_err().to_string().contains(name));
        }
    }
}
