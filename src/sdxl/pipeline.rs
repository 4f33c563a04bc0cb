//! Text conditioning and noise → latents → images.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

pub use super::loader::SdxlLoader;
use super::loader::{latent_shape, negative};
use super::text::{TextConditioning, TextEncoders};
use super::unet::{UNet, UNetInput};
use super::vae::Vae;
pub use crate::diffusion::sampler::Sampler;
use crate::diffusion::schedule::NoiseSchedule;
use crate::image::Image;
use crate::layers::compute_dtype;
use crate::named::named;
use crate::weights::model_folder::ModelFiles;

/// Text encoders, UNet, VAE and schedule of one model.
#[derive(Clone)]
pub struct Sdxl {
    /// Both tokenizers and text encoders.
    pub text: TextEncoders,
    /// The denoiser.
    pub unet: UNet,
    /// The codec between images and latents.
    pub vae: Vae,
    /// Noise levels and what the UNet predicts.
    pub schedule: NoiseSchedule,
    /// The sampler that its scheduler config names, if it is one of ours.
    pub sampler: Option<Sampler>,
    /// Whether a missing negative prompt means zeros, as in SDXL's own `model_index.json`.
    force_zeros_for_empty_prompt: bool,
    device: Device,
}

/// Sampling settings of an image.
#[derive(Clone, Copy, Debug)]
pub struct GenerationParams {
    /// Sampling steps.
    pub steps: usize,
    /// Classifier-free guidance scale (Ho and Salimans 2022). 1 or less takes a single pass without the negative
    /// prompt, as do models distilled with guidance.
    pub guidance_scale: f64,
    /// Sampling method.
    pub sampler: Sampler,
    /// Size conditioning; the image's own size where it is `None`.
    pub sizes: Option<Sizes>,
    /// Whether the VAE decodes in strips.
    pub vae_tiling: Tiling,
}

/// SDXL's size conditioning (Podell et al. 2023, sections 2.2 and 2.3), in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `original_size`: width and height before downscaling.
    pub original: [usize; 2],
    /// `crop_coords_top_left`: rows and columns cropped above and to the left.
    pub crop: [usize; 2],
    /// `target_size`: width and height after cropping.
    pub target: [usize; 2],
}

impl Sizes {
    /// An image that was neither shrunk nor cut, diffusers' default.
    pub fn of(width: usize, height: usize) -> Self {
        Self { original: [width, height], crop: [0, 0], target: [width, height] }
    }

    /// In the order that the UNet wants, the same for all: (B, 6).
    pub fn time_ids(&self, b: usize, device: &Device) -> Result<Tensor> {
        let [original, crop, target] = [self.original, self.crop, self.target];
        let ids = [original[1], original[0], crop[0], crop[1], target[1], target[0]].map(|size| size as f32);
        Ok(Tensor::new(&ids, device)?.unsqueeze(0)?.repeat((b, 1))?)
    }
}

named! {
    /// Whether a VAE decodes in strips, which takes a fraction of the memory and gives the same image.
    pub enum Tiling {
        /// Above 512×512 pixels.
        Auto = "auto",
        /// Always.
        On = "on",
        /// Never.
        Off = "off",
    }
}

/// Most pixels that are decoded in one piece with [`Tiling::Auto`].
const WHOLE_PIXELS: usize = 512 * 512;

/// Pixels of a strip: a convolution over 256 channels gathers 300 MiB of patches for it.
const STRIP_PIXELS: usize = 1 << 15;

/// The state after one sampling step.
pub struct Step<'a> {
    /// 1 for the first.
    pub number: usize,
    x_t: &'a Tensor,
    output: &'a Tensor,
    t: f64,
    schedule: &'a NoiseSchedule,
}

impl Step<'_> {
    /// The noisy latents x_t that the step began with, (B, C, h, w), with a variance of about 1 at every t.
    pub fn noisy(&self) -> &Tensor {
        self.x_t
    }

    /// The current estimate of x_0, (B, C, h, w).
    pub fn denoised(&self) -> Result<Tensor> {
        let t = self.t.round() as usize;
        self.schedule.to_x0(self.output, self.x_t, &vec![t; self.x_t.dim(0)?])
    }
}

impl Sdxl {
    /// Opens a model in diffusers' folder layout and loads all of it.
    ///
    /// # Errors
    /// [`crate::failure::Failure::Unusable`] when a part is missing, damaged or of another architecture.
    pub fn open(files: &ModelFiles, dtype: DType, device: &Device) -> Result<Self> {
        let model = SdxlLoader::open(files, dtype, device)?;
        Ok(Self {
            text: model.load_text()?,
            unet: model.load_unet()?,
            vae: model.load_vae()?,
            schedule: model.schedule,
            sampler: model.sampler,
            force_zeros_for_empty_prompt: model.force_zeros_for_empty_prompt,
            device: model.device,
        })
    }

