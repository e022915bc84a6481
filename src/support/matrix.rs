//! The table for people: fields beside each other that fare alike share a line.

use super::Support::{Both, Guest, Host, Ignored, Label, Refused};
use super::fields::{FIELDS, Field};

/// As a table in Markdown, as the README shows it.
pub fn markdown() -> String {
    let mut text = "| field of config.json | acts | |\n|---|---|---|\n".to_string();
    for line in lines() {
        text += &format!("| `{}` | {} | {} |\n", line.name(), line.place(), line.words());
    }
    text
}

/// As columns.
pub fn text() -> String {
    let lines = lines();
    let width = lines.iter().map(|line| line.name().len()).max().unwrap_or(0);
    let columns = |line: &Line| format!("{:width$}  {:7}  {}", line.name(), line.place(), line.words());
    lines.iter().map(|line| format!("{}\n", columns(line).trim_end())).collect()
}

/// Fields of one parent with one fate.
struct Line {
    parent: &'static str,
    names: Vec<&'static str>,
    field: &'static Field,
}

impl Line {
    fn name(&self) -> String {
        match self.names.as_slice() {
            [name] => format!("{}{name}", self.parent),
            names => format!("{}{{{}}}", self.parent, names.join(", ")),
        }
    }

    fn place(&self) -> &'static str {
        match self.field.support {
            Guest => "guest",
            Host | Label(..) => "host",
            Both => "both",
            Ignored(_) => "ignored",
            Refused(_) => "refused",
        }
    }

    fn words(&self) -> &'static str {
        match self.field.support {
            Ignored(reason) | Refused(reason) => reason,
            Guest | Host | Both | Label(..) => self.field.note,
        }
    }
}

fn lines() -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for field in FIELDS {
        let (parent, name) = match field.path.rfind(['.', '=']) {
            Some(end) => field.path.split_at(end + 1),
            None => ("", field.path),
        };
        let alike = |line: &&mut Line| {
            let other = line.field;
            !parent.is_empty()
                && line.parent == parent
                && (other.support, other.note) == (field.support, field.note)
        };
        match lines.iter_mut().find(alike) {
            Some(line) => line.names.push(name),
            None => lines.push(Line { parent, names: vec![name], field }),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_shows_the_table() {
        let readme = include_str!("../../README.md");
        assert!(readme.contains(&markdown()), "README.md is behind: run scripts/matrix");
    }

    #[test]
    fn every_row_is_shown_once() {
        let shown: usize = lines().iter().map(|line| line.names.len()).sum();
        assert_eq!(shown, FIELDS.len());
        assert!(
            text().lines().any(|line| line.starts_with("process.user.{uid, gid, additionalGids, umask} "))
        );
    }
}
