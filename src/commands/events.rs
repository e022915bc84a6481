//! `events`: what a container uses, in runc's form and as its guest counts it: without the guest's kernel.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use a3s_box_proto::{Outcome, Request};
use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};

use super::{Context, start};
use crate::cgroup::Cgroup;
use crate::cli::Events;
use crate::guest;
use crate::store::{Record, Status};
use crate::vmm;

/// How often a guest is asked whether it ran out of memory.
const WATCH: Duration = Duration::from_secs(1);

/// The verb.
pub fn events(context: &Context, args: &Events) -> Result<i32> {
    let interval = interval(&args.interval)?;
    let record = context.store.read(&args.id)?;
    match record.status() {
        Status::Created | Status::Running => {}
        Status::Paused => bail!("container is paused: its guest cannot answer"),
        Status::Creating | Status::Stopped => bail!("container not running"),
    }
    let counted = ask(context, &record)?;
    if args.stats {
        write("stats", &record, Some(&counted))?;
        return Ok(0);
    }
    stream(context, &record, &counted, interval)
}

/// Until the container ends.
fn stream(context: &Context, record: &Record, first: &Counts, interval: Duration) -> Result<i32> {
    let monitor = record.monitor.context("the container's pid")?;
    let Ok(ended) = vmm::pidfd_open(monitor.pid) else { return Ok(0) };
    let mut kills = first.get("memory.events/oom_kill");
    let mut due = Instant::now() + interval;
    while monitor.is_alive() {
        let wait = due.saturating_duration_since(Instant::now()).min(WATCH);
        if vmm::ends_within(ended.as_fd(), wait) {
            break;
        }
        let is_due = Instant::now() >= due;
        if is_due {
            due += interval;
        }
        // One that is paused has no numbers until it goes on.
        let Ok(counted) = ask(context, record) else { continue };
        let now = counted.get("memory.events/oom_kill");
        if now > kills {
            write("oom", record, None)?;
        }
        kills = now;
        if is_due {
            write("stats", record, Some(&counted))?;
        }
    }
    Ok(0)
}

/// The guest's numbers.
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// A number; one that the guest does not count is 0.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// Asks the guest.
pub fn ask(context: &Context, record: &Record) -> Result<Counts> {
    if record.status() == Status::Paused {
        bail!("container is paused: its guest cannot answer");
    }
    let mut connection = start::connect(&context.store.path(&record.id)?, record, guest::GREETING)?;
    match connection.call(&Request::Stats { container: record.id.clone() }, guest::ANSWER)? {
        Outcome::Stats(counts) => Ok(Counts(counts)),
        Outcome::NotFound => bail!("container not running"),
        other => bail!("the guest did not say what it counts: {other:?}"),
    }
}

fn write(kind: &str, record: &Record, counts: Option<&Counts>) -> Result<()> {
    let mut line = json!({ "type": kind, "id": record.id });
    if let Some(counts) = counts {
        line["data"] = data(counts, &record.cgroup);
    }
    super::write_out(&format!("{line}\n"))
}

