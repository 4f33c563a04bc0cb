//! `difflora train-lae`: LoRAs → their autoencoder, or several to compare.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::commands::train_dit;
use crate::dataset::lora_dataset::{FormWanted, LoraDataset, ReadOptions};
use crate::device;
use crate::failure::Failure;
use crate::hypernet::codec::{LoraCodec, blocks};
use crate::hypernet::delta::DeltaSpace;
use crate::hypernet::lae::{self, CorrectionConfig, Distance, Lae, LaeConfig, Stage};
use crate::hypernet::pca::{EXACT, Pca};
use crate::hypernet::rows::{Rows, Standardised};
use crate::hypernet::stats::{Scaling, Standardise};
use crate::lora::canonical::Canonical;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::statistics::Mean;
use crate::train;
use crate::train::distributed;
use crate::train::shards::Loss;
use crate::train::trainer::{self, Outcome, RunOptions, TrainerConfig};
use crate::weights::Trainable;
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
    /// Folder for the autoencoder, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    pub out: PathBuf,
    /// Settings file, as configs/hypernet-tiny.toml.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    pub config: PathBuf,
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
        env = "DIFFLORA_MEMORY"
    )]
    pub memory: f64,
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
        Settings::read(&self.config).is_ok_and(|settings| settings.lae.plan.trains_in_shards())
    }
}

/// The file given by `--config`: both trainings, since the second builds on the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The autoencoder.
    pub lae: Recipe,
    /// The networks between a person and a latent.
    pub dit: train_dit::Recipe,
}

impl Settings {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Failure::unusable(path, error))?;
        toml::from_str(&text).map_err(|error| Failure::unusable(path, error))
    }
}

/// How the autoencoder is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Of weights, batches and noise.
    pub seed: u64,
    /// The form that the factors of each LoRA are brought to.
    #[serde(default)]
    pub canonical: Canonical,
    /// What is taken off and divided by before the network sees a LoRA.
    #[serde(default)]
    pub scaling: Scaling,
    /// Which network.
    pub network: Network,
    /// What the reconstruction pays for.
    #[serde(default)]
    pub distance: Distance,
    /// λ of L_WP.
    pub weight_preserved: f64,
    /// Weight of 1 − cos(ΔŴ, ΔW).
    #[serde(default)]
    pub angle: f64,
    /// σ of the noise added to the standardised weights: the encoder must not lean on single ones.
    #[serde(default)]
    pub input_noise: f64,
    /// Noise added to the latents, as a part of their RMS: near latents decode to near LoRAs.
    pub latent_noise: f64,
    /// Steps, batch, rate.
    pub plan: TrainerConfig,
}

/// [`LaeConfig`] without the length of the vectors, which the dataset decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Network {
    /// Closed form; nothing is trained.
    Pca { latent: usize },
    /// The paper's convolutions with a dense bottleneck.
    Conv1dDense { latent: usize, patch: usize, channels: usize },
    /// Kernels of their own for each long patch.
    Conv1dLocal {
        patch: usize,
        components: usize,
        #[serde(default)]
        correction: Option<CorrectionConfig>,
    },
    /// The paper's convolutions alone, or around a dense stage.
    Conv1d {
        stages: Vec<Stage>,
        #[serde(default)]
        position: bool,
        #[serde(default)]
        dense: Option<usize>,
    },
}

impl Network {
    pub fn config(&self, input: usize) -> LaeConfig {
        match self.clone() {
            Self::Pca { latent } => LaeConfig::Pca { input, latent },
            Self::Conv1dDense { latent, patch, channels } => {
                LaeConfig::Conv1dDense { input, latent, patch, channels }
            }
            Self::Conv1dLocal { patch, components, correction } => {
                LaeConfig::Conv1dLocal { input, patch, components, correction }
            }
            Self::Conv1d { stages, position, dense } => LaeConfig::Conv1d { input, stages, position, dense },
        }
    }
}

/// The file given by `--sweep`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    pub variant: Vec<Variant>,
}

