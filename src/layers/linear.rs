//! y = x·Wᵀ + b, with an optional LoRA beside it.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::Pass;
use super::linear_op::linear_in;
use super::lora_linear::{Adapter, lora_linear};

/// A linear layer; `weight` (out, in), `bias` (out).
#[derive(Clone, Debug)]
pub struct Linear {
    /// (out, in)
    pub weight: Tensor,
    /// (out)
    pub bias: Option<Tensor>,
    /// A LoRA applied at run time: y + scale · up(down(x)).
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// A layer with bias, initialised as PyTorch does: U(−1/√in, 1/√in).
    pub fn new(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let mut linear = Self::without_bias(input, output, vb.clone())?;
        linear.bias = Some(vb.get_with_hints(output, "bias", uniform(input))?);
        Ok(linear)
    }

    /// A layer without bias.
    pub fn without_bias(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((output, input), "weight", uniform(input))?;
        Ok(Self { weight, bias: None, adapter: None })
    }

    /// A layer whose weight and bias start at zero.
    pub fn zeros(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((output, input), "weight", candle_nn::Init::Const(0.0))?;
        let bias = Some(vb.get_with_hints(output, "bias", candle_nn::Init::Const(0.0))?);
        Ok(Self { weight, bias, adapter: None })
    }
}

impl Linear {
    /// The same for the last layer of a checkpointed piece: in [`Pass::Recompute`] the values may be zeros.
    pub fn forward_last(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let (weight, bias) = (&self.weight, self.bias.as_ref());
        let Some(adapter) = &self.adapter else { return linear_in(x, weight, bias, pass) };
        match lora_linear(x, weight, bias, adapter, pass)? {
            Some(y) => Ok(y),
            None => linear_in(x, weight, bias, pass)? + adapter.forward(x)?,
        }
    }
}

/// U(−1/√fan, 1/√fan), PyTorch's default for linear layers and convolutions.
pub(super) fn uniform(fan_in: usize) -> candle_nn::Init {
    let bound = 1.0 / (fan_in as f64).sqrt();
    candle_nn::Init::Uniform { lo: -bound, up: bound }
}

impl Module for Linear {
    /// `x` (…, in) → (…, out); with an adapter of K people the first axis is K · samples.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_last(x, Pass::Forward)
    }
}
