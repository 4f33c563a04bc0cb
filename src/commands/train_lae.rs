//! `difflora train-lae`: LoRAs → their autoencoder.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::lora_set::{Agreement, LoraSet};
use super::train_dit;
use crate::cli::Common;
use crate::failure::Failure;
use crate::hypernet::codec::{LoraCodec, blocks};
use crate::hypernet::lae::{self, Lae, LaeConfig};
use crate::hypernet::pca::Pca;
use crate::hypernet::stats::{Standardise, unit_power};
use crate::model_files::save_json;
use crate::train::run::{self, End, Keeping, Plan};
use crate::train::shards::Loss;
use crate::weights::Trainable;
use crate::{progress, train};

/// Arguments of `difflora train-lae`.
///
/// Learns to write the LoRAs of a dataset as short latents. OUT holds the autoencoder for `train-dit`; checkpoint,
/// log and report.json (its errors on the people held out, beside those of plain principal components) go to
/// OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder that `build-dataset` wrote.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_DATASET")]
    dataset: PathBuf,
    /// Folder for the autoencoder; made where it is missing.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: PathBuf,
    /// Sizes and recipe, as in configs/hypernet-tiny.toml.
    #[arg(long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    config: PathBuf,
    /// Go on from the last checkpoint of the same settings.
    #[arg(long, env = "DIFFLORA_RESUME")]
    resume: bool,
    /// Stop after so many minutes with a checkpoint; --resume goes on.
    #[arg(long, value_name = "MINUTES", env = "DIFFLORA_MINUTES")]
    minutes: Option<f64>,
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
    seed: u64,
    /// Which network.
    network: Network,
    /// λ of L_WP.
    weight_preserved: f64,
    /// Noise added to the latents, as a part of their RMS at the start: near latents decode to near LoRAs.
    latent_noise: f64,
    /// Steps, batch, rate.
    plan: Plan,
}

/// [`LaeConfig`] without the length of the vectors, which the dataset decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Network {
    /// Closed form; nothing is trained.
    Pca { latent: usize },
    /// The paper's convolutions with a dense bottleneck.
    Conv1dDense { latent: usize, patch: usize, channels: usize },
    /// The paper's convolutions alone.
    Conv1d { folds: Vec<usize>, channels: Vec<usize> },
}

impl Network {
    fn config(&self, input: usize) -> LaeConfig {
        match self.clone() {
            Self::Pca { latent } => LaeConfig::Pca { input, latent },
            Self::Conv1dDense { latent, patch, channels } => {
                LaeConfig::Conv1dDense { input, latent, patch, channels }
            }
            Self::Conv1d { folds, channels } => LaeConfig::Conv1d { input, folds, channels },
        }
    }
}

/// Trains, saves and reports.
pub fn run(args: Args, common: &Common) -> Result<()> {
    let recipe = Settings::read(&args.config)?.lae;
    let training = args.out.join("training");
    std::fs::create_dir_all(&training)
        .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    let set = LoraSet::read(&args.dataset)?;
    let keeping = Keeping {
        folder: &training,
        name: "lae",
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
        save_every: Duration::from_secs(120),
    };
    let (codec, pca, end) = train(&recipe, &set, &keeping)?;
    // Half precision: its error is a thousandth of what the autoencoder leaves out.
    codec.save(&args.out, DType::F16)?;
    let report = report(&codec, &pca, &set, end)?;
    save_json(&training.join("report.json"), &report)?;
    if let End::Paused { step } = end {
        progress::note(format_args!("lae stops at step {step}; --resume goes on"));
    }
    if common.json {
        println!("{report}");
    } else {
        print_report(&report);
    }
    Ok(())
}

