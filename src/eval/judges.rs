//! Networks that measure generated images. None of them takes part in a training.

use anyhow::Result;

use crate::eval::metrics::{Attributes, Observation};
use crate::failure::Failure;
use crate::identity::{self, FaceEncoder};
use crate::image::Image;
use crate::synthetic::World;
use crate::synthetic::attribute_classifier::{AttributeClassifier, Record};
use crate::weights::model_id::ModelId;

/// Face detector, face recogniser, and the classifier of painted attributes.
pub struct Judges {
    /// Finds faces; it is the hypernetwork's own encoder, whose vectors are not used as a measure.
    pub detector: FaceEncoder,
    /// Embeds faces for the similarity.
    pub recogniser: identity::Judge,
    /// Measures prompt accuracy and factors, where there is one.
    pub attributes: Option<AttributeClassifier>,
}

impl Judges {
    /// Measures each image on its own.
    pub fn observe(&self, images: &[Image]) -> Result<Vec<Observation>> {
        let attributes: Vec<Option<Attributes>> = match &self.attributes {
            Some(classifier) => {
                let both = classifier.classes(images)?.into_iter().zip(classifier.factors(images)?);
                both.map(|(classes, factors)| Some(Attributes { classes, factors })).collect()
            }
            None => vec![None; images.len()],
        };
        let observe = |(image, attributes): (&Image, Option<Attributes>)| {
            let faces = self.detector.detect(image)?;
            let face = faces.first().map(|face| self.recogniser.embed(image, face)).transpose()?;
            Ok(Observation { face, attributes })
        };
        images.iter().zip(attributes).map(observe).collect()
    }

    /// The world whose attributes the classifier names; the varied one where there is no classifier.
    pub fn world(&self) -> World {
        self.attributes.as_ref().map_or(World::Varied, AttributeClassifier::world)
    }

    /// Refuses an attribute classifier of another world than that of the people.
    ///
    /// # Errors
    /// [`Failure::Usage`] with both worlds.
    pub fn demand_world(&self, world: World) -> Result<()> {
        if self.attributes.is_none() || self.world() == world {
            return Ok(());
        }
        let [people, classifier] = [world, self.world()].map(World::name);
        Err(Failure::Usage(format!(
            "the dataset's people are of the {people} world, the attribute classifier names those of the {classifier} \
             one; give one of the {people} world with --judge"
        ))
        .into())
    }

    /// Accuracy of the attribute classifier on painted images.
    pub fn record(&self) -> Option<&Record> {
        self.attributes.as_ref().map(AttributeClassifier::record)
    }

    /// Indices of the factors of which the attribute classifier explains half of the variance or more.
    pub fn visible_factors(&self) -> Vec<usize> {
        let factors = self.record().map_or(&[][..], |record| &record.factors);
        factors.iter().enumerate().filter(|(_, factor)| factor.r2 >= 0.5).map(|(i, _)| i).collect()
    }

    /// Name and hash of the recogniser.
    pub fn recogniser_id(&self) -> ModelId {
        let (name, sha256) = self.recogniser.provenance();
        ModelId { name: name.into(), sha256 }
    }
}
