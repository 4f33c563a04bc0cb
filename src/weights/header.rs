//! The header of a safetensors file, read with an error for everything that can be wrong with it.
//!
//! Format: 8 bytes of length N (little-endian), N bytes of JSON, then the tensors' bytes without holes
//! (safetensors' `README.md`, section "Format"). The `safetensors` crate wants the whole file in memory and takes
//! the last of two equal keys in silence; here only the header is read, and tensors one by one.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde::de::{MapAccess, Visitor};
use serde_json::{Value, json};

/// The format's own limit for the header.
const LONGEST_HEADER: u64 = 100_000_000;

/// Header of a safetensors file.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes.
    pub tensors: Vec<Entry>,
    /// Where the tensors' bytes begin in the file.
    data: u64,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// How its numbers are stored.
    pub storage: Storage,
    /// Its shape.
    pub shape: Vec<usize>,
    begin: u64,
    end: u64,
}

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Storage {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    I64,
    U64,
    I32,
    U32,
    I16,
    U16,
    I8,
    U8,
    Bool,
}

/// Errors of a file as such.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// No bytes.
    #[error("the file is empty")]
    Empty,
    /// Another format under this name.
    #[error("it is {0}, not safetensors; convert it with the program that wrote it")]
    Other(&'static str),
    /// The header does not fit into the file.
    #[error(
        "not a whole safetensors file: the header should be {says} bytes long, the file has {has} after it begins"
    )]
    Length {
        /// Its length by the first 8 bytes.
        says: u64,
        /// Bytes after those.
        has: u64,
    },
    /// The header is no JSON object of tensors.
    #[error("the header is not readable: {0}")]
    Json(String),
    /// A key that occurs twice.
    #[error("the key `{0}` occurs twice")]
    Twice(String),
    /// An entry that does not describe a tensor.
    #[error("`{key}`: {why}")]
    Entry {
        /// The key.
        key: String,
        /// The reason.
        why: String,
    },
    /// The tensors' bytes are not all there, or more than those.
    #[error("not a whole safetensors file: the tensors take {wanted} bytes, the file holds {has}")]
    Data {
        /// By the header.
        wanted: u64,
        /// In the file.
        has: u64,
    },
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl Header {
    /// Reads the header alone; `file` may be gigabytes long.
    ///
    /// # Errors
    /// [`HeaderError`] for a file that is not whole or not safetensors, and for tensors that lie over each other,
    /// leave holes or have another number of bytes than their shape wants.
    pub fn read(file: &mut (impl Read + Seek)) -> Result<Self, HeaderError> {
        let length = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        let mut first = Vec::new();
        file.by_ref().take(8).read_to_end(&mut first)?;
        if first.is_empty() {
            return Err(HeaderError::Empty);
        }
        let has = length.saturating_sub(8);
        let says = <[u8; 8]>::try_from(first.as_slice()).map_or(u64::MAX, u64::from_le_bytes);
        if says > has || says > LONGEST_HEADER {
            // Only now: a length may begin with the bytes of a pickle.
            return Err(other_format(&first).map_or(HeaderError::Length { says, has }, HeaderError::Other));
        }
        let mut json = vec![0; says as usize];
        file.read_exact(&mut json)?;
        let (metadata, tensors) = parse(&json)?;
        let header = Self { metadata, tensors, data: 8 + says };
        header.check(has - says)?;
        Ok(header)
    }

    /// The tensors must lie one after the other, each as long as its shape wants.
    fn check(&self, has: u64) -> Result<(), HeaderError> {
        let mut next = 0;
        for entry in &self.tensors {
            let wrong = |why: String| HeaderError::Entry { key: entry.key.clone(), why };
            let numbers =
                entry.shape.iter().try_fold(1u64, |product, axis| product.checked_mul(*axis as u64));
            let wanted = numbers.and_then(|numbers| numbers.checked_mul(entry.storage.bytes()));
            let length = entry.end.checked_sub(entry.begin);
            if length.is_none() || length != wanted {
                let wanted = wanted.map_or("more than fits".to_string(), |wanted| wanted.to_string());
                return Err(wrong(format!(
                    "its bytes are {}..{}, its shape {:?} of {:?} wants {wanted}",
                    entry.begin, entry.end, entry.shape, entry.storage
                )));
            }
            if entry.begin != next {
                let what = if entry.begin < next { "lie over another tensor" } else { "leave a hole" };
                return Err(wrong(format!("its bytes {}..{} {what} at {next}", entry.begin, entry.end)));
            }
            next = entry.end;
        }
        if next == has { Ok(()) } else { Err(HeaderError::Data { wanted: next, has }) }
    }

    /// Where a tensor's bytes lie in the file.
    pub fn place(&self, entry: &Entry) -> Range<u64> {
        self.data + entry.begin..self.data + entry.end
    }

    /// A header for tensors that follow each other in this order.
    pub fn of<'a>(
        metadata: BTreeMap<String, String>,
        tensors: impl IntoIterator<Item = (&'a str, Storage, &'a [usize])>,
    ) -> Self {
        let mut end = 0;
        let entry = |(key, storage, shape): (&str, Storage, &[usize])| {
            let begin = end;
            end += storage.bytes() * shape.iter().product::<usize>() as u64;
            Entry { key: key.to_string(), storage, shape: shape.to_vec(), begin, end }
        };
        let mut header = Self { metadata, tensors: tensors.into_iter().map(entry).collect(), data: 0 };
        header.data = header.to_bytes().len() as u64;
        header
    }

    /// The bytes of a file before its tensors, which follow in the order of [`Header::tensors`]. Keys are sorted, so
    /// that equal headers have equal bytes; the `safetensors` crate keeps metadata in a hash map, whose order changes
    /// from run to run.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut fields = BTreeMap::new();
        if !self.metadata.is_empty() {
            fields.insert("__metadata__", json!(self.metadata));
        }
        for Entry { key, storage, shape, begin, end } in &self.tensors {
            let entry = json!({ "dtype": storage.name(), "shape": shape, "data_offsets": [begin, end] });
            fields.insert(key, entry);
        }
        let mut json = json!(fields).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' '); // the format wants the data aligned
        [(json.len() as u64).to_le_bytes().to_vec(), json].concat()
    }

    /// One tensor, on the CPU; see [`Entry::decode`].
    ///
    /// # Errors
    /// [`HeaderError::Io`].
    pub fn load(&self, file: &mut (impl Read + Seek), entry: &Entry) -> Result<Tensor, HeaderError> {
        file.seek(SeekFrom::Start(self.data + entry.begin))?;
        // `check` held the length against that of the file, so a lying header cannot ask for all memory.
        let mut bytes = vec![0; (entry.end - entry.begin) as usize];
        file.read_exact(&mut bytes)?;
        entry.decode(&bytes)
    }
}

