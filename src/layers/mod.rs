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
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use difflora::layers::{attention, backward, linear};
//!
//! // y = x·Wᵀ + b, and ∂(Σy)/∂W = Σ x.
//! let x = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
//! let weight = Var::new(&[[1f32, 0.0], [0.0, 3.0]], &Device::Cpu)?;
//! let bias = Tensor::new(&[0.5f32, 0.0], &Device::Cpu)?;
//! let y = linear(&x, &weight, Some(&bias))?;
//! assert_eq!(y.to_vec2::<f32>()?, [[1.5, 6.0]]);
//! let gradients = backward(&y.sum_all()?)?;
//! let gradient = gradients.get(&weight).expect("the sum depends on the weight");
//! assert_eq!(gradient.to_vec2::<f32>()?, [[1.0, 2.0], [1.0, 2.0]]);
//!
//! // Two equal keys: attention gives the mean of their values. (B, N, H·d)
//! let q = Tensor::new(&[[[1f32, 1.0]]], &Device::Cpu)?;
//! let k = Tensor::new(&[[[1f32, 0.0], [1.0, 0.0]]], &Device::Cpu)?;
//! let v = Tensor::new(&[[[2f32, 0.0], [4.0, 8.0]]], &Device::Cpu)?;
//! assert_eq!(attention(&q, &k, &v, 1, false)?.to_vec3::<f32>()?, [[[3.0, 4.0]]]);
//! # anyhow::Ok(())
//! ```

mod activation;
mod attention;
mod backward;
mod clip_transformer;
mod conv;
mod cpu;
mod cuda;
mod gemm;
mod gradient_checkpointing;
mod linear;
mod linear_op;
mod lora_linear;
mod losses;
mod norm;
mod patch_linear;
mod runtime;
mod tokens;
mod visit;
mod winograd;

pub use activation::{Activation, geglu, upsample_nearest2x};
pub use attention::attention;
pub use backward::backward;
pub use clip_transformer::{ClipTransformer, ClipTransformerSizes};
pub use conv::{Conv2d, ConvGeometry};
pub(crate) use cpu::vectorised;
pub use cuda::{adamw_on_gpu, blend_on_gpu, square_sums};
pub use gemm::add_low_rank;
pub use gradient_checkpointing::{Pass, checkpointed};
pub use linear::Linear;
pub use linear_op::linear;
pub use lora_linear::Adapter;
pub use losses::reconstruction_errors;
pub use norm::{GroupNorm, GroupStatistics, LayerNorm, layer_norm_modulated, layer_norm_plain};
pub use patch_linear::{Correction, expand_patches, project_patches};
pub use runtime::{keep_freed_memory, let_waiting_threads_sleep};
pub use tokens::{add_to_channels, image_to_tokens, tokens_to_image};
pub use visit::{Layer, Visit};

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
    gemm::isa::instruction_set()
}

/// Whether oneDNN's library is found; nothing in builds without the feature `onednn`.
pub fn onednn_library() -> Option<bool> {
    #[cfg(feature = "onednn")]
    return Some(gemm::onednn::is_available());
    #[cfg(not(feature = "onednn"))]
    None
}

/// A weight in the type of `x`.
fn like(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    if weight.dtype() == x.dtype() { Ok(weight.clone()) } else { weight.to_dtype(x.dtype()) }
}
