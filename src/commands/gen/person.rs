//! Photos of a person → a LoRA, by the hypernetwork that was asked for.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use candle_core::Device;

use super::Args;
use crate::hypernet::hyperlora::Shapes;
use crate::hypernet::{DenoiserConfig, Hypernet};
use crate::identity::catalog::{self, open_encoder};
use crate::identity::clip::ImageEncoder;
use crate::identity::hyperlora::FacePreparation;
use crate::identity::references::References;
use crate::image::Image;
use crate::personal_lora::{Origin, PersonalLora, diffusion, hyperlora};
use crate::progress::Stage;
use crate::registry::{self, Base};
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;

/// Makes the LoRA; each network is freed before the next is loaded.
pub(super) fn make_lora(
    args: &Args,
    base: &Base,
    base_id: &ModelId,
    device: &Device,
) -> Result<PersonalLora> {
    let files = registry::find_hypernet(&args.hypernet, args.base_options.offline)?;
    let origin = |start| Origin {
        hypernet: &args.hypernet,
        base,
        base_id,
        vary: args.identity.vary(),
        refine: args.identity.refine.map(|steps| (steps, args.identity.refine_rate)),
        device,
        start,
    };
    if Shapes::are_in(&files) {
        return by_hyperlora(args, base, &files, origin);
    }
    let (config, denoiser) = Hypernet::config(&files)?;
    config.base.demand(base_id, "base model")?;
    let clock = Stage::begin("looking at the photos");
    let people = look(args, &denoiser)?;
    clock.end();
    let origin = origin(Instant::now());
    let predicted = {
        let clock = Stage::begin("loading the hypernetwork");
        let hypernet = Hypernet::open(&files, device)?;
        clock.end();
        let options = args.identity.sampling(&hypernet);
        diffusion::predict(&files, &hypernet, &people, &options, args.identity.vary())?
    };
    predicted.finish(&people, &origin)
}

/// The photos of each person that --ref or --mix names, with the person's weight.
fn people(args: &Args) -> Result<Vec<(Vec<PathBuf>, f64)>> {
    if !args.identity.mixes() {
        return Ok(vec![(args.reference.clone(), 1.0)]);
    }
    Ok(args.identity.mixed()?.into_iter().map(|(photo, weight)| (vec![photo], weight)).collect())
}

/// Embeds the photos with the encoders that the hypernetwork was trained with.
fn look(args: &Args, config: &DenoiserConfig) -> Result<Vec<References<Vec<f32>>>> {
    let image_name = args.image_encoder.as_deref().unwrap_or(registry::BUILT_IN);
    let image_files = registry::find(image_name, "image_encoder")?;
    let image_id = registry::identify(&image_files, image_name, registry::ENCODER_WEIGHTS)?;
    config.image_encoder.demand(&image_id, "image encoder")?;
    let faces = open_encoder(match &args.face_encoder {
        Some(name) => name,
        None if catalog::is_known(&config.face_encoder.name) => &config.face_encoder.name,
        None => catalog::BUILT_IN,
    })?;
    config.face_encoder.demand(&faces.id(), "face encoder")?;
    let image_encoder = ImageEncoder::open(&image_files)?.with_input(config.image_input);
    diffusion::look(&people(args)?, &faces, &image_encoder, args.face.unwrap_or(1) as usize)
}

fn by_hyperlora<'a>(
    args: &Args,
    base: &Base,
    files: &ModelFiles,
    origin: impl Fn(Instant) -> Origin<'a>,
) -> Result<PersonalLora> {
    args.identity.refuse_sampling()?;
    let shapes = Shapes::read(files)?;
    hyperlora::check_base(&shapes, base)?;
    let clock = Stage::begin("looking at the photos");
    let (people, face) = cut_out(args)?;
    clock.end();

    let origin = origin(Instant::now());
    let clock = Stage::begin("encoding the crops");
    let name = args.image_encoder.as_deref();
    let clip = registry::find_clip(name, args.base_options.offline)?;
    let clip_name = name.unwrap_or(registry::hyperlora::CLIP);
    let image = registry::identify(&clip, clip_name, registry::ENCODER_WEIGHTS)?;
    registry::hyperlora::check_image_encoder(&image);
    let conditions = hyperlora::encode(&people, ImageEncoder::open(&clip)?)?;
    clock.end();
    let encoders = hyperlora::Encoders { face, image };
    let seed = args.identity.seed();
    hyperlora::predict(files, shapes, &conditions, encoders, seed, origin.device)?.finish(&people, &origin)
}

/// Finds and cuts out the faces; also says which face encoder did. SCRFD, ArcFace and the landmark detector are freed
/// on return.
fn cut_out(args: &Args) -> Result<(Vec<References<Image>>, ModelId)> {
    let name = args.face_encoder.as_deref().unwrap_or(registry::hyperlora::FACE_ENCODER);
    let encoder = open_encoder(name)?;
    let id = encoder.id();
    registry::hyperlora::check_face_encoder(&id)?;
    let preparation = FacePreparation::new(encoder, catalog::open_landmarks(name)?)?;
    let face = args.face.map(|number| number as usize);
    Ok((hyperlora::look(&people(args)?, &preparation, face, args.strict)?, id))
}
