//! The loop itself: gradients, a step, the average; now and then a line in the log and a checkpoint.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::Var;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::files::FolderLock;
use crate::progress;
use crate::train::adamw::AdamWOptions;
use crate::train::checkpoint;
use crate::train::distributed;
use crate::train::ema::Ema;
use crate::train::gradients::{Loss, Sum};
use crate::train::log::Log;
use crate::train::lr_schedule::Schedule;
use crate::train::shards;
use crate::train::state::State;

/// How a network is trained, whatever it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerConfig {
    /// Steps from the first to the last.
    pub steps: u64,
    /// Samples a step.
    pub batch: usize,
    /// Parts of a batch, each with a graph and a thread of its own; a part of the recipe, since sums depend on it.
    pub shards: usize,
    /// The learning rate.
    pub rate: Schedule,
    /// AdamW and clipping.
    #[serde(default)]
    pub optimiser: AdamWOptions,
    /// Decay of the average that is kept as the result.
    pub ema: f64,
}

impl TrainerConfig {
    /// Samples a shard.
    ///
    /// # Errors
    /// When the batch does not part evenly.
    pub fn samples_a_shard(&self) -> Result<usize> {
        anyhow::ensure!(
            self.shards > 0 && self.batch > 0 && self.batch.is_multiple_of(self.shards),
            "a batch of {} does not part into {} shards",
            self.batch,
            self.shards
        );
        Ok(self.batch / self.shards)
    }

    /// Whether this process will run several shards, one a thread.
    pub fn trains_in_shards(&self) -> bool {
        self.shards > distributed::world_size()
    }
}

/// Where a run keeps its state, and when it stops.
#[derive(Clone, Debug)]
pub struct RunOptions<'a> {
    /// `FOLDER/NAME.checkpoint.safetensors` and `FOLDER/NAME.jsonl`.
    pub folder: &'a Path,
    /// Names the files and the progress bar.
    pub name: &'static str,
    /// Go on from the checkpoint when there is one.
    pub resume: bool,
    /// Stop then, with a checkpoint.
    pub deadline: Option<Instant>,
    /// Seconds between checkpoints.
    pub save_every: Duration,
}

impl RunOptions<'_> {
    /// The file of the state.
    pub fn checkpoint(&self) -> PathBuf {
        self.folder.join(format!("{}.checkpoint.safetensors", self.name))
    }

    /// Makes the folder and locks it for this process; of a process group, the main one holds the lock.
    ///
    /// # Errors
    /// [`Failure::Usage`] when another process has it, or with `--resume` when there is none of `states`.
    pub fn begin(&self, states: &[PathBuf]) -> Result<Option<FolderLock>> {
        if self.resume {
            checkpoint::require_any(states)?;
        }
        distributed::is_main_process().then(|| FolderLock::acquire(self.folder)).transpose()
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are made.
    Finished,
    /// The deadline came first; `--resume` goes on.
    Paused {
        /// Steps made.
        step: u64,
    },
    /// `after` stopped [`run_until`]: more steps would not help.
    Stopped {
        /// Steps made.
        step: u64,
    },
}

/// Trains `vars` by `plan`: `loss(step, shard)` must draw what is random from its arguments alone. `after` is called
/// after each step (from 1) with the averages, for images along the way.
///
/// Ctrl-C saves the state and ends with [`crate::failure::Failure::Interrupted`].
pub fn run<S: Serialize>(
    plan: &TrainerConfig,
    settings: &S,
    run_options: &RunOptions,
    vars: &BTreeMap<String, Var>,
    loss: impl Fn(u64, usize) -> Result<Loss> + Sync,
    mut after: impl FnMut(u64, &Ema) -> Result<()>,
) -> Result<(Outcome, Ema)> {
    run_until(plan, settings, run_options, vars, loss, |step, ema| {
        after(step, ema)?;
        Ok(ControlFlow::Continue(()))
    })
}

