//! Exponential moving average of weights: e ← d·e + (1 − d)·w.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};

use crate::train::adamw::blend;

/// The average of named variables.
pub struct Ema {
    decay: f64,
    vars: BTreeMap<String, Var>,
    average: BTreeMap<String, Tensor>,
}

impl Ema {
    /// Starts at the present values of `vars`; `decay` is d after the first steps.
    pub fn new(vars: BTreeMap<String, Var>, decay: f64) -> Result<Self> {
        let average = copies(&vars)?;
        Ok(Self { decay, vars, average })
    }

    /// Follows the variables after step `step` (from 1), with d = min(decay, (1 + step) / (10 + step)), so that
    /// the random start is soon forgotten.
    pub fn follow(&mut self, step: u64) -> Result<()> {
        let decay = self.decay.min((1 + step) as f64 / (10 + step) as f64);
        for (average, var) in self.average.values_mut().zip(self.vars.values()) {
            blend(average, var.as_tensor(), decay, 1.0 - decay)?;
        }
        Ok(())
    }

    /// The averages by name; they change with the next [`Ema::follow`].
    pub fn averages(&self) -> &BTreeMap<String, Tensor> {
        &self.average
    }

    /// Runs `work` while the variables hold their averages, then puts the trained values back.
    pub fn averaged<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let trained = copies(&self.vars)?;
        let put = |values: &BTreeMap<String, Tensor>| -> Result<()> {
            for (name, var) in &self.vars {
                var.set(&values[name])?;
            }
            Ok(())
        };
        put(&self.average)?;
        let result = work();
        put(&trained)?;
        result
    }

    /// Takes up saved averages.
    ///
    /// # Errors
    /// A name that is missing or of another shape.
    pub fn set(&mut self, averages: &HashMap<String, Tensor>) -> Result<()> {
        for (name, average) in &mut self.average {
            let saved = averages.get(name).with_context(|| format!("average `{name}` is missing"))?;
            anyhow::ensure!(saved.shape() == average.shape(), "average `{name}` has another shape");
            *average = saved.to_device(average.device())?.copy()?;
        }
        Ok(())
    }
}

fn copies(vars: &BTreeMap<String, Var>) -> Result<BTreeMap<String, Tensor>> {
    vars.iter().map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach()))).collect()
}
