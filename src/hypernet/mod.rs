//! Hypernetwork: a person's embeddings → their LoRA.
//!
//! ```text
//! face, image embedding ──► mixer: condition F ──► dit: noise → x_0 ──► lae: latent → vector ──► LoRA
//!                      └──► ridge: linear guess ──────────┘ +
//! ```
//!
//! A hypernetwork is a folder: `config.json`, `lae.safetensors`, `dit.safetensors` (mixer and linear guess
//! included), `stats.safetensors`. HyperLoRA's released weights, another network, are read by [`hyperlora`].
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use difflora::hypernet::lae::{Lae, LaeConfig};
//! use difflora::hypernet::pca::Pca;
//! use difflora::hypernet::weight_preserved_loss::{Distance, loss};
//! use difflora::weights::frozen;
//!
//! // Three centred vectors on a line through the origin: one principal component restores them.
//! let x = Tensor::new(&[[3f32, 4.0], [-6.0, -8.0], [3.0, 4.0]], &Device::Cpu)?;
//! let pca = Pca::fit(&x, 1)?;
//! let config = LaeConfig::Pca { input: 2, latent: 1 };
//! let lae = Lae::new(&config, frozen(Lae::pca_tensors(&pca), DType::F32, &Device::Cpu))?;
//! let z = lae.encode(&x)?; // (B, L)
//! assert!((z.to_vec2::<f32>()?[0][0].abs() - 5.0).abs() < 1e-5);
//! let error = (lae.decode(&z)? - &x)?.abs()?.max_all()?.to_scalar::<f32>()?; // (B, P)
//! assert!(error < 1e-5);
//!
//! // L_WP = mean(|x|·|x − x̂|): the same error costs more where the weight is large.
//! let x = Tensor::new(&[[1f32, 3.0]], &Device::Cpu)?;
//! let x_hat = Tensor::new(&[[1f32, 2.5]], &Device::Cpu)?;
//! let parts = loss(&x, &x_hat, Distance::Mse, 1.0)?;
//! assert_eq!(parts.weight_preserved.to_scalar::<f32>()?, 0.75);
//! assert_eq!(parts.reconstruction.to_scalar::<f32>()?, 0.125);
//! # anyhow::Ok(())
//! ```
//!
#![doc = include_str!("../docs/hypernetwork.md")]

pub mod codec;
pub mod config;
pub mod delta_metrics;
pub mod denoiser;
pub mod dit;
pub mod hyperlora;
pub mod lae;
pub mod lae_conv;
pub mod mixer;
pub mod pca;
pub mod prior;
pub mod ridge;
pub mod row_source;
pub mod scaler;
pub mod tensor_names;
mod tensors;
pub mod weight_preserved_loss;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

pub use codec::LoraCodec;
pub use config::{Config, FORMAT};
pub use denoiser::{Choice, Denoiser, DenoiserConfig, DenoiserStats, SampleOptions, diffusion_of_latents};

use tensors::write_tensors;

use crate::diffusion::noise;
use crate::identity::Identity;
use crate::lora::Lora;
use crate::weights::model_folder::{ModelFiles, save_json};
use crate::weights::sha256;

/// What both hypernetworks do: a person's conditions → LoRA.
pub trait PersonToLora {
    /// What is known of a person from all photos.
    type Conditions;

    /// The LoRA of one person, or of a mixture of people whose weights sum to 1. The same conditions give the same LoRA.
    ///
    /// # Errors
    /// Conditions that the network was not trained with; no person at all.
    fn predict(&self, people: &[(Self::Conditions, f64)]) -> Result<Lora>;
}

/// DiffLoRA's hypernetwork with the options of its sampling.
#[derive(Clone, Copy, Debug)]
pub struct LatentSampler<'a> {
    /// The networks.
    pub hypernet: &'a Hypernet,
    /// How latents are sampled.
    pub options: &'a SampleOptions,
    /// As in [`Hypernet::vary`], with the seed of the options.
    pub vary: Option<f64>,
}

impl PersonToLora for LatentSampler<'_> {
    type Conditions = Identity;

    fn predict(&self, people: &[(Identity, f64)]) -> Result<Lora> {
        let Self { hypernet, options, vary } = *self;
        let latent =
            |(identity, weight): &(Identity, f64)| Ok((hypernet.sample_latent(identity, options)?, *weight));
        let mut latent = mixture(&people.iter().map(latent).collect::<Result<Vec<_>>>()?)?;
        if let Some(vary) = vary {
            latent = hypernet.vary(&latent, vary, options.seed)?;
        }
        hypernet.codec.lora(&latent)
    }
}

/// A trained hypernetwork.
#[derive(Clone, Debug)]
pub struct Hypernet {
    /// LoRA ↔ latent.
    pub codec: LoraCodec,
    /// Person → latent.
    pub denoiser: Denoiser,
}

impl Hypernet {
    /// The config of a hypernetwork folder, without its weights: the whole, and the part between a person and a
    /// latent.
    ///
    /// # Errors
    /// [`Failure::Unusable`] with the file, also for a folder that holds an autoencoder only.
    pub fn config(files: &ModelFiles) -> Result<(Config, DenoiserConfig)> {
        if hyperlora::Shapes::are_in(files) {
            return Err(files.unusable("", "it holds HyperLoRA's weights, which only `difflora gen` uses"));
        }
        let config = Config::read(files)?;
        let Some(denoiser) = config.denoiser.clone() else {
            let why = "it holds an autoencoder only; train the rest with `difflora train-dit`";
            return Err(files.unusable("config.json", why));
        };
        Ok((config, denoiser))
    }

