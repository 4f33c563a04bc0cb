//! Seeded noise, equal on every machine and device: ChaCha8 on the host, by seed and stream.
//!
//! A stream is a number that the caller gives to a purpose (an image, a step, a person). What one stream holds
//! does not depend on how much another one was read, so work can be done in any order and on any thread.

use candle_core::{Device, Result, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// Standard normal noise of `shape`, f32.
pub fn normal(seed: u64, stream: u64, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let mut rng = generator(seed, stream);
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.sample(StandardNormal)).collect();
    Tensor::from_vec(values, shape, device)
}

/// The generator of one stream, for draws other than whole normal tensors (timesteps, choices).
pub fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_stream_give_the_same_noise() -> Result<()> {
        let draw = |seed, stream| normal(seed, stream, 4, &Device::Cpu)?.to_vec1::<f32>();
        assert_eq!(draw(7, 1)?, draw(7, 1)?);
        assert_ne!(draw(7, 1)?, draw(7, 2)?);
        assert_ne!(draw(7, 1)?, draw(8, 1)?);
        // The values themselves are a promise: images made by an earlier build can be made again.
        assert_eq!(draw(0, 0)?, [0.699_960_77, -0.144_061_64, 0.302_886_28, -1.374_513_9]);
        Ok(())
    }

    #[test]
    fn noise_has_mean_zero_and_variance_one() -> Result<()> {
        let values = normal(1, 0, 40_000, &Device::Cpu)?.to_vec1::<f32>()?;
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.015, "mean {mean}"); // three standard errors
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
        Ok(())
    }
}
