//! The VMM's system calls: what libkrun was seen to use, and nothing else.
//!
//! Calls that only an intruder makes kill the process; any other that is not listed fails as on a kernel without it, and
//! is logged where the kernel logs seccomp actions. Compiled while the VMM waits for its tree, loaded just before it
//! starts the guest; threads inherit it. In: nothing. Out: a filter. Must not: allow a process, a program, a namespace,
//! a mount, code that was data before, or a socket that reaches out of the machine.

use crate::plan::vm::Network;
use anyhow::{Context, Result};
use libseccomp::ScmpCompareOp::{Equal, MaskedEqual, NotEqual};
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpFilterContext, ScmpSyscall};

/// Allowed whatever the arguments. What libkrun never asks for is not here, however harmless.
const ALLOWED: &[&str] = &[
    // memory
    "brk",
    "madvise",
    "mremap",
    "munmap",
    // threads and time
    "clock_gettime",
    "clock_nanosleep",
    "exit",
    "exit_group",
    "futex",
    "getpid",
    "getrandom",
    "gettid",
    "nanosleep",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "set_robust_list",
    "sigaltstack",
    // events
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "eventfd2",
    "poll",
    "ppoll",
    "timerfd_create",
    "timerfd_settime",
    // descriptors
    "close",
    "copy_file_range",
    "dup",
    "fadvise64",
    "fallocate",
    "fcntl",
    "fdatasync",
    "flock",
    "fsync",
    "ftruncate",
    "lseek",
    "pread64",
    "preadv",
    "preadv2",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "read",
    "readv",
    "write",
    "writev",
    // files
    "faccessat",
    "faccessat2",
    "fchmod",
    "fchmodat",
    "fchown",
    "fchownat",
    "fgetxattr",
    "flistxattr",
    "fremovexattr",
    "fsetxattr",
    "fstat",
    "fstatfs",
    "getdents64",
    "lgetxattr",
    "linkat",
    "llistxattr",
    "lremovexattr",
    "lsetxattr",
    "lstat",
    "mkdirat",
    "mknodat",
    "newfstatat",
    "open",
    "openat",
    "readlinkat",
    "renameat",
    "renameat2",
    "stat",
    "statfs",
    "statx",
    "symlinkat",
    "umask",
    "unlinkat",
    "utimensat",
    // the guest's users
    "capget",
    "capset",
    "getegid",
    "geteuid",
    "getgid",
    "getuid",
    "setresgid",
    "setresuid",
    // the control socket
    "accept",
    "accept4",
    "bind",
    "connect",
    "getpeername",
    "getsockname",
    "getsockopt",
    "listen",
    "recvfrom",
    "sendto",
    "setsockopt",
    "shutdown",
];

/// What only an intruder tries.
const DEADLY: &[&str] = &[
    // programs and other processes
    "execve",
    "execveat",
    "fork",
    "kcmp",
    "kill",
    "pidfd_getfd",
    "pidfd_send_signal",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "tkill",
    "vfork",
    // ways out
    "chroot",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "name_to_handle_at",
    "open_by_handle_at",
    "open_tree",
    "pivot_root",
    "setns",
    "umount2",
    "unshare",
    // the kernel
    "acct",
    "add_key",
    "bpf",
    "delete_module",
    "finit_module",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "modify_ldt",
    "perf_event_open",
    "personality",
    "quotactl",
    "reboot",
    "request_key",
    "swapoff",
    "swapon",
    "syslog",
    "userfaultfd",
    // the host's name and time
    "adjtimex",
    "clock_adjtime",
    "clock_settime",
    "setdomainname",
    "sethostname",
    "settimeofday",
];

/// `ioctl` requests, as request, mask: all of KVM's (type 0xae), and what a console or a non-blocking descriptor needs.
const IOCTLS: &[(u64, u64)] = &[
    (0xae00, 0xff00),
    (libc::FIOCLEX, u32::MAX as u64),
    (libc::FIONBIO, u32::MAX as u64),
    (libc::TCGETS, u32::MAX as u64),
    (libc::TCGETS2, u32::MAX as u64),
    (libc::TIOCGWINSZ, u32::MAX as u64),
];

