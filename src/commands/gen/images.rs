//! Prompts → images.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::commands::r#gen::Args;
use crate::diffusion::noise;
use crate::failure::Failure;
use crate::files;
use crate::image::Image;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::progress::Stage;
use crate::sdxl::infotext::Settings;
use crate::sdxl::lora_stack::LoraStack;
use crate::sdxl::pipeline::{Denoiser, GenerationParams, Sampler, SdxlLoader, Sizes, Step, decode};
use crate::sdxl::preview::LatentColours;
use crate::sdxl::text::TextConditioning;
use crate::sdxl::unet::UNet;
use crate::sdxl::vae::Vae;
use crate::weights;
use crate::weights::model_id::ModelId;

/// Sampling settings and start of the images, checked before any weight is loaded.
pub(super) struct Plan {
    params: GenerationParams,
    /// Width and height.
    size: [usize; 2],
    /// (C, h, w)
    shape: [usize; 3],
    /// Of `--init-latents`.
    start: Option<Tensor>,
}

impl Plan {
    /// # Errors
    /// [`Failure::Usage`] for sizes and samplers that this model does not have, [`Failure::Unusable`] for latents that do not fit.
    pub(super) fn new(args: &Args, model: &SdxlLoader) -> Result<Self> {
        let usage = |error: anyhow::Error| Failure::Usage(format!("{error:#}"));
        let native = model.native_size();
        let (width, height) = (args.width.unwrap_or(native), args.height.unwrap_or(native));
        let shape = model.latent_shape(width, height).map_err(usage)?;
        let start = args.init_latents.as_deref().map(|path| init_latents(path, shape)).transpose()?;
        let sampler = args.sampler.or(model.sampler).unwrap_or_else(|| {
            progress::note("the base model names no sampler that difflora has; using euler");
            Sampler::Euler
        });
        sampler.check(&model.schedule, args.steps as usize).map_err(usage)?;
        let params = GenerationParams {
            steps: args.steps as usize,
            guidance_scale: args.guidance,
            sampler,
            sizes: Some(Sizes {
                original: args.original_size.unwrap_or([width, height]),
                crop: args.crop,
                target: args.target_size.unwrap_or([width, height]),
            }),
            vae_tiling: args.vae_tiling,
        };
        Ok(Self { params, size: [width, height], shape, start })
    }
}

/// Generates and writes every image; returns the settings of each.
///
/// Each component is freed before the next is loaded: text encoders, UNet, VAE.
pub(super) fn generate(
    args: &Args,
    plan: &Plan,
    model: &SdxlLoader,
    base: &ModelId,
    loras: &LoraStack,
    paths: &[PathBuf],
    output: &Output,
) -> Result<Value> {
    let (prompts, negative) = encode(args, model, loras)?;
    let mut vae = None;
    let preview = match args.preview {
        Some(every) => Some((every, LatentColours::fit(vae.insert(load_vae(model)?), &model.device)?)),
        None => None,
    };
    let mut unet = Some(load_unet(model, loras)?);

    let bar = progress::bar(paths.len() as u64 * u64::from(args.steps), "sampling");
    let mut written = Vec::new();
    for (k, path) in paths.iter().enumerate() {
        let which = k / args.num_images as usize;
        let settings = Settings {
            prompt: &args.prompt[which],
            negative_prompt: args.negative_prompt.as_deref(),
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
            none => none.insert(load_vae(model)?),
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
fn encode(
    args: &Args,
    model: &SdxlLoader,
    loras: &LoraStack,
) -> Result<(Vec<TextConditioning>, TextConditioning)> {
    let clock = Stage::begin("loading the text encoders");
    let mut text = model.load_text()?;
    loras.apply_to_text(&mut text)?;
    clock.end();
    for prompt in args.prompt.iter().chain(&args.negative_prompt) {
        if let Some(end) = text.cut(prompt)? {
            let most = text.tokenizer.max_length();
            progress::warn(format_args!("a prompt has more than {most} tokens; this end is left out: {end}"));
        }
    }
    let clock = Stage::begin("encoding the prompts");
    let negative = match model.unet.takes_two_passes(args.guidance) {
        true => model.negative(&text, args.negative_prompt.as_deref())?,
        false => {
            if args.negative_prompt.is_some() {
                progress::note(
                    "the negative prompt has no effect: guidance is disabled (--guidance 1 or less)",
                );
            }
            text.zeros()? // not used by a single pass
        }
    };
    let prompts = args.prompt.iter().map(|prompt| text.encode_prompts(&[prompt]));
    let prompts = prompts.collect::<Result<_>>()?;
    clock.end();
    Ok((prompts, negative))
}

fn load_unet(model: &SdxlLoader, loras: &LoraStack) -> Result<UNet> {
    let clock = Stage::begin("loading the UNet");
    let mut unet = model.load_unet()?;
    loras.apply_to_unet(&mut unet)?;
    clock.end();
    Ok(unet)
}

fn load_vae(model: &SdxlLoader) -> Result<Vae> {
    let clock = Stage::begin("loading the VAE");
    let vae = model.load_vae()?;
    clock.end();
    Ok(vae)
}

/// The tensor `latents` of a file, (1, C, h, w).
fn init_latents(path: &Path, shape: [usize; 3]) -> Result<Tensor> {
    let wanted = [1, shape[0], shape[1], shape[2]];
    let latents = weights::read_file(path)?
        .remove("latents")
        .ok_or_else(|| Failure::unusable(path, "it holds no tensor `latents`"))?;
    if latents.dims() != wanted {
        let why = format!("`latents` has shape {:?}, this model and size want {wanted:?}", latents.dims());
        return Err(Failure::unusable(path, why));
    }
    if !latents.dtype().is_float() {
        let why = format!("`latents` holds {:?}, wanted floating-point numbers", latents.dtype());
        return Err(Failure::unusable(path, why));
    }
    let latents = latents.to_dtype(DType::F32)?;
    if !latents.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
        return Err(Failure::unusable(path, "`latents` holds NaN or infinity"));
    }
    Ok(latents)
}
