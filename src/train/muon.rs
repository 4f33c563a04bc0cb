//! Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon):
//!
//! ```text
//! m ← μ m + g      u = g + μ m      w ← w − η λ w − η · 0.2 √max(rows, columns) · NS(u)
//! ```
//!
//! NS makes the singular values of u about 1 by five Newton–Schulz steps X ← a X + (b A + c A²) X, A = X Xᵀ. The factor
//! gives updates the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both share η and λ.

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

/// Constants of Muon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MuonOptions {
    /// μ
    pub momentum: f64,
    /// Factor on the learning rate of AdamW.
    pub rate: f64,
    /// Variables with one of these in their name stay with AdamW, as all do that are no matrices or kernels.
    pub except: Vec<String>,
}

impl Default for MuonOptions {
    fn default() -> Self {
        let except = ["embedding", "conv_in", "conv_out"].map(String::from).to_vec();
        Self { momentum: 0.95, rate: 1.0, except }
    }
}

impl MuonOptions {
    /// Whether a variable of this name and shape is trained by Muon.
    pub fn takes(&self, name: &str, dims: &[usize]) -> bool {
        dims.len() > 1 && !self.except.iter().any(|part| name.contains(part.as_str()))
    }

    /// The momentum (same shape as `gradient`) after a gradient, and the direction to move against.
    pub fn direction(&self, momentum: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
        let momentum = ((momentum * self.momentum)? + gradient)?.detach();
        let nesterov = (gradient + (&momentum * self.momentum)?)?;
        let matrix = nesterov.flatten_from(1)?;
        let (rows, columns) = matrix.dims2()?;
        let size = 0.2 * (rows.max(columns) as f64).sqrt();
        let direction = (orthogonalise(&matrix)? * size)?.reshape(gradient.shape())?.detach();
        Ok((momentum, direction))
    }
}

/// `matrix` (R, C) with singular values of about 1: between 0.7 and 1.2, as five steps with these constants leave them.
fn orthogonalise(matrix: &Tensor) -> Result<Tensor> {
    const FACTORS: [f64; 3] = [3.4445, -4.7750, 2.0315];
    let (rows, columns) = matrix.dims2()?;
    let wide = rows <= columns;
    let matrix = if wide { matrix.contiguous()? } else { matrix.t()?.contiguous()? };
    let norm = matrix.sqr()?.sum_all()?.sqrt()?;
    let mut x = matrix.broadcast_div(&(norm + 1e-7)?)?;
    for _ in 0..5 {
        let a = x.matmul(&x.transpose(D::Minus2, D::Minus1)?.contiguous()?)?;
        let b = ((&a * FACTORS[1])? + (a.matmul(&a)? * FACTORS[2])?)?;
        x = ((&x * FACTORS[0])? + b.matmul(&x)?)?;
    }
    if wide { Ok(x) } else { x.t()?.contiguous() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{normal, rng};
    use candle_core::Device;

    #[test]
    fn directions_are_nearly_orthogonal_whatever_their_shape() {
        for shape in [vec![6, 20], vec![20, 6], vec![8, 3, 3, 3]] {
            let gradient = normal(&mut rng(1, 0), &shape.clone().into(), &Device::Cpu).unwrap();
            let options = MuonOptions::default();
            let (momentum, direction) =
                options.direction(&gradient.zeros_like().unwrap(), &gradient).unwrap();
            let apart = (&momentum - &gradient).unwrap().abs().unwrap().max_all().unwrap();
            assert!(apart.to_scalar::<f32>().unwrap() < 1e-6);
            assert_eq!(direction.dims(), shape);
            let matrix = direction.flatten_from(1).unwrap();
            let (rows, columns) = matrix.dims2().unwrap();
            let matrix = (matrix / (0.2 * (rows.max(columns) as f64).sqrt())).unwrap();
            // The squares of the singular values sum to about the rank.
            let sum = matrix.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let rank = rows.min(columns) as f32;
            assert!((0.5 * rank..1.45 * rank).contains(&sum), "{shape:?}: {sum} of {rank}");
        }
    }

    #[test]
    fn vectors_and_embeddings_stay_with_adamw() {
        let options = MuonOptions::default();
        assert!(options.takes("unet.mid_block.resnets.0.conv1.weight", &[8, 8, 3, 3]));
        assert!(!options.takes("unet.mid_block.resnets.0.conv1.bias", &[8]));
        assert!(!options.takes("text_encoder.token_embedding.weight", &[100, 8]));
    }
}
