//! `config.json` of a hypernetwork folder.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::denoiser::DenoiserConfig;
use super::lae::LaeConfig;
use crate::lora::canonical::Canonical;
use crate::lora::layout::LoraLayout;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;

/// `config.json` of a hypernetwork folder, or of an autoencoder's (without `denoiser`).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Version of the folder's format.
    pub format: u32,
    /// The base model that the LoRAs are for.
    pub base: ModelId,
    /// Modules of the vector, in order.
    pub layout: LoraLayout,
    /// The form that the factors of a LoRA are brought to before they become a vector.
    #[serde(default)]
    pub canonical: Canonical,
    /// Sizes of the autoencoder.
    pub lae: LaeConfig,
    /// Sizes and settings of the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denoiser: Option<DenoiserConfig>,
}

/// The format that this program writes. Format 1, which it reads too, had other keys for `conv1d` autoencoders.
pub const FORMAT: u32 = 2;

impl Config {
    pub(super) fn read(files: &ModelFiles) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        // The version first: keys of a newer one would only be called unknown.
        let Version { format } = files.json("config.json")?;
        if !(1..=FORMAT).contains(&format) {
            let why =
                format!("it has format {format}, this program reads 1 to {FORMAT}; use a newer difflora");
            return Err(files.unusable("config.json", why));
        }
        let mut config: serde_json::Value = files.config("config.json")?;
        if format == 1
            && let Some(lae) = config.get_mut("lae")
        {
            *lae = LaeConfig::from_format_1(lae.take());
        }
        serde_json::from_value(config).map_err(|error| files.unusable("config.json", error))
    }
}
