//! `difflora lora convert`: other key names.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::write::{KeyNames, Written};
use crate::commands::output::Output;
use crate::files::{check_writable, refuse_inputs};
use crate::lora::file::Reading;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// LoRA file.
    pub(super) input: PathBuf,
    /// File to write.
    output: PathBuf,
    #[command(flatten)]
    names: KeyNames,
}

pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    refuse_inputs(&[&args.output], std::slice::from_ref(&args.input))?;
    check_writable(&args.output)?;
    let adapters = reading.read(&args.input)?;
    Written { out: &args.output, format: args.names.format, layout: reading.layout, output }
        .write(&adapters, json!({}))
}
