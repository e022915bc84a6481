//! Which VM a container lives in, by the annotations with which engines group containers into pods.
//!
//! In: annotations. Out: a [`Role`]. Touches no file and no process. Must not: guess where an engine says something
//! that it does not understand.

use std::collections::HashMap;

use anyhow::{Result, bail};

const CONTAINERD_TYPE: &str = "io.kubernetes.cri.container-type";
const CONTAINERD_ID: &str = "io.kubernetes.cri.sandbox-id";
/// CRI-O's word for what a container is to its pod.
pub const CRIO_TYPE: &str = "io.kubernetes.cri-o.ContainerType";
/// CRI-O's name of a container's pod. podman sets it too, and no type beside it.
pub const CRIO_ID: &str = "io.kubernetes.cri-o.SandboxID";

/// A container's place among VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// It has a VM of its own.
    #[default]
    Alone,
    /// It starts a pod's VM and holds it, and runs nothing in it.
    Sandbox,
    /// It lives in another container's VM.
    Member {
        /// That container's id.
        sandbox: String,
        /// What it means that there is no such container.
        absent: Absent,
    },
}

/// What it means that a member's sandbox is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// An error: the engine has created it before.
    Refused,
    /// The container is the first: whoever comes first has to make it.
    Made,
    /// The pod has no container of ours that holds it, so there is nothing to join.
    Alone,
}

/// Reads the annotations.
pub fn role(annotations: &HashMap<String, String>) -> Result<Role> {
    let get = |name: &str| annotations.get(name).map(String::as_str);
    for (key, id_key, absent) in
        [(CONTAINERD_TYPE, CONTAINERD_ID, Absent::Refused), (CRIO_TYPE, CRIO_ID, Absent::Made)]
    {
        match (get(key), get(id_key)) {
            (None, _) => {}
            (Some("sandbox"), _) => return Ok(Role::Sandbox),
            (Some("container"), Some(id)) if !id.is_empty() => {
                return Ok(Role::Member { sandbox: id.into(), absent });
            }
            (Some("container"), _) => bail!("annotation {id_key}: missing, which {key}=container needs"),
            (Some(text), _) => bail!("annotation {key}: {text:?} is none of sandbox, container"),
        }
    }
    Ok(match get(CRIO_ID).filter(|id| !id.is_empty()) {
        Some(id) => Role::Member { sandbox: id.into(), absent: Absent::Alone },
        None => Role::Alone,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role_of(list: &[(&str, &str)]) -> Result<Role> {
        role(&list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    #[test]
    fn engines_say_who_holds_a_pod_and_who_joins_it() {
        let member = |absent| Role::Member { sandbox: "s1".into(), absent };
        for (annotations, expected) in [
            (&[][..], Role::Alone),
            (&[("io.kubernetes.cri.container-name", "c")], Role::Alone),
            (&[(CONTAINERD_TYPE, "sandbox"), (CONTAINERD_ID, "s1")], Role::Sandbox),
            (&[(CONTAINERD_TYPE, "container"), (CONTAINERD_ID, "s1")], member(Absent::Refused)),
            (&[(CRIO_TYPE, "sandbox"), (CRIO_ID, "s1")], Role::Sandbox),
            (&[(CRIO_TYPE, "container"), (CRIO_ID, "s1")], member(Absent::Made)),
            (&[(CRIO_ID, "s1")], member(Absent::Alone)),
            (&[(CRIO_ID, "")], Role::Alone),
        ] {
            assert_eq!(role_of(annotations).unwrap(), expected, "{annotations:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (annotations, words) in [
            (&[(CONTAINERD_TYPE, "pod")][..], "container-type: \"pod\""),
            (&[(CONTAINERD_TYPE, "container")], "sandbox-id: missing"),
            (&[(CRIO_TYPE, "container"), (CRIO_ID, "")], "SandboxID: missing"),
        ] {
            let text = role_of(annotations).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }
}
