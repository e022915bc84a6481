//! config.json, made for each test: what an engine would write, then the test's own changes.
//!
//! In: changes by JSON pointer. Out: a bundle directory. Must not: use anything of the runtime's.

pub mod engines;

use serde_json::{Map, Value, json};

/// A runtime configuration in the making.
#[derive(Clone, Debug)]
pub struct Config(Value);

impl Config {
    /// What engines ask for by default, for a small VM. The root file system is set when the bundle is made.
    pub fn new(args: &[&str]) -> Self {
        let capabilities =
            json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SETGID"]);
        let namespaces =
            ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
        Config(json!({
            "ociVersion": "1.2.0",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": args,
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "FROM_CONFIG=yes"],
                "cwd": "/",
                "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
                "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512 }],
            },
            "root": { "path": "rootfs" },
            "hostname": "conformance",
            "mounts": mounts(),
            "annotations": { "a3s.box/vcpus": "1", "a3s.box/memory-mib": "256" },
            "linux": { "namespaces": namespaces },
        }))
    }

    /// Any document.
    pub fn of(document: Value) -> Self {
        Config(document)
    }

    /// A shell script as the container's process.
    pub fn sh(script: &str) -> Self {
        Config::new(&["sh", "-c", script])
    }

    /// A process that waits for its end without doing anything, until SIGTERM.
    pub fn idle() -> Self {
        Config::sh("trap 'exit 0' TERM; sleep 100000 & wait")
    }

    /// Sets the value at a JSON pointer; missing objects on the way are made.
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let mut place = &mut self.0;
        for name in pointer.split('/').skip(1).map(|name| name.replace("~1", "/")) {
            let name = name.as_str();
            if place.is_null() {
                *place = Value::Object(Map::new());
            }
            place = match place {
                Value::Array(items) => match name.parse::<usize>() {
                    Ok(index) if index < items.len() => &mut items[index],
                    _ => {
                        items.push(Value::Null);
                        let last = items.len() - 1;
                        &mut items[last]
                    }
                },
                object => &mut object[name],
            };
        }
        *place = value;
        self
    }

    /// Takes away a field of an object.
    pub fn without(mut self, pointer: &str) -> Self {
        if let Some((parent, name)) = pointer.rsplit_once('/')
            && let Some(Value::Object(fields)) = self.0.pointer_mut(parent)
        {
            fields.remove(name);
        }
        self
    }

    /// Adds a mount after the ones there are.
    pub fn mount(self, destination: &str, kind: &str, source: &str, options: &[&str]) -> Self {
        self.set("/mounts/-", mount(destination, kind, source, options))
    }

    /// Adds a bind mount.
    pub fn bind(self, source: &std::path::Path, destination: &str, options: &[&str]) -> Self {
        let options: Vec<&str> = ["rbind", "rprivate"].iter().chain(options).copied().collect();
        self.mount(destination, "bind", &source.to_string_lossy(), &options)
    }

    /// The document.
    pub fn value(&self) -> &Value {
        &self.0
    }
}

/// One mount of config.json.
pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

fn mounts() -> Value {
    let plain = ["nosuid", "noexec", "nodev"];
    json!([
        mount("/proc", "proc", "proc", &plain),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &plain),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev", "relatime"]),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_reach_their_place() {
        let config = Config::new(&["a"])
            .set("/process/user/additionalGids", json!([5]))
            .set("/x/y", json!(1))
            .mount("/data", "tmpfs", "tmpfs", &["ro"])
            .without("/hostname");
        assert_eq!(config.0["process"]["user"]["additionalGids"], json!([5]));
        assert_eq!(config.0["x"]["y"], json!(1));
        assert_eq!(config.0["mounts"].as_array().map(Vec::len), Some(8));
        assert_eq!(config.0["mounts"][7]["destination"], json!("/data"));
        assert!(config.0.get("hostname").is_none());
    }
}
