//! The promise: which field of config.json does what.
//!
//! One table for validation; a field of the spec that is missing here is not promised and not refused (the spec asks
//! runtimes to ignore properties they do not know). In: config.json as JSON. Out: a refusal that names field, value
//! and reason, or the warnings for fields that are ignored. Touches nothing.

use std::fmt;

use serde_json::Value;

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It acts.
    Honoured,
    /// It changes nothing that matters here; warned about once, with this reason.
    Ignored(&'static str),
    /// It is refused with this reason.
    Refused(&'static str),
}

use Support::{Honoured, Ignored, Refused};

const NOT_YET: &str = "not supported";
const NO_LSM: &str = "the guest kernel has no such security module";

/// Fields by path; `[]` stands for any element. A path covers everything below it that has no longer entry.
pub const FIELDS: &[(&str, Support)] = &[
    ("ociVersion", Honoured),
    ("root", Honoured),
    ("mounts", Honoured),
    ("mounts[].uidMappings", Refused(NOT_YET)),
    ("mounts[].gidMappings", Refused(NOT_YET)),
    ("process", Honoured),
    ("process.terminal", Refused(NOT_YET)),
    ("process.consoleSize", Honoured),
    ("process.apparmorProfile", Ignored(NO_LSM)),
    ("process.selinuxLabel", Ignored(NO_LSM)),
    ("process.scheduler", Refused(NOT_YET)),
    ("process.ioPriority", Refused(NOT_YET)),
    ("process.execCPUAffinity", Refused(NOT_YET)),
    ("hostname", Honoured),
    ("domainname", Honoured),
    ("annotations", Honoured),
    ("hooks", Refused(NOT_YET)),
    ("linux.namespaces", Honoured),
    ("linux.cgroupsPath", Honoured),
    ("linux.maskedPaths", Honoured),
    ("linux.readonlyPaths", Honoured),
    ("linux.mountLabel", Ignored(NO_LSM)),
    ("linux.rootfsPropagation", Honoured),
    ("linux.uidMappings", Refused(NOT_YET)),
    ("linux.gidMappings", Refused(NOT_YET)),
    ("linux.timeOffsets", Refused(NOT_YET)),
    ("linux.devices", Refused(NOT_YET)),
    ("linux.netDevices", Refused(NOT_YET)),
    ("linux.sysctl", Refused(NOT_YET)),
    ("linux.seccomp", Refused(NOT_YET)),
    ("linux.intelRdt", Refused(NOT_YET)),
    ("linux.memoryPolicy", Refused(NOT_YET)),
    ("linux.personality", Refused(NOT_YET)),
    ("linux.resources.devices", Honoured),
    ("linux.resources.memory.limit", Honoured),
    ("linux.resources.memory", Refused(NOT_YET)),
    ("linux.resources.cpu.quota", Honoured),
    ("linux.resources.cpu.period", Honoured),
    ("linux.resources.cpu.shares", Honoured),
    ("linux.resources.cpu.cpus", Honoured),
    ("linux.resources.cpu", Refused(NOT_YET)),
    ("linux.resources.pids", Honoured),
    ("linux.resources", Refused(NOT_YET)),
    ("linux", Honoured),
    ("vm", Refused(NOT_YET)),
    ("solaris", Refused("this is a Linux runtime")),
    ("windows", Refused("this is a Linux runtime")),
    ("zos", Refused("this is a Linux runtime")),
    ("freebsd", Refused("this is a Linux runtime")),
];

/// Types of namespaces that the spec knows.
const NAMESPACES: [&str; 8] = ["pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"];

/// A field that cannot be honoured.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    field: String,
    value: String,
    reason: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.field, self.value, self.reason)
    }
}

impl std::error::Error for Refusal {}

/// Checks every field of a config.json. The result holds one line for each ignored field that is set.
pub fn check(config: &Value) -> Result<Vec<String>, Refusal> {
    let mut warnings = Vec::new();
    walk(config, "", "", &mut warnings)?;
    values(config)?;
    Ok(warnings)
}

