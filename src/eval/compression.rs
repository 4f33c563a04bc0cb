//! Figure 2 of the paper (Wu et al. 2024, arXiv 2408.06740): images and LoRAs of the same people through autoencoders of
//! one kind, at several factors of compression. The kind is the closed form, principal components: what a linear
//! autoencoder ends at.

use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use serde::Serialize;
use serde_json::{Value, json};

use crate::dataset::lora_dataset::{LoraDataset, ReadOptions};
use crate::eval::html::Page;
use crate::eval::painted_rows::PaintedRows;
use crate::eval::plots::{self, Line};
use crate::eval::similarity::{psnr_of, ssim_of};
use crate::eval::tables::{interval, table};
use crate::files;
use crate::hypernet::pca::Pca;
use crate::hypernet::row_source::RowSource;
use crate::progress;
use crate::statistics::Mean;

/// Data of one kind: rows to fit to, and held-out rows to judge by.
pub struct Data<'a> {
    /// In tables.
    pub name: String,
    /// Rows to fit to.
    pub train: &'a dyn RowSource,
    /// Rows that are restored.
    pub held_out: &'a dyn RowSource,
    /// Height and width of the planes that a row consists of, for SSIM.
    pub plane: [usize; 2],
}

/// How well held-out rows of one kind are restored at one factor.
#[derive(Clone, Debug, Serialize)]
pub struct Restored {
    /// Which data.
    pub data: String,
    /// Values of a row for each value of its latent.
    pub factor: f64,
    /// Values of the latent.
    pub latent: usize,
    /// In dB, the peak being the range of all held-out values.
    pub psnr: Option<Mean>,
    /// Of the planes, with the same range.
    pub ssim: Option<Mean>,
    /// Part of the variance around the mean that is restored.
    pub variance: Option<Mean>,
}

/// Restores `data` at each of `factors`; one that needs more components than there are rows to fit to is left out.
///
/// # Errors
/// No factor is possible; errors of reading rows.
pub fn compress(data: &Data, factors: &[f64]) -> Result<Vec<Restored>> {
    let (width, rows) = (data.train.width(), data.train.count());
    let latent = |factor: &f64| (width as f64 / factor).round().max(1.0) as usize;
    let possible: Vec<(f64, usize)> =
        factors.iter().map(|factor| (*factor, latent(factor))).filter(|(_, latent)| *latent < rows).collect();
    for factor in factors.iter().filter(|factor| latent(factor) >= rows) {
        progress::note(format_args!(
            "{}: factor {factor} is left out, its {} components need more than {rows} people",
            data.name,
            latent(factor)
        ));
    }
    let most = possible.iter().map(|(_, latent)| *latent).max();
    ensure!(most.is_some(), "{}: no factor is possible with {rows} people; take larger ones", data.name);
    let train = data.train.all()?;
    let mean = train.mean_keepdim(0)?;
    let basis = Pca::fit(&train.broadcast_sub(&mean)?, most.unwrap_or(1))?.basis;
    drop(train);
    let truth = data.held_out.all()?;
    let (low, high) =
        (truth.flatten_all()?.min(0)?.to_scalar::<f32>()?, truth.flatten_all()?.max(0)?.to_scalar::<f32>()?);
    let range = f64::from(high - low).max(1e-12);
    let fitted = Fitted { mean, basis, truth, range };
    possible.into_iter().map(|(factor, latent)| restore(data, &fitted, factor, latent)).collect()
}

/// Mean (1, P) and components (L, P), and what they are judged by.
struct Fitted {
    mean: Tensor,
    basis: Tensor,
    /// (H, P)
    truth: Tensor,
    /// Of all values of `truth`.
    range: f64,
}

fn restore(data: &Data, fitted: &Fitted, factor: f64, latent: usize) -> Result<Restored> {
    progress::check()?;
    let Fitted { mean, truth, range, .. } = fitted;
    let basis = fitted.basis.narrow(0, 0, latent)?; // (K, P)
    let centred = truth.broadcast_sub(mean)?;
    let restored = centred.matmul(&basis.t()?)?.matmul(&basis)?.broadcast_add(mean)?;
    let (mut psnrs, mut ssims, mut variances) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..truth.dim(0)? {
        let row = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.get(i)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
        };
        let (a, b, c) = (row(truth)?, row(&restored)?, row(&centred)?);
        psnrs.push(psnr_of(&a, &b, *range));
        let [height, width] = data.plane;
        let planes = a.chunks_exact(height * width).zip(b.chunks_exact(height * width));
        let of_planes: Vec<f64> = planes.map(|(a, b)| ssim_of(a, b, [height, width], *range)).collect();
        ssims.push(of_planes.iter().sum::<f64>() / of_planes.len() as f64);
        let error: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
        variances.push(1.0 - error / c.iter().map(|c| c * c).sum::<f64>().max(f64::MIN_POSITIVE));
    }
    Ok(Restored {
        data: data.name.clone(),
        factor,
        latent,
        psnr: Mean::of(&psnrs),
        ssim: Mean::of(&ssims),
        variance: Mean::of(&variances),
    })
}

