//! The `vm` object of config.json: a kernel and a size of the VM's own.
//!
//! In: the object as JSON; the specification's type knows no `hwConfig`. Out: [`Machine`], whose words are fit for the
//! guest kernel's command line. Must not: let a word through that would keep guest-init from coming up.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::vm::{MAX_VCPUS, MIN_MEMORY_MIB};

/// Bytes of all parameters. The guest cuts its command line at 2048, devices need their share, and then it hangs.
const MAX_PARAMETERS: usize = 1024;
/// Parameters without which, or with others of which, guest-init does not come up.
const RESERVED: [&str; 10] = [
    "--",
    "console",
    "init",
    "panic",
    "reboot",
    "ro",
    "root",
    "rootflags",
    "rootfstype",
    "virtio_mmio.device",
];

/// What it asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// A kernel other than the configured one, or more words for it.
    #[serde(default)]
    kernel: Kernel,
    /// Sizes.
    #[serde(default)]
    hw_config: HwConfig,
}

/// A guest kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Absolute path on the host; empty for the configured kernel.
    #[serde(default)]
    pub path: PathBuf,
    /// Words added to its command line.
    #[serde(default)]
    pub parameters: Vec<String>,
    /// Absolute path of an initial RAM disk on the host.
    pub initrd: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct HwConfig {
    vcpus: Option<i64>,
    memory: Option<i64>,
}

impl Machine {
    /// Reads the object; an absent one asks for nothing.
    pub fn read(object: Option<serde_json::Value>) -> Result<Self> {
        let machine = match object {
            None | Some(serde_json::Value::Null) => Machine::default(),
            Some(object) => serde_json::from_value(object).context("vm")?,
        };
        machine.kernel.check()?;
        Ok(machine)
    }

    /// One that asks for a size alone.
    pub fn of_size(vcpus: u8, memory_mib: u32) -> Self {
        let hw_config = HwConfig { vcpus: Some(vcpus.into()), memory: Some(i64::from(memory_mib) << 20) };
        Machine { hw_config, ..Machine::default() }
    }

    /// The kernel, where it is anything but the configured one as it is.
    pub fn kernel(&self) -> Option<&Kernel> {
        Some(&self.kernel).filter(|kernel| **kernel != Kernel::default())
    }

    /// Virtual CPUs.
    pub fn vcpus(&self) -> Result<Option<u8>> {
        match self.hw_config.vcpus {
            None | Some(0) => Ok(None),
            Some(count) if (1..=i64::from(MAX_VCPUS)).contains(&count) => Ok(Some(count as u8)),
            Some(count) => bail!("vm.hwConfig.vcpus: {count} is not a number from 1 to {MAX_VCPUS}"),
        }
    }

    /// RAM in MiB; the object counts bytes.
    pub fn memory_mib(&self) -> Result<Option<u32>> {
        let Some(bytes) = self.hw_config.memory.filter(|bytes| *bytes != 0) else { return Ok(None) };
        let mib = u64::try_from(bytes).ok().and_then(|bytes| u32::try_from(bytes.div_ceil(1 << 20)).ok());
        match mib {
            Some(mib) if mib >= MIN_MEMORY_MIB => Ok(Some(mib)),
            _ => bail!(
                "vm.hwConfig.memory: {bytes} bytes are not a size from {MIN_MEMORY_MIB} MiB (the least that boots)"
            ),
        }
    }
}

impl Kernel {
    fn check(&self) -> Result<()> {
        for (field, path) in [("path", Some(&self.path)), ("initrd", self.initrd.as_ref())] {
            if let Some(path) = path.filter(|path| !path.as_os_str().is_empty() && !path.is_absolute()) {
                bail!("vm.kernel.{field}: {path:?} is not an absolute path");
            }
        }
        for parameter in &self.parameters {
            let is_word =
                !parameter.is_empty() && parameter.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
            if !is_word {
                bail!(
                    "vm.kernel.parameters: {parameter:?} is not one word of printable ASCII without quotes"
                );
            }
            // The kernel takes `-` for `_`.
            let name = parameter.split('=').next().unwrap_or_default();
            if RESERVED.contains(&name) || RESERVED.contains(&name.replace('-', "_").as_str()) {
                bail!("vm.kernel.parameters: {parameter:?}: {name} is a3s-box's own to set");
            }
        }
        let length: usize = self.parameters.iter().map(|parameter| parameter.len() + 1).sum();
        if length > MAX_PARAMETERS {
            bail!("vm.kernel.parameters: {length} bytes, at most {MAX_PARAMETERS} fit the command line");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(object: Value) -> Result<Machine> {
        Machine::read(Some(object))
    }

    #[test]
    fn sizes_and_words() {
        let sized = Machine::of_size(3, u32::MAX);
        assert_eq!((sized.vcpus().unwrap(), sized.memory_mib().unwrap()), (Some(3), Some(u32::MAX)));
        let machine = read(json!({
            "kernel": {"path": "/boot/vmlinux", "parameters": ["quiet", "a.b=c,d"], "initrd": "/boot/initrd"},
            "hwConfig": {"vcpus": 3, "memory": 268_435_457}
        }))
        .unwrap();
        assert_eq!((machine.vcpus().unwrap(), machine.memory_mib().unwrap()), (Some(3), Some(257)));
        assert_eq!(machine.kernel().unwrap().parameters, ["quiet", "a.b=c,d"]);
        for nothing in [json!({}), json!({"kernel": {"path": ""}}), Value::Null] {
            let machine = read(nothing).unwrap();
            assert_eq!((machine.vcpus().unwrap(), machine.kernel()), (None, None));
        }
    }

    #[test]
    fn what_would_keep_the_guest_from_coming_up_is_named() {
        let word = |word: &str| json!({"kernel": {"path": "", "parameters": [word]}});
        for (object, words) in [
            (word("init=/bin/sh"), "\"init=/bin/sh\": init is a3s-box's own"),
            (word("virtio-mmio.device=4K@0:5"), "a3s-box's own"),
            (word("--"), "a3s-box's own"),
            (word("a b"), "not one word"),
            (word("a=\"b"), "not one word"),
            (word("a\nb"), "not one word"),
            (word(""), "not one word"),
            (word(&"x".repeat(2000)), "2001 bytes, at most 1024"),
            (json!({"kernel": {"path": "vmlinux"}}), "vm.kernel.path: \"vmlinux\""),
            (json!({"kernel": {"initrd": "i"}}), "vm.kernel.initrd: \"i\""),
            (json!({"kernel": {"parameters": "quiet"}}), "vm: "),
        ] {
            let text = format!("{:#}", read(object).unwrap_err());
            assert!(text.contains(words), "{text}");
        }
        for (hardware, words) in [
            (json!({"vcpus": 17}), "vcpus: 17"),
            (json!({"vcpus": -1}), "vcpus: -1"),
            (json!({"memory": 1024}), "memory: 1024 bytes"),
            (json!({"memory": -1}), "memory: -1 bytes"),
            (json!({"memory": i64::MAX}), "bytes are not a size"),
        ] {
            let machine = read(json!({"hwConfig": hardware})).unwrap();
            let text = machine.vcpus().map(drop).and(machine.memory_mib().map(drop)).unwrap_err().to_string();
            assert!(text.starts_with("vm.hwConfig.") && text.contains(words), "{text}");
        }
    }
}
