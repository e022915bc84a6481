//! Which mount is assembled on the host's tree and which is made in the guest.
//!
//! In: the mounts of config.json, in order. Out: the [`Tree`] for the host and the same list, in the same order, as
//! the guest mounts it: binds from the exported tree, file systems of the guest's own.

use std::path::{Component, Path, PathBuf};

use a3s_box_proto::{Mount as GuestMount, Source};
use anyhow::{Result, bail};
use oci_spec::runtime::{Mount, Spec};

/// What the host assembles: the root file system and every bind mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
    /// `root.readonly`
    pub readonly: bool,
    /// Bind mounts, in order.
    pub binds: Vec<Bind>,
    /// Destinations of the guest's own file systems with their types, in order: the monitor's view needs their places.
    pub places: Vec<(PathBuf, String)>,
}

/// A bind mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Where it appears in the container, normalized and absolute.
    pub destination: PathBuf,
    /// Its place below the exported tree's root.
    pub export: PathBuf,
    /// Whether mounts below the source come along.
    pub recursive: bool,
    /// `MOUNT_ATTR_*` to set.
    pub attributes: u64,
    /// How many of [`Tree::places`] come before it.
    pub after_places: usize,
}

/// Options that are honoured, for `features`; file systems take their own beside these.
pub const OPTIONS: [&str; 26] = [
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "rbind",
    "relatime",
    "ro",
    "rprivate",
    "rslave",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "unbindable",
];

/// Types that the guest mounts itself.
const GUEST_TYPES: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Where the root file system lies in the exported tree.
pub fn exported_rootfs() -> PathBuf {
    PathBuf::from("c0/rootfs")
}

fn exported_bind(index: usize) -> PathBuf {
    PathBuf::from(format!("c0/{index}"))
}

/// Splits the mounts between host and guest.
pub fn plan(spec: &Spec, rootfs: &Path, bundle: &Path) -> Result<(Tree, Vec<GuestMount>)> {
    let readonly = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let mut tree = Tree { rootfs: rootfs.to_path_buf(), readonly, ..Tree::default() };
    let mut guest = Vec::new();
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let destination = normalized(mount.destination());
        if destination == Path::new("/") {
            bail!("mounts[{index}].destination: {:?} is the root itself", mount.destination());
        }
        let options = Options::parse(mount, index)?;
        let source = if options.bind {
            let export = exported_bind(index);
            tree.binds.push(Bind {
                source: bind_source(mount, index, bundle)?,
                destination: destination.clone(),
                export: export.clone(),
                recursive: options.recursive,
                attributes: options.attributes,
                after_places: tree.places.len(),
            });
            Source::Export(export)
        } else {
            let kind = guest_type(mount, index)?;
            tree.places.push((destination.clone(), kind.to_string()));
            let name = mount.source().as_ref().map_or(kind.into(), |s| s.to_string_lossy().into_owned());
            Source::FileSystem { kind: kind.into(), name, options: options.data }
        };
        guest.push(GuestMount { destination, source, attributes: options.attributes });
    }
    Ok((tree, guest))
}

fn guest_type(mount: &Mount, index: usize) -> Result<&str> {
    match mount.typ().as_deref() {
        // The guest has cgroup v2 alone.
        Some("cgroup") => Ok("cgroup2"),
        Some(kind) if GUEST_TYPES.contains(&kind) => Ok(kind),
        Some(kind) => {
            bail!("mounts[{index}].type: {kind:?} is not supported (bind, {})", GUEST_TYPES.join(", "))
        }
        None => bail!("mounts[{index}].type: missing, and the options do not ask for a bind"),
    }
}

fn bind_source(mount: &Mount, index: usize, bundle: &Path) -> Result<PathBuf> {
    match mount.source() {
        Some(source) if !source.as_os_str().is_empty() => Ok(bundle.join(source)),
        _ => bail!("mounts[{index}].source: a bind mount to {} needs one", mount.destination().display()),
    }
}

/// A destination without `.` and `..`, as the container's root bounds it.
fn normalized(path: &Path) -> PathBuf {
    let mut result = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    result
}

#[derive(Default)]
struct Options {
    bind: bool,
    recursive: bool,
    attributes: u64,
    data: Vec<String>,
}

