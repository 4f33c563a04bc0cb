//! The judge of the small world: what a portrait shows, for evaluation only.
//!
//! A vision transformer as CLIP's whose projection holds a logit for each class of [`Scene::class_words`], in
//! order, and after them one number for each factor of [`Identity`], in units of its deviation:
//! y = √12 · (factor − ½). It has learned from painted pictures and was told nothing about drawn ones.

use std::ops::Range;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Identity, Scene};
use crate::identity::clip::{ClipPreprocessor, ClipVision, ClipVisionConfig};
use crate::model_files::{ModelFiles, TRANSFORMERS_WEIGHTS};
use crate::picture::Picture;

/// The judge.
#[derive(Clone, Debug)]
pub struct Judge {
    network: ClipVision,
    preprocessor: ClipPreprocessor,
    record: Record,
}

impl Judge {
    /// Reads the folder that `difflora train-encoder --kind judge` writes.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let config: Config = files.config("config.json")?;
        let preprocessor = files.json("preprocessor_config.json")?;
        let wanted = outputs();
        let network = files.load("", TRANSFORMERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| {
            let given = config.network.projection_dim;
            ensure!(given == wanted, "the judge has {given} outputs, this version reads {wanted}");
            ClipVision::new(&config.network, vb)
        })?;
        Ok(Self { network, preprocessor, record: config.judge })
    }

    /// The likeliest class of each attribute, in the order of [`Scene::class_words`].
    pub fn classes(&self, pictures: &[Picture]) -> Result<Vec<[usize; Scene::CLASSES]>> {
        Ok(self.rows(pictures)?.iter().map(|row| classes(row)).collect())
    }

    /// The factors of each person as they look, in the order of [`Identity::NAMES`], on the scale of
    /// [`Identity`]. How far each can be trusted is in [`Judge::record`].
    pub fn factors(&self, pictures: &[Picture]) -> Result<Vec<[f32; Identity::COUNT]>> {
        Ok(self.rows(pictures)?.iter().map(|row| factors(row)).collect())
    }

    /// What it was measured to be on people that it had not seen.
    pub fn record(&self) -> &Record {
        &self.record
    }

    fn rows(&self, pictures: &[Picture]) -> Result<Vec<Vec<f32>>> {
        let mut rows = Vec::with_capacity(pictures.len());
        // So many at once that memory stays small.
        for pictures in pictures.chunks(64) {
            let pixels: Vec<Tensor> = pictures
                .iter()
                .map(|picture| self.preprocessor.apply(picture, &Device::Cpu))
                .collect::<Result<_>>()?;
            rows.extend(self.network.forward(&Tensor::stack(&pixels, 0)?)?.to_vec2()?);
        }
        Ok(rows)
    }
}

/// `config.json`: the network as transformers describes it, and beside it the record.
#[derive(Clone, Debug, Deserialize)]
struct Config {
    #[serde(flatten)]
    network: ClipVisionConfig,
    judge: Record,
}

/// How good the judge was on held-out people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Held-out people, one picture each.
    pub people: usize,
    /// Per attribute.
    pub attributes: Vec<Attribute>,
    /// Per factor.
    pub factors: Vec<Factor>,
}

/// How good it was at one attribute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attribute {
    /// As in [`Scene::class_words`].
    pub name: String,
    /// Part of the pictures of which it named the right class.
    pub accuracy: f64,
}

/// How good it was at one factor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Factor {
    /// As in [`Identity::NAMES`].
    pub name: String,
    /// Part of the factor's variance that it explains, R².
    pub r2: f64,
}

