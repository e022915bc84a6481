//! The `vm` object of config.json (config-vm.md): a kernel of the container's own, words for it, a size.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Vm, "vm/kernel-parameters-and-sizes-are-as-asked", parameters),
        wish(At::Vm, "vm/a-kernel-of-its-own-boots", another),
        wish(At::Vm, "vm/a-kernel-that-is-none-is-refused", none),
        wish(At::Vm, "vm/an-initial-ram-disk-that-the-kernel-would-pass-over-is-refused", initrd),
    ]
}

fn parameters(world: &'static World) -> Result<()> {
    let script = "grep -o 'a3sbox.wish=[0-9]*' /proc/cmdline; nproc; grep MemTotal /proc/meminfo | tr -s ' ' | cut -d ' ' -f 2";
    let config = Config::sh(script)
        .without("/annotations")
        .set("/vm/kernel", json!({ "path": "", "parameters": ["a3sbox.wish=7"] }))
        .set("/vm/hwConfig", json!({ "vcpus": 1, "memory": 300 << 20 }));
    let said = world.run_config(&config)?;
    let lines: Vec<&str> = said.lines().collect();
    same(&(lines[0], lines[1]), &("a3sbox.wish=7", "1"))?;
    let kib: u64 = lines[2].parse()?;
    ensure!((220 * 1024..=300 * 1024).contains(&kib), "{kib} KiB of 300 MiB");
    Ok(())
}

/// libkrunfw's kernel as an ELF file, as a VM before this has left it.
fn elf() -> Result<Vec<u8>> {
    let files = fs::read_dir("/run/a3s-box-kernel").context("where kernels lie")?.flatten();
    let newest = files.max_by_key(|file| file.metadata().and_then(|meta| meta.modified()).ok());
    Ok(fs::read(newest.context("no kernel")?.path())?)
}

fn write(world: &World, bytes: &[u8]) -> Result<PathBuf> {
    let path = world.make_dir("kernel")?.join("vmlinux");
    fs::write(&path, bytes)?;
    Ok(path)
}

fn with_kernel(path: &Path, script: &str) -> Config {
    Config::sh(script).set("/vm/kernel", json!({ "path": path, "parameters": ["a3sbox.wish=8"] }))
}

/// The same kernel under another name, which only this file has.
fn another(world: &'static World) -> Result<()> {
    let release = world.run_config(&Config::sh("uname -r"))?.trim().to_string();
    let renamed: String = release.replacen("6.", "9.", 1);
    ensure!(renamed != release, "{release}");
    let mut image = elf()?;
    let places: Vec<usize> = image
        .windows(release.len())
        .enumerate()
        .filter(|(_, window)| *window == release.as_bytes())
        .map(|(place, _)| place)
        .collect();
    places.iter().for_each(|place| image[*place..place + release.len()].copy_from_slice(renamed.as_bytes()));
    let path = write(world, &image)?;
    let said =
        world.run_config(&with_kernel(&path, "uname -r; grep -o 'a3sbox.wish=[0-9]*' /proc/cmdline"))?;
    same(&said, &format!("{renamed}\na3sbox.wish=8\n"))
}

fn none(world: &'static World) -> Result<()> {
    for (path, words) in [
        ("/etc/passwd", "not a kernel image"),
        ("/dev/zero", "not a regular file"),
        ("/no/kernel", "no such file"),
    ] {
        let config = Config::sh("echo ran").set("/vm/kernel/path", json!(path));
        world.run(&world.bundle(&config)?, b"")?.code(1)?.one_line(&["vm.kernel.path", path, words])?;
    }
    // A file that begins as a kernel does, and then ends.
    let path = write(world, &elf()?[..64])?;
    let output = world.run(&world.bundle(&with_kernel(&path, "echo ran"))?, b"")?.code(1)?;
    ensure!(output.stdout.is_empty(), "it ran");
    output.one_line(&["the VM"]).map(drop)
}

fn initrd(world: &'static World) -> Result<()> {
    let dir = world.make_dir("initrd")?;
    let initrd = dir.join("initrd");
    fs::write(&initrd, "070701")?;
    for kernel in ["".into(), write(world, &elf()?)?] {
        let config = with_kernel(&kernel, "echo ran").set("/vm/kernel/initrd", json!(initrd));
        let words = ["vm.kernel.initrd", &*initrd.to_string_lossy(), "takes no initial RAM disk"];
        world.run(&world.bundle(&config)?, b"")?.code(1)?.one_line(&words)?;
    }
    let config =
        Config::sh("echo ran").set("/vm/kernel", json!({ "path": "", "initrd": dir.join("missing") }));
    world
        .run(&world.bundle(&config)?, b"")?
        .code(1)?
        .one_line(&["vm.kernel.initrd", "no such file"])
        .map(drop)
}