    /// Reads a hypernetwork folder.
    ///
    /// # Errors
    /// [`Failure::Unusable`] with the file for anything that is missing, damaged or does not fit.
    pub fn open(files: &ModelFiles, device: &Device) -> Result<Self> {
        let (config, denoiser) = Self::config(files)?;
        let codec = LoraCodec::from_config(&config, files, device)?;
        let denoiser = Denoiser::open(&denoiser, files, device)?;
        let (made, read) = (denoiser.config.dit.latent, codec.lae.config().latent());
        if made != read {
            let why = format!("the transformer makes latents of {made} values, the autoencoder reads {read}");
            return Err(files.unusable("config.json", why));
        }
        Ok(Self { codec, denoiser })
    }

    /// SHA-256 of the files that a hypernetwork consists of, one after the other.
    ///
    /// # Errors
    /// A file is missing or cannot be read.
    pub fn sha256(files: &ModelFiles) -> Result<String> {
        let mut hash = Sha256::new();
        for file in ["config.json", "lae.safetensors", "dit.safetensors", "stats.safetensors"] {
            hash.update(files.read(file)?);
        }
        Ok(sha256::in_hex(hash))
    }

    /// Writes the folder; networks are stored as `dtype`, statistics always as f32. f16 halves the folder.
    pub fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        let (weights, stats) = self.denoiser.parts()?;
        self.codec.save_weights(folder, dtype)?;
        write_tensors(&folder.join("dit.safetensors"), weights, dtype)?;
        let mut all = self.codec.stats()?;
        all.extend(stats);
        write_tensors(&folder.join("stats.safetensors"), all, DType::F32)?;
        let config = Config { denoiser: Some(self.denoiser.config.clone()), ..self.codec.config() };
        // Last, so that a folder with a config is complete.
        save_json(&folder.join("config.json"), &serde_json::to_value(config)?)
    }

    /// The options that it was made with, and seed 0.
    pub fn options(&self) -> SampleOptions {
        let DenoiserConfig { steps, guidance, .. } = self.denoiser.config;
        SampleOptions { steps, guidance, ..SampleOptions::default() }
    }

    /// Samples the LoRA of a person. The same identity and options give the same LoRA.
    pub fn generate(&self, identity: &Identity, options: &SampleOptions) -> Result<Lora> {
        self.codec.lora(&self.sample_latent(identity, options)?)
    }

    /// Samples the latent of a person: z (1, L).
    pub fn sample_latent(&self, identity: &Identity, options: &SampleOptions) -> Result<Tensor> {
        let (face, image) = self.denoiser.embeddings(identity, self.codec.device())?;
        self.denoiser.sample(&face, &image, options)
    }

    /// The linear guess of a person's latent, z (1, L), without the transformer; zero where there is none.
    pub fn guess_latent(&self, identity: &Identity) -> Result<Tensor> {
        let (face, image) = self.denoiser.embeddings(identity, self.codec.device())?;
        self.denoiser.linear_guess(&face, &image)
    }

    /// How much of the condition comes from the face, from 0 to 1; none where the mixer has no gate.
    pub fn gate(&self, identity: &Identity) -> Result<Option<f32>> {
        let (face, image) = self.denoiser.embeddings(identity, self.codec.device())?;
        let gates = self.denoiser.gates(&face, &image)?;
        Ok(gates.map(|gates| gates.get(0)?.get(1)?.to_scalar::<f32>()).transpose()?)
    }

    /// Another person near that of `z` (1, L): √(1 − a²)·z + a·σ·ε, with σ the deviation of people learnt from. `amount`
    /// a from 0, the person, to 1, anybody; both ends are as far from the mean person as people are.
    ///
    /// # Errors
    /// A folder of an earlier version, which does not hold σ.
    pub fn vary(&self, z: &Tensor, amount: f64, seed: u64) -> Result<Tensor> {
        ensure!((0.0..=1.0).contains(&amount), "the amount is a number from 0 to 1, not {amount}");
        let spread = self.spread()?;
        // A stream that no sample has.
        let eps = noise::normal(seed, u64::MAX, z.shape(), z.device())?;
        Ok(((z * (1.0 - amount * amount).sqrt())? + (eps.broadcast_mul(spread)? * amount)?)?)
    }
}

impl Hypernet {
    /// σ of [`Hypernet::vary`], (1, L).
    ///
    /// # Errors
    /// A folder of an earlier version, which does not hold it.
    pub fn spread(&self) -> Result<&Tensor> {
        self.denoiser.stats.spread.as_ref().context(
            "the hypernetwork does not hold how much people differ (`latent.spread` in stats.safetensors); make it \
             again with `difflora train-dit`",
        )
    }
}

/// The weighted sum of latents (1, L): a person between people.
pub fn mixture(parts: &[(Tensor, f64)]) -> Result<Tensor> {
    let [(first, weight), rest @ ..] = parts else { anyhow::bail!("no person to mix") };
    // One person alone keeps every bit.
    let first = if *weight == 1.0 { first.clone() } else { (first * *weight)? };
    rest.iter().try_fold(first, |sum, (z, weight)| Ok((sum + (z * *weight)?)?))
}

#[cfg(test)]
mod tests;
