//! Options that all trainings share.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use crate::failure::Failure;
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
    #[arg(help_heading = "Output", long, value_name = "MINUTES", env = "DIFFLORA_MINUTES")]
    pub minutes: Option<f64>,
}

impl RunArgs {
    /// Reads the settings file.
    ///
    /// # Errors
    /// [`Failure::Unusable`] with the file and the line.
    pub fn settings<T: DeserializeOwned>(&self) -> Result<T> {
        read_toml(&self.config)
    }

    /// Creates OUT/training, for checkpoint and log.
    pub fn training_folder(&self) -> Result<PathBuf> {
        let training = self.out.join("training");
        std::fs::create_dir_all(&training)
            .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
        Ok(training)
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

/// Reads a TOML file.
///
/// # Errors
/// [`Failure::Unusable`] with the file and the line.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::unusable(path, error))?;
    toml::from_str(&text).map_err(|error| Failure::unusable(path, error))
}

/// Notes that the training `name` was paused.
pub fn note_pause(outcome: Outcome, name: &str) {
    if let Outcome::Paused { step } = outcome {
        progress::note(format_args!("{name} stops at step {step}; --resume goes on"));
    }
}
