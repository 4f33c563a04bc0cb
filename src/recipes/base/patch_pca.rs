//! An encoder in closed form: the principal components of patches of 4×4 or 8×8 pixels, written as the weights of an
//! AutoencoderKL with three or four levels.
//!
//! Training a VAE's encoder takes most of its time, and on small portraits it ends near what a linear map gives at
//! once. So the encoder is set, not trained, and only the decoder learns. The network is made linear by these means:
//! the residual branches start at zero; the stride-2 convolutions, of which each sees 2×2 places, move a patch into
//! channels and project it, with four levels by way of the best common subspace of its four quarters; the last GroupNorm sees beside each component its negative (mean 0) and two large constants
//! (deviation known); SiLU is used far on its linear side, and twice, so that the offset cancels.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor, Var};

use crate::hypernet::pca;
use crate::sdxl::vae::VaeConfig;

/// The constants beside the components, in standard deviations of a component.
const ANCHOR: f64 = 64.0;
/// Where SiLU is used: x + OFFSET, for |x| up to about 4.
const OFFSET: f64 = 16.0;
/// Half a standard deviation of a component moves SiLU's argument by this much.
const SWING: f64 = 0.5;

/// Mean and principal components of patches of S×S pixels.
pub struct Patches {
    /// S
    side: usize,
    /// (3·S²), in the order channel, row, column.
    mean: Vec<f64>,
    /// (K, 3·S²), orthonormal.
    basis: Vec<Vec<f64>>,
    /// Standard deviation of each component.
    deviations: Vec<f64>,
    /// Part of the variance that the components keep.
    pub kept: f64,
}

impl Patches {
    /// From images (B, 3, H, W) in [−1, 1]; `side` is 4 or 8.
    pub fn fit(images: &Tensor, components: usize, side: usize) -> Result<Self> {
        let (b, c, h, w) = images.dims4()?;
        let rows = images
            .reshape(vec![b, c, h / side, side, w / side, side])?
            .permute(vec![0, 2, 4, 1, 3, 5])?
            .contiguous()?
            .reshape((b * (h / side) * (w / side), c * side * side))?;
        let mean = rows.mean_keepdim(0)?;
        let centred = rows.broadcast_sub(&mean)?;
        let covariance = (centred.t()?.contiguous()?.matmul(&centred)? / rows.dim(0)? as f64)?;
        let total: f64 =
            covariance.to_vec2::<f32>()?.iter().enumerate().map(|(i, row)| f64::from(row[i])).sum();
        let (values, vectors) = pca::largest_eigenpairs(&covariance.to_dtype(DType::F64)?, components)?;
        let wide = |row: Vec<f32>| row.into_iter().map(f64::from).collect();
        Ok(Self {
            side,
            mean: wide(mean.flatten_all()?.to_vec1()?),
            basis: vectors.to_dtype(DType::F64)?.to_vec2()?,
            deviations: values.iter().map(|value| value.max(1e-12).sqrt()).collect(),
            kept: values.iter().sum::<f64>() / total,
        })
    }

    /// Scale of latent k: component k in standard deviations times this. The square root keeps part of the
    /// spectrum, so that a denoiser spends its effort where the image is; together the latents have power 1.
    fn scale(&self, k: usize) -> f64 {
        let power = self.deviations.iter().sum::<f64>() / self.deviations.len() as f64;
        (self.deviations[k] / power).sqrt()
    }

    /// The four quarters of a patch, row by row, each in the order channel, row, column.
    fn quarters(&self, patch: &[f64]) -> [Vec<f64>; 4] {
        let (side, half) = (self.side, self.side / 2);
        std::array::from_fn(|q| {
            let (top, left) = (q / 2 * half, q % 2 * half);
            let place = |at: usize| (at / (half * half), at / half % half + top, at % half + left);
            (0..3 * half * half)
                .map(|at| {
                    let (c, y, x) = place(at);
                    patch[c * side * side + y * side + x]
                })
                .collect()
        })
    }

    /// The directions (N, 48) of quarters of 4×4 pixels that lose least of the components; N at most 48.
    fn subspace(&self, directions: usize) -> Result<Vec<Vec<f64>>> {
        let mut rows = Vec::new();
        for (basis, deviation) in self.basis.iter().zip(&self.deviations) {
            rows.extend(self.quarters(basis).into_iter().flatten().map(|value| value / deviation));
        }
        let rows = Tensor::from_vec(rows, (4 * self.basis.len(), 48), &Device::Cpu)?;
        let (_, vectors) = pca::largest_eigenpairs(&rows.t()?.matmul(&rows)?, directions)?;
        Ok(vectors.to_dtype(DType::F64)?.to_vec2()?)
    }

