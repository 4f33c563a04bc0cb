//! Photos of a person → a LoRA.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{DType, Device};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::commands::r#gen::Args;
use crate::failure::Failure;
use crate::hypernet::{Config, DenoiserConfig, Hypernet, ModelId, SampleOptions, mixture};
use crate::identity::catalog::open_encoder;
use crate::identity::clip::ImageEncoder;
use crate::identity::outliers::{SAME_PERSON, mean_direction, outliers};
use crate::identity::photos::Photos;
use crate::identity::{Face, FaceEncoder, Identity, Quality, catalog, cosine};
use crate::image::Image;
use crate::lora::{Lora, TRIGGER_PHRASE};
use crate::progress::{self, Stage};
use crate::recipes::dreambooth::functional_loss::{Refinement, refine};
use crate::registry;
use crate::sdxl::pipeline::Sdxl;
use crate::weights::model_folder::ModelFiles;
use crate::weights::sha256;

/// Photos → identities → latent → LoRA for a `base` that draws `size` pixels across, and what is worth telling of it.
pub(super) fn make_lora(args: &Args, base: &ModelId, size: usize, device: &Device) -> Result<(Lora, Value)> {
    let hypernet_files = registry::find_hypernet(&args.hypernet, args.base_options.offline)?;
    let (Config { base: wanted, layout, .. }, config) = Hypernet::config(&hypernet_files)?;
    wanted.demand(base, "base model")?;
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
        let base_files = registry::find_base(&args.base, &args.base_options)?;
        let base = Sdxl::open(&base_files, DType::F32, device)?;
        let bar = progress::bar(u64::from(steps), "refining");
        let (better, told) = refine(&base, &lora, &photos, how, &bar)?;
        bar.finish_and_clear();
        (lora, refined) = (better, Some(told));
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
    let alpha = lora.layers.values().next().map_or(0.0, |layer| layer.alpha);
    let base_version = if args.base == registry::BUILT_IN { "difflora_tiny" } else { "sdxl_base_v1-0" };
    for (key, value) in [
        ("ss_network_module", "networks.lora".to_string()),
        ("ss_network_dim", rank.to_string()),
        ("ss_network_alpha", alpha.to_string()),
        ("ss_base_model_version", base_version.to_string()),
        (TRIGGER_PHRASE, "person".to_string()),
        ("modelspec.title", "a person, by difflora".to_string()),
        ("difflora.version", env!("CARGO_PKG_VERSION").to_string()),
        ("modelspec.resolution", format!("{size}x{size}")),
        ("difflora.hypernet", args.hypernet.clone()),
        ("difflora.hypernet_sha256", hypernet_sha256(&hypernet_files)?),
        ("difflora.base", base.name.clone()),
        ("difflora.base_sha256", base.sha256.clone()),
        ("difflora.face_encoder", config.face_encoder.name.clone()),
        ("difflora.face_encoder_sha256", config.face_encoder.sha256.clone()),
        ("difflora.reference_sha256", hashes.join(",")),
        ("difflora.identity_seed", options.seed.to_string()),
        ("difflora.identity_steps", options.steps.to_string()),
    ] {
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
    let told = json!({
        "references": people.iter().flat_map(|(references, _)| references.told()).collect::<Vec<_>>(),
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
    Ok((lora, told))
}

/// The photos of each person, with the person's weight. The encoders are gone when it returns: an image encoder may take
/// more memory than the hypernetwork.
fn look_at_all(args: &Args, config: &DenoiserConfig) -> Result<Vec<(References, f64)>> {
    let image_files = registry::find(&args.image_encoder, "image_encoder")?;
    let image_id = registry::identify(&image_files, &args.image_encoder, registry::ENCODER_WEIGHTS)?;
    config.image_encoder.demand(&image_id, "image encoder")?;
    let face_name = match &args.face_encoder {
        Some(name) => name,
        // A name that stands for a folder of another machine is asked for instead.
        None if catalog::is_known(&config.face_encoder.name) => &config.face_encoder.name,
        None => catalog::BUILT_IN,
    };
    let faces = open_encoder(face_name)?;
    let [_, (name, sha256)] = faces.provenance();
    config.face_encoder.demand(&ModelId { name: name.into(), sha256 }, "face encoder")?;
    let image_encoder = ImageEncoder::open(&image_files)?.with_input(config.image_input);
    if !args.identity.mixes() {
        return Ok(vec![(look_at(args, &args.reference, &faces, &image_encoder)?, 1.0)]);
    }
    (args.identity.mixed()?.into_iter())
        .map(|(photo, weight)| Ok((look_at(args, &[photo], &faces, &image_encoder)?, weight)))
        .collect()
}

/// What the hypernetwork makes of people.
struct Sampled {
    lora: Lora,
    /// How much of each condition came from the face, where the mixer has a gate.
    gates: Vec<f32>,
    /// How latents were sampled.
    options: SampleOptions,
}

/// People → latent → LoRA; the hypernetwork is in memory no longer than that.
fn sample(args: &Args, files: &ModelFiles, people: &[(References, f64)], device: &Device) -> Result<Sampled> {
    let clock = Stage::begin("loading the hypernetwork");
    let hypernet = Hypernet::open(files, device)?;
    clock.end();
    let clock = Stage::begin("making the LoRA");
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

/// What one photo tells.
struct Reference {
    face: Vec<f32>,
    image: Vec<f32>,
    sha256: String,
    faces: usize,
    chosen: Face,
    quality: Quality,
}

/// The photos of the person.
struct References {
    used: Vec<(PathBuf, Reference)>,
    /// Files that could not be used or that show somebody else, with the reason.
    left_out: Value,
}

impl References {
    /// Who they show.
    fn identity(&self) -> Identity {
        let photos = || self.used.iter().map(|(_, photo)| photo);
        Identity {
            face: mean_direction(&photos().map(|photo| &photo.face[..]).collect::<Vec<_>>()),
            image: Some(mean_direction(&photos().map(|photo| &photo.image[..]).collect::<Vec<_>>())),
        }
    }

    /// The photos again, cut to squares around the face.
    fn squares(&self) -> Result<Vec<Image>> {
        let square = |(path, photo): &(PathBuf, Reference)| {
            let image = Image::open(path)?;
            let [x1, y1, x2, y2] = photo.chosen.bounds;
            // Three times the face: head, hair and shoulders, as portraits show them.
            let side = (3.0 * (x2 - x1).max(y2 - y1)) as usize;
            let side = side.clamp(1, image.width.min(image.height));
            let from = |a: f32, b: f32, length: usize| {
                ((((a + b) / 2.0) as usize).saturating_sub(side / 2)).min(length - side)
            };
            let (left, top) = (from(x1, x2, image.width), from(y1, y2, image.height));
            Ok(image.crop(left, top, side, side))
        };
        self.used.iter().map(square).collect()
    }

    fn told(&self) -> Vec<Value> {
        let told = |(file, photo): &(PathBuf, Reference)| {
            json!({
                "file": file,
                "faces": photo.faces,
                "face": photo.chosen,
                "quality": photo.quality,
                "hints": photo.quality.hints(),
            })
        };
        self.used.iter().map(told).collect()
    }
}

/// Encodes the photos and leaves out those that show somebody else; says what will make the likeness suffer.
fn look_at(
    args: &Args,
    photos: &[PathBuf],
    faces: &FaceEncoder,
    image_encoder: &ImageEncoder,
) -> Result<References> {
    let seen = Photos::find(photos)?.look(|_, path, image| {
        let search = faces.search(image)?;
        let chosen = search.face(args.face as usize, &path.display().to_string())?;
        Ok(Reference {
            face: faces.embed(image, chosen)?,
            image: image_encoder.embed(image, chosen)?,
            sha256: sha256::of_file(path)?,
            faces: search.faces.len(),
            chosen: chosen.clone(),
            quality: Quality::of(image, chosen, &search.faces),
        })
    })?;
    let mut left_out = seen.left_out_json();
    for (path, photo) in &seen.photos {
        if photo.faces > 1 {
            let which = if args.face == 1 { "the largest".into() } else { format!("number {}", args.face) };
            progress::note(format_args!(
                "{} faces in `{}`: {which} is taken, at {:.0?}; --face N takes another",
                photo.faces,
                path.display(),
                photo.chosen.bounds
            ));
        }
        for hint in photo.quality.hints() {
            progress::note(format_args!("`{}`: {hint}", path.display()));
        }
    }
    let vectors: Vec<Vec<f32>> = seen.photos.iter().map(|(_, photo)| photo.face.clone()).collect();
    let outliers = outliers(&vectors);
    for outlier in &outliers {
        let path = &seen.photos[outlier.photo].0;
        let why = format!(
            "its face does not look like the others (cosine {:.2} to their mean, wanted {SAME_PERSON})",
            outlier.cosine
        );
        progress::warn(format_args!("`{}` is left out: {why}", path.display()));
        if let Value::Array(left_out) = &mut left_out {
            left_out.push(json!({ "file": path, "why": why }));
        }
    }
    let used: Vec<(PathBuf, Reference)> = seen
        .photos
        .into_iter()
        .enumerate()
        .filter(|(at, _)| outliers.iter().all(|outlier| outlier.photo != *at))
        .map(|(_, photo)| photo)
        .collect();
    if let [(one, a), (two, b)] = &used[..]
        && cosine(&a.face, &b.face) < SAME_PERSON
    {
        progress::warn(format_args!(
            "`{}` and `{}` seem to show two people (cosine {:.2}); both are used. `difflora face dedupe` groups \
             images by person",
            one.display(),
            two.display(),
            cosine(&a.face, &b.face)
        ));
    }
    Ok(References { used, left_out })
}
