//! Prompts → images.

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::Device;
use serde_json::{Value, json};

use crate::commands::r#gen::Args;
use crate::commands::r#gen::plan::Plan;
use crate::commands::r#gen::prompts::Prompts;
use crate::diffusion::noise;
use crate::files;
use crate::image::Image;
use crate::output::{Output, print_line};
use crate::progress::{self, Stage};
use crate::sdxl::infotext::Settings;
use crate::sdxl::lora_stack::LoraStack;
use crate::sdxl::pipeline::{Denoiser, SdxlLoader, Step, decode};
use crate::sdxl::preview::LatentColours;
use crate::sdxl::prompt::PromptSyntax;
use crate::sdxl::text::TextConditioning;
use crate::sdxl::unet::UNet;
use crate::sdxl::vae::Vae;
use crate::weights::model_id::ModelId;

/// The images to generate, and what they are generated with.
pub(super) struct Images<'a> {
    pub args: &'a Args,
    pub plan: &'a Plan,
    pub prompts: &'a Prompts,
    pub model: &'a SdxlLoader,
    pub base: &'a ModelId,
    pub loras: &'a LoraStack,
}

impl Images<'_> {
    /// Generates and writes every image; returns the settings of each.
    ///
    /// Each component is freed before the next is loaded: text encoders, UNet, VAE.
    pub(super) fn generate(&self, paths: &[PathBuf], output: &Output) -> Result<Value> {
        let Self { args, plan, model, base, loras, .. } = *self;
        let (prompts, negative) = self.encode()?;
        let mut vae = None;
        let preview = match args.preview {
            Some(every) => Some((every, LatentColours::fit(vae.insert(self.load_vae()?), &model.device)?)),
            None => None,
        };
        let mut unet = Some(self.load_unet()?);

        let bar = progress::bar(paths.len() as u64 * u64::from(args.steps), "sampling");
        let mut written = Vec::new();
        for (k, path) in paths.iter().enumerate() {
            let which = k / args.num_images as usize;
            let settings = Settings {
                prompt: &self.prompts.texts[which],
                negative_prompt: self.prompts.negative.as_deref(),
                sampler: plan.params.sampler,
                steps: args.steps,
                guidance: args.guidance,
                seed: args.seed.wrapping_add(k as u64),
                size: plan.size,
                base,
                loras: &loras.loras,
            };
            let seed = settings.seed;
            let shape = (1, plan.shape[0], plan.shape[1], plan.shape[2]);
            let latents = match &plan.start {
                Some(latents) => latents.clone(),
                None => noise::normal(seed, 0, shape, &Device::Cpu)?,
            };
            // Stream 0 is the start, so that fresh noise never repeats it.
            let fresh = |step: usize| Ok(noise::normal(seed, 1 + step as u64, shape, &Device::Cpu)?);
            let mut clock = Stage::begin("a step");
            let step = |step: &Step| {
                bar.inc(1);
                bar.suspend(|| std::mem::replace(&mut clock, Stage::begin("a step")).end());
                match &preview {
                    Some((every, colours)) if step.number.is_multiple_of(*every as usize) => {
                        colours.image(&step.denoised()?)?.save(&path.with_extension("preview.png"), None)?;
                    }
                    _ => {}
                }
                progress::check()
            };
            let network = unet.as_ref().context("the UNet stays until the last image")?;
            let denoiser = Denoiser { unet: network, schedule: &model.schedule, factor: model.vae.factor() };
            let latents = denoiser.denoise(&latents, &prompts[which], &negative, plan.params, fresh, step)?;
            if k + 1 == paths.len() {
                unet = None; // 10 GB in SDXL
            }
            let codec = match &mut vae {
                Some(codec) => codec,
                none => none.insert(self.load_vae()?),
            };
            let clock = Stage::begin("decoding");
            let image = Image::from_tensor(&decode(codec, &latents, args.vae_tiling)?.squeeze(0)?)?;
            clock.end();
            let text = settings.parameters();
            image.save(path, (!args.no_metadata).then_some(&text))?;
            let mut record = settings.to_json();
            record["file"] = json!(path.display().to_string());
            if output.json {
                files::write_whole(&path.with_extension("json"), format!("{record:#}\n").as_bytes())?;
            } else {
                bar.suspend(|| print_line!("image {}", path.display()))?;
            }
            written.push(record);
        }
        bar.finish_and_clear();
        Ok(written.into())
    }

    /// Each prompt's conditioning, and that of the negative prompt. The text encoders are freed on return.
    fn encode(&self) -> Result<(Vec<TextConditioning>, TextConditioning)> {
        let Self { args, model, .. } = *self;
        let Prompts { texts, negative, syntax, .. } = self.prompts;
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
        let negative = match model.unet.takes_two_passes(args.guidance) {
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
