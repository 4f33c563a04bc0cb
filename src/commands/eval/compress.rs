//! `difflora eval compress`: images and LoRAs through autoencoders of one kind.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::commands::output::{self, Output, print_line};
use crate::commands::values::number;
use crate::dataset::lora_dataset::{LoraDataset, ReadOptions};
use crate::eval::compression::{Data, compress, figure};
use crate::eval::html::Page;
use crate::eval::painted_rows::PaintedRows;
use crate::files;
use crate::hypernet::row_source::RowSource;

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
    let loras = LoraDataset::open(&args.dataset, &ReadOptions::default())?;
    let painted = PaintedRows::read(&args.dataset)?;
    let side = painted.train.side();
    let parameters = loras.train.vectors.width();
    // A LoRA has no rows and columns that all layers share: its values in order, as one nearly square plane.
    let height = parameters.isqrt();
    let data = [
        Data {
            name: "images".into(),
            train: &painted.train,
            held_out: &painted.held_out,
            plane: [side, side],
        },
        Data {
            name: "LoRAs".into(),
            train: &loras.train.vectors,
            held_out: &loras.held_out.vectors,
            plane: [height, parameters / height],
        },
    ];
    let mut rows = Vec::new();
    for data in &data {
        rows.extend(compress(data, &args.factors)?);
    }
    let (text, plots) = figure(&rows)?;
    let note = "Principal components fitted to the training people, restored on held-out ones. PSNR and SSIM are relative \
                to the range of all held-out values; a LoRA's SSIM is that of its values in order as one plane.";
    let report = json!({ "rows": rows, "train": loras.train.people(), "held_out": loras.held_out.people() });
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
        let page = Page {
            title: "Compression of images and LoRAs".into(),
            tables: vec![("Restored".into(), text.clone())],
            plots,
            notes: vec![note.into()],
            people: Vec::new(),
        };
        let json = serde_json::to_string_pretty(&report)? + "\n";
        for (name, text) in [("table.json", &json), ("table.md", &text), ("report.html", &page.to_html())] {
            files::write_whole(&out.join(name), text.as_bytes())?;
        }
    }
    if output.json { print_line!("{report}") } else { output::print(format_args!("{text}\n{note}\n")) }
}
