//! `difflora lora`: look into LoRA files, convert, add, shorten, extract, compare and disturb them.

mod extract;
mod merge;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::files::{self, check_writable, refuse_inputs};
use crate::lora::adapter::AdapterFile;
use crate::lora::arithmetic::{self, Keep, Kept, Replacement, Which};
use crate::lora::block_weights::BlockWeights;
use crate::lora::file::{self, Format};
use crate::lora::ldm_keys::BlockLayout;
use crate::lora::summary::Summary;
use crate::lora::{LoraError, listed};
use crate::output::Output;
use crate::output::print_line;
use crate::registry;
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS};

/// Arguments of `difflora lora`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
    /// Base model of the LoRAs, which determines LDM key names [default: SDXL's layout].
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
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Show kinds, ranks, alphas, modules and metadata of a file; reads only its header.
    Inspect {
        /// LoRA file.
        file: PathBuf,
    },
    /// Convert a file to other key names; metadata are kept.
    Convert {
        /// LoRA file.
        input: PathBuf,
        /// File to write.
        output: PathBuf,
        /// Key names of the written LoRA.
        #[arg(long, value_enum, default_value = "kohya")]
        format: Format,
    },
    /// Sum LoRAs into one file, exactly or by SVD; with --base, merge them into a model.
    Merge {
        /// LoRA files with optional weights, as in `gen`.
        #[arg(long, value_name = "FILE[:WEIGHT]", num_args = 1.., required = true)]
        lora: Vec<String>,
        /// LoRA file to write; with --base a model: a file for a single-file base, else a new folder.
        #[arg(long, value_name = "FILE|DIR")]
        out: PathBuf,
        #[command(flatten)]
        length: Length,
        /// Key names of the written LoRA.
        #[arg(long, value_enum, default_value = "kohya")]
        format: Format,
    },
    /// Reduce the rank of a file by SVD.
    Resize {
        /// LoRA file.
        input: PathBuf,
        /// File to write.
        output: PathBuf,
        #[command(flatten)]
        length: Length,
        /// Key names of the written LoRA.
        #[arg(long, value_enum, default_value = "kohya")]
        format: Format,
    },
    /// Extract a LoRA from the difference between two models of the same shape. Layers become products of the given
    /// rank; changed biases and norms are stored as they are; other changes are listed.
    Extract {
        /// Original model: a folder, a file, or a name.
        before: String,
        /// Changed model.
        after: String,
        /// LoRA file to write.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Rank of each layer.
        #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
        rank: u32,
        /// Omit biases and norms, which some programs do not read.
        #[arg(long)]
        layers_only: bool,
        /// Key names of the written LoRA.
        #[arg(long, value_enum, default_value = "kohya")]
        format: Format,
    },
    /// Weighted mean of several LoRAs; weights are divided by their sum.
    Mix {
        /// LoRA files with optional weights.
        #[arg(long, value_name = "FILE[:WEIGHT]", num_args = 2.., required = true)]
        lora: Vec<String>,
        /// LoRA file to write.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        length: Length,
        /// Key names of the written LoRA.
        #[arg(long, value_enum, default_value = "kohya")]
        format: Format,
    },
    /// Replace the largest or smallest weights of a LoRA, to measure which ones matter.
    Perturb {
        /// LoRA file.
        input: PathBuf,
        /// File to write.
        output: PathBuf,
        /// Weights to replace.
        #[arg(long, value_enum, default_value = "largest")]
        which: Which,
        /// Replacement.
        #[arg(long, value_enum, default_value = "zero")]
        with: Replacement,
        /// Share of all weights to replace.
        #[arg(long, default_value_t = 0.25)]
        share: f64,
        /// Seed of the noise.
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Compare the ΔW of two files, module by module.
    Diff {
        /// First LoRA file.
        one: PathBuf,
        /// Second LoRA file.
        two: PathBuf,
    },
}

/// How long a result is.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Length {
    /// Rank of the result.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    rank: Option<u32>,
    /// Share of Σ σ² to keep, per module; chooses the rank.
    #[arg(long, value_name = "SHARE")]
    keep: Option<f64>,
}

