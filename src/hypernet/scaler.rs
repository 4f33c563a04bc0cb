//! Standardisation of what the networks see: LoRA vectors, face embeddings, image embeddings.
//!
//! x̂ = (x − mean) / scale with one scale for a whole block (a LoRA tensor, an embedding): dividing each element by its
//! own deviation would blow up the noise of elements that hardly differ between people. The mean is one for every
//! element, for a block, or none ([`Scaling`]).

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::row_source::RowSource;

/// Statistics that are subtracted and divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// The mean of each element, and one deviation a block: what all LoRAs share is gone.
    #[default]
    Element,
    /// One mean and one deviation a block (RPG).
    Block,
    /// No mean; one root mean square a block. L_WP then weighs weights as large as they are.
    Rms,
}

/// Mean of every element and one scale a block. Applied to rows (…, D).
#[derive(Clone, Debug)]
pub struct StandardScaler {
    /// (D)
    mean: Tensor,
    /// (D), equal within a block.
    scale: Tensor,
    /// Lengths of the blocks; their sum is D.
    blocks: Vec<usize>,
}

impl StandardScaler {
    /// The mean of each element of `rows` (M, D), and the deviation over each block of `blocks` elements.
    ///
    /// A block that never varies gets scale 1.
    pub fn fit(rows: &Tensor, blocks: &[usize]) -> Result<Self> {
        Self::of(rows, blocks, Scaling::Element)
    }

    /// The same from rows that are read a few at a time, once, with any [`Scaling`]. Sums are kept in f64, of
    /// differences from the first row, so that what all rows share does not eat the digits.
    pub fn of(rows: &dyn RowSource, blocks: &[usize], scaling: Scaling) -> Result<Self> {
        let (count, width) = (rows.count(), rows.width());
        ensure!(count > 0, "no rows to take statistics of");
        ensure!(
            blocks.iter().sum::<usize>() == width,
            "blocks of {} values for rows of {width}",
            blocks.iter().sum::<usize>()
        );
        let first = rows.batch(&[0])?.flatten_all()?.to_vec1::<f32>()?;
        let (mut sums, mut squares) = (vec![0f64; width], vec![0f64; width]);
        rows.each(&mut |_, batch| {
            for row in batch.to_vec2::<f32>()? {
                for (((sum, square), x), first) in sums.iter_mut().zip(&mut squares).zip(&row).zip(&first) {
                    let x = f64::from(*x) - f64::from(*first);
                    *sum += x;
                    *square += x * x;
                }
            }
            Ok(())
        })?;
        let count = count as f64;
        let mut mean = Vec::with_capacity(width);
        let mut scales = Vec::with_capacity(blocks.len());
        for block in blocks {
            let range = mean.len()..mean.len() + block;
            // Mean and variance of each element.
            let elements = sums[range.clone()].iter().zip(&squares[range.clone()]).zip(&first[range]);
            let elements: Vec<(f64, f64)> = elements
                .map(|((sum, square), first)| {
                    let shifted = sum / count;
                    (f64::from(*first) + shifted, (square / count - shifted * shifted).max(0.0))
                })
                .collect();
            let average =
                |of: &dyn Fn(&(f64, f64)) -> f64| elements.iter().map(of).sum::<f64>() / *block as f64;
            let centre = average(&|(mean, _)| *mean);
            let power = match scaling {
                Scaling::Element => average(&|(_, variance)| *variance),
                Scaling::Block => average(&|(mean, variance)| variance + (mean - centre).powi(2)),
                Scaling::Rms => average(&|(mean, variance)| variance + mean * mean),
            };
            mean.extend(elements.iter().map(|(mean, _)| match scaling {
                Scaling::Element => *mean as f32,
                Scaling::Block => centre as f32,
                Scaling::Rms => 0.0,
            }));
            scales.push(if power > 0.0 { power.sqrt() as f32 } else { 1.0 });
        }
        Self::new(Tensor::from_vec(mean, width, &Device::Cpu)?, &scales, blocks)
    }

