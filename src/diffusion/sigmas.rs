//! Timesteps and noise levels of each sampler.
//!
//! σ = √((1−ᾱ)/ᾱ) is the noise in x_0 + σ·ε (Karras et al. 2022). diffusers has three timestep spacings whose details
//! differ between its scheduler classes; this file follows each class.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::schedule::{BetaSchedule, FinalSigma, NoiseSchedule, Prediction, Spacing};

/// Noise levels of a sampler, falling, and the timesteps at which it evaluates the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Sigmas {
    /// Timesteps at which the network is evaluated; fractions where σ is interpolated.
    pub timesteps: Vec<f64>,
    /// Noise levels σ, one more than timesteps: the last is where the last step ends.
    pub sigmas: Vec<f64>,
    /// Standard deviation of the first sample.
    pub initial_sigma: f64,
}

impl Sigmas {
    /// The denoiser D(x; σ_i) of Karras et al. from a network that takes x/√(σ²+1) and the timestep:
    /// `denoise(x, i)`, (B, …) → (B, …).
    pub fn denoiser<'a>(
        &'a self,
        prediction: Prediction,
        mut predict: impl FnMut(&Tensor, f64) -> Result<Tensor> + 'a,
    ) -> impl FnMut(&Tensor, usize) -> Result<Tensor> + 'a {
        move |x, i| {
            let sigma = self.sigmas[i];
            let output = predict(&(x / (sigma * sigma + 1.0).sqrt())?, self.timesteps[i])?;
            Ok(prediction.denoised(&output, x, sigma)?)
        }
    }
}

/// ρ of the Karras levels; 7 in the paper (table 1).
const RHO: f64 = 7.0;

/// diffusers' substitute for ᾱ = 0, where σ would be infinite: the smallest half-precision number.
const ALMOST_NO_SIGNAL: f64 = 1.0 / 16_777_216.0;

impl NoiseSchedule {
    /// The levels of [`euler`](super::sampler::euler): diffusers' `EulerDiscreteScheduler`.
    pub fn euler_sigmas(&self, steps: usize) -> Result<Sigmas> {
        let mut timesteps = self.timesteps(steps, Spacing::Linspace)?;
        let mut sigmas = self.sigmas_at(&timesteps, steps)?;
        if self.config.use_karras_sigmas {
            sigmas = karras(sigmas[0], sigmas[steps - 1], steps);
            let table = self.sigma_table();
            timesteps = sigmas.iter().map(|sigma| timestep_of(*sigma, &table)).collect();
        }
        let initial_sigma = self.unscaled_start(sigmas[0]);
        sigmas.push(self.final_sigma());
        Ok(Sigmas { timesteps, sigmas, initial_sigma })
    }

    /// The levels of [`euler_ancestral`](super::sampler::euler_ancestral): `EulerAncestralDiscreteScheduler`, which
    /// knows neither Karras levels nor an end at the smallest σ.
    pub fn ancestral_sigmas(&self, steps: usize) -> Result<Sigmas> {
        let timesteps = self.timesteps(steps, Spacing::Linspace)?;
        let mut sigmas = self.sigmas_at(&timesteps, steps)?;
        let initial_sigma = self.unscaled_start(sigmas[0]);
        sigmas.push(0.0);
        Ok(Sigmas { timesteps, sigmas, initial_sigma })
    }

    /// The levels of [`dpmpp_2m`](super::sampler::dpmpp_2m) and [`unipc`](super::sampler::unipc):
    /// `DPMSolverMultistepScheduler` and `UniPCMultistepScheduler`. They part the time into one interval more, whose
    /// lower end is not asked about.
    ///
    /// # Errors
    /// Solver settings that are not implemented, and numbers of steps that the schedule does not have.
    pub fn multistep_sigmas(&self, steps: usize, use_karras_sigmas: bool) -> Result<Sigmas> {
        let config = &self.config;
        if let Some(setting) = &config.unsupported_solver {
            anyhow::bail!("scheduler setting `{setting}` is not supported");
        }
        self.stride(steps)?;
        let all = config.num_train_timesteps;
        let timestep = |i: usize| match config.timestep_spacing.unwrap_or(Spacing::Linspace) {
            Spacing::Leading => ((steps - i) * (all / (steps + 1)) + config.steps_offset) as f64,
            Spacing::Trailing => self.trailing(i, steps),
            Spacing::Linspace => ((steps - i) as f64 * ((all as f64 - 1.0) / steps as f64)).round_ties_even(),
        };
        let mut timesteps: Vec<f64> = (0..steps).map(timestep).collect();
        let mut sigmas;
        if use_karras_sigmas {
            ensure!(
                config.beta_schedule != BetaSchedule::SquaredcosCapV2,
                "Karras levels with `beta_schedule: squaredcos_cap_v2` are not supported"
            );
            let table = self.sigma_table();
            sigmas = karras(table[all - 1], table[0], steps);
            timesteps = sigmas.iter().map(|sigma| timestep_of(*sigma, &table).round_ties_even()).collect();
        } else {
            sigmas = self.sigmas_at(&timesteps, steps)?;
        }
        // Both classes start from unit noise and think of it as the scaled sample.
        let initial_sigma = (sigmas[0] * sigmas[0] + 1.0).sqrt();
        sigmas.push(self.final_sigma());
        Ok(Sigmas { timesteps, sigmas, initial_sigma })
    }

