//! Options that several commands share.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Device;
use serde::de::DeserializeOwned;

use crate::commands::values::minutes;
use crate::device;
use crate::limits;
use crate::progress;
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
