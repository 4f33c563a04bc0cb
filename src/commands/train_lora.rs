//! `difflora train-lora`: a folder of one person's pictures → LoRA (DreamBooth).

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::dreambooth::{self, Frozen, Lessons, Recipe, Students, Targets};
use super::models;
use crate::cli::Common;
use crate::failure::Failure;
use crate::lora::TRIGGER_PHRASE;
use crate::lora::file::{self, Format};
use crate::picture::{Filter, Picture, pictures_in};
use crate::sdxl::pipeline::Sdxl;
use crate::train::optimiser::AdamWOptions;
use crate::train::run::{self, Keeping, Plan};
use crate::train::schedule::{Decay, Schedule};
use crate::{files, progress};

/// Arguments of `difflora train-lora`.
///
/// A caption may lie beside each picture in a .txt of the same name; otherwise it is "a photo of TRIGGER CLASS".
/// State and log are kept in OUT.training; --resume goes on after Ctrl-C to the same bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of pictures of one person.
    #[arg(value_name = "PICTURES")]
    pictures: PathBuf,
    /// LoRA to write.
    #[arg(long, value_name = "FILE.safetensors", env = "DIFFLORA_OUT")]
    out: PathBuf,
    /// The model that the LoRA is for.
    #[arg(long, value_name = "NAME|DIR", default_value = models::BUILT_IN, env = "DIFFLORA_BASE")]
    base: String,
    /// What the person is.
    #[arg(long, value_name = "WORD", default_value = "person", env = "DIFFLORA_CLASS_WORD")]
    class_word: String,
    /// A rare word that calls the person; without it the class word does.
    #[arg(long, value_name = "WORD", default_value = "", env = "DIFFLORA_TRIGGER")]
    trigger: String,
    /// Rank of every module.
    #[arg(long, value_name = "R", default_value_t = 4, env = "DIFFLORA_RANK")]
    rank: usize,
    /// The LoRA is scaled by alpha / rank; the rank where it is not given.
    #[arg(long, value_name = "F", env = "DIFFLORA_ALPHA")]
    alpha: Option<f64>,
    /// Which linear layers are adapted.
    #[arg(long, value_enum, default_value = "attn", env = "DIFFLORA_TARGETS")]
    targets: Targets,
    /// Steps of training.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1_000_000), env = "DIFFLORA_STEPS")]
    steps: u64,
    /// Adam's learning rate; it falls to a tenth in a line.
    #[arg(long, value_name = "F", default_value_t = 3e-3, env = "DIFFLORA_LR")]
    lr: f64,
    /// Samples a step.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024), env = "DIFFLORA_BATCH")]
    batch: u32,
    /// Pixels on a side, to which pictures are cut and scaled; the base's own size where it is not given.
    #[arg(long, value_name = "PX", env = "DIFFLORA_RESOLUTION")]
    resolution: Option<usize>,
    /// Train `up` alone and leave `down` as the seed draws it, so that LoRAs of one seed can be compared.
    #[arg(long, env = "DIFFLORA_FREEZE_A")]
    freeze_a: bool,
    /// Of the start, the order of pictures, timesteps and noise.
    #[arg(long, default_value_t = 0, env = "DIFFLORA_SEED")]
    seed: u64,
    /// Go on from the state that an interrupted run left.
    #[arg(long, env = "DIFFLORA_RESUME")]
    resume: bool,
}

