//! The training loop, [`trainer::descend`], and its parts: optimiser, moving average, learning rates, gradients on several threads,
//! checkpoints that resume to the bit, and a log.
//!
//! A step draws everything that is random from [`rng`] of the run's seed and the step's number, so that a run
//! that was stopped and resumed is the run that never stopped.

pub mod adamw;
pub mod checkpoint;
pub mod distributed;
pub mod ema;
pub mod gradients;
pub mod log;
pub mod lr_schedule;
pub mod muon;
#[cfg(feature = "nccl")]
mod nccl;
pub mod shards;
pub mod state;
pub mod tail_mean;
pub mod trainer;

use candle_core::{Device, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// The generator of step `step` of a run with `seed`; equal on every machine and independent of other steps.
pub fn rng(seed: u64, step: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(step);
    rng
}

/// Standard normal values from a step's generator, the same on every device.
pub fn normal(rng: &mut impl Rng, shape: &Shape, device: &Device) -> candle_core::Result<Tensor> {
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.sample(StandardNormal)).collect();
    Tensor::from_vec(values, shape, device)
}

/// Makes every kernel run in the thread that calls it, for programs that run a shard of the batch a thread
/// ([`shards::gradients`]); a `RAYON_NUM_THREADS` that the user has set stays.
///
/// candle reads the variable at its first operation and at each matrix product, rayon when its pool starts; with
/// 1 neither has a pool that the shards would wait in line for.
///
/// # Safety
/// No other thread may run yet: the environment is changed.
pub unsafe fn single_threaded_kernels() {
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        // SAFETY: the caller promises that this is the only thread, so no other thread reads the environment meanwhile.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    }
}
