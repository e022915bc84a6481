//! `check`: can this host run microVMs, and what to do where it cannot.
//!
//! The last word is a probe: a /dev/kvm that only looks alive is found out by booting the guest kernel to its init.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde_json::Value;

use super::list;
use crate::cgroup::{self, Version};
use crate::cli::{self, Format};
use crate::config::{self, Config};
use crate::console::Console;
use crate::guest::{Connection, SOCKET};
use crate::jail;
use crate::log::sentence;
use crate::plan::{Vm, vm};
use crate::userns;
use crate::vmm;
use a3s_box_proto::LISTENING;
use std::os::fd::AsFd;

/// One thing that was looked at.
#[derive(Serialize)]
struct Finding {
    name: &'static str,
    ok: bool,
    /// Whether containers can run without it.
    needed: bool,
    found: String,
    /// What to do; empty where all is well.
    advice: String,
}

/// The verb.
pub fn check(context: &super::Context, args: &cli::Check) -> Result<i32> {
    let config = config::load(context.config.as_deref())?;
    let libkrunfw = config.settings().libkrunfw;
    let mut findings = vec![kernel(), kvm(), firmware(libkrunfw.as_deref())];
    let hopeful = findings.iter().all(|finding| finding.ok);
    findings.extend(boots(hopeful, Duration::from_secs(args.timeout), libkrunfw));
    findings.extend([tap(), cgroups(), devices(), landlock(), selinux(), user_namespaces(), memory()]);
    let able = findings.iter().all(|finding| finding.ok || !finding.needed);
    let text = match args.format {
        Format::Json => {
            let document = serde_json::json!({ "able": able, "findings": findings, "configuration": config.effective() });
            format!("{}\n", serde_json::to_string_pretty(&document).context("encode findings")?)
        }
        Format::Table => format!("{}\n{}", table(&findings, able), settings(&config)),
    };
    super::write_out(&text)?;
    Ok(i32::from(!able))
}

fn table(findings: &[Finding], able: bool) -> String {
    let mut rows = vec![["CHECK", "OK", "FOUND"].map(String::from)];
    let verdict = |finding: &Finding| match (finding.ok, finding.needed) {
        (true, _) => "yes",
        (false, true) => "NO",
        (false, false) => "no",
    };
    rows.extend(findings.iter().map(|f| [f.name.to_string(), verdict(f).to_string(), f.found.clone()]));
    let mut text = list::columns(&rows);
    for finding in findings.iter().filter(|finding| !finding.ok) {
        text.push_str(&format!("\n{}: {}\n", finding.name, finding.advice));
    }
    text.push_str(if able {
        "\nThis host can run microVMs.\n"
    } else {
        "\nThis host cannot run microVMs.\n"
    });
    text
}

/// What holds for containers that ask for nothing else.
fn settings(config: &Config) -> String {
    let mut rows = vec![["SETTING", "VALUE", "FROM"].map(String::from)];
    rows.extend(config.effective().into_iter().map(|effective| {
        let value = match &effective.value {
            Value::String(text) => text.clone(),
            Value::Array(items) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
            value => value.to_string(),
        };
        [effective.name.to_string(), value, effective.from.clone()]
    }));
    list::columns(&rows)
}

fn finding(name: &'static str, needed: bool, result: Result<String>, advice: &str) -> Finding {
    match result {
        Ok(found) => Finding { name, ok: true, needed, found, advice: String::new() },
        Err(error) => Finding { name, ok: false, needed, found: sentence(&error), advice: advice.into() },
    }
}

fn kvm() -> Finding {
    match vmm::look() {
        Ok(()) => finding("/dev/kvm", true, Ok("present, may be opened".into()), ""),
        Err(trouble) => finding("/dev/kvm", true, Err(anyhow!(trouble.found)), trouble.advice),
    }
}

