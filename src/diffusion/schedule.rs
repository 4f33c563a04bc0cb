//! How much noise there is at each timestep, and which timesteps a sampler visits.
//!
//! Read from a model's `scheduler/scheduler_config.json`; tables are equal to those of diffusers' schedulers (0.42.1).
//! Options that are not implemented are errors, because a slightly wrong schedule still generates images.

use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::limits;

/// ᾱ_t for t = 0 … T−1, and the formulas that need them.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    /// The config of the table.
    pub config: SchedulerConfig,
    /// ᾱ_t = Π (1 − β_i), i ≤ t.
    pub alphas_bar: Vec<f64>,
}

/// Prediction type of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prediction {
    /// The noise ε in x_t.
    #[serde(rename = "epsilon")]
    Epsilon,
    /// The velocity v = √ᾱ·ε − √(1−ᾱ)·x_0 (Salimans and Ho 2022).
    #[serde(rename = "v_prediction")]
    V,
    /// The clean sample x_0.
    #[serde(rename = "sample")]
    Sample,
}

/// One step of [`crate::diffusion::sampler::ddim`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DdimStep {
    /// Timestep that the network is asked about.
    pub t: usize,
    /// ᾱ at `t`.
    pub alpha_bar: f64,
    /// ᾱ where the step ends.
    pub alpha_bar_next: f64,
}

impl NoiseSchedule {
    /// The table that `config` describes.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        ensure!(config.num_train_timesteps > 1, "num_train_timesteps must be at least 2");
        let alphas_bar = alphas_bar(config);
        Ok(Self { config: config.clone(), alphas_bar })
    }

    /// x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε. `x0`, `eps` (B, …), `t` (B) → (B, …).
    pub fn add_noise(&self, x0: &Tensor, eps: &Tensor, t: &[usize]) -> Result<Tensor> {
        let alphas_bar = self.at(t)?;
        Ok((scaled(x0, &alphas_bar, f64::sqrt)? + scaled(eps, &alphas_bar, noise_share)?)?)
    }

    /// v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0. `x0`, `eps` (B, …), `t` (B) → (B, …).
    pub fn velocity(&self, x0: &Tensor, eps: &Tensor, t: &[usize]) -> Result<Tensor> {
        let alphas_bar = self.at(t)?;
        Ok((scaled(eps, &alphas_bar, f64::sqrt)? - scaled(x0, &alphas_bar, noise_share)?)?)
    }

    /// Training target of the network. `x0`, `eps` (B, …), `t` (B) → (B, …).
    pub fn target(&self, x0: &Tensor, eps: &Tensor, t: &[usize]) -> Result<Tensor> {
        match self.config.prediction_type {
            Prediction::Epsilon => Ok(eps.clone()),
            Prediction::V => self.velocity(x0, eps, t),
            Prediction::Sample => Ok(x0.clone()),
        }
    }

    /// The clean sample behind the network's `output` at `x_t`; all (B, …), `t` (B).
    pub fn to_x0(&self, output: &Tensor, x_t: &Tensor, t: &[usize]) -> Result<Tensor> {
        Ok(self.config.prediction_type.to_x0(output, x_t, &self.at(t)?)?)
    }

    /// The noise behind the network's `output` at `x_t`; all (B, …), `t` (B).
    pub fn to_eps(&self, output: &Tensor, x_t: &Tensor, t: &[usize]) -> Result<Tensor> {
        Ok(self.config.prediction_type.to_eps(output, x_t, &self.at(t)?)?)
    }

    /// Min-SNR weights of the loss (Hang et al. 2023), with SNR = ᾱ/(1−ᾱ): min(SNR, γ) for an x_0 target,
    /// divided by SNR for ε and by SNR + 1 for v. The paper's γ is 5. `t` (B) → (B).
    pub fn min_snr_weights(&self, t: &[usize], gamma: f64) -> Result<Vec<f64>> {
        let weight = |alpha_bar: f64| {
            let snr = alpha_bar / (1.0 - alpha_bar).max(SMALLEST * SMALLEST);
            match self.config.prediction_type {
                Prediction::Sample => snr.min(gamma),
                // min(SNR, γ)/SNR, written so that SNR = 0 is no division by zero
                Prediction::Epsilon => (gamma / snr).min(1.0),
                Prediction::V => snr.min(gamma) / (snr + 1.0),
            }
        };
        Ok(self.at(t)?.into_iter().map(weight).collect())
    }

    /// The steps of DDIM, first to last.
    pub fn ddim_steps(&self, steps: usize) -> Result<Vec<DdimStep>> {
        let stride = self.stride(steps)?;
        let last = if self.config.set_alpha_to_one { 1.0 } else { self.alphas_bar[0] };
        let step = |t: f64| {
            let t = t.round_ties_even() as usize;
            let alpha_bar = self.alpha_bar(t, steps)?;
            // As diffusers does: one stride back, which need not be the next timestep in the list.
            let alpha_bar_next = t.checked_sub(stride).map_or(last, |next| self.alphas_bar[next]);
            Ok(DdimStep { t, alpha_bar, alpha_bar_next })
        };
        self.timesteps(steps, Spacing::Leading)?.into_iter().map(step).collect()
    }

    fn at(&self, t: &[usize]) -> Result<Vec<f64>> {
        let look_up = |t: &usize| {
            self.alphas_bar
                .get(*t)
                .copied()
                .with_context(|| format!("timestep {t} of {}", self.alphas_bar.len()))
        };
        t.iter().map(look_up).collect()
    }
}

