//! From noise to a sample, by asking a network.
//!
//! [`euler`], [`euler_ancestral`], [`dpmpp_2m`] and [`unipc`] walk down noise levels σ on x = x_0 + σ·ε, in the words of
//! Karras et al. 2022 (arXiv 2206.00364): `denoise(x, i)` answers with the denoised sample D(x; σ_i), guidance
//! included. [`ddim`] and [`lcm`] walk down timesteps on x_t = √ᾱ·x_0 + √(1−ᾱ)·ε, and their `predict(x_t, t)` answers
//! with whatever the schedule's `prediction_type` says. Each asks exactly once a step. Where a sampler takes fresh
//! noise, `noise(i)` gives the unit normal noise of step i.
//!
//! [`Sampler`] names them on the command line and sets each up as diffusers' scheduler of that name.

use anyhow::Result;
use candle_core::Tensor;

use super::schedule::NoiseSchedule;
use super::sigmas::Sigmas;
use crate::named::named;

named! {
    /// How latents become less noisy.
    pub enum Sampler {
        /// DDIM, deterministic (Song et al. 2020).
        Ddim = "ddim",
        /// Euler's method in sigma, SDXL's default.
        Euler = "euler",
        /// Euler's method with ancestral noise.
        EulerA = "euler-a",
        /// DPM-Solver++, second-order multistep.
        Dpmpp2m = "dpmpp-2m",
        /// DPM-Solver++ 2M with Karras sigmas.
        Dpmpp2mKarras = "dpmpp-2m-karras",
        /// UniPC, second-order predictor-corrector.
        UniPc = "unipc",
        /// Latent consistency sampling, for LCM-distilled models: 1 to 8 steps, guidance 1 to 2.
        Lcm = "lcm",
    }
}

impl Sampler {
    /// The sampler of a diffusers scheduler class, which a model's `scheduler_config.json` names.
    pub fn of_class(class: &str, use_karras_sigmas: bool) -> Option<Self> {
        Some(match class {
            "DDIMScheduler" => Self::Ddim,
            "EulerDiscreteScheduler" => Self::Euler,
            "EulerAncestralDiscreteScheduler" => Self::EulerA,
            "DPMSolverMultistepScheduler" if use_karras_sigmas => Self::Dpmpp2mKarras,
            "DPMSolverMultistepScheduler" => Self::Dpmpp2m,
            "UniPCMultistepScheduler" => Self::UniPc,
            "LCMScheduler" => Self::Lcm,
            _ => return None,
        })
    }

    /// Its name in A1111 and its relatives.
    pub fn a1111_name(self) -> &'static str {
        match self {
            Self::Ddim => "DDIM",
            Self::Euler => "Euler",
            Self::EulerA => "Euler a",
            Self::Dpmpp2m => "DPM++ 2M",
            Self::Dpmpp2mKarras => "DPM++ 2M Karras",
            Self::UniPc => "UniPC",
            Self::Lcm => "LCM",
        }
    }

    /// From unit normal `x` (B, …) to a sample (B, …), as diffusers' scheduler with the same config.
    ///
    /// `predict(x_t, t)` is the network, guidance included.
    ///
    /// # Errors
    /// A number of steps or a setting that this sampler does not know, before the first step.
    pub fn sample(
        self,
        schedule: &NoiseSchedule,
        steps: usize,
        predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
        x: Tensor,
        noise: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let config = &schedule.config;
        let prediction = config.prediction_type;
        match self {
            Self::Ddim => ddim(predict, x, Ddim { schedule, steps, eta: 0.0 }, noise),
            Self::Lcm => lcm(predict, x, schedule, steps, noise),
            Self::Euler => {
                let levels = schedule.euler_sigmas(steps)?;
                let x = (x * levels.initial_sigma)?;
                euler(levels.denoiser(prediction, predict), x, &levels.sigmas)
            }
            Self::EulerA => {
                let levels = schedule.ancestral_sigmas(steps)?;
                let x = (x * levels.initial_sigma)?;
                euler_ancestral(levels.denoiser(prediction, predict), x, &levels.sigmas, noise)
            }
            Self::Dpmpp2m | Self::Dpmpp2mKarras => {
                let karras = self == Self::Dpmpp2mKarras || config.use_karras_sigmas;
                let levels = schedule.multistep_sigmas(steps, karras)?;
                let x = (x * levels.initial_sigma)?;
                let first_order_end = config.euler_at_final || config.lower_order_final && steps < 15;
                let x = dpmpp_2m(levels.denoiser(prediction, predict), x, &levels.sigmas, first_order_end)?;
                scaled_end(x, &levels)
            }
            Self::UniPc => {
                let levels = schedule.multistep_sigmas(steps, config.use_karras_sigmas)?;
                let x = (x * levels.initial_sigma)?;
                let denoise = levels.denoiser(prediction, predict);
                scaled_end(unipc(denoise, x, &levels.sigmas, config.lower_order_final)?, &levels)
            }
        }
    }

    /// Whether the sampler and the schedule can do this many steps.
    ///
    /// # Errors
    /// The errors of [`Sampler::sample`], before any work.
    pub fn check(self, schedule: &NoiseSchedule, steps: usize) -> Result<()> {
        match self {
            Self::Ddim => schedule.ddim_steps(steps).map(drop),
            Self::Lcm => schedule.lcm_timesteps(steps).map(drop),
            Self::Euler => schedule.euler_sigmas(steps).map(drop),
            Self::EulerA => schedule.ancestral_sigmas(steps).map(drop),
            Self::Dpmpp2m => schedule.multistep_sigmas(steps, schedule.config.use_karras_sigmas).map(drop),
            Self::Dpmpp2mKarras => schedule.multistep_sigmas(steps, true).map(drop),
            Self::UniPc => schedule.multistep_sigmas(steps, schedule.config.use_karras_sigmas).map(drop),
        }
    }
}

