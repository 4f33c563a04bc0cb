//! `difflora lora`: inspects, converts, sums, resizes, extracts, compares and perturbs LoRA files.

mod convert;
mod diff;
mod extract;
mod inspect;
mod merge;
mod mix;
mod perturb;
mod resize;
mod write;

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::commands::output::Output;
use crate::lora::file::{Missing, Reading};
use crate::registry::{self, Base, BaseOptions};

/// Arguments of `difflora lora`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    base: BaseArgs,
}

/// The base of all subcommands.
#[derive(Debug, clap::Args)]
struct BaseArgs {
    /// Base model of the LoRAs, which determines LDM key names [default: tiny for its own LoRAs, else SDXL].
    #[arg(
        help_heading = "Model",
        long,
        value_name = "NAME|DIR|FILE|REPO",
        global = true,
        env = "DIFFLORA_BASE"
    )]
    base: Option<String>,
    /// Settings of a single-file base that its tensors do not show: a JSON file or a diffusers folder.
    #[arg(
        help_heading = "Model",
        long,
        value_name = "FILE|DIR",
        global = true,
        env = "DIFFLORA_BASE_CONFIG"
    )]
    base_config: Option<PathBuf>,
    /// Fail where a part of a LoRA cannot be used, instead of a warning.
    #[arg(help_heading = "Model", long, global = true, env = "DIFFLORA_STRICT")]
    strict: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Show kinds, ranks, alphas, modules and metadata of a file; reads only its header.
    Inspect(inspect::Args),
    /// Convert a file to other key names; metadata are kept.
    Convert(convert::Args),
    /// Sum LoRAs into one file, exactly or by SVD; with --base, merge them into a model.
    Merge(merge::Args),
    /// Reduce the rank of a file by SVD.
    Resize(resize::Args),
    /// Extract a LoRA from the difference between two models of the same shape. Layers become products of the given
    /// rank; changed biases and norms are stored as they are; other changes are listed.
    Extract(extract::Args),
    /// Weighted mean of several LoRAs; weights are divided by their sum.
    Mix(mix::Args),
    /// Replace the largest or smallest weights of a LoRA, to measure which ones matter.
    Perturb(perturb::Args),
    /// Compare the ΔW of two files, module by module.
    Diff(diff::Args),
}

impl Action {
    /// The LoRA files that it reads.
    fn loras(&self) -> Result<Vec<PathBuf>> {
        Ok(match self {
            Self::Inspect(args) => vec![args.file.clone()],
            Self::Convert(args) => vec![args.input.clone()],
            Self::Resize(args) => vec![args.input.clone()],
            Self::Perturb(args) => vec![args.input.clone()],
            Self::Merge(args) => write::paths_of(&args.lora)?,
            Self::Mix(args) => write::paths_of(&args.lora)?,
            Self::Diff(args) => vec![args.one.clone(), args.two.clone()],
            Self::Extract(_) => Vec::new(),
        })
    }
}

impl BaseArgs {
    /// Opens the model `name`. --base-config is for models in one file; of two models one may be a folder.
    fn open(&self, name: &str) -> Result<Base> {
        let base_config = self.base_config.clone().filter(|_| Path::new(name).is_file());
        Base::open_any(name, &BaseOptions { base_config, ..Default::default() })
    }
}

/// Runs the subcommand.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let base = args.base.base.as_deref().map(|name| args.base.open(name)).transpose()?;
    let layout = match &base {
        Some(base) => base.block_layout.clone(),
        None => registry::block_layout_of_loras(&args.action.loras()?)?,
    };
    let missing = if args.base.strict { Missing::Refuse } else { Missing::Warn };
    let reading = Reading { layout: &layout, missing };
    match args.action {
        Action::Inspect(args) => inspect::run(args, &reading, output),
        Action::Convert(args) => convert::run(args, &reading, output),
        Action::Merge(args) => match &base {
            Some(base) => merge::run_with_base(args, base, &reading, output),
            None => merge::run(args, &reading, output),
        },
        Action::Resize(args) => resize::run(args, &reading, output),
        Action::Extract(action) => extract::run(action, &args.base, output),
        Action::Mix(args) => mix::run(args, &reading, output),
        Action::Perturb(args) => perturb::run(args, &reading, output),
        Action::Diff(args) => diff::run(args, &reading, output),
    }
}
