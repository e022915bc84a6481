//! Where the container's host cgroup lies, from `linux.cgroupsPath` and the driver.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::cli::CgroupManager;

/// Where containers without a `cgroupsPath` live.
pub const OWN_PARENT: &str = "a3s-box";

/// A scope of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// The slice it is in; systemd knows where that lies (`a-b.slice` in `a.slice`).
    pub slice: String,
    /// Its name.
    pub unit: String,
}

/// Where the cgroup lies, and so who makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A path below each hierarchy's root, made by us.
    Path(PathBuf),
    /// A transient scope, made by systemd.
    Scope(Scope),
}

/// Reads `linux.cgroupsPath` as the driver does, for the host's root or for others; `None` where there shall be no cgroup.
pub fn place(id: &str, path: Option<&Path>, manager: CgroupManager, is_root: bool) -> Result<Option<Place>> {
    let path = path.filter(|path| !path.as_os_str().is_empty());
    Ok(match manager {
        CgroupManager::Disabled => None,
        CgroupManager::Cgroupfs => Some(Place::Path(directory(id, path)?)),
        CgroupManager::Systemd => Some(Place::Scope(scope(id, path, is_root)?)),
    })
}

/// An absolute path is taken as it is, a relative one lies below `/a3s-box`, as does a container without one.
fn directory(id: &str, path: Option<&Path>) -> Result<PathBuf> {
    let given = match path {
        None => Path::new(OWN_PARENT).join(id),
        Some(path) if path.is_absolute() => path.strip_prefix("/").unwrap_or(path).to_path_buf(),
        Some(path) => Path::new(OWN_PARENT).join(path),
    };
    if given.as_os_str().is_empty() || given.components().any(|c| !matches!(c, Component::Normal(_))) {
        bail!("linux.cgroupsPath: {:?} does not name a cgroup", path.unwrap_or(Path::new("")));
    }
    Ok(given)
}

/// `slice:prefix:name`, of which slice and prefix may be empty.
fn scope(id: &str, path: Option<&Path>, is_root: bool) -> Result<Scope> {
    let text = path.map(|path| path.to_string_lossy().into_owned());
    let text = text.unwrap_or_else(|| format!(":{OWN_PARENT}:{id}"));
    let refuse = |why: &str| bail!("linux.cgroupsPath: {text:?} {why}");
    let [slice, prefix, name] = text.split(':').collect::<Vec<_>>()[..] else {
        return refuse("is not of the form slice:prefix:name, which the systemd cgroup driver takes");
    };
    let slice = match (slice, is_root) {
        ("", true) => "system.slice",
        ("", false) => "user.slice",
        (given, _) => given,
    };
    if !slice.ends_with(".slice") || slice.contains('/') {
        return refuse("does not begin with the name of a slice");
    }
    if name.is_empty() || name.ends_with(".slice") {
        return refuse("does not end with a name for a scope");
    }
    let dash = if prefix.is_empty() { "" } else { "-" };
    let unit = format!("{}.scope", escape(&format!("{prefix}{dash}{name}")));
    Ok(Scope { slice: slice.into(), unit })
}

/// What a unit's name cannot hold, as systemd writes it (systemd.unit(5)). Ids may have a `+`.
fn escape(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("\\x{byte:02x}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories() {
        let path = |text: &str| directory("c1", Some(Path::new(text)));
        assert_eq!(path("/docker/abc").unwrap(), Path::new("docker/abc"));
        assert_eq!(path("pod/abc").unwrap(), Path::new("a3s-box/pod/abc"));
        assert_eq!(path("system.slice:docker:c1").unwrap(), Path::new("a3s-box/system.slice:docker:c1"));
        assert_eq!(directory("c1", None).unwrap(), Path::new("a3s-box/c1"));
        for hostile in ["/", "/a/../../etc", "../x"] {
            assert!(path(hostile).unwrap_err().to_string().contains("cgroupsPath"), "{hostile}");
        }
    }

    #[test]
    fn scopes() {
        for (text, slice, unit) in [
            ("system.slice:docker:abc", "system.slice", "docker-abc.scope"),
            ("kubepods-pod1.slice:cri-containerd:abc", "kubepods-pod1.slice", "cri-containerd-abc.scope"),
            ("-.slice::abc", "-.slice", "abc.scope"),
            (":p:abc", "system.slice", "p-abc.scope"),
            ("a.slice:p:x+1", "a.slice", "p-x\\x2b1.scope"),
        ] {
            let expected = Scope { slice: slice.into(), unit: unit.into() };
            let found = scope("c1", Some(Path::new(text)), true).unwrap();
            assert_eq!(found, expected, "{text}");
        }
        assert_eq!(scope("c1", None, true).unwrap().unit, "a3s-box-c1.scope");
        assert_eq!(scope("c1", None, false).unwrap().slice, "user.slice");
    }

    #[test]
    fn what_names_no_scope_is_refused() {
        for (text, words) in [
            ("/docker/abc", "slice:prefix:name"),
            ("a:b", "slice:prefix:name"),
            ("a.slice:b:c:d", "slice:prefix:name"),
            ("system:docker:abc", "name of a slice"),
            ("a/b.slice:docker:abc", "name of a slice"),
            ("a.slice:docker:", "name for a scope"),
            ("a.slice:docker:b.slice", "name for a scope"),
        ] {
            let error = scope("c1", Some(Path::new(text)), true).unwrap_err().to_string();
            assert!(error.starts_with("linux.cgroupsPath: ") && error.contains(words), "{error}");
        }
    }

    #[test]
    fn no_driver_no_cgroup() {
        assert_eq!(place("c1", Some(Path::new("/x")), CgroupManager::Disabled, true).unwrap(), None);
    }
}
