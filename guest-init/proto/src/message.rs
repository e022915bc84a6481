//! Messages: requests of the host, answers and events of the guest.
//!
//! The host opens a connection, the guest greets, then requests and replies alternate. A connection that created a
//! container or a process owns it: its streams flow there, its exit is told there, and losing the connection kills
//! it. In and out: JSON bodies of [`crate::Frame::Message`].

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::container::{Container, Process, Size};
use crate::frame::{Frame, MAX_MESSAGE};

/// The guest's first words on every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`crate::VERSION`] of the guest.
    pub version: u16,
    /// The guest kernel's release, as `uname -r` says it.
    pub kernel: String,
    /// Microseconds since the guest kernel started.
    pub uptime_us: u64,
}

/// What the host asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// Build a container up to the point where its process could start. The connection owns it from here on.
    Create(Box<Container>),
    /// Let the created container's process run.
    Start {
        /// Container id.
        container: String,
    },
    /// Make NICs of the VM interfaces of a container, as the host's network namespace has them.
    Plug {
        /// Container id.
        container: String,
        /// NICs that move to it.
        nics: Vec<Nic>,
        /// What is set there once they have.
        settings: Vec<Setting>,
    },
    /// Take a NIC back from a container: its interface is gone.
    Unplug {
        /// Container id.
        container: String,
        /// The NIC's number.
        slot: u8,
        /// The interface's number.
        index: u32,
    },
    /// Connect to an address inside a container's network namespace. The connection owns it as a process: its input
    /// goes there, what comes back is its output.
    Dial {
        /// Container id.
        container: String,
        /// Where to, by TCP.
        address: SocketAddr,
    },
    /// Serve names at 127.0.0.11 inside a container's network namespace, where its resolv.conf asks for that. The
    /// connection owns it as a process. Queries are its output: length (u16, big-endian), number (u16), 1 if by TCP,
    /// query. Answers are its input: length, number, answer.
    Resolve {
        /// Container id.
        container: String,
    },
    /// Stand in for sockets of the host's inside a container. The connection owns it as a process, whose input are
    /// [`crate::sockets::Order`]s and whose output are [`crate::sockets::Event`]s.
    Sockets {
        /// Container id.
        container: String,
    },
    /// Go on with a client of such a socket. The connection owns it as a process: its input goes to the client, what
    /// comes from there is its output.
    Accept {
        /// Container id.
        container: String,
        /// As [`crate::sockets::Event::Client`] called it.
        client: u64,
    },
    /// Run one more process in a container. The connection owns it.
    Exec {
        /// Container id.
        container: String,
        /// The whole process; nothing is inherited from the container's own.
        process: Box<Process>,
        /// The cgroup it joins, below the container's own; empty for that itself.
        cgroup: PathBuf,
    },
    /// Send a signal.
    Signal {
        /// Container id.
        container: String,
        /// Signal number, 1 to 64 (0 probes).
        signal: i32,
        /// To which of the container's processes.
        target: Target,
    },
    /// Give the terminal of the process that the connection owns this size.
    Resize(Size),
    /// The container's processes, as the guest numbers them.
    Processes {
        /// Container id.
        container: String,
    },
    /// Change limits of a container's cgroup: all of them, or none.
    Update {
        /// Container id.
        container: String,
        /// File of cgroup v2 and the value to write, in this order.
        limits: Vec<(String, String)>,
    },
    /// What a container's cgroup counts.
    Stats {
        /// Container id.
        container: String,
    },
    /// End a container and forget it. The outcome comes once nothing of its files is in use.
    Delete {
        /// Container id.
        container: String,
    },
    /// The owner has taken note of its process's exit; the guest may forget it.
    Acknowledge,
}

/// A NIC of the VM and the interface that it becomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its number among the VM's NICs.
    pub slot: u8,
    /// The message that makes it the interface; the guest adds which NIC it is about and where it goes.
    pub link: Setting,
}

/// An rtnetlink message (rtnetlink(7)), without its header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// What it sets, for people.
    pub what: String,
    /// `RTM_*`
    pub kind: u16,
    /// `NLM_F_*` beside those of every request.
    pub flags: u16,
    /// Family header and attributes.
    pub body: Vec<u8>,
}

/// Which processes a signal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// The container's first process.
    Init,
    /// Every process of the container.
    All,
    /// The process this connection owns.
    Own,
}

