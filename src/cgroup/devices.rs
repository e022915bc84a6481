//! Which of the host's devices a container's processes may open: few, whatever nodes a VMM that was taken over makes.
//!
//! In: a cgroup's directories. Out: [`plan::devices::host`] holds there; left out where the kernel cannot or the caller
//! may not, which [`look`] tells. Must not: rely on the jail, none of whose mounts lets a device be opened.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use a3s_box_devices as filter;
use a3s_box_proto::{DeviceKind, DeviceRule};
use anyhow::{Context, Result, bail};

use super::systemd::{Properties, Value};
use crate::plan;

/// v1: what may not be used any more, and what may.
const DENY: &str = "devices.deny";
const ALLOW: &str = "devices.allow";

/// What a host has for it: v1's controller, or v2's programs.
enum Means<'a> {
    List(&'a Path),
    Filter(&'a Path),
}

impl Means<'_> {
    fn of(dirs: &[PathBuf]) -> Option<Means<'_>> {
        let having = |file: &str| dirs.iter().find(|dir| dir.join(file).exists());
        let list = having(DENY).map(|dir| Means::List(dir));
        list.or_else(|| Some(Means::Filter(having("cgroup.controllers")?)))
    }
}

/// Takes all other devices away from the processes of a cgroup; false where that cannot be.
pub fn confine(dirs: &[PathBuf]) -> Result<bool> {
    let rules = rules();
    let confined = match Means::of(dirs) {
        Some(Means::List(dir)) => list(dir, &rules),
        Some(Means::Filter(dir)) => attach(dir, &rules),
        None => Ok(false),
    };
    confined.context("the host's devices")
}

fn rules() -> Vec<DeviceRule> {
    let mut rules = plan::devices::host();
    if cfg!(feature = "local-guest") {
        // What stands in for a VM in tests has its workloads in this cgroup: one of them opens /dev/fuse.
        let (kind, major, minor) = (Some(DeviceKind::Char), Some(10), Some(229));
        rules.push(DeviceRule { allow: true, kind, major, minor, access: 6 });
    }
    rules
}

/// Whether [`confine`] confines here.
pub fn look() -> Result<String> {
    let roots = super::roots()?;
    let usable = match Means::of(&roots) {
        Some(Means::List(root)) => File::options().write(true).open(root.join(DENY)).map(drop),
        Some(Means::Filter(_)) => filter::usable(),
        None => bail!("cgroups here know no devices"),
    };
    match usable {
        Ok(()) => Ok("each container's cgroup opens few of the host's".into()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => bail!("only root may bar the host's"),
        Err(error) => Err(error).context("the kernel's filter for cgroups"),
    }
}

fn attach(dir: &Path, rules: &[DeviceRule]) -> Result<bool> {
    let file = File::open(dir).with_context(|| format!("open cgroup {}", dir.display()))?;
    match filter::attach(&file, rules) {
        Err(_) if filter::usable().is_err() => Ok(false),
        result => result.map(|()| true),
    }
}

fn list(dir: &Path, rules: &[DeviceRule]) -> Result<bool> {
    let write = |file: &str, line: &str| match fs::write(dir.join(file), line) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(false),
        result => {
            result.map(|()| true).with_context(|| format!("write {line:?} to {file} in {}", dir.display()))
        }
    };
    if !write(DENY, "a")? {
        return Ok(false);
    }
    for rule in rules {
        // What is kept from the cgroup above, as from a container that this runs in, stays so.
        write(ALLOW, &line(rule))?;
    }
    Ok(true)
}

/// A rule as v1 spells it.
fn line(rule: &DeviceRule) -> String {
    let kind = match rule.kind {
        Some(DeviceKind::Block) => "b",
        Some(DeviceKind::Char) => "c",
        None => "a",
    };
    let number = |number: Option<u32>| number.map_or("*".into(), |number| number.to_string());
    format!("{kind} {}:{} {}", number(rule.major), number(rule.minor), letters(rule))
}

fn letters(rule: &DeviceRule) -> String {
    let letters = [(1, 'm'), (2, 'r'), (4, 'w')];
    letters.iter().filter(|(bit, _)| rule.access & bit != 0).map(|(_, letter)| letter).collect()
}

/// The same for systemd, which on v1 writes its own list to every scope, also one that is delegated, and again when it
/// is reloaded.
pub fn properties() -> Properties {
    let entry = |rule: &DeviceRule| {
        let kind = if rule.kind == Some(DeviceKind::Block) { "block" } else { "char" };
        let name = match (rule.major, rule.minor) {
            (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
            // It knows groups of devices by their names in /proc/devices; there is one.
            (Some(_), None) => "char-pts".into(),
            (None, _) => format!("{kind}-*"),
        };
        (name, letters(rule))
    };
    let entries = rules().iter().map(entry).collect();
    vec![("DevicePolicy".into(), Value::Text("strict".into())), ("DeviceAllow".into(), Value::Pairs(entries))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_has_a_line_for_each_rule() {
        let lines: Vec<String> = plan::devices::host().iter().map(line).collect();
        let always = ["1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "5:2", "136:*"].map(|n| format!("c {n} mrw"));
        let kvm_and_tun = ["c 10:232 rw", "c 10:200 rw"].map(String::from);
        let any = ["c *:* m", "b *:* m"].map(String::from);
        assert_eq!(lines, [&any[..], &always[..], &kvm_and_tun[..]].concat());
    }

    #[test]
    fn systemd_has_an_entry_for_each_rule() {
        let properties = properties();
        let Value::Pairs(entries) = &properties[1].1 else { panic!("{properties:?}") };
        let entry = |name: &str, access: &str| (name.to_string(), access.to_string());
        assert_eq!(
            entries[..3],
            [("char-*", "m"), ("block-*", "m"), ("/dev/char/1:3", "mrw")].map(|(n, a)| entry(n, a))
        );
        assert!(
            entries.contains(&entry("char-pts", "mrw")) && entries.contains(&entry("/dev/char/10:232", "rw"))
        );
    }

    #[test]
    fn a_host_has_v1s_controller_or_v2s_programs_or_neither() {
        let base = std::env::temp_dir().join(format!("a3s-box-devices-{}", std::process::id()));
        let dir = |name: &str, file: Option<&str>| {
            let dir = base.join(name);
            fs::create_dir_all(&dir).unwrap();
            file.map_or(Ok(()), |file| fs::write(dir.join(file), "")).unwrap();
            dir
        };
        let (cpu, unified) = (dir("cpu", None), dir("unified", Some("cgroup.controllers")));
        let devices = dir("devices", Some(DENY));
        assert!(Means::of(std::slice::from_ref(&cpu)).is_none());
        assert!(
            matches!(Means::of(&[cpu.clone(), unified.clone()]), Some(Means::Filter(dir)) if dir == unified)
        );
        let all = [cpu, unified, devices.clone()];
        assert!(matches!(Means::of(&all), Some(Means::List(dir)) if dir == devices));
        // Nothing is denied in a file that takes the words without acting on them: the lines are all there is to see.
        assert!(confine(&all).unwrap());
        assert_eq!(fs::read_to_string(devices.join(DENY)).unwrap(), "a");
        assert_eq!(fs::read_to_string(devices.join(ALLOW)).unwrap(), "c 10:200 rw");
        fs::remove_dir_all(base).unwrap();
    }
}