    /// Sets the variables of `encoder` and `quant_conv` in `vars`.
    ///
    /// # Errors
    /// A layout in which the construction has no room.
    pub fn write(&self, config: &VaeConfig, vars: &BTreeMap<String, Var>) -> Result<()> {
        let k = self.basis.len();
        let groups = config.norm_num_groups;
        let widths = &config.block_out_channels;
        let levels = widths.len();
        ensure!(
            1 << (levels - 1) == self.side,
            "a patch of {0}×{0} does not fit a VAE of {levels} levels",
            self.side
        );
        let each = k.div_ceil(groups);
        let room = widths[levels - 1] / groups;
        ensure!(
            widths[0] >= 12
                && widths[1] >= 12
                && widths[levels - 2] >= k
                && widths[levels - 1] > widths[levels - 2]
                && room >= 2 * each + 2,
            "channels {widths:?} in {groups} groups have no room for {k} components"
        );
        // Channel of component i, of its negative, and of the two constants of its group.
        let plus = |i: usize| i / each * room + 2 * (i % each);
        let constants = |group: usize| group * room + 2 * each;

        for (name, var) in vars.iter().filter(|(name, _)| name.starts_with("encoder.")) {
            if name.contains(".conv2.") {
                var.set(&var.zeros_like()?)?;
            }
        }
        let mut conv_in = Kernel::new(vars, "encoder.conv_in")?;
        (0..3).for_each(|c| conv_in.set(c, c, 1, 1, 1.0));
        conv_in.store()?;
        let mut first = Kernel::new(vars, "encoder.down_blocks.0.downsamplers.0.conv")?;
        for c in 0..3 {
            for (y, x) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                first.set(c * 4 + y * 2 + x, c, y, x, 1.0);
            }
        }
        first.store()?;
        // Channels that the patch has before the last halving: each sees 2×2 pixels, or the subspace of 4×4.
        let inner =
            if levels == 3 { pixels_of_four() } else { self.subspace(widths[1].min(widths[2]).min(48))? };
        if levels == 4 {
            let mut second = Kernel::new(vars, "encoder.down_blocks.1.downsamplers.0.conv")?;
            for (r, row) in inner.iter().enumerate() {
                for (at, value) in row.iter().enumerate() {
                    let (c, y, x) = (at / 16, at / 4 % 4, at % 4);
                    second.set(r, c * 4 + y % 2 * 2 + x % 2, y / 2, x / 2, *value);
                }
            }
            second.store()?;
        }
        let mut last = Kernel::new(vars, &format!("encoder.down_blocks.{}.downsamplers.0.conv", levels - 2))?;
        for i in 0..k {
            let (parts, means) = (self.quarters(&self.basis[i]), self.quarters(&self.mean));
            for (q, (part, mean)) in parts.iter().zip(&means).enumerate() {
                for (r, row) in inner.iter().enumerate() {
                    let weight = dot(row, part) / self.deviations[i];
                    last.set(i, r, q / 2, q % 2, weight);
                    last.bias[i] -= (weight * dot(row, mean)) as f32;
                }
            }
        }
        last.store()?;
        for level in 1..levels - 1 {
            if widths[level - 1] != widths[level] {
                let mut pass =
                    Kernel::new(vars, &format!("encoder.down_blocks.{level}.resnets.0.conv_shortcut"))?;
                let used = if level == 1 { 12 } else { inner.len() };
                (0..used).for_each(|c| pass.set(c, c, 0, 0, 1.0));
                pass.store()?;
            }
        }
        let mut spread =
            Kernel::new(vars, &format!("encoder.down_blocks.{}.resnets.0.conv_shortcut", levels - 1))?;
        for i in 0..k {
            spread.set(plus(i), i, 0, 0, 1.0);
            spread.set(plus(i) + 1, i, 0, 0, -1.0);
        }
        for group in 0..groups {
            spread.bias[constants(group)] = ANCHOR as f32;
            spread.bias[constants(group) + 1] = -ANCHOR as f32;
        }
        spread.store()?;

