//! Arguments of `difflora train-lora`, except those that change settings.

use std::path::PathBuf;

use crate::commands::run_args::{BaseOptionArgs, DeviceArgs};
use crate::commands::train_lora::options::Options;
use crate::registry;

/// Arguments of `difflora train-lora`.
///
/// Captions are read from a .txt beside each image, else made from the template. Settings come from a preset or a
/// TOML file (--config); options override them. State, log, samples and the settings in effect are kept in
/// OUT.training; --resume continues to the same bytes. Options without a default take it from the preset. Guide:
/// difflora help train-lora.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of images of one person.
    #[arg(help_heading = "Input", value_name = "IMAGES", required_unless_present = "many")]
    pub images: Option<PathBuf>,
    /// Folder of people, each a folder of images, instead of IMAGES.
    #[arg(
        help_heading = "Input",
        long,
        value_name = "DIR",
        conflicts_with = "images",
        env = "DIFFLORA_MANY"
    )]
    pub many: Option<PathBuf>,
    /// People who share each forward pass of the frozen base.
    #[arg(help_heading = "Advanced", long, value_name = "K", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024), env = "DIFFLORA_PEOPLE_PER_BATCH")]
    pub people_per_batch: u32,
    /// With --many: groups of people trained in parallel, one thread each. Use the number of cores for small bases;
    /// with 1, each operation uses all cores.
    #[arg(help_heading = "Advanced", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), env = "DIFFLORA_GROUPS")]
    pub groups: u32,
    /// LoRA to write; with --many a folder, for PERSON.safetensors each.
    #[arg(help_heading = "Output", long, value_name = "FILE.safetensors|DIR", env = "DIFFLORA_OUT")]
    pub out: PathBuf,
    /// Preset (tiny, sdxl-dreambooth) or a TOML file like those in configs/, which may override a preset (preset =
    /// "tiny") [default: the preset that fits the base].
    #[arg(help_heading = "Input", long, value_name = "NAME|FILE", env = "DIFFLORA_CONFIG")]
    pub config: Option<PathBuf>,
    /// Base model: tiny (built in), sdxl, a diffusers folder, a `.safetensors` in LDM layout, or a hub repository.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR|FILE|REPO", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub base: String,
    #[command(flatten)]
    pub(super) base_options: BaseOptionArgs,
    /// Where to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Continue an interrupted run.
    #[arg(help_heading = "Output", long, env = "DIFFLORA_RESUME")]
    pub resume: bool,
    #[command(flatten)]
    pub(super) options: Options,
}

impl Args {
    /// Whether groups of people train a thread each, so that kernels must not have threads of their own.
    pub fn trains_in_groups(&self) -> bool {
        self.many.is_some() && self.groups > 1
    }
}
