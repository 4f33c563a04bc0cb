//! Person → latent: mixer and diffusion transformer, sampled with DDIM.
//!
//! The diffused variable is x_0 = (z − guess) · scale: the latent, less the linear guess where there is one, brought
//! to unit power by one factor. In a prototype the transformer on what ridge regression leaves over kept a little
//! more of a person than one on the whole latent (factor correlation 0.37 against 0.34, within its noise) at a
//! larger error of the weights; so the guess is optional.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::dit::{Dit, DitConfig};
use super::mixer::{Mixer, MixerConfig, MixerKind};
use super::prior::{Prior, PriorConfig};
use super::ridge::Ridge;
use super::scaler::StandardScaler;
use super::tensor_names;
use super::tensors::Weights;
use crate::diffusion::noise;
use crate::diffusion::sampler::Ddim;
use crate::diffusion::schedule::{BetaSchedule, NoiseSchedule, Prediction, SchedulerConfig, Spacing};
use crate::diffusion::shifted::Shift;
use crate::identity::Identity;
use crate::identity::clip::ImageInput;
use crate::named::named;
use crate::weights::frozen;
use crate::weights::model_id::ModelId;

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
    /// Where the diffusion ends; N(0, I) without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prior: Option<PriorConfig>,
    /// Model of the face embeddings.
    pub face_encoder: ModelId,
    /// Model of the image embeddings.
    pub image_encoder: ModelId,
    /// Input of the image encoder, and which output is taken.
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

named! {
    /// Combination of several samples.
    #[derive(Default)]
    pub enum Choice {
        /// Their mean: nearest to all samples, with less detail than each.
        #[default]
        Mean = "mean",
        /// The sample nearest to their mean.
        Typical = "typical",
    }
}

/// How a latent is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleOptions {
    /// DDIM steps.
    pub steps: usize,
    /// Fresh noise in each step: 0 is deterministic, 1 as much as in DDPM.
    pub eta: f64,
    /// Classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// Of the noise.
    pub seed: u64,
    /// Latents that are sampled.
    pub samples: usize,
    /// How samples are combined.
    pub choice: Choice,
    /// Factor on the latent: how far from the mean LoRA. Regression shrinks towards the mean; more than 1 undoes it.
    pub strength: f64,
}

impl Default for SampleOptions {
    /// One step without guidance, one sample of seed 0.
    fn default() -> Self {
        Self { steps: 1, eta: 0.0, guidance: 1.0, seed: 0, samples: 1, choice: Choice::Mean, strength: 1.0 }
    }
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
    /// ScaledRows [face; image] (B, F + I) → z (B, L).
    pub guess: Option<Ridge>,
    /// Statistics of embeddings and latents.
    pub stats: DenoiserStats,
    schedule: NoiseSchedule,
    weights: Weights,
}

/// Standardisation of the inputs and the scale of the output.
#[derive(Clone, Debug)]
pub struct DenoiserStats {
    /// Of face embeddings.
    pub face: StandardScaler,
    /// Of image embeddings.
    pub image: StandardScaler,
    /// x_0 = (z − guess) · scale; [`super::scaler::unit_power`] of the training set.
    pub scale: f64,
    /// Of x_0, where the config has a prior.
    pub prior: Option<Prior>,
    /// Deviation of each value of the latent z over the people of the training set (L): what nearby people are made
    /// with. Folders of earlier versions have none.
    pub spread: Option<Tensor>,
}

impl DenoiserStats {
    /// The input of the linear guess: standardised [face; image] (B, F + I), less what the mixer does not see.
    pub fn seen(&self, kind: MixerKind, face: &Tensor, image: &Tensor) -> candle_core::Result<Tensor> {
        kind.seen(&self.face.apply(face)?, &self.image.apply(image)?)
    }

    /// The same on `device`.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        Ok(Self {
            face: self.face.to_device(device)?,
            image: self.image.to_device(device)?,
            scale: self.scale,
            prior: self.prior.as_ref().map(|prior| prior.to_device(device)).transpose()?,
            spread: self.spread.as_ref().map(|spread| spread.to_device(device)).transpose()?,
        })
    }

    fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors: BTreeMap<String, Tensor> = self.face.tensors("face")?.into_iter().collect();
        tensors.extend(self.image.tensors("image")?);
        tensors.insert("latent.scale".into(), Tensor::from_slice(&[self.scale], 1, &Device::Cpu)?);
        tensors.extend(self.prior.iter().flat_map(Prior::tensors));
        tensors.extend(self.spread.iter().map(|spread| (SPREAD.to_string(), spread.clone())));
        Ok(tensors)
    }

    fn load(config: &DenoiserConfig, tensors: &HashMap<String, Tensor>, device: &Device) -> Result<Self> {
        let scale = tensors.get("latent.scale").context("tensor `latent.scale` is missing")?;
        let on_device = |x: &Tensor| x.to_dtype(DType::F32)?.to_device(device);
        let prior = config.prior.as_ref().map(|prior| Prior::load(prior, tensors, device));
        Ok(Self {
            prior: prior.transpose()?,
            spread: tensors.get(SPREAD).map(on_device).transpose()?,
            face: StandardScaler::load(tensors, "face", device)?,
            image: StandardScaler::load(tensors, "image", device)?,
            scale: scale.to_dtype(DType::F64)?.flatten_all()?.get(0)?.to_scalar()?,
        })
    }
}

