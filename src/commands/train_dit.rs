//! `difflora train-dit`: a person's embeddings → the latent of their LoRA.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::lora_set::{Agreement, FormWanted, LoraSet, Reading};
use super::models;
use super::train_lae::Settings;
use crate::cli::Common;
use crate::diffusion::schedule::NoiseSchedule;
use crate::failure::Failure;
use crate::hypernet::dit::{Dit, DitConfig};
use crate::hypernet::mixer::{Mixer, MixerConfig};
use crate::hypernet::ridge::Ridge;
use crate::hypernet::rows::Rows;
use crate::hypernet::stats::{Standardise, unit_power};
use crate::hypernet::{
    Denoiser, DenoiserConfig, DenoiserStats, Hypernet, LoraCodec, ModelId, SampleOptions,
    diffusion_of_latents,
};
use crate::model_files::{ModelFiles, save_json};
use crate::train::run::{self, End, Keeping, Plan};
use crate::train::shards::Loss;
use crate::weights::Trainable;
use crate::{progress, train};

/// Arguments of `difflora train-dit`.
///
/// Learns to make the latent of a person's LoRA from embeddings of one photo. OUT becomes the finished hypernetwork
/// for `gen`; checkpoint, log and report.json (its errors on the people held out, beside simpler ways) go to
/// OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder that `build-dataset` wrote.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_DATASET")]
    dataset: PathBuf,
    /// Folder that `train-lae` wrote for the same dataset.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_LAE")]
    lae: PathBuf,
    /// Folder for the hypernetwork; made where it is missing.
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

/// How mixer and transformer are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Of weights, batches and noise.
    seed: u64,
    /// Values in a token.
    token: usize,
    /// D of transformer and mixer.
    width: usize,
    /// Blocks.
    depth: usize,
    /// H
    heads: usize,
    /// DDIM steps of the finished hypernetwork, unless asked otherwise.
    steps: usize,
    /// Its guidance; 1 is none.
    guidance: f64,
    /// Whether the transformer corrects a ridge regression or makes the whole latent.
    linear_guess: bool,
    /// Penalties of the ridge regression, of which cross validation takes the best.
    penalties: Vec<f64>,
    /// Parts of that cross validation; the rows of a person are in one part.
    folds: usize,
    /// σ of the noise added to standardised embeddings.
    condition_noise: f64,
    /// Part of the samples that are told nothing about the person.
    drop: f64,
    /// Steps, batch, rate.
    plan: Plan,
}

/// Trains, saves and reports.
pub fn run(args: Args, common: &Common) -> Result<()> {
    let recipe = Settings::read(&args.config)?.dit;
    let training = args.out.join("training");
    std::fs::create_dir_all(&training)
        .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    let lae_files = ModelFiles::folder(&args.lae)?;
    let codec = LoraCodec::open(&lae_files, &Device::Cpu)?;
    let lae = models::identify(&lae_files, &args.lae.display().to_string(), "lae.safetensors")?;
    let form = FormWanted::Of(codec.form.clone());
    let set = LoraSet::open(&args.dataset, &Reading { form, ..Reading::default() })?;
    check(&codec, &set)?;
    let keeping = Keeping {
        folder: &training,
        name: "dit",
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
        save_every: Duration::from_secs(120),
    };
    let lessons = Lessons::prepare(&recipe, &codec, &set)?;
    let (denoiser, end) = train(&recipe, &lessons, &set, &lae, &keeping)?;
    let hypernet = Hypernet { codec, denoiser };
    hypernet.save(&args.out, DType::F16)?;
    let report = report(&hypernet, &lessons, &set, end)?;
    save_json(&training.join("report.json"), &report)?;
    if let End::Paused { step } = end {
        progress::note(format_args!("dit stops at step {step}; --resume goes on"));
    }
    if common.json {
        println!("{report}");
    } else {
        print_report(&report);
    }
    Ok(())
}

