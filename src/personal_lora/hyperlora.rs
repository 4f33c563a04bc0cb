//! A person's LoRA by HyperLoRA: grey-background crops and face vectors → LoRA, in one pass.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::Predicted;
use crate::failure::Failure;
use crate::hypernet::PersonToLora;
use crate::hypernet::hyperlora::{self, CAPTION, Conditions, LORA_SCALE, Shapes, TRIGGER};
use crate::identity::clip::ImageEncoder;
use crate::identity::hyperlora::FacePreparation;
use crate::identity::references::{Reference, References};
use crate::image::Image;
use crate::lora::apply::{self, Unmatched};
use crate::lora::block_weights::BlockWeights;
use crate::lora::{Lora, LoraLayer, metadata};
use crate::progress::{self, Stage};
use crate::registry::Base;
use crate::sdxl::pipeline::SdxlLoader;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;

/// Refuses a base that lacks one of the LoRA's layers, before anything is computed.
///
/// # Errors
/// [`Failure::Usage`] that names the base and the layer.
pub fn check_base(shapes: &Shapes, base: &Base) -> Result<()> {
    let rank = shapes.rank();
    let zeros = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let layers = shapes.layers().map(|(path, out, input)| {
        let layer = LoraLayer { down: zeros((rank, input))?, up: zeros((out, rank))?, alpha: 1.0 };
        Ok((path, layer))
    });
    let lora = Lora { layers: layers.collect::<Result<_>>()?, ..Lora::default() };
    let mut skeleton = SdxlLoader::open(&base.files, DType::F32, &Device::Cpu)?.skeleton()?;
    let loras = [(&(&lora).into(), BlockWeights::all(1.0))];
    apply::check(|visit| skeleton.visit_layers(visit), &loras, Unmatched::Refuse).map(drop).map_err(|error| {
        let why =
            format!("HyperLoRA cannot be used with the base `{}`: {error}; it needs SDXL's UNet", base.name);
        Failure::Usage(why).into()
    })
}

/// Finds and cuts out the faces of each person; the people are lists of photos with a weight. `face` is the number of
/// the face to use, from the largest on; the one with the highest score without it.
///
/// # Errors
/// As [`References::look`]; with `strict` [`Failure::NoFace`] where HyperLoRA's own sizes of search show no face.
pub fn look(
    people: &[(Vec<PathBuf>, f64)],
    preparation: &FacePreparation,
    face: Option<usize>,
    strict: bool,
) -> Result<Vec<References<Image>>> {
    let which = match face {
        None => "the one with the highest score".to_string(),
        Some(1) => "the largest".into(),
        Some(number) => format!("number {number}"),
    };
    let one = |(photos, weight): &(Vec<PathBuf>, f64)| {
        References::look(photos, *weight, &which, |path, photo| {
            let name = path.display().to_string();
            let found = preparation.prepare(photo, &name, face)?;
            if strict && !found.strict {
                let why =
                    format!("no face found in `{name}` at HyperLoRA's own sizes of search, and --strict");
                return Err(Failure::NoFace(why).into());
            }
            let remark = (!found.strict).then(|| {
                "HyperLoRA's own sizes of search (640, 512, 384 and 256 pixels; 640 in the square around the face) show \
                 no face; a smaller size or a border did"
                    .to_string()
            });
            let (vector, shown) = (found.embedding, found.clip);
            let reference = Reference::new((path, photo), &found.search, &found.chosen, vector, shown)?;
            Ok(Reference { remark, ..reference })
        })
    };
    people.iter().map(one).collect()
}

/// What HyperLoRA is conditioned on: the face vectors of each person, and CLIP's tokens of the crops. The encoder is
/// freed on return.
///
/// # Errors
/// The image encoder fails; Ctrl-C.
pub fn encode(people: &[References<Image>], encoder: ImageEncoder) -> Result<Vec<(Vec<Conditions>, f64)>> {
    let conditions = |person: &References<Image>| {
        let photos = person.used.iter().map(|(_, photo)| {
            progress::check()?;
            Ok(Conditions { face: photo.face.clone(), clip: encoder.tokens(&photo.image)? })
        });
        Ok((photos.collect::<Result<_>>()?, person.weight))
    };
    people.iter().map(conditions).collect()
}

/// The encoders that the conditions were made with.
pub struct Encoders {
    /// ArcFace.
    pub face: ModelId,
    /// CLIP.
    pub image: ModelId,
}

/// Predicts the LoRA of a person, or of a mixture of people, in one pass. `seed` is that of refining.
///
/// # Errors
/// Conditions that do not fit, or weights that cannot be read.
pub fn predict(
    files: &ModelFiles,
    shapes: Shapes,
    conditions: &[(Vec<Conditions>, f64)],
    encoders: Encoders,
    seed: u64,
    device: &Device,
) -> Result<Predicted> {
    let clock = Stage::begin("mixing the LoRA");
    let lora = shapes.load(files, device)?.predict(conditions)?;
    clock.end();
    Ok(Predicted {
        lora,
        metadata: vec![
            (metadata::TRIGGER_PHRASE, TRIGGER.to_string()),
            ("difflora.hypernet_sha256", hyperlora::sha256(files)?),
            ("difflora.face_encoder", encoders.face.name),
            ("difflora.face_encoder_sha256", encoders.face.sha256),
            ("difflora.image_encoder", encoders.image.name),
            ("difflora.image_encoder_sha256", encoders.image.sha256),
        ],
        gates: Vec::new(),
        seed,
        own_downs: true,
        caption: CAPTION,
        trigger: Some(TRIGGER),
        scale: LORA_SCALE,
        dtype: DType::F16,
    })
}
