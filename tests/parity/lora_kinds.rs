//! Every kind of adapter against LyCORIS 4.1.3, diffusers 0.42.1 and peft 0.21.2 (scripts/golden_lora.py --kinds).
//!
//! `lora_kinds/KIND.safetensors` was written by the library, `expected.safetensors` holds what its own forward pass
//! adds to the weights, and the original weights.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use difflora::lora::adapter::{Adapter, AdapterFile};
use difflora::lora::file::{self, Format};
use difflora::lora::ldm_keys::BlockLayout;
use difflora::weights;

/// File, what its changes are called, and how often each occurs.
const KINDS: [(&str, &[(&str, usize)]); 22] = [
    ("locon", &[("LoCon", 2), ("LoRA", 2)]),
    ("locon_tucker", &[("LoCon", 1), ("LoCon (Tucker)", 1), ("LoRA", 2)]),
    ("dora_out", &[("DoRA", 4)]),
    ("dora_in", &[("DoRA", 4)]),
    ("loha", &[("LoHa", 4)]),
    ("loha_tucker", &[("LoHa", 4)]),
    ("loha_dora", &[("LoHa with DoRA", 4)]),
    ("lokr", &[("LoKr", 4)]),
    ("lokr_both", &[("LoKr", 4)]),
    ("lokr_tucker", &[("LoKr", 4)]),
    ("lokr_full", &[("LoKr", 4)]),
    ("full", &[("full", 4)]),
    ("norm", &[("norm", 2)]),
    ("ia3_out", &[("IA3", 4)]),
    ("ia3_in", &[("IA3", 4)]),
    ("oft", &[("OFT", 4)]),
    ("oft_bound", &[("OFT", 4)]),
    ("boft", &[("BOFT", 4)]),
    ("glora", &[("GLoRA", 4)]),
    ("peft_conv", &[("LoCon", 2), ("LoRA", 2)]),
    ("peft_patterns", &[("LoCon", 2), ("LoRA", 2)]),
    ("peft_dora", &[("DoRA", 4)]),
];

