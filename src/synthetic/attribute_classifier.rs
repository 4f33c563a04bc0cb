//! The attribute classifier of the synthetic world: what a portrait shows, for evaluation only.
//!
//! A convolutional network whose outputs are a logit for each class of [`World::attributes`], in order, and after
//! them one number for each factor of [`Identity`], in units of its deviation: y = √12 · (factor − ½). It is trained
//! on painted images and never on generated ones.
//!
//! Places matter here (a smile is two pixels at the corners of a mouth), so that the last map is flattened and not
//! averaged. A vision transformer of about the same cost needed 4.5 times as many steps to the same error.

use std::ops::Range;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::image::{Filter, Image};
use crate::layers::{Activation, Conv2d, ConvGeometry, GroupNorm, Linear};
use crate::synthetic::{Attribute, Identity, World};
use crate::weights::model_folder::{ModelFiles, TRANSFORMERS_WEIGHTS};

/// The attribute classifier.
#[derive(Clone, Debug)]
pub struct AttributeClassifier {
    network: Network,
    image_size: usize,
    world: World,
    record: Record,
}

impl AttributeClassifier {
    /// Reads the folder that `difflora train-encoder --kind judge` writes.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let Config { network: config, judge: record } = files.config("config.json")?;
        let network =
            files.load("", TRANSFORMERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| Network::new(&config, vb))?;
        Ok(Self { network, image_size: config.image_size, world: config.world, record })
    }

    /// The likeliest class of each of [`World::attributes`].
    pub fn classes(&self, images: &[Image]) -> Result<Vec<Vec<usize>>> {
        Ok(self.rows(images)?.iter().map(|row| labels(self.world, row)).collect())
    }

    /// Which attributes it names, and how it was trained to see them.
    pub fn world(&self) -> World {
        self.world
    }

    /// The logits of each image, one row of outputs each: see [`class_outputs`].
    pub fn logits(&self, images: &[Image]) -> Result<Vec<Vec<f32>>> {
        self.rows(images)
    }

    /// The factors of each person as they look, in the order of [`Identity::NAMES`], on the scale of
    /// [`Identity`]. How far each can be trusted is in [`AttributeClassifier::record`].
    pub fn factors(&self, images: &[Image]) -> Result<Vec<[f32; Identity::COUNT]>> {
        Ok(self.rows(images)?.iter().map(|row| factors(self.world, row)).collect())
    }

    /// Accuracy on held-out people.
    pub fn record(&self) -> &Record {
        &self.record
    }

    fn rows(&self, images: &[Image]) -> Result<Vec<Vec<f32>>> {
        let mut rows = Vec::with_capacity(images.len());
        // So many at once that memory stays small.
        for images in images.chunks(64) {
            rows.extend(self.network.forward(&pixels(images, self.image_size)?)?.to_vec2()?);
        }
        Ok(rows)
    }
}

/// `config.json`: the network, and beside it the record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// Sizes.
    #[serde(flatten)]
    pub network: NetworkConfig,
    /// How good it is.
    pub judge: Record,
}

/// Sizes of the classifier's network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// Side of the image, in pixels.
    pub image_size: usize,
    /// Whose attributes it names.
    #[serde(default)]
    pub world: World,
    /// Channels of the stages; each halves the image.
    pub channels: Vec<usize>,
    /// Channels that are normalised together.
    pub group: usize,
    /// Width of the layer before the outputs.
    pub hidden: usize,
}

/// The network: stages x ← down(x), x ← x + mix(x), each a convolution, a norm and SiLU; two linear layers.
#[derive(Clone, Debug)]
pub struct Network {
    stages: Vec<[(Conv2d, GroupNorm); 2]>,
    hidden: Linear,
    outputs: Linear,
}

