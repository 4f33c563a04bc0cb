//! Trains mixer and diffusion transformer (DiT): E[w_t·‖f(z_t, t, F) − x_0‖²].

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::Tensor;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::dataset::lora_dataset::LoraDataset;
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::shifted::Shift;
use crate::failure::Failure;
use crate::hypernet::dit::Dit;
use crate::hypernet::mixer::{GateFigures, Mixer};
use crate::hypernet::{Denoiser, DenoiserConfig, LoraCodec, SampleOptions, tensor_names};
use crate::recipes::dit::best_checkpoint::BestCheckpoint;
use crate::recipes::dit::config::{DitTrainConfig, LossWeights};
use crate::recipes::dit::image_loss::ImageLoss;
use crate::recipes::dit::learned_prior::LearnedPrior;
use crate::recipes::dit::training_set::LatentTrainingSet;
use crate::train;
use crate::train::distributed;
use crate::train::gradients::{Figure, Loss};
use crate::train::trainer::{self, Outcome, RunOptions};
use crate::weights::Trainable;
use crate::weights::model_id::ModelId;

/// Checks that the autoencoder was trained on LoRAs of the dataset's base model and layout.
///
/// # Errors
/// [`Failure::Usage`] with what differs.
pub fn check_autoencoder(codec: &LoraCodec, set: &LoraDataset) -> Result<()> {
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

/// Trains mixer and transformer. The result has the moving averages of the weights; with validation, those of the step
/// with the lowest validation error.
pub fn train(
    config: &DitTrainConfig,
    data: &LatentTrainingSet,
    image_loss: Option<&ImageLoss>,
    set: &LoraDataset,
    lae: &ModelId,
    run_options: &RunOptions,
) -> Result<(Denoiser, Outcome)> {
    let widths = [data.face.dim(1)?, data.image.dim(1)?, data.width()];
    let networks_config = config.config(widths, set)?;
    let trainable = Trainable::new(config.seed);
    let device = data.device();
    // The initial values depend on the names; see `tensor_names`.
    let vb = trainable.builder(device).rename_f(tensor_names::to_old);
    let trainer = DitTrainer {
        config,
        data,
        image_loss,
        mixer: trainable.checked(Mixer::new(&networks_config.mixer, vb.pp("mixer")))?,
        dit: trainable.checked(Dit::new(&networks_config.dit, vb.pp("dit")))?,
        prior: data
            .stats
            .prior
            .as_ref()
            .map(|prior| LearnedPrior::new(config, prior, vb.pp("prior")))
            .transpose()?,
        schedule: NoiseSchedule::new(&networks_config.diffusion)?,
    };
    let vars = trainable.vars();
    if let Some(prior) = &trainer.prior {
        prior.start(&vars)?;
    }
    let plan = &config.plan;
    let (batch, shards) = (plan.samples_a_shard()?, plan.shards as u64);
    let people = data.training.len();
    let loss = |step: u64, shard: usize| -> Result<Loss> {
        let mut rng = train::rng(config.seed, step * shards + shard as u64);
        let mut rows = Vec::with_capacity(batch);
        for _ in 0..batch {
            let photos = &data.training[rng.random_range(0..people)];
            rows.push(photos[rng.random_range(0..photos.len())]);
        }
        trainer.loss(&rows, &mut rng)
    };
    let settings = json!({
        "dit": config, "dataset": set.settings_hash, "people": people, "lae": lae.sha256,
    });
    let finished = |averages: &BTreeMap<String, Tensor>| -> Result<Denoiser> {
        let mut stats = data.stats.clone();
        if let (Some(prior), Some(trained)) = (&mut stats.prior, &trainer.prior) {
            trained.put_into(prior, averages)?;
        }
        let networks = averages.iter().filter(|(name, _)| !name.starts_with("prior."));
        let mut weights: BTreeMap<String, Tensor> =
            networks.map(|(name, weight)| (name.clone(), weight.clone())).collect();
        if config.linear_guess {
            weights.extend(data.fit.ridge.tensors("guess"));
        }
        Denoiser::new(networks_config.clone(), stats, weights, device)
    };
    let mut best = BestCheckpoint::open(config.validation.as_ref(), run_options, &settings)?;
    let (end, ema) = trainer::run_until(plan, &settings, run_options, &vars, loss, |step, ema| {
        best.validate(step, ema, || validation_error(data, &finished(ema.averages())?))
    })?;
    // Only the main process saves the result, so the others need not read the checkpoint.
    let best = if distributed::is_main_process() { best.averages()? } else { None };
    let averages = best.unwrap_or_else(|| ema.averages().clone());
    Ok((finished(&averages)?, end))
}

/// The networks in training, and the terms of their loss.
struct DitTrainer<'a> {
    config: &'a DitTrainConfig,
    data: &'a LatentTrainingSet,
    image_loss: Option<&'a ImageLoss<'a>>,
    mixer: Mixer,
    dit: Dit,
    prior: Option<LearnedPrior>,
    schedule: NoiseSchedule,
}

