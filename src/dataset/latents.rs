//! Latents of a dataset in a file, a row a person: however many there are, memory holds those of one batch.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::files;
use crate::progress;

/// Latents (M, L) as f32 in the tensor `z` of a safetensors file.
pub struct LatentFile {
    file: Mutex<File>,
    /// Where the first row begins.
    start: u64,
    people: usize,
    width: usize,
}

/// People whose LoRAs are read and encoded at once.
pub const CHUNK: usize = 32;

impl LatentFile {
    /// Opens `path` where it was made from the same `source`, and otherwise makes it; `encode(from, count)` gives rows
    /// (count, L).
    pub fn open_or_make(
        path: &Path,
        source: &Value,
        [people, width]: [usize; 2],
        encode: impl Fn(usize, usize) -> Result<Tensor>,
    ) -> Result<Self> {
        let header = header(source, [people, width])?;
        if let Ok(mut file) = File::open(path) {
            let mut found = vec![0; header.len()];
            let whole = file.metadata()?.len() == (header.len() + 4 * people * width) as u64;
            if whole && file.read_exact(&mut found).is_ok() && found == header {
                return Ok(Self { file: Mutex::new(file), start: header.len() as u64, people, width });
            }
        }
        let cannot = || format!("cannot write `{}`", path.display());
        let mut beside = files::temporary_file(path).with_context(cannot)?;
        beside.write_all(&header).with_context(cannot)?;
        let bar = progress::bar(people as u64, "encoding");
        for from in (0..people).step_by(CHUNK) {
            progress::check()?;
            let count = CHUNK.min(people - from);
            let rows = encode(from, count)?;
            ensure!(
                rows.dims() == [count, width],
                "latents of shape {:?}, wanted {width} values",
                rows.dims()
            );
            let values: Vec<f32> = rows.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
            if let Some(bad) = values.iter().position(|value| !value.is_finite()) {
                let person = from + bad / width;
                anyhow::bail!(
                    "the autoencoder makes values that are not finite of person {person}; train it again"
                );
            }
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            beside.write_all(&bytes).with_context(cannot)?;
            bar.inc(count as u64);
        }
        bar.finish_and_clear();
        let file = beside.persist(path).map_err(|failed| failed.error).with_context(cannot)?;
        Ok(Self { file: Mutex::new(file), start: header.len() as u64, people, width })
    }

    /// The latents of `people` (B, L), in that order.
    pub fn rows(&self, people: &[usize]) -> Result<Tensor> {
        let mut bytes = vec![0u8; 4 * self.width * people.len()];
        {
            let mut file = self.file.lock().expect("nothing panics while it holds the file");
            for (person, row) in people.iter().zip(bytes.chunks_exact_mut(4 * self.width)) {
                ensure!(*person < self.people, "latent {person} of {}", self.people);
                file.seek(SeekFrom::Start(self.start + (4 * self.width * person) as u64))?;
                file.read_exact(row).map_err(|error| {
                    Failure::Unusable(format!("the file of latents cannot be read any more: {error}"))
                })?;
            }
        }
        let values: Vec<f32> = bytes
            .chunks_exact(4)
            .map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]]))
            .collect();
        Ok(Tensor::from_vec(values, (people.len(), self.width), &Device::Cpu)?)
    }

    /// L
    pub fn width(&self) -> usize {
        self.width
    }
}

/// The head of the safetensors file, which says what the latents were made from.
fn header(source: &Value, [people, width]: [usize; 2]) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec(&json!({
        "__metadata__": { "source": source.to_string() },
        "z": { "dtype": "F32", "shape": [people, width], "data_offsets": [0, 4 * people * width] },
    }))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::diffusion::noise::normal;

    #[test]
    fn rows_come_back_from_the_file_that_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("latents.safetensors");
        let all = normal(1, 0, (70, 3), &Device::Cpu).unwrap();
        let made = Cell::new(0);
        let open = |source: &str| {
            LatentFile::open_or_make(&path, &json!(source), [70, 3], |from, count| {
                made.set(made.get() + count);
                Ok(all.narrow(0, from, count)?)
            })
            .unwrap()
        };
        let values = |x: &Tensor| x.to_vec2::<f32>().unwrap();
        for (source, encoded) in [("one", 70), ("one", 70), ("two", 140)] {
            let latents = open(source);
            let picked = all.index_select(&Tensor::new(&[69u32, 0, 33], &Device::Cpu).unwrap(), 0).unwrap();
            assert_eq!(values(&latents.rows(&[69, 0, 33]).unwrap()), values(&picked));
            assert_eq!(made.get(), encoded, "{source}");
            assert!(latents.rows(&[70]).is_err());
        }
        // Others can read it too.
        assert_eq!(values(&crate::weights::read_file(&path).unwrap()["z"]), values(&all));
    }

    #[test]
    fn latents_that_are_not_finite_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("latents.safetensors");
        let bad = |_, count| Ok((Tensor::ones((count, 2), candle_core::DType::F32, &Device::Cpu)? / 0.0)?);
        let error = LatentFile::open_or_make(&path, &json!(1), [3, 2], bad).err().unwrap().to_string();
        assert!(error.contains("not finite") && !path.exists(), "{error}");
    }
}