/// Name of [`DenoiserStats::spread`] in a file.
const SPREAD: &str = "latent.spread";

impl Denoiser {
    /// Builds the networks on `device` from `weights`: `mixer.…`, `dit.…` and, with a linear guess, `guess.…`, under their
    /// names in files or those of [`tensor_names`].
    pub fn new(
        config: DenoiserConfig,
        stats: DenoiserStats,
        weights: BTreeMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let weights = tensor_names::all_from_old(weights);
        let named = weights.clone().into_iter().collect();
        let networks = Networks::new(&config, frozen(named, DType::F32, device))?;
        Self::assemble(config, stats.to_device(device)?, networks, Weights::Held(weights))
    }

    pub(super) fn open(
        config: &DenoiserConfig,
        files: &crate::weights::model_folder::ModelFiles,
        device: &Device,
    ) -> Result<Self> {
        let networks = files
            .load("", "dit", DType::F32, device, |vb| Networks::new(config, tensor_names::old_or_new(vb)))?;
        let stats = DenoiserStats::load(config, &files.tensors("", "stats")?, device)
            .map_err(|error| files.unusable("stats.safetensors", format!("{error:#}")))?;
        Self::assemble(config.clone(), stats, networks, Weights::In(files.clone()))
            .map_err(|error| files.unusable("config.json", format!("{error:#}")))
    }

    fn assemble(
        config: DenoiserConfig,
        stats: DenoiserStats,
        networks: Networks,
        weights: Weights,
    ) -> Result<Self> {
        let sizes = (config.mixer.face, config.mixer.image);
        ensure!(
            (stats.face.width(), stats.image.width()) == sizes && config.mixer.width == config.dit.width,
            "the sizes of mixer, transformer and statistics do not agree"
        );
        let latent = config.dit.latent;
        let clusters = config.prior.as_ref().map_or(0, |prior| prior.clusters);
        if let Some(prior) = &stats.prior {
            ensure!(
                prior.mean.dim(1)? == latent && prior.centroids.dim(1)? == config.mixer.face,
                "the prior is for latents of {} values and faces of {}, the transformer has {latent} and {}",
                prior.mean.dim(1)?,
                prior.centroids.dim(1)?,
                config.mixer.face
            );
        }
        ensure!(
            config.dit.clusters == clusters && stats.prior.is_some() == config.prior.is_some(),
            "the transformer knows {} Gaussians, the prior has {clusters}",
            config.dit.clusters
        );
        if let Some(spread) = &stats.spread {
            ensure!(spread.dims() == [latent], "`{SPREAD}` has shape {:?}, wanted [{latent}]", spread.dims());
        }
        ensure!(
            config.diffusion.prediction_type == Prediction::Sample,
            "the transformer predicts x_0, `diffusion.prediction_type` must be `sample`"
        );
        let schedule = NoiseSchedule::new(&config.diffusion)?;
        let Networks { mixer, dit, guess } = networks;
        Ok(Self { config, mixer, dit, guess, stats, schedule, weights })
    }

