//! The people of an evaluation. Some photos are the condition; a person's images are judged against the others.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::eval::baselines::mean_vector;
use crate::eval::judges::Judges;
use crate::eval::metrics::{Observation, Target};
use crate::identity::Identity;
use crate::identity::clip::ImageEncoder;
use crate::identity::outliers::mean_direction;
use crate::image::Image;
use crate::progress;
use crate::synthetic::scenes::{paint_image, reference_scene};
use crate::synthetic::{Person, World};

/// A person before anything is generated.
pub struct Subject {
    /// Name in messages and in the folder of images.
    pub id: String,
    /// Word of the person in prompts, such as `woman`.
    pub class: String,
    /// The person's own LoRA, where there is one.
    pub own_lora: Option<PathBuf>,
    /// Photos that are the condition; the others are judged against.
    pub references: usize,
    /// All photos.
    pub photos: Photos,
}

/// Photos of a person.
pub enum Photos {
    /// Painted when they are looked at.
    Painted(PaintedPhotos),
    /// Files, in order.
    Files(Vec<PathBuf>),
}

/// Reference photos of a painted person.
pub struct PaintedPhotos {
    /// Who is painted.
    pub person: Person,
    /// In which world.
    pub world: World,
    /// How many.
    pub count: u64,
    /// Selects the scenes.
    pub seed: u64,
    /// Side in pixels.
    pub size: usize,
}

/// What a LoRA is generated from.
pub struct Condition {
    /// The photos, one or more.
    pub photos: Vec<Image>,
    /// Mean of their embeddings; the image's is missing where no hypernetwork asks for it.
    pub identity: Identity,
}

/// A person whose photos have been embedded.
pub struct EmbeddedSubject {
    /// From the first photos with a face.
    pub condition: Condition,
    /// Measurements of the first of these photos.
    pub photo_observation: Observation,
    /// From the other photos.
    pub target: Target,
    /// What detection and embedding of the condition took.
    pub seconds: f64,
}

impl Subject {
    /// Detects and embeds the faces of all photos. A photo without a face is left out.
    ///
    /// # Errors
    /// A file that is no image; no photo with a face.
    pub fn embed(&self, judges: &Judges, image_encoder: Option<&ImageEncoder>) -> Result<EmbeddedSubject> {
        let mut condition =
            Condition { photos: Vec::new(), identity: Identity { face: Vec::new(), image: None } };
        let (mut faces, mut images) = (Vec::new(), Vec::new());
        let (mut others, mut photos) = (Vec::new(), Vec::new());
        let mut seconds = 0.0;
        self.photos.each(|name, photo| {
            let clock = Instant::now();
            let search = judges.detector.search(&photo)?;
            let Some(face) = search.faces.first() else {
                if let Some(name) = name {
                    progress::warn(format_args!("`{}` is left out: no face was found", name.display()));
                }
                return Ok(());
            };
            if condition.photos.len() < self.references {
                faces.push(judges.detector.embed(&photo, face)?);
                images.extend(image_encoder.map(|encoder| encoder.embed(&photo, face)).transpose()?);
                seconds += clock.elapsed().as_secs_f64();
                condition.photos.push(photo);
            } else {
                others.push(judges.embed_faces(&photo, face)?);
                photos.push(judges.embed_image(&photo)?);
            }
            Ok(())
        })?;
        anyhow::ensure!(!faces.is_empty(), "no face was found in any photo");
        condition.identity.face = direction(faces);
        condition.identity.image = (!images.is_empty()).then(|| direction(images));
        let of_recogniser = |at: usize| {
            mean_vector(&others.iter().map(|faces: &Vec<Vec<f32>>| faces[at].clone()).collect::<Vec<_>>())
        };
        let observation = judges.observe(&condition.photos[..1])?.pop();
        Ok(EmbeddedSubject {
            photo_observation: observation.context("an image has an observation")?,
            condition,
            target: Target {
                faces: (0..judges.recognisers.len()).filter_map(of_recogniser).collect(),
                images: photos,
                factors: match &self.photos {
                    Photos::Painted(painted) => Some(painted.person.identity.to_array()),
                    Photos::Files(_) => None,
                },
            },
            seconds,
        })
    }
}

/// The one vector as it is, or the direction of the mean.
fn direction(mut vectors: Vec<Vec<f32>>) -> Vec<f32> {
    if vectors.len() == 1 { vectors.remove(0) } else { mean_direction(&vectors) }
}

impl Photos {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Painted(painted) => painted.count as usize,
            Self::Files(files) => files.len(),
        }
    }

    /// Shows one after the other, with its file.
    fn each(&self, mut look: impl FnMut(Option<&Path>, Image) -> Result<()>) -> Result<()> {
        match self {
            Self::Painted(PaintedPhotos { person, world, count, seed, size }) => (0..*count)
                .try_for_each(|i| look(None, paint_image(person, &reference_scene(*world, *seed, i), *size))),
            Self::Files(files) => files.iter().try_for_each(|file| look(Some(file), Image::open(file)?)),
        }
    }
}
