//! System calls: which can fail, and with what.

use nix::libc::{self, *};

/// Not made to fail, and why.
const SPARED: &[(&str, &[c_long])] = &[
    (
        "memory: the C library and Rust end a process that has none",
        &[SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_madvise, SYS_brk],
    ),
    (
        "signals: they fail for wrong arguments alone",
        &[SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_sigaltstack],
    ),
    (
        "what the C library and Rust do before main, or for locks, and count on",
        &[
            SYS_arch_prctl,
            SYS_set_tid_address,
            SYS_set_robust_list,
            SYS_rseq,
            SYS_futex,
            SYS_getrandom,
            SYS_sched_getaffinity,
        ],
    ),
    (
        "they cannot fail",
        &[
            SYS_getpid,
            SYS_gettid,
            SYS_getppid,
            SYS_getuid,
            SYS_geteuid,
            SYS_getgid,
            SYS_getegid,
            SYS_umask,
            SYS_uname,
            SYS_clock_gettime,
            SYS_sched_yield,
            SYS_rt_sigreturn,
            SYS_restart_syscall,
            SYS_exit,
            SYS_exit_group,
        ],
    ),
    ("a sleep can only be cut short", &[SYS_nanosleep, SYS_clock_nanosleep]),
    ("whatever it says, the descriptor is closed", &[SYS_close]),
];

/// By what a call fails with where the machine is at its limits or forbids it. Any other gets EIO.
const FAILURES: &[(c_int, &[c_long])] = &[
    (
        EMFILE,
        &[
            SYS_open,
            SYS_openat,
            SYS_openat2,
            SYS_open_tree,
            SYS_socket,
            SYS_socketpair,
            SYS_accept4,
            SYS_pipe2,
            SYS_dup,
            SYS_dup2,
            SYS_dup3,
            SYS_memfd_create,
            SYS_eventfd2,
            SYS_signalfd4,
            SYS_inotify_init1,
            SYS_epoll_create1,
            SYS_timerfd_create,
            SYS_pidfd_open,
        ],
    ),
    (
        ENOSPC,
        &[
            SYS_write,
            SYS_pwrite64,
            SYS_writev,
            SYS_mkdir,
            SYS_mkdirat,
            SYS_mknod,
            SYS_mknodat,
            SYS_rename,
            SYS_renameat2,
            SYS_symlinkat,
            SYS_linkat,
            SYS_inotify_add_watch,
            SYS_ftruncate,
            SYS_sendfile,
            SYS_copy_file_range,
        ],
    ),
    (
        ENOMEM,
        &[
            SYS_connect,
            SYS_recvfrom,
            SYS_recvmsg,
            SYS_execve,
            SYS_execveat,
            SYS_poll,
            SYS_ppoll,
            SYS_epoll_wait,
            SYS_epoll_ctl,
            SYS_setxattr,
        ],
    ),
    (EAGAIN, &[SYS_clone, SYS_clone3, SYS_fork, SYS_vfork]),
    (ENOLCK, &[SYS_flock]),
    (ENOBUFS, &[SYS_sendto, SYS_sendmsg]),
    (ECHILD, &[SYS_wait4, SYS_waitid]),
    (
        EPERM,
        &[
            SYS_mount,
            SYS_umount2,
            SYS_fsopen,
            SYS_fsconfig,
            SYS_fsmount,
            SYS_move_mount,
            SYS_mount_setattr,
            SYS_pivot_root,
            SYS_chroot,
            SYS_setns,
            SYS_unshare,
            SYS_sethostname,
            SYS_setdomainname,
            SYS_setsid,
            SYS_setpgid,
            SYS_setuid,
            SYS_setresuid,
            SYS_setgid,
            SYS_setresgid,
            SYS_setgroups,
            SYS_capset,
            SYS_prctl,
            SYS_prlimit64,
            SYS_chmod,
            SYS_fchmod,
            SYS_fchmodat,
            SYS_chown,
            SYS_fchown,
            SYS_fchownat,
            SYS_kill,
            SYS_pidfd_send_signal,
            SYS_seccomp,
            SYS_bpf,
            SYS_keyctl,
        ],
    ),
];

