//! Which devices the processes of a cgroup may use: a program of cgroup v2, which the kernel asks at every open and
//! mknod. The host's cgroup of a VM has one, and the guest's of a container.
//!
//! In: rules. Out: a loaded and attached program; it lives as long as the cgroup. Must not: allow what no rule allows.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use a3s_box_proto::{DeviceKind, DeviceRule};
use anyhow::{Context, Result};

const EVERY_ACCESS: u32 = 7;
/// linux/bpf.h
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Several programs may be there, and all have to agree.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// One instruction: code, registers, jump offset, number.
type Instruction = (u8, u8, i16, i32);

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
/// What of the wanted access no rule has allowed yet.
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_NUMBER: u8 = 0xb7;
const AND_NUMBER: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP: u8 = 0x05;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const JUMP_IF_ANY_BIT: u8 = 0x45;
const EXIT: u8 = 0x95;

/// Makes the rules hold for all processes of a cgroup.
pub fn attach(cgroup: &File, rules: &[DeviceRule]) -> Result<()> {
    let program = load(&encode(&program(rules))).context("load the filter of devices")?;
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let attach = Attach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attach).context("attach the filter of devices").map(drop)
}

/// Whether the kernel takes such programs, and from this process; else, why not.
pub fn usable() -> io::Result<()> {
    load(&encode(&program(&[]))).map(drop)
}

/// From the last rule to the first: each takes a stand on what is wanted and not yet allowed.
fn program(rules: &[DeviceRule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: kind and access in one word, major, minor.
    let mut program = vec![
        (LOAD_WORD, registers(KIND, CONTEXT), 0, 0),
        (MOVE, registers(WANTED, KIND), 0, 0),
        (SHIFT_RIGHT, WANTED, 0, 16),
        (AND_NUMBER, KIND, 0, 0xffff),
        (LOAD_WORD, registers(MAJOR, CONTEXT), 4, 0),
        (LOAD_WORD, registers(MINOR, CONTEXT), 8, 0),
    ];
    for rule in rules.iter().rev() {
        let conditions: Vec<(u8, u32)> =
            [(KIND, rule.kind.map(number)), (MAJOR, rule.major), (MINOR, rule.minor)]
                .into_iter()
                .filter_map(|(register, value)| Some((register, value?)))
                .collect();
        let stand = stand(rule);
        for (index, (register, value)) in conditions.iter().enumerate() {
            let rest = conditions.len() - index - 1 + stand.len();
            program.push((JUMP_UNLESS_EQUAL, *register, rest as i16, *value as i32));
        }
        program.extend(stand);
        // The verifier takes no instruction that cannot be reached, and none is needed.
        if conditions.is_empty() && !rule.allow && rule.access == EVERY_ACCESS {
            return program;
        }
    }
    program.extend(answer(false));
    program
}

fn stand(rule: &DeviceRule) -> Vec<Instruction> {
    let access = rule.access as i32;
    let mut stand = match (rule.allow, rule.access) {
        (true, _) => vec![(AND_NUMBER, WANTED, 0, !access), (JUMP_UNLESS_EQUAL, WANTED, 2, 0)],
        (false, EVERY_ACCESS) => Vec::new(),
        (false, _) => vec![(JUMP_IF_ANY_BIT, WANTED, 1, access), (JUMP, 0, 2, 0)],
    };
    stand.extend(answer(rule.allow));
    stand
}

fn answer(allow: bool) -> [Instruction; 2] {
    [(MOVE_NUMBER, RESULT, 0, i32::from(allow)), (EXIT, 0, 0, 0)]
}

/// `BPF_DEVCG_DEV_*`
fn number(kind: DeviceKind) -> u32 {
    match kind {
        DeviceKind::Block => 1,
        DeviceKind::Char => 2,
    }
}

fn registers(target: u8, source: u8) -> u8 {
    source << 4 | target
}

fn encode(program: &[Instruction]) -> Vec<u64> {
    let word = |(code, registers, offset, number): &Instruction| {
        let [low, high] = offset.to_ne_bytes();
        let [a, b, c, d] = number.to_ne_bytes();
        u64::from_ne_bytes([*code, *registers, low, high, a, b, c, d])
    };
    program.iter().map(word).collect()
}

fn load(program: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &load)?;
    // SAFETY: the kernel just gave this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the attributes and what they point to live until after the call, and their size is given.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u32 = 2;
    const WRITE: u32 = 4;

    fn rule(allow: bool, device: (Option<DeviceKind>, Option<u32>, Option<u32>), access: u32) -> DeviceRule {
        DeviceRule { allow, kind: device.0, major: device.1, minor: device.2, access }
    }

    /// Runs a program as the kernel would.
    fn allows(rules: &[DeviceRule], kind: DeviceKind, major: u32, minor: u32, access: u32) -> bool {
        let program = program(rules);
        let words = [u64::from(access << 16 | number(kind)), u64::from(major), u64::from(minor)];
        let mut registers = [0u64; 6];
        let mut at = 0usize;
        loop {
            let (code, named, offset, number) = program[at];
            let (target, source) = ((named & 15) as usize, (named >> 4) as usize);
            let number = number as i64 as u64;
            at += 1;
            let mut jump_if = |condition: bool| at += if condition { offset as usize } else { 0 };
            match code {
                LOAD_WORD => registers[target] = words[offset as usize / 4],
                MOVE => registers[target] = registers[source],
                MOVE_NUMBER => registers[target] = number,
                AND_NUMBER => registers[target] &= number,
                SHIFT_RIGHT => registers[target] >>= number,
                JUMP => jump_if(true),
                JUMP_UNLESS_EQUAL => jump_if(registers[target] != number),
                JUMP_IF_ANY_BIT => jump_if(registers[target] & number != 0),
                EXIT => return registers[RESULT as usize] == 1,
                other => panic!("no such instruction: {other:#x}"),
            }
        }
    }

    #[test]
    fn the_last_rule_that_fits_decides_for_each_access() {
        use DeviceKind::{Block, Char};
        let all = (None, None, None);
        let null = (Some(Char), Some(1), Some(3));
        let rules = [
            rule(true, (Some(Char), Some(7), None), EVERY_ACCESS),
            rule(false, all, EVERY_ACCESS),
            rule(true, null, READ),
            rule(true, null, WRITE),
            rule(true, (Some(Char), Some(136), None), EVERY_ACCESS),
            rule(false, (Some(Char), Some(136), Some(9)), WRITE),
        ];
        for (kind, major, minor, access, expected) in [
            (Char, 1, 3, READ | WRITE, true),
            (Char, 1, 3, EVERY_ACCESS, false),
            (Block, 1, 3, READ, false),
            (Char, 1, 5, READ, false),
            (Char, 7, 1, READ, false),
            (Char, 136, 4, EVERY_ACCESS, true),
            (Char, 136, 9, READ, true),
            (Char, 136, 9, READ | WRITE, false),
        ] {
            assert_eq!(
                allows(&rules, kind, major, minor, access),
                expected,
                "{kind:?} {major}:{minor} {access}"
            );
        }
        assert!(!allows(&[], Char, 1, 3, READ));
        assert!(allows(&[rule(true, all, EVERY_ACCESS)], Block, 8, 0, EVERY_ACCESS));
        assert!(!allows(&[rule(false, all, WRITE)], Block, 8, 0, READ));
    }
}
