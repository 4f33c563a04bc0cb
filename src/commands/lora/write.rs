//! What the subcommands that write a LoRA share.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use crate::commands::output::{Output, print_line};
use crate::commands::values::{named, number};
use crate::failure::Failure;
use crate::files;
use crate::lora::adapter::AdapterFile;
use crate::lora::arithmetic::{self, Keep, KeptSummary};
use crate::lora::block_weights::BlockWeights;
use crate::lora::file::{self, Format, Reading};
use crate::lora::ldm_keys::BlockLayout;
use crate::lora::weighted_file::WeightedFile;
use crate::lora::{LoraError, listed};
use crate::progress;

/// Spelling of the result.
#[derive(Debug, clap::Args)]
pub(super) struct KeyNames {
    /// Key names of the written LoRA.
    #[arg(long, value_parser = named::<Format>(), default_value = "kohya")]
    pub(super) format: Format,
}

/// Rank of the result.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub(super) struct RankArgs {
    /// Rank of the result.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    rank: Option<u32>,
    /// Share of Σ σ² to keep, per module; chooses the rank.
    #[arg(long, value_name = "SHARE", value_parser = number)]
    keep: Option<f64>,
}

impl RankArgs {
    pub(super) fn keep(&self) -> Result<Keep> {
        match (self.rank, self.keep) {
            (Some(rank), _) => Ok(Keep::Rank(rank as usize)),
            (None, Some(keep)) => Ok(Keep::Share(share(keep, "--keep")?)),
            (None, None) => Ok(Keep::All),
        }
    }
}

/// Checks a share of an option.
pub(super) fn share(share: f64, option: &str) -> Result<f64> {
    if share > 0.0 && share <= 1.0 {
        return Ok(share);
    }
    Err(Failure::Usage(format!("{option} {share}: give a share above 0 and at most 1")).into())
}

/// The files of arguments like FILE:WEIGHT.
pub(super) fn paths_of(loras: &[String]) -> Result<Vec<PathBuf>> {
    loras.iter().map(|lora| Ok(BlockWeights::split(lora)?.0)).collect()
}

/// Reads the files of arguments like FILE:WEIGHT.
pub(super) fn read_all(arguments: &[String], reading: &Reading) -> Result<Vec<WeightedFile>> {
    arguments.iter().map(|argument| WeightedFile::read(argument, reading)).collect()
}

/// Where and how a LoRA is written and reported.
pub(super) struct Written<'a> {
    pub out: &'a Path,
    pub format: Format,
    pub layout: &'a BlockLayout,
    pub output: &'a Output,
}

impl Written<'_> {
    /// Writes `adapters` and prints `report` with the file's name.
    pub(super) fn write(&self, adapters: &AdapterFile, mut report: Value) -> Result<()> {
        let bytes = file::adapters_to_bytes(adapters, self.format, self.layout).map_err(|error| {
            let known = error.downcast_ref::<LoraError>().is_some();
            let why = format!("cannot write `{}`: {error:#}", self.out.display());
            if known { Failure::Unusable(why).into() } else { error }
        })?;
        files::write_whole(self.out, &bytes)?;
        if self.format == Format::Peft && !adapters.embeddings.is_empty() {
            let names: Vec<String> = adapters.embeddings.iter().map(|e| e.name.clone()).collect();
            progress::warn(format_args!(
                "PEFT's format has no place for the textual inversion embeddings {}; `{}` is without them",
                listed(&names),
                self.out.display()
            ));
        }
        report["file"] = json!(self.out.display().to_string());
        report["modules"] = json!(adapters.modules.len());
        print_report(&report, self.output)
    }
}

/// Sums the LoRAs with their weights and writes the result.
pub(super) fn write_sum(loras: &[WeightedFile], keep: Keep, written: &Written) -> Result<()> {
    let files: Vec<(&AdapterFile, BlockWeights)> =
        loras.iter().map(|lora| (&lora.adapters, lora.weights.clone())).collect();
    let names: Vec<String> = loras.iter().map(|lora| lora.path.display().to_string()).collect();
    let (sum, kept) = arithmetic::sum(&files, keep)
        .map_err(|error| Failure::Unusable(format!("cannot use {}: {error}", listed(&names))))?;
    written.write(&sum, serde_json::to_value(KeptSummary::of(&kept))?)
}

/// Prints a report as JSON, or a line for each of its values.
pub(super) fn print_report(report: &Value, output: &Output) -> Result<()> {
    if output.json {
        return print_line!("{report:#}");
    }
    for (name, value) in report.as_object().into_iter().flatten() {
        print_line!("{name:<10} {}", value.as_str().map_or_else(|| value.to_string(), String::from))?;
    }
    Ok(())
}