/// Refuses an autoencoder of other LoRAs than the dataset's.
fn check(codec: &LoraCodec, set: &LoraSet) -> Result<()> {
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

/// What the networks learn from, a row a reference picture (R, …).
struct Lessons {
    stats: DenoiserStats,
    /// Standardised embeddings (R, F) and (R, I).
    face: Tensor,
    image: Tensor,
    /// (z − out-of-fold guess) · scale, or z · scale without a guess (R, L).
    x0: Tensor,
    /// The linear guess; also made where it is not stored, as a baseline.
    ridge: Ridge,
    penalty: f64,
    out_of_fold_error: f64,
}

impl Lessons {
    fn prepare(recipe: &Recipe, codec: &LoraCodec, set: &LoraSet) -> Result<Self> {
        let train = &set.train;
        let mut stats = DenoiserStats {
            face: Standardise::fit_whole(&train.faces)?,
            image: Standardise::fit_whole(&train.images)?,
            scale: 1.0,
        };
        let z = train.per_reference(&codec.encode_all(&train.vectors)?)?; // (R, L)
        let x = stats.together(&train.faces, &train.images)?;
        // The photos of one person are alike: in another fold they would give the answer away.
        let folds: Vec<usize> = train.owners.iter().map(|owner| owner % recipe.folds.max(1)).collect();
        let fit = Ridge::cross_fit_in(&x, &z, &recipe.penalties, &folds)?;
        let target = if recipe.linear_guess { (&z - &fit.out_of_fold)? } else { z };
        stats.scale = unit_power(&target)?;
        Ok(Self {
            face: stats.face.apply(&train.faces)?,
            image: stats.image.apply(&train.images)?,
            x0: (target * stats.scale)?,
            ridge: fit.ridge,
            penalty: fit.penalty,
            out_of_fold_error: fit.relative_error,
            stats,
        })
    }
}

/// Mixer and transformer with averaged weights.
///
/// T = 1000, x_0 predicted, its squared error not weighted by t: min-SNR weights give the high noise, where the
/// condition matters, nearly nothing.
fn train(
    recipe: &Recipe,
    lessons: &Lessons,
    set: &LoraSet,
    lae: &ModelId,
    keeping: &Keeping,
) -> Result<(Denoiser, End)> {
    let Recipe { token, width, depth, heads, steps, guidance, linear_guess, .. } = *recipe;
    let config = DenoiserConfig {
        mixer: MixerConfig { face: lessons.face.dim(1)?, image: lessons.image.dim(1)?, width },
        dit: DitConfig { latent: lessons.x0.dim(1)?, token, width, depth, heads },
        diffusion: diffusion_of_latents(),
        steps,
        guidance,
        linear_guess,
        face_encoder: set.header.face_encoder.clone(),
        image_encoder: set.header.image_encoder.clone(),
        image_input: set.header.image_input,
    };
    let trainable = Trainable::new(recipe.seed);
    let vb = trainable.builder(&Device::Cpu);
    let mixer = Mixer::new(&config.mixer, vb.pp("mixer"))?;
    let dit = Dit::new(&config.dit, vb.pp("dit"))?;
    let vars = trainable.vars();
    let schedule = NoiseSchedule::new(&config.diffusion)?;
    let references = set.train.references();
    let plan = &recipe.plan;
    let (batch, shards) = (plan.samples_a_shard()?, plan.shards as u64);
    let loss = |step: u64, shard: usize| -> Result<Loss> {
        let mut rng = train::rng(recipe.seed, step * shards + shard as u64);
        let mut rows = Vec::with_capacity(batch);
        for _ in 0..batch {
            let photos = &references[rng.random_range(0..references.len())];
            rows.push(photos[rng.random_range(0..photos.len())]);
        }
        let t: Vec<usize> = (0..batch).map(|_| rng.random_range(0..schedule.alphas_bar.len())).collect();
        let keep: Vec<f32> =
            (0..batch).map(|_| if rng.random::<f64>() < recipe.drop { 0.0 } else { 1.0 }).collect();
        let rows = Tensor::new(rows, &Device::Cpu)?;
        let mut blurred = |x: &Tensor| -> Result<Tensor> {
            let x = x.index_select(&rows, 0)?;
            let noise = train::normal(&mut rng, x.shape())?;
            Ok((x + (noise * recipe.condition_noise)?)?)
        };
        let (face, image) = (blurred(&lessons.face)?, blurred(&lessons.image)?);
        let x0 = lessons.x0.index_select(&rows, 0)?;
        let eps = train::normal(&mut rng, x0.shape())?;
        let condition = mixer.forward(&face, &image)?.condition;
        let condition = mixer.drop(&condition, &Tensor::new(keep, &Device::Cpu)?)?;
        let x_t = schedule.add_noise(&x0, &eps, &t)?;
        let t: Vec<f32> = t.into_iter().map(|t| t as f32).collect();
        let guess = dit.forward(&x_t, &Tensor::new(t, &Device::Cpu)?, &condition)?;
        Ok((guess - x0)?.sqr()?.mean_all()?.into())
    };
    let settings = json!({
        "dit": recipe, "dataset": set.stamp, "people": references.len(), "lae": lae.sha256,
    });
    let (end, ema) = run::run(plan, &settings, keeping, &vars, loss, |_, _| Ok(()))?;
    let mut weights = ema.averages().clone();
    if linear_guess {
        weights.extend(lessons.ridge.tensors("guess"));
    }
    Ok((Denoiser::new(config, lessons.stats.clone(), weights, &Device::Cpu)?, end))
}

/// Errors on the people held out: of the hypernetwork from one photo, and of simpler ways.
fn report(hypernet: &Hypernet, lessons: &Lessons, set: &LoraSet, end: End) -> Result<Value> {
    let Hypernet { codec, denoiser } = hypernet;
    let new = &set.held_out;
    let vectors = new.vectors.all()?;
    let truth = codec.standardise.apply(&vectors)?; // (M, P)
    let truths = new.per_reference(&truth)?; // (R, P)
    let mut table = Vec::new();
    let mut add = |name: &str, guess: &Tensor, truth: &Tensor| -> Result<()> {
        let Agreement { relative_error, cosine } = Agreement::of(guess, truth)?;
        table.push(json!({ "name": name, "relative_error": relative_error, "cosine": cosine }));
        Ok(())
    };
    let decode = |z: &Tensor| -> Result<Tensor> { Ok(codec.lae.decode(z)?) };
    let sample = |steps, samples| {
        let options = SampleOptions { steps, samples, ..hypernet.options() };
        denoiser.sample(&new.faces, &new.images, &options)
    };

    add("mean LoRA", &truths.zeros_like()?, &truths)?;
    add("nearest person by face", &nearest(codec, set)?, &truths)?;
    let linear = lessons.ridge.forward(&lessons.stats.together(&new.faces, &new.images)?)?;
    add("ridge regression", &decode(&linear)?, &truths)?;
    add("ridge, mean of all photos", &decode(&new.mean_per_person(&linear)?)?, &truth)?;
    for steps in [1, 2, 5, 10, 25] {
        add(&format!("DDIM {steps}"), &decode(&sample(steps, 1)?)?, &truths)?;
    }
    let z = sample(denoiser.config.steps, 4)?;
    let name = format!("DDIM {}, 4 samples", denoiser.config.steps);
    add(&name, &decode(&z)?, &truths)?;
    add(&format!("{name}, mean of all photos"), &decode(&new.mean_per_person(&z)?)?, &truth)?;
    // The next person's LoRA is asked for: that is what a shuffled condition gives.
    let people = new.people();
    let next: Vec<u32> = (0..people).map(|person| ((person + 1) % people) as u32).collect();
    let others = new.per_reference(&truth.index_select(&Tensor::new(next, &Device::Cpu)?, 0)?)?;
    add(&format!("{name}, shuffled"), &decode(&z)?, &others)?;
    add("own LoRA through the autoencoder", &decode(&codec.encode(&vectors)?)?, &truth)?;

    // As many photos as there are of new people: all would fill the memory and tell no more.
    let learnt = &set.train;
    let photos = learnt.owners.len().min(new.owners.len());
    let options = SampleOptions { steps: denoiser.config.steps, ..hypernet.options() };
    let (faces, images) = (learnt.faces.narrow(0, 0, photos)?, learnt.images.narrow(0, 0, photos)?);
    let owned = learnt.vectors.batch(&learnt.owners[..photos])?;
    let seen = decode(&denoiser.sample(&faces, &images, &options)?)?;
    add("people learnt from", &seen, &codec.standardise.apply(&owned)?)?;

    let gates = denoiser.gates(&new.faces, &new.images)?.mean(0)?.to_vec1::<f32>()?;
    Ok(json!({
        "finished": end == End::Finished,
        "people": { "train": learnt.people(), "held_out": people },
        "photos": { "train": learnt.owners.len(), "held_out": new.owners.len() },
        "table": table,
        "gates": { "image": gates[0], "face": gates[1] },
        "ridge": { "penalty": lessons.penalty, "out_of_fold_error_of_latents": lessons.out_of_fold_error },
    }))
}

/// For each photo of the people held out, the LoRA of the person learnt from whose faces are most alike (R, P).
fn nearest(codec: &LoraCodec, set: &LoraSet) -> Result<Tensor> {
    let known = set.train.mean_per_person(&set.train.faces)?;
    let unit = |x: &Tensor| x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.sqrt()?);
    let likeness = unit(&set.held_out.faces)?.matmul(&unit(&known)?.t()?)?;
    let places: Vec<usize> =
        likeness.argmax(1)?.to_vec1::<u32>()?.into_iter().map(|place| place as usize).collect();
    Ok(codec.standardise.apply(&set.train.vectors.batch(&places)?)?)
}