    /// The timesteps of [`lcm`](super::sampler::lcm), evenly chosen among those of the distillation
    /// (`LCMScheduler`; Luo et al. 2023, arXiv 2310.04378, section 4.3).
    pub fn lcm_timesteps(&self, steps: usize) -> Result<Vec<usize>> {
        let (all, original) = (self.config.num_train_timesteps, self.config.original_inference_steps);
        ensure!(
            original > 0 && original <= all,
            "`original_inference_steps` is {original}, of {all} timesteps"
        );
        ensure!(steps > 0 && steps <= original, "{steps} steps; LCM takes 1 to {original}");
        let chosen = |i: usize| (i as f64 * (original as f64 / steps as f64)).floor() as usize;
        Ok((0..steps).map(|i| (original - chosen(i)) * (all / original) - 1).collect())
    }

    /// The timesteps that are visited, first to last (Lin et al. 2023, table 2); `otherwise` where the config does not
    /// say how they are spaced.
    pub(super) fn timesteps(&self, steps: usize, otherwise: Spacing) -> Result<Vec<f64>> {
        let stride = self.stride(steps)?;
        let all = self.config.num_train_timesteps as f64;
        let timestep = |i: usize| match self.config.timestep_spacing.unwrap_or(otherwise) {
            Spacing::Leading => ((steps - 1 - i) * stride + self.config.steps_offset) as f64,
            Spacing::Trailing => self.trailing(i, steps),
            Spacing::Linspace if steps == 1 => 0.0,
            Spacing::Linspace => (steps - 1 - i) as f64 * ((all - 1.0) / (steps - 1) as f64),
        };
        Ok((0..steps).map(timestep).collect())
    }

    fn trailing(&self, i: usize, steps: usize) -> f64 {
        let all = self.config.num_train_timesteps as f64;
        (all - i as f64 * (all / steps as f64)).round_ties_even() - 1.0
    }

    pub(super) fn stride(&self, steps: usize) -> Result<usize> {
        let all = self.config.num_train_timesteps;
        ensure!(steps > 0 && steps <= all, "{steps} steps; this model takes 1 to {all}");
        Ok(all / steps)
    }

    /// ᾱ_t, where `steps` led to `t`.
    pub(super) fn alpha_bar(&self, t: usize, steps: usize) -> Result<f64> {
        self.alphas_bar.get(t).copied().with_context(|| {
            let last = self.config.num_train_timesteps - 1;
            format!("{steps} steps lead to timestep {t}, the model knows 0 to {last}; take fewer steps")
        })
    }

    /// σ_t for t = 0 … T−1, with the roundings of PyTorch.
    fn sigma_table(&self) -> Vec<f64> {
        let sigma = |alpha_bar: f64| {
            let alpha_bar = alpha_bar as f32;
            f64::from(((1.0 - alpha_bar) / alpha_bar).sqrt())
        };
        let mut table: Vec<f64> = self.alphas_bar.iter().map(|alpha_bar| sigma(*alpha_bar)).collect();
        if let (true, Some(last)) = (self.config.rescale_betas_zero_snr, table.last_mut()) {
            *last = sigma(ALMOST_NO_SIGNAL);
        }
        table
    }

    /// σ at `timesteps`, between two of the table by linear interpolation.
    fn sigmas_at(&self, timesteps: &[f64], steps: usize) -> Result<Vec<f64>> {
        let table = self.sigma_table();
        let sigma = |t: &f64| {
            let below = *t as usize;
            self.alpha_bar(below, steps)?;
            let above = table[(below + 1).min(table.len() - 1)];
            Ok(table[below] + (above - table[below]) * t.fract())
        };
        timesteps.iter().map(sigma).collect()
    }

    fn final_sigma(&self) -> f64 {
        match self.config.final_sigmas_type {
            FinalSigma::Zero => 0.0,
            FinalSigma::SigmaMin => self.sigma_table()[0],
        }
    }

    /// How both Euler classes scale the first sample.
    fn unscaled_start(&self, largest: f64) -> f64 {
        match self.config.timestep_spacing.unwrap_or(Spacing::Linspace) {
            Spacing::Leading => (largest * largest + 1.0).sqrt(),
            Spacing::Trailing | Spacing::Linspace => largest,
        }
    }
}

/// Karras et al. 2022, eq. 5: `steps` levels from `sigma_max` to `sigma_min` in equal steps of σ^(1/ρ).
fn karras(sigma_max: f64, sigma_min: f64, steps: usize) -> Vec<f64> {
    let (max, min) = (sigma_max.powf(1.0 / RHO), sigma_min.powf(1.0 / RHO));
    let ramp = |i: usize| if steps > 1 { i as f64 / (steps - 1) as f64 } else { 0.0 };
    (0..steps).map(|i| (max + ramp(i) * (min - max)).powf(RHO)).collect()
}

/// The timestep whose level is `sigma`, by linear interpolation of ln σ in a rising `table`.
fn timestep_of(sigma: f64, table: &[f64]) -> f64 {
    // numpy keeps the table's logarithms as f32.
    let ln = |i: usize| f64::from((table[i] as f32).ln());
    let wanted = sigma.max(1e-10).ln();
    let below = (0..table.len()).rev().find(|i| wanted >= ln(*i)).unwrap_or(0).min(table.len() - 2);
    let (low, high) = (ln(below), ln(below + 1));
    below as f64 + ((wanted - low) / (high - low)).clamp(0.0, 1.0)
}