/// The same, until `after` says that it is enough.
pub fn run_until<S: Serialize>(
    plan: &TrainerConfig,
    settings: &S,
    run_options: &RunOptions,
    vars: &BTreeMap<String, Var>,
    loss: impl Fn(u64, usize) -> Result<Loss> + Sync,
    mut after: impl FnMut(u64, &Ema) -> Result<ControlFlow<()>>,
) -> Result<(Outcome, Ema)> {
    plan.samples_a_shard()?;
    let mut state = State::new(vars.clone(), plan.optimiser.clone(), Some(plan.ema))?;
    let path = run_options.checkpoint();
    if run_options.resume && path.exists() {
        state.load(&path, settings)?;
    }

    let mut log = Log::open(&run_options.folder.join(format!("{}.jsonl", run_options.name)), state.step)?;
    let bar = progress::bar(plan.steps, run_options.name);
    bar.set_position(state.step);
    bar.reset_eta();
    let mut recent = Recent::of(&mut state.figures);
    let (start, first) = (Instant::now(), state.step);
    let mut saved_at = Instant::now();
    // Between two steps: a signal ends the run, and the deadline pauses it.
    let pause = |state: &State| -> Result<ControlFlow<Outcome>> {
        if progress::interrupted() {
            state.save(&path, settings)?;
            progress::check().map_err(|error| Failure::with_hint(error, &resume_hint(state.step)))?;
        }
        if run_options.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            state.save(&path, settings)?;
            return Ok(ControlFlow::Break(Outcome::Paused { step: state.step }));
        }
        Ok(ControlFlow::Continue(()))
    };
    let mut outcome = match state.step < plan.steps {
        true => pause(&state)?.break_value(),
        false => None,
    };
    if outcome.is_none() {
        let gradients = |step: u64| shards::gradients(vars, plan.shards, |shard| loss(step, shard));
        let rate = |step: u64| plan.rate.learning_rate(step, plan.steps);
        outcome = descend(&mut state, plan.steps, rate, gradients, |state, made| {
            let step = state.step;
            recent.add(made.loss, made.norm, &made.parts);
            bar.inc(1);
            if step % REPORT == 0 || step == plan.steps {
                let a_second = (step - first) as f64 / start.elapsed().as_secs_f64();
                let mut figures =
                    vec![("rate", made.rate), ("samples_a_second", a_second * plan.batch as f64)];
                figures.extend(recent.means());
                bar.set_message(format!("loss {:.4} {a_second:.2} it/s", recent.loss()));
                log.write(step, &figures);
                recent = Recent::default();
            }
            state.figures = recent.figures();
            if after(step, state.ema.as_ref().context("this run keeps an average")?)?.is_break() {
                state.save(&path, settings)?;
                return Ok(ControlFlow::Break(Outcome::Stopped { step }));
            }
            if saved_at.elapsed() >= run_options.save_every {
                keep_going(state.save(&path, settings));
                saved_at = Instant::now();
            }
            if step < plan.steps { pause(state) } else { Ok(ControlFlow::Continue(())) }
        })?;
    }
    if outcome.is_none() {
        keep_going(state.save(&path, settings));
    }
    bar.finish_and_clear();
    Ok((outcome.unwrap_or(Outcome::Finished), state.into_ema()?))
}

