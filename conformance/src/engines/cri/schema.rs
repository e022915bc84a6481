//! Protocol buffers from and to JSON, by the text of their definition.
//!
//! In: `api.proto` beside this file, documents, bytes. Out: bytes, documents in which every plain field has a value.
//! Must not: know what a message is for.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

/// What is called by which name with which messages.
pub struct Schema {
    messages: BTreeMap<String, Vec<Field>>,
    methods: BTreeMap<String, Method>,
}

/// A remote procedure.
pub struct Method {
    /// In a URL.
    pub path: String,
    /// Its argument's message.
    pub request: String,
    /// Its result's.
    pub reply: String,
}

struct Field {
    name: String,
    number: u64,
    kind: Kind,
    repeated: bool,
}

#[derive(Clone, PartialEq)]
enum Kind {
    Bool,
    Integer,
    Text,
    /// Texts by texts.
    Map,
    Message(String),
}

const VARINT: u64 = 0;
const BYTES: u64 = 2;

impl Schema {
    /// Reads a definition.
    pub fn parse(text: &str) -> Result<Self> {
        let mut schema = Schema { messages: BTreeMap::new(), methods: BTreeMap::new() };
        let lines = text.lines().filter(|line| !line.starts_with("//"));
        let text = lines.collect::<Vec<_>>().join(" ");
        for block in text.split('}').filter(|block| !block.trim().is_empty()) {
            let (head, body) = block.split_once('{').context("a block without {")?;
            let statements = body.split(';').map(str::trim).filter(|text| !text.is_empty());
            match head.split_whitespace().collect::<Vec<_>>()[..] {
                ["message", name] => {
                    let fields = statements.map(|text| field(text).context(text.to_string()));
                    schema.messages.insert(name.into(), fields.collect::<Result<_>>()?);
                }
                ["service", name] => {
                    for text in statements {
                        let words: Vec<&str> =
                            text.split([' ', '(', ')']).filter(|word| !word.is_empty()).collect();
                        let ["rpc", method, request, "returns", reply] = words[..] else { bail!("{text}") };
                        let path = format!("/runtime.v1.{name}/{method}");
                        let method_of = Method { path, request: request.into(), reply: reply.into() };
                        schema.methods.insert(method.into(), method_of);
                    }
                }
                _ => bail!("{head}"),
            }
        }
        Ok(schema)
    }

    /// A procedure by its name.
    pub fn method(&self, name: &str) -> Result<&Method> {
        self.methods.get(name).with_context(|| format!("no method {name}"))
    }

    fn fields(&self, message: &str) -> Result<&[Field]> {
        self.messages.get(message).map(Vec::as_slice).with_context(|| format!("no message {message}"))
    }

    /// The bytes of a document.
    pub fn encode(&self, message: &str, document: &Value) -> Result<Vec<u8>> {
        let fields = self.fields(message)?;
        let mut out = Vec::new();
        for (name, value) in document.as_object().into_iter().flatten() {
            let field = fields.iter().find(|field| field.name == *name);
            let field = field.with_context(|| format!("{message} has no {name}"))?;
            self.encode_field(&mut out, field, value)
                .with_context(|| format!("{message} {name}: {value}"))?;
        }
        Ok(out)
    }

    fn encode_field(&self, out: &mut Vec<u8>, field: &Field, value: &Value) -> Result<()> {
        if let (true, Value::Array(values)) = (field.repeated, value) {
            // One by one, which whoever expects numbers packed has to take as well.
            return values.iter().try_for_each(|value| self.encode_field(out, field, value));
        }
        let key = |kind| field.number << 3 | kind;
        let bytes = match &field.kind {
            Kind::Bool | Kind::Integer => {
                varint(out, key(VARINT));
                let number = value.as_i64().or(value.as_bool().map(i64::from)).context("no number")?;
                varint(out, number as u64);
                return Ok(());
            }
            Kind::Text => value.as_str().context("no text")?.as_bytes().to_vec(),
            Kind::Message(name) => self.encode(name, value)?,
            Kind::Map => {
                for (name, value) in value.as_object().into_iter().flatten() {
                    let mut pair = Vec::new();
                    prefixed(&mut pair, 1 << 3 | BYTES, name.as_bytes());
                    prefixed(&mut pair, 2 << 3 | BYTES, value.as_str().context("no text")?.as_bytes());
                    prefixed(out, key(BYTES), &pair);
                }
                return Ok(());
            }
        };
        prefixed(out, key(BYTES), &bytes);
        Ok(())
    }

