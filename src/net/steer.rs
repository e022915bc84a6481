//! Hands connections to the loopback address, whatever their port, to one listener.
//!
//! An eBPF program at the namespace's socket look-up (BPF_PROG_TYPE_SK_LOOKUP): nothing is translated, nothing is left
//! behind, and the listener's sockets say which port was meant. It lives as long as its [`Steering`]. Must not: touch
//! any other address, such as 127.0.0.11 where engines serve names.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};

/// In force until it is dropped.
pub struct Steering {
    _link: OwnedFd,
}

const MAP_CREATE: u32 = 0;
const MAP_UPDATE: u32 = 2;
const PROG_LOAD: u32 = 5;
const LINK_CREATE: u32 = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Steers to `four` and, where there is IPv6, to `six`, in the namespace.
pub fn steer(namespace: BorrowedFd<'_>, four: RawFd, six: Option<RawFd>) -> Result<Steering> {
    let map = map_create().context("bpf map")?;
    for (key, socket) in [(0, Some(four)), (1, six)] {
        let Some(socket) = socket else { continue };
        map_update(&map, key, socket).context("bpf map")?;
    }
    let program = load(&program(map.as_raw_fd())).context("bpf program")?;
    let link = [program.as_raw_fd() as u32, namespace.as_raw_fd() as u32, ATTACH_SK_LOOKUP, 0];
    let _link = bpf_fd(LINK_CREATE, &link).context("attach bpf program")?;
    Ok(Steering { _link })
}

/// One instruction: `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// Places in the program that jumps name, until they are told how far it is.
const OUT: i16 = i16::MAX;
const FOUR: i16 = OUT - 1;
const LOOK: i16 = OUT - 2;

/// Is it TCP to 127.0.0.1 or ::1? Then the socket in the map is the one. Whatever happens, the look-up goes on.
fn program(map: RawFd) -> Vec<Instruction> {
    const LOAD: u8 = 0x61; // to = *(u32 *)(from + offset)
    const STORE: u8 = 0x62; // *(u32 *)(to + offset) = immediate
    const MOVE: u8 = 0xbf; // to = from
    const SET: u8 = 0xb7; // to = immediate
    const ADD: u8 = 0x07; // to += immediate
    const UNLESS: u8 = 0x55; // if to != immediate, jump
    const IF: u8 = 0x15; // if to == immediate, jump
    const GOTO: u8 = 0x05;
    const MAP: u8 = 0x18; // to = map, in two words
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    let mut code = vec![
        op(MOVE, 6, 1, 0, 0),
        op(STORE, 10, 0, -4, 0),
        op(LOAD, 2, 6, PROTOCOL, 0),
        op(UNLESS, 2, 0, OUT, libc::IPPROTO_TCP),
        op(LOAD, 2, 6, FAMILY, 0),
        op(IF, 2, 0, FOUR, libc::AF_INET),
        op(UNLESS, 2, 0, OUT, libc::AF_INET6),
    ];
    for (word, value) in [0, 0, 0, i32::from_ne_bytes([0, 0, 0, 1])].into_iter().enumerate() {
        code.push(op(LOAD, 2, 6, LOCAL_IP6 + 4 * word as i16, 0));
        code.push(op(UNLESS, 2, 0, OUT, value));
    }
    code.extend([op(STORE, 10, 0, -4, 1), op(GOTO, 0, 0, LOOK, 0)]);
    let four = code.len();
    code.extend([op(LOAD, 2, 6, LOCAL_IP4, 0), op(UNLESS, 2, 0, OUT, i32::from_ne_bytes([127, 0, 0, 1]))]);
    let look = code.len();
    code.extend([
        op(MAP, 1, 1, 0, map),
        op(0, 0, 0, 0, 0),
        op(MOVE, 2, 10, 0, 0),
        op(ADD, 2, 0, 0, -4),
        op(CALL, 0, 0, 0, MAP_LOOKUP),
        op(IF, 0, 0, OUT, 0),
        op(MOVE, 7, 0, 0, 0),
        op(MOVE, 1, 6, 0, 0),
        op(MOVE, 2, 7, 0, 0),
        op(SET, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, SK_ASSIGN),
        op(MOVE, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, SK_RELEASE),
    ]);
    let out = code.len();
    code.extend([op(SET, 0, 0, 0, 1), op(EXIT, 0, 0, 0, 0)]);
    for (index, instruction) in code.iter_mut().enumerate() {
        let target = match instruction.offset {
            OUT => out,
            FOUR => four,
            LOOK => look,
            _ => continue,
        };
        instruction.offset = (target - index - 1) as i16;
    }
    code
}

fn map_create() -> io::Result<OwnedFd> {
    let (key, value, entries) = (4, 4, 2);
    bpf_fd(MAP_CREATE, &[MAP_TYPE_SOCKMAP, key, value, entries])
}

fn map_update(map: &OwnedFd, key: u32, socket: RawFd) -> io::Result<()> {
    let value = socket as u32;
    let attributes = [
        map.as_raw_fd() as u64,
        (&raw const key).expose_provenance() as u64,
        (&raw const value).expose_provenance() as u64,
        0,
    ];
    bpf(MAP_UPDATE, &attributes).map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let licence = c"Dual MIT/GPL";
    let head = u64::from(PROG_TYPE_SK_LOOKUP) | (program.len() as u64) << 32;
    let mut attributes = [0u64; 9];
    attributes[..3].copy_from_slice(&[
        head,
        program.as_ptr().expose_provenance() as u64,
        licence.as_ptr().expose_provenance() as u64,
    ]);
    attributes[8] = u64::from(ATTACH_SK_LOOKUP) << 32; // behind prog_ifindex
    own(bpf(PROG_LOAD, &attributes)?)
}

fn bpf_fd(command: u32, attributes: &[u32]) -> io::Result<OwnedFd> {
    own(bpf(command, attributes)?)
}

fn own(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the kernel just gave this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: u32, attributes: &[T]) -> io::Result<RawFd> {
    // SAFETY: the kernel reads as many bytes as are given; addresses in them are of values that outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_lands_in_the_program() {
        let code = program(7);
        assert_eq!(size_of::<Instruction>(), 8);
        for (index, instruction) in
            code.iter().enumerate().filter(|(_, i)| [0x05, 0x15, 0x55].contains(&i.code))
        {
            let target = index + 1 + instruction.offset as usize;
            assert!(instruction.offset >= 0 && target < code.len(), "{index}: {instruction:?}");
        }
        assert_eq!(code.last().map(|last| last.code), Some(0x95));
    }
}
