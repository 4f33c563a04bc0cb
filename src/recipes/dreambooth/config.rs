//! How a LoRA is trained: a preset, over it a TOML file, over that the command line.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::device::Precision;
use crate::failure::Failure;
use crate::files;
use crate::limits;
use crate::named::named;
use crate::recipes::dreambooth::data_order::Timesteps;
use crate::recipes::dreambooth::lockstep::Targets;
use crate::train::adamw::AdamWOptions;
use crate::train::lr_schedule::{Decay, Schedule};

/// The presets, by the name that `--config` takes.
pub const PRESETS: [(&str, &str); 2] = [
    ("tiny", include_str!("../../../configs/train-lora-tiny.toml")),
    ("sdxl-dreambooth", include_str!("../../../configs/train-lora-sdxl-dreambooth.toml")),
];

/// Everything that decides a LoRA besides base and images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Of the start, the order of images, timesteps and noise.
    pub seed: u64,
    /// Trained modules.
    pub lora: Factors,
    /// The loss.
    pub objective: Objective,
    /// Images and captions.
    // Here and below: written under its first name, which the states of existing runs hold.
    #[serde(rename(serialize = "pictures"), alias = "pictures")]
    pub images: Images,
    /// How it is brought there.
    pub training: Training,
    /// Images along the way.
    pub samples: Samples,
}

/// The LoRA's factors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factors {
    /// R of every layer.
    pub rank: usize,
    /// ΔW is scaled by alpha / R; R where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Which layers.
    pub targets: Targets,
    /// `down` keeps its random initial value.
    pub freeze_a: bool,
    /// The text encoders get a LoRA too.
    pub text_encoders: bool,
}

/// The loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// How timesteps are drawn.
    pub timesteps: Timesteps,
    /// γ of min-SNR; 0 for none.
    pub min_snr_gamma: f64,
    /// Noise that all pixels of a channel share, as a part of the noise.
    pub noise_offset: f64,
    /// Class images for prior preservation; 0 for none.
    #[serde(rename(serialize = "class_pictures"), alias = "class_pictures")]
    pub class_images: u64,
    /// Caption of class images; `template` with the class word alone where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_prompt: Option<String>,
    /// λ, their weight.
    pub prior_weight: f64,
}

/// The images and their captions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// Class word of the person.
    pub class_word: String,
    /// A rare word that calls the person; empty for none.
    pub trigger: String,
    /// The caption of images without a text beside them; `{}` stands for trigger and class word.
    pub template: String,
    /// Pixels on a side; 0 for the base's own. With buckets, the side of the square of equal area.
    pub resolution: usize,
    /// Crop of an image.
    pub crop: Crop,
    /// Each image mirrored every other time, at random.
    pub flip: bool,
    /// Brightness, contrast and saturation change by up to this part.
    pub colour: f64,
    /// Which latents stand for an image.
    pub latents: Latents,
    /// SDXL's size conditioning: original size, crop and target size.
    pub sizes: SizeConditioning,
}

named! {
    /// Crop of an image.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum Crop {
        /// The largest centred square.
        Center = "center",
        /// A random square each time.
        Random = "random",
        /// Aspect-ratio buckets of equal area; images of one batch share a bucket.
        Buckets = "buckets",
    }
}

/// Which latents stand for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Latents {
    /// The mean of the VAE's distribution.
    Mean,
    /// Another sample of it each time, as in diffusers.
    Sample,
}

/// SDXL's size conditioning: original size, crop and target size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SizeConditioning {
    /// The size of the file, what was cut off, and the size that is trained on.
    #[serde(rename(serialize = "picture"), alias = "picture")]
    Image,
    /// The size that is trained on, and no crop.
    Target,
}

/// Steps and optimiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Steps of the optimiser.
    pub steps: u64,
    /// Where it is not 0, each person has so many steps for each of the person's images instead.
    #[serde(rename(serialize = "steps_per_picture"), alias = "steps_per_picture")]
    pub steps_per_image: u64,
    /// Samples of a forward pass.
    pub batch: usize,
    /// Forward passes of a step.
    pub accumulate: u64,
    /// The highest learning rate.
    pub lr: f64,
    /// Likewise for the text encoders.
    pub text_encoder_lr: f64,
    /// The way from the highest rate to the last step.
    pub schedule: Decay,
    /// Steps of linear growth at the start.
    pub warmup: u64,
    /// The last rate as a part of the highest.
    pub floor: f64,
    /// β₁ and β₂ of AdamW.
    pub betas: [f64; 2],
    /// ε of AdamW.
    pub eps: f64,
    /// λ of AdamW.
    pub weight_decay: f64,
    /// Longest gradient; 0 for no bound.
    pub clip: f64,
    /// Decay of the average of the weights that becomes the LoRA; 0 for the weights themselves.
    pub ema: f64,
    /// Number type of the frozen weights.
    pub dtype: Precision,
    /// Factor on the loss against underflow of 16-bit gradients.
    pub loss_scale: LossScale,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
}

