//! Hooks, checked and sorted by when they run.
//!
//! In: config.json. Out: [`Hooks`]. Touches nothing: whether a program is there is seen when it is run.

use std::collections::HashMap;
use std::path::Path;

use a3s_box_proto::Hook;
use anyhow::{Result, bail};
use oci_spec::runtime::{self as oci, Spec};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Kinds of hooks, in the order in which they run.
pub const KINDS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// A container's hooks, one list a kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Hooks {
    /// By `create`, in its own namespaces.
    pub prestart: Vec<Hook>,
    /// The same, after them.
    pub create_runtime: Vec<Hook>,
    /// By the monitor, where it assembles the container's tree.
    pub create_container: Vec<Hook>,
    /// By the container's first process, in the guest.
    pub start_container: Vec<Hook>,
    /// By `start`, once the program runs.
    pub poststart: Vec<Hook>,
    /// By `delete`, once nothing is left.
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// Whether any of them has to run before the VM boots.
    pub fn any_at_create(&self) -> bool {
        [&self.prestart, &self.create_runtime, &self.create_container].iter().any(|list| !list.is_empty())
    }
}

/// Takes the hooks out of a config.json.
pub fn plan(spec: &Spec) -> Result<Hooks> {
    let Some(hooks) = spec.hooks() else { return Ok(Hooks::default()) };
    #[allow(deprecated, reason = "engines still use prestart hooks, so does the spec's table of them")]
    let prestart = hooks.prestart();
    Ok(Hooks {
        prestart: list(KINDS[0], prestart)?,
        create_runtime: list(KINDS[1], hooks.create_runtime())?,
        create_container: list(KINDS[2], hooks.create_container())?,
        start_container: list(KINDS[3], hooks.start_container())?,
        poststart: list(KINDS[4], hooks.poststart())?,
        poststop: list(KINDS[5], hooks.poststop())?,
    })
}

fn list(kind: &str, hooks: &Option<Vec<oci::Hook>>) -> Result<Vec<Hook>> {
    hooks.iter().flatten().enumerate().map(|(n, hook)| one(&format!("hooks.{kind}[{n}]"), hook)).collect()
}

fn one(field: &str, hook: &oci::Hook) -> Result<Hook> {
    let path = hook.path();
    if !path.is_absolute() {
        bail!("{field}.path: {:?} is not absolute", path);
    }
    let timeout = match hook.timeout() {
        Some(seconds) if seconds < 1 => bail!("{field}.timeout: {seconds} is not greater than zero"),
        timeout => timeout.map(|seconds| seconds as u64),
    };
    let args = hook.args().clone().unwrap_or_default();
    let env = hook.env().clone();
    let texts = args.iter().chain(env.iter().flatten()).map(String::as_str).chain(path.to_str());
    if let Some(text) = texts.into_iter().find(|text| text.contains('\0')) {
        bail!("{field}: {text:?} holds a NUL byte");
    }
    Ok(Hook { path: path.clone(), args, env, timeout })
}

/// The state of runtime.md that hooks get, without status and pid.
pub fn state(version: &str, id: &str, bundle: &Path, annotations: &HashMap<String, String>) -> Value {
    let mut state = json!({ "ociVersion": version, "id": id, "bundle": bundle });
    if !annotations.is_empty() {
        state["annotations"] = json!(annotations);
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(hooks: Value) -> Result<Hooks> {
        plan(&super::super::tests::spec(|v| v["hooks"] = hooks))
    }

    #[test]
    fn every_kind_keeps_its_order() {
        for kind in KINDS {
            let hooks = json!({ kind: [{"path": "/a", "args": ["a", "b"], "timeout": 5}, {"path": "/b", "env": []}] });
            let value = serde_json::to_value(planned(hooks).unwrap()).unwrap();
            let lists: Vec<_> =
                value.as_object().unwrap().values().filter(|list| *list != &json!([])).collect();
            let expected = json!([
                {"path": "/a", "args": ["a", "b"], "env": null, "timeout": 5},
                {"path": "/b", "args": [], "env": [], "timeout": null}
            ]);
            assert_eq!(lists, [&expected], "{kind}");
        }
    }

    #[test]
    fn what_the_spec_forbids_is_named() {
        for (hook, words) in [
            (json!({"path": "true"}), "hooks.poststop[0].path: \"true\" is not absolute"),
            (json!({"path": "/a", "timeout": 0}), "hooks.poststop[0].timeout: 0 is not greater than zero"),
            (json!({"path": "/a", "timeout": -5}), "hooks.poststop[0].timeout: -5"),
            (json!({"path": "/a", "args": ["a\0"]}), "hooks.poststop[0]: \"a\\0\" holds a NUL byte"),
        ] {
            let text = planned(json!({ "poststop": [hook] })).unwrap_err().to_string();
            assert!(text.starts_with(words), "{text}");
        }
    }
}
