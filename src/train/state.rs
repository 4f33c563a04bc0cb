//! The state of a run: weights, the optimiser's moments, their moving average and the number of steps.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use serde::Serialize;

use crate::train::adamw::{AdamW, AdamWOptions};
use crate::train::checkpoint;
use crate::train::ema::Ema;
use crate::train::gradients::Gradients;

/// The figure that counts the optimiser's steps where some were left out.
const UPDATES: &str = "updates";

/// Mutable state of a run: weights, their moments and averages, and the number of steps.
pub struct State {
    vars: BTreeMap<String, Var>,
    optimiser: AdamW,
    pub(super) ema: Option<Ema>,
    /// Figures that a run keeps beside them, by name.
    pub figures: BTreeMap<String, f64>,
    /// Steps made.
    pub step: u64,
}

impl State {
    /// At the present values of `vars`; `ema` is the decay of their average, where one is kept.
    pub fn new(vars: BTreeMap<String, Var>, options: AdamWOptions, ema: Option<f64>) -> Result<Self> {
        let optimiser = AdamW::new(vars.clone(), options)?;
        let ema = ema.map(|decay| Ema::new(vars.clone(), decay)).transpose()?;
        Ok(Self { vars, optimiser, ema, figures: BTreeMap::new(), step: 0 })
    }

    /// The optimiser, to set rates of its own for some variables.
    pub fn optimiser(&mut self) -> &mut AdamW {
        &mut self.optimiser
    }

    /// The variables that train.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// Makes one step; gives the norm of the gradient before clipping.
    ///
    /// # Errors
    /// A gradient that is not finite: nothing is changed then.
    pub fn update(&mut self, gradients: &Gradients, rate: f64) -> Result<f64> {
        let norm = self.optimiser.step(gradients, rate)?;
        self.step += 1;
        if let Some(ema) = &mut self.ema {
            ema.follow(self.step)?;
        }
        Ok(norm)
    }

    /// Counts a step in which nothing was changed.
    pub fn skip(&mut self) {
        self.step += 1;
    }

    /// The averages of the variables, or their values where no average is kept.
    pub fn result(&self) -> BTreeMap<String, Tensor> {
        match &self.ema {
            Some(ema) => ema.averages().clone(),
            None => self.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect(),
        }
    }

    /// Writes it all to `path`; what was there stays until the new file is whole.
    pub fn save<S: Serialize>(&self, path: &Path, settings: &S) -> Result<()> {
        checkpoint::save(path, self.step, settings, &self.parts()?)
    }

    /// The groups of tensors that stand for it in a checkpoint.
    fn parts(&self) -> Result<Vec<(&'static str, BTreeMap<String, Tensor>)>> {
        let weights = self.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let mut parts = vec![("weights", weights), ("moments", self.optimiser.moments())];
        parts.extend(self.ema.iter().map(|ema| ("average", ema.averages().clone())));
        let mut figures = self.figures.clone();
        if self.optimiser.steps() != self.step {
            figures.insert(UPDATES.into(), self.optimiser.steps() as f64);
        }
        if !figures.is_empty() {
            let figure = |(name, value)| Ok((name, Tensor::new(&[value], &candle_core::Device::Cpu)?));
            parts.push(("figures", figures.into_iter().map(figure).collect::<Result<_>>()?));
        }
        Ok(parts)
    }

    /// Goes back to the state that [`State::save`] wrote with the same settings.
    ///
    /// # Errors
    /// See [`checkpoint::load`]; a variable that is missing.
    pub fn load<S: Serialize>(&mut self, path: &Path, settings: &S) -> Result<()> {
        let saved = checkpoint::load(path, settings)?;
        set(&self.vars, &saved.part("weights"))?;
        for (name, value) in saved.part("figures") {
            self.figures.insert(name, value.to_vec1::<f64>()?.into_iter().sum());
        }
        let updates = self.figures.remove(UPDATES).map_or(saved.step, |updates| updates as u64);
        self.optimiser.set_moments(&saved.part("moments"), updates)?;
        if let Some(ema) = &mut self.ema {
            ema.set(&saved.part("average"))?;
        }
        self.step = saved.step;
        Ok(())
    }

    pub(super) fn into_ema(self) -> Result<Ema> {
        self.ema.context("this run keeps an average")
    }
}

fn set(vars: &BTreeMap<String, Var>, values: &std::collections::HashMap<String, Tensor>) -> Result<()> {
    for (name, var) in vars {
        let value =
            values.get(name).with_context(|| format!("weight `{name}` is missing in the checkpoint"))?;
        var.set(&value.to_device(var.device())?)?;
    }
    Ok(())
}
