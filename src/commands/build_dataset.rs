//! `difflora build-dataset`: portraits of many people → a LoRA of each, and a manifest.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::DType;

use crate::commands::output::{Output, print_line};
use crate::commands::run_args::{BaseOptionArgs, DeviceArgs};
use crate::dataset::manifest::{HEADER, Header, MANIFEST, SETTINGS};
use crate::failure::Failure;
use crate::files::{self, FolderLock};
use crate::identity::catalog::{self, open_encoder};
use crate::identity::clip::ImageEncoder;
use crate::identity::hyperlora::FacePreparation;
use crate::limits::read_toml;
use crate::recipes::lora_dataset::{BASIS, DatasetBuilder, DatasetSettings, settings_hash};
use crate::registry;
use crate::sdxl::pipeline::Sdxl;

/// Arguments of `difflora build-dataset`.
///
/// Paints the people of the small world, trains a DreamBooth LoRA for each, and embeds their faces. OUT holds
/// manifest.jsonl with one row per person, loras/, embeddings/, portraits/ and the shared basis. Run the same command
/// again to continue.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset folder, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    pub out: PathBuf,
    /// Settings file, as configs/dataset-tiny.toml.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    pub config: PathBuf,
    /// Base model of the LoRAs.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub base: String,
    #[command(flatten)]
    base_options: BaseOptionArgs,
    /// CLIP image encoder.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_IMAGE_ENCODER")]
    pub image_encoder: String,
    /// Face encoder; hypernetworks for this dataset are conditioned on it.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = catalog::BUILT_IN, env = "DIFFLORA_FACE_ENCODER")]
    pub face_encoder: String,
    /// Where to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Train this many people twice, with other images and noise, and print the mean cosine of their two LoRAs.
    #[arg(
        help_heading = "Advanced",
        long,
        value_name = "N",
        default_value_t = 0,
        alias = "signal",
        env = "DIFFLORA_REPEATABILITY"
    )]
    pub repeatability: u64,
    /// Stop after the basis and the repeatability.
    #[arg(help_heading = "Advanced", long, alias = "signal-only", env = "DIFFLORA_REPEATABILITY_ONLY")]
    pub repeatability_only: bool,
}

/// Builds the dataset, or the rest of it.
pub fn run(args: Args, output: &Output) -> Result<()> {
    build(args, output)
        .map_err(|error| Failure::with_hint(error, "what is finished is kept; the same command continues"))
}

fn build(args: Args, output: &Output) -> Result<()> {
    let written = [HEADER, SETTINGS, MANIFEST, BASIS].map(|name| args.out.join(name));
    let written: Vec<&Path> = written.iter().map(PathBuf::as_path).collect();
    files::refuse_inputs(&written, std::slice::from_ref(&args.config))?;
    let settings: DatasetSettings = read_toml(&args.config)?;
    let device = args.device.open()?;
    let records = settings.records;
    let crops = records.grey_crops.then_some("crops");
    for folder in ["loras", "embeddings", "portraits"].into_iter().chain(crops) {
        std::fs::create_dir_all(args.out.join(folder))
            .with_context(|| format!("cannot make the folder `{}`", args.out.join(folder).display()))?;
    }
    let lock = FolderLock::acquire(&args.out)?;
    let base = args.base_options.open(&args.base)?;
    let base_id = base.id()?;
    let image_files = registry::find(&args.image_encoder, "image_encoder")?;
    let image_encoder = registry::identify(&image_files, &args.image_encoder, registry::ENCODER_WEIGHTS)?;
    let model = Sdxl::open(&base.files, DType::F32, &device)?;
    let builder = DatasetBuilder {
        blocks: base.block_layout,
        faces: open_encoder(&args.face_encoder)?,
        image_encoder: ImageEncoder::open(&image_files)?.with_input(settings.image_input),
        preparation: match records.grey_crops {
            true => Some(FacePreparation::new(
                open_encoder(&args.face_encoder)?,
                catalog::open_landmarks(&args.face_encoder)?,
            )?),
            false => None,
        },
        settings_hash: settings_hash(&settings, &base_id)?,
        out: args.out,
        model,
        settings,
        lock,
    };
    builder.check_memory()?;
    let downs = builder.basis()?;
    if args.repeatability > 0 {
        let cosine = builder.repeatability(&downs, args.repeatability)?;
        if output.json {
            print_line!("{}", serde_json::json!({ "signal": cosine, "people": args.repeatability }))?;
        } else {
            print_line!(
                "repeatability: {} people trained twice, mean cosine of their centred LoRAs {cosine:.3}",
                args.repeatability
            )?;
        }
        if args.repeatability_only {
            return Ok(());
        }
    }
    builder.write_header(&Header {
        base: base_id,
        face_encoder: builder.face_encoder(),
        image_encoder,
        image_input: builder.settings.image_input,
        layout: Some(builder.vector_layout(&downs)?),
    })?;
    let people = builder.train_all(&downs)?;
    if output.json {
        print_line!("{}", serde_json::json!({ "people": people, "out": builder.out }))?;
    } else {
        print_line!("{people} people in {}", builder.out.display())?;
    }
    Ok(())
}
