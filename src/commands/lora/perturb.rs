//! `difflora lora perturb`: the largest or smallest weights replaced.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::write::{Written, share};
use crate::commands::output::Output;
use crate::commands::values::{named, number, seed};
use crate::failure::Failure;
use crate::files::{check_writable, refuse_inputs};
use crate::lora::arithmetic::{self, Replacement, Which};
use crate::lora::file::{Format, Reading};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// LoRA file.
    pub(super) input: PathBuf,
    /// File to write.
    output: PathBuf,
    /// Weights to replace.
    #[arg(long, value_parser = named::<Which>(), default_value = "largest")]
    which: Which,
    /// Replacement.
    #[arg(long, value_parser = named::<Replacement>(), default_value = "zero")]
    with: Replacement,
    /// Share of all weights to replace.
    #[arg(long, default_value_t = 0.25, value_parser = number)]
    share: f64,
    /// Seed of the noise; -1 takes a random one.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = seed)]
    seed: u64,
}

pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    refuse_inputs(&[&args.output], std::slice::from_ref(&args.input))?;
    check_writable(&args.output)?;
    let share = share(args.share, "--share")?;
    let mut adapters = reading.read(&args.input)?;
    let count = arithmetic::perturb(&mut adapters, args.which, share, args.with, args.seed)
        .map_err(|error| Failure::unusable(&args.input, error))?;
    let written = Written { out: &args.output, format: Format::Kohya, layout: reading.layout, output };
    written.write(&adapters, json!({ "replaced": count, "seed": args.seed }))
}
