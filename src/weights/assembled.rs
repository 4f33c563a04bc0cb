//! A model that lies in one file: where each tensor of the usual folder is, and how it is stored.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::Tensor;

/// A folder that is not there: configs in memory, and the tensors of one `.safetensors` under other names.
#[derive(Debug)]
pub struct Assembled {
    /// The weight file.
    pub file: PathBuf,
    /// Configs and vocabularies by their path in a folder, for example `unet/config.json`.
    pub texts: BTreeMap<String, Cow<'static, str>>,
    /// For each component, for example `unet`, where its tensors lie.
    pub tensors: BTreeMap<String, BTreeMap<String, Place>>,
}

/// Where a tensor lies in an [`Assembled`] model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its name in the weight file.
    pub stored: String,
    /// How it lies there.
    pub form: Form,
    /// Name of the factor that its numbers are to be multiplied by: one, or one for each row.
    pub scale: Option<String>,
}

impl Place {
    /// A tensor without a factor.
    pub fn new(stored: impl Into<String>, form: Form) -> Self {
        Self { stored: stored.into(), form, scale: None }
    }
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As the network wants it.
    Whole,
    /// The n-th of three along the first axis: OpenCLIP keeps query, key and value together.
    Third(usize),
    /// Rows and columns exchanged.
    Transposed,
    /// As a 1×1 convolution, wanted as a matrix.
    Pointwise,
}

impl Form {
    /// The tensor as the network wants it.
    pub fn take(self, stored: Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Whole => Ok(stored),
            Self::Third(n) => {
                let rows = stored.dim(0)? / 3;
                stored.narrow(0, n * rows, rows)?.contiguous()
            }
            Self::Transposed => stored.t()?.contiguous(),
            Self::Pointwise => stored.flatten_from(1),
        }
    }

    /// The stored tensor with `part`, which the network wants, put into its place.
    pub fn put(self, stored: &Tensor, part: Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Whole => Ok(part),
            Self::Third(n) => {
                let rows = stored.dim(0)? / 3;
                let thirds =
                    (0..3).map(|i| if i == n { Ok(part.clone()) } else { stored.narrow(0, i * rows, rows) });
                Tensor::cat(&thirds.collect::<candle_core::Result<Vec<_>>>()?, 0)
            }
            Self::Transposed => part.t()?.contiguous(),
            Self::Pointwise => part.reshape(stored.shape()),
        }
    }

    /// The shape that the network wants of a tensor that is stored in this one.
    pub fn shape(self, stored: &[usize]) -> Vec<usize> {
        match (self, stored) {
            (Self::Third(_), [rows, rest @ ..]) => [&[rows / 3], rest].concat(),
            (Self::Transposed, [rows, columns]) => vec![*columns, *rows],
            (Self::Pointwise, [out, rest @ ..]) => vec![*out, rest.iter().product()],
            _ => stored.to_vec(),
        }
    }
}
