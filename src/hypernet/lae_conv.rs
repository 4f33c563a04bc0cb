//! The stages of the convolutional autoencoder ([`LaeConfig::Conv1d`](super::lae::LaeConfig::Conv1d)): those of p-diff
//! (NUS-HPC-AI-Lab/Neural-Network-Diffusion, `core/module/modules/encoder.py`): norm, activation, convolution, and a
//! convolution that folds.
//!
//! Inside, values lie as (B, N, C): a fold is then a reshape and a matrix product. Kernels are stored as PyTorch has
//! them.

use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use crate::layers::{Activation, GroupNorm, LayerNorm, linear};

/// One stage of [`LaeConfig::Conv1d`]: norm, activation, convolution, activation, fold. The decoder's is the mirror
/// of it: unfold, activation, convolution, norm, activation. The first stage has no norm and no activation at its
/// outer side, since the vector has signs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Before the convolution.
    #[serde(default)]
    pub norm: Norm,
    /// Before the convolution, and between it and the fold.
    #[serde(default)]
    pub activation: Nonlinearity,
    /// Odd length of the convolution that keeps the length; 0 for none.
    #[serde(default)]
    pub kernel: usize,
    /// Channels after the stage; those of the last are the latent's.
    pub channels: usize,
    /// Kernel and stride of the strided convolution.
    pub fold: usize,
}

/// Normalisation of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// Nothing.
    #[default]
    None,
    /// Each channel over the whole length (InstanceNorm1d); what p-diff does. The length of a LoRA is lost there.
    Instance,
    /// The channels of each place.
    Layer,
}

/// Activation of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nonlinearity {
    /// Nothing: a linear autoencoder.
    None,
    /// x · σ(x)
    #[default]
    Silu,
    /// x · Φ(x)
    Gelu,
    /// x, or x / 100 below zero; what p-diff has.
    LeakyRelu,
}

impl Nonlinearity {
    fn apply(self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
            Self::Silu => Activation::Silu.apply(x),
            Self::Gelu => Activation::Gelu.apply(x),
            Self::LeakyRelu => (x.relu()? * 0.99)? + (x * 0.01)?,
        }
    }
}

/// One stage, downwards or upwards.
#[derive(Clone, Debug)]
pub(super) struct Folding {
    up: bool,
    pub(super) fold: usize,
    /// Channels at the side of the latent.
    pub(super) inner: usize,
    /// Channels at the side of the vector.
    outer: usize,
    /// Kernel of the fold: (inner, outer · fold) downwards, (inner, outer · fold) upwards as well, flattened from
    /// PyTorch's (out, in, k) and (in, out, k).
    weight: Tensor,
    /// (inner) downwards, (outer) upwards; none where an instance norm follows, which would take it away.
    bias: Option<Tensor>,
    convolution: Option<Same>,
    norm: StageNorm,
    /// At the side of the vector; none for the outermost stage.
    activation: Nonlinearity,
    /// Between fold and convolution.
    between: Nonlinearity,
    /// (places, inner), added at the side of the latent.
    position: Option<Tensor>,
}

#[derive(Clone, Debug)]
enum StageNorm {
    None,
    Instance(GroupNorm),
    Layer(LayerNorm),
}

/// Where a stage stands.
pub(super) struct FoldingShape {
    /// Places at the side of the vector.
    pub(super) length: usize,
    /// Channels there.
    pub(super) channels: usize,
    pub(super) outermost: bool,
    pub(super) position: bool,
    /// Whether an instance norm follows, which takes away what all places share.
    pub(super) centred: bool,
}

impl Folding {
    /// From the vector towards the latent; `last` gives the latent itself, which gets no offsets.
    pub(super) fn down(
        stage: &Stage,
        shape: &FoldingShape,
        last: bool,
        vb: VarBuilder,
    ) -> candle_core::Result<Self> {
        let FoldingShape { length, channels: outer, position, centred, .. } = *shape;
        // The convolution widens, so that the fold has something to choose from.
        let wide = if stage.kernel > 0 { stage.channels } else { outer };
        let init = uniform(wide * stage.fold);
        Ok(Self {
            up: false,
            fold: stage.fold,
            inner: stage.channels,
            outer: wide,
            weight: vb.get_with_hints((stage.channels, wide * stage.fold), "weight", init)?,
            bias: bias(!centred, stage.channels, init, &vb)?,
            convolution: Same::new(outer, wide, stage.kernel, true, vb.pp("conv"))?,
            norm: StageNorm::new(stage, shape, vb.pp("norm"))?,
            activation: if shape.outermost { Nonlinearity::None } else { stage.activation },
            between: stage.activation,
            position: offsets(position && !last, length / stage.fold, stage.channels, &vb)?,
        })
    }

