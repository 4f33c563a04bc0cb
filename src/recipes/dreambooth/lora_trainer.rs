//! One person's LoRA in training: what it learns from, where it stands, and when it stops.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::diffusion::noise;
use crate::progress;
use crate::recipes::dreambooth::config::{LossScale, ScaleRule, Settings};
use crate::recipes::dreambooth::data_order;
use crate::recipes::dreambooth::image_dataset::{self, ImageDataset, Scaling};
use crate::recipes::dreambooth::lockstep::{SharedDown, TargetModule, TrainableLora};
use crate::recipes::dreambooth::loss::{Batch, Captions};
use crate::sdxl::text::TextConditioning;
use crate::train::gradients::Gradients;
use crate::train::log::Log;
use crate::train::state::State;

/// What the batches of all people of a run share.
#[derive(Clone, Copy)]
pub struct SharedData<'a> {
    /// Training settings.
    pub settings: &'a Settings,
    /// Class images for prior preservation.
    pub class: Option<&'a ImageDataset>,
    /// Scale of the latents.
    pub scaling: &'a Scaling,
    /// Number of noise levels.
    pub timesteps: usize,
    /// Where batches are made.
    pub device: &'a Device,
}

/// A LoRA to train.
pub struct Job {
    /// Name in warnings and logs.
    pub name: String,
    /// Folder of the images.
    pub images: PathBuf,
    /// The LoRA to write.
    pub out: PathBuf,
    /// State, log and samples.
    pub folder: PathBuf,
}

impl Job {
    /// For the person whose images lie in the folder `images`, named after it; state and samples go beside `out`.
    pub fn new(images: &Path, out: PathBuf) -> Self {
        Self {
            name: images.file_name().map_or("images".into(), |name| name.to_string_lossy().into()),
            images: images.to_path_buf(),
            folder: out.with_extension("training"),
            out,
        }
    }

    /// One for each folder of images in `people`, to `PERSON.safetensors` in the folder `out`.
    ///
    /// # Errors
    /// [`crate::failure::Failure::Unusable`] where there is no folder.
    pub fn of_people(people: &Path, out: &Path) -> Result<Vec<Self>> {
        let job = |images: &PathBuf| {
            let mut name = images.file_name().unwrap_or_default().to_os_string();
            name.push(".safetensors");
            Self::new(images, out.join(name))
        };
        Ok(image_dataset::people_in(people)?.iter().map(job).collect())
    }
}

/// What all LoRAs of a run start from.
pub struct SharedStart<'a> {
    /// Layers that are adapted.
    pub modules: &'a [TargetModule],
    /// Initial `down` of each.
    pub downs: &'a SharedDown,
    /// Norm of the weights of these layers.
    pub weight_norm: f64,
    /// Training settings.
    pub settings: &'a Settings,
    /// Continue from a checkpoint where there is one.
    pub resume: bool,
    /// Whether the base computes in f16.
    pub half: bool,
}

/// One person in training.
pub struct LoraTrainer {
    /// As warnings and logs call the person.
    pub name: String,
    /// The LoRA to write.
    pub out: PathBuf,
    /// State, log and samples.
    pub folder: PathBuf,
    /// The person's images.
    pub dataset: ImageDataset,
    /// The adapters.
    pub lora: TrainableLora,
    state: State,
    /// Settings that must be equal to resume from a checkpoint.
    stamp: Value,
    log: Log,
    health: Health,
    scaled: Option<ScaleRule>,
    /// Length of the weights beside which it trains.
    weight_norm: f64,
    /// Steps from the first to the last.
    pub steps: u64,
}

/// A LoRA so many times as heavy as the weights that it changes has destroyed them: usual ones stay below 1.
const TOO_HEAVY: f64 = 3.0;

/// Steps between looks at the LoRA's weight.
const WEIGH: u64 = 10;

/// Steps between lines of the log.
const REPORT: u64 = 20;

/// The figure under which a checkpoint keeps the factor on the loss, and the steps since it last changed.
const SCALE: &str = "loss_scale";
const GOOD_STEPS: &str = "good_steps";

/// Figures of the sums since the last line of the log: loss, norm of the gradient, steps.
const RECENT: [&str; 3] = ["recent.loss", "recent.gradient_norm", "recent.count"];

