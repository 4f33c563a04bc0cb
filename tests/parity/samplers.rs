//! Schedules and samplers against diffusers 0.42.1 (scripts/golden_samplers.py).

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use difflora::diffusion::{
    sampler,
    schedule::{NoiseSchedule, SchedulerConfig},
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    start: Vec<f32>,
    noise: Vec<Vec<f32>>,
    alphas_bar: std::collections::BTreeMap<String, Vec<f64>>,
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
fn assert_close(ours: &[f64], theirs: &[f64], tolerance: f64, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!((ours - theirs).abs() <= tolerance * theirs.abs().max(1.0), "{what}: {ours} and {theirs}");
    }
}

#[test]
fn timesteps_sigmas_and_final_latents_are_those_of_diffusers() -> Result<()> {
    let golden = golden()?;
    for case in &golden.cases {
        let what = format!("{} {} steps eta {} {}", case.sampler, case.steps, case.eta, case.config);
        let schedule = NoiseSchedule::new(&SchedulerConfig::from_json(&case.config.to_string())?)?;
        let x = tensor(&golden.start)?;
        let mut visited = Vec::new();
        let denoise = |x: &Tensor, t: f64| {
            visited.push(t);
            toy(x, t)
        };
        let x = match case.sampler.as_str() {
            "ddim" => {
                let noise = |i: usize| tensor(golden.noise.get(i).context("a noise for each step")?);
                sampler::ddim(denoise, x, &schedule, case.steps, case.eta, noise)?
            }
            _ => {
                let table = schedule.euler_steps(case.steps)?;
                assert_close(&table.sigmas, &case.sigmas, 1e-6, &what);
                assert_close(&[table.initial_sigma], &[case.initial_sigma], 1e-6, &what);
                sampler::euler(denoise, x, &schedule, case.steps)?
            }
        };
        assert_close(&visited, &case.timesteps, 1e-6, &what);
        let ours: Vec<f64> = x.squeeze(0)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        let theirs: Vec<f64> = case.r#final.iter().copied().map(f64::from).collect();
        // Without terminal signal Euler starts from σ = 4096, where neighbouring f32 are 5e-4 apart.
        let tolerance = (f64::from(f32::EPSILON) * case.initial_sigma).max(1e-5);
        assert_close(&ours, &theirs, tolerance, &what);
    }
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
