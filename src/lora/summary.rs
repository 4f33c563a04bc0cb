//! What a LoRA file is, from its header and alphas alone: the factors, which may be gigabytes, are not read.

use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::path::Path;

use anyhow::Result;
use candle_core::DType;
use serde::Serialize;

use super::embedding::take_pairs;
use super::file;
use super::keys::{self, Part};
use super::ldm_keys::BlockLayout;
use super::peft_config::{ConfigFile, PeftConfig};
use crate::failure::Failure;
use crate::weights::header::{Entry, Header};

/// The facts about a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Modules of each kind.
    pub kinds: BTreeMap<String, usize>,
    /// Modules of each rank, where a kind has one.
    pub ranks: BTreeMap<usize, usize>,
    /// Modules of each alpha, where a kind has one; it is the rank where the file tells none.
    pub alphas: BTreeMap<String, usize>,
    /// Modules whose alpha is not in the file.
    pub without_alpha: usize,
    /// Modules of `unet`, `text_encoder`, `text_encoder_2`.
    pub parts: BTreeMap<String, usize>,
    /// Modules of each block of the UNet.
    pub blocks: BTreeMap<String, usize>,
    /// Tensors that belong to a module.
    pub matched: usize,
    /// Keys that belong to none.
    pub unmatched: Vec<String>,
    /// Vectors of each textual inversion that the file brings along.
    pub embeddings: BTreeMap<String, usize>,
    /// Tensors of each number type.
    pub storage: BTreeMap<String, usize>,
    /// How wide the text is that cross-attention listens to: 2048 in SDXL, 768 in SD 1.5.
    pub text_width: Option<usize>,
    /// The file's own metadata.
    pub metadata: BTreeMap<String, String>,
}

impl Summary {
    /// Reads the header and the alphas of a file.
    ///
    /// # Errors
    /// As [`file::read_adapters`], as far as the header shows it.
    pub fn read(file: &mut (impl Read + Seek), layout: &BlockLayout) -> Result<Self> {
        Self::with(file, layout, None)
    }

    /// The same of the file in `path`, or of the weights in a folder.
    ///
    /// # Errors
    /// As [`Summary::read`].
    pub fn of(path: &Path, layout: &BlockLayout) -> Result<Self> {
        let mut file = file::open(path)?;
        let mut read = || -> Result<Self> {
            let config = ConfigFile::beside(&file::weights_in(path)?)?;
            Self::with(&mut file, layout, config.as_ref())
        };
        read().map_err(|error| Failure::unusable(path, format!("{error:#}")))
    }

    fn with(
        from: &mut (impl Read + Seek),
        layout: &BlockLayout,
        beside: Option<&ConfigFile>,
    ) -> Result<Self> {
        let header = Header::read(from)?;
        let noted = PeftConfig::of(&header, beside)?;
        let (modules, mut unmatched) = file::sorted(&header, layout, &noted)?;
        let vectors =
            |key: &String| header.tensors.iter().find(|entry| entry.key == *key)?.shape.first().copied();
        let embeddings = take_pairs(&mut unmatched);
        let embeddings =
            embeddings.into_iter().map(|(name, [key, _])| (name, vectors(&key).unwrap_or(1))).collect();
        let mut report = Self { unmatched, embeddings, metadata: header.metadata.clone(), ..Self::default() };
        for entry in &header.tensors {
            *report.storage.entry(format!("{:?}", entry.storage)).or_default() += 1;
        }
        for (module, parts) in &modules {
            report.matched += parts.len();
            *report.kinds.entry(kind(parts).to_string()).or_default() += 1;
            let part = ["text_encoder_2", "text_encoder"]
                .into_iter()
                .find(|part| module.strip_prefix(part).is_some_and(|rest| rest.starts_with('.')));
            *report.parts.entry(part.unwrap_or("unet").to_string()).or_default() += 1;
            if part.is_none() {
                *report.blocks.entry(block(module)).or_default() += 1;
            }
            if module.ends_with(".attn2.to_k") {
                let width = [Part::Down, Part::HadaW1B, Part::Diff].iter().find_map(|part| parts.get(part));
                report.text_width = width.and_then(|entry| entry.shape.get(1).copied()).or(report.text_width);
            }
            let Some(rank) = rank(parts) else { continue };
            *report.ranks.entry(rank).or_default() += 1;
            let stored = match parts.get(&Part::Alpha) {
                Some(entry) => {
                    let values =
                        header.load(from, entry)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                    values.first().copied()
                }
                None => {
                    let stem = parts.values().find_map(|entry| keys::stem(&entry.key));
                    noted.alpha(module, stem.unwrap_or(module), rank)
                }
            };
            report.without_alpha += usize::from(stored.is_none());
            let alpha = stored.filter(|alpha| *alpha != 0.0).unwrap_or(rank as f32);
            *report.alphas.entry(alpha.to_string()).or_default() += 1;
        }
        Ok(report)
    }

