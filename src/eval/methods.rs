//! The methods that are compared: which LoRA each of them gives a person.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde::{Serialize, Serializer};

use crate::eval::baselines::NearestNeighbour;
use crate::eval::image_store::Times;
use crate::eval::renderer::Sampling;
use crate::eval::subjects::{Condition, Subject};
use crate::failure::Failure;
use crate::hypernet::{Hypernet, SampleOptions};
use crate::identity::clip::ImageEncoder;
use crate::lora::adapter::AdapterFile;
use crate::lora::arithmetic::{Replacement, Which, perturb};
use crate::lora::file;
use crate::lora::ldm_keys::BlockLayout;
use crate::recipes::dreambooth::refine::{Refinement, refine};
use crate::sdxl::pipeline::Sdxl;
use crate::weights::sha256;

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// The base model alone.
    NoLora,
    /// The mean of the training LoRAs.
    MeanLora,
    /// The LoRA that the hypernetwork generates for another person.
    Shuffled,
    /// The LoRA of the training person with the most similar face.
    Nearest,
    /// The hypernetwork's linear guess: ridge regression from the embeddings to the latent.
    Ridge,
    /// The LoRA that the hypernetwork generates from the person's reference photos.
    Generated,
    /// The generated LoRA, fine-tuned on the reference photos.
    Refined,
    /// The person's own LoRA through the autoencoder.
    Restored,
    /// The person's own DreamBooth LoRA.
    Own,
    /// The person's own LoRA with a quarter of its weights replaced.
    Perturbed(Which, Replacement),
    /// `DIR/PERSON.safetensors`, as another program made it.
    Files(PathBuf),
    /// The reference photo itself; nothing is generated.
    Photo,
}

/// All methods that stand alone: the name in options, the key in reports, the title in tables.
const NAMES: [(Method, &str, &str, &str); 10] = [
    (Method::NoLora, "none", "no-lora", "no LoRA"),
    (Method::MeanLora, "mean", "mean-lora", "mean LoRA"),
    (Method::Shuffled, "shuffled", "shuffled", "DiffLoRA, another's photo"),
    (Method::Nearest, "nearest", "nearest", "nearest training LoRA"),
    (Method::Ridge, "ridge", "ridge", "ridge regression"),
    (Method::Generated, "generated", "difflora", "DiffLoRA"),
    (Method::Refined, "refined", "refined", "DiffLoRA, refined"),
    (Method::Restored, "restored", "restored", "own LoRA through the autoencoder"),
    (Method::Own, "own", "own", "own DreamBooth LoRA"),
    (Method::Photo, "photo", "photo", "the photo itself"),
];

impl Method {
    /// All methods but [`Method::Files`] and [`Method::Perturbed`], in the order of the table.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.iter().map(|(method, ..)| method.clone())
    }

    /// The methods in the order of the table: the `wanted` ones, or all where none is named; `refines` says whether
    /// LoRAs are fine-tuned.
    ///
    /// # Errors
    /// [`Failure::Usage`] for one that is named twice, or cannot be had alone.
    pub fn chosen(wanted: &[Self], refines: bool) -> Result<Vec<Self>> {
        let usage = |why: String| Err(Failure::Usage(format!("--methods: {why}")).into());
        if wanted.is_empty() {
            return Ok(Self::all().filter(|method| *method != Self::Refined || refines).collect());
        }
        for (i, method) in wanted.iter().enumerate() {
            if wanted[..i].iter().any(|other| other.key() == method.key()) {
                return usage(format!("`{method}` is named twice"));
            }
        }
        if wanted.contains(&Self::Refined) && !refines {
            return usage("`refined` needs --refine STEPS".into());
        }
        if wanted.contains(&Self::Shuffled) && !wanted.contains(&Self::Generated) {
            return usage("`shuffled` needs `generated`, whose images it exchanges".into());
        }
        Ok(wanted.to_vec())
    }

    /// Name in reports and of the folder of images.
    pub fn key(&self) -> String {
        match (self, self.names()) {
            (Self::Files(folder), _) => {
                format!("lora-{}", folder.file_name().unwrap_or_default().to_string_lossy())
            }
            (Self::Perturbed(which, replacement), _) => {
                let which = if *which == Which::Largest { "largest" } else { "smallest" };
                let with = if *replacement == Replacement::Zero { "zero" } else { "noise" };
                format!("own-{which}-{with}")
            }
            (_, (_, key, _)) => key.into(),
        }
    }

    /// Name in tables.
    pub fn title(&self) -> String {
        match (self, self.names()) {
            (Self::Files(folder), _) => format!("LoRAs of `{}`", folder.display()),
            (Self::Perturbed(which, replacement), _) => {
                let which = if *which == Which::Largest { "largest" } else { "smallest" };
                let with = if *replacement == Replacement::Zero { "zeroed" } else { "replaced by noise" };
                format!("own, {which} quarter {with}")
            }
            (_, (.., title)) => title.into(),
        }
    }

    /// Whether its images are the same for all people of one class word.
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::NoLora | Self::MeanLora)
    }

    /// Whether it generates images of its own: the shuffled ones are those of another person.
    pub fn is_drawn(&self) -> bool {
        !matches!(self, Self::Shuffled | Self::Photo)
    }

    /// Whether a hypernetwork is needed.
    pub fn needs_hypernet(&self) -> bool {
        !matches!(
            self,
            Self::NoLora | Self::Nearest | Self::Own | Self::Perturbed(..) | Self::Files(_) | Self::Photo
        )
    }

    fn names(&self) -> (&'static str, &'static str, &'static str) {
        let found = NAMES.iter().find(|(method, ..)| method == self);
        found.map_or(("lora", "", ""), |(_, name, key, title)| (name, key, title))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Files(folder) => write!(f, "lora:{}", folder.display()),
            Self::Perturbed(..) => f.write_str(&self.key()),
            other => f.write_str(other.names().0),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some(folder) = text.strip_prefix("lora:").filter(|folder| !folder.is_empty()) {
            return Ok(Self::Files(folder.into()));
        }
        let found = NAMES.iter().find(|(_, name, key, _)| [*name, *key].contains(&text));
        found.map(|(method, ..)| method.clone()).ok_or_else(|| {
            let known: Vec<&str> = NAMES.iter().map(|(_, name, ..)| *name).collect();
            format!("the methods are {}, and lora:DIR", known.join(", "))
        })
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.key())
    }
}

