//! What users are told to type: README's code blocks and the EXAMPLES of the man pages.
//!
//! In: the documents' text as it was when the suite was built. Out: their commands. Must not: know what these do.

use anyhow::{Context, Result};

/// The front page.
pub const README: &str = include_str!("../../README.md");

macro_rules! pages {
    ($($name:literal)*) => { &[$(($name, include_str!(concat!("../../man/", $name)))),*] };
}

/// The man pages that have examples, in an order in which these can be tried: a container is made before it is started.
pub const PAGES: &[(&str, &str)] = pages![
    "a3s-box-spec.8" "a3s-box-check.8" "a3s-box-features.8" "a3s-box.toml.5" "a3s-box-completions.8" "a3s-box-create.8"
    "a3s-box-start.8" "a3s-box-state.8" "a3s-box-list.8" "a3s-box-ps.8" "a3s-box-exec.8" "a3s-box-events.8"
    "a3s-box-update.8" "a3s-box-pause.8" "a3s-box-resume.8" "a3s-box-timeline.8" "a3s-box-kill.8"
    "a3s-box-delete.8" "a3s-box-run.8"
];

/// Those whose examples are an engine's.
pub const OF_ENGINES: &[(&str, &str)] = pages!["a3s-box.8" "a3s-box-annotations.7"];

/// A command that README has as it is: what is tested is what users read.
pub fn quoted(command: &str) -> Result<&'static str> {
    let line = commands(README).into_iter().find(|line| *line == command);
    line.with_context(|| format!("README does not say {command:?}"))
}

/// Every line of a document's `sh` blocks, without comments.
pub fn commands(document: &'static str) -> Vec<&'static str> {
    let mut is_code = false;
    let mut all = Vec::new();
    for line in document.lines() {
        match line {
            "```sh" => is_code = true,
            "```" => is_code = false,
            line if is_code => all.push(line.split("  #").next().unwrap_or_default().trim_end()),
            _ => {}
        }
    }
    all.retain(|line| !line.is_empty());
    all
}

/// A man page's examples, as one script.
pub fn examples(page: &str) -> String {
    let section = page.split(".SH EXAMPLES\n").nth(1).unwrap_or_default();
    let section = section.split("\n.SH ").next().unwrap_or_default();
    let mut is_code = false;
    let mut script = String::new();
    for line in section.lines() {
        match line {
            ".EX" => is_code = true,
            ".EE" => is_code = false,
            line if is_code => {
                let plain =
                    line.replace("\\-", "-").replace("\\(aq", "'").replace("\\(ti", "~").replace("\\e", "\\");
                script += &format!("{plain}\n");
            }
            _ => {}
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_lines_of_code_without_comments() {
        let text = "words\n```sh\none 'two'   # why\n\nthree # four\n```\nfive\n```toml\nsix\n```\n";
        assert_eq!(commands(text), ["one 'two'", "three # four"]);
    }

    #[test]
    fn examples_are_what_stands_between_macros() {
        let page = ".SH A\n.EX\nno\n.EE\n.SH EXAMPLES\nwords\n.EX\none \\-\\-two \\e\nthree \\(aq\n.EE\n.EX\nfour\n.EE\n.SH B\n.EX\nno\n.EE\n";
        assert_eq!(examples(page), "one --two \\\nthree '\nfour\n");
    }

    /// README's commands that no wish runs as they stand, and why.
    const NOT_RUN: &[(&str, &str)] = &[
        ("scripts/demo", "it builds from the source"),
        ("scripts/test", "it runs the wishes"),
        ("scripts/package", "it builds from the source; scripts/test runs it before the wishes package/*"),
        ("systemctl reload docker", "the daemon is the wish's own, and reads its configuration as it starts"),
        ("a3s-box-engines containerd", "there is no CRI-O; the wishes install/* look at what is written"),
        ("ctr image pull docker.io/library/alpine:latest", "there is no registry; the image is there"),
        ("kubectl apply -f /usr/share/a3s-box/engines/runtimeclass.yaml", "there is no Kubernetes"),
    ];

    #[test]
    fn every_command_of_the_readme_is_run_or_is_not_for_a_reason() {
        let wishes = include_str!("engines/package.rs");
        for command in commands(README) {
            let is_run = wishes
                .contains(&format!("{command:?}").replace("docker.io/library/alpine:latest", "{image}"));
            let reason = NOT_RUN.iter().find(|(line, _)| *line == command);
            assert!(is_run != reason.is_some(), "{command:?}: run {is_run}, not run because {reason:?}");
        }
        for (line, _) in NOT_RUN {
            assert!(quoted(line).is_ok(), "{line:?} has left README");
        }
    }

    #[test]
    fn every_page_with_examples_is_tried() {
        let man = "../man";
        let files = std::fs::read_dir(man).unwrap().map(|entry| entry.unwrap());
        let pages = files.filter(|file| file.file_type().unwrap().is_file());
        let all = pages.map(|file| file.file_name().into_string().unwrap());
        for name in all {
            let known = PAGES.iter().chain(OF_ENGINES).find(|(page, _)| *page == name);
            let (_, text) = known.unwrap_or_else(|| panic!("man/{name} is not tried"));
            assert!(!examples(text).is_empty(), "man/{name} has no examples");
        }
    }
}
