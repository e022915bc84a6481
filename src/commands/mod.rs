//! One file a verb: each strings the modules below together and prints what the caller reads.

mod check;
mod completions;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod pause;
mod ps;
mod run;
mod sandbox;
mod spec;
mod start;
mod state;
mod timeline;
mod update;

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use a3s_box_proto::Process;
use anyhow::{Context as _, Result, bail};

use crate::cli::{self, CgroupManager, Cli, Command, Global};
use crate::config;
use crate::log::{self, Log, sentence};
use crate::store::Store;
use crate::terminal::{self, Pty};
use crate::userns;
use crate::vmm;

/// What every verb may need.
pub struct Context {
    store: Store,
    log: Log,
    cgroup_manager: CgroupManager,
    /// The configuration file, where the caller names one.
    config: Option<PathBuf>,
    /// The directory of the state, where the caller names one.
    root: Option<PathBuf>,
}

/// Runs one command and returns its exit status: 0, 1, for `exec` 255, for foreground processes their own.
pub fn run(cli: Cli) -> u8 {
    let failure = if matches!(cli.command, Some(Command::Exec(_))) { 255 } else { 1 };
    let log = match Log::open(&cli.global) {
        Ok(log) => log,
        Err(error) => {
            log::say(&format!("a3s-box: {}", sentence(&error)));
            return failure;
        }
    };
    if cli.global.version {
        return u8::from(write_out(&version(cli.global.config.as_deref())).is_err());
    }
    let store = Store::new(root(&cli.global));
    let (cgroup_manager, config, root) = (cgroup_manager(&cli.global), cli.global.config, cli.global.root);
    let context = Context { store, log, cgroup_manager, config, root };
    let Some(command) = cli.command else {
        context.log.error("there is no verb (see --help)");
        return failure;
    };
    match dispatch(&context, command) {
        Ok(status) => status as u8,
        Err(error) => {
            context.log.error(&sentence(&error));
            failure
        }
    }
}

fn dispatch(context: &Context, command: Command) -> Result<i32> {
    match command {
        Command::Create(args) => create::create(context, &args),
        Command::Start(args) => start::start(context, &args.id),
        Command::Run(args) => run::run(context, &args),
        Command::State(args) => state::state(context, &args.id),
        Command::Kill(args) => kill::kill(context, &args),
        Command::Delete(args) => delete::delete(context, &args),
        Command::Exec(args) => exec::exec(context, &args),
        Command::List(args) => list::list(context, &args),
        Command::Ps(args) => ps::ps(context, &args),
        Command::Pause(args) => pause::pause(context, &args.id),
        Command::Update(args) => update::update(context, &args),
        Command::Events(args) => events::events(context, &args),
        Command::Resume(args) => pause::resume(context, &args.id),
        Command::Timeline(args) => timeline::timeline(context, &args),
        Command::Spec(args) => spec::spec(&args),
        Command::Features(args) => features::features(&args),
        Command::Check(args) => check::check(context, &args),
        Command::Completions(args) => completions::completions(&args),
        Command::Checkpoint(_) => bail!("checkpoint is not supported: a microVM cannot be checkpointed"),
        Command::Restore(_) => bail!("restore is not supported: a microVM cannot be restored"),
    }
}

/// Root's directory, or a user's own: also where that user is root of a namespace, as with rootless engines, whose USER is
/// still the user's. An empty XDG_RUNTIME_DIR is no XDG_RUNTIME_DIR: podman passes one as root.
fn root(global: &Global) -> PathBuf {
    let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let is_root = || userns::is_hosts_root() || std::env::var("USER").is_ok_and(|user| user == "root");
    match (&global.root, own) {
        (Some(root), _) => root.clone(),
        (None, Some(dir)) if !is_root() => PathBuf::from(dir).join("a3s-box"),
        (None, _) => PathBuf::from("/run/a3s-box"),
    }
}

fn cgroup_manager(global: &Global) -> CgroupManager {
    let by_flag = if global.systemd_cgroup { CgroupManager::Systemd } else { CgroupManager::Cgroupfs };
    global.cgroup_manager.unwrap_or(by_flag)
}

/// Descriptors that a caller wants passed on cannot be: by flag, or by systemd's protocol for socket activation.
fn refuse_descriptors(engine: &cli::Engine) -> Result<()> {
    if engine.preserve_fds > 0 {
        bail!("--preserve-fds {}: descriptors cannot cross into a VM", engine.preserve_fds);
    }
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    let (count, pid) = (number("LISTEN_FDS"), number("LISTEN_PID"));
    if count > 0 && pid == std::process::id() {
        bail!("LISTEN_FDS={count}: descriptors cannot cross into a VM");
    }
    Ok(())
}

/// Readies a process's terminal: a pty for the caller's socket, or the caller's own terminal where somebody stays.
fn terminal(process: &mut Process, detached: bool, engine: &cli::Engine) -> Result<Option<Pty>> {
    let socket = engine.console_socket.as_deref();
    terminal::check(process.terminal.is_some(), detached, socket)?;
    let Some(size) = &mut process.terminal else { return Ok(None) };
    if let Some(own) = terminal::own().and_then(terminal::size).filter(|_| socket.is_none()) {
        *size = own;
    }
    socket.map(|socket| Pty::open(*size, socket)).transpose()
}

/// Tells the caller which process stands for what it asked for: its pid in a file, a pidfd of it to a socket.
fn introduce(engine: &cli::Engine, pid: i32, pidfd: BorrowedFd<'_>) -> Result<()> {
    if let Some(path) = &engine.pidfd_socket {
        terminal::send(&terminal::dial(path, "--pidfd-socket")?, pidfd, "pidfd")?;
    }
    match &engine.pid_file {
        Some(path) => crate::store::replace(path, pid.to_string().as_bytes(), 0o644),
        None => Ok(()),
    }
}

/// Version, commit, spec and libraries, in runc's form; of a configuration that cannot be read nothing is told.
pub fn version(file: Option<&Path>) -> String {
    let configured = config::load(file).ok().and_then(|config| config.settings().libkrunfw);
    let firmware = vmm::firmware(configured.as_deref())
        .map(|(path, kernel)| format!("{} (Linux {kernel})", path.display()));
    format!(
        "a3s-box version {}\ncommit: {}\nspec: {}\nlibkrun: {}\nlibkrunfw: {}\n",
        env!("CARGO_PKG_VERSION"),
        env!("A3S_BOX_COMMIT"),
        features::SPEC_VERSION,
        vmm::library(),
        firmware.unwrap_or_else(|_| "not found".into()),
    )
}

/// Writes a document to standard output.
fn write_out(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("write to standard output")
}