/// How a request went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It was done.
    Done,
    /// The answer to [`Request::Processes`].
    Processes(Vec<ProcessInfo>),
    /// The answer to [`Request::Stats`]: numbers by file of cgroup v2, or by file and key (`memory.stat/anon`); a limit
    /// that is not set is [`u64::MAX`].
    Stats(BTreeMap<String, u64>),
    /// No such container, or the connection owns no process.
    NotFound,
    /// The process has ended already; nothing was done.
    AlreadyExited,
    /// The request does not fit the container's present state.
    Busy {
        /// Which state that is.
        reason: String,
    },
    /// It could not be done.
    Failed {
        /// Why, as one line.
        text: String,
    },
}

/// A process inside a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Pid in the container's own pid namespace.
    pub pid: i32,
    /// Parent's pid there; 0 for a process that came from outside.
    pub ppid: i32,
    /// Real user id.
    pub uid: u32,
    /// Command line, or the thread name where it is empty.
    pub command: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It called exit with this status.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl ExitStatus {
    /// The status as a shell shows it: the code, or 128 plus the signal.
    pub fn code(self) -> i32 {
        match self {
            ExitStatus::Code(code) => code.into(),
            ExitStatus::Signal(signal) => 128 + i32::from(signal),
        }
    }
}

/// What the guest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Reply {
    /// First on every connection.
    Greeting(Greeting),
    /// To the last request.
    Outcome(Outcome),
    /// The last request is still being worked on. Said every [`crate::WORKING`] until its outcome.
    Working,
    /// The kernel has killed a process of the container whose first process the connection owns, for want of memory:
    /// once or more since this was last said.
    OutOfMemory,
    /// The connection's own process has failed, in these words, before it ran the workload and while nobody waited for
    /// an outcome.
    Stillborn(String),
    /// The connection's own process has ended, and all its output was sent before this.
    Exited(ExitStatus),
}

/// Packs a message into a frame. Fails only for one that is too long to send.
pub fn pack<T: Serialize>(message: &T) -> Result<Frame, String> {
    let body = serde_json::to_vec(message).map_err(|e| e.to_string())?;
    if body.len() > MAX_MESSAGE {
        return Err(format!("message of {} bytes is over the limit of {MAX_MESSAGE}", body.len()));
    }
    Ok(Frame::Message(body))
}