    /// From the latent towards the vector.
    pub(super) fn up(stage: &Stage, shape: &FoldingShape, vb: VarBuilder) -> candle_core::Result<Self> {
        let FoldingShape { length, channels: outer, position, outermost, .. } = *shape;
        let wide = if stage.kernel > 0 { stage.channels } else { outer };
        let init = uniform(wide * stage.fold);
        let centred = stage.norm == Norm::Instance && !outermost;
        Ok(Self {
            up: true,
            fold: stage.fold,
            inner: stage.channels,
            outer: wide,
            weight: vb.get_with_hints((stage.channels, wide * stage.fold), "weight", init)?,
            bias: bias(!centred || stage.kernel > 0, wide, init, &vb)?,
            convolution: Same::new(wide, outer, stage.kernel, !centred, vb.pp("conv"))?,
            norm: StageNorm::new(stage, shape, vb.pp("norm"))?,
            activation: if shape.outermost { Nonlinearity::None } else { stage.activation },
            between: stage.activation,
            position: offsets(position, length / stage.fold, stage.channels, &vb)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.up { self.unfold(x) } else { self.fold(x) }
    }

    /// `x` (B, N, C) → (B, N / fold, inner).
    fn fold(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.activation.apply(&self.norm.forward(x)?)?;
        let x = match &self.convolution {
            Some(convolution) => self.between.apply(&convolution.forward(&x)?)?,
            None => x,
        };
        let (b, n, _) = x.dims3()?;
        let rows = x.reshape((b, n / self.fold, self.fold * self.outer))?;
        let kernel =
            self.weight.reshape((self.inner, self.outer, self.fold))?.transpose(1, 2)?.contiguous()?;
        let y = linear(&rows, &kernel.reshape((self.inner, ()))?, self.bias.as_ref())?;
        match &self.position {
            Some(position) => y.broadcast_add(position),
            None => Ok(y),
        }
    }

    /// `x` (B, N, inner) → (B, N · fold, C).
    fn unfold(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = match &self.position {
            Some(position) => x.broadcast_add(position)?,
            None => x.clone(),
        };
        let (b, n, inner) = x.dims3()?;
        let kernel = self.weight.reshape((inner, self.outer, self.fold))?.permute((2, 1, 0))?.contiguous()?;
        let kernel = kernel.reshape((self.fold * self.outer, inner))?; // (fold · out, in)
        let bias = self.bias.as_ref().map(|bias| bias.repeat(self.fold)).transpose()?;
        let y = linear(&x, &kernel, bias.as_ref())?.reshape((b, n * self.fold, self.outer))?;
        let y = match &self.convolution {
            Some(convolution) => convolution.forward(&self.between.apply(&y)?)?,
            None => y,
        };
        self.activation.apply(&self.norm.forward(&y)?)
    }
}

/// U(−1/√fan, 1/√fan), as PyTorch starts its convolutions.
fn uniform(fan: usize) -> Init {
    let bound = 1.0 / (fan as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

fn bias(wanted: bool, channels: usize, init: Init, vb: &VarBuilder) -> candle_core::Result<Option<Tensor>> {
    wanted.then(|| vb.get_with_hints(channels, "bias", init)).transpose()
}

fn offsets(
    wanted: bool,
    places: usize,
    channels: usize,
    vb: &VarBuilder,
) -> candle_core::Result<Option<Tensor>> {
    let init = Init::Randn { mean: 0.0, stdev: 0.02 };
    wanted.then(|| vb.get_with_hints((places, channels), "position", init)).transpose()
}

impl StageNorm {
    /// ε of torch.nn.InstanceNorm1d and LayerNorm.
    const EPS: f64 = 1e-5;

    fn new(stage: &Stage, shape: &FoldingShape, vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(match stage.norm {
            _ if shape.outermost => Self::None,
            Norm::None => Self::None,
            Norm::Instance => Self::Instance(GroupNorm::new(shape.channels, shape.channels, Self::EPS, vb)?),
            Norm::Layer => Self::Layer(LayerNorm::new(shape.channels, Self::EPS, vb)?),
        })
    }

    /// `x` (B, N, C) → same.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
            Self::Instance(norm) => {
                norm.forward(&x.transpose(1, 2)?.contiguous()?)?.transpose(1, 2)?.contiguous()
            }
            Self::Layer(norm) => norm.forward(x),
        }
    }
}

/// A convolution that keeps the length, with zeros beyond both ends.
#[derive(Clone, Debug)]
struct Same {
    /// (out, in · k), flattened from PyTorch's (out, in, k).
    weight: Tensor,
    /// (out)
    bias: Option<Tensor>,
    kernel: usize,
}

impl Same {
    fn new(
        input: usize,
        output: usize,
        kernel: usize,
        with_bias: bool,
        vb: VarBuilder,
    ) -> candle_core::Result<Option<Self>> {
        if kernel == 0 {
            return Ok(None);
        }
        let init = uniform(input * kernel);
        let weight = vb.get_with_hints((output, input * kernel), "weight", init)?;
        Ok(Some(Self { weight, bias: bias(with_bias, output, init, &vb)?, kernel }))
    }

    /// `x` (B, N, in) → (B, N, out).
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (_, n, input) = x.dims3()?;
        let output = self.weight.dim(0)?;
        let padded = x.pad_with_zeros(1, self.kernel / 2, self.kernel / 2)?;
        let shifted =
            (0..self.kernel).map(|k| padded.narrow(1, k, n)).collect::<candle_core::Result<Vec<_>>>()?;
        let rows = Tensor::cat(&shifted, 2)?; // (B, N, k · in)
        let kernel = self.weight.reshape((output, input, self.kernel))?.transpose(1, 2)?.contiguous()?;
        linear(&rows, &kernel.reshape((output, ()))?, self.bias.as_ref())
    }
}