impl Length {
    fn keep(&self) -> Result<Keep> {
        match (self.rank, self.keep) {
            (Some(rank), _) => Ok(Keep::Rank(rank as usize)),
            (None, Some(share)) => Ok(Keep::Share(a_share(share, "--keep")?)),
            (None, None) => Ok(Keep::All),
        }
    }
}

fn a_share(share: f64, option: &str) -> Result<f64> {
    if share > 0.0 && share <= 1.0 {
        return Ok(share);
    }
    Err(Failure::Usage(format!("{option} {share}: give a share above 0 and at most 1")).into())
}

/// Runs what was asked for.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let find = |name: &str| open_base(name, args.base_config.as_deref());
    let base = args.base.as_deref().map(find).transpose()?;
    let layout = base.as_ref().map(registry::block_layout).transpose()?.unwrap_or_default();
    match args.action {
        Action::Inspect { file } => inspect(&file, &layout, output),
        Action::Convert { input, output: out, format } => {
            refuse_inputs(&[&out], std::slice::from_ref(&input))?;
            check_writable(&out)?;
            write(&out, &file::read_adapters(&input, &layout)?, format, &layout, output, json!({}))
        }
        Action::Merge { lora, out, length, format } => match base {
            Some(base) => {
                if length.keep()? != Keep::All {
                    let why = "--rank and --keep are for LoRA files; with --base weights are added whole";
                    return Err(Failure::Usage(why.into()).into());
                }
                let begin = Instant::now();
                let mut inputs = paths_of(&lora)?;
                inputs.extend(args.base.as_deref().map(PathBuf::from));
                refuse_inputs(&[&out], &inputs)?;
                let loras = read_all(&lora, &layout)?;
                merge::run(&base, &loras, begin, &out, output)
            }
            None => {
                refuse_inputs(&[&out], &paths_of(&lora)?)?;
                check_writable(&out)?;
                let loras = read_all(&lora, &layout)?;
                write_sum(&loras, length.keep()?, &out, format, &layout, output)
            }
        },
        Action::Resize { input, output: out, length, format } => {
            refuse_inputs(&[&out], std::slice::from_ref(&input))?;
            check_writable(&out)?;
            let keep = length.keep()?;
            if keep == Keep::All {
                return Err(Failure::Usage("how short? give --rank N or --keep SHARE".into()).into());
            }
            let loras = read_all(&[input.display().to_string()], &layout)?;
            write_sum(&loras, keep, &out, format, &layout, output)
        }
        Action::Mix { lora, out, length, format } => {
            refuse_inputs(&[&out], &paths_of(&lora)?)?;
            check_writable(&out)?;
            let loras = read_all(&lora, &layout)?;
            let total: f64 = loras.iter().map(|lora| lora.weights.everywhere()).sum();
            if total == 0.0 {
                return Err(Failure::Usage("the weights add up to zero, so there is no mean".into()).into());
            }
            let share = |lora: Given| Given { weights: lora.weights.times(1.0 / total), ..lora };
            let loras: Vec<Given> = loras.into_iter().map(share).collect();
            write_sum(&loras, length.keep()?, &out, format, &layout, output)
        }
        Action::Extract { before, after, out, rank, layers_only, format } => {
            refuse_inputs(&[&out], &[PathBuf::from(&before), PathBuf::from(&after)])?;
            check_writable(&out)?;
            let wanted = extract::Wanted { rank: rank as usize, format, layers_only };
            extract::run(&find(&before)?, &find(&after)?, &out, &wanted, output)
        }
        Action::Perturb { input, output: out, which, with, share, seed } => {
            refuse_inputs(&[&out], std::slice::from_ref(&input))?;
            check_writable(&out)?;
            let share = a_share(share, "--share")?;
            let mut adapters = file::read_adapters(&input, &layout)?;
            let count = arithmetic::perturb(&mut adapters, which, share, with, seed)
                .map_err(|error| Failure::unusable(&input, error))?;
            write(&out, &adapters, Format::Kohya, &layout, output, json!({ "replaced": count }))
        }
        Action::Diff { one, two } => diff(&one, &two, &layout, output),
    }
}