/// The youngest of the system calls without which nothing runs is mount_setattr.
fn kernel() -> Finding {
    const LEAST: (u32, u32) = (5, 12);
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_default();
    let result = match numbers(&release) {
        Some(version) if version < LEAST => {
            Err(anyhow!("Linux {release}, older than {}.{}", LEAST.0, LEAST.1))
        }
        _ => Ok(format!("Linux {release}")),
    };
    finding(
        "host kernel",
        true,
        result,
        "install a newer kernel of the distribution's (a backport, an HWE kernel) and boot it",
    )
}

fn numbers(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn firmware(path: Option<&Path>) -> Finding {
    let result = vmm::firmware(path).map(|(path, version)| format!("{}: Linux {version}", path.display()));
    let advice = "install libkrunfw: package libkrunfw5 (Debian forky and newer), libkrunfw (Fedora, Arch, openSUSE), or build github.com/containers/libkrunfw";
    finding("guest kernel", true, result, advice)
}

fn boots(hopeful: bool, wait: Duration, libkrunfw: Option<PathBuf>) -> [Finding; 2] {
    let untried = |name, advice| finding(name, true, Err(anyhow!("not tried: see above")), advice);
    if !hopeful {
        let advice = "it boots the guest kernel once what stands above is in order";
        return ["probe VM", "vsock"].map(|name| untried(name, advice));
    }
    let advice = "the guest kernel does not come up on this host's KVM: it may be nested without hardware support, or emulated; try bare metal, or a host with nested virtualization";
    match probe(wait, libkrunfw) {
        Err(error) => {
            [finding("probe VM", true, Err(error), advice), untried("vsock", "it is tried with the probe VM")]
        }
        Ok((vm, vsock)) => [
            finding("probe VM", true, Ok(vm), ""),
            finding("vsock", true, vsock, "a guest kernel without virtio vsock: take libkrunfw's own"),
        ],
    }
}

/// Boots the guest kernel to guest-init and greets that over vsock, and ends it.
fn probe(wait: Duration, libkrunfw: Option<PathBuf>) -> Result<(String, Result<String>)> {
    let dir = ProbeDir::make()?;
    let begin = Instant::now();
    let mut console = Console::create(&dir.0, None)?;
    let size = Vm { vcpus: 1, memory_mib: vm::MIN_MEMORY_MIB, libkrunfw, ..Vm::default() };
    let mut vmm = vmm::spawn(&size, &dir.0, &dir.0, None)?;
    let greeted = vmm.boot(&[]).and_then(|()| greet(&mut console, &vmm, &dir.0, begin + wait));
    vmm::kill(vmm.pidfd());
    vmm.reap();
    console.drain();
    let greeted = greeted.map_err(|error| match console.last_words() {
        words if words.is_empty() => error,
        words => error.context(format!("its console said: {words}")),
    })?;
    let vsock = greeted.map(|kernel| format!("Linux {kernel} greeted over it"));
    Ok((format!("up to guest-init and back in {} ms", begin.elapsed().as_millis()), vsock))
}

/// Waits for guest-init to listen. Out: what it says.
fn greet(console: &mut Console, vmm: &vmm::Vmm, dir: &Path, deadline: Instant) -> Result<Result<String>> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("it did not come up in time");
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds =
            [PollFd::new(console.as_fd(), PollFlags::POLLIN), PollFd::new(vmm.pidfd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).context("poll")?;
        if fds[1].any().unwrap_or(false) {
            return Err(vmm.complaint().unwrap_or_else(|| anyhow!("its VMM ended")));
        }
        console.drain();
        if console.heard(LISTENING) {
            let stream = UnixStream::connect(dir.join(SOCKET)).context("connect to the probe VM");
            let greeted = stream.and_then(|stream| Connection::greet(stream, left));
            return Ok(greeted.map(|connection| crate::guest::clean(&connection.greeting.kernel)));
        }
    }
}

struct ProbeDir(PathBuf);

