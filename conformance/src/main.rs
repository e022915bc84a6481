//! Black-box tests of an OCI runtime's command line.
//!
//! Knows nothing of the runtime's code: it makes bundles, runs commands, looks at what they print and what they leave.
//! [`cases`] runs the tests, [`wishes`] and [`engines`] hold them, [`requirements`] says what they are for, [`profile`] where
//! a runtime differs, [`report`] tells; [`world`], [`container`] and [`config`] are what they are made of; [`process`] keeps
//! a hanging command from hanging the suite, [`pty`] is a terminal to type on, [`documents`] what users are told to type;
//! [`leaks`] counts what is left at the end; [`tracer`] lets a system call fail.

#![forbid(unsafe_code)]

mod apparmor;
mod cases;
mod config;
mod container;
mod documents;
mod engines;
mod leaks;
mod options;
mod process;
mod profile;
mod pty;
mod report;
mod requirements;
mod sha256;
#[cfg(target_arch = "x86_64")]
mod tracer;
mod wishes;
mod world;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use options::{Level, Options};
use world::World;

fn main() -> ExitCode {
    #[cfg(target_arch = "x86_64")]
    if std::env::args_os().nth(1).is_some_and(|word| word == tracer::WORD) {
        return tracer::main(std::env::args_os().skip(2)).unwrap_or_else(|error| {
            eprintln!("a3s-box-conformance: {error:#}");
            ExitCode::from(tracer::BROKEN)
        });
    }
    match options::parse(std::env::args_os().skip(1)) {
        Ok(Some(options)) => match suite(&options) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("a3s-box-conformance: {error:#}");
                ExitCode::from(2)
            }
        },
        Ok(None) => {
            print!("{}", options::USAGE);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("a3s-box-conformance: {error:#}\n{}", options::USAGE);
            ExitCode::from(2)
        }
    }
}

fn suite(options: &Options) -> Result<bool> {
    let mut cases = wishes::all();
    cases.extend(engines::all());
    if options.list {
        cases::names(&cases, options.level).iter().for_each(|name| println!("{name}"));
        return Ok(true);
    }
    ensure!(rustix::process::geteuid().is_root(), "containers need root");
    // What loses its parent becomes ours, as it becomes an engine's.
    let own = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own)).context("become a subreaper")?;
    let mut reports = Vec::new();
    let mine = (&options.runtime, options.level, options.profile.as_deref());
    let others = options.beside.iter().map(|path| (path, Level::Contract, None));
    for (runtime, level, profile) in [mine].into_iter().chain(others) {
        reports.push(hold(&cases, options, runtime, level, profile)?);
    }
    if options.level == Level::Contract || reports.len() > 1 {
        println!("\n{}", report::table(&reports));
    }
    if let Some(path) = &options.junit {
        std::fs::write(path, report::junit(&reports)).with_context(|| format!("write {}", path.display()))?;
    }
    let counts = reports.iter().map(report::Report::counts);
    let (passed, failed) = counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// Holds one runtime to its wishes.
fn hold(
    cases: &[cases::Case],
    options: &Options,
    runtime: &Path,
    level: Level,
    profile: Option<&str>,
) -> Result<report::Report> {
    // For the whole process: containers outlive no test, and the copies of the root file systems go with them.
    let world: &'static World = Box::leak(Box::new(World::new(options, runtime, level)?));
    let profile = profile::Profile::find(profile, runtime)?;
    let mut report = report::Report::new(profile::name_of(runtime)?, profile);
    cases::run(cases, options, world, &mut report);
    world::remove_tree(&world.dir)?;
    Ok(report)
}
