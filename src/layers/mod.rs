//! The layers that every network here is built of, differentiable and fast on the CPU.
//!
//! candle's own fused LayerNorm and softmax have no backward pass, and gradients stop there without an error;
//! its convolution backward is several times slower than needed. So each operation here has one form for f32 on
//! the CPU, with a hand-written gradient (held against PyTorch by a test), and a composite form of candle
//! operations for every other device and type.
//!
//! A weight that is no variable gets no gradient: nothing is computed for frozen models.
//!
//! Weights of 16 bits follow the type of what they are applied to. On the CPU that is f32 ([`compute_dtype`]): a model
//! takes half the memory, and its weights are widened as products pack them. Where they are bf16 and the processor
//! multiplies bf16 (AVX-512 BF16), the other operand is rounded to bf16 too, and products are summed in f32 at twice
//! the speed, by oneDNN in builds with the feature `onednn`. Elsewhere activations have 16 bits as well; statistics of
//! norms and softmax are kept in f32.

mod activation;
mod adapted;
mod attention;
mod clip_transformer;
mod conv;
mod gathered;
mod linear;
mod low_rank;
mod memory;
mod norm;
#[cfg(feature = "onednn")]
mod onednn;
mod patchwise;
mod product;
mod recompute;
mod reconstruction;
mod slices;
mod thin;
mod tile;
mod tokens;
mod waiting;
mod winograd;

pub use activation::{Activation, geglu, upsample_nearest2x};
pub use attention::attention;
pub use clip_transformer::{ClipTransformer, ClipTransformerSizes};
pub use conv::{Conv2d, ConvGeometry};
pub use gathered::backward;
pub use linear::{Adapter, Linear, linear};
pub use low_rank::add_low_rank;
pub use memory::keep_freed_memory;
pub use norm::{GroupNorm, GroupStatistics, LayerNorm, layer_norm_plain};
pub use patchwise::{Correction, expand_patches, project_patches};
pub use recompute::{Pass, recomputed};
pub use reconstruction::reconstruction_errors;
pub(crate) use slices::vectorised;
pub use tokens::{add_to_channels, pixels, tokens};
pub use waiting::let_waiting_threads_sleep;

use candle_core::{DType, Device, Result, Tensor};

/// The type in which activations are computed where weights of type `stored` lie on `device`.
pub fn compute_dtype(stored: DType, device: &Device) -> DType {
    match device {
        Device::Cpu => DType::F32,
        _ => stored,
    }
}

/// The instruction set that the CPU kernels use on this machine.
pub fn instruction_set() -> &'static str {
    tile::instruction_set()
}

/// Whether oneDNN's library is found; nothing in builds without the feature `onednn`.
pub fn onednn_library() -> Option<bool> {
    #[cfg(feature = "onednn")]
    return Some(onednn::is_available());
    #[cfg(not(feature = "onednn"))]
    None
}

/// A weight in the type of `x`.
fn like(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    if weight.dtype() == x.dtype() { Ok(weight.clone()) } else { weight.to_dtype(x.dtype()) }
}

/// A layer that an adapter may change, as its network shows it.
pub enum Layer<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// A convolution.
    Conv(&'a mut Conv2d),
    /// GroupNorm or LayerNorm; both (C).
    Norm {
        /// What the normalised values are multiplied by.
        weight: &'a mut Tensor,
        /// What is then added.
        bias: &'a mut Tensor,
    },
}

/// What a network calls with each of its layers and its path.
pub type Visit<'a> = dyn FnMut(&str, Layer) + 'a;

impl Layer<'_> {
    /// Its weight; the first axis are the outputs.
    pub fn weight(&self) -> &Tensor {
        match self {
            Self::Linear(layer) => &layer.weight,
            Self::Conv(layer) => &layer.weight,
            Self::Norm { weight, .. } => weight,
        }
    }

    /// Its bias (out), where it has one.
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Linear(layer) => layer.bias.as_ref(),
            Self::Conv(layer) => layer.bias.as_ref(),
            Self::Norm { bias, .. } => Some(bias),
        }
    }

    /// Sets its weight, and its bias where it can be without.
    pub fn set(&mut self, new_weight: Tensor, new_bias: Option<Tensor>) {
        match self {
            Self::Linear(layer) => (layer.weight, layer.bias) = (new_weight, new_bias),
            Self::Conv(layer) => (layer.weight, layer.bias) = (new_weight, new_bias),
            Self::Norm { weight, bias } => {
                **weight = new_weight;
                if let Some(new_bias) = new_bias {
                    **bias = new_bias;
                }
            }
        }
    }

    /// Sets or takes off the adapter beside it; a norm has none.
    pub fn set_adapter(&mut self, adapter: Option<Adapter>) {
        match self {
            Self::Linear(layer) => layer.adapter = adapter,
            Self::Conv(layer) => layer.adapter = adapter,
            Self::Norm { .. } => {}
        }
    }
}
