//! LoRA files against diffusers 0.42.1 and peft 0.21.2 (scripts/golden_lora.py).
//!
//! `lora_peft` was saved by diffusers, `lora_delta` holds the ΔW that diffusers makes of it. The other three files
//! are what we write; `scripts/golden_lora.py --check` shows that diffusers loads them and makes the same ΔW.

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use difflora::lora::adapter::AdapterFile;
use difflora::lora::apply::{Branch, Originals, Unmatched, attach, merge};
use difflora::lora::block_weights::BlockWeights;
use difflora::lora::file::{self, Format};
use difflora::lora::ldm_keys::BlockLayout;
use difflora::lora::{Lora, layout::LoraLayout};
use difflora::sdxl::unet::{UNet, UNetConfig, UNetInput};
use difflora::weights::{self, Trainable};

const WRITTEN: [(Format, &str); 3] = [
    (Format::Kohya, "lora_kohya.safetensors"),
    (Format::KohyaDiffusers, "lora_kohya_diffusers.safetensors"),
    (Format::Peft, "lora_peft_written.safetensors"),
];

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name)
}

/// The UNet of the script has two levels of two layers.
fn blocks() -> BlockLayout {
    BlockLayout::uniform(2, 2)
}

fn lora() -> Result<Lora> {
    file::read(&golden("lora_peft.safetensors"), &blocks())
}

fn unet() -> Result<UNet> {
    let config: UNetConfig = serde_json::from_value(serde_json::json!({
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16],
        "layers_per_block": 2, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [1, 2],
        "cross_attention_dim": 12, "transformer_layers_per_block": 1, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32,
        "use_linear_projection": true, "norm_num_groups": 4,
    }))?;
    UNet::new(&config, Trainable::new(0).builder(&Device::Cpu))
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a.to_dtype(DType::F32)? - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

/// Largest difference between the ΔW of `lora` and those of diffusers, for exactly the same modules.
fn worst(lora: &Lora) -> Result<f32> {
    let wanted = weights::read_file(&golden("lora_delta.safetensors"))?;
    assert_eq!(lora.layers.len(), wanted.len());
    let mut worst = 0f32;
    for (module, layer) in &lora.layers {
        let wanted = wanted.get(&format!("{module}.weight")).with_context(|| module.clone())?;
        worst = worst.max(distance(&layer.delta()?, wanted)?);
    }
    Ok(worst)
}

#[test]
fn a_peft_file_of_diffusers_gives_its_delta() -> Result<()> {
    // diffusers adds ΔW to the weights and the script subtracts them again: two roundings of numbers below 1.
    let worst = worst(&lora()?)?;
    assert!(worst < 1e-6, "{worst}");
    Ok(())
}

#[test]
fn merging_changes_our_unet_as_diffusers_changes_its_own() -> Result<()> {
    let wanted = weights::read_file(&golden("lora_delta.safetensors"))?;
    let mut unet = unet()?;
    let mut before = std::collections::BTreeMap::new();
    unet.visit_linears(&mut |path, linear| {
        before.insert(path.to_string(), linear.weight.clone());
    });
    let merged = merge(
        |visit| unet.visit_layers(visit),
        &[(&AdapterFile::from(&lora()?), BlockWeights::all(1.0))],
        Unmatched::Refuse,
        Originals::Drop,
    )?;
    assert_eq!(merged.matched.len(), wanted.len());
    let mut far = Vec::new();
    unet.visit_linears(&mut |path, linear| {
        let change = (&linear.weight - &before[path]).expect("a merge keeps the shape");
        far.push(match wanted.get(&format!("{path}.weight")) {
            Some(wanted) => distance(&change, wanted).expect("equal shapes"),
            None => change.abs().and_then(|c| c.sum_all()?.to_scalar()).expect("a tensor"),
        });
    });
    assert!(far.iter().all(|far| *far < 1e-6), "{far:?}");
    Ok(())
}

#[test]
fn a_merged_and_an_attached_lora_predict_the_same() -> Result<()> {
    let normal = |stream, shape: &[usize]| difflora::diffusion::noise::normal(5, stream, shape, &Device::Cpu);
    let predict = |unet: &UNet| -> Result<Tensor> {
        let timesteps = Tensor::new(&[10f32, 700.0], &Device::Cpu)?;
        let sizes = Tensor::full(8f32, (2, 6), &Device::Cpu)?;
        unet.forward(&UNetInput {
            latents: &normal(0, &[2, 4, 8, 8])?,
            timesteps: &timesteps,
            context: &normal(1, &[2, 5, 12])?,
            pooled: &normal(2, &[2, 8])?,
            time_ids: &sizes,
            guidance_scale: None,
        })
    };
    let (lora, plain) = (lora()?, unet()?);
    let (mut merged, mut attached) = (plain.clone(), plain.clone());
    let loras = [(&AdapterFile::from(&lora), BlockWeights::all(0.7))];
    merge(|visit| merged.visit_layers(visit), &loras, Unmatched::Refuse, Originals::Drop)?;
    attach(|visit| attached.visit_layers(visit), &loras, Unmatched::Refuse, Branch::Both)?;
    let (merged, attached) = (predict(&merged)?, predict(&attached)?);
    let far = distance(&merged, &attached)?;
    assert!(far < 1e-5, "{far}");
    assert!(distance(&merged, &predict(&plain)?)? > 1e-3, "the LoRA must change the prediction");
    Ok(())
}

#[test]
fn files_are_written_as_diffusers_was_shown_to_read_them() -> Result<()> {
    for (format, name) in WRITTEN {
        let mut lora = lora()?;
        // A version that no release has, so that the golden files outlive each.
        let metadata = [
            (difflora::lora::metadata::TRIGGER_PHRASE, "photo of sks person"),
            ("difflora.version", "0.0.0"),
        ];
        lora.metadata = metadata.map(|(key, value)| (key.to_string(), value.to_string())).into();
        let bytes = file::to_bytes(&lora, format, &blocks())?;
        // After a wanted change of the format: set it, run this test, then `scripts/golden_lora.py --check`.
        if std::env::var_os("DIFFLORA_WRITE_GOLDEN").is_some() {
            std::fs::write(golden(name), &bytes)?;
        }
        assert!(bytes == std::fs::read(golden(name))?, "{name} differs");
        let again = file::read(&golden(name), &blocks())?;
        assert_eq!(again.trigger_phrase(), Some("photo of sks person"));
        // PEFT has alpha / R multiplied into `up`: one more rounding.
        let worst = worst(&again)?;
        assert!(worst < 1e-6, "{worst}");
    }
    Ok(())
}

#[test]
fn the_vector_of_a_real_lora_leads_back_to_its_delta() -> Result<()> {
    let lora = lora()?;
    let layout = LoraLayout::of(&lora);
    let worst = worst(&layout.from_vector(&layout.to_vector(&lora)?)?)?;
    assert!(worst < 1e-6, "{worst}");
    Ok(())
}
