//! Calls to a CRI server on a Unix socket: gRPC, one connection a call.
//!
//! In: a method's name and a document. Out: the reply's document, or the server's words. Must not: wait for ever.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request};
use serde_json::Value;
use tokio::net::UnixStream;

use super::schema::Schema;

/// gRPC puts a byte (not compressed) and a length before each message.
const HEAD: usize = 5;

/// The server and what it understands.
pub struct Client {
    socket: PathBuf,
    schema: Schema,
    patience: Duration,
}

impl Client {
    /// A server that need not be there yet.
    pub fn new(socket: PathBuf, patience: Duration) -> Result<Self> {
        Ok(Client { socket, schema: Schema::parse(include_str!("api.proto"))?, patience })
    }

    /// Calls a method.
    pub fn call(&self, method: &str, document: &Value) -> Result<Value> {
        self.exchange(method, document).with_context(|| format!("CRI {method}"))
    }

    fn exchange(&self, name: &str, document: &Value) -> Result<Value> {
        let method = self.schema.method(name)?;
        let message = self.schema.encode(&method.request, document)?;
        let mut body = vec![0];
        body.extend(u32::try_from(message.len())?.to_be_bytes());
        body.extend(message);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let reply = runtime.block_on(async {
            let limit = tokio::time::timeout(self.patience, self.send(&method.path, body));
            limit.await.with_context(|| format!("no reply after {:.0?}", self.patience))?
        })?;
        ensure!(reply.len() >= HEAD && reply[0] == 0, "a reply of {} bytes", reply.len());
        self.schema.decode(&method.reply, &reply[HEAD..])
    }

    async fn send(&self, path: &str, body: Vec<u8>) -> Result<Vec<u8>> {
        let stream = UnixStream::connect(&self.socket).await.context("connect")?;
        let (client, connection) = h2::client::handshake(stream).await?;
        let driver = tokio::spawn(connection);
        let request = Request::post(format!("http://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let mut client = client.ready().await?;
        let (response, mut sender) = client.send_request(request, false)?;
        sender.send_data(Bytes::from(body), true)?;
        let response = response.await?;
        ensure!(response.status().is_success(), "HTTP status {}", response.status());
        let headers = response.headers().clone();
        let mut stream = response.into_body();
        let mut reply = Vec::new();
        while let Some(piece) = stream.data().await {
            let piece = piece?;
            stream.flow_control().release_capacity(piece.len())?;
            reply.extend_from_slice(&piece);
        }
        let trailers = stream.trailers().await?.unwrap_or(headers);
        driver.abort();
        status(&trailers)?;
        Ok(reply)
    }
}

/// What gRPC says of how a call went.
fn status(trailers: &HeaderMap) -> Result<()> {
    let text = |name: &str| String::from_utf8_lossy(trailers.get(name).map_or(b"", |value| value.as_bytes()));
    match text("grpc-status").as_ref() {
        "0" => Ok(()),
        code => bail!("{} (gRPC status {code:?})", text("grpc-message")),
    }
}