/// runc's types/events.go; what nobody can tell is left out there too. The VM does its I/O as host processes do.
fn data(counts: &Counts, cgroup: &Cgroup) -> Value {
    let micro = |name: &str| counts.get(name).saturating_mul(1000);
    let entry = |name: &str, failures: u64| {
        json!({
            "limit": counts.get(&format!("{name}.max")), "usage": counts.get(&format!("{name}.current")),
            "max": counts.get(&format!("{name}.peak")), "failcnt": failures,
        })
    };
    let raw: Map<String, Value> = counts
        .0
        .iter()
        .filter_map(|(name, number)| Some((name.strip_prefix("memory.stat/")?.to_string(), json!(number))))
        .collect();
    json!({
        "cpu": {
            "usage": {
                "total": micro("cpu.stat/usage_usec"), "kernel": micro("cpu.stat/system_usec"),
                "user": micro("cpu.stat/user_usec"),
            },
            "throttling": {
                "periods": counts.get("cpu.stat/nr_periods"), "throttledPeriods": counts.get("cpu.stat/nr_throttled"),
                "throttledTime": micro("cpu.stat/throttled_usec"),
            },
        },
        "cpuset": {},
        "memory": {
            "cache": counts.get("memory.stat/file"),
            "usage": entry("memory", counts.get("memory.events/max")),
            "swap": entry("memory.swap", 0),
            "kernel": { "limit": 0, "usage": counts.get("memory.stat/kernel"), "failcnt": 0 },
            "kernelTCP": { "limit": 0, "usage": counts.get("memory.stat/sock"), "failcnt": 0 },
            "raw": raw,
        },
        "pids": { "current": counts.get("pids.current"), "limit": bounded(counts.get("pids.max")) },
        "blkio": disks(cgroup),
        "hugetlb": hugetlb(counts),
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

/// runc shows no limit of tasks as 0.
fn bounded(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

fn hugetlb(counts: &Counts) -> Value {
    let size = |name: &str| Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_string());
    let sizes = counts.0.keys().filter_map(|name| size(name)).filter(|size| !size.contains('.'));
    let entry = |size: String| {
        let of = |what: &str| counts.get(&format!("hugetlb.{size}.{what}"));
        let value = json!({ "usage": of("current"), "failcnt": of("events/max") });
        (size, value)
    };
    Value::Object(sizes.map(entry).collect())
}

fn disks(cgroup: &Cgroup) -> Value {
    let (mut bytes, mut operations) = (Vec::new(), Vec::new());
    for line in cgroup.io().lines() {
        let mut words = line.split(' ');
        let device = words.next().and_then(|device| device.split_once(':'));
        let Some((major, minor)) =
            device.and_then(|(a, b)| Some((a.parse::<u64>().ok()?, b.parse::<u64>().ok()?)))
        else {
            continue;
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut bytes, "Read"),
                "wbytes" => (&mut bytes, "Write"),
                "rios" => (&mut operations, "Read"),
                "wios" => (&mut operations, "Write"),
                _ => continue,
            };
            let value: u64 = value.parse().unwrap_or(0);
            list.push(json!({ "major": major, "minor": minor, "op": op, "value": value }));
        }
    }
    let mut all = Map::new();
    for (name, list) in [("ioServiceBytesRecursive", bytes), ("ioServicedRecursive", operations)] {
        if !list.is_empty() {
            all.insert(name.into(), list.into());
        }
    }
    all.into()
}

/// `5s`, `500ms`, `2m`, `1h`, or a number of seconds.
fn interval(text: &str) -> Result<Duration> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "ms" => Some(0.001),
        "" | "s" => Some(1.0),
        "m" => Some(60.0),
        "h" => Some(3600.0),
        _ => None,
    };
    let seconds = unit.zip(number.parse::<f64>().ok()).map(|(unit, number)| unit * number);
    match seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
        Some(Duration::ZERO) => bail!("--interval {text}: duration interval must be greater than 0"),
        Some(duration) => Ok(duration),
        None => bail!("--interval {text:?}: not a time such as 5s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        for (text, milliseconds) in
            [("5s", 5000), ("500ms", 500), ("2", 2000), ("1.5s", 1500), ("1m", 60_000)]
        {
            assert_eq!(interval(text).unwrap(), Duration::from_millis(milliseconds), "{text}");
        }
        for text in ["0", "0s", "-1s", "", "s", "5x", "nan"] {
            assert!(interval(text).unwrap_err().to_string().starts_with("--interval"), "{text}");
        }
    }

    #[test]
    fn numbers_are_where_runc_has_them() {
        let counts = [
            ("memory.current", 5),
            ("memory.max", u64::MAX),
            ("memory.stat/anon", 3),
            ("pids.current", 2),
            ("pids.max", u64::MAX),
            ("cpu.stat/usage_usec", 7),
            ("hugetlb.2MB.current", 4),
        ];
        let counts = Counts(counts.map(|(name, number)| (name.to_string(), number)).into());
        let data = data(&counts, &Cgroup::default());
        assert_eq!(data["memory"]["usage"], json!({"limit": u64::MAX, "usage": 5, "max": 0, "failcnt": 0}));
        assert_eq!(data["memory"]["raw"], json!({"anon": 3}));
        assert_eq!(data["pids"], json!({"current": 2, "limit": 0}));
        assert_eq!(data["cpu"]["usage"]["total"], json!(7000));
        assert_eq!(data["hugetlb"]["2MB"]["usage"], json!(4));
    }
}
