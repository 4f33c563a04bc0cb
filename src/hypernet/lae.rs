//! LoRA weight autoencoder (LAE): a flat LoRA vector ↔ a short latent.
//!
//! Wu et al. 2024 (arXiv 2408.06740): 1-D convolutions, trained with reconstruction + weight-preserved loss,
//! L_WP = mean(|x|·|x − x̂|). Vectors are standardised first ([`crate::hypernet::stats`]).
//!
//! We differ where the paper's form fails at our size. Neighbouring LoRA weights are nearly white; what people
//! have in common is spread over the whole vector, so short shared kernels cannot compress it, and the plain
//! strided stack ([`LaeConfig::Conv1d`], kept to compare) collapses to the mean. [`LaeConfig::Conv1dDense`] mixes
//! the whole vector in one dense stage, which starts as the principal components, and corrects it by convolutions
//! whose last kernel starts at zero: the start is exactly the PCA ([`LaeConfig::Pca`]), and training goes on
//! from there.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{Module, Tensor, Var};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::pca::Pca;
use crate::layers::{Activation, Linear, linear};

/// Which autoencoder, and its sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LaeConfig {
    /// Principal components: linear, closed form.
    Pca {
        /// P
        input: usize,
        /// L
        latent: usize,
    },
    /// A dense stage that starts as the PCA, with convolutional corrections on both sides.
    Conv1dDense {
        /// P
        input: usize,
        /// L
        latent: usize,
        /// Kernel and stride of the correcting convolutions.
        patch: usize,
        /// Their channels.
        channels: usize,
    },
    /// The paper's plain form: strided convolutions, mirrored.
    Conv1d {
        /// P
        input: usize,
        /// Stride, and kernel, of each stage.
        folds: Vec<usize>,
        /// Channels after each stage; the last are those of the latent.
        channels: Vec<usize>,
    },
}

impl LaeConfig {
    /// P: values in a LoRA vector.
    pub fn input(&self) -> usize {
        match self {
            Self::Pca { input, .. } | Self::Conv1dDense { input, .. } | Self::Conv1d { input, .. } => *input,
        }
    }

    /// L: values in a latent.
    pub fn latent(&self) -> usize {
        match self {
            Self::Pca { latent, .. } | Self::Conv1dDense { latent, .. } => *latent,
            Self::Conv1d { input, folds, channels } => {
                input.div_ceil(folds.iter().product::<usize>().max(1))
                    * channels.last().copied().unwrap_or_default()
            }
        }
    }

    /// P / L.
    pub fn compression(&self) -> f64 {
        self.input() as f64 / self.latent() as f64
    }

    fn check(&self) -> Result<()> {
        ensure!(self.input() > 0 && self.latent() > 0, "an autoencoder of size zero: {self:?}");
        match self {
            Self::Pca { .. } => {}
            Self::Conv1dDense { patch, channels, .. } => {
                ensure!(*patch > 0 && *channels > 0, "patch and channels are at least 1: {self:?}");
            }
            Self::Conv1d { folds, channels, .. } => ensure!(
                folds.len() == channels.len() && folds.iter().chain(channels).all(|n| *n > 0),
                "as many folds as channels, each at least 1: {self:?}"
            ),
        }
        Ok(())
    }
}

/// The autoencoder; one type for all variants.
#[derive(Clone, Debug)]
pub struct Lae {
    config: LaeConfig,
    net: Net,
}

#[derive(Clone, Debug)]
enum Net {
    Pca { basis: Tensor },
    Conv1dDense { basis: Tensor, before: Correction, after: Correction },
    Conv1d { down: Vec<Fold>, up: Vec<Fold> },
}

/// The parts of the training loss, each a scalar.
#[derive(Clone, Debug)]
pub struct LaeLoss {
    /// reconstruction + λ · weight_preserved
    pub total: Tensor,
    /// mean((x − x̂)²)
    pub reconstruction: Tensor,
    /// L_WP = mean(|x|·|x − x̂|)
    pub weight_preserved: Tensor,
}