/// The same for attaching to a tap.
const TAP_IOCTLS: [libc::Ioctl; 3] = [libc::TUNSETIFF, libc::TUNSETOFFLOAD, libc::TUNSETVNETHDRSZ];

/// A compiled filter.
pub struct Filter(ScmpFilterContext);

impl Filter {
    /// Compiles the filter for the calling process, whose VM is connected like this.
    pub fn compile(network: Network) -> Result<Self> {
        let mut rules = Rules(
            ScmpFilterContext::new(ScmpAction::Errno(libc::ENOSYS)).context("seccomp filter of the VMM")?,
        );
        rules.0.set_ctl_log(true).context("seccomp log")?;
        rules.0.set_act_badarch(ScmpAction::KillProcess).context("seccomp architecture")?;
        // Every exit of a vCPU that libkrun handles ends in this one, which no cache of the kernel's can take.
        let ioctl = ScmpSyscall::from_name("ioctl").context("seccomp rule for ioctl")?;
        rules.0.set_syscall_priority(ioctl, u8::MAX).context("seccomp priority")?;
        for (request, mask) in IOCTLS {
            rules.add(ScmpAction::Allow, "ioctl", &[ScmpArgCompare::new(1, MaskedEqual(*mask), *request)])?;
        }
        let taps = if matches!(network, Network::Tap(_)) { &TAP_IOCTLS[..] } else { &[] };
        for request in taps {
            let only = ScmpArgCompare::new(1, MaskedEqual(u32::MAX.into()), *request);
            rules.add(ScmpAction::Allow, "ioctl", &[only])?;
        }
        ALLOWED.iter().try_for_each(|name| rules.add(ScmpAction::Allow, name, &[]))?;
        DEADLY.iter().try_for_each(|name| rules.add(ScmpAction::KillProcess, name, &[]))?;
        rules.by_arguments()?;
        rules.sockets(network)?;
        Ok(Filter(rules.0))
    }

    /// Sets it for the calling thread and those it will start. There is no way back.
    pub fn load(self) -> Result<()> {
        self.0.load().context("load the VMM's seccomp filter")
    }
}

struct Rules(ScmpFilterContext);

impl Rules {
    /// Adds a rule; a system call that this architecture lacks needs none.
    fn add(&mut self, action: ScmpAction, name: &str, arguments: &[ScmpArgCompare]) -> Result<()> {
        let Ok(syscall) = ScmpSyscall::from_name(name) else { return Ok(()) };
        self.0
            .add_rule_conditional(action, syscall, arguments)
            .map(drop)
            .with_context(|| format!("seccomp rule for {name}"))
    }

    /// Calls whose arguments decide.
    fn by_arguments(&mut self) -> Result<()> {
        use ScmpAction::{Allow, KillProcess};
        let is = |argument, value: u64| ScmpArgCompare::new(argument, Equal, value);
        let masked = |argument, mask: u64, value| ScmpArgCompare::new(argument, MaskedEqual(mask), value);
        // Threads, never processes. The flags of clone3, which glibc tries first, cannot be seen: it is unknown here.
        let thread = libc::CLONE_THREAD as u64;
        self.add(Allow, "clone", &[masked(0, thread, thread)])?;
        self.add(KillProcess, "clone", &[masked(0, thread, 0)])?;
        // Nothing that was written can be run.
        for (name, argument) in [("mmap", 2), ("mprotect", 2)] {
            self.add(Allow, name, &[masked(argument, libc::PROT_EXEC as u64, 0)])?;
            self.add(KillProcess, name, &[masked(argument, libc::PROT_EXEC as u64, libc::PROT_EXEC as u64)])?;
        }
        // Limits may be read, the own ones.
        self.add(Allow, "prlimit64", &[is(0, 0), is(2, 0)])?;
        // Names of threads, and of memory as glibc's malloc gives them.
        self.add(Allow, "prctl", &[is(0, libc::PR_SET_NAME as u64)])?;
        self.add(Allow, "prctl", &[is(0, libc::PR_SET_VMA as u64)])?;
        // vCPU threads are interrupted, and abort(3) ends the process: both within it.
        self.add(Allow, "tgkill", &[is(0, std::process::id().into())])
    }

