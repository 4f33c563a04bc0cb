//! `difflora train-lora`: a folder of one person's images → LoRA (DreamBooth); or many people, a LoRA each.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::json;

use crate::device::{self, Precision};
use crate::failure::Failure;
use crate::files::{self, FolderLock};
use crate::identity::FaceEncoder;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::recipes::dreambooth::batch_trainer::{BatchTrainer, Job, JobQueue};
use crate::recipes::dreambooth::config::{Crop, LossScale, Settings};
use crate::recipes::dreambooth::data_order::Timesteps;
use crate::recipes::dreambooth::image_dataset::{Encoders, ImageDataset, Scaling};
use crate::recipes::dreambooth::lockstep::{Networks, Targets};
use crate::recipes::dreambooth::lora_trainer::CHECKPOINT;
use crate::recipes::dreambooth::previews::Previewer;
use crate::recipes::dreambooth::training_folder::TrainingFolder;
use crate::recipes::dreambooth::{class_images, image_dataset, targets};
use crate::registry;
use crate::sdxl::pipeline::SdxlLoader;
use crate::sdxl::unet::UNetConfig;
use crate::threads::in_threads;
use crate::train::lr_schedule::Decay;

/// Arguments of `difflora train-lora`.
///
/// Captions are read from a .txt beside each image, else made from the template. Settings come from a preset or a
/// TOML file (--config); options override them. State, log, samples and the settings in effect are kept in
/// OUT.training; --resume continues to the same bytes. Options without a default take it from the preset. Guide:
/// difflora help train-lora.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of images of one person.
    #[arg(help_heading = "Input", value_name = "IMAGES", required_unless_present = "many")]
    pub images: Option<PathBuf>,
    /// Folder of people, each a folder of images, instead of IMAGES.
    #[arg(
        help_heading = "Input",
        long,
        value_name = "DIR",
        conflicts_with = "images",
        env = "DIFFLORA_MANY"
    )]
    pub many: Option<PathBuf>,
    /// People who share each forward pass of the frozen base.
    #[arg(help_heading = "Advanced", long, value_name = "K", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024), env = "DIFFLORA_PEOPLE_PER_BATCH")]
    pub people_per_batch: u32,
    /// With --many: groups of people trained in parallel, one thread each. Use the number of cores for small bases;
    /// with 1, each operation uses all cores.
    #[arg(help_heading = "Advanced", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), env = "DIFFLORA_GROUPS")]
    pub groups: u32,
    /// LoRA to write; with --many a folder, for PERSON.safetensors each.
    #[arg(help_heading = "Output", long, value_name = "FILE.safetensors|DIR", env = "DIFFLORA_OUT")]
    pub out: PathBuf,
    /// Preset (tiny, sdxl-dreambooth) or a TOML file like those in configs/, which may override a preset (preset =
    /// "tiny") [default: the preset that fits the base].
    #[arg(help_heading = "Input", long, value_name = "NAME|FILE", env = "DIFFLORA_CONFIG")]
    pub config: Option<PathBuf>,
    /// Base model: tiny (built in), sdxl, a diffusers folder, a `.safetensors` in LDM layout, or a hub repository.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR|FILE|REPO", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub base: String,
    #[command(flatten)]
    base_options: registry::BaseOptions,
    /// Device to compute on; `auto` is the GPU in builds with CUDA, else the CPU.
    #[arg(
        help_heading = "Advanced",
        long,
        value_name = "auto|cpu|cuda[:N]|metal",
        default_value = "auto",
        env = "DIFFLORA_DEVICE"
    )]
    pub device: String,
    /// Continue an interrupted run.
    #[arg(help_heading = "Output", long, env = "DIFFLORA_RESUME")]
    pub resume: bool,
    #[command(flatten)]
    options: Options,
}

