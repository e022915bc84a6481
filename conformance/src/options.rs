//! The suite's own command line.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// What it says when asked.
pub const USAGE: &str = "\
usage: a3s-box-conformance --runtime PATH --level contract|local|vm|systemd|smoke|engines --rootfs busybox=DIR
                           [--rootfs debian=DIR] [--profile NAME|FILE] [--beside PATH]... [--junit FILE]
                           [--installer PATH] [--package FILE] [--share DIR] [--full] [--list] [FILTER...]

Tests an OCI runtime through its command line. Root only. Prints TAP, with --beside or --level contract a table.
  --level   contract: what the spec and engines demand of any runtime; local: containers are cheap, everything runs;
            vm: every container is an emulated VM, many checks in each; systemd: VMs on a host that systemd runs, and
            what they have to do with it; smoke: does it work at all; engines: as docker, podman, containerd and
            CRI-O (by conmon) drive it
  --profile where the runtime differs, and how it then fails: a3s-box, runc, crun or a file [default: by its --version]
  --beside  hold another runtime to the contract as well
  --junit   write the results as JUnit's XML
  --rootfs  root file systems; they are copied, or used without being written to
  --installer  script that installs the runtime and engines' configuration, for the wishes install/*
  --package    the runtime's Debian package, for the wishes package/*: the runtime under test is out of sight meanwhile
  --share   other suites, in other machines, have the same directory: each test runs in the one that first claims it there
  --full    full length: 100 MB streams, long loops
  --list    print the tests' names
  FILTER    only tests whose name holds one of these words
";

/// What a container costs, and so how many there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Milliseconds.
    Local,
    /// Seconds.
    Vm,
    /// Seconds, on a host that systemd runs; only what has to do with that.
    Systemd,
    /// Seconds, and only a sign of life is wanted.
    Smoke,
    /// Seconds, and engines make them.
    Engines,
    /// Unknown: what any runtime has to do.
    Contract,
}

/// What was asked for.
#[derive(Debug)]
pub struct Options {
    /// The runtime under test.
    pub runtime: PathBuf,
    /// Name or file of its profile.
    pub profile: Option<String>,
    /// Other runtimes for the table.
    pub beside: Vec<PathBuf>,
    /// Where JUnit's XML goes.
    pub junit: Option<PathBuf>,
    /// Which tests.
    pub level: Level,
    /// Directory of a busybox root file system.
    pub busybox: PathBuf,
    /// Directory of a Debian root file system.
    pub debian: Option<PathBuf>,
    /// What puts the runtime and engines' configuration in place.
    pub installer: Option<PathBuf>,
    /// The runtime's Debian package.
    pub package: Option<PathBuf>,
    /// Where suites that share the work claim their part.
    pub share: Option<PathBuf>,
    /// Everything at full length.
    pub full: bool,
    /// Names alone.
    pub list: bool,
    /// Words in the names of the tests that are wanted.
    pub filters: Vec<String>,
}

/// Reads the command line; `None` where help was asked for.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Option<Options>> {
    let mut args = args.map(|arg| arg.into_string().map_err(|arg| anyhow::anyhow!("{arg:?} is not text")));
    let (mut runtime, mut level, mut busybox, mut debian) = (None, None, None, None);
    let (mut full, mut list, mut filters) = (false, false, Vec::new());
    let (mut profile, mut beside, mut junit) = (None, Vec::new(), None);
    let (mut installer, mut package, mut share) = (None, None, None);
    while let Some(arg) = args.next().transpose()? {
        let mut value = || args.next().transpose()?.with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--runtime" => runtime = Some(PathBuf::from(value()?)),
            "--profile" => profile = Some(value()?),
            "--beside" => beside.push(PathBuf::from(value()?)),
            "--installer" => installer = Some(PathBuf::from(value()?)),
            "--package" => package = Some(PathBuf::from(value()?)),
            "--share" => share = Some(PathBuf::from(value()?)),
            "--junit" => junit = Some(PathBuf::from(value()?)),
            "--level" => {
                level = Some(match value()?.as_str() {
                    "local" => Level::Local,
                    "vm" => Level::Vm,
                    "systemd" => Level::Systemd,
                    "smoke" => Level::Smoke,
                    "engines" => Level::Engines,
                    "contract" => Level::Contract,
                    other => bail!("--level {other}: contract, local, vm, systemd, smoke or engines"),
                });
            }
            "--rootfs" => {
                let value = value()?;
                match value.split_once('=') {
                    Some(("busybox", dir)) => busybox = Some(PathBuf::from(dir)),
                    Some(("debian", dir)) => debian = Some(PathBuf::from(dir)),
                    _ => bail!("--rootfs {value}: busybox=DIR or debian=DIR"),
                }
            }
            "--full" => full = true,
            "--list" => list = true,
            "--help" | "-h" => return Ok(None),
            other if other.starts_with('-') => bail!("unknown option {other}"),
            _ => filters.push(arg),
        }
    }
    Ok(Some(Options {
        runtime: runtime.context("--runtime is missing")?,
        level: level.context("--level is missing")?,
        busybox: busybox.context("--rootfs busybox=DIR is missing")?,
        debian,
        profile,
        beside,
        junit,
        installer,
        package,
        share,
        full,
        list,
        filters,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Option<Options>> {
        parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn a_whole_line() {
        let line = "--runtime /r --level vm --rootfs busybox=/b --rootfs debian=/d --full exec/ kill/";
        let options = parsed(line).unwrap().unwrap();
        assert_eq!(options.level, Level::Vm);
        assert_eq!(options.debian, Some("/d".into()));
        assert_eq!(options.filters, ["exec/", "kill/"]);
        assert!(options.full && !options.list);
    }

    #[test]
    fn mistakes_are_named() {
        for (line, word) in [
            ("--level local --rootfs busybox=/b", "--runtime"),
            ("--runtime /r --level big --rootfs busybox=/b", "big"),
            ("--runtime /r --level vm --rootfs alpine=/b", "alpine"),
            ("--runtime /r --frobnicate", "--frobnicate"),
        ] {
            assert!(parsed(line).unwrap_err().to_string().contains(word), "{line}");
        }
    }
}
