//! One `.safetensors` file, read tensor by tensor.
//!
//! It is read and not mapped: pages of a mapped file count as the program's memory beside the tensors that are made of
//! them, which for SDXL in half precision is half as much again. Each tensor is read in pieces by all threads, and a
//! piece is widened to its place in the tensor while it lies in the processor's cache.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, WithDType};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::weights::header::{Entry, Header, HeaderError, Storage};

/// Numbers that are read and widened at a time: 64 or 128 KiB of the file.
const PIECE: usize = 1 << 15;

/// A file whose header has been read.
pub struct Stored {
    bytes: Bytes,
    header: Header,
    /// Where in the header each tensor stands.
    index: HashMap<String, usize>,
}

enum Bytes {
    File(File),
    InProgram(&'static [u8]),
}

impl Stored {
    /// Reads the header.
    pub fn open(path: &Path) -> std::result::Result<Self, HeaderError> {
        let mut file = crate::files::open_input(path)?;
        let header = Header::read(&mut file)?;
        Ok(Self::new(Bytes::File(file), header))
    }

    /// A file that lies in the program.
    pub fn in_program(bytes: &'static [u8]) -> std::result::Result<Self, HeaderError> {
        let header = Header::read(&mut Cursor::new(bytes))?;
        Ok(Self::new(Bytes::InProgram(bytes), header))
    }

    fn new(bytes: Bytes, header: Header) -> Self {
        let index = header.tensors.iter().enumerate().map(|(i, entry)| (entry.key.clone(), i)).collect();
        Self { bytes, header, index }
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.iter().map(|entry| entry.key.as_str())
    }

    /// Whether it holds this tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The shape of the tensor `name`.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.index.get(name).map(|i| self.header.tensors[*i].shape.as_slice())
    }

    /// Whether the tensor `name` is stored as f16.
    pub fn is_half(&self, name: &str) -> bool {
        self.index.get(name).is_some_and(|i| self.header.tensors[*i].storage == Storage::F16)
    }

    /// The tensor `name` on the CPU, as `dtype` or as stored.
    ///
    /// # Errors
    /// A tensor that is not there, cannot be read, or holds NaN or infinity.
    pub fn load(&self, name: &str, dtype: Option<DType>) -> Result<Tensor> {
        let Some(entry) = self.index.get(name).map(|i| &self.header.tensors[*i]) else {
            candle_core::bail!("there is no tensor `{name}`")
        };
        let own = match entry.storage {
            Storage::F32 => DType::F32,
            Storage::F16 => DType::F16,
            Storage::BF16 => DType::BF16,
            _ => return self.load_rare(entry, dtype),
        };
        let count: usize = entry.shape.iter().product();
        // Zeros of plain numbers are memory that has not been touched yet.
        match dtype.unwrap_or(own) {
            DType::F32 => self.read(entry, vec![0f32; count], |from, to, _| widen(entry.storage, from, to)),
            DType::F16 => {
                self.read(entry, vec![0u16; count].reinterpret_into(), |from, to: &mut [f16], wide| {
                    widen(entry.storage, from, wide) && {
                        to.convert_from_f32_slice(wide);
                        true
                    }
                })
            }
            DType::BF16 => {
                self.read(entry, vec![0u16; count].reinterpret_into(), |from, to: &mut [bf16], wide| {
                    widen(entry.storage, from, wide) && {
                        to.convert_from_f32_slice(wide);
                        true
                    }
                })
            }
            other => self.load(name, Some(own))?.to_dtype(other),
        }
    }

    /// Reads a tensor piece by piece over `numbers`; `convert` is given a piece's bytes, the piece, and room for as many
    /// f32, and says whether all numbers are finite.
    fn read<T: WithDType>(
        &self,
        entry: &Entry,
        mut numbers: Vec<T>,
        convert: impl Fn(&[u8], &mut [T], &mut [f32]) -> bool + Sync,
    ) -> Result<Tensor> {
        let place = self.header.place(entry);
        let width = if entry.storage == Storage::F32 { 4 } else { 2 };
        let room = || (vec![0u8; width * PIECE], vec![0f32; PIECE]);
        numbers.par_chunks_mut(PIECE).enumerate().try_for_each_init(room, |(bytes, wide), (i, piece)| {
            let bytes = &mut bytes[..width * piece.len()];
            self.bytes.read_exact_at(bytes, place.start + (i * width * PIECE) as u64)?;
            let wide = &mut wide[..piece.len()];
            if convert(bytes, piece, wide) { Ok(()) } else { Err(not_finite(entry)) }
        })?;
        Tensor::from_vec(numbers, entry.shape.as_slice(), &Device::Cpu)
    }

