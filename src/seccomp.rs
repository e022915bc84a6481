//! Compiles `linux.seccomp` to the bytes that the guest's kernel runs.
//!
//! In: the profile of config.json, as the engine resolved it. Out: flags and instructions for seccomp(2). Must not: load
//! anything. It happens on the host because libseccomp and its tables are here, and the guest stays small.

use std::fs::File;
use std::io::{Read, Seek};
use std::time::Duration;

use a3s_box_proto as proto;
use anyhow::{Context, Result, bail, ensure};
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompFilterFlag as Flag,
    LinuxSeccompOperator as Operator, LinuxSyscall,
};

use crate::patience;

/// Actions that a profile can ask for.
pub const ACTIONS: [&str; 8] = [
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
];

/// Comparisons of arguments.
pub const OPERATORS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];

/// Flags that a profile can set.
pub const FLAGS: [&str; 3] =
    ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_LOG"];

/// The flag that is known and refused: it is for a listener.
pub const LISTENER_FLAG: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// Every architecture that the spec names.
const ARCHITECTURES: [Arch; 24] = [
    Arch::ScmpArchNative,
    Arch::ScmpArchX86,
    Arch::ScmpArchX86_64,
    Arch::ScmpArchX32,
    Arch::ScmpArchArm,
    Arch::ScmpArchAarch64,
    Arch::ScmpArchMips,
    Arch::ScmpArchMips64,
    Arch::ScmpArchMips64n32,
    Arch::ScmpArchMipsel,
    Arch::ScmpArchMipsel64,
    Arch::ScmpArchMipsel64n32,
    Arch::ScmpArchPpc,
    Arch::ScmpArchPpc64,
    Arch::ScmpArchPpc64le,
    Arch::ScmpArchS390,
    Arch::ScmpArchS390x,
    Arch::ScmpArchParisc,
    Arch::ScmpArchParisc64,
    Arch::ScmpArchRiscv64,
    Arch::ScmpArchLoongarch64,
    Arch::ScmpArchM68k,
    Arch::ScmpArchSh,
    Arch::ScmpArchSheb,
];

/// How long libseccomp may compute. Most profiles take milliseconds; with a few dozen rules that compare arguments of one
/// call in many ways, its trees grow beyond all bounds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Rules from which on a search tree beats a list, as runc has it.
const LONG: usize = 8;

/// Names of the architectures that can stand in one filter with the machine's own.
pub fn architectures() -> Vec<String> {
    let fits = |arch: &Arch| {
        let mut filter = ScmpFilterContext::new(ScmpAction::Allow).ok()?;
        filter.add_arch(architecture(*arch).ok()?).ok().map(drop)
    };
    let named = ARCHITECTURES.iter().filter(|arch| **arch != Arch::ScmpArchNative);
    named.filter(|arch| fits(arch).is_some()).map(|arch| word(*arch)).collect()
}

/// Compiles a profile.
pub fn compile(profile: &LinuxSeccomp) -> Result<proto::Seccomp> {
    let profile = profile.clone();
    patience::within_work(PATIENCE, move || translate(&profile))
        .with_context(|| format!("linux.seccomp: it cannot be compiled within {} s", PATIENCE.as_secs()))?
}

/// The work of [`compile`].
fn translate(profile: &LinuxSeccomp) -> Result<proto::Seccomp> {
    let default = action(profile.default_action(), profile.default_errno_ret())
        .context("linux.seccomp.defaultAction")?;
    let mut filter = ScmpFilterContext::new(default).context("linux.seccomp.defaultAction")?;
    // The process's own business (process.noNewPrivileges), not the filter's.
    filter.set_ctl_nnp(false).context("linux.seccomp")?;
    for arch in profile.architectures().iter().flatten() {
        let add = architecture(*arch).and_then(|known| filter.add_arch(known).map(drop).map_err(Into::into));
        add.with_context(|| format!("linux.seccomp.architectures: {}", word(*arch)))?;
    }
    let rules = profile.syscalls().as_deref().unwrap_or_default();
    if rules.len() > LONG {
        filter.set_ctl_optimize(2).context("linux.seccomp")?;
    }
    for (index, rule) in rules.iter().enumerate() {
        add(&mut filter, rule, default).with_context(|| format!("linux.seccomp.syscalls[{index}]"))?;
    }
    let mut program = newer_than_the_profile(profile)?;
    program.extend(export(&filter)?);
    ensure!(
        program.len() <= proto::MAX_FILTER,
        "linux.seccomp: the filter has {} instructions, the kernel takes {} at most",
        program.len(),
        proto::MAX_FILTER
    );
    Ok(proto::Seccomp { flags: flags(profile)?, program })
}