impl LoraTrainer {
    /// At the start, or with `resume` where the checkpoint in `folder` is.
    ///
    /// # Errors
    /// A checkpoint that was made with another `stamp`.
    pub fn new(job: Job, dataset: ImageDataset, stamp: Value, shared: &SharedStart) -> Result<Self> {
        let SharedStart { modules, downs, weight_norm, settings, resume, half } = *shared;
        let Job { name, out, folder, .. } = job;
        let mut lora = TrainableLora::new(modules, downs, settings.alpha())?;
        if !settings.lora.freeze_a {
            lora.train_shared_down()?;
        }
        let ema = (settings.training.ema > 0.0).then_some(settings.training.ema);
        let mut state = State::new(lora.vars().clone(), settings.optimiser(), ema)?;
        let slower = settings.training.text_encoder_lr / settings.training.lr;
        for prefix in ["up.text_encoder", "down.text_encoder"] {
            state.optimiser().scale_rate(prefix, slower);
        }
        let scaled = match settings.training.loss_scale {
            LossScale::Static(factor) => {
                state.figures.insert(SCALE.into(), factor);
                Some(ScaleRule::None)
            }
            LossScale::Rule(ScaleRule::Dynamic) if half => {
                state.figures.insert(SCALE.into(), 65536.0);
                state.figures.insert(GOOD_STEPS.into(), 0.0);
                Some(ScaleRule::Dynamic)
            }
            LossScale::Rule(_) => None,
        };
        let checkpoint = folder.join(CHECKPOINT);
        if resume && checkpoint.exists() {
            state.load(&checkpoint, &stamp)?;
        }
        let log = Log::open(&folder.join("lora.jsonl"), state.step)?;
        let health = Health::default();
        let steps = settings.steps(dataset.len());
        Ok(Self { name, out, folder, dataset, lora, state, stamp, log, health, scaled, weight_norm, steps })
    }

    /// Steps made.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// Whether all steps are made.
    pub fn is_done(&self) -> bool {
        self.state.step >= self.steps
    }

    /// The mean loss of the last steps.
    pub fn loss(&self) -> f64 {
        self.health.recent()
    }

    /// Samples of part `part` of the next step, class images included.
    pub fn batch(&self, shared: &SharedData, part: u64) -> Result<Batch> {
        let SharedData { settings, class, scaling, timesteps, device } = *shared;
        let (seed, training) = (settings.seed, &settings.training);
        let pass = self.state.step * training.accumulate + part;
        let chosen = self.dataset.choose(pass, training.batch);
        let (mut x0, mut time_ids) = self.dataset.latents(&chosen, pass, scaling)?;
        let mut captions = self.dataset.captions(&chosen, pass)?;
        let mut class_images = 0;
        if let Some(class) = class {
            let chosen = class.choose(pass, training.batch);
            let (latents, sizes) = class.latents(&chosen, pass, scaling)?;
            x0 = Tensor::cat(&[&x0, &latents], 0)?;
            time_ids = Tensor::cat(&[&time_ids, &sizes], 0)?;
            captions = joined(captions, class.captions(&chosen, pass)?)?;
            class_images = chosen.len();
        }
        let (n, c, h, w) = x0.dims4()?;
        let objective = &settings.objective;
        let mut rng = noise::generator(seed, pass);
        // The class images' timesteps are drawn behind the person's, so that these stay what they are without them.
        let mut t = objective.timesteps.draw(n - class_images, timesteps, &mut rng);
        t.extend(objective.timesteps.draw(class_images, timesteps, &mut rng));
        Ok(Batch {
            x0,
            eps: data_order::eps(seed, pass, [n, c, h, w], objective.noise_offset, device)?,
            timesteps: t,
            captions,
            time_ids,
            class_images,
            scale: self.scale(),
        })
    }

    fn scale(&self) -> f64 {
        self.state.figures.get(SCALE).copied().unwrap_or(1.0)
    }

    /// Makes a step with the gradients of the scaled loss.
    ///
    /// # Errors
    /// A loss or a gradient that is not finite, a loss that runs away, a LoRA that grows beyond measure: the last
    /// checkpoint is left alone then.
    pub fn apply(&mut self, mut gradients: Gradients, loss: f64, settings: &Settings) -> Result<()> {
        let scale = self.scale();
        if scale != 1.0 {
            for gradient in gradients.values_mut() {
                *gradient = (gradient.to_dtype(DType::F32)? / scale)?;
            }
        }
        let rate = settings.rate().learning_rate(self.state.step, self.steps);
        if !loss.is_finite() {
            return self.stop("the loss is NaN or infinite", settings);
        }
        let norm = crate::train::adamw::norm(&gradients)?;
        if !norm.is_finite() {
            if self.scaled != Some(ScaleRule::Dynamic) || scale <= 1.0 {
                return self.stop("the gradient is NaN or infinite", settings);
            }
            self.state.skip();
            self.state.figures.insert(SCALE.into(), scale / 2.0);
            self.state.figures.insert(GOOD_STEPS.into(), 0.0);
            return Ok(());
        }
        if let Some(start) = self.health.runs_away(loss) {
            let recent = self.health.recent();
            return self.stop(&format!("the loss grew from {start:.3} to {recent:.3}"), settings);
        }
        self.state.update(&gradients, rate)?;
        if self.scaled == Some(ScaleRule::Dynamic)
            && let Some(good) = self.state.figures.get_mut(GOOD_STEPS)
        {
            *good += 1.0;
            if *good >= 2000.0 {
                *good = 0.0;
                self.state.figures.insert(SCALE.into(), scale * 2.0);
            }
        }
        let step = self.state.step;
        let recent = [loss, norm, 1.0];
        for (name, value) in RECENT.iter().zip(recent) {
            *self.state.figures.entry((*name).into()).or_default() += value;
        }
        if step.is_multiple_of(REPORT) || step == self.steps {
            let [loss, norm, count] = RECENT.map(|name| self.state.figures.remove(name).unwrap_or(f64::NAN));
            let figures = [("rate", rate), ("loss", loss / count), ("gradient_norm", norm / count)];
            self.log.write(step, &figures);
        }
        let keep = step.is_multiple_of(settings.training.checkpoint_every);
        if keep || step.is_multiple_of(WEIGH) {
            let times = self.lora.delta_norm()? / self.weight_norm;
            if !times.is_finite() || times > TOO_HEAVY {
                return self.stop(&format!("the LoRA has grown to {times:.1} times the weights"), settings);
            }
        }
        if keep && self.health.is_good() {
            // A full disk is no reason to lose the run: the old checkpoint is whole, and the next may fit.
            if let Err(error) = self.save() {
                progress::warn(format_args!("{}: {error:#}; the checkpoint before it is kept", self.name));
            }
        }
        Ok(())
    }