    pub(super) fn parts(&self) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, Tensor>)> {
        Ok((tensor_names::all_from_old(self.weights.by_name("dit")?), self.stats.tensors()?))
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
        let MixerConfig { kind, face: f, image: i, .. } = self.config.mixer;
        let unseen = vec![0.0; i];
        let image = match &identity.image {
            Some(image) => image,
            None if !kind.sees_image() => &unseen,
            None => anyhow::bail!("the hypernetwork wants an image embedding as well"),
        };
        Ok((
            row(&identity.face, f, "face", &self.config.face_encoder)?,
            row(image, i, "image", &self.config.image_encoder)?,
        ))
    }

    /// The linear guess z (B, L), zero where there is none. `face` (B, F), `image` (B, I), as the encoders made them.
    pub fn linear_guess(&self, face: &Tensor, image: &Tensor) -> Result<Tensor> {
        match &self.guess {
            Some(guess) => Ok(guess.forward(&self.stats.seen(self.config.mixer.kind, face, image)?)?),
            None => Ok(Tensor::zeros((face.dim(0)?, self.config.dit.latent), DType::F32, face.device())?),
        }
    }

    /// Whether there is a [`Self::linear_guess`].
    pub fn has_linear_guess(&self) -> bool {
        self.guess.is_some()
    }

    /// Gate values (B, 2): image and face; none where the mixer has no gate.
    pub fn gates(&self, face: &Tensor, image: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.mixer.forward(&self.stats.face.apply(face)?, &self.stats.image.apply(image)?)?.gates)
    }

    /// Where the diffusion of these people ends, and which Gaussian that is. `face` (B, F).
    fn shift(&self, face: &Tensor) -> Result<(Shift, Option<Tensor>)> {
        match &self.stats.prior {
            Some(prior) => {
                let cluster = prior.choose(face)?;
                Ok((prior.shift(&cluster)?, Some(cluster)))
            }
            None => {
                let mean = Tensor::zeros((1, self.config.dit.latent), DType::F32, face.device())?;
                Ok((Shift { std: mean.ones_like()?, mean }, None))
            }
        }
    }

    /// Samples latents z (B, L). `face` (B, F), `image` (B, I), as the encoders made them.
    pub fn sample(&self, face: &Tensor, image: &Tensor, options: &SampleOptions) -> Result<Tensor> {
        let SampleOptions { steps, eta, guidance, seed, samples, choice, strength } = *options;
        ensure!(steps > 0 && samples > 0, "at least one step and one sample");
        ensure!(eta.is_finite() && eta >= 0.0, "eta is a number from 0 on, not {eta}");
        let b = face.dim(0)?;
        let (shift, cluster) = self.shift(face)?;
        // Both predictions of guidance know the Gaussian: only then is it the same with ε and with x_0.
        let of_cluster = |condition: Tensor| match &cluster {
            Some(cluster) => self.dit.in_cluster(&condition, cluster),
            None => Ok(condition),
        };
        let mixed = self.mixer.forward(&self.stats.face.apply(face)?, &self.stats.image.apply(image)?)?;
        let condition = of_cluster(mixed.condition)?;
        let null_condition = of_cluster(self.mixer.null_condition(b)?)?;
        let predict = |x: &Tensor, t: f64| -> Result<Tensor> {
            let t = Tensor::full(t as f32, b, x.device())?;
            let x0 = self.dit.forward(x, &t, &condition)?;
            if guidance == 1.0 {
                return Ok(x0);
            }
            let without = self.dit.forward(x, &t, &null_condition)?;
            Ok((&without + ((x0 - &without)? * guidance)?)?)
        };
        let shape = (b, self.config.dit.latent);
        let sample = |sample: usize| -> Result<Tensor> {
            // A stream a sample for the start, and streams that no start has for what steps add.
            let fresh = |step: usize| {
                let stream = (1 + step as u64) << 32 | sample as u64;
                Ok(noise::normal(seed, stream, shape, face.device())?)
            };
            let start = noise::normal(seed, sample as u64, shape, face.device())?;
            shift.ddim(predict, start, Ddim { schedule: &self.schedule, steps, eta }, fresh)
        };
        let guess = self.linear_guess(face, image)?;
        let mut sum = guess.clone();
        let mut drawn = Vec::new();
        for i in 0..samples {
            let x0 = sample(i)?;
            if choice == Choice::Typical && samples > 1 {
                drawn.push(x0.clone());
            }
            sum = (sum + (x0 / (self.stats.scale * samples as f64))?)?;
        }
        if !drawn.is_empty() {
            let mean = ((sum - &guess)? * self.stats.scale)?;
            sum = (guess + (typical(&Tensor::stack(&drawn, 0)?, &mean)? / self.stats.scale)?)?;
        }
        Ok((sum * strength)?)
    }
}

/// Of `samples` (S, B, L) the ones that lie nearest to their `mean` (B, L) → (B, L).
fn typical(samples: &Tensor, mean: &Tensor) -> Result<Tensor> {
    let distances = samples.broadcast_sub(mean)?.sqr()?.sum(2)?; // (S, B)
    let nearest: Vec<u32> = distances.argmin(0)?.to_vec1()?;
    let rows = nearest.iter().enumerate().map(|(row, sample)| samples.get(*sample as usize)?.get(row));
    Ok(Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

struct Networks {
    mixer: Mixer,
    dit: Dit,
    guess: Option<Ridge>,
}

impl Networks {
    fn new(config: &DenoiserConfig, vb: VarBuilder) -> Result<Self> {
        let guess = || Ridge::new(config.mixer.input(), config.dit.latent, vb.pp("guess"));
        Ok(Self {
            mixer: Mixer::new(&config.mixer, vb.pp("mixer"))?,
            dit: Dit::new(&config.dit, vb.pp("dit"))?,
            guess: config.linear_guess.then(guess).transpose()?,
        })
    }
}
