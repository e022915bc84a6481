//! Which mount is assembled on the host's tree and which is made in the guest.
//!
//! In: the mounts of config.json, in order. Out: the [`Tree`] for the host and the same list, in the same order, as
//! the guest mounts it: binds from the exported tree, file systems of the guest's own.

use std::path::{Component, Path, PathBuf};

use a3s_box_proto::{Attributes, Mount as GuestMount, Source};
use anyhow::{Context, Result, bail};
use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};

use super::options::{Change, Options};

/// What the host assembles: the root file system and every bind mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
    /// `root.readonly`
    pub readonly: bool,
    /// Bind mounts, in order.
    pub binds: Vec<Bind>,
    /// The guest's own file systems, in order: the monitor's view needs their places.
    pub places: Vec<Place>,
}

/// A bind mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Which of the guest's mounts it is.
    pub index: usize,
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Where it appears in the container, normalized and absolute.
    pub destination: PathBuf,
    /// Its name beside the root file system in the exported tree.
    pub export: PathBuf,
    /// Whether mounts below the source come along.
    pub recursive: bool,
    /// Whether what the host mounts below the source later comes as well.
    pub follows: bool,
    /// Attributes of the mount itself.
    pub own: Change,
    /// Attributes of the mount and all below it.
    pub tree: Change,
    /// Owners are shown mapped.
    pub ids: Option<IdMap>,
    /// How many of [`Tree::places`] come before it.
    pub after_places: usize,
}

/// The place of a file system that the guest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which of the guest's mounts it is.
    pub index: usize,
    /// Normalized and absolute.
    pub destination: PathBuf,
    /// Its type.
    pub kind: String,
}

/// An id mapping, as user namespaces take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// For /proc/PID/uid_map.
    pub uids: String,
    /// For /proc/PID/gid_map.
    pub gids: String,
    /// Whether it holds for every mount below, too.
    pub recursive: bool,
}

/// Types that the guest mounts itself.
const GUEST_TYPES: [&str; 8] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"];

/// Splits the mounts between host and guest.
pub fn plan(spec: &Spec, rootfs: &Path, bundle: &Path) -> Result<(Tree, Vec<GuestMount>)> {
    let readonly = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let tree = Tree { rootfs: rootfs.to_path_buf(), readonly, ..Tree::default() };
    let mut split = Split { spec, bundle, tree, guest: Vec::new() };
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        split.add(mount, &format!("mounts[{index}]"))?;
    }
    Ok((split.tree, split.guest))
}

struct Split<'a> {
    spec: &'a Spec,
    bundle: &'a Path,
    tree: Tree,
    guest: Vec<GuestMount>,
}

