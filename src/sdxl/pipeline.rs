//! A whole SDXL model, and the drawing of pictures with it.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

use super::text::{TextConditioning, TextEncoders};
use super::unet::{UNet, UNetConfig};
use super::vae::{Vae, VaeConfig};
pub use crate::diffusion::sampler::Sampler;
use crate::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
use crate::model_files::{DIFFUSERS_WEIGHTS, ModelFiles};
use crate::picture::Picture;

/// Text encoders, UNet, VAE and schedule of one model.
#[derive(Clone)]
pub struct Sdxl {
    /// Both tokenizers and text encoders.
    pub text: TextEncoders,
    /// The denoiser.
    pub unet: UNet,
    /// The codec between pictures and latents.
    pub vae: Vae,
    /// Noise levels and what the UNet predicts.
    pub schedule: NoiseSchedule,
    /// Whether a missing negative prompt means zeros, as in SDXL's own `model_index.json`.
    force_zeros_for_empty_prompt: bool,
    device: Device,
}

/// How to draw.
#[derive(Clone, Copy, Debug)]
pub struct Drawing {
    /// Sampling steps.
    pub steps: usize,
    /// Weight of the prompt against the negative prompt; at 1 or less the second pass is left out.
    pub guidance_scale: f64,
    /// Sampling method.
    pub sampler: Sampler,
}

