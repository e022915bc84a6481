//! What the host's administrator decides about VMs, and what a container's annotations may decide instead.
//!
//! One table ([`KEYS`]) for the configuration file, the annotations, `check` and the documentation. In: names and
//! values. Out: [`Settings`]. Must not: read a file, or let an annotation through that the configuration does not allow.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::network::{DEFAULT_NICS, MOST_NICS, Mode};
use super::vm::{DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MAX_VCPUS, MIN_MEMORY_MIB};

/// The configuration file.
pub const FILE: &str = "/etc/a3s-box/config.toml";
/// What the names of annotations that act begin with.
pub const PREFIX: &str = "a3s.box/";
/// The annotation of `state` that says in whose VM a container lives. A key of its own would be news to engines that read
/// `state` into what they know.
pub const SANDBOX: &str = "a3s.box/sandbox";
/// What annotations may say unless the configuration decides: nothing that gives the VMM more rights than without
/// them, or another path.
const ALLOWED: [&str; 5] = ["memory-mib", "network-mode=none", "network-mode=tap", "nics", "vcpus"];

/// What was decided; `None` where nothing was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Virtual CPUs.
    pub vcpus: Option<u8>,
    /// RAM in MiB.
    pub memory_mib: Option<u32>,
    /// NICs.
    pub nics: Option<u8>,
    /// How the VM is connected.
    pub network_mode: Option<Mode>,
    /// Where libkrunfw lies.
    pub libkrunfw: Option<PathBuf>,
    /// Annotations that act: a name, or a name and one value, `name=value`.
    pub allowed_annotations: Option<Vec<String>>,
}

/// One thing that can be decided.
pub struct Key {
    /// Its name in the configuration file; behind [`PREFIX`] the annotation's.
    pub name: &'static str,
    /// What it decides, in the words of the documentation.
    pub about: &'static str,
    /// What its values are, as the end of "… is not".
    pub values: &'static str,
    /// Whether there is an annotation of this name.
    pub is_annotation: bool,
    /// Takes a value; false for one that is not of its values.
    set: fn(&mut Settings, &Value) -> bool,
    get: fn(&Settings) -> Option<Value>,
}

/// All of them.
pub const KEYS: &[Key] = &[
    Key {
        name: "vcpus",
        about: "Virtual CPUs of a VM whose container has neither a CPU quota nor a CPU set.",
        values: "a number from 1 to 16",
        is_annotation: true,
        set: |settings, value| put(&mut settings.vcpus, number(value, 1..=MAX_VCPUS)),
        get: |settings| settings.vcpus.map(Value::from),
    },
    Key {
        name: "memory-mib",
        about: "RAM, in MiB, of a VM whose container has no memory limit. The host gives it as it is used.",
        values: "a number of MiB from 96 (the least that boots)",
        is_annotation: true,
        set: |settings, value| put(&mut settings.memory_mib, number(value, MIN_MEMORY_MIB..=u32::MAX)),
        get: |settings| settings.memory_mib.map(Value::from),
    },
    Key {
        name: "nics",
        about: "Network interfaces that a VM has room for where its network namespace is new, so that they come later.",
        values: "a number from 0 to 6",
        is_annotation: true,
        set: |settings, value| put(&mut settings.nics, number(value, 0..=MOST_NICS)),
        get: |settings| settings.nics.map(Value::from),
    },
    Key {
        name: "network-mode",
        about: "How VMs are connected. `tap`: a NIC for each interface of the network namespace; a container in the \
                host's is refused. `tsi`: sockets are made on the host. `none`: not at all. `auto`: `tsi` in the \
                host's network namespace, else `tap`.",
        values: "one of auto, tap, tsi, none",
        is_annotation: true,
        set: |settings, value| put(&mut settings.network_mode, value.as_str().and_then(Mode::of)),
        get: |settings| settings.network_mode.map(|mode| mode.word().into()),
    },
    Key {
        name: "libkrunfw",
        about: "The library that holds the guest kernel. Without this key the dynamic linker finds libkrunfw.so.5.",
        values: "an absolute path",
        is_annotation: true,
        set: |settings, value| {
            let path = value.as_str().map(PathBuf::from).filter(|path| path.is_absolute());
            put(&mut settings.libkrunfw, path)
        },
        get: |settings| settings.libkrunfw.as_ref().map(|path| path.to_string_lossy().into()),
    },
    Key {
        name: "allowed-annotations",
        about: "Which of the keys above a container may decide for itself by an annotation a3s.box/KEY: names, or \
                names and one value, as in \"network-mode=tsi\". Any other annotation a3s.box/… is ignored with \
                a warning. What gives the VMM more rights (tsi) or another path (libkrunfw) is not allowed unless it is \
                listed here.",
        values: "a list of keys that are annotations, or \"KEY=VALUE\"",
        is_annotation: false,
        set: |settings, value| put(&mut settings.allowed_annotations, annotations(value)),
        get: |settings| settings.allowed_annotations.clone().map(Value::from),
    },
];

fn acting(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.is_annotation && key.name == name)
}

