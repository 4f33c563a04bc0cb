//! The layers of a network by path, for adapters that change them.

use candle_core::Tensor;

use super::conv::Conv2d;
use super::linear::Linear;
use super::lora_linear::Adapter;

/// A layer that an adapter may change, as its network shows it.
pub enum Layer<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// A convolution.
    Conv(&'a mut Conv2d),
    /// GroupNorm or LayerNorm; both (C).
    Norm {
        /// Scale of the normalised values.
        weight: &'a mut Tensor,
        /// Shift.
        bias: &'a mut Tensor,
    },
}

/// Visitor: called by a network with each of its layers and its path.
pub type Visit<'a> = dyn FnMut(&str, Layer) + 'a;

impl Layer<'_> {
    /// Its weight; the first axis are the outputs.
    pub fn weight(&self) -> &Tensor {
        match self {
            Self::Linear(layer) => &layer.weight,
            Self::Conv(layer) => &layer.weight,
            Self::Norm { weight, .. } => weight,
        }
    }

    /// Its bias (out), where it has one.
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Linear(layer) => layer.bias.as_ref(),
            Self::Conv(layer) => layer.bias.as_ref(),
            Self::Norm { bias, .. } => Some(bias),
        }
    }

    /// Sets its weight, and its bias where it can be without.
    pub fn set(&mut self, new_weight: Tensor, new_bias: Option<Tensor>) {
        match self {
            Self::Linear(layer) => (layer.weight, layer.bias) = (new_weight, new_bias),
            Self::Conv(layer) => (layer.weight, layer.bias) = (new_weight, new_bias),
            Self::Norm { weight, bias } => {
                **weight = new_weight;
                if let Some(new_bias) = new_bias {
                    **bias = new_bias;
                }
            }
        }
    }

    /// Sets or takes off the adapter beside it; a norm has none.
    pub fn set_adapter(&mut self, adapter: Option<Adapter>) {
        match self {
            Self::Linear(layer) => layer.adapter = adapter,
            Self::Conv(layer) => layer.adapter = adapter,
            Self::Norm { .. } => {}
        }
    }
}
