//! Diffusion that ends in N(μ, Σ) instead of N(0, I): the shifted diffusion of Corgi (Zhou et al. 2022, arXiv
//! 2211.15388; code drboog/Shifted_Diffusion), with Σ = diag(σ²).
//!
//! ```text
//! q(z_t | z_{t−1}) = N(√α_t·z_{t−1} + (1 − √α_t)·μ, β_t·Σ)
//! q(z_t | z_0)     = N(√ᾱ_t·z_0 + (1 − √ᾱ_t)·μ, (1 − ᾱ_t)·Σ)                    the steps composed
//! q(z_{t−1} | z_t, z_0) = N(c_1·z_0 + c_2·z_t + (1 − c_1 − c_2)·μ, β̃_t·Σ)       the posterior
//!     c_1 = √ᾱ_{t−1}·β_t/(1 − ᾱ_t)   c_2 = √α_t·(1 − ᾱ_{t−1})/(1 − ᾱ_t)   β̃_t = β_t·(1 − ᾱ_{t−1})/(1 − ᾱ_t)
//! ε̂ = (z_t − √ᾱ_t·ẑ_0 − (1 − √ᾱ_t)·μ)/(√(1 − ᾱ_t)·σ)                            from a prediction of z_0
//! z_s = √ᾱ_s·ẑ_0 + (1 − √ᾱ_s)·μ + √(1 − ᾱ_s − ς²)·σ·ε̂ + ς·σ·ε                    DDIM, ς as without a shift
//! ```
//!
//! With y = (z − μ)/σ all of it is ordinary diffusion of y: that is how it is computed here, so that μ = 0 and μ ≠ 0
//! are one path, and μ = 0, σ = 1 gives the bits of the plain sampler. One Gaussian for everybody is therefore nothing
//! but standardised latents; what is new begins where the condition chooses among several. (The code that was released
//! with the paper has no working DDIM.)

use anyhow::{Result, ensure};
use candle_core::Tensor;

use super::sampler::{self, Ddim};
use super::schedule::{NoiseSchedule, Prediction};

/// Where diffusion ends: N(μ, diag(σ²)), one for each sample of a batch or one for all.
#[derive(Clone, Debug)]
pub struct Shift {
    /// μ (B, L) or (1, L)
    pub mean: Tensor,
    /// σ, likewise; positive
    pub std: Tensor,
}

impl Shift {
    /// z → y = (z − μ)/σ. `z` (B, L) → (B, L).
    pub fn whiten(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        z.broadcast_sub(&self.mean)?.broadcast_div(&self.std)
    }

    /// y → z = μ + σ·y. `y` (B, L) → (B, L).
    pub fn colour(&self, y: &Tensor) -> candle_core::Result<Tensor> {
        y.broadcast_mul(&self.std)?.broadcast_add(&self.mean)
    }

    /// z_t. `z0` and unit normal `eps` (B, L), `t` (B) → (B, L).
    pub fn add_noise(
        &self,
        schedule: &NoiseSchedule,
        z0: &Tensor,
        eps: &Tensor,
        t: &[usize],
    ) -> Result<Tensor> {
        Ok(self.colour(&schedule.add_noise(&self.whiten(z0)?, eps, t)?)?)
    }

