//! The EXAMPLES of the man pages, as they stand there.
//!
//! In: the pages. Out: what their commands print. Must not: change a command but by where the state lies.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cases::{At, Case, wish};
use crate::documents::{PAGES, examples};
use crate::engines::archive;
use crate::process;
use crate::world::World;

/// What some of them print, where their success alone says little.
const SAID: &[(&str, &[&str])] = &[
    ("a3s-box-check.8", &["This host can run microVMs.", "true"]),
    ("a3s-box-features.8", &["1.3.0", "linux.resources.pids.limit"]),
    ("a3s-box.toml.5", &["512", "vcpus, memory-mib, network-mode=tsi"]),
    ("a3s-box-state.8", &["running"]),
    ("a3s-box-list.8", &["web"]),
    ("a3s-box-ps.8", &["sleep 1000", "["]),
    ("a3s-box-exec.8", &["Linux version", "65534\n/tmp\n1\n"]),
];

pub fn cases() -> Vec<Case> {
    vec![wish(At::Vm, "documents/the-examples-of-the-man-pages-work", man_pages)]
}

fn man_pages(world: &'static World) -> Result<()> {
    let dir = world.make_dir("examples")?;
    fs::write(dir.join("rootfs.tar"), archive(world)?)?;
    // The suite's containers have a state directory of their own.
    let program = dir.join("bin/a3s-box");
    fs::create_dir(dir.join("bin"))?;
    fs::write(&program, format!("#!/bin/sh\nexec {:?} --root {:?} \"$@\"\n", world.runtime, world.root))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", dir.join("bin").display(), std::env::var("PATH").unwrap_or_default());
    for (page, text) in PAGES {
        let mut shell = Command::new("sh");
        shell.args(["-ec", &examples(text)]).current_dir(&dir).env("PATH", &path).env("HOME", &dir);
        let output = process::run(shell, b"", world.patience()).context(*page)?;
        let said = output.text();
        output.code(0).with_context(|| format!("man/{page}"))?;
        let words = SAID.iter().find(|(name, _)| name == page).map_or(&[][..], |(_, words)| words);
        for word in words {
            ensure!(said.contains(word), "man/{page}: no {word:?} in {said:?}");
        }
    }
    Ok(())
}
