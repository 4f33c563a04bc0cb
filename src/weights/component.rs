//! The tensors of a component: read by name from all its files, and handed to a network under construction.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

use super::assembled::{Form, Place};
use super::model_folder::ModelFiles;
use super::safetensors::Stored;

/// The tensors of all parts of a component.
#[derive(Default)]
pub(super) struct Weights {
    pub(super) parts: Vec<Stored>,
    /// Where they lie, when not under their own names.
    pub(super) places: Option<BTreeMap<String, Place>>,
}

impl Weights {
    pub(super) fn names(&self) -> BTreeSet<String> {
        match &self.places {
            Some(places) => places.keys().cloned().collect(),
            None => self.parts.iter().flat_map(Stored::names).map(String::from).collect(),
        }
    }

    fn contains(&self, name: &str) -> bool {
        match &self.places {
            Some(places) => places.contains_key(name),
            None => self.parts.iter().any(|part| part.contains(name)),
        }
    }

    /// Where the tensor `name` lies.
    fn find(&self, name: &str) -> Option<(Place, &Stored)> {
        let place = match &self.places {
            Some(places) => places.get(name)?.clone(),
            None => Place::new(name, Form::Whole),
        };
        let part = self.parts.iter().find(|part| part.contains(&place.stored))?;
        Some((place, part))
    }

    /// Whether the tensor `name` is stored as f16.
    pub(super) fn is_half(&self, name: &str) -> bool {
        self.find(name).is_some_and(|(place, part)| place.scale.is_none() && part.is_half(&place.stored))
    }

    /// The tensor `name` on the CPU, as `dtype` or as stored.
    pub(super) fn load(&self, name: &str, dtype: Option<DType>) -> candle_core::Result<Tensor> {
        let Some((place, part)) = self.find(name) else { candle_core::bail!("there is no tensor `{name}`") };
        let Some(scale) = &place.scale else { return place.form.take(part.load(&place.stored, dtype)?) };
        let stored = part.load(&place.stored, Some(DType::F32))?;
        let scale = part.load(scale, Some(DType::F32))?.flatten_all()?;
        let scale = match scale.elem_count() {
            1 => scale.reshape(vec![1; stored.rank()])?,
            rows => {
                let mut shape = vec![1; stored.rank()];
                shape[0] = rows;
                scale.reshape(shape)?
            }
        };
        let scaled = place.form.take(stored.broadcast_mul(&scale)?)?;
        dtype.map_or(Ok(scaled.clone()), |dtype| scaled.to_dtype(dtype))
    }
}

/// The tensors of a component, read one by one; see [`ModelFiles::reader`].
pub struct TensorReader<'a> {
    pub(super) files: &'a ModelFiles,
    /// What messages call the file.
    pub(super) file: String,
    pub(super) weights: Weights,
}

impl TensorReader<'_> {
    /// All names.
    pub fn names(&self) -> BTreeSet<String> {
        self.weights.names()
    }

    /// The shape of the tensor `name`, without reading it.
    ///
    /// # Errors
    /// [`crate::failure::Failure::Unusable`] when there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self
            .weights
            .find(name)
            .and_then(|(place, part)| Some(place.form.shape(part.shape(&place.stored)?)))
        {
            Some(shape) => Ok(shape),
            None => Err(self.unusable(format!("the tensor `{name}` is missing"))),
        }
    }

    /// The tensor `name` on the CPU, as `dtype` or as it is stored.
    ///
    /// # Errors
    /// [`crate::failure::Failure::Unusable`] when it is missing, or holds NaN or infinity.
    pub fn load(&self, name: &str, dtype: Option<DType>) -> Result<Tensor> {
        self.weights.load(name, dtype).map_err(|error| self.unusable(error))
    }

    /// An error about the file.
    pub fn unusable(&self, why: impl std::fmt::Display) -> anyhow::Error {
        self.files.unusable(&self.file, why)
    }
}

/// `stem.safetensors.index.json`: which part each tensor lies in.
#[derive(serde::Deserialize)]
pub(super) struct ShardIndex {
    pub(super) weight_map: BTreeMap<String, String>,
}

/// Weights, and the names that a network asked for.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) weights: Weights,
    /// Whether to give zeros, once a tensor has been looked at.
    pub(super) only_check: bool,
    /// Whether what is stored as f16 stays so.
    pub(super) halves: bool,
    pub(super) asked: Mutex<BTreeSet<String>>,
}

/// A [`Ledger`] as the source of a network's weights.
pub(super) struct Entries(pub(super) Arc<Ledger>);

impl SimpleBackend for Entries {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.0.asked.lock().expect("no thread panics while it holds the names").insert(name.to_string());
        if !self.0.weights.contains(name) {
            // All missing tensors are reported together once the network is built.
            return Tensor::zeros(shape, dtype, device);
        }
        let dtype = if self.0.halves && self.0.weights.is_half(name) { DType::F16 } else { dtype };
        let tensor = self.0.weights.load(name, Some(dtype))?;
        if tensor.shape() != &shape {
            candle_core::bail!("tensor `{name}` has shape {:?}, wanted {shape:?}", tensor.shape());
        }
        if self.0.only_check {
            return Tensor::zeros((), dtype, device)?.broadcast_as(shape);
        }
        tensor.to_device(device)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("tensor `{name}` was asked for without its shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.weights.contains(name)
    }
}