impl Split<'_> {
    fn add(&mut self, mount: &Mount, field: &str) -> Result<()> {
        let destination = normalized(mount.destination());
        if destination == Path::new("/") {
            bail!("{field}.destination: {:?} is the root itself", mount.destination());
        }
        let given = mount.options().as_deref().unwrap_or_default();
        let mut options = Options::parse(given, &format!("{field}.options"))?;
        options.bind |= mount.typ().as_deref() == Some("bind");
        if options.remount {
            return self.remount(&destination, &options, field);
        }
        let kind = if options.bind { "bind" } else { guest_type(mount, field)? };
        check(&options, kind, field)?;
        let ids = id_map(self.spec, mount, &options, field)?;
        let index = self.guest.len();
        let source = if options.bind {
            self.tree.binds.push(Bind {
                index,
                source: bind_source(mount, field, self.bundle)?,
                destination: destination.clone(),
                export: index.to_string().into(),
                recursive: options.recursive,
                follows: options.propagation & libc::MS_SLAVE != 0,
                own: options.own,
                tree: options.tree,
                ids,
                after_places: self.tree.places.len(),
            });
            Source::Export(index.to_string().into())
        } else {
            self.tree.places.push(Place { index, destination: destination.clone(), kind: kind.into() });
            let name = mount.source().as_ref().map_or(kind.into(), |s| s.to_string_lossy().into_owned());
            let data = [options.superblock.as_slice(), &options.data].concat();
            Source::FileSystem { kind: kind.into(), name, options: data, copy_up: options.copy_up }
        };
        let attributes = Attributes { own: options.attributes(0), below: Vec::new() };
        self.guest.push(GuestMount { destination, source, attributes, propagation: options.propagation });
        Ok(())
    }

    /// Changes the mount that was made there before, which is the same as changing it afterwards: nothing runs in
    /// between. A bind's attributes so hold on the host as well.
    fn remount(&mut self, destination: &Path, options: &Options, field: &str) -> Result<()> {
        let index = self.guest.iter().rposition(|mount| mount.destination == destination);
        let index = index.with_context(|| {
            format!(
                "{field}.options: \"remount\" changes a mount, and none before is at {}",
                destination.display()
            )
        })?;
        let mount = &mut self.guest[index];
        let keep_atime = (options.own.set | options.own.clear) & libc::MOUNT_ATTR__ATIME == 0;
        let kept = if keep_atime { libc::MOUNT_ATTR__ATIME } else { 0 };
        mount.attributes.own = options.attributes(mount.attributes.own & kept);
        if options.propagation != 0 {
            mount.propagation = options.propagation;
        }
        if let Source::FileSystem { options: data, .. } = &mut mount.source {
            data.extend(options.superblock.iter().chain(&options.data).cloned());
        }
        if let Some(bind) = self.tree.binds.iter_mut().find(|bind| bind.index == index) {
            let set = options.attributes(bind.own.set & kept);
            let source_keeps = if set & libc::MOUNT_ATTR__ATIME == 0 { kept } else { 0 };
            bind.own = Change { set, clear: ALL & !source_keeps };
            bind.tree = options.tree;
        }
        Ok(())
    }
}

/// What a remount replaces.
const ALL: u64 = libc::MOUNT_ATTR_RDONLY
    | libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NODIRATIME
    | libc::MOUNT_ATTR_NOSYMFOLLOW
    | libc::MOUNT_ATTR__ATIME;

/// Options that mean nothing to a mount of this type would be lost.
fn check(options: &Options, kind: &str, field: &str) -> Result<()> {
    if let (true, Some(option)) = (options.bind, options.data.first()) {
        bail!("{field}.options: {option:?} means nothing to a bind mount");
    }
    if options.copy_up && kind != "tmpfs" {
        bail!("{field}.options: \"tmpcopyup\" means nothing to a mount of type {kind:?}, only to a tmpfs");
    }
    Ok(())
}

fn id_map(spec: &Spec, mount: &Mount, options: &Options, field: &str) -> Result<Option<IdMap>> {
    let own = (given(mount.uid_mappings().as_ref()), given(mount.gid_mappings().as_ref()));
    let (uids, gids) = match (own, options.ids) {
        ((None, None), None) => return Ok(None),
        ((Some(uids), Some(gids)), _) => (uids, gids),
        ((None, None), Some(_)) => users(spec).with_context(|| {
            format!("{field}.options: \"idmap\" needs uidMappings and gidMappings, or a user namespace's")
        })?,
        ((None, Some(_)), _) => bail!("{field}.uidMappings: missing, and there are gidMappings"),
        ((Some(_), None), _) => bail!("{field}.gidMappings: missing, and there are uidMappings"),
    };
    if !options.bind {
        bail!("{field}.uidMappings: ids are mapped for bind mounts alone");
    }
    let lines = |list: &[LinuxIdMapping]| -> String {
        list.iter().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect()
    };
    Ok(Some(IdMap { uids: lines(uids), gids: lines(gids), recursive: options.ids == Some(true) }))
}

fn users(spec: &Spec) -> Option<(&[LinuxIdMapping], &[LinuxIdMapping])> {
    let linux = spec.linux().as_ref()?;
    Some((given(linux.uid_mappings().as_ref())?, given(linux.gid_mappings().as_ref())?))
}

fn given(list: Option<&Vec<LinuxIdMapping>>) -> Option<&[LinuxIdMapping]> {
    list.map(Vec::as_slice).filter(|list| !list.is_empty())
}

