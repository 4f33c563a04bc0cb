//! Schedules and samplers against diffusers 0.42.1 (scripts/golden_samplers.py).

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use difflora::diffusion::sampler::{self, Ddim, Sampler};
use difflora::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
use difflora::named::Named;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    start: Vec<f32>,
    noise: Vec<Vec<f32>>,
    alphas_bar: BTreeMap<String, Vec<f64>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    sampler: String,
    config: serde_json::Value,
    steps: usize,
    eta: f64,
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    initial_sigma: f64,
    r#final: Vec<f32>,
}

fn golden() -> Result<Golden> {
    Ok(serde_json::from_str(include_str!("../data/golden/samplers.json"))?)
}

fn tensor(values: &[f32]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?.unsqueeze(0)?)
}

/// The denoiser of the script.
fn toy(x: &Tensor, t: f64) -> Result<Tensor> {
    Ok(x.affine(0.3, 0.0005 * t - 0.1)?)
}

/// Relative to numbers above 1, absolute below: both sides round to f32.
fn assert_close(ours: &[f64], theirs: &[f64], tolerance: f64, what: &str) -> f64 {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let mut worst = 0f64;
    for (ours, theirs) in ours.iter().zip(theirs) {
        let apart = (ours - theirs).abs() / theirs.abs().max(1.0);
        assert!(apart <= tolerance, "{what}: {ours} and {theirs}");
        worst = worst.max(apart);
    }
    worst
}

#[test]
fn timesteps_sigmas_and_final_latents_are_those_of_diffusers() -> Result<()> {
    let golden = golden()?;
    let mut worst = BTreeMap::<&str, f64>::new();
    for case in &golden.cases {
        let what = format!("{} {} steps eta {} {}", case.sampler, case.steps, case.eta, case.config);
        let schedule = NoiseSchedule::new(&SchedulerConfig::from_json(&case.config.to_string())?)?;
        let sampler = Sampler::from_name(&case.sampler).context("a sampler of ours")?;
        let levels = match sampler {
            Sampler::Ddim | Sampler::Lcm => None,
            Sampler::Euler => Some(schedule.euler_sigmas(case.steps)?),
            Sampler::EulerA => Some(schedule.ancestral_sigmas(case.steps)?),
            Sampler::Dpmpp2mKarras => Some(schedule.multistep_sigmas(case.steps, true)?),
            Sampler::Dpmpp2m | Sampler::UniPc => {
                Some(schedule.multistep_sigmas(case.steps, schedule.config.use_karras_sigmas)?)
            }
        };
        if let Some(levels) = levels {
            assert_close(&levels.sigmas, &case.sigmas, 1e-6, &what);
            // The multistep classes start from x_t instead of x_0 + σ·ε.
            let scale = match sampler {
                Sampler::Euler | Sampler::EulerA => 1.0,
                _ => (levels.sigmas[0].powi(2) + 1.0).sqrt(),
            };
            assert_close(&[levels.initial_sigma / scale], &[case.initial_sigma], 1e-6, &what);
        }

        let x = tensor(&golden.start)?;
        let noise = |i: usize| tensor(golden.noise.get(i).context("a noise for each step")?);
        let mut visited = Vec::new();
        let predict = |x: &Tensor, t: f64| {
            visited.push(t);
            toy(x, t)
        };
        let x = if case.eta > 0.0 {
            let ddim = Ddim { schedule: &schedule, steps: case.steps, eta: case.eta };
            sampler::ddim(predict, x, ddim, noise)?
        } else {
            sampler.sample(&schedule, case.steps, predict, x, noise)?
        };
        assert_close(&visited, &case.timesteps, 1e-6, &what);
        let ours: Vec<f64> = x.squeeze(0)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        let theirs: Vec<f64> = case.r#final.iter().copied().map(f64::from).collect();
        // Without terminal signal Euler starts from σ = 4096, where neighbouring f32 are 5e-4 apart.
        let tolerance = (f64::from(f32::EPSILON) * case.initial_sigma).max(1e-5);
        let apart = assert_close(&ours, &theirs, tolerance, &what);
        let worst = worst.entry(&case.sampler).or_default();
        *worst = worst.max(apart);
    }
    println!("largest difference of a final latent: {worst:?}");
    assert_eq!(worst.len(), Sampler::ALL.len(), "every sampler has its cases");
    Ok(())
}

#[test]
fn alphas_bar_are_those_of_diffusers() -> Result<()> {
    for (name, theirs) in &golden()?.alphas_bar {
        let (beta_schedule, rescale) = match name.strip_suffix(" rescaled") {
            Some(name) => (name, true),
            None => (name.as_str(), false),
        };
        let config = serde_json::json!({
            "beta_schedule": beta_schedule, "rescale_betas_zero_snr": rescale, "prediction_type": "v_prediction"
        });
        let ours = NoiseSchedule::new(&SchedulerConfig::from_json(&config.to_string())?)?.alphas_bar;
        let every: Vec<f64> = ours.iter().step_by(37).chain(ours.last()).copied().collect();
        // Rescaling takes roots and quotients of the whole table in f32.
        assert_close(&every, theirs, if rescale { 1e-6 } else { 1e-7 }, name);
    }
    Ok(())
}
