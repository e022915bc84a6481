//! `update`: other limits for a container that lives, in its guest and on the host.

use std::io::Read;
use std::path::Path;

use a3s_box_proto::{Outcome, Request};
use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};

use super::{Context, events, start};
use crate::cli::Update;
use crate::guest;
use crate::plan::{host, resources, vm};
use crate::store::{Record, Status};
use crate::support;

/// More than any engine sends.
const LONGEST: u64 = 1 << 20;

/// The verb.
pub fn update(context: &Context, args: &Update) -> Result<i32> {
    let (entry, mut record) = context.store.open_checked(&args.id, updatable)?;
    let wanted = wanted(args)?;
    let warnings = support::check(&json!({ "linux": { "resources": wanted } }), &[])?;
    warnings.iter().for_each(|warning| context.log.warn(warning));
    let merged = merge(record.resources.clone(), wanted);
    let (before, after) = (typed(&record.resources)?, typed(&merged)?);
    vm::fits(&before, &after, record.vcpus, record.memory_mib)?;
    if let Some(memory) = after.memory().as_ref().filter(|memory| memory.check_before_update() == Some(true))
        && let Some(limit) =
            memory.limit().and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0)
        && let used = events::ask(context, &record)?.get("memory.current")
        && used > limit
    {
        bail!("linux.resources.memory.limit {limit}: the container uses {used} bytes now");
    }
    apply(context, &record, &before, &after)?;
    record.resources = merged;
    entry.save(&record)?;
    Ok(0)
}

fn updatable(record: &Record) -> Result<()> {
    match record.status() {
        Status::Created | Status::Running => Ok(()),
        Status::Paused => bail!("cannot update a paused container: its guest is frozen"),
        Status::Creating | Status::Stopped => bail!("container not running"),
    }
}

fn typed(value: &Value) -> Result<LinuxResources> {
    let resources: Option<LinuxResources> =
        serde_json::from_value(value.clone()).context("linux.resources")?;
    Ok(resources.unwrap_or_default())
}

/// The host first, since that may be taken back; then the guest, which changes all or nothing.
fn apply(context: &Context, record: &Record, before: &LinuxResources, after: &LinuxResources) -> Result<()> {
    let (held, mut limits) = (resources::limits(before)?, resources::limits(after)?);
    limits.retain(|limit| !held.contains(limit));
    let host_held = host::limits(before)?;
    let host_limits = host::limits(after)?.without(&host_held);
    let undo = record.cgroup.limit(&host_limits)?;
    let request = Request::Update { container: record.id.clone(), limits };
    let answer = start::connect(&context.store.path(&record.id)?, record, guest::GREETING)
        .and_then(|mut connection| connection.call(&request, guest::ANSWER));
    let refusal = match answer {
        Ok(Outcome::Done) => return Ok(()),
        Ok(Outcome::Failed { text }) => anyhow::anyhow!("{}", guest::clean(&text)),
        Ok(other) => anyhow::anyhow!("the guest did not change the limits: {other:?}"),
        Err(error) => error,
    };
    undo.run();
    let _ = record.cgroup.limit(&host_held)?;
    Err(refusal)
}

/// What the caller gives, as `linux.resources`.
fn wanted(args: &Update) -> Result<Value> {
    let Some(path) = &args.resources else { return by_flags(args) };
    let shown = format!("--resources {}", path.display());
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(LONGEST).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(LONGEST).read_to_string(&mut text))
    };
    read.with_context(|| shown.clone())?;
    let mut value: Value = serde_json::from_str(&text).context(shown.clone())?;
    let Some(fields) = value.as_object_mut() else { bail!("{shown}: not an object") };
    // Its devices are those of create.
    fields.remove("devices");
    typed(&value).context(shown)?;
    Ok(value)
}

