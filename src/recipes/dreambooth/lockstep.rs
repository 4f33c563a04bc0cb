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

use anyhow::{Context, Result, ensure};
use candle_core::{Device, IndexOp, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::data_order::Timesteps;
use super::loss::{Batch, Objective, Words};
pub use super::targets::{Downs, Networks, Site, Student, Targets};

use crate::diffusion::noise;
use crate::diffusion::schedule::NoiseSchedule;
use crate::lora::Lora;
use crate::sdxl::pipeline::time_ids;
use crate::sdxl::text::TextConditioning;
use crate::sdxl::unet::UNet;
use crate::train::adamw::{AdamW, AdamWOptions};
use crate::train::lr_schedule::Schedule;
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

/// What K people are learnt from: M images each, in the same scenes.
pub struct Lessons {
    /// (K, M, C, h, w), scaled as the UNet wants them.
    pub latents: Tensor,
    /// Of the M captions.
    pub captions: TextConditioning,
    /// Side of the images in pixels.
    pub size: usize,
}

/// Random `down`s, U(−1/√in, 1/√in) as kohya's and peft's initialisation.
pub fn random_downs(unet: &UNet, recipe: &Recipe) -> Result<Downs> {
    let networks = Networks { unet: unet.clone(), text: None };
    let sites = super::targets::sites(&networks, recipe.targets, recipe.rank)?;
    super::targets::random_downs(&sites, recipe.rank, recipe.seed)
}

/// Trains a LoRA for each of the K people of `lessons`, with frozen `downs`. `tick` is called after each step.
pub fn train(
    base: Frozen,
    downs: &Downs,
    lessons: &Lessons,
    recipe: &Recipe,
    tick: impl FnMut(f64) -> Result<()>,
) -> Result<Vec<Lora>> {
    let class = Class::new(base, downs, lessons, recipe)?;
    let learnt = class.learn(&class.vars(), recipe, tick)?;
    class
        .students
        .iter()
        .enumerate()
        .map(|(person, student)| {
            let own = under(&learnt, &format!("{person}/"));
            Ok(student.at(&own).changes()?.into_lora()?)
        })
        .collect()
}

/// Learns the basis itself: `downs` trained together with the `up`s of all K people, then orthonormalised in
/// direction and brought back to the scale of the start; on the CPU.
pub fn learn_downs(
    base: Frozen,
    downs: &Downs,
    lessons: &Lessons,
    recipe: &Recipe,
    tick: impl FnMut(f64) -> Result<()>,
) -> Result<Downs> {
    let shared: BTreeMap<String, Var> = downs
        .iter()
        .map(|(path, down)| Ok((path.clone(), Var::from_tensor(&down.to_device(lessons.latents.device())?)?)))
        .collect::<Result<_>>()?;
    let tracked = shared.iter().map(|(path, var)| (path.clone(), var.as_tensor().clone())).collect();
    let class = Class::new(base, &tracked, lessons, recipe)?;
    let mut vars = class.vars();
    vars.extend(shared.into_iter().map(|(path, var)| (format!("down.{path}"), var)));
    let learnt = class.learn(&vars, recipe, tick)?;
    under(&learnt, "down.").iter().map(|(path, down)| Ok((path.clone(), orthogonal_rows(down)?))).collect()
}

/// The entries whose name starts with `prefix`, without it.
fn under(values: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let own =
        |(name, value): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_string(), value.clone()));
    values.iter().filter_map(own).collect()
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
    Ok(Tensor::from_vec(rows.concat(), shape, &Device::Cpu)?)
}

/// K people who learn in step.
struct Class<'a> {
    networks: Networks,
    schedule: &'a NoiseSchedule,
    lessons: &'a Lessons,
    students: Vec<Student>,
}