impl Entry {
    /// The tensor of these bytes, on the CPU. 8-bit floats come as f16, which holds all their values; integers as f32.
    pub fn decode(&self, bytes: &[u8]) -> Result<Tensor, HeaderError> {
        let shape = self.shape.as_slice();
        let tensor = match self.storage {
            Storage::F64 => Tensor::from_vec(numbers(bytes, f64::from_le_bytes), shape, &Device::Cpu),
            Storage::F32 => Tensor::from_vec(numbers(bytes, f32::from_le_bytes), shape, &Device::Cpu),
            Storage::F16 => Tensor::from_vec(numbers(bytes, f16::from_le_bytes), shape, &Device::Cpu),
            Storage::BF16 => Tensor::from_vec(numbers(bytes, bf16::from_le_bytes), shape, &Device::Cpu),
            Storage::F8E4M3 => Tensor::from_vec(numbers(bytes, |[b]| from_e4m3(b)), shape, &Device::Cpu),
            // The upper half of an f16.
            Storage::F8E5M2 => {
                Tensor::from_vec(numbers(bytes, |[b]| f16::from_le_bytes([0, b])), shape, &Device::Cpu)
            }
            Storage::I64 => {
                Tensor::from_vec(numbers(bytes, |b| i64::from_le_bytes(b) as f32), shape, &Device::Cpu)
            }
            Storage::U64 => {
                Tensor::from_vec(numbers(bytes, |b| u64::from_le_bytes(b) as f32), shape, &Device::Cpu)
            }
            Storage::I32 => {
                Tensor::from_vec(numbers(bytes, |b| i32::from_le_bytes(b) as f32), shape, &Device::Cpu)
            }
            Storage::U32 => {
                Tensor::from_vec(numbers(bytes, |b| u32::from_le_bytes(b) as f32), shape, &Device::Cpu)
            }
            Storage::I16 => {
                Tensor::from_vec(numbers(bytes, |b| f32::from(i16::from_le_bytes(b))), shape, &Device::Cpu)
            }
            Storage::U16 => {
                Tensor::from_vec(numbers(bytes, |b| f32::from(u16::from_le_bytes(b))), shape, &Device::Cpu)
            }
            Storage::I8 => {
                Tensor::from_vec(numbers(bytes, |b| f32::from(i8::from_le_bytes(b))), shape, &Device::Cpu)
            }
            Storage::U8 | Storage::Bool => {
                Tensor::from_vec(numbers(bytes, |[b]| f32::from(b)), shape, &Device::Cpu)
            }
        };
        tensor.map_err(|error| HeaderError::Entry { key: self.key.clone(), why: error.to_string() })
    }
}