    /// A tensor of a type that networks seldom have.
    fn load_rare(&self, entry: &Entry, dtype: Option<DType>) -> Result<Tensor> {
        let place = self.header.place(entry);
        let mut bytes = vec![0; (place.end - place.start) as usize];
        self.bytes.read_exact_at(&mut bytes, place.start)?;
        let whole = match entry.storage {
            Storage::I64 => Some(DType::I64),
            Storage::I32 => Some(DType::I32),
            Storage::U32 => Some(DType::U32),
            Storage::U8 => Some(DType::U8),
            _ => None,
        };
        let tensor = match whole {
            Some(whole) => Tensor::from_raw_buffer(&bytes, whole, &entry.shape, &Device::Cpu)?,
            None => entry.decode(&bytes).map_err(candle_core::Error::wrap)?,
        };
        if whole.is_none() && !tensor.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite()
        {
            return Err(not_finite(entry));
        }
        dtype.map_or(Ok(tensor.clone()), |dtype| tensor.to_dtype(dtype))
    }
}

fn not_finite(entry: &Entry) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "tensor `{}` holds NaN or infinity; the file is damaged, or was saved from a training that failed",
        entry.key
    ))
}

/// Little-endian numbers as f32; whether all are finite.
fn widen(storage: Storage, from: &[u8], to: &mut [f32]) -> bool {
    match storage {
        Storage::F32 => {
            for (to, from) in to.iter_mut().zip(from.as_chunks().0) {
                *to = f32::from_le_bytes(*from);
            }
        }
        Storage::BF16 => {
            for (to, from) in to.iter_mut().zip(from.as_chunks().0) {
                *to = f32::from_bits(u32::from(u16::from_le_bytes(*from)) << 16);
            }
        }
        _ => {
            let mut bits = [0u16; 1 << 10];
            for (to, from) in to.chunks_mut(bits.len()).zip(from.chunks(2 * bits.len())) {
                let bits = &mut bits[..to.len()];
                for (bits, from) in bits.iter_mut().zip(from.as_chunks().0) {
                    *bits = u16::from_le_bytes(*from);
                }
                bits.reinterpret_cast::<f16>().convert_to_f32_slice(to); // F16C where the processor has it
            }
        }
    }
    // NaN and infinity have all bits of the exponent set. No early exit, so that it is computed eight at a time.
    let exponent = 0x7f80_0000;
    !to.iter().fold(false, |found, x| found | (x.to_bits() & exponent == exponent))
}

impl Bytes {
    fn read_exact_at(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => read_exact_at(file, to, offset),
            Self::InProgram(bytes) => {
                let from = bytes.get(offset as usize..).unwrap_or_default();
                (&from[..]).read_exact(to)
            }
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, to: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, to, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut to: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !to.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, to, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                to = &mut to[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(tensor: &Tensor) -> (tempfile::NamedTempFile, Stored) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), safetensors::serialize([("a", tensor)], None).unwrap()).unwrap();
        let opened = Stored::open(file.path()).unwrap();
        (file, opened)
    }

    const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    #[test]
    fn every_float_type_is_read_as_every_other_over_more_than_one_piece() {
        let values: Vec<f32> = (0..PIECE + 1000).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let values = Tensor::from_vec(values, (PIECE + 1000, 1), &Device::Cpu).unwrap();
        for own in FLOATS {
            let tensor = values.to_dtype(own).unwrap();
            let (_file, stored) = stored(&tensor);
            assert_eq!(stored.load("a", None).unwrap().dtype(), own);
            for wanted in FLOATS.into_iter().chain([DType::F64]) {
                let numbers = |x: &Tensor| {
                    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()
                };
                let read = stored.load("a", Some(wanted)).unwrap();
                assert_eq!((read.dtype(), read.dims()), (wanted, tensor.dims()));
                assert_eq!(
                    numbers(&read),
                    numbers(&tensor.to_dtype(wanted).unwrap()),
                    "{own:?} as {wanted:?}"
                );
            }
        }
    }

    #[test]
    fn whole_numbers_stay_whole() {
        let tensor = Tensor::new(&[[1u32, 4_000_000_000]], &Device::Cpu).unwrap();
        let (_file, stored) = stored(&tensor);
        let read = stored.load("a", None).unwrap();
        assert_eq!(read.to_vec2::<u32>().unwrap(), tensor.to_vec2::<u32>().unwrap());
    }

    #[test]
    fn nan_and_infinity_are_found_in_every_float_type_and_large_numbers_are_not() {
        for own in FLOATS {
            for (value, fine) in [(6e4, true), (-0.0, true), (f32::NAN, false), (f32::NEG_INFINITY, false)] {
                let tensor = Tensor::new(&[1f32, value, 2.0], &Device::Cpu).unwrap().to_dtype(own).unwrap();
                let (_file, stored) = stored(&tensor);
                for wanted in FLOATS {
                    let read = stored.load("a", Some(wanted));
                    assert_eq!(read.is_ok(), fine, "{value} of {own:?} as {wanted:?}");
                    if let Err(error) = read {
                        assert!(error.to_string().contains("`a` holds NaN or infinity"), "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_file_that_was_cut_short_since_it_was_opened_is_an_error() {
        let (file, stored) = stored(&Tensor::ones(1000, DType::F32, &Device::Cpu).unwrap());
        std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(500).unwrap();
        assert!(stored.load("a", Some(DType::F16)).is_err());
    }
}