    /// The control socket's family; those that reach out only where the guest's sockets are made here.
    fn sockets(&mut self, network: Network) -> Result<()> {
        let hijacked: &[libc::c_int] =
            if network == Network::Tsi { &[libc::AF_INET, libc::AF_INET6] } else { &[] };
        let allowed: Vec<u64> =
            hijacked.iter().chain(&[libc::AF_UNIX]).map(|family| *family as u64).collect();
        for family in &allowed {
            self.add(ScmpAction::Allow, "socket", &[ScmpArgCompare::new(0, Equal, *family)])?;
        }
        let others: Vec<_> = allowed.iter().map(|family| ScmpArgCompare::new(0, NotEqual, *family)).collect();
        // One rule cannot compare one argument twice: there, what is not allowed is unknown.
        if others.len() > 1 { Ok(()) } else { self.add(ScmpAction::KillProcess, "socket", &others) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};

    /// How a filtered process ends that makes one system call: its errno as exit status, 0 without one.
    fn ends(syscall: i32, arguments: [libc::c_long; 3]) -> WaitStatus {
        // SAFETY: the child makes system calls and allocates, which glibc's fork leaves possible; then it ends.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
            ForkResult::Child => {
                nix::sys::prctl::set_no_new_privs().unwrap();
                Filter::compile(Network::None).unwrap().load().unwrap();
                let [a, b, c] = arguments;
                // SAFETY: the arguments are plain numbers, or pointers that the kernel checks; nothing of it is kept.
                let result = unsafe { libc::syscall(syscall.into(), a, b, c, -1, 0, 0) };
                let status = if result < 0 { nix::errno::Errno::last_raw() } else { 0 };
                // SAFETY: _exit takes any status and does not return.
                unsafe { libc::_exit(status) }
            }
        }
    }

    fn number(name: &str) -> Option<i32> {
        ScmpSyscall::from_name(name).ok().map(i32::from).filter(|number| *number >= 0)
    }

    fn killed(status: WaitStatus) -> bool {
        matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
    }

    fn exited(status: WaitStatus) -> Option<i32> {
        if let WaitStatus::Exited(_, code) = status { Some(code) } else { None }
    }

    #[test]
    fn what_only_an_intruder_does_kills() {
        for name in DEADLY {
            if let Some(number) = number(name) {
                assert!(killed(ends(number, [-1, -1, -1])), "{name}");
            }
        }
        let exec = (libc::PROT_READ | libc::PROT_EXEC).into();
        for (name, arguments) in [
            ("clone", [libc::SIGCHLD.into(), 0, 0]),
            ("clone", [libc::CLONE_NEWUSER.into(), 0, 0]),
            ("mmap", [0, 4096, exec]),
            ("mprotect", [0, 4096, exec]),
            ("socket", [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]),
            ("socket", [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]),
        ] {
            assert!(killed(ends(number(name).unwrap(), arguments)), "{name} {arguments:?}");
        }
    }

    #[test]
    fn the_unknown_is_not_implemented() {
        let parent = Pid::parent().as_raw().into();
        for (name, arguments) in [
            ("getppid", [0, 0, 0]),
            ("clone3", [0, 0, 0]),
            ("landlock_create_ruleset", [0, 0, 0]),
            ("ioctl", [0, libc::TIOCSTI as libc::c_long, 0]),
            ("prctl", [libc::PR_SET_SECCOMP.into(), 0, 0]),
            ("prlimit64", [parent, 0, 0]),
            ("tgkill", [parent, parent, 0]),
        ] {
            assert_eq!(exited(ends(number(name).unwrap(), arguments)), Some(libc::ENOSYS), "{name}");
        }
    }

    #[test]
    fn what_libkrun_needs_is_let_through() {
        for (name, arguments, errno) in [
            ("gettid", [0, 0, 0], 0),
            ("close", [-1, 0, 0], libc::EBADF),
            ("socket", [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0], 0),
            ("ioctl", [-1, 0xae80, 0], libc::EBADF),
            ("mprotect", [0, 4096, libc::PROT_READ.into()], libc::ENOMEM),
        ] {
            assert_eq!(exited(ends(number(name).unwrap(), arguments)), Some(errno), "{name}");
        }
    }
}
