//! The reference photos of a person: embeddings, quality, and which of them show another person.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};

use crate::identity::clip::ImageEncoder;
use crate::identity::outliers::{SAME_PERSON, mean_direction, outliers};
use crate::identity::photos::Photos;
use crate::identity::{Face, FaceEncoder, Identity, Quality, cosine};
use crate::image::Image;
use crate::progress;
use crate::weights::sha256;

/// What is read from one photo.
pub(super) struct Reference {
    face: Vec<f32>,
    image: Vec<f32>,
    pub(super) sha256: String,
    faces: usize,
    chosen: Face,
    quality: Quality,
}

/// The photos of the person.
pub(super) struct References {
    pub(super) used: Vec<(PathBuf, Reference)>,
    /// Files that could not be used or that show another person, with the reason.
    pub(super) left_out: Value,
}

impl References {
    /// The mean embeddings.
    pub(super) fn identity(&self) -> Identity {
        let photos = || self.used.iter().map(|(_, photo)| photo);
        Identity {
            face: mean_direction(&photos().map(|photo| &photo.face[..]).collect::<Vec<_>>()),
            image: Some(mean_direction(&photos().map(|photo| &photo.image[..]).collect::<Vec<_>>())),
        }
    }

    /// The photos again, cut to squares around the face.
    pub(super) fn squares(&self) -> Result<Vec<Image>> {
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

    pub(super) fn to_json(&self) -> Vec<Value> {
        let entry = |(file, photo): &(PathBuf, Reference)| {
            json!({
                "file": file.display().to_string(),
                "faces": photo.faces,
                "face": photo.chosen,
                "quality": photo.quality,
                "hints": photo.quality.hints(),
            })
        };
        self.used.iter().map(entry).collect()
    }
}

/// Encodes the photos, leaves out those of another person, and notes what lowers the likeness.
///
/// `face` numbers the face of each photo, 1 for the largest.
pub(super) fn look_at(
    photos: &[PathBuf],
    face: usize,
    faces: &FaceEncoder,
    image_encoder: &ImageEncoder,
) -> Result<References> {
    let seen = Photos::find(photos)?.without_generated()?.look(|_, path, image| {
        let search = faces.search(image)?;
        let chosen = search.face(face, &path.display().to_string())?;
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
            let which = if face == 1 { "the largest".into() } else { format!("number {face}") };
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
            left_out.push(json!({ "file": path.display().to_string(), "why": why }));
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