    fn stop(&self, what: &str, settings: &Settings) -> Result<()> {
        let kept = match self.folder.join(CHECKPOINT) {
            path if path.exists() => format!("the last good state is kept in `{}`", path.display()),
            _ => "there is no checkpoint yet".to_string(),
        };
        bail!(
            "{}: {what} after {} steps; the learning rate {:e} may be too high, try a tenth of it{}; {kept}",
            self.name,
            self.state.step,
            settings.training.lr,
            if settings.training.clip == 0.0 { " or --clip 1" } else { "" }
        )
    }

    /// Writes the state; what was there stays until the new file is whole.
    pub fn save(&self) -> Result<()> {
        self.state.save(&self.folder.join(CHECKPOINT), &self.stamp)
    }

    /// The adapters as they would be written now: averages where they are kept.
    pub fn result(&self) -> TrainableLora {
        self.lora.at(&self.state.result())
    }
}

/// The file of a state, in a person's folder.
pub const CHECKPOINT: &str = "lora.checkpoint.safetensors";

/// Samples of the person and of the class as one.
fn joined(own: Captions, class: Captions) -> Result<Captions> {
    let cat = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 0);
    Ok(match (own, class) {
        (Captions::Encoded(a), Captions::Encoded(b)) => Captions::Encoded(TextConditioning {
            context: cat(&a.context, &b.context)?,
            pooled: cat(&a.pooled, &b.pooled)?,
        }),
        (Captions::Tokens(a, a_2), Captions::Tokens(b, b_2)) => {
            Captions::Tokens(cat(&a, &b)?, cat(&a_2, &b_2)?)
        }
        _ => bail!("captions of person and class are encoded in two ways"),
    })
}

/// Whether the loss runs away.
#[derive(Default)]
struct Health {
    first: Vec<f64>,
    last: VecDeque<f64>,
}

impl Health {
    /// Steps whose mean is looked at: the loss of a single one says little, timesteps differ too much.
    const WINDOW: usize = 10;

    /// Times the loss of the start, or of an answer of zeros, 1, whichever is more.
    const TOO_MUCH: f64 = 4.0;

    /// Takes a loss; gives the mean at the start when the mean now is too much more.
    fn runs_away(&mut self, loss: f64) -> Option<f64> {
        if self.first.len() < Self::WINDOW {
            self.first.push(loss);
        }
        self.last.push_back(loss);
        if self.last.len() > Self::WINDOW {
            self.last.pop_front();
        }
        let start = self.start();
        let full = self.last.len() == Self::WINDOW;
        (full && self.recent() > Self::TOO_MUCH * start.max(1.0)).then_some(start)
    }

    /// Whether a state is worth run_options: the loss is not on its way up already.
    fn is_good(&self) -> bool {
        self.recent() <= Self::TOO_MUCH / 2.0 * self.start().max(1.0)
    }

    fn start(&self) -> f64 {
        self.first.iter().sum::<f64>() / self.first.len().max(1) as f64
    }

    fn recent(&self) -> f64 {
        self.last.iter().sum::<f64>() / self.last.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_grows_is_noticed_and_one_that_jumps_is_not() {
        let mut health = Health::default();
        for i in 0..200 {
            // Single steps of high loss are usual.
            assert!(health.runs_away(if i % 7 == 0 { 3.0 } else { 0.2 }).is_none() && health.is_good());
        }
        let grows = (0..60).map(|i| 0.2 * 1.2f64.powi(i));
        let at = grows.take_while(|loss| health.runs_away(*loss).is_none()).count();
        assert!((15..40).contains(&at) && !health.is_good(), "{at}");
    }
}