fn print_report(report: &Value) {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    println!(
        "{} people to learn from, {} held out, one photo each unless said otherwise",
        report["people"]["train"], report["people"]["held_out"]
    );
    println!("{:<36} {:>14} {:>7}", "", "relative error", "cosine");
    for row in report["table"].as_array().into_iter().flatten() {
        let name = row["name"].as_str().unwrap_or_default();
        println!("{name:<36} {:>14.3} {:>7.3}", number(&row["relative_error"]), number(&row["cosine"]));
    }
    let gates = &report["gates"];
    println!("gates: face {:.2}, image {:.2}", number(&gates["face"]), number(&gates["image"]));
}

#[cfg(test)]
mod tests {
    use super::super::lora_set::tests::write_dataset;
    use super::super::train_lae;
    use super::super::train_lae::tests::{SETTINGS, args as lae_args, quiet};
    use super::*;
    use crate::identity::Identity;
    use std::path::Path;

    fn args(folder: &Path) -> Args {
        Args {
            dataset: folder.join("dataset"),
            lae: folder.join("lae"),
            out: folder.join("hypernet"),
            config: folder.join("settings.toml"),
            resume: false,
            minutes: None,
        }
    }

    fn error_of(report: &Value, name: &str) -> f64 {
        let rows = report["table"].as_array().unwrap();
        let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}"));
        row["relative_error"].as_f64().unwrap()
    }

    #[test]
    fn new_people_get_loras_that_depend_on_their_faces() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("dataset"), 60);
        for guess in ["true", "false"] {
            let settings = SETTINGS.replace("linear_guess = true", &format!("linear_guess = {guess}"));
            train_lae::run(lae_args(folder.path(), &settings), &quiet()).unwrap();
            run(args(folder.path()), &quiet()).unwrap();
            let files = ModelFiles::folder(folder.path().join("hypernet")).unwrap();
            let report: Value = files.json("training/report.json").unwrap();
            assert_eq!(error_of(&report, "mean LoRA"), 1.0);
            // Embeddings with a noise of 0.05 tell four factors nearly exactly, and linearly.
            assert!(error_of(&report, "ridge regression") < 0.05, "{report:#}");
            // With the guess the transformer has nothing left to add; alone, it has learnt for 60 steps only.
            let wanted = if guess == "true" { 0.2 } else { 0.95 };
            assert!(error_of(&report, "DDIM 1") < wanted, "{report:#}");
            assert!(error_of(&report, "DDIM 2, 4 samples, shuffled") > 1.0, "{report:#}");
            let hypernet = Hypernet::open(&files, &Device::Cpu).unwrap();
            let identity = Identity { face: vec![0.5; 6], image: Some(vec![0.5; 5]) };
            assert_eq!(hypernet.generate(&identity, &hypernet.options()).unwrap().layers.len(), 2);
        }
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
