//! Frames: what travels on a connection.
//!
//! A frame is `length: u32 LE` (of what follows), `kind: u8`, then its body. Messages are JSON; data frames carry
//! one stream's bytes. In: bytes as they arrive. Out: whole frames. Must not: allocate for a length it has not
//! checked, or accept anything after the first error.

use std::fmt;

/// Longest message body, bytes. A config.json of a busy Kubernetes pod is some hundred KiB.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Longest run of stream bytes in one data frame.
pub const MAX_DATA: usize = 32 << 10;

const HEADER: usize = 4;
const KIND_MESSAGE: u8 = 1;
const KIND_DATA: u8 = 2;
const KIND_CREDIT: u8 = 3;
const KIND_END: u8 = 4;

/// A byte stream of the process that owns the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stream {
    /// Host to guest.
    Stdin = 0,
    /// Guest to host.
    Stdout = 1,
    /// Guest to host.
    Stderr = 2,
}

impl Stream {
    /// All streams, in the order of their descriptors.
    pub const ALL: [Stream; 3] = [Stream::Stdin, Stream::Stdout, Stream::Stderr];

    fn from_byte(byte: u8) -> Result<Self, Error> {
        match byte {
            0 => Ok(Stream::Stdin),
            1 => Ok(Stream::Stdout),
            2 => Ok(Stream::Stderr),
            _ => Err(Error::UnknownStream(byte)),
        }
    }
}

/// One unit on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A JSON body, see [`crate::message`].
    Message(Vec<u8>),
    /// Bytes of a stream.
    Data(Stream, Vec<u8>),
    /// The receiver of a stream has consumed this much of its window (see [`crate::credit`]).
    Credit(Stream, u32),
    /// From the sender of a stream: end of file. From its receiver: nobody reads any more.
    End(Stream),
}

/// Why bytes are not a frame. The connection is of no use afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The announced length is beyond the bound for its kind.
    Oversized(usize),
    /// The body is shorter or longer than its kind allows.
    Malformed(u8),
    /// No such frame kind.
    UnknownKind(u8),
    /// No such stream.
    UnknownStream(u8),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Oversized(len) => write!(f, "frame of {len} bytes is over the limit"),
            Error::Malformed(kind) => write!(f, "frame of kind {kind} has a wrong length"),
            Error::UnknownKind(kind) => write!(f, "unknown frame kind {kind}"),
            Error::UnknownStream(stream) => write!(f, "unknown stream {stream}"),
        }
    }
}

impl std::error::Error for Error {}

impl Frame {
    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Frame::Message(body) => put(out, KIND_MESSAGE, &[], body),
            Frame::Data(stream, bytes) => put(out, KIND_DATA, &[*stream as u8], bytes),
            Frame::Credit(stream, n) => put(out, KIND_CREDIT, &[*stream as u8], &n.to_le_bytes()),
            Frame::End(stream) => put(out, KIND_END, &[*stream as u8], &[]),
        }
    }

    fn decode(kind: u8, body: &[u8]) -> Result<Self, Error> {
        match (kind, body) {
            (KIND_MESSAGE, body) => Ok(Frame::Message(body.to_vec())),
            (KIND_DATA, [stream, bytes @ ..]) if !bytes.is_empty() => {
                Ok(Frame::Data(Stream::from_byte(*stream)?, bytes.to_vec()))
            }
            (KIND_CREDIT, [stream, a, b, c, d]) => {
                Ok(Frame::Credit(Stream::from_byte(*stream)?, u32::from_le_bytes([*a, *b, *c, *d])))
            }
            (KIND_END, [stream]) => Ok(Frame::End(Stream::from_byte(*stream)?)),
            (KIND_DATA | KIND_CREDIT | KIND_END, _) => Err(Error::Malformed(kind)),
            _ => Err(Error::UnknownKind(kind)),
        }
    }
}

fn put(out: &mut Vec<u8>, kind: u8, head: &[u8], body: &[u8]) {
    let len = (1 + head.len() + body.len()) as u32;
    out.extend_from_slice(&len.to_le_bytes());
    out.push(kind);
    out.extend_from_slice(head);
    out.extend_from_slice(body);
}

