//! A person's LoRA by DiffLoRA: embeddings → latent by diffusion → LoRA.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;

use super::Predicted;
use crate::failure::Failure;
use crate::hypernet::{Hypernet, LatentSampler, PersonToLora, SampleOptions};
use crate::identity::FaceEncoder;
use crate::identity::clip::ImageEncoder;
use crate::identity::references::{Reference, References};
use crate::lora::metadata;
use crate::progress::Stage;
use crate::recipes::dreambooth::refine::CAPTION;
use crate::weights::model_folder::ModelFiles;

/// Embeds the photos of each person; the people are lists of photos with a weight. `face` is the number of the face
/// to use in each photo, 1 for the largest.
///
/// # Errors
/// As [`References::look`].
pub fn look(
    people: &[(Vec<PathBuf>, f64)],
    faces: &FaceEncoder,
    image_encoder: &ImageEncoder,
    face: usize,
) -> Result<Vec<References<Vec<f32>>>> {
    let which = if face == 1 { "the largest".into() } else { format!("number {face}") };
    let one = |(photos, weight): &(Vec<PathBuf>, f64)| {
        References::look(photos, *weight, &which, |path, image| {
            let search = faces.search(image)?;
            let chosen = search.face(face, &path.display().to_string())?;
            let (vector, shown) = (faces.embed(image, chosen)?, image_encoder.embed(image, chosen)?);
            Reference::new((path, image), &search, chosen, vector, shown)
        })
    };
    people.iter().map(one).collect()
}

/// Samples the LoRA of a person, or of a mixture of people. `vary` moves it away from the person, see
/// [`Hypernet::vary`].
///
/// # Errors
/// [`Failure::Usage`] where `vary` cannot be used with this hypernetwork.
pub fn predict(
    files: &ModelFiles,
    hypernet: &Hypernet,
    people: &[References<Vec<f32>>],
    options: &SampleOptions,
    vary: Option<f64>,
) -> Result<Predicted> {
    let clock = Stage::begin("sampling the LoRA");
    if vary.is_some() {
        hypernet.spread().map_err(|error| Failure::Usage(format!("--vary: {error:#}")))?;
    }
    let (mut conditions, mut gates) = (Vec::new(), Vec::new());
    for person in people {
        let identity = person.identity();
        gates.extend(hypernet.gate(&identity)?);
        conditions.push((identity, person.weight));
    }
    let lora = LatentSampler { hypernet, options, vary }.predict(&conditions)?;
    clock.end();

    let face_encoder = &hypernet.denoiser.config.face_encoder;
    Ok(Predicted {
        lora,
        metadata: vec![
            (metadata::TRIGGER_PHRASE, "person".to_string()),
            ("difflora.hypernet_sha256", Hypernet::sha256(files)?),
            ("difflora.face_encoder", face_encoder.name.clone()),
            ("difflora.face_encoder_sha256", face_encoder.sha256.clone()),
            ("difflora.identity_seed", options.seed.to_string()),
            ("difflora.identity_steps", options.steps.to_string()),
        ],
        gates,
        seed: options.seed,
        own_downs: !hypernet.codec.layout.shared_down,
        caption: CAPTION,
        trigger: None,
        scale: 1.0,
        dtype: DType::F32,
    })
}
