//! Latents → a rough image, one pixel each, without the VAE.
//!
//! A linear map from a latent pixel to a colour, fitted to the model's own VAE when drawing begins, so that it needs
//! no constants and works with any number of channels.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use super::vae::Vae;
use crate::diffusion::noise;
use crate::image::Image;
use crate::layers::compute_dtype;

/// The map: colour = z·slope + offset.
#[derive(Clone, Debug)]
pub struct LatentColours {
    /// (C, 3)
    slope: Tensor,
    /// (3)
    offset: Tensor,
}

/// Blocks along a side of the pattern to which the map is fitted, and latent pixels along the side of a block.
const BLOCKS: usize = 8;
const BLOCK: usize = 2;

impl LatentColours {
    /// Fits the map by least squares to what the VAE decodes from blocks of random latents.
    pub fn fit(vae: &Vae, device: &Device) -> Result<Self> {
        let (c, factor) = (vae.config().latent_channels, vae.config().factor());
        let (side, grid) = (BLOCKS * BLOCK, (1, c, BLOCKS, 1, BLOCKS, 1));
        let blocks = noise::normal(0, 0, grid, &Device::Cpu)?;
        let z = blocks.broadcast_as((1, c, BLOCKS, BLOCK, BLOCKS, BLOCK))?.reshape((1, c, side, side))?;
        let input = vae.from_latents(&z.to_device(device)?)?.to_dtype(compute_dtype(vae.dtype(), device))?;
        let colours = vae.decode(&input)?.to_dtype(DType::F32)?.avg_pool2d(factor)?;
        let rows = |x: &Tensor| -> Result<Vec<Vec<f32>>> {
            Ok(x.squeeze(0)?.flatten_from(1)?.t()?.to_device(&Device::Cpu)?.to_vec2()?)
        };
        let weights = least_squares(&rows(&z)?, &rows(&colours)?).context("no preview can be fitted")?;
        let (slope, offset) = weights.split_at(3 * c);
        Ok(Self {
            slope: Tensor::from_slice(slope, (c, 3), device)?,
            offset: Tensor::from_slice(offset, 3, device)?,
        })
    }

    /// An image of w×h pixels of `latents` (1, C, h, w).
    pub fn image(&self, latents: &Tensor) -> Result<Image> {
        let (_, c, h, w) = latents.dims4()?;
        let tokens = latents.reshape((c, h * w))?.t()?.contiguous()?; // (h·w, C)
        let colours = tokens.matmul(&self.slope)?.broadcast_add(&self.offset)?;
        Image::from_tensor(&colours.t()?.reshape((3, h, w))?)
    }
}

/// Weights (C + 1, 3), the last row for a constant, that take rows of `x` to rows of `y`: the normal equations by
/// elimination. `None` where `x` does not determine them.
fn least_squares(x: &[Vec<f32>], y: &[Vec<f32>]) -> Option<Vec<f32>> {
    let n = x.first()?.len() + 1;
    let mut system = vec![vec![0f64; n + 3]; n];
    for (x, y) in x.iter().zip(y) {
        let row: Vec<f64> = x.iter().copied().chain([1.0]).map(f64::from).collect();
        for (i, equation) in system.iter_mut().enumerate() {
            let values = row.iter().copied().chain(y.iter().copied().map(f64::from));
            equation.iter_mut().zip(values).for_each(|(sum, value)| *sum += row[i] * value);
        }
    }
    for i in 0..n {
        let largest = (i..n).max_by(|&a, &b| system[a][i].abs().total_cmp(&system[b][i].abs()))?;
        system.swap(i, largest);
        let pivot = system[i].clone();
        if !pivot[i].is_finite() || pivot[i].abs() < 1e-9 {
            return None;
        }
        for (j, equation) in system.iter_mut().enumerate() {
            let factor = equation[i] / pivot[i];
            if j != i {
                equation.iter_mut().zip(&pivot).for_each(|(value, pivot)| *value -= factor * pivot);
            }
        }
    }
    let solved = system.iter().enumerate();
    Some(
        solved
            .flat_map(|(i, equation)| (0..3).map(move |k| (equation[n + k] / equation[i]) as f32))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_map_is_found_again() {
        let x: Vec<Vec<f32>> = (0..20).map(|i| vec![(i % 5) as f32, (i * i % 7) as f32]).collect();
        let y: Vec<Vec<f32>> = x.iter().map(|x| vec![2.0 * x[0] - x[1] + 0.5, x[1], 3.0 - x[0]]).collect();
        let weights = least_squares(&x, &y).unwrap();
        let wanted = [2.0, 0.0, -1.0, -1.0, 1.0, 0.0, 0.5, 0.0, 3.0];
        for (ours, wanted) in weights.iter().zip(wanted) {
            assert!((ours - wanted).abs() < 1e-5, "{weights:?}");
        }
        assert!(least_squares(&x[..1], &y[..1]).is_none(), "one row does not determine three weights");
    }
}
