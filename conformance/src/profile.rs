//! What is known of a runtime: where it differs from the wishes, and how it then fails.
//!
//! In: `profiles/NAME.profile`, or a file of the caller's. Out: what to expect of each wish. Must not: excuse a wish
//! that fails in another way than declared, or one that has come true meanwhile.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process;

/// Profiles that come with the suite, by the first word of `--version`.
const BUILT_IN: [(&str, &str); 3] = [
    ("a3s-box", include_str!("../profiles/a3s-box.profile")),
    ("crun", include_str!("../profiles/crun.profile")),
    ("runc", include_str!("../profiles/runc.profile")),
];

/// A runtime's differences, the more special ones last.
#[derive(Clone, Debug, Default)]
pub struct Profile(Vec<Difference>);

#[derive(Clone, Debug)]
struct Difference {
    pattern: String,
    expected: Expected,
}

/// What to expect of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// That it comes true.
    Passes,
    /// That it fails with these words, for this reason.
    Differs {
        /// Part of the failure's text.
        words: String,
        /// Why it is no fault, or a known one.
        reason: String,
    },
    /// Nothing: it asks for what the runtime does not have, for this reason.
    Absent(String),
}

impl Profile {
    /// The profile of a name, of a file, or of the runtime's own name. One without a profile has no differences.
    pub fn find(given: Option<&str>, runtime: &Path) -> Result<Self> {
        let built_in = |name: &str| BUILT_IN.iter().find(|(known, _)| *known == name).map(|(_, text)| *text);
        match given {
            Some(name) => match built_in(name) {
                Some(text) => parse(text).context(name.to_string()),
                None => parse(&std::fs::read_to_string(name).with_context(|| format!("--profile {name}"))?)
                    .with_context(|| name.to_string()),
            },
            None => built_in(&name_of(runtime)?).map_or(Ok(Profile::default()), parse),
        }
    }

    /// What to expect of a wish.
    pub fn expected(&self, name: &str) -> Expected {
        let fits = |pattern: &str| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        };
        let found = self.0.iter().rev().find(|difference| fits(&difference.pattern));
        found.map_or(Expected::Passes, |difference| difference.expected.clone())
    }

    /// Every pattern in it.
    #[cfg(test)]
    fn patterns(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|difference| difference.pattern.as_str())
    }
}

/// What a runtime calls itself.
pub fn name_of(runtime: &Path) -> Result<String> {
    let mut command = Command::new(runtime);
    command.arg("--version");
    let output = process::run(command, b"", Duration::from_secs(20))?.code(0)?;
    Ok(output.text().split(' ').next().unwrap_or_default().to_string())
}

/// `NAME | WORDS | REASON`, one a line; a NAME that ends with `*` stands for all that begin so. Without WORDS the wish is not run.
fn parse(text: &str) -> Result<Profile> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(difference).collect::<Result<_>>().map(Profile)
}

fn difference(line: &str) -> Result<Difference> {
    let [pattern, words, reason] = line.split('|').map(str::trim).collect::<Vec<_>>()[..] else {
        bail!("{line:?} is not NAME | WORDS | REASON");
    };
    if pattern.is_empty() || reason.is_empty() {
        bail!("{line:?}: a name and a reason are needed");
    }
    let expected = match words {
        "" => Expected::Absent(reason.into()),
        words => Expected::Differs { words: words.into(), reason: reason.into() },
    };
    Ok(Difference { pattern: pattern.into(), expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_that_fits_counts() {
        let profile = parse("# why\na/* | | no such thing\n\na/b | some words | it says so\n").unwrap();
        assert_eq!(profile.expected("a/c"), Expected::Absent("no such thing".into()));
        let differs = Expected::Differs { words: "some words".into(), reason: "it says so".into() };
        assert_eq!(profile.expected("a/b"), differs);
        assert_eq!(profile.expected("b/a"), Expected::Passes);
        for bad in ["a/b", "a | b", " | words | reason", "a | words | "] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_profile_speaks_of_wishes_that_exist() {
        let cases = [crate::wishes::all(), crate::engines::all()];
        let names: Vec<_> = cases.iter().flatten().flat_map(|case| case.names.iter().copied()).collect();
        for (runtime, text) in BUILT_IN {
            for pattern in parse(text).unwrap().patterns() {
                let start = pattern.strip_suffix('*').unwrap_or(pattern);
                assert!(names.iter().any(|name| name.starts_with(start)), "{runtime}: {pattern}");
            }
        }
    }
}
