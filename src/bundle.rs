//! Reads a bundle: config.json and the root file system it names.
//!
//! In: a directory. Out: a [`Bundle`] that later stages may trust. Must not: change anything.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use oci_spec::runtime::{MountBuilder, Spec};

use crate::log::sentence;
use crate::plan::{Machine, settings};
use crate::support::{self, Module};

/// Where a container finds its caller's `NOTIFY_SOCKET`, as under runc.
const NOTIFY: &str = "/run/notify/notify.sock";
/// What a bundle without config.json needs.
const SPEC: &str = "`a3s-box spec` writes one; --bundle names another directory";
/// What one without a root file system needs.
const UNPACK: &str = "unpack a root file system there, or let config.json name another directory";

/// A bundle that passed every check that needs no plan.
#[derive(Debug)]
pub struct Bundle {
    /// Absolute path.
    pub dir: PathBuf,
    /// Its config.json.
    pub spec: Spec,
    /// Its `vm` object.
    pub machine: Machine,
    /// Absolute path of its root file system.
    pub rootfs: PathBuf,
    /// One line for each field that is set and ignored.
    pub warnings: Vec<String>,
}

/// Opens the bundle in `dir`. `modules`: those that the host has.
pub fn open(dir: &Path, modules: &[Module]) -> Result<Bundle> {
    let dir = fs::canonicalize(dir).with_context(|| format!("bundle {}", dir.display()))?;
    let path = dir.join("config.json");
    let text = fs::read(&path).map_err(|error| missing(error, &format!("open {}", path.display()), SPEC))?;
    let (spec, machine, warnings) = parse(&text, &path, modules)?;
    let root = spec.root().as_ref().context("root: config.json gives no root file system")?;
    let rootfs = dir.join(root.path());
    let shown = format!("root.path {}", rootfs.display());
    let metadata = fs::metadata(&rootfs).map_err(|error| missing(error, &shown, UNPACK))?;
    if !metadata.is_dir() {
        bail!("root.path {}: not a directory", rootfs.display());
    }
    Ok(Bundle { dir, spec, machine, rootfs, warnings })
}

impl Bundle {
    /// Lets the container speak to the service manager of its caller (sd_notify(3)), unless config.json has a
    /// `NOTIFY_SOCKET` already.
    pub fn notify(&mut self, socket: &Path) -> Result<()> {
        if !socket.is_absolute() {
            bail!(
                "NOTIFY_SOCKET={}: not a path, and only that can be bound into a container",
                socket.display()
            );
        }
        let Some(process) = self.spec.process_mut() else { return Ok(()) };
        let env = process.env_mut().get_or_insert_default();
        if env.iter().any(|variable| variable.starts_with("NOTIFY_SOCKET=")) {
            return Ok(());
        }
        env.push(format!("NOTIFY_SOCKET={NOTIFY}"));
        let mount = MountBuilder::default().destination(NOTIFY).source(socket).typ("bind");
        let mount = mount.options(vec!["bind".to_string()]).build().context("NOTIFY_SOCKET")?;
        self.spec.mounts_mut().get_or_insert_default().push(mount);
        Ok(())
    }
}

/// A file system's refusal, with the next step where it is only that something is not there.
fn missing(error: io::Error, what: &str, step: &str) -> anyhow::Error {
    let is_missing = error.kind() == io::ErrorKind::NotFound;
    let step = if is_missing { format!(" ({step})") } else { String::new() };
    anyhow!("{what}: {}{step}", sentence(&error.into()))
}

/// Reads the text of the config.json at `path`: what it asks for, its `vm` object, a line for each ignored field.
pub fn parse(text: &[u8], path: &Path, modules: &[Module]) -> Result<(Spec, Machine, Vec<String>)> {
    let mut config: serde_json::Value =
        serde_json::from_slice(text).with_context(|| format!("{} is not valid JSON", path.display()))?;
    check_version(&config["ociVersion"])?;
    let mut warnings = support::check(&config, modules)?;
    // The typed reading knows less of it than the specification.
    let machine = Machine::read(config.as_object_mut().and_then(|fields| fields.remove("vm")))?;
    let spec: Spec =
        serde_path(config).with_context(|| format!("{} is not a runtime configuration", path.display()))?;
    warnings.extend(spec.annotations().as_ref().map(settings::unknown).unwrap_or_default());
    Ok((spec, machine, warnings))
}

/// Typed reading, with the field's name where it goes wrong.
fn serde_path(config: serde_json::Value) -> Result<Spec> {
    let fields = config.as_object().context("the outermost value is not an object")?.clone();
    serde_json::from_value(config).map_err(|whole| {
        let wrong = fields.iter().find(|(name, value)| {
            let mut alone = serde_json::Map::from_iter([("ociVersion".into(), fields["ociVersion"].clone())]);
            alone.insert((*name).clone(), (*value).clone());
            serde_json::from_value::<Spec>(alone.into()).is_err()
        });
        match wrong {
            Some((name, _)) => anyhow::anyhow!("{name}: {whole}"),
            None => whole.into(),
        }
    })
}

/// runtime-spec 1.x; the spec promises that minor versions stay compatible.
fn check_version(version: &serde_json::Value) -> Result<()> {
    let text = version.as_str().unwrap_or_default();
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let numbers: Option<Vec<u64>> = core.split('.').map(|part| part.parse().ok()).collect();
    match numbers.as_deref() {
        Some([1, _, _]) => Ok(()),
        Some([_, _, _]) => bail!("ociVersion: {text:?} is not supported, only 1.x is"),
        _ if version.is_null() => bail!("ociVersion: missing in config.json"),
        _ => bail!("ociVersion: {version} is not a version"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn versions() {
        for good in ["1.0.0", "1.0.2-dev", "1.1.0+x", "1.2.1", "1.3.0", "1.99.0"] {
            assert!(check_version(&json!(good)).is_ok(), "{good}");
        }
        for bad in
            [json!("2.0.0"), json!("0.9.0"), json!("1.0"), json!("latest"), json!(1), json!(null), json!("")]
        {
            let text = check_version(&bad).unwrap_err().to_string();
            assert!(text.starts_with("ociVersion"), "{text}");
        }
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named() {
        let config =
            json!({"ociVersion": "1.0.0", "root": {"path": "r"}, "process": {"args": "sh", "cwd": "/"}});
        let text = format!("{:#}", serde_path(config).unwrap_err());
        assert!(text.starts_with("process: "), "{text}");
    }
}