impl Options {
    fn parse(mount: &Mount, index: usize) -> Result<Self> {
        let mut parsed = Options { bind: mount.typ().as_deref() == Some("bind"), ..Options::default() };
        for option in mount.options().iter().flatten() {
            parsed.add(option, index)?;
        }
        if parsed.bind && !parsed.data.is_empty() {
            bail!("mounts[{index}].options: {:?} means nothing to a bind mount", parsed.data[0]);
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str, index: usize) -> Result<()> {
        match option {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            // Nothing of a guest's mounts reaches the host, and the host's reach the guest by the source alone.
            "private" | "rprivate" | "slave" | "rslave" | "unbindable" | "runbindable" => {}
            "shared" | "rshared" => {
                bail!(
                    "mounts[{index}].options: {option:?} is not supported: a guest's mounts cannot propagate to the host"
                )
            }
            _ => match attribute(option) {
                Some((bits, true)) => self.set(bits),
                Some((bits, false)) => self.attributes &= !bits,
                None if is_refused(option) => bail!("mounts[{index}].options: {option:?} is not supported"),
                None => self.data.push(option.to_string()),
            },
        }
        Ok(())
    }

    fn set(&mut self, bits: u64) {
        if bits & libc::MOUNT_ATTR__ATIME != 0 {
            self.attributes &= !libc::MOUNT_ATTR__ATIME;
        }
        self.attributes |= bits;
    }
}

/// Options that are mount attributes: their bits, and whether they set or clear them.
fn attribute(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "ro" => (libc::MOUNT_ATTR_RDONLY, true),
        "rw" => (libc::MOUNT_ATTR_RDONLY, false),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, true),
        "suid" => (libc::MOUNT_ATTR_NOSUID, false),
        "nodev" => (libc::MOUNT_ATTR_NODEV, true),
        "dev" => (libc::MOUNT_ATTR_NODEV, false),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, true),
        "exec" => (libc::MOUNT_ATTR_NOEXEC, false),
        "noatime" => (libc::MOUNT_ATTR_NOATIME, true),
        "atime" | "norelatime" | "nostrictatime" => (libc::MOUNT_ATTR__ATIME, false),
        "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, true),
        "relatime" => (libc::MOUNT_ATTR__ATIME, false),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, true),
        "diratime" => (libc::MOUNT_ATTR_NODIRATIME, false),
        "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, true),
        "symfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, false),
        "defaults" => (0, true),
        _ => return None,
    })
}

/// Options of runc's that need more than an attribute; they would be lost as file system data.
fn is_refused(option: &str) -> bool {
    const NAMES: [&str; 18] = [
        "rro",
        "rrw",
        "rnosuid",
        "rsuid",
        "rnodev",
        "rdev",
        "rnoexec",
        "rexec",
        "rnoatime",
        "ratime",
        "rstrictatime",
        "rrelatime",
        "rnodiratime",
        "rdiratime",
        "rnosymfollow",
        "rsymfollow",
        "tmpcopyup",
        "remount",
    ];
    NAMES.contains(&option) || option.starts_with("idmap") || option.starts_with("ridmap")
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use serde_json::{Value, json};

    fn planned(mounts: Value) -> Result<(Tree, Vec<GuestMount>)> {
        plan(&spec(|v| v["mounts"] = mounts), Path::new("/b/rootfs"), Path::new("/b"))
    }

    #[test]
    fn order_is_kept_and_each_side_gets_its_share() {
        let (tree, guest) = planned(json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data/./x/../y", "type": "bind", "source": "vol", "options": ["rbind", "ro", "nosuid"]},
            {"destination": "/dev", "type": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/etc/hosts", "type": "none", "source": "/h", "options": ["bind"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]},
        ]))
        .unwrap();
        let order: Vec<_> = guest.iter().map(|m| m.destination.to_str().unwrap()).collect();
        assert_eq!(order, ["/proc", "/data/y", "/dev", "/etc/hosts", "/sys/fs/cgroup"]);
        assert_eq!(tree.binds[0].source, Path::new("/b/vol"));
        assert!(tree.binds[0].recursive && !tree.binds[1].recursive);
        assert_eq!(tree.binds[0].attributes, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
        assert_eq!((tree.binds[0].after_places, tree.binds[1].after_places), (1, 2));
        assert_eq!(tree.places.len(), 3);
        let Source::FileSystem { kind, options, .. } = &guest[2].source else { panic!() };
        assert_eq!(
            (kind.as_str(), options.as_slice()),
            ("tmpfs", &["mode=755".into(), "size=65536k".into()][..])
        );
        let Source::FileSystem { kind, .. } = &guest[4].source else { panic!() };
        assert_eq!(kind, "cgroup2");
    }

    #[test]
    fn later_options_win() {
        let (tree, _) = planned(json!([
            {"destination": "/a", "source": "/s", "options": ["bind", "ro", "noatime", "rw", "relatime"]}
        ]))
        .unwrap();
        assert_eq!(tree.binds[0].attributes, 0);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (mount, words) in [
            (json!({"destination": "/", "source": "/s", "options": ["bind"]}), "destination"),
            (json!({"destination": "/a/..", "source": "/s", "options": ["bind"]}), "root itself"),
            (json!({"destination": "/a", "options": ["bind"]}), "source"),
            (json!({"destination": "/a", "type": "nfs", "source": "x"}), "\"nfs\""),
            (json!({"destination": "/a", "source": "/s", "options": ["bind", "rshared"]}), "rshared"),
            (json!({"destination": "/a", "source": "/s", "options": ["rbind", "rro"]}), "rro"),
            (json!({"destination": "/a", "source": "/s", "options": ["bind", "size=3"]}), "size=3"),
            (json!({"destination": "/a", "source": "/s"}), "type"),
        ] {
            let text = planned(json!([mount])).unwrap_err().to_string();
            assert!(text.contains("mounts[0]") && text.contains(words), "{text}");
        }
    }
}
