//! Opens a model's configs first and each of its components later.

use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::text::{ClipTextConfig, ClipTextModel, TextConditioning, TextEncoders};
use super::unet::{UNet, UNetConfig};
use super::vae::{Vae, VaeConfig};
use super::{architecture, counts};
use crate::diffusion::sampler::Sampler;
use crate::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
use crate::failure::Failure;
use crate::layers::Visit;
use crate::weights;
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS, WeightType};

/// A model whose configs are read and whose weights are not yet: each component is loaded when it is needed, so that
/// memory need not hold all of them.
#[derive(Clone, Debug)]
pub struct SdxlLoader {
    files: ModelFiles,
    /// `unet/config.json`
    pub unet: UNetConfig,
    /// `vae/config.json`
    pub vae: VaeConfig,
    /// Noise levels and what the UNet predicts.
    pub schedule: NoiseSchedule,
    /// The sampler that its scheduler config names, if it is one of ours.
    pub sampler: Option<Sampler>,
    /// `force_zeros_for_empty_prompt` of `model_index.json`: without a negative prompt the unconditional pass takes zeros.
    pub force_zeros_for_empty_prompt: bool,
    weights: WeightType,
    /// Where the weights will lie.
    pub device: Device,
}

impl SdxlLoader {
    /// Reads the configs of a model in diffusers' folder layout.
    ///
    /// # Errors
    /// [`crate::failure::Failure::Unusable`] when a part is missing, damaged or of another architecture.
    pub fn open(files: &ModelFiles, weights: impl Into<WeightType>, device: &Device) -> Result<Self> {
        architecture::require_sdxl(files)?;
        let index: serde_json::Value = files.json("model_index.json")?;
        let scheduler_file = "scheduler/scheduler_config.json";
        let scheduler = SchedulerConfig::from_json(&files.text(scheduler_file)?)
            .map_err(|error| files.unusable(scheduler_file, format!("{error:#}")))?;
        let sampler = index["scheduler"][1]
            .as_str()
            .and_then(|class| Sampler::of_class(class, scheduler.use_karras_sigmas));
        Ok(Self {
            files: files.clone(),
            unet: files.config("unet/config.json")?,
            vae: files.config("vae/config.json")?,
            schedule: NoiseSchedule::new(&scheduler)
                .map_err(|error| files.unusable(scheduler_file, format!("{error:#}")))?,
            sampler,
            force_zeros_for_empty_prompt: index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true),
            weights: weights.into(),
            device: device.clone(),
        })
    }

    /// Loads both text encoders: 817 million parameters in SDXL.
    pub fn load_text(&self) -> Result<TextEncoders> {
        TextEncoders::open(&self.files, self.weights, &self.device)
    }

    /// Loads the denoiser: 2,567 million parameters in SDXL.
    pub fn load_unet(&self) -> Result<UNet> {
        self.files.load("unet", DIFFUSERS_WEIGHTS, self.weights, &self.device, |vb| UNet::new(&self.unet, vb))
    }

    /// Loads the codec: 84 million parameters in SDXL.
    pub fn load_vae(&self) -> Result<Vae> {
        let weights = if self.vae.force_upcast { self.weights.upcast() } else { self.weights };
        self.files.load("vae", DIFFUSERS_WEIGHTS, weights, &self.device, |vb| Vae::new(&self.vae, vb))
    }

    /// UNet and text encoders with layer names and shapes but without weights, to check LoRAs against.
    pub fn skeleton(&self) -> Result<SdxlSkeleton> {
        let text = |folder: &str| -> Result<ClipTextModel> {
            let config: ClipTextConfig = self.files.config(&format!("{folder}/config.json"))?;
            Ok(counts::recorded(|vb| ClipTextModel::new(&config, vb))?.0)
        };
        let unet = counts::recorded(|vb| UNet::new(&self.unet, vb))?.0;
        Ok(SdxlSkeleton { unet, text: [text("text_encoder")?, text("text_encoder_2")?] })
    }

    /// (C, H/f, W/f) of the latents of an image.
    ///
    /// # Errors
    /// A size that is not a multiple of the VAE's factor.
    pub fn latent_shape(&self, width: usize, height: usize) -> Result<[usize; 3]> {
        latent_shape(&self.unet, &self.vae, width, height)
    }

    /// The side of the images that the model was trained for.
    pub fn native_size(&self) -> usize {
        self.unet.sample_size * self.vae.factor()
    }

    /// The conditioning of the unconditional pass: the negative prompt, else the empty prompt or zeros, as
    /// `force_zeros_for_empty_prompt` says.
    pub fn negative(&self, text: &TextEncoders, prompt: Option<&str>) -> Result<TextConditioning> {
        negative(text, prompt, self.force_zeros_for_empty_prompt)
    }
}

