//! `difflora train-dit`: a person's embeddings → the latent of their LoRA.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::commands::train_lae::Settings;
use crate::dataset::lora_dataset::{FormWanted, LoraDataset, ReadOptions};
use crate::dataset::manifest::Header;
use crate::device;
use crate::diffusion::schedule::{BetaSchedule, NoiseSchedule};
use crate::diffusion::shifted::Shift;
use crate::failure::Failure;
use crate::hypernet::dit::{Dit, DitConfig, DitSize, Position};
use crate::hypernet::mixer::{GateFigures, Mixer, MixerConfig, MixerKind};
use crate::hypernet::prior::PriorConfig;
use crate::hypernet::{
    Denoiser, DenoiserConfig, Hypernet, LoraCodec, ModelId, SampleOptions, diffusion_of_latents,
};
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::recipes::dit::best_checkpoint::Best;
use crate::recipes::dit::learned_prior::TrainedPrior;
use crate::recipes::dit::report::{print_report, report};
use crate::recipes::dit::training_set::Lessons;
use crate::recipes::dreambooth::functional_loss::FunctionalLoss;
use crate::registry;
use crate::sdxl::pipeline::Sdxl;
use crate::train;
use crate::train::distributed;
use crate::train::shards::Loss;
use crate::train::trainer::{self, Outcome, RunOptions, TrainerConfig};
use crate::weights::Trainable;
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
    /// Folder for the hypernetwork, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    pub out: PathBuf,
    /// Settings file, as configs/hypernet-tiny.toml.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    pub config: PathBuf,
    /// Base model for the diffusion loss of images (`functional` in the settings).
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub base: String,
    /// Device to compute on; `auto` is the GPU in builds with CUDA, else the CPU.
    #[arg(
        help_heading = "Advanced",
        long,
        value_name = "auto|cpu|cuda[:N]|metal",
        default_value = "auto",
        env = "DIFFLORA_DEVICE"
    )]
    pub device: String,
    /// Continue from the last checkpoint of the same settings.
    #[arg(help_heading = "Output", long, env = "DIFFLORA_RESUME")]
    pub resume: bool,
    /// Stop with a checkpoint after this many minutes; --resume continues.
    #[arg(help_heading = "Output", long, value_name = "MINUTES", env = "DIFFLORA_MINUTES")]
    pub minutes: Option<f64>,
}

impl Args {
    /// Whether the recipe cuts batches into shards, one for each thread.
    pub fn trains_in_shards(&self) -> bool {
        // What is wrong with the file is told when the command runs.
        Settings::read(&self.config).is_ok_and(|settings| settings.dit.plan.trains_in_shards())
    }
}

/// How mixer and transformer are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Of weights, batches and noise.
    pub seed: u64,
    /// How face and image become one condition.
    #[serde(default)]
    pub mixer: MixerKind,
    /// Values in a token.
    pub token: usize,
    /// Depth, width and heads by a name: S, B, L or XL.
    #[serde(default)]
    pub size: Option<DitSize>,
    /// D of transformer and mixer, where not that of `size`.
    #[serde(default)]
    pub width: Option<usize>,
    /// Blocks, likewise.
    #[serde(default)]
    pub depth: Option<usize>,
    /// H, likewise.
    #[serde(default)]
    pub heads: Option<usize>,
    /// How tokens know their place.
    #[serde(default)]
    pub position: Position,
    /// How noise grows from t = 0 to T.
    #[serde(default)]
    pub schedule: NoiseGrowth,
    /// w_t of the loss.
    #[serde(default)]
    pub weights: Weights,
    /// A mixture of Gaussians in which the diffusion ends, in the place of N(0, I).
    #[serde(default)]
    pub prior: Option<PriorConfig>,
    /// DDIM steps of the finished hypernetwork, unless asked otherwise.
    pub steps: usize,
    /// Its guidance; 1 is none.
    pub guidance: f64,
    /// Whether the transformer corrects a ridge regression or makes the whole latent.
    pub linear_guess: bool,
    /// Penalties of the ridge regression, of which cross validation takes the best.
    pub penalties: Vec<f64>,
    /// Parts of that cross validation; the rows of a person are in one part.
    pub folds: usize,
    /// σ of the noise added to standardised embeddings.
    pub condition_noise: f64,
    /// Part of the samples that are told nothing about the person.
    pub drop: f64,
    /// Steps, batch, rate.
    pub plan: TrainerConfig,
    /// When to look at people kept apart, and when to stop.
    #[serde(default)]
    pub validation: Option<Validation>,
    /// A loss of images beside that of latents; needs --base.
    #[serde(default)]
    pub functional: Option<Functional>,
}

