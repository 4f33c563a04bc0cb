//! `difflora train-base`: a small SDXL from nothing, trained on painted portraits.

use std::path::PathBuf;

use anyhow::Result;

use crate::commands::output::{Output, print_line};
use crate::commands::run_args::{DeviceArgs, RunArgs, note_pause};
use crate::files;
use crate::recipes::base::config::Settings;
use crate::recipes::base::{unet, vae};
use crate::synthetic::attribute_classifier::AttributeClassifier;
use crate::synthetic::image_set::PaintedImages;
use crate::train::trainer::Outcome;
use crate::weights::model_folder::ModelFiles;

/// Arguments of `difflora train-base`.
///
/// Two stages: first the VAE, then the UNet and both text encoders from captions. OUT becomes an SDXL folder in
/// diffusers' layout; checkpoints, logs and contact sheets go to OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Stage to train; the UNet needs a trained VAE.
    #[arg(help_heading = "Training", long, value_enum, default_value = "all", env = "DIFFLORA_STAGE")]
    stage: Stage,
    /// Initialise UNet and text encoders from this model, for a further round with its own schedule. The VAE of OUT
    /// is kept.
    #[arg(help_heading = "Input", long, value_name = "DIR", env = "DIFFLORA_FROM")]
    from: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Attribute classifier that measures generated images along the way, in OUT/training/unet-quality.jsonl.
    #[arg(help_heading = "Input", long, value_name = "DIR", env = "DIFFLORA_JUDGE")]
    judge: Option<PathBuf>,
    /// Steps per stage [default: the settings].
    #[arg(help_heading = "Training", long, value_name = "N", env = "DIFFLORA_STEPS")]
    steps: Option<u64>,
}

/// Parts of the training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    /// The VAE.
    Vae,
    /// UNet and text encoders.
    Unet,
    /// Both, one after the other.
    All,
}

/// Trains the stages that were asked for.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let settings = read(&args)?;
    let training = args.run.training_folder();
    let options = |name| args.run.options(&training, name, 300);
    let _lock = options("unet").begin(&["vae", "unet"].map(|name| options(name).checkpoint()))?;
    if let Some(from) = &args.from {
        files::refuse_inputs(&[&args.run.out.join("unet")], &[from.join("unet")])?;
    }
    files::write_whole(&training.join("settings.toml"), toml::to_string(&settings)?.as_bytes())?;
    let device = args.device.open()?;
    let images = PaintedImages::new(&settings.images);
    if matches!(args.stage, Stage::Vae | Stage::All) {
        let end = vae::train(&settings, &images, &options("vae"), &args.run.out, &device)?;
        if report(end, "vae", output)? {
            return Ok(());
        }
    }
    if matches!(args.stage, Stage::Unet | Stage::All) {
        let classifier = match &args.judge {
            Some(name) => Some(AttributeClassifier::open(&ModelFiles::folder(name)?)?),
            None => None,
        };
        let start =
            unet::Start { device: &device, from: args.from.as_deref(), classifier: classifier.as_ref() };
        let end = unet::train(&settings, &images, &options("unet"), &args.run.out, &start)?;
        report(end, "unet", output)?;
    }
    Ok(())
}

/// The settings with what the command line changes in them.
fn read(args: &Args) -> Result<Settings> {
    let mut settings: Settings = args.run.settings()?;
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
fn report(end: Outcome, stage: &str, output: &Output) -> Result<bool> {
    note_pause(end, &format!("stage {stage}"));
    if output.json {
        let (finished, step) = match end {
            Outcome::Finished | Outcome::Stopped { .. } => (true, None),
            Outcome::Paused { step } => (false, Some(step)),
        };
        print_line!("{}", serde_json::json!({ "stage": stage, "finished": finished, "step": step }))?;
    }
    Ok(end != Outcome::Finished)
}