    /// One scale for all elements of rows (M, D): for embeddings.
    pub fn fit_whole(rows: &Tensor) -> Result<Self> {
        Self::fit(rows, &[rows.dim(D::Minus1)?])
    }

    fn new(mean: Tensor, scales: &[f32], blocks: &[usize]) -> Result<Self> {
        let expanded: Vec<f32> = scales
            .iter()
            .zip(blocks)
            .flat_map(|(scale, block)| std::iter::repeat_n(*scale, *block))
            .collect();
        let scale = Tensor::from_vec(expanded, mean.dims1()?, mean.device())?;
        Ok(Self { mean, scale, blocks: blocks.to_vec() })
    }

    /// The same on `device`; [`StandardScaler::of`] gives it on the CPU.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        let (mean, scale) = (self.mean.to_device(device)?, self.scale.to_device(device)?);
        Ok(Self { mean, scale, blocks: self.blocks.clone() })
    }

    /// D.
    pub fn width(&self) -> usize {
        self.mean.elem_count()
    }

    /// (x − mean) / scale. `x` (…, D) → same.
    pub fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.broadcast_sub(&self.mean)?.broadcast_div(&self.scale)
    }

    /// x · scale + mean. `x` (…, D) → same.
    pub fn undo(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.broadcast_mul(&self.scale)?.broadcast_add(&self.mean)
    }

    /// The mean element (D): for LoRA vectors, the mean LoRA.
    pub fn mean(&self) -> &Tensor {
        &self.mean
    }

    /// Tensors of a file: `mean` (D), `scale` (blocks), `blocks` (blocks), each after `prefix` and a dot.
    pub fn tensors(&self, prefix: &str) -> Result<HashMap<String, Tensor>> {
        let expanded = self.scale.to_vec1::<f32>()?;
        let mut at = 0;
        let mut scales = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            scales.push(expanded.get(at).copied().unwrap_or(1.0));
            at += block;
        }
        let count = self.blocks.len();
        let blocks: Vec<u32> = self.blocks.iter().map(|block| *block as u32).collect();
        Ok(HashMap::from([
            (format!("{prefix}.mean"), self.mean.to_device(&Device::Cpu)?),
            (format!("{prefix}.scale"), Tensor::from_vec(scales, count, &Device::Cpu)?),
            (format!("{prefix}.blocks"), Tensor::from_vec(blocks, count, &Device::Cpu)?),
        ]))
    }

    /// Reads what [`StandardScaler::tensors`] made.
    pub fn load(tensors: &HashMap<String, Tensor>, prefix: &str, device: &Device) -> Result<Self> {
        let get = |name: &str, dtype| -> Result<Tensor> {
            let name = format!("{prefix}.{name}");
            let tensor = tensors.get(&name).with_context(|| format!("tensor `{name}` is missing"))?;
            Ok(tensor.to_dtype(dtype)?.to_device(&Device::Cpu)?)
        };
        let mean = get("mean", DType::F32)?;
        let scales = get("scale", DType::F32)?.to_vec1::<f32>()?;
        let blocks: Vec<usize> =
            get("blocks", DType::U32)?.to_vec1::<u32>()?.into_iter().map(|x| x as usize).collect();
        ensure!(
            scales.len() == blocks.len() && blocks.iter().sum::<usize>() == mean.elem_count(),
            "`{prefix}`: mean, scale and blocks differ in length"
        );
        Self::new(mean.to_device(device)?, &scales, &blocks)
    }
}

/// Rows as the networks see them.
pub struct ScaledRows<'a> {
    /// As they are stored.
    pub rows: &'a dyn RowSource,
    /// Applied to each row.
    pub standardise: &'a StandardScaler,
}

impl RowSource for ScaledRows<'_> {
    fn count(&self) -> usize {
        self.rows.count()
    }

    fn width(&self) -> usize {
        self.rows.width()
    }

    fn batch(&self, places: &[usize]) -> Result<Tensor> {
        Ok(self.standardise.apply(&self.rows.batch(places)?)?)
    }
}