/// What the decoded LoRA pays for the images of its person, beside the distance of latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Functional {
    /// Weight of the base's diffusion loss.
    pub weight: f64,
    /// People of a shard whose LoRAs are decoded.
    pub people: usize,
    /// Images of each.
    #[serde(rename(serialize = "pictures"), alias = "pictures")]
    pub images: usize,
}

/// How noise grows with t.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseGrowth {
    /// β from 1e-4 to 0.02 in equal steps (Ho et al. 2020; G.pt, HyperDiffusion).
    #[default]
    Linear,
    /// ᾱ follows a squared cosine (Nichol and Dhariwal 2021).
    Cosine,
}

/// w_t, the weight of a sample's squared error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// The same for all t.
    #[default]
    Uniform,
    /// min(SNR, γ) (Hang et al. 2023; γ = 5 there): next to nothing where the noise is high.
    MinSnr(f64),
}

/// People of the training set who are kept apart. The weights with the least error on them are the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Their share of the people.
    pub share: f64,
    /// Steps between two looks.
    pub every: u64,
    /// Looks without a gain after which training stops; 0 for never.
    #[serde(default)]
    pub patience: u64,
}

impl Recipe {
    /// Depth, width and heads.
    pub fn sizes(&self) -> Result<(usize, usize, usize)> {
        let named = self.size.map(DitSize::sizes);
        let one = |given: Option<usize>, named: Option<usize>, what: &str| {
            given.or(named).ok_or_else(|| {
                Failure::Usage(format!("the recipe of the transformer has neither `{what}` nor `size`"))
            })
        };
        let depth = one(self.depth, named.map(|(depth, ..)| depth), "depth")?;
        let width = one(self.width, named.map(|(_, width, _)| width), "width")?;
        Ok((depth, width, one(self.heads, named.map(|(.., heads)| heads), "heads")?))
    }

    /// The config of networks for embeddings of `face` and `image` values and latents of `latent`.
    pub fn config(&self, [face, image, latent]: [usize; 3], header: &Header) -> Result<DenoiserConfig> {
        let (depth, width, heads) = self.sizes()?;
        let clusters = self.prior.as_ref().map_or(0, |prior| prior.clusters);
        let mut diffusion = diffusion_of_latents();
        if self.schedule == NoiseGrowth::Cosine {
            diffusion.beta_schedule = BetaSchedule::SquaredcosCapV2;
        }
        Ok(DenoiserConfig {
            mixer: MixerConfig { kind: self.mixer, face, image, width },
            dit: DitConfig {
                latent,
                token: self.token,
                width,
                depth,
                heads,
                position: self.position,
                clusters,
            },
            diffusion,
            steps: self.steps,
            guidance: self.guidance,
            linear_guess: self.linear_guess,
            prior: self.prior.clone(),
            face_encoder: header.face_encoder.clone(),
            image_encoder: header.image_encoder.clone(),
            image_input: header.image_input,
        })
    }

    /// Refuses values that no training can start from.
    pub fn check(&self) -> Result<()> {
        let refuse =
            |why: String| Err(Failure::Usage(format!("the recipe of the transformer: {why}")).into());
        if self.folds < 2 {
            return refuse(format!("`folds` is {}, two at least are needed", self.folds));
        }
        if !(0.0..=1.0).contains(&self.drop) {
            return refuse(format!("`drop` is {}, it is a part from 0 to 1", self.drop));
        }
        if let Some(Validation { share, every, .. }) = &self.validation
            && (!(*share > 0.0 && *share < 1.0) || *every == 0)
        {
            return refuse("`validation` wants a `share` between 0 and 1 and `every` of at least 1".into());
        }
        if let Some(Functional { weight, people, images }) = &self.functional
            && !(*weight > 0.0 && weight.is_finite() && *people > 0 && *images > 0)
        {
            return refuse("`functional` wants a positive `weight`, `people` and `images`".into());
        }
        if let Weights::MinSnr(gamma) = self.weights
            && !(gamma > 0.0 && gamma.is_finite())
        {
            return refuse(format!("`min_snr` is a positive number, not {gamma}"));
        }
        Ok(())
    }
}