/// The autoencoder with averaged weights, and the principal components that it is compared with.
fn train(recipe: &Recipe, set: &LoraSet, keeping: &Keeping) -> Result<(LoraCodec, Pca, End)> {
    let vectors = &set.train.vectors; // (M, P)
    let config = recipe.network.config(vectors.dim(1)?);
    let standardise = Standardise::fit(vectors, &blocks(&set.layout))?;
    let x = standardise.apply(vectors)?;
    let components = config.latent().min(set.train.people() - 1);
    if components < config.latent() && !matches!(config, LaeConfig::Conv1d { .. }) {
        return Err(Failure::Usage(format!(
            "a latent of {} values needs more LoRAs than the {} of the dataset; make `latent` smaller",
            config.latent(),
            set.train.people()
        ))
        .into());
    }
    let pca = Pca::fit(&x, components)?;
    let trainable = Trainable::new(recipe.seed);
    let lae = Lae::new(&config, trainable.builder(&Device::Cpu))?;
    let (weights, end) = if matches!(config, LaeConfig::Pca { .. }) {
        (Lae::pca_tensors(&pca).into_iter().collect(), End::Finished)
    } else {
        let vars = trainable.vars();
        let mut noise = 0.0;
        if matches!(config, LaeConfig::Conv1dDense { .. }) {
            lae.start_from(&pca, &vars)?;
            noise = recipe.latent_noise / unit_power(&lae.encode(&x)?)?;
        }
        let plan = &recipe.plan;
        let (batch, shards) = (plan.samples_a_shard()?, plan.shards as u64);
        let people = set.train.people();
        let loss = |step: u64, shard: usize| -> Result<Loss> {
            let mut rng = train::rng(recipe.seed, step * shards + shard as u64);
            let rows: Vec<u32> = (0..batch).map(|_| rng.random_range(0..people as u32)).collect();
            let x = x.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
            let z = lae.encode(&x)?;
            let z = (&z + (train::normal(&mut rng, z.shape())? * noise)?)?;
            let loss = lae::loss(&x, &lae.decode(&z)?, recipe.weight_preserved)?;
            let part = |x: &Tensor| -> Result<f64> { Ok(f64::from(x.to_scalar::<f32>()?)) };
            let parts = vec![
                ("reconstruction", part(&loss.reconstruction)?),
                ("weight_preserved", part(&loss.weight_preserved)?),
            ];
            Ok(Loss { value: loss.total, parts })
        };
        let settings = json!({ "lae": recipe, "dataset": set.stamp, "people": people });
        let (end, ema) = run::run(plan, &settings, keeping, &vars, loss, |_, _| Ok(()))?;
        (ema.averages().clone(), end)
    };
    let base = set.header.base.clone();
    let codec = LoraCodec::new(base, set.layout.clone(), standardise, &config, weights, &Device::Cpu)?;
    Ok((codec, pca, end))
}

/// Errors on the people held out, of the autoencoder and of as many principal components.
fn report(codec: &LoraCodec, pca: &Pca, set: &LoraSet, end: End) -> Result<Value> {
    let x = codec.standardise.apply(&set.held_out.vectors)?;
    let by_lae = codec.lae.decode(&codec.lae.encode(&x)?)?;
    let by_pca = x.matmul(&pca.basis.t()?)?.matmul(&pca.basis)?;
    let figures = |guess: &Tensor| -> Result<Value> {
        let Agreement { relative_error, cosine } = Agreement::of(guess, &x)?;
        Ok(json!({
            "relative_error": relative_error,
            "cosine": cosine,
            "relative_error_by_magnitude": by_magnitude(guess, &x)?,
        }))
    };
    let config = codec.lae.config();
    Ok(json!({
        "finished": end == End::Finished,
        "people": { "train": set.train.people(), "held_out": set.held_out.people() },
        "parameters": config.input(),
        "latent": config.latent(),
        "compression": config.compression(),
        "lae": figures(&by_lae)?,
        "pca": figures(&by_pca)?,
    }))
}

