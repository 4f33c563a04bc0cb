//! The weights with the lowest validation error so far, stored beside the checkpoint so that a resumed run keeps them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::progress;
use crate::recipes::dit::config::Validation;
use crate::train::checkpoint;
use crate::train::ema::Ema;
use crate::train::log::Log;
use crate::train::trainer::{self, RunOptions};

/// Validates the averaged weights periodically and keeps the best. Does nothing without a [`Validation`].
pub struct BestCheckpoint<'a> {
    validation: Option<&'a Validation>,
    settings: &'a Value,
    /// `NAME.best.safetensors`
    path: PathBuf,
    log: Option<Log>,
    /// Step and error of the weights in the file.
    best: Option<(u64, f64)>,
}

impl<'a> BestCheckpoint<'a> {
    /// With `--resume`, continues from the stored weights.
    pub fn open(
        validation: Option<&'a Validation>,
        run_options: &RunOptions,
        settings: &'a Value,
    ) -> Result<Self> {
        let path = run_options.folder.join(format!("{}.best.safetensors", run_options.name));
        let mut best = None;
        let mut log = None;
        if validation.is_some() {
            if run_options.resume && path.exists() {
                let saved = checkpoint::load(&path, settings)?;
                let error = saved.part("validation").remove("error").context("no error in it")?;
                best = Some((saved.step, error.to_scalar::<f64>()?));
            }
            // Steps after the checkpoint are repeated and write the same lines again.
            let after = best.map_or(0, |(step, _)| step);
            log = Some(Log::open(
                &run_options.folder.join(format!("{}.validation.jsonl", run_options.name)),
                after,
            )?);
        }
        Ok(Self { validation, settings, path, log, best })
    }

    /// Called after each step: validates every [`Validation::every`] steps, and breaks when patience is exhausted.
    pub fn validate(
        &mut self,
        step: u64,
        ema: &Ema,
        error: impl FnOnce() -> Result<f64>,
    ) -> Result<ControlFlow<()>> {
        let Some(validation) = self.validation.filter(|validation| step.is_multiple_of(validation.every))
        else {
            return Ok(ControlFlow::Continue(()));
        };
        let error = error()?;
        if let Some(log) = &mut self.log {
            log.write(step, &[("error", error)]);
        }
        if self.best.is_none_or(|(_, least)| error < least) {
            let figure = BTreeMap::from([("error".to_string(), Tensor::new(error, &Device::Cpu)?)]);
            let parts = [("average", ema.averages().clone()), ("validation", figure)];
            match checkpoint::save(&self.path, step, self.settings, &parts) {
                Ok(()) => self.best = Some((step, error)),
                // The best one so far is kept.
                written => trainer::optional(written),
            }
        }
        let since = self.best.map_or(0, |(best, _)| step.saturating_sub(best)) / validation.every;
        let enough = validation.patience > 0 && since >= validation.patience;
        Ok(if enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// The best averages; `None` before the first validation.
    pub fn averages(&self) -> Result<Option<BTreeMap<String, Tensor>>> {
        let Some((step, error)) = self.best else { return Ok(None) };
        progress::note(format_args!("keeping the weights of step {step}, with validation error {error:.4}"));
        let saved = checkpoint::load(&self.path, self.settings)?;
        Ok(Some(saved.part("average").into_iter().collect()))
    }
}
