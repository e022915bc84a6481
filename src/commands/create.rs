//! `create`: a booted VM, a container built in it, its process waiting for `start`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use super::{Context, delete, sandbox};
use crate::bundle::{self, Bundle};
use crate::cgroup::Cgroup;
use crate::cli;
use crate::config;
use crate::hooks;
use crate::jail;
use crate::log::sentence;
use crate::monitor::{self, Handle, Report};
use crate::net;
use crate::plan::{self, Hooks, Limits, Plan, Vm, cgroup::Place};
use crate::pod::{self, Home};
use crate::relay;
use crate::sandbox::Absent;
use crate::store::{Entry, ProcessId, Record, Seat, boot_id};
use crate::terminal::Pty;
use crate::timeline::{self, Mark, Timeline};
use crate::userns;

/// The verb.
pub fn create(context: &Context, args: &cli::Create) -> Result<i32> {
    birth(context, args, None, true)?.keep();
    Ok(0)
}

/// A created container, undone when dropped: its VM, cgroup, pid file and directory; then its `poststop` hooks run.
pub struct Born<'a> {
    context: &'a Context,
    record: Record,
    handle: Option<Handle>,
    pid_file: Option<&'a Path>,
    has_terminal: bool,
    /// `None` once it is kept.
    entry: Option<Entry>,
}

impl Born<'_> {
    /// Lets the container live on.
    pub fn keep(mut self) {
        self.entry = None;
    }

    /// Whether its process has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.has_terminal
    }

    /// Runs `release` on the container, which lives on if that succeeds.
    pub fn start(mut self, release: fn(&Entry, &mut Record) -> Result<()>) -> Result<(Record, Handle)> {
        let entry = self.entry.as_ref().context("the container's directory")?;
        release(entry, &mut self.record)?;
        self.entry = None;
        Ok((self.record.clone(), self.handle.take().context("the monitor")?))
    }

    fn save(&self) -> Result<()> {
        self.entry.as_ref().map_or(Ok(()), |entry| entry.save(&self.record))
    }
}

impl Drop for Born<'_> {
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        if let Some(handle) = &self.handle {
            handle.kill();
        }
        // What went wrong before is what the caller is told.
        let gone = self.record.cgroup.remove();
        let _ = self.record.network.as_ref().map(net::clean);
        let _ = pod::leave(entry.dir(), &self.record);
        if let Some(path) = self.pid_file {
            let _ = std::fs::remove_file(path);
        }
        // What is left is a directory without processes: `delete --force` takes it.
        if gone.is_ok() {
            let _ = entry.remove();
        }
        hooks::poststop(&self.record, &self.context.log);
        let _ = delete::retire(self.context, &self.record);
    }
}

/// Creates a container. With `signals`, one that would end the caller ends the attempt. `detached`, nobody stays to
/// use its own terminal.
pub fn birth<'a>(
    context: &'a Context,
    args: &'a cli::Create,
    signals: Option<&SignalFd>,
    detached: bool,
) -> Result<Born<'a>> {
    let called = timeline::now();
    refuse_flags(args)?;
    context.store.path(&args.id)?;
    let mut bundle = bundle::open(&args.bundle, &jail::label::modules())?;
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) {
        bundle.notify(Path::new(&socket))?;
    }
    for warning in &bundle.warnings {
        if detached { context.log.aside(warning) } else { context.log.warn(warning) }
    }
    bear(context, &args.id, &bundle, &args.engine, Attendance { signals, detached, made: false, called })
}

/// Who waits for a container's birth.
pub struct Attendance<'a> {
    /// One that would end the caller ends the attempt.
    pub signals: Option<&'a SignalFd>,
    /// Nobody stays to use its own terminal.
    pub detached: bool,
    /// It is a sandbox that no engine has asked for.
    pub made: bool,
    /// When it was asked for ([`timeline::now`]).
    pub called: u64,
}

