//! `face embed`: the largest face of each image as a unit vector.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::inputs::{Encoder, Images, People, short_names};
use super::print_json;
use crate::files;
use crate::output::print_line;
use crate::weights::header::{Header, Storage};

pub(super) fn embed(images: &Images, encoder: &Encoder, out: &Path, json: bool) -> Result<()> {
    files::refuse_inputs(&[out], &images.images)?;
    files::check_writable(out)?;
    let encoder = encoder.load()?;
    let people = People::embed(images, &encoder)?;
    let names = short_names(&people.files);
    let vectors = people.vectors.iter().map(|vector| (vec![vector.len()], &vector[..]));
    let [_, (name, sha256)] = encoder.provenance();
    write_vectors(out, &names, vectors, [("face_encoder", name.into()), ("face_encoder_sha256", sha256)])?;
    if json {
        print_json(
            &json!({ "out": out.display().to_string(), "names": names, "face_encoder": name, "left_out": people.left_out }),
        )
    } else {
        print_line!("{} faces in `{}`", names.len(), out.display())
    }
}

/// Writes a .safetensors of one tensor (shape, values) an image; `about` tells what made them.
pub(super) fn write_vectors<'a>(
    out: &Path,
    names: &[String],
    tensors: impl Iterator<Item = (Vec<usize>, &'a [f32])>,
    about: [(&str, String); 2],
) -> Result<()> {
    let mut rows: Vec<_> = names.iter().zip(tensors).collect();
    rows.sort_by_key(|(name, _)| *name);
    let entries = rows.iter().map(|(name, (shape, _))| (name.as_str(), Storage::F32, &shape[..]));
    let about = about.map(|(key, value)| (key.to_string(), value)).into();
    let mut bytes = Header::of(about, entries).to_bytes();
    let values = rows.iter().flat_map(|(_, (_, values))| values.iter());
    bytes.extend(values.flat_map(|value| value.to_le_bytes()));
    files::write_whole(out, &bytes)
}
