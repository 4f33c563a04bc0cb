//! The painted images that a base model is trained on; each is painted when it is needed.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::synthetic::{self, FaceMap, Person, Scene, World};

/// Which images, and what their captions say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How scenes vary and what captions say.
    // Checkpoints hold the settings that they were made with, and older ones know no world.
    #[serde(default, skip_serializing_if = "World::is_varied")]
    pub world: World,
    /// Seed of the population.
    pub seed: u64,
    /// Number of the first person.
    pub first: u64,
    /// People.
    pub people: u64,
    /// Images of each.
    pub each: u64,
    /// Pixels on a side.
    pub size: usize,
    /// Part of the captions that say all about the person; the others say a random number of words. Only in the varied
    /// world.
    #[serde(default)]
    pub full_captions: f64,
    /// Probability of leaving out each of expression, direction and background. Only in the varied world.
    #[serde(default)]
    pub drop: f32,
}

/// A numbered set of painted images with captions.
pub struct PaintedImages {
    settings: Settings,
}

impl PaintedImages {
    /// The set that the settings describe.
    pub fn new(settings: &Settings) -> Self {
        Self { settings: settings.clone() }
    }

    /// Images in all.
    pub fn len(&self) -> usize {
        (self.settings.people * self.settings.each) as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `count` images of people who are in no training batch, one each, by number.
    pub fn held_out(&self, count: usize) -> Vec<usize> {
        (0..count).map(|i| self.len() + i * self.settings.each as usize).collect()
    }

    /// Numbers of up to `count` images, evenly spread.
    pub fn spread(&self, count: usize) -> Vec<usize> {
        let count = count.clamp(1, self.len().max(1));
        (0..count).map(|i| i * (self.len() / count)).collect()
    }

    /// Images by number. (B, 3, size, size) in [−1, 1].
    pub fn batch(&self, numbers: &[usize]) -> Result<Tensor> {
        let size = self.settings.size;
        let planes = numbers.iter().flat_map(|number| self.planes(*number));
        let values: Vec<f32> = planes.map(|byte| f32::from(byte) / 127.5 - 1.0).collect();
        Ok(Tensor::from_vec(values, (numbers.len(), 3, size, size), &Device::Cpu)?)
    }

    /// Weights of the squared or absolute error over a grid of `side`×`side`, 1 beside the head, 1 + `head` on it and
    /// 1 + `head` + `features` at eyes and mouth, over their mean. (B, 1, side, side)
    pub fn weights(&self, numbers: &[usize], side: usize, head: f64, features: f64) -> Result<Tensor> {
        let mut values = Vec::with_capacity(numbers.len() * side * side);
        for &number in numbers {
            let (person, scene) = self.subject(number);
            let map = FaceMap::new(&person, &scene, side);
            let weight = |(on, at): (&f32, &f32)| 1.0 + head as f32 * on + features as f32 * at;
            let weights: Vec<f32> = map.head.iter().zip(&map.features).map(weight).collect();
            let mean = weights.iter().sum::<f32>() / weights.len() as f32;
            values.extend(weights.into_iter().map(|weight| weight / mean));
        }
        Ok(Tensor::from_vec(values, (numbers.len(), 1, side, side), &Device::Cpu)?)
    }

    /// A caption of image `number`; what it says is drawn from `rng`.
    pub fn caption(&self, number: usize, rng: &mut impl Rng) -> String {
        let (person, scene) = self.subject(number);
        self.settings.world.caption(&person, &scene, self.settings.full_captions, self.settings.drop, rng)
    }

    /// Person and scene of image `number`.
    pub fn subject(&self, number: usize) -> (Person, Scene) {
        let (person, image) = (number as u64 / self.settings.each, number as u64 % self.settings.each);
        let person = Person::new(self.settings.seed, self.settings.first + person);
        let scene = self.settings.world.scene(&person, image);
        (person, scene)
    }

    /// Bytes (3, size, size).
    fn planes(&self, number: usize) -> Vec<u8> {
        let (person, scene) = self.subject(number);
        let rgb = synthetic::paint(&person, &scene, self.settings.size, 1);
        (0..3).flat_map(|channel| rgb.iter().skip(channel).step_by(3).copied()).collect()
    }
}
