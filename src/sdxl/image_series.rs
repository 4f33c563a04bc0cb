//! A series of images: each network of the model is loaded when it is needed and freed before the next, so that memory
//! holds one of them at a time.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use super::infotext::Settings;
use super::lora_stack::LoraStack;
use super::pipeline::{Denoiser, DenoiserInput, GenerationParams, SdxlLoader, Step, decode};
use super::preview::LatentColours;
use super::prompt::PromptSyntax;
use super::prompt_set::PromptSet;
use super::text::TextConditioning;
use super::unet::UNet;
use super::vae::Vae;
use crate::diffusion::noise;
use crate::image::{Image, contact_sheet};
use crate::progress::{self, Stage};
use crate::weights::model_id::ModelId;

/// Longer side of an image in a strip, in pixels.
const STRIP_CELL: usize = 256;

/// `columns` of the steps 1 … `steps`, the first and the last among them.
fn evenly(columns: usize, steps: usize) -> Vec<usize> {
    let columns = columns.clamp(1, steps);
    let last = (columns - 1).max(1);
    let mut shown: Vec<usize> = (0..columns).map(|i| 1 + (i * (steps - 1) + last / 2) / last).collect();
    if columns == 1 {
        shown = vec![steps];
    }
    shown
}

/// Images of some prompts.
pub struct ImageSeries<'a> {
    /// The model.
    pub model: &'a SdxlLoader,
    /// Its name and hash, for the settings of each image.
    pub base: &'a ModelId,
    /// LoRAs on the model.
    pub loras: &'a LoraStack,
    /// What the images show.
    pub prompts: &'a PromptSet,
    /// How they are sampled.
    pub params: GenerationParams,
    /// Width and height.
    pub size: [usize; 2],
    /// Unit normal latents (1, C, h, w) to start from, instead of the seed's.
    pub start: Option<Tensor>,
    /// Images of each prompt.
    pub images_per_prompt: usize,
    /// Seed of the first image; the next ones count up.
    pub seed: u64,
    /// Steps between previews.
    pub preview_every: Option<usize>,
    /// Columns of a strip of the first image of each prompt on its way from noise.
    pub strip_columns: Option<usize>,
}

