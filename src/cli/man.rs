//! The man pages: `man/*.8` are what `--help` says, `a3s-box.toml.5` is the table of settings, each with the hand-written
//! sections of `man/sections`.
//!
//! In: the command line's definitions, the settings, the sections. Out: one page a verb, one of the file. With
//! A3S_BOX_WRITE_MAN set the test writes them (`scripts/man`), else it finds out which have gone stale.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::Cli;
use crate::plan::settings::{KEYS, Key, PREFIX, Settings};

/// Verbs that only say that they are not supported.
const WITHOUT_PAGE: [&str; 2] = ["checkpoint", "restore"];

/// cargo runs tests in the package's directory.
fn dir() -> PathBuf {
    PathBuf::from("man")
}

/// Name and text of every page.
fn pages() -> Vec<(String, String)> {
    let mut top = Cli::command().disable_help_subcommand(true);
    top.build();
    let top = WITHOUT_PAGE.iter().fold(top, |top, name| top.mut_subcommand(name, |verb| verb.hide(true)));
    let verbs = top.get_subcommands().filter(|verb| !verb.is_hide_set());
    let mut pages: Vec<_> = std::iter::once(&top).chain(verbs).map(page).collect();
    pages.push(settings());
    pages
}

/// The hand-written part of a page: what goes on with its description, and the sections after that.
fn own(name: &str) -> (String, String) {
    let own = fs::read_to_string(dir().join("sections").join(format!("{name}.man"))).unwrap_or_default();
    let own = examples(&own);
    let (description, sections) = own.split_at(own.find(".SH ").unwrap_or(own.len()));
    (description.into(), sections.into())
}

/// What is to be copied must come out of a formatter as it went in.
fn examples(text: &str) -> String {
    let mut is_code = false;
    let mut line = |line: &str| {
        is_code = line == ".EX" || is_code && line != ".EE";
        match is_code && line != ".EX" {
            true => {
                line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq").replace('~', "\\(ti")
                    + "\n"
            }
            false => format!("{line}\n"),
        }
    };
    text.lines().map(&mut line).collect()
}

/// The page of the configuration file.
fn settings() -> (String, String) {
    let name = "a3s-box.toml";
    let (description, sections) = own(name);
    let version = env!("CARGO_PKG_VERSION");
    let text = [
        format!(".TH A3S-BOX.TOML 5 \"\" \"a3s-box {version}\" \"File Formats Manual\"\n"),
        ".SH NAME\na3s\\-box.toml \\- what the host decides about the microVMs of a3s\\-box\n".into(),
        format!(".SH DESCRIPTION\n{description}.SH KEYS\n"),
        KEYS.iter().map(setting).collect(),
        sections,
        ".SH SEE ALSO\n.BR a3s-box (8),\n.BR a3s-box-annotations (7)\n".into(),
    ];
    (format!("{name}.5"), text.concat())
}

fn setting(key: &Key) -> String {
    let built_in = key
        .built_in()
        .map_or(String::new(), |value| format!("Built-in: \\fB{}\\fR.\n", escaped(&value.to_string())));
    let (name, values, about) = (escaped(key.name), escaped(key.values), escaped(key.about));
    format!(".TP\n\\fB{name}\\fR = \\fI{values}\\fR\n{about}\n{built_in}")
}

/// Text as roff: words between backquotes are bold.
fn escaped(text: &str) -> String {
    let parts = text.replace('\\', "\\\\").replace('-', "\\-");
    let bold =
        |(index, part): (usize, &str)| if index % 2 == 1 { format!("\\fB{part}\\fR") } else { part.into() };
    parts.split('`').enumerate().map(bold).collect()
}

fn page(command: &Command) -> (String, String) {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_string();
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .section("8")
        .date("")
        .source(concat!("a3s-box ", env!("CARGO_PKG_VERSION")))
        .manual("System Manager's Manual");
    let (description, sections) = own(&name);
    let also = if command.has_subcommands() {
        "a3s-box.toml (5),\n.BR a3s-box-annotations (7)"
    } else {
        "a3s-box (8)"
    };
    let text = [
        roff(|to| man.render_title(to)),
        roff(|to| man.render_name_section(to)),
        roff(|to| man.render_synopsis_section(to)),
        roff(|to| man.render_description_section(to)),
        if description.is_empty() { String::new() } else { format!(".PP\n{description}") },
        roff(|to| man.render_options_section(to)),
        if command.has_subcommands() { roff(|to| man.render_subcommands_section(to)) } else { String::new() },
        sections,
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
    let names: Vec<_> =
        pages().into_iter().map(|(name, _)| format!("{}.man", &name[..name.len() - 2])).collect();
    for entry in fs::read_dir(dir().join("sections")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(names.contains(&name), "man/sections/{name} belongs to no page");
    }
}

/// Hand-written, but for what the tables of settings say: which there are, their values, what is allowed unasked.
#[test]
fn the_page_of_annotations_knows_them_all() {
    let page = fs::read_to_string(dir().join("a3s-box-annotations.7")).unwrap();
    let entries: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix(".BR a3s.box/")).collect();
    let entries = entries.into_iter().filter(|entry| entry.contains(" = "));
    let words =
        |text: &str| text.split(|c: char| !c.is_alphanumeric()).map(str::to_owned).collect::<Vec<_>>();
    let mut known = BTreeSet::new();
    for entry in entries {
        let name = entry.split([' ', '"']).next().unwrap();
        let key = KEYS.iter().find(|key| key.is_annotation && key.name == name);
        let values = key.unwrap_or_else(|| panic!("{PREFIX}{name} does not act")).values;
        let said =
            words(values).into_iter().filter(|word| word.parse::<u32>().is_ok() || name == "network-mode");
        for word in said.filter(|word| !["one", "of", ""].contains(&word.as_str())) {
            assert!(words(entry).contains(&word), "{PREFIX}{name} is {values}, not {entry:?}");
        }
        known.insert(name);
    }
    let all = KEYS.iter().filter(|key| key.is_annotation).map(|key| key.name);
    assert_eq!(known, all.collect());
    for allowed in Settings::built_in().allowed_annotations.unwrap() {
        let (bold, line) =
            (format!(" {allowed} "), page.lines().find(|line| line.starts_with(".BR vcpus \", \"")).unwrap());
        assert!(
            line.replace("\"", " ").replace(',', " ").contains(bold.trim_end()),
            "{allowed} is allowed, but {line:?}"
        );
    }
}