impl Prediction {
    /// The denoised sample D(x; σ) of Karras et al. 2022 from the network's `output`, where `x` = x_0 + σ·ε (B, …) and
    /// the network was shown x/√(σ²+1).
    pub fn denoised(self, output: &Tensor, x: &Tensor, sigma: f64) -> candle_core::Result<Tensor> {
        let total = sigma * sigma + 1.0;
        match self {
            Prediction::Epsilon => x - (output * sigma)?,
            Prediction::V => (x / total)? - (output * (sigma / total.sqrt()))?,
            Prediction::Sample => Ok(output.clone()),
        }
    }

    /// x_0 from the network's `output` at `x_t` (B, …); `alphas_bar` (B), or one for all samples.
    pub fn to_x0(self, output: &Tensor, x_t: &Tensor, alphas_bar: &[f64]) -> candle_core::Result<Tensor> {
        match self {
            Prediction::Epsilon => {
                let x0 = (x_t - scaled(output, alphas_bar, noise_share)?)?;
                scaled(&x0, alphas_bar, |a| 1.0 / a.sqrt().max(SMALLEST))
            }
            Prediction::V => scaled(x_t, alphas_bar, f64::sqrt)? - scaled(output, alphas_bar, noise_share)?,
            Prediction::Sample => Ok(output.clone()),
        }
    }

    /// ε from the network's `output` at `x_t` (B, …); `alphas_bar` (B), or one for all samples.
    pub fn to_eps(self, output: &Tensor, x_t: &Tensor, alphas_bar: &[f64]) -> candle_core::Result<Tensor> {
        match self {
            Prediction::Epsilon => Ok(output.clone()),
            Prediction::V => scaled(output, alphas_bar, f64::sqrt)? + scaled(x_t, alphas_bar, noise_share)?,
            Prediction::Sample => {
                let noise = (x_t - scaled(output, alphas_bar, f64::sqrt)?)?;
                scaled(&noise, alphas_bar, |a| 1.0 / noise_share(a).max(SMALLEST))
            }
        }
    }
}

/// Guards divisions where no signal (ᾱ = 0) or no noise (ᾱ = 1) is left; what is divided there is later
/// multiplied by zero.
const SMALLEST: f64 = 1e-8;

fn noise_share(alpha_bar: f64) -> f64 {
    (1.0 - alpha_bar).sqrt()
}

/// `x` (B, …) times f(ᾱ) of each sample; `alphas_bar` (B), or one for all samples.
fn scaled(x: &Tensor, alphas_bar: &[f64], f: impl Fn(f64) -> f64) -> candle_core::Result<Tensor> {
    if let [one] = alphas_bar {
        return x * f(*one);
    }
    if alphas_bar.len() != x.dim(0)? {
        candle_core::bail!("{} timesteps for a batch of shape {:?}", alphas_bar.len(), x.shape());
    }
    let mut shape = vec![1; x.rank()];
    shape[0] = alphas_bar.len();
    let factors: Vec<f32> = alphas_bar.iter().map(|alpha_bar| f(*alpha_bar) as f32).collect();
    x.broadcast_mul(&Tensor::from_vec(factors, shape, x.device())?.to_dtype(x.dtype())?)
}

