//! `completions`: what a shell needs to complete this command line.

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::{self, Cli};

/// The verb.
pub fn completions(args: &cli::Completions) -> Result<i32> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "a3s-box", &mut script);
    super::write_out(&String::from_utf8(script)?)?;
    Ok(0)
}
