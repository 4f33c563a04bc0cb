//! `difflora train-dit`: a person's embeddings → the latent of their LoRA.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;

use crate::commands::output::{Output, print_line};
use crate::commands::run_args::{DeviceArgs, RunArgs, note_pause};
use crate::dataset::lora_dataset::{FormWanted, LoraDataset, ReadOptions};
use crate::files;
use crate::hypernet::{Hypernet, LoraCodec};
use crate::progress;
use crate::recipes::dit::config::FunctionalLossConfig;
use crate::recipes::dit::image_loss::ImageLoss;
use crate::recipes::dit::report::{as_text, report};
use crate::recipes::dit::train::{check_autoencoder, train};
use crate::recipes::dit::training_set::LatentTrainingSet;
use crate::recipes::dreambooth::functional_loss::FunctionalLoss;
use crate::recipes::hypernet_config::HypernetTrainConfig;
use crate::registry::{self, Base, BaseOptions};
use crate::sdxl::pipeline::Sdxl;
use crate::train::distributed;
use crate::train::trainer::Outcome;
use crate::weights::model_folder::{ModelFiles, save_json};

/// Arguments of `difflora train-dit`.
///
/// Trains the mixer and the diffusion transformer, which predict the latent of a person's LoRA from the embeddings of
/// one photo. OUT becomes the hypernetwork for `gen`; checkpoint, log and report.json (held-out errors beside
/// baselines) go to OUT/training. Guide: difflora help hypernetwork.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset folder of `build-dataset`.
    #[arg(help_heading = "Input", long, value_name = "DIR", env = "DIFFLORA_DATASET")]
    pub dataset: PathBuf,
    /// Autoencoder of `train-lae` for the same dataset.
    #[arg(help_heading = "Input", long, value_name = "DIR", env = "DIFFLORA_LAE")]
    pub lae: PathBuf,
    /// Settings, output folder, and how long to train.
    #[command(flatten)]
    pub run: RunArgs,
    /// Base model for the diffusion loss of images (`functional` in the settings).
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub base: String,
    /// Where to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl Args {
    /// Whether the batches of the training are split into shards, one per thread.
    pub fn trains_in_shards(&self) -> bool {
        // An unreadable file is reported when the command runs.
        HypernetTrainConfig::read(&self.run.config).is_ok_and(|config| config.dit.plan.trains_in_shards())
    }
}

/// Trains, saves and reports.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let config = HypernetTrainConfig::read(&args.run.config)?.dit;
    config.check()?;
    distributed::join()?;
    let device = args.device.open()?;
    let training = args.run.training_folder();
    let options = args.run.options(&training, "dit", 120);
    let _lock = options.begin(&[options.checkpoint()])?;
    let (report_file, config_file) = (training.join("report.json"), args.run.out.join("config.json"));
    let inputs = [args.run.config.clone(), args.lae.join("config.json")];
    files::refuse_inputs(&[&report_file, &config_file], &inputs)?;
    let lae_files = ModelFiles::folder(&args.lae)?;
    let codec = LoraCodec::open(&lae_files, &device)?;
    let lae = registry::identify(&lae_files, &args.lae.display().to_string(), "lae.safetensors")?;
    let form = FormWanted::Of(codec.form.clone());
    let set = LoraDataset::open(&args.dataset, &ReadOptions { form, ..ReadOptions::default() })?;
    check_autoencoder(&codec, &set)?;
    let data = LatentTrainingSet::prepare(&config, &codec, &lae.sha256, &set, &training)?;
    let open = |how| open_image_loss(how, &args, &codec, &set);
    let image_loss = config.functional.as_ref().map(open).transpose()?;
    let (denoiser, end) = train(&config, &data, image_loss.as_ref(), &set, &lae, &options)?;
    if !distributed::is_main_process() {
        return Ok(());
    }
    let hypernet = Hypernet { codec, denoiser };
    hypernet.save(&args.run.out, DType::F16)?;
    let report = report(&hypernet, &data, &set, end)?;
    save_json(&training.join("report.json"), &report)?;
    note_pause(end, "dit");
    if let Outcome::Stopped { step } = end {
        progress::note(format_args!("dit stops at step {step}: the validation error no longer falls"));
    }
    if output.json { print_line!("{report}") } else { print_line!("{}", as_text(&report)) }
}

fn open_image_loss<'a>(
    how: &'a FunctionalLossConfig,
    args: &Args,
    codec: &'a LoraCodec,
    set: &LoraDataset,
) -> Result<ImageLoss<'a>> {
    let base = Base::open(&args.base, &BaseOptions::default())?;
    codec.base.demand(&base.id()?, "base model")?;
    let base = Sdxl::open(&base.files, DType::F32, codec.device())?;
    Ok(ImageLoss {
        how,
        codec,
        functional_loss: FunctionalLoss::open(&args.dataset, base, set.train.people())?,
    })
}
