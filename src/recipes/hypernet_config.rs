//! The file given to `train-lae --config` and `train-dit --config`.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::limits;
use crate::recipes::dit::config::DitTrainConfig;
use crate::recipes::lae::config::LaeTrainConfig;

/// Both trainings of a hypernetwork in one file, since the second builds on the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HypernetTrainConfig {
    /// The LoRA autoencoder.
    pub lae: LaeTrainConfig,
    /// The mixer and the diffusion transformer.
    pub dit: DitTrainConfig,
}

impl HypernetTrainConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// [`Failure::Unusable`](crate::failure::Failure::Unusable) with the file and the line.
    pub fn read(path: &Path) -> Result<Self> {
        limits::read_toml(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipes::lae::config::Sweep;

    #[test]
    fn the_settings_in_the_repository_are_read() {
        let settings: HypernetTrainConfig =
            toml::from_str(include_str!("../../configs/hypernet-tiny.toml")).unwrap();
        settings.lae.plan.samples_a_shard().unwrap();
        let sweep: Sweep = toml::from_str(include_str!("../../configs/lae-sweep-tiny.toml")).unwrap();
        let sdxl: HypernetTrainConfig =
            toml::from_str(include_str!("../../configs/hypernet-sdxl.toml")).unwrap();
        let config = sdxl.lae.network.config(11_612_160);
        assert_eq!((config.latent(), config.compression().round()), (38_556, 301.0));
        for variant in sweep.variant {
            variant.apply(&settings.lae).unwrap().network.config(47_872);
        }
    }
}
