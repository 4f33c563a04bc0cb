//! Generates the images that are evaluated: one batch of prompts and noise, with different LoRAs.

use anyhow::Result;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::diffusion::noise;
use crate::eval::judges::Judges;
use crate::image::Image;
use crate::layers::Visit;
use crate::lora::adapter::AdapterFile;
use crate::lora::apply::{Originals, Unmatched, merge};
use crate::lora::block_weights::BlockWeights;
use crate::lora::ldm_keys::BlockLayout;
use crate::progress;
use crate::sdxl::pipeline::{DenoiserInput, GenerationParams, Sampler, Sdxl, Step, Tiling};
use crate::sdxl::text::TextConditioning;
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
        json!({ "steps": self.steps, "guidance": self.guidance, "seed": self.seed, "sampler": self.sampler.a1111_name() })
    }
}

/// Prompts and start noise of B images, the same for every LoRA.
pub struct PromptBatch {
    seed: u64,
    /// Of each image; selects its noise.
    grains: Vec<u64>,
    /// (B, C, h, w)
    noise: Tensor,
    texts: Vec<String>,
    prompts: TextConditioning,
    negative: TextConditioning,
    params: GenerationParams,
}

impl PromptBatch {
    /// The prompts.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }
}

/// The base with a LoRA merged.
pub struct Merged {
    model: Sdxl,
    /// Whether the text encoders differ from the base's.
    text: bool,
}

impl Renderer {
    /// How many images are generated at once: what takes the memory of 64 of 128×128 pixels.
    pub fn batch_size(&self) -> usize {
        (64 * 128 * 128 / self.model.native_size().pow(2).max(1)).clamp(1, 64)
    }

    /// Encodes prompts, each with the number that selects its noise, for images of the base's native size.
    pub fn batch(&self, prompts: &[(String, u64)], sampling: &Sampling) -> Result<PromptBatch> {
        let size = self.model.native_size();
        let shape = self.model.latent_shape(size, size)?;
        let (texts, grains): (Vec<String>, Vec<u64>) = prompts.iter().cloned().unzip();
        let Sampling { steps, guidance, sampler, seed } = *sampling;
        Ok(PromptBatch {
            seed,
            noise: noise_of(seed, &grains, 0, &shape)?.to_device(self.model.device())?,
            grains,
            prompts: self.model.text.encode_prompts(&borrowed(&texts))?,
            texts,
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

    /// Merges a LoRA into a copy of the model, which shares unchanged weights.
    ///
    /// # Errors
    /// [`crate::lora::LoraError`] for a LoRA of another base.
    pub fn merge(&self, lora: Option<&AdapterFile>) -> Result<Merged> {
        let mut model = self.model.clone();
        let text =
            lora.is_some_and(|lora| lora.modules.keys().any(|module| module.starts_with("text_encoder")));
        if let Some(lora) = lora {
            let loras = [(lora, BlockWeights::all(1.0))];
            let Sdxl { unet, text: encoders, .. } = &mut model;
            let visit = |visit: &mut Visit| {
                unet.visit_layers(visit);
                if text {
                    encoders.visit_layers(visit);
                }
            };
            merge(visit, &loras, Unmatched::Refuse, Originals::Drop)?;
        }
        Ok(Merged { model, text })
    }

    /// Generates the images of a batch, in the order of its prompts.
    pub fn render(&self, batch: &PromptBatch, merged: &Merged) -> Result<Vec<Image>> {
        let PromptBatch { seed, grains, noise, texts, prompts, negative, params } = batch;
        let model = &merged.model;
        let own = match merged.text {
            true => Some((model.text.encode_prompts(&borrowed(texts))?, model.negative(None)?)),
            false => None,
        };
        let (prompts, negative) =
            own.as_ref().map_or((prompts, negative), |(prompts, negative)| (prompts, negative));
        let fresh = |step: usize| {
            Ok(noise_of(*seed, grains, 1 + step as u64, &noise.dims()[1..])?.to_device(noise.device())?)
        };
        let step = |_: &Step| progress::check();
        let input = DenoiserInput { latents: noise, prompts, negative, params: *params };
        model.pipeline().generate(&input, fresh, step)
    }
}

/// Mean absolute difference of the pixels of two series of images, as a fraction of their range.
pub fn pixel_distance(a: &[Image], b: &[Image]) -> f64 {
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.rgb.iter().zip(&b.rgb));
    let (mut sum, mut count) = (0.0, 0usize);
    for (a, b) in pairs {
        sum += f64::from(a.abs_diff(*b)) / 255.0;
        count += 1;
    }
    sum / count.max(1) as f64
}

fn borrowed(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

/// Unit normal noise of `shape` for each grain, (B, C, h, w). `number` 0 is the start, others are what a sampler adds.
fn noise_of(seed: u64, grains: &[u64], number: u64, shape: &[usize]) -> Result<Tensor> {
    let one = |grain: &u64| noise::normal(seed, grain + (number << 40), shape, &Device::Cpu);
    let noise: Vec<Tensor> = grains.iter().map(one).collect::<candle_core::Result<_>>()?;
    Ok(Tensor::stack(&noise, 0)?)
}
