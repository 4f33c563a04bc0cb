//! LoRA weight autoencoder (LAE): a flat LoRA vector ↔ a short latent.
//!
//! Wu et al. 2024 (arXiv 2408.06740): 1-D convolutions, trained with reconstruction + weight-preserved loss,
//! L_WP = mean(|x|·|x − x̂|). Vectors are standardised first ([`crate::hypernet::scaler`]). The paper gives no table of
//! layers; the stages of [`LaeConfig::Conv1d`] are those of p-diff (NUS-HPC-AI-Lab/Neural-Network-Diffusion,
//! `core/module/modules/encoder.py`): norm, activation, convolution, and a convolution that folds.
//!
//! We differ where the paper's form fails at our size. Neighbouring LoRA weights are nearly white; what people have in
//! common is spread over the whole vector, so kernels that all places share cannot compress it, and the plain stack
//! collapses to the mean. What helps is weights that know their place: a dense stage
//! ([`LaeConfig::Conv1dDense`]), or, where the vector is too long for one, kernels of their own for each long patch
//! ([`LaeConfig::Conv1dLocal`]). Both start as principal components ([`LaeConfig::Pca`]), and training goes on from
//! there through convolutions whose last kernel starts at zero.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::{Module, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::lae_conv::{Folding, FoldingShape, Norm, Stage};
use super::pca::Pca;
use super::weight_preserved_loss::{Distance, LaeLoss, loss};
use crate::layers::{Correction, Linear, compute_dtype, expand_patches, project_patches};

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
    /// A convolution that folds long patches, each by kernels of its own, which start as the principal components
    /// of that patch; with convolutional corrections on both sides.
    Conv1dLocal {
        /// P
        input: usize,
        /// Values in a patch; the last one is filled up with zeros.
        patch: usize,
        /// Values of the latent for each patch.
        components: usize,
        /// The correcting convolutions, if any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        correction: Option<CorrectionConfig>,
    },
    /// The paper's form: stages of convolutions that all places share, mirrored.
    Conv1d {
        /// P
        input: usize,
        /// From the vector to the latent.
        stages: Vec<Stage>,
        /// Whether each place has a learned offset in every channel, so that shared kernels can tell where they are.
        #[serde(default)]
        position: bool,
        /// L of a dense stage between the last fold and its mirror; without it the folded channels are the latent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dense: Option<usize>,
    },
}

/// Kernel and channels of the convolutions that correct a linear autoencoder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorrectionConfig {
    /// Kernel and stride.
    pub patch: usize,
    /// Channels.
    pub channels: usize,
}

impl LaeConfig {
    /// P: values in a LoRA vector.
    pub fn input(&self) -> usize {
        match self {
            Self::Pca { input, .. }
            | Self::Conv1dDense { input, .. }
            | Self::Conv1dLocal { input, .. }
            | Self::Conv1d { input, .. } => *input,
        }
    }

    /// L: values in a latent.
    pub fn latent(&self) -> usize {
        match self {
            Self::Pca { latent, .. } | Self::Conv1dDense { latent, .. } => *latent,
            Self::Conv1dLocal { input, patch, components, .. } => input.div_ceil(*patch) * components,
            Self::Conv1d { dense: Some(latent), .. } => *latent,
            Self::Conv1d { input, stages, .. } => {
                let fold: usize = stages.iter().map(|stage| stage.fold).product();
                input.div_ceil(fold.max(1)) * stages.last().map_or(0, |stage| stage.channels)
            }
        }
    }

    /// P / L.
    pub fn compression(&self) -> f64 {
        self.input() as f64 / self.latent() as f64
    }

    /// The patches whose principal components it starts from: their length and how many components each; none where
    /// it starts at random.
    pub fn start(&self) -> Option<(usize, usize)> {
        match self {
            Self::Pca { input, latent } | Self::Conv1dDense { input, latent, .. } => Some((*input, *latent)),
            Self::Conv1dLocal { patch, components, .. } => Some((*patch, *components)),
            Self::Conv1d { .. } => None,
        }
    }

    /// Whether nothing is left to train after the start.
    pub fn closed_form(&self) -> bool {
        matches!(self, Self::Pca { .. })
    }