/// Trains, saves and reports.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let recipe = Settings::read(&args.config)?.dit;
    recipe.check()?;
    distributed::join()?;
    let device = device::open(&args.device)?;
    let training = args.out.join("training");
    std::fs::create_dir_all(&training)
        .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    let lae_files = ModelFiles::folder(&args.lae)?;
    let codec = LoraCodec::open(&lae_files, &device)?;
    let lae = registry::identify(&lae_files, &args.lae.display().to_string(), "lae.safetensors")?;
    let form = FormWanted::Of(codec.form.clone());
    let set = LoraDataset::open(&args.dataset, &ReadOptions { form, ..ReadOptions::default() })?;
    check(&codec, &set)?;
    let run_options = RunOptions {
        folder: &training,
        name: "dit",
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
        save_every: Duration::from_secs(120),
    };
    let lessons = Lessons::prepare(&recipe, &codec, &lae.sha256, &set, &training)?;
    let gallery =
        recipe.functional.as_ref().map(|how| Gallery::open(how, &args, &codec, &set)).transpose()?;
    let (denoiser, end) = train(&recipe, &lessons, gallery.as_ref(), &set, &lae, &run_options)?;
    if !distributed::is_main_process() {
        return Ok(());
    }
    let hypernet = Hypernet { codec, denoiser };
    hypernet.save(&args.out, DType::F16)?;
    let report = report(&hypernet, &lessons, &set, end)?;
    save_json(&training.join("report.json"), &report)?;
    match end {
        Outcome::Paused { step } => {
            progress::note(format_args!("dit stops at step {step}; --resume goes on"))
        }
        Outcome::Stopped { step } => {
            progress::note(format_args!("dit stops at step {step}: the people kept apart gain no more"));
        }
        Outcome::Finished => {}
    }
    if output.json {
        print_line!("{report}")?;
    } else {
        print_report(&report)?;
    }
    Ok(())
}

/// Refuses an autoencoder of other LoRAs than the dataset's.
pub fn check(codec: &LoraCodec, set: &LoraDataset) -> Result<()> {
    codec.base.demand(&set.header.base, "base model")?;
    if codec.layout.modules != set.layout.modules || codec.layout.shared_down != set.layout.shared_down {
        let why =
            "autoencoder and dataset have other modules; train it on this dataset with `difflora train-lae`";
        return Err(Failure::Usage(why.into()).into());
    }
    for (module, down) in codec.layout.shared_tensors() {
        let other = &set.layout.shared_tensors()[module];
        let far = (down - other)?.abs()?.max_all()?.to_scalar::<f32>()?;
        if far > 1e-5 {
            let why = format!(
                "autoencoder and dataset have another shared `down` of `{module}`; train it on this dataset with \
                 `difflora train-lae`"
            );
            return Err(Failure::Usage(why).into());
        }
    }
    Ok(())
}