/// What one step came to.
pub struct StepReport {
    /// Learning rate.
    pub rate: f64,
    /// Loss before the step.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// Figures of [`Loss::parts`].
    pub parts: Vec<(&'static str, f64)>,
}

/// Gradient descent from the step of `state` up to `steps`, the core of every training of one set of variables:
/// `gradients(step)` and `rate(step)` count from 0; `after` is called after each update and may end the run early, with a
/// value that is returned.
///
/// # Errors
/// Those of the closures; a gradient that is not finite.
pub fn descend<B>(
    state: &mut State,
    steps: u64,
    rate: impl Fn(u64) -> f64,
    mut gradients: impl FnMut(u64) -> Result<Sum>,
    mut after: impl FnMut(&mut State, StepReport) -> Result<ControlFlow<B>>,
) -> Result<Option<B>> {
    while state.step < steps {
        let rate = rate(state.step);
        let Sum { loss, parts, gradients } = gradients(state.step)?;
        let norm = state.update(&gradients, rate)?;
        // A checkpoint needs their memory.
        drop(gradients);
        if let ControlFlow::Break(value) = after(state, StepReport { rate, loss, norm, parts })? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// How an interrupted training continues.
pub fn resume_hint(step: u64) -> String {
    format!("the state after step {step} is kept; the same command with --resume continues")
}

/// Warns of something that was not written along the way, on a full disk for example: the run matters more.
pub fn optional(written: Result<()>) {
    match written {
        // The loop sees the signal and saves the state.
        Err(error) if matches!(error.downcast_ref(), Some(Failure::Interrupted { .. })) => {}
        Err(error) => progress::warn(format_args!("{error:#}; training continues")),
        Ok(()) => {}
    }
}

/// Warns of a checkpoint that was not written: the one before it is whole, and the next may fit the disk.
fn keep_going(saved: Result<()>) {
    if let Err(error) = saved {
        progress::warn(format_args!("{error:#}; the checkpoint before it is kept"));
    }
}

/// Steps between lines of the log.
const REPORT: u64 = 20;

/// Sums since the last line of the log; a checkpoint keeps them, so that a resumed run writes the same lines.
#[derive(Default)]
struct Recent {
    count: f64,
    sums: BTreeMap<String, f64>,
}

/// Figures of a checkpoint that hold [`Recent`].
const RECENT: &str = "recent.";

impl Recent {
    /// Takes them out of the figures of a state.
    fn of(figures: &mut BTreeMap<String, f64>) -> Self {
        let mut recent = Self::default();
        figures.retain(|name, value| match name.strip_prefix(RECENT) {
            Some(name) => {
                recent.sums.insert(name.into(), *value);
                false
            }
            None => true,
        });
        recent.count = recent.sums.remove("count").unwrap_or(0.0);
        recent
    }

    fn figures(&self) -> BTreeMap<String, f64> {
        if self.count == 0.0 {
            return BTreeMap::new();
        }
        let sums = self.sums.iter().map(|(name, sum)| (format!("{RECENT}{name}"), *sum));
        sums.chain([(format!("{RECENT}count"), self.count)]).collect()
    }

    fn add(&mut self, loss: f64, norm: f64, parts: &[(&'static str, f64)]) {
        self.count += 1.0;
        for (name, value) in [("loss", loss), ("gradient_norm", norm)].iter().chain(parts) {
            *self.sums.entry((*name).into()).or_default() += value;
        }
    }

    fn loss(&self) -> f64 {
        self.sums.get("loss").map_or(f64::NAN, |sum| sum / self.count)
    }

    fn means(&self) -> Vec<(&str, f64)> {
        self.sums.iter().map(|(name, sum)| (name.as_str(), sum / self.count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::diffusion::noise;
    use crate::layers::linear;
    use crate::train::checkpoint;
    use crate::train::lr_schedule::Decay;
    use crate::weights::Trainable;

    fn plan() -> TrainerConfig {
        TrainerConfig {
            steps: 12,
            batch: 8,
            shards: 2,
            rate: Schedule { peak: 1e-2, warmup: 3, decay: Decay::Cosine, floor: 0.1 },
            optimiser: AdamWOptions::default(),
            ema: 0.9,
        }
    }

    /// Trains a linear map towards another; `kill_at` breaks off as a crash does. Gives weights and averages.
    fn train(folder: &Path, resume: bool, kill_at: Option<u64>) -> Option<(Vec<f32>, Vec<f32>)> {
        let trainable = Trainable::new(1);
        let weight = trainable.builder(&Device::Cpu).get((3, 5), "weight").unwrap();
        let truth = noise::normal(2, 0, (3, 5), &Device::Cpu).unwrap();
        let loss = |step: u64, shard: usize| {
            let x = noise::normal(3, 2 * step + shard as u64, (4, 5), &Device::Cpu)?;
            let error = (linear(&x, &weight, None)? - linear(&x, &truth, None)?)?;
            Ok(Loss::from(error.sqr()?.mean_all()?))
        };
        let run_options =
            RunOptions { folder, name: "test", resume, deadline: None, save_every: Duration::ZERO };
        let after = |step: u64, _: &Ema| match kill_at {
            Some(kill) if step == kill => anyhow::bail!("killed"),
            _ => Ok(()),
        };
        let (end, ema) = run(&plan(), &plan(), &run_options, &trainable.vars(), loss, after).ok()?;
        assert_eq!(end, Outcome::Finished);
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        Some((values(&weight), values(&ema.averages()["weight"])))
    }

    #[test]
    fn a_run_that_was_killed_and_goes_on_ends_in_the_same_bits() {
        let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let wanted = train(whole.path(), false, None).unwrap();
        assert!(train(broken.path(), false, Some(5)).is_none());
        assert!(train(broken.path(), true, Some(9)).is_none());
        assert_eq!(train(broken.path(), true, None).unwrap(), wanted);
    }

    #[test]
    fn other_settings_are_refused_with_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        assert!(train(folder.path(), false, Some(5)).is_none());
        let path = folder.path().join("test.checkpoint.safetensors");
        let other = TrainerConfig { batch: 16, ..plan() };
        let error = checkpoint::load(&path, &other).err().unwrap().to_string();
        assert!(error.contains("batch") && error.contains('8') && error.contains("16"), "{error}");
    }
}
