//! Options that all trainings share.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::de::DeserializeOwned;

use crate::commands::values::minutes;
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