impl Network {
    /// Builds it from the weights in `vb`.
    pub fn new(config: &NetworkConfig, vb: VarBuilder) -> Result<Self> {
        let &NetworkConfig { image_size, world, ref channels, group, hidden } = config;
        let deep = channels.len() as u32;
        ensure!(
            image_size.is_multiple_of(2usize.pow(deep)) && group > 0 && deep > 0,
            "an image of {image_size} pixels cannot be halved {deep} times"
        );
        let layer = |input: usize, output: usize, geometry: ConvGeometry, vb: VarBuilder| -> Result<_> {
            let norm = GroupNorm::new(output / group, output, 1e-5, vb.pp("norm"))?;
            Ok((Conv2d::new(input, output, geometry, vb.pp("conv"))?, norm))
        };
        let down = ConvGeometry { kernel: 3, stride: 2, pad_before: 1, pad_after: 0 };
        let (mut input, mut stages) = (3, Vec::new());
        for (i, &output) in channels.iter().enumerate() {
            let vb = vb.pp("stages").pp(i);
            let mix = layer(output, output, ConvGeometry::same(3), vb.pp("mix"))?;
            stages.push([layer(input, output, down, vb.pp("down"))?, mix]);
            input = output;
        }
        let places = (image_size >> deep).pow(2);
        Ok(Self {
            stages,
            hidden: Linear::new(input * places, hidden, vb.pp("hidden"))?,
            outputs: Linear::new(hidden, outputs(world), vb.pp("outputs"))?,
        })
    }

    /// `x` (B, 3, S, S) from [`pixels`] → (B, [`outputs`]).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for [(down, down_norm), (mix, mix_norm)] in &self.stages {
            x = down_norm.forward_silu(&down.forward(&x)?)?;
            x = (&x + mix_norm.forward_silu(&mix.forward(&x)?)?)?;
        }
        let x = Activation::Silu.apply(&self.hidden.forward(&x.flatten_from(1)?)?)?;
        Ok(self.outputs.forward(&x)?)
    }
}

/// Pictures of any size for [`Network::forward`]: the middle square, (B, 3, S, S) in [−1, 1].
pub fn pixels(images: &[Image], size: usize) -> Result<Tensor> {
    let one = |image: &Image| image.square(size, Filter::Bicubic).to_tensor(&Device::Cpu);
    Ok(Tensor::stack(&images.iter().map(one).collect::<Result<Vec<_>>>()?, 0)?)
}

/// How good the classifier was on held-out people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Held-out people, one image each.
    pub people: usize,
    /// Per attribute.
    pub attributes: Vec<AttributeRecord>,
    /// Per factor.
    pub factors: Vec<Factor>,
}

/// How good it was at one attribute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttributeRecord {
    /// As in [`World::attributes`].
    pub name: String,
    /// Part of the images of which it named the right class.
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
    /// Compares outputs of the network, one row an image, with the truth.
    pub fn measure(world: World, rows: &[Vec<f32>], truth: &[Truth]) -> Self {
        let people = truth.len();
        let part = |count: usize| count as f64 / people as f64;
        let pairs = || rows.iter().zip(truth);
        let seen: Vec<Vec<usize>> = rows.iter().map(|row| labels(world, row)).collect();
        let attribute = |(i, (name, _)): (usize, Attribute)| AttributeRecord {
            name: name.to_string(),
            accuracy: part(seen.iter().zip(truth).filter(|(seen, (right, _))| seen[i] == right[i]).count()),
        };
        let factor = |(i, name): (usize, &&str)| {
            let mean = truth.iter().map(|(_, right)| f64::from(right[i])).sum::<f64>() / people as f64;
            let square = |of: f32, from: f64| (f64::from(of) - from).powi(2);
            let error: f64 =
                pairs().map(|(row, (_, right))| square(right[i], factors(world, row)[i].into())).sum();
            let variance: f64 = truth.iter().map(|(_, right)| square(right[i], mean)).sum();
            Factor { name: (*name).to_string(), r2: 1.0 - error / variance }
        };
        Self {
            people,
            attributes: world.attributes().into_iter().enumerate().map(attribute).collect(),
            factors: Identity::NAMES.iter().enumerate().map(factor).collect(),
        }
    }
}

/// Targets of an image: labels as [`World::labels`] gives them, and the factors of the person.
pub type Truth = (Vec<usize>, [f32; Identity::COUNT]);

/// Outputs of the network.
pub fn outputs(world: World) -> usize {
    factor_outputs(world).end
}

/// The outputs that hold the logits of each attribute of [`World::attributes`].
pub fn class_outputs(world: World) -> Vec<Range<usize>> {
    let mut end = 0;
    let range = |(_, words): Attribute| {
        end += words.len();
        end - words.len()..end
    };
    world.attributes().into_iter().map(range).collect()
}

/// The outputs that hold the factors.
pub fn factor_outputs(world: World) -> Range<usize> {
    let start = class_outputs(world).last().map_or(0, |last| last.end);
    start..start + Identity::COUNT
}