/// The figure: numbers, a table in Markdown, and a page with plots.
pub struct Figure {
    /// For `table.json`.
    pub report: Value,
    /// For `table.md`.
    pub text: String,
    /// For `report.html`.
    pub html: String,
}

/// Restores images and LoRAs of a dataset's held-out people at each of `factors`.
///
/// # Errors
/// As [`LoraDataset::open`] and [`compress`].
pub fn evaluate(dataset: &Path, factors: &[f64]) -> Result<Figure> {
    let loras = LoraDataset::open(dataset, &ReadOptions::default())?;
    let painted = PaintedRows::read(dataset)?;
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
        rows.extend(compress(data, factors)?);
    }
    let (table, plots) = table_and_plots(&rows)?;
    let page = Page {
        title: "Compression of images and LoRAs".into(),
        tables: vec![("Restored".into(), table.clone())],
        plots,
        notes: vec![NOTE.into()],
        people: Vec::new(),
    };
    Ok(Figure {
        report: json!({ "rows": rows, "train": loras.train.people(), "held_out": loras.held_out.people() }),
        text: format!("{table}\n{NOTE}\n"),
        html: page.to_html(),
    })
}

/// How to read the table.
const NOTE: &str = "Principal components fitted to the training people, restored on held-out ones. PSNR and SSIM are \
                    relative to the range of all held-out values; a LoRA's SSIM is that of its values in order as one \
                    plane.";

impl Figure {
    /// Writes table.json, table.md and report.html.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(&self.report)? + "\n";
        for (name, text) in [("table.json", &json), ("table.md", &self.text), ("report.html", &self.html)] {
            files::write_whole(&folder.join(name), text.as_bytes())?;
        }
        Ok(())
    }
}

/// The table of the figure, and its plots.
///
/// # Errors
/// What the plotting library says.
fn table_and_plots(rows: &[Restored]) -> Result<(String, Vec<String>)> {
    let head = ["data", "factor", "latent", "PSNR, dB", "SSIM", "variance kept"].map(String::from);
    let cells = |row: &Restored| {
        vec![
            row.data.clone(),
            format!("{:.0}", row.factor),
            row.latent.to_string(),
            interval(row.psnr),
            interval(row.ssim),
            interval(row.variance),
        ]
    };
    let text = table(&head, &rows.iter().map(cells).collect::<Vec<_>>());
    let mut names: Vec<&str> = rows.iter().map(|row| row.data.as_str()).collect();
    names.dedup();
    let plot = |title: &str, unit: &str, of: &dyn Fn(&Restored) -> Option<Mean>| {
        let line = |name: &&str| Line {
            name: (*name).to_string(),
            points: rows
                .iter()
                .filter(|row| row.data == *name)
                .filter_map(|row| Some((row.factor, of(row)?)))
                .map(|(factor, mean)| (factor, (mean.mean, mean.half_width.unwrap_or(0.0))))
                .collect(),
        };
        plots::lines(title, "compression", unit, &names.iter().map(line).collect::<Vec<_>>())
    };
    let plots = vec![
        plot("PSNR of held-out people", "dB", &|row| row.psnr)?,
        plot("SSIM of held-out people", "SSIM", &|row| row.ssim)?,
        plot("Variance kept of held-out people", "part", &|row| row.variance)?,
    ];
    Ok((text, plots))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn rows_of_low_rank_are_restored_and_others_are_not() -> Result<()> {
        // Eight rows in a plane of 2 of 484 dimensions.
        let rows = |seed: u64| -> Result<Tensor> {
            let basis = crate::diffusion::noise::normal(7, 0, (2, 484), &Device::Cpu)?;
            Ok(crate::diffusion::noise::normal(seed, 1, (8, 2), &Device::Cpu)?.matmul(&basis)?)
        };
        let (train, held_out) = (rows(1)?, rows(2)?);
        let data = Data { name: "rows".into(), train: &train, held_out: &held_out, plane: [11, 22] };
        let found = compress(&data, &[10.0, 242.0, 484.0])?;
        assert_eq!(found.iter().map(|row| row.latent).collect::<Vec<_>>(), [2, 1]);
        assert!(found[0].variance.unwrap().mean > 0.9999 && found[0].ssim.unwrap().mean > 0.999);
        assert!(found[1].variance.unwrap().mean < 0.99);
        let (text, plots) = table_and_plots(&found)?;
        assert!(text.contains("242") && plots.len() == 3, "{text}");
        assert!(compress(&data, &[1.0]).is_err());
        Ok(())
    }
}
