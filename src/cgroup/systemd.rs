//! systemd's side of a cgroup: transient scopes, by D-Bus.
//!
//! In: a scope's name, slice, first process. Out: the scope, once systemd says that it is there. Must not: wait for
//! systemd without a deadline.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustbus::connection::ll_conn::force_finish_on_error;
use rustbus::connection::{Timeout, get_session_bus_path, get_system_bus_path};
use rustbus::message_builder::MarshalledMessage;
use rustbus::wire::ObjectPath;
use rustbus::wire::errors::MarshalError;
use rustbus::{MessageBuilder, MessageType, RpcConn};

use crate::patience;
use crate::plan::cgroup::Scope;
use crate::userns;

const SYSTEMD: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// How long systemd may take to make a scope or to change it.
const WAIT: Duration = Duration::from_secs(20);
/// How long it may take to stop one. It collects an empty scope without being asked, and an engine whose shim has died
/// gives the whole clean-up five seconds.
const STOP: Duration = Duration::from_secs(2);

/// A property's value: a variant of D-Bus.
#[derive(Debug, rustbus::Marshal, rustbus::Unmarshal, rustbus::Signature)]
pub enum Value {
    /// `s`
    Text(String),
    /// `b`
    Flag(bool),
    /// `t`
    Number(u64),
    /// `au`
    Pids(Vec<u32>),
    /// `ay`
    Bytes(Vec<u8>),
    /// `a(ss)`
    Pairs(Vec<(String, String)>),
}

/// Properties of a unit (systemd.resource-control(5), org.freedesktop.systemd1(5)).
pub type Properties = Vec<(String, Value)>;

/// What a method refused, by D-Bus name and in words.
#[derive(Debug)]
struct Refused {
    name: String,
    text: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.text.trim_end_matches('.'), self.name)
    }
}

impl std::error::Error for Refused {}

impl Scope {
    /// Has systemd make the scope around a process, which is in it when this returns.
    pub fn start(&self, pid: i32, limits: Properties) -> Result<()> {
        let text = |text: &str| Value::Text(text.to_string());
        let mut properties = vec![
            ("Description", text("a3s-box container")),
            ("Slice", text(&self.slice)),
            ("PIDs", Value::Pids(vec![pid as u32])),
            // What is below, and every file of it, is ours to write.
            ("Delegate", Value::Flag(true)),
            // Or a shutdown would stop containers before the engine that minds them.
            ("DefaultDependencies", Value::Flag(false)),
            // A scope whose last process was killed shall not stay behind as failed.
            ("CollectMode", text("inactive-or-failed")),
        ];
        let accounted = ["CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting"];
        properties.extend(accounted.map(|name| (name, Value::Flag(true))));
        let properties = properties.into_iter().map(|(name, value)| (name.to_string(), value));
        let properties: Properties = properties.chain(limits).collect();
        let shown = || format!("systemd: make the scope {} in {}", self.unit, self.slice);
        let mut bus = Bus::connect(WAIT)?;
        match bus.start(&self.unit, &properties) {
            // What is left of an earlier container of this name, whose end systemd has not finished with.
            Err(error) if is_named(&error, "UnitExists") && !self.is_inhabited(&mut bus) => {
                let _ = self.clear(&mut bus);
                bus.start(&self.unit, &properties).with_context(shown)
            }
            result => result.with_context(shown),
        }
    }

    /// Has systemd stop it and forget it.
    pub fn stop(&self) -> Result<()> {
        let mut bus = Bus::connect(STOP)?;
        self.clear(&mut bus).with_context(|| format!("systemd: stop {}", self.unit))
    }

    fn clear(&self, bus: &mut Bus) -> Result<()> {
        let stopped = bus.job("StopUnit", |call| call.body.push_param2(&*self.unit, "replace"));
        // Only a failed one is there to be reset.
        let _ = bus.call(MANAGER, "ResetFailedUnit", |call| call.body.push_param(&*self.unit));
        match stopped {
            Err(error) if is_named(&error, "NoSuchUnit") => Ok(()),
            result => result,
        }
    }

    fn is_inhabited(&self, bus: &mut Bus) -> bool {
        let processes = bus.call(MANAGER, "GetUnitProcesses", |call| call.body.push_param(&*self.unit));
        let list = processes.and_then(|reply| Ok(reply.body.parser().get::<Vec<(String, u32, String)>>()?));
        !list.is_ok_and(|list| list.is_empty())
    }

