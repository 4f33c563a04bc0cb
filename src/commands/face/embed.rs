//! `face embed`: the largest face of each image as a unit vector.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::inputs::{Encoder, Images};
use super::print_json;
use crate::commands::output::print_line;
use crate::files;
use crate::identity::photos::EmbeddedFaces;
use crate::image::short_names;
use crate::weights::write_f32;

pub(super) fn embed(images: &Images, encoder: &Encoder, out: &Path, json: bool) -> Result<()> {
    files::refuse_inputs(&[out], &images.images)?;
    files::check_writable(out)?;
    let encoder = encoder.load()?;
    let people = EmbeddedFaces::of(&images.images, &encoder)?;
    let names = short_names(&people.files);
    let vectors = names.iter().zip(&people.vectors);
    let vectors = vectors.map(|(name, vector)| (name.as_str(), vec![vector.len()], &vector[..]));
    let [_, (name, sha256)] = encoder.provenance();
    write_f32(out, [("face_encoder", name.into()), ("face_encoder_sha256", sha256)], vectors)?;
    if json {
        print_json(
            &json!({ "out": out.display().to_string(), "names": names, "face_encoder": name, "left_out": people.left_out }),
        )
    } else {
        print_line!("{} faces in `{}`", names.len(), out.display())
    }
}
