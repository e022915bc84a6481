//! `exec`: a further process in a running container, with this process or a proxy standing for it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};

use a3s_box_proto::{self as proto, Request};
use anyhow::{Context as _, Result, anyhow, bail};
use oci_spec::runtime::{Capability, LinuxCapabilities, Process, User};
use serde_json::json;

use super::{Context, start};
use crate::log::sentence;
use crate::proxy::{self, Job};
use crate::relay::Post;
use crate::store::{Record, Status};
use crate::terminal::{self, Pty, Raw};
use crate::{cli, jail, plan, relay, support, vmm};

/// The verb.
pub fn exec(context: &Context, args: &cli::Exec) -> Result<i32> {
    let record = context.store.read(&args.id)?;
    match record.status() {
        Status::Paused if args.ignore_paused => {
            bail!("--ignore-paused: not supported, the whole VM is frozen")
        }
        Status::Created | Status::Running => {}
        Status::Stopped => bail!("cannot exec in a stopped container"),
        Status::Paused => bail!("cannot exec in a paused container (use --ignore-paused to override)"),
        Status::Creating => bail!("cannot exec in a container that is still being created"),
    }
    super::refuse_descriptors(&args.engine)?;
    let mut process = Box::new(process(context, args)?);
    let pty = super::terminal(&mut process, args.detach, &args.engine)?;
    let cgroup = cgroup(args.cgroup.as_deref())?;
    let request = Request::Exec { container: record.id.clone(), process, cgroup };
    let stream = start::dial(&context.store.path(&args.id)?, &record)?;
    let slave = pty.as_ref().map(|pty| pty.slave.try_clone()).transpose().context("terminal")?;
    let job = Job { stream, request, container: &record.id, slave };
    if args.detach { detach(context, job, args, &record, pty) } else { stay(context, job, args) }
}

/// Leaves a proxy that stands for the process.
fn detach(context: &Context, job: Job, args: &cli::Exec, record: &Record, pty: Option<Pty>) -> Result<i32> {
    let proxy = proxy::spawn(job, &record.cgroup)?;
    context.log.debug("process started");
    pty.map_or(Ok(()), Pty::send)?;
    super::introduce(&args.engine, proxy.pid, proxy.pidfd())?;
    proxy.release();
    Ok(0)
}

/// Stands for the process itself.
fn stay(context: &Context, job: Job, args: &cli::Exec) -> Result<i32> {
    let has_terminal = matches!(&job.request, Request::Exec { process, .. } if process.terminal.is_some());
    let herald = Herald::send_for(&args.engine)?;
    let signals = relay::take_signals()?;
    jail::drop_privileges()?;
    jail::confine_relay(&[])?;
    let connection = proxy::begin(job.stream, &job.request)?;
    herald.map_or(Ok(()), Herald::announce)?;
    context.log.debug("process started");
    let terminal = if has_terminal { terminal::own() } else { None };
    let _raw = terminal.map(|_| Raw::own()).transpose()?;
    let post = Post { container: job.container, terminal, is_job: true, ..Post::default() };
    relay::run(connection, &signals, post).map(|status| status.code())
}

/// A child that keeps the privilege to write where the caller wants the pid, and hears one byte: that it is time.
struct Herald {
    channel: UnixStream,
}

impl Herald {
    fn send_for(engine: &cli::Engine) -> Result<Option<Self>> {
        if engine.pid_file.is_none() && engine.pidfd_socket.is_none() {
            return Ok(None);
        }
        let (channel, mut theirs) = UnixStream::pair().context("socketpair")?;
        let pid = std::process::id() as i32;
        let pidfd = vmm::pidfd_open(pid)?;
        // SAFETY: this process has one thread.
        if let nix::unistd::ForkResult::Parent { .. } = unsafe { nix::unistd::fork() }.context("fork")? {
            return Ok(Some(Herald { channel }));
        }
        drop(channel);
        let introduced = match theirs.read_exact(&mut [0u8; 1]) {
            Ok(()) => super::introduce(engine, pid, pidfd.as_fd()),
            Err(_) => Ok(()),
        };
        let words = introduced.map_or_else(|error| sentence(&error), |()| String::new());
        let _ = theirs.write_all(words.as_bytes());
        // SAFETY: _exit takes any status and does not return; no exit handler of the parent's may run here.
        unsafe { libc::_exit(0) }
    }

