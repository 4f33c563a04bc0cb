//! The methods that are compared: which LoRA each of them gives a person.

use std::path::Path;

use anyhow::Result;
use indicatif::ProgressBar;
use serde::{Serialize, Serializer};

use crate::eval::baselines::NearestNeighbour;
use crate::eval::renderer::Sampling;
use crate::eval::subjects::Condition;
use crate::hypernet::{Hypernet, SampleOptions};
use crate::identity::clip::ImageEncoder;
use crate::lora::ldm_keys::BlockLayout;
use crate::lora::{Lora, file};
use crate::recipes::dreambooth::refine::{Refinement, refine};
use crate::sdxl::pipeline::Sdxl;

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// The base model alone.
    NoLora,
    /// The mean of the training LoRAs.
    MeanLora,
    /// The LoRA that the hypernetwork generates for another person.
    Shuffled,
    /// The LoRA of the training person with the most similar face.
    Nearest,
    /// The LoRA that the hypernetwork generates from the person's reference photo.
    Generated,
    /// The generated LoRA, fine-tuned on the reference photo.
    Refined,
    /// The person's own LoRA through the autoencoder.
    Restored,
    /// The person's own DreamBooth LoRA.
    Own,
    /// The reference photo itself; nothing is generated.
    Photo,
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.key())
    }
}

impl Method {
    /// Name in reports.
    pub fn key(self) -> &'static str {
        match self {
            Self::NoLora => "no-lora",
            Self::MeanLora => "mean-lora",
            Self::Shuffled => "shuffled",
            Self::Nearest => "nearest",
            Self::Generated => "difflora",
            Self::Refined => "refined",
            Self::Restored => "restored",
            Self::Own => "own",
            Self::Photo => "photo",
        }
    }

    /// Name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::NoLora => "no LoRA",
            Self::MeanLora => "mean LoRA",
            Self::Shuffled => "DiffLoRA, another's photo",
            Self::Nearest => "nearest training LoRA",
            Self::Generated => "DiffLoRA",
            Self::Refined => "DiffLoRA, refined",
            Self::Restored => "own LoRA through the autoencoder",
            Self::Own => "own DreamBooth LoRA",
            Self::Photo => "the photo itself",
        }
    }
}

/// The hypernetwork under evaluation.
pub struct Generator {
    /// As the user named it.
    pub name: String,
    /// The hypernetwork.
    pub hypernet: Hypernet,
    /// Encoder of the photo as a whole, for its condition.
    pub image_encoder: ImageEncoder,
    /// How latents are sampled.
    pub options: SampleOptions,
}

/// How people are evaluated.
pub struct PeopleOptions {
    /// Images of each person and method.
    pub images: u64,
    /// How they are sampled.
    pub sampling: Sampling,
    /// Evaluates [`Method::Refined`] as well.
    pub refinement: Option<Refinement>,
}

/// What the LoRAs of all people come from.
pub struct LoraSources<'a> {
    /// The base, for [`Method::Refined`].
    pub base: &'a Sdxl,
    /// Of the base; names in LoRA files depend on it.
    pub block_layout: &'a BlockLayout,
    /// The hypernetwork.
    pub generator: &'a Generator,
    /// For [`Method::Nearest`].
    pub training_people: &'a NearestNeighbour,
    /// For [`Method::Refined`].
    pub refinement: Option<Refinement>,
}

/// What the LoRAs of one person come from.
pub struct PersonLoras<'a> {
    condition: &'a Condition,
    generated: Lora,
    own: Option<Lora>,
}

impl LoraSources<'_> {
    /// Generates the LoRA of a person from `condition`, and reads the `own` one.
    ///
    /// # Errors
    /// A LoRA file that cannot be read, and errors of the networks.
    pub fn person<'a>(&self, condition: &'a Condition, own: Option<&Path>) -> Result<PersonLoras<'a>> {
        Ok(PersonLoras {
            condition,
            generated: self.generator.hypernet.generate(&condition.identity, &self.generator.options)?,
            own: own.map(|path| self.read(path)).transpose()?,
        })
    }

    /// The LoRA of a method that is the same for everyone.
    pub fn shared_lora(&self, method: Method) -> Result<Option<Lora>> {
        match method {
            Method::MeanLora => Ok(Some(self.generator.hypernet.codec.mean_lora()?)),
            _ => Ok(None),
        }
    }

    /// The LoRA that `method` gives a person; `None` where it has none.
    ///
    /// # Errors
    /// A LoRA file that cannot be read, and errors of the networks.
    pub fn lora(&self, method: Method, person: &PersonLoras) -> Result<Option<Lora>> {
        let PersonLoras { condition, generated, own } = person;
        let codec = &self.generator.hypernet.codec;
        Ok(match (method, own, self.refinement) {
            (Method::Nearest, ..) => {
                let nearest = self.training_people.nearest(&condition.identity.face);
                nearest.map(|path| self.read(path)).transpose()?
            }
            (Method::Generated, ..) => Some(generated.clone()),
            (Method::Refined, _, Some(refinement)) => {
                let photo = std::slice::from_ref(&condition.photo);
                Some(refine(self.base, generated, photo, refinement, &ProgressBar::hidden())?.0)
            }
            (Method::Restored, Some(own), _) => Some(codec.lora(&codec.encode(&codec.vector(own)?)?)?),
            (Method::Own, own, _) => own.clone(),
            _ => None,
        })
    }

    fn read(&self, path: &Path) -> Result<Lora> {
        file::read(path, self.block_layout)
    }
}
