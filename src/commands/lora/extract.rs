//! `difflora lora extract`: the difference between two models as a LoRA.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::BaseArgs;
use super::write::{KeyNames, Written};
use crate::commands::output::Output;
use crate::files::{check_writable, refuse_inputs};
use crate::lora::arithmetic::KeptSummary;
use crate::lora::extract::{ExtractOptions, Extracted, extract};
use crate::lora::{listed_for_user, metadata};
use crate::progress;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
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
    #[command(flatten)]
    names: KeyNames,
}

pub(super) fn run(args: Args, base: &BaseArgs, output: &Output) -> Result<()> {
    refuse_inputs(&[&args.out], &[PathBuf::from(&args.before), PathBuf::from(&args.after)])?;
    check_writable(&args.out)?;
    let (before, after) = (base.open(&args.before)?, base.open(&args.after)?);
    let options = ExtractOptions { rank: args.rank as usize, layers_only: args.layers_only };
    let Extracted { mut adapters, kept, biases_and_norms, left_out } =
        extract(&before.files, &after.files, options)?;
    if !left_out.is_empty() {
        progress::warn(format_args!(
            "{} changes are left out: {}",
            left_out.len(),
            listed_for_user(&left_out)
        ));
    }
    if biases_and_norms > 0 {
        progress::note(format_args!(
            "{biases_and_norms} modules have changes of biases or norms, stored as they are (`diff_b`, `w_norm`, \
             `b_norm`); diffusers does not read those, --layers-only leaves them out"
        ));
    }
    adapters.metadata.insert(metadata::RESOLUTION.into(), metadata::resolution(before.native_size));
    adapters.metadata.insert(metadata::TITLE.into(), "the difference of two models, by difflora".into());
    let mut report = serde_json::to_value(KeptSummary::of(&kept))?;
    report["biases_and_norms"] = json!(biases_and_norms);
    report["left_out"] = json!(left_out);
    let written = Written { out: &args.out, format: args.names.format, layout: &before.block_layout, output };
    written.write(&adapters, report)
}
