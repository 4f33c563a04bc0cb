//! Preview images of a LoRA in training, as contact sheets.

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::diffusion::noise;
use crate::diffusion::schedule::NoiseSchedule;
use crate::failure::Failure;
use crate::files;
use crate::image::{Image, contact_sheet};
use crate::progress;
use crate::recipes::dreambooth::config::Settings;
use crate::recipes::dreambooth::lockstep::{Networks, TrainableLora};
use crate::sdxl::pipeline::{DenoiserInput, GenerationParams, Pipeline, Sampler, SdxlLoader, Tiling};
use crate::sdxl::prompt::{PromptSyntax, check, lora_tags};
use crate::sdxl::text::{TextConditioning, TextEncoders};
use crate::sdxl::vae::Vae;

/// The other networks of generation.
pub struct Previewer {
    vae: Vae,
    schedule: NoiseSchedule,
    sampler: Sampler,
    device: Device,
    /// (C, h, w)
    shape: [usize; 3],
    negative: TextConditioning,
}

/// The prompts of previews, and how they are read: those of the settings as `gen` reads prompts, the caption in their
/// place as training reads captions.
#[derive(Clone, Debug)]
pub struct PreviewPrompts {
    texts: Vec<String>,
    syntax: PromptSyntax,
}

impl PreviewPrompts {
    /// The prompts of the settings, else `caption`.
    ///
    /// # Errors
    /// [`Failure::Usage`] for prompts that cannot be read.
    pub fn new(settings: &Settings, caption: impl FnOnce() -> String) -> Result<Self> {
        let mut texts = Vec::new();
        for prompt in &settings.samples.prompts {
            let (text, tags) = lora_tags(prompt).map_err(Failure::Usage)?;
            check(&text, PromptSyntax::A1111).map_err(Failure::Usage)?;
            if let Some(tag) = tags.first() {
                progress::warn(format_args!("<lora:{}> in a preview's prompt is ignored", tag.name));
            }
            texts.push(text);
        }
        Ok(match texts.is_empty() {
            true => Self { texts: vec![caption()], syntax: PromptSyntax::Plain },
            false => Self { texts, syntax: PromptSyntax::A1111 },
        })
    }

    /// The conditioning of each.
    pub fn encode(&self, text: &TextEncoders) -> Result<Vec<TextConditioning>> {
        self.texts.iter().map(|prompt| text.encode(prompt, self.syntax)).collect()
    }
}

/// Images of a prompt on a sheet.
const COLUMNS: usize = 4;

impl Previewer {
    /// Of `model`, for squares of `side` pixels.
    pub fn new(model: &SdxlLoader, text: &TextEncoders, vae: Vae, side: usize) -> Result<Self> {
        Ok(Self {
            vae,
            schedule: model.schedule.clone(),
            sampler: model.sampler.unwrap_or(Sampler::Ddim),
            device: model.device.clone(),
            shape: model.latent_shape(side, side)?,
            negative: model.negative(text, None)?,
        })
    }

    /// Generates an image of each prompt from the noise of `seed`, `seed` + 1, ….
    pub fn draw(
        &self,
        networks: &Networks,
        prompts: &TextConditioning,
        seed: u64,
        steps: usize,
        guidance_scale: f64,
    ) -> Result<Vec<Image>> {
        let [c, h, w] = self.shape;
        let mut images = Vec::new();
        for i in 0..prompts.context.dim(0)? {
            let prompt = TextConditioning {
                context: prompts.context.narrow(0, i, 1)?,
                pooled: prompts.pooled.narrow(0, i, 1)?,
            };
            let seed = seed + i as u64;
            let normal = |stream: u64| noise::normal(seed, stream, (1, c, h, w), &self.device);
            let params = GenerationParams {
                steps,
                guidance_scale,
                sampler: self.sampler,
                sizes: None,
                vae_tiling: Tiling::Auto,
            };
            let pipeline = Pipeline { unet: &networks.unet, vae: &self.vae, schedule: &self.schedule };
            let fresh = |step: usize| Ok(normal(1 + step as u64)?);
            let (latents, negative) = (&normal(0)?, &self.negative);
            let input = DenoiserInput { latents, prompts: &prompt, negative, params };
            images.extend(pipeline.generate(&input, fresh, |_| progress::check())?);
        }
        Ok(images)
    }

    /// Generates previews with `lora`: a row of images for each prompt, the same noise at every time, into `path`.
    pub fn sheet(
        &self,
        networks: &Networks,
        lora: &TrainableLora,
        encoded: &[TextConditioning],
        settings: &Settings,
        path: &Path,
    ) -> Result<()> {
        let mut networks = networks.clone();
        networks.attach(&[lora])?;
        let samples = &settings.samples;
        let mut rows = Vec::new();
        for prompt in encoded {
            let same = |x: &Tensor| -> Result<Tensor> {
                Ok(Tensor::cat(&vec![x.to_dtype(DType::F32)?; COLUMNS], 0)?)
            };
            let prompts = TextConditioning { context: same(&prompt.context)?, pooled: same(&prompt.pooled)? };
            rows.push(self.draw(&networks, &prompts, settings.seed, samples.steps, samples.guidance)?);
        }
        let rows: Vec<Vec<&Image>> = rows.iter().map(|row| row.iter().collect()).collect();
        let side = self.shape[1].max(self.shape[2]) * self.vae.config().factor();
        std::fs::create_dir_all(files::folder_of(path))?;
        contact_sheet(&rows, side.min(256), 4).save(path, None)
    }
}
