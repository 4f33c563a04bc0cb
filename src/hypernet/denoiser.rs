//! Person → latent: mixer and diffusion transformer, sampled with DDIM.
//!
//! What is diffused is x_0 = (z − guess) · scale: the latent, less the linear guess where there is one, brought
//! to unit power by one factor. In a prototype the transformer on what ridge regression leaves over kept a little
//! more of a person than one on the whole latent (factor correlation 0.37 against 0.34, within its noise) at a
//! larger error of the weights; so the guess is optional.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::ModelId;
use super::dit::{Dit, DitConfig};
use super::mixer::{Mixer, MixerConfig};
use super::ridge::Ridge;
use super::stats::Standardise;
use crate::diffusion::noise;
use crate::diffusion::sampler::ddim;
use crate::diffusion::schedule::{BetaSchedule, NoiseSchedule, Prediction, SchedulerConfig, Spacing};
use crate::identity::Identity;
use crate::identity::clip::ImageInput;
use crate::weights::frozen;

/// Sizes and settings of the networks between a person and a latent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenoiserConfig {
    /// Sizes of the mixer.
    pub mixer: MixerConfig,
    /// Sizes of the transformer.
    pub dit: DitConfig,
    /// Noise of training and steps of sampling.
    pub diffusion: SchedulerConfig,
    /// DDIM steps unless asked otherwise.
    pub steps: usize,
    /// Guidance unless asked otherwise; 1 is none.
    pub guidance: f64,
    /// Whether a linear guess is stored, which the transformer corrects.
    pub linear_guess: bool,
    /// What made the face embeddings.
    pub face_encoder: ModelId,
    /// What made the image embeddings.
    pub image_encoder: ModelId,
    /// What the image encoder is shown and which output is taken.
    #[serde(default, skip_serializing_if = "ImageInput::is_default")]
    pub image_input: ImageInput,
}

/// How LoRA latents are diffused: T = 1000, β linear from 1e-4 to 0.02 as in G.pt and HyperDiffusion, x_0 predicted.
///
/// Trailing steps, so that one step starts at pure noise.
pub fn diffusion_of_latents() -> SchedulerConfig {
    SchedulerConfig {
        beta_start: 1e-4,
        beta_end: 0.02,
        beta_schedule: BetaSchedule::Linear,
        prediction_type: Prediction::Sample,
        timestep_spacing: Some(Spacing::Trailing),
        steps_offset: 0,
        set_alpha_to_one: true,
        ..SchedulerConfig::default()
    }
}

/// How a latent is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleOptions {
    /// DDIM steps.
    pub steps: usize,
    /// Classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// Of the noise.
    pub seed: u64,
    /// Latents that are sampled and averaged.
    pub samples: usize,
    /// Factor on the latent: how far from the mean LoRA. Regression shrinks towards the mean; more than 1 undoes it.
    pub strength: f64,
}

/// Mixer, transformer, linear guess and their statistics.
#[derive(Clone, Debug)]
pub struct Denoiser {
    /// Sizes and settings.
    pub config: DenoiserConfig,
    /// Person → condition.
    pub mixer: Mixer,
    /// x_t, t, condition → x_0.
    pub dit: Dit,
    /// Standardised [face; image] (B, F + I) → z (B, L).
    pub guess: Option<Ridge>,
    /// What has to be known about embeddings and latents.
    pub stats: DenoiserStats,
    schedule: NoiseSchedule,
    weights: BTreeMap<String, Tensor>,
}

/// Standardisation of the inputs and the scale of the output.
#[derive(Clone, Debug)]
pub struct DenoiserStats {
    /// Of face embeddings.
    pub face: Standardise,
    /// Of image embeddings.
    pub image: Standardise,
    /// x_0 = (z − guess) · scale; [`super::stats::unit_power`] of the training set.
    pub scale: f64,
}

impl DenoiserStats {
    /// The input of the linear guess: standardised [face; image] (B, F + I).
    pub fn together(&self, face: &Tensor, image: &Tensor) -> candle_core::Result<Tensor> {
        Tensor::cat(&[self.face.apply(face)?, self.image.apply(image)?], 1)
    }

    fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors: BTreeMap<String, Tensor> = self.face.tensors("face")?.into_iter().collect();
        tensors.extend(self.image.tensors("image")?);
        tensors.insert("latent.scale".into(), Tensor::from_slice(&[self.scale], 1, &Device::Cpu)?);
        Ok(tensors)
    }

    fn load(tensors: &HashMap<String, Tensor>, device: &Device) -> Result<Self> {
        let scale = tensors.get("latent.scale").context("tensor `latent.scale` is missing")?;
        Ok(Self {
            face: Standardise::load(tensors, "face", device)?,
            image: Standardise::load(tensors, "image", device)?,
            scale: scale.to_dtype(DType::F64)?.flatten_all()?.get(0)?.to_scalar()?,
        })
    }
}

impl Denoiser {
    /// Puts trained networks together; `weights` has `mixer.…`, `dit.…` and, with a linear guess, `guess.…`.
    pub fn new(
        config: DenoiserConfig,
        stats: DenoiserStats,
        weights: BTreeMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let named = weights.clone().into_iter().collect();
        let networks = Networks::new(&config, frozen(named, DType::F32, device))?;
        Self::assemble(config, stats, networks, weights)
    }

