//! The LoRAs of an image: their files, their weights, and their application to the model.

use std::io::Cursor;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::pipeline::SdxlLoader;
use super::text::TextEncoders;
use super::unet::UNet;
use crate::failure::Failure;
use crate::layers::Visit;
use crate::lora::adapter::AdapterFile;
use crate::lora::apply::{self, Branch, Originals, Unmatched};
use crate::lora::block_weights::BlockWeights;
use crate::lora::embedding::Embedding;
use crate::lora::file::{self, Format, Missing, Reading};
use crate::lora::ldm_keys::BlockLayout;
use crate::lora::summary::Summary;
use crate::lora::{Lora, LoraError, listed_for_user};
use crate::named::named;
use crate::progress;
use crate::weights::sha256;

/// A LoRA with its name, weight and hash, as the image's metadata record them.
pub struct StackedLora {
    /// File name without extension.
    pub name: String,
    /// The file as the user named it; the name where there is none.
    pub file: String,
    /// Weight, by part of the model.
    pub strength: BlockWeights,
    /// A1111's hash of the file.
    pub hash: String,
    /// Its layers.
    pub changes: AdapterFile,
    /// Kind, rank and origin of the file.
    pub report: Summary,
}

named! {
    /// How LoRAs change the base.
    pub enum LoraMode {
        /// Into the weights, once: sampling costs nothing extra.
        Merge = "merge",
        /// Beside the weights, at each step.
        Runtime = "runtime",
    }
}

/// LoRAs and how they are applied.
pub struct LoraStack {
    /// In the order of the command line.
    pub loras: Vec<StackedLora>,
    /// Merged, or beside the weights.
    pub mode: LoraMode,
    /// Whether the unconditional pass of guidance is without LoRAs; needs [`LoraMode::Runtime`].
    pub positive_only: bool,
    /// Guidance scale of the images: without guidance there is no unconditional pass.
    pub guidance: f64,
    /// Whether layers that a LoRA changes are computed in f32, whatever type the file has.
    pub widen: bool,
    /// What happens where a part of a LoRA cannot be used.
    pub missing: Missing,
    /// Textual inversions of files of their own, each with its file.
    pub embeddings: Vec<(String, Embedding)>,
}

impl LoraStack {
    /// Adds a LoRA that is not read from a file; its hash is that of the file which `format` gives.
    pub fn push(
        &mut self,
        lora: &Lora,
        name: &str,
        weight: f64,
        format: Format,
        layout: &BlockLayout,
    ) -> Result<()> {
        let bytes = file::to_bytes(lora, format, layout)?;
        let report = Summary::read(&mut Cursor::new(&bytes), layout)?;
        let (strength, hash) = (BlockWeights::all(weight), lora_hash(&bytes));
        self.loras.push(StackedLora {
            name: name.into(),
            file: name.into(),
            strength,
            hash,
            changes: lora.into(),
            report,
        });
        Ok(())
    }

    /// Adds the LoRA of a file.
    ///
    /// # Errors
    /// [`LoraError`] for a file that is no LoRA.
    pub fn push_file(&mut self, path: &Path, strength: BlockWeights, layout: &BlockLayout) -> Result<()> {
        let changes = Reading { layout, missing: self.missing }.read(path)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let report = Summary::of(path, layout)?;
        let hash = lora_hash(&std::fs::read(file::weights_in(path)?)?);
        let file = path.display().to_string();
        self.loras.push(StackedLora { name, file, strength, hash, changes, report });
        Ok(())
    }

    /// Checks each LoRA against the layers of `model` before any weight is loaded, and describes it.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a LoRA of another base; [`Failure::Usage`] for one that cannot change the prompt's pass
    /// alone.
    pub fn check(&self, model: &SdxlLoader) -> Result<Value> {
        if self.loras.is_empty() && self.embeddings.is_empty() {
            return Ok(json!([]));
        }
        let mut skeleton = model.skeleton()?;
        self.check_embeddings(skeleton.text_widths())?;
        let mut reports = Vec::new();
        for lora in &self.loras {
            let alone = [(&lora.changes, lora.strength.clone())];
            let missing = apply::check(|visit| skeleton.visit_layers(visit), &alone, Unmatched::Allow)
                .map_err(|error| {
                    Failure::Unusable(format!("cannot use the LoRA `{}`: {error}", lora.file))
                })?;
            progress::note(format_args!("LoRA `{}`: {}", lora.name, lora.report.line()));
            if !missing.is_empty() {
                let why = format!(
                    "{} of {} layers, {:.0} % of its weights, have no place in this base and are left out: {}",
                    missing.len(),
                    lora.changes.modules.len(),
                    100.0 * lora.changes.share_of(&missing),
                    listed_for_user(&missing)
                );
                self.missing
                    .report(&lora.file, why)
                    .map_err(|error| Failure::unusable(Path::new(&lora.file), error))?;
            }
            let mut report = serde_json::to_value(&lora.report)?;
            report["name"] = json!(lora.name);
            report["weight"] = json!(lora.strength.everywhere());
            report["without_place"] = json!(missing);
            reports.push(report);
        }
        if self.branch(&skeleton.unet) == Branch::Positive {
            self.apply_to_unet(&mut skeleton.unet)?;
        }
        Ok(reports.into())
    }

