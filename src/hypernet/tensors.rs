//! The weights of a hypernetwork folder by name.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use crate::files::write_whole;
use crate::weights::model_folder::ModelFiles;

/// The weights of networks by name, for a file.
#[derive(Clone, Debug)]
pub(super) enum Weights {
    /// Of networks that were trained here.
    Held(BTreeMap<String, Tensor>),
    /// Of networks that were read: read again where they are to be written, so that they are not in memory twice.
    In(ModelFiles),
}

impl Weights {
    pub(super) fn by_name(&self, stem: &str) -> Result<BTreeMap<String, Tensor>> {
        match self {
            Self::Held(weights) => Ok(weights.clone()),
            Self::In(files) => Ok(files.tensors("", stem)?.into_iter().collect()),
        }
    }
}

/// Writes tensors by name; floating ones as `dtype`.
pub(super) fn write_tensors(path: &Path, tensors: BTreeMap<String, Tensor>, dtype: DType) -> Result<()> {
    let mut stored = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = tensor.to_device(&Device::Cpu)?;
        let tensor = if tensor.dtype().is_float() { tensor.to_dtype(dtype)? } else { tensor };
        stored.insert(name, tensor.contiguous()?);
    }
    let bytes = safetensors::serialize(stored, None).context("cannot serialise the weights")?;
    write_whole(path, &bytes)
}
