//! The options of what lies between photos and a LoRA.

use std::path::PathBuf;

use anyhow::Result;

use crate::commands::values::{learning_rate, named, number, seed};
use crate::failure::Failure;
use crate::hypernet::{Choice, Hypernet, SampleOptions};

/// How a person becomes a LoRA.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct IdentityOptions {
    /// DDIM steps for the LoRA's latent [default: the hypernetwork's].
    #[arg(help_heading = "Identity", long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), env = "DIFFLORA_IDENTITY_STEPS")]
    identity_steps: Option<u32>,
    /// Guidance scale for the latent [default: the hypernetwork's].
    #[arg(help_heading = "Identity", long, value_name = "F", env = "DIFFLORA_IDENTITY_GUIDANCE", value_parser = number)]
    identity_guidance: Option<f64>,
    /// DDIM η: 0 is deterministic, 1 adds as much noise as DDPM.
    #[arg(
        help_heading = "Identity",
        long,
        value_name = "F",
        default_value_t = 0.0,
        env = "DIFFLORA_IDENTITY_ETA", value_parser = number)]
    identity_eta: f64,
    /// Seed of the latent noise; -1 takes a random one.
    #[arg(
        help_heading = "Identity",
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true,
        value_parser = seed,
        env = "DIFFLORA_IDENTITY_SEED"
    )]
    identity_seed: u64,
    /// Number of latents to sample.
    #[arg(help_heading = "Identity", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000), env = "DIFFLORA_IDENTITY_SAMPLES")]
    identity_samples: u32,
    /// How several samples become one latent.
    #[arg(
        help_heading = "Identity",
        long,
        value_parser = named::<Choice>(),
        default_value = "mean",
        env = "DIFFLORA_IDENTITY_CHOICE"
    )]
    identity_choice: Choice,
    /// Distance from the mean person; above 1 exaggerates.
    #[arg(
        help_heading = "Identity",
        long,
        value_name = "F",
        default_value_t = 1.0,
        env = "DIFFLORA_IDENTITY_STRENGTH", value_parser = number)]
    identity_strength: f64,
    /// Mix several people instead of --ref: --mix anna.jpg:0.6 --mix ben.jpg:0.4. Weights are normalised to sum 1.
    #[arg(help_heading = "Identity", long, value_name = "PHOTO[:WEIGHT]", num_args = 1.., conflicts_with = "reference", env = "DIFFLORA_MIX")]
    mix: Vec<String>,
    /// Another person nearby: 0 is the person, 1 an unrelated one; --identity-seed selects which.
    #[arg(help_heading = "Identity", long, value_name = "F", env = "DIFFLORA_VARY", value_parser = number)]
    vary: Option<f64>,
    /// Fine-tune the LoRA on the photos for this many steps.
    #[arg(help_heading = "Identity", long, value_name = "STEPS", conflicts_with = "mix", value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_REFINE")]
    pub(super) refine: Option<u32>,
    /// Learning rate of --refine.
    #[arg(help_heading = "Identity", long, value_name = "F", default_value_t = 1e-3, requires = "refine", value_parser = learning_rate, env = "DIFFLORA_REFINE_RATE")]
    pub(super) refine_rate: f64,
}

impl IdentityOptions {
    /// Refuses values that nothing can be made with.
    pub(super) fn check(&self, photos: bool) -> Result<()> {
        let usage = |why: String| Err(Failure::Usage(why).into());
        if let Some(vary) = self.vary.filter(|vary| !(0.0..=1.0).contains(vary)) {
            return usage(format!("--vary {vary}: it goes from 0, the person, to 1, anybody"));
        }
        if self.identity_eta < 0.0 {
            return usage(format!("--identity-eta {}: it is 0 or more", self.identity_eta));
        }
        if !photos && self.mix.is_empty() && (self.vary.is_some() || self.refine.is_some()) {
            return usage("--vary and --refine need --ref: they change the LoRA of a person".into());
        }
        self.mixed().map(drop)
    }

    /// Whether several people are mixed.
    pub(super) fn mixes(&self) -> bool {
        !self.mix.is_empty()
    }

