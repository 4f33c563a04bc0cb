//! Trains a LoRA autoencoder (LAE): standardisation, principal components, then gradient descent.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use serde_json::{Value, json};

use crate::dataset::lora_dataset::LoraDataset;
use crate::failure::Failure;
use crate::hypernet::codec::{LoraCodec, VectorSpace, blocks};
use crate::hypernet::delta_metrics::DeltaSpace;
use crate::hypernet::lae::{Lae, LaeConfig};
use crate::hypernet::pca::{EXACT, Pca};
use crate::hypernet::row_source::RowSource;
use crate::hypernet::scaler::{ScaledRows, StandardScaler};
use crate::hypernet::weight_preserved_loss;
use crate::limits::require_memory;
use crate::progress;
use crate::recipes::lae::config::LaeTrainConfig;
use crate::recipes::lae::report::report;
use crate::train;
use crate::train::distributed;
use crate::train::gradients::{Figure, Loss};
use crate::train::trainer::{self, Outcome, RunOptions};
use crate::weights::Trainable;
use crate::weights::model_folder::save_json;

/// Options that all autoencoders of a run share.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Device to compute on.
    pub device: Device,
    /// Continue from the last checkpoint.
    pub resume: bool,
    /// Time to stop at, with a checkpoint.
    pub deadline: Option<Instant>,
}

/// Trains an autoencoder, writes it to `out` and returns its report. In a process group only the main process writes;
/// the others return `None`.
pub fn train_into(
    config: &LaeTrainConfig,
    set: &LoraDataset,
    out: &Path,
    options: &TrainOptions,
) -> Result<Option<Value>> {
    let training = out.join("training");
    if distributed::is_main_process() {
        std::fs::create_dir_all(&training)
            .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    }
    let run_options = RunOptions {
        folder: &training,
        name: "lae",
        resume: options.resume,
        deadline: options.deadline,
        save_every: Duration::from_secs(120),
    };
    let start = Instant::now();
    let (codec, end) = train(config, set, &options.device, &run_options)?;
    let seconds = start.elapsed().as_secs_f64();
    if !distributed::is_main_process() {
        return Ok(None);
    }
    // Rounding to f16 adds a thousandth of the autoencoder's own error.
    codec.save(out, DType::F16)?;
    let mut report = report(&codec, set, end, seconds)?;
    report["recipe"] = serde_json::to_value(config)?;
    save_json(&training.join("report.json"), &report)?;
    if let Outcome::Paused { step } = end {
        progress::note(format_args!("lae stops at step {step}; --resume goes on"));
    }
    Ok(Some(report))
}

/// Trains the variants of a sweep, each in a folder of its own below `out`, and returns their reports. Variants that an
/// earlier run finished are not trained again when the run continues. `open` opens the dataset in the form that a
/// configuration needs; it is asked again only where the form changes.
///
/// # Errors
/// The first error, with the name of the variant.
pub fn train_variants(
    variants: Vec<(String, LaeTrainConfig)>,
    out: &Path,
    options: &TrainOptions,
    open: impl Fn(&LaeTrainConfig) -> Result<LoraDataset>,
) -> Result<Vec<(String, Value)>> {
    let mut reports = Vec::new();
    let mut set: Option<LoraDataset> = None;
    for (name, config) in variants {
        progress::note(format_args!("sweep: {name}"));
        let out = out.join(&name);
        if let Some(report) = options.resume.then(|| finished_report(&out, &config)).flatten() {
            reports.push((name, report));
            continue;
        }
        let fits = set.take().filter(|set| set.form.kind() == config.canonical);
        let opened = fits.map_or_else(|| open(&config), Ok)?;
        let report = train_into(&config, &opened, &out, options)
            .with_context(|| format!("variant `{name}` of the sweep"))?;
        set = Some(opened);
        reports.extend(report.map(|report| (name, report)));
    }
    Ok(reports)
}

/// Trains an autoencoder; its weights are the moving averages.
///
/// # Errors
/// [`Failure::Usage`] for a dataset that is too small for `config`.
pub fn train(
    config: &LaeTrainConfig,
    set: &LoraDataset,
    device: &Device,
    run_options: &RunOptions,
) -> Result<(LoraCodec, Outcome)> {
    let vectors = &set.train.vectors;
    let lae = config.network.config(vectors.width());
    check_people(config, &lae, vectors.count())?;
    let standardise = StandardScaler::of(vectors, &blocks(&set.layout), config.scaling)?;
    let rows = ScaledRows { rows: vectors, standardise: &standardise };
    progress::note(format_args!(
        "{} values in {}: {:.0} times smaller",
        lae.input(),
        lae.latent(),
        lae.compression()
    ));
    let pca = match lae.start() {
        Some((patch, components)) => Some(Pca::fit_patches(&rows, patch, components, EXACT)?),
        None => None,
    };
    let (weights, end) = match pca {
        Some(pca) if lae.closed_form() => (Lae::pca_tensors(&pca).into_iter().collect(), Outcome::Finished),
        start => LaeTrainer { config, lae: &lae, set, rows: &rows, device }.run(start, run_options)?,
    };
    let (base, layout) = (set.header.base.clone(), set.layout.clone());
    let space = VectorSpace { base, layout, form: set.form.clone(), standardise };
    let codec = LoraCodec::new(space, &lae, weights, device)?;
    Ok((codec, end))
}