/// One autoencoder of a comparison.
#[derive(Deserialize)]
pub struct Variant {
    /// Its folder, and its row in the table.
    pub name: String,
    /// Keys of `[lae]` with other values; tables are merged key by key, except `network`.
    #[serde(flatten)]
    pub changes: toml::Table,
}

impl Variant {
    /// `recipe` with the changes.
    pub fn recipe(&self, recipe: &Recipe) -> Result<Recipe> {
        let mut table = toml::Table::try_from(recipe)?;
        merge(&mut table, &self.changes);
        let wrong = |error| Failure::Usage(format!("variant `{}` of the sweep: {error}", self.name));
        Ok(table.try_into().map_err(wrong)?)
    }
}

pub fn merge(table: &mut toml::Table, changes: &toml::Table) {
    for (key, change) in changes {
        match (table.get_mut(key), change) {
            // A network of another kind has other keys.
            (Some(toml::Value::Table(inner)), toml::Value::Table(changes)) if key != "network" => {
                merge(inner, changes);
            }
            _ => {
                table.insert(key.clone(), change.clone());
            }
        }
    }
}

/// Trains, saves and reports.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let recipe = Settings::read(&args.config)?.lae;
    distributed::join()?;
    let how = How {
        device: device::open(&args.device)?,
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
    };
    let open = |recipe: &Recipe| {
        let memory = (args.memory.max(0.0) * (1u64 << 30) as f64) as usize;
        let form = FormWanted::New(recipe.canonical);
        LoraDataset::open(&args.dataset, &ReadOptions { skip_missing: args.skip_missing, memory, form })
    };
    let Some(path) = &args.sweep else {
        let Some(report) = make(&recipe, &open(&recipe)?, &args.out, &how)? else { return Ok(()) };
        if output.json {
            print_line!("{report}")?;
        } else {
            print_report(&report)?;
        }
        return Ok(());
    };
    let text = std::fs::read_to_string(path).map_err(|error| Failure::unusable(path, error))?;
    let sweep: Sweep = toml::from_str(&text).map_err(|error| Failure::unusable(path, error))?;
    // All recipes first: a mistake in the last one should not cost the time of the others.
    let variants = sweep.variant.iter().map(|variant| Ok((&variant.name, variant.recipe(&recipe)?)));
    let variants: Vec<_> = variants.collect::<Result<_>>()?;
    let mut reports = Vec::new();
    let mut set: Option<LoraDataset> = None;
    for (name, recipe) in variants {
        progress::note(format_args!("sweep: {name}"));
        let out = args.out.join(name);
        if let Some(report) = args.resume.then(|| finished(&out, &recipe)).flatten() {
            reports.push((name.clone(), report));
            continue;
        }
        // Read again only for another form.
        let fits = set.take().filter(|set| set.form.kind() == recipe.canonical);
        let opened = fits.map_or_else(|| open(&recipe), Ok)?;
        let report =
            make(&recipe, &opened, &out, &how).with_context(|| format!("variant `{name}` of the sweep"))?;
        set = Some(opened);
        reports.extend(report.map(|report| (name.clone(), report)));
    }
    if !distributed::is_main_process() {
        return Ok(());
    }
    let table: Value =
        reports.iter().map(|(name, report)| json!({ "name": name, "report": report })).collect();
    save_json(&args.out.join("sweep.json"), &table)?;
    if output.json {
        print_line!("{table}")?;
    } else {
        print_table(&reports)?;
    }
    Ok(())
}

/// The report of a variant that was finished with the same recipe.
pub fn finished(out: &Path, recipe: &Recipe) -> Option<Value> {
    let report: Value =
        serde_json::from_slice(&std::fs::read(out.join("training/report.json")).ok()?).ok()?;
    (report["finished"] == true && report["recipe"] == serde_json::to_value(recipe).ok()?).then_some(report)
}

/// What is the same for all autoencoders of a call.
pub struct How {
    pub device: Device,
    pub resume: bool,
    pub deadline: Option<Instant>,
}