/// Mixer and transformer with averaged weights, or those with the least error on the people kept apart.
pub fn train(
    recipe: &Recipe,
    lessons: &Lessons,
    gallery: Option<&Gallery>,
    set: &LoraDataset,
    lae: &ModelId,
    run_options: &RunOptions,
) -> Result<(Denoiser, Outcome)> {
    let widths = [lessons.face.dim(1)?, lessons.image.dim(1)?, lessons.width()];
    let config = recipe.config(widths, &set.header)?;
    let trainable = Trainable::new(recipe.seed);
    let device = lessons.device();
    let vb = trainable.builder(device);
    let pupil = Pupil {
        mixer: Mixer::new(&config.mixer, vb.pp("mixer"))?,
        dit: Dit::new(&config.dit, vb.pp("dit"))?,
        prior: lessons
            .stats
            .prior
            .as_ref()
            .map(|prior| TrainedPrior::new(recipe, prior, vb.pp("prior")))
            .transpose()?,
        schedule: NoiseSchedule::new(&config.diffusion)?,
    };
    let vars = trainable.vars();
    if let Some(prior) = &pupil.prior {
        prior.start(&vars)?;
    }
    let plan = &recipe.plan;
    let (batch, shards) = (plan.samples_a_shard()?, plan.shards as u64);
    let people = lessons.learnt.len();
    let loss = |step: u64, shard: usize| -> Result<Loss> {
        let mut rng = train::rng(recipe.seed, step * shards + shard as u64);
        let mut rows = Vec::with_capacity(batch);
        for _ in 0..batch {
            let photos = &lessons.learnt[rng.random_range(0..people)];
            rows.push(photos[rng.random_range(0..photos.len())]);
        }
        pupil.loss(recipe, lessons, gallery, &rows, &mut rng)
    };
    let settings = json!({
        "dit": recipe, "dataset": set.settings_hash, "people": people, "lae": lae.sha256,
    });
    let finished = |averages: &BTreeMap<String, Tensor>| -> Result<Denoiser> {
        let mut stats = lessons.stats.clone();
        if let (Some(prior), Some(trained)) = (&mut stats.prior, &pupil.prior) {
            trained.put_into(prior, averages)?;
        }
        let networks = averages.iter().filter(|(name, _)| !name.starts_with("prior."));
        let mut weights: BTreeMap<String, Tensor> =
            networks.map(|(name, weight)| (name.clone(), weight.clone())).collect();
        if recipe.linear_guess {
            weights.extend(lessons.fit.ridge.tensors("guess"));
        }
        Denoiser::new(config.clone(), stats, weights, device)
    };
    let mut best = Best::open(recipe.validation.as_ref(), run_options, &settings)?;
    let (end, ema) = trainer::run_until(plan, &settings, run_options, &vars, loss, |step, ema| {
        best.look(step, ema, || validation_error(lessons, &finished(ema.averages())?))
    })?;
    // The others of a group write nothing, so they need not wait for what the first has written.
    let best = if distributed::is_main_process() { best.averages()? } else { None };
    let averages = best.unwrap_or_else(|| ema.averages().clone());
    Ok((finished(&averages)?, end))
}

/// The networks while they learn.
pub struct Pupil {
    pub mixer: Mixer,
    pub dit: Dit,
    pub prior: Option<TrainedPrior>,
    pub schedule: NoiseSchedule,
}

impl Pupil {
    /// E[w_t·‖f(z_t, t, F) − x_0‖²] over the photos `rows`, with the gate's figures.
    pub fn loss(
        &self,
        recipe: &Recipe,
        lessons: &Lessons,
        gallery: Option<&Gallery>,
        rows: &[u32],
        rng: &mut ChaCha8Rng,
    ) -> Result<Loss> {
        let (batch, device) = (rows.len(), lessons.device());
        let t: Vec<usize> = (0..batch).map(|_| rng.random_range(0..self.schedule.alphas_bar.len())).collect();
        let keep: Vec<f32> =
            (0..batch).map(|_| if rng.random::<f64>() < recipe.drop { 0.0 } else { 1.0 }).collect();
        let mut blurred = |x: Tensor| -> Result<Tensor> {
            let noise = train::normal(rng, x.shape(), device)?;
            Ok((x + (noise * recipe.condition_noise)?)?)
        };
        let (face, image) = lessons.embeddings(rows)?;
        let (face, image) = (blurred(face)?, blurred(image)?);
        let x0 = lessons.x0(rows)?;
        let eps = train::normal(rng, x0.shape(), device)?;
        let mixed = self.mixer.forward(&face, &image)?;
        let mut condition = self.mixer.drop(&mixed.condition, &Tensor::new(keep, device)?)?;
        let weights = match recipe.weights {
            Weights::Uniform => vec![1.0; batch],
            Weights::MinSnr(gamma) => self.schedule.min_snr_weights(&t, gamma)?,
        };
        let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
        let weights = Tensor::new(weights, device)?;
        let mut parts = Vec::new();
        let mut of_prior = None;
        let x_t = match &self.prior {
            Some(trained) => {
                let clusters: Vec<u32> = rows.iter().map(|row| lessons.clusters[*row as usize]).collect();
                let clusters = Tensor::new(clusters, device)?;
                condition = self.dit.in_cluster(&condition, &clusters)?;
                let shift = trained.shift(&clusters)?;
                if trained.learned() {
                    let loss = trained.loss(&shift, &x0, &weights, rng)?;
                    parts.push(("prior", scalar(&loss)?));
                    of_prior = Some(loss);
                }
                // The error of the network says nothing about where noise should end.
                let still = Shift { mean: shift.mean.detach(), std: shift.std.detach() };
                still.add_noise(&self.schedule, &x0, &eps, &t)?
            }
            None => self.schedule.add_noise(&x0, &eps, &t)?,
        };
        let t: Vec<f32> = t.into_iter().map(|t| t as f32).collect();
        let guess = self.dit.forward(&x_t, &Tensor::new(t, device)?, &condition)?;
        let errors = (&guess - x0)?.sqr()?.mean(1)?; // (B)
        let mut value = (errors * weights)?.mean_all()?;
        if let Some(gates) = &mixed.gates {
            let gates = GateFigures::of(&gates.detach())?;
            parts.extend([("gate_face", gates.face), ("gate_spread", gates.spread)]);
        }
        if of_prior.is_some() || gallery.is_some() {
            parts.push(("denoising", scalar(&value)?));
        }
        if let Some(of_prior) = of_prior {
            value = (value + of_prior)?;
        }
        if let Some(gallery) = gallery {
            let rows = &rows[..gallery.how.people.min(batch)];
            let z = ((guess.narrow(0, 0, rows.len())? / lessons.stats.scale)? + lessons.guess(rows)?)?;
            let loss = gallery.loss(&z, &lessons.people(rows), rng)?;
            parts.push(("functional", scalar(&loss)?));
            value = (value + (loss * gallery.how.weight)?)?;
        }
        Ok(Loss { value, parts })
    }
}