/// Checks that the dataset is large enough.
fn check_people(config: &LaeTrainConfig, lae: &LaeConfig, people: usize) -> Result<()> {
    if let Some((patch, components)) = lae.start()
        && components >= people
    {
        let what = if patch == lae.input() { "latent" } else { "components" };
        return Err(Failure::Usage(format!(
            "{components} principal components need more LoRAs than the {people} of the dataset; make `{what}` smaller"
        ))
        .into());
    }
    if !lae.closed_form() && people < 2 * config.plan.batch {
        return Err(Failure::Usage(format!(
            "{people} people to learn from are too few for a batch of {}; at least twice the batch is needed: make \
             `batch` smaller, or the dataset larger",
            config.plan.batch
        ))
        .into());
    }
    Ok(())
}

/// Gradient descent; the rows are read on the CPU and computed on `device`.
struct LaeTrainer<'a> {
    config: &'a LaeTrainConfig,
    lae: &'a LaeConfig,
    set: &'a LoraDataset,
    rows: &'a ScaledRows<'a>,
    device: &'a Device,
}

impl LaeTrainer<'_> {
    /// Trains from the principal components `start`, or from random weights, and returns the averaged weights.
    fn run(
        &self,
        start: Option<Pca>,
        run_options: &RunOptions,
    ) -> Result<(BTreeMap<String, Tensor>, Outcome)> {
        let Self { config, set, rows, device, .. } = *self;
        let trainable = Trainable::new(config.seed);
        let lae = trainable.checked(Lae::new(self.lae, trainable.builder(device)))?;
        // LoRA, noise, guess and error of each sample.
        let factors = [config.plan.batch, self.lae.input(), 4, 4];
        require_memory("the LoRAs of a step", &factors, "`batch`")?;
        let vars = trainable.vars();
        if let Some(pca) = start {
            lae.start_from(&pca, &vars)?;
        }
        let standardise = rows.standardise.to_device(device)?;
        let space = DeltaSpace::new(&set.layout, device)?;
        let plan = &config.plan;
        let (batch, shards) = (plan.samples_a_shard()?, plan.shards as u64);
        let loss = |step: u64, shard: usize| -> Result<Loss> {
            let mut rng = train::rng(config.seed, step * shards + shard as u64);
            let places: Vec<usize> = (0..batch).map(|_| rng.random_range(0..rows.count())).collect();
            let x0 = standardise.apply(&rows.rows.batch(&places)?.to_device(device)?)?;
            let mut noisy = |x: &Tensor, sigma: f64| -> Result<Tensor> {
                if sigma == 0.0 {
                    return Ok(x.clone());
                }
                Ok((x + (train::normal(&mut rng, x.shape(), device)? * sigma)?)?)
            };
            let z = lae.encode(&noisy(&x0, config.input_noise)?)?;
            let size = f64::from(z.detach().sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
            let guess = lae.decode(&noisy(&z, config.latent_noise * size)?)?;
            let loss = weight_preserved_loss::loss(&x0, &guess, config.distance, config.weight_preserved)?;
            let mut parts = vec![
                ("reconstruction", Figure::from(&loss.reconstruction)),
                ("weight_preserved", Figure::from(&loss.weight_preserved)),
                ("latent_rms", size.into()),
            ];
            let mut total = loss.total;
            if config.angle > 0.0 {
                let angle = space.angle(&standardise.undo(&guess)?, &standardise.undo(&x0)?)?;
                parts.push(("angle", Figure::from(&angle)));
                total = (total + (angle * config.angle)?)?;
            }
            Ok(Loss { value: total, parts })
        };
        let settings = json!({ "lae": config, "dataset": set.settings_hash, "people": rows.count() });
        let (end, ema) = trainer::run(plan, &settings, run_options, &vars, loss, |_, _| Ok(()))?;
        Ok((ema.averages().clone(), end))
    }
}

/// The report of an autoencoder in `out` whose training finished with the same configuration.
fn finished_report(out: &Path, config: &LaeTrainConfig) -> Option<Value> {
    let report: Value =
        serde_json::from_slice(&std::fs::read(out.join("training/report.json")).ok()?).ok()?;
    (report["finished"] == true && report["recipe"] == serde_json::to_value(config).ok()?).then_some(report)
}
