//! Go's spelling of flags, made clap's.
//!
//! In: argv. Out: argv in which every long flag has two dashes. Must not: know a flag that the definitions do not.

use std::ffi::OsString;

use clap::{Command, CommandFactory};

use super::Cli;

/// Go's flag parser takes long flags with one dash too, and go-runc passes one so; clap does not.
pub fn normalize(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let top = Cli::command();
    let (mut verb, mut passed_on, mut is_value): (Option<&Command>, _, _) = (None, false, true);
    args.map(|arg| {
        let Some(text) = arg.to_str().filter(|_| !passed_on && !is_value).map(str::to_owned) else {
            is_value = false;
            return arg;
        };
        let command = verb.unwrap_or(&top);
        let name = text.strip_prefix('-').and_then(|rest| rest.split('=').next()).unwrap_or_default();
        let text = if is_long(command, name) { format!("-{text}") } else { text };
        match (verb, text.starts_with('-')) {
            (None, false) => verb = top.find_subcommand(&text),
            // What follows the id is a command of the container's, or ps's own flags.
            (Some(verb), false) => passed_on = matches!(verb.get_name(), "exec" | "ps"),
            // So that a value is not taken for the container's id.
            (_, true) => is_value = takes_next(command, &text),
        }
        passed_on |= text == "--";
        text.into()
    })
    .collect()
}

fn is_long(command: &Command, name: &str) -> bool {
    let own = command
        .get_arguments()
        .any(|arg| arg.get_long() == Some(name) || arg.get_all_aliases().unwrap_or_default().contains(&name));
    own || ["help", "version"].contains(&name)
}

/// Whether the argument behind `flag` is its value.
fn takes_next(command: &Command, flag: &str) -> bool {
    let same = |long: Option<&str>, short: Option<char>| match flag.strip_prefix("--") {
        Some(name) => long == Some(name),
        None => short.is_some_and(|short| flag.strip_prefix('-') == Some(short.encode_utf8(&mut [0; 4]))),
    };
    let mut found = command.get_arguments().filter(|arg| same(arg.get_long(), arg.get_short()));
    found.any(|arg| arg.get_action().takes_values() && !arg.is_require_equals_set())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;
    use clap::Parser;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(normalize(line.split(' ').map(OsString::from))).unwrap()
    }

    #[test]
    fn definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn engines_lines_parse() {
        for line in [
            "a3s-box --root /r --log /l --log-format json --systemd-cgroup create --bundle /b --pid-file /p --console-socket /s --no-pivot --no-new-keyring id",
            "a3s-box --config /etc/c.toml check --format json",
            "a3s-box --root=/r --debug run --bundle /b --keep id",
            "a3s-box --rootless=auto --cgroup-manager disabled start id",
            "a3s-box --rootless state id",
            "a3s-box kill -a id 9",
            "a3s-box kill --all id SIGTERM",
            "a3s-box delete --force id",
            "a3s-box ps --format json id",
            "a3s-box exec --process /p --detach --pid-file /x id",
            "a3s-box list --format=json",
            "a3s-box create -no-subreaper -bundle /b id",
            "a3s-box checkpoint --image-path /i --help",
            "a3s-box restore -no-subreaper --lsm-mount-context",
            "a3s-box features",
            "a3s-box features --matrix --format markdown",
            "a3s-box --root=/r --version",
            "a3s-box -v",
        ] {
            parse(line);
        }
    }

    #[test]
    fn what_follows_the_id_belongs_to_the_command() {
        let cli = parse("a3s-box exec -e A=1 id ls -la --help -e B=2");
        let Some(Command::Exec(exec)) = cli.command else { panic!() };
        assert_eq!(exec.command, ["ls", "-la", "--help", "-e", "B=2"]);
        assert_eq!(exec.env, ["A=1"]);
        let cli = parse("a3s-box -root /exec exec -user 0 id find / -user x -- -all");
        let Some(Command::Exec(exec)) = cli.command else { panic!() };
        assert_eq!((exec.user.as_deref(), exec.id.as_str()), (Some("0"), "id"));
        assert_eq!(exec.command, ["find", "/", "-user", "x", "--", "-all"]);
    }
}
