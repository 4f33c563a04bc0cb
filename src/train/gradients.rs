//! Results of a training step: a loss, figures for the log, and gradients.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};

/// Gradients by the name of their variable.
pub type Gradients = BTreeMap<String, Tensor>;

/// Result of one shard.
pub struct Loss {
    /// Mean over the samples of the shard, a scalar with its graph.
    pub value: Tensor,
    /// Figures for the log, likewise means.
    pub parts: Vec<(&'static str, Figure)>,
}

/// A figure for the log.
pub enum Figure {
    /// A number.
    Known(f64),
    /// A scalar that may still be computed, by a GPU: it is read when the backward pass is queued, since the GPU would
    /// have nothing to do while it is waited for.
    Queued(Tensor),
}

impl Figure {
    /// Its value, waited for.
    pub fn read(&self) -> Result<f64> {
        match self {
            Self::Known(value) => Ok(*value),
            Self::Queued(value) => Ok(f64::from(value.to_dtype(DType::F32)?.to_scalar::<f32>()?)),
        }
    }
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        Self::Known(value)
    }
}

impl From<&Tensor> for Figure {
    fn from(scalar: &Tensor) -> Self {
        Self::Queued(scalar.detach())
    }
}

impl From<Tensor> for Loss {
    fn from(value: Tensor) -> Self {
        Self { value, parts: Vec::new() }
    }
}

/// Means over the shards.
pub struct Sum {
    /// The loss.
    pub loss: f64,
    /// The figures of [`Loss::parts`].
    pub parts: Vec<(&'static str, f64)>,
    /// Of every variable that the loss depends on.
    pub gradients: Gradients,
}
