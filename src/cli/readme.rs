//! The messages that README quotes are those of the code.
//!
//! In: its tables between `<!-- messages -->` marks, the sources. Out: which message nobody says any more.

use std::fs;
use std::path::{Path, PathBuf};

/// What stands for a value in a quoted message.
const GAP: char = '…';
/// Shorter pieces between gaps prove nothing.
const LEAST: usize = 6;

fn sources(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, all),
            false if path.extension().is_some_and(|extension| extension == "rs") => all.push(path),
            false => {}
        }
    }
}

/// What the code says: without its tests, and with strings that go on in the next line in one.
fn code() -> String {
    // cargo runs tests in the package's directory.
    let root = Path::new("");
    let mut files = Vec::new();
    for dir in ["src", "guest-init/src", "guest-init/hook/src", "guest-init/mount/src"] {
        sources(&root.join(dir), &mut files);
    }
    files.retain(|file| {
        !file.starts_with(root.join("src/cli")) || file.file_name().is_some_and(|name| name == "cli.rs")
    });
    let mut text = String::new();
    for file in files {
        let source = fs::read_to_string(file).unwrap();
        let mut lines = source.split("#[cfg(test)]\nmod tests").next().unwrap().split("\\\n");
        text += lines.next().unwrap_or_default();
        lines.for_each(|line| text += line.trim_start());
    }
    text.replace("\\\"", "\"")
}

/// Texts between backquotes, in the cells that quote: beside what is asked for, or what is seen first.
fn messages() -> Vec<String> {
    let readme = include_str!("../../README.md");
    let tables =
        readme.split("<!-- messages -->\n").skip(1).map(|rest| rest.split("<!-- end").next().unwrap());
    let mut all = Vec::new();
    for table in tables {
        let column = if table.starts_with("| you ask for |") { 2 } else { 1 };
        let cells = table.lines().skip(2).filter_map(|row| row.split(" | ").nth(column - 1));
        for cell in cells {
            all.extend(cell.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    all
}

#[test]
fn the_readme_quotes_what_the_code_says() {
    let (code, messages) = (code(), messages());
    assert!(messages.len() > 25, "{messages:?}");
    for message in messages {
        let pieces = message.split(GAP).map(|piece| piece.trim_matches(|c: char| " :;,()".contains(c)));
        let pieces: Vec<_> = pieces.filter(|piece| piece.len() >= LEAST).collect();
        assert!(!pieces.is_empty(), "{message:?} says nothing");
        for piece in pieces {
            assert!(code.contains(piece), "nothing says {piece:?} (README: {message:?})");
        }
    }
}
