//! Measures commands against each other, in rounds: A B C, A B C, …, so that a busy moment of the machine meets them all.
//!
//! In: the number of rounds; on stdin a line per step, `LABEL | COMMAND`, where LABEL is `WHAT: WHO < OTHER [UNIT]`, the
//! last two as they are wanted. A step is timed, or, with a unit, prints its figure as its last word; without a label
//! it is neither. Out: a markdown table: median, best, and the median as a multiple of OTHER's, or of the first step's of
//! the same WHAT; with `--json FILE` and `--svg FILE` the same for machines and as bars. Each command is `sh -c`'s.
//! Must not: go on after a failed step, whose figure would mean nothing.

mod chart;
mod table;

use std::io::{self, BufRead};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};

/// What is done in every round.
struct Step {
    /// What is measured, and nothing where nothing is.
    what: String,
    /// Whom it is measured of; nothing where there is only one.
    who: String,
    /// The label of the step it is held against.
    against: Option<String>,
    /// The figure's unit, where it is no time.
    unit: Option<String>,
    command: String,
    /// A figure of each round: milliseconds, or the unit's.
    figures: Vec<f64>,
}

impl Step {
    /// As others call it.
    fn label(&self) -> String {
        if self.who.is_empty() { self.what.clone() } else { format!("{}: {}", self.what, self.who) }
    }

    /// `ms` where it is a time.
    fn unit(&self) -> &str {
        self.unit.as_deref().unwrap_or("ms")
    }

    /// Whether a larger figure is the better one: it is a rate.
    fn is_rate(&self) -> bool {
        self.unit().contains("/s")
    }

    /// Not a number where there are no figures.
    fn median(&self) -> f64 {
        let sorted = self.sorted();
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let half = sorted.len() / 2;
        if sorted.len() % 2 == 1 { at(half) } else { (at(half.wrapping_sub(1)) + at(half)) / 2.0 }
    }

