//! Networks that measure generated images. None of them takes part in a training.

use anyhow::Result;

use crate::eval::image_judges::ImageJudge;
use crate::eval::metrics::{Attributes, Observation};
use crate::failure::Failure;
use crate::identity::align::align;
use crate::identity::{self, Face, FaceEncoder};
use crate::image::Image;
use crate::named::Named;
use crate::synthetic::World;
use crate::synthetic::attribute_classifier::{AttributeClassifier, Record};
use crate::weights::model_id::ModelId;

/// Side of an aligned face, in pixels.
const ALIGNED: usize = 112;

/// Face detector, face recognisers, image encoders, and the classifier of painted attributes.
pub struct Judges {
    /// Finds faces; it is the hypernetwork's own encoder, whose vectors are not used as a measure.
    pub detector: FaceEncoder,
    /// Embed faces for the similarity; the first is the one of the table's main columns.
    pub recognisers: Vec<identity::Judge>,
    /// Embed whole images.
    pub encoders: Vec<ImageJudge>,
    /// Measures prompt accuracy and factors, where there is one.
    pub attributes: Option<AttributeClassifier>,
}

impl Judges {
    /// Measures each image on its own.
    pub fn observe(&self, images: &[Image]) -> Result<Vec<Observation>> {
        Ok(self.observe_faces(images)?.into_iter().map(|(observation, _)| observation).collect())
    }

    /// As [`Self::observe`], with the aligned face of each image.
    pub fn observe_faces(&self, images: &[Image]) -> Result<Vec<(Observation, Option<Image>)>> {
        let attributes: Vec<Option<Attributes>> = match &self.attributes {
            Some(classifier) => {
                let both = classifier.classes(images)?.into_iter().zip(classifier.factors(images)?);
                both.map(|(classes, factors)| Some(Attributes { classes, factors })).collect()
            }
            None => vec![None; images.len()],
        };
        let observe = |(image, attributes): (&Image, Option<Attributes>)| {
            let faces = self.detector.detect(image)?;
            let face = faces.first();
            let observation = Observation {
                faces: face.map(|face| self.embed_faces(image, face)).transpose()?,
                images: self.embed_image(image)?,
                attributes,
            };
            Ok((observation, face.map(|face| align(image, &face.points, ALIGNED))))
        };
        images.iter().zip(attributes).map(observe).collect()
    }

    /// The vector of `face` by each recogniser.
    pub fn embed_faces(&self, image: &Image, face: &Face) -> Result<Vec<Vec<f32>>> {
        self.recognisers.iter().map(|recogniser| recogniser.embed(image, face)).collect()
    }

    /// The vector of `image` by each image encoder.
    pub fn embed_image(&self, image: &Image) -> Result<Vec<Vec<f32>>> {
        self.encoders.iter().map(|encoder| encoder.embed(image)).collect()
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
        let [people, classifier] = [world, self.world()].map(Named::name);
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

    /// Name and hash of each recogniser.
    pub fn recogniser_ids(&self) -> Vec<ModelId> {
        let id = |recogniser: &identity::Judge| {
            let (name, sha256) = recogniser.provenance();
            ModelId { name: name.into(), sha256 }
        };
        self.recognisers.iter().map(id).collect()
    }
}
