//! `exec`: a further process in a running container, with this process standing for it.

use std::path::Path;

use a3s_box_proto::{self as proto, Outcome, Request};
use anyhow::{Context as _, Result, anyhow, bail};
use oci_spec::runtime::{Capability, LinuxCapabilities, Process, Spec, User};

use super::{Context, start};
use crate::guest::Connection;
use crate::store::{Record, Status};
use crate::{cli, guest, jail, plan, relay, support};

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
    refuse_flags(args)?;
    let process = process(args, &record)?;
    let stream = start::dial(&context.store.path(&args.id)?, &record)?;
    let signals = relay::take_signals()?;
    jail::drop_privileges()?;
    jail::confine_relay(&[])?;
    let mut connection = Connection::greet(stream, guest::ANSWER)?;
    let request = Request::Exec { container: record.id.clone(), process: Box::new(process) };
    match connection.call(&request, guest::ANSWER)? {
        Outcome::Done => {}
        Outcome::Failed { text } => {
            bail!("exec failed: unable to start container process: {}", guest::clean(&text))
        }
        Outcome::AlreadyExited | Outcome::NotFound => bail!("cannot exec in a stopped container"),
        other => bail!("exec failed: the guest answered {other:?}"),
    }
    context.log.debug("process started");
    relay::run(connection, &record.id, &signals, None).map(|status| status.code())
}

fn refuse_flags(args: &cli::Exec) -> Result<()> {
    for (flag, given) in [
        ("--tty", args.tty),
        ("--console-socket", args.engine.console_socket.is_some()),
        ("--detach", args.detach),
        ("--pid-file", args.engine.pid_file.is_some()),
    ] {
        if given {
            bail!("{flag}: not supported");
        }
    }
    if args.engine.preserve_fds > 0 {
        bail!("--preserve-fds {}: descriptors cannot cross into a VM", args.engine.preserve_fds);
    }
    Ok(())
}

/// The whole process: from `--process`, or the container's own with the flags' changes, as runc does.
fn process(args: &cli::Exec, record: &Record) -> Result<proto::Process> {
    let process = match &args.process {
        Some(path) => from_file(path)?,
        None => from_config(args, record)?,
    };
    if process.terminal() == Some(true) {
        bail!("process.terminal true: not supported");
    }
    plan::process::plan(&process)
}

fn from_file(path: &Path) -> Result<Process> {
    let text = std::fs::read(path).with_context(|| format!("open {}", path.display()))?;
    let shown = || format!("{} is not a process", path.display());
    let process: serde_json::Value = serde_json::from_slice(&text).with_context(shown)?;
    support::check(&serde_json::json!({ "process": process }))?;
    serde_json::from_value(process).with_context(shown)
}

fn from_config(args: &cli::Exec, record: &Record) -> Result<Process> {
    let path = record.bundle.join("config.json");
    let text = std::fs::read(&path).with_context(|| format!("open {}", path.display()))?;
    let spec: Spec = serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
    let mut process = spec.process().clone().context("config.json has no process")?;
    process.set_terminal(None);
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
