//! Weights on their way into networks: frozen ones from files, trainable ones from a seed.
//!
//! Every network here is built by `new(config, vb)` from a [`VarBuilder`]. [`frozen`] gives plain tensors,
//! through which no gradient is computed for the weight; [`Trainable`] gives variables and remembers them by name.

pub mod assembled;
mod component;
pub mod header;
pub mod hub;
pub mod model_folder;
pub mod model_id;
mod safetensors;
pub mod sha256;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::files;
use crate::limits;
use header::{Header, Storage};

/// The tensors of a `.safetensors` file, as stored.
///
/// # Errors
/// [`Failure::Unusable`] when the file is missing, truncated or not safetensors.
pub fn read_file(path: &Path) -> Result<HashMap<String, Tensor>> {
    let bytes = files::read_input(path, u64::MAX)?;
    read_bytes(&bytes).map_err(|error| Failure::unusable(path, format!("{error:#}")))
}

/// The tensors of a `.safetensors` file that is in memory, as stored.
pub fn read_bytes(bytes: &[u8]) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load_buffer(bytes, &Device::Cpu).context("not a readable safetensors file")
}

/// Writes a `.safetensors` file of f32 tensors (name, shape, values), sorted by name.
///
/// # Errors
/// The file cannot be written.
pub fn write_f32<'a>(
    path: &Path,
    metadata: impl IntoIterator<Item = (&'a str, String)>,
    tensors: impl IntoIterator<Item = (&'a str, Vec<usize>, &'a [f32])>,
) -> Result<()> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by_key(|(name, ..)| *name);
    let metadata = metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    let entries = tensors.iter().map(|(name, shape, _)| (*name, Storage::F32, &shape[..]));
    let mut bytes = Header::of(metadata, entries).to_bytes();
    let values = tensors.iter().flat_map(|(_, _, values)| values.iter());
    bytes.extend(values.flat_map(|value| value.to_le_bytes()));
    files::write_whole(path, &bytes)
}

/// Tensors as the source of a network's weights; they get no gradients.
pub fn frozen(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors, dtype, device)
}

/// Weights that train: variables by name, made on first use from a seed and the layer's own initialisation.
///
/// candle's `VarMap` draws from an unseedable generator on the CPU; here the value of a variable depends on
/// the seed and its name alone, not on the order in which layers are built.
pub struct Trainable {
    seed: u64,
    vars: Mutex<BTreeMap<String, Var>>,
    /// Why a network was refused.
    refused: Mutex<Option<anyhow::Error>>,
}

impl Trainable {
    /// No variables yet; they appear as networks are built from [`Trainable::builder`].
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self { seed, vars: Mutex::default(), refused: Mutex::default() })
    }

    /// A builder whose every tensor is a variable of `self`.
    pub fn builder(self: &Arc<Self>, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Source(self.clone())), DType::F32, device.clone())
    }

    /// A network that was built from [`Trainable::builder`].
    ///
    /// # Errors
    /// [`Failure::Usage`](crate::failure::Failure) for one of which the training fits no memory; any other error of
    /// `built`.
    pub fn checked<T, E: Into<anyhow::Error>>(&self, built: std::result::Result<T, E>) -> Result<T> {
        let refused = || self.refused.lock().ok()?.take();
        built.map_err(|error| refused().unwrap_or_else(|| error.into()))
    }

    /// # Errors
    /// As [`Trainable::checked`], for the variables so far and one of `shape`.
    fn require_memory(&self, vars: &BTreeMap<String, Var>, shape: &Shape) -> Result<()> {
        // The shape of a refused network may hold more numbers than there are.
        let numbers = shape.dims().iter().fold(1usize, |all, side| all.saturating_mul(*side));
        let numbers = vars.values().map(|var| var.elem_count()).fold(numbers, usize::saturating_add);
        // Weight, gradient, two moments and average, in f32.
        limits::require_memory("the network and its training state", &[numbers, 5, 4], "its sizes")
    }

    /// All variables by name.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        self.vars.lock().expect("no thread panics while it holds the variables").clone()
    }

    /// Sets every variable from `tensors`.
    ///
    /// # Errors
    /// A name that is missing, left over, or of another shape.
    pub fn load(&self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let vars = self.vars();
        for (name, var) in &vars {
            let tensor = tensors.get(name).with_context(|| format!("tensor `{name}` is missing"))?;
            anyhow::ensure!(
                tensor.shape() == var.shape(),
                "tensor `{name}` has shape {:?}, wanted {:?}",
                tensor.shape(),
                var.shape()
            );
            var.set(&tensor.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
        if let Some(extra) = tensors.keys().find(|name| !vars.contains_key(*name)) {
            anyhow::bail!("tensor `{extra}` belongs to no layer");
        }
        Ok(())
    }
}

struct Source(Arc<Trainable>);

impl SimpleBackend for Source {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut vars = self.0.vars.lock().expect("no thread panics while it holds the variables");
        if let Some(var) = vars.get(name) {
            if var.shape() != &shape {
                candle_core::bail!("`{name}` was made with shape {:?}, asked for {shape:?}", var.shape());
            }
            return Ok(var.as_tensor().clone());
        }
        if let Err(error) = self.0.require_memory(&vars, &shape) {
            let text = error.to_string();
            *self.0.refused.lock().expect("no thread panics while it holds the reason") = Some(error);
            candle_core::bail!("{text}");
        }
        let var =
            Var::from_tensor(&initial(self.0.seed, name, &shape, init)?.to_dtype(dtype)?.to_device(device)?)?;
        let tensor = var.as_tensor().clone();
        vars.insert(name.to_string(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("`{name}`: a trainable weight needs a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// The value of `init` for the variable `name`, from ChaCha8 keyed by SHA-256 of seed and name.
fn initial(seed: u64, name: &str, shape: &Shape, init: Init) -> candle_core::Result<Tensor> {
    let mut key = Sha256::new();
    key.update(seed.to_le_bytes());
    key.update(name.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(key.finalize().into());
    let count = shape.elem_count();
    let uniform = |rng: &mut ChaCha8Rng, low: f64, high: f64| -> Vec<f32> {
        (0..count).map(|_| (low + (high - low) * rng.random::<f64>()) as f32).collect()
    };
    let normal = |rng: &mut ChaCha8Rng, mean: f64, std: f64| -> Vec<f32> {
        (0..count).map(|_| (mean + std * rng.sample::<f64, _>(StandardNormal)) as f32).collect()
    };
    let values = match init {
        Init::Const(value) => vec![value as f32; count],
        Init::Uniform { lo, up } => uniform(&mut rng, lo, up),
        Init::Randn { mean, stdev } => normal(&mut rng, mean, stdev),
        Init::Kaiming { dist, fan, non_linearity } => {
            let std = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                candle_nn::init::NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * std;
                    uniform(&mut rng, -bound, bound)
                }
                candle_nn::init::NormalOrUniform::Normal => normal(&mut rng, 0.0, std),
            }
        }
    };
    Tensor::from_vec(values, shape, &Device::Cpu)
}
