//! How the images are sampled.

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Tensor};

use crate::commands::r#gen::Args;
use crate::failure::Failure;
use crate::progress;
use crate::sdxl::pipeline::{GenerationParams, Sampler, SdxlLoader, Sizes};
use crate::weights;

/// Sampling settings and start of the images, checked before any weight is loaded.
pub(super) struct Plan {
    pub(super) params: GenerationParams,
    /// Width and height.
    pub(super) size: [usize; 2],
    /// (C, h, w)
    pub(super) shape: [usize; 3],
    /// Of `--init-latents`.
    pub(super) start: Option<Tensor>,
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
