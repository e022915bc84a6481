//! `linux.sysctl`: kernel parameters of the container's own namespaces.
//!
//! In: names and values, the namespaces of config.json. Out: paths below /proc/sys and values for the guest. Refusals
//! are runc's, word for word. Must not: let a parameter through that belongs to the whole guest.

use std::path::PathBuf;

use anyhow::{Result, bail};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// Parameters of the ipc namespace, beside all of `fs.mqueue.`.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Checks them all; in the order of their names, as a map has none.
pub fn plan(spec: &Spec) -> Result<Vec<(PathBuf, String)>> {
    let Some(linux) = spec.linux() else { return Ok(Vec::new()) };
    let namespaces: Vec<_> = linux.namespaces().iter().flatten().map(|namespace| namespace.typ()).collect();
    let mut wanted: Vec<_> = linux.sysctl().iter().flatten().collect();
    wanted.sort();
    let mut planned = Vec::new();
    for (name, value) in wanted {
        let name = dotted(name);
        check(&name, &namespaces)?;
        planned.push((path(&name)?, value.clone()));
    }
    Ok(planned)
}

/// `net/ipv4/conf/eth0.1/forwarding` as `net.ipv4.conf.eth0/1.forwarding`, as sysctl(8) does.
fn dotted(name: &str) -> String {
    if name.find(['.', '/']).is_some_and(|at| name[at..].starts_with('/')) {
        swapped(name)
    } else {
        name.into()
    }
}

fn swapped(name: &str) -> String {
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    name.chars().map(swap).collect()
}

fn check(name: &str, namespaces: &[LinuxNamespaceType]) -> Result<()> {
    let own = |kind| namespaces.contains(&kind);
    if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        if !own(LinuxNamespaceType::Ipc) {
            bail!("linux.sysctl: sysctl {name:?} is not allowed in the hosts ipc namespace");
        }
        return Ok(());
    }
    if name.starts_with("net.") {
        if !own(LinuxNamespaceType::Network) {
            bail!("linux.sysctl: sysctl {name:?} not allowed in host network namespace");
        }
        return Ok(());
    }
    match name {
        "kernel.domainname" if own(LinuxNamespaceType::Uts) => Ok(()),
        "kernel.hostname" if own(LinuxNamespaceType::Uts) => {
            bail!(
                "linux.sysctl: sysctl {name:?} is not allowed as it conflicts with the OCI \"hostname\" field"
            )
        }
        _ => bail!("linux.sysctl: sysctl {name:?} is not in a separate kernel namespace"),
    }
}

fn path(name: &str) -> Result<PathBuf> {
    let path = swapped(name);
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        bail!("linux.sysctl: sysctl {name:?} is not the name of a parameter");
    }
    Ok(path.into())
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use serde_json::json;

    fn planned(names: &[&str], kinds: &[&str]) -> Result<Vec<(PathBuf, String)>> {
        plan(&spec(|v| {
            v["linux"]["namespaces"] = kinds.iter().map(|kind| json!({ "type": kind })).collect();
            v["linux"]["sysctl"] = names.iter().map(|name| (name.to_string(), json!("1"))).collect();
        }))
    }

    #[test]
    fn parameters_of_own_namespaces_pass() {
        let names = [
            "net.ipv4.ping_group_range",
            "net/ipv4/conf/eth0.1/forwarding",
            "kernel.sem",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ];
        let planned = planned(&names, &["network", "ipc", "uts"]).unwrap();
        let paths: Vec<_> = planned.iter().map(|(path, _)| path.to_str().unwrap()).collect();
        let mut expected = [
            "net/ipv4/ping_group_range",
            "net/ipv4/conf/eth0.1/forwarding",
            "kernel/sem",
            "fs/mqueue/msg_max",
            "kernel/domainname",
        ];
        expected.sort_by_key(|path| names[names.iter().position(|n| dotted(n) == swapped(path)).unwrap()]);
        assert_eq!(paths, expected);
    }

    #[test]
    fn the_rest_is_refused_in_runcs_words() {
        let all = ["network", "ipc", "uts"];
        for (name, kinds, words) in [
            ("vm.swappiness", &all[..], "sysctl \"vm.swappiness\" is not in a separate kernel namespace"),
            ("kernel.core_pattern", &all, "is not in a separate kernel namespace"),
            ("kernel.hostname", &all, "conflicts with the OCI \"hostname\" field"),
            ("kernel.shmmax", &["network"], "is not allowed in the hosts ipc namespace"),
            ("net.ipv4.ip_forward", &["ipc"], "not allowed in host network namespace"),
            ("kernel.domainname", &["ipc"], "is not in a separate kernel namespace"),
            ("net.../kernel", &all, "is not the name of a parameter"),
            ("net/../kernel/core_pattern", &all, "is not the name of a parameter"),
            ("net.", &all, "is not the name of a parameter"),
            ("", &all, "is not in a separate kernel namespace"),
        ] {
            let text = planned(&[name], kinds).unwrap_err().to_string();
            assert!(text.starts_with("linux.sysctl: ") && text.contains(words), "{name}: {text}");
        }
    }
}