impl ProbeDir {
    fn make() -> Result<Self> {
        let base = if userns::is_hosts_root() { PathBuf::from("/run") } else { std::env::temp_dir() };
        let path = base.join(format!("a3s-box-check-{}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("make {}", path.display()))?;
        Ok(ProbeDir(path))
    }
}

impl Drop for ProbeDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tap() -> Finding {
    let open = fs::File::options().read(true).write(true).open("/dev/net/tun");
    let advice = match &open {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            "run as root: without, a VM's network is loopback, or sockets made on the host"
        }
        _ => "load the module (`modprobe tun`): a VM's network interface needs it",
    };
    let result = open.map(|_| "/dev/net/tun may be opened".into()).context("/dev/net/tun");
    finding("tap", false, result, advice)
}

fn cgroups() -> Finding {
    let result = cgroup::version().and_then(|version| match version {
        Version::V2 => Ok(format!("v2 ({})", drivers())),
        Version::V1 => Ok(format!("v1 ({})", drivers())),
        Version::None => Err(anyhow!("nothing is mounted at /sys/fs/cgroup")),
    });
    finding("cgroups", true, result, "mount them: `mount -t cgroup2 cgroup2 /sys/fs/cgroup`")
}

fn drivers() -> String {
    match cgroup::systemd::version() {
        Ok(version) => format!("drivers cgroupfs and systemd: version {version} answers"),
        Err(error) => format!("driver cgroupfs; {}", sentence(&error)),
    }
}

fn devices() -> Finding {
    let advice = "a wall around a VMM that makes device nodes is missing: run as root, on a kernel with CONFIG_CGROUP_BPF (v2), or with the devices controller mounted (v1)";
    finding("devices", false, cgroup::devices::look(), advice)
}

fn landlock() -> Finding {
    let result = if jail::landlock::is_available() {
        Ok("confines every VMM".into())
    } else {
        Err(anyhow!("not in this kernel, or older than ABI 2: VMMs do without"))
    };
    let advice = "a second wall around a VMM's files is missing: use Linux 5.19 or newer with CONFIG_SECURITY_LANDLOCK, and `landlock` in the lsm= list of its command line";
    finding("Landlock", false, result, advice)
}

fn selinux() -> Finding {
    let result = match fs::read_to_string("/sys/fs/selinux/enforce").as_deref().map(str::trim) {
        Ok("1") => Err(anyhow!("enforcing: a VMM that an engine labels container_t may not open /dev/kvm")),
        Ok(_) => Ok("permissive".into()),
        Err(_) => Ok("not in use".into()),
    };
    let advice = "podman labels it container_kvm_t once `a3s-box-engines podman` has told it to; with another engine allow it: `setsebool -P container_use_devices on`";
    finding("SELinux", false, result, advice)
}

fn user_namespaces() -> Finding {
    let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let result = match limit {
        Some(1u64..) => Ok("allowed".into()),
        Some(0) => Err(anyhow!("user.max_user_namespaces is 0")),
        None => Err(anyhow!("the kernel has none")),
    };
    finding(
        "user namespaces",
        false,
        result,
        "set the sysctl user.max_user_namespaces: rootless use needs it",
    )
}

fn memory() -> Finding {
    let table = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = table.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free =
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map(|kib| kib >> 10);
    let least = u64::from(vm::MIN_MEMORY_MIB);
    let result = match free {
        Some(free) if free >= least => Ok(format!("{free} MiB available (a VM takes what its guest uses)")),
        Some(free) => Err(anyhow!("{free} MiB available, the smallest VM needs {least}")),
        None => Err(anyhow!("/proc/meminfo does not say")),
    };
    finding("memory", true, result, "free some memory, or give this machine more")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_first_two_numbers() {
        assert_eq!(numbers("6.12.48+deb13-amd64"), Some((6, 12)));
        assert_eq!(numbers("5.4.0-81-generic"), Some((5, 4)));
        assert!(numbers("5.9") < numbers("5.12"));
        assert_eq!(numbers(""), None);
    }
}
