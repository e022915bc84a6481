//! Loads the container's filter of system calls.
//!
//! In: instructions that the host compiled. Out: a process that they bind, and its children. Must not: interpret them.

use a3s_box_proto::Seccomp;
use anyhow::{Context, Result};
use nix::errno::Errno;

/// Binds this process. Without no_new_privs it takes CAP_SYS_ADMIN.
pub fn load(filter: &Seccomp) -> Result<()> {
    let mut instructions: Vec<libc::sock_filter> = filter.program.iter().map(instruction).collect();
    let len = u16::try_from(instructions.len()).context("linux.seccomp: the filter is too long")?;
    let program = libc::sock_fprog { len, filter: instructions.as_mut_ptr() };
    // SAFETY: the program and its instructions live until after the call, which only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::c_ulong::from(filter.flags),
            &raw const program,
        )
    };
    Errno::result(result).map(drop).context("linux.seccomp: load the filter")
}

fn instruction(packed: &u64) -> libc::sock_filter {
    libc::sock_filter {
        code: *packed as u16,
        jt: (packed >> 16) as u8,
        jf: (packed >> 24) as u8,
        k: (packed >> 32) as u32,
    }
}