/// What the spec says where no errno is given, and only where the action has one.
fn action(action: Action, errno: Option<u32>) -> Result<ScmpAction> {
    // Both share the low 16 bits of the filter's verdict; the kernel caps an errno at 4095.
    let value = || match errno {
        Some(errno) => u16::try_from(errno).with_context(|| format!("errno {errno}")),
        None => Ok(libc::EPERM as u16),
    };
    let found = match action {
        Action::ScmpActErrno => return Ok(ScmpAction::Errno(value()?.into())),
        Action::ScmpActTrace => return Ok(ScmpAction::Trace(value()?)),
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActLog => ScmpAction::Log,
        Action::ScmpActAllow => ScmpAction::Allow,
        Action::ScmpActNotify => {
            bail!("SCMP_ACT_NOTIFY: no descriptor of the guest's kernel can cross to the host")
        }
    };
    match errno {
        Some(errno) => bail!("{}: the action has no errno, {errno} was given", word(action)),
        None => Ok(found),
    }
}

/// One rule for each of its names. A name that is not known here is one that no kernel of this library's time has: runc
/// skips it too.
fn add(filter: &mut ScmpFilterContext, rule: &LinuxSyscall, default: ScmpAction) -> Result<()> {
    let wanted = action(rule.action(), rule.errno_ret())?;
    let arguments = rule.args().as_deref().unwrap_or_default();
    let conditions: Vec<ScmpArgCompare> = arguments.iter().map(condition).collect::<Result<_>>()?;
    // libseccomp compares an argument once a rule. Several comparisons of one are alternatives then, as in runc.
    let is_twice = |(at, argument): (usize, &LinuxSeccompArg)| {
        arguments[..at].iter().any(|other| other.index() == argument.index())
    };
    let alternatives = arguments.iter().enumerate().any(is_twice);
    for name in rule.names() {
        let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
        if wanted == default {
            continue;
        }
        let added = match (conditions.as_slice(), alternatives) {
            ([], _) => filter.add_rule(wanted, syscall).map(drop),
            (all, false) => filter.add_rule_conditional(wanted, syscall, all).map(drop),
            (all, true) => {
                all.iter().try_for_each(|one| filter.add_rule_conditional(wanted, syscall, &[*one]).map(drop))
            }
        };
        added.with_context(|| {
            format!("{name}: {} cannot be combined with the other rules", word(rule.action()))
        })?;
    }
    Ok(())
}

fn condition(argument: &LinuxSeccompArg) -> Result<ScmpArgCompare> {
    let index = argument.index();
    ensure!(index < 6, "args: index {index}: a system call has six arguments");
    let (operator, value) = match argument.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, argument.value()),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, argument.value()),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, argument.value()),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, argument.value()),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, argument.value()),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, argument.value()),
        // The first value is the mask.
        Operator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(argument.value()), argument.value_two().unwrap_or(0))
        }
    };
    Ok(ScmpArgCompare::new(index as u32, operator, value))
}

fn flags(profile: &LinuxSeccomp) -> Result<u32> {
    let mut bits = 0;
    for flag in profile.flags().iter().flatten() {
        bits |= match flag {
            Flag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            Flag::SeccompFilterFlagWaitKillableRecv => {
                bail!("linux.seccomp.flags: {LISTENER_FLAG}: there is no listener")
            }
        };
    }
    Ok(bits as u32)
}

fn architecture(arch: Arch) -> Result<ScmpArch> {
    word(arch).parse().context("no such architecture")
}

