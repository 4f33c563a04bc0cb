//! `difflora lora merge`: LoRAs into one LoRA, or with `--base` into a model's weights.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::write::{KeyNames, RankArgs, Written, paths_of, print_report, read_all, write_sum};
use crate::commands::output::Output;
use crate::failure::Failure;
use crate::files::{self, check_writable, refuse_inputs};
use crate::lora::arithmetic::Keep;
use crate::lora::checkpoint::Merge;
use crate::lora::file::Reading;
use crate::lora::weighted_file::WeightedFile;
use crate::lora::{listed, listed_for_user};
use crate::registry::Base;
use crate::weights::model_folder::ModelFiles;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// LoRA files with optional weights, as in `gen`.
    #[arg(long, value_name = "FILE[:WEIGHT]", num_args = 1.., required = true)]
    pub(super) lora: Vec<String>,
    /// LoRA file to write; with --base a model: a file for a single-file base, else a new folder.
    #[arg(long, value_name = "FILE|DIR")]
    out: PathBuf,
    #[command(flatten)]
    rank: RankArgs,
    #[command(flatten)]
    names: KeyNames,
}

/// Sums the LoRAs into one file.
pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    refuse_inputs(&[&args.out], &paths_of(&args.lora)?)?;
    check_writable(&args.out)?;
    let loras = read_all(&args.lora, reading)?;
    let written = Written { out: &args.out, format: args.names.format, layout: reading.layout, output };
    write_sum(&loras, args.rank.keep()?, &written)
}

/// Merges the LoRAs into the model `base`.
pub(super) fn run_with_base(args: Args, base: &Base, reading: &Reading, output: &Output) -> Result<()> {
    if args.rank.keep()? != Keep::All {
        let why = "--rank and --keep are for LoRA files; with --base weights are added whole";
        return Err(Failure::Usage(why.into()).into());
    }
    let begin = Instant::now();
    let mut inputs = paths_of(&args.lora)?;
    inputs.push(PathBuf::from(&base.name));
    refuse_inputs(&[&args.out], &inputs)?;
    let loras = read_all(&args.lora, reading)?;
    let read = begin.elapsed();
    check_target(&base.files, &args.out)?;
    let merge = Merge::new(&base.files, &loras)?;
    for (lora, missing) in loras.iter().zip(&merge.left_out).filter(|(_, missing)| !missing.is_empty()) {
        let why = format!(
            "{} of {} layers, {:.0} % of its weights, have no place in this base and are left out: {}",
            missing.len(),
            lora.adapters.modules.len(),
            100.0 * lora.adapters.share_of(missing),
            listed_for_user(missing)
        );
        let reported = reading.missing.report(lora.path.display(), why);
        reported.map_err(|error| Failure::unusable(&lora.path, error))?;
    }
    for lora in loras.iter().filter(|lora| !lora.adapters.embeddings.is_empty()) {
        let names: Vec<String> = lora.adapters.embeddings.iter().map(|e| e.name.clone()).collect();
        let why = format!(
            "its textual inversion embeddings {} have no place in a checkpoint and are left out",
            listed(&names)
        );
        let reported = reading.missing.report(lora.path.display(), why);
        reported.map_err(|error| Failure::unusable(&lora.path, error))?;
    }
    let merging = merge.write(&args.out)?;
    let kind = if matches!(base.files, ModelFiles::Assembled(_)) { "file" } else { "folder" };
    let mut report = json!({ kind: args.out.display().to_string(), "modules": merge.modules });
    if output.json {
        let lora = |lora: &WeightedFile| {
            json!({
                "file": lora.path.display().to_string(),
                "weight": lora.weight,
                "modules": lora.adapters.modules.len(),
            })
        };
        report["loras"] = loras.iter().map(lora).collect();
        // Reading the LoRAs, adding them up in memory, and all of it with reading and writing of the model.
        let [loras, merging, all] = [read, merging, begin.elapsed()].map(|time| time.as_secs_f64());
        report["seconds"] = json!({ "loras": loras, "merging": merging, "all": all });
    }
    print_report(&report, output)
}

/// The result of a file is a file, that of a folder a new folder.
fn check_target(base: &ModelFiles, out: &Path) -> Result<()> {
    let is_file = out.extension().is_some_and(|kind| kind == "safetensors");
    let refuse = |why: String| Err(Failure::Usage(format!("--out `{}`: {why}", out.display())).into());
    match base {
        ModelFiles::Assembled(_) if !is_file => {
            refuse("the base is one file, and so is the result; name it NAME.safetensors".into())
        }
        ModelFiles::Assembled(_) => files::check_writable(out),
        _ if is_file => refuse("the base is a folder, and so is the result; name a folder".into()),
        _ if out.exists() => refuse("it exists already; name a folder that does not, or remove it".into()),
        _ if !files::folder_of(out).is_dir() => {
            refuse(format!("there is no folder `{}`; make it first", files::folder_of(out).display()))
        }
        _ => Ok(()),
    }
}
