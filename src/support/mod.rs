//! The promise: which field of config.json does what.
//!
//! One table ([`fields`]) for validation, for `features` and for the matrix in the README; a field that is missing
//! there is not promised and not refused (the spec asks runtimes to ignore properties they do not know). In:
//! config.json as JSON. Out: a refusal that names field, value and reason, or the warnings for fields that are
//! ignored. Touches nothing.

mod fields;
mod matrix;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use fields::FIELDS;
pub use matrix::{markdown, text};

/// A security module of the host's that can confine a VMM as config.json says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Module {
    /// apparmor(7)
    AppArmor,
    /// selinux(8)
    SeLinux,
}

impl Module {
    /// The field of `process` that is for it.
    pub fn field(self) -> &'static str {
        match self {
            Module::AppArmor => "apparmorProfile",
            Module::SeLinux => "selinuxLabel",
        }
    }
}

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It acts inside the VM.
    Guest,
    /// It acts on the host.
    Host,
    /// It acts on both sides.
    Both,
    /// It acts on the host where that has the module, and is ignored elsewhere, with this reason.
    Label(Module, &'static str),
    /// It changes nothing that matters here; warned about once, with this reason.
    Ignored(&'static str),
    /// It is refused with this reason.
    Refused(&'static str),
}

impl Support {
    /// Whether it acts anywhere.
    pub fn is_honoured(self) -> bool {
        matches!(self, Support::Guest | Support::Host | Support::Both | Support::Label(..))
    }
}

use Support::{Ignored, Label, Refused};

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

/// Checks every field of a config.json. The result holds one line for each ignored field that is set. `modules`: those
/// whose labels act.
pub fn check(config: &Value, modules: &[Module]) -> Result<Vec<String>, Refusal> {
    let mut warnings = Vec::new();
    walk(config, modules, ("", ""), &mut warnings)?;
    Ok(warnings)
}

/// What of the rows that begin with `start` is honoured: fields for `path.`, values for `path=`.
pub fn honoured(start: &str) -> Vec<&'static str> {
    let honoured = FIELDS.iter().filter(|field| field.support.is_honoured());
    honoured.filter_map(|field| field.path.strip_prefix(start)).collect()
}

/// Whether the row with this path is honoured.
pub fn is_honoured(path: &str) -> bool {
    honoured(path).contains(&"")
}

fn walk(
    value: &Value,
    modules: &[Module],
    (shown, path): (&str, &str),
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    if is_unset(value) {
        return Ok(());
    }
    if let Some(support) = lookup(path, value) {
        return match support {
            Refused(reason) => Err(Refusal { field: shown.into(), value: brief(value), reason }),
            Label(module, _) if modules.contains(&module) => Ok(()),
            Label(_, reason) | Ignored(reason) => {
                warnings.push(format!("{shown} {} is ignored: {reason}", brief(value)));
                Ok(())
            }
            _ => Ok(()),
        };
    }
    match value {
        Value::Object(fields) => {
            let dot = if path.is_empty() { "" } else { "." };
            for (name, value) in fields {
                let place = (&*format!("{shown}{dot}{name}"), &*format!("{path}{dot}{name}"));
                walk(value, modules, place, warnings)?;
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let place = (&*format!("{shown}[{index}]"), &*format!("{path}[]"));
                walk(item, modules, place, warnings)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The row for this value of the path, else for the path. Where there are values alone, another value is none.
fn lookup(path: &str, value: &Value) -> Option<Support> {
    let word = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let values: Vec<_> = FIELDS
        .iter()
        .filter_map(|field| Some((field.path.strip_prefix(path)?.strip_prefix('=')?, field.support)))
        .collect();
    let value = values.iter().find(|(known, _)| *known == word).map(|(_, support)| *support);
    let whole = || FIELDS.iter().find(|field| field.path == path).map(|field| field.support);
    let none = (!values.is_empty()).then_some(Refused("there is no such value"));
    value.or_else(whole).or(none)
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_set_field_that_is_not_supported_is_named_with_its_value() {
        for (config, words) in [
            (json!({"linux": {"netDevices": {"a": {"name": "b"}}}}), "linux.netDevices {\"a\":"),
            (json!({"linux": {"rootfsPropagation": "rshared"}}), "rootfsPropagation"),
            (
                json!({"linux": {"seccomp": {"syscalls": [{"names": ["a"]}, {"action": "SCMP_ACT_NOTIFY"}]}}}),
                "linux.seccomp.syscalls[1].action \"SCMP_ACT_NOTIFY\": the filter runs in the guest's kernel",
            ),
            (
                json!({"linux": {"seccomp": {"listenerPath": "/run/agent"}}}),
                "linux.seccomp.listenerPath \"/run/agent\"",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "pid"}, {"type": "x"}]}}),
                "linux.namespaces[1].type \"x\"",
            ),
        ] {
            let text = check(&config, &[]).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn every_field_of_the_spec_has_its_row() {
        let spec = include_str!("runtime-spec-1.3.txt").lines().filter(|line| !line.starts_with('#'));
        for path in spec {
            let covers = |field: &&fields::Field| {
                let shorter = |rest: &str| rest.is_empty() || rest.starts_with(['.', '[']);
                path.strip_prefix(field.path).is_some_and(shorter)
                    || field.path.strip_prefix(path).is_some_and(|rest| rest == "[]" || rest.starts_with('='))
            };
            assert!(FIELDS.iter().any(|field| covers(&field)), "{path} has no row");
        }
    }

    #[test]
    fn no_row_hides_another() {
        for (index, field) in FIELDS.iter().enumerate() {
            for (other_index, other) in FIELDS.iter().enumerate().filter(|(other, _)| *other != index) {
                let below = other
                    .path
                    .strip_prefix(field.path)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
                assert!(!below, "rows {index} {} and {other_index} {}", field.path, other.path);
            }
        }
    }

    #[test]
    fn names_are_listed_as_features_needs_them() {
        assert!(honoured("linux.namespaces[].type=").contains(&"pid"));
        assert_eq!(honoured("linux.rootfsPropagation=").len(), 6);
        assert_eq!(honoured("windows."), Vec::<&str>::new());
    }

    #[test]
    fn empty_means_absent_and_unknown_is_none_of_our_business() {
        let config = json!({
            "process": {"terminal": false, "args": ["a"]}, "x-vendor": {"a": 1},
            "linux": {"seccomp": null, "sysctl": {}, "resources": {"devices": [{"allow": false, "access": "rwm"}]}}
        });
        assert_eq!(check(&config, &[]), Ok(vec![]));
    }

    #[test]
    fn ignored_fields_warn_once_each() {
        let config = json!({"process": {"apparmorProfile": "docker-default", "selinuxLabel": "a"}, "linux": {"mountLabel": "l",
            "resources": {"memory": {"limit": 5, "swap": 9, "swappiness": 0}}}});
        let warnings = check(&config, &[]).unwrap();
        assert_eq!(warnings.len(), 4);
        assert!(
            warnings.iter().any(|w| w.starts_with("process.apparmorProfile \"docker-default\" is ignored"))
        );
        for module in [Module::AppArmor, Module::SeLinux] {
            let warnings = check(&config, &[module]).unwrap();
            assert!(
                warnings.len() == 3 && !warnings.iter().any(|w| w.contains(module.field())),
                "{warnings:?}"
            );
        }
    }
}
