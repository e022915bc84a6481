//! A process of config.json or of `exec`, in the kernel's own terms.

use std::collections::HashSet;

use a3s_box_proto as proto;
use anyhow::{Result, anyhow, bail};
use caps::Capability;
use oci_spec::runtime::{self as oci, PosixRlimitType, Process};

/// Checks and translates a process.
pub fn plan(process: &Process) -> Result<proto::Process> {
    let user = process.user();
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        bail!("process.args: there is no program to run");
    }
    if !process.cwd().is_absolute() {
        bail!("process.cwd: {:?} is not an absolute path", process.cwd());
    }
    Ok(proto::Process {
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().clone(),
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        rlimits: rlimits(process)?,
        capabilities: capabilities(process)?,
        no_new_privileges: process.no_new_privileges() == Some(true),
        oom_score_adj: oom_score_adj(process)?,
        scheduler: scheduler(process)?,
        io_priority: io_priority(process)?,
        terminal: if process.terminal() == Some(true) { Some(size(process)?) } else { None },
    })
}

fn oom_score_adj(process: &Process) -> Result<Option<i32>> {
    match process.oom_score_adj() {
        Some(score) if !(-1000..=1000).contains(&score) => {
            bail!("process.oomScoreAdj: {score} is not a number from -1000 to 1000")
        }
        score => Ok(score),
    }
}

/// With the checks and texts of runc.
fn scheduler(process: &Process) -> Result<Option<proto::Scheduler>> {
    use oci::LinuxSchedulerPolicy::{
        SchedBatch, SchedDeadline, SchedFifo, SchedIdle, SchedIso, SchedOther, SchedRr,
    };
    let Some(given) = process.scheduler() else { return Ok(None) };
    let nice = given.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        bail!("process.scheduler: invalid scheduler.nice: {nice}");
    }
    let policy = *given.policy();
    let priority = given.priority().unwrap_or(0);
    if priority != 0 && !matches!(policy, SchedFifo | SchedRr) {
        bail!("process.scheduler: scheduler.priority can only be specified for SchedFIFO or SchedRR policy");
    }
    let priority =
        u32::try_from(priority).map_err(|_| anyhow!("process.scheduler.priority: {priority} is negative"))?;
    let [runtime, deadline, period] =
        [given.runtime(), given.deadline(), given.period()].map(|value| value.unwrap_or(0));
    if policy != SchedDeadline && (runtime, deadline, period) != (0, 0, 0) {
        bail!(
            "process.scheduler: scheduler runtime/deadline/period can only be specified for SchedDeadline policy"
        );
    }
    let policy = match policy {
        SchedOther => 0,
        SchedFifo => 1,
        SchedRr => 2,
        SchedBatch => 3,
        SchedIso => bail!("process.scheduler.policy: SCHED_ISO is not supported: Linux does not have it"),
        SchedIdle => 5,
        SchedDeadline => 6,
    };
    let flags = given.flags().iter().flatten().fold(0, |bits, flag| bits | scheduler_flag(*flag));
    Ok(Some(proto::Scheduler { policy, flags, nice, priority, runtime, deadline, period }))
}

/// `SCHED_FLAG_*` of linux/sched.h, in the order of the specification.
fn scheduler_flag(flag: oci::LinuxSchedulerFlag) -> u64 {
    use oci::LinuxSchedulerFlag as Flag;
    match flag {
        Flag::SchedResetOnFork => 0x01,
        Flag::SchedFlagReclaim => 0x02,
        Flag::SchedFlagDLOverrun => 0x04,
        Flag::SchedFlagKeepPolicy => 0x08,
        Flag::SchedFlagKeepParams => 0x10,
        Flag::SchedFlagUtilClampMin => 0x20,
        Flag::SchedFlagUtilClampMax => 0x40,
    }
}

/// Class and level as ioprio_set(2) packs them.
fn io_priority(process: &Process) -> Result<Option<u32>> {
    const CLASS_SHIFT: u32 = 13;
    let Some(given) = process.io_priority() else { return Ok(None) };
    let class = match given.class() {
        oci::IOPriorityClass::IoprioClassRt => 1,
        oci::IOPriorityClass::IoprioClassBe => 2,
        oci::IOPriorityClass::IoprioClassIdle => 3,
    };
    match given.priority() {
        level @ 0..=7 => Ok(Some(class << CLASS_SHIFT | level as u32)),
        level => bail!("process.ioPriority.priority: {level} is not a number from 0 to 7"),
    }
}

fn size(process: &Process) -> Result<proto::Size> {
    let Some(given) = process.console_size() else { return Ok(proto::Size::default()) };
    let fit = |name, value| {
        u16::try_from(value)
            .map_err(|_| anyhow!("process.consoleSize.{name}: {value} is more than a terminal has"))
    };
    Ok(proto::Size { rows: fit("height", given.height())?, columns: fit("width", given.width())? })
}