/// Format of a file that begins with these bytes.
fn other_format(first: &[u8]) -> Option<&'static str> {
    Some(match first {
        [b'P', b'K', 3, 4, ..] => "a zip archive, as PyTorch's .pt and .bin are",
        [0x80, 2..=5, ..] => "a Python pickle",
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file",
        [0x89, b'P', b'N', b'G', ..] | [0xff, 0xd8, 0xff, ..] => "an image",
        b"version " => "a Git LFS pointer, which `git lfs pull` replaces by the file",
        [b'<', b'!' | b'h', ..] => "a web page, as a server sends in the place of a file: download it again",
        _ => return None,
    })
}

fn numbers<T, const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
}

/// The 8-bit float with 4 bits of exponent, 3 of mantissa and no infinity (Micikevicius et al. 2022).
fn from_e4m3(byte: u8) -> f16 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    f16::from_f32(if byte >> 7 == 1 { -magnitude } else { magnitude })
}

/// Names of the types in the format.
const NAMES: [(&str, Storage); 15] = [
    ("F64", Storage::F64),
    ("F32", Storage::F32),
    ("F16", Storage::F16),
    ("BF16", Storage::BF16),
    ("F8_E4M3", Storage::F8E4M3),
    ("F8_E5M2", Storage::F8E5M2),
    ("I64", Storage::I64),
    ("U64", Storage::U64),
    ("I32", Storage::I32),
    ("U32", Storage::U32),
    ("I16", Storage::I16),
    ("U16", Storage::U16),
    ("I8", Storage::I8),
    ("U8", Storage::U8),
    ("BOOL", Storage::Bool),
];