    /// The document of some bytes. What the definition does not name is skipped.
    pub fn decode(&self, message: &str, mut bytes: &[u8]) -> Result<Value> {
        let fields = self.fields(message)?;
        let mut document: Map<String, Value> =
            fields.iter().map(|field| (field.name.clone(), field.default())).collect();
        while !bytes.is_empty() {
            let key = take_varint(&mut bytes)?;
            let field = fields.iter().find(|field| field.number == key >> 3);
            let value = match key & 7 {
                VARINT => {
                    let number = take_varint(&mut bytes)?;
                    let is_bool = field.is_some_and(|field| field.kind == Kind::Bool);
                    if is_bool { json!(number != 0) } else { json!(number as i64) }
                }
                BYTES => self.decode_bytes(field, take_prefixed(&mut bytes)?)?,
                1 => json!(take(&mut bytes, 8)?.len()),
                5 => json!(take(&mut bytes, 4)?.len()),
                kind => bail!("{message}: wire type {kind}"),
            };
            let Some(field) = field else { continue };
            match (&mut document[&field.name], value) {
                (Value::Array(all), value) => all.push(value),
                (Value::Object(all), Value::Object(more)) => all.extend(more),
                (place, value) => *place = value,
            }
        }
        Ok(Value::Object(document))
    }

    fn decode_bytes(&self, field: Option<&Field>, mut bytes: &[u8]) -> Result<Value> {
        Ok(match field.map(|field| &field.kind) {
            None => Value::Null,
            Some(Kind::Message(name)) => self.decode(name, bytes)?,
            Some(Kind::Map) => {
                let mut pair = [String::new(), String::new()];
                while !bytes.is_empty() {
                    let index = (take_varint(&mut bytes)? >> 3) as usize;
                    let text = String::from_utf8_lossy(take_prefixed(&mut bytes)?).into_owned();
                    *pair.get_mut(index.wrapping_sub(1)).context("a map's entry")? = text;
                }
                let [name, value] = pair;
                json!({ name: value })
            }
            _ => json!(String::from_utf8_lossy(bytes)),
        })
    }
}

impl Field {
    fn default(&self) -> Value {
        match &self.kind {
            _ if self.repeated => json!([]),
            Kind::Bool => json!(false),
            Kind::Integer => json!(0),
            Kind::Text => json!(""),
            Kind::Map => json!({}),
            Kind::Message(_) => Value::Null,
        }
    }
}

fn field(text: &str) -> Result<Field> {
    let (what, number) = text.split_once('=').context("no number")?;
    let mut words: Vec<&str> = what.split_whitespace().collect();
    let repeated = words.first() == Some(&"repeated");
    if repeated {
        words.remove(0);
    }
    let [kind, name] = words[..] else { bail!("not a type and a name") };
    let kind = match kind {
        "bool" => Kind::Bool,
        "int32" | "uint32" | "int64" | "uint64" => Kind::Integer,
        "string" | "bytes" => Kind::Text,
        "map<string,string>" => Kind::Map,
        message => Kind::Message(message.into()),
    };
    Ok(Field { name: name.into(), number: number.trim().parse()?, kind, repeated })
}

fn varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn prefixed(out: &mut Vec<u8>, key: u64, bytes: &[u8]) {
    varint(out, key);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8]> {
    ensure!(bytes.len() >= length, "a message that ends early");
    let (piece, rest) = bytes.split_at(length);
    *bytes = rest;
    Ok(piece)
}

fn take_varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(number);
        }
    }
    bail!("a number without end")
}

fn take_prefixed<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8]> {
    let length = take_varint(bytes)?;
    take(bytes, length.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_come_back_and_have_the_known_bytes() {
        let schema = Schema::parse(include_str!("api.proto")).unwrap();
        let document = json!({
            "metadata": { "name": "n", "attempt": 300 }, "annotations": { "a": "b", "c": "" },
            "linux": { "security_context": { "run_as_user": { "value": -1 }, "privileged": true } },
        });
        let bytes = schema.encode("PodConfig", &document).unwrap();
        let back = schema.decode("PodConfig", &bytes).unwrap();
        for pointer in
            ["/metadata/name", "/metadata/attempt", "/annotations", "/linux/security_context/privileged"]
        {
            assert_eq!(back.pointer(pointer), document.pointer(pointer), "{pointer}");
        }
        assert_eq!(back.pointer("/linux/security_context/run_as_user/value"), Some(&json!(-1)));
        assert_eq!((&back["hostname"], &back["dns_config"]), (&json!(""), &Value::Null));
        let exec = json!({ "container_id": "x", "cmd": ["a", "b"], "timeout": 150 });
        // By name, as documents are sorted.
        let expected = [0x12, 1, b'a', 0x12, 1, b'b', 0x0a, 1, b'x', 0x18, 0x96, 1];
        let mut bytes = schema.encode("ExecSync", &exec).unwrap();
        assert_eq!(bytes, expected);
        // A field of a newer version.
        bytes.extend([0x7a, 2, 0, 0]);
        assert_eq!(schema.decode("ExecSync", &bytes).unwrap(), exec);
    }

    #[test]
    fn every_message_that_is_named_is_there() {
        let schema = Schema::parse(include_str!("api.proto")).unwrap();
        for method in schema.methods.values() {
            schema.fields(&method.request).unwrap();
            schema.fields(&method.reply).unwrap();
        }
        for field in schema.messages.values().flatten() {
            if let Kind::Message(name) = &field.kind {
                schema.fields(name).unwrap();
            }
        }
        assert!(schema.encode("Empty", &json!({ "x": 1 })).is_err());
        assert!(schema.decode("Version", &[0x12, 9, b'x']).is_err());
    }
}
