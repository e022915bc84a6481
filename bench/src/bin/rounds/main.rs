//! Times commands against each other, in rounds: A B C, A B C, …, so that a busy moment of the machine meets them all.
//!
//! In: the number of rounds as argument; on stdin a line per step, `label | command` or `label < other label | command`;
//! without a label it is not timed. Out: a markdown table: median, fastest, and the median as a multiple of the first
//! label's, or of the other's. Each command is `sh -c`'s.
//! Must not: go on after a failed step, whose time would mean nothing.

use std::io::{self, BufRead};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

struct Step {
    label: String,
    /// The label of the step it is held against.
    against: Option<String>,
    command: String,
    times: Vec<Duration>,
}

fn main() -> anyhow::Result<()> {
    let rounds = std::env::args().nth(1).context("usage: rounds NUMBER < steps")?;
    let rounds: usize = rounds.parse().with_context(|| format!("rounds {rounds}"))?;
    let mut steps = read_steps(io::stdin().lock())?;
    for _ in 0..rounds {
        for step in &mut steps {
            let time = run(&step.command).with_context(|| format!("{:?}", step.command))?;
            step.times.push(time);
        }
    }
    print(&mut steps);
    Ok(())
}

fn read_steps(input: impl BufRead) -> anyhow::Result<Vec<Step>> {
    let mut steps = Vec::new();
    for line in input.lines() {
        let line = line.context("read the steps")?;
        if line.trim().is_empty() {
            continue;
        }
        let (label, command) = line.split_once('|').with_context(|| format!("no | in {line:?}"))?;
        let (label, against) = match label.split_once('<') {
            Some((label, against)) => (label, Some(against.trim().to_owned())),
            None => (label, None),
        };
        let (label, command) = (label.trim().to_owned(), command.trim().to_owned());
        steps.push(Step { label, against, command, times: Vec::new() });
    }
    Ok(steps)
}

fn run(command: &str) -> anyhow::Result<Duration> {
    let mut shell = Command::new("sh");
    // Containers inherit stdout and stderr: a pipe would be open, and awaited, as long as they live.
    shell.arg("-c").arg(command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    let start = Instant::now();
    let status = shell.status().context("run sh")?;
    let time = start.elapsed();
    if !status.success() {
        bail!("{status}");
    }
    Ok(time)
}

fn print(steps: &mut [Step]) {
    println!("| | median ms | fastest ms | ratio | to |\n|---|--:|--:|--:|---|");
    steps.iter_mut().for_each(|step| step.times.sort());
    let timed = || steps.iter().filter(|step| !step.label.is_empty());
    let middle = |step: &Step| milliseconds(median(&step.times));
    for step in timed() {
        let base = match &step.against {
            Some(label) => timed().find(|other| other.label == *label),
            None => timed().next(),
        };
        let fastest = milliseconds(step.times.first().copied().unwrap_or_default());
        let ratio = base.map_or(f64::NAN, |base| middle(step) / middle(base));
        let to = base.map_or("", |base| base.label.as_str());
        println!("| {} | {:.1} | {fastest:.1} | {ratio:.2} | {to} |", step.label, middle(step));
    }
}

fn median(sorted: &[Duration]) -> Duration {
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { at(half) } else { (at(half.saturating_sub(1)) + at(half)) / 2 }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_no_times() {
        let times: Vec<_> = [1, 2, 4, 8].map(Duration::from_secs).into();
        assert_eq!(median(&times[..3]), Duration::from_secs(2));
        assert_eq!(median(&times), Duration::from_secs(3));
        assert_eq!(median(&[]), Duration::ZERO);
    }

    #[test]
    fn a_step_without_label_is_not_timed() {
        let steps = read_steps(&b"a b < c | run x\n\n | clean up | twice\n"[..]).unwrap();
        assert_eq!(steps.len(), 2);
        assert_eq!(steps[0].against.as_deref(), Some("c"));
        assert_eq!((steps[0].label.as_str(), steps[0].command.as_str()), ("a b", "run x"));
        assert_eq!((steps[1].label.as_str(), steps[1].command.as_str()), ("", "clean up | twice"));
    }
}
