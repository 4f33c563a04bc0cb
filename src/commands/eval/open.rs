//! The models of an evaluation.

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device};

use super::args::PeopleArgs;
use crate::dataset::lora_dataset::{FormWanted, LoraDataset, ReadOptions};
use crate::eval::image_judges::ImageJudge;
use crate::eval::judges::Judges;
use crate::eval::methods::Generator;
use crate::eval::renderer::Renderer;
use crate::hypernet::{DenoiserConfig, Hypernet, SampleOptions};
use crate::identity::clip::ImageEncoder;
use crate::identity::{self, FaceEncoder};
use crate::progress;
use crate::registry;
use crate::sdxl::pipeline::Sdxl;
use crate::synthetic::attribute_classifier::AttributeClassifier;

/// The hypernetwork, with the image encoder that it was made for.
pub(super) fn generator(args: &PeopleArgs, device: &Device) -> Result<Generator> {
    let files = registry::find_hypernet(&args.hypernet, args.base_options.offline)?;
    let hypernet = Hypernet::open(&files, device)?;
    let wanted = &hypernet.denoiser.config;
    let encoder_files = registry::find(&args.image_encoder, "image_encoder")?;
    let image_id = registry::identify(&encoder_files, &args.image_encoder, registry::ENCODER_WEIGHTS)?;
    wanted.image_encoder.demand(&image_id, "image encoder")?;
    Ok(Generator {
        name: args.hypernet.clone(),
        sha256: Hypernet::sha256(&files)?,
        image_encoder: ImageEncoder::open(&encoder_files)?.with_input(wanted.image_input),
        options: SampleOptions {
            seed: args.seed,
            samples: args.samples as usize,
            strength: args.strength,
            ..hypernet.options()
        },
        hypernet,
    })
}

/// All LoRAs of the dataset, for comparisons of the LoRAs themselves; none, with a note, where they do not fit.
pub(super) fn loras(dataset: Option<&Path>, generator: Option<&Generator>) -> Option<LoraDataset> {
    let options = ReadOptions {
        form: FormWanted::Of(generator?.hypernet.codec.form.clone()),
        ..ReadOptions::default()
    };
    match LoraDataset::open(dataset?, &options) {
        Ok(loras) => Some(loras),
        Err(error) => {
            progress::note(format_args!("the LoRAs themselves are not compared: {error:#}"));
            None
        }
    }
}

/// The face encoder that the hypernetwork was made for; it detects, too.
pub(super) fn detector(wanted: &DenoiserConfig) -> Result<FaceEncoder> {
    let detector = match wanted.face_encoder.name.as_str() {
        name if identity::catalog::is_known(name) => FaceEncoder::open(name)?,
        _ => FaceEncoder::builtin()?,
    };
    wanted.face_encoder.demand(&detector.id(), "face encoder")?;
    Ok(detector)
}

/// The base, and the networks that judge its images.
pub(super) fn renderer(args: &PeopleArgs, detector: FaceEncoder, device: &Device) -> Result<Renderer> {
    let base = args.base_options.open(&args.base)?;
    let attributes = match &args.judge {
        Some(name) => Some(AttributeClassifier::open(&registry::find(name, "judge")?)?),
        None => match registry::built_in("judge") {
            Ok(files) => Some(AttributeClassifier::open(&files)?),
            Err(error) => {
                progress::note(format_args!("prompt accuracy and factors are not measured: {error:#}"));
                None
            }
        },
    };
    let recognisers =
        args.recognisers.iter().map(|name| identity::Judge::open(name)).collect::<Result<_>>()?;
    let clip = |name: &String| {
        let files = registry::find(name, "image_encoder")?;
        ImageJudge::clip(&files, registry::identify(&files, name, registry::ENCODER_WEIGHTS)?)
    };
    let dino = |name: &String| {
        let files = registry::find(name, "dino")?;
        ImageJudge::dino(&files, registry::identify(&files, name, registry::ENCODER_WEIGHTS)?)
    };
    let encoders = args.clip.iter().map(clip).chain(args.dino.iter().map(dino)).collect::<Result<_>>()?;
    Ok(Renderer {
        base: base.id()?,
        model: Sdxl::open(&base.files, DType::F32, device)?,
        block_layout: base.block_layout,
        judges: Judges { detector, recognisers, encoders, attributes },
    })
}
