//! The people of a dataset of LoRAs that no hypernetwork is trained on.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::dataset::manifest::{Header, ImageSettings, Row, read_manifest};
use crate::eval::baselines::NearestNeighbour;
use crate::eval::subjects::{PaintedPhotos, Photos, Subject};
use crate::failure::Failure;
use crate::synthetic::{Person, World};
use crate::weights::model_id::ModelId;

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
    /// Reads the dataset in `folder`, whose LoRAs must be for `base`; at most `maximum` held-out people, the first of
    /// whose photos are `references`.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for another base, fewer than two people, or files that are missing or damaged.
    pub fn read(folder: &Path, base: &ModelId, maximum: Option<usize>, references: usize) -> Result<Self> {
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
        let ImageSettings { world, size, seed, references: photos, .. } = ImageSettings::read(folder)?;
        ensure!(
            photos as usize > references,
            "`{}` has {photos} reference images a person; {references} are the condition, so one more is needed",
            folder.display()
        );
        let subject = |row: Row| Subject {
            id: row.id,
            class: "person".into(),
            own_lora: Some(folder.join(row.lora)),
            references,
            photos: Photos::Painted(PaintedPhotos {
                person: Person::new(row.person.0, row.person.1),
                world,
                count: photos,
                seed,
                size,
            }),
        };
        Ok(Self {
            world,
            subjects: held_out.into_iter().take(count).map(subject).collect(),
            training_people: NearestNeighbour::read(folder, &training)?,
        })
    }
}