        let mut norm = Kernel::new(vars, "encoder.conv_norm_out")?;
        let mut out = Kernel::new(vars, "encoder.conv_out")?;
        for i in 0..k {
            let members = (i / each * each..k.min((i / each + 1) * each)).len() as f64;
            let deviation = (2.0 * (ANCHOR * ANCHOR + members) / room as f64).sqrt();
            for (channel, sign) in [(plus(i), 1.0), (plus(i) + 1, -1.0)] {
                norm.weight[channel] = (SWING * deviation) as f32;
                norm.bias[channel] = OFFSET as f32;
                out.set(i, channel, 1, 1, sign * self.scale(i) / (2.0 * SWING));
            }
            // The variance e^−30 of the posterior: none.
            out.bias[k + i] = -30.0;
        }
        norm.store()?;
        out.store()?;
        let mut quant = Kernel::new(vars, "quant_conv")?;
        (0..2 * k).for_each(|c| quant.set(c, c, 0, 0, 1.0));
        quant.store()
    }
}

/// The 12 values of a quarter of 2×2 pixels, each by itself.
fn pixels_of_four() -> Vec<Vec<f64>> {
    (0..12).map(|one| (0..12).map(|at| f64::from(u8::from(at == one))).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A weight (out, in, k, k) or (out) and its bias, all zero until set.
struct Kernel<'a> {
    vars: [&'a Var; 2],
    shape: Vec<usize>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl<'a> Kernel<'a> {
    fn new(vars: &'a BTreeMap<String, Var>, name: &str) -> Result<Self> {
        let var = |part: &str| {
            vars.get(&format!("{name}.{part}"))
                .ok_or_else(|| anyhow::anyhow!("this VAE has no `{name}.{part}`"))
        };
        let vars = [var("weight")?, var("bias")?];
        let shape = vars[0].dims().to_vec();
        let weight = vec![0.0; vars[0].elem_count()];
        Ok(Self { vars, shape, weight, bias: vec![0.0; vars[1].elem_count()] })
    }

    fn set(&mut self, output: usize, input: usize, y: usize, x: usize, value: f64) {
        let at = ((output * self.shape[1] + input) * self.shape[2] + y) * self.shape[3] + x;
        self.weight[at] = value as f32;
    }

    fn store(self) -> Result<()> {
        let [weight, bias] = self.vars;
        let count = self.bias.len();
        weight.set(&Tensor::from_vec(self.weight, self.shape, weight.device())?)?;
        Ok(bias.set(&Tensor::from_vec(self.bias, count, bias.device())?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sdxl::vae::Vae;
    use crate::weights::Trainable;

    #[test]
    fn the_encoder_gives_the_components_of_each_patch() {
        for (widths, side) in [(vec![16, 16, 32], 4), (vec![16, 32, 32, 48], 8), (vec![16, 48, 48, 64], 8)] {
            check(&widths, side);
        }
    }

    fn check(widths: &[usize], side: usize) {
        let config = VaeConfig {
            latent_channels: 8,
            mid_block_add_attention: false,
            ..VaeConfig::sized(widths, 1, 4)
        };
        let trainable = Trainable::new(3);
        let vae = Vae::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        let images =
            crate::train::normal(&mut crate::train::rng(1, 1), &(6, 3, 64, 64).into(), &Device::Cpu).unwrap();
        let images = (images * 0.4).unwrap();
        let patches = Patches::fit(&images, 8, side).unwrap();
        patches.write(&config, &trainable.vars()).unwrap();
        let (mean, logvar) = vae.encode(&images).unwrap();
        assert_eq!(mean.dims(), [6, 8, 64 / side, 64 / side]);
        assert!(logvar.max_all().unwrap().to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap() < -29.0);
        // The patch in row 2, column 5 of image 4, by hand.
        let patch =
            images.get(4).unwrap().narrow(1, 2 * side, side).unwrap().narrow(2, 5 * side, side).unwrap();
        let patch: Vec<f32> = patch.flatten_all().unwrap().to_vec1().unwrap();
        for i in 0..8 {
            let component: f64 = patches.basis[i]
                .iter()
                .zip(&patch)
                .zip(&patches.mean)
                .map(|((basis, value), mean)| basis * (f64::from(*value) - mean))
                .sum();
            let wanted = component / patches.deviations[i] * patches.scale(i);
            let got = mean.get(4).unwrap().get(i).unwrap().get(2).unwrap().get(5).unwrap();
            let got = f64::from(got.to_scalar::<f32>().unwrap());
            assert!((got - wanted).abs() < 5e-3, "{widths:?}, component {i}: {got}, wanted {wanted}");
        }
    }
}
