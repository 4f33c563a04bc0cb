//! `difflora train-encoder`: the two small networks that look at portraits of the small world.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use crate::failure::Failure;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::recipes::encoder::config::Settings;
use crate::recipes::encoder::{attributes, image};
use crate::train::trainer::{Outcome, RunOptions};

/// Arguments of `difflora train-encoder`.
///
/// Trains on portraits painted on the fly; only the settings are read. OUT becomes a folder in transformers' layout
/// (a CLIPVisionModelWithProjection); checkpoint and log go to OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network to train.
    #[arg(help_heading = "Training", long, value_enum, env = "DIFFLORA_KIND")]
    kind: Kind,
    /// Folder for the network, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: PathBuf,
    /// Settings file, as configs/encoder-tiny.toml.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    config: PathBuf,
    /// Continue from the last checkpoint of the same settings.
    #[arg(help_heading = "Output", long, env = "DIFFLORA_RESUME")]
    resume: bool,
    /// Number of steps [default: the settings].
    #[arg(help_heading = "Training", long, value_name = "N", env = "DIFFLORA_STEPS")]
    steps: Option<u64>,
    /// Stop with a checkpoint after this many minutes; --resume continues.
    #[arg(help_heading = "Output", long, value_name = "MINUTES", env = "DIFFLORA_MINUTES")]
    minutes: Option<f64>,
}

/// The networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Image encoder: images of one person are close, whatever the scene.
    Image,
    /// Attribute classifier, used only by `eval`.
    Judge,
}

/// Trains the network that was asked for.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let text =
        std::fs::read_to_string(&args.config).map_err(|error| Failure::unusable(&args.config, error))?;
    let mut settings: Settings =
        toml::from_str(&text).map_err(|error| Failure::unusable(&args.config, error))?;
    let training = args.out.join("training");
    std::fs::create_dir_all(&training)
        .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    let name = match args.kind {
        Kind::Image => "image",
        Kind::Judge => "judge",
    };
    for plan in [&mut settings.image.plan, &mut settings.judge.plan] {
        plan.steps = args.steps.unwrap_or(plan.steps);
    }
    let run_options = RunOptions {
        folder: &training,
        name,
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
        save_every: Duration::from_secs(120),
    };
    let (end, figures) = match args.kind {
        Kind::Image => image::train(&settings.image, &run_options, &args.out)?,
        Kind::Judge => attributes::train(&settings.judge, &run_options, &args.out)?,
    };
    if let Outcome::Paused { step } = end {
        progress::note(format_args!("{name} stops at step {step}; --resume goes on"));
    }
    if output.json {
        print_line!("{}", json!({ "kind": name, "finished": end == Outcome::Finished, "figures": figures }))?;
    }
    Ok(())
}