    /// Changes limits as systemd keeps them, so that it does not undo them at its next reload.
    pub fn set(&self, limits: Properties) -> Result<()> {
        let set = Bus::connect(WAIT)?
            .call(MANAGER, "SetUnitProperties", |call| call.body.push_param3(&*self.unit, true, limits));
        set.map(drop).with_context(|| format!("systemd: change the limits of {}", self.unit))
    }
}

/// systemd's version, where it answers.
pub fn version() -> Result<String> {
    let reply = Bus::connect(WAIT)?
        .call("org.freedesktop.DBus.Properties", "Get", |call| call.body.push_param2(MANAGER, "Version"))?;
    match reply.body.parser().get::<Value>() {
        Ok(Value::Text(version)) => Ok(version),
        _ => bail!("systemd does not say its version"),
    }
}

fn is_named(error: &anyhow::Error, name: &str) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.name == format!("{SYSTEMD}.{name}"))
}

/// A connection to the bus that systemd is on, and when patience with it ends.
struct Bus {
    conn: RpcConn,
    deadline: Instant,
}

impl Bus {
    fn connect(patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let path = if userns::is_hosts_root() { get_system_bus_path() } else { get_session_bus_path() };
        // Its library waits for a bus to greet for as long as that takes.
        let connect = move || RpcConn::connect_to_path(path?, Timeout::Duration(patience));
        let conn = patience::within(patience, connect).unwrap_or(Err(rustbus::connection::Error::TimedOut));
        let conn =
            conn.context("the systemd cgroup driver: D-Bus does not answer (is systemd running here?)")?;
        Ok(Bus { conn, deadline })
    }

    fn left(&self) -> Timeout {
        // A time limit of zero would be none.
        let left = self.deadline.saturating_duration_since(Instant::now());
        Timeout::Duration(left.max(Duration::from_millis(1)))
    }

    /// Calls a method of the manager's object.
    fn call(
        &mut self,
        interface: &str,
        method: &str,
        fill: impl FnOnce(&mut MarshalledMessage) -> Result<(), MarshalError>,
    ) -> Result<MarshalledMessage> {
        let call = MessageBuilder::new().call(method).with_interface(interface);
        let mut call = call.on(OBJECT).at(SYSTEMD).build();
        fill(&mut call).context("encode for D-Bus")?;
        self.send(&mut call)
    }

    fn send(&mut self, call: &mut MarshalledMessage) -> Result<MarshalledMessage> {
        let left = self.left();
        let serial = self.conn.send_message(call).context("D-Bus")?;
        let serial = serial.write(left).map_err(force_finish_on_error).context("D-Bus")?;
        let left = self.left();
        let reply = self.conn.wait_response(serial, left).context("D-Bus")?;
        if reply.typ != MessageType::Error {
            return Ok(reply);
        }
        let text = reply.body.parser().get::<String>().unwrap_or_default();
        Err(Refused { name: reply.dynheader.error_name.unwrap_or_default(), text }.into())
    }

    fn start(&mut self, unit: &str, properties: &Properties) -> Result<()> {
        self.job("StartTransientUnit", |call| {
            call.body.push_param3(unit, "replace", properties)?;
            // No auxiliary units.
            call.body.push_param::<&[(String, Properties)]>(&[])
        })
    }

    /// Calls a method that starts a job, and waits for the job's end.
    fn job(
        &mut self,
        method: &str,
        fill: impl FnOnce(&mut MarshalledMessage) -> Result<(), MarshalError>,
    ) -> Result<()> {
        let rule = format!("type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='JobRemoved'");
        self.send(&mut rustbus::standard_messages::add_match(&rule))?;
        self.call(MANAGER, "Subscribe", |_| Ok(()))?;
        let reply = self.call(MANAGER, method, fill)?;
        let job: ObjectPath<String> = reply.body.parser().get().context("systemd's answer")?;
        loop {
            let left = self.left();
            let signal = self.conn.wait_signal(left);
            let signal = signal.with_context(|| format!("{method}: systemd did not end its job"))?;
            let mut body = signal.body.parser();
            let Ok((_, ended, _, result)) = body.get4::<u32, ObjectPath<String>, String, String>() else {
                continue;
            };
            if ended.as_ref() == job.as_ref() {
                return if result == "done" {
                    Ok(())
                } else {
                    Err(anyhow!("{method}: its job ended as {result}"))
                };
            }
        }
    }
}
