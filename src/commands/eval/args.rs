//! Arguments of `difflora eval`.

use std::path::PathBuf;

use crate::commands::run_args::DeviceArgs;
use crate::commands::values::{learning_rate, number, seed};
use crate::eval::renderer::Sampling;
use crate::registry;
use crate::sdxl::pipeline::Sampler;

/// Arguments of `difflora eval`.
///
/// Generates images of held-out people with no LoRA, the mean LoRA, the hypernetwork's LoRA from one photo and from
/// another person's photo, the LoRA of the nearest training person, the person's own DreamBooth LoRA, and that LoRA
/// through the autoencoder; all from the same noise and prompts. SFace, which took part in no training, measures the
/// similarity to other photos of the person.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset folder of `build-dataset`.
    #[arg(
        help_heading = "Input",
        long,
        value_name = "DIR",
        required_unless_present = "base_only",
        env = "DIFFLORA_DATASET"
    )]
    pub(super) dataset: Option<PathBuf>,
    /// Hypernetwork: tiny (built in), a folder, or a hub repository.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR|REPO", default_value = registry::BUILT_IN, env = "DIFFLORA_HYPERNET")]
    pub(super) hypernet: String,
    /// Base model of the LoRAs.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub(super) base: String,
    #[command(flatten)]
    pub(super) base_options: registry::BaseOptions,
    /// CLIP image encoder.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_IMAGE_ENCODER")]
    pub(super) image_encoder: String,
    /// Attribute classifier, which measures prompt accuracy and factors [default: the built-in one].
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", env = "DIFFLORA_JUDGE")]
    pub(super) judge: Option<String>,
    /// Maximum number of held-out people [default: all].
    #[arg(help_heading = "Input", long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), env = "DIFFLORA_PEOPLE")]
    pub(super) people: Option<u64>,
    /// Images per person and method; four prompts alternate.
    #[arg(help_heading = "Sampling", long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64), alias = "pictures", env = "DIFFLORA_IMAGES")]
    pub(super) images: u64,
    /// Number of sampling steps.
    #[arg(help_heading = "Sampling", long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000), env = "DIFFLORA_STEPS")]
    pub(super) steps: u64,
    /// Classifier-free guidance scale; 1 or less disables guidance.
    #[arg(
        help_heading = "Sampling",
        long,
        value_name = "X",
        default_value_t = 3.0,
        env = "DIFFLORA_GUIDANCE", value_parser = number)]
    pub(super) guidance: f64,
    /// Sampling method.
    #[arg(help_heading = "Sampling", long, value_enum, default_value_t = Sampler::Euler, env = "DIFFLORA_SAMPLER")]
    pub(super) sampler: Sampler,
    /// Latents to sample and average per person.
    #[arg(help_heading = "Identity", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000), env = "DIFFLORA_SAMPLES")]
    pub(super) samples: u64,
    /// Factor on the generated latent: distance from the mean LoRA.
    #[arg(
        help_heading = "Identity",
        long,
        value_name = "X",
        default_value_t = 1.0,
        env = "DIFFLORA_STRENGTH", value_parser = number)]
    pub(super) strength: f64,
    /// Evaluate the generated LoRA after this many fine-tuning steps on the photo as well, as `gen --refine`.
    #[arg(help_heading = "Identity", long, value_name = "STEPS", value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_REFINE")]
    pub(super) refine: Option<u32>,
    /// Learning rate of --refine.
    #[arg(help_heading = "Identity", long, value_name = "F", default_value_t = 1e-3, requires = "refine", value_parser = learning_rate, env = "DIFFLORA_REFINE_RATE")]
    pub(super) refine_rate: f64,
    /// Seed of all noise; -1 takes a random one.
    #[arg(help_heading = "Sampling", long, default_value_t = 0, env = "DIFFLORA_SEED", allow_negative_numbers = true, value_parser = seed)]
    pub(super) seed: u64,
    /// Where to compute.
    #[command(flatten)]
    pub(super) device: DeviceArgs,
    /// Folder for table.json, table.md and sheet.png, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    pub(super) out: Option<PathBuf>,
    /// Evaluate only the base model, on N images (100) from random captions.
    #[arg(help_heading = "Input", long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "100", value_parser = clap::value_parser!(u64).range(1..=100_000), env = "DIFFLORA_BASE_ONLY")]
    pub(super) base_only: Option<u64>,
}

impl Args {
    /// How images are sampled.
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            steps: self.steps as usize,
            guidance: self.guidance,
            sampler: self.sampler,
            seed: self.seed,
        }
    }
}
