//! What came of the wishes: lines of TAP as they come, at the end a table, and JUnit's XML where it is asked for.
//!
//! In: results. Out: text. Must not: decide what counts as a failure but by the profile.

use std::fmt::{self, Write};
use std::time::Instant;

use anyhow::{Error, Result};

use crate::profile::{Expected, Profile};
use crate::requirements::REQUIREMENTS;

/// Why a wish cannot be asked on this machine, or with what was given. It counts as not run, whatever the profile says.
#[derive(Debug)]
pub struct NotHere(pub &'static str);

impl fmt::Display for NotHere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for NotHere {}

/// What became of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed(String),
    /// It failed as the profile says; the reason.
    Differs(String),
    /// It was not run; the reason.
    Absent(String),
}

#[derive(Clone, Debug)]
struct Row {
    name: String,
    verdict: Verdict,
    seconds: f64,
}

/// Results of one runtime.
#[derive(Debug)]
pub struct Report {
    /// The runtime's name.
    pub runtime: String,
    profile: Profile,
    rows: Vec<Row>,
}

impl Report {
    /// Begins one.
    pub fn new(runtime: String, profile: Profile) -> Self {
        println!("# runtime {runtime}");
        Report { runtime, profile, rows: Vec::new() }
    }

    /// Notes a wish that this runtime cannot be asked; false where it can be.
    pub fn leave_out(&mut self, name: &str) -> bool {
        let Expected::Absent(reason) = self.profile.expected(name) else { return false };
        self.add(name, Verdict::Absent(reason), 0.0);
        true
    }

    /// Notes what came of a wish.
    pub fn report(&mut self, name: &str, result: &Result<()>, begin: Instant) {
        let not_here = result.as_ref().err().and_then(|error| error.downcast_ref());
        let verdict = match (not_here, self.profile.expected(name), result) {
            (Some(NotHere(reason)), ..) => Verdict::Absent(reason.to_string()),
            (None, Expected::Differs { reason, .. }, Ok(())) => {
                Verdict::Failed(format!("it came true, but the profile says: {reason}"))
            }
            (None, Expected::Differs { words, reason }, Err(error)) if one_line(error).contains(&words) => {
                Verdict::Differs(reason)
            }
            (None, Expected::Differs { words, .. }, Err(error)) => {
                Verdict::Failed(format!("not as the profile says ({words}): {}", one_line(error)))
            }
            (None, _, Ok(())) => Verdict::Passed,
            (None, _, Err(error)) => Verdict::Failed(one_line(error)),
        };
        self.add(name, verdict, begin.elapsed().as_secs_f64());
    }

    fn add(&mut self, name: &str, verdict: Verdict, seconds: f64) {
        let number = self.rows.len() + 1;
        match &verdict {
            Verdict::Passed => println!("ok {number} {name} ({seconds:.1} s)"),
            Verdict::Failed(text) => println!("not ok {number} {name} ({seconds:.1} s) # {text}"),
            Verdict::Differs(reason) => {
                println!("not ok {number} {name} ({seconds:.1} s) # TODO differs: {reason}")
            }
            Verdict::Absent(reason) => println!("ok {number} {name} # SKIP {reason}"),
        }
        self.rows.push(Row { name: name.into(), verdict, seconds });
    }

    /// How many came out as expected, and how many did not. What was not run counts as neither.
    pub fn counts(&self) -> (usize, usize) {
        let count =
            |wanted: fn(&Verdict) -> bool| self.rows.iter().filter(|row| wanted(&row.verdict)).count();
        (
            count(|verdict| matches!(verdict, Verdict::Passed | Verdict::Differs(_))),
            count(|verdict| matches!(verdict, Verdict::Failed(_))),
        )
    }

    fn verdict(&self, name: &str) -> Option<&Verdict> {
        self.rows.iter().find(|row| row.name == name).map(|row| &row.verdict)
    }
}

fn one_line(error: &Error) -> String {
    format!("{error:#}").replace('\n', "\\n")
}

/// Requirements by rows, runtimes by columns, and below it each difference in words.
pub fn table(reports: &[Report]) -> String {
    let mut text = String::new();
    let mut line = |cells: &[&str], last: &str| {
        let cells: String = cells.iter().map(|cell| format!("{cell:<9} ")).collect();
        text.push_str(cells.as_str());
        text.push_str(last);
        text.push('\n');
    };
    let names: Vec<&str> = reports.iter().map(|report| report.runtime.as_str()).collect();
    line(&names, "requirement");
    let mut notes = Vec::new();
    for requirement in REQUIREMENTS {
        let title = format!("{}: {}", requirement.id, requirement.demand);
        let cells: Vec<&str> = reports.iter().map(|report| cell(report, requirement.wishes)).collect();
        if cells.iter().any(|cell| *cell != "-") {
            line(&cells, &title);
        }
    }
    for report in reports {
        for row in &report.rows {
            match &row.verdict {
                Verdict::Failed(text) => {
                    notes.push(format!("{}: FAILED {}: {text}", report.runtime, row.name))
                }
                Verdict::Differs(text) => {
                    notes.push(format!("{}: differs {}: {text}", report.runtime, row.name))
                }
                Verdict::Absent(text) => {
                    notes.push(format!("{}: absent {}: {text}", report.runtime, row.name))
                }
                Verdict::Passed => {}
            }
        }
    }
    format!("{text}\n{}\n", notes.join("\n"))
}

