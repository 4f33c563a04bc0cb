//! Photos of a person → a LoRA.

use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{DType, Device};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::commands::r#gen::Args;
use crate::commands::r#gen::references::{References, look_at};
use crate::failure::Failure;
use crate::hypernet::{Config, DenoiserConfig, Hypernet, SampleOptions, mixture};
use crate::identity::catalog::{self, open_encoder};
use crate::identity::clip::ImageEncoder;
use crate::lora::{Lora, metadata};
use crate::progress::{self, Stage};
use crate::recipes::dreambooth::functional_loss::{Refinement, refine};
use crate::registry::{self, Base};
use crate::sdxl::pipeline::Sdxl;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;
use crate::weights::sha256;

/// Photos → identities → latent → LoRA, and a report for `--json`.
pub(super) fn make_lora(
    args: &Args,
    base: &Base,
    base_id: &ModelId,
    device: &Device,
) -> Result<(Lora, Value)> {
    let hypernet_files = registry::find_hypernet(&args.hypernet, args.base_options.offline)?;
    let (Config { base: wanted, layout, .. }, config) = Hypernet::config(&hypernet_files)?;
    wanted.demand(base_id, "base model")?;
    let clock = Stage::begin("looking at the photos");
    let people = look_at_all(args, &config)?;
    clock.end();
    let start = Instant::now();
    let Sampled { mut lora, gates, options } = sample(args, &hypernet_files, &people, device)?;
    let mut refined = None;
    if let Some(steps) = args.identity.refine {
        let how = Refinement {
            steps,
            rate: args.identity.refine_rate,
            seed: options.seed,
            downs: !layout.shared_down,
        };
        let photos = people[0].0.squares()?;
        let model = Sdxl::open(&base.files, DType::F32, device)?;
        let bar = progress::bar(u64::from(steps), "refining");
        let (better, losses) = refine(&model, &lora, &photos, how, &bar)?;
        bar.finish_and_clear();
        (lora, refined) = (better, Some(losses));
    }
    let hashes: Vec<&str> = people
        .iter()
        .flat_map(|(references, _)| references.used.iter().map(|(_, photo)| photo.sha256.as_str()))
        .collect();
    for (module, layer) in &lora.layers {
        let sum = layer.up.abs()?.sum_all()?.to_scalar::<f32>()?;
        ensure!(sum.is_finite(), "the hypernetwork made NaN or infinity for `{module}`; nothing is written");
    }
    let rank = lora.layers.values().next().map_or(0, crate::lora::LoraLayer::rank);
    let base_version = if args.base == registry::BUILT_IN { "difflora_tiny" } else { metadata::SDXL_VERSION };
    for (key, value) in [
        (metadata::BASE_VERSION, base_version.to_string()),
        (metadata::TRIGGER_PHRASE, "person".to_string()),
        (metadata::TITLE, "a person, by difflora".to_string()),
        (metadata::RESOLUTION, metadata::resolution(base.native_size)),
        ("difflora.hypernet", args.hypernet.clone()),
        ("difflora.hypernet_sha256", hypernet_sha256(&hypernet_files)?),
        ("difflora.face_encoder", config.face_encoder.name.clone()),
        ("difflora.face_encoder_sha256", config.face_encoder.sha256.clone()),
        ("difflora.reference_sha256", hashes.join(",")),
        ("difflora.identity_seed", options.seed.to_string()),
        ("difflora.identity_steps", options.steps.to_string()),
    ]
    .into_iter()
    .chain(metadata::of_base(base_id))
    {
        lora.metadata.insert(key.into(), value);
    }
    if people.len() > 1 {
        let weights: Vec<String> = people.iter().map(|(_, weight)| format!("{weight:.4}")).collect();
        lora.metadata.insert("difflora.mix".into(), weights.join(","));
    }
    for (key, value) in [
        ("difflora.vary", args.identity.vary().map(|vary| vary.to_string())),
        ("difflora.refine_steps", args.identity.refine.map(|steps| steps.to_string())),
    ] {
        lora.metadata.extend(value.map(|value| (key.to_string(), value)));
    }
    let report = json!({
        "references": people.iter().flat_map(|(references, _)| references.to_json()).collect::<Vec<_>>(),
        "left_out": people
            .iter()
            .flat_map(|(references, _)| references.left_out.as_array().cloned().unwrap_or_default())
            .collect::<Vec<_>>(),
        "weights": people.iter().map(|(_, weight)| weight).collect::<Vec<_>>(),
        "gates": gates
            .iter()
            .map(|face| json!({ "face": face, "image": 1.0 - face }))
            .collect::<Vec<_>>(),
        "refined": refined,
        "modules": lora.layers.len(),
        "rank": rank,
        "seconds": start.elapsed().as_secs_f64(),
    });
    Ok((lora, report))
}