/// Trains the LoRA and writes it.
pub fn run(args: Args, common: &Common) -> Result<()> {
    files::check_writable(&args.out)?;
    let base_files = models::find_base(&args.base, &models::BaseOptions::default())?;
    let base = models::identify(&base_files, &args.base, models::BASE_WEIGHTS)?;
    let model = Sdxl::open(&base_files, DType::F32, &Device::Cpu)?;
    let size = args.resolution.unwrap_or(model.native_size());
    model.latent_shape(size, size).map_err(|error| Failure::Usage(error.to_string()))?;
    let (lessons, count) = lessons(&args, &model, size)?;

    let recipe = Recipe {
        rank: args.rank,
        alpha: args.alpha.unwrap_or(args.rank as f64),
        targets: args.targets,
        steps: args.steps,
        batch: args.batch as usize,
        rate: Schedule { peak: args.lr, warmup: 0, decay: Decay::Linear, floor: 0.1 },
        average_last: 0.0,
        seed: args.seed,
    };
    let frozen = Frozen { unet: &model.unet, schedule: &model.schedule };
    let downs = dreambooth::random_downs(&model.unet, &recipe)
        .map_err(|error| Failure::Usage(format!("{error:#}")))?;
    let students = Students::new(&model.unet, &downs, &lessons, &recipe, !args.freeze_a)?;
    let plan = Plan {
        steps: recipe.steps,
        batch: recipe.batch,
        shards: 1,
        rate: recipe.rate.clone(),
        optimiser: AdamWOptions { betas: [0.9, 0.99], weight_decay: 0.0, clip: 0.0, ..Default::default() },
        ema: 0.9,
    };
    let folder = args.out.with_extension("training");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let keeping = Keeping {
        folder: &folder,
        name: "lora",
        resume: args.resume,
        deadline: None,
        save_every: Duration::from_secs(300),
    };
    let settings =
        json!({ "recipe": recipe, "base": base, "pictures": count, "size": size, "freeze_a": args.freeze_a });
    let loss = |step: u64, _| Ok(students.loss(frozen, &lessons, &recipe, step)?.into());
    let (_, average) = run::run(&plan, &settings, &keeping, &students.vars, loss, |_, _| Ok(()))?;

    let mut lora = students.lora(average.averages(), &downs, &recipe, 0)?;
    let called = format!("{} {}", args.trigger, args.class_word);
    for (key, value) in [
        ("ss_network_module", "networks.lora".to_string()),
        ("ss_network_dim", recipe.rank.to_string()),
        ("ss_network_alpha", recipe.alpha.to_string()),
        ("ss_learning_rate", args.lr.to_string()),
        ("ss_max_train_steps", recipe.steps.to_string()),
        ("ss_num_train_images", count.to_string()),
        ("ss_seed", recipe.seed.to_string()),
        (TRIGGER_PHRASE, called.trim().to_string()),
        ("difflora.base", base.name.clone()),
        ("difflora.base_sha256", base.sha256.clone()),
        ("difflora.version", env!("CARGO_PKG_VERSION").to_string()),
    ] {
        lora.metadata.insert(key.into(), value);
    }
    file::write(&args.out, &lora, Format::Kohya, &models::block_layout(&base_files)?)?;
    if common.json {
        println!("{}", json!({ "lora": args.out, "pictures": count, "modules": lora.layers.len() }));
    } else {
        println!("LoRA    {}", args.out.display());
    }
    Ok(())
}

/// The pictures of the folder as latents, with their captions, and how many there are.
fn lessons(args: &Args, model: &Sdxl, size: usize) -> Result<(Lessons, usize)> {
    let mut pictures = Vec::new();
    let mut captions = Vec::new();
    for path in pictures_in(&args.pictures)? {
        progress::check()?;
        match Picture::open(&path) {
            Ok(picture) => {
                pictures.push(picture.square(size, Filter::Bicubic).to_tensor(&Device::Cpu)?);
                captions.push(caption(args, &path)?);
            }
            Err(error) => progress::warn(format_args!("left out: {error:#}")),
        }
    }
    if pictures.is_empty() {
        return Err(Failure::unusable(&args.pictures, "there is no readable picture in it"));
    }
    if pictures.len() < 3 {
        progress::warn(format_args!("only {} pictures: the LoRA will learn them by heart", pictures.len()));
    }
    let mut latents = Vec::new();
    for picture in &pictures {
        let (mean, _) = model.vae.encode(&picture.unsqueeze(0)?)?;
        latents.push(model.vae.to_latents(&mean)?);
    }
    let latents = Tensor::cat(&latents, 0)?.unsqueeze(0)?; // (1, M, C, h, w)
    let told: Vec<&str> = captions.iter().map(String::as_str).collect();
    let captions = model.text.encode_prompts(&told)?;
    ensure!(captions.context.dim(0)? == pictures.len(), "a caption for each picture");
    Ok((Lessons { latents, captions, size }, pictures.len()))
}

/// The text beside a picture, or the template.
fn caption(args: &Args, picture: &Path) -> Result<String> {
    let path = picture.with_extension("txt");
    if path.exists() {
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Failure::unusable(&path, format!("{error}; captions are UTF-8")))?;
        return Ok(text.trim().to_string());
    }
    let called = format!("{} {}", args.trigger, args.class_word);
    Ok(format!("a photo of a {}", called.trim()))
}
