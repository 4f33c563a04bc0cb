//! The reference photos of a person: embeddings, quality, and which of them show another person.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use super::Args;
use crate::identity::outliers::{SAME_PERSON, mean_direction, outliers};
use crate::identity::photos::Photos;
use crate::identity::{Face, Identity, Quality, Search, cosine};
use crate::image::Image;
use crate::progress;
use crate::weights::sha256;

/// What is read from one photo; `C` is what an image encoder is shown or gives.
pub(super) struct Reference<C> {
    face: Vec<f32>,
    pub(super) image: C,
    pub(super) sha256: String,
    faces: usize,
    chosen: Face,
    quality: Quality,
    /// How the face was found, where that is worth a note.
    remark: Option<String>,
}

impl<C> Reference<C> {
    /// Of the face `chosen` among those of `search`, with its vector `face`.
    pub(super) fn new(
        (path, photo): (&Path, &Image),
        search: &Search,
        chosen: &Face,
        face: Vec<f32>,
        image: C,
    ) -> Result<Self> {
        Ok(Self {
            face,
            image,
            sha256: sha256::of_file(path)?,
            faces: search.faces.len(),
            chosen: chosen.clone(),
            quality: Quality::of(photo, chosen, &search.faces),
            remark: None,
        })
    }

    /// The same with a note on how the face was found.
    pub(super) fn with_remark(self, remark: Option<String>) -> Self {
        Self { remark, ..self }
    }

    /// The face's unit vector.
    pub(super) fn face(&self) -> &[f32] {
        &self.face
    }

    /// What lowers the likeness, or is worth a note.
    fn hints(&self) -> Vec<String> {
        self.quality.hints().into_iter().chain(self.remark.clone()).collect()
    }
}

/// The photos of the person.
pub(super) struct References<C> {
    pub(super) used: Vec<(PathBuf, Reference<C>)>,
    /// Files that could not be used or that show another person, with the reason.
    pub(super) left_out: Value,
}

impl References<Vec<f32>> {
    /// The mean embeddings.
    pub(super) fn identity(&self) -> Identity {
        let photos = || self.used.iter().map(|(_, photo)| photo);
        Identity {
            face: mean_direction(&photos().map(|photo| &photo.face[..]).collect::<Vec<_>>()),
            image: Some(mean_direction(&photos().map(|photo| &photo.image[..]).collect::<Vec<_>>())),
        }
    }
}

impl<C> References<C> {
    /// The photos again, cut to squares around the face.
    pub(super) fn squares(&self) -> Result<Vec<Image>> {
        let square = |(path, photo): &(PathBuf, Reference<C>)| {
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
        let entry = |(file, photo): &(PathBuf, Reference<C>)| {
            json!({
                "file": file.display().to_string(),
                "faces": photo.faces,
                "face": photo.chosen,
                "quality": photo.quality,
                "hints": photo.hints(),
            })
        };
        self.used.iter().map(entry).collect()
    }
}

/// The photos of each person that --ref or --mix names, with the person's weight; see [`look_at`].
pub(super) fn look_at_all<C: Send>(
    args: &Args,
    which: &str,
    read: impl Fn(&Path, &Image) -> Result<Reference<C>> + Sync,
) -> Result<Vec<(References<C>, f64)>> {
    if !args.identity.mixes() {
        return Ok(vec![(look_at(&args.reference, which, read)?, 1.0)]);
    }
    let people = args.identity.mixed()?.into_iter();
    people.map(|(photo, weight)| Ok((look_at(&[photo], which, &read)?, weight))).collect()
}

/// Reads the photos with `read`, leaves out those of another person, and notes what lowers the likeness.
///
/// `which` says which of several faces `read` takes.
fn look_at<C: Send>(
    photos: &[PathBuf],
    which: &str,
    read: impl Fn(&Path, &Image) -> Result<Reference<C>> + Sync,
) -> Result<References<C>> {
    let seen = Photos::find(photos)?.without_generated()?.look(|_, path, image| read(path, image))?;
    let mut left_out = seen.left_out_json();
    for (path, photo) in &seen.photos {
        if photo.faces > 1 {
            progress::note(format_args!(
                "{} faces in `{}`: {which} is taken, at {:.0?}; --face N takes another",
                photo.faces,
                path.display(),
                photo.chosen.bounds
            ));
        }
        for hint in photo.hints() {
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
    let used: Vec<(PathBuf, Reference<C>)> = seen
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
