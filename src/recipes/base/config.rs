//! The file that `train-base --config` takes.

use serde::{Deserialize, Serialize};

use super::{unet, vae};
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
