//! The command line: runc's, and nothing else.
//!
//! In: argv. Out: typed arguments. Must not: look at the system; what a flag means is decided elsewhere.

#[cfg(test)]
mod man;
#[path = "cli/normalize.rs"]
mod normalize;
#[cfg(test)]
mod readme;
#[path = "cli/update.rs"]
mod update;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use normalize::normalize;
pub use update::Update;

/// OCI runtime that runs every container in its own libkrun microVM
#[derive(Debug, Parser)]
#[command(name = "a3s-box", disable_version_flag = true, arg_required_else_help = true)]
pub struct Cli {
    /// Flags before the verb
    #[command(flatten)]
    pub global: Global,
    /// The verb; `--version` alone goes without
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Flags that go before the verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Directory for the containers' state [default: /run/a3s-box, without root $XDG_RUNTIME_DIR/a3s-box]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Configuration file, read instead of /etc/a3s-box/config.toml and /etc/a3s-box/conf.d/*.toml
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Append log records to this file
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Form of log records
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// `debug` does what --debug does; other levels change nothing
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Log what is done, with the boot's phases and their times
    #[arg(long)]
    pub debug: bool,
    /// Have systemd make the cgroup, a transient scope: linux.cgroupsPath is `slice:prefix:name`
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Which cgroup driver `create` and `run` use; other verbs find it in the state
    #[arg(long, value_enum)]
    pub cgroup_manager: Option<CgroupManager>,
    /// Accepted for compatibility: true, false or auto
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub rootless: Option<Rootless>,
    /// Print the version
    #[arg(short = 'v', long = "version")]
    pub version: bool,
}

/// Form of log records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// logfmt
    Text,
    /// One JSON object a line
    Json,
}

/// Cgroup drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CgroupManager {
    /// Directories in the cgroup file system
    Cgroupfs,
    /// Transient scopes
    Systemd,
    /// No cgroup at all
    Disabled,
}

/// Values of --rootless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rootless {
    /// yes
    True,
    /// no
    False,
    /// as it is
    Auto,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a container: its microVM boots, its process waits for `start`
    Create(Create),
    /// Start the process of a created container
    Start(Id),
    /// Create, start and wait for a container
    Run(Run),
    /// Print the state of a container as JSON
    State(Id),
    /// Send a signal to a container's first process
    Kill(Kill),
    /// Delete a container
    Delete(Delete),
    /// Run a further process in a container
    Exec(Box<Exec>),
    /// List containers
    List(List),
    /// List the processes of a container
    Ps(Ps),
    /// Freeze a container
    Pause(Id),
    /// Let a frozen container go on
    Resume(Id),
    /// Change the limits of a container
    Update(Box<Update>),
    /// Print what a container uses, as JSON: every interval, or once
    Events(Events),
    /// Show where the time of a container's start went
    Timeline(Timeline),
    /// Write a config.json to start from
    Spec(Spec),
    /// Print what this runtime supports as JSON (runtime-spec features.md)
    Features(Features),
    /// Say whether this host can run microVMs and what to do where not, and which configuration holds
    Check(Check),
    /// Print a shell's completions for this command line
    Completions(Completions),
    /// Not supported: a microVM cannot be checkpointed
    #[command(disable_help_flag = true)]
    Checkpoint(Anything),
    /// Not supported: a microVM cannot be restored
    #[command(disable_help_flag = true)]
    Restore(Anything),
}

/// A container's id.
#[derive(Debug, Args)]
pub struct Id {
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
}

/// Whatever follows.
#[derive(Debug, Args)]
pub struct Anything {
    /// Ignored
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 0..)]
    pub args: Vec<OsString>,
}

/// Flags of `create`, `run` and `exec` that engines use.
#[derive(Debug, Args)]
pub struct Engine {
    /// Write the process's pid to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Unix socket that is to receive the terminal's master
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that is to receive a pidfd of the process's pid
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// Pass this many further descriptors (cannot cross into a VM: 0 alone is accepted)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
}