/// The hypernetwork under evaluation.
pub struct Generator {
    /// As the user named it.
    pub name: String,
    /// SHA-256 of its files.
    pub sha256: String,
    /// The hypernetwork.
    pub hypernet: Hypernet,
    /// Encoder of the photo as a whole, for its condition.
    pub image_encoder: ImageEncoder,
    /// How latents are sampled.
    pub options: SampleOptions,
}

/// How people are evaluated.
pub struct PeopleOptions {
    /// Rows of the table, in order.
    pub methods: Vec<Method>,
    /// How images are sampled.
    pub sampling: Sampling,
    /// For [`Method::Refined`].
    pub refinement: Option<Refinement>,
    /// Judges the images that are there, and generates none.
    pub judge_only: bool,
    /// Whether a measure that cannot be taken is an error.
    pub require_all: bool,
}

/// What the LoRAs of all people come from.
pub struct LoraSources<'a> {
    /// The base, for [`Method::Refined`].
    pub base: &'a Sdxl,
    /// Of the base; names in LoRA files depend on it.
    pub block_layout: &'a BlockLayout,
    /// The hypernetwork, for the methods that need one.
    pub generator: Option<&'a Generator>,
    /// For [`Method::Nearest`].
    pub training_people: Option<&'a NearestNeighbour>,
    /// For [`Method::Refined`].
    pub refinement: Option<Refinement>,
}