/// Options that change the settings.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Class of the subject, such as person.
    #[arg(help_heading = "Input", long, value_name = "WORD", env = "DIFFLORA_CLASS_WORD")]
    pub class_word: Option<String>,
    /// Rare word that names the person in prompts [default: none, the class word].
    #[arg(help_heading = "Input", long, value_name = "WORD", env = "DIFFLORA_TRIGGER")]
    pub trigger: Option<String>,
    /// Caption of images without a .txt; {} stands for trigger and class word.
    #[arg(help_heading = "Input", long, value_name = "TEXT", env = "DIFFLORA_TEMPLATE")]
    pub template: Option<String>,
    /// Rank of each layer.
    #[arg(help_heading = "Model", long, value_name = "R", env = "DIFFLORA_RANK")]
    pub rank: Option<usize>,
    /// The LoRA is scaled by alpha / rank [default: the rank].
    #[arg(help_heading = "Model", long, value_name = "F", env = "DIFFLORA_ALPHA")]
    pub alpha: Option<f64>,
    /// Modules to adapt.
    #[arg(help_heading = "Model", long, value_enum, env = "DIFFLORA_TARGETS")]
    pub targets: Option<Targets>,
    /// Train only `up`; keep the seeded `down`, so that LoRAs of one seed are comparable.
    #[arg(help_heading = "Model", long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", env = "DIFFLORA_FREEZE_A")]
    pub freeze_a: Option<bool>,
    /// Train LoRAs of both text encoders as well.
    #[arg(help_heading = "Model", long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", env = "DIFFLORA_TEXT_ENCODERS")]
    pub text_encoders: Option<bool>,
    /// Number of optimiser steps.
    #[arg(help_heading = "Training", long, value_name = "N", env = "DIFFLORA_STEPS")]
    pub steps: Option<u64>,
    /// Optimiser steps per training image, instead of a fixed number.
    #[arg(
        help_heading = "Training",
        long,
        value_name = "N",
        alias = "steps-per-picture",
        env = "DIFFLORA_STEPS_PER_IMAGE"
    )]
    pub steps_per_image: Option<u64>,
    /// Samples per forward pass.
    #[arg(help_heading = "Training", long, value_name = "N", env = "DIFFLORA_BATCH")]
    pub batch: Option<usize>,
    /// Forward passes per optimiser step.
    #[arg(help_heading = "Training", long, value_name = "N", env = "DIFFLORA_ACCUMULATE")]
    pub accumulate: Option<u64>,
    /// Peak learning rate.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_LR")]
    pub lr: Option<f64>,
    /// Peak learning rate of the text encoders.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_TEXT_ENCODER_LR")]
    pub text_encoder_lr: Option<f64>,
    /// Learning rate after the warm-up.
    #[arg(help_heading = "Training", long, value_enum, env = "DIFFLORA_LR_SCHEDULE")]
    pub lr_schedule: Option<Decay>,
    /// Steps of linear warm-up.
    #[arg(help_heading = "Training", long, value_name = "N", env = "DIFFLORA_WARMUP")]
    pub warmup: Option<u64>,
    /// AdamW's weight decay.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_WEIGHT_DECAY")]
    pub weight_decay: Option<f64>,
    /// Maximum gradient norm; 0 disables clipping.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_CLIP")]
    pub clip: Option<f64>,
    /// Decay of the moving average that becomes the LoRA; 0 uses the last weights.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_EMA")]
    pub ema: Option<f64>,
    /// Side in pixels [default: the base's native size].
    #[arg(help_heading = "Input", long, value_name = "PX", env = "DIFFLORA_RESOLUTION")]
    pub resolution: Option<usize>,
    /// How images are cropped.
    #[arg(help_heading = "Input", long, value_enum, env = "DIFFLORA_CROP")]
    pub crop: Option<Crop>,
    /// Mirror images at random.
    #[arg(help_heading = "Input", long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", env = "DIFFLORA_FLIP")]
    pub flip: Option<bool>,
    /// Vary brightness, contrast and saturation by up to this factor.
    #[arg(help_heading = "Input", long, value_name = "F", env = "DIFFLORA_COLOUR")]
    pub colour: Option<f64>,
    /// Distribution of the timesteps.
    #[arg(help_heading = "Training", long, value_enum, env = "DIFFLORA_TIMESTEPS")]
    pub timesteps: Option<Timesteps>,
    /// γ of min-SNR loss weighting (5 in the paper); 0 disables it.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_MIN_SNR_GAMMA")]
    pub min_snr_gamma: Option<f64>,
    /// Strength of noise shared by all pixels of a channel.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_NOISE_OFFSET")]
    pub noise_offset: Option<f64>,
    /// Folder of class images for prior preservation; missing ones are generated by the base.
    #[arg(
        help_heading = "Input",
        long,
        value_name = "DIR",
        alias = "class-pictures",
        env = "DIFFLORA_CLASS_IMAGES"
    )]
    pub class_images: Option<PathBuf>,
    /// Number of class images [default with --class-images: 100].
    #[arg(
        help_heading = "Input",
        long,
        value_name = "N",
        alias = "num-class-pictures",
        env = "DIFFLORA_NUM_CLASS_IMAGES"
    )]
    pub num_class_images: Option<u64>,
    /// Prompt of the class images [default: the template with the class word].
    #[arg(help_heading = "Input", long, value_name = "TEXT", env = "DIFFLORA_CLASS_PROMPT")]
    pub class_prompt: Option<String>,
    /// Weight of the prior preservation loss.
    #[arg(help_heading = "Training", long, value_name = "F", env = "DIFFLORA_PRIOR_WEIGHT")]
    pub prior_weight: Option<f64>,
    /// Number type of the frozen weights; the LoRA is trained in f32.
    #[arg(help_heading = "Advanced", long, value_enum, env = "DIFFLORA_DTYPE")]
    pub dtype: Option<Precision>,
    /// Loss scaling against underflow of f16 gradients on a GPU: none, dynamic, or a factor.
    #[arg(help_heading = "Advanced", long, value_name = "none|dynamic|F", env = "DIFFLORA_LOSS_SCALE")]
    pub loss_scale: Option<LossScale>,
    /// Steps between checkpoints.
    #[arg(help_heading = "Output", long, value_name = "N", env = "DIFFLORA_CHECKPOINT_EVERY")]
    pub checkpoint_every: Option<u64>,
    /// Write a contact sheet every N steps; 0 disables it.
    #[arg(help_heading = "Output", long, value_name = "N", env = "DIFFLORA_SAMPLE_EVERY")]
    pub sample_every: Option<u64>,
    /// Prompts of the contact sheets, one row each [default: the template's caption].
    #[arg(help_heading = "Output", long, value_name = "TEXT", num_args = 1.., env = "DIFFLORA_SAMPLE_PROMPT")]
    pub sample_prompt: Vec<String>,
    /// Seed of initialisation, data order, timesteps and noise.
    #[arg(help_heading = "Training", long, env = "DIFFLORA_SEED")]
    pub seed: Option<u64>,
}

