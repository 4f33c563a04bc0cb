//! Textual inversion (Gal et al. 2022, arXiv 2208.01618): words that stand for learned token vectors of both text
//! encoders. LoRA files bring them along as `bundle_emb.NAME.clip_l` and `bundle_emb.NAME.clip_g` (A1111's
//! `network.py`, OneTrainer); files of their own hold `clip_l` and `clip_g`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::LoraError;
use crate::failure::Failure;
use crate::weights;

/// How the keys of embeddings in a LoRA file begin.
pub(super) const BUNDLED: &str = "bundle_emb.";

/// Most vectors of one embedding: a prompt's chunk takes no more tokens.
pub const MAX_VECTORS: usize = 75;

/// The vectors that a word stands for.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// The word, or words, by which prompts call it.
    pub name: String,
    /// Vectors of the first text encoder, (N, D₁).
    pub clip_l: Tensor,
    /// Vectors of the second text encoder, (N, D₂).
    pub clip_g: Tensor,
}

impl Embedding {
    /// # Errors
    /// A sentence about vectors that are of no embedding.
    fn new(name: &str, clip_l: Tensor, clip_g: Tensor) -> Result<Self, String> {
        let rows = |tensor: &Tensor| match tensor.rank() {
            1 => tensor.unsqueeze(0).ok(),
            2 => Some(tensor.clone()),
            _ => None,
        };
        let (Some(clip_l), Some(clip_g)) = (rows(&clip_l), rows(&clip_g)) else {
            return Err("its vectors are no rows of a matrix".into());
        };
        let [count, other] = [clip_l.dims()[0], clip_g.dims()[0]];
        if count != other {
            return Err(format!("clip_l has {count} vectors and clip_g {other}"));
        }
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(format!("it has {count} vectors; at most {MAX_VECTORS} fit into a prompt"));
        }
        for tensor in [&clip_l, &clip_g] {
            let sum = tensor.to_dtype(DType::F32).and_then(|t| t.abs()?.sum_all()?.to_scalar::<f32>());
            if !sum.is_ok_and(f32::is_finite) {
                return Err("it holds numbers that are not finite".into());
            }
        }
        Ok(Self { name: name.into(), clip_l, clip_g })
    }

    /// The embedding of a `.safetensors` file, called by the file's name without its extension.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a file without `clip_l` and `clip_g`, and for vectors of which no embedding can be made.
    pub fn read(path: &Path) -> Result<Self> {
        let mut tensors = weights::read_file(path)?;
        let (Some(clip_l), Some(clip_g)) = (tensors.remove("clip_l"), tensors.remove("clip_g")) else {
            let why = "it holds no `clip_l` and `clip_g`, the vectors of SDXL's two text encoders; embeddings for SD 1.x \
                       and SD 2 do not fit";
            return Err(Failure::unusable(path, why));
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::new(&name, clip_l, clip_g).map_err(|why| Failure::unusable(path, why))
    }

    /// How many tokens of a prompt it takes.
    pub fn vectors(&self) -> usize {
        self.clip_l.dims()[0]
    }

    /// Its tensors in a LoRA file.
    pub(super) fn tensors(&self) -> [(String, Tensor); 2] {
        let key = |part: &str| format!("{BUNDLED}{}.{part}", self.name);
        [(key("clip_l"), self.clip_l.clone()), (key("clip_g"), self.clip_g.clone())]
    }
}

/// The keys of the embeddings among `keys` by their names, those of `clip_l` and `clip_g`; other keys stay.
pub(super) fn take_pairs(keys: &mut Vec<String>) -> BTreeMap<String, [String; 2]> {
    let name = |key: &String| Some(key.strip_prefix(BUNDLED)?.strip_suffix(".clip_l")?.to_string());
    let names: Vec<String> = keys.iter().filter_map(name).filter(|name| !name.is_empty()).collect();
    let mut pairs = BTreeMap::new();
    for name in names {
        let pair = ["clip_l", "clip_g"].map(|part| format!("{BUNDLED}{name}.{part}"));
        if pair.iter().all(|key| keys.contains(key)) {
            keys.retain(|key| !pair.contains(key));
            pairs.insert(name, pair);
        }
    }
    pairs
}

/// The embedding of a LoRA file.
///
/// # Errors
/// [`LoraError::Embedding`].
pub(super) fn bundled(name: &str, clip_l: Tensor, clip_g: Tensor) -> Result<Embedding, LoraError> {
    Embedding::new(name, clip_l, clip_g).map_err(|why| LoraError::Embedding { name: name.into(), why })
}