    /// Applies the LoRAs to the UNet.
    pub fn apply_to_unet(&self, unet: &mut UNet) -> Result<()> {
        let loras = self.in_order();
        if self.widen {
            apply::widen(|visit| unet.visit_layers(visit), &loras)?;
        }
        match self.mode {
            LoraMode::Merge => {
                let visit = |visit: &mut Visit| unet.visit_layers(visit);
                apply::merge(visit, &loras, Unmatched::Ignore, Originals::Drop)?;
            }
            LoraMode::Runtime => {
                let branch = self.branch(unet);
                let attached =
                    apply::attach(|visit| unet.visit_layers(visit), &loras, Unmatched::Ignore, branch);
                attached.map_err(|error| match error {
                    LoraError::Kind { .. } => Failure::Usage(format!("--lora-positive-only: {error}")).into(),
                    other => anyhow::Error::from(other),
                })?;
            }
        }
        Ok(())
    }

    /// Applies the LoRAs to the text encoders. Prompts are encoded one by one, so these have a single branch.
    pub fn apply_to_text(&self, text: &mut TextEncoders) -> Result<()> {
        let loras = self.in_order();
        if self.widen {
            apply::widen(|visit| text.visit_layers(visit), &loras)?;
        }
        for (_, embedding) in self.embeddings() {
            text.add_embedding(embedding)?;
        }
        let visit = |visit: &mut Visit| text.visit_layers(visit);
        match self.mode {
            LoraMode::Merge => apply::merge(visit, &loras, Unmatched::Ignore, Originals::Drop)?,
            LoraMode::Runtime => apply::attach(visit, &loras, Unmatched::Ignore, Branch::Both)?,
        };
        Ok(())
    }

    /// The textual inversions with their files, each name once: those of files of their own come first.
    pub fn embeddings(&self) -> Vec<(&str, &Embedding)> {
        let bundled = self
            .loras
            .iter()
            .flat_map(|lora| lora.changes.embeddings.iter().map(|e| (lora.file.as_str(), e)));
        let mut all: Vec<(&str, &Embedding)> = Vec::new();
        for (file, embedding) in self.embeddings.iter().map(|(file, e)| (file.as_str(), e)).chain(bundled) {
            if all.iter().all(|(_, other)| other.name != embedding.name) {
                all.push((file, embedding));
            }
        }
        all
    }

    /// # Errors
    /// [`Failure::Unusable`] for vectors of other widths than the text encoders'.
    fn check_embeddings(&self, widths: [usize; 2]) -> Result<()> {
        for (file, embedding) in self.embeddings() {
            let own = [embedding.clip_l.dim(1)?, embedding.clip_g.dim(1)?];
            if own != widths {
                let why = format!(
                    "the embedding `{}` has vectors of {} and {} numbers, the text encoders of this base are {} and {} wide",
                    embedding.name, own[0], own[1], widths[0], widths[1]
                );
                return Err(Failure::unusable(Path::new(file), why));
            }
        }
        Ok(())
    }

    fn branch(&self, unet: &UNet) -> Branch {
        if self.positive_only && unet.config.takes_two_passes(self.guidance) {
            Branch::Positive
        } else {
            Branch::Both
        }
    }

    /// By hash: f32 sums depend on their order, and results must not depend on that of the command line.
    fn in_order(&self) -> Vec<(&AdapterFile, BlockWeights)> {
        let mut order: Vec<&StackedLora> = self.loras.iter().collect();
        let weight = |lora: &StackedLora| lora.strength.everywhere();
        order.sort_by(|a, b| a.hash.cmp(&b.hash).then(weight(a).total_cmp(&weight(b))));
        order.iter().map(|lora| (&lora.changes, lora.strength.clone())).collect()
    }
}

/// A1111's hash of a LoRA: SHA-256 of a `.safetensors` behind its header, so that other metadata does not
/// change it (`modules/hashes.py`, `addnet_hash_safetensors`).
fn lora_hash(bytes: &[u8]) -> String {
    let header = bytes.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length) as usize);
    sha256::of_bytes(bytes.get(header.saturating_add(8)..).unwrap_or(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lora_s_hash_leaves_out_its_header() {
        let file =
            |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), b"data"].concat();
        assert_eq!(lora_hash(&file("{}")), lora_hash(&file("{\"__metadata__\": {}}")));
        assert_eq!(lora_hash(&file("{}")), sha256::of_bytes(b"data"));
    }
}