/// The multistep classes of diffusers give x_t, not x_0 + σ·ε, where the last level is not zero.
fn scaled_end(x: Tensor, levels: &Sigmas) -> Result<Tensor> {
    let last = levels.sigmas.last().copied().unwrap_or(0.0);
    Ok((x / (last * last + 1.0).sqrt())?)
}

/// The way of [`ddim`] from noise to a sample.
#[derive(Clone, Copy, Debug)]
pub struct Ddim<'a> {
    /// Noise levels.
    pub schedule: &'a NoiseSchedule,
    /// Number of steps.
    pub steps: usize,
    /// Fresh noise in each step: 0 is deterministic, 1 is DDPM.
    pub eta: f64,
}

/// DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16). `x` (B, …) unit normal → (B, …). `noise` is not asked when
/// `eta` is 0.
pub fn ddim(
    mut predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
    x: Tensor,
    Ddim { schedule, steps, eta }: Ddim,
    mut noise: impl FnMut(usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let prediction = schedule.config.prediction_type;
    let mut x = x;
    for (i, step) in schedule.ddim_steps(steps)?.into_iter().enumerate() {
        let (a, s) = (step.alpha_bar, step.alpha_bar_next);
        let output = predict(&x, step.t as f64)?;
        let x0 = prediction.to_x0(&output, &x, &[a])?;
        let eps = prediction.to_eps(&output, &x, &[a])?;
        let sigma = eta * ((1.0 - s) / (1.0 - a)).sqrt() * (1.0 - a / s).max(0.0).sqrt();
        x = ((x0 * s.sqrt())? + (eps * (1.0 - s - sigma * sigma).max(0.0).sqrt())?)?;
        if sigma > 0.0 {
            x = (x + (noise(i)? * sigma)?)?;
        }
    }
    Ok(x)
}

/// Multistep latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3): jump to the clean sample,
/// add noise of the next level. `x` (B, …) unit normal → (B, …).
pub fn lcm(
    mut predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
    x: Tensor,
    schedule: &NoiseSchedule,
    steps: usize,
    mut noise: impl FnMut(usize) -> Result<Tensor>,
) -> Result<Tensor> {
    /// σ_data of the boundary condition, as in consistency models (Song et al. 2023, arXiv 2303.01469, appendix C).
    const SIGMA_DATA: f64 = 0.5;
    let timesteps = schedule.lcm_timesteps(steps)?;
    let mut x = x;
    for (i, &t) in timesteps.iter().enumerate() {
        let output = predict(&x, t as f64)?;
        let x0 = schedule.to_x0(&output, &x, &vec![t; x.dim(0)?])?;
        let scaled = t as f64 * schedule.config.timestep_scaling;
        let total = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        let (c_skip, c_out) = (SIGMA_DATA * SIGMA_DATA / total, scaled / total.sqrt());
        let denoised = ((x0 * c_out)? + (&x * c_skip)?)?;
        x = match timesteps.get(i + 1) {
            Some(&next) => schedule.add_noise(&denoised, &noise(i)?, &vec![next; denoised.dim(0)?])?,
            None => denoised,
        };
    }
    Ok(x)
}

/// Euler's method (Karras et al. 2022, algorithm 2 without churn). `x` (B, …) of deviation σ_0 → (B, …).
pub fn euler(
    mut denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
    x: Tensor,
    sigmas: &[f64],
) -> Result<Tensor> {
    let mut x = x;
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = denoise(&x, i)?;
        let d = ((&x - denoised)? / sigma)?;
        x = (x + (d * (next - sigma))?)?;
    }
    Ok(x)
}