/// Relative error among the smallest quarter of the standardised weights, the next, and so on.
fn by_magnitude(guess: &Tensor, truth: &Tensor) -> Result<Vec<f64>> {
    let flat = |x: &Tensor| -> Result<Vec<f32>> { Ok(x.flatten_all()?.to_vec1()?) };
    let mut pairs: Vec<(f32, f32)> = flat(truth)?.into_iter().zip(flat(guess)?).collect();
    pairs.sort_unstable_by(|a, b| a.0.abs().total_cmp(&b.0.abs()));
    let quarter = pairs.len().div_ceil(4).max(1);
    let relative = |pairs: &[(f32, f32)]| {
        let sum = |f: &dyn Fn(&(f32, f32)) -> f32| pairs.iter().map(|pair| f64::from(f(pair))).sum::<f64>();
        sum(&|(x, guess)| (x - guess).powi(2)) / sum(&|(x, _)| x.powi(2)).max(f64::MIN_POSITIVE)
    };
    Ok(pairs.chunks(quarter).map(relative).collect())
}

fn print_report(report: &Value) {
    println!(
        "{} values in {}: {:.0} times smaller; {} LoRAs to learn from, {} held out",
        report["parameters"],
        report["latent"],
        report["compression"].as_f64().unwrap_or(f64::NAN),
        report["people"]["train"],
        report["people"]["held_out"]
    );
    println!("{:>6} {:>14} {:>10}  error by magnitude of the weights", "", "relative error", "1 - cosine");
    for name in ["lae", "pca"] {
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let figures = &report[name];
        let quarters: Vec<String> = figures["relative_error_by_magnitude"]
            .as_array()
            .map(|list| list.iter().map(|value| format!("{:.3}", number(value))).collect())
            .unwrap_or_default();
        println!(
            "{name:>6} {:>14.4} {:>10.4}  {}",
            number(&figures["relative_error"]),
            1.0 - number(&figures["cosine"]),
            quarters.join(" ")
        );
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::lora_set::tests::write_dataset;
    use super::*;
    use crate::model_files::ModelFiles;

    /// Settings for the dataset of [`write_dataset`], whose LoRAs have four dimensions.
    pub(in crate::commands) const SETTINGS: &str = r#"
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
    pub(in crate::commands) fn args(folder: &Path, settings: &str) -> Args {
        std::fs::write(folder.join("settings.toml"), settings).unwrap();
        Args {
            dataset: folder.join("dataset"),
            out: folder.join("lae"),
            config: folder.join("settings.toml"),
            resume: false,
            minutes: None,
        }
    }

    pub(in crate::commands) fn quiet() -> Common {
        Common { json: true, quiet: true, verbose: false }
    }

    #[test]
    fn an_autoencoder_is_trained_that_restores_the_loras_of_new_people() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 40);
        run(args(folder.path(), SETTINGS), &quiet()).unwrap();
        let files = ModelFiles::folder(folder.path().join("lae")).unwrap();
        let report: Value = files.json("training/report.json").unwrap();
        // Four dimensions in four values: nothing but rounding and the noise of the latents is lost.
        for name in ["lae", "pca"] {
            assert!(report[name]["relative_error"].as_f64().unwrap() < 0.01, "{report}");
            assert_eq!(report[name]["relative_error_by_magnitude"].as_array().unwrap().len(), 4);
        }
        assert_eq!(report["compression"], 8.0);
        assert!(LoraCodec::open(&files, &Device::Cpu).is_ok());
    }

    #[test]
    fn a_paused_training_goes_on_to_the_same_weights() {
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
    fn latents_longer_than_the_dataset_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 20);
        let error = run(args(folder.path(), &SETTINGS.replace("latent = 4", "latent = 24")), &quiet());
        assert!(format!("{:#}", error.unwrap_err()).contains("make `latent` smaller"));
    }

    #[test]
    fn the_settings_in_the_repository_are_read() {
        let settings: Settings = toml::from_str(include_str!("../../configs/hypernet-tiny.toml")).unwrap();
        settings.lae.plan.samples_a_shard().unwrap();
    }
}