impl<'a> Class<'a> {
    fn new(base: Frozen<'a>, downs: &Downs, lessons: &'a Lessons, recipe: &Recipe) -> Result<Self> {
        let networks = Networks { unet: base.unet.clone(), text: None };
        let sites = super::targets::sites(&networks, recipe.targets, recipe.rank)?;
        ensure!(
            sites
                .iter()
                .all(|site| downs.get(&site.path).is_some_and(|down| down.dim(0).ok() == Some(recipe.rank))),
            "the basis is of other layers or another rank than the recipe's; take another --out"
        );
        let people = lessons.latents.dim(0)?;
        // Once for all people, so that they share them there too.
        let near = |(path, down): (&String, &Tensor)| -> Result<_> {
            Ok((path.clone(), down.to_device(lessons.latents.device())?))
        };
        let downs: Downs = downs.iter().map(near).collect::<Result<_>>()?;
        let students =
            (0..people).map(|_| Student::new(&sites, &downs, recipe.alpha)).collect::<Result<_>>()?;
        Ok(Self { networks, schedule: base.schedule, lessons, students })
    }

    /// The variables of all, as `PERSON/up.PATH`.
    fn vars(&self) -> BTreeMap<String, Var> {
        let mut all = BTreeMap::new();
        for (person, student) in self.students.iter().enumerate() {
            all.extend(student.vars().iter().map(|(name, var)| (format!("{person}/{name}"), var.clone())));
        }
        all
    }

    /// Runs the recipe; gives the variables' means over the last part of the run.
    fn learn(
        &self,
        vars: &BTreeMap<String, Var>,
        recipe: &Recipe,
        mut tick: impl FnMut(f64) -> Result<()>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let options = AdamWOptions { betas: [0.9, 0.99], weight_decay: 0.0, clip: 0.0, ..Default::default() };
        let mut optimiser = AdamW::new(vars.clone(), options)?;
        // A learnt basis turns slowly under the `up`s that are made for it.
        optimiser.scale_rate("down.", 0.1);
        let first_averaged =
            recipe.steps - (recipe.steps as f64 * recipe.average_last.clamp(0.0, 1.0)) as u64;
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        let mut averaged = 0;
        for step in 0..recipe.steps {
            let loss = self.loss(recipe, step)?;
            let mut store = loss.backward()?;
            let gradients: Gradients =
                vars.iter().filter_map(|(name, var)| Some((name.clone(), store.remove(var)?))).collect();
            optimiser.step(&gradients, recipe.rate.learning_rate(step, recipe.steps))?;
            if step >= first_averaged || step + 1 == recipe.steps {
                averaged += 1;
                for (name, var) in vars {
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

    /// Sum over the people of the mean squared error of each, with what is random drawn from the step alone.
    fn loss(&self, recipe: &Recipe, step: u64) -> Result<Tensor> {
        let Lessons { latents, captions, size } = self.lessons;
        let (_, images, c, h, w) = latents.dims5()?;
        let device = latents.device();
        let batch = recipe.batch;
        let chosen = super::data_order::in_turn(recipe.seed, step, batch, images);
        let chosen: Vec<u32> = chosen.into_iter().map(|image| image as u32).collect();
        let index = Tensor::from_vec(chosen, batch, device)?;
        let mut rng = noise::generator(recipe.seed, step);
        let timesteps = Timesteps::Stratified.draw(batch, self.schedule.alphas_bar.len(), &mut rng);
        let eps = super::data_order::eps(recipe.seed, step, [batch, c, h, w], 0.0, device)?;
        let words = Words::Encoded(TextConditioning {
            context: captions.context.index_select(&index, 0)?,
            pooled: captions.pooled.index_select(&index, 0)?,
        });
        let batch_of = |person: usize| -> Result<Batch> {
            Ok(Batch {
                x0: latents.i(person)?.index_select(&index, 0)?,
                eps: eps.clone(),
                timesteps: timesteps.clone(),
                words: words.clone(),
                time_ids: time_ids(batch, *size, *size, device)?,
                class_images: 0,
                scale: 1.0,
            })
        };
        let batches = (0..self.students.len()).map(batch_of).collect::<Result<Vec<_>>>()?;
        let mut networks = self.networks.clone();
        networks.attach(&self.students.iter().collect::<Vec<_>>())?;
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