impl LoraSources<'_> {
    /// Whether `method` has a LoRA for `subject`.
    pub fn has(&self, method: &Method, subject: &Subject) -> bool {
        match method {
            Method::Nearest => self.training_people.is_some(),
            Method::Refined => self.generator.is_some() && self.refinement.is_some(),
            Method::Ridge => {
                self.generator.is_some_and(|generator| generator.hypernet.denoiser.has_linear_guess())
            }
            Method::Restored => self.generator.is_some() && subject.own_lora.is_some(),
            Method::Own | Method::Perturbed(..) => subject.own_lora.is_some(),
            Method::Files(folder) => lora_file(folder, &subject.id).is_some(),
            Method::MeanLora | Method::Shuffled | Method::Generated => self.generator.is_some(),
            Method::NoLora | Method::Photo => true,
        }
    }

    /// The LoRA that `method` gives a person, and what it took; none without a LoRA.
    ///
    /// # Errors
    /// A LoRA file that cannot be read, and errors of the networks.
    pub fn lora(
        &self,
        method: &Method,
        subject: &Subject,
        condition: &Condition,
        times: &mut Times,
    ) -> Result<Option<AdapterFile>> {
        let lora = match method {
            Method::NoLora | Method::Photo => return Ok(None),
            Method::Files(_) | Method::Own | Method::Nearest | Method::Perturbed(..) => {
                let path =
                    self.file(method, subject, condition).context("there is no LoRA of this person")?;
                times.lora_bytes = file::weights_in(&path)?.metadata().map_or(0, |data| data.len());
                let mut lora = file::read_adapters(&path, self.block_layout)?;
                if let Method::Perturbed(which, replacement) = method {
                    perturb(&mut lora, *which, QUARTER, *replacement, PERTURBATION_SEED)?;
                }
                return Ok(Some(lora));
            }
            Method::MeanLora => self.generator()?.hypernet.codec.mean_lora()?,
            Method::Restored => {
                let own = subject.own_lora.as_deref().context("the person has no LoRA of their own")?;
                let codec = &self.generator()?.hypernet.codec;
                codec.lora(&codec.encode(&codec.vector(&file::read(own, self.block_layout)?)?)?)?
            }
            Method::Ridge | Method::Generated | Method::Shuffled | Method::Refined => {
                let Generator { hypernet, options, .. } = self.generator()?;
                let clock = Instant::now();
                let latent = match method {
                    Method::Ridge => hypernet.guess_latent(&condition.identity)?,
                    _ => hypernet.sample_latent(&condition.identity, options)?,
                };
                times.sample = clock.elapsed().as_secs_f64();
                let clock = Instant::now();
                let lora = hypernet.codec.lora(&latent)?;
                times.decode = clock.elapsed().as_secs_f64();
                match (method, self.refinement) {
                    (Method::Refined, Some(refinement)) => {
                        let clock = Instant::now();
                        let refined =
                            refine(self.base, &lora, &condition.photos, refinement, &ProgressBar::hidden())?
                                .0;
                        times.sample += clock.elapsed().as_secs_f64();
                        refined
                    }
                    _ => lora,
                }
            }
        };
        times.lora_bytes = lora
            .layers
            .values()
            .map(|layer| 4 * (layer.down.elem_count() + layer.up.elem_count()) as u64)
            .sum();
        Ok(Some(AdapterFile::from(&lora)))
    }

    /// The file that `method` reads the LoRA of a person from, where it reads one.
    fn file(&self, method: &Method, subject: &Subject, condition: &Condition) -> Option<PathBuf> {
        match method {
            Method::Files(folder) => lora_file(folder, &subject.id),
            Method::Own | Method::Perturbed(..) | Method::Restored => subject.own_lora.clone(),
            Method::Nearest => self.training_people?.nearest(&condition.identity.face).map(Path::to_path_buf),
            _ => None,
        }
    }

    /// A hash of what decides the LoRA that `method` gives a person: its file, or the hypernetwork with its options and
    /// the person's embeddings. Images of another origin are not those of this evaluation.
    ///
    /// # Errors
    /// A LoRA file that cannot be read.
    pub fn origin(&self, method: &Method, subject: &Subject, condition: &Condition) -> Result<String> {
        let file = self.file(method, subject, condition);
        let mut text = match file {
            Some(path) => sha256::of_file(&file::weights_in(&path)?)?,
            None => String::new(),
        };
        if method.needs_hypernet() {
            let generator = self.generator()?;
            text += &format!("\n{}", generator.sha256);
            if !matches!(method, Method::MeanLora | Method::Restored) {
                text += &format!("\n{:?}\n{:?}", generator.options, condition.identity);
            }
        }
        if *method == Method::Refined {
            text += &format!("\n{:?}", self.refinement);
        }
        Ok(sha256::of_bytes(text.as_bytes()))
    }

    fn generator(&self) -> Result<&Generator> {
        self.generator.context("this method needs a hypernetwork")
    }
}

/// Share of the weights that [`Method::Perturbed`] replaces (Wu et al. 2024, figure 4).
const QUARTER: f64 = 0.25;
/// Seed of its noise.
const PERTURBATION_SEED: u64 = 0;

/// The LoRA of person `id` in a folder of another program's LoRAs: `ID.safetensors`, or the folder `ID`.
fn lora_file(folder: &Path, id: &str) -> Option<PathBuf> {
    let file = folder.join(format!("{id}.safetensors"));
    let inside = folder.join(id);
    [file, inside].into_iter().find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_read_by_their_name_and_by_their_key_in_reports() {
        for method in Method::all() {
            assert_eq!(method.to_string().parse(), Ok(method.clone()));
            assert_eq!(method.key().parse(), Ok(method));
        }
        let files: Method = "lora:peers/hyperlora".parse().unwrap();
        assert_eq!(
            (files.key(), files.to_string()),
            ("lora-hyperlora".into(), "lora:peers/hyperlora".into())
        );
        assert!("lora:".parse::<Method>().is_err());
        assert!("best".parse::<Method>().unwrap_err().contains("ridge"));
    }
}