/// The photos of each person, with the person's weight. The encoders are freed on return: an image encoder may need
/// more memory than the hypernetwork.
fn look_at_all(args: &Args, config: &DenoiserConfig) -> Result<Vec<(References, f64)>> {
    let image_files = registry::find(&args.image_encoder, "image_encoder")?;
    let image_id = registry::identify(&image_files, &args.image_encoder, registry::ENCODER_WEIGHTS)?;
    config.image_encoder.demand(&image_id, "image encoder")?;
    let face_name = match &args.face_encoder {
        Some(name) => name,
        None if catalog::is_known(&config.face_encoder.name) => &config.face_encoder.name,
        None => catalog::BUILT_IN,
    };
    let faces = open_encoder(face_name)?;
    let [_, (name, sha256)] = faces.provenance();
    config.face_encoder.demand(&ModelId { name: name.into(), sha256 }, "face encoder")?;
    let image_encoder = ImageEncoder::open(&image_files)?.with_input(config.image_input);
    if !args.identity.mixes() {
        return Ok(vec![(look_at(&args.reference, args.face as usize, &faces, &image_encoder)?, 1.0)]);
    }
    (args.identity.mixed()?.into_iter())
        .map(|(photo, weight)| Ok((look_at(&[photo], args.face as usize, &faces, &image_encoder)?, weight)))
        .collect()
}

/// A LoRA sampled from the hypernetwork.
struct Sampled {
    lora: Lora,
    /// The mixer's weight of the face, for each person, where the mixer has a gate.
    gates: Vec<f32>,
    /// How latents were sampled.
    options: SampleOptions,
}

/// People → latent → LoRA; the hypernetwork is freed on return.
fn sample(args: &Args, files: &ModelFiles, people: &[(References, f64)], device: &Device) -> Result<Sampled> {
    let clock = Stage::begin("loading the hypernetwork");
    let hypernet = Hypernet::open(files, device)?;
    clock.end();
    let clock = Stage::begin("sampling the LoRA");
    let options = args.identity.sampling(&hypernet);
    let (mut parts, mut gates) = (Vec::new(), Vec::new());
    for (references, weight) in people {
        let identity = references.identity();
        parts.push((hypernet.sample_latent(&identity, &options)?, *weight));
        gates.extend(hypernet.gate(&identity)?);
    }
    let mut latent = mixture(&parts)?;
    if let Some(vary) = args.identity.vary() {
        let usage = |error| Failure::Usage(format!("--vary: {error:#}"));
        latent = hypernet.vary(&latent, vary, options.seed).map_err(usage)?;
    }
    let lora = hypernet.codec.lora(&latent)?;
    clock.end();
    Ok(Sampled { lora, gates, options })
}

/// SHA-256 of the files that a hypernetwork consists of, one after the other.
fn hypernet_sha256(files: &ModelFiles) -> Result<String> {
    let mut hash = Sha256::new();
    for file in ["config.json", "lae.safetensors", "dit.safetensors", "stats.safetensors"] {
        hash.update(files.read(file)?);
    }
    Ok(sha256::in_hex(hash))
}
