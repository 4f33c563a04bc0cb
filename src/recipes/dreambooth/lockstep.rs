//! DreamBooth LoRA training (Ruiz et al. 2022, arXiv 2208.12242) of one person or of many at once.
//!
//! Many people share each forward pass of the frozen UNet: the batch holds K people's samples one after the other,
//! and every adapted layer multiplies each person's rows by that person's own factors. The losses are summed and Adam
//! works value by value, so each LoRA comes out as if it had been trained alone.
//!
//! Here is the form that datasets are made with: all people see the same scenes, timesteps and noise in the same
//! order and share frozen `down`s, so that what differs between two LoRAs is the person. `train-lora` builds its own
//! runs from the same parts.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, IndexOp, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::data_order::Timesteps;
use super::loss::{Batch, Captions, Objective};
pub use super::targets::{Networks, SharedDown, TargetModule, Targets, TrainableLora};

use crate::diffusion::noise;
use crate::diffusion::schedule::NoiseSchedule;
use crate::lora::Lora;
use crate::sdxl::pipeline::time_ids;
use crate::sdxl::text::TextConditioning;
use crate::sdxl::unet::UNet;
use crate::train::adamw::AdamWOptions;
use crate::train::gradients::Sum;
use crate::train::lr_schedule::Schedule;
use crate::train::state::State;
use crate::train::tail_mean::TailMean;
use crate::train::trainer::descend;

/// How a LoRA is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockstepConfig {
    /// Rank of every module.
    pub rank: usize,
    /// Scale of the LoRA is alpha / rank.
    pub alpha: f64,
    /// Which linear layers are adapted.
    pub targets: Targets,
    /// Steps of training.
    pub steps: u64,
    /// Samples of each person a step.
    pub batch: usize,
    /// Adam's learning rate.
    pub rate: Schedule,
    /// The result is the mean of the weights over this part of the run, at its end: less noise, more person.
    pub average_last: f64,
    /// Of the order of images, timesteps and noise, and of the frozen `down`s.
    pub seed: u64,
}

/// The frozen base.
#[derive(Clone, Copy)]
pub struct Frozen<'a> {
    /// Without adapters.
    pub unet: &'a UNet,
    /// Noise levels and what the UNet predicts.
    pub schedule: &'a NoiseSchedule,
}

/// Training data of K people: M images each, in the same scenes.
pub struct LockstepDataset {
    /// (K, M, C, h, w), scaled as the UNet wants them.
    pub latents: Tensor,
    /// Of the M captions.
    pub captions: TextConditioning,
    /// Side of the images in pixels.
    pub size: usize,
}

/// Random `down`s, U(−1/√in, 1/√in) as kohya's and peft's initialisation.
pub fn random_shared_down(unet: &UNet, config: &LockstepConfig) -> Result<SharedDown> {
    let networks = Networks { unet: unet.clone(), text: None };
    let modules = super::targets::target_modules(&networks, config.targets, config.rank)?;
    super::targets::random_shared_down(&modules, config.rank, config.seed)
}

/// Trains a LoRA for each of the K people of `dataset`, with frozen `downs`. `tick` is called after each step.
pub fn train(
    base: Frozen,
    downs: &SharedDown,
    dataset: &LockstepDataset,
    config: &LockstepConfig,
    tick: impl FnMut(f64) -> Result<()>,
) -> Result<Vec<Lora>> {
    let batch = LockstepBatch::new(base, downs, dataset, config)?;
    let learnt = batch.train(&batch.vars(), config, tick)?;
    batch
        .loras
        .iter()
        .enumerate()
        .map(|(person, lora)| {
            let own = under(&learnt, &format!("{person}/"));
            Ok(lora.at(&own).adapters()?.into_lora()?)
        })
        .collect()
}

/// Learns the basis itself: `downs` trained together with the `up`s of all K people, then orthonormalised in
/// direction and brought back to the scale of the start; on the CPU.
pub fn train_shared_down(
    base: Frozen,
    downs: &SharedDown,
    dataset: &LockstepDataset,
    config: &LockstepConfig,
    tick: impl FnMut(f64) -> Result<()>,
) -> Result<SharedDown> {
    let shared: BTreeMap<String, Var> = downs
        .iter()
        .map(|(path, down)| Ok((path.clone(), Var::from_tensor(&down.to_device(dataset.latents.device())?)?)))
        .collect::<Result<_>>()?;
    let tracked = shared.iter().map(|(path, var)| (path.clone(), var.as_tensor().clone())).collect();
    let batch = LockstepBatch::new(base, &tracked, dataset, config)?;
    let mut vars = batch.vars();
    vars.extend(shared.into_iter().map(|(path, var)| (format!("down.{path}"), var)));
    let learnt = batch.train(&vars, config, tick)?;
    under(&learnt, "down.").iter().map(|(path, down)| Ok((path.clone(), orthogonal_rows(down)?))).collect()
}

/// The entries whose name starts with `prefix`, without it.
fn under(values: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let own =
        |(name, value): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_string(), value.clone()));
    values.iter().filter_map(own).collect()
}