/// One autoencoder in `out`, and its report. Of a group only the first process writes them, and the others have none.
pub fn make(recipe: &Recipe, set: &LoraDataset, out: &Path, how: &How) -> Result<Option<Value>> {
    let training = out.join("training");
    if distributed::is_main_process() {
        std::fs::create_dir_all(&training)
            .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    }
    let run_options = RunOptions {
        folder: &training,
        name: "lae",
        resume: how.resume,
        deadline: how.deadline,
        save_every: Duration::from_secs(120),
    };
    let start = Instant::now();
    let (codec, end) = train(recipe, set, &how.device, &run_options)?;
    let seconds = start.elapsed().as_secs_f64();
    if !distributed::is_main_process() {
        return Ok(None);
    }
    // Half precision: its error is a thousandth of what the autoencoder leaves out.
    codec.save(out, DType::F16)?;
    let mut report = report(&codec, set, end, seconds)?;
    report["recipe"] = serde_json::to_value(recipe)?;
    save_json(&training.join("report.json"), &report)?;
    if let Outcome::Paused { step } = end {
        progress::note(format_args!("lae stops at step {step}; --resume goes on"));
    }
    Ok(Some(report))
}

/// The autoencoder with averaged weights.
pub fn train(
    recipe: &Recipe,
    set: &LoraDataset,
    device: &Device,
    run_options: &RunOptions,
) -> Result<(LoraCodec, Outcome)> {
    let vectors = &set.train.vectors;
    let config = recipe.network.config(vectors.width());
    check_people(recipe, &config, vectors.count())?;
    let standardise = Standardise::of(vectors, &blocks(&set.layout), recipe.scaling)?;
    let x = Standardised { rows: vectors, standardise: &standardise };
    progress::note(format_args!(
        "{} values in {}: {:.0} times smaller",
        config.input(),
        config.latent(),
        config.compression()
    ));
    let pca = match config.start() {
        Some((patch, components)) => Some(Pca::fit_patches(&x, patch, components, EXACT)?),
        None => None,
    };
    let (weights, end) = match pca {
        Some(pca) if config.closed_form() => {
            (Lae::pca_tensors(&pca).into_iter().collect(), Outcome::Finished)
        }
        start => descend(recipe, &config, set, &x, start, device, run_options)?,
    };
    let (base, layout) = (set.header.base.clone(), set.layout.clone());
    let codec = LoraCodec::new(base, layout, set.form.clone(), standardise, &config, weights, device)?;
    Ok((codec, end))
}

/// Refuses a dataset that is too small for the recipe.
pub fn check_people(recipe: &Recipe, config: &LaeConfig, people: usize) -> Result<()> {
    if let Some((patch, components)) = config.start()
        && components >= people
    {
        let what = if patch == config.input() { "latent" } else { "components" };
        return Err(Failure::Usage(format!(
            "{components} principal components need more LoRAs than the {people} of the dataset; make `{what}` smaller"
        ))
        .into());
    }
    if !config.closed_form() && people < 2 * recipe.plan.batch {
        return Err(Failure::Usage(format!(
            "{people} people to learn from are too few for a batch of {}; at least twice the batch is needed: make \
             `batch` smaller, or the dataset larger",
            recipe.plan.batch
        ))
        .into());
    }
    Ok(())
}

