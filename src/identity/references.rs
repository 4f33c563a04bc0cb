//! The reference photos of a person: face vectors, quality, and which of them show another person.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use super::outliers::{SAME_PERSON, mean_direction, outliers};
use super::photos::Photos;
use super::{Face, Identity, Quality, Search, cosine};
use crate::image::Image;
use crate::progress;
use crate::weights::sha256;

/// What is read from one photo; `C` is what an image encoder is shown or gives.
#[derive(Clone, Debug)]
pub struct Reference<C> {
    /// Unit vector of the face.
    pub face: Vec<f32>,
    /// For or from the image encoder.
    pub image: C,
    /// Hash of the file.
    pub sha256: String,
    /// Number of faces in the photo.
    pub faces: usize,
    /// The face that is used.
    pub chosen: Face,
    /// Quality of that face.
    pub quality: Quality,
    /// How the face was found, where that is worth a note.
    pub remark: Option<String>,
}

impl<C> Reference<C> {
    /// Of the face `chosen` among those of `search`, with its vector `face`.
    ///
    /// # Errors
    /// The file of the photo cannot be read for its hash.
    pub fn new(
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

    /// What lowers the likeness, or is worth a note.
    pub fn hints(&self) -> Vec<String> {
        self.quality.hints().into_iter().chain(self.remark.clone()).collect()
    }
}

/// The photos of a person, and the person's share in a mixture of people.
#[derive(Clone, Debug)]
pub struct References<C> {
    /// The photos that show the person, in order.
    pub used: Vec<(PathBuf, Reference<C>)>,
    /// Files that could not be used or that show another person, each with the reason.
    pub left_out: Vec<(PathBuf, String)>,
    /// Weight of the person; all weights sum to 1.
    pub weight: f64,
}

impl References<Vec<f32>> {
    /// The mean embeddings.
    pub fn identity(&self) -> Identity {
        let photos = || self.used.iter().map(|(_, photo)| photo);
        Identity {
            face: mean_direction(&photos().map(|photo| &photo.face[..]).collect::<Vec<_>>()),
            image: Some(mean_direction(&photos().map(|photo| &photo.image[..]).collect::<Vec<_>>())),
        }
    }
}

impl<C: Send> References<C> {
    /// Reads the photos of one person with `read`, leaves out those of another person, and notes what lowers the
    /// likeness. `which` says in a note which of several faces `read` takes.
    ///
    /// # Errors
    /// As [`Photos::find`] and [`Photos::look`].
    pub fn look(
        photos: &[PathBuf],
        weight: f64,
        which: &str,
        read: impl Fn(&Path, &Image) -> Result<Reference<C>> + Sync,
    ) -> Result<Self> {
        let seen = Photos::find(photos)?.without_generated()?.look(|_, path, image| read(path, image))?;
        let mut left_out = seen.left_out;
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
            left_out.push((path.clone(), why));
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
        Ok(Self { used, left_out, weight })
    }
}

impl<C> References<C> {
    /// The photos again, cut to squares around the face: three times its size, so that head, hair and shoulders are in
    /// them, as portraits show them.
    ///
    /// # Errors
    /// A photo cannot be read again.
    pub fn squares(&self) -> Result<Vec<Image>> {
        let square = |(path, photo): &(PathBuf, Reference<C>)| {
            let image = Image::open(path)?;
            let [x1, y1, x2, y2] = photo.chosen.bounds;
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

    /// The used photos for a report in JSON.
    pub fn to_json(&self) -> Vec<Value> {
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
