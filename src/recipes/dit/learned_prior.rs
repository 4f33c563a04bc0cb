//! A prior whose means and deviations train along (Corgi, arXiv 2211.15388; `training_losses` in
//! drboog/Shifted_Diffusion, whose formula the paper prints as an image).

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use candle_nn::VarBuilder;
use rand_chacha::ChaCha8Rng;

use crate::commands::train_dit::Recipe;
use crate::diffusion::shifted::Shift;
use crate::hypernet::prior::Prior;
use crate::train;

/// The prior of a training, where the networks are: as it was fitted, or with variables of its own.
pub struct TrainedPrior {
    fitted: Prior,
    /// μ and ln σ (K, L), each divided by [`SLOWNESS`].
    learned: Option<[Tensor; 2]>,
}

/// What the variables are multiplied by, so that Adam moves them slowly; the released code's `vocab_lr_scale`.
const SLOWNESS: f64 = 0.01;

/// Draws from a Gaussian that are held against a latent; the released code's number.
const DRAWS: usize = 16;

/// ξ: how much means are kept apart; the released code's number.
const APART: f64 = 1.0;

impl TrainedPrior {
    /// Variables `mean` and `log_std` under `vb` where the recipe asks for a learned prior.
    pub fn new(recipe: &Recipe, fitted: &Prior, vb: VarBuilder) -> Result<Self> {
        let learned = recipe.prior.as_ref().is_some_and(|prior| prior.learned);
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

    /// Whether it trains.
    pub fn learned(&self) -> bool {
        self.learned.is_some()
    }

    /// Where the diffusion of samples ends whose Gaussians are `cluster` (B) u32.
    pub fn shift(&self, cluster: &Tensor) -> Result<Shift> {
        let Some([mean, log_std]) = &self.learned else { return self.fitted.shift(cluster) };
        let std = (log_std.index_select(cluster, 0)? * SLOWNESS)?.exp()?;
        Ok(Shift { mean: (mean.index_select(cluster, 0)? * SLOWNESS)?, std: (std * self.fitted.kappa)? })
    }

    /// L_p = w_t·(−mean_j cos(z_0, μ + κσ·ε_j)) + ξ·mean_{b≠b'} cos(μ_b, μ_b'): draws come near the latents, means stay
    /// apart. `z0` (B, L), `weights` (B) → a scalar.
    pub fn loss(&self, shift: &Shift, z0: &Tensor, weights: &Tensor, rng: &mut ChaCha8Rng) -> Result<Tensor> {
        let (b, l) = z0.dims2()?;
        let eps = train::normal(rng, &(DRAWS, b, l).into(), z0.device())?;
        let draws = eps.broadcast_mul(&shift.std)?.broadcast_add(&shift.mean)?;
        let near = (unit(&draws)?.broadcast_mul(&unit(z0)?)?.sum(2)?.mean(0)? * weights)?.mean_all()?;
        let means = unit(&shift.mean)?;
        let cosines = means.matmul(&means.t()?)?;
        // Each row's cosine to itself is 1.
        let others = ((cosines.sum_all()? - b as f64)? / (b * (b.max(2) - 1)) as f64)?;
        let apart = ((others * APART)? * weights.mean_all()?)?;
        Ok((apart - near)?)
    }

    /// The trained values, into the prior that is stored.
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
