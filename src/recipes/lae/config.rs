//! Settings of an autoencoder's training, and of a comparison of several: `[lae]` of `train-lae --config`, and `--sweep`.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::hypernet::lae::{CorrectionConfig, LaeConfig};
use crate::hypernet::lae_conv::Stage;
use crate::hypernet::scaler::Scaling;
use crate::hypernet::weight_preserved_loss::Distance;
use crate::lora::canonical::Canonical;
use crate::train::trainer::TrainerConfig;

/// How an autoencoder is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaeTrainConfig {
    /// Seed of the initial weights, the batches and the noise.
    pub seed: u64,
    /// Canonical form that the factors of each LoRA are brought to.
    #[serde(default)]
    pub canonical: Canonical,
    /// Mean and scale that standardise the LoRA vectors.
    #[serde(default)]
    pub scaling: Scaling,
    /// The architecture.
    pub network: Network,
    /// Reconstruction loss.
    #[serde(default)]
    pub distance: Distance,
    /// λ of the weight-preserved loss L_WP.
    pub weight_preserved: f64,
    /// Weight of 1 − cos(ΔŴ, ΔW).
    #[serde(default)]
    pub angle: f64,
    /// σ of the noise added to the standardised vectors, which keeps the encoder from relying on single weights.
    #[serde(default)]
    pub input_noise: f64,
    /// σ of the noise added to the latents, relative to their RMS: nearby latents then decode to similar LoRAs.
    pub latent_noise: f64,
    /// Steps, batch size, learning rate.
    pub plan: TrainerConfig,
}

/// [`LaeConfig`] without the vector length P, which the dataset determines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Network {
    /// Principal components, in closed form.
    Pca {
        /// L
        latent: usize,
    },
    /// The paper's convolutions with a dense bottleneck.
    Conv1dDense {
        /// L
        latent: usize,
        /// Kernel and stride of the correcting convolutions.
        patch: usize,
        /// Their channels.
        channels: usize,
    },
    /// Separate kernels for each long patch.
    Conv1dLocal {
        /// Values of a patch.
        patch: usize,
        /// Latent values per patch.
        components: usize,
        /// Correcting convolutions.
        #[serde(default)]
        correction: Option<CorrectionConfig>,
    },
    /// The paper's convolutions, optionally with a dense bottleneck.
    Conv1d {
        /// From the vector to the latent.
        stages: Vec<Stage>,
        /// Learned offsets per position.
        #[serde(default)]
        position: bool,
        /// L of the dense bottleneck.
        #[serde(default)]
        dense: Option<usize>,
    },
}

impl Network {
    /// The architecture for vectors of `input` values.
    pub fn config(&self, input: usize) -> LaeConfig {
        match self.clone() {
            Self::Pca { latent } => LaeConfig::Pca { input, latent },
            Self::Conv1dDense { latent, patch, channels } => {
                LaeConfig::Conv1dDense { input, latent, patch, channels }
            }
            Self::Conv1dLocal { patch, components, correction } => {
                LaeConfig::Conv1dLocal { input, patch, components, correction }
            }
            Self::Conv1d { stages, position, dense } => LaeConfig::Conv1d { input, stages, position, dense },
        }
    }
}

/// The file given by `--sweep`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// The `[[variant]]` entries.
    pub variant: Vec<Variant>,
}

impl Sweep {
    /// Every variant's name and configuration: a mistake in the last one does not cost the time of the others.
    ///
    /// # Errors
    /// As [`Variant::apply`].
    pub fn variants(&self, config: &LaeTrainConfig) -> Result<Vec<(String, LaeTrainConfig)>> {
        self.variant.iter().map(|variant| Ok((variant.name.clone(), variant.apply(config)?))).collect()
    }
}

/// One autoencoder of a comparison.
#[derive(Clone, Debug, Deserialize)]
pub struct Variant {
    /// Its folder below OUT, and its row in the table.
    pub name: String,
    /// Changed keys of `[lae]`; tables are merged key by key, except `network`, which is replaced.
    #[serde(flatten)]
    pub changes: toml::Table,
}

impl Variant {
    /// `config` with the changes.
    ///
    /// # Errors
    /// [`Failure::Usage`] with the name of the variant for an unknown key or a value of the wrong type.
    pub fn apply(&self, config: &LaeTrainConfig) -> Result<LaeTrainConfig> {
        let mut table = toml::Table::try_from(config)?;
        merge(&mut table, &self.changes);
        let wrong = |error| Failure::Usage(format!("variant `{}` of the sweep: {error}", self.name));
        Ok(table.try_into().map_err(wrong)?)
    }
}

fn merge(table: &mut toml::Table, changes: &toml::Table) {
    for (key, change) in changes {
        match (table.get_mut(key), change) {
            // Another kind of network has other keys.
            (Some(toml::Value::Table(inner)), toml::Value::Table(changes)) if key != "network" => {
                merge(inner, changes);
            }
            _ => {
                table.insert(key.clone(), change.clone());
            }
        }
    }
}