/// Unpacks a message frame's body.
pub fn unpack<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::*;

    fn process() -> Process {
        Process {
            args: vec!["sh".into()],
            cwd: "/".into(),
            umask: Some(0o27),
            rlimits: vec![Rlimit { resource: 7, soft: 1, hard: u64::MAX }],
            capabilities: Capabilities { bounding: u64::MAX, ..Capabilities::default() },
            scheduler: Some(Scheduler { policy: 6, period: u64::MAX, ..Scheduler::default() }),
            terminal: Some(Size { rows: 24, columns: 80 }),
            ..Process::default()
        }
    }

    fn container() -> Container {
        Container {
            id: "c1".into(),
            place: "c".into(),
            idle: false,
            shared: None,
            attributes: Attributes { own: 1, below: vec![("data".into(), 0)] },
            propagation: 1 << 17,
            hostname: Some("box".into()),
            domainname: None,
            mounts: vec![
                Mount {
                    destination: "/proc".into(),
                    source: Source::FileSystem {
                        kind: "proc".into(),
                        name: "proc".into(),
                        options: vec!["hidepid=2".into()],
                        copy_up: false,
                    },
                    attributes: Attributes { own: 6, below: vec![] },
                    propagation: 0,
                },
                Mount {
                    destination: "/etc/hosts".into(),
                    source: Source::Export("c/1".into()),
                    attributes: Attributes::default(),
                    propagation: 0,
                },
                Mount {
                    destination: "/null".into(),
                    source: Source::Device("dev/null".into()),
                    attributes: Attributes::default(),
                    propagation: 0,
                },
            ],
            limits: vec![("pids.max".into(), "64".into())],
            device_rules: Some(vec![DeviceRule {
                allow: true,
                kind: Some(DeviceKind::Block),
                major: Some(7),
                minor: None,
                access: 5,
            }]),
            devices: vec![Device {
                path: "/dev/fuse".into(),
                number: Some((DeviceKind::Char, 10, 229)),
                mode: 0o666,
                uid: 0,
                gid: 5,
                optional: true,
            }],
            sysctls: vec![("kernel/sem".into(), "250 32000 32 128".into())],
            time_offsets: Some("monotonic 1 0\n".into()),
            personality: Some(8),
            masked_paths: vec!["/proc/kcore".into()],
            readonly_paths: vec![],
            seccomp: Some(Seccomp { flags: 2, program: vec![u64::MAX; MAX_FILTER] }),
            process: process(),
            hooks: vec![Hook { path: "/bin/hook".into(), env: Some(vec![]), ..Hook::default() }],
            state: serde_json::json!({ "id": "c1", "annotations": { "a": "b" } }),
            user: Some(UserNamespace { uids: vec![(0, 65_536)], gids: vec![(0, 1000), (2000, 1)] }),
        }
    }

    fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: T) {
        let Frame::Message(body) = pack(&value).unwrap() else { panic!("not a message") };
        assert_eq!(unpack::<T>(&body).unwrap(), value);
    }

    #[test]
    fn every_request_survives_the_wire() {
        let id = || "c1".to_string();
        round_trip(Request::Create(Box::new(container())));
        round_trip(Request::Start { container: id() });
        round_trip(Request::Resize(Size { rows: 1, columns: u16::MAX }));
        let link = Setting { what: "eth0".into(), kind: 16, flags: 0x400, body: vec![0, 255] };
        let nic = Nic { slot: 1, link: link.clone() };
        round_trip(Request::Plug { container: id(), nics: vec![nic], settings: vec![link] });
        round_trip(Request::Unplug { container: id(), slot: 1, index: u32::MAX });
        round_trip(Request::Dial { container: id(), address: ([127, 0, 0, 1], 80).into() });
        round_trip(Request::Resolve { container: id() });
        round_trip(Request::Sockets { container: id() });
        round_trip(Request::Accept { container: id(), client: u64::MAX });
        round_trip(Request::Exec { container: id(), process: Box::new(process()), cgroup: "a/b".into() });
        round_trip(Request::Signal { container: id(), signal: 15, target: Target::All });
        round_trip(Request::Processes { container: id() });
        round_trip(Request::Update { container: id(), limits: vec![("pids.max".into(), "5".into())] });
        round_trip(Request::Stats { container: id() });
        round_trip(Request::Delete { container: id() });
        round_trip(Request::Acknowledge);
    }

    #[test]
    fn every_reply_survives_the_wire() {
        round_trip(Reply::Greeting(Greeting { version: 1, kernel: "6.12".into(), uptime_us: 5 }));
        for outcome in [
            Outcome::Done,
            Outcome::Processes(vec![ProcessInfo { pid: 1, ppid: 0, uid: 0, command: "sh".into() }]),
            Outcome::Stats([("pids.current".to_string(), u64::MAX)].into()),
            Outcome::NotFound,
            Outcome::AlreadyExited,
            Outcome::Busy { reason: "created".into() },
            Outcome::Failed { text: "no".into() },
        ] {
            round_trip(Reply::Outcome(outcome));
        }
        round_trip(Reply::OutOfMemory);
        round_trip(Reply::Working);
        round_trip(Reply::Stillborn("why".into()));
        round_trip(Reply::Exited(ExitStatus::Code(42)));
        round_trip(Reply::Exited(ExitStatus::Signal(9)));
    }

    #[test]
    fn unknown_variants_fields_and_garbage_are_errors() {
        for body in [
            &br#"{"Destroy":{}}"#[..],
            br#"{"Start":{"container":"a","now":true}}"#,
            br#"{"Signal":{"container":"a","signal":"TERM","target":"Init"}}"#,
            br#"{"Start":"#,
            b"\xff\xfe",
            b"",
        ] {
            assert!(unpack::<Request>(body).is_err(), "{}", String::from_utf8_lossy(body));
        }
        assert!(unpack::<Reply>(br#"{"Exited":{"Code":256}}"#).is_err());
        assert!(unpack::<Reply>(br#"{"Greeting":{"version":70000,"kernel":"","uptime_us":0}}"#).is_err());
    }

    #[test]
    fn deeply_nested_json_is_refused_not_recursed_into() {
        let bomb = "[".repeat(100_000);
        assert!(unpack::<Request>(bomb.as_bytes()).is_err());
    }

    #[test]
    fn a_message_over_the_limit_is_not_packed() {
        let request = Request::Start { container: "x".repeat(MAX_MESSAGE) };
        assert!(pack(&request).unwrap_err().contains("over the limit"));
    }

    #[test]
    fn status_follows_the_shell() {
        assert_eq!(ExitStatus::Code(42).code(), 42);
        assert_eq!(ExitStatus::Signal(9).code(), 137);
    }
}
