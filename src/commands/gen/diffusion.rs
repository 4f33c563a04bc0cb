//! A person's LoRA by DiffLoRA: embeddings → latent by diffusion → LoRA.

use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device};
use sha2::{Digest, Sha256};

use super::Args;
use super::person::Predicted;
use super::references::{Reference, References, look_at_all};
use crate::failure::Failure;
use crate::hypernet::{Config, DenoiserConfig, Hypernet, mixture};
use crate::identity::catalog::{self, open_encoder};
use crate::identity::clip::ImageEncoder;
use crate::lora::metadata;
use crate::progress::Stage;
use crate::recipes::dreambooth::refine::CAPTION;
use crate::registry;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;
use crate::weights::sha256;

type People = Vec<(References<Vec<f32>>, f64)>;

/// Photos → identities → latent → LoRA; networks are freed as soon as they are not needed.
pub(super) fn predict(
    args: &Args,
    base_id: &ModelId,
    files: &ModelFiles,
    device: &Device,
) -> Result<(People, Predicted)> {
    let (Config { base: wanted, layout, .. }, config) = Hypernet::config(files)?;
    wanted.demand(base_id, "base model")?;
    let clock = Stage::begin("looking at the photos");
    let people = look(args, &config)?;
    clock.end();

    let start = Instant::now();
    let clock = Stage::begin("loading the hypernetwork");
    let hypernet = Hypernet::open(files, device)?;
    clock.end();
    let clock = Stage::begin("sampling the LoRA");
    let options = args.identity.sampling(&hypernet);
    let (mut parts, mut gates) = (Vec::new(), Vec::new());
    for (references, weight) in &people {
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

    let recorded = vec![
        (metadata::TRIGGER_PHRASE, "person".to_string()),
        ("difflora.hypernet_sha256", hypernet_sha256(files)?),
        ("difflora.face_encoder", config.face_encoder.name),
        ("difflora.face_encoder_sha256", config.face_encoder.sha256),
        ("difflora.identity_seed", options.seed.to_string()),
        ("difflora.identity_steps", options.steps.to_string()),
    ];
    let predicted = Predicted {
        lora,
        metadata: recorded,
        gates,
        seed: options.seed,
        own_downs: !layout.shared_down,
        caption: CAPTION,
        trigger: None,
        scale: 1.0,
        dtype: DType::F32,
        start,
    };
    Ok((people, predicted))
}

/// The photos of each person, with the person's weight. The encoders are freed on return: an image encoder may need
/// more memory than the hypernetwork.
fn look(args: &Args, config: &DenoiserConfig) -> Result<People> {
    let image_name = args.image_encoder.as_deref().unwrap_or(registry::BUILT_IN);
    let image_files = registry::find(image_name, "image_encoder")?;
    let image_id = registry::identify(&image_files, image_name, registry::ENCODER_WEIGHTS)?;
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
    let number = args.face.unwrap_or(1);
    let which = if number == 1 { "the largest".into() } else { format!("number {number}") };
    look_at_all(args, &which, |path, image| {
        let search = faces.search(image)?;
        let chosen = search.face(number as usize, &path.display().to_string())?;
        let (face, shown) = (faces.embed(image, chosen)?, image_encoder.embed(image, chosen)?);
        Reference::new((path, image), &search, chosen, face, shown)
    })
}

/// SHA-256 of the files that a hypernetwork consists of, one after the other.
fn hypernet_sha256(files: &ModelFiles) -> Result<String> {
    let mut hash = Sha256::new();
    for file in ["config.json", "lae.safetensors", "dit.safetensors", "stats.safetensors"] {
        hash.update(files.read(file)?);
    }
    Ok(sha256::in_hex(hash))
}