impl Args {
    /// Whether groups of people train a thread each, so that kernels must not have threads of their own.
    pub fn trains_in_groups(&self) -> bool {
        self.many.is_some() && self.groups > 1
    }
}

/// Trains the LoRAs and writes them.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let base_files = registry::find_base(&args.base, &args.base_options)?;
    let base = registry::identify(&base_files, &args.base, registry::BASE_WEIGHTS)?;
    let small = base_files.config::<UNetConfig>("unet/config.json")?.sample_size <= SMALL_LATENTS;
    let preset = if small { "tiny" } else { "sdxl-dreambooth" };
    let mut settings = Settings::read(args.config.as_deref(), preset)?;
    args.options.apply(&mut settings);
    settings.check()?;
    let people = people(&args)?;
    let alone = args.many.is_none();
    if args.resume {
        check_resumable(&people, !alone)?;
    }
    let _lock = FolderLock::acquire(if alone { &people[0].folder } else { &args.out })?;
    let folders = people.iter().map(|person| match TrainingFolder::read(&person.images) {
        // Of many people, one who fails is reported when the turn comes.
        Err(_) if !alone => Ok(TrainingFolder::default()),
        read => read,
    });
    let folders = folders.collect::<Result<Vec<_>>>()?;
    let usage = |why: String| -> anyhow::Error { Failure::Usage(why).into() };
    if settings.images.crop == Crop::Buckets && !alone && args.people_per_batch > 1 {
        return Err(usage(
            "people in one forward pass need images of one size: --crop center or random".into(),
        ));
    }
    if settings.images.crop == Crop::Buckets && settings.objective.class_images > 0 {
        return Err(usage("class images are squares: use --crop center or random with them".into()));
    }

    let device = device::open(&args.device)?;
    let model = SdxlLoader::open(&base_files, DType::from(settings.training.dtype), &device)?;
    let side = if settings.images.resolution == 0 { model.native_size() } else { settings.images.resolution };
    model.latent_shape(side, side).map_err(|error| usage(error.to_string()))?;
    if settings.images.crop == Crop::Buckets && !side.is_multiple_of(16) {
        return Err(usage(format!("buckets need a --resolution in multiples of 16, not {side}")));
    }
    let (text, vae) = (model.load_text()?, model.load_vae()?);
    let mut networks =
        Networks { unet: model.skeleton()?.unet, text: settings.lora.text_encoders.then(|| text.clone()) };
    let rank = settings.lora.rank;
    let modules = |networks: &Networks| {
        targets::target_modules(networks, settings.lora.targets, rank)
            .map_err(|error| usage(format!("{error:#}")))
    };
    modules(&networks)?; // names and shapes are enough to refuse a rank before anything long begins

    let class_folder = args.options.class_images.as_deref();
    let prior = settings.objective.class_images > 0;
    let previewer = (settings.samples.every > 0 || prior)
        .then(|| Previewer::new(&model, &text, vae.clone(), side))
        .transpose()?;
    if let (true, Some(previewer)) = (prior, &previewer) {
        let folder =
            class_folder.ok_or_else(|| usage("class images need a folder: --class-images DIR".into()))?;
        class_images::complete(folder, &model, &text, previewer, &settings)?;
    }
    let sample_prompts = match &settings.samples.prompts[..] {
        [] => vec![settings.caption(folders.first().filter(|_| alone).and_then(TrainingFolder::called))],
        prompts => prompts.to_vec(),
    };
    let prompts: Vec<&str> = sample_prompts.iter().map(String::as_str).collect();
    let sample_captions = previewer.as_ref().map(|_| text.encode_prompts(&prompts)).transpose()?;
    let scaling = Scaling::of(&vae, &device)?;
    let encoders = Encoders { vae, text, device: device.clone() };
    let class = match class_folder.filter(|_| prior) {
        Some(folder) => {
            let mut images = image_dataset::read_images(folder, |_| settings.class_prompt())?;
            images.truncate(settings.objective.class_images as usize);
            Some(ImageDataset::new(images, &settings, side, &encoders)?)
        }
        None => None,
    };
    let steps = folders.iter().map(|folder| settings.steps(folder.images.len())).sum();
    let mut queue = JobQueue::new(VecDeque::from(people), encoders, FaceEncoder::builtin()?);
    if alone {
        queue.encode_first(&settings, side)?; // 3.6 GB of encoders in f32 SDXL go before 10 GB of UNet come
    }

    networks.unet = model.load_unet()?;
    networks.visit_layers(&mut |_, mut layer| layer.set_adapter(None));
    let modules = modules(&networks)?;
    let downs = targets::random_shared_down(&modules, rank, settings.seed)?;
    let weight_norm = targets::weight_norm(&networks, &modules)?;
    let half = networks.unet.compute_dtype() == DType::F16;
    let room = BatchTrainer {
        networks,
        schedule: model.schedule,
        scaling,
        class,
        previewer: previewer.filter(|_| settings.samples.every > 0),
        sample_prompts,
        sample_captions,
        modules,
        downs,
        weight_norm,
        layout: registry::block_layout(&base_files)?,
        base,
        device,
        side,
        half,
        resume: args.resume,
        alone,
        settings,
    };
    let bar = progress::bar(steps, "lora");
    let slots = if alone { 1 } else { args.people_per_batch as usize };
    let groups = if alone { 1 } else { args.groups as usize };
    in_threads(groups, |_| room.train(&queue, slots, &bar))?;
    bar.finish_and_clear();
    report(&args, output, &queue)
}

