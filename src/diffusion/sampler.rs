//! From noise to a sample, by asking a network.
//!
//! `denoise(x_t, t)` answers with whatever the schedule's `prediction_type` says, guidance included. Both samplers
//! start from unit normal `x`.

use anyhow::Result;
use candle_core::Tensor;

use super::schedule::NoiseSchedule;

/// DDIM (Song et al. 2020, eq. 12 and 16). `x` (B, …) → (B, …).
///
/// `eta` 0 is deterministic, 1 is DDPM. `noise(i)` gives the fresh noise of step i; it is not asked when `eta` is 0.
pub fn ddim(
    mut denoise: impl FnMut(&Tensor, f64) -> Result<Tensor>,
    x: Tensor,
    schedule: &NoiseSchedule,
    steps: usize,
    eta: f64,
    mut noise: impl FnMut(usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let prediction = schedule.config.prediction_type;
    let mut x = x;
    for (i, step) in schedule.ddim_steps(steps)?.into_iter().enumerate() {
        let (a, s) = (step.alpha_bar, step.alpha_bar_next);
        let output = denoise(&x, step.t as f64)?;
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

/// Euler's method (Karras et al. 2022, algorithm 2 without churn). `x` (B, …) → (B, …).
pub fn euler(
    mut denoise: impl FnMut(&Tensor, f64) -> Result<Tensor>,
    x: Tensor,
    schedule: &NoiseSchedule,
    steps: usize,
) -> Result<Tensor> {
    let table = schedule.euler_steps(steps)?;
    let mut x = (x * table.initial_sigma)?;
    for (t, sigma) in table.timesteps.iter().zip(table.sigmas.windows(2)) {
        let (sigma, next) = (sigma[0], sigma[1]);
        // x is x_0 + σ·ε here; the network knows √ᾱ·x_0 + √(1−ᾱ)·ε with ᾱ = 1/(σ²+1).
        let alpha_bar = 1.0 / (sigma * sigma + 1.0);
        let x_t = (&x * alpha_bar.sqrt())?;
        let output = denoise(&x_t, *t)?;
        let x0 = schedule.config.prediction_type.to_x0(&output, &x_t, &[alpha_bar])?;
        let d = ((&x - x0)? / sigma)?;
        x = (x + (d * (next - sigma))?)?;
    }
    Ok(x)
}