impl Storage {
    fn from_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|(other, _)| *other == name).map(|(_, storage)| *storage)
    }

    /// Name in the format.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, other)| *other == self).map_or("", |(name, _)| name)
    }

    /// The type that a tensor's numbers are written in.
    pub fn of(tensor: &Tensor) -> Option<Self> {
        Some(match tensor.dtype() {
            DType::F64 => Self::F64,
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::I64 => Self::I64,
            DType::I32 => Self::I32,
            DType::U32 => Self::U32,
            DType::U8 => Self::U8,
            _ => return None,
        })
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

type Parsed = (BTreeMap<String, String>, Vec<Entry>);

fn parse(json: &[u8]) -> Result<Parsed, HeaderError> {
    let text = std::str::from_utf8(json)
        .map_err(|error| HeaderError::Json(format!("byte {} is not UTF-8", error.valid_up_to())))?;
    let Pairs(pairs) = serde_json::from_str(text).map_err(|error| HeaderError::Json(error.to_string()))?;
    let mut metadata = BTreeMap::new();
    let mut tensors = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (key, value) in pairs {
        if !seen.insert(key.clone()) {
            return Err(HeaderError::Twice(key));
        }
        if key == "__metadata__" {
            metadata = parse_metadata(value)?;
        } else {
            tensors.push(parse_entry(key, &value)?);
        }
    }
    tensors.sort_by(|a, b| (a.begin, a.end, &a.key).cmp(&(b.begin, b.end, &b.key)));
    Ok((metadata, tensors))
}

/// Values that are not text, which the format does not allow and some programs write, are kept as JSON.
fn parse_metadata(value: Value) -> Result<BTreeMap<String, String>, HeaderError> {
    let entries = match value {
        Value::Object(entries) => entries,
        Value::Null => return Ok(BTreeMap::new()),
        _ => {
            let (key, why) = ("__metadata__".to_string(), "it is no JSON object".to_string());
            return Err(HeaderError::Entry { key, why });
        }
    };
    let text = |value| match value {
        Value::String(text) => Some(text),
        Value::Null => None,
        other => Some(other.to_string()),
    };
    Ok(entries.into_iter().filter_map(|(key, value)| Some((key, text(value)?))).collect())
}

fn parse_entry(key: String, value: &Value) -> Result<Entry, HeaderError> {
    let wrong = |why: &str| HeaderError::Entry { key: key.clone(), why: why.to_string() };
    let name = value["dtype"].as_str().ok_or_else(|| wrong("it has no `dtype`"))?;
    let storage =
        Storage::from_name(name).ok_or_else(|| wrong(&format!("numbers of type `{name}` are not read")))?;
    let list =
        |field: &str| -> Option<Vec<u64>> { value[field].as_array()?.iter().map(Value::as_u64).collect() };
    let shape = list("shape").ok_or_else(|| wrong("its `shape` is no list of sizes"))?;
    let shape = shape.into_iter().map(usize::try_from).collect::<Result<_, _>>();
    let shape = shape.map_err(|_| wrong("its `shape` is too large"))?;
    let (begin, end) = match list("data_offsets").as_deref() {
        Some([begin, end]) => (*begin, *end),
        _ => return Err(wrong("its `data_offsets` are no pair of numbers")),
    };
    Ok(Entry { key, storage, shape, begin, end })
}

/// The entries of a JSON object in order, equal keys kept.
pub(crate) struct Pairs(pub(crate) Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs;

            fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Pairs, M::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.bytes());
        bytes.extend(vec![0; data]);
        bytes
    }

    fn says(bytes: &[u8]) -> String {
        Header::read(&mut Cursor::new(bytes)).unwrap_err().to_string()
    }

    #[test]
    fn each_damage_has_its_own_message() {
        let one = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
        let whole = file(&format!("{{{one}}}"), 8);
        assert!(Header::read(&mut Cursor::new(&whole)).is_ok());
        let entry = |key: &str, dtype: &str, shape: &str, offsets: &str| {
            format!(r#""{key}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        for (bytes, words) in [
            (vec![], "is empty"),
            (vec![1, 2, 3], "not a whole"),
            (b"PK\x03\x04\x14\x00\x00\x00rest".to_vec(), "zip archive"),
            (b"\x80\x02}q\x00(X\x05rest".to_vec(), "pickle"),
            (b"version https://git-lfs".to_vec(), "Git LFS"),
            (vec![254; 64], "header should be 18374403900871474942 bytes"),
            (whole[..whole.len() - 1].to_vec(), "take 8 bytes, the file holds 7"),
            (file(&format!("{{{one}}}"), 9), "take 8 bytes, the file holds 9"),
            (whole[..30].to_vec(), "not a whole"),
            (file("[]", 0), "not readable"),
            (file("{\"a\"", 0), "not readable"),
            (file(&"[".repeat(5000), 0), "not readable"),
            (file("{\"\u{0}", 0), "not readable"),
            (file(&format!("{{{one},{one}}}"), 8), "`a` occurs twice"),
            (file(&format!("{{{one},{}}}", entry("b", "F32", "[1]", "[4,8]")), 8), "lie over another"),
            (file(&format!("{{{one},{}}}", entry("b", "F32", "[1]", "[12,16]")), 16), "leave a hole"),
            (file(&format!("{{{}}}", entry("b", "F32", "[1]", "[8,4]")), 8), "wants 4"),
            (file(&format!("{{{}}}", entry("b", "F32", "[3]", "[0,8]")), 8), "wants 12"),
            (
                file(&format!("{{{}}}", entry("b", "F32", "[4611686018427387904,4]", "[0,8]")), 8),
                "more than fits",
            ),
            (file(&format!("{{{}}}", entry("b", "F32", "[0]", "[9,9]")), 0), "leave a hole"),
            (file(&format!("{{{}}}", entry("b", "Q4", "[1]", "[0,4]")), 4), "type `Q4`"),
            (file(&format!("{{{}}}", entry("b", "F32", "[-1]", "[0,4]")), 4), "no list of sizes"),
            (file(&format!("{{{}}}", entry("b", "F32", "[1]", "[0]")), 4), "no pair"),
            (file(r#"{"__metadata__":7}"#, 0), "no JSON object"),
        ] {
            let said = says(&bytes);
            assert!(said.contains(words), "{said}, wanted {words}");
        }
        let mut binary = file("{\"__metadata__\":{\"a\":\"xx\"}}", 0);
        let at = binary.len() - 5;
        binary[at] = 0xff;
        assert!(says(&binary).contains("not UTF-8"), "{}", says(&binary));
    }

    #[test]
    fn metadata_that_nothing_reads_are_no_reason_to_refuse_a_file() {
        let read = |json: &str| Header::read(&mut Cursor::new(file(json, 0))).unwrap().metadata;
        assert!(read(r#"{"__metadata__":null}"#).is_empty());
        let odd = read(r#"{"__metadata__":{"a":1,"b":null,"c":{"d":[true]},"e":"text"}}"#);
        let kept: Vec<_> = odd.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(kept, [("a", "1"), ("c", r#"{"d":[true]}"#), ("e", "text")]);
        let long = "x".repeat(20_000_000);
        assert_eq!(
            read(&format!(r#"{{"__metadata__":{{"ss_tag_frequency":"{long}"}}}}"#))["ss_tag_frequency"],
            long
        );
    }

    #[test]
    fn every_storage_type_gives_its_numbers() {
        let read = |storage: &str, bytes: &[u8]| {
            let json =
                format!(r#"{{"a":{{"dtype":"{storage}","shape":[1],"data_offsets":[0,{}]}}}}"#, bytes.len());
            let mut all = file(&json, 0);
            all.extend(bytes);
            let mut all = Cursor::new(all);
            let header = Header::read(&mut all).unwrap();
            let tensor = header.load(&mut all, &header.tensors[0]).unwrap();
            tensor.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()[0]
        };
        assert_eq!(read("F64", &(-1.5f64).to_le_bytes()), -1.5);
        assert_eq!(read("F32", &(-1.5f32).to_le_bytes()), -1.5);
        assert_eq!(read("F16", &f16::from_f32(-1.5).to_le_bytes()), -1.5);
        assert_eq!(read("BF16", &bf16::from_f32(-1.5).to_le_bytes()), -1.5);
        assert_eq!(read("I64", &(-3i64).to_le_bytes()), -3.0);
        assert_eq!(read("I32", &(-3i32).to_le_bytes()), -3.0);
        assert_eq!(read("U64", &7u64.to_le_bytes()), 7.0);
        assert_eq!(read("I16", &(-300i16).to_le_bytes()), -300.0);
        assert_eq!(read("U16", &65535u16.to_le_bytes()), 65535.0);
        assert_eq!(read("I8", &[0xfd]), -3.0);
        assert_eq!(read("BOOL", &[1]), 1.0);
        // 1 sign, 4 exponent (bias 7), 3 mantissa: the largest is 448, the smallest 2⁻⁹.
        for (byte, value) in [(0x38, 1.0), (0xbc, -1.5), (0x7e, 448.0), (0x01, 0.001_953_125), (0x80, 0.0)] {
            assert_eq!(read("F8_E4M3", &[byte]), value);
        }
        assert!(read("F8_E4M3", &[0x7f]).is_nan());
        // 1 sign, 5 exponent (bias 15), 2 mantissa.
        for (byte, value) in [(0x3c, 1.0), (0xbe, -1.5), (0x7b, 57344.0)] {
            assert_eq!(read("F8_E5M2", &[byte]), value);
        }
    }
}
