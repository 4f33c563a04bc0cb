//! `difflora lora convert`: other key names.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::write::Written;
use crate::files::{check_writable, refuse_inputs};
use crate::lora::file::{Format, Reading};
use crate::output::Output;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// LoRA file.
    pub(super) input: PathBuf,
    /// File to write.
    output: PathBuf,
    /// Key names of the written LoRA.
    #[arg(long, value_enum, default_value = "kohya")]
    format: Format,
}

pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    refuse_inputs(&[&args.output], std::slice::from_ref(&args.input))?;
    check_writable(&args.output)?;
    let adapters = reading.read(&args.input)?;
    Written { out: &args.output, format: args.format, layout: reading.layout, output }
        .write(&adapters, json!({}))
}