impl ImageSeries<'_> {
    /// Generates the images, prompt by prompt. `preview(k, image)` gets a rough image along the way, `done(k, image,
    /// settings)` the image k. Returns the strip, where one is asked for: for each prompt a row of noisy latents and below it
    /// the predicted x_0 of the same steps, all decoded.
    ///
    /// # Errors
    /// NaN or infinity, with the part where it appeared; what the callbacks refuse; Ctrl-C.
    pub fn generate(
        &self,
        preview: impl Fn(usize, Image) -> Result<()>,
        mut done: impl FnMut(usize, Image, &Settings) -> Result<()>,
    ) -> Result<Option<Image>> {
        let Self { model, params, .. } = self;
        let [c, h, w] = model.latent_shape(self.size[0], self.size[1])?;
        let (prompts, negative) = self.encode()?;
        let mut vae = None;
        let colours = match self.preview_every {
            Some(_) => Some(LatentColours::fit(vae.insert(self.load_vae()?), &model.device)?),
            None => None,
        };
        let mut unet = Some(self.load_unet()?);

        let count = prompts.len() * self.images_per_prompt;
        let shown = self.strip_columns.map_or(Vec::new(), |columns| evenly(columns, params.steps));
        let mut strip: Vec<Vec<Image>> = Vec::new();
        let bar = progress::bar((count * params.steps) as u64, "sampling");
        for k in 0..count {
            let which = k / self.images_per_prompt;
            let seed = self.seed.wrapping_add(k as u64);
            let latents = match &self.start {
                Some(latents) => latents.clone(),
                None => noise::normal(seed, 0, (1, c, h, w), &Device::Cpu)?,
            };
            // Stream 0 is the start, so that fresh noise never repeats it.
            let fresh = |step: usize| Ok(noise::normal(seed, 1 + step as u64, (1, c, h, w), &Device::Cpu)?);
            let in_strip = k.is_multiple_of(self.images_per_prompt);
            let mut way = Vec::new();
            let mut clock = Stage::begin("a step");
            let step = |step: &Step| {
                bar.inc(1);
                if in_strip && shown.contains(&step.number) {
                    way.push((step.noisy().clone(), step.denoised()?));
                }
                bar.suspend(|| std::mem::replace(&mut clock, Stage::begin("a step")).end());
                match (&colours, self.preview_every) {
                    (Some(colours), Some(every)) if step.number.is_multiple_of(every) => {
                        preview(k, colours.image(&step.denoised()?)?)?;
                    }
                    _ => {}
                }
                progress::check()
            };
            let network = unet.as_ref().context("the UNet stays until the last image")?;
            let denoiser = Denoiser { unet: network, schedule: &model.schedule, factor: model.vae.factor() };
            let (prompts, negative) = (&prompts[which], &negative);
            let input = DenoiserInput { latents: &latents, prompts, negative, params: *params };
            let latents = denoiser.denoise(&input, fresh, step)?;
            if k + 1 == count {
                unet = None; // 10 GB in SDXL
            }
            let codec = match &mut vae {
                Some(codec) => codec,
                none => none.insert(self.load_vae()?),
            };
            let clock = Stage::begin("decoding");
            let image = Image::from_tensor(&decode(codec, &latents, params.vae_tiling)?.squeeze(0)?)?;
            clock.end();
            if !way.is_empty() {
                let decoded = |latents: &Tensor| {
                    Image::from_tensor(&decode(codec, latents, params.vae_tiling)?.squeeze(0)?)
                };
                strip.push(way.iter().map(|(noisy, _)| decoded(noisy)).collect::<Result<_>>()?);
                strip.push(way.iter().map(|(_, x0)| decoded(x0)).collect::<Result<_>>()?);
            }
            bar.suspend(|| done(k, image, &self.settings(which, seed)))?;
        }
        bar.finish_and_clear();
        let rows: Vec<Vec<&Image>> = strip.iter().map(|row| row.iter().collect()).collect();
        let cell = self.size[0].max(self.size[1]).min(STRIP_CELL);
        Ok((!rows.is_empty()).then(|| contact_sheet(&rows, cell, 4)))
    }

    /// What the image of prompt `which` depends on.
    fn settings(&self, which: usize, seed: u64) -> Settings<'_> {
        Settings {
            prompt: &self.prompts.texts[which],
            negative_prompt: self.prompts.negative.as_deref(),
            sampler: self.params.sampler,
            steps: self.params.steps,
            guidance: self.params.guidance_scale,
            seed,
            size: self.size,
            base: self.base,
            loras: &self.loras.loras,
        }
    }

    /// Each prompt's conditioning, and that of the negative prompt. The text encoders are freed on return.
    fn encode(&self) -> Result<(Vec<TextConditioning>, TextConditioning)> {
        let (model, PromptSet { texts, negative, syntax, .. }) = (self.model, self.prompts);
        let clock = Stage::begin("loading the text encoders");
        let mut text = model.load_text()?;
        self.loras.apply_to_text(&mut text)?;
        clock.end();
        let plain = texts.iter().chain(negative).filter(|_| *syntax == PromptSyntax::Plain);
        for prompt in plain {
            if let Some(end) = text.cut(prompt)? {
                let most = text.tokenizer.max_length();
                progress::warn(format_args!(
                    "a prompt has more than {most} tokens; this end is left out: {end}"
                ));
            }
        }
        let clock = Stage::begin("encoding the prompts");
        let negative = match model.unet.takes_two_passes(self.params.guidance_scale) {
            true => match negative {
                Some(prompt) => text.encode(prompt, *syntax)?,
                None => model.negative(&text, None)?,
            },
            false => {
                if negative.is_some() {
                    progress::note(
                        "the negative prompt has no effect: guidance is disabled (--guidance 1 or less)",
                    );
                }
                text.zeros()? // not used by a single pass
            }
        };
        let prompts = texts.iter().map(|prompt| text.encode(prompt, *syntax));
        let prompts = prompts.collect::<Result<_>>()?;
        clock.end();
        Ok((prompts, negative))
    }

    fn load_unet(&self) -> Result<UNet> {
        let clock = Stage::begin("loading the UNet");
        let mut unet = self.model.load_unet()?;
        self.loras.apply_to_unet(&mut unet)?;
        clock.end();
        Ok(unet)
    }

    fn load_vae(&self) -> Result<Vae> {
        let clock = Stage::begin("loading the VAE");
        let vae = self.model.load_vae()?;
        clock.end();
        Ok(vae)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_strip_go_from_the_first_to_the_last_step() {
        assert_eq!(evenly(5, 21), [1, 6, 11, 16, 21]);
        assert_eq!(evenly(3, 4), [1, 3, 4]);
        assert_eq!(evenly(9, 3), [1, 2, 3]);
        assert_eq!(evenly(1, 7), [7]);
    }
}
