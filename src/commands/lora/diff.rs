//! `difflora lora diff`: the ΔW of two files, module by module.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use crate::commands::output::{Output, print_line};
use crate::failure::Failure;
use crate::lora::adapter::AdapterFile;
use crate::lora::file::Reading;
use crate::lora::{arithmetic, listed};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// First LoRA file.
    pub(super) one: PathBuf,
    /// Second LoRA file.
    pub(super) two: PathBuf,
}

pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    let (one, two) = (args.one.as_path(), args.two.as_path());
    let (a, b) = (reading.read(one)?, reading.read(two)?);
    let (modules, all) = arithmetic::compare(&a, &b).map_err(|error| Failure::unusable(two, error))?;
    let only = |a: &AdapterFile, b: &AdapterFile| -> Vec<String> {
        a.modules.keys().filter(|module| !b.modules.contains_key(*module)).cloned().collect()
    };
    let (only_one, only_two) = (only(&a, &b), only(&b, &a));
    if output.json {
        let report = json!({
            "modules": modules, "together": all, "only_in_first": only_one, "only_in_second": only_two,
        });
        print_line!("{report:#}")?;
        return Ok(());
    }
    print_line!("{:>8} {:>8} {:>8}  module", "cosine", "norm", "distance")?;
    let together = all.iter().map(|similarity| ("all of these together", similarity));
    for (module, similarity) in modules.iter().map(|(module, l)| (module.as_str(), l)).chain(together) {
        print_line!(
            "{:8.4} {:8.4} {:8.4}  {module}",
            similarity.cosine,
            similarity.norm_ratio,
            similarity.distance
        )?;
    }
    for (path, only) in [(one, only_one), (two, only_two)] {
        if !only.is_empty() {
            print_line!("only in {}: {}", path.display(), listed(&only))?;
        }
    }
    Ok(())
}
