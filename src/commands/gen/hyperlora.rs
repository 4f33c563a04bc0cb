//! A person's LoRA by HyperLoRA: grey-background crops and face vectors → LoRA, in one pass.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::Args;
use super::person::Predicted;
use super::references::{Reference, References, look_at_all};
use crate::failure::Failure;
use crate::hypernet::hyperlora::{CAPTION, Conditions, FILES, LORA_SCALE, Person, Shapes, TRIGGER};
use crate::identity::catalog::{self, FACE_MODELS};
use crate::identity::clip::ImageEncoder;
use crate::identity::hyperlora::FacePreparation;
use crate::image::Image;
use crate::lora::apply::{self, Unmatched};
use crate::lora::block_weights::BlockWeights;
use crate::lora::{Lora, LoraLayer, metadata};
use crate::progress::{self, Stage};
use crate::registry::hyperlora::{CLIP, CLIP_SHA256, FACE_ENCODER};
use crate::registry::{self, Base};
use crate::sdxl::pipeline::SdxlLoader;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;
use crate::weights::sha256;

/// The photos of each person with what CLIP is to be shown, and the person's weight.
type People = Vec<(References<Image>, f64)>;

/// Photos → crops → CLIP's tokens → LoRA; networks are freed as soon as they are not needed.
pub(super) fn predict(
    args: &Args,
    base: &Base,
    files: &ModelFiles,
    device: &Device,
) -> Result<(People, Predicted)> {
    args.identity.refuse_sampling()?;
    let shapes = Shapes::read(files)?;
    check_base(&shapes, base)?;
    let clock = Stage::begin("looking at the photos");
    let (people, face_id) = look(args)?;
    clock.end();

    let start = Instant::now();
    let clock = Stage::begin("encoding the crops");
    let (conditions, image_id) = encode(args, &people)?;
    clock.end();
    let clock = Stage::begin("mixing the LoRA");
    let network = shapes.load(files, device)?;
    let lora = network.lora(files, &network.coefficients(&conditions)?)?;
    clock.end();

    let predicted = Predicted {
        lora,
        metadata: vec![
            (metadata::TRIGGER_PHRASE, TRIGGER.to_string()),
            ("difflora.hypernet_sha256", hypernet_sha256(files)?),
            ("difflora.face_encoder", face_id.name),
            ("difflora.face_encoder_sha256", face_id.sha256),
            ("difflora.image_encoder", image_id.name),
            ("difflora.image_encoder_sha256", image_id.sha256),
        ],
        gates: Vec::new(),
        seed: args.identity.seed(),
        own_downs: true,
        caption: CAPTION,
        trigger: Some(TRIGGER),
        scale: LORA_SCALE,
        dtype: DType::F16,
        start,
    };
    Ok((people, predicted))
}

