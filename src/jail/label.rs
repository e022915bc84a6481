//! Labels of a VMM: by which config.json has the host's security modules confine its container's process, whose own kernel has
//! none.
//!
//! In: a label. Out: the calling process under it. Must not: go on without one where the host has its module.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::plan::vm::Label;
use crate::support::Module;

/// Those that the host's kernel has, switched on.
pub fn modules() -> Vec<Module> {
    [Module::AppArmor, Module::SeLinux].into_iter().filter(|module| is_enabled(*module)).collect()
}

/// Whether the host's kernel has it, switched on.
pub fn is_enabled(module: Module) -> bool {
    let begins = |path: &str, with: &str| fs::read_to_string(path).is_ok_and(|text| text.starts_with(with));
    match module {
        Module::AppArmor => begins("/sys/module/apparmor/parameters/enabled", "Y"),
        // Before a policy is loaded all there is are `kernel`s.
        Module::SeLinux => {
            Path::new("/sys/fs/selinux/enforce").exists() && !begins("/proc/self/attr/current", "kernel")
        }
    }
}

/// The way to another label, opened while procfs is in reach. Only the thread that has opened it may go, and under SELinux only
/// a process's one thread.
pub struct Door {
    file: File,
    label: Label,
}

impl Door {
    /// Opens it.
    pub fn open(label: Label) -> Result<Self> {
        let open = |file: &str| File::options().write(true).open(format!("/proc/thread-self/attr/{file}"));
        let file = match label.module {
            // Linux before 5.8 has one file for whichever module comes first.
            Module::AppArmor => open("apparmor/current").or_else(|_| open("current")).context("AppArmor"),
            Module::SeLinux => open("current").context("SELinux"),
        };
        Ok(Door { file: file?, label })
    }

    /// Puts the thread under the label, for good where that does not let it go.
    pub fn pass(mut self) -> Result<()> {
        let Label { module, text } = &self.label;
        let change = match module {
            Module::AppArmor => format!("changeprofile {text}"),
            Module::SeLinux => text.clone(),
        };
        let changed = self.file.write_all(change.as_bytes());
        changed.with_context(|| format!("process.{} {text:?}: apply it to the VMM", module.field()))
    }
}