/// The files of arguments like FILE:WEIGHT.
fn paths_of(loras: &[String]) -> Result<Vec<PathBuf>> {
    loras.iter().map(|lora| Ok(BlockWeights::split(lora)?.0)).collect()
}

fn inspect(path: &Path, layout: &BlockLayout, output: &Output) -> Result<()> {
    let mut file = file::open(path)?;
    let report =
        Summary::read(&mut file, layout).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
    let bytes = file.metadata()?.len();
    if output.json {
        let mut value = serde_json::to_value(&report)?;
        value["file"] = json!(path.display().to_string());
        value["bytes"] = json!(bytes);
        print_line!("{value:#}")?;
        return Ok(());
    }
    let counts = |map: &BTreeMap<String, usize>| -> String {
        map.iter().map(|(name, count)| format!("{name} ({count})")).collect::<Vec<_>>().join(", ")
    };
    let ranks = report.ranks.iter().map(|(rank, count)| (rank.to_string(), *count)).collect();
    print_line!("file      {} ({:.1} MB)", path.display(), bytes as f64 / 1e6)?;
    print_line!("kind      {}", counts(&report.kinds))?;
    for (name, map) in [("rank", &ranks), ("alpha", &report.alphas), ("parts", &report.parts)] {
        if !map.is_empty() {
            print_line!("{name:<9} {}", counts(map))?;
        }
    }
    if report.without_alpha > 0 {
        print_line!("          {} modules tell no alpha: it is the rank", report.without_alpha)?;
    }
    if !report.blocks.is_empty() {
        print_line!("blocks    {}", counts(&report.blocks))?;
    }
    print_line!("numbers   {}", counts(&report.storage))?;
    if let Some(width) = report.text_width {
        let base = match width {
            2048 => ", as in SDXL",
            768 => ", as in SD 1.5: not for SDXL",
            1024 => ", as in SD 2: not for SDXL",
            _ => "",
        };
        print_line!("text      {width} wide{base}")?;
    }
    if !report.unmatched.is_empty() {
        print_line!("unknown   {} keys: {}", report.unmatched.len(), listed(&report.unmatched))?;
    }
    for (key, value) in &report.metadata {
        let line: String = value.chars().take(100).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let more =
            if value.chars().count() > 100 { format!(" … ({} bytes)", value.len()) } else { String::new() };
        print_line!("  {key} = {line}{more}")?;
    }
    Ok(())
}

/// A model that LoRAs are for.
fn open_base(name: &str, config: Option<&Path>) -> Result<ModelFiles> {
    // The settings are for models in one file alone; of two models one may be a folder.
    let base_config = config.filter(|_| Path::new(name).is_file()).map(Path::to_path_buf);
    registry::find_base(name, &registry::BaseOptions { base_config, ..Default::default() })
}

/// A file of the command line.
struct Given {
    path: PathBuf,
    adapters: AdapterFile,
    weights: BlockWeights,
    /// The weight as it was given; `1` where none was.
    weight: String,
}

fn read_all(arguments: &[String], layout: &BlockLayout) -> Result<Vec<Given>> {
    let read = |argument: &String| {
        let (path, weights) = BlockWeights::split(argument)?;
        let adapters = file::read_adapters(&path, layout)?;
        let weight = argument.strip_prefix(&format!("{}:", path.display())).unwrap_or("1").to_string();
        Ok(Given { path, adapters, weights, weight })
    };
    arguments.iter().map(read).collect()
}

fn write_sum(
    loras: &[Given],
    keep: Keep,
    out: &Path,
    format: Format,
    layout: &BlockLayout,
    output: &Output,
) -> Result<()> {
    let files: Vec<(&AdapterFile, BlockWeights)> =
        loras.iter().map(|lora| (&lora.adapters, lora.weights.clone())).collect();
    let names: Vec<String> = loras.iter().map(|lora| lora.path.display().to_string()).collect();
    let (sum, kept) = arithmetic::sum(&files, keep)
        .map_err(|error| Failure::Unusable(format!("cannot use {}: {error}", listed(&names))))?;
    write(out, &sum, format, layout, output, summary(&kept))
}