    /// The device that the weights lie on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// As [`SdxlLoader::latent_shape`].
    pub fn latent_shape(&self, width: usize, height: usize) -> Result<[usize; 3]> {
        latent_shape(&self.unet.config, self.vae.config(), width, height)
    }

    /// As [`SdxlLoader::native_size`].
    pub fn native_size(&self) -> usize {
        self.unet.config.sample_size * self.vae.config().factor()
    }

    /// As [`SdxlLoader::negative`].
    pub fn negative(&self, prompt: Option<&str>) -> Result<TextConditioning> {
        negative(&self.text, prompt, self.force_zeros_for_empty_prompt)
    }

    /// The UNet, the VAE and the schedule, without the text encoders.
    pub fn pipeline(&self) -> Pipeline<'_> {
        Pipeline { unet: &self.unet, vae: &self.vae, schedule: &self.schedule }
    }
}

/// Generates images from encoded prompts; the text encoders may be dropped by then.
#[derive(Clone, Copy)]
pub struct Pipeline<'a> {
    /// The denoiser.
    pub unet: &'a UNet,
    /// The codec between images and latents.
    pub vae: &'a Vae,
    /// Noise levels and what the UNet predicts.
    pub schedule: &'a NoiseSchedule,
}

impl Pipeline<'_> {
    /// Generates an image from each sample of the latents; see [`Pipeline::denoise`].
    pub fn generate(
        &self,
        input: &DenoiserInput,
        noise: impl FnMut(usize) -> Result<Tensor>,
        step: impl FnMut(&Step) -> Result<()>,
    ) -> Result<Vec<Image>> {
        let latents = self.denoise(input, noise, step)?;
        let decoded = self.decode(&latents, input.params.vae_tiling)?;
        let b = decoded.dim(0)?;
        (0..b).map(|i| Image::from_tensor(&decoded.get(i)?).context("decoded image")).collect()
    }

    /// See [`Denoiser::denoise`].
    pub fn denoise(
        &self,
        input: &DenoiserInput,
        noise: impl FnMut(usize) -> Result<Tensor>,
        step: impl FnMut(&Step) -> Result<()>,
    ) -> Result<Tensor> {
        let factor = self.vae.config().factor();
        let denoiser = Denoiser { unet: self.unet, schedule: self.schedule, factor };
        denoiser.denoise(input, noise, step)
    }

    /// See [`decode`].
    pub fn decode(&self, latents: &Tensor, tiling: Tiling) -> Result<Tensor> {
        decode(self.vae, latents, tiling)
    }
}

/// What images are sampled from.
#[derive(Clone, Copy)]
pub struct DenoiserInput<'a> {
    /// Unit normal, (B, C, h, w).
    pub latents: &'a Tensor,
    /// B conditionings.
    pub prompts: &'a TextConditioning,
    /// One for all.
    pub negative: &'a TextConditioning,
    /// Steps, guidance, sampler and sizes.
    pub params: GenerationParams,
}

/// Samples latents; the VAE need not be loaded yet.
#[derive(Clone, Copy)]
pub struct Denoiser<'a> {
    /// The denoiser.
    pub unet: &'a UNet,
    /// Noise levels and what the UNet predicts.
    pub schedule: &'a NoiseSchedule,
    /// Pixels to a side of a latent.
    pub factor: usize,
}