    /// DDIM. `predict(z_t, t)` answers with z_0; unit normal `y` (B, L) → z_0 (B, L).
    ///
    /// With η = 1 it takes the posterior's noise; `noise(i)` gives the unit normal noise of step i.
    ///
    /// # Errors
    /// A schedule whose network predicts anything but z_0.
    pub fn ddim(
        &self,
        mut predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
        y: Tensor,
        ddim: Ddim,
        noise: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        ensure!(
            ddim.schedule.config.prediction_type == Prediction::Sample,
            "a shifted diffusion is sampled from predictions of the clean sample, `prediction_type` must be `sample`"
        );
        let predict = |y: &Tensor, t: f64| Ok(self.whiten(&predict(&self.colour(y)?, t)?)?);
        Ok(self.colour(&sampler::ddim(predict, y, ddim, noise)?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::diffusion::schedule::{BetaSchedule, SchedulerConfig, Spacing};

    const L: usize = 5;

    fn schedule() -> NoiseSchedule {
        NoiseSchedule::new(&SchedulerConfig {
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            prediction_type: Prediction::Sample,
            timestep_spacing: Some(Spacing::Trailing),
            steps_offset: 0,
            set_alpha_to_one: true,
            ..SchedulerConfig::default()
        })
        .unwrap()
    }

    /// Different for each sample and value.
    fn shift(b: usize) -> Shift {
        let mean = (normal(3, 0, (b, L), &Device::Cpu).unwrap() * 2.0).unwrap();
        let std = (normal(3, 1, (b, L), &Device::Cpu).unwrap().abs().unwrap() + 0.3).unwrap();
        Shift { mean, std }
    }

    fn none() -> Shift {
        let zeros = Tensor::zeros((1, L), DType::F32, &Device::Cpu).unwrap();
        Shift { std: zeros.ones_like().unwrap(), mean: zeros }
    }

    fn values(x: &Tensor) -> Vec<f64> {
        x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    /// A network that knows nothing of shifts: any smooth function will do.
    fn network(z: &Tensor, t: f64) -> Result<Tensor> {
        Ok(((z * 0.7)?.tanh()? + (t / 1000.0 - 0.3))?)
    }

    #[test]
    fn a_thousand_single_steps_end_where_the_closed_form_says() {
        let (schedule, shift) = (schedule(), shift(1));
        let z0 = values(&normal(4, 0, (1, L), &Device::Cpu).unwrap());
        let (mean, std) = (values(&shift.mean), values(&shift.std));
        let mut before = 1.0;
        // Mean and variance of z_t given z_0, in 64 bits, by the single steps.
        let mut stepped: Vec<(f64, f64)> = z0.iter().map(|z| (*z, 0.0)).collect();
        for (t, alpha_bar) in schedule.alphas_bar.iter().enumerate() {
            let alpha = alpha_bar / before;
            before = *alpha_bar;
            for (i, (m, v)) in stepped.iter_mut().enumerate() {
                *m = alpha.sqrt() * *m + (1.0 - alpha.sqrt()) * mean[i];
                *v = alpha * *v + (1.0 - alpha) * std[i].powi(2);
            }
            if ![0, 10, 400, 999].contains(&t) {
                continue;
            }
            let z0 =
                Tensor::from_vec(z0.clone(), (1, L), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            let still = shift.add_noise(&schedule, &z0, &z0.zeros_like().unwrap(), &[t]).unwrap();
            let moved = shift.add_noise(&schedule, &z0, &z0.ones_like().unwrap(), &[t]).unwrap();
            for (i, (m, v)) in stepped.iter().enumerate() {
                assert!((values(&still)[i] - m).abs() < 1e-5, "mean at {t}");
                assert!((values(&moved)[i] - m - v.sqrt()).abs() < 1e-5, "deviation at {t}");
            }
        }
    }

    #[test]
    fn without_a_shift_samples_have_the_bits_of_the_plain_sampler() {
        let schedule = schedule();
        let noise = normal(5, 0, (3, L), &Device::Cpu).unwrap();
        for (steps, eta) in [(1, 0.0), (7, 0.0), (7, 1.0)] {
            let fresh = |i: usize| Ok(normal(5, 1 + i as u64, (3, L), &Device::Cpu)?);
            let ddim = Ddim { schedule: &schedule, steps, eta };
            let plain = sampler::ddim(network, noise.clone(), ddim, fresh).unwrap();
            let shifted = none().ddim(network, noise.clone(), ddim, fresh).unwrap();
            assert_eq!(values(&plain), values(&shifted));
        }
    }

    #[test]
    fn one_gaussian_is_the_plain_sampler_on_standardised_latents() {
        let (schedule, shift) = (schedule(), shift(1));
        let noise = normal(6, 0, (4, L), &Device::Cpu).unwrap();
        let fresh = |i: usize| Ok(normal(6, 1 + i as u64, (4, L), &Device::Cpu)?);
        // The same network, which sees z as standardised latents.
        let of_z = |z: &Tensor, t: f64| Ok(shift.colour(&network(&shift.whiten(z)?, t)?)?);
        for eta in [0.0, 0.5, 1.0] {
            let ddim = Ddim { schedule: &schedule, steps: 9, eta };
            let standardised = sampler::ddim(network, noise.clone(), ddim, fresh).unwrap();
            let shifted = shift.ddim(of_z, noise.clone(), ddim, fresh).unwrap();
            assert!(worst(&shift.colour(&standardised).unwrap(), &shifted) < 1e-5, "eta {eta}");
        }
    }

    /// z_s = c_0·ẑ_0 + r·z_t + (1 − c_0 − r)·μ with r = √((1 − ᾱ_s)/(1 − ᾱ_t)): Σ cancels without fresh noise.
    #[test]
    fn the_deterministic_form_needs_no_variance() {
        let (schedule, shift) = (schedule(), shift(2));
        let noise = normal(7, 0, (2, L), &Device::Cpu).unwrap();
        let mut z = shift.colour(&noise).unwrap();
        for step in schedule.ddim_steps(6).unwrap() {
            let (a, s) = (step.alpha_bar, step.alpha_bar_next);
            let r = ((1.0 - s) / (1.0 - a)).sqrt();
            let c0 = s.sqrt() - r * a.sqrt();
            let z0 = network(&z, step.t as f64).unwrap();
            let moved = ((z0 * c0).unwrap() + (&z * r).unwrap()).unwrap();
            z = (moved + (&shift.mean * (1.0 - c0 - r)).unwrap()).unwrap();
        }
        let fresh = |_| anyhow::bail!("no noise is needed");
        let sampled =
            shift.ddim(network, noise, Ddim { schedule: &schedule, steps: 6, eta: 0.0 }, fresh).unwrap();
        assert!(worst(&z, &sampled) < 1e-5);
    }

    #[test]
    fn with_eta_one_and_all_steps_each_step_draws_from_the_posterior() {
        let (schedule, shift) = (schedule(), shift(2));
        let noise = normal(8, 0, (2, L), &Device::Cpu).unwrap();
        let fresh = |i: usize| Ok(normal(8, 1 + i as u64, (2, L), &Device::Cpu)?);
        let mut z = shift.colour(&noise).unwrap();
        for (i, t) in (0..1000).rev().enumerate() {
            let a_t = schedule.alphas_bar[t];
            let a_s = if t == 0 { 1.0 } else { schedule.alphas_bar[t - 1] };
            let (alpha, beta) = (a_t / a_s, 1.0 - a_t / a_s);
            let c1 = a_s.sqrt() * beta / (1.0 - a_t);
            let c2 = alpha.sqrt() * (1.0 - a_s) / (1.0 - a_t);
            let deviation = (beta * (1.0 - a_s) / (1.0 - a_t)).sqrt();
            let z0 = network(&z, t as f64).unwrap();
            let mean = ((z0 * c1).unwrap() + (&z * c2).unwrap()).unwrap();
            let mean = (mean + (&shift.mean * (1.0 - c1 - c2)).unwrap()).unwrap();
            let fresh = (fresh(i).unwrap() * &shift.std).unwrap();
            z = (mean + (fresh * deviation).unwrap()).unwrap();
        }
        let sampled =
            shift.ddim(network, noise, Ddim { schedule: &schedule, steps: 1000, eta: 1.0 }, fresh).unwrap();
        // A thousand roundings of f32 on either side.
        assert!(worst(&z, &sampled) < 1e-3, "{}", worst(&z, &sampled));
    }
}
