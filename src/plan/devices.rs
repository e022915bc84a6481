//! Devices of a container: which it is given, which it may use; and which of the host's its VM may.
//!
//! In: `linux.devices` and `linux.resources.devices`. Out: special files and rules for the guest. They are the guest
//! kernel's devices, never the host's, for which the rules are always the same. Must not: look at any device.

use std::path::Path;

use a3s_box_proto::{Device, DeviceKind, DeviceRule};
use anyhow::{Context, Result, bail};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
/// Widths of the numbers in the kernel's `dev_t`.
const MAX_MAJOR: i64 = 0xfff;
const MAX_MINOR: i64 = 0xf_ffff;

/// What runc allows every container, whatever config.json says: null, zero, full, random, urandom, tty, ptmx, terminals.
const ALWAYS: [(u32, Option<u32>); 8] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(2)),
    (136, None),
];

/// What the VM's side on the host needs besides: /dev/kvm, /dev/net/tun.
const VM: [(u32, u32); 2] = [(10, 232), (10, 200)];

/// The rules for the host's cgroup of a container. VMM, monitor and relays would do with null, ptmx, kvm and tun; but
/// `createContainer` hooks run in the monitor's cgroup, and find what they find below runc. Whoever may make nodes may
/// make any, for virtiofs does so on the guest's behalf: it is to open one that is barred.
pub fn host() -> Vec<DeviceRule> {
    let mut rules = always();
    rules.extend(VM.map(|(major, minor)| DeviceRule {
        allow: true,
        kind: Some(DeviceKind::Char),
        major: Some(major),
        minor: Some(minor),
        access: READ | WRITE,
    }));
    rules
}

/// The special files to make, and the rules; no rules where everything is allowed.
pub fn plan(spec: &Spec) -> Result<(Vec<Device>, Option<Vec<DeviceRule>>)> {
    let linux = spec.linux().as_ref();
    let given = linux.and_then(|linux| linux.resources().as_ref()?.devices().as_ref());
    let rules = rules(given.map_or(&[], Vec::as_slice))?;
    // Engines list all of the host's devices for a container that may use every device: what the guest has, it gets.
    let optional = rules.is_none();
    let listed = linux.and_then(|linux| linux.devices().as_ref()).into_iter().flatten();
    let mut devices = Vec::new();
    for (index, entry) in listed.enumerate() {
        // The container's own devpts has it.
        if entry.path() != Path::new("/dev/ptmx") {
            devices.push(device(entry, optional).with_context(|| format!("linux.devices[{index}]"))?);
        }
    }
    Ok((devices, rules))
}

fn device(entry: &LinuxDevice, optional: bool) -> Result<Device> {
    let path = entry.path();
    if !path.is_absolute() || path.file_name().is_none() {
        bail!("path {path:?} is not an absolute path of a file");
    }
    let kind = match entry.typ() {
        LinuxDeviceType::B => Some(DeviceKind::Block),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(DeviceKind::Char),
        LinuxDeviceType::P => None,
        LinuxDeviceType::A => bail!("type \"a\" is not that of a device"),
    };
    let number = match kind {
        Some(kind) => Some((
            kind,
            number("major", entry.major(), MAX_MAJOR)?,
            number("minor", entry.minor(), MAX_MINOR)?,
        )),
        None => None,
    };
    let mode = entry.file_mode().unwrap_or(0o666) & 0o7777;
    let (uid, gid) = (entry.uid().unwrap_or(0), entry.gid().unwrap_or(0));
    Ok(Device { path: path.clone(), number, mode, uid, gid, optional })
}

fn number(field: &str, value: i64, most: i64) -> Result<u32> {
    match value {
        0.. if value <= most => Ok(value as u32),
        _ => bail!("{field} {value} is not a number from 0 to {most}"),
    }
}

/// `None` where everything is allowed.
fn rules(given: &[LinuxDeviceCgroup]) -> Result<Option<Vec<DeviceRule>>> {
    let parse = |(index, entry)| rule(entry).with_context(|| format!("linux.resources.devices[{index}]"));
    let given = given.iter().enumerate().map(parse).collect::<Result<Vec<_>>>()?;
    // Of an access that several rules speak of, the last one decides.
    let decisive = given.iter().rposition(is_about_everything);
    if decisive.is_some_and(|at| given[at..].iter().all(|rule| rule.allow)) {
        return Ok(None);
    }
    let mut rules = given[decisive.unwrap_or(0)..].to_vec();
    rules.extend(always());
    Ok(Some(rules))
}

/// Nodes of any device may be made, those of [`ALWAYS`] be used.
fn always() -> Vec<DeviceRule> {
    let any = |kind| DeviceRule { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD };
    let mut rules = vec![any(DeviceKind::Char), any(DeviceKind::Block)];
    rules.extend(ALWAYS.map(|(major, minor)| DeviceRule {
        major: Some(major),
        minor,
        access: ALL,
        ..any(DeviceKind::Char)
    }));
    rules
}