impl Denoiser<'_> {
    /// From unit normal latents to clean ones (B, C, h, w), f32.
    ///
    /// `noise(i)` gives the unit normal noise (B, C, h, w) that
    /// some samplers add at step i; `step` is called after each sampling step.
    ///
    /// # Errors
    /// NaN or infinity anywhere, with the part and the step at which it appeared.
    pub fn denoise(
        &self,
        input: &DenoiserInput,
        mut noise: impl FnMut(usize) -> Result<Tensor>,
        mut step: impl FnMut(&Step) -> Result<()>,
    ) -> Result<Tensor> {
        let DenoiserInput { latents, prompts, negative, params } = *input;
        let (b, _, h, w) = latents.dims4()?;
        ensure!(prompts.context.dim(0)? == b, "{b} latents for {} prompts", prompts.context.dim(0)?);
        let dtype = self.unet.compute_dtype();
        let guided = self.unet.config.takes_two_passes(params.guidance_scale);
        let both = |cond: &Tensor, uncond: &Tensor| -> Result<Tensor> {
            ensure!(
                is_finite(cond)? && (!guided || is_finite(uncond)?),
                "a text encoder gave NaN or infinity; its weights are damaged, or too large for this number type"
            );
            if !guided {
                return Ok(cond.to_dtype(dtype)?);
            }
            let mut shape = cond.dims().to_vec();
            shape[0] = b;
            Ok(Tensor::cat(&[&uncond.broadcast_as(shape)?.contiguous()?, cond], 0)?.to_dtype(dtype)?)
        };
        let (prompt, unconditional) = match guided {
            true => equally_long(&prompts.context, &negative.context)?,
            false => (prompts.context.clone(), negative.context.clone()),
        };
        let context = both(&prompt, &unconditional)?;
        let pooled = both(&prompts.pooled, &negative.pooled)?;
        let (rows, device) = (context.dim(0)?, context.device());
        let sizes = params.sizes.unwrap_or(Sizes::of(self.factor * w, self.factor * h));
        let time_ids = sizes.time_ids(rows, device)?;

        let mut number = 0;
        let predict = |x_t: &Tensor, t: f64| -> Result<Tensor> {
            number += 1;
            let twice = if guided { Tensor::cat(&[x_t, x_t], 0)? } else { x_t.clone() };
            let timesteps = Tensor::full(t as f32, rows, device)?;
            let out = self.unet.forward(&UNetInput {
                latents: &twice.to_dtype(dtype)?,
                timesteps: &timesteps,
                context: &context,
                pooled: &pooled,
                time_ids: &time_ids,
                guidance_scale: Some(params.guidance_scale),
            })?;
            let out = out.to_dtype(DType::F32)?;
            let out = if guided {
                let (uncond, cond) = (out.narrow(0, 0, b)?, out.narrow(0, b, b)?);
                (&uncond + ((cond - &uncond)? * params.guidance_scale)?)?
            } else {
                out
            };
            if !is_finite(&out)? {
                bail!(
                    "the UNet predicted NaN or infinity at step {number} of {} (timestep {t}); its weights or a LoRA \
                     are damaged, or too large for this number type",
                    params.steps
                );
            }
            step(&Step { number, x_t, output: &out, t, schedule: self.schedule })?;
            Ok(out)
        };
        let latents = latents.to_dtype(DType::F32)?.to_device(device)?;
        let noise = |i: usize| noise(i)?.to_device(device).context("fresh noise");
        let latents = params.sampler.sample(self.schedule, params.steps, predict, latents, noise)?;
        ensure!(is_finite(&latents)?, "the latents are NaN or infinite after the last step");
        Ok(latents)
    }
}

/// Two contexts (B, N, D) and (1, M, D) of the same length: each repeated as a whole, which attention does not see, since
/// equal keys share what one of them would get.
fn equally_long(one: &Tensor, two: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n, m) = (one.dim(1)?, two.dim(1)?);
    let mut length = n.max(m);
    while !(length.is_multiple_of(n) && length.is_multiple_of(m)) {
        length += n.max(m);
    }
    Ok((one.repeat((1, length / n, 1))?, two.repeat((1, length / m, 1))?))
}

/// Images (B, 3, h·f, w·f) in about [−1, 1], f32, of the diffusion model's latents (B, C, h, w).
///
/// # Errors
/// NaN or infinity in what the VAE decodes.
pub fn decode(vae: &Vae, latents: &Tensor, tiling: Tiling) -> Result<Tensor> {
    let (_, _, h, w) = latents.dims4()?;
    let dtype = compute_dtype(vae.dtype(), latents.device());
    let z = vae.from_latents(latents)?.to_dtype(dtype)?;
    let strips = match tiling {
        Tiling::Auto => h * w * vae.config().factor().pow(2) > WHOLE_PIXELS,
        Tiling::On => true,
        Tiling::Off => false,
    };
    let decoded = if strips { vae.decode_in_strips(&z, STRIP_PIXELS)? } else { vae.decode(&z)? };
    let decoded = decoded.to_dtype(DType::F32)?;
    ensure!(
        is_finite(&decoded)?,
        "the VAE decoded NaN or infinity; its weights are damaged, or too large for this number type (--dtype f32)"
    );
    Ok(decoded)
}

/// SDXL's size conditioning: original size, no crop, target size; (B, 6).
pub fn time_ids(b: usize, width: usize, height: usize, device: &Device) -> Result<Tensor> {
    Sizes::of(width, height).time_ids(b, device)
}

fn is_finite(x: &Tensor) -> Result<bool> {
    // A NaN or an infinity anywhere makes the sum of magnitudes one.
    Ok(x.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite())
}
