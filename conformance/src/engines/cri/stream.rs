//! Streams of exec, attach and port-forward: WebSockets that carry Kubernetes' channels.
//!
//! In: the URL that a CRI server gave. Out: what comes in by which channel, and how a program ended. Must not: wait for
//! ever.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Channels of exec and attach.
pub const STDIN: u8 = 0;
/// The program's output.
pub const STDOUT: u8 = 1;
/// Its errors.
pub const STDERR: u8 = 2;
/// How it ended.
const STATUS: u8 = 3;
/// The terminal's size.
pub const RESIZE: u8 = 4;

const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const FINAL: u8 = 0x80;
/// Clients mask what they send; with zeros it stays what it is.
const MASKED: u8 = 0x80;

/// One connection.
pub struct Stream {
    tcp: TcpStream,
}

/// All that came of a program.
pub struct Ended {
    /// Output.
    pub stdout: String,
    /// Errors.
    pub stderr: String,
    /// Exit status.
    pub code: i32,
}

impl Stream {
    /// Connects to a URL.
    pub fn open(url: &Value, patience: Duration) -> Result<Self> {
        let url = url["url"].as_str().and_then(|url| url.strip_prefix("http://")).context("no URL")?;
        let (host, path) = url.split_once('/').context("a URL without a path")?;
        let mut tcp = TcpStream::connect(host).with_context(|| format!("connect to {host}"))?;
        tcp.set_read_timeout(Some(patience))?;
        tcp.set_write_timeout(Some(patience))?;
        write!(
            tcp,
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            tcp.read_exact(&mut byte).context("the answer to the upgrade")?;
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        ensure!(head.starts_with("HTTP/1.1 101 "), "no upgrade: {head}");
        Ok(Stream { tcp })
    }

    /// Sends by a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let length = u16::try_from(bytes.len() + 1)?;
        let mut frame = vec![FINAL | BINARY, MASKED | 126];
        frame.extend(length.to_be_bytes());
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(bytes);
        self.tcp.write_all(&frame).context("send to the stream")
    }

    /// What comes next, and by which channel; `None` at the end.
    pub fn next(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            if self.tcp.read(&mut head[..1]).context("read from the stream")? == 0 {
                return Ok(None);
            }
            self.tcp.read_exact(&mut head[1..])?;
            let mut size = [0; 8];
            match head[1] {
                126 => self.tcp.read_exact(&mut size[6..])?,
                127 => self.tcp.read_exact(&mut size)?,
                short => size[7] = short,
            }
            let mut payload = vec![0; usize::try_from(u64::from_be_bytes(size))?];
            self.tcp.read_exact(&mut payload)?;
            match head[0] & 0xf {
                CLOSE => return Ok(None),
                PING => {}
                _ if payload.is_empty() => {}
                _ => return Ok(Some((payload.remove(0), payload))),
            }
        }
    }

    /// Reads until a channel has said this.
    pub fn read_until(&mut self, channel: u8, words: &str) -> Result<String> {
        let mut said = String::new();
        while !said.contains(words) {
            match self.next().with_context(|| format!("waiting for {words:?} in {said:?}"))? {
                Some((from, bytes)) if from == channel => said += &String::from_utf8_lossy(&bytes),
                Some(_) => {}
                None => anyhow::bail!("the stream ended without {words:?}: {said:?}"),
            }
        }
        Ok(said)
    }

    /// Reads to the end of a program.
    pub fn finish(mut self) -> Result<Ended> {
        let mut texts = [const { Vec::new() }; 4];
        while let Some((channel, bytes)) = self.next()? {
            texts.get_mut(usize::from(channel)).context("an unknown channel")?.extend(bytes);
        }
        let text = |channel: u8| String::from_utf8_lossy(&texts[usize::from(channel)]).into_owned();
        let status: Value = serde_json::from_str(&text(STATUS))
            .with_context(|| format!("no status but {:?}, stdout {:?}", text(STATUS), text(STDOUT)))?;
        let code = match status["status"].as_str() {
            Some("Success") => Some(0),
            _ => status
                .pointer("/details/causes/0/message")
                .and_then(Value::as_str)
                .and_then(|code| code.parse().ok()),
        };
        let code = code.with_context(|| format!("it ended with {status}"))?;
        Ok(Ended { stdout: text(STDOUT), stderr: text(STDERR), code })
    }
}
