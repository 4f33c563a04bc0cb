//! `difflora portraits`: paint people of the small world.

use anyhow::Result;

use crate::cli::Common;

/// Arguments of `difflora portraits`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Paints the people.
pub fn run(_args: Args, _common: &Common) -> Result<()> {
    Ok(())
}
