//! Landlock: the same few places once more, held by a part of the kernel that mount tables have no say in.
//!
//! In: a process that sits in its jail. Out: one that can open nothing else, whatever descriptor it starts from. Must
//! not: tell what lies below the exported tree apart; mounts that come there later are covered as well.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use a3s_box_mount::{errno_words, open_path};
use anyhow::{Context, Result, anyhow};
use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};

use super::{EXPORT, RUN};

/// The oldest that lets files move between directories; an older one would break the guest's renames.
const OLDEST: ABI = ABI::V2;
/// The newest whose every right was considered here.
const NEWEST: ABI = ABI::V6;

/// Whether this kernel's Landlock is of use.
pub fn is_available() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessFs::from_all(OLDEST)).and_then(Ruleset::create).is_ok()
}

/// Confines the calling thread and those it will start to the exported tree, the VM's directory, the device nodes and
/// the kernel's file; left out where the kernel cannot ([`is_available`]).
pub fn confine(devices: &[&str], files: &[impl AsFd]) -> Result<()> {
    if !is_available() {
        return Ok(());
    }
    let rules = || -> Result<RulesetCreated> {
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        ruleset = allow(ruleset, EXPORT, AccessFs::from_all(NEWEST) & !AccessFs::Execute)?;
        ruleset = allow(ruleset, RUN, AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeSock)?;
        for device in devices {
            let access = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
            ruleset = allow(ruleset, device, access)?;
        }
        for file in files.iter().filter(|file| !is_memory(file.as_fd())) {
            ruleset = ruleset.add_rule(PathBeneath::new(file, AccessFs::ReadFile))?;
        }
        Ok(ruleset)
    };
    rules().and_then(|ruleset| Ok(ruleset.restrict_self()?)).map(drop).context("Landlock")
}

/// A file that lies on no mount, which Landlock has no rules for and does not bar.
fn is_memory(file: BorrowedFd<'_>) -> bool {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    path.is_ok_and(|path| path.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
}

fn allow(ruleset: RulesetCreated, path: &str, access: BitFlags<AccessFs>) -> Result<RulesetCreated> {
    let place = open_path(Path::new(path)).map_err(|e| anyhow!("{path}: {}", errno_words(e)))?;
    ruleset.add_rule(PathBeneath::new(place, access)).with_context(|| path.to_string())
}