/// The spec's spelling.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn export(filter: &ScmpFilterContext) -> Result<Vec<u64>> {
    let mut file = File::from(memfd_create("seccomp", MFdFlags::MFD_CLOEXEC).context("memory file")?);
    filter.export_bpf(&file).context("linux.seccomp: compile")?;
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).context("read the compiled filter")?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_ne_bytes(*chunk)).collect())
}

/// Instructions that say ENOSYS to system calls newer than any that the profile names, where it would forbid them.
/// Its author did not know them, and programs fall back at ENOSYS but not at EPERM. runc does the same.
fn newer_than_the_profile(profile: &LinuxSeccomp) -> Result<Vec<u64>> {
    let permissive =
        matches!(profile.default_action(), Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace);
    if permissive || profile.default_errno_ret() == Some(libc::ENOSYS as u32) {
        return Ok(Vec::new());
    }
    let given = profile.architectures().iter().flatten().copied();
    let mut program = Vec::new();
    let mut seen = Vec::new();
    for arch in given.chain([NATIVE]).map(|arch| if arch == Arch::ScmpArchNative { NATIVE } else { arch }) {
        let known = architecture(arch)?;
        let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
        let numbers = names.filter_map(|name| ScmpSyscall::from_name_by_arch(name, known).ok());
        // Negative ones stand for calls that this architecture does not have.
        let last = numbers.map(ScmpSyscall::as_raw_syscall).filter(|number| *number >= 0).max();
        if let Some(last) = last.filter(|_| !seen.contains(&arch)) {
            program.extend(enosys_above(arch, last as u32));
        }
        seen.push(arch);
    }
    Ok(program)
}

/// The machine's own architecture, which is in every filter.
#[cfg(target_arch = "x86_64")]
const NATIVE: Arch = Arch::ScmpArchX86_64;
#[cfg(target_arch = "aarch64")]
const NATIVE: Arch = Arch::ScmpArchAarch64;
#[cfg(target_arch = "riscv64")]
const NATIVE: Arch = Arch::ScmpArchRiscv64;

/// x32 shares its architecture number with x86-64 and sets this bit in its call numbers.
const X32_BIT: u32 = 0x4000_0000;