fn guest_type<'a>(mount: &'a Mount, field: &str) -> Result<&'a str> {
    match mount.typ().as_deref() {
        // The guest has cgroup v2 alone.
        Some("cgroup") => Ok("cgroup2"),
        Some(kind) if GUEST_TYPES.contains(&kind) => Ok(kind),
        Some(kind) => {
            bail!("{field}.type: {kind:?} is not supported (bind, {})", GUEST_TYPES.join(", "))
        }
        None => bail!("{field}.type: missing, and the options do not ask for a bind"),
    }
}

fn bind_source(mount: &Mount, field: &str, bundle: &Path) -> Result<PathBuf> {
    match mount.source() {
        Some(source) if !source.as_os_str().is_empty() => Ok(bundle.join(source)),
        _ => bail!("{field}.source: a bind mount to {} needs one", mount.destination().display()),
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
        assert_eq!(tree.binds[0].own.of(0), libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
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
    fn a_remount_changes_the_mount_before_it() {
        let (tree, guest) = planned(json!([
            {"destination": "/a", "source": "/s", "options": ["bind", "noexec", "noatime"]},
            {"destination": "/t", "type": "tmpfs", "options": ["nosuid"]},
            {"destination": "/a/", "source": "none", "options": ["bind", "remount", "ro"]},
            {"destination": "/t", "type": "tmpfs", "options": ["remount", "size=4k"]},
        ]))
        .unwrap();
        assert_eq!((tree.binds.len(), guest.len()), (1, 2));
        assert_eq!(tree.binds[0].own.of(libc::MOUNT_ATTR_NODEV), 0x11);
        assert_eq!(guest[1].attributes.own, 0);
        assert!(matches!(&guest[1].source, Source::FileSystem { options, .. } if options == &["size=4k"]));
    }

    #[test]
    fn ids_are_mapped_by_the_mounts_own_or_the_user_namespaces_mapping() {
        let map = json!([{"containerID": 0, "hostID": 1000, "size": 5}, {"containerID": 9, "hostID": 9, "size": 1}]);
        let bind = |options: Value| json!({"destination": "/a", "source": "/s", "options": options});
        let mut mount = bind(json!(["rbind", "ridmap"]));
        (mount["uidMappings"], mount["gidMappings"]) = (map.clone(), map.clone());
        let (tree, _) = planned(json!([mount])).unwrap();
        let ids = tree.binds[0].ids.clone().unwrap();
        assert_eq!((ids.uids.as_str(), ids.recursive), ("0 1000 5\n9 9 1\n", true));
        let user = spec(|v| {
            v["mounts"] = json!([bind(json!(["bind", "idmap"]))]);
            (v["linux"]["uidMappings"], v["linux"]["gidMappings"]) = (map.clone(), map);
        });
        let (tree, _) = plan(&user, Path::new("/r"), Path::new("/b")).unwrap();
        assert_eq!(tree.binds[0].ids, Some(IdMap { recursive: false, ..ids }));
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (mount, words) in [
            (json!({"destination": "/", "source": "/s", "options": ["bind"]}), "destination"),
            (json!({"destination": "/a/..", "source": "/s", "options": ["bind"]}), "root itself"),
            (json!({"destination": "/a", "options": ["bind"]}), "source"),
            (json!({"destination": "/a", "type": "nfs", "source": "x"}), "\"nfs\""),
            (json!({"destination": "/a", "source": "/s", "options": ["bind", "rshared"]}), "rshared"),
            (
                json!({"destination": "/a", "source": "/s", "options": ["bind", "remount"]}),
                "none before is at /a",
            ),
            (json!({"destination": "/a", "type": "mqueue", "options": ["tmpcopyup"]}), "tmpcopyup"),
            (json!({"destination": "/a", "source": "/s", "options": ["bind", "idmap"]}), "uidMappings"),
            (
                json!({"destination": "/a", "source": "/s", "options": ["bind"],
                       "uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}),
                "gidMappings: missing",
            ),
            (json!({"destination": "/a", "type": "overlay", "options": ["lowerdir=/x"]}), "\"overlay\""),
            (json!({"destination": "/a", "source": "/s", "options": ["bind", "size=3"]}), "size=3"),
            (json!({"destination": "/a", "source": "/s"}), "type"),
        ] {
            let text = planned(json!([mount])).unwrap_err().to_string();
            assert!(text.contains("mounts[0]") && text.contains(words), "{text}");
        }
    }
}
