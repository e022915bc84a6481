//! Where a container's start went: marks, each written when it happens, by whichever process saw it.
//!
//! In: marks. Out: a line each in the container's directory; read back, the spans between them. Must not: fail or hold up a start.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The file in the container's directory.
const FILE: &str = "timeline";

/// What was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// `create` or `run` was called.
    Called,
    /// config.json is a plan.
    Planned,
    /// The monitor was cloned.
    Monitor,
    /// It sits in its cgroup.
    Cgroup,
    /// The VMM's program was started.
    Vmm,
    /// Mounts, taps and hooks are done; the VMM is told to boot.
    Tree,
    /// The guest kernel's clock began.
    Kernel,
    /// guest-init listens.
    Listening,
    /// It greeted the monitor.
    Greeted,
    /// The guest has built the container, and `create` has told its caller.
    Created,
    /// `start` was called.
    Start,
    /// The interfaces of the network namespace are the guest's.
    Network,
    /// The process runs.
    Started,
    /// Its first byte of output arrived.
    Output,
}

impl Mark {
    /// What went on until this mark, since the one before.
    pub fn what(self) -> &'static str {
        match self {
            Mark::Called => "",
            Mark::Planned => "plan",
            Mark::Monitor => "monitor",
            Mark::Cgroup => "cgroup",
            Mark::Vmm => "VMM program",
            Mark::Tree => "mounts, taps, hooks",
            Mark::Kernel => "VMM set-up",
            Mark::Listening => "guest kernel",
            Mark::Greeted => "guest-init",
            Mark::Created => "container",
            Mark::Start => "waiting for start",
            Mark::Network => "network",
            Mark::Started => "process",
            Mark::Output => "first output",
        }
    }

    /// Whose time it was.
    pub fn side(self) -> Side {
        match self {
            Mark::Start => Side::Caller,
            Mark::Listening | Mark::Greeted | Mark::Created | Mark::Started | Mark::Output => Side::Guest,
            _ => Side::Host,
        }
    }
}

/// Who was at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// This runtime, on the host.
    Host,
    /// The guest.
    Guest,
    /// The engine, or whoever calls `start`.
    Caller,
}

#[derive(Debug, Serialize, Deserialize)]
struct Moment {
    mark: Mark,
    /// Microseconds since the host booted.
    at: u64,
}

/// Microseconds since the host booted.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from);
    time.unwrap_or_default().as_micros() as u64
}

/// Where marks are written; nowhere, if the file cannot be.
pub struct Timeline(Option<File>);

impl Timeline {
    /// The timeline of the container whose directory this is.
    pub fn open(dir: &Path) -> Self {
        let mut options = File::options();
        options.create(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        Timeline(options.open(dir.join(FILE)).ok())
    }

    /// Writes that a mark is reached.
    pub fn mark(&self, mark: Mark) {
        self.mark_at(mark, now());
    }

    /// Writes that a mark was reached at a time of [`now`].
    pub fn mark_at(&self, mark: Mark, at: u64) {
        let Some(mut file) = self.0.as_ref() else { return };
        if let Ok(line) = serde_json::to_string(&Moment { mark, at }) {
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }
}

/// What went on between two marks, in microseconds since `create` was called.
#[derive(Debug, PartialEq, Eq)]
pub struct Span {
    /// The mark that ended it.
    pub mark: Mark,
    /// Its begin.
    pub from: u64,
    /// Its end.
    pub to: u64,
}

/// The spans of a container's start so far, in their order.
pub fn read(dir: &Path) -> Result<Vec<Span>> {
    let text = std::fs::read_to_string(dir.join(FILE)).context("timeline: it was not recorded")?;
    spans(&text)
}

fn spans(text: &str) -> Result<Vec<Span>> {
    let mut moments: Vec<Moment> =
        text.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("timeline")?;
    moments.sort_by_key(|moment| moment.at);
    let called = moments.iter().find(|moment| moment.mark == Mark::Called);
    let Some(first) = called.map(|moment| moment.at) else { bail!("timeline: its begin is missing") };
    // A member of a pod joins a kernel that has been up for long.
    moments.retain(|moment| moment.at >= first);
    let pairs = moments.windows(2).map(|pair| Span {
        mark: pair[1].mark,
        from: pair[0].at - first,
        to: pair[1].at - first,
    });
    Ok(pairs.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_several_processes_come_into_order() {
        let text = "{\"mark\":\"called\",\"at\":100}\n{\"mark\":\"vmm\",\"at\":250}\n{\"mark\":\"planned\",\"at\":130}\n\
                    {\"mark\":\"kernel\",\"at\":7}\n";
        let expected =
            [Span { mark: Mark::Planned, from: 0, to: 30 }, Span { mark: Mark::Vmm, from: 30, to: 150 }];
        assert_eq!(spans(text).unwrap(), expected);
        assert!(spans("").is_err() && spans("no JSON").is_err());
    }
}