/// Refuses a base that lacks one of the LoRA's layers, before anything is computed.
fn check_base(shapes: &Shapes, base: &Base) -> Result<()> {
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

/// Finds and cuts out the faces. SCRFD, ArcFace and the landmark detector are freed on return.
fn look(args: &Args) -> Result<(People, ModelId)> {
    let name = args.face_encoder.as_deref().unwrap_or(FACE_ENCODER);
    let encoder = catalog::open_encoder(name)?;
    let [_, (recogniser, sha256)] = encoder.provenance();
    let id = ModelId { name: recogniser.into(), sha256 };
    check_recogniser(&id)?;
    let preparation = FacePreparation::new(encoder, catalog::open_landmarks(name)?)?;
    let which = match args.face {
        None => "the one with the highest score".to_string(),
        Some(1) => "the largest".into(),
        Some(number) => format!("number {number}"),
    };
    let people = look_at_all(args, &which, |path, photo| {
        let face = preparation.prepare(
            photo,
            &path.display().to_string(),
            args.face.map(|number| number as usize),
        )?;
        if args.strict && !face.strict {
            let why = format!(
                "no face found in `{}` at HyperLoRA's own sizes of search, and --strict",
                path.display()
            );
            return Err(Failure::NoFace(why).into());
        }
        let remark = (!face.strict).then(|| {
            "HyperLoRA's own sizes of search (640, 512, 384 and 256 pixels; 640 in the square around the face) show no \
             face; a smaller size or a border did"
                .to_string()
        });
        let reference = Reference::new((path, photo), &face.search, &face.chosen, face.embedding, face.clip)?;
        Ok(reference.with_remark(remark))
    })?;
    Ok((people, id))
}

/// Refuses another known recogniser in the place of antelopev2's: its vectors mean another person. Unknown bytes, as of
/// another export of the same network, are used with a warning.
fn check_recogniser(found: &ModelId) -> Result<()> {
    let Some(wanted) = catalog::find(FACE_ENCODER) else { return Ok(()) };
    let wanted = ModelId { name: wanted.name.into(), sha256: wanted.recogniser.sha256.into() };
    let builtin = catalog::is_known(&found.name) && catalog::find(&found.name).is_none();
    if builtin || FACE_MODELS.iter().any(|model| model.recogniser.sha256 == found.sha256) {
        return wanted.demand(found, "face encoder");
    }
    if let Err(error) = wanted.demand(found, "face encoder") {
        progress::warn(format_args!("{error}; it is used because its bytes are of no other known encoder"));
    }
    Ok(())
}

/// Each person's conditions, and the image encoder, which is freed on return.
fn encode(args: &Args, people: &People) -> Result<(Vec<Person>, ModelId)> {
    let name = args.image_encoder.as_deref();
    let files = registry::find_clip(name, args.base_options.offline)?;
    let id = registry::identify(&files, name.unwrap_or(CLIP), registry::ENCODER_WEIGHTS)?;
    let wanted = ModelId { name: CLIP.into(), sha256: CLIP_SHA256.into() };
    if let Err(error) = wanted.demand(&id, "image encoder") {
        progress::warn(format_args!("{error}; it is used, but the likeness may suffer"));
    }
    let encoder = ImageEncoder::open(&files)?;
    let conditions = |(references, weight): &(References<Image>, f64)| {
        let photos = references.used.iter().map(|(_, photo)| {
            progress::check()?;
            Ok(Conditions { face: photo.face().to_vec(), clip: encoder.tokens(&photo.image)? })
        });
        Ok(Person { photos: photos.collect::<Result<_>>()?, weight: *weight })
    };
    Ok((people.iter().map(conditions).collect::<Result<_>>()?, id))
}

/// SHA-256 of the four files, one after the other; remembered until one changes.
fn hypernet_sha256(files: &ModelFiles) -> Result<String> {
    let folder = files.name();
    sha256::remembered(&FILES.map(|file| Path::new(&folder).join(file)))
}

/// The prompt with the words that the LoRA needs in front, unless it holds them.
pub(super) fn with_trigger(prompt: &str, words: &str) -> String {
    if prompt.contains(words) { prompt.to_string() } else { format!("{words}, {prompt}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trigger_words_come_first_and_once() {
        let prompt = with_trigger("a man, smiling", TRIGGER);
        assert_eq!(prompt, "fcsks fxhks fhyks, a man, smiling");
        assert_eq!(with_trigger(&prompt, TRIGGER), prompt);
    }

    #[test]
    fn other_known_recognisers_are_refused_with_both_names() {
        let id = |name: &str, sha256: &str| ModelId { name: name.into(), sha256: sha256.into() };
        let buffalo = catalog::find("buffalo_l").unwrap().recogniser.sha256;
        let error = check_recogniser(&id("buffalo_l", buffalo)).unwrap_err().to_string();
        assert!(error.contains("antelopev2") && error.contains("buffalo_l"), "{error}");
        assert!(check_recogniser(&id("mobilefacenet512", "0123")).is_err());
        let antelope = catalog::find("antelopev2").unwrap().recogniser.sha256;
        assert!(check_recogniser(&id("antelopev2", antelope)).is_ok());
        assert!(check_recogniser(&id("mine", "0123")).is_ok());
    }
}
