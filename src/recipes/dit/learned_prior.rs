//! A prior whose means and standard deviations are trained (Corgi, arXiv 2211.15388; `training_losses` in
//! drboog/Shifted_Diffusion, whose formula the paper prints as an image).

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use candle_nn::VarBuilder;
use rand_chacha::ChaCha8Rng;

use crate::diffusion::shifted::Shift;
use crate::hypernet::prior::Prior;
use crate::recipes::dit::config::DitTrainConfig;
use crate::train;

/// The prior in training, on the device of the networks: as fitted, or with trainable means and deviations.
pub struct LearnedPrior {
    fitted: Prior,
    /// μ and ln σ (K, L), each divided by [`SLOWNESS`].
    learned: Option<[Tensor; 2]>,
}

/// Factor on the variables, which lowers their effective learning rate; the released code's `vocab_lr_scale`.
const SLOWNESS: f64 = 0.01;

/// Samples of a Gaussian per latent; the value of the released code.
const SAMPLES: usize = 16;

/// ξ, the weight of the repulsion of the means; the value of the released code.
const REPULSION: f64 = 1.0;

impl LearnedPrior {
    /// Variables `mean` and `log_std` under `vb` where the config has a learned prior.
    pub fn new(config: &DitTrainConfig, fitted: &Prior, vb: VarBuilder) -> Result<Self> {
        let learned = config.prior.as_ref().is_some_and(|prior| prior.learned);
        let variable = |name| vb.get_with_hints(fitted.mean.shape(), name, candle_nn::Init::Const(0.0));
        let learned = if learned { Some([variable("mean")?, variable("log_std")?]) } else { None };
        Ok(Self { fitted: fitted.to_device(vb.device())?, learned })
    }

    /// Sets the variables to the fitted prior.
    pub fn start(&self, vars: &BTreeMap<String, Var>) -> Result<()> {
        if self.learned() {
            let var = |name: &str| vars.get(name).with_context(|| format!("no variable `{name}`"));
            var("prior.mean")?.set(&(&self.fitted.mean / SLOWNESS)?)?;
            var("prior.log_std")?.set(&(self.fitted.std.log()? / SLOWNESS)?)?;
        }
        Ok(())
    }

    /// Whether means and deviations are trained.
    pub fn learned(&self) -> bool {
        self.learned.is_some()
    }

    /// Mean and deviation (B, L) of the Gaussians `cluster` (B) u32.
    pub fn shift(&self, cluster: &Tensor) -> Result<Shift> {
        let Some([mean, log_std]) = &self.learned else { return self.fitted.shift(cluster) };
        let std = (log_std.index_select(cluster, 0)? * SLOWNESS)?.exp()?;
        Ok(Shift { mean: (mean.index_select(cluster, 0)? * SLOWNESS)?, std: (std * self.fitted.kappa)? })
    }

    /// L_p = w_t·(−mean_j cos(z_0, μ + κσ·ε_j)) + ξ·mean_{b≠b'} cos(μ_b, μ_b'): pulls samples
    /// towards the latents and pushes the means apart. `z0` (B, L), `weights` (B) → a scalar.
    pub fn loss(&self, shift: &Shift, z0: &Tensor, weights: &Tensor, rng: &mut ChaCha8Rng) -> Result<Tensor> {
        let (b, l) = z0.dims2()?;
        let eps = train::normal(rng, &(SAMPLES, b, l).into(), z0.device())?;
        let draws = eps.broadcast_mul(&shift.std)?.broadcast_add(&shift.mean)?;
        let near = (unit(&draws)?.broadcast_mul(&unit(z0)?)?.sum(2)?.mean(0)? * weights)?.mean_all()?;
        let means = unit(&shift.mean)?;
        let cosines = means.matmul(&means.t()?)?;
        // Each row's cosine to itself is 1.
        let others = ((cosines.sum_all()? - b as f64)? / (b * (b.max(2) - 1)) as f64)?;
        let apart = ((others * REPULSION)? * weights.mean_all()?)?;
        Ok((apart - near)?)
    }

    /// Copies the trained values into the stored prior.
    pub fn put_into(&self, prior: &mut Prior, averages: &BTreeMap<String, Tensor>) -> Result<()> {
        if self.learned() {
            let value = |name: &str| -> Result<Tensor> {
                Ok((averages.get(name).with_context(|| format!("no average of `{name}`"))? * SLOWNESS)?)
            };
            (prior.mean, prior.std) = (value("prior.mean")?, value("prior.log_std")?.exp()?);
        }
        Ok(())
    }
}

fn unit(x: &Tensor) -> candle_core::Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.sum_keepdim(candle_core::D::Minus1)? + 1e-12)?.sqrt()?)
}