fn is_about_everything(rule: &DeviceRule) -> bool {
    rule.kind.is_none() && rule.major.is_none() && rule.minor.is_none() && rule.access == ALL
}

fn rule(entry: &LinuxDeviceCgroup) -> Result<DeviceRule> {
    let kind = match entry.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(DeviceKind::Block),
        Some(LinuxDeviceType::C) => Some(DeviceKind::Char),
        Some(other) => bail!("invalid cgroup device type {:?}", other.as_str()),
    };
    let text = entry.access().as_deref().unwrap_or_default();
    let mut access = 0;
    for letter in text.chars() {
        access |= match letter {
            'm' => MKNOD,
            'r' => READ,
            'w' => WRITE,
            _ => bail!("access {text:?} is not made of \"r\", \"w\" and \"m\""),
        };
    }
    if access == 0 {
        bail!("device access field cannot be empty");
    }
    let any = |field, value: Option<i64>, most| match value {
        None | Some(-1) => Ok(None),
        Some(value) => number(field, value, most).map(Some),
    };
    let (major, minor) = (any("major", entry.major(), MAX_MAJOR)?, any("minor", entry.minor(), MAX_MINOR)?);
    Ok(DeviceRule { allow: entry.allow(), kind, major, minor, access })
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use serde_json::{Value, json};

    fn planned(devices: Value, rules: Value) -> Result<(Vec<Device>, Option<Vec<DeviceRule>>)> {
        plan(&spec(|v| {
            v["linux"]["devices"] = devices;
            v["linux"]["resources"]["devices"] = rules;
        }))
    }

    #[test]
    fn rules_come_before_what_is_always_allowed() {
        let deny_all = json!({"allow": false, "access": "rwm"});
        let fuse = json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"});
        let (_, rules) = planned(json!([]), json!([fuse, deny_all, fuse])).unwrap();
        let rules = rules.unwrap();
        assert_eq!(rules.len(), 2 + 2 + ALWAYS.len());
        assert!(is_about_everything(&rules[0]) && !rules[0].allow);
        let expected = DeviceRule {
            allow: true,
            kind: Some(DeviceKind::Char),
            major: Some(10),
            minor: Some(229),
            access: READ | WRITE,
        };
        assert_eq!(rules[1], expected);
        assert_eq!(planned(json!([]), json!([])).unwrap().1.unwrap().len(), 2 + ALWAYS.len());
    }

    #[test]
    fn everything_is_allowed_only_where_nothing_is_denied_after_it() {
        let all = json!({"allow": true, "type": "a", "major": -1, "minor": -1, "access": "rwm"});
        let deny = json!({"allow": false, "type": "b", "access": "w"});
        assert_eq!(planned(json!([]), json!([deny, all])).unwrap().1, None);
        assert!(planned(json!([]), json!([all, deny])).unwrap().1.is_some());
        let partly = json!({"allow": true, "type": "a", "access": "rw"});
        assert!(planned(json!([]), json!([partly])).unwrap().1.is_some());
    }

    #[test]
    fn devices_have_defaults_and_can_be_left_out_when_everything_is_allowed() {
        let fuse =
            json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o100_600});
        let fifo = json!({"path": "/run/fifo", "type": "p", "uid": 5, "gid": 6});
        let ptmx = json!({"path": "/dev/ptmx", "type": "c", "major": 5, "minor": 2});
        let (devices, _) = planned(json!([fuse, fifo, ptmx]), json!([])).unwrap();
        assert_eq!(devices.len(), 2);
        assert_eq!((devices[0].number, devices[0].mode), (Some((DeviceKind::Char, 10, 229)), 0o600));
        assert_eq!((devices[1].number, devices[1].mode, devices[1].uid, devices[1].gid), (None, 0o666, 5, 6));
        assert!(!devices[0].optional);
        let (devices, _) = planned(json!([fuse]), json!([{"allow": true, "access": "rwm"}])).unwrap();
        assert!(devices[0].optional);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (devices, rules, words) in [
            (json!([{"path": "dev/x", "type": "c"}]), json!([]), "linux.devices[0]: path \"dev/x\""),
            (json!([{"path": "/dev/x", "type": "a"}]), json!([]), "type \"a\""),
            (json!([{"path": "/dev/x", "type": "c", "major": 5000}]), json!([]), "major 5000"),
            (json!([{"path": "/dev/x", "type": "b", "minor": -1}]), json!([]), "minor -1"),
            (json!([]), json!([{"allow": true, "access": "x"}]), "linux.resources.devices[0]: access \"x\""),
            (json!([]), json!([{"allow": true}]), "device access field cannot be empty"),
            (
                json!([]),
                json!([{"allow": true, "type": "p", "access": "r"}]),
                "invalid cgroup device type \"p\"",
            ),
        ] {
            let text = format!("{:#}", planned(devices, rules).unwrap_err());
            assert!(text.contains(words), "{text}");
        }
    }
}