/// Rows made orthogonal (Gram–Schmidt), each of the length that [`random_shared_down`] gives: 1/√3.
fn orthogonal_rows(down: &Tensor) -> Result<Tensor> {
    let mut rows: Vec<Vec<f32>> = down.to_vec2()?;
    let length = 1.0 / 3f32.sqrt();
    for i in 0..rows.len() {
        let (before, rest) = rows.split_at_mut(i);
        let row = &mut rest[0];
        for other in before.iter() {
            let dot: f32 = row.iter().zip(other).map(|(a, b)| a * b).sum::<f32>() / (length * length);
            row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
        }
        let norm = row.iter().map(|a| a * a).sum::<f32>().sqrt().max(1e-12);
        row.iter_mut().for_each(|a| *a *= length / norm);
    }
    let shape = down.shape().clone();
    Ok(Tensor::from_vec(rows.concat(), shape, &Device::Cpu)?)
}

/// K people who learn in step.
struct LockstepBatch<'a> {
    networks: Networks,
    schedule: &'a NoiseSchedule,
    dataset: &'a LockstepDataset,
    loras: Vec<TrainableLora>,
}

impl<'a> LockstepBatch<'a> {
    fn new(
        base: Frozen<'a>,
        downs: &SharedDown,
        dataset: &'a LockstepDataset,
        config: &LockstepConfig,
    ) -> Result<Self> {
        let networks = Networks { unet: base.unet.clone(), text: None };
        let modules = super::targets::target_modules(&networks, config.targets, config.rank)?;
        ensure!(
            modules.iter().all(|module| downs
                .get(&module.path)
                .is_some_and(|down| down.dim(0).ok() == Some(config.rank))),
            "the basis is of other layers or another rank than the config's; take another --out"
        );
        let people = dataset.latents.dim(0)?;
        // Once for all people, so that they share them there too.
        let near = |(path, down): (&String, &Tensor)| -> Result<_> {
            Ok((path.clone(), down.to_device(dataset.latents.device())?))
        };
        let downs: SharedDown = downs.iter().map(near).collect::<Result<_>>()?;
        let loras =
            (0..people).map(|_| TrainableLora::new(&modules, &downs, config.alpha)).collect::<Result<_>>()?;
        Ok(Self { networks, schedule: base.schedule, dataset, loras })
    }

    /// The variables of all, as `PERSON/up.PATH`.
    fn vars(&self) -> BTreeMap<String, Var> {
        let mut all = BTreeMap::new();
        for (person, lora) in self.loras.iter().enumerate() {
            all.extend(lora.vars().iter().map(|(name, var)| (format!("{person}/{name}"), var.clone())));
        }
        all
    }

    /// Runs the config; gives the variables' means over the last part of the run.
    fn train(
        &self,
        vars: &BTreeMap<String, Var>,
        config: &LockstepConfig,
        mut tick: impl FnMut(f64) -> Result<()>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let options = AdamWOptions { betas: [0.9, 0.99], weight_decay: 0.0, clip: 0.0, ..Default::default() };
        let mut state = State::new(vars.clone(), options, None)?;
        // A learnt basis turns slowly under the `up`s that are made for it.
        state.optimiser().scale_rate("down.", 0.1);
        let mut mean = TailMean::new(config.steps, config.average_last);
        let gradients = |step: u64| -> Result<Sum> {
            let loss = self.loss(config, step)?;
            let mut store = loss.backward()?;
            let gradients =
                vars.iter().filter_map(|(name, var)| Some((name.clone(), store.remove(var)?))).collect();
            Ok(Sum { loss: f64::from(loss.to_scalar::<f32>()?), parts: Vec::new(), gradients })
        };
        let rate = |step: u64| config.rate.learning_rate(step, config.steps);
        descend(&mut state, config.steps, rate, gradients, |state, made| {
            mean.follow(state.step - 1, vars)?;
            tick(made.loss)?;
            Ok(ControlFlow::<()>::Continue(()))
        })?;
        mean.means()
    }

    /// Sum over the people of the mean squared error of each, with what is random drawn from the step alone.
    fn loss(&self, config: &LockstepConfig, step: u64) -> Result<Tensor> {
        let LockstepDataset { latents, captions, size } = self.dataset;
        let (_, images, c, h, w) = latents.dims5()?;
        let device = latents.device();
        let batch = config.batch;
        let chosen = super::data_order::shuffled_epoch_indices(config.seed, step, batch, images);
        let chosen: Vec<u32> = chosen.into_iter().map(|image| image as u32).collect();
        let index = Tensor::from_vec(chosen, batch, device)?;
        let mut rng = noise::generator(config.seed, step);
        let timesteps = Timesteps::Stratified.draw(batch, self.schedule.alphas_bar.len(), &mut rng);
        let eps = super::data_order::eps(config.seed, step, [batch, c, h, w], 0.0, device)?;
        let captions = Captions::Encoded(TextConditioning {
            context: captions.context.index_select(&index, 0)?,
            pooled: captions.pooled.index_select(&index, 0)?,
        });
        let batch_of = |person: usize| -> Result<Batch> {
            Ok(Batch {
                x0: latents.i(person)?.index_select(&index, 0)?,
                eps: eps.clone(),
                timesteps: timesteps.clone(),
                captions: captions.clone(),
                time_ids: time_ids(batch, *size, *size, device)?,
                class_images: 0,
                scale: 1.0,
            })
        };
        let batches = (0..self.loras.len()).map(batch_of).collect::<Result<Vec<_>>>()?;
        let mut networks = self.networks.clone();
        networks.attach(&self.loras.iter().collect::<Vec<_>>())?;
        let loss = super::loss::losses(&networks, self.schedule, &Objective::default(), &batches)
            .context("a training step")?
            .total;
        ensure!(
            loss.to_scalar::<f32>()?.is_finite(),
            "the loss of step {step} is not finite; a lower learning rate may help"
        );
        Ok(loss)
    }
}
