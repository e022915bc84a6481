//! The options of a mount, as runc reads them.
//!
//! One table says what each does; `features` lists it. In: one mount's options, in order. Out: [`Options`]. What the
//! table does not know is data for the guest kernel's file system, which refuses what it does not know itself.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// Bits of mount_setattr(2): those to clear, then those to set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Set, whatever they were.
    pub set: u64,
    /// Cleared before.
    pub clear: u64,
}

impl Change {
    fn set(&mut self, bits: u64) {
        if bits & libc::MOUNT_ATTR__ATIME != 0 {
            self.clear(libc::MOUNT_ATTR__ATIME);
        }
        self.set |= bits;
    }

    fn clear(&mut self, bits: u64) {
        self.set &= !bits;
        self.clear |= bits;
    }

    /// What it makes of these bits.
    pub fn of(self, attributes: u64) -> u64 {
        attributes & !self.clear | self.set
    }
}

/// What an option does.
#[derive(Clone, Copy)]
enum Effect {
    /// Sets bits of the mount; with an `r` before its name, of every mount below as well.
    Set(u64),
    /// Clears such bits.
    Clear(u64),
    /// Makes it a bind, perhaps with what is mounted below the source.
    Bind {
        recursive: bool,
    },
    /// `MS_*` of a propagation type.
    Propagation(libc::c_ulong),
    /// A word that fsconfig(2) takes. The kernel ignores it for a bind, and so do we.
    Superblock,
    /// Changes nothing on any file system that the guest mounts.
    Nothing,
    Remount,
    CopyUp,
}

use Effect::{Bind, Clear, CopyUp, Nothing, Propagation, Remount, Set, Superblock};

/// Every option but `idmap` and `ridmap`, which runc does not list either.
const TABLE: &[(&str, Effect)] = &[
    ("async", Superblock),
    ("atime", Clear(libc::MOUNT_ATTR__ATIME)),
    ("bind", Bind { recursive: false }),
    ("defaults", Nothing),
    ("dev", Clear(libc::MOUNT_ATTR_NODEV)),
    ("diratime", Clear(libc::MOUNT_ATTR_NODIRATIME)),
    ("dirsync", Superblock),
    ("exec", Clear(libc::MOUNT_ATTR_NOEXEC)),
    ("iversion", Nothing),
    ("lazytime", Superblock),
    ("loud", Nothing),
    ("mand", Superblock),
    ("noatime", Set(libc::MOUNT_ATTR_NOATIME)),
    ("nodev", Set(libc::MOUNT_ATTR_NODEV)),
    ("nodiratime", Set(libc::MOUNT_ATTR_NODIRATIME)),
    ("noexec", Set(libc::MOUNT_ATTR_NOEXEC)),
    ("noiversion", Nothing),
    ("nolazytime", Superblock),
    ("nomand", Superblock),
    ("norelatime", Clear(libc::MOUNT_ATTR__ATIME)),
    ("nostrictatime", Clear(libc::MOUNT_ATTR__ATIME)),
    ("nosuid", Set(libc::MOUNT_ATTR_NOSUID)),
    ("nosymfollow", Set(libc::MOUNT_ATTR_NOSYMFOLLOW)),
    ("private", Propagation(libc::MS_PRIVATE)),
    ("rbind", Bind { recursive: true }),
    ("relatime", Clear(libc::MOUNT_ATTR__ATIME)),
    ("remount", Remount),
    ("ro", Set(libc::MOUNT_ATTR_RDONLY)),
    ("rprivate", Propagation(libc::MS_PRIVATE | libc::MS_REC)),
    ("rslave", Propagation(libc::MS_SLAVE | libc::MS_REC)),
    ("runbindable", Propagation(libc::MS_UNBINDABLE | libc::MS_REC)),
    ("rw", Clear(libc::MOUNT_ATTR_RDONLY)),
    ("silent", Nothing),
    ("slave", Propagation(libc::MS_SLAVE)),
    ("strictatime", Set(libc::MOUNT_ATTR_STRICTATIME)),
    ("suid", Clear(libc::MOUNT_ATTR_NOSUID)),
    ("symfollow", Clear(libc::MOUNT_ATTR_NOSYMFOLLOW)),
    ("sync", Superblock),
    ("tmpcopyup", CopyUp),
    ("unbindable", Propagation(libc::MS_UNBINDABLE)),
];

fn lookup(option: &str) -> Option<Effect> {
    TABLE.iter().find(|(name, _)| *name == option).map(|(_, effect)| *effect)
}

/// The attribute that an option with an `r` before its name has below the mount.
fn recursive(option: &str) -> Option<Effect> {
    lookup(option.strip_prefix('r')?).filter(|effect| matches!(effect, Set(_) | Clear(_)))
}

/// The options that are honoured, for `features`; file systems take their own beside these.
pub fn names() -> Vec<String> {
    let below = TABLE.iter().map(|(name, _)| format!("r{name}")).filter(|name| recursive(name).is_some());
    let mut names: Vec<String> = TABLE.iter().map(|(name, _)| (*name).to_string()).chain(below).collect();
    names.sort();
    names
}

