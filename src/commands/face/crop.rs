//! `face crop`: the largest face of each image, aligned.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use super::inputs::Images;
use super::print_json;
use crate::commands::output::print_line;
use crate::files;
use crate::identity::FaceEncoder;
use crate::identity::align::align;
use crate::identity::photos::Photos;
use crate::image::pngs_for;

pub(super) fn crop(
    images: &Images,
    encoder: &FaceEncoder,
    out: &Path,
    size: usize,
    json: bool,
) -> Result<()> {
    let photos = Photos::find(&images.images)?;
    let targets = pngs_in(out, &photos)?;
    let seen = photos.look(|at, file, image| {
        let search = encoder.search(image)?;
        let face = search.largest(&file.display().to_string())?;
        align(image, &face.points, size).save(&targets[at], Some("difflora face crop"))?;
        Ok((search.faces.len(), targets[at].clone()))
    })?;
    seen.note_several_faces(|(faces, _)| *faces);
    if json {
        let written: Vec<_> =
            seen.photos.iter().map(|(file, (_, face))| json!({ "file": file.display().to_string(), "face": face.display().to_string() })).collect();
        print_json(&written)
    } else {
        print_line!("{} faces in `{}`", seen.photos.len(), out.display())
    }
}

/// A PNG in the folder `out`, which is made, for each photo, named after it.
pub(super) fn pngs_in(out: &Path, photos: &Photos) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make the folder `{}`", out.display()))?;
    let sources: Vec<PathBuf> = photos.paths().map(Path::to_path_buf).collect();
    let targets = pngs_for(out, &sources);
    let outputs: Vec<&Path> = targets.iter().map(PathBuf::as_path).collect();
    files::refuse_inputs(&outputs, &sources)?;
    targets.iter().try_for_each(|path| files::check_writable(path))?;
    Ok(targets)
}