/// The base, and the images of the people to learn from.
pub struct Gallery<'a> {
    pub how: &'a Functional,
    pub codec: &'a LoraCodec,
    pub album: FunctionalLoss,
}

impl<'a> Gallery<'a> {
    pub fn open(how: &'a Functional, args: &Args, codec: &'a LoraCodec, set: &LoraDataset) -> Result<Self> {
        let files = registry::find_base(&args.base, &registry::BaseOptions::default())?;
        codec.base.demand(&registry::identify(&files, &args.base, registry::BASE_WEIGHTS)?, "base model")?;
        let base = Sdxl::open(&files, DType::F32, codec.device())?;
        Ok(Self { how, codec, album: FunctionalLoss::open(&args.dataset, base, set.train.people())? })
    }

    /// Of latents z (K, L) of these K people.
    pub fn loss(&self, z: &Tensor, people: &[usize], rng: &mut ChaCha8Rng) -> Result<Tensor> {
        let vectors = self.codec.decode(z)?;
        self.album.loss(&self.codec.layout, &vectors, people, self.how.images, rng)
    }
}

pub fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

/// Error of the latents of the people kept apart, each from a photo: ‖x̂_0 − x_0‖² / ‖x_0‖². With a linear guess, 1
/// is what the guess alone leaves over.
pub fn validation_error(lessons: &Lessons, denoiser: &Denoiser) -> Result<f64> {
    let rows: Vec<u32> = lessons.validation.iter().map(|photos| photos[0]).collect();
    let (face, image) = lessons.embeddings(&rows)?;
    let (face, image) = (denoiser.stats.face.undo(&face)?, denoiser.stats.image.undo(&image)?);
    let DenoiserConfig { steps, guidance, .. } = denoiser.config;
    let options = SampleOptions { steps, guidance, ..SampleOptions::default() };
    let z = denoiser.sample(&face, &image, &options)?;
    // The finished network corrects the guess that all people were used for; these people's own is without them.
    let made = ((z - denoiser.linear_guess(&face, &image)?)? * lessons.stats.scale)?;
    let x0 = lessons.x0(&rows)?;
    Ok(scalar(&(made - &x0)?.sqr()?.sum_all()?)? / scalar(&x0.sqr()?.sum_all()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::train_lae;
    use crate::commands::train_lae::tests::{SETTINGS, args as lae_args, quiet};
    use crate::dataset::lora_dataset::tests::write_dataset;
    use crate::identity::Identity;
    use candle_core::Device;
    use serde_json::Value;
    use std::path::Path;

    fn args(folder: &Path) -> Args {
        Args {
            dataset: folder.join("dataset"),
            lae: folder.join("lae"),
            out: folder.join("hypernet"),
            config: folder.join("settings.toml"),
            base: registry::BUILT_IN.into(),
            device: "cpu".into(),
            resume: false,
            minutes: None,
        }
    }

    fn row(report: &Value, name: &str) -> Value {
        let rows = report["table"].as_array().unwrap();
        rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}")).clone()
    }

    fn error_of(report: &Value, name: &str) -> f64 {
        row(report, name)["relative_error"].as_f64().unwrap()
    }

    /// Trains on a dataset of 60 people with other settings than [`SETTINGS`].
    fn trained(folder: &Path, change: impl Fn(&str) -> String) -> (ModelFiles, Value) {
        if !folder.join("dataset").exists() {
            write_dataset(&folder.join("dataset"), 60);
        }
        let settings = change(SETTINGS);
        if !folder.join("lae").exists() {
            train_lae::run(lae_args(folder, &settings), &quiet()).unwrap();
        }
        std::fs::write(folder.join("settings.toml"), settings).unwrap();
        run(args(folder), &quiet()).unwrap();
        let files = ModelFiles::folder(folder.join("hypernet")).unwrap();
        let report = files.json("training/report.json").unwrap();
        (files, report)
    }

    fn somebody(hypernet: &Hypernet) {
        let identity = Identity { face: vec![0.5; 6], image: Some(vec![0.5; 5]) };
        assert_eq!(hypernet.generate(&identity, &hypernet.options()).unwrap().layers.len(), 2);
    }

    #[test]
    fn new_people_get_loras_that_depend_on_their_faces() {
        let folder = tempfile::tempdir().unwrap();
        for guess in ["true", "false"] {
            let change = |text: &str| text.replace("linear_guess = true", &format!("linear_guess = {guess}"));
            let (files, report) = trained(folder.path(), change);
            assert_eq!(error_of(&report, "mean LoRA"), 1.0);
            // Embeddings with a noise of 0.05 tell four factors nearly exactly, and linearly.
            assert!(error_of(&report, "ridge regression") < 0.05, "{report:#}");
            // With the guess the transformer has nothing left to add; alone, it has learnt for 60 steps only.
            let wanted = if guess == "true" { 0.2 } else { 0.95 };
            assert!(error_of(&report, "DDIM 1") < wanted, "{report:#}");
            assert!(row(&report, "DDIM 1")["half_width"]["relative_error"].as_f64().unwrap() > 0.0);
            assert!(row(&report, "DDIM 1")["over_ridge"]["mean"].as_f64().is_some());
            assert!(error_of(&report, "DDIM 2, 4 samples, shuffled") > 1.0, "{report:#}");
            somebody(&Hypernet::open(&files, &Device::Cpu).unwrap());
        }
    }

    #[test]
    fn every_variant_of_the_recipe_trains_and_opens_again() {
        let folder = tempfile::tempdir().unwrap();
        for (settings, gated) in [
            ("mixer = \"face-only\"\nposition = \"sinusoidal\"", false),
            ("mixer = \"concat\"\nschedule = \"cosine\"\nweights = { min_snr = 5.0 }", false),
            ("prior = { clusters = 3, kappa = 2.0 }", true),
            ("mixer = \"image-only\"\nprior = { clusters = 2, learned = true }", false),
        ] {
            let (files, report) = trained(folder.path(), |text| {
                text.replace("linear_guess = true", &format!("linear_guess = false\n{settings}"))
            });
            let hypernet = Hypernet::open(&files, &Device::Cpu).unwrap();
            somebody(&hypernet);
            assert_eq!(report["gates"].is_object(), gated, "{settings}");
            assert_eq!(report["start"].is_object(), settings.contains("clusters"), "{settings}");
            assert!(error_of(&report, "DDIM 1").is_finite(), "{settings}");
            let log = std::fs::read_to_string(folder.path().join("hypernet/training/dit.jsonl")).unwrap();
            assert_eq!(log.contains("gate_face"), gated, "{settings}");
            let losses: Vec<f64> = log
                .lines()
                .map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap())
                .collect();
            assert!(losses[2] < losses[0], "{settings}: {losses:?}");
            if settings.contains("learned") {
                assert!(log.contains("prior"));
                assert!(hypernet.denoiser.stats.prior.is_some());
            }
        }
    }

    #[test]
    fn a_training_that_paused_goes_on_to_the_same_weights_and_keeps_the_best() {
        let folder = tempfile::tempdir().unwrap();
        let change = |text: &str| {
            text.replace(
                "linear_guess = true",
                "linear_guess = false\nvalidation = { share = 0.2, every = 7 }",
            )
        };
        let weights = || std::fs::read(folder.path().join("hypernet/dit.safetensors")).unwrap();
        let (_, report) = trained(folder.path(), change);
        assert_eq!((&report["people"]["validation"], &report["finished"]), (&json!(12), &json!(true)));
        let straight = weights();
        let training = folder.path().join("hypernet/training");
        let looks = |what: &str| std::fs::read_to_string(training.join(what)).unwrap();
        let all = looks("dit.validation.jsonl");
        assert_eq!(all.lines().count(), 60 / 7);

        std::fs::remove_dir_all(folder.path().join("hypernet")).unwrap();
        run(Args { minutes: Some(0.0), ..args(folder.path()) }, &quiet()).unwrap();
        assert_ne!(weights(), straight);
        run(Args { resume: true, ..args(folder.path()) }, &quiet()).unwrap();
        assert_eq!(weights(), straight);
        assert_eq!(looks("dit.validation.jsonl"), all);
    }

    #[test]
    fn a_training_that_gains_no_more_stops() {
        let folder = tempfile::tempdir().unwrap();
        // With a rate of nearly nothing no look is better than the first by more than chance.
        let change = |text: &str| {
            text.replace("peak = 3e-3", "peak = 1e-12").replace(
                "linear_guess = true",
                "linear_guess = true\nvalidation = { share = 0.1, every = 2, patience = 3 }",
            )
        };
        trained(folder.path(), change);
        let log = folder.path().join("hypernet/training/dit.validation.jsonl");
        assert!(std::fs::read_to_string(log).unwrap().lines().count() < 30);
    }

    #[test]
    fn recipes_that_cannot_work_say_what_to_change() {
        let folder = tempfile::tempdir().unwrap();
        trained(folder.path(), str::to_string);
        let refusal = |from: &str, to: &str| {
            std::fs::write(folder.path().join("settings.toml"), SETTINGS.replace(from, to)).unwrap();
            format!("{:#}", run(args(folder.path()), &quiet()).unwrap_err())
        };
        for (from, to, why) in [
            ("width = 16", "", "neither `width` nor `size`"),
            ("heads = 2", "heads = 3", "3 heads"),
            ("token = 2", "token = 3", "take one of [1, 2, 4]"),
            ("folds = 4", "folds = 1", "folds"),
            ("drop = 0.1", "drop = 1.5", "drop"),
            ("drop = 0.1", "drop = 0.1\nprior = { clusters = 30 }", "at most 6"),
            ("drop = 0.1", "drop = 0.1\nvalidation = { share = 0.9, every = 1 }", "too few"),
            ("steps = 60, batch = 16", "steps = 60, batch = 32", "too few for batches of 32"),
            ("drop = 0.1", "drop = 0.1\ngate = 1", "gate"),
        ] {
            let message = refusal(from, to);
            assert!(message.contains(why), "{to}: {message}");
        }
        let other = SETTINGS.replace("drop = 0.1", "drop = 0.2");
        std::fs::write(folder.path().join("settings.toml"), other).unwrap();
        let message =
            format!("{:#}", run(Args { resume: true, ..args(folder.path()) }, &quiet()).unwrap_err());
        assert!(message.contains("dit.drop: 0.1, now 0.2"), "{message}");
    }

    #[test]
    fn an_autoencoder_of_another_base_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = folder.path().join("dataset");
        write_dataset(&dataset, 40);
        train_lae::run(lae_args(folder.path(), SETTINGS), &quiet()).unwrap();
        let header = std::fs::read_to_string(dataset.join("dataset.json")).unwrap();
        std::fs::write(dataset.join("dataset.json"), header.replace("base0123", "base9999")).unwrap();
        let message = format!("{:#}", run(args(folder.path()), &quiet()).unwrap_err());
        assert!(message.contains("base model"), "{message}");
    }
}
