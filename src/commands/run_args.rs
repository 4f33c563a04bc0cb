//! Options that several commands share.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Device;
use serde::de::DeserializeOwned;

use crate::commands::values::{minutes, named, number};
use crate::device;
use crate::limits;
use crate::progress;
use crate::registry::{Base, BaseOptions};
use crate::sdxl::pipeline::Sampler;
use crate::train::trainer::{Outcome, RunOptions};

/// Settings, output folder, and how long to train.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Folder for the result, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    pub out: PathBuf,
    /// Settings file, as those in configs/.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    pub config: PathBuf,
    /// Continue from the last checkpoint of the same settings.
    #[arg(help_heading = "Output", long, env = "DIFFLORA_RESUME")]
    pub resume: bool,
    /// Stop with a checkpoint after this many minutes; --resume continues.
    #[arg(help_heading = "Output", long, value_name = "MINUTES", env = "DIFFLORA_MINUTES", value_parser = minutes)]
    pub minutes: Option<f64>,
}

/// Where to compute.
#[derive(Clone, Debug, clap::Args)]
pub struct DeviceArgs {
    /// Device to compute on; `auto` is the GPU in builds with CUDA, else the CPU.
    #[arg(
        help_heading = "Advanced",
        long = "device",
        value_name = "auto|cpu|cuda[:N]|metal",
        default_value = "auto",
        env = "DIFFLORA_DEVICE"
    )]
    name: String,
}

/// Where to look for a base model.
#[derive(Clone, Debug, clap::Args)]
pub struct BaseOptionArgs {
    /// Settings of a single-file base that its tensors do not show: a diffusers folder, or a JSON file with the keys
    /// `unet`, `vae`, `text_encoder`, `text_encoder_2`, `scheduler`, `tokenizer`, `tokenizer_2`, `model_index`.
    #[arg(help_heading = "Model", long, value_name = "FILE|DIR", env = "DIFFLORA_BASE_CONFIG")]
    base_config: Option<PathBuf>,
    /// Branch, tag or commit of a base on the hub.
    #[arg(help_heading = "Model", long, value_name = "REVISION", env = "DIFFLORA_REVISION")]
    revision: Option<String>,
    /// Use only cached models, never the network (as HF_HUB_OFFLINE).
    #[arg(help_heading = "Model", long, env = "DIFFLORA_OFFLINE")]
    pub offline: bool,
}

impl BaseOptionArgs {
    /// The options for the library.
    pub fn options(&self) -> BaseOptions {
        let Self { base_config, revision, offline } = self.clone();
        BaseOptions { base_config, revision, offline }
    }

    /// Opens the base model `name`.
    ///
    /// # Errors
    /// As [`Base::open`].
    pub fn open(&self, name: &str) -> Result<Base> {
        Base::open(name, &self.options())
    }
}

/// How images are sampled.
#[derive(Clone, Debug, clap::Args)]
pub struct SamplingArgs {
    /// Number of sampling steps.
    #[arg(help_heading = "Sampling", long, value_name = "N", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=1000), env = "DIFFLORA_STEPS")]
    pub steps: u32,
    /// Classifier-free guidance scale; 1 or less disables guidance.
    #[arg(help_heading = "Sampling", long, value_name = "F", default_value_t = 3.0, env = "DIFFLORA_GUIDANCE", value_parser = number)]
    pub guidance: f64,
    /// Sampling method [default: the base model's].
    #[arg(help_heading = "Sampling", long, value_parser = named::<Sampler>(), env = "DIFFLORA_SAMPLER")]
    pub sampler: Option<Sampler>,
}

impl From<&str> for DeviceArgs {
    fn from(name: &str) -> Self {
        Self { name: name.to_string() }
    }
}

impl DeviceArgs {
    /// Opens the device.
    ///
    /// # Errors
    /// As [`device::open`].
    pub fn open(&self) -> Result<Device> {
        device::open(&self.name)
    }
}

impl RunArgs {
    /// Reads the settings file.
    ///
    /// # Errors
    /// As [`limits::read_toml`].
    pub fn settings<T: DeserializeOwned>(&self) -> Result<T> {
        limits::read_toml(&self.config)
    }

    /// OUT/training, for checkpoint and log.
    pub fn training_folder(&self) -> PathBuf {
        self.out.join("training")
    }

    /// When `--minutes` are over.
    pub fn deadline(&self) -> Option<Instant> {
        self.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes))
    }

    /// A run called `name` with a checkpoint every `save_every` seconds in `folder`.
    pub fn options<'a>(&self, folder: &'a Path, name: &'static str, save_every: u64) -> RunOptions<'a> {
        RunOptions {
            folder,
            name,
            resume: self.resume,
            deadline: self.deadline(),
            save_every: Duration::from_secs(save_every),
        }
    }
}

/// Notes that the training `name` was paused.
pub fn note_pause(outcome: Outcome, name: &str) {
    if let Outcome::Paused { step } = outcome {
        progress::note(format_args!("{name} stops at step {step}; --resume goes on"));
    }
}
