//! Header of an ONNX file, read before it is run: inputs, outputs and the names of its first nodes.
//!
//! The file is one protobuf message (`onnx.proto3`): ModelProto.graph = 7; GraphProto.node = 1, initializer = 5,
//! input = 11, output = 12; NodeProto.input = 1, name = 3, op_type = 4; TensorProto.data_type = 2, name = 8,
//! raw_data = 9; ValueInfoProto.name = 1, type = 2; TypeProto.tensor_type = 1, its shape = 2, dim = 1, dim_value = 1.

use std::collections::{HashMap, HashSet};
use std::fmt;

use anyhow::{Context, Result, ensure};

/// The first nodes whose names tell how a recogniser wants its pixels; insightface looks at as many.
const FIRST_NODES: usize = 8;

/// Inputs, outputs and first nodes of a graph.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// Inputs of the network, without weights that old files list among them.
    pub inputs: Vec<Port>,
    /// Outputs of the network.
    pub outputs: Vec<Port>,
    /// Names of the first eight nodes.
    pub first_nodes: Vec<String>,
}

/// An input or an output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// Its name in the graph.
    pub name: String,
    /// Its sizes; one that the file leaves open is `None`.
    pub shape: Vec<Option<usize>>,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let sizes: Vec<String> =
            self.shape.iter().map(|size| size.map_or("?".into(), |size| size.to_string())).collect();
        write!(f, "`{}` [{}]", self.name, sizes.join(", "))
    }
}

impl Header {
    /// Reads the header of an ONNX file.
    ///
    /// # Errors
    /// Says whether the bytes are no ONNX at all or end too early.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(!bytes.is_empty(), "the file is empty");
        if bytes.starts_with(b"version https://git-lfs") {
            anyhow::bail!("it is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`");
        }
        let mut graph = None;
        walk(bytes, &mut |field, value| {
            if let (7, Value::Bytes(bytes)) = (field, value) {
                graph = Some(bytes);
            }
            Ok(())
        })?;
        let graph = graph.context("it is no ONNX file: it has no graph")?;
        let (mut header, mut weights) = (Self::default(), HashSet::new());
        walk(graph, &mut |field, value| {
            match (field, value) {
                (1, Value::Bytes(node)) if header.first_nodes.len() < FIRST_NODES => {
                    header.first_nodes.push(text(node, 3)?);
                }
                (5, Value::Bytes(tensor)) => {
                    weights.insert(text(tensor, 8)?);
                }
                (11, Value::Bytes(port)) => header.inputs.push(Port::parse(port)?),
                (12, Value::Bytes(port)) => header.outputs.push(Port::parse(port)?),
                _ => {}
            }
            Ok(())
        })?;
        header.inputs.retain(|input| !weights.contains(&input.name));
        Ok(header)
    }
}

impl Port {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut port = Self { name: text(bytes, 1)?, shape: Vec::new() };
        let mut shape = bytes;
        for field in [2, 1, 2] {
            shape = part(shape, field)?;
        }
        walk(shape, &mut |field, value| {
            if let (1, Value::Bytes(size)) = (field, value) {
                let mut known = None;
                walk(size, &mut |field, value| {
                    if let (1, Value::Number(number)) = (field, value) {
                        // Exporters write 0 or −1 for a size that is open.
                        known = i64::try_from(number).ok().filter(|&size| size > 0).map(|size| size as usize);
                    }
                    Ok(())
                })?;
                port.shape.push(known);
            }
            Ok(())
        })?;
        Ok(port)
    }
}

/// The weights of a graph, for a network that is computed here.
#[derive(Debug, Default)]
pub struct Weights {
    /// The 32-bit floats among the initialisers by name, flattened.
    pub values: HashMap<String, Vec<f32>>,
    /// Names of weight and bias of each `Conv` that has both, in the order of the nodes.
    pub convolutions: Vec<[String; 2]>,
}