    fn announce(mut self) -> Result<()> {
        let mut words = String::new();
        self.channel.write_all(b"n").and_then(|()| self.channel.read_to_string(&mut words)).context("pid")?;
        let _ = nix::sys::wait::wait();
        if words.is_empty() { Ok(()) } else { Err(anyhow!(words)) }
    }
}

/// cgroup v2's form of --cgroup: one path below the container's cgroup; `/` is that itself.
fn cgroup(path: Option<&Path>) -> Result<PathBuf> {
    let Some(path) = path else { return Ok(PathBuf::new()) };
    let shown = path.display();
    if path.to_string_lossy().contains(':') {
        bail!("--cgroup {shown}: the guest has cgroup v2 alone, which takes a path without controllers");
    }
    let below = path.strip_prefix("/").unwrap_or(path);
    if below.components().any(|part| !matches!(part, Component::Normal(_))) {
        bail!("--cgroup {shown}: not below the container's cgroup");
    }
    Ok(below.to_path_buf())
}

/// The whole process: from `--process`, or the container's own with the flags' changes. runc reads config.json once
/// more for that; here, what it says after `create` changes nothing.
fn process(context: &Context, args: &cli::Exec) -> Result<proto::Process> {
    let process = match &args.process {
        Some(path) => from_file(context, path)?,
        None => from_flags(context, args)?,
    };
    plan::process::plan(&process)
}

fn from_file(context: &Context, path: &Path) -> Result<Process> {
    let text = std::fs::read(path).with_context(|| format!("open {}", path.display()))?;
    let shown = || format!("{} is not a process", path.display());
    let process: serde_json::Value = serde_json::from_slice(&text).with_context(shown)?;
    // Engines repeat what they have set for the container, whose `create` has warned; stderr is the process's here.
    support::check(&serde_json::json!({ "process": process }), &[])?
        .iter()
        .for_each(|line| context.log.note(line));
    serde_json::from_value(process).with_context(shown)
}

fn from_flags(context: &Context, args: &cli::Exec) -> Result<Process> {
    let mut process = context.store.process(&args.id)?;
    process.set_terminal(Some(args.tty));
    process.set_args(Some(args.command.clone()));
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    let mut env = process.env().clone().unwrap_or_default();
    for entry in &args.env {
        let (name, _) =
            entry.split_once('=').with_context(|| format!("--env {entry:?} is not NAME=VALUE"))?;
        env.retain(|old| old.split('=').next() != Some(name));
        env.push(entry.clone());
    }
    process.set_env(Some(env));
    let mut user = process.user().clone();
    if let Some(text) = &args.user {
        set_user(&mut user, text)?;
    }
    if !args.additional_gids.is_empty() {
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(&args.additional_gids);
        user.set_additional_gids(Some(gids));
    }
    process.set_user(user);
    if !args.cap.is_empty() {
        add_capabilities(&mut process, &args.cap)?;
    }
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    let labels = json!({ "apparmorProfile": args.apparmor, "selinuxLabel": args.process_label });
    support::check(&json!({ "process": labels }), &[])?.iter().for_each(|line| context.log.warn(line));
    Ok(process)
}

/// `UID[:GID]`, numbers alone: names are the image's business, and engines have looked them up.
fn set_user(user: &mut User, text: &str) -> Result<()> {
    let number =
        |part: &str| part.parse::<u32>().map_err(|_| anyhow!("--user {text:?} is not UID[:GID] in numbers"));
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (number(uid)?, Some(number(gid)?)),
        None => (number(text)?, None),
    };
    user.set_uid(uid);
    if let Some(gid) = gid {
        user.set_gid(gid);
    }
    Ok(())
}

fn add_capabilities(process: &mut Process, names: &[String]) -> Result<()> {
    let mut capabilities = process.capabilities().clone().unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        none.set_bounding(None)
            .set_effective(None)
            .set_inheritable(None)
            .set_permitted(None)
            .set_ambient(None);
        none
    });
    for name in names {
        let upper = name.to_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let capability: Capability = serde_json::from_value(format!("CAP_{bare}").into())
            .map_err(|_| anyhow!("--cap {name:?} is not a capability"))?;
        let with = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let (bounding, effective, permitted) =
            (with(capabilities.bounding()), with(capabilities.effective()), with(capabilities.permitted()));
        capabilities.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    }
    process.set_capabilities(Some(capabilities));
    Ok(())
}
