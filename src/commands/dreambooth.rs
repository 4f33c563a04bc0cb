//! DreamBooth LoRA training (Ruiz et al. 2022, arXiv 2208.12242) of one person or of many at once.
//!
//! Many people share each forward pass of the frozen UNet: the batch holds K people's samples one after the other,
//! and every adapted layer multiplies each person's rows by that person's own `up`. The losses are summed and Adam
//! works value by value, so each LoRA comes out as if it had been trained alone. All people see the same scenes,
//! timesteps and noise in the same order and share frozen `down`s: what differs between two LoRAs is the person.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, IndexOp, Tensor, Var};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::diffusion::noise;
use crate::diffusion::schedule::NoiseSchedule;
use crate::layers::{Adapter, Linear};
use crate::lora::{Lora, LoraLayer};
use crate::sdxl::pipeline::time_ids;
use crate::sdxl::text::TextConditioning;
use crate::sdxl::unet::UNet;
use crate::train::optimiser::{AdamW, AdamWOptions};
use crate::train::schedule::Schedule;
use crate::train::shards::Gradients;

/// How a LoRA is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
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
    /// Of the order of pictures, timesteps and noise, and of the frozen `down`s.
    pub seed: u64,
}

/// Which linear layers of the UNet get a LoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Targets {
    /// Queries, keys, values and outputs of every attention (diffusers' default).
    Attn,
    /// Attention and feed-forward.
    AttnFf,
}

impl Targets {
    /// Whether the layer at this diffusers path is adapted.
    pub fn includes(self, path: &str) -> bool {
        let attention = path.contains(".attn1.") || path.contains(".attn2.");
        attention || (self == Self::AttnFf && path.contains(".ff."))
    }
}

/// The frozen base.
#[derive(Clone, Copy)]
pub struct Frozen<'a> {
    /// Without adapters.
    pub unet: &'a UNet,
    /// Noise levels and what the UNet predicts.
    pub schedule: &'a NoiseSchedule,
}

/// What K people are learnt from: M pictures each, in the same scenes.
pub struct Lessons {
    /// (K, M, C, h, w), scaled as the UNet wants them.
    pub latents: Tensor,
    /// Of the M captions.
    pub captions: TextConditioning,
    /// Side of the pictures in pixels.
    pub size: usize,
}

/// `down` of every adapted layer by its path, (R, in): the basis that all people share.
pub type Downs = BTreeMap<String, Tensor>;

/// Random `down`s, U(−1/√in, 1/√in) as kohya's and peft's initialisation.
pub fn random_downs(unet: &UNet, recipe: &Recipe) -> Result<Downs> {
    let mut downs = Downs::new();
    let mut failed = None;
    unet.clone().visit_linears(&mut |path, linear| {
        if recipe.targets.includes(path) {
            match random_down(path, linear, recipe) {
                Ok(down) => drop(downs.insert(path.to_string(), down)),
                Err(error) => failed = Some(error),
            }
        }
    });
    if let Some(error) = failed {
        return Err(error);
    }
    ensure!(!downs.is_empty(), "no layer of this base is adapted by these targets");
    Ok(downs)
}

fn random_down(path: &str, linear: &Linear, recipe: &Recipe) -> Result<Tensor> {
    let (output, input) = linear.weight.dims2()?;
    ensure!(
        recipe.rank >= 1 && recipe.rank <= input.min(output),
        "rank {} does not fit the layer `{path}` of {input} → {output}; take 1 to {}",
        recipe.rank,
        input.min(output)
    );
    // FNV-1a of the path, so that a layer's basis does not depend on the other layers.
    let stream = path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let mut rng = noise::generator(recipe.seed, stream);
    let bound = 1.0 / (input as f32).sqrt();
    let values: Vec<f32> = (0..recipe.rank * input).map(|_| rng.random_range(-bound..bound)).collect();
    Ok(Tensor::from_vec(values, (recipe.rank, input), &Device::Cpu)?)
}

/// Trains a LoRA for each of the K people of `lessons`, with frozen `downs`. `tick` is called after each step.
pub fn train(
    base: Frozen,
    downs: &Downs,
    lessons: &Lessons,
    recipe: &Recipe,
    tick: impl FnMut(f64) -> Result<()>,
) -> Result<Vec<Lora>> {
    let students = Students::new(base.unet, downs, lessons, recipe, false)?;
    let learnt = students.learn(base, lessons, recipe, tick)?;
    (0..lessons.latents.dim(0)?).map(|person| students.lora(&learnt, downs, recipe, person)).collect()
}

