//! `difflora train-encoder`: the two small networks that look at portraits of the small world.

use anyhow::Result;
use serde_json::json;

use crate::commands::output::{Output, print_line};
use crate::commands::run_args::{DeviceArgs, RunArgs, note_pause};
use crate::files;
use crate::recipes::encoder::config::Settings;
use crate::recipes::encoder::{attributes, image};
use crate::train::trainer::Outcome;

/// Arguments of `difflora train-encoder`.
///
/// Trains on portraits painted on the fly; only the settings are read. OUT becomes a folder in transformers' layout
/// (a CLIPVisionModelWithProjection); checkpoint and log go to OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network to train.
    #[arg(help_heading = "Training", long, value_enum, env = "DIFFLORA_KIND")]
    kind: Kind,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Number of steps [default: the settings].
    #[arg(help_heading = "Training", long, value_name = "N", env = "DIFFLORA_STEPS")]
    steps: Option<u64>,
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
    let mut settings: Settings = args.run.settings()?;
    let training = args.run.training_folder();
    let name = match args.kind {
        Kind::Image => "image",
        Kind::Judge => "judge",
    };
    for plan in [&mut settings.image.plan, &mut settings.judge.plan] {
        plan.steps = args.steps.unwrap_or(plan.steps);
    }
    let options = args.run.options(&training, name, 120);
    let _lock = options.begin(&[options.checkpoint()])?;
    files::refuse_inputs(&[&args.run.out.join("config.json")], std::slice::from_ref(&args.run.config))?;
    let device = args.device.open()?;
    let (end, figures) = match args.kind {
        Kind::Image => image::train(&settings.image, &options, &args.run.out, &device)?,
        Kind::Judge => attributes::train(&settings.judge, &options, &args.run.out, &device)?,
    };
    note_pause(end, name);
    if output.json {
        print_line!("{}", json!({ "kind": name, "finished": end == Outcome::Finished, "figures": figures }))?;
    }
    Ok(())
}
