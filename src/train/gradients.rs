//! Results of a training step: a loss, figures for the log, and gradients.

use std::collections::BTreeMap;

use candle_core::Tensor;

/// Gradients by the name of their variable.
pub type Gradients = BTreeMap<String, Tensor>;

/// Result of one shard.
pub struct Loss {
    /// Mean over the samples of the shard, a scalar with its graph.
    pub value: Tensor,
    /// Figures for the log, likewise means.
    pub parts: Vec<(&'static str, f64)>,
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