/// A line for each annotation that reads like one of ours and is none: config.md, "Annotations", wants it tolerated.
pub fn unknown(annotations: &HashMap<String, String>) -> Vec<String> {
    let is_idle = |name: &&String| name.strip_prefix(PREFIX).is_some_and(|key| acting(key).is_none());
    let mut names: Vec<_> = annotations.keys().filter(is_idle).filter(|name| *name != SANDBOX).collect();
    names.sort();
    let known: Vec<_> = KEYS.iter().filter(|key| key.is_annotation).map(|key| key.name).collect();
    let line =
        |name| format!("annotation {name} is ignored: those that act are {PREFIX}{{{}}}", known.join(", "));
    names.into_iter().map(line).collect()
}

/// The table in Markdown, as the README shows it.
pub fn markdown() -> String {
    let mut text = "| key | is | built-in | |\n|---|---|---|---|\n".to_string();
    for key in KEYS {
        let built_in = key.built_in().map_or(String::new(), |value| format!("`{value}`"));
        text += &format!("| `{}` | {} | {built_in} | {} |\n", key.name, key.values, key.about);
    }
    text
}

/// A configuration file that changes nothing, to start from.
pub fn text() -> String {
    let example = |key: &Key| {
        let value = key.built_in().unwrap_or("/usr/lib/libkrunfw.so.5".into());
        format!("# {}\n# It is {}.\n#{} = {value}\n", key.about, key.values, key.name)
    };
    KEYS.iter().map(example).collect::<Vec<_>>().join("\n")
}

fn put<T>(place: &mut Option<T>, value: Option<T>) -> bool {
    *place = value;
    place.is_some()
}

fn number<T: TryFrom<u64> + PartialOrd>(value: &Value, range: RangeInclusive<T>) -> Option<T> {
    T::try_from(value.as_u64()?).ok().filter(|number| range.contains(number))
}

fn annotations(value: &Value) -> Option<Vec<String>> {
    let is_known = |text: &str| {
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let key = KEYS.iter().find(|key| key.is_annotation && key.name == name);
        key.is_some_and(|key| value.is_none_or(|value| (key.set)(&mut Settings::default(), &typed(value))))
    };
    let words = value.as_array()?.iter().map(|item| item.as_str().filter(|text| is_known(text)));
    words.map(|word| word.map(str::to_owned)).collect()
}

/// An annotation's text as the configuration file would write it.
fn typed(text: &str) -> Value {
    text.parse::<u64>().map_or_else(|_| text.into(), Value::from)
}

impl Key {
    /// What was decided about it.
    pub fn get(&self, settings: &Settings) -> Option<Value> {
        (self.get)(settings)
    }

    /// What it is where nobody decides.
    pub fn built_in(&self) -> Option<Value> {
        self.get(&Settings::built_in())
    }
}

impl Settings {
    /// What holds where nobody decides.
    pub fn built_in() -> Self {
        Settings {
            vcpus: Some(DEFAULT_VCPUS),
            memory_mib: Some(DEFAULT_MEMORY_MIB),
            nics: Some(DEFAULT_NICS),
            network_mode: Some(Mode::Auto),
            libkrunfw: None,
            allowed_annotations: Some(ALLOWED.map(str::to_owned).into()),
        }
    }