    /// The same as a format 1 folder has it: its `conv1d` was `folds` and `channels`, with SiLU in between.
    pub(super) fn from_format_1(mut config: serde_json::Value) -> serde_json::Value {
        let list = |name: &str| config.get(name).and_then(|list| list.as_array()).cloned();
        if let (Some(folds), Some(channels)) = (list("folds"), list("channels"))
            && config.get("kind").is_some_and(|kind| kind == "conv1d")
        {
            let stage = |(fold, channels)| serde_json::json!({ "fold": fold, "channels": channels });
            let stages: Vec<_> = folds.into_iter().zip(channels).map(stage).collect();
            config = serde_json::json!({ "kind": "conv1d", "input": config["input"], "stages": stages });
        }
        config
    }

    fn check(&self) -> Result<()> {
        match self {
            Self::Pca { .. } => {}
            Self::Conv1dDense { patch, channels, .. } => {
                ensure!(*patch > 0 && *channels > 0, "patch and channels are at least 1: {self:?}");
            }
            Self::Conv1dLocal { patch, components, correction, .. } => {
                ensure!(
                    *patch > 0 && components <= patch,
                    "a patch has at least as many values as components: {self:?}"
                );
                ensure!(
                    correction.as_ref().is_none_or(|c| c.patch > 0 && c.channels > 0),
                    "patch and channels are at least 1: {self:?}"
                );
            }
            Self::Conv1d { stages, .. } => {
                let good = |stage: &Stage| {
                    stage.fold > 0 && stage.channels > 0 && (stage.kernel == 0 || stage.kernel % 2 == 1)
                };
                ensure!(
                    !stages.is_empty() && stages.iter().all(good),
                    "each stage has a fold and channels of at least 1 and a kernel that is odd, or 0 for none: {self:?}"
                );
            }
        }
        ensure!(self.input() > 0 && self.latent() > 0, "an autoencoder of size zero: {self:?}");
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
    /// A linear map of patches, one patch where it is dense, between corrections.
    Linear {
        /// (L, patch): the rows of the first patch, of the second, and so on.
        basis: Tensor,
        corrections: Option<(Correction, Correction)>,
    },
    Conv1d {
        down: Vec<Folding>,
        up: Vec<Folding>,
        dense: Option<(Linear, Linear)>,
    },
}

impl Lae {
    /// Builds the networks.
    ///
    /// `basis` (L, patch) is the linear stage of both directions.
    pub fn new(config: &LaeConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let p = config.input();
        // A basis of 16 bits stays as it is; it is the only large weight.
        let stored = vb.clone();
        let vb = vb.to_dtype(compute_dtype(stored.dtype(), stored.device()));
        // Before the PCA is put in its place, a random basis of rows with length 1.
        let random = |width: usize| Init::Randn { mean: 0.0, stdev: 1.0 / (width as f64).sqrt() };
        let corrections = |patch, channels| -> candle_core::Result<_> {
            let part = |name| Correction::new(p, patch, channels, vb.pp(name));
            Ok(Some((part("before")?, part("after")?)))
        };
        let net = match config {
            LaeConfig::Pca { latent, .. } => Net::Linear {
                basis: stored.get_with_hints((*latent, p), "basis", random(p))?,
                corrections: None,
            },
            LaeConfig::Conv1dDense { latent, patch, channels, .. } => Net::Linear {
                basis: stored.get_with_hints((*latent, p), "basis", random(p))?,
                corrections: corrections(*patch, *channels)?,
            },
            LaeConfig::Conv1dLocal { patch, correction, .. } => Net::Linear {
                basis: stored.get_with_hints((config.latent(), *patch), "basis", random(*patch))?,
                corrections: match correction {
                    Some(CorrectionConfig { patch, channels }) => corrections(*patch, *channels)?,
                    None => None,
                },
            },
            LaeConfig::Conv1d { stages, position, dense, .. } => {
                let total: usize = stages.iter().map(|stage| stage.fold).product();
                let mut length = p.div_ceil(total) * total;
                let mut channels = 1;
                let (mut down, mut up) = (Vec::new(), Vec::new());
                for (i, stage) in stages.iter().enumerate() {
                    let last = i + 1 == stages.len();
                    let centred = stages.get(i + 1).is_some_and(|next| next.norm == Norm::Instance);
                    let shape =
                        FoldingShape { length, channels, outermost: i == 0, position: *position, centred };
                    down.push(Folding::down(stage, &shape, last && dense.is_none(), vb.pp("down").pp(i))?);
                    let mirror = stages.len() - 1 - i;
                    up.push(Folding::up(stage, &shape, vb.pp("up").pp(mirror))?);
                    (length, channels) = (length / stage.fold, stage.channels);
                }
                up.reverse();
                let dense = match dense {
                    Some(latent) => Some((
                        Linear::new(length * channels, *latent, vb.pp("narrow"))?,
                        Linear::new(*latent, length * channels, vb.pp("widen"))?,
                    )),
                    None => None,
                };
                Net::Conv1d { down, up, dense }
            }
        };
        Ok(Self { config: config.clone(), net })
    }