/// Factor on the loss. It counts where f16 is computed in, on GPUs; on the CPU 16-bit weights are widened.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", untagged)]
pub enum LossScale {
    /// Always the same.
    Static(f64),
    /// By a rule.
    Rule(ScaleRule),
}

/// How the factor is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    /// 1.
    None,
    /// From 65536 on: halved when a gradient overflows (the step is left out), doubled after 2000 good steps, as
    /// PyTorch's `GradScaler`.
    Dynamic,
}

impl std::str::FromStr for LossScale {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.parse::<f64>()) {
            ("none", _) => Ok(Self::Rule(ScaleRule::None)),
            ("dynamic", _) => Ok(Self::Rule(ScaleRule::Dynamic)),
            (_, Ok(factor)) if factor > 0.0 && factor.is_finite() => Ok(Self::Static(factor)),
            _ => Err("write none, dynamic, or a factor above 0".into()),
        }
    }
}

/// Images along the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    /// Steps between them; 0 for none.
    pub every: u64,
    /// Their captions; the template's where there is none.
    pub prompts: Vec<String>,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance.
    pub guidance: f64,
}

impl Settings {
    /// The preset `default`, or the one that `config` names; where `config` is a file, over it what that file says;
    /// over these the `options`, a table of the same form.
    ///
    /// # Errors
    /// [`Failure::Usage`] for a name that is no preset and no file, [`Failure::Unusable`] for a file with an unknown key
    /// or a value of the wrong kind.
    pub fn read(config: Option<&Path>, default: &str, options: toml::Table) -> Result<Self> {
        let preset = |name: &str| PRESETS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text);
        let fallback = preset(default).context("the preset is built in")?;
        let named = config.map_or(Some(fallback), |name| preset(&name.to_string_lossy()));
        if let Some(text) = named {
            let mut whole: toml::Table = toml::from_str(text)?;
            lay_over(&mut whole, options);
            return Ok(whole.try_into()?);
        }
        let path = config.context("a preset or a file")?;
        if !path.exists() {
            let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
            let (path, names) = (path.display(), names.join(", "));
            let why = format!("`{path}` is no file and no preset; presets are {names}");
            return Err(Failure::Usage(why).into());
        }
        let text = files::read_text(path, limits::MAX_SETTINGS)?;
        let mut file: toml::Table = toml::from_str(&text).map_err(|error| Failure::unusable(path, error))?;
        let below = match file.remove("preset") {
            None => fallback,
            Some(toml::Value::String(name)) => {
                preset(&name).ok_or_else(|| Failure::unusable(path, format!("`{name}` is no preset")))?
            }
            Some(_) => return Err(Failure::unusable(path, "`preset` is a name in quotes")),
        };
        let mut whole: toml::Table = toml::from_str(below)?;
        lay_over(&mut whole, file);
        limits::check_toml(&whole).map_err(|why| Failure::unusable(path, why))?;
        lay_over(&mut whole, options);
        whole.try_into().map_err(|error| Failure::unusable(path, error))
    }

    /// Steps for a person with so many images.
    pub fn steps(&self, images: usize) -> u64 {
        match self.training.steps_per_image {
            0 => self.training.steps,
            each => each * images as u64,
        }
    }

    /// α.
    pub fn alpha(&self) -> f64 {
        self.lora.alpha.unwrap_or(self.lora.rank as f64)
    }

    /// Trigger and class word, as captions call the person; those of the folder's name where no trigger is set.
    pub fn called(&self, folder: Option<&str>) -> String {
        match folder.filter(|_| self.images.trigger.is_empty()) {
            Some(named) => named.to_string(),
            None => format!("{} {}", self.images.trigger, self.images.class_word).trim().to_string(),
        }
    }

    /// The caption of an image without a text of its own; `folder` as in [`Settings::called`].
    pub fn caption(&self, folder: Option<&str>) -> String {
        self.images.template.replace("{}", &self.called(folder))
    }

    /// Caption of class images.
    pub fn class_prompt(&self) -> String {
        let plain = || self.images.template.replace("{}", &self.images.class_word);
        self.objective.class_prompt.clone().unwrap_or_else(plain)
    }

    /// The learning rate over the run.
    pub fn rate(&self) -> Schedule {
        let Training { lr, warmup, schedule, floor, .. } = self.training;
        Schedule { peak: lr, warmup, decay: schedule, floor }
    }

    /// The optimiser's constants.
    pub fn optimiser(&self) -> AdamWOptions {
        let Training { betas, eps, weight_decay, clip, .. } = self.training;
        AdamWOptions { betas, eps, weight_decay, clip, muon: None }
    }

    /// Refuses what cannot be meant.
    pub fn check(&self) -> Result<()> {
        let Training { steps, batch, accumulate, lr, ema, betas, checkpoint_every, .. } = self.training;
        let objective = &self.objective;
        let wrong = [
            (self.lora.rank == 0, "rank is 0; take 1 or more"),
            (self.alpha() <= 0.0 || !self.alpha().is_finite(), "alpha must be above 0"),
            (steps == 0 || steps > 10_000_000, "steps must be 1 to 10000000"),
            (batch == 0 || batch > 1024, "batch must be 1 to 1024"),
            (accumulate == 0 || accumulate > 1024, "accumulate must be 1 to 1024"),
            (lr <= 0.0 || !lr.is_finite(), "lr must be above 0"),
            (self.lora.rank > 4096, "rank must be at most 4096"),
            (self.images.resolution > 8192, "resolution must be at most 8192"),
            (self.training.steps_per_image > 1_000_000, "steps_per_image must be at most 1000000"),
            (objective.class_images > 1_000_000, "class_images must be at most 1000000"),
            (checkpoint_every > 1_000_000_000, "checkpoint_every must be at most 1000000000"),
            (!(0.0..1.0).contains(&ema), "ema must be at least 0 and below 1"),
            (betas.iter().any(|beta| !(0.0..1.0).contains(beta)), "betas must be at least 0 and below 1"),
            (checkpoint_every == 0, "checkpoint_every must be 1 or more"),
            (objective.min_snr_gamma < 0.0, "min_snr_gamma must not be negative"),
            (!objective.noise_offset.is_finite(), "noise_offset must be a number"),
            (objective.prior_weight < 0.0, "prior_weight must not be negative"),
            (!(0.0..1.0).contains(&self.images.colour), "colour must be at least 0 and below 1"),
            (!self.images.template.contains("{}"), "template needs a {} for the person"),
        ];
        match wrong.iter().find(|(is, _)| *is) {
            Some((_, why)) => bail!(Failure::Usage((*why).to_string())),
            None => Ok(()),
        }
    }
}

