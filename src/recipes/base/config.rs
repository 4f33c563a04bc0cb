//! The file that `train-base --config` takes.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::vae::FITTED_IMAGES;
use super::{unet, vae};
use crate::limits::require_memory;
use crate::sdxl::vae::VaeConfig;
use crate::synthetic::image_set;

/// The file given by `--config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Of weights, batches and noise.
    pub seed: u64,
    /// The training images.
    #[serde(rename(serialize = "pictures"), alias = "pictures")]
    pub images: image_set::Settings,
    /// Sizes and recipe of the VAE.
    pub vae: vae::Settings,
    /// Sizes and recipe of UNet and text encoders.
    pub unet: unet::Settings,
}

impl Settings {
    /// Refuses sizes that together need more memory than there is for the VAE's training.
    ///
    /// # Errors
    /// [`Failure::Usage`](crate::failure::Failure) with the settings to lower.
    pub fn check_images(&self) -> Result<()> {
        let (images, plan) = (&self.images, &self.vae.plan);
        let count = (images.people * images.each).min(FITTED_IMAGES as u64) as usize;
        let area = [images.size, images.size];
        let channels = 3 + self.vae.model.block_out_channels.first().copied().unwrap_or(0);
        let sizes = "`images.size` or `vae.plan.batch`";
        require_memory(
            "the images that the VAE starts from",
            &[count, area[0], area[1], 3, 4],
            "`images.size`",
        )?;
        require_memory("the images of a step", &[plan.batch, area[0], area[1], channels, 4], sizes)
    }

    /// Refuses sizes that together need more memory than there is for the UNet's training with this VAE.
    ///
    /// # Errors
    /// As [`Settings::check_images`].
    pub fn check_latents(&self, vae: &VaeConfig) -> Result<()> {
        let (images, unet) = (&self.images, &self.unet);
        let side = images.size / vae.factor();
        let (people, each) = (images.people as usize, images.each as usize);
        // In parts, then as one tensor.
        let all = [people, each, side, side, vae.latent_channels, 4, 2];
        require_memory("the latents of all images", &all, "`images.people`, `images.each` or `images.size`")?;
        let noise = [unet.plan.batch, unet.noise_candidates, side, side, vae.latent_channels, 4];
        require_memory("the noise of a step", &noise, "`unet.plan.batch` or `unet.noise_candidates`")?;
        let channels = unet.model.block_out_channels.first().copied().unwrap_or(0);
        let step = [unet.plan.batch, side, side, channels, 4];
        require_memory("the images of a step", &step, "`unet.plan.batch` or `images.size`")
    }
}
