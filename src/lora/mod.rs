//! LoRA: a small change ΔW = (alpha / R) · up · down to the linear layers of a model (Hu et al. 2021).
//!
//! [`file`] reads and writes the files that other programs exchange, [`keys`] knows their spellings, [`adapter`]
//! every kind of adapter that they hold, [`canonical`] brings its factors to one form, [`layout`] turns a
//! LoRA into the flat vector that the hypernetwork learns and back, [`apply`] puts all of them into a model,
//! [`checkpoint`] into its weight files, [`extract`] finds them between two models, [`arithmetic`] adds, shortens and
//! compares them.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use difflora::lora::layout::LoraLayout;
//! use difflora::lora::{Lora, LoraLayer};
//!
//! // ΔW = (alpha / R) · up · down with R = 1.
//! let module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q";
//! let down = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
//! let up = Tensor::new(&[[3f32], [4.0]], &Device::Cpu)?;
//! let layer = LoraLayer::new(module, down, up, 2.0)?;
//! assert_eq!(layer.delta()?.to_vec2::<f32>()?, [[6.0, 12.0], [8.0, 16.0]]);
//!
//! // The vector that the hypernetwork learns: `up`, then `down` transposed; and back.
//! let mut lora = Lora::default();
//! lora.layers.insert(module.into(), layer);
//! let layout = LoraLayout::of(&lora);
//! let vector = layout.to_vector(&lora)?;
//! assert_eq!(vector, [3.0, 4.0, 1.0, 2.0]);
//! assert_eq!(layout.from_vector(&vector)?.layers[module].shape(), (2, 2));
//! # anyhow::Ok(())
//! ```
//!
#![doc = include_str!("../docs/lora-files.md")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

pub mod file;
mod foreign;
pub mod keys;
pub mod ldm_keys;
pub mod metadata;
mod parts;
mod peft_config;

pub mod adapter;
pub mod embedding;

pub mod canonical;
pub mod layout;

pub mod apply;
pub mod block_weights;
pub mod checkpoint;
pub mod weighted_file;

pub mod arithmetic;
pub mod extract;
pub mod low_rank;
pub mod named;
pub mod summary;
mod tensor_products;

mod error;

pub use error::LoraError;
pub(crate) use error::{listed, listed_for_user};

/// A LoRA: changes to linear layers, and what is known about their origin.
#[derive(Clone, Debug, Default)]
pub struct Lora {
    /// By module path as diffusers spells it. The UNet's come without prefix
    /// (`down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`), those of the text encoders begin with
    /// `text_encoder.` or `text_encoder_2.`.
    pub layers: BTreeMap<String, LoraLayer>,
    /// The file's metadata: `ss_…`, `modelspec.…`, `difflora.…`.
    pub metadata: BTreeMap<String, String>,
}

/// The change of one linear layer.
#[derive(Clone, Debug)]
pub struct LoraLayer {
    /// A, (R, in).
    pub down: Tensor,
    /// B, (out, R).
    pub up: Tensor,
    /// ΔW is scaled by alpha / R.
    pub alpha: f32,
}

impl Lora {
    /// The words in a prompt that call the person, where the file tells them.
    pub fn trigger_phrase(&self) -> Option<&str> {
        self.metadata.get(metadata::TRIGGER_PHRASE).map(String::as_str)
    }

    /// All factors in another number type and on another device.
    pub fn to(&self, dtype: DType, device: &Device) -> candle_core::Result<Self> {
        let convert = |tensor: &Tensor| tensor.to_device(device)?.to_dtype(dtype);
        let mut lora = self.clone();
        for layer in lora.layers.values_mut() {
            (layer.down, layer.up) = (convert(&layer.down)?, convert(&layer.up)?);
        }
        Ok(lora)
    }
}

impl LoraLayer {
    /// A layer from its two factors, `down` (R, in) and `up` (out, R).
    ///
    /// # Errors
    /// [`LoraError::Factors`] when they do not fit each other, named by `module`.
    pub fn new(module: &str, down: Tensor, up: Tensor, alpha: f32) -> Result<Self, LoraError> {
        match (down.dims(), up.dims()) {
            ([rank, _], [_, same]) if rank == same && *rank > 0 => Ok(Self { down, up, alpha }),
            (a, b) => {
                let (down, up) = (a.to_vec(), b.to_vec());
                Err(LoraError::Factors { module: module.to_string(), down, up })
            }
        }
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.down.dims()[0]
    }

    /// (out, in) of the linear layer that it changes.
    pub fn shape(&self) -> (usize, usize) {
        (self.up.dims()[0], self.down.dims()[1])
    }

    /// alpha / R.
    pub fn scale(&self) -> f64 {
        f64::from(self.alpha) / self.rank() as f64
    }

    /// ΔW = (alpha / R) · up · down, (out, in) in f32.
    pub fn delta(&self) -> candle_core::Result<Tensor> {
        self.up.to_dtype(DType::F32)?.matmul(&self.down.to_dtype(DType::F32)?)? * self.scale()
    }
}