/// Gradient descent on `device` from `start`, or a random one; the rows are read by the CPU.
pub fn descend(
    recipe: &Recipe,
    config: &LaeConfig,
    set: &LoraDataset,
    x: &Standardised,
    start: Option<Pca>,
    device: &Device,
    run_options: &RunOptions,
) -> Result<(std::collections::BTreeMap<String, Tensor>, Outcome)> {
    let trainable = Trainable::new(recipe.seed);
    let lae = Lae::new(config, trainable.builder(device))?;
    let vars = trainable.vars();
    if let Some(pca) = start {
        lae.start_from(&pca, &vars)?;
    }
    let standardise = x.standardise.to_device(device)?;
    let space = DeltaSpace::new(&set.layout, device)?;
    let plan = &recipe.plan;
    let (batch, shards) = (plan.samples_a_shard()?, plan.shards as u64);
    let loss = |step: u64, shard: usize| -> Result<Loss> {
        let mut rng = train::rng(recipe.seed, step * shards + shard as u64);
        let places: Vec<usize> = (0..batch).map(|_| rng.random_range(0..x.count())).collect();
        let x0 = standardise.apply(&x.rows.batch(&places)?.to_device(device)?)?;
        let mut noisy = |x: &Tensor, sigma: f64| -> Result<Tensor> {
            if sigma == 0.0 {
                return Ok(x.clone());
            }
            Ok((x + (train::normal(&mut rng, x.shape(), device)? * sigma)?)?)
        };
        let z = lae.encode(&noisy(&x0, recipe.input_noise)?)?;
        let size = f64::from(z.detach().sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
        let guess = lae.decode(&noisy(&z, recipe.latent_noise * size)?)?;
        let loss = lae::loss(&x0, &guess, recipe.distance, recipe.weight_preserved)?;
        let part = |x: &Tensor| -> Result<f64> { Ok(f64::from(x.to_scalar::<f32>()?)) };
        let mut parts = vec![
            ("reconstruction", part(&loss.reconstruction)?),
            ("weight_preserved", part(&loss.weight_preserved)?),
            ("latent_rms", size),
        ];
        let mut total = loss.total;
        if recipe.angle > 0.0 {
            let angle = space.angle(&standardise.undo(&guess)?, &standardise.undo(&x0)?)?;
            parts.push(("angle", part(&angle)?));
            total = (total + (angle * recipe.angle)?)?;
        }
        Ok(Loss { value: total, parts })
    };
    let settings = json!({ "lae": recipe, "dataset": set.settings_hash, "people": x.count() });
    let (end, ema) = trainer::run(plan, &settings, run_options, &vars, loss, |_, _| Ok(()))?;
    Ok((ema.averages().clone(), end))
}

/// What the autoencoder keeps of the LoRAs of people held out, in ΔW and in the weights.
pub fn report(codec: &LoraCodec, set: &LoraDataset, end: Outcome, seconds: f64) -> Result<Value> {
    let device = codec.device();
    let space = DeltaSpace::new(&codec.layout, device)?;
    let mean = mean_row(codec, set)?.to_device(device)?;
    let mut alike = Vec::new();
    let mut quarters = Quarters::default();
    set.held_out.vectors.each(&mut |_, vectors| {
        let vectors = vectors.to_device(device)?;
        let guess = codec.decode(&codec.encode(&vectors)?)?;
        alike.extend(space.agreement(&guess, &vectors, &mean)?);
        let standard = |x: &Tensor| codec.standardise.apply(x);
        quarters.add(&standard(&guess)?, &standard(&vectors)?)
    })?;
    let (z, start) = (Tensor::zeros((1, codec.lae.config().latent()), DType::F32, device)?, Instant::now());
    codec.lora(&z)?;
    let decode = start.elapsed().as_secs_f64();
    let over_people = |of: &dyn Fn(&crate::hypernet::delta::Alike) -> f64| {
        Mean::of(&alike.iter().map(of).collect::<Vec<_>>())
    };
    let config = codec.lae.config();
    Ok(json!({
        "finished": end == Outcome::Finished,
        "seconds": seconds,
        "decode_seconds": decode,
        "people": { "train": set.train.people(), "held_out": set.held_out.people() },
        "parameters": config.input(),
        "latent": config.latent(),
        "compression": config.compression(),
        "delta_cosine": over_people(&|alike| alike.cosine),
        "delta_relative_error": over_people(&|alike| alike.relative_error),
        "own_cosine": over_people(&|alike| alike.own_cosine),
        "own_relative_error": over_people(&|alike| alike.own_relative_error),
        "relative_error": quarters.relative_error(),
        "relative_error_by_magnitude": quarters.by_magnitude(),
    }))
}

/// The mean LoRA (1, P), whatever the scaling takes off.
pub fn mean_row(codec: &LoraCodec, set: &LoraDataset) -> Result<Tensor> {
    let whole = Standardise::of(&set.train.vectors, &[codec.lae.config().input()], Scaling::Element)?;
    Ok(whole.mean().unsqueeze(0)?)
}

/// Errors among the smallest quarter of the standardised weights of each person, the next, and so on.
#[derive(Default)]
pub struct Quarters {
    /// Σ (x − x̂)² and Σ x².
    pub sums: [(f64, f64); 4],
}

impl Quarters {
    pub fn add(&mut self, guess: &Tensor, truth: &Tensor) -> Result<()> {
        for (guess, truth) in guess.to_vec2::<f32>()?.iter().zip(truth.to_vec2::<f32>()?) {
            let mut pairs: Vec<(f32, f32)> = truth.into_iter().zip(guess.iter().copied()).collect();
            pairs.sort_unstable_by(|a, b| a.0.abs().total_cmp(&b.0.abs()));
            let quarter = pairs.len().div_ceil(4).max(1);
            for (sum, pairs) in self.sums.iter_mut().zip(pairs.chunks(quarter)) {
                for (x, guess) in pairs {
                    let (x, guess) = (f64::from(*x), f64::from(*guess));
                    *sum = (sum.0 + (x - guess).powi(2), sum.1 + x * x);
                }
            }
        }
        Ok(())
    }

    pub fn by_magnitude(&self) -> Vec<f64> {
        self.sums.iter().map(|(error, power)| error / power.max(f64::MIN_POSITIVE)).collect()
    }

    /// Σ‖x̂ − x‖² / Σ‖x‖² over all weights.
    pub fn relative_error(&self) -> f64 {
        let (error, power) = self.sums.iter().fold((0.0, 0.0), |all, one| (all.0 + one.0, all.1 + one.1));
        error / f64::max(power, f64::MIN_POSITIVE)
    }
}

/// `mean ± half of the interval`.
pub fn interval(value: &Value) -> String {
    let mean = value["mean"].as_f64().unwrap_or(f64::NAN);
    match value["half_width"].as_f64() {
        Some(half) => format!("{mean:.3} ± {half:.3}"),
        None => format!("{mean:.3}"),
    }
}

pub fn quarters(report: &Value) -> String {
    let numbers = report["relative_error_by_magnitude"].as_array().into_iter().flatten();
    numbers.map(|value| format!("{:.2}", value.as_f64().unwrap_or(f64::NAN))).collect::<Vec<_>>().join(" ")
}

pub fn print_report(report: &Value) -> Result<()> {
    print_line!(
        "{} values in {}: {:.0} times smaller; {} LoRAs to learn from, {} held out",
        report["parameters"],
        report["latent"],
        report["compression"].as_f64().unwrap_or(f64::NAN),
        report["people"]["train"],
        report["people"]["held_out"]
    )?;
    print_line!(
        "ΔW: cosine {}, relative error {}",
        interval(&report["delta_cosine"]),
        interval(&report["delta_relative_error"])
    )?;
    print_line!(
        "beyond the mean LoRA: cosine {}, relative error {}",
        interval(&report["own_cosine"]),
        interval(&report["own_relative_error"])
    )?;
    print_line!(
        "weights: relative error {:.3}; by magnitude, from the smallest quarter: {}",
        report["relative_error"].as_f64().unwrap_or(f64::NAN),
        quarters(report)
    )?;
    Ok(())
}

pub fn print_table(reports: &[(String, Value)]) -> Result<()> {
    let widest = reports.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    print_line!(
        "{:widest$}  {:>6}  {:>7}  {:>15}  {:>15}  {:>15}  {:>15}  {:>23}  {:>7}",
        "",
        "latent",
        "smaller",
        "ΔW cosine",
        "ΔW rel. error",
        "own cosine",
        "own rel. error",
        "error by magnitude",
        "seconds"
    )?;
    for (name, report) in reports {
        print_line!(
            "{name:widest$}  {:>6}  {:>6.0}×  {:>15}  {:>15}  {:>15}  {:>15}  {:>23}  {:>7.0}",
            report["latent"],
            report["compression"].as_f64().unwrap_or(f64::NAN),
            interval(&report["delta_cosine"]),
            interval(&report["delta_relative_error"]),
            interval(&report["own_cosine"]),
            interval(&report["own_relative_error"]),
            quarters(report),
            report["seconds"].as_f64().unwrap_or(f64::NAN)
        )?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::dataset::lora_dataset::tests::write_dataset;
    use crate::weights::model_folder::ModelFiles;

    /// Settings for the dataset of [`write_dataset`], whose LoRAs have four dimensions.
    pub const SETTINGS: &str = r#"
        [lae]
        seed = 1
        network = { kind = "conv1d_dense", latent = 4, patch = 8, channels = 2 }
        weight_preserved = 0.1
        latent_noise = 0.01
        plan = { steps = 20, batch = 16, shards = 2, rate = { peak = 1e-3 }, ema = 0.9 }
        [dit]
        seed = 2
        token = 2
        width = 16
        depth = 1
        heads = 2
        steps = 2
        guidance = 1.0
        linear_guess = true
        penalties = [1e-3, 1e-2, 1e-1]
        folds = 4
        condition_noise = 0.1
        drop = 0.1
        plan = { steps = 60, batch = 16, shards = 2, rate = { peak = 3e-3, decay = "linear" }, ema = 0.9 }
    "#;

    /// Arguments with the files of a folder.
    pub fn args(folder: &Path, settings: &str) -> Args {
        std::fs::write(folder.join("settings.toml"), settings).unwrap();
        Args {
            dataset: folder.join("dataset"),
            out: folder.join("lae"),
            config: folder.join("settings.toml"),
            device: "cpu".into(),
            resume: false,
            minutes: None,
            sweep: None,
            skip_missing: false,
            memory: 1.0,
        }
    }

    pub fn quiet() -> Output {
        Output { json: true, quiet: true, verbose: false }
    }

    #[test]
    pub fn an_autoencoder_is_trained_that_restores_the_loras_of_new_people() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 40);
        run(args(folder.path(), SETTINGS), &quiet()).unwrap();
        let files = ModelFiles::folder(folder.path().join("lae")).unwrap();
        let report: Value = files.json("training/report.json").unwrap();
        // Four dimensions in four values: nothing but rounding and the noise of the latents is lost.
        assert!(report["relative_error"].as_f64().unwrap() < 0.01, "{report}");
        assert!(report["own_relative_error"]["mean"].as_f64().unwrap() < 0.01, "{report}");
        assert!(report["delta_cosine"]["mean"].as_f64().unwrap() > 0.995, "{report}");
        assert_eq!(report["relative_error_by_magnitude"].as_array().unwrap().len(), 4);
        assert_eq!(report["compression"], 8.0);
        assert!(LoraCodec::open(&files, &Device::Cpu).is_ok());
    }

    #[test]
    pub fn a_paused_training_goes_on_to_the_same_weights() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 40);
        let weights = || std::fs::read(folder.path().join("lae/lae.safetensors")).unwrap();
        run(args(folder.path(), SETTINGS), &quiet()).unwrap();
        let straight = weights();
        run(Args { minutes: Some(0.0), ..args(folder.path(), SETTINGS) }, &quiet()).unwrap();
        assert_ne!(weights(), straight);
        run(Args { resume: true, ..args(folder.path(), SETTINGS) }, &quiet()).unwrap();
        assert_eq!(weights(), straight);
    }

    #[test]
    pub fn a_dataset_larger_than_the_memory_gives_the_same_autoencoder() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 40);
        let weights = |memory| {
            run(Args { memory, ..args(folder.path(), SETTINGS) }, &quiet()).unwrap();
            std::fs::read(folder.path().join("lae/lae.safetensors")).unwrap()
        };
        assert_eq!(weights(0.0), weights(1.0));
    }

    #[test]
    pub fn every_option_of_the_recipe_trains_and_opens_again() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 40);
        let settings = SETTINGS.replacen(
            "seed = 1",
            "seed = 1\nscaling = \"rms\"\ndistance = \"l1\"\nangle = 0.5\ninput_noise = 0.1",
            1,
        );
        let local = "{ kind = \"conv1d_local\", patch = 16, components = 3 }";
        let staged = "{ kind = \"conv1d\", position = true, dense = 4, stages = [{ channels = 3, fold = 4, kernel = 3 }, \
                      { channels = 4, fold = 2, norm = \"instance\", activation = \"leaky_relu\" }] }";
        let dense = "{ kind = \"conv1d_dense\", latent = 4, patch = 8, channels = 2 }";
        for network in [local, staged] {
            assert!(settings.contains(dense));
            run(args(folder.path(), &settings.replace(dense, network)), &quiet()).unwrap();
            let files = ModelFiles::folder(folder.path().join("lae")).unwrap();
            let codec = LoraCodec::open(&files, &Device::Cpu).unwrap();
            let z = Tensor::zeros((1, codec.lae.config().latent()), DType::F32, &Device::Cpu).unwrap();
            assert_eq!(codec.lora(&z).unwrap().layers.len(), 2);
            let log = std::fs::read_to_string(folder.path().join("lae/training/lae.jsonl")).unwrap();
            assert!(log.contains("\"angle\"") && log.contains("latent_rms"), "{log}");
        }
    }

    #[test]
    pub fn a_sweep_makes_all_variants_and_a_table() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 40);
        let sweep = folder.path().join("sweep.toml");
        let list = r#"
            [[variant]]
            name = "pca"
            network = { kind = "pca", latent = 2 }
            [[variant]]
            name = "short"
            network = { kind = "conv1d", stages = [{ channels = 2, fold = 8 }] }
            plan = { steps = 3, rate = { peak = 1e-2 } }
        "#;
        std::fs::write(&sweep, list).unwrap();
        let with_sweep = || Args { sweep: Some(sweep.clone()), ..args(folder.path(), SETTINGS) };
        run(with_sweep(), &quiet()).unwrap();
        let files = ModelFiles::folder(folder.path().join("lae")).unwrap();
        let table: Value = files.json("sweep.json").unwrap();
        assert_eq!(table[0]["name"], "pca");
        assert_eq!((&table[0]["report"]["latent"], &table[1]["report"]["latent"]), (&json!(2), &json!(8)));
        assert_eq!(table[1]["report"]["delta_cosine"]["n"], 12);
        for name in ["pca", "short"] {
            assert!(
                LoraCodec::open(
                    &ModelFiles::folder(folder.path().join("lae").join(name)).unwrap(),
                    &Device::Cpu
                )
                .is_ok()
            );
        }
        std::fs::write(&sweep, list.replace("steps = 3", "stepz = 3")).unwrap();
        let message = format!("{:#}", run(with_sweep(), &quiet()).unwrap_err());
        assert!(message.contains("`short`") && message.contains("stepz"), "{message}");
    }

    #[test]
    pub fn a_checkpoint_of_another_recipe_is_refused_with_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 40);
        run(Args { minutes: Some(0.0), ..args(folder.path(), SETTINGS) }, &quiet()).unwrap();
        let other = SETTINGS.replace("latent = 4, patch = 8", "latent = 3, patch = 8");
        let error = run(Args { resume: true, ..args(folder.path(), &other) }, &quiet()).unwrap_err();
        assert!(format!("{error:#}").contains("lae.network.latent: 4, now 3"), "{error:#}");
    }

    #[test]
    pub fn too_few_people_for_the_batch_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 20);
        let error = run(args(folder.path(), SETTINGS), &quiet()).unwrap_err();
        assert!(format!("{error:#}").contains("at least twice the batch"), "{error:#}");
    }

    #[test]
    pub fn latents_longer_than_the_dataset_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 20);
        let error = run(args(folder.path(), &SETTINGS.replace("latent = 4", "latent = 24")), &quiet());
        assert!(format!("{:#}", error.unwrap_err()).contains("make `latent` smaller"));
    }

    #[test]
    pub fn the_settings_in_the_repository_are_read() {
        let settings: Settings = toml::from_str(include_str!("../../configs/hypernet-tiny.toml")).unwrap();
        settings.lae.plan.samples_a_shard().unwrap();
        let sweep: Sweep = toml::from_str(include_str!("../../configs/lae-sweep-tiny.toml")).unwrap();
        let sdxl: Settings = toml::from_str(include_str!("../../configs/hypernet-sdxl.toml")).unwrap();
        let config = sdxl.lae.network.config(11_612_160);
        assert_eq!((config.latent(), config.compression().round()), (38_556, 301.0));
        for variant in sweep.variant {
            variant.recipe(&settings.lae).unwrap().network.config(47_872);
        }
    }
}
