//! `FILE[:WEIGHT]`: a LoRA file with its weight.

use std::path::PathBuf;

use anyhow::Result;

use super::adapter::AdapterFile;
use super::block_weights::BlockWeights;
use super::file::Reading;

/// A LoRA file and the weight that it is added with.
pub struct WeightedFile {
    /// The file.
    pub path: PathBuf,
    /// Its contents.
    pub adapters: AdapterFile,
    /// Weight by part of the model.
    pub weights: BlockWeights,
    /// The weight as it was given; `1` where none was.
    pub weight: String,
}

impl WeightedFile {
    /// Reads the file of an argument `FILE[:WEIGHT]`.
    ///
    /// # Errors
    /// As [`BlockWeights::split`] and [`Reading::read`].
    pub fn read(argument: &str, reading: &Reading) -> Result<Self> {
        let (path, weights) = BlockWeights::split(argument)?;
        let adapters = reading.read(&path)?;
        let weight = argument.strip_prefix(&format!("{}:", path.display())).unwrap_or("1").to_string();
        Ok(Self { path, adapters, weights, weight })
    }
}
