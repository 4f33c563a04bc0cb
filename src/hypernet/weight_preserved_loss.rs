//! The loss of the LoRA autoencoder: reconstruction and the weight-preserved loss L_WP of DiffLoRA
//! (arXiv 2408.06740), which weighs each error by the size of the weight.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::layers::reconstruction_errors;

/// The parts of the training loss, each a scalar.
#[derive(Clone, Debug)]
pub struct LaeLoss {
    /// reconstruction + λ · weight_preserved
    pub total: Tensor,
    /// mean((x − x̂)²), or mean(|x − x̂|)
    pub reconstruction: Tensor,
    /// L_WP = mean(|x|·|x − x̂|)
    pub weight_preserved: Tensor,
}

/// Distance of the reconstruction term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    /// Squares.
    #[default]
    Mse,
    /// Absolute values.
    L1,
}

/// The loss between a batch `x` (B, P) and its reconstruction `x_hat`.
///
/// Apart from [`Lae::loss`] for a training loop that adds noise to the latents in between.
pub fn loss(x: &Tensor, x_hat: &Tensor, distance: Distance, lambda: f64) -> candle_core::Result<LaeLoss> {
    let errors = reconstruction_errors(x, x_hat, distance == Distance::Mse)?;
    let (reconstruction, weight_preserved) = (errors.get(0)?, errors.get(1)?);
    let total = (&reconstruction + (&weight_preserved * lambda)?)?;
    Ok(LaeLoss { total, reconstruction, weight_preserved })
}
