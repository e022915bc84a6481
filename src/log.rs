//! The one voice: stderr for people, `--log` for engines, the system's log where stderr is neither's.
//!
//! Callers parse both: stderr stays silent on success, the log gets one record an error, and nothing but errors at
//! level error. In: messages. Out: lines. Must not: fail a command because a message cannot be written.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::cli::{Global, LogFormat};

/// Where messages go.
pub struct Log {
    file: Option<File>,
    format: LogFormat,
    debug: bool,
    start: Instant,
}

impl Log {
    /// Opens the log file, which exists from then on even if nothing is said.
    pub fn open(global: &Global) -> Result<Self> {
        let file = match &global.log {
            Some(path) => {
                let file = File::options().create(true).append(true).mode(0o644).open(path);
                Some(file.with_context(|| format!("open log {}", path.display()))?)
            }
            None => None,
        };
        let debug = global.debug
            || global.log_level.as_deref().is_some_and(|level| level.eq_ignore_ascii_case("debug"));
        Ok(Log { file, format: global.log_format, debug, start: Instant::now() })
    }

    /// Why the command failed. Once a command.
    pub fn error(&self, message: &str) {
        say(&format!("a3s-box: {message}"));
        self.record("error", message);
    }

    /// Something is not as asked, and need not be. To the log alone where there is one.
    pub fn warn(&self, message: &str) {
        match self.file {
            Some(_) => self.record("warning", message),
            None => say(&format!("a3s-box: warning: {message}")),
        }
    }

    /// The same where standard error is not this program's to write to.
    pub fn note(&self, message: &str) {
        self.record("warning", message);
    }

    /// The same where standard error is about to be a container's, whose log it may be: without a log of ours the system's
    /// gets it, and only where nobody keeps that either standard error does.
    pub fn aside(&self, message: &str) {
        if self.file.is_some() || std::io::stderr().is_terminal() || system_log(message).is_err() {
            self.warn(message);
        }
    }

    /// What is done, with the time since the command's start.
    pub fn debug(&self, message: &str) {
        if !self.debug {
            return;
        }
        let message = format!("{:8.3} ms  {message}", self.start.elapsed().as_secs_f64() * 1e3);
        match self.file {
            Some(_) => self.record("debug", &message),
            None => say(&format!("a3s-box: {message}")),
        }
    }

    /// Whether [`Log::debug`] says anything.
    pub fn is_debug(&self) -> bool {
        self.debug
    }

    fn record(&self, level: &str, message: &str) {
        let Some(mut file) = self.file.as_ref() else { return };
        let time = jiff::Timestamp::now();
        let line = match self.format {
            LogFormat::Json => {
                let time = format!("{time:.0}");
                format!("{}\n", serde_json::json!({"level": level, "msg": message, "time": time}))
            }
            LogFormat::Text => format!("time=\"{time:.0}\" level={level} msg={message:?}\n"),
        };
        let _ = file.write_all(line.as_bytes());
    }
}

/// A line on standard error, where it takes one: `eprintln!` would panic on a full disk.
pub fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// One warning to syslog(3)'s socket, without waiting for its reader.
fn system_log(message: &str) -> std::io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let level = libc::LOG_DAEMON | libc::LOG_WARNING;
    let line = format!("<{level}>a3s-box[{}]: {message}", std::process::id());
    socket.send_to(line.as_bytes(), "/dev/log").map(drop)
}

/// An error and its causes as one line, system errors in the lower-case words that engines look for.
pub fn sentence(error: &anyhow::Error) -> String {
    let words = |cause: &(dyn std::error::Error + 'static)| {
        let code = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        match code.map(Errno::from_raw).or_else(|| cause.downcast_ref::<Errno>().copied()) {
            Some(errno) => errno.desc().to_lowercase(),
            None => cause.to_string(),
        }
    };
    error.chain().map(words).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_speak_the_words_that_engines_grep_for() {
        let io = std::io::Error::from_raw_os_error(libc::ENOENT);
        let error = anyhow::Error::new(io).context("open /b/config.json").context("bundle");
        assert_eq!(sentence(&error), "bundle: open /b/config.json: no such file or directory");
        assert_eq!(sentence(&anyhow::Error::new(Errno::EACCES).context("mount")), "mount: permission denied");
    }
}