fn rlimits(process: &Process) -> Result<Vec<proto::Rlimit>> {
    let mut seen = HashSet::new();
    let mut limits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let kind = limit.typ();
        let resource = resource(kind);
        if !seen.insert(resource) {
            bail!("process.rlimits: {kind} is given twice");
        }
        if limit.soft() > limit.hard() {
            bail!(
                "process.rlimits: {kind}: soft limit {} is above hard limit {}",
                limit.soft(),
                limit.hard()
            );
        }
        limits.push(proto::Rlimit { resource, soft: limit.soft(), hard: limit.hard() });
    }
    Ok(limits)
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// No capabilities given means none at all, as in runc.
fn capabilities(process: &Process) -> Result<proto::Capabilities> {
    let Some(sets) = process.capabilities() else { return Ok(proto::Capabilities::default()) };
    Ok(proto::Capabilities {
        bounding: mask(sets.bounding())?,
        effective: mask(sets.effective())?,
        inheritable: mask(sets.inheritable())?,
        permitted: mask(sets.permitted())?,
        ambient: mask(sets.ambient())?,
    })
}

fn mask(set: &Option<HashSet<oci::Capability>>) -> Result<u64> {
    let bit = |capability: &oci::Capability| {
        let name = format!("CAP_{}", capability.to_string().trim_start_matches("CAP_"));
        let known =
            name.parse::<Capability>().map_err(|_| anyhow!("process.capabilities: {name} is not known"))?;
        Ok(known.bitmask())
    };
    set.iter().flatten().map(bit).try_fold(0, |mask, bit: Result<u64>| Ok(mask | bit?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn planned(change: impl FnOnce(&mut Value)) -> Result<proto::Process> {
        let mut value = json!({"cwd": "/", "args": ["sh"], "user": {"uid": 7, "gid": 8}});
        change(&mut value);
        plan(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn sets_become_masks_and_absence_means_none() {
        let given =
            planned(|v| v["capabilities"] = json!({"bounding": ["CAP_CHOWN", "CAP_KILL"], "ambient": []}));
        assert_eq!(
            given.unwrap().capabilities,
            proto::Capabilities { bounding: 0b10_0001, ..Default::default() }
        );
        assert_eq!(planned(|_| ()).unwrap().capabilities, proto::Capabilities::default());
    }

    #[test]
    fn limits_are_checked() {
        let limit = |soft: u64| json!({"type": "RLIMIT_NOFILE", "soft": soft, "hard": 100});
        let good = planned(|v| v["rlimits"] = json!([limit(10)])).unwrap();
        assert_eq!(good.rlimits, [proto::Rlimit { resource: 7, soft: 10, hard: 100 }]);
        let text = planned(|v| v["rlimits"] = json!([limit(101)])).unwrap_err().to_string();
        assert!(text.contains("soft limit 101"), "{text}");
        let text = planned(|v| v["rlimits"] = json!([limit(1), limit(1)])).unwrap_err().to_string();
        assert!(text.contains("twice"), "{text}");
    }

    #[test]
    fn scheduling_in_the_kernels_numbers() {
        let given = planned(|v| {
            v["scheduler"] = json!({"policy": "SCHED_RR", "priority": 5, "flags": ["SCHED_RESET_ON_FORK"]});
            v["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 4});
            v["oomScoreAdj"] = json!(-1000);
        })
        .unwrap();
        let expected = proto::Scheduler { policy: 2, flags: 1, priority: 5, ..Default::default() };
        assert_eq!((given.scheduler, given.io_priority), (Some(expected), Some(3 << 13 | 4)));
        assert_eq!(given.oom_score_adj, Some(-1000));
        for (field, value, words) in [
            ("scheduler", json!({"policy": "SCHED_OTHER", "nice": 20}), "invalid scheduler.nice: 20"),
            ("scheduler", json!({"policy": "SCHED_OTHER", "priority": 1}), "SchedFIFO or SchedRR"),
            ("scheduler", json!({"policy": "SCHED_FIFO", "priority": -1}), "priority: -1 is negative"),
            ("scheduler", json!({"policy": "SCHED_FIFO", "period": 1}), "SchedDeadline policy"),
            ("scheduler", json!({"policy": "SCHED_ISO"}), "SCHED_ISO"),
            ("ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 8}), "ioPriority.priority: 8"),
            ("oomScoreAdj", json!(1001), "process.oomScoreAdj: 1001"),
        ] {
            let text = planned(|v| v[field] = value).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn what_cannot_run_is_named() {
        assert!(planned(|v| v["args"] = json!([])).unwrap_err().to_string().contains("process.args"));
        assert!(planned(|v| v["cwd"] = json!("x")).unwrap_err().to_string().contains("process.cwd: \"x\""));
    }
}
