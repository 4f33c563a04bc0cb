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
use crate::train::trainer::{End, Keeping};

/// Arguments of `difflora train-encoder`.
///
/// Learns from portraits that are painted on the way; nothing is read but the settings. OUT becomes a folder as
/// transformers writes it (the encoder is a CLIPVisionModelWithProjection); checkpoint and log go to OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which network.
    #[arg(long, value_enum, env = "DIFFLORA_KIND")]
    kind: Kind,
    /// Folder for the network; made where it is missing.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: PathBuf,
    /// Sizes and recipe, as in configs/encoder-tiny.toml.
    #[arg(long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    config: PathBuf,
    /// Go on from the last checkpoint of the same settings.
    #[arg(long, env = "DIFFLORA_RESUME")]
    resume: bool,
    /// Steps to train, instead of the number in the settings.
    #[arg(long, value_name = "N", env = "DIFFLORA_STEPS")]
    steps: Option<u64>,
    /// Stop after so many minutes with a checkpoint; --resume goes on.
    #[arg(long, value_name = "MINUTES", env = "DIFFLORA_MINUTES")]
    minutes: Option<f64>,
}

/// The networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// The image encoder: images of one person lie together, whatever the scene.
    Image,
    /// The judge: names what an image shows; for evaluation only.
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
    let keeping = Keeping {
        folder: &training,
        name,
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
        save_every: Duration::from_secs(120),
    };
    let (end, figures) = match args.kind {
        Kind::Image => image::train(&settings.image, &keeping, &args.out)?,
        Kind::Judge => attributes::train(&settings.judge, &keeping, &args.out)?,
    };
    if let End::Paused { step } = end {
        progress::note(format_args!("{name} stops at step {step}; --resume goes on"));
    }
    if output.json {
        print_line!("{}", json!({ "kind": name, "finished": end == End::Finished, "figures": figures }))?;
    }
    Ok(())
}