/// The one factor that brings latents (M, L) to unit power: 1 / RMS over all of them.
///
/// One for all elements, so that the spectrum of the latents stays. A prototype that scaled each element by itself
/// learned nearly nothing; other settings changed together with this one, so it is not proven to be the cause.
pub fn unit_power(rows: &Tensor) -> Result<f64> {
    let power = f64::from(rows.sqr()?.mean_all()?.to_scalar::<f32>()?);
    ensure!(power.is_finite() && power > 0.0, "the latents are all zero or not finite");
    Ok(1.0 / power.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Tensor {
        let values: Vec<f32> = (0..40).map(|i| ((i * 37 % 11) as f32 - 3.0) * (1 + i % 4) as f32).collect();
        Tensor::from_vec(values, (10, 4), &Device::Cpu).unwrap()
    }

    #[test]
    fn every_block_has_mean_zero_and_unit_power() {
        let rows = rows();
        let s = StandardScaler::fit(&rows, &[1, 3]).unwrap();
        let x = s.apply(&rows).unwrap();
        for mean in x.mean(0).unwrap().to_vec1::<f32>().unwrap() {
            assert!(mean.abs() < 1e-6);
        }
        for (from, length) in [(0, 1), (1, 3)] {
            let power = x.narrow(1, from, length).unwrap().sqr().unwrap().mean_all().unwrap();
            assert!((power.to_scalar::<f32>().unwrap() - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn each_scaling_takes_off_what_it_says() {
        let rows = rows();
        let first_two = rows.narrow(1, 0, 2).unwrap();
        let number = |x: Tensor| x.to_scalar::<f32>().unwrap();
        let block = |scaling| {
            let x = StandardScaler::of(&rows, &[2, 2], scaling).unwrap().apply(&rows).unwrap();
            let x = x.narrow(1, 0, 2).unwrap();
            (number(x.mean_all().unwrap()), number(x.sqr().unwrap().mean_all().unwrap()))
        };
        let (mean, power) = block(Scaling::Block);
        assert!(mean.abs() < 1e-6 && (power - 1.0).abs() < 1e-5);
        let (mean, power) = block(Scaling::Rms);
        let rms = number(first_two.sqr().unwrap().mean_all().unwrap()).sqrt();
        assert!((mean - number(first_two.mean_all().unwrap()) / rms).abs() < 1e-5);
        assert!((power - 1.0).abs() < 1e-5);
    }

    #[test]
    fn a_small_variation_around_a_large_mean_keeps_its_digits() {
        // The common start of all LoRAs is a thousand times what people change.
        let noise = crate::diffusion::noise::normal(3, 0, (50, 8), &Device::Cpu).unwrap();
        let rows = ((&noise * 1e-3).unwrap() + 1000.0 / 1024.0).unwrap();
        let scale = StandardScaler::fit(&rows, &[8]).unwrap().scale.to_vec1::<f32>().unwrap()[0];
        let centred = noise.broadcast_sub(&noise.mean(0).unwrap()).unwrap();
        let wanted = centred.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt() * 1e-3;
        assert!((scale / wanted - 1.0).abs() < 1e-4, "{scale} {wanted}");
    }

    #[test]
    fn undoing_restores_the_rows_also_through_a_file() {
        let rows = rows();
        let s = StandardScaler::fit(&rows, &[2, 2]).unwrap();
        let s = StandardScaler::load(&s.tensors("vector").unwrap(), "vector", &Device::Cpu).unwrap();
        let back = s.undo(&s.apply(&rows).unwrap()).unwrap();
        let worst = (back - rows).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-5, "{worst}");
    }

    #[test]
    fn a_block_that_never_varies_stays_finite() {
        let rows = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
        let x = StandardScaler::fit_whole(&rows).unwrap().apply(&rows).unwrap();
        assert_eq!(x.sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }
}
