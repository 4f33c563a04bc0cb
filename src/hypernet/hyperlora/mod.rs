//! HyperLoRA (Li et al. 2025, CVPR, arXiv 2503.16944): photos of a person → rank-8 LoRA of SDXL's 560 attention
//! projections, in one forward pass. Written from a description of its tensors and formulas; the released weights are
//! CC BY-NC 4.0 and not part of this program.
//!
//! ```text
//! ArcFace vector ──► id_projector: 16 tokens ──┐
//! CLIP tokens (N, 1024) ───────────────────────┴► resampler: 1120 queries ──► 1120 unit vectors of 128 coefficients
//! 8 coefficient vectors of an attention module, 128 basis matrices each ──► down and up of its q, k, v and out
//! ```
//!
//! Released weights are a folder of four files ([`FILES`]) without a config; all sizes but the width of a head are those
//! of the tensors.

mod basis;
mod resampler;
#[cfg(test)]
mod tests;

use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use basis::Basis;
use resampler::{IdProjector, Resampler};

use super::PersonToLora;
use crate::lora::Lora;
use crate::weights::model_folder::{ModelFiles, WeightType};
use crate::weights::sha256;

/// The files of a folder with HyperLoRA's weights.
pub const FILES: [&str; 4] = [
    "hyper_lora_modules.json",
    "hyper_lora_modules.safetensors",
    "id_projector.safetensors",
    "resampler.safetensors",
];

/// The words that the released weights were trained to hear at the start of the prompt.
pub const TRIGGER: &str = "fcsks fxhks fhyks";

/// Caption of photos of a person, for fine-tuning: it begins with [`TRIGGER`].
pub const CAPTION: &str = "fcsks fxhks fhyks, a photo of a person";

/// The weight at which the LoRA is used unless another is asked for; the publisher recommends 0.75 to 0.85.
pub const LORA_SCALE: f64 = 0.8;

/// The prompt with the words that a LoRA needs in front, unless it holds them.
pub fn with_trigger(prompt: &str, words: &str) -> String {
    if prompt.contains(words) { prompt.to_string() } else { format!("{words}, {prompt}") }
}

/// SHA-256 of the four files, one after the other; remembered until one changes.
///
/// # Errors
/// A file cannot be read.
pub fn sha256(files: &ModelFiles) -> Result<String> {
    let folder = files.name();
    sha256::remembered(&FILES.map(|file| Path::new(&folder).join(file)))
}

/// The numbers in each weight file, by its name without extension; reads only headers.
///
/// # Errors
/// [`crate::failure::Failure::Unusable`] for a file that is missing or damaged.
pub fn parameters(files: &ModelFiles) -> Result<Vec<(&'static str, u64)>> {
    let count = |file| {
        let stored = files.reader("", file)?;
        let names = stored.names().into_iter();
        let sizes = names.map(|name| Ok(stored.shape(&name)?.iter().product::<usize>() as u64));
        Ok((file, sizes.sum::<Result<u64>>()?))
    };
    FILES.into_iter().filter_map(|file| file.strip_suffix(".safetensors")).map(count).collect()
}

/// Width of an attention head, the one size that no tensor shows.
const HEAD_WIDTH: usize = 64;

/// ε of every norm.
const EPS: f64 = 1e-5;

/// What is known of a person from one photo.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// ArcFace's unit vector.
    pub face: Vec<f32>,
    /// CLIP's `hidden_states[-2]` of the grey-background crop, (N, D), the class token first.
    pub clip: Tensor,
}

/// What the shapes in a folder say; no weight is read for it.
#[derive(Clone, Debug)]
pub struct Shapes {
    basis: Basis,
    resampler: resampler::Sizes,
    /// E, numbers of the face vector.
    face: usize,
    /// T, tokens that are made of it.
    tokens: usize,
}

impl Shapes {
    /// Whether a folder holds these weights, whole or in part.
    pub fn are_in(files: &ModelFiles) -> bool {
        FILES.iter().any(|file| files.exists(file))
    }

    /// Reads a folder.
    ///
    /// # Errors
    /// [`Failure::Unusable`](crate::failure::Failure) with the file for anything that is missing or does not fit.
    pub fn read(files: &ModelFiles) -> Result<Self> {
        Self::with_heads_of(HEAD_WIDTH, files)
    }