/// Flags of `create`, which `run` shares.
#[derive(Debug, Args)]
pub struct Create {
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
    /// Bundle directory
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// What engines hand over and want back
    #[command(flatten)]
    pub engine: Engine,
    /// Accepted for compatibility: the root is entered by pivot_root inside the VM
    #[arg(long)]
    pub no_pivot: bool,
    /// Accepted for compatibility: the guest's keyring is its own
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Accepted for compatibility
    #[arg(long)]
    pub no_subreaper: bool,
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// What `create` takes
    #[command(flatten)]
    pub create: Create,
    /// Return once the process runs
    #[arg(short, long)]
    pub detach: bool,
    /// Do not delete the container when it has stopped
    #[arg(long)]
    pub keep: bool,
}

/// Flags of `kill`.
#[derive(Debug, Args)]
pub struct Kill {
    /// Signal every process of the container
    #[arg(short, long)]
    pub all: bool,
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
    /// Signal by name or number
    #[arg(value_name = "SIGNAL", default_value = "TERM", allow_hyphen_values = true)]
    pub signal: String,
}

/// Flags of `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// Kill the container first; an unknown id is no error
    #[arg(short, long)]
    pub force: bool,
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
}

/// Flags of `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// The process as JSON (runtime-spec's process object)
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Set a variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Run as this user
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// Further group ids
    #[arg(short = 'g', long, value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// Add a capability
    #[arg(short, long, value_name = "NAME")]
    pub cap: Vec<String>,
    /// Set no_new_privs
    #[arg(long)]
    pub no_new_privs: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Return once the process runs; another process stays and stands for it
    #[arg(short, long)]
    pub detach: bool,
    /// What engines hand over and want back
    #[command(flatten)]
    pub engine: Engine,
    /// Join this cgroup below the container's own (cgroup v2: a path alone)
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Accepted and ignored: the guest kernel has no SELinux
    #[arg(long, value_name = "LABEL")]
    pub process_label: Option<String>,
    /// Accepted and ignored: the guest kernel has no AppArmor
    #[arg(long, value_name = "PROFILE")]
    pub apparmor: Option<String>,
    /// Run in a paused container as well (not supported: its whole VM is frozen)
    #[arg(long)]
    pub ignore_paused: bool,
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
    /// Program and arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Forms of `list` and `ps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Flags of `list`.
#[derive(Debug, Args)]
pub struct List {
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Ids alone
    #[arg(short, long)]
    pub quiet: bool,
}

/// Flags of `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// How long between two lines: a number with `ms`, `s`, `m` or `h`, or of seconds
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub interval: String,
    /// One line and no more
    #[arg(long)]
    pub stats: bool,
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
}

/// Flags of `timeline`.
#[derive(Debug, Args)]
pub struct Timeline {
    /// Bars for a terminal, a picture, or events for chrome://tracing and Perfetto
    #[arg(long, value_enum, default_value_t = TimelineFormat::Text)]
    pub format: TimelineFormat,
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
}

/// Forms of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimelineFormat {
    /// Bars
    Text,
    /// A picture
    Svg,
    /// Chrome's trace events, JSON
    Trace,
}

/// Flags of `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// Table of the guest's processes, or JSON list of the host's pids
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Container id
    #[arg(value_name = "ID")]
    pub id: String,
    /// Accepted for compatibility
    #[arg(value_name = "PS-ARGS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

/// Flags of `spec`.
#[derive(Debug, Args)]
pub struct Spec {
    /// Directory to write to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
}

/// Flags of `features`.
#[derive(Debug, Args)]
pub struct Features {
    /// Print instead what becomes of each field of config.json
    #[arg(long, group = "table")]
    pub matrix: bool,
    /// Print instead the keys of the configuration file: as a file that changes nothing, or as a table
    #[arg(long, group = "table")]
    pub settings: bool,
    /// Form of the table
    #[arg(long, value_enum, default_value_t = MatrixFormat::Text, requires = "table")]
    pub format: MatrixFormat,
}

/// Forms of those tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MatrixFormat {
    /// Columns
    Text,
    /// A table
    Markdown,
}

/// Flags of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// How long the probe VM may take to boot, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub timeout: u64,
}

/// Flags of `completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}