/// Bound on what follows the length field, by kind; also rejects unknown kinds before their body is awaited.
fn limit(kind: u8) -> Result<usize, Error> {
    match kind {
        KIND_MESSAGE => Ok(1 + MAX_MESSAGE),
        KIND_DATA => Ok(2 + MAX_DATA),
        KIND_CREDIT => Ok(6),
        KIND_END => Ok(2),
        _ => Err(Error::UnknownKind(kind)),
    }
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    broken: Option<Error>,
}

impl Decoder {
    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start > MAX_DATA {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes come. After an error every call repeats it.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Error> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let result = self.cut();
        if let Err(error) = &result {
            self.broken = Some(error.clone());
        }
        result
    }

    /// Bytes that wait for the rest of their frame.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }

    fn cut(&mut self) -> Result<Option<Frame>, Error> {
        let bytes = &self.buffer[self.start..];
        let [a, b, c, d, rest @ ..] = bytes else { return Ok(None) };
        let len = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        let Some(kind) = rest.first().copied() else {
            return if len > 1 + MAX_MESSAGE { Err(Error::Oversized(len)) } else { Ok(None) };
        };
        if len == 0 {
            return Err(Error::Malformed(kind));
        }
        if len > limit(kind)? {
            return Err(Error::Oversized(len));
        }
        let Some(body) = rest.get(1..len) else { return Ok(None) };
        let frame = Frame::decode(kind, body)?;
        self.start += HEADER + len;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(frame: &Frame) -> Vec<u8> {
        let mut out = Vec::new();
        frame.encode(&mut out);
        out
    }

    fn samples() -> Vec<Frame> {
        vec![
            Frame::Message(b"{}".to_vec()),
            Frame::Message(vec![b' '; MAX_MESSAGE]),
            Frame::Data(Stream::Stdin, vec![7; MAX_DATA]),
            Frame::Data(Stream::Stderr, vec![0]),
            Frame::Credit(Stream::Stdout, u32::MAX),
            Frame::End(Stream::Stdout),
        ]
    }

    #[test]
    fn every_frame_survives_the_wire_however_it_is_cut() {
        for step in [1, 3, 4096, usize::MAX] {
            let bytes: Vec<u8> = samples().iter().flat_map(wire).collect();
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for chunk in bytes.chunks(step.min(bytes.len())) {
                decoder.push(chunk);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame);
                }
            }
            assert_eq!(seen, samples());
            assert_eq!(decoder.pending(), 0);
        }
    }

    #[test]
    fn a_truncated_frame_waits_and_yields_nothing() {
        for frame in samples() {
            let bytes = wire(&frame);
            let mut decoder = Decoder::default();
            decoder.push(&bytes[..bytes.len() - 1]);
            assert_eq!(decoder.next_frame(), Ok(None));
        }
    }

    fn error_of(bytes: &[u8]) -> Error {
        let mut decoder = Decoder::default();
        decoder.push(bytes);
        decoder.next_frame().unwrap_err()
    }

    #[test]
    fn oversized_lengths_are_refused_before_their_body_comes() {
        assert_eq!(error_of(&[0xff, 0xff, 0xff, 0xff]), Error::Oversized(u32::MAX as usize));
        let data = (MAX_DATA as u32 + 3).to_le_bytes();
        assert_eq!(
            error_of(&[data[0], data[1], data[2], data[3], KIND_DATA]),
            Error::Oversized(MAX_DATA + 3)
        );
        assert_eq!(error_of(&[3, 0, 0, 0, KIND_END]), Error::Oversized(3));
    }

    #[test]
    fn wrong_shapes_and_unknown_variants_are_named() {
        assert_eq!(error_of(&[0, 0, 0, 0, 9]), Error::Malformed(9));
        assert_eq!(error_of(&[1, 0, 0, 0, 200]), Error::UnknownKind(200));
        assert_eq!(error_of(&[2, 0, 0, 0, KIND_END, 9]), Error::UnknownStream(9));
        assert_eq!(error_of(&[2, 0, 0, 0, KIND_DATA, 0]), Error::Malformed(KIND_DATA));
        assert_eq!(error_of(&[3, 0, 0, 0, KIND_CREDIT, 0, 1]), Error::Malformed(KIND_CREDIT));
    }

    #[test]
    fn after_an_error_nothing_more_is_accepted() {
        let mut decoder = Decoder::default();
        decoder.push(&[1, 0, 0, 0, 200]);
        let first = decoder.next_frame().unwrap_err();
        decoder.push(&wire(&Frame::End(Stream::Stdin)));
        assert_eq!(decoder.next_frame().unwrap_err(), first);
    }
}