fn enosys_above(arch: Arch, last: u32) -> Vec<u64> {
    let instruction =
        |code: u32, yes: u64, no: u64, k: u32| u64::from(code) | yes << 16 | no << 24 | u64::from(k) << 32;
    let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let jump = |kind, yes, no, k| instruction(libc::BPF_JMP | kind | libc::BPF_K, yes, no, k);
    // struct seccomp_data: the call's number, then the architecture.
    let (load_number, load_arch) = (load(0), load(4));
    let enosys =
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
    // What is outside this architecture's range of numbers goes past the verdict.
    let (number, range) = match arch {
        Arch::ScmpArchX86_64 => (arch as u32, Some(jump(libc::BPF_JGE, 2, 0, X32_BIT))),
        Arch::ScmpArchX32 => (Arch::ScmpArchX86_64 as u32, Some(jump(libc::BPF_JGE, 0, 2, X32_BIT))),
        arch => (arch as u32, None),
    };
    let past = 3 + u64::from(range.is_some());
    let mut program = vec![load_arch, jump(libc::BPF_JEQ, 0, past, number), load_number];
    program.extend(range);
    program.extend([jump(libc::BPF_JGT, 0, 1, last), enosys]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn compiled(profile: Value) -> Result<proto::Seccomp> {
        compile(&serde_json::from_value(profile).unwrap())
    }

    /// What the kernel would say to a call: the verdict of the program on it.
    fn verdict(filter: &proto::Seccomp, arch: Arch, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [0u32; 16];
        (data[0], data[1]) = (number, arch as u32);
        for (at, argument) in arguments.into_iter().enumerate() {
            (data[4 + 2 * at], data[5 + 2 * at]) = (argument as u32, (argument >> 32) as u32);
        }
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let instruction = filter.program[at];
            let (code, k) = (instruction as u16 as u32, (instruction >> 32) as u32);
            let (yes, no) = ((instruction >> 16) as u8, (instruction >> 24) as u8);
            at += 1;
            let jump = |taken: bool| usize::from(if taken { yes } else { no });
            const JUMP: u32 = libc::BPF_JMP | libc::BPF_K;
            match code {
                0x20 => accumulator = data[k as usize / 4],
                0x54 => accumulator &= k,
                code if code == JUMP | libc::BPF_JEQ => at += jump(accumulator == k),
                code if code == JUMP | libc::BPF_JGT => at += jump(accumulator > k),
                code if code == JUMP | libc::BPF_JGE => at += jump(accumulator >= k),
                code if code == JUMP | libc::BPF_JA => at += k as usize,
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

    fn errno(number: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | number as u32
    }

    fn native(filter: &proto::Seccomp, name: &str, arguments: [u64; 6]) -> u32 {
        let number = ScmpSyscall::from_name(name).unwrap().as_raw_syscall() as u32;
        verdict(filter, NATIVE, number, arguments)
    }

    #[test]
    fn every_action_has_its_verdict() {
        for (name, errno_ret, expected) in [
            ("SCMP_ACT_KILL", None, libc::SECCOMP_RET_KILL_THREAD),
            ("SCMP_ACT_KILL_THREAD", None, libc::SECCOMP_RET_KILL_THREAD),
            ("SCMP_ACT_KILL_PROCESS", None, libc::SECCOMP_RET_KILL_PROCESS),
            ("SCMP_ACT_TRAP", None, libc::SECCOMP_RET_TRAP),
            ("SCMP_ACT_ERRNO", None, errno(libc::EPERM)),
            ("SCMP_ACT_ERRNO", Some(71), errno(71)),
            ("SCMP_ACT_TRACE", Some(5), libc::SECCOMP_RET_TRACE | 5),
            ("SCMP_ACT_LOG", None, libc::SECCOMP_RET_LOG),
        ] {
            assert!(ACTIONS.contains(&name));
            let rule = json!({"names": ["sync", "no_such_call"], "action": name, "errnoRet": errno_ret});
            let filter = compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})).unwrap();
            assert_eq!(native(&filter, "sync", [0; 6]), expected, "{name}");
            assert_eq!(native(&filter, "getpid", [0; 6]), ALLOW, "{name}");
            let filter = compiled(json!({"defaultAction": name, "defaultErrnoRet": errno_ret})).unwrap();
            assert_eq!(native(&filter, "sync", [0; 6]), expected, "{name}");
        }
    }

    #[test]
    fn every_operator_compares() {
        for (operator, value, value_two, matching, other) in [
            ("SCMP_CMP_NE", 5, 0, 6, 5),
            ("SCMP_CMP_LT", 5, 0, 4, 5),
            ("SCMP_CMP_LE", 5, 0, 5, 6),
            ("SCMP_CMP_EQ", 1u64 << 40, 0, 1u64 << 40, 0),
            ("SCMP_CMP_GE", 5, 0, 5, 4),
            ("SCMP_CMP_GT", 5, 0, 6, 5),
            ("SCMP_CMP_MASKED_EQ", 0xf0, 0x30, 0x3f, 0x43),
        ] {
            assert!(OPERATORS.contains(&operator));
            let argument = json!({"index": 2, "value": value, "valueTwo": value_two, "op": operator});
            let rule =
                json!({"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97, "args": [argument]});
            let filter = compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})).unwrap();
            assert_eq!(native(&filter, "socket", [0, 0, matching, 0, 0, 0]), errno(97), "{operator}");
            assert_eq!(native(&filter, "socket", [0, 0, other, 0, 0, 0]), ALLOW, "{operator}");
        }
    }

    #[test]
    fn comparisons_of_one_argument_are_alternatives_others_hold_together() {
        let rule = |indices: [u32; 2]| {
            let arguments =
                indices.map(|index| json!({"index": index, "value": 7 + index, "op": "SCMP_CMP_EQ"}));
            let mut rule = json!({"names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": arguments});
            rule["args"][1]["value"] = json!(9);
            compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})).unwrap()
        };
        let (both, either) = (rule([0, 1]), rule([0, 0]));
        for (arguments, of_both, of_either) in
            [([7, 9], true, true), ([7, 0], false, true), ([9, 0], false, true), ([0, 9], false, false)]
        {
            let arguments = [arguments[0], arguments[1], 0, 0, 0, 0];
            assert_eq!(native(&both, "socket", arguments) != ALLOW, of_both, "{arguments:?}");
            assert_eq!(native(&either, "socket", arguments) != ALLOW, of_either, "{arguments:?}");
        }
    }

    #[test]
    fn what_is_newer_than_the_profile_is_missing_not_forbidden() {
        let profile = |default: &str, errno_ret: Value| {
            json!({
                "defaultAction": default, "defaultErrnoRet": errno_ret,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{"names": ["getpid", "openat2"], "action": "SCMP_ACT_ALLOW"}]
            })
        };
        let filter = compiled(profile("SCMP_ACT_ERRNO", Value::Null)).unwrap();
        for arch in [Arch::ScmpArchX86_64, Arch::ScmpArchX86] {
            // openat2 is 437 for both.
            assert_eq!(verdict(&filter, arch, 437, [0; 6]), ALLOW, "{arch:?}");
            assert_eq!(verdict(&filter, arch, 438, [0; 6]), errno(libc::ENOSYS), "{arch:?}");
            assert_eq!(verdict(&filter, arch, 400, [0; 6]), errno(libc::EPERM), "{arch:?}");
        }
        let x32 = |number| verdict(&filter, Arch::ScmpArchX86_64, X32_BIT + number, [0; 6]);
        assert_eq!([437, 438, 400].map(x32), [ALLOW, errno(libc::ENOSYS), errno(libc::EPERM)]);
        let of = |default| verdict(&compiled(profile(default, Value::Null)).unwrap(), NATIVE, 9999, [0; 6]);
        assert_eq!(of("SCMP_ACT_KILL_PROCESS"), errno(libc::ENOSYS));
        assert_eq!(of("SCMP_ACT_LOG"), libc::SECCOMP_RET_LOG);
    }

    #[test]
    fn other_architectures_are_killed_unless_named() {
        let filter = compiled(json!({"defaultAction": "SCMP_ACT_ALLOW"})).unwrap();
        assert_eq!(verdict(&filter, Arch::ScmpArchMips, 1, [0; 6]), libc::SECCOMP_RET_KILL_THREAD);
        let words = architectures();
        assert!(words.iter().any(|name| name == "SCMP_ARCH_X86_64") && !words.iter().any(String::is_empty));
        for arch in ARCHITECTURES {
            assert!(architecture(arch).is_ok(), "{arch:?}");
        }
    }

    #[test]
    fn flags_become_bits() {
        assert_eq!(compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": FLAGS})).unwrap().flags, 7);
        assert_eq!(compiled(json!({"defaultAction": "SCMP_ACT_ALLOW"})).unwrap().flags, 0);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let rule = |rule: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
        let argument = json!([{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]);
        let many: Vec<Value> = (0..5000)
            .map(|n| {
                json!({"names": ["socket"], "action": "SCMP_ACT_TRAP",
            "args": [{"index": 0, "value": n, "op": "SCMP_CMP_EQ"}]})
            })
            .collect();
        for (profile, words) in [
            (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY"),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}),
                "SCMP_ACT_ALLOW: the action has no errno",
            ),
            (json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 70000}), "errno 70000"),
            (
                rule(json!({"names": ["sync"], "action": "SCMP_ACT_TRAP", "errnoRet": 5})),
                "linux.seccomp.syscalls[0]: ",
            ),
            (rule(json!({"names": ["sync"], "action": "SCMP_ACT_TRAP", "args": argument})), "index 6"),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390X"]}),
                "architectures: SCMP_ARCH_S390X",
            ),
            (json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": [LISTENER_FLAG]}), LISTENER_FLAG),
            (json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": many}), "the kernel takes 4096 at most"),
        ] {
            let text = format!("{:#}", compiled(profile).unwrap_err());
            assert!(text.contains(words), "{text}");
        }
    }
}