fn walk(value: &Value, shown: &str, path: &str, warnings: &mut Vec<String>) -> Result<(), Refusal> {
    if is_unset(value) {
        return Ok(());
    }
    let support = lookup(path);
    let has_longer = FIELDS
        .iter()
        .any(|(entry, _)| entry.strip_prefix(path).is_some_and(|rest| rest.starts_with(['.', '['])));
    match (support, value) {
        (_, Value::Object(fields)) if has_longer || path.is_empty() => {
            for (name, value) in fields {
                let dot = if path.is_empty() { "" } else { "." };
                walk(value, &format!("{shown}{dot}{name}"), &format!("{path}{dot}{name}"), warnings)?;
            }
            Ok(())
        }
        (_, Value::Array(items)) if has_longer => {
            for (index, item) in items.iter().enumerate() {
                walk(item, &format!("{shown}[{index}]"), &format!("{path}[]"), warnings)?;
            }
            Ok(())
        }
        (Some(Refused(reason)), value) => Err(Refusal { field: shown.into(), value: brief(value), reason }),
        (Some(Ignored(reason)), value) => {
            warnings.push(format!("{shown} {} is ignored: {reason}", brief(value)));
            Ok(())
        }
        (Some(Honoured) | None, _) => Ok(()),
    }
}

/// The entry for the path or its nearest parent.
fn lookup(path: &str) -> Option<Support> {
    let covers = |entry: &str| {
        path.strip_prefix(entry).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    FIELDS
        .iter()
        .filter(|(entry, _)| covers(entry))
        .max_by_key(|(entry, _)| entry.len())
        .map(|(_, support)| *support)
}

/// Absent, or as good as absent.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_unset),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Fields of which only some values can be honoured.
fn values(config: &Value) -> Result<(), Refusal> {
    let linux = &config["linux"];
    for (index, namespace) in linux["namespaces"].as_array().into_iter().flatten().enumerate() {
        if !NAMESPACES.contains(&namespace["type"].as_str().unwrap_or_default()) {
            let field = format!("linux.namespaces[{index}].type");
            return Err(Refusal {
                field,
                value: brief(&namespace["type"]),
                reason: "there is no such namespace",
            });
        }
    }
    if let Some(mode @ ("shared" | "rshared")) = linux["rootfsPropagation"].as_str() {
        let reason = "a guest's mounts cannot propagate to the host";
        return Err(Refusal { field: "linux.rootfsPropagation".into(), value: format!("{mode:?}"), reason });
    }
    for (index, rule) in linux["resources"]["devices"].as_array().into_iter().flatten().enumerate() {
        if rule["allow"] == Value::Bool(true) {
            let field = format!("linux.resources.devices[{index}]");
            return Err(Refusal { field, value: brief(rule), reason: "allowing devices is not supported" });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_set_field_that_is_not_supported_is_named_with_its_value() {
        for (config, words) in [
            (json!({"hooks": {"prestart": [{"path": "/x"}]}}), "hooks"),
            (json!({"linux": {"sysctl": {"net.a": "1"}}}), "linux.sysctl {\"net.a\":\"1\"}"),
            (
                json!({"linux": {"resources": {"memory": {"limit": 5, "swap": 9}}}}),
                "linux.resources.memory.swap 9",
            ),
            (json!({"linux": {"resources": {"blockIO": {"weight": 10}}}}), "linux.resources.blockIO"),
            (
                json!({"mounts": [{"destination": "/a"}, {"uidMappings": [{"hostID": 1}]}]}),
                "mounts[1].uidMappings",
            ),
            (json!({"linux": {"rootfsPropagation": "rshared"}}), "rootfsPropagation"),
            (json!({"linux": {"resources": {"devices": [{"allow": true, "access": "rwm"}]}}}), "devices[0]"),
            (json!({"process": {"terminal": true}}), "process.terminal true"),
            (
                json!({"linux": {"namespaces": [{"type": "pid"}, {"type": "x"}]}}),
                "linux.namespaces[1].type \"x\"",
            ),
        ] {
            let text = check(&config).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn empty_means_absent_and_unknown_is_none_of_our_business() {
        let config = json!({
            "hooks": {"prestart": []}, "process": {"terminal": false, "args": ["a"]}, "x-vendor": {"a": 1},
            "linux": {"seccomp": null, "sysctl": {}, "resources": {"devices": [{"allow": false, "access": "rwm"}]}}
        });
        assert_eq!(check(&config), Ok(vec![]));
    }

    #[test]
    fn ignored_fields_warn_once_each() {
        let config = json!({"process": {"apparmorProfile": "docker-default"}, "linux": {"mountLabel": "l"}});
        let warnings = check(&config).unwrap();
        assert_eq!(warnings.len(), 2);
        assert!(
            warnings.iter().any(|w| w.starts_with("process.apparmorProfile \"docker-default\" is ignored"))
        );
    }
}
