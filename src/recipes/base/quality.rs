//! How well generated images show what their captions say, as the attribute classifier reads them.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::image::Image;
use crate::progress;
use crate::synthetic::attribute_classifier::{AttributeClassifier, class_outputs, labels};
use crate::synthetic::image_set::PaintedImages;
use crate::synthetic::{Detail, describe};
use crate::train;

/// Figures of one attribute, or means over all.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// As in [`World::attributes`](crate::synthetic::World::attributes), or `all`.
    pub name: String,
    /// Part of the images of which the classifier names the right class.
    pub accuracy: f64,
    /// Area under the ROC curve of the log-probability of a class, mean over the classes that occur.
    pub auc: f64,
}

/// Figures of one moment of a training.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quality {
    /// Means over the attributes first, then each.
    pub figures: Vec<Figures>,
}

/// Images for one measurement.
const IMAGES: usize = 96;

impl Quality {
    /// Of what `generate` makes from the full captions of held-out people.
    pub fn measure(
        images: &PaintedImages,
        classifier: &AttributeClassifier,
        generate: impl FnOnce(&[String]) -> Result<Vec<Image>>,
    ) -> Result<Self> {
        let world = classifier.world();
        let numbers = images.held_out(IMAGES);
        let prompts: Vec<String> = numbers
            .iter()
            .map(|number| {
                let (person, scene) = images.subject(*number);
                describe(&person, &scene, "person", Detail::All, &mut train::rng(9, *number as u64))
            })
            .collect();
        let rows = classifier.logits(&generate(&prompts)?)?;
        let truth: Vec<Vec<usize>> = numbers
            .iter()
            .map(|number| {
                let (person, scene) = images.subject(*number);
                world.labels(&person, &scene)
            })
            .collect();
        let seen: Vec<Vec<usize>> = rows.iter().map(|row| labels(world, row)).collect();
        let mut figures = Vec::new();
        for (i, ((name, _), outputs)) in world.attributes().into_iter().zip(class_outputs(world)).enumerate()
        {
            let right = seen.iter().zip(&truth).filter(|(seen, truth)| seen[i] == truth[i]).count();
            let areas: Vec<f64> = outputs
                .clone()
                .filter_map(|output| {
                    let scores: Vec<f64> = rows
                        .iter()
                        .map(|row| log_probability(&row[outputs.clone()], output - outputs.start))
                        .collect();
                    let wanted: Vec<bool> =
                        truth.iter().map(|truth| truth[i] == output - outputs.start).collect();
                    area_under_curve(&scores, &wanted)
                })
                .collect();
            let auc = areas.iter().sum::<f64>() / areas.len().max(1) as f64;
            figures.push(Figures { name: name.into(), accuracy: right as f64 / truth.len() as f64, auc });
        }
        let mean =
            |of: fn(&Figures) -> f64| figures.iter().map(of).sum::<f64>() / figures.len().max(1) as f64;
        let all = Figures { name: "all".into(), accuracy: mean(|f| f.accuracy), auc: mean(|f| f.auc) };
        figures.insert(0, all);
        Ok(Self { figures })
    }

    /// Adds a line to the file at `path`, and prints the means.
    pub fn append(&self, path: &Path, step: u64, batch: usize) -> Result<()> {
        let mut line = serde_json::json!({ "step": step, "samples": step * batch as u64 });
        for Figures { name, accuracy, auc } in &self.figures {
            line[name] = serde_json::json!([(accuracy * 1e3).round() / 1e3, (auc * 1e3).round() / 1e3]);
        }
        let shown = || format!("cannot write `{}`", path.display());
        let mut file =
            std::fs::OpenOptions::new().create(true).append(true).open(path).with_context(shown)?;
        writeln!(file, "{line}").with_context(shown)?;
        let Figures { accuracy, auc, .. } = &self.figures[0];
        progress::note(format_args!(
            "step {step}: generated images show {:.1} % of what captions say, AUC {auc:.3}",
            100.0 * accuracy
        ));
        Ok(())
    }
}

fn log_probability(logits: &[f32], class: usize) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    f64::from(logits[class] - highest) - total.ln()
}

/// Probability that a wanted one scores above an unwanted one; `None` where one kind is missing.
fn area_under_curve(scores: &[f64], wanted: &[bool]) -> Option<f64> {
    let of = |kind: bool| -> Vec<f64> {
        scores.iter().zip(wanted).filter(|(_, wanted)| **wanted == kind).map(|(score, _)| *score).collect()
    };
    let (yes, no) = (of(true), of(false));
    let above = |a: f64, b: f64| {
        if a > b {
            1.0
        } else if a == b {
            0.5
        } else {
            0.0
        }
    };
    let sum: f64 = yes.iter().flat_map(|a| no.iter().map(move |b| above(*a, *b))).sum();
    (!yes.is_empty() && !no.is_empty()).then(|| sum / (yes.len() * no.len()) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_under_the_curve_counts_pairs_in_order() {
        assert_eq!(area_under_curve(&[3.0, 1.0, 2.0, 0.0], &[true, true, false, false]), Some(0.75));
        assert_eq!(area_under_curve(&[1.0, 1.0], &[true, false]), Some(0.5));
        assert_eq!(area_under_curve(&[1.0, 1.0], &[true, true]), None);
    }

    #[test]
    fn probabilities_of_the_classes_sum_to_one() {
        let sum: f64 = (0..3).map(|class| log_probability(&[1.0, -2.0, 900.0], class).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }
}
