//! `difflora lora mix`: the weighted mean of several LoRAs.

use std::path::PathBuf;

use anyhow::Result;

use super::write::{KeyNames, RankArgs, Written, paths_of, read_all, write_sum};
use crate::commands::output::Output;
use crate::failure::Failure;
use crate::files::{check_writable, refuse_inputs};
use crate::lora::file::Reading;
use crate::lora::weighted_file::WeightedFile;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// LoRA files with optional weights.
    #[arg(long, value_name = "FILE[:WEIGHT]", num_args = 2.., required = true)]
    pub(super) lora: Vec<String>,
    /// LoRA file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    rank: RankArgs,
    #[command(flatten)]
    names: KeyNames,
}

pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    refuse_inputs(&[&args.out], &paths_of(&args.lora)?)?;
    check_writable(&args.out)?;
    let loras = read_all(&args.lora, reading)?;
    let total: f64 = loras.iter().map(|lora| lora.weights.everywhere()).sum();
    if total == 0.0 {
        return Err(Failure::Usage("the weights add up to zero, so there is no mean".into()).into());
    }
    let share = |lora: WeightedFile| WeightedFile { weights: lora.weights.times(1.0 / total), ..lora };
    let loras: Vec<WeightedFile> = loras.into_iter().map(share).collect();
    let written = Written { out: &args.out, format: args.names.format, layout: reading.layout, output };
    write_sum(&loras, args.rank.keep()?, &written)
}
