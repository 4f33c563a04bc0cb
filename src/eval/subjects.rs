//! The people of an evaluation. One photo is the condition; a person's images are judged against the other photos.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::dataset::manifest::{Header, ImageSettings, Row, read_manifest};
use crate::eval::baselines::{NearestNeighbour, mean_vector};
use crate::eval::judges::Judges;
use crate::eval::metrics::{Observation, Target};
use crate::failure::Failure;
use crate::identity::Identity;
use crate::identity::clip::ImageEncoder;
use crate::image::Image;
use crate::synthetic::scenes::{paint_image, reference_scene};
use crate::synthetic::{Person, World};
use crate::weights::model_id::ModelId;

/// A person before anything is generated.
pub struct Subject {
    /// Name in messages.
    pub id: String,
    /// The person's own LoRA, where there is one.
    pub own_lora: Option<PathBuf>,
    photos: PaintedPhotos,
}

/// Reference photos of a painted person.
struct PaintedPhotos {
    person: Person,
    world: World,
    count: u64,
    seed: u64,
    size: usize,
}

/// What a LoRA is generated from.
pub struct Condition {
    /// The photo.
    pub photo: Image,
    /// Its embeddings.
    pub identity: Identity,
}

/// A person whose photos have been embedded.
pub struct EmbeddedSubject {
    /// From the first photo with a face.
    pub condition: Condition,
    /// Measurements of that photo.
    pub photo_observation: Observation,
    /// From the other photos.
    pub target: Target,
}

impl Subject {
    /// Detects and embeds the faces of all photos.
    ///
    /// # Errors
    /// Fewer than two photos with a face.
    pub fn embed(&self, judges: &Judges, image_encoder: &ImageEncoder) -> Result<EmbeddedSubject> {
        let mut condition = None;
        let mut others: Vec<Vec<f32>> = Vec::new();
        for photo in self.photos.paint() {
            let search = judges.detector.search(&photo)?;
            let Some(face) = search.faces.first() else { continue };
            if condition.is_none() {
                let image = Some(image_encoder.embed(&photo, face)?);
                let identity = Identity { face: judges.detector.embed(&photo, face)?, image };
                condition = Some(Condition { photo, identity });
            } else {
                others.push(judges.recogniser.embed(&photo, face)?);
            }
        }
        let condition = condition.context("no face was found in any reference image")?;
        let observation = judges.observe(std::slice::from_ref(&condition.photo))?.pop();
        Ok(EmbeddedSubject {
            photo_observation: observation.context("an image has an observation")?,
            condition,
            target: Target {
                face: mean_vector(&others).context("a face was found in one reference image only")?,
                factors: Some(self.photos.person.identity.to_array()),
            },
        })
    }
}

impl PaintedPhotos {
    fn paint(&self) -> impl Iterator<Item = Image> {
        let scenes = (0..self.count).map(|i| reference_scene(self.world, self.seed, i));
        scenes.map(|scene| paint_image(&self.person, &scene, self.size))
    }
}

/// The held-out people of a dataset, and those that its hypernetworks are trained on.
pub struct HeldOut {
    /// World of all subjects.
    pub world: World,
    /// Two or more.
    pub subjects: Vec<Subject>,
    /// For the nearest-neighbour baseline.
    pub training_people: NearestNeighbour,
}

impl HeldOut {
    /// Reads the dataset in `folder`, whose LoRAs must be for `base`; at most `maximum` held-out people.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for another base, fewer than two people, or files that are missing or damaged.
    pub fn read(folder: &Path, base: &ModelId, maximum: Option<usize>) -> Result<Self> {
        let header = Header::read(folder)?;
        if header.base.sha256 != base.sha256 {
            let why = format!("its LoRAs are for the base `{}`, not for `{}`", header.base.name, base.name);
            return Err(Failure::unusable(&folder.join("dataset.json"), why));
        }
        let rows = read_manifest(folder)?;
        let (held_out, training): (Vec<Row>, Vec<Row>) =
            rows.into_iter().partition(|row| row.split == "held-out");
        let count = maximum.map_or(held_out.len(), |maximum| held_out.len().min(maximum));
        if count < 2 {
            let why = format!("it has {} held-out people; at least two are needed", held_out.len());
            return Err(Failure::unusable(&folder.join("manifest.jsonl"), why));
        }
        let ImageSettings { world, size, seed, references, .. } = ImageSettings::read(folder)?;
        ensure!(
            references > 1,
            "`{}` has {references} reference images a person; one is the condition, so two are needed",
            folder.display()
        );
        let subject = |row: Row| Subject {
            id: row.id,
            own_lora: Some(folder.join(row.lora)),
            photos: PaintedPhotos {
                person: Person::new(row.person.0, row.person.1),
                world,
                count: references,
                seed,
                size,
            },
        };
        Ok(Self {
            world,
            subjects: held_out.into_iter().take(count).map(subject).collect(),
            training_people: NearestNeighbour::read(folder, &training)?,
        })
    }
}
