//! LoRA: a small change ΔW = (alpha / R) · up · down to the linear layers of a model (Hu et al. 2021).
//!
//! [`file`] reads and writes the files that other programs exchange, [`keys`] knows their spellings, [`adapter`]
//! every kind of adapter that they hold, [`canonical`] brings its factors to one form, [`layout`] turns a
//! LoRA into the flat vector that the hypernetwork learns and back, [`apply`] puts all of them into a model, [`arithmetic`] adds, shortens and compares them.
//!
#![doc = include_str!("../docs/lora-files.md")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

pub mod file;
pub mod keys;

pub mod adapter;

pub mod canonical;
pub mod layout;

pub mod apply;
pub mod block_weights;

pub mod arithmetic;
pub mod low_rank;
pub mod summary;

/// A LoRA: changes to linear layers, and what is known about their origin.
#[derive(Clone, Debug, Default)]
pub struct Lora {
    /// By module path as diffusers spells it. The UNet's come without prefix
    /// (`down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`), those of the text encoders begin with
    /// `text_encoder.` or `text_encoder_2.`.
    pub layers: BTreeMap<String, LoraLayer>,
    /// The file's metadata: `ss_…`, `modelspec.…`, `difflora.…`.
    pub metadata: BTreeMap<String, String>,
}

/// The change of one linear layer.
#[derive(Clone, Debug)]
pub struct LoraLayer {
    /// A, (R, in).
    pub down: Tensor,
    /// B, (out, R).
    pub up: Tensor,
    /// ΔW is scaled by alpha / R.
    pub alpha: f32,
}

/// Metadata key of the words that call the person (ModelSpec 1.0.1).
pub const TRIGGER_PHRASE: &str = "modelspec.trigger_phrase";

impl Lora {
    /// The words in a prompt that call the person, where the file tells them.
    pub fn trigger_phrase(&self) -> Option<&str> {
        self.metadata.get(TRIGGER_PHRASE).map(String::as_str)
    }

    /// All factors in another number type and on another device.
    pub fn to(&self, dtype: DType, device: &Device) -> candle_core::Result<Self> {
        let convert = |tensor: &Tensor| tensor.to_device(device)?.to_dtype(dtype);
        let mut lora = self.clone();
        for layer in lora.layers.values_mut() {
            (layer.down, layer.up) = (convert(&layer.down)?, convert(&layer.up)?);
        }
        Ok(lora)
    }
}

impl LoraLayer {
    /// A layer from its two factors, `down` (R, in) and `up` (out, R).
    ///
    /// # Errors
    /// [`LoraError::Factors`] when they do not fit each other, named by `module`.
    pub fn new(module: &str, down: Tensor, up: Tensor, alpha: f32) -> Result<Self, LoraError> {
        match (down.dims(), up.dims()) {
            ([rank, _], [_, same]) if rank == same && *rank > 0 => Ok(Self { down, up, alpha }),
            (a, b) => {
                let (down, up) = (a.to_vec(), b.to_vec());
                Err(LoraError::Factors { module: module.to_string(), down, up })
            }
        }
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.down.dims()[0]
    }

    /// (out, in) of the linear layer that it changes.
    pub fn shape(&self) -> (usize, usize) {
        (self.up.dims()[0], self.down.dims()[1])
    }

    /// alpha / R.
    pub fn scale(&self) -> f64 {
        f64::from(self.alpha) / self.rank() as f64
    }

    /// ΔW = (alpha / R) · up · down, (out, in) in f32.
    pub fn delta(&self) -> candle_core::Result<Tensor> {
        self.up.to_dtype(DType::F32)?.matmul(&self.down.to_dtype(DType::F32)?)? * self.scale()
    }
}

/// What can be wrong with a LoRA, or between a LoRA and a model.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// No key of a file belongs to a LoRA.
    #[error(
        "none of its {count} tensors belongs to a LoRA that this program knows{}{}",
        if examples.is_empty() { String::new() } else { format!(", for example {}", listed(examples)) },
        guess.map(|guess| format!("; {guess}")).unwrap_or_default()
    )]
    NoLayers {
        /// Tensors in the file.
        count: usize,
        /// Their keys.
        examples: Vec<String>,
        /// What the file seems to be.
        guess: Option<&'static str>,
    },
    /// Two keys that say the same.
    #[error("`{first}` and `{second}` are the same part of the same layer in two spellings")]
    Twice {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// A kind of adapter that is not implemented, or not here.
    #[error("`{key}`: {kind} is not supported here")]
    Kind {
        /// A key that shows it.
        key: String,
        /// Its name.
        kind: &'static str,
    },
    /// Only one of the two factors is there.
    #[error("layer `{module}` lacks its `{missing}` factor")]
    Half {
        /// Which layer.
        module: String,
        /// `up` or `down`, or another part's name.
        missing: &'static str,
    },
    /// The two factors do not fit each other.
    #[error("layer `{module}`: down {down:?} and up {up:?} are not (R, in) and (out, R)")]
    Factors {
        /// Which layer.
        module: String,
        /// Shape of `down`.
        down: Vec<usize>,
        /// Shape of `up`.
        up: Vec<usize>,
    },
    /// A part of a shape that no such part has.
    #[error("layer `{module}`: {part} of shape {shape:?} is no part of a LoRA")]
    Part {
        /// Which layer.
        module: String,
        /// Which part.
        part: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A factor or alpha that is NaN or infinite.
    #[error("`{module}` holds numbers that are not finite")]
    NotFinite {
        /// Which layer, or which key of a file.
        module: String,
    },
    /// A layer of another size than the model's.
    #[error(
        "layer `{module}` is made for a weight of {lora:?}, the model has {model:?}{}",
        guess.as_deref().unwrap_or("; is the LoRA made for this base?")
    )]
    Size {
        /// Which layer.
        module: String,
        /// Shape of the weight that the LoRA wants, 0 for an axis that it does not tell.
        lora: Vec<usize>,
        /// Shape of the model's weight.
        model: Vec<usize>,
        /// What the LoRA seems to be made for.
        guess: Option<String>,
    },
    /// Layers for which the model has no place.
    #[error(
        "{} of {count} layers have no place in this model: {}{}",
        modules.len(), listed(modules), guess.as_deref().unwrap_or("; is the LoRA made for this base?")
    )]
    NoPlace {
        /// Layers in the LoRA.
        count: usize,
        /// Those without a place.
        modules: Vec<String>,
        /// What the LoRA seems to be made for.
        guess: Option<String>,
    },
    /// A file that is damaged or no safetensors.
    #[error(transparent)]
    Header(#[from] crate::weights::header::HeaderError),
    /// A module that has no name in a file format.
    #[error("layer `{module}` has no name in {format} files")]
    NoName {
        /// Which layer.
        module: String,
        /// The format.
        format: &'static str,
    },
    /// A LoRA and a layout that do not fit.
    #[error("layer `{module}`: {why}; the layout is another one than the LoRA was made with")]
    Layout {
        /// Which layer.
        module: String,
        /// What differs.
        why: String,
    },
    /// A vector of another length than the layout's.
    #[error("a vector of {given} numbers, the layout has {wanted}")]
    Length {
        /// Numbers given.
        given: usize,
        /// Numbers in the layout.
        wanted: usize,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Up to ten names, and how many more there are.
pub(crate) fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(10).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(10) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// The same for a warning; all names where the user asked for everything (`--verbose`).
pub(crate) fn listed_for_user(names: &[String]) -> String {
    if !crate::progress::is_verbose() {
        return listed(names);
    }
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
