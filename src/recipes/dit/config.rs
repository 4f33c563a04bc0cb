//! Settings of the training of mixer and transformer: `[dit]` of `train-dit --config`.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::dataset::lora_dataset::LoraDataset;
use crate::diffusion::schedule::BetaSchedule;
use crate::failure::Failure;
use crate::hypernet::dit::{DitConfig, DitSize, Position};
use crate::hypernet::mixer::{MixerConfig, MixerKind};
use crate::hypernet::prior::PriorConfig;
use crate::hypernet::{DenoiserConfig, diffusion_of_latents};
use crate::train::trainer::TrainerConfig;

/// How mixer and transformer are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DitTrainConfig {
    /// Seed of the initial weights, the batches and the noise.
    pub seed: u64,
    /// How face and image embedding become one condition.
    #[serde(default)]
    pub mixer: MixerKind,
    /// Latent values per token.
    pub token: usize,
    /// Depth, width and heads by name: S, B, L or XL.
    #[serde(default)]
    pub size: Option<DitSize>,
    /// D of transformer and mixer; overrides `size`.
    #[serde(default)]
    pub width: Option<usize>,
    /// Number of blocks; overrides `size`.
    #[serde(default)]
    pub depth: Option<usize>,
    /// H; overrides `size`.
    #[serde(default)]
    pub heads: Option<usize>,
    /// Position embedding.
    #[serde(default)]
    pub position: Position,
    /// Noise schedule.
    #[serde(default)]
    pub schedule: NoiseScheduleKind,
    /// w_t of the loss.
    #[serde(default)]
    pub weights: LossWeights,
    /// Mixture of Gaussians that replaces N(0, I) as the end of the diffusion.
    #[serde(default)]
    pub prior: Option<PriorConfig>,
    /// Default number of DDIM steps of the trained hypernetwork.
    pub steps: usize,
    /// Its default classifier-free guidance scale; 1 disables guidance.
    pub guidance: f64,
    /// Whether the transformer predicts the residual of a ridge regression instead of the whole latent.
    pub linear_guess: bool,
    /// Candidate penalties of the ridge regression, selected by cross-validation.
    pub penalties: Vec<f64>,
    /// Folds of the cross-validation; all photos of a person are in one fold.
    pub folds: usize,
    /// σ of the noise added to standardised embeddings.
    pub condition_noise: f64,
    /// Condition dropout probability, for classifier-free guidance.
    pub drop: f64,
    /// Steps, batch size, learning rate.
    pub plan: TrainerConfig,
    /// Validation and early stopping.
    #[serde(default)]
    pub validation: Option<Validation>,
    /// Diffusion loss of the base model with the predicted LoRA, added to the loss of latents.
    #[serde(default)]
    pub functional: Option<FunctionalLossConfig>,
}

/// Diffusion loss of the base model on images of a person, with the decoded LoRA attached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionalLossConfig {
    /// Weight of this loss.
    pub weight: f64,
    /// People per shard whose LoRAs are decoded.
    pub people: usize,
    /// Images per person.
    #[serde(rename(serialize = "pictures"), alias = "pictures")]
    pub images: usize,
}

/// Noise schedule of the latents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseScheduleKind {
    /// β from 1e-4 to 0.02 in equal steps (Ho et al. 2020; G.pt, HyperDiffusion).
    #[default]
    Linear,
    /// ᾱ follows a squared cosine (Nichol and Dhariwal 2021).
    Cosine,
}

/// w_t, the weight of a sample's squared error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossWeights {
    /// 1 for all t.
    #[default]
    Uniform,
    /// min(SNR, γ) (Hang et al. 2023; they use γ = 5): near zero at high noise.
    MinSnr(f64),
}

/// Validation on people of the training set who are excluded from training. The weights with the lowest validation
/// error are saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Share of the people.
    pub share: f64,
    /// Steps between validations.
    pub every: u64,
    /// Validations without improvement after which training stops; 0 disables early stopping.
    #[serde(default)]
    pub patience: u64,
}

impl DitTrainConfig {
    /// Depth, width and heads.
    ///
    /// # Errors
    /// [`Failure::Usage`] when neither `size` nor the number is set.
    pub fn sizes(&self) -> Result<(usize, usize, usize)> {
        let named = self.size.map(DitSize::sizes);
        let one = |given: Option<usize>, named: Option<usize>, what: &str| {
            given.or(named).ok_or_else(|| {
                Failure::Usage(format!("the recipe of the transformer has neither `{what}` nor `size`"))
            })
        };
        let depth = one(self.depth, named.map(|(depth, ..)| depth), "depth")?;
        let width = one(self.width, named.map(|(_, width, _)| width), "width")?;
        Ok((depth, width, one(self.heads, named.map(|(.., heads)| heads), "heads")?))
    }

    /// The networks for embeddings of `face` and `image` values and latents of `latent` values, with the encoders of `set`.
    pub fn config(&self, [face, image, latent]: [usize; 3], set: &LoraDataset) -> Result<DenoiserConfig> {
        let (depth, width, heads) = self.sizes()?;
        let clusters = self.prior.as_ref().map_or(0, |prior| prior.clusters);
        let mut diffusion = diffusion_of_latents();
        if self.schedule == NoiseScheduleKind::Cosine {
            diffusion.beta_schedule = BetaSchedule::SquaredcosCapV2;
        }
        Ok(DenoiserConfig {
            mixer: MixerConfig { kind: self.mixer, face, image, width },
            dit: DitConfig {
                latent,
                token: self.token,
                width,
                depth,
                heads,
                position: self.position,
                clusters,
            },
            diffusion,
            steps: self.steps,
            guidance: self.guidance,
            linear_guess: self.linear_guess,
            prior: self.prior.clone(),
            face_encoder: set.header.face_encoder.clone(),
            image_encoder: set.header.image_encoder.clone(),
            image_input: set.header.image_input,
        })
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Failure::Usage`] with the key.
    pub fn check(&self) -> Result<()> {
        let refuse =
            |why: String| Err(Failure::Usage(format!("the recipe of the transformer: {why}")).into());
        if self.folds < 2 {
            return refuse(format!("`folds` is {}, two at least are needed", self.folds));
        }
        if !(0.0..=1.0).contains(&self.drop) {
            return refuse(format!("`drop` is {}, it is a part from 0 to 1", self.drop));
        }
        if let Some(Validation { share, every, .. }) = &self.validation
            && (!(*share > 0.0 && *share < 1.0) || *every == 0)
        {
            return refuse("`validation` wants a `share` between 0 and 1 and `every` of at least 1".into());
        }
        if let Some(FunctionalLossConfig { weight, people, images }) = &self.functional
            && !(*weight > 0.0 && weight.is_finite() && *people > 0 && *images > 0)
        {
            return refuse("`functional` wants a positive `weight`, `people` and `images`".into());
        }
        if let LossWeights::MinSnr(gamma) = self.weights
            && !(gamma > 0.0 && gamma.is_finite())
        {
            return refuse(format!("`min_snr` is a positive number, not {gamma}"));
        }
        Ok(())
    }
}