impl Lae {
    /// Builds the networks; `basis` (L, P) is the dense stage of both directions.
    pub fn new(config: &LaeConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let (p, l) = (config.input(), config.latent());
        // Before the PCA is put in its place, a random basis of rows with length 1.
        let basis = || {
            let init = candle_nn::Init::Randn { mean: 0.0, stdev: 1.0 / (p as f64).sqrt() };
            vb.get_with_hints((l, p), "basis", init)
        };
        let net = match config {
            LaeConfig::Pca { .. } => Net::Pca { basis: basis()? },
            LaeConfig::Conv1dDense { patch, channels, .. } => Net::Conv1dDense {
                basis: basis()?,
                before: Correction::new(p, *patch, *channels, vb.pp("before"))?,
                after: Correction::new(p, *patch, *channels, vb.pp("after"))?,
            },
            LaeConfig::Conv1d { folds, channels, .. } => {
                let inputs = std::iter::once(1).chain(channels.iter().copied());
                let stages: Vec<_> = inputs.zip(channels).zip(folds).collect();
                let down = stages
                    .iter()
                    .enumerate()
                    .map(|(i, ((from, to), fold))| Fold::down(*from, **to, **fold, vb.pp("down").pp(i)));
                let up = stages
                    .iter()
                    .rev()
                    .enumerate()
                    .map(|(i, ((from, to), fold))| Fold::up(**to, *from, **fold, vb.pp("up").pp(i)));
                Net::Conv1d {
                    down: down.collect::<candle_core::Result<_>>()?,
                    up: up.collect::<candle_core::Result<_>>()?,
                }
            }
        };
        Ok(Self { config: config.clone(), net })
    }

    /// Puts the principal components in the dense stage of a network that was built with `vars`.
    ///
    /// The plain convolutional variant has no such stage and is refused.
    pub fn start_from(&self, pca: &Pca, vars: &std::collections::BTreeMap<String, Var>) -> Result<()> {
        let (Net::Pca { basis } | Net::Conv1dDense { basis, .. }) = &self.net else {
            anyhow::bail!("the plain conv1d autoencoder has no stage that could start from a PCA");
        };
        let var = vars
            .values()
            .find(|var| var.as_tensor().id() == basis.id())
            .context("the variables are not those of this autoencoder")?;
        Ok(var.set(&pca.basis.to_device(basis.device())?)?)
    }

    /// The weights of the PCA variant, ready for [`crate::weights::frozen`] or a file.
    pub fn pca_tensors(pca: &Pca) -> HashMap<String, Tensor> {
        HashMap::from([("basis".to_string(), pca.basis.clone())])
    }

    /// What it was made from.
    pub fn config(&self) -> &LaeConfig {
        &self.config
    }

    /// `x` (B, P), standardised → z (B, L).
    pub fn encode(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match &self.net {
            Net::Pca { basis } => linear(x, basis, None),
            Net::Conv1dDense { basis, before, .. } => linear(&before.forward(x)?, basis, None),
            Net::Conv1d { down, .. } => {
                let (b, p) = x.dims2()?;
                let stride: usize = down.iter().map(|stage| stage.fold).product();
                let x = x.pad_with_zeros(1, 0, p.next_multiple_of(stride) - p)?;
                through(down, x.unsqueeze(1)?)?.reshape((b, self.config.latent()))
            }
        }
    }

    /// `z` (B, L) → x̂ (B, P), standardised.
    pub fn decode(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        match &self.net {
            Net::Pca { basis } => z.matmul(basis),
            Net::Conv1dDense { basis, after, .. } => after.forward(&z.matmul(basis)?),
            Net::Conv1d { up, .. } => {
                let b = z.dim(0)?;
                let channels = up.first().map_or(1, |stage| stage.input);
                let x = through(up, z.reshape((b, channels, ()))?)?;
                x.squeeze(1)?.narrow(1, 0, self.config.input())
            }
        }
    }