/// A model's `scheduler_config.json`. Default: SDXL's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// T.
    pub num_train_timesteps: usize,
    /// β_0.
    pub beta_start: f64,
    /// β_{T−1}.
    pub beta_end: f64,
    /// How β grows from the first to the last.
    pub beta_schedule: BetaSchedule,
    /// Prediction type of the network.
    pub prediction_type: Prediction,
    /// Which of the T timesteps a sampler visits; each sampler has its own default, as in diffusers.
    pub timestep_spacing: Option<Spacing>,
    /// Added to every timestep with leading spacing.
    pub steps_offset: usize,
    /// DDIM's last step ends at ᾱ = 1 instead of ᾱ_0.
    pub set_alpha_to_one: bool,
    /// Where the last step ends, in σ.
    pub final_sigmas_type: FinalSigma,
    /// Noise levels in equal steps of σ^(1/7) (Karras et al. 2022, eq. 5) instead of timesteps in equal steps.
    pub use_karras_sigmas: bool,
    /// Fewer than 15 steps of a multistep method end with a step of first order.
    pub lower_order_final: bool,
    /// DPM-Solver++ always ends with a step of first order.
    pub euler_at_final: bool,
    /// Steps among which LCM chooses its own.
    pub original_inference_steps: usize,
    /// Factor on t in LCM's boundary condition.
    pub timestep_scaling: f64,
    /// A setting of DPM-Solver++ or UniPC that is not implemented, for example `solver_order: 3`; those two samplers
    /// refuse it, the others never look at it.
    #[serde(skip)]
    pub unsupported_solver: Option<String>,
    /// Shift the betas so that no signal is left at T−1 (Lin et al. 2023, algorithm 1).
    pub rescale_betas_zero_snr: bool,
}

/// How β grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// β itself in equal steps.
    Linear,
    /// √β in equal steps (latent diffusion).
    ScaledLinear,
    /// ᾱ follows a squared cosine, β at most 0.999 (Nichol and Dhariwal 2021).
    SquaredcosCapV2,
}

/// Which timesteps are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spacing {
    /// Multiples of T / steps from 0.
    Leading,
    /// Multiples of T / steps down from T.
    Trailing,
    /// From 0 to T−1 with both ends.
    Linspace,
}

