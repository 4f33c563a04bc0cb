//! Kernels for CUDA: norms, activations, GEGLU, attention without the score matrix, and what lies between them, forward
//! and backward, in f32, f16 and bf16 with sums and statistics in f32.
//!
//! `kernels/*.cu` are the kernels, `ops.rs` says which of them an operation runs and in what sizes, `call.rs` checks a
//! launch against CUDA's limits, `gpu.rs` (feature `cuda`) runs it. The operations are those of the CPU kernels and are
//! chosen in the same places. Tests build the kernels for the CPU and hold them against those.

#[cfg(any(feature = "cuda", test))]
mod call;
#[cfg(feature = "cudnn")]
pub(super) mod convolution;
#[cfg(all(test, unix))]
mod emulated;
#[cfg(feature = "cuda")]
pub(super) mod gpu;
#[cfg(any(feature = "cuda", test))]
pub(super) mod ops;

use candle_core::{DType, Tensor};

/// Whether the CUDA kernels apply to `x`.
pub(super) fn applies(x: &Tensor) -> bool {
    cfg!(feature = "cuda")
        && x.device().is_cuda()
        && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// Whether `tensors` are all f32 on a GPU, each in one piece, so that the optimiser's kernels apply.
#[cfg(feature = "cuda")]
fn are_f32<const N: usize>(tensors: [&Tensor; N]) -> bool {
    tensors.iter().all(|x| applies(x) && x.dtype() == DType::F32 && x.is_contiguous() && x.elem_count() > 0)
}

/// One step of AdamW in place on [weight, first moment, second moment] by the gradient, with the constants [β₁, β₂, factor
/// of the gradient, factor of its square, factor of the weight, step, root, ε]; `false` where there is no kernel for them.
pub fn adamw_on_gpu(tensors: [&Tensor; 4], constants: [f32; 8]) -> candle_core::Result<bool> {
    #[cfg(feature = "cuda")]
    if are_f32(tensors) {
        return gpu::adamw(tensors, constants).map(|()| true);
    }
    let _ = (tensors, constants);
    Ok(false)
}

/// kept ← keep · kept + take · x in place; `false` where there is no kernel for them.
pub fn blend_on_gpu(kept: &Tensor, x: &Tensor, [keep, take]: [f32; 2]) -> candle_core::Result<bool> {
    #[cfg(feature = "cuda")]
    if are_f32([kept, x]) {
        return gpu::blend(kept, x, [keep, take]).map(|()| true);
    }
    let _ = (kept, x, keep, take);
    Ok(false)
}

/// Σ x² as a few sums on the GPU (1 to 64), or as one by candle's operations.
pub fn square_sums(x: &Tensor) -> candle_core::Result<Tensor> {
    #[cfg(feature = "cuda")]
    if are_f32([x]) {
        return gpu::square_sums(x);
    }
    x.flatten_all()?.to_dtype(DType::F32)?.sqr()?.sum_all()?.reshape(1)
}

/// What an operation on CUDA keeps for its backward pass.
#[derive(Default)]
pub(super) struct Saved {
    #[cfg(feature = "cuda")]
    value: std::sync::OnceLock<Tensor>,
}

#[cfg(feature = "cuda")]
impl Saved {
    /// Keeps `value`; an operation runs once.
    pub(super) fn keep(&self, value: Tensor) -> candle_core::Result<()> {
        self.value.set(value).map_err(|_| candle_core::Error::Msg("an operation ran twice".into()))
    }

    pub(super) fn get(&self) -> candle_core::Result<&Tensor> {
        self.value.get().ok_or_else(|| candle_core::Error::Msg("an operation did not run".into()))
    }
}
