//! The LoRAs of an image: which, how strong, and into the model.

use std::io::Cursor;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::commands::r#gen::{Args, LoraMode};
use crate::device::Precision;
use crate::failure::Failure;
use crate::layers::Visit;
use crate::lora::apply::{self, Branch, Originals, Unmatched};
use crate::lora::change::Changes;
use crate::lora::file;
use crate::lora::report::Report;
use crate::lora::strength::Strength;
use crate::lora::{Lora, LoraError, listed_for_user};
use crate::progress;
use crate::registry;
use crate::sdxl::pipeline::Unloaded;
use crate::sdxl::text::TextEncoders;
use crate::sdxl::unet::UNet;
use crate::weights::model_folder::ModelFiles;
use crate::weights::sha256;

/// A LoRA with its name, strength and short hash, for the image's text.
pub(crate) struct Chosen {
    pub(crate) name: String,
    pub(crate) strength: Strength,
    pub(crate) hash: String,
    pub(crate) changes: Changes,
    /// What the file is.
    pub(crate) report: Report,
}

/// The person's LoRA and those of `--lora`.
pub(crate) fn chosen_loras(args: &Args, person: Option<&Lora>, base: &ModelFiles) -> Result<Vec<Chosen>> {
    let layout = registry::block_layout(base)?;
    let mut chosen = Vec::new();
    if let Some(lora) = person {
        let name = args
            .lora_out
            .as_deref()
            .and_then(Path::file_stem)
            .map_or("person".into(), |stem| stem.to_string_lossy());
        let bytes = file::to_bytes(lora, args.lora_format, &layout)?;
        let report = Report::read(&mut Cursor::new(&bytes), &layout)?;
        let (strength, hash) = (Strength::all(args.lora_scale), lora_hash(&bytes));
        chosen.push(Chosen { name: name.into(), strength, hash, changes: lora.into(), report });
    }
    for text in &args.lora {
        let (path, strength) = Strength::split(text)?;
        let changes = file::read_changes(&path, &layout)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let report = Report::read(&mut file::open(&path)?, &layout)?;
        chosen.push(Chosen { name, strength, hash: lora_hash(&std::fs::read(&path)?), changes, report });
    }
    Ok(chosen)
}

/// Makes sure that each LoRA is made for this base, before any weight is loaded, and tells what it is.
///
/// # Errors
/// [`Failure::Unusable`] for a LoRA that is not; [`Failure::Usage`] for one that cannot change the prompt alone.
pub(crate) fn check_loras(model: &Unloaded, chosen: &[Chosen], args: &Args) -> Result<Value> {
    if chosen.is_empty() {
        return Ok(json!([]));
    }
    let mut outline = model.outline()?;
    let mut told = Vec::new();
    for chosen in chosen {
        let alone = [(&chosen.changes, chosen.strength.clone())];
        let missing = apply::check(|visit| outline.visit_layers(visit), &alone, Unmatched::Allow)
            .map_err(|error| Failure::Unusable(format!("cannot use the LoRA `{}`: {error}", chosen.name)))?;
        progress::note(format_args!("LoRA `{}`: {}", chosen.name, chosen.report.line()));
        if !missing.is_empty() {
            progress::warn(format_args!(
                "{} of {} layers of the LoRA `{}` have no place in this base and are left out: {}",
                missing.len(),
                chosen.changes.modules.len(),
                chosen.name,
                listed_for_user(&missing)
            ));
        }
        let mut report = serde_json::to_value(&chosen.report)?;
        report["name"] = json!(chosen.name);
        report["weight"] = json!(chosen.strength.everywhere());
        report["without_place"] = json!(missing);
        told.push(report);
    }
    if branch(args, &outline.unet) == Branch::Positive {
        apply_to_unet(&mut outline.unet, chosen, args)?;
    }
    Ok(told.into())
}

/// Puts the LoRAs into the UNet.
pub(crate) fn apply_to_unet(unet: &mut UNet, chosen: &[Chosen], args: &Args) -> Result<()> {
    let loras = in_order(chosen);
    if args.dtype == Precision::F32 {
        apply::widen(|visit| unet.visit_layers(visit), &loras)?;
    }
    match args.lora_mode {
        LoraMode::Merge => {
            let visit = |visit: &mut Visit| unet.visit_layers(visit);
            apply::merge(visit, &loras, Unmatched::Ignore, Originals::Drop)?;
        }
        LoraMode::Runtime => {
            let branch = branch(args, unet);
            apply::attach(|visit| unet.visit_layers(visit), &loras, Unmatched::Ignore, branch).map_err(
                |error| match error {
                    LoraError::Kind { .. } => Failure::Usage(format!("--lora-positive-only: {error}")).into(),
                    other => anyhow::Error::from(other),
                },
            )?;
        }
    }
    Ok(())
}

/// Puts the LoRAs into the text encoders. A prompt's batch is one, so these have no halves.
pub(crate) fn apply_to_text(text: &mut TextEncoders, chosen: &[Chosen], args: &Args) -> Result<()> {
    let loras = in_order(chosen);
    if args.dtype == Precision::F32 {
        apply::widen(|visit| text.visit_layers(visit), &loras)?;
    }
    let visit = |visit: &mut Visit| text.visit_layers(visit);
    match args.lora_mode {
        LoraMode::Merge => apply::merge(visit, &loras, Unmatched::Ignore, Originals::Drop)?,
        LoraMode::Runtime => apply::attach(visit, &loras, Unmatched::Ignore, Branch::Both)?,
    };
    Ok(())
}

fn branch(args: &Args, unet: &UNet) -> Branch {
    if args.lora_positive_only && unet.config.takes_two_passes(args.guidance) {
        Branch::Positive
    } else {
        Branch::Both
    }
}

/// f32 sums depend on their order; the order on the command line must not count.
fn in_order(chosen: &[Chosen]) -> Vec<(&Changes, Strength)> {
    let mut order: Vec<&Chosen> = chosen.iter().collect();
    let weight = |chosen: &Chosen| chosen.strength.everywhere();
    order.sort_by(|a, b| a.hash.cmp(&b.hash).then(weight(a).total_cmp(&weight(b))));
    order.iter().map(|chosen| (&chosen.changes, chosen.strength.clone())).collect()
}

/// What A1111 calls a LoRA's hash: SHA-256 of a `.safetensors` behind its header, so that other metadata does not
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
