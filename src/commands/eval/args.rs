//! Arguments of `difflora eval`.

use std::path::PathBuf;

use anyhow::Result;

use crate::commands::run_args::{BaseOptionArgs, DeviceArgs, SamplingArgs};
use crate::commands::values::{learning_rate, number, seed};
use crate::eval::methods::Method;
use crate::eval::renderer::Sampling;
use crate::failure::Failure;
use crate::registry;
use crate::sdxl::pipeline::Sampler;

/// Arguments of `difflora eval`.
///
/// Generates images of held-out people with no LoRA, the mean LoRA, the hypernetwork's LoRA from one photo and from
/// another person's photo, the LoRA of the nearest training person, the person's own DreamBooth LoRA, and that LoRA
/// through the autoencoder; all from the same noise and prompts. SFace, which took part in no training, measures the
/// similarity to other photos of the person.
///
/// Images are kept in OUT/images, so that a run that was stopped goes on. Beside the table, OUT gets report.html with
/// plots and everyone's images, and images.csv with a line an image.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    pub(super) figure: Option<Figure>,
    #[command(flatten)]
    pub(super) people: PeopleArgs,
}

/// Figures of the DiffLoRA paper.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Figure {
    /// Which weights of a LoRA carry the person: the largest or smallest quarter of own LoRAs replaced (figure 4).
    Perturb(Box<PeopleArgs>),
    /// How well images and LoRAs are restored from autoencoders at several compressions (figure 2).
    Compress(super::compress::Args),
}