impl Weights {
    /// Reads the weights of an ONNX file that carries them itself.
    ///
    /// # Errors
    /// As [`Header::parse`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut weights = Self::default();
        walk(part(bytes, 7)?, &mut |field, value| {
            match (field, value) {
                (1, Value::Bytes(node)) if part(node, 4)? == b"Conv" => {
                    let mut inputs = Vec::new();
                    walk(node, &mut |field, value| {
                        if let (1, Value::Bytes(name)) = (field, value) {
                            inputs.push(String::from_utf8_lossy(name).into_owned());
                        }
                        Ok(())
                    })?;
                    if let [_, weight, bias] = &inputs[..] {
                        weights.convolutions.push([weight.clone(), bias.clone()]);
                    }
                }
                (5, Value::Bytes(tensor)) => {
                    const FLOAT: u64 = 1;
                    let mut kind = 0;
                    walk(tensor, &mut |field, value| {
                        if let (2, Value::Number(number)) = (field, value) {
                            kind = number;
                        }
                        Ok(())
                    })?;
                    let raw = part(tensor, 9)?;
                    if kind == FLOAT && !raw.is_empty() {
                        let floats =
                            raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                        weights.values.insert(text(tensor, 8)?, floats.collect());
                    }
                }
                _ => {}
            }
            Ok(())
        })?;
        Ok(weights)
    }
}

/// The value of a protobuf field.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Calls `visit` with number and value of each field of a message.
fn walk<'a>(mut bytes: &'a [u8], visit: &mut dyn FnMut(u64, Value<'a>) -> Result<()>) -> Result<()> {
    const CUT: &str = "it is truncated, or no ONNX file";
    while !bytes.is_empty() {
        let key = varint(&mut bytes).context(CUT)?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut bytes).context(CUT)?),
            kind @ (1 | 2 | 5) => {
                let length = match kind {
                    1 => 8,
                    5 => 4,
                    _ => usize::try_from(varint(&mut bytes).context(CUT)?)?,
                };
                let (value, rest) = bytes.split_at_checked(length).context(CUT)?;
                bytes = rest;
                Value::Bytes(value)
            }
            _ => anyhow::bail!(CUT),
        };
        visit(key >> 3, value)?;
    }
    Ok(())
}

/// A number of seven bits a byte, the low ones first.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(number);
        }
    }
    None
}

/// The last occurrence of a field that holds bytes; empty where there is none.
fn part(bytes: &[u8], wanted: u64) -> Result<&[u8]> {
    let mut found: &[u8] = &[];
    walk(bytes, &mut |field, value| {
        if let Value::Bytes(bytes) = value
            && field == wanted
        {
            found = bytes;
        }
        Ok(())
    })?;
    Ok(found)
}

fn text(bytes: &[u8], field: u64) -> Result<String> {
    Ok(String::from_utf8_lossy(part(bytes, field)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_of_a_real_file_is_read() {
        let header = Header::parse(include_bytes!("../assets/face/mobilefacenet512.onnx")).unwrap();
        let shape = vec![Some(1), Some(3), Some(112), Some(112)];
        assert_eq!(header.inputs, [Port { name: "input".into(), shape }]);
        assert_eq!(header.outputs[0].to_string(), "`output` [1, 512]");
        assert_eq!(header.first_nodes.len(), FIRST_NODES);
    }

    #[test]
    fn what_is_damaged_is_said_and_nothing_panics() {
        let whole = include_bytes!("../assets/face/yunet.onnx");
        for part in (0..whole.len()).step_by(997) {
            let message = Header::parse(&whole[..part]).unwrap_err().to_string();
            assert!(
                message.contains("truncated") || message.contains("empty") || message.contains("no graph"),
                "{part} bytes: {message}"
            );
        }
        assert!(Header::parse(b"<html>not found</html>").is_err());
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00";
        assert!(Header::parse(pointer).unwrap_err().to_string().contains("git lfs pull"));
    }
}
