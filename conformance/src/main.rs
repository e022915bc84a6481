//! Black-box tests of an OCI runtime's command line.
//!
//! Knows nothing of the runtime's code: it makes bundles, runs commands, looks at what they print and what they leave.
//! [`cases`] runs the tests, [`wishes`] and [`engines`] hold them; [`world`], [`container`] and [`config`] are what they
//! are made of; [`process`] keeps a hanging command from hanging the suite, [`pty`] is a terminal to type on; [`leaks`]
//! counts what is left at the end.

#![forbid(unsafe_code)]

mod cases;
mod config;
mod container;
mod engines;
mod leaks;
mod options;
mod process;
mod pty;
mod sha256;
mod wishes;
mod world;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use options::Options;
use world::World;

fn main() -> ExitCode {
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
    // For the whole process: containers outlive no test, and the copies of the root file systems go with them.
    let world: &'static World = Box::leak(Box::new(World::new(options)?));
    let tap = cases::run(&cases, options, world);
    let removed = world::remove_tree(&world.dir);
    println!("{} passed, {} failed", tap.passed, tap.failed);
    removed.map(|()| tap.failed == 0)
}