/// Side of the latents up to which a base is a small one, for which the preset `tiny` is made.
pub const SMALL_LATENTS: usize = 32;

/// Who is to be learnt, and where each LoRA goes.
pub fn people(args: &Args) -> Result<Vec<Job>> {
    let person = |images: &Path, out: PathBuf| Job {
        name: images.file_name().map_or("images".into(), |name| name.to_string_lossy().into()),
        images: images.to_path_buf(),
        folder: out.with_extension("training"),
        out,
    };
    let people = match (&args.many, &args.images) {
        (Some(folder), _) => {
            let folders = image_dataset::people_in(folder)?;
            std::fs::create_dir_all(&args.out)
                .with_context(|| format!("cannot make `{}`", args.out.display()))?;
            let out = |folder: &Path| {
                let mut name = folder.file_name().unwrap_or_default().to_os_string();
                name.push(".safetensors");
                args.out.join(name)
            };
            folders.iter().map(|folder| person(folder, out(folder))).collect()
        }
        (None, Some(images)) => vec![person(images, args.out.clone())],
        (None, None) => Vec::new(),
    };
    for Job { out, .. } in &people {
        files::check_writable(out)?;
    }
    Ok(people)
}

/// Refuses `--resume` where nothing was begun: a wrong `--out`, say.
fn check_resumable(people: &[Job], many: bool) -> Result<()> {
    let begun = |job: &Job| job.folder.join(CHECKPOINT).exists() || (many && job.out.exists());
    match people.first() {
        Some(first) if !people.iter().any(begun) => Err(Failure::Usage(format!(
            "--resume: there is no state `{}`; check --out, or start anew without --resume",
            first.folder.join(CHECKPOINT).display()
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Says what was made; with failures among many people, the error that names them.
pub fn report(args: &Args, output: &Output, queue: &JobQueue) -> Result<()> {
    let (done, failed) = queue.results();
    if output.json {
        let loras: Vec<_> = done
            .iter()
            .map(|(lora, images, loss)| json!({ "lora": lora.display().to_string(), "pictures": images, "loss": loss }))
            .collect();
        match (&args.many, &loras[..]) {
            (None, [one]) => print_line!("{one}")?,
            _ => print_line!("{}", json!({ "loras": loras, "failed": failed }))?,
        }
    } else {
        for (lora, _, _) in &done {
            print_line!("LoRA    {}", lora.display())?;
        }
    }
    if let Some(first) = failed.first() {
        anyhow::bail!("{} of {} people failed, first: {first}", failed.len(), failed.len() + done.len());
    }
    Ok(())
}

impl Options {
    /// Puts what was given over `settings`.
    pub fn apply(&self, settings: &mut Settings) {
        fn set<T: Clone>(to: &mut T, from: &Option<T>) {
            if let Some(value) = from {
                *to = value.clone();
            }
        }
        let Settings { seed, lora, objective, images, training, samples } = settings;
        set(seed, &self.seed);
        set(&mut lora.rank, &self.rank);
        lora.alpha = self.alpha.or(lora.alpha);
        set(&mut lora.targets, &self.targets);
        set(&mut lora.freeze_a, &self.freeze_a);
        set(&mut lora.text_encoders, &self.text_encoders);
        set(&mut objective.timesteps, &self.timesteps);
        set(&mut objective.min_snr_gamma, &self.min_snr_gamma);
        set(&mut objective.noise_offset, &self.noise_offset);
        set(&mut objective.prior_weight, &self.prior_weight);
        objective.class_prompt = self.class_prompt.clone().or(objective.class_prompt.take());
        if self.class_images.is_some() && objective.class_images == 0 {
            objective.class_images = 100;
        }
        set(&mut objective.class_images, &self.num_class_images);
        set(&mut images.class_word, &self.class_word);
        set(&mut images.trigger, &self.trigger);
        set(&mut images.template, &self.template);
        set(&mut images.resolution, &self.resolution);
        set(&mut images.crop, &self.crop);
        set(&mut images.flip, &self.flip);
        set(&mut images.colour, &self.colour);
        set(&mut training.steps, &self.steps);
        set(&mut training.steps_per_image, &self.steps_per_image);
        set(&mut training.batch, &self.batch);
        set(&mut training.accumulate, &self.accumulate);
        set(&mut training.lr, &self.lr);
        set(&mut training.text_encoder_lr, &self.text_encoder_lr);
        set(&mut training.schedule, &self.lr_schedule);
        set(&mut training.warmup, &self.warmup);
        set(&mut training.weight_decay, &self.weight_decay);
        set(&mut training.clip, &self.clip);
        set(&mut training.ema, &self.ema);
        set(&mut training.dtype, &self.dtype);
        set(&mut training.loss_scale, &self.loss_scale);
        set(&mut training.checkpoint_every, &self.checkpoint_every);
        set(&mut samples.every, &self.sample_every);
        if !self.sample_prompt.is_empty() {
            samples.prompts = self.sample_prompt.clone();
        }
    }
}
