//! Any profile: no panic; what compiles is a program that the kernel would take, and says to a call that no rule names
//! what the default says. `-detect_leaks=0`: libseccomp loses memory on some rules, which a process that compiles once
//! does not mind.
#![no_main]

use a3s_box_fuzz::seccomp::{ACTIONS, FLAGS, LISTENER_FLAG, OPERATORS, compile};
use a3s_box_proto::MAX_FILTER;
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

/// Calls of one machine, of several, of none, and nonsense; `getpid` is named by no rule.
const NAMES: [&str; 16] = [
    "read",
    "clone",
    "clone3",
    "socket",
    "socketcall",
    "personality",
    "openat2",
    "arm_fadvise64_64",
    "ipc",
    "mmap2",
    "process_mrelease",
    "s390_pci_mmio_read",
    "no_such_call",
    "",
    "a\u{0}b",
    "futex_waitv",
];
const ARCHITECTURES: [&str; 10] = [
    "SCMP_ARCH_NATIVE",
    "SCMP_ARCH_X86_64",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC64LE",
];
/// With more rules that compare arguments of one call libseccomp takes minutes. `compile` gives up then, but the thread
/// goes on, at the cost of all inputs after it.
const COMPARING: usize = 3;
const GETPID: u32 = libc::SYS_getpid as u32;

fuzz_target!(|bytes: &[u8]| {
    let Ok(profile) = profile(&mut Unstructured::new(bytes)) else { return };
    let Ok(typed) = serde_json::from_value(profile.clone()) else { return };
    let Ok(filter) = compile(&typed) else { return };
    assert!((1..=MAX_FILTER).contains(&filter.program.len()));
    let default = profile["defaultAction"].as_str().unwrap_or_default();
    let errno = profile["defaultErrnoRet"].as_u64().unwrap_or(1) as u32;
    let expected = match default {
        "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
        "SCMP_ACT_LOG" => libc::SECCOMP_RET_LOG,
        "SCMP_ACT_TRAP" => libc::SECCOMP_RET_TRAP,
        "SCMP_ACT_KILL_PROCESS" => libc::SECCOMP_RET_KILL_PROCESS,
        "SCMP_ACT_ERRNO" => libc::SECCOMP_RET_ERRNO | errno,
        "SCMP_ACT_TRACE" => libc::SECCOMP_RET_TRACE | errno,
        _ => libc::SECCOMP_RET_KILL_THREAD,
    };
    let verdict = run(&filter.program);
    // A profile whose newest call is older than getpid (39) does not know it.
    assert!(
        verdict == expected || verdict == libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
        "{verdict:#x} {profile}"
    );
});

fn profile(bytes: &mut Unstructured) -> Result<Value> {
    let mut profile = json!({ "defaultAction": bytes.choose(&ACTIONS)?, "syscalls": [] });
    if bytes.ratio(1, 3)? {
        profile["defaultErrnoRet"] = bytes.arbitrary::<u16>()?.into();
    }
    let architectures = (0..bytes.int_in_range(0..=4)?).map(|_| bytes.choose(&ARCHITECTURES));
    profile["architectures"] = json!(architectures.collect::<Result<Vec<_>>>()?);
    let flags = [&FLAGS[..], &[LISTENER_FLAG]].concat();
    if bytes.ratio(1, 4)? {
        profile["flags"] = json!([bytes.choose(&flags)?]);
    }
    let mut rules = Vec::new();
    while rules.len() < 12 && !bytes.is_empty() {
        rules.push(rule(bytes, rules.len() < COMPARING)?);
    }
    profile["syscalls"] = rules.into();
    Ok(profile)
}

fn rule(bytes: &mut Unstructured, compares: bool) -> Result<Value> {
    let names = (0..bytes.int_in_range(0..=if compares { 1 } else { 3 })?)
        .map(|_| bytes.choose(&NAMES))
        .collect::<Result<Vec<_>>>()?;
    let mut rule = json!({ "names": names, "action": bytes.choose(&ACTIONS)? });
    if bytes.ratio(1, 3)? {
        rule["errnoRet"] = bytes.arbitrary::<u32>()?.into();
    }
    let mut arguments = Vec::new();
    for _ in 0..bytes.int_in_range(0..=if compares { 3 } else { 0 })? {
        arguments.push(json!({
            "index": bytes.int_in_range(0..=6)?, "op": bytes.choose(&OPERATORS)?,
            "value": bytes.arbitrary::<u64>()?, "valueTwo": bytes.arbitrary::<u64>()?
        }));
    }
    rule["args"] = arguments.into();
    Ok(rule)
}

/// Checks as the kernel does (only known instructions, jumps forward and within, a verdict at the end) and runs getpid.
fn run(program: &[u64]) -> u32 {
    let native = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
    let data = |offset: u32| match offset {
        0 => GETPID,
        4 => native,
        offset => {
            assert!(offset < 64 && offset % 4 == 0, "load at {offset}");
            0
        }
    };
    let parts =
        |packed: u64| (packed as u16, (packed >> 16) as u8, (packed >> 24) as u8, (packed >> 32) as u32);
    let last = program.last().map(|packed| parts(*packed).0);
    assert_eq!(last, Some((libc::BPF_RET | libc::BPF_K) as u16));
    let (mut verdict, mut at, mut accumulator) = (None, 0, 0);
    for (place, packed) in program.iter().enumerate() {
        let (code, yes, no, k) = parts(*packed);
        let next = |further: u32| {
            assert!(place + 1 + (further as usize) < program.len(), "jump out of the program");
            place + 1 + further as usize
        };
        let is_here = verdict.is_none() && at == place;
        let target = match code {
            0x20 => {
                let value = data(k);
                if is_here {
                    accumulator = value;
                }
                next(0)
            }
            0x54 => {
                if is_here {
                    accumulator &= k;
                }
                next(0)
            }
            0x05 => next(k),
            0x15 | 0x25 | 0x35 => {
                let (taken, other) = (next(yes.into()), next(no.into()));
                let holds = match code {
                    0x15 => accumulator == k,
                    0x25 => accumulator > k,
                    _ => accumulator >= k,
                };
                if holds { taken } else { other }
            }
            0x06 => {
                if is_here {
                    verdict = Some(k);
                }
                place
            }
            code => panic!("instruction {code:#x}"),
        };
        if is_here {
            at = target;
        }
    }
    verdict.expect("no verdict")
}