    /// The training loss of a batch `x` (B, P); `lambda` weighs L_WP.
    pub fn loss(&self, x: &Tensor, lambda: f64) -> candle_core::Result<LaeLoss> {
        loss(x, &self.decode(&self.encode(x)?)?, lambda)
    }
}

/// The loss between a batch `x` (B, P) and its reconstruction `x_hat`.
///
/// Apart from [`Lae::loss`] for a training loop that adds noise to the latents in between.
pub fn loss(x: &Tensor, x_hat: &Tensor, lambda: f64) -> candle_core::Result<LaeLoss> {
    let error = (x - x_hat)?;
    let reconstruction = error.sqr()?.mean_all()?;
    let weight_preserved = (x.abs()? * error.abs()?)?.mean_all()?;
    let total = (&reconstruction + (&weight_preserved * lambda)?)?;
    Ok(LaeLoss { total, reconstruction, weight_preserved })
}

/// x + conv_transposed(GELU(conv(x) + position)), kernel = stride = one patch.
#[derive(Clone, Debug)]
struct Correction {
    /// Kernel (channels, patch) of the convolution.
    narrow: Linear,
    /// Kernel (patch, channels) of the transposed one. Zero, so that training starts at the dense stage alone.
    widen: Linear,
    /// (patches, channels): which part of the LoRA this is; kernels are shared, layers are not alike.
    position: Tensor,
    patch: usize,
}

impl Correction {
    fn new(p: usize, patch: usize, channels: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        let init = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Self {
            narrow: Linear::new(patch, channels, vb.pp("narrow"))?,
            widen: Linear::zeros(channels, patch, vb.pp("widen"))?,
            position: vb.get_with_hints((p.div_ceil(patch), channels), "position", init)?,
            patch,
        })
    }

    /// (B, P) → same.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, p) = x.dims2()?;
        let patches = p.div_ceil(self.patch);
        let padded = x.pad_with_zeros(1, 0, patches * self.patch - p)?;
        let h = self.narrow.forward(&padded.reshape((b, patches, self.patch))?)?; // (B, patches, C)
        let h = Activation::GeluTanh.apply(&h.broadcast_add(&self.position)?)?;
        let y = self.widen.forward(&h)?.reshape((b, patches * self.patch))?;
        x + y.narrow(1, 0, p)?
    }
}

/// A strided convolution whose kernel is as long as its stride, or the transposed one.
#[derive(Clone, Debug)]
struct Fold {
    /// Down: (out, in · fold). Up: (in, out · fold). Flattened from PyTorch's (out, in, k) and (in, out, k).
    weight: Tensor,
    /// (out)
    bias: Tensor,
    input: usize,
    output: usize,
    fold: usize,
    up: bool,
}

impl Fold {
    fn down(input: usize, output: usize, fold: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        let bound = 1.0 / ((input * fold) as f64).sqrt();
        let init = candle_nn::Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((output, input * fold), "weight", init)?;
        Ok(Self { weight, bias: vb.get_with_hints(output, "bias", init)?, input, output, fold, up: false })
    }

    fn up(input: usize, output: usize, fold: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        let bound = 1.0 / ((output * fold) as f64).sqrt();
        let init = candle_nn::Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((input, output * fold), "weight", init)?;
        Ok(Self { weight, bias: vb.get_with_hints(output, "bias", init)?, input, output, fold, up: true })
    }

    /// `x` (B, in, N) → (B, out, N / fold), or (B, out, N · fold) upwards.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, c, n) = x.dims3()?;
        let f = self.fold;
        if self.up {
            let rows = x.transpose(1, 2)?.contiguous()?.reshape((b * n, c))?; // (B·N, in)
            let y = rows.matmul(&self.weight)?.reshape((b, n, self.output, f))?;
            let y = y.transpose(1, 2)?.contiguous()?.reshape((b, self.output, n * f))?;
            return y.broadcast_add(&self.bias.reshape((1, self.output, 1))?);
        }
        let patches = x.reshape((b, c, n / f, f))?.transpose(1, 2)?.contiguous()?; // (B, N/f, in, f)
        let y = linear(&patches.reshape((b, n / f, c * f))?, &self.weight, Some(&self.bias))?;
        y.transpose(1, 2)?.contiguous()
    }
}