fn path(name: &str) -> PathBuf {
    let file = format!("tests/data/golden/lora_kinds/{name}.safetensors");
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// The UNet of the script has two levels of two layers.
fn blocks() -> BlockLayout {
    BlockLayout::uniform(2, 2)
}

fn read(kind: &str) -> Result<AdapterFile> {
    file::read_adapters(&path(kind), &blocks()).with_context(|| kind.to_string())
}

/// ‖a − b‖ / ‖b‖.
fn far(a: &Tensor, b: &Tensor) -> Result<f64> {
    let norm = |t: &Tensor| -> Result<f64> {
        Ok(t.to_dtype(DType::F64)?.flatten_all()?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
    };
    Ok(norm(&(a.to_dtype(DType::F32)? - b)?)? / norm(b)?)
}

#[test]
fn every_kind_changes_weights_as_the_library_that_wrote_it_does() -> Result<()> {
    let expected = weights::read_file(&path("expected"))?;
    let mut compared = 0;
    for (kind, kinds) in KINDS {
        let changes = read(kind)?;
        let mut found: BTreeMap<&str, usize> = BTreeMap::new();
        changes.modules.values().for_each(|change| *found.entry(change.kind_name()).or_default() += 1);
        assert_eq!(found, kinds.iter().copied().collect(), "{kind}");
        for (name, wanted) in &expected {
            let Some(rest) = name.strip_prefix(&format!("{kind}.")) else { continue };
            let mut pieces = rest.splitn(4, '.');
            let (one, tenth) = (pieces.next().context("times")?, pieces.next().context("times")?);
            let times: f64 = format!("{one}.{tenth}").parse()?;
            let (part, module) = (pieces.next().context("part")?, pieces.next().context("module")?);
            let change = changes.modules.get(module).with_context(|| format!("{kind}: {module}"))?;
            let ours = if part == "bias" {
                change.bias.as_ref().context("a bias")?.delta(None, times)?
            } else {
                let original = &expected[&format!("original.{module}")];
                assert!(change.fits(original.dims()), "{kind}: {module}");
                change.delta(original, times)?
            };
            // A fused PEFT file is known only as W' − W, both rounded to f32, whose ΔW is a few times smaller.
            let far = far(&ours, wanted)?;
            assert!(far < 1e-5, "{name}: {far:e}");
            compared += 1;
        }
    }
    assert_eq!(compared, expected.len() - 6, "all but the six original weights");
    Ok(())
}

fn same(a: &Adapter, b: &Adapter) -> Result<bool> {
    let (a, b) = (a.parts()?, b.parts()?);
    let equal = |a: &Tensor, b: &Tensor| -> Result<bool> {
        Ok(a.dims() == b.dims()
            && a.dtype() == b.dtype()
            && a.ne(b)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()? == 0.0)
    };
    let names = |parts: &[(_, Tensor)]| parts.iter().map(|(part, _)| *part).collect::<Vec<_>>();
    if names(&a) != names(&b) {
        return Ok(false);
    }
    a.iter().zip(&b).try_fold(true, |all, ((_, a), (_, b))| Ok(all && equal(a, b)?))
}

#[test]
fn every_kind_is_written_in_both_kohya_spellings_and_read_again_bit_for_bit() -> Result<()> {
    for (kind, _) in KINDS {
        let changes = read(kind)?;
        for format in [Format::Kohya, Format::KohyaDiffusers] {
            let bytes = file::adapters_to_bytes(&changes, format, &blocks())?;
            let (again, unknown) = file::adapters_from_bytes(&bytes, &blocks())?;
            assert!(unknown.is_empty(), "{kind}: {unknown:?}");
            assert_eq!(changes.modules.len(), again.modules.len());
            for (module, change) in &changes.modules {
                assert!(same(change, &again.modules[module])?, "{kind}: {module}");
            }
            assert!(bytes == file::adapters_to_bytes(&again, format, &blocks())?, "{kind}");
        }
    }
    Ok(())
}

#[test]
fn peft_files_hold_what_peft_knows_and_other_kinds_are_refused_by_name() -> Result<()> {
    let expected = weights::read_file(&path("expected"))?;
    for kind in ["locon", "peft_patterns", "peft_dora", "dora_out"] {
        let bytes = file::adapters_to_bytes(&read(kind)?, Format::Peft, &blocks())?;
        let (again, _) = file::adapters_from_bytes(&bytes, &blocks())?;
        for (module, change) in &again.modules {
            let delta = change.delta(&expected[&format!("original.{module}")], 1.0)?;
            let far = far(&delta, &expected[&format!("{kind}.1.0.weight.{module}")])?;
            assert!(far < 1e-5, "{kind}: {module} {far:e}");
        }
    }
    for (kind, said) in [("loha", "LoHa"), ("lokr", "LoKr"), ("dora_in", "DoRA"), ("boft", "BOFT")] {
        let error = file::adapters_to_bytes(&read(kind)?, Format::Peft, &blocks()).unwrap_err().to_string();
        assert!(error.contains(&format!("{said} is not supported")), "{error}");
    }
    Ok(())
}

/// The weights and biases of PEFT's own merged model, from folders that replace some of them (`modules_to_save`, `bias`).
#[test]
fn peft_folders_that_replace_weights_and_biases_give_the_merged_model_of_peft() -> Result<()> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/peft_replaced");
    let expected = weights::read_file(&folder.join("expected.safetensors"))?;
    for (kind, replacements) in [("all", 19), ("lora_only", 19), ("none", 2)] {
        let adapters = file::read_adapters(&folder.join(kind), &blocks())?;
        let found = adapters.modules.values().filter(|change| change.kind_name() == "replacement").count();
        assert_eq!(found, replacements, "{kind}");
        let mut compared = 0;
        for (name, after) in &expected {
            let Some(name) = name.strip_prefix(&format!("{kind}.after.")) else { continue };
            let before = &expected[&format!("before.{name}")];
            let (module, part) = name.rsplit_once('.').context("a part")?;
            let change = adapters.modules.get(module).with_context(|| format!("{kind}: {module}"))?;
            let delta = match part {
                "weight" => change.delta(before, 1.0)?,
                _ => change
                    .bias
                    .as_ref()
                    .with_context(|| format!("{kind}: {name}"))?
                    .delta(Some(before), 1.0)?,
            };
            let far = far(&(before + delta)?, after)?;
            assert!(far < 1e-6, "{kind}: {name}: {far:e}");
            compared += 1;
        }
        let parts =
            |change: &Adapter| usize::from(change.kind_name() != "bias") + usize::from(change.bias.is_some());
        assert_eq!(
            compared,
            adapters.modules.values().map(parts).sum::<usize>(),
            "{kind}: nothing else changes"
        );
    }
    Ok(())
}
