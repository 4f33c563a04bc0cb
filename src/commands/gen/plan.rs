//! How the images are sampled.

use anyhow::Result;
use candle_core::Tensor;

use crate::commands::r#gen::Args;
use crate::failure::Failure;
use crate::progress;
use crate::sdxl::loader::read_latents;
use crate::sdxl::pipeline::{GenerationParams, Sampler, SdxlLoader, Sizes};

/// Sampling settings and start of the images, checked before any weight is loaded.
pub(super) struct Plan {
    pub(super) params: GenerationParams,
    /// Width and height.
    pub(super) size: [usize; 2],
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
        let start = args.init_latents.as_deref().map(|path| read_latents(path, shape)).transpose()?;
        let sampler = args.sampling.sampler.or(model.sampler).unwrap_or_else(|| {
            progress::note("the base model names no sampler that difflora has; using euler");
            Sampler::Euler
        });
        sampler.check(&model.schedule, args.sampling.steps as usize).map_err(usage)?;
        let params = GenerationParams {
            steps: args.sampling.steps as usize,
            guidance_scale: args.sampling.guidance,
            sampler,
            sizes: Some(Sizes {
                original: args.original_size.unwrap_or([width, height]),
                crop: args.crop,
                target: args.target_size.unwrap_or([width, height]),
            }),
            vae_tiling: args.vae_tiling,
        };
        Ok(Self { params, size: [width, height], start })
    }
}