/// Ranks and shares over all modules.
fn summary(kept: &BTreeMap<String, Kept>) -> Value {
    let lowest = kept.values().map(|kept| kept.share).fold(1.0, f64::min);
    let mean = kept.values().map(|kept| kept.share).sum::<f64>() / kept.len().max(1) as f64;
    let mut ranks: BTreeMap<usize, usize> = BTreeMap::new();
    kept.values().for_each(|kept| *ranks.entry(kept.after).or_default() += 1);
    json!({ "ranks": ranks, "kept_mean": mean, "kept_least": lowest })
}

fn write(
    path: &Path,
    adapters: &AdapterFile,
    format: Format,
    layout: &BlockLayout,
    output: &Output,
    mut told: Value,
) -> Result<()> {
    let bytes = file::adapters_to_bytes(adapters, format, layout).map_err(|error| {
        let known = error.downcast_ref::<LoraError>().is_some();
        let why = format!("cannot write `{}`: {error:#}", path.display());
        if known { Failure::Unusable(why).into() } else { error }
    })?;
    files::write_whole(path, &bytes)?;
    told["file"] = json!(path.display().to_string());
    told["modules"] = json!(adapters.modules.len());
    tell(&told, output)
}

fn tell(told: &Value, output: &Output) -> Result<()> {
    if output.json {
        return print_line!("{told:#}");
    }
    for (name, value) in told.as_object().into_iter().flatten() {
        print_line!("{name:<10} {}", value.as_str().map_or_else(|| value.to_string(), String::from))?;
    }
    Ok(())
}

fn diff(one: &Path, two: &Path, layout: &BlockLayout, output: &Output) -> Result<()> {
    let (a, b) = (file::read_adapters(one, layout)?, file::read_adapters(two, layout)?);
    let (modules, all) = arithmetic::compare(&a, &b).map_err(|error| Failure::unusable(two, error))?;
    let only = |a: &AdapterFile, b: &AdapterFile| -> Vec<String> {
        a.modules.keys().filter(|module| !b.modules.contains_key(*module)).cloned().collect()
    };
    let (only_one, only_two) = (only(&a, &b), only(&b, &a));
    if output.json {
        let told = json!({
            "modules": modules, "together": all, "only_in_first": only_one, "only_in_second": only_two,
        });
        print_line!("{told:#}")?;
        return Ok(());
    }
    print_line!("{:>8} {:>8} {:>8}  module", "cosine", "norm", "distance")?;
    let together = all.iter().map(|similarity| ("all of these together", similarity));
    for (module, similarity) in modules.iter().map(|(module, l)| (module.as_str(), l)).chain(together) {
        print_line!(
            "{:8.4} {:8.4} {:8.4}  {module}",
            similarity.cosine,
            similarity.norm_ratio,
            similarity.distance
        )?;
    }
    for (path, only) in [(one, only_one), (two, only_two)] {
        if !only.is_empty() {
            print_line!("only in {}: {}", path.display(), listed(&only))?;
        }
    }
    Ok(())
}

/// Components that LoRAs change: folder, weight file, and what module paths begin with.
const COMPONENTS: [(&str, &str, &str); 3] = [
    ("unet", DIFFUSERS_WEIGHTS, ""),
    ("text_encoder", TRANSFORMERS_WEIGHTS, "text_encoder."),
    ("text_encoder_2", TRANSFORMERS_WEIGHTS, "text_encoder_2."),
];

/// The module whose weight or bias a tensor is, and whether it is the weight.
fn module_of(prefix: &str, name: &str) -> Option<(String, bool)> {
    let (path, is_weight) = match (name.strip_suffix(".weight"), name.strip_suffix(".bias")) {
        (Some(path), _) => (path, true),
        (_, Some(path)) => (path, false),
        _ => return None,
    };
    // transformers 5 leaves `text_model.` out.
    let bare = !prefix.is_empty() && !path.starts_with("text_model.") && path != "text_projection";
    Some((format!("{prefix}{}{path}", if bare { "text_model." } else { "" }), is_weight))
}