    /// Modules in all.
    pub fn modules(&self) -> usize {
        self.kinds.values().sum()
    }

    /// The facts in one line: `LoRA, rank 16, alpha 8, 722 modules: unet 722`.
    pub fn line(&self) -> String {
        let ranks = self.ranks.iter().map(|(rank, count)| (rank.to_string(), *count)).collect();
        let facts = [("", &self.kinds), ("rank ", &ranks), ("alpha ", &self.alphas)];
        let facts = facts.into_iter().filter(|(_, counts)| !counts.is_empty());
        let facts: Vec<String> = facts.map(|(name, counts)| format!("{name}{}", distinct(counts))).collect();
        let parts: Vec<String> = self.parts.iter().map(|(part, count)| format!("{part} {count}")).collect();
        format!("{}, {} modules: {}", facts.join(", "), self.modules(), parts.join(", "))
    }
}

/// What there is; how often, where there is more than one.
fn distinct(counts: &BTreeMap<String, usize>) -> String {
    match counts.len() {
        1 => counts.keys().cloned().collect(),
        2..=4 => {
            counts.iter().map(|(name, count)| format!("{name} (×{count})")).collect::<Vec<_>>().join(", ")
        }
        several => format!("of {several} values"),
    }
}

/// `down_blocks.1.attentions.0.…` → `down.1`.
fn block(module: &str) -> String {
    let mut pieces = module.split('.');
    match (pieces.next(), pieces.next()) {
        (Some("down_blocks"), Some(level)) => format!("down.{level}"),
        (Some("up_blocks"), Some(level)) => format!("up.{level}"),
        (Some("mid_block"), _) => "mid".to_string(),
        _ => "outside".to_string(),
    }
}

type Parts<'a> = BTreeMap<Part, &'a Entry>;

/// As [`Adapter::kind_name`](super::adapter::Adapter::kind_name), from the shapes alone.
fn kind(parts: &Parts) -> &'static str {
    let has = |part: Part| parts.contains_key(&part);
    let dora = has(Part::DoraScale) || has(Part::Magnitude);
    let axes = |part: Part| parts.get(&part).map_or(0, |entry| entry.shape.len());
    if has(Part::Down) || has(Part::Up) {
        match (dora, has(Part::Mid), axes(Part::Down)) {
            (true, _, _) => "DoRA",
            (_, true, _) => "LoCon (Tucker)",
            (_, _, 4) => "LoCon",
            _ => "LoRA",
        }
    } else if has(Part::HadaW1A) {
        if dora { "LoHa with DoRA" } else { "LoHa" }
    } else if has(Part::LokrW1) || has(Part::LokrW1A) {
        if dora { "LoKr with DoRA" } else { "LoKr" }
    } else if has(Part::WNorm) {
        "norm"
    } else if has(Part::Diff) {
        if axes(Part::Diff) == 1 { "norm" } else { "full" }
    } else if has(Part::SetWeight) {
        "replacement"
    } else if has(Part::Ia3) {
        "IA3"
    } else if has(Part::OftBlocks) {
        if axes(Part::OftBlocks) == 4 { "BOFT" } else { "OFT" }
    } else if has(Part::A1) {
        "GLoRA"
    } else if has(Part::DiffB) || has(Part::BNorm) || has(Part::SetBias) {
        "bias"
    } else {
        "incomplete"
    }
}

fn rank(parts: &Parts) -> Option<usize> {
    [Part::Down, Part::HadaW1B, Part::LokrW2B, Part::LokrW1B, Part::A2]
        .iter()
        .find_map(|part| parts.get(part)?.shape.first().copied())
}