/// The networks that LoRAs change, without weights; see [`SdxlLoader::skeleton`].
pub struct SdxlSkeleton {
    /// The denoiser.
    pub unet: UNet,
    text: [ClipTextModel; 2],
}

impl SdxlSkeleton {
    /// Widths of the tokens of both text encoders.
    pub fn text_widths(&self) -> [usize; 2] {
        [self.text[0].width(), self.text[1].width()]
    }

    /// Visits all layers that a LoRA may change.
    pub fn visit_layers(&mut self, visit: &mut Visit) {
        self.unet.visit_layers(visit);
        for (folder, encoder) in ["text_encoder", "text_encoder_2"].into_iter().zip(&mut self.text) {
            encoder.visit_layers(&mut |path, layer| visit(&format!("{folder}.{path}"), layer));
        }
    }
}

/// Checks every tensor of a model, by name, shape and finite values, without keeping any.
///
/// # Errors
/// [`Failure::Unusable`] with the file and the tensor.
pub fn verify(files: &ModelFiles) -> Result<()> {
    architecture::require_sdxl(files)?;
    let unet: UNetConfig = files.config("unet/config.json")?;
    files.check("unet", DIFFUSERS_WEIGHTS, |vb| UNet::new(&unet, vb))?;
    let vae: VaeConfig = files.config("vae/config.json")?;
    files.check("vae", DIFFUSERS_WEIGHTS, |vb| Vae::new(&vae, vb))?;
    for folder in ["text_encoder", "text_encoder_2"] {
        let config: ClipTextConfig = files.config(&format!("{folder}/config.json"))?;
        files.check(folder, TRANSFORMERS_WEIGHTS, |vb| ClipTextModel::new(&config, vb))?;
    }
    Ok(())
}

/// The tensor `latents` (1, C, h, w) of a safetensors file, unit normal noise to start from, as f32; `shape` is (C, h, w).
///
/// # Errors
/// [`Failure::Unusable`] with the file for latents that are missing, of another shape, or not finite numbers.
pub fn read_latents(path: &Path, shape: [usize; 3]) -> Result<Tensor> {
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

pub(super) fn latent_shape(
    unet: &UNetConfig,
    vae: &VaeConfig,
    width: usize,
    height: usize,
) -> Result<[usize; 3]> {
    let factor = vae.factor();
    ensure!(
        width > 0 && height > 0 && width.is_multiple_of(factor) && height.is_multiple_of(factor),
        "an image of {width}×{height} cannot be drawn: this model needs multiples of {factor}"
    );
    // 8192 × 8192: attention over more pixels than that fits no memory.
    let most = 1 << 26;
    ensure!(
        width.saturating_mul(height) <= most,
        "an image of {width}×{height} has more than the limit of {most} pixels"
    );
    Ok([unet.in_channels, height / factor, width / factor])
}

pub(super) fn negative(
    text: &TextEncoders,
    prompt: Option<&str>,
    zeros_for_none: bool,
) -> Result<TextConditioning> {
    match prompt {
        None if zeros_for_none => text.zeros(),
        _ => text.encode_prompts(&[prompt.unwrap_or("")]),
    }
}