/// Arguments of an evaluation of people, or of a base.
#[derive(Debug, clap::Args)]
#[command(mut_args(own_defaults))]
pub struct PeopleArgs {
    /// Dataset folder of `build-dataset`, whose held-out people are evaluated.
    #[arg(
        help_heading = "Input",
        long,
        value_name = "DIR",
        required_unless_present_any = ["base_only", "people"],
        env = "DIFFLORA_DATASET"
    )]
    pub(super) dataset: Option<PathBuf>,
    /// Folder with a folder of photos for each person; or, with --dataset, the maximum number of people.
    #[arg(help_heading = "Input", long, value_name = "DIR|N", env = "DIFFLORA_PEOPLE")]
    pub(super) people: Option<PathBuf>,
    /// Maximum number of people [default: all].
    #[arg(help_heading = "Input", long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), env = "DIFFLORA_MAX_PEOPLE")]
    pub(super) max_people: Option<u64>,
    /// Photos of each person that are the condition; images are judged against the others.
    #[arg(help_heading = "Input", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100), env = "DIFFLORA_REFERENCES")]
    pub(super) references: u64,
    /// Word of a person in prompts, where the person's folder has no class.txt.
    #[arg(
        help_heading = "Input",
        long,
        value_name = "WORD",
        default_value = "person",
        env = "DIFFLORA_CLASS"
    )]
    pub(super) class: String,
    /// Prompts with {class} for the person: photomaker-40, dreambooth-25, or a text file with one a line [default: of
    /// the dataset's painted world, else photomaker-40].
    #[arg(help_heading = "Input", long, value_name = "NAME|FILE", env = "DIFFLORA_PROMPTS")]
    pub(super) prompts: Option<String>,
    /// Methods to compare, in order: none, mean, shuffled, nearest, ridge, generated, refined, restored, own, photo,
    /// and lora:DIR for DIR/PERSON.safetensors of another program [default: all that are possible].
    #[arg(
        help_heading = "Input",
        long,
        value_name = "METHOD,…",
        value_delimiter = ',',
        env = "DIFFLORA_METHODS"
    )]
    pub(super) methods: Vec<Method>,
    /// Judge the images of an earlier run in OUT/images, and generate none.
    #[arg(help_heading = "Output", long, requires = "out", env = "DIFFLORA_JUDGE_ONLY")]
    pub(super) judge_only: bool,
    /// Hypernetwork: tiny (built in), a folder, or a hub repository.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR|REPO", default_value = registry::BUILT_IN, env = "DIFFLORA_HYPERNET")]
    pub(super) hypernet: String,
    /// Base model of the LoRAs.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub(super) base: String,
    #[command(flatten)]
    pub(super) base_options: BaseOptionArgs,
    /// CLIP image encoder.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_IMAGE_ENCODER")]
    pub(super) image_encoder: String,
    /// Attribute classifier, which measures prompt accuracy and factors [default: the built-in one].
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", env = "DIFFLORA_JUDGE")]
    pub(super) judge: Option<String>,
    /// Face recognisers that measure the similarity: sface (built in), or those of `models show`; the first is the main
    /// one.
    #[arg(
        help_heading = "Model",
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        default_value = "sface",
        env = "DIFFLORA_RECOGNISERS"
    )]
    pub(super) recognisers: Vec<String>,
    /// CLIP models for CLIP-I and CLIP-T: tiny (built in, CLIP-I only), or folders in transformers' layout.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", num_args = 1.., env = "DIFFLORA_CLIP")]
    pub(super) clip: Vec<String>,
    /// DINO or DINOv2 models: folders in transformers' layout.
    #[arg(help_heading = "Model", long, value_name = "DIR", num_args = 1.., env = "DIFFLORA_DINO")]
    pub(super) dino: Vec<String>,
    /// Fail where a measure cannot be taken, instead of leaving it out with a note.
    #[arg(help_heading = "Output", long, env = "DIFFLORA_REQUIRE")]
    pub(super) require: bool,
    /// Images per person and method; the prompts alternate [default: 4 in a painted world, else one a prompt].
    #[arg(help_heading = "Sampling", long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000), alias = "pictures", env = "DIFFLORA_IMAGES")]
    pub(super) images: Option<u64>,
    #[command(flatten)]
    pub(super) sampling: SamplingArgs,
    /// Latents to sample and average per person.
    #[arg(help_heading = "Identity", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000), env = "DIFFLORA_SAMPLES")]
    pub(super) samples: u64,
    /// Factor on the generated latent: distance from the mean LoRA.
    #[arg(
        help_heading = "Identity",
        long,
        value_name = "X",
        default_value_t = 1.0,
        env = "DIFFLORA_STRENGTH", value_parser = number)]
    pub(super) strength: f64,
    /// Evaluate the generated LoRA after this many fine-tuning steps on the photo as well, as `gen --refine`.
    #[arg(help_heading = "Identity", long, value_name = "STEPS", value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_REFINE")]
    pub(super) refine: Option<u32>,
    /// Learning rate of --refine.
    #[arg(help_heading = "Identity", long, value_name = "F", default_value_t = 1e-3, requires = "refine", value_parser = learning_rate, env = "DIFFLORA_REFINE_RATE")]
    pub(super) refine_rate: f64,
    /// Seed of all noise; -1 takes a random one.
    #[arg(help_heading = "Sampling", long, default_value_t = 0, env = "DIFFLORA_SEED", allow_negative_numbers = true, value_parser = seed)]
    pub(super) seed: u64,
    /// Where to compute.
    #[command(flatten)]
    pub(super) device: DeviceArgs,
    /// Folder for table.json, table.md, sheet.png and the images, created if missing. The images of an earlier run with
    /// the same settings are kept.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    pub(super) out: Option<PathBuf>,
    /// Evaluate only the base model, on N images (100) from random captions.
    #[arg(help_heading = "Input", long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "100", value_parser = clap::value_parser!(u64).range(1..=100_000), env = "DIFFLORA_BASE_ONLY")]
    pub(super) base_only: Option<u64>,
}

/// Sampling options as `eval` has them.
fn own_defaults(arg: clap::Arg) -> clap::Arg {
    match arg.get_id().as_str() {
        "steps" => arg.default_value("20"),
        "guidance" => arg.value_name("X"),
        "sampler" => arg.default_value("euler").help("Sampling method"),
        _ => arg,
    }
}

impl PeopleArgs {
    /// The maximum number of a dataset's people: --max-people, or --people with a number.
    ///
    /// # Errors
    /// [`Failure::Usage`] for a folder in --people beside --dataset.
    pub(super) fn most_held_out(&self) -> Result<Option<usize>> {
        let Some(people) = &self.people else { return Ok(self.max_people.map(|people| people as usize)) };
        match people.to_str().and_then(|text| text.parse().ok()) {
            Some(number) if number > 0 => Ok(Some(number)),
            _ => {
                let why = "--people: with --dataset it is a number of people from 1; a folder of people stands alone";
                Err(Failure::Usage(why.into()).into())
            }
        }
    }

    /// How images are sampled.
    pub(super) fn sampling(&self) -> Sampling {
        let SamplingArgs { steps, guidance, sampler } = self.sampling.clone();
        let sampler = sampler.unwrap_or(Sampler::Euler);
        Sampling { steps: steps as usize, guidance, sampler, seed: self.seed }
    }
}
