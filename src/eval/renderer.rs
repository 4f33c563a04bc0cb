//! Generates the images that are evaluated: one batch of prompts and noise, with different LoRAs.

use anyhow::Result;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::diffusion::noise;
use crate::eval::judges::Judges;
use crate::eval::metrics::Observation;
use crate::image::Image;
use crate::lora::Lora;
use crate::lora::adapter::AdapterFile;
use crate::lora::apply::{Originals, Unmatched, merge};
use crate::lora::block_weights::BlockWeights;
use crate::lora::ldm_keys::BlockLayout;
use crate::progress;
use crate::sdxl::pipeline::{GenerationParams, Sampler, Sdxl, Step, Tiling};
use crate::sdxl::text::TextConditioning;
use crate::synthetic::Scene;
use crate::weights::model_id::ModelId;

/// The base model, and the judges of its images.
pub struct Renderer {
    /// Name and hash of the base.
    pub base: ModelId,
    /// The base, whole.
    pub model: Sdxl,
    /// Of the base; names of LoRA layers depend on it.
    pub block_layout: BlockLayout,
    /// Measure each image.
    pub judges: Judges,
}

/// How images are sampled.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Steps of the sampler.
    pub steps: usize,
    /// Classifier-free guidance scale.
    pub guidance: f64,
    /// The sampler.
    pub sampler: Sampler,
    /// Of the noise.
    pub seed: u64,
}

impl Sampling {
    /// For reports.
    pub fn to_json(&self) -> Value {
        json!({ "steps": self.steps, "guidance": self.guidance, "seed": self.seed })
    }
}

/// Prompts and start noise of B images, the same for every LoRA.
pub struct PromptBatch {
    seed: u64,
    /// Of each image; selects its noise.
    grains: Vec<u64>,
    /// (B, C, h, w)
    noise: Tensor,
    prompts: TextConditioning,
    negative: TextConditioning,
    params: GenerationParams,
}

/// Generated images and their measurements.
pub struct Rendering {
    /// In the order of the prompts.
    pub images: Vec<Image>,
    /// Of each image.
    pub observations: Vec<Observation>,
}

impl Rendering {
    /// Mean absolute difference of the pixels to those of `other`, as a fraction of their range.
    pub fn pixel_distance(&self, other: &Self) -> f64 {
        let pairs = self.images.iter().zip(&other.images).flat_map(|(a, b)| a.rgb.iter().zip(&b.rgb));
        let distances: Vec<f64> = pairs.map(|(a, b)| f64::from(a.abs_diff(*b)) / 255.0).collect();
        distances.iter().sum::<f64>() / distances.len() as f64
    }
}

impl Renderer {
    /// Encodes `captions` and samples the noise of their `scenes`, at the base's native size.
    pub fn batch(&self, scenes: &[Scene], captions: &[String], sampling: &Sampling) -> Result<PromptBatch> {
        let size = self.model.native_size();
        let shape = self.model.latent_shape(size, size)?;
        let grains: Vec<u64> = scenes.iter().map(|scene| scene.grain).collect();
        let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
        let Sampling { steps, guidance, sampler, seed } = *sampling;
        Ok(PromptBatch {
            seed,
            noise: noise_of(seed, &grains, 0, &shape)?.to_device(self.model.device())?,
            grains,
            prompts: self.model.text.encode_prompts(&captions)?,
            negative: self.model.negative(None)?,
            params: GenerationParams {
                steps,
                guidance_scale: guidance,
                sampler,
                sizes: None,
                vae_tiling: Tiling::Auto,
            },
        })
    }

    /// Generates and measures a batch with `lora` merged into a copy of the model, which shares unchanged weights.
    pub fn render(&self, batch: &PromptBatch, lora: Option<&Lora>) -> Result<Rendering> {
        let mut model = self.model.clone();
        if let Some(lora) = lora {
            let loras = [(&AdapterFile::from(lora), BlockWeights::all(1.0))];
            merge(|visit| model.unet.visit_layers(visit), &loras, Unmatched::Refuse, Originals::Drop)?;
        }
        let PromptBatch { seed, grains, noise, prompts, negative, params } = batch;
        let fresh = |step: usize| {
            Ok(noise_of(*seed, grains, 1 + step as u64, &noise.dims()[1..])?.to_device(noise.device())?)
        };
        let step = |_: &Step| progress::check();
        let images = model.pipeline().generate(noise, prompts, negative, *params, fresh, step)?;
        let observations = self.judges.observe(&images)?;
        Ok(Rendering { images, observations })
    }
}

/// Unit normal noise of `shape` for each grain, (B, C, h, w). `number` 0 is the start, others are what a sampler adds.
fn noise_of(seed: u64, grains: &[u64], number: u64, shape: &[usize]) -> Result<Tensor> {
    let one = |grain: &u64| noise::normal(seed, grain + (number << 40), shape, &Device::Cpu);
    let noise: Vec<Tensor> = grains.iter().map(one).collect::<candle_core::Result<_>>()?;
    Ok(Tensor::stack(&noise, 0)?)
}
