//! `difflora lora inspect`: kinds, ranks, alphas, modules and metadata of a file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use crate::commands::output::{Output, print_line};
use crate::failure::Failure;
use crate::lora::file::{self, Missing, Reading};
use crate::lora::summary::Summary;
use crate::lora::{LoraError, listed};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// LoRA file.
    pub(super) file: PathBuf,
}

pub(super) fn run(args: Args, reading: &Reading, output: &Output) -> Result<()> {
    let path = args.file.as_path();
    let report = Summary::of(path, reading.layout)?;
    let bytes = file::open(path)?.metadata()?.len();
    if reading.missing == Missing::Refuse && !report.unmatched.is_empty() {
        let (count, keys) = (report.unmatched.len(), listed(&report.unmatched));
        let why = format!("{count} keys belong to no known layer: {keys}");
        return Err(Failure::unusable(path, LoraError::Incomplete { why }));
    }
    if output.json {
        let mut value = serde_json::to_value(&report)?;
        value["file"] = json!(path.display().to_string());
        value["bytes"] = json!(bytes);
        print_line!("{value:#}")?;
        return Ok(());
    }
    let counts = |map: &BTreeMap<String, usize>| -> String {
        map.iter().map(|(name, count)| format!("{name} ({count})")).collect::<Vec<_>>().join(", ")
    };
    let ranks = report.ranks.iter().map(|(rank, count)| (rank.to_string(), *count)).collect();
    print_line!("file      {} ({:.1} MB)", path.display(), bytes as f64 / 1e6)?;
    print_line!("kind      {}", counts(&report.kinds))?;
    for (name, map) in [("rank", &ranks), ("alpha", &report.alphas), ("parts", &report.parts)] {
        if !map.is_empty() {
            print_line!("{name:<9} {}", counts(map))?;
        }
    }
    if report.without_alpha > 0 {
        print_line!("          {} modules tell no alpha: it is the rank", report.without_alpha)?;
    }
    if !report.blocks.is_empty() {
        print_line!("blocks    {}", counts(&report.blocks))?;
    }
    print_line!("numbers   {}", counts(&report.storage))?;
    if let Some(width) = report.text_width {
        let base = match width {
            2048 => ", as in SDXL",
            768 => ", as in SD 1.5: not for SDXL",
            1024 => ", as in SD 2: not for SDXL",
            _ => "",
        };
        print_line!("text      {width} wide{base}")?;
    }
    if !report.embeddings.is_empty() {
        print_line!("embedding {}", counts(&report.embeddings))?;
    }
    if !report.unmatched.is_empty() {
        print_line!("unknown   {} keys: {}", report.unmatched.len(), listed(&report.unmatched))?;
    }
    for (key, value) in &report.metadata {
        let line: String = value.chars().take(100).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let more =
            if value.chars().count() > 100 { format!(" … ({} bytes)", value.len()) } else { String::new() };
        print_line!("  {key} = {line}{more}")?;
    }
    Ok(())
}