/// What a call can fail with; None where it is spared.
pub fn failure(call: u64) -> Option<c_int> {
    let call = c_long::try_from(call).ok()?;
    if SPARED.iter().any(|(_, calls)| calls.contains(&call)) {
        return None;
    }
    let listed = FAILURES.iter().find(|(_, calls)| calls.contains(&call));
    Some(listed.map_or(EIO, |(errno, _)| *errno))
}

/// Its name, of those that a runtime may well make.
pub fn name(call: u64) -> String {
    macro_rules! names { ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] } }
    const NAMES: &[(c_long, &str)] = names!(
        SYS_read SYS_write SYS_open SYS_stat SYS_fstat SYS_lstat SYS_poll SYS_lseek SYS_ioctl SYS_pread64 SYS_pwrite64
        SYS_readv SYS_writev SYS_access SYS_dup SYS_dup2 SYS_dup3 SYS_socket SYS_connect SYS_accept4 SYS_sendto
        SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_shutdown SYS_bind SYS_listen SYS_getsockname SYS_getpeername
        SYS_socketpair SYS_setsockopt SYS_getsockopt SYS_clone SYS_clone3 SYS_fork SYS_vfork SYS_execve SYS_execveat
        SYS_wait4 SYS_waitid SYS_kill SYS_fcntl SYS_flock SYS_fsync SYS_ftruncate SYS_getdents64 SYS_getcwd SYS_chdir
        SYS_fchdir SYS_rename SYS_renameat2 SYS_mkdir SYS_mkdirat SYS_rmdir SYS_unlink SYS_unlinkat SYS_symlinkat
        SYS_linkat SYS_readlink SYS_readlinkat SYS_chmod SYS_fchmod SYS_fchmodat SYS_chown SYS_fchown SYS_fchownat
        SYS_mknod SYS_mknodat SYS_statfs SYS_fstatfs SYS_newfstatat SYS_statx SYS_faccessat SYS_faccessat2 SYS_openat
        SYS_openat2 SYS_close_range SYS_pipe2 SYS_ppoll SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_wait SYS_eventfd2
        SYS_signalfd4 SYS_timerfd_create SYS_timerfd_settime SYS_inotify_init1 SYS_inotify_add_watch SYS_memfd_create
        SYS_prctl SYS_prlimit64 SYS_setsid SYS_setpgid SYS_getpgid SYS_getsid SYS_setuid SYS_setresuid SYS_setgid
        SYS_setresgid SYS_getgroups SYS_setgroups SYS_capget SYS_capset SYS_sethostname SYS_setdomainname SYS_setns
        SYS_unshare SYS_mount SYS_umount2 SYS_pivot_root SYS_chroot SYS_fsopen SYS_fsconfig SYS_fsmount SYS_open_tree
        SYS_move_mount SYS_mount_setattr SYS_pidfd_open SYS_pidfd_send_signal SYS_sendfile SYS_copy_file_range
        SYS_splice SYS_utimensat SYS_setxattr SYS_getxattr SYS_seccomp SYS_bpf SYS_keyctl SYS_personality
        SYS_sysinfo SYS_getrusage SYS_times SYS_alarm SYS_tgkill SYS_fadvise64 SYS_fallocate
    );
    let found = NAMES.iter().find(|(number, _)| u64::try_from(*number) == Ok(call));
    found.map_or_else(|| format!("call {call}"), |(_, name)| name["SYS_".len()..].to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_listed_twice_and_each_has_a_name_where_it_fails() {
        let spared = SPARED.iter().flat_map(|(_, calls)| calls.iter());
        let failing: Vec<_> = FAILURES.iter().flat_map(|(_, calls)| calls.iter()).collect();
        for call in &failing {
            assert!(!name(**call as u64).starts_with("call"), "{call}");
        }
        let mut all: Vec<_> = spared.chain(failing.iter().copied()).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn what_is_spared_never_fails() {
        assert_eq!(failure(SYS_mmap as u64), None);
        assert_eq!(failure(SYS_openat as u64), Some(EMFILE));
        assert_eq!(failure(SYS_read as u64), Some(EIO));
    }
}