/// A factor in [0, 1] as the network gives it.
pub fn scaled(factor: f32) -> f32 {
    (factor - 0.5) * 12f32.sqrt()
}

/// The likeliest class of each attribute in a row of outputs.
pub fn labels(world: World, row: &[f32]) -> Vec<usize> {
    let likeliest = |outputs: Range<usize>| {
        let logits = row[outputs].iter().enumerate();
        logits.max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class)
    };
    class_outputs(world).into_iter().map(likeliest).collect()
}

fn factors(world: World, row: &[f32]) -> [f32; Identity::COUNT] {
    let outputs = &row[factor_outputs(world)];
    std::array::from_fn(|i| outputs[i] / 12f32.sqrt() + 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Person, paint};
    use crate::weights::Trainable;
    use crate::weights::model_folder::save_component;

    #[test]
    fn a_classifier_is_written_and_opened_and_takes_images_of_any_size_and_number() {
        let out = tempfile::tempdir().unwrap();
        let network =
            NetworkConfig { image_size: 16, world: World::Varied, channels: vec![4, 8], group: 4, hidden: 8 };
        let trainable = Trainable::new(5);
        Network::new(&network, trainable.builder(&Device::Cpu)).unwrap();
        let weights =
            trainable.vars().into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
        let record = Record { people: 3, attributes: Vec::new(), factors: Vec::new() };
        let save =
            |config| save_component(out.path(), "", TRANSFORMERS_WEIGHTS, &config, &weights, DType::F16);
        let files = ModelFiles::folder(out.path()).unwrap();

        save(serde_json::json!(network)).unwrap();
        let error = AttributeClassifier::open(&files).unwrap_err();
        assert!(format!("{error:#}").contains("missing field `judge`"), "{error:#}");

        save(serde_json::json!(Config { network, judge: record.clone() })).unwrap();
        let classifier = AttributeClassifier::open(&files).unwrap();
        assert_eq!(classifier.record(), &record);
        let rgb = paint(&Person::new(5, 1), &crate::synthetic::Scene::draw(5, 1), 32, 1);
        let images = vec![Image { width: 32, height: 32, rgb }; 65];
        let classes = classifier.classes(&images).unwrap();
        assert_eq!(classes.len(), 65);
        assert_eq!(classes[0], classes[64]);
        assert!(classifier.factors(&images).unwrap().iter().flatten().all(|factor| factor.is_finite()));
    }

    const WORLD: World = World::Aligned;

    fn truth(number: u64) -> Truth {
        let person = Person::new(3, number);
        (WORLD.labels(&person, &WORLD.scene(&person, 0)), person.identity.to_array())
    }

    /// The outputs of a perfect classifier.
    fn perfect((classes, factors): &Truth) -> Vec<f32> {
        let mut row = vec![0.0; outputs(WORLD)];
        for (outputs, class) in class_outputs(WORLD).into_iter().zip(classes) {
            row[outputs][*class] = 1.0;
        }
        for (output, factor) in row[factor_outputs(WORLD)].iter_mut().zip(factors) {
            *output = scaled(*factor);
        }
        row
    }

    #[test]
    fn outputs_are_read_as_they_are_laid_out() {
        let truth = truth(1);
        let row = perfect(&truth);
        assert_eq!(labels(WORLD, &row), truth.0);
        for (read, factor) in factors(WORLD, &row).iter().zip(truth.1) {
            assert!((read - factor).abs() < 1e-6);
        }
    }

    #[test]
    fn the_record_counts_what_is_right_and_what_is_explained() {
        let truth: Vec<_> = (0..8).map(truth).collect();
        let mut rows: Vec<_> = truth.iter().map(perfect).collect();
        let whole = Record::measure(WORLD, &rows, &truth);
        assert!(whole.attributes.iter().all(|attribute| attribute.accuracy == 1.0));
        assert!(whole.factors.iter().all(|factor| (factor.r2 - 1.0).abs() < 1e-6));
        rows[0][class_outputs(WORLD)[0].start + (truth[0].0[0] + 1) % 4] = 2.0;
        let skin = factor_outputs(WORLD).start;
        rows.iter_mut().for_each(|row| row[skin] = 0.0);
        let blind = Record::measure(WORLD, &rows, &truth);
        assert_eq!(blind.attributes[0].accuracy, 7.0 / 8.0);
        assert!(blind.factors[0].r2 <= 0.0, "half is no better than the mean");
    }
}
