//! `difflora eval compress`: images and LoRAs through autoencoders of one kind.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::commands::output::{self, Output, print_line};
use crate::commands::values::number;
use crate::eval::compression;

/// Arguments of `difflora eval compress`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Dataset folder of `build-dataset`, with LoRAs of painted people.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_DATASET")]
    dataset: PathBuf,
    /// Values of a row for each value of its latent.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [100.0, 200.0, 300.0, 500.0, 1000.0, 3000.0], value_parser = number)]
    factors: Vec<f64>,
    /// Folder for table.json, table.md and report.html, created if missing.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: Option<PathBuf>,
}

/// Fits and judges at each factor.
pub(super) fn run(args: &Args, output: &Output) -> Result<()> {
    let figure = compression::evaluate(&args.dataset, &args.factors)?;
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
        figure.write(out)?;
    }
    if output.json {
        print_line!("{}", figure.report)
    } else {
        output::print(format_args!("{}", figure.text))
    }
}