/// Learns the basis itself: `downs` trained together with the `up`s of all K people, then orthonormalised in
/// direction and brought back to the scale of the start.
pub fn learn_downs(
    base: Frozen,
    downs: &Downs,
    lessons: &Lessons,
    recipe: &Recipe,
    tick: impl FnMut(f64) -> Result<()>,
) -> Result<Downs> {
    let students = Students::new(base.unet, downs, lessons, recipe, true)?;
    let learnt = students.learn(base, lessons, recipe, tick)?;
    downs.keys().map(|path| Ok((path.clone(), orthogonal_rows(&learnt[&format!("down.{path}")])?))).collect()
}

/// Rows made orthogonal (Gram–Schmidt), each of the length that [`random_downs`] gives: 1/√3.
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
    Ok(Tensor::from_vec(rows.concat(), shape, down.device())?)
}

/// A UNet with the adapters of K people, and what trains in it.
pub struct Students {
    unet: UNet,
    /// `up.PATH` (K, out, R) and, where they are learnt, `down.PATH` (R, in).
    pub vars: BTreeMap<String, Var>,
}

impl Students {
    /// Adapters that start at no change at all: `up` is zero.
    pub fn new(
        unet: &UNet,
        downs: &Downs,
        lessons: &Lessons,
        recipe: &Recipe,
        learn_downs: bool,
    ) -> Result<Self> {
        let people = lessons.latents.dim(0)?;
        let mut students = Self { unet: unet.clone(), vars: BTreeMap::new() };
        let mut failed = None;
        let vars = &mut students.vars;
        students.unet.visit_linears(&mut |path, linear| {
            if let Some(down) = downs.get(path) {
                let mut adapt = || -> Result<Adapter> {
                    let (output, input) = linear.weight.dims2()?;
                    ensure!(
                        down.dims() == [recipe.rank, input],
                        "`down` of `{path}` has shape {:?}, wanted [{}, {input}]",
                        down.dims(),
                        recipe.rank
                    );
                    let device = linear.weight.device();
                    let up = Var::zeros((people, output, recipe.rank), candle_core::DType::F32, device)?;
                    let mut down = down.to_device(device)?;
                    if learn_downs {
                        let var = Var::from_tensor(&down)?;
                        down = var.as_tensor().clone();
                        vars.insert(format!("down.{path}"), var);
                    }
                    let adapter = Adapter {
                        down,
                        up: up.as_tensor().clone(),
                        scale: recipe.alpha / recipe.rank as f64,
                    };
                    vars.insert(format!("up.{path}"), up);
                    Ok(adapter)
                };
                match adapt() {
                    Ok(adapter) => linear.adapter = Some(adapter),
                    Err(error) => failed = Some(error),
                }
            }
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(students),
        }
    }

    /// Runs the recipe; gives the variables' means over the last part of the run.
    fn learn(
        &self,
        base: Frozen,
        lessons: &Lessons,
        recipe: &Recipe,
        mut tick: impl FnMut(f64) -> Result<()>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let options = AdamWOptions { betas: [0.9, 0.99], weight_decay: 0.0, clip: 0.0, ..Default::default() };
        let mut optimiser = AdamW::new(self.vars.clone(), options)?;
        // A learnt basis turns slowly under the `up`s that are made for it.
        optimiser.scale_rate("down.", 0.1);
        let first_averaged =
            recipe.steps - (recipe.steps as f64 * recipe.average_last.clamp(0.0, 1.0)) as u64;
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        let mut averaged = 0;
        for step in 0..recipe.steps {
            let loss = self.loss(base, lessons, recipe, step)?;
            let mut store = loss.backward()?;
            let gradients: Gradients =
                self.vars.iter().filter_map(|(name, var)| Some((name.clone(), store.remove(var)?))).collect();
            optimiser.step(&gradients, recipe.rate.learning_rate(step, recipe.steps))?;
            if step >= first_averaged || step + 1 == recipe.steps {
                averaged += 1;
                for (name, var) in &self.vars {
                    let sum = match sums.remove(name) {
                        Some(sum) => (sum + var.as_tensor().detach())?,
                        None => var.as_tensor().detach().copy()?,
                    };
                    sums.insert(name.clone(), sum);
                }
            }
            tick(f64::from(loss.to_scalar::<f32>()?))?;
        }
        sums.into_iter().map(|(name, sum)| Ok((name, (sum / f64::from(averaged))?))).collect()
    }

    /// The LoRA of one of the people, from the values of the variables.
    pub fn lora(
        &self,
        learnt: &BTreeMap<String, Tensor>,
        downs: &Downs,
        recipe: &Recipe,
        person: usize,
    ) -> Result<Lora> {
        let layers = downs.iter().map(|(path, down)| {
            let up = learnt[&format!("up.{path}")].i(person)?.contiguous()?;
            let down = learnt.get(&format!("down.{path}")).unwrap_or(down).clone();
            Ok((path.clone(), LoraLayer::new(path, down, up, recipe.alpha as f32)?))
        });
        Ok(Lora { layers: layers.collect::<Result<_>>()?, metadata: BTreeMap::new() })
    }

    /// Sum over the people of the mean squared error of each, with what is random drawn from the step alone.
    pub fn loss(&self, base: Frozen, lessons: &Lessons, recipe: &Recipe, step: u64) -> Result<Tensor> {
        let (people, pictures, c, h, w) = lessons.latents.dims5()?;
        let device = lessons.latents.device();
        let batch = recipe.batch;
        let mut rng = noise::generator(recipe.seed, step);
        let chosen = (0..batch as u64)
            .map(|i| {
                // Every picture comes once before any comes again; each round has an order of its own.
                let (round, place) = (
                    (step * batch as u64 + i) / pictures as u64,
                    (step * batch as u64 + i) % pictures as u64,
                );
                let mut order: Vec<u32> = (0..pictures as u32).collect();
                order.shuffle(&mut noise::generator(recipe.seed ^ 0x0bde, round));
                order[place as usize]
            })
            .collect::<Vec<_>>();
        // One timestep from each of `batch` equal parts of the range: less noise between steps.
        let range = base.schedule.alphas_bar.len() as f64;
        let timesteps: Vec<usize> = (0..batch)
            .map(|i| ((i as f64 + rng.random::<f64>()) / batch as f64 * range) as usize)
            .map(|t| t.min(range as usize - 1))
            .collect();
        let eps = noise::normal(recipe.seed ^ 0x5eed, step, (1, batch, c, h, w), device)?;
        let all = |x: &Tensor| -> Result<Tensor> {
            let mut shape = x.dims().to_vec();
            shape.insert(0, people);
            let rows = x.unsqueeze(0)?.broadcast_as(shape.clone())?.contiguous()?;
            shape.remove(0);
            shape[0] *= people;
            Ok(rows.reshape(shape)?)
        };
        let index = Tensor::from_vec(chosen, batch, device)?;
        let x0 = lessons.latents.index_select(&index, 1)?.reshape((people * batch, c, h, w))?;
        let eps =
            eps.broadcast_as((people, batch, c, h, w))?.contiguous()?.reshape((people * batch, c, h, w))?;
        let t: Vec<usize> = (0..people).flat_map(|_| timesteps.iter().copied()).collect();
        let x_t = base.schedule.add_noise(&x0, &eps, &t)?;
        let target = base.schedule.target(&x0, &eps, &t)?;
        let times: Vec<f32> = t.iter().map(|&t| t as f32).collect();
        let context = all(&lessons.captions.context.index_select(&index, 0)?)?;
        let pooled = all(&lessons.captions.pooled.index_select(&index, 0)?)?;
        let sizes = time_ids(people * batch, lessons.size, lessons.size, device)?;
        let times = Tensor::from_vec(times, people * batch, device)?;
        let out = self.unet.forward(&x_t, &times, &context, &pooled, &sizes).context("a training step")?;
        let loss = ((out - target)?.sqr()?.mean_all()? * people as f64)?;
        ensure!(
            loss.to_scalar::<f32>()?.is_finite(),
            "the loss of step {step} is not finite; a lower learning rate may help"
        );
        Ok(loss)
    }
}