/// The bits that a list of attribute options sets, as /proc/PID/mountinfo shows a mount's.
pub fn attributes(list: &str) -> u64 {
    let mut change = Change::default();
    for option in list.split(',') {
        if let Some(Set(bits)) = lookup(option) {
            change.set(bits);
        }
    }
    change.set
}

/// What a propagation type of config.json is for mount(2); `None` for one that there is not.
pub fn propagation(word: &str) -> Option<u64> {
    match lookup(word) {
        Some(Propagation(flags)) => Some(flags),
        _ => None,
    }
}

/// A mount's options.
#[derive(Debug, Default)]
pub struct Options {
    /// Not a file system of the guest's own.
    pub bind: bool,
    /// Mounts below the source come along.
    pub recursive: bool,
    /// What is mounted there already is changed.
    pub remount: bool,
    /// A tmpfs starts with what lies at its destination.
    pub copy_up: bool,
    /// Ids are mapped; for every mount below as well if true.
    pub ids: Option<bool>,
    /// Bits of the mount itself.
    pub own: Change,
    /// Bits of the mount and everything below it, which win.
    pub tree: Change,
    /// `MS_*` of mount(2), 0 if none was given.
    pub propagation: u64,
    /// `sync` and the like.
    pub superblock: Vec<String>,
    /// The file system's own.
    pub data: Vec<String>,
}

impl Options {
    /// Reads the options in order: later ones win. `field` is their path in config.json.
    pub fn parse(options: &[String], field: &str) -> Result<Self> {
        let mut parsed = Options::default();
        for option in options {
            parsed.add(option, field)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str, field: &str) -> Result<()> {
        match lookup(option) {
            Some(Set(bits)) => self.own.set(bits),
            Some(Clear(bits)) => self.own.clear(bits),
            Some(Bind { recursive }) => (self.bind, self.recursive) = (true, self.recursive || recursive),
            Some(Propagation(flags)) => self.propagation = flags,
            Some(Superblock) => self.superblock.push(option.to_string()),
            Some(Remount) => self.remount = true,
            Some(CopyUp) => self.copy_up = true,
            Some(Nothing) => {}
            None => match (option, recursive(option)) {
                (_, Some(Set(bits))) => self.tree.set(bits),
                (_, Some(Clear(bits))) => self.tree.clear(bits),
                ("idmap" | "ridmap", _) => self.ids = Some(option == "ridmap"),
                ("shared" | "rshared", _) => {
                    bail!(
                        "{field}: {option:?} is not supported: a guest's mounts cannot propagate to the host"
                    )
                }
                _ => self.data.push(option.to_string()),
            },
        }
        Ok(())
    }

    /// The bits of a mount that begins with these.
    pub fn attributes(&self, first: u64) -> u64 {
        self.tree.of(self.own.of(first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(list: &str) -> Result<Options> {
        let list: Vec<String> = list.split(',').map(str::to_string).collect();
        Options::parse(&list, "mounts[0].options")
    }

    #[test]
    fn later_options_win_and_the_trees_over_the_mounts_own() {
        let bits = |list: &str| parsed(list).unwrap().attributes(libc::MOUNT_ATTR_NOEXEC);
        assert_eq!(bits("ro,rw"), libc::MOUNT_ATTR_NOEXEC);
        assert_eq!(bits("rw,exec,ro"), libc::MOUNT_ATTR_RDONLY);
        assert_eq!(bits("exec,noatime,strictatime"), libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(bits("exec,noatime,relatime"), 0);
        assert_eq!(bits("rexec,rro,rw"), libc::MOUNT_ATTR_RDONLY);
        assert_eq!(bits("ro,rrw,rnoatime,atime"), libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOATIME);
    }

    #[test]
    fn every_option_of_runcs_is_known_but_those_refused() {
        let runcs = "async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand noatime nodev \
             nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private ratime \
             rbind rdev rdiratime relatime remount rexec rnoatime rnodev rnodiratime rnoexec rnorelatime \
             rnostrictatime rnosuid rnosymfollow ro rprivate rrelatime rro rrw rslave rstrictatime rsuid rsymfollow \
             runbindable rw silent slave strictatime suid symfollow sync tmpcopyup unbindable";
        let runcs: Vec<&str> = runcs.split_whitespace().collect();
        assert_eq!(names(), runcs);
        for option in runcs {
            assert!(parsed(option).unwrap().data.is_empty(), "{option}");
        }
        for option in ["shared", "rshared"] {
            assert!(parsed(option).unwrap_err().to_string().contains(option));
        }
    }

    #[test]
    fn what_is_unknown_is_the_file_systems() {
        let options = parsed("rbind,size=4k,rsync,ridmap,sync,unbindable").unwrap();
        assert_eq!(options.data, ["size=4k", "rsync"]);
        assert_eq!((options.bind, options.recursive, options.ids), (true, true, Some(true)));
        assert_eq!(options.superblock, ["sync"]);
        assert_eq!(options.propagation, libc::MS_UNBINDABLE);
        assert_eq!(
            attributes("rw,nosuid,relatime,noexec"),
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC
        );
    }
}
