//! `difflora train-base`: a small SDXL from nothing, trained on painted portraits.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::failure::Failure;
use crate::files;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::recipes::base::config::Settings;
use crate::recipes::base::{unet, vae};
use crate::synthetic::image_set::Gallery;
use crate::train::trainer::{End, Keeping};

/// Arguments of `difflora train-base`.
///
/// Two stages: the VAE learns to code images, then the UNet and both text encoders learn to draw from captions.
/// OUT becomes an ordinary SDXL folder as diffusers reads it; checkpoints, logs and sample sheets go to OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder for the model; made where it is missing.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: PathBuf,
    /// Sizes and recipe, as in configs/base-tiny.toml.
    #[arg(long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    config: PathBuf,
    /// What to train; the UNet needs a VAE that has been trained before.
    #[arg(long, value_enum, default_value = "all", env = "DIFFLORA_STAGE")]
    stage: Stage,
    /// Go on from the last checkpoint of the same settings.
    #[arg(long, env = "DIFFLORA_RESUME")]
    resume: bool,
    /// Start UNet and text encoders from the weights of this model instead of from noise: a further round of
    /// training with a schedule of its own. The VAE stays what OUT has.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_FROM")]
    from: Option<PathBuf>,
    /// Steps of each stage that is trained, instead of the number in the settings.
    #[arg(long, value_name = "N", env = "DIFFLORA_STEPS")]
    steps: Option<u64>,
    /// Stop after so many minutes with a checkpoint; --resume goes on.
    #[arg(long, value_name = "MINUTES", env = "DIFFLORA_MINUTES")]
    minutes: Option<f64>,
}

/// Parts of the training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    /// The codec between images and latents.
    Vae,
    /// The denoiser and the text encoders.
    Unet,
    /// One after the other.
    All,
}

/// Trains the stages that were asked for.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let settings = read(&args)?;
    let training = args.out.join("training");
    std::fs::create_dir_all(&training)
        .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    files::write_whole(&training.join("settings.toml"), toml::to_string(&settings)?.as_bytes())?;
    let keeping = |name| Keeping {
        folder: &training,
        name,
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
        save_every: Duration::from_secs(300),
    };
    let mut gallery = Gallery::new(&settings.images);
    if matches!(args.stage, Stage::Vae | Stage::All) {
        let end = vae::train(&settings, &mut gallery, &keeping("vae"), &args.out)?;
        if report(end, "vae", output)? {
            return Ok(());
        }
    }
    if matches!(args.stage, Stage::Unet | Stage::All) {
        let end = unet::train(&settings, &mut gallery, &keeping("unet"), &args.out, args.from.as_deref())?;
        report(end, "unet", output)?;
    }
    Ok(())
}

/// The settings with what the command line changes in them.
fn read(args: &Args) -> Result<Settings> {
    let text =
        std::fs::read_to_string(&args.config).map_err(|error| Failure::unusable(&args.config, error))?;
    let mut settings: Settings =
        toml::from_str(&text).map_err(|error| Failure::unusable(&args.config, error))?;
    if let Some(steps) = args.steps {
        match args.stage {
            Stage::Vae => settings.vae.plan.steps = steps,
            Stage::Unet => settings.unet.plan.steps = steps,
            Stage::All => (settings.vae.plan.steps, settings.unet.plan.steps) = (steps, steps),
        }
    }
    Ok(settings)
}

/// Says how a stage ended; whether it paused.
fn report(end: End, stage: &str, output: &Output) -> Result<bool> {
    if let End::Paused { step } = end {
        progress::note(format_args!("stage {stage} stops at step {step}; --resume goes on"));
    }
    if output.json {
        let (finished, step) = match end {
            End::Finished | End::Stopped { .. } => (true, None),
            End::Paused { step } => (false, Some(step)),
        };
        print_line!("{}", serde_json::json!({ "stage": stage, "finished": finished, "step": step }))?;
    }
    Ok(end != End::Finished)
}