fn by_flags(args: &Update) -> Result<Value> {
    for (flag, schema) in [("l3-cache-schema", &args.l3_cache_schema), ("mem-bw-schema", &args.mem_bw_schema)]
    {
        if let Some(schema) = schema {
            bail!("--{flag} {schema}: not supported: hardware of the host that the guest does not see");
        }
    }
    let bytes = |flag: &str, text: &Option<String>| {
        text.as_ref()
            .map(|text| bytes(text).with_context(|| format!("--{flag} {text:?}: not a number of bytes")))
            .transpose()
    };
    let mut value = json!({
        "memory": {
            "limit": bytes("memory", &args.memory)?,
            "reservation": bytes("memory-reservation", &args.memory_reservation)?,
            "swap": bytes("memory-swap", &args.memory_swap)?,
            "kernel": bytes("kernel-memory", &args.kernel_memory)?,
            "kernelTCP": bytes("kernel-memory-tcp", &args.kernel_memory_tcp)?,
        },
        "cpu": {
            "quota": args.cpu_quota, "period": args.cpu_period, "burst": args.cpu_burst, "shares": args.cpu_share,
            "idle": args.cpu_idle, "realtimePeriod": args.cpu_rt_period, "realtimeRuntime": args.cpu_rt_runtime,
            "cpus": args.cpuset_cpus, "mems": args.cpuset_mems,
        },
    });
    if let Some(limit) = args.pids_limit {
        value["pids"] = json!({ "limit": limit });
    }
    if let Some(weight) = args.blkio_weight {
        value["blockIO"] = json!({ "weight": weight });
    }
    Ok(value)
}

/// `512m` and the like, as docker and runc read it.
fn bytes(text: &str) -> Option<i64> {
    let lower = text.trim().to_ascii_lowercase();
    let number = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match lower[number.len()..].trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    match number.trim().parse::<i64>() {
        Ok(-1) if shift == 0 => Some(-1),
        Ok(number) if number >= 0 => number.checked_mul(1 << shift),
        Ok(_) => None,
        // A fraction of a unit.
        Err(_) => number
            .trim()
            .parse::<f64>()
            .ok()
            .filter(|n| *n >= 0.0)
            .map(|n| (n * (1i64 << shift) as f64) as i64),
    }
}

/// What is set replaces, what is absent or 0 leaves. A limit that is lifted takes along the one that counted from it.
fn merge(mut held: Value, wanted: Value) -> Value {
    let lifts = wanted["memory"]["limit"] == -1 && !is_set(&wanted["memory"]["swap"]);
    overlay(&mut held, wanted);
    if lifts && let Some(memory) = held["memory"].as_object_mut() {
        memory.remove("swap");
    }
    held
}

fn overlay(held: &mut Value, wanted: Value) {
    match wanted {
        Value::Object(fields) => {
            if !held.is_object() {
                *held = json!({});
            }
            for (name, value) in fields {
                overlay(&mut held[name], value);
            }
        }
        value if is_set(&value) => *held = value,
        _ => {}
    }
}

fn is_set(value: &Value) -> bool {
    !(value.is_null() || *value == 0 || *value == "" || *value == json!([]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        for (text, number) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("4096", Some(4096)),
            ("512m", Some(512 << 20)),
            ("1G", Some(1 << 30)),
            ("2KiB", Some(2048)),
            ("1.5k", Some(1536)),
            ("7b", Some(7)),
            ("", None),
            ("-5", None),
            ("-1k", None),
            ("many", None),
            ("1x", None),
            ("9223372036854775807k", None),
        ] {
            assert_eq!(bytes(text), number, "{text}");
        }
    }

    #[test]
    fn what_is_unset_stays() {
        let held = json!({"memory": {"limit": 100, "swap": 200}, "cpu": {"quota": 5, "period": 10}});
        for (wanted, expected) in [
            (json!({}), held.clone()),
            (json!({"memory": {"limit": 0}, "cpu": {"quota": null, "cpus": ""}, "blockIO": null}), {
                let mut same = held.clone();
                same["cpu"]["cpus"] = Value::Null;
                same["blockIO"] = Value::Null;
                same
            }),
            (
                json!({"cpu": {"quota": 7}, "pids": {"limit": 3}}),
                json!({"memory": {"limit": 100, "swap": 200}, "cpu": {"quota": 7, "period": 10}, "pids": {"limit": 3}}),
            ),
            (
                json!({"memory": {"limit": -1}}),
                json!({"memory": {"limit": -1}, "cpu": {"quota": 5, "period": 10}}),
            ),
        ] {
            assert_eq!(merge(held.clone(), wanted), expected);
        }
    }
}
