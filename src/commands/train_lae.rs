//! `difflora train-lae`: LoRAs → their autoencoder, or several to compare.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};

use crate::commands::output::{Output, print_line};
use crate::commands::run_args::{DeviceArgs, RunArgs};
use crate::commands::values::number;
use crate::dataset::lora_dataset::{FormWanted, LoraDataset, ReadOptions};
use crate::files::{self, FolderLock};
use crate::limits::read_toml;
use crate::recipes::hypernet_config::HypernetTrainConfig;
use crate::recipes::lae::config::{LaeTrainConfig, Sweep};
use crate::recipes::lae::report;
use crate::recipes::lae::train::{TrainOptions, train_into, train_variants};
use crate::train::checkpoint;
use crate::train::distributed;
use crate::weights::model_folder::save_json;

/// Arguments of `difflora train-lae`.
///
/// OUT holds the autoencoder for `train-dit`; checkpoint, log and report.json (errors on held-out LoRAs) go to
/// OUT/training. With --sweep, one autoencoder per entry of a list, OUT/NAME each, and one table. Guide: difflora
/// help hypernetwork.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset folder of `build-dataset`.
    #[arg(help_heading = "Input", long, value_name = "DIR", env = "DIFFLORA_DATASET")]
    pub dataset: PathBuf,
    /// Settings, output folder, and how long to train.
    #[command(flatten)]
    pub run: RunArgs,
    /// List of [[variant]]s, each with a `name` and its changes of [lae], as configs/lae-sweep-tiny.toml.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_SWEEP")]
    pub sweep: Option<PathBuf>,
    /// Skip people whose files are missing.
    #[arg(help_heading = "Input", long, env = "DIFFLORA_SKIP_MISSING")]
    pub skip_missing: bool,
    /// Gigabytes of LoRAs cached in memory; the rest is read from disk in each step.
    #[arg(
        help_heading = "Advanced",
        long,
        value_name = "GB",
        default_value_t = 2.0,
        env = "DIFFLORA_MEMORY", value_parser = number)]
    pub memory: f64,
    /// Where to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl Args {
    /// Whether the batches of the training are split into shards, one per thread.
    pub fn trains_in_shards(&self) -> bool {
        // An unreadable file is reported when the command runs.
        HypernetTrainConfig::read(&self.run.config).is_ok_and(|config| config.lae.plan.trains_in_shards())
    }
}

/// Trains, saves and reports.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let config = HypernetTrainConfig::read(&args.run.config)?.lae;
    distributed::join()?;
    let options =
        TrainOptions { device: args.device.open()?, resume: args.run.resume, deadline: args.run.deadline() };
    if let Some(path) = &args.sweep {
        return run_sweep(&args, &config, &read_toml(path)?, &options, output);
    }
    let _lock = begin(&args, std::slice::from_ref(&args.run.out))?;
    let set = open_dataset(&args, &config)?;
    let Some(report) = train_into(&config, &set, &args.run.out, &options)? else { return Ok(()) };
    if output.json { print_line!("{report}") } else { print_line!("{}", report::as_text(&report)) }
}

/// Trains each variant in a folder of its own below OUT, and writes `sweep.json`.
fn run_sweep(
    args: &Args,
    config: &LaeTrainConfig,
    sweep: &Sweep,
    options: &TrainOptions,
    output: &Output,
) -> Result<()> {
    let variants = sweep.variants(config)?;
    let folders: Vec<PathBuf> = variants.iter().map(|(name, _)| args.run.out.join(name)).collect();
    let _lock = begin(args, &folders)?;
    let reports = train_variants(variants, &args.run.out, options, |config| open_dataset(args, config))?;
    if !distributed::is_main_process() {
        return Ok(());
    }
    let table: Value =
        reports.iter().map(|(name, report)| json!({ "name": name, "report": report })).collect();
    save_json(&args.run.out.join("sweep.json"), &table)?;
    if output.json { print_line!("{table}") } else { print_line!("{}", report::table(&reports)) }
}

/// Refuses `--resume` where none of `folders` holds a state, and locks OUT; of a process group the main process does.
fn begin(args: &Args, folders: &[PathBuf]) -> Result<Option<FolderLock>> {
    let outputs: Vec<PathBuf> =
        folders.iter().flat_map(|folder| ["config.json", STATE].map(|file| folder.join(file))).collect();
    let inputs: Vec<PathBuf> = args.sweep.iter().chain([&args.run.config]).cloned().collect();
    files::refuse_inputs(&outputs.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &inputs)?;
    if args.run.resume {
        let report = |folder: &PathBuf| folder.join("training/report.json");
        let states = folders.iter().map(|folder| folder.join(STATE)).chain(folders.iter().map(report));
        checkpoint::require_any(&states.collect::<Vec<_>>())?;
    }
    distributed::is_main_process().then(|| FolderLock::acquire(&args.run.out)).transpose()
}

/// The state of a training, in its folder.
const STATE: &str = "training/lae.checkpoint.safetensors";

fn open_dataset(args: &Args, config: &LaeTrainConfig) -> Result<LoraDataset> {
    let memory = (args.memory.max(0.0) * (1u64 << 30) as f64) as usize;
    let form = FormWanted::New(config.canonical);
    LoraDataset::open(&args.dataset, &ReadOptions { skip_missing: args.skip_missing, memory, form })
}