    fn with_heads_of(head_width: usize, files: &ModelFiles) -> Result<Self> {
        let basis = Basis::open(files)?;
        let sizes = resampler::Sizes::read(files, head_width)?;
        let stored = files.reader("", "id_projector")?;
        let [numbers, face] = stored.shape("0.weight")?[..] else {
            return Err(stored.unusable("`0.weight` is no matrix"));
        };
        let (width, wanted) = (stored.shape("2.weight")?.iter().product::<usize>(), sizes.face_width);
        if width != wanted || !numbers.is_multiple_of(width.max(1)) {
            let why = format!(
                "it gives {numbers} numbers in tokens of {width}, the resampler wants tokens of {wanted}"
            );
            return Err(stored.unusable(why));
        }
        let (modules, k) = (basis.modules.len(), basis.coefficients);
        if (sizes.queries, sizes.outputs) != (8 * modules, k) {
            let why = format!(
                "it gives {} vectors of {} numbers; the {modules} modules of `{}` want {} of {k}",
                sizes.queries,
                sizes.outputs,
                FILES[0],
                8 * modules
            );
            return Err(files.unusable(FILES[3], why));
        }
        Ok(Self { basis, resampler: sizes, face, tokens: numbers / width })
    }

    /// The layers that a LoRA will have: diffusers path, outputs and inputs.
    pub fn layers(&self) -> impl Iterator<Item = (String, usize, usize)> {
        self.basis.modules.iter().flat_map(basis::Module::layers)
    }

    /// R of every layer.
    pub fn rank(&self) -> usize {
        self.basis.rank
    }

    /// Reads the two networks; the bases stay in their file.
    ///
    /// # Errors
    /// [`Failure::Unusable`](crate::failure::Failure) with the file for tensors that are missing, damaged or left over.
    pub fn load(self, files: &ModelFiles, device: &Device) -> Result<HyperLora> {
        let weights = WeightType::as_good_as(DType::F32, device);
        let build = |vb| Resampler::new(&self.resampler, vb);
        let resampler = files.load("", "resampler", weights, device, build)?;
        let build = |vb| IdProjector::new(self.face, self.tokens, self.resampler.face_width, vb);
        let id_projector = files.load("", "id_projector", weights, device, build)?;
        Ok(HyperLora { id_projector, resampler, shapes: self, files: files.clone(), device: device.clone() })
    }
}

/// HyperLoRA's networks; see [`Shapes::load`].
pub struct HyperLora {
    id_projector: IdProjector,
    resampler: Resampler,
    shapes: Shapes,
    /// With the bases, which are read as they are mixed.
    files: ModelFiles,
    device: Device,
}

impl PersonToLora for HyperLora {
    /// Of each photo; they count alike.
    type Conditions = Vec<Conditions>;

    fn predict(&self, people: &[(Vec<Conditions>, f64)]) -> Result<Lora> {
        self.lora(&self.coefficients(people)?)
    }
}

impl HyperLora {
    /// The coefficients of one person or of a mixture: (N, K), each row of length 1. A person is a mean over photos, taken before rows are brought to length 1.
    ///
    /// # Errors
    /// Conditions of other widths than those that it was trained with.
    pub fn coefficients(&self, people: &[(Vec<Conditions>, f64)]) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (photos, weight) in people {
            for photo in photos {
                let z = (self.photo(photo)? * (weight / photos.len() as f64))?;
                sum = Some(match sum {
                    Some(sum) => (sum + z)?,
                    None => z,
                });
            }
        }
        let z = sum.ok_or_else(|| anyhow::anyhow!("no photo was given"))?;
        let length = (z.sqr()?.sum_keepdim(1)? + 1e-8)?.sqrt()?;
        Ok(z.broadcast_div(&length)?)
    }

    /// The resampler's output for one photo, (N, K).
    fn photo(&self, photo: &Conditions) -> Result<Tensor> {
        let (face, width) = (self.shapes.face, self.shapes.resampler.clip_width);
        ensure!(photo.face.len() == face, "the face vector has {} numbers, wanted {face}", photo.face.len());
        let given = photo.clip.dims2()?.1;
        ensure!(given == width, "CLIP's tokens have {given} numbers, wanted {width}");
        let e = Tensor::from_slice(&photo.face, (1, face), &self.device)?;
        let clip = photo.clip.to_device(&self.device)?.to_dtype(DType::F32)?.unsqueeze(0)?;
        Ok(self.resampler.forward(&self.id_projector.forward(&e)?, &clip)?.squeeze(0)?)
    }

    /// The LoRA that `coefficients` (N, K) mix from the bases, in f32 on the CPU. The bases are read once, matrix by matrix.
    pub fn lora(&self, coefficients: &Tensor) -> Result<Lora> {
        self.shapes.basis.lora(&self.files, &coefficients.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
    }
}