/// Ancestral sampling with Euler steps: down to σ_down, then up again with fresh noise (crowsonkb/k-diffusion,
/// `sampling.py`, `sample_euler_ancestral` with η = 1). `x` (B, …) of deviation σ_0 → (B, …).
pub fn euler_ancestral(
    mut denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
    x: Tensor,
    sigmas: &[f64],
    mut noise: impl FnMut(usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut x = x;
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let sigma_up = (next.powi(2) * (sigma.powi(2) - next.powi(2)) / sigma.powi(2)).sqrt();
        let sigma_down = (next.powi(2) - sigma_up.powi(2)).sqrt();
        let denoised = denoise(&x, i)?;
        let d = ((&x - denoised)? / sigma)?;
        x = (x + (d * (sigma_down - sigma))?)?;
        if sigma_up > 0.0 {
            x = (x + (noise(i)? * sigma_up)?)?;
        }
    }
    Ok(x)
}

/// DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), where α = 1 and λ = −ln σ. `x` (B, …) of
/// deviation σ_0 → (B, …).
///
/// The first step is of first order; so is the last with `first_order_end`, and whenever it ends at σ = 0.
pub fn dpmpp_2m(
    mut denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
    x: Tensor,
    sigmas: &[f64],
    first_order_end: bool,
) -> Result<Tensor> {
    let lambda = |sigma: f64| -sigma.ln();
    let mut x = x;
    let mut before: Option<Tensor> = None;
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let last = i + 2 == sigmas.len();
        let h = lambda(next) - lambda(sigma);
        let denoised = denoise(&x, i)?;
        let d = match &before {
            Some(before) if next > 0.0 && !(last && first_order_end) => {
                let r = (lambda(sigma) - lambda(sigmas[i - 1])) / h;
                (&denoised + ((&denoised - before)? / (2.0 * r))?)?
            }
            _ => denoised.clone(),
        };
        x = ((x * (next / sigma))? - (d * (-h).exp_m1())?)?;
        before = Some(denoised);
    }
    Ok(x)
}

/// UniPC-2 with B₂(h) = e^h − 1 on the denoised sample (Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8), where
/// α = 1 and λ = −ln σ. `x` (B, …) of deviation σ_0 → (B, …).
///
/// Each answer of the network first corrects the sample that it was asked about, then predicts the next. The first
/// step is of first order; so is the last with `first_order_end`, and whenever it ends at σ = 0.
pub fn unipc(
    mut denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
    x: Tensor,
    sigmas: &[f64],
    first_order_end: bool,
) -> Result<Tensor> {
    let lambda = |sigma: f64| -sigma.ln();
    // The step on which the corrector looks back: where it began and what was known there.
    struct Taken {
        x: Tensor,
        denoised: Tensor,
        /// (m_{−1} − m_0)/r of a step of second order, and r.
        slope: Option<(Tensor, f64)>,
    }
    let mut x = x;
    let mut taken: Option<Taken> = None;
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = denoise(&x, i)?;

        if let Some(Taken { x: start, denoised: m0, slope }) = &taken {
            let h = lambda(sigma) - lambda(sigmas[i - 1]);
            let b_h = (-h).exp_m1();
            let ahead = (&denoised - m0)?;
            let correction = match slope {
                None => (ahead * 0.5)?,
                Some((slope, r)) => {
                    // ρ solves (1 1; r 1)·ρ = b, with φ_2 and φ_3 of the paper.
                    let phi_2 = b_h / -h - 1.0;
                    let phi_3 = phi_2 / -h - 0.5;
                    let b = [phi_2 / b_h, 2.0 * phi_3 / b_h];
                    let rho = (b[0] - b[1]) / (1.0 - r);
                    ((slope * rho)? + (ahead * (b[0] - rho))?)?
                }
            };
            x = ((start * (sigma / sigmas[i - 1]))? - ((m0 + correction)? * b_h)?)?;
        }

        let h = lambda(next) - lambda(sigma);
        let last = i + 2 == sigmas.len();
        let slope = match &taken {
            Some(before) if next > 0.0 && !(last && first_order_end) => {
                let r = (lambda(sigmas[i - 1]) - lambda(sigma)) / h;
                Some((((&before.denoised - &denoised)? / r)?, r))
            }
            _ => None,
        };
        let d = match &slope {
            Some((slope, _)) => (&denoised + (slope * 0.5)?)?,
            None => denoised.clone(),
        };
        let start = x;
        x = ((&start * (next / sigma))? - (d * (-h).exp_m1())?)?;
        taken = Some(Taken { x: start, denoised, slope });
    }
    Ok(x)
}