impl Record {
    /// Compares outputs of the network, one row a picture, with the truth.
    pub fn measure(rows: &[Vec<f32>], truth: &[([usize; Scene::CLASSES], [f32; Identity::COUNT])]) -> Self {
        let people = truth.len();
        let part = |count: usize| count as f64 / people as f64;
        let pairs = || rows.iter().zip(truth);
        let attribute = |(i, (name, _)): (usize, (&'static str, _))| Attribute {
            name: name.to_string(),
            accuracy: part(pairs().filter(|(row, (right, _))| classes(row)[i] == right[i]).count()),
        };
        let factor = |(i, name): (usize, &&str)| {
            let mean = truth.iter().map(|(_, right)| f64::from(right[i])).sum::<f64>() / people as f64;
            let square = |of: f32, from: f64| (f64::from(of) - from).powi(2);
            let error: f64 = pairs().map(|(row, (_, right))| square(right[i], factors(row)[i].into())).sum();
            let variance: f64 = truth.iter().map(|(_, right)| square(right[i], mean)).sum();
            Factor { name: (*name).to_string(), r2: 1.0 - error / variance }
        };
        Self {
            people,
            attributes: Scene::class_words().into_iter().enumerate().map(attribute).collect(),
            factors: Identity::NAMES.iter().enumerate().map(factor).collect(),
        }
    }
}

/// Outputs of the network.
pub fn outputs() -> usize {
    factor_outputs().end
}

/// The outputs that hold the logits of each attribute.
pub fn class_outputs() -> [Range<usize>; Scene::CLASSES] {
    let mut end = 0;
    Scene::class_words().map(|(_, words)| {
        end += words.len();
        end - words.len()..end
    })
}

/// The outputs that hold the factors.
pub fn factor_outputs() -> Range<usize> {
    let start = class_outputs()[Scene::CLASSES - 1].end;
    start..start + Identity::COUNT
}

/// A factor in [0, 1] as the network gives it.
pub fn scaled(factor: f32) -> f32 {
    (factor - 0.5) * 12f32.sqrt()
}

fn classes(row: &[f32]) -> [usize; Scene::CLASSES] {
    class_outputs().map(|outputs| {
        let logits = row[outputs].iter().enumerate();
        logits.max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class)
    })
}

fn factors(row: &[f32]) -> [f32; Identity::COUNT] {
    let outputs = &row[factor_outputs()];
    std::array::from_fn(|i| outputs[i] / 12f32.sqrt() + 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Person;

    /// The row of a judge that knows everything.
    fn knowing(classes: &[usize; Scene::CLASSES], factors: &[f32; Identity::COUNT]) -> Vec<f32> {
        let mut row = vec![0.0; outputs()];
        for (outputs, class) in class_outputs().into_iter().zip(classes) {
            row[outputs][*class] = 1.0;
        }
        for (output, factor) in row[factor_outputs()].iter_mut().zip(factors) {
            *output = scaled(*factor);
        }
        row
    }

    #[test]
    fn outputs_are_read_as_they_are_laid_out() {
        let (classes, factors) = (Scene::draw(3, 1).classes(), Person::new(3, 1).identity.to_array());
        let row = knowing(&classes, &factors);
        assert_eq!(super::classes(&row), classes);
        for (told, factor) in super::factors(&row).iter().zip(factors) {
            assert!((told - factor).abs() < 1e-6);
        }
    }

    #[test]
    fn the_record_counts_what_is_right_and_what_is_explained() {
        let truth: Vec<_> =
            (0..8).map(|i| (Scene::draw(3, i).classes(), Person::new(3, i).identity.to_array())).collect();
        let mut rows: Vec<_> = truth.iter().map(|(classes, factors)| knowing(classes, factors)).collect();
        let whole = Record::measure(&rows, &truth);
        assert!(whole.attributes.iter().all(|attribute| attribute.accuracy == 1.0));
        assert!(whole.factors.iter().all(|factor| (factor.r2 - 1.0).abs() < 1e-6));
        rows[0][class_outputs()[0].start + (truth[0].0[0] + 1) % 4] = 2.0;
        let skin = factor_outputs().start;
        rows.iter_mut().for_each(|row| row[skin] = 0.0);
        let blind = Record::measure(&rows, &truth);
        assert_eq!(blind.attributes[0].accuracy, 7.0 / 8.0);
        assert!(blind.factors[0].r2 <= 0.0, "half is no better than the mean");
    }
}