/// Creates a container of a bundle.
pub fn bear<'a>(
    context: &'a Context,
    id: &str,
    bundle: &Bundle,
    engine: &'a cli::Engine,
    Attendance { signals, detached, made, called }: Attendance,
) -> Result<Born<'a>> {
    let host = config::load(context.config.as_deref())?.settings();
    let mut plan = plan::plan(id, &bundle.spec, &bundle.machine, &host, &bundle.rootfs, &bundle.dir)?;
    let linux = bundle.spec.linux().as_ref();
    let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
    let place = plan::cgroup::place(id, path, context.cgroup_manager, userns::is_hosts_root())?;
    plan.vm.debug = context.log.is_debug();
    let pty = super::terminal(&mut plan.guest.process, detached, engine)?;
    crate::vmm::usable()?;
    context.log.debug(&format!("planned: {} vCPUs, {} MiB", plan.vm.vcpus, plan.vm.memory_mib));
    let planned = timeline::now();
    let joins = pod::joins(&context.store, &plan.role)?;
    let (namespace, network) = if joins.is_none() { net::choose(&mut plan)? } else { (None, None) };
    let entry = context.store.create(id)?;
    let timeline = Timeline::open(entry.dir());
    timeline.mark_at(Mark::Called, called);
    timeline.mark_at(Mark::Planned, planned);
    let seat = joins.as_ref().map(|(sandbox, _)| Seat { sandbox: sandbox.clone(), number: 0 });
    let record = Record { network, seat, made, ..record(id, bundle, &plan.vm, plan.hooks.clone())? };
    let has_terminal = plan.guest.process.terminal.is_some();
    let mut born = Born { context, record, handle: None, pid_file: None, has_terminal, entry: Some(entry) };
    if made {
        born.entry.as_ref().map_or(Ok(()), Entry::make_root)?;
    }
    if let Some(place) = &place {
        born.record.cgroup = Cgroup::plan(place)?;
    }
    // Its sandbox is known from here on, to be taken away with it.
    born.save()?;
    born.entry.as_ref().zip(bundle.spec.process().as_ref()).map_or(Ok(()), |(e, p)| e.save_process(p))?;
    let (home, namespace) = match joins {
        None => (None, namespace),
        Some(sandbox) => join(&mut born, bundle, &mut plan, sandbox, signals)?,
    };
    let (early, late) = std::mem::take(&mut plan.limits).split();
    let seat = place.as_ref().map(|place| (place, &early));
    raise((context, &timeline), &mut born, (plan, namespace, home), seat, signals, pty.as_ref())?;
    let _ = born.record.cgroup.limit(&late)?;
    born.record.ready = true;
    born.save()?;
    pty.map_or(Ok(()), Pty::send)?;
    let handle = born.handle.as_ref().context("the monitor")?;
    super::introduce(engine, handle.pid, handle.pidfd())?;
    born.pid_file = engine.pid_file.as_deref();
    handle.go_on()?;
    timeline.mark(Mark::Created);
    context.log.debug("created");
    Ok(born)
}

/// Finds a seat for a member.
fn join(
    born: &mut Born,
    bundle: &Bundle,
    plan: &mut Plan,
    (id, absent): (String, Absent),
    signals: Option<&SignalFd>,
) -> Result<(Option<Home>, Option<File>)> {
    let store = &born.context.store;
    let mut sandbox = sandbox::find(born.context, &id, absent, (bundle, &plan.vm), signals)?;
    if sandbox.is_engines() {
        let ignored = plan::pod::without_effect(&plan.vm, &plan.limits);
        ignored.iter().for_each(|line| born.context.log.aside(line));
    }
    let (home, namespace) = sandbox.admit(store, bundle, plan)?;
    let record = &mut born.record;
    (record.seat, record.vm) = (Some(home.seat.clone()), Some(home.vm));
    (record.vcpus, record.memory_mib) = (plan.vm.vcpus, plan.vm.memory_mib);
    // While the sandbox is locked: nobody else gets the seat.
    born.save()?;
    Ok((Some(home), namespace))
}

fn refuse_flags(args: &cli::Create) -> Result<()> {
    super::refuse_descriptors(&args.engine)
}

