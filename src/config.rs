//! The host's configuration: `/etc/a3s-box/config.toml` and its drop-ins, or one file by flag.
//!
//! In: files that nobody but root and the caller can have written. Out: [`Settings`], and which file each comes from.
//! Must not: take a file that others can write to (it names a library that VMMs load), or pass over a key.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::plan::settings::{FILE, KEYS, Key, Settings};

/// The directory of drop-ins, which win over [`FILE`]; of two, the one whose name comes later.
const DROP_INS: &str = "/etc/a3s-box/conf.d";

/// What was read.
pub struct Config(Vec<(String, Settings)>);

/// One setting that holds.
#[derive(Serialize)]
pub struct Effective {
    /// Its key.
    pub name: &'static str,
    /// What it is.
    pub value: Value,
    /// The file that says so, or that none does.
    pub from: String,
}

/// Reads `file`, else the host's own, of which there may be none.
pub fn load(file: Option<&Path>) -> Result<Config> {
    let files = match file {
        Some(file) => vec![file.to_path_buf()],
        None => hosts()?,
    };
    let read = |path: PathBuf| {
        let settings = open(&path).and_then(|text| parse(&text));
        let settings = settings.with_context(|| format!("configuration {}", path.display()))?;
        Ok((path.display().to_string(), settings))
    };
    Ok(Config(files.into_iter().map(read).collect::<Result<_>>()?))
}

/// The files that there are, those that win last.
fn hosts() -> Result<Vec<PathBuf>> {
    let mut drop_ins = match fs::read_dir(DROP_INS) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
    .with_context(|| format!("configuration {DROP_INS}"))?;
    drop_ins.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    drop_ins.sort();
    let main = match fs::symlink_metadata(FILE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        _ => Some(PathBuf::from(FILE)),
    };
    Ok(main.into_iter().chain(drop_ins).collect())
}

/// The text of a file that only root or the caller can have written.
fn open(path: &Path) -> Result<String> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = fs::metadata(dir)?;
    let mut file = File::open(path)?;
    let own = file.metadata()?;
    if !own.is_file() {
        bail!("it is not a regular file");
    }
    trusted(&own)?;
    // In a sticky directory nobody replaces the file of another.
    if parent.mode() & libc::S_ISVTX == 0 {
        trusted(&parent).with_context(|| format!("its directory {}", dir.display()))?;
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn trusted(metadata: &Metadata) -> Result<()> {
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let caller = nix::unistd::geteuid().as_raw();
    if ![0, caller].contains(&owner) && Some(owner) != outsider() {
        bail!("it belongs to user {owner}, who is neither root nor the caller");
    }
    if mode & 0o022 != 0 {
        bail!("others can write to it (mode {mode:04o}): `chmod go-w` it");
    }
    Ok(())
}

/// In a user namespace, where the host's root may not be known by its number: the number of all that are not known.
fn outsider() -> Option<u32> {
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    let is_whole = map.split_whitespace().eq(["0", "0", "4294967295"]);
    let overflow = fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?;
    overflow.trim().parse().ok().filter(|_| !is_whole)
}

fn parse(text: &str) -> Result<Settings> {
    let keys: Map<String, Value> = toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let line = line.map_or(String::new(), |line| format!("line {line}: "));
        anyhow!("{line}{}", error.message().replace('\n', ", "))
    })?;
    let mut settings = Settings::default();
    keys.iter().try_for_each(|(name, value)| settings.set(name, value))?;
    Ok(settings)
}

impl Config {
    /// What the files decide.
    pub fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        for (key, (value, _)) in KEYS.iter().filter_map(|key| Some((key, self.decided(key)?))) {
            // It was taken before.
            let _ = settings.set(key.name, &value);
        }
        settings
    }

    /// What holds for containers that ask for nothing else.
    pub fn effective(&self) -> Vec<Effective> {
        let effective = |key: &Key| {
            let (value, from) = match self.decided(key) {
                Some((value, file)) => (value, file.to_string()),
                None => (key.built_in().unwrap_or("found by the dynamic linker".into()), "built-in".into()),
            };
            Effective { name: key.name, value, from }
        };
        KEYS.iter().map(effective).collect()
    }

    fn decided(&self, key: &Key) -> Option<(Value, &str)> {
        self.0.iter().rev().find_map(|(file, settings)| Some((key.get(settings)?, file.as_str())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read() {
        let text = "# all of it\nvcpus = 4\nmemory-mib = 512\nnetwork-mode = \"none\"\nnics = 0\n\
                    libkrunfw = '/opt/libkrunfw.so.5'\nallowed-annotations = [\"vcpus\"]\n";
        let settings = parse(text).unwrap();
        assert_eq!((settings.vcpus, settings.memory_mib, settings.nics), (Some(4), Some(512), Some(0)));
        assert_eq!(settings.libkrunfw, Some("/opt/libkrunfw.so.5".into()));
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    #[test]
    fn the_example_changes_nothing_and_is_right_where_it_is_uncommented() {
        let example = crate::plan::settings::text();
        assert_eq!(parse(&example).unwrap(), Settings::default());
        let lines = example.lines().map(|line| line.strip_prefix('#').filter(|line| !line.starts_with(' ')));
        let settings = parse(&lines.flatten().collect::<Vec<_>>().join("\n")).unwrap();
        let built_in = Settings { libkrunfw: None, ..settings };
        assert_eq!(built_in, Settings::built_in());
    }

    #[test]
    fn mistakes_are_one_line() {
        for (text, words) in [
            ("vcpus = ", "line 1: "),
            ("\n\nvcpus = 1\nvcpus = 2\n", "line 4: "),
            ("vcpus = 99", "vcpus: 99 is not a number from 1 to 16"),
            ("cpus = 9", "cpus: is none of the keys"),
            ("[vcpus]\nx = 1", "vcpus: {\"x\":1} is not"),
            ("vcpus = 1979-05-27", "vcpus: "),
            ("vcpus = nan", "vcpus: "),
        ] {
            let text = format!("{:#}", parse(text).unwrap_err());
            assert!(text.contains(words) && !text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn the_last_file_that_says_something_wins() {
        let file = |name: &str, text: &str| (name.to_string(), parse(text).unwrap());
        let config = Config(vec![file("a", "vcpus = 1\nnics = 1"), file("b", "vcpus = 3"), file("c", "")]);
        let settings = config.settings();
        assert_eq!((settings.vcpus, settings.nics, settings.memory_mib), (Some(3), Some(1), None));
        let shown =
            |effective: &Effective| format!("{}={} {}", effective.name, effective.value, effective.from);
        let all: Vec<String> = config.effective().iter().map(shown).collect();
        assert_eq!(all[..3], ["vcpus=3 b", "memory-mib=2048 built-in", "nics=1 a"]);
        assert_eq!(all.len(), KEYS.len());
    }
}