    /// The photos of --mix, with weights that sum to 1.
    pub(super) fn mixed(&self) -> Result<Vec<(PathBuf, f64)>> {
        let part = |text: &String| {
            // A colon may be part of the name.
            match text.rsplit_once(':').map(|(path, weight)| (path, weight.parse::<f64>())) {
                Some((path, Ok(weight))) => (PathBuf::from(path), weight),
                _ => (PathBuf::from(text), 1.0),
            }
        };
        let parts: Vec<(PathBuf, f64)> = self.mix.iter().map(part).collect();
        let sum: f64 = parts.iter().map(|(_, weight)| weight).sum();
        if !(parts.is_empty() || (sum.is_finite() && sum > 1e-6)) {
            let why = format!("--mix: the weights sum to {sum}; the sum must be more than 0");
            return Err(Failure::Usage(why).into());
        }
        Ok(parts.into_iter().map(|(path, weight)| (path, weight / sum)).collect())
    }

    /// Seed of what is sampled on the way to the LoRA.
    pub(super) fn seed(&self) -> u64 {
        self.identity_seed
    }

    /// How latents are sampled.
    pub(super) fn sampling(&self, hypernet: &Hypernet) -> SampleOptions {
        let own = hypernet.options();
        SampleOptions {
            steps: self.identity_steps.map_or(own.steps, |steps| steps as usize),
            guidance: self.identity_guidance.unwrap_or(own.guidance),
            eta: self.identity_eta,
            seed: self.identity_seed,
            samples: self.identity_samples as usize,
            choice: self.identity_choice,
            strength: self.identity_strength,
        }
    }

    /// Refuses options of the sampling for a hypernetwork that predicts the LoRA in one pass.
    ///
    /// # Errors
    /// [`Failure::Usage`] that names them.
    pub(super) fn refuse_sampling(&self) -> Result<()> {
        let given = [
            ("--identity-steps", self.identity_steps.is_some()),
            ("--identity-guidance", self.identity_guidance.is_some()),
            ("--identity-eta", self.identity_eta != 0.0),
            ("--identity-samples", self.identity_samples != 1),
            ("--identity-strength", self.identity_strength != 1.0),
            ("--vary", self.vary.is_some()),
        ];
        let Some((option, _)) = given.into_iter().find(|(_, given)| *given) else { return Ok(()) };
        let why =
            format!("{option} is for hypernetworks that sample; HyperLoRA predicts the LoRA in one pass");
        Err(Failure::Usage(why).into())
    }

    /// How far from the person, where that is asked for.
    pub(super) fn vary(&self) -> Option<f64> {
        self.vary.filter(|vary| *vary > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixing(mix: &[&str]) -> IdentityOptions {
        IdentityOptions {
            identity_steps: None,
            identity_guidance: None,
            identity_eta: 0.0,
            identity_seed: 0,
            identity_samples: 1,
            identity_choice: Choice::Mean,
            identity_strength: 1.0,
            mix: mix.iter().map(|text| text.to_string()).collect(),
            vary: None,
            refine: None,
            refine_rate: 1e-3,
        }
    }

    #[test]
    fn weights_of_a_mixture_sum_to_one() {
        let parts = mixing(&["a.jpg:3", "C:/b.jpg", "c:d.jpg:-0.5"]).mixed().unwrap();
        let wanted = [("a.jpg", 3.0 / 3.5), ("C:/b.jpg", 1.0 / 3.5), ("c:d.jpg", -0.5 / 3.5)];
        for ((path, weight), (name, wanted)) in parts.iter().zip(wanted) {
            assert_eq!(path, &PathBuf::from(name));
            assert!((weight - wanted).abs() < 1e-12);
        }
        assert!(mixing(&["a.jpg:1", "b.jpg:-1"]).mixed().is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let message = |options: IdentityOptions, photos| options.check(photos).unwrap_err().to_string();
        assert!(message(IdentityOptions { vary: Some(1.5), ..mixing(&[]) }, true).contains("--vary 1.5"));
        assert!(message(IdentityOptions { refine: Some(3), ..mixing(&[]) }, false).contains("--ref"));
        let varied = IdentityOptions { vary: Some(0.1), ..mixing(&[]) };
        assert!(varied.refuse_sampling().unwrap_err().to_string().contains("--vary"));
        assert!(mixing(&["a.jpg"]).refuse_sampling().is_ok());
        let eta = IdentityOptions { identity_eta: -1.0, ..mixing(&[]) };
        assert!(message(eta, true).contains("--identity-eta"));
        assert!(IdentityOptions { vary: Some(0.3), ..mixing(&["a.jpg"]) }.check(false).is_ok());
    }
}