/// The stages one after the other, with SiLU between them.
fn through(stages: &[Fold], x: Tensor) -> candle_core::Result<Tensor> {
    stages.iter().enumerate().try_fold(x, |x, (i, stage)| {
        let x = if i == 0 { x } else { Activation::Silu.apply(&x)? };
        stage.forward(&x)
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::weights::{Trainable, frozen};

    fn rows(count: usize, width: usize) -> Tensor {
        let values: Vec<f32> = (0..count * width).map(|i| ((i * 7919 % 1013) as f32 / 506.5) - 1.0).collect();
        let rows = Tensor::from_vec(values, (count, width), &Device::Cpu).unwrap();
        rows.broadcast_sub(&rows.mean(0).unwrap()).unwrap()
    }

    fn worst(x: &Tensor) -> f32 {
        x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    }

    #[test]
    fn the_dense_variant_starts_exactly_at_the_principal_components() {
        let x = rows(12, 100);
        let pca = Pca::fit(&x, 5).unwrap();
        let plain = LaeConfig::Pca { input: 100, latent: 5 };
        let plain = Lae::new(&plain, frozen(Lae::pca_tensors(&pca), DType::F32, &Device::Cpu)).unwrap();
        let config = LaeConfig::Conv1dDense { input: 100, latent: 5, patch: 16, channels: 8 };
        let trainable = Trainable::new(1);
        let lae = Lae::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        lae.start_from(&pca, &trainable.vars()).unwrap();
        let z = lae.encode(&x).unwrap();
        assert_eq!(worst(&(&z - plain.encode(&x).unwrap()).unwrap()), 0.0);
        assert_eq!(worst(&(lae.decode(&z).unwrap() - plain.decode(&z).unwrap()).unwrap()), 0.0);
    }

    #[test]
    fn rows_inside_the_span_come_back_from_the_pca() {
        let x = rows(12, 100);
        let pca = Pca::fit(&x, 11).unwrap();
        let config = LaeConfig::Pca { input: 100, latent: 11 };
        let lae = Lae::new(&config, frozen(Lae::pca_tensors(&pca), DType::F32, &Device::Cpu)).unwrap();
        let back = lae.decode(&lae.encode(&x).unwrap()).unwrap();
        assert!(worst(&(back - &x).unwrap()) < 1e-4);
        assert!(lae.loss(&x, 1.0).unwrap().total.to_scalar::<f32>().unwrap() < 1e-4);
    }

    #[test]
    fn every_variable_of_every_variant_gets_a_gradient_in_the_end() {
        for config in [
            LaeConfig::Conv1dDense { input: 50, latent: 4, patch: 8, channels: 6 },
            LaeConfig::Conv1d { input: 50, folds: vec![3, 4], channels: vec![5, 2] },
        ] {
            let trainable = Trainable::new(2);
            let lae = Lae::new(&config, trainable.builder(&Device::Cpu)).unwrap();
            let x = rows(6, 50);
            assert_eq!(lae.encode(&x).unwrap().dims(), [6, config.latent()]);
            // One small step away from zero kernels, behind which nothing can be seen.
            for var in trainable.vars().values() {
                var.set(&(var.as_tensor() + 0.01).unwrap()).unwrap();
            }
            let grads = lae.loss(&x, 0.1).unwrap().total.backward().unwrap();
            for (name, var) in trainable.vars() {
                let grad = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("{name} has no gradient"));
                assert!(worst(grad) > 0.0, "{name}");
            }
        }
    }

    #[test]
    fn a_config_survives_json_and_unknown_keys_are_refused() {
        let config = LaeConfig::Conv1dDense { input: 22_528, latent: 64, patch: 64, channels: 32 };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<LaeConfig>(&text).unwrap(), config);
        assert!((config.compression() - 352.0).abs() < 1e-9);
        let typo = text.replace("patch", "pach");
        assert!(serde_json::from_str::<LaeConfig>(&typo).is_err());
    }
}