fn record(id: &str, bundle: &Bundle, vm: &Vm, hooks: Hooks) -> Result<Record> {
    Ok(Record {
        id: id.to_string(),
        oci_version: bundle.spec.version().clone(),
        bundle: bundle.dir.clone(),
        rootfs: bundle.rootfs.clone(),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        created: jiff::Timestamp::now().to_string(),
        monitor: None,
        vm: None,
        vcpus: vm.vcpus,
        memory_mib: vm.memory_mib,
        resources: resources(bundle)?,
        ready: false,
        seat: None,
        made: false,
        joined: 0,
        started: false,
        cgroup: Cgroup::default(),
        hooks,
        network: None,
        owner: nix::unistd::geteuid().as_raw(),
        boot: boot_id().context("the host's boot id")?.to_string(),
    })
}

/// Of which `update` changes parts. Its devices are those of `create`.
fn resources(bundle: &Bundle) -> Result<serde_json::Value> {
    let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let mut value = serde_json::to_value(resources).context("linux.resources")?;
    if let Some(fields) = value.as_object_mut() {
        fields.remove("devices");
    }
    Ok(value)
}

/// Clones the monitor, puts it into its cgroup and follows its reports until the container is there.
fn raise(
    (context, timeline): (&Context, &Timeline),
    born: &mut Born,
    (plan, namespace, home): (Plan, Option<File>, Option<Home>),
    place: Option<(&Place, &Limits)>,
    signals: Option<&SignalFd>,
    pty: Option<&Pty>,
) -> Result<()> {
    let entry = born.entry.as_ref().context("the container's directory")?;
    if home.is_none() {
        entry.make_vm_dir()?;
    }
    let slave = pty.map(|pty| pty.slave.try_clone()).transpose().context("terminal")?;
    let handle = monitor::spawn(plan, namespace, entry.dir(), home, slave)?;
    timeline.mark(Mark::Monitor);
    context.log.debug("monitor cloned");
    let handle = born.handle.insert(handle);
    born.record.monitor = ProcessId::of(handle.pid)?;
    entry.save(&born.record)?;
    if let Some((place, limits)) = place {
        let cgroup = &mut born.record.cgroup;
        let said = match cgroup.enter(place, handle.pid, limits) {
            Ok(true) => "monitor in its cgroup".into(),
            Ok(false) => "monitor in its cgroup, which keeps no device of the host's away".into(),
            Err(error) if cgroup.is_dispensable(&error, limits) => {
                cgroup.remove()?;
                *cgroup = Cgroup::default();
                format!("no cgroup on the host: {}", sentence(&error))
            }
            Err(error) => return Err(error),
        };
        entry.save(&born.record)?;
        timeline.mark(Mark::Cgroup);
        context.log.debug(&said);
    }
    handle.go_on()?;
    loop {
        await_report(handle, signals)?;
        match handle.report()? {
            (Report::Vmm, pid) => {
                timeline.mark(Mark::Vmm);
                context.log.debug("VMM started");
                born.record.vm = ProcessId::of(pid.context("the VMM's pid")?)?;
                entry.save(&born.record)?;
            }
            (Report::Environment, _) => {
                context.log.debug("environment set up");
                hooks::at_create(&born.record, handle.pidfd(), signals)?;
                handle.go_on()?;
            }
            (Report::Phase(text), _) => context.log.debug(&text),
            (Report::Ready, _) => {
                let own = born.record.vm.filter(|_| born.record.seat.is_none());
                return own.map_or(Ok(()), |vm| crate::vmm::close_nodes(vm.pid));
            }
            (Report::Failed(text), _) => return Err(anyhow!(text)),
        }
    }
}

fn await_report(handle: &Handle, signals: Option<&SignalFd>) -> Result<()> {
    let Some(signals) = signals else { return Ok(()) };
    let mut fds =
        [PollFd::new(handle.channel(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        if fds[0].any().unwrap_or(false) {
            return Ok(());
        }
        while let Ok(Some(info)) = signals.read_signal() {
            let signal = info.ssi_signo as i32;
            if relay::ENDING.contains(&signal) {
                bail!("given up: signal {signal}");
            }
        }
    }
}