impl Settings {
    /// Refuses settings that exclude each other, with images of `side` pixels, `several` people in one forward pass, and
    /// a folder for class images or not.
    ///
    /// # Errors
    /// [`Failure::Usage`] with the options to change.
    pub fn check_run(&self, side: usize, several: bool, class_folder: bool) -> Result<()> {
        let buckets = self.images.crop == Crop::Buckets;
        let class_images = self.objective.class_images > 0;
        let why = if buckets && several {
            "people in one forward pass need images of one size: --crop center or random".into()
        } else if buckets && class_images {
            "class images are squares: use --crop center or random with them".into()
        } else if buckets && !side.is_multiple_of(16) {
            format!("buckets need a --resolution in multiples of 16, not {side}")
        } else if class_images && !class_folder {
            "class images need a folder: --class-images DIR".into()
        } else {
            return Ok(());
        };
        Err(Failure::Usage(why).into())
    }
}

/// Keys of earlier versions and their present spelling.
const RENAMED_KEYS: [(&str, &str); 3] =
    [("pictures", "images"), ("class_pictures", "class_images"), ("steps_per_picture", "steps_per_image")];

/// Puts the values of `above` over those of `below`, table by table; old keys count as their new spelling.
fn lay_over(below: &mut toml::Table, above: toml::Table) {
    for (key, value) in above {
        let key = RENAMED_KEYS.iter().find(|(old, _)| *old == key).map_or(key, |(_, new)| (*new).to_string());
        match (below.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => lay_over(below, above),
            (_, value) => drop(below.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        Settings::read(Some(&path), "tiny", toml::Table::new())
    }

    #[test]
    fn presets_are_whole_and_pass_their_own_check() {
        for (name, _) in PRESETS {
            let settings = Settings::read(Some(Path::new(name)), "tiny", toml::Table::new()).unwrap();
            settings.check().unwrap();
            let again: Settings = toml::from_str(&toml::to_string(&settings).unwrap()).unwrap();
            assert_eq!(again, settings, "{name}");
        }
    }

    #[test]
    fn a_file_changes_what_it_names_and_leaves_the_rest() {
        let plain = Settings::read(None, "tiny", toml::Table::new()).unwrap();
        let mut wanted = plain.clone();
        (wanted.lora.rank, wanted.training.loss_scale) = (2, LossScale::Static(128.0));
        assert_eq!(read("[lora]\nrank = 2\n[training]\nloss_scale = 128.0").unwrap(), wanted);
        let sdxl = read("preset = \"sdxl-dreambooth\"\nseed = 4").unwrap();
        assert_eq!((sdxl.lora.rank, sdxl.seed, sdxl.images.crop), (8, 4, Crop::Buckets));
    }

    #[test]
    fn unknown_keys_and_values_are_refused_by_name() {
        for (text, captions) in [
            ("[lora]\nranks = 2", "ranks"),
            ("rank = 2", "rank"),
            ("[lora]\ntargets = \"all\"", "all"),
            ("preset = \"sd15\"", "sd15"),
            ("[lora", "run.toml"),
        ] {
            let error = read(text).unwrap_err();
            assert!(
                matches!(error.downcast_ref(), Some(Failure::Unusable(text)) if text.contains(captions)),
                "{error}"
            );
        }
        assert!(
            Settings::read(Some(Path::new("no-such")), "tiny", toml::Table::new())
                .unwrap_err()
                .to_string()
                .contains("sdxl-dreambooth")
        );
    }
}
