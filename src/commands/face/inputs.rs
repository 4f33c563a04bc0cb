//! The images and the encoder of the `face` commands.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::Result;

use crate::identity::landmarks::LandmarkDetector;
use crate::identity::photos::{Photos, Seen};
use crate::identity::{FaceEncoder, catalog};
use crate::progress;

#[derive(Debug, clap::Args)]
pub(super) struct Images {
    /// Images, patterns such as 'me/*.jpg', or folders.
    #[arg(required = true, value_name = "IMAGE|DIR")]
    pub(super) images: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Encoder {
    /// mobilefacenet (512 values), sface (128 values), antelopev2, buffalo_l, auraface, or a folder of ONNX files.
    #[arg(
        long,
        visible_alias = "encoder",
        value_name = "NAME|DIR",
        env = "DIFFLORA_FACE_ENCODER",
        default_value = "mobilefacenet"
    )]
    face_encoder: String,
}

impl Encoder {
    /// Opens the encoder.
    pub(super) fn load(&self) -> Result<FaceEncoder> {
        catalog::open_encoder(&self.face_encoder)
    }

    /// Opens the landmark detector beside it.
    pub(super) fn load_landmarks(&self) -> Result<LandmarkDetector> {
        catalog::open_landmarks(&self.face_encoder)
    }
}

/// The largest face of each image as a unit vector.
pub(super) struct People {
    pub(super) files: Vec<PathBuf>,
    pub(super) vectors: Vec<Vec<f32>>,
    pub(super) left_out: serde_json::Value,
}

impl People {
    /// Embeds the largest face of each image.
    pub(super) fn embed(images: &Images, encoder: &FaceEncoder) -> Result<Self> {
        let seen = Photos::find(&images.images)?.look(|_, file, image| {
            let search = encoder.search(image)?;
            let face = search.largest(&file.display().to_string())?;
            Ok((search.faces.len(), encoder.embed(image, face)?))
        })?;
        note_several_faces(&seen, |(faces, _)| *faces);
        let left_out = seen.left_out_json();
        let (files, vectors) = seen.photos.into_iter().map(|(file, (_, vector))| (file, vector)).unzip();
        Ok(Self { files, vectors, left_out })
    }
}

/// Says which images have several faces.
pub(super) fn note_several_faces<T>(seen: &Seen<T>, faces: impl Fn(&T) -> usize) {
    for (file, story) in &seen.photos {
        if faces(story) > 1 {
            progress::note(format_args!(
                "{} faces in `{}`: the largest is taken",
                faces(story),
                file.display()
            ));
        }
    }
}

/// File names where they differ, else whole paths.
pub(super) fn short_names(files: &[PathBuf]) -> Vec<String> {
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut times = HashMap::new();
    for file in files {
        *times.entry(name(file)).or_insert(0) += 1;
    }
    files
        .iter()
        .map(|file| if times[&name(file)] == 1 { name(file) } else { file.display().to_string() })
        .collect()
}
