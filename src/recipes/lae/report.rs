//! Errors of an autoencoder on held-out LoRAs, as JSON and as text.

use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use crate::dataset::lora_dataset::LoraDataset;
use crate::hypernet::codec::LoraCodec;
use crate::hypernet::delta_metrics::{Alike, DeltaSpace};
use crate::hypernet::row_source::RowSource;
use crate::hypernet::scaler::{Scaling, StandardScaler};
use crate::statistics::Mean;
use crate::train::trainer::Outcome;

/// Reconstruction errors on the held-out LoRAs, of ΔW and of the standardised weights.
pub fn report(codec: &LoraCodec, set: &LoraDataset, end: Outcome, seconds: f64) -> Result<Value> {
    let device = codec.device();
    let space = DeltaSpace::new(&codec.layout, device)?;
    let mean = mean_row(codec, set)?.to_device(device)?;
    let mut alike = Vec::new();
    let mut quarters = Quarters::default();
    set.held_out.vectors.each(&mut |_, vectors| {
        let vectors = vectors.to_device(device)?;
        let guess = codec.decode(&codec.encode(&vectors)?)?;
        alike.extend(space.agreement(&guess, &vectors, &mean)?);
        let standard = |x: &Tensor| codec.standardise.apply(x);
        quarters.add(&standard(&guess)?, &standard(&vectors)?)
    })?;
    let (z, start) = (Tensor::zeros((1, codec.lae.config().latent()), DType::F32, device)?, Instant::now());
    codec.lora(&z)?;
    let decode = start.elapsed().as_secs_f64();
    let over_people = |of: &dyn Fn(&Alike) -> f64| Mean::of(&alike.iter().map(of).collect::<Vec<_>>());
    let config = codec.lae.config();
    Ok(json!({
        "finished": end == Outcome::Finished,
        "seconds": seconds,
        "decode_seconds": decode,
        "people": { "train": set.train.people(), "held_out": set.held_out.people() },
        "parameters": config.input(),
        "latent": config.latent(),
        "compression": config.compression(),
        "delta_cosine": over_people(&|alike| alike.cosine),
        "delta_relative_error": over_people(&|alike| alike.relative_error),
        "own_cosine": over_people(&|alike| alike.own_cosine),
        "own_relative_error": over_people(&|alike| alike.own_relative_error),
        "relative_error": quarters.relative_error(),
        "relative_error_by_magnitude": quarters.by_magnitude(),
    }))
}

/// The mean training LoRA (1, P), for every [`Scaling`].
fn mean_row(codec: &LoraCodec, set: &LoraDataset) -> Result<Tensor> {
    let whole = StandardScaler::of(&set.train.vectors, &[codec.lae.config().input()], Scaling::Element)?;
    Ok(whole.mean().unsqueeze(0)?)
}

/// Reconstruction error by magnitude: the standardised weights of each LoRA, sorted, in four quarters.
#[derive(Default)]
struct Quarters {
    /// Σ (x − x̂)² and Σ x².
    sums: [(f64, f64); 4],
}

impl Quarters {
    fn add(&mut self, guess: &Tensor, truth: &Tensor) -> Result<()> {
        for (guess, truth) in guess.to_vec2::<f32>()?.iter().zip(truth.to_vec2::<f32>()?) {
            let mut pairs: Vec<(f32, f32)> = truth.into_iter().zip(guess.iter().copied()).collect();
            pairs.sort_unstable_by(|a, b| a.0.abs().total_cmp(&b.0.abs()));
            let quarter = pairs.len().div_ceil(4).max(1);
            for (sum, pairs) in self.sums.iter_mut().zip(pairs.chunks(quarter)) {
                for (x, guess) in pairs {
                    let (x, guess) = (f64::from(*x), f64::from(*guess));
                    *sum = (sum.0 + (x - guess).powi(2), sum.1 + x * x);
                }
            }
        }
        Ok(())
    }

    fn by_magnitude(&self) -> Vec<f64> {
        self.sums.iter().map(|(error, power)| error / power.max(f64::MIN_POSITIVE)).collect()
    }

    /// Σ‖x̂ − x‖² / Σ‖x‖² over all weights.
    fn relative_error(&self) -> f64 {
        let (error, power) = self.sums.iter().fold((0.0, 0.0), |all, one| (all.0 + one.0, all.1 + one.1));
        error / f64::max(power, f64::MIN_POSITIVE)
    }
}

/// `mean ± half of the interval`.
fn interval(value: &Value) -> String {
    let mean = value["mean"].as_f64().unwrap_or(f64::NAN);
    match value["half_width"].as_f64() {
        Some(half) => format!("{mean:.3} ± {half:.3}"),
        None => format!("{mean:.3}"),
    }
}

fn quarters(report: &Value) -> String {
    let numbers = report["relative_error_by_magnitude"].as_array().into_iter().flatten();
    numbers.map(|value| format!("{:.2}", value.as_f64().unwrap_or(f64::NAN))).collect::<Vec<_>>().join(" ")
}

/// The report of one autoencoder as text.
pub fn as_text(report: &Value) -> String {
    let mut lines = Vec::new();
    lines.push(format!(
        "{} values in {}: {:.0} times smaller; {} LoRAs to learn from, {} held out",
        report["parameters"],
        report["latent"],
        report["compression"].as_f64().unwrap_or(f64::NAN),
        report["people"]["train"],
        report["people"]["held_out"]
    ));
    lines.push(format!(
        "ΔW: cosine {}, relative error {}",
        interval(&report["delta_cosine"]),
        interval(&report["delta_relative_error"])
    ));
    lines.push(format!(
        "beyond the mean LoRA: cosine {}, relative error {}",
        interval(&report["own_cosine"]),
        interval(&report["own_relative_error"])
    ));
    lines.push(format!(
        "weights: relative error {:.3}; by magnitude, from the smallest quarter: {}",
        report["relative_error"].as_f64().unwrap_or(f64::NAN),
        quarters(report)
    ));
    lines.join("\n")
}

/// The reports of a sweep as a table, one row per variant.
pub fn table(reports: &[(String, Value)]) -> String {
    let mut lines = Vec::new();
    let widest = reports.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    lines.push(format!(
        "{:widest$}  {:>6}  {:>7}  {:>15}  {:>15}  {:>15}  {:>15}  {:>23}  {:>7}",
        "",
        "latent",
        "smaller",
        "ΔW cosine",
        "ΔW rel. error",
        "own cosine",
        "own rel. error",
        "error by magnitude",
        "seconds"
    ));
    for (name, report) in reports {
        lines.push(format!(
            "{name:widest$}  {:>6}  {:>6.0}×  {:>15}  {:>15}  {:>15}  {:>15}  {:>23}  {:>7.0}",
            report["latent"],
            report["compression"].as_f64().unwrap_or(f64::NAN),
            interval(&report["delta_cosine"]),
            interval(&report["delta_relative_error"]),
            interval(&report["own_cosine"]),
            interval(&report["own_relative_error"]),
            quarters(report),
            report["seconds"].as_f64().unwrap_or(f64::NAN)
        ));
    }
    lines.join("\n")
}
