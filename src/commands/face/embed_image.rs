//! The image encoder's embeddings of images, as the hypernetwork's second condition has them or as transformers does.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::inputs::{Encoder, Images};
use super::print_json;
use crate::commands::output::print_line;
use crate::files;
use crate::identity::clip::{ImageEncoder, ImageInput, ImageOutput};
use crate::identity::photos::Photos;
use crate::image::short_names;
use crate::registry;
use crate::weights::write_f32;

/// Embeddings of an image encoder instead of a face encoder's.
#[derive(Debug, clap::Args)]
pub struct ImageEncoderArgs {
    /// Embed with a CLIP image encoder instead: `tiny`, or a folder like openai/clip-vit-large-patch14.
    #[arg(long, value_name = "NAME|DIR", env = "DIFFLORA_IMAGE_ENCODER")]
    image_encoder: Option<String>,
    /// Output of the image encoder: `image_embeds` (projected), the mean of `hidden_states[-2]` (penultimate), both
    /// unit vectors, or all tokens of `hidden_states[-2]`, shape (N, D).
    #[arg(long, default_value = "projected", requires = "image_encoder", env = "DIFFLORA_IMAGE_OUTPUT")]
    image_output: Output,
    /// Embed the whole image, as IP-Adapter does, instead of the square around the largest face; needs no face.
    #[arg(long, requires = "image_encoder", alias = "whole-picture", env = "DIFFLORA_WHOLE_IMAGE")]
    whole_image: bool,
    /// Paint everything outside an ellipse around the face grey.
    #[arg(
        long,
        requires = "image_encoder",
        conflicts_with = "whole_image",
        env = "DIFFLORA_BLANK_BACKGROUND"
    )]
    blank_background: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Projected,
    Penultimate,
    Tokens,
}

impl ImageEncoderArgs {
    /// The image encoder that was asked for.
    pub fn encoder(&self) -> Option<&str> {
        self.image_encoder.as_deref()
    }
}

/// Writes one tensor an image, under its file name.
pub fn embed(
    images: &Images,
    faces: &Encoder,
    name: &str,
    options: &ImageEncoderArgs,
    out: &Path,
    json: bool,
) -> Result<()> {
    files::refuse_inputs(&[out], &images.images)?;
    files::check_writable(out)?;
    let files = registry::find(name, "image_encoder")?;
    let id = registry::identify(&files, name, registry::ENCODER_WEIGHTS)?;
    let output = match options.image_output {
        Output::Projected => ImageOutput::Projected,
        Output::Penultimate | Output::Tokens => ImageOutput::Penultimate,
    };
    let input = ImageInput { output, blank_background: options.blank_background };
    let image_encoder = ImageEncoder::open(&files)?.with_input(input);
    let faces = if options.whole_image { None } else { Some(faces.load()?) };
    let seen = Photos::find(&images.images)?.look(|_, file, image| {
        let (count, shown) = match &faces {
            None => (1, image.clone()),
            Some(faces) => {
                let search = faces.search(image)?;
                let face = search.largest(&file.display().to_string())?;
                (search.faces.len(), image_encoder.shown(image, face))
            }
        };
        if options.image_output == Output::Tokens {
            let tokens = image_encoder.tokens(&shown)?;
            return Ok((count, tokens.dims().to_vec(), tokens.flatten_all()?.to_vec1()?));
        }
        let vector = image_encoder.embed_whole(&shown)?;
        Ok((count, vec![vector.len()], vector))
    })?;
    seen.note_several_faces(|(faces, ..)| *faces);
    let left_out = seen.left_out_json();
    let paths: Vec<_> = seen.photos.iter().map(|(file, _)| file.clone()).collect();
    let names = short_names(&paths);
    let tensors = names.iter().zip(&seen.photos);
    let tensors = tensors.map(|(name, (_, (_, shape, values)))| (name.as_str(), shape.clone(), &values[..]));
    write_f32(
        out,
        [("image_encoder", id.name.clone()), ("image_encoder_sha256", id.sha256.clone())],
        tensors,
    )?;
    if json {
        print_json(
            &json!({ "out": out.display().to_string(), "names": names, "image_encoder": id.name, "left_out": left_out }),
        )
    } else {
        print_line!("{} embeddings in `{}`", names.len(), out.display())
    }
}