    /// Decides one thing.
    pub fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        let Some(key) = KEYS.iter().find(|key| key.name == name) else {
            let names: Vec<_> = KEYS.iter().map(|key| key.name).collect();
            bail!("{name}: is none of the keys that there are ({})", names.join(", "))
        };
        if !(key.set)(self, value) {
            bail!("{name}: {value} is not {}", key.values);
        }
        Ok(())
    }

    /// What a container's annotations decide.
    pub fn annotated(&self, annotations: &HashMap<String, String>) -> Result<Settings> {
        let built_in = Settings::built_in();
        let allowed = self.allowed_annotations.as_ref().or(built_in.allowed_annotations.as_ref());
        let allowed = allowed.context("allowed-annotations")?;
        let mut asked = Settings::default();
        let mut ours: Vec<_> =
            annotations.iter().filter_map(|(name, text)| Some((name.strip_prefix(PREFIX)?, text))).collect();
        ours.sort();
        for (name, text) in ours {
            let Some(key) = acting(name) else { continue };
            if !(key.set)(&mut asked, &typed(text)) {
                bail!("annotation {PREFIX}{name}: {text:?} is not {}", key.values);
            }
            if !allowed.iter().any(|word| word == name || *word == format!("{name}={text}")) {
                bail!(
                    "annotation {PREFIX}{name}: {text:?} is not allowed on this host (allowed-annotations in {FILE})"
                );
            }
        }
        Ok(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_about_values_are_true() {
        let about = |name: &str| KEYS.iter().find(|key| key.name == name).unwrap().values;
        assert!(about("vcpus").contains(&MAX_VCPUS.to_string()));
        assert!(about("memory-mib").contains(&MIN_MEMORY_MIB.to_string()));
        assert!(about("nics").contains(&MOST_NICS.to_string()));
        for key in KEYS {
            assert_eq!(key.get(&Settings::built_in()).is_some(), key.name != "libkrunfw", "{}", key.name);
        }
    }

    #[test]
    fn the_readme_shows_the_table() {
        let readme = include_str!("../../README.md");
        assert!(readme.contains(&markdown()), "README.md is behind: run scripts/matrix");
    }

    #[test]
    fn what_is_set_is_shown() {
        let mut settings = Settings::default();
        for (name, value) in [
            ("vcpus", json!(16)),
            ("memory-mib", json!(96)),
            ("nics", json!(0)),
            ("network-mode", json!("tsi")),
            ("libkrunfw", json!("/opt/libkrunfw.so")),
            ("allowed-annotations", json!(["vcpus", "network-mode=tsi", "libkrunfw"])),
        ] {
            settings.set(name, &value).unwrap();
            let key = KEYS.iter().find(|key| key.name == name).unwrap();
            assert_eq!(key.get(&settings), Some(value));
        }
        assert!(KEYS.iter().all(|key| key.get(&Settings::default()).is_none()));
    }

    #[test]
    fn senseless_values_are_named() {
        for (name, value, words) in [
            ("vcpus", json!(0), "vcpus: 0 is not a number from 1 to 16"),
            ("vcpus", json!(17), "vcpus: 17 is not"),
            ("vcpus", json!("2"), "vcpus: \"2\" is not"),
            ("vcpus", json!(2.5), "vcpus: 2.5 is not"),
            ("memory-mib", json!(-1), "memory-mib: -1 is not"),
            ("memory-mib", json!(u64::MAX), "memory-mib: 18446744073709551615 is not"),
            ("nics", json!(7), "nics: 7 is not"),
            ("network-mode", json!("bridge"), "network-mode: \"bridge\" is not one of auto, tap, tsi, none"),
            ("libkrunfw", json!("libkrunfw.so"), "libkrunfw: \"libkrunfw.so\" is not an absolute path"),
            ("allowed-annotations", json!("vcpus"), "allowed-annotations: \"vcpus\" is not a list"),
            ("allowed-annotations", json!(["cpus"]), "allowed-annotations: [\"cpus\"] is not"),
            ("allowed-annotations", json!(["network-mode=x"]), "[\"network-mode=x\"] is not"),
            ("allowed-annotations", json!(["allowed-annotations"]), "is not a list"),
            ("memory", json!(512), "memory: is none of the keys that there are (vcpus, memory-mib, "),
        ] {
            let text = Settings::default().set(name, &value).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    fn annotated(settings: &Settings, name: &str, text: &str) -> Result<Settings> {
        settings.annotated(&HashMap::from([(name.to_string(), text.to_string())]))
    }

    #[test]
    fn annotations_decide_what_they_may() {
        let host = Settings::default();
        assert_eq!(annotated(&host, "a3s.box/vcpus", "3").unwrap().vcpus, Some(3));
        assert_eq!(annotated(&host, "a3s.box/network-mode", "none").unwrap().network_mode, Some(Mode::None));
        assert_eq!(annotated(&host, "org.example/vcpus", "x").unwrap(), Settings::default());
        for (name, text, words) in [
            ("vcpus", "0", "vcpus: \"0\" is not a number"),
            ("memory-mib", "lots", "memory-mib: \"lots\" is not a number"),
            ("network-mode", "tsi", "network-mode: \"tsi\" is not allowed on this host"),
            ("network-mode", "auto", "network-mode: \"auto\" is not allowed on this host"),
            ("libkrunfw", "/evil.so", "libkrunfw: \"/evil.so\" is not allowed on this host"),
        ] {
            let text = annotated(&host, &format!("a3s.box/{name}"), text).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn an_unknown_one_is_told_and_changes_nothing() {
        for name in ["memory", "allowed-annotations"] {
            let one = HashMap::from([(format!("a3s.box/{name}"), "5".to_string())]);
            assert_eq!(Settings::default().annotated(&one).unwrap(), Settings::default());
            let lines = unknown(&one);
            assert!(lines[0].starts_with(&format!("annotation a3s.box/{name} is ignored: ")), "{lines:?}");
        }
        let fine = ["a3s.box/vcpus", SANDBOX, "org.example/x"].map(|name| (name.to_string(), String::new()));
        assert_eq!(unknown(&fine.into()), [""; 0]);
    }

    #[test]
    fn the_host_says_which() {
        let mut host = Settings::default();
        host.set("allowed-annotations", &json!(["libkrunfw", "network-mode=tsi"])).unwrap();
        assert_eq!(annotated(&host, "a3s.box/libkrunfw", "/a.so").unwrap().libkrunfw, Some("/a.so".into()));
        assert_eq!(annotated(&host, "a3s.box/network-mode", "tsi").unwrap().network_mode, Some(Mode::Tsi));
        for (name, text) in [("network-mode", "tap"), ("vcpus", "1")] {
            let text = annotated(&host, &format!("a3s.box/{name}"), text).unwrap_err().to_string();
            assert!(text.contains("not allowed"), "{text}");
        }
    }
}
