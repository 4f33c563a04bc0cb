//! Prompts → pictures.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::Args;
use super::loras::Chosen;
use super::settings::Settings;
use crate::cli::Common;
use crate::diffusion::noise;
use crate::failure::Failure;
use crate::hypernet::ModelId;
use crate::sdxl::pipeline::{Drawing, Painter, Sampler, Sdxl, Sizes, Step};
use crate::sdxl::preview::LatentColours;
use crate::{files, progress, weights};

/// Draws every picture that was asked for and writes it; gives what was written.
pub(super) fn draw(
    args: &Args,
    model: Sdxl,
    base: &ModelId,
    loras: &[Chosen],
    paths: &[PathBuf],
    common: &Common,
) -> Result<Value> {
    let usage = |error: anyhow::Error| Failure::Usage(format!("{error:#}"));
    let size = model.native_size();
    let (width, height) = (args.width.unwrap_or(size), args.height.unwrap_or(size));
    let shape = model.latent_shape(width, height).map_err(usage)?;
    let given = args.init_latents.as_deref().map(|path| init_latents(path, shape)).transpose()?;
    let sampler = args.sampler.or(model.sampler).unwrap_or_else(|| {
        progress::note("the base model names no sampler that difflora has; it draws with euler");
        Sampler::Euler
    });
    sampler.check(&model.schedule, args.steps as usize).map_err(usage)?;
    let drawing = Drawing {
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
    for prompt in args.prompt.iter().chain(&args.negative_prompt) {
        if let Some(end) = model.text.cut(prompt)? {
            let most = model.text.tokenizer.max_length();
            progress::warn(format_args!("a prompt has more than {most} tokens; this end is left out: {end}"));
        }
    }
    let negative = model.negative(args.negative_prompt.as_deref())?;
    let prompts = args.prompt.iter().map(|prompt| model.text.encode_prompts(&[prompt]));
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let device = model.device().clone();
    let Sdxl { text, unet, vae, schedule, .. } = model;
    drop(text); // 3 GB in SDXL, and not needed from here on
    let painter = Painter { unet: &unet, vae: &vae, schedule: &schedule };
    let colours = args.preview.map(|_| LatentColours::fit(&vae, &device)).transpose()?;
    let preview = args.preview.zip(colours);

    let bar = progress::bar(paths.len() as u64 * u64::from(args.steps), "drawing");
    let mut written = Vec::new();
    for (k, path) in paths.iter().enumerate() {
        let which = k / args.num_images as usize;
        let settings = Settings {
            prompt: &args.prompt[which],
            negative_prompt: args.negative_prompt.as_deref(),
            sampler,
            steps: args.steps,
            guidance: args.guidance,
            seed: args.seed.wrapping_add(k as u64),
            size: [width, height],
            base,
            loras,
        };
        let seed = settings.seed;
        let shape = (1, shape[0], shape[1], shape[2]);
        let latents = match &given {
            Some(latents) => latents.clone(),
            None => noise::normal(seed, 0, shape, &Device::Cpu)?,
        };
        // Stream 0 is the start, so that fresh noise never repeats it.
        let fresh = |step: usize| Ok(noise::normal(seed, 1 + step as u64, shape, &Device::Cpu)?);
        let step = |step: &Step| {
            bar.inc(1);
            match &preview {
                Some((every, colours)) if step.number.is_multiple_of(*every as usize) => {
                    colours.picture(&step.denoised()?)?.save(&path.with_extension("preview.png"), None)?;
                }
                _ => {}
            }
            progress::check()
        };
        let pictures = painter.draw(&latents, &prompts[which], &negative, drawing, fresh, step)?;
        let Some(picture) = pictures.first() else { bail!("no picture was drawn") };
        let text = settings.parameters();
        picture.save(path, (!args.no_metadata).then_some(&text))?;
        let mut told = settings.to_json();
        told["file"] = json!(path);
        if common.json {
            files::write_whole(&path.with_extension("json"), format!("{told:#}\n").as_bytes())?;
        } else {
            bar.suspend(|| println!("picture {}", path.display()));
        }
        written.push(told);
    }
    bar.finish_and_clear();
    Ok(written.into())
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