impl Sdxl {
    /// Opens a model in diffusers' folder layout.
    ///
    /// # Errors
    /// [`crate::failure::Failure::Unusable`] when a part is missing, damaged or of another architecture.
    pub fn open(files: &ModelFiles, dtype: DType, device: &Device) -> Result<Self> {
        if !files.exists("model_index.json") {
            return Err(files.unusable("model_index.json", "it is missing; is this a diffusers SDXL folder?"));
        }
        let index: serde_json::Value = files.json("model_index.json")?;
        if !files.exists("text_encoder_2/config.json") {
            return Err(files.unusable("text_encoder_2", "it is missing; SDXL has two text encoders"));
        }
        let unet: UNetConfig = files.config("unet/config.json")?;
        let vae: VaeConfig = files.config("vae/config.json")?;
        let scheduler: SchedulerConfig =
            SchedulerConfig::from_json(&files.text("scheduler/scheduler_config.json")?)
                .map_err(|error| files.unusable("scheduler/scheduler_config.json", format!("{error:#}")))?;
        Ok(Self {
            text: TextEncoders::open(files, dtype, device)?,
            unet: files.load("unet", DIFFUSERS_WEIGHTS, dtype, device, |vb| UNet::new(&unet, vb))?,
            vae: files.load("vae", DIFFUSERS_WEIGHTS, dtype, device, |vb| Vae::new(&vae, vb))?,
            schedule: NoiseSchedule::new(&scheduler)?,
            force_zeros_for_empty_prompt: index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true),
            device: device.clone(),
        })
    }

    /// The device that the weights lie on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// (C, H/f, W/f) of the latents of a picture.
    ///
    /// # Errors
    /// A size that the model cannot draw.
    pub fn latent_shape(&self, width: usize, height: usize) -> Result<[usize; 3]> {
        // The UNet halves the latents once a level but the last.
        let step = self.vae.config().factor() << (self.unet.config.block_out_channels.len() - 1);
        ensure!(
            width > 0 && height > 0 && width.is_multiple_of(step) && height.is_multiple_of(step),
            "a picture of {width}×{height} cannot be drawn: this model needs multiples of {step}"
        );
        let factor = self.vae.config().factor();
        Ok([self.unet.config.in_channels, height / factor, width / factor])
    }

    /// The side of the pictures that the model was trained for.
    pub fn native_size(&self) -> usize {
        self.unet.config.sample_size * self.vae.config().factor()
    }

    /// What stands for "not this": the negative prompt, the empty prompt, or zeros, as the model wants.
    pub fn negative(&self, prompt: Option<&str>) -> Result<TextConditioning> {
        let encoded = self.text.encode_prompts(&[prompt.unwrap_or("")])?;
        if prompt.is_none() && self.force_zeros_for_empty_prompt {
            return Ok(TextConditioning {
                context: encoded.context.zeros_like()?,
                pooled: encoded.pooled.zeros_like()?,
            });
        }
        Ok(encoded)
    }

    /// Draws a picture from each sample of unit normal `latents` (B, C, h, w).
    ///
    /// `prompts` holds B conditionings, `negative` one for all. `noise(i)` gives the unit normal noise (B, C, h, w) that
    /// some samplers add at step i; `step` is called after each sampling step.
    ///
    /// # Errors
    /// NaN or infinity anywhere, with the step at which it appeared.
    pub fn draw(
        &self,
        latents: &Tensor,
        prompts: &TextConditioning,
        negative: &TextConditioning,
        drawing: Drawing,
        mut noise: impl FnMut(usize) -> Result<Tensor>,
        mut step: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Picture>> {
        let (b, _, h, w) = latents.dims4()?;
        ensure!(prompts.context.dim(0)? == b, "{b} latents for {} prompts", prompts.context.dim(0)?);
        let guided = drawing.guidance_scale > 1.0;
        let both = |cond: &Tensor, uncond: &Tensor| -> Result<Tensor> {
            if !guided {
                return Ok(cond.clone());
            }
            let mut shape = cond.dims().to_vec();
            shape[0] = b;
            Ok(Tensor::cat(&[&uncond.broadcast_as(shape)?.contiguous()?, cond], 0)?)
        };
        let context = both(&prompts.context, &negative.context)?;
        let pooled = both(&prompts.pooled, &negative.pooled)?;
        let rows = context.dim(0)?;
        let factor = self.vae.config().factor();
        let time_ids = time_ids(rows, factor * w, factor * h, &self.device)?;

        let mut done = 0;
        let denoise = |x: &Tensor, t: f64| -> Result<Tensor> {
            let twice = if guided { Tensor::cat(&[x, x], 0)? } else { x.clone() };
            let timesteps = Tensor::full(t as f32, rows, &self.device)?;
            let out = self.unet.forward(
                &twice.to_dtype(context.dtype())?,
                &timesteps,
                &context,
                &pooled,
                &time_ids,
            )?;
            let out = out.to_dtype(DType::F32)?;
            let out = if guided {
                let (uncond, cond) = (out.narrow(0, 0, b)?, out.narrow(0, b, b)?);
                (&uncond + ((cond - &uncond)? * drawing.guidance_scale)?)?
            } else {
                out
            };
            done += 1;
            if !is_finite(&out)? {
                bail!(
                    "the UNet predicted NaN or infinity at step {done}; the weights or the LoRA are damaged"
                );
            }
            step()?;
            Ok(out)
        };
        let latents = latents.to_dtype(DType::F32)?.to_device(&self.device)?;
        let noise = |i: usize| noise(i)?.to_device(&self.device).context("fresh noise");
        let latents = drawing.sampler.sample(&self.schedule, drawing.steps, denoise, latents, noise)?;
        let decoded = self.vae.decode(&self.vae.from_latents(&latents)?)?;
        if !is_finite(&decoded)? {
            bail!("the VAE decoded NaN or infinity");
        }
        (0..b).map(|i| Picture::from_tensor(&decoded.get(i)?).context("decoded picture")).collect()
    }
}

/// SDXL's size conditioning: original size, no crop, target size; (B, 6).
pub fn time_ids(b: usize, width: usize, height: usize, device: &Device) -> Result<Tensor> {
    let [w, h] = [width as f32, height as f32];
    Ok(Tensor::new(&[h, w, 0.0, 0.0, h, w], device)?.unsqueeze(0)?.repeat((b, 1))?)
}

fn is_finite(x: &Tensor) -> Result<bool> {
    // A NaN or an infinity anywhere makes the sum of magnitudes one.
    Ok(x.abs()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?.is_finite())
}
