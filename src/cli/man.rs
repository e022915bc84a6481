//! The man pages: `man/*.8` are what `--help` says, and the hand-written sections of `man/sections`.
//!
//! In: the command line's definitions, the sections. Out: one page a verb. With A3S_BOX_WRITE_MAN set the test writes them
//! (`scripts/man`), else it finds out which have gone stale.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::Cli;

/// Verbs that only say that they are not supported.
const WITHOUT_PAGE: [&str; 2] = ["checkpoint", "restore"];

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("man")
}

/// Name and text of every page.
fn pages() -> Vec<(String, String)> {
    let mut top = Cli::command().disable_help_subcommand(true);
    top.build();
    let verbs = top.get_subcommands().filter(|verb| !WITHOUT_PAGE.contains(&verb.get_name()));
    std::iter::once(&top).chain(verbs).map(page).collect()
}

fn page(command: &Command) -> (String, String) {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_string();
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .section("8")
        .date("")
        .source(concat!("a3s-box ", env!("CARGO_PKG_VERSION")))
        .manual("System Manager's Manual");
    let own = fs::read_to_string(dir().join("sections").join(format!("{name}.man"))).unwrap_or_default();
    // What comes before its first heading goes on with the description.
    let (description, sections) = own.split_at(own.find(".SH ").unwrap_or(own.len()));
    let also = if command.has_subcommands() { "a3s-box-annotations (7)" } else { "a3s-box (8)" };
    let text = [
        roff(|to| man.render_title(to)),
        roff(|to| man.render_name_section(to)),
        roff(|to| man.render_synopsis_section(to)),
        roff(|to| man.render_description_section(to)),
        if description.is_empty() { String::new() } else { format!(".PP\n{description}") },
        roff(|to| man.render_options_section(to)),
        if command.has_subcommands() { roff(|to| man.render_subcommands_section(to)) } else { String::new() },
        sections.to_string(),
        format!(".SH SEE ALSO\n.BR {also}\n"),
    ];
    (format!("{name}.8"), text.concat())
}

fn roff(render: impl FnOnce(&mut Vec<u8>) -> std::io::Result<()>) -> String {
    let mut text = Vec::new();
    render(&mut text).unwrap();
    format!("{}\n", String::from_utf8(text).unwrap().trim_end())
}

#[test]
fn pages_say_what_help_says() {
    let write = std::env::var_os("A3S_BOX_WRITE_MAN").is_some();
    for (name, text) in pages() {
        let path = dir().join(&name);
        if write {
            fs::write(&path, text).unwrap();
        } else {
            let is_same = fs::read_to_string(&path).unwrap_or_default() == text;
            assert!(is_same, "man/{name} is stale: scripts/man writes it anew");
        }
    }
}

#[test]
fn every_section_belongs_to_a_page() {
    let names: Vec<_> = pages().into_iter().map(|(name, _)| name.replace(".8", ".man")).collect();
    for entry in fs::read_dir(dir().join("sections")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(names.contains(&name), "man/sections/{name} belongs to no verb");
    }
}