    fn best(&self) -> f64 {
        let sorted = self.sorted();
        let best = if self.is_rate() { sorted.last() } else { sorted.first() };
        best.copied().unwrap_or(f64::NAN)
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.figures.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

struct Options {
    rounds: usize,
    json: Option<PathBuf>,
    svg: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let options = options(std::env::args().skip(1))?;
    let mut steps = read_steps(io::stdin().lock())?;
    for _ in 0..options.rounds {
        for step in &mut steps {
            let figure = run(step).with_context(|| format!("{:?}", step.command))?;
            step.figures.push(figure);
        }
    }
    let steps = grouped(steps);
    print!("{}", table::markdown(&steps));
    for (path, text) in [(options.json, table::json(&steps)), (options.svg, chart::svg(&steps))] {
        if let Some(path) = path {
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(())
}

fn options(mut args: impl Iterator<Item = String>) -> anyhow::Result<Options> {
    let rounds = args.next().context("usage: rounds NUMBER [--json FILE] [--svg FILE] < steps")?;
    let rounds = rounds.parse().with_context(|| format!("rounds {rounds}"))?;
    let mut options = Options { rounds, json: None, svg: None };
    while let Some(name) = args.next() {
        let value = args.next().with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--json" => options.json = Some(value.into()),
            "--svg" => options.svg = Some(value.into()),
            _ => bail!("{name}: no such option"),
        }
    }
    Ok(options)
}

fn read_steps(input: impl BufRead) -> anyhow::Result<Vec<Step>> {
    let mut steps = Vec::new();
    for line in input.lines() {
        let line = line.context("read the steps")?;
        if line.trim().is_empty() {
            continue;
        }
        let (label, command) = line.split_once('|').with_context(|| format!("no | in {line:?}"))?;
        let (label, unit) = match label.trim().strip_suffix(']').and_then(|label| label.rsplit_once('[')) {
            Some((label, unit)) => (label, Some(unit.to_owned())),
            None => (label, None),
        };
        let (label, against) = match label.split_once('<') {
            Some((label, against)) => (label, Some(against.trim().to_owned())),
            None => (label, None),
        };
        let (what, who) = label.split_once(':').unwrap_or((label, ""));
        let [what, who, command] = [what, who, command].map(|text| text.trim().to_owned());
        steps.push(Step { what, who, against, unit, command, figures: Vec::new() });
    }
    Ok(steps)
}

/// What is measured, things that belong together beside each other, in the order of the first.
fn grouped(steps: Vec<Step>) -> Vec<Step> {
    let mut groups: Vec<Vec<Step>> = Vec::new();
    for step in steps.into_iter().filter(|step| !step.what.is_empty()) {
        match groups.iter_mut().find(|group| group[0].what == step.what) {
            Some(group) => group.push(step),
            None => groups.push(vec![step]),
        }
    }
    groups.into_iter().flatten().collect()
}

/// A step's figure; one without unit takes its time.
fn run(step: &Step) -> anyhow::Result<f64> {
    let mut shell = Command::new("sh");
    // Containers inherit stdout and stderr: a pipe would be open, and awaited, as long as they live.
    let stdout = if step.unit.is_some() { Stdio::piped() } else { Stdio::null() };
    shell.arg("-c").arg(&step.command).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::inherit());
    let start = Instant::now();
    let output = shell.output().context("run sh")?;
    let time = start.elapsed();
    if !output.status.success() {
        bail!("{}", output.status);
    }
    if step.unit.is_none() {
        return Ok(time.as_secs_f64() * 1000.0);
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let figure = said.split_whitespace().last().context("it has printed nothing")?;
    figure.parse().with_context(|| format!("{figure:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps with these figures.
    pub fn steps(lines: &[(&str, &[f64])]) -> Vec<Step> {
        let text: String = lines.iter().map(|(label, _)| format!("{label} | true\n")).collect();
        let mut steps = read_steps(text.as_bytes()).unwrap();
        steps.iter_mut().zip(lines).for_each(|(step, (_, figures))| step.figures = figures.to_vec());
        steps
    }

    #[test]
    fn median_and_best_of_odd_even_and_no_figures() {
        let steps = steps(&[("a", &[8.0, 1.0, 2.0]), ("b [MB/s]", &[1.0, 8.0, 2.0, 4.0]), ("c", &[])]);
        assert_eq!((steps[0].median(), steps[0].best()), (2.0, 1.0));
        assert_eq!((steps[1].median(), steps[1].best()), (3.0, 8.0));
        assert!(steps[2].median().is_nan() && steps[2].best().is_nan());
    }

    #[test]
    fn a_label_has_four_parts_at_most() {
        let text = b"a b: w < a b: c [MiB] | run x\n\n | clean up | twice\nd: e | f\n";
        let steps = read_steps(&text[..]).unwrap();
        assert_eq!(steps.len(), 3);
        assert_eq!((steps[0].label().as_str(), steps[0].against.as_deref()), ("a b: w", Some("a b: c")));
        assert_eq!((steps[0].unit(), steps[0].command.as_str()), ("MiB", "run x"));
        assert_eq!((steps[1].what.as_str(), steps[1].command.as_str()), ("", "clean up | twice"));
        assert_eq!((steps[2].what.as_str(), steps[2].who.as_str(), steps[2].unit()), ("d", "e", "ms"));
    }

    #[test]
    fn groups_come_in_the_order_of_their_first() {
        let steps = grouped(steps(&[("b: x", &[]), ("a: x", &[]), ("", &[]), ("b: y", &[])]));
        assert_eq!(steps.iter().map(Step::label).collect::<Vec<_>>(), ["b: x", "b: y", "a: x"]);
    }

    #[test]
    fn a_figure_is_the_last_word_or_the_time() {
        let step = |label: &str, command: &str| {
            read_steps(format!("{label}|{command}").as_bytes()).unwrap().remove(0)
        };
        assert_eq!(run(&step("a [MiB]", "echo so 1.5")).unwrap(), 1.5);
        assert!(run(&step("a", "sleep 0.01")).unwrap() >= 10.0);
        assert!(run(&step("a [MiB]", "true")).is_err() && run(&step("a", "false")).is_err());
    }
}