/// One word for all wishes of a requirement: the worst.
fn cell(report: &Report, wishes: &[&str]) -> &'static str {
    let verdicts: Vec<_> = wishes.iter().filter_map(|name| report.verdict(name)).collect();
    let any = |wanted: fn(&Verdict) -> bool| verdicts.iter().any(|verdict| wanted(verdict));
    if any(|verdict| matches!(verdict, Verdict::Failed(_))) {
        "FAILED"
    } else if any(|verdict| matches!(verdict, Verdict::Differs(_))) {
        "differs"
    } else if any(|verdict| matches!(verdict, Verdict::Passed)) {
        "ok"
    } else if verdicts.is_empty() {
        "-"
    } else {
        "absent"
    }
}

/// The same as JUnit's XML: a suite a runtime; the class of a test is the first requirement that it belongs to.
pub fn junit(reports: &[Report]) -> String {
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n");
    for report in reports {
        let failed = report.counts().1;
        let skipped =
            report.rows.len() - failed - report.rows.iter().filter(|r| r.verdict == Verdict::Passed).count();
        let _ = writeln!(
            text,
            "<testsuite name=\"{}\" tests=\"{}\" failures=\"{failed}\" skipped=\"{skipped}\">",
            escape(&report.runtime),
            report.rows.len(),
        );
        for row in &report.rows {
            let class = crate::requirements::of(&row.name).unwrap_or("product");
            let _ = write!(
                text,
                "<testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\">",
                escape(class),
                escape(&row.name),
                row.seconds
            );
            let _ = match &row.verdict {
                Verdict::Passed => Ok(()),
                Verdict::Failed(why) => write!(text, "<failure message=\"{}\"/>", escape(why)),
                Verdict::Differs(why) => write!(text, "<skipped message=\"differs: {}\"/>", escape(why)),
                Verdict::Absent(why) => write!(text, "<skipped message=\"{}\"/>", escape(why)),
            };
            text.push_str("</testcase>\n");
        }
        text.push_str("</testsuite>\n");
    }
    text + "</testsuites>\n"
}

/// For an attribute's value. XML 1.0 has no way to write most control characters.
fn escape(text: &str) -> String {
    let one = |c: char| match c {
        '&' => "&amp;".into(),
        '<' => "&lt;".into(),
        '>' => "&gt;".into(),
        '"' => "&quot;".into(),
        c if c.is_control() || c == '\u{fffe}' || c == '\u{ffff}' => "\u{fffd}".into(),
        c => c.to_string(),
    };
    text.chars().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let rows = [
            ("create/pid-file-holds-a-bare-number", Verdict::Passed),
            ("delete/leaves-nothing", Verdict::Failed("a <b> & \"c\"\u{1}".into())),
            ("kill/zero-only-asks", Verdict::Differs("why".into())),
            ("machine/the-kernel-is-the-guests", Verdict::Absent("no VM".into())),
        ];
        let rows = rows.map(|(name, verdict)| Row { name: name.into(), verdict, seconds: 1.5 }).to_vec();
        Report { runtime: "r".into(), profile: Profile::default(), rows }
    }

    #[test]
    fn a_difference_is_expected_and_a_failure_is_not() {
        assert_eq!(report().counts(), (2, 1));
    }

    #[test]
    fn what_cannot_be_asked_here_is_no_result_and_no_failure() {
        let mut report = Report::new("r".into(), Profile::default());
        let unfit = Err(Error::new(NotHere("no such rootfs")).context("set-up"));
        report.report("debian/one-run-shows-it-all", &unfit, Instant::now());
        assert_eq!(report.counts(), (0, 0));
        assert_eq!(report.rows[0].verdict, Verdict::Absent("no such rootfs".into()));
    }

    #[test]
    fn xml_survives_any_text() {
        let text = junit(&[report()]);
        assert!(text.contains("tests=\"4\" failures=\"1\" skipped=\"2\""), "{text}");
        assert!(text.contains("message=\"a &lt;b&gt; &amp; &quot;c&quot;\u{fffd}\""), "{text}");
        assert!(text.contains("classname=\"P1\" name=\"create/pid-file-holds-a-bare-number\""), "{text}");
    }

    #[test]
    fn the_worst_of_a_requirement_is_what_the_table_shows() {
        let table = table(&[report()]);
        let cell =
            |id: &str| table.lines().find(|line| line.contains(&format!(" {id}:"))).unwrap_or_default();
        assert!(cell("P1").starts_with("ok "), "{table}");
        assert!(cell("C7").starts_with("differs "), "{table}");
        assert!(table.contains("r: FAILED delete/leaves-nothing: a <b>"), "{table}");
    }
}