    pub(super) fn open(
        config: &DenoiserConfig,
        files: &crate::model_files::ModelFiles,
        device: &Device,
    ) -> Result<Self> {
        let networks = files.load("", "dit", DType::F32, device, |vb| Networks::new(config, vb))?;
        let stats = DenoiserStats::load(&files.tensors("", "stats")?, device)
            .map_err(|error| files.unusable("stats.safetensors", format!("{error:#}")))?;
        let weights = files.tensors("", "dit")?.into_iter().collect();
        Self::assemble(config.clone(), stats, networks, weights)
            .map_err(|error| files.unusable("config.json", format!("{error:#}")))
    }

    fn assemble(
        config: DenoiserConfig,
        stats: DenoiserStats,
        networks: Networks,
        weights: BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let sizes = (config.mixer.face, config.mixer.image);
        ensure!(
            (stats.face.width(), stats.image.width()) == sizes && config.mixer.width == config.dit.width,
            "the sizes of mixer, transformer and statistics do not agree"
        );
        ensure!(
            config.diffusion.prediction_type == Prediction::Sample,
            "the transformer predicts x_0, `diffusion.prediction_type` must be `sample`"
        );
        let schedule = NoiseSchedule::new(&config.diffusion)?;
        let Networks { mixer, dit, guess } = networks;
        Ok(Self { config, mixer, dit, guess, stats, schedule, weights })
    }

    pub(super) fn parts(&self) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, Tensor>)> {
        Ok((self.weights.clone(), self.stats.tensors()?))
    }

    /// Embeddings of one person as rows (1, F) and (1, I).
    ///
    /// # Errors
    /// Embeddings of another size than the networks were trained on, and a missing image embedding.
    pub fn embeddings(&self, identity: &Identity, device: &Device) -> Result<(Tensor, Tensor)> {
        let row = |values: &[f32], wanted: usize, what: &str, encoder: &ModelId| {
            ensure!(
                values.len() == wanted,
                "the {what} embedding has {} values, the hypernetwork wants the {wanted} of `{}`",
                values.len(),
                encoder.name
            );
            Ok(Tensor::from_slice(values, (1, wanted), device)?)
        };
        let image = identity.image.as_deref().context("the hypernetwork wants an image embedding as well")?;
        let MixerConfig { face: f, image: i, .. } = self.config.mixer;
        Ok((
            row(&identity.face, f, "face", &self.config.face_encoder)?,
            row(image, i, "image", &self.config.image_encoder)?,
        ))
    }

    /// The linear guess z (B, L), zero where there is none. `face` (B, F), `image` (B, I), as the encoders made them.
    pub fn linear_guess(&self, face: &Tensor, image: &Tensor) -> Result<Tensor> {
        match &self.guess {
            Some(guess) => Ok(guess.forward(&self.stats.together(face, image)?)?),
            None => Ok(Tensor::zeros((face.dim(0)?, self.config.dit.latent), DType::F32, face.device())?),
        }
    }

    /// Gate values (B, 2): image and face.
    pub fn gates(&self, face: &Tensor, image: &Tensor) -> Result<Tensor> {
        Ok(self.mixer.forward(&self.stats.face.apply(face)?, &self.stats.image.apply(image)?)?.gates)
    }

    /// Samples latents z (B, L). `face` (B, F), `image` (B, I), as the encoders made them.
    pub fn sample(&self, face: &Tensor, image: &Tensor, options: &SampleOptions) -> Result<Tensor> {
        let SampleOptions { steps, guidance, seed, samples, strength } = *options;
        ensure!(steps > 0 && samples > 0, "at least one step and one sample");
        let b = face.dim(0)?;
        let condition =
            self.mixer.forward(&self.stats.face.apply(face)?, &self.stats.image.apply(image)?)?.condition;
        let nobody = self.mixer.nobody(b)?;
        let predict = |x: &Tensor, t: f64| -> Result<Tensor> {
            let t = Tensor::full(t as f32, b, x.device())?;
            let x0 = self.dit.forward(x, &t, &condition)?;
            if guidance == 1.0 {
                return Ok(x0);
            }
            let without = self.dit.forward(x, &t, &nobody)?;
            Ok((&without + ((x0 - &without)? * guidance)?)?)
        };
        let mut sum = self.linear_guess(face, image)?;
        for sample in 0..samples {
            let x = noise::normal(seed, sample as u64, (b, self.config.dit.latent), face.device())?;
            // Without η no step takes fresh noise.
            let fresh = |_| anyhow::bail!("DDIM without noise asked for noise");
            let x0 = ddim(predict, x, &self.schedule, steps, 0.0, fresh)?;
            sum = (sum + (x0 / (self.stats.scale * samples as f64))?)?;
        }
        Ok((sum * strength)?)
    }
}

struct Networks {
    mixer: Mixer,
    dit: Dit,
    guess: Option<Ridge>,
}

impl Networks {
    fn new(config: &DenoiserConfig, vb: VarBuilder) -> Result<Self> {
        let MixerConfig { face, image, .. } = config.mixer;
        let guess = || Ridge::new(face + image, config.dit.latent, vb.pp("guess"));
        Ok(Self {
            mixer: Mixer::new(&config.mixer, vb.pp("mixer"))?,
            dit: Dit::new(&config.dit, vb.pp("dit"))?,
            guess: config.linear_guess.then(guess).transpose()?,
        })
    }
}
