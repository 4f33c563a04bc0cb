//! `difflora lora resize`: a lower rank by SVD.

use std::path::PathBuf;

use anyhow::Result;

use super::write::{KeyNames, RankArgs, Written, write_sum};
use crate::commands::output::Output;
use crate::failure::Failure;
use crate::files::{check_writable, refuse_inputs};
use crate::lora::arithmetic::Keep;
use crate::lora::file::Reading;
use crate::lora::weighted_file::WeightedFile;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// LoRA file.
    pub(super) input: PathBuf,
    /// File to write.
    output: PathBuf,
    #[command(flatten)]
    rank: RankArgs,
    #[command(flatten)]
    names: KeyNames,
}

pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    refuse_inputs(&[&args.output], std::slice::from_ref(&args.input))?;
    check_writable(&args.output)?;
    let keep = args.rank.keep()?;
    if keep == Keep::All {
        return Err(Failure::Usage("how short? give --rank N or --keep SHARE".into()).into());
    }
    let lora = WeightedFile::read(&args.input.display().to_string(), reading)?;
    write_sum(
        &[lora],
        keep,
        &Written { out: &args.output, format: args.names.format, layout: reading.layout, output },
    )
}