/// Where the last step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigma {
    /// At σ = 0.
    Zero,
    /// At the smallest σ of training.
    SigmaMin,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction_type: Prediction::Epsilon,
            timestep_spacing: Some(Spacing::Leading),
            steps_offset: 1,
            set_alpha_to_one: false,
            final_sigmas_type: FinalSigma::Zero,
            use_karras_sigmas: false,
            lower_order_final: true,
            euler_at_final: false,
            original_inference_steps: 50,
            timestep_scaling: 10.0,
            unsupported_solver: None,
            rescale_betas_zero_snr: false,
        }
    }
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json`. Keys that are left out have the default of the diffusers class that the
    /// file names, but for the spacing of timesteps, whose default is that of the sampler.
    ///
    /// # Errors
    /// Malformed JSON, and every setting that changes the schedule and is not implemented, by its name.
    pub fn from_json(text: &str) -> Result<Self> {
        // Python writes `-Infinity`, which is no JSON, for DPM-Solver's lowest λ.
        let text = text.replace(": -Infinity", ": null");
        let mut json: serde_json::Value = serde_json::from_str(&text).context("not JSON")?;
        let keys = json.as_object_mut().context("not a JSON object")?;
        let class = keys.get("_class_name").and_then(|name| name.as_str()).unwrap_or_default().to_string();
        let defaults = if class == "LCMScheduler" {
            json!({ "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear" })
        } else {
            json!({ "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear" })
        };
        let common = json!({
            "steps_offset": 0, "set_alpha_to_one": true, "clip_sample": class == "DDIMScheduler",
            "timestep_spacing": null,
        });
        for (key, value) in [defaults, common].iter().filter_map(|part| part.as_object()).flatten() {
            keys.entry(key).or_insert_with(|| value.clone());
        }

        let refused_when_on = [
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_lu_lambdas",
            "use_flow_sigmas",
            "thresholding",
            "clip_sample",
        ];
        for key in refused_when_on {
            let on = keys.get(key).and_then(|value| value.as_bool()).unwrap_or(false);
            ensure!(!on, "scheduler setting `{key}: true` is not supported");
        }
        for key in ["trained_betas", "sigma_min", "sigma_max"] {
            let absent = keys.get(key).is_none_or(|value| value.is_null());
            ensure!(absent, "scheduler setting `{key}` is not supported");
        }
        for (key, only) in [("interpolation_type", "linear"), ("timestep_type", "discrete")] {
            match keys.get(key).and_then(|value| value.as_str()) {
                Some(other) if other != only => bail!("scheduler setting `{key}: {other}` is not supported"),
                _ => {}
            }
        }
        // diffusers turns the solver types of other classes into the class's own default.
        let solver = [
            ("lambda_min_clipped", json!([])),
            ("solver_order", json!([2])),
            ("algorithm_type", json!(["dpmsolver++", "deis"])),
            ("solver_type", json!(["midpoint", "bh2", "logrho"])),
            ("predict_x0", json!([true])),
            ("disable_corrector", json!([[]])),
            ("solver_p", json!([])),
        ];
        let unsupported_solver = solver.iter().find_map(|(key, known)| {
            let value = keys.get(*key).filter(|value| !value.is_null())?;
            let known = known.as_array().is_some_and(|known| known.contains(value));
            (!known).then(|| format!("{key}: {value}"))
        });
        limits::check_json(&json).map_err(|why| anyhow::anyhow!("{why}"))?;
        let config = Self { unsupported_solver, ..serde_json::from_value(json)? };
        ensure!(
            !config.rescale_betas_zero_snr || config.prediction_type != Prediction::Epsilon,
            "`rescale_betas_zero_snr` leaves no signal at the first step, from which `epsilon` cannot be used"
        );
        Ok(config)
    }
}

/// ᾱ with the roundings of PyTorch: β and 1 − β in f32, the product in f64, kept as f32. A thousand factors in
/// another precision move σ by 1e-6 of itself.
fn alphas_bar(config: &SchedulerConfig) -> Vec<f64> {
    let count = config.num_train_timesteps;
    let betas: Vec<f32> = match config.beta_schedule {
        BetaSchedule::Linear => linspace(config.beta_start, config.beta_end, count),
        BetaSchedule::ScaledLinear => {
            let roots = linspace(config.beta_start.sqrt(), config.beta_end.sqrt(), count);
            roots.into_iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredcosCapV2 => {
            let cosine = |t: usize| {
                let angle = (t as f64 / count as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2;
                angle.cos().powi(2)
            };
            (0..count).map(|t| (1.0 - cosine(t + 1) / cosine(t)).min(0.999) as f32).collect()
        }
    };
    let product = |betas: &[f32]| -> Vec<f64> {
        let mut product = 1f64;
        let mut next = |beta: &f32| {
            product *= f64::from(1.0 - beta);
            f64::from(product as f32)
        };
        betas.iter().map(&mut next).collect()
    };
    if !config.rescale_betas_zero_snr {
        return product(&betas);
    }
    let roots: Vec<f32> = product(&betas).iter().map(|alpha_bar| alpha_bar.sqrt() as f32).collect();
    let (first, last) = (roots[0], roots[count - 1]);
    let shifted: Vec<f32> = roots.iter().map(|root| (root - last) * (first / (first - last))).collect();
    let squared: Vec<f32> = shifted.iter().map(|root| root * root).collect();
    let factors =
        squared.iter().enumerate().map(|(i, value)| if i == 0 { *value } else { value / squared[i - 1] });
    product(&factors.map(|factor| 1.0 - factor).collect::<Vec<_>>())
}

/// `torch.linspace` in f32: from both ends towards the middle.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| if i < count / 2 { start + step * i as f32 } else { end - step * (count - 1 - i) as f32 })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn schedule(prediction_type: Prediction) -> NoiseSchedule {
        NoiseSchedule::new(&SchedulerConfig { prediction_type, ..Default::default() }).unwrap()
    }

    #[test]
    fn the_target_leads_back_to_the_clean_sample_and_the_noise() -> Result<()> {
        let x0 = crate::diffusion::noise::normal(1, 0, (3, 4, 2, 2), &Device::Cpu)?;
        let eps = crate::diffusion::noise::normal(1, 1, (3, 4, 2, 2), &Device::Cpu)?;
        let t = [0, 500, 900];
        for prediction in [Prediction::Epsilon, Prediction::V, Prediction::Sample] {
            let schedule = schedule(prediction);
            let x_t = schedule.add_noise(&x0, &eps, &t)?;
            let target = schedule.target(&x0, &eps, &t)?;
            let far = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f32>();
            assert!(far(&schedule.to_x0(&target, &x_t, &t)?, &x0)? < 1e-4);
            // At t = 0 the noise is 3 % of the sample: rounding grows by 1/0.03.
            assert!(far(&schedule.to_eps(&target, &x_t, &t)?, &eps)? < 1e-4);
        }
        Ok(())
    }

    #[test]
    fn a_batch_is_treated_as_its_samples_are_alone() -> Result<()> {
        let x0 = crate::diffusion::noise::normal(1, 0, (2, 3), &Device::Cpu)?;
        let eps = crate::diffusion::noise::normal(1, 1, (2, 3), &Device::Cpu)?;
        let schedule = schedule(Prediction::V);
        let both = schedule.velocity(&x0, &eps, &[10, 700])?.to_vec2::<f32>()?;
        for (i, t) in [10, 700].into_iter().enumerate() {
            let alone = schedule.velocity(&x0.narrow(0, i, 1)?, &eps.narrow(0, i, 1)?, &[t])?;
            assert_eq!(alone.to_vec2::<f32>()?[0], both[i]);
        }
        assert!(schedule.velocity(&x0, &eps, &[1, 2, 3]).is_err());
        Ok(())
    }

    #[test]
    fn min_snr_weights_are_those_of_the_paper() -> Result<()> {
        let t = [0, 400, 999];
        let v = schedule(Prediction::V);
        let weights = |prediction| schedule(prediction).min_snr_weights(&t, 5.0);
        for (i, t) in t.iter().enumerate() {
            let snr = v.alphas_bar[*t] / (1.0 - v.alphas_bar[*t]);
            let least = snr.min(5.0);
            assert!((weights(Prediction::Sample)?[i] - least).abs() < 1e-12);
            assert!((weights(Prediction::Epsilon)?[i] - least / snr).abs() < 1e-12);
            assert!((weights(Prediction::V)?[i] - least / (snr + 1.0)).abs() < 1e-12);
        }
        Ok(())
    }

    #[test]
    fn settings_that_are_not_implemented_are_refused_by_name() {
        for setting in ["thresholding", "clip_sample", "use_beta_sigmas"] {
            let error = SchedulerConfig::from_json(&format!(r#"{{"{setting}": true}}"#)).unwrap_err();
            assert!(error.to_string().contains(setting), "{error}");
        }
        for text in [
            r#"{"trained_betas": [0.1]}"#,
            r#"{"timestep_type": "continuous"}"#,
            r#"{"interpolation_type": "log_linear"}"#,
            r#"{"prediction_type": "flow_prediction"}"#,
            r#"{"rescale_betas_zero_snr": true}"#,
            r#"{"sigma_max": 14.6}"#,
            r#"{"_class_name": "DDIMScheduler"}"#, // clips, by the default of its class
            "[]",
            "{",
        ] {
            assert!(SchedulerConfig::from_json(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sdxl_s_own_file_is_the_default() -> Result<()> {
        let text = r#"{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0",
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,
            "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
            "sample_max_value": 1.0, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
            "timestep_spacing": "leading", "trained_betas": null, "use_karras_sigmas": false}"#;
        assert_eq!(SchedulerConfig::from_json(text)?, SchedulerConfig::default());
        Ok(())
    }

    #[test]
    fn a_solver_that_is_not_implemented_is_remembered_by_name() -> Result<()> {
        for (text, refused) in [
            (
                r#"{"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "algorithm_type": "dpmsolver++",
                "solver_type": "midpoint", "lambda_min_clipped": -Infinity, "use_karras_sigmas": true}"#,
                None,
            ),
            (
                r#"{"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "predict_x0": true,
                "disable_corrector": [], "solver_p": null}"#,
                None,
            ),
            (r#"{"lambda_min_clipped": -5.1}"#, Some("lambda_min_clipped: -5.1")),
            (r#"{"solver_order": 3}"#, Some("solver_order: 3")),
            (r#"{"algorithm_type": "sde-dpmsolver++"}"#, Some("algorithm_type: \"sde-dpmsolver++\"")),
            (r#"{"disable_corrector": [0]}"#, Some("disable_corrector: [0]")),
        ] {
            assert_eq!(SchedulerConfig::from_json(text)?.unsupported_solver.as_deref(), refused, "{text}");
        }
        Ok(())
    }

    #[test]
    fn impossible_numbers_of_steps_are_errors() {
        for steps in [0, 51] {
            assert!(schedule(Prediction::Epsilon).lcm_timesteps(steps).is_err(), "{steps}");
        }
        let schedule = schedule(Prediction::Epsilon);
        for steps in [0, 1000, 1001] {
            assert!(schedule.ddim_steps(steps).is_err(), "{steps}"); // 1000 steps and offset 1 lead to t = 1000
            assert!(schedule.euler_sigmas(steps).is_err(), "{steps}");
        }
    }
}