impl DitTrainer<'_> {
    /// E[w_t·‖f(z_t, t, F) − x_0‖²] over the photos `rows`, plus the losses of the prior and of images.
    fn loss(&self, rows: &[u32], rng: &mut ChaCha8Rng) -> Result<Loss> {
        let Self { config, data, image_loss, .. } = *self;
        let (batch, device) = (rows.len(), data.device());
        let t: Vec<usize> = (0..batch).map(|_| rng.random_range(0..self.schedule.alphas_bar.len())).collect();
        let keep: Vec<f32> =
            (0..batch).map(|_| if rng.random::<f64>() < config.drop { 0.0 } else { 1.0 }).collect();
        let mut noised = |x: Tensor| -> Result<Tensor> {
            let noise = train::normal(rng, x.shape(), device)?;
            Ok((x + (noise * config.condition_noise)?)?)
        };
        let (face, image) = data.embeddings(rows)?;
        let (face, image) = (noised(face)?, noised(image)?);
        let x0 = data.x0(rows)?;
        let eps = train::normal(rng, x0.shape(), device)?;
        let mixed = self.mixer.forward(&face, &image)?;
        let mut condition = self.mixer.drop(&mixed.condition, &Tensor::new(keep, device)?)?;
        let weights = match config.weights {
            LossWeights::Uniform => vec![1.0; batch],
            LossWeights::MinSnr(gamma) => self.schedule.min_snr_weights(&t, gamma)?,
        };
        let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
        let weights = Tensor::new(weights, device)?;
        let mut parts = Vec::new();
        let mut prior_loss = None;
        let x_t = match &self.prior {
            Some(prior) => {
                let clusters: Vec<u32> = rows.iter().map(|row| data.clusters[*row as usize]).collect();
                let clusters = Tensor::new(clusters, device)?;
                condition = self.dit.in_cluster(&condition, &clusters)?;
                let shift = prior.shift(&clusters)?;
                if prior.learned() {
                    let loss = prior.loss(&shift, &x0, &weights, rng)?;
                    parts.push(("prior", Figure::from(&loss)));
                    prior_loss = Some(loss);
                }
                // The network's error must not train the prior.
                let fixed = Shift { mean: shift.mean.detach(), std: shift.std.detach() };
                fixed.add_noise(&self.schedule, &x0, &eps, &t)?
            }
            None => self.schedule.add_noise(&x0, &eps, &t)?,
        };
        let t: Vec<f32> = t.into_iter().map(|t| t as f32).collect();
        let guess = self.dit.forward(&x_t, &Tensor::new(t, device)?, &condition)?;
        let errors = (&guess - x0)?.sqr()?.mean(1)?; // (B)
        let mut value = (errors * weights)?.mean_all()?;
        if let Some(gates) = &mixed.gates {
            let gates = GateFigures::of(&gates.detach())?;
            parts.extend([("gate_face", gates.face.into()), ("gate_spread", gates.spread.into())]);
        }
        if prior_loss.is_some() || image_loss.is_some() {
            parts.push(("denoising", Figure::from(&value)));
        }
        if let Some(prior_loss) = prior_loss {
            value = (value + prior_loss)?;
        }
        if let Some(functional) = image_loss {
            let rows = &rows[..functional.how.people.min(batch)];
            let z = ((guess.narrow(0, 0, rows.len())? / data.stats.scale)? + data.guess(rows)?)?;
            let loss = functional.loss(&z, &data.people(rows), rng)?;
            parts.push(("functional", Figure::from(&loss)));
            value = (value + (loss * functional.how.weight)?)?;
        }
        Ok(Loss { value, parts })
    }
}

fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

/// Relative error ‖x̂_0 − x_0‖² / ‖x_0‖² of the validation people, from one photo each. With a linear guess, 1 is the
/// error of the guess alone.
fn validation_error(data: &LatentTrainingSet, denoiser: &Denoiser) -> Result<f64> {
    let rows: Vec<u32> = data.validation.iter().map(|photos| photos[0]).collect();
    let (face, image) = data.embeddings(&rows)?;
    let (face, image) = (denoiser.stats.face.undo(&face)?, denoiser.stats.image.undo(&image)?);
    let DenoiserConfig { steps, guidance, .. } = denoiser.config;
    let options = SampleOptions { steps, guidance, ..SampleOptions::default() };
    let z = denoiser.sample(&face, &image, &options)?;
    // The finished network adds to the guess fitted on all people; x_0 of these is relative to the guess fitted without
    // them.
    let made = ((z - denoiser.linear_guess(&face, &image)?)? * data.stats.scale)?;
    let x0 = data.x0(&rows)?;
    Ok(scalar(&(made - &x0)?.sqr()?.sum_all()?)? / scalar(&x0.sqr()?.sum_all()?)?)
}
