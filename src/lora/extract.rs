//! The difference between two models as a LoRA.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::adapter::{Adapter, AdapterFile, AdapterKind, BiasChange};
use super::arithmetic::{self, Kept};
use super::checkpoint::{COMPONENTS, module_of};
use super::listed;
use crate::progress;
use crate::weights::model_folder::ModelFiles;

/// How the difference is stored.
#[derive(Clone, Copy, Debug)]
pub struct ExtractOptions {
    /// Rank of each layer's factors.
    pub rank: usize,
    /// Omit biases and norms.
    pub layers_only: bool,
}

/// What was extracted.
pub struct Extracted {
    /// The LoRA.
    pub adapters: AdapterFile,
    /// Rank and kept share of each layer's difference.
    pub kept: BTreeMap<String, Kept>,
    /// Modules whose bias or norm changes, stored as it is.
    pub biases_and_norms: usize,
    /// Changes that no LoRA holds.
    pub left_out: Vec<String>,
}

/// The difference `after` − `before` of two models of the same shape, by SVD.
///
/// # Errors
/// Models of different shapes, equal models, and models in which nothing changes that a LoRA holds.
pub fn extract(before: &ModelFiles, after: &ModelFiles, options: ExtractOptions) -> Result<Extracted> {
    let mut adapters = AdapterFile::default();
    let mut kept = BTreeMap::new();
    let mut left_out = Vec::new();
    for (folder, stem, prefix) in COMPONENTS {
        let there = [before, after].map(|model| model.exists(&format!("{folder}/config.json")));
        if there != [true, true] {
            if there != [false, false] {
                let which = if there[0] { before } else { after };
                left_out.push(format!("{folder}, which only {} has", which.name()));
            }
            continue;
        }
        let [stored_before, stored_after] = [before.reader(folder, stem)?, after.reader(folder, stem)?];
        let (names, others) = (stored_before.names(), stored_after.names());
        // Two versions of transformers spell a text encoder's names in two ways.
        let others: BTreeMap<String, &String> =
            others.iter().map(|name| (canonical(prefix, name), name)).collect();
        let mut biases = Vec::new();
        let bar = progress::bar(names.len() as u64, "comparing");
        for name in &names {
            progress::check()?;
            bar.inc(1);
            // Old transformers stored the numbers 0, 1, 2, … of the positions.
            if name.ends_with("position_ids") {
                continue;
            }
            let one = stored_before.load(name, None)?;
            let two =
                others.get(&canonical(prefix, name)).map(|name| stored_after.load(name, None)).transpose()?;
            let Some(two) = two.filter(|two| two.dims() == one.dims()) else {
                return Err(after.unusable(folder, format!("it has no `{name}` of shape {:?}", one.dims())));
            };
            let difference = (two.to_dtype(DType::F32)? - one.to_dtype(DType::F32)?)?;
            if difference.abs()?.max_all()?.to_scalar::<f32>()? == 0.0 {
                continue;
            }
            match module_of(prefix, name) {
                Some((module, true)) if one.rank() >= 2 && !name.contains("embedding.weight") => {
                    let (adapter, share) = arithmetic::extract(&one, &two, options.rank, DType::F32)?;
                    kept.insert(module.clone(), share);
                    adapters.modules.insert(module, adapter);
                }
                Some((module, true)) if one.rank() == 1 && !options.layers_only => {
                    let kind = AdapterKind::Full(difference);
                    adapters.modules.insert(module, Adapter { kind, magnitude: None, bias: None });
                }
                Some((module, false)) if one.rank() == 1 && !options.layers_only => {
                    biases.push((module, difference))
                }
                _ => left_out.push(format!("{folder}/{name}")),
            }
        }
        bar.finish_and_clear();
        add_biases(&mut adapters, biases);
    }
    if adapters.modules.is_empty() {
        let why = if left_out.is_empty() {
            "its weights are the same as before: there is nothing to extract".to_string()
        } else {
            format!("nothing that a LoRA holds has changed; other changes: {}", listed(&left_out))
        };
        return Err(after.unusable("unet", why));
    }
    let biases_and_norms = adapters.modules.values().filter(|adapter| is_no_lora(adapter)).count();
    Ok(Extracted { adapters, kept, biases_and_norms, left_out })
}

/// A name under which two models agree.
fn canonical(prefix: &str, name: &str) -> String {
    module_of(prefix, name).map_or(name.to_string(), |(module, is_weight)| format!("{module}.{is_weight}"))
}

fn add_biases(adapters: &mut AdapterFile, biases: Vec<(String, Tensor)>) {
    for (module, bias) in biases {
        let adapter = adapters.modules.entry(module);
        adapter.or_insert(Adapter { kind: AdapterKind::BiasOnly, magnitude: None, bias: None }).bias =
            Some(BiasChange::Added(bias));
    }
}

/// Whether it holds more than two factors.
fn is_no_lora(adapter: &Adapter) -> bool {
    adapter.bias.is_some() || !matches!(adapter.kind, AdapterKind::LowRank { .. })
}