    /// Puts the principal components in the linear stage of a network that was built with `vars`.
    ///
    /// The plain convolutional variant has no such stage and is refused.
    pub fn start_from(&self, pca: &Pca, vars: &BTreeMap<String, Var>) -> Result<()> {
        let Net::Linear { basis, .. } = &self.net else {
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

    /// The config of the network.
    pub fn config(&self) -> &LaeConfig {
        &self.config
    }

    /// `x` (B, P), standardised → z (B, L).
    pub fn encode(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, p) = x.dims2()?;
        match &self.net {
            Net::Linear { basis, corrections } => {
                project_patches(x, basis, corrections.as_ref().map(|(before, _)| before))
            }
            Net::Conv1d { down, dense, .. } => {
                let fold: usize = down.iter().map(|stage| stage.fold).product();
                let x = x.pad_with_zeros(1, 0, p.next_multiple_of(fold) - p)?.unsqueeze(2)?; // (B, N, 1)
                let h = down.iter().try_fold(x, |x, stage| stage.forward(&x))?; // (B, N / fold, C)
                match dense {
                    Some((narrow, _)) => narrow.forward(&h.flatten_from(1)?),
                    // As PyTorch's (B, C, N) would be flattened.
                    None => h.transpose(1, 2)?.contiguous()?.reshape((b, self.config.latent())),
                }
            }
        }
    }

    /// `z` (B, L) → x̂ (B, P), standardised.
    pub fn decode(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        let p = self.config.input();
        match &self.net {
            Net::Linear { basis, corrections } => {
                expand_patches(z, basis, corrections.as_ref().map(|(_, after)| after), p)
            }
            Net::Conv1d { up, dense, .. } => {
                let b = z.dim(0)?;
                let channels = up.first().map_or(1, |stage| stage.inner);
                let h = match dense {
                    Some((_, widen)) => widen.forward(z)?.reshape((b, (), channels))?,
                    None => z.reshape((b, channels, ()))?.transpose(1, 2)?.contiguous()?,
                };
                let x = up.iter().try_fold(h, |x, stage| stage.forward(&x))?; // (B, N, 1)
                x.squeeze(2)?.narrow(1, 0, p)
            }
        }
    }

    /// The training loss of a batch `x` (B, P); `lambda` weighs L_WP.
    pub fn loss(&self, x: &Tensor, lambda: f64) -> candle_core::Result<LaeLoss> {
        loss(x, &self.decode(&self.encode(x)?)?, Distance::Mse, lambda)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::hypernet::lae_conv::Nonlinearity;
    use crate::weights::{Trainable, frozen};

    fn rows(count: usize, width: usize) -> Tensor {
        let values: Vec<f32> = (0..count * width).map(|i| ((i * 7919 % 1013) as f32 / 506.5) - 1.0).collect();
        let rows = Tensor::from_vec(values, (count, width), &Device::Cpu).unwrap();
        rows.broadcast_sub(&rows.mean(0).unwrap()).unwrap()
    }

    /// Every option once.
    fn stages() -> Vec<Stage> {
        let stage =
            |norm, activation, kernel, channels, fold| Stage { norm, activation, kernel, channels, fold };
        vec![
            stage(Norm::None, Nonlinearity::LeakyRelu, 3, 5, 3),
            stage(Norm::Instance, Nonlinearity::Silu, 0, 4, 2),
            stage(Norm::Layer, Nonlinearity::Gelu, 5, 3, 2),
        ]
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
            LaeConfig::Conv1dLocal {
                input: 50,
                patch: 16,
                components: 3,
                correction: Some(CorrectionConfig { patch: 8, channels: 6 }),
            },
            LaeConfig::Conv1d { input: 50, stages: stages(), position: true, dense: None },
            LaeConfig::Conv1d { input: 50, stages: stages(), position: false, dense: Some(7) },
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
