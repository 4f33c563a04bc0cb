//! The painted images that a base model learns from, held in memory.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::progress;
use crate::synthetic::{self, CaptionOptions, Person, Scene};
use crate::train::shards::in_threads;

/// Which images, and what their captions say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
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
    /// Part of the captions that say all about the person; the others say a random number of words.
    pub full_captions: f64,
    /// Probability of leaving out each of expression, direction and background.
    pub drop: f32,
}

/// Images that are painted when they are first needed.
pub struct Gallery {
    settings: Settings,
    /// Bytes, (image, 3, size, size).
    planes: Vec<u8>,
}

impl Gallery {
    /// Nothing is painted yet.
    pub fn new(settings: &Settings) -> Self {
        Self { settings: settings.clone(), planes: Vec::new() }
    }

    /// Images in all.
    pub fn len(&self) -> usize {
        (self.settings.people * self.settings.each) as usize
    }

    /// Paints all images, unless that is done.
    pub fn paint(&mut self) -> Result<()> {
        if self.planes.is_empty() {
            let bar = progress::bar(self.len() as u64, "painting");
            let parts = in_threads(self.settings.people as usize, |person| {
                progress::check()?;
                let mut planes = Vec::new();
                for image in 0..self.settings.each as usize {
                    planes.extend(self.planes_of(person * self.settings.each as usize + image));
                    bar.inc(1);
                }
                Ok(planes)
            })?;
            bar.finish_and_clear();
            self.planes = parts.concat();
        }
        Ok(())
    }

    /// Images of people who are in no training batch: `count` of them, one each. (count, 3, size, size) in [−1, 1].
    pub fn strangers(&self, count: usize) -> Result<Tensor> {
        let first = self.len();
        let planes =
            in_threads(count, |i| Ok(self.planes_of(first + i * self.settings.each as usize)))?.concat();
        self.tensor(count, planes.iter())
    }

    /// Up to `count` images, evenly spread. (count, 3, size, size) in [−1, 1].
    pub fn sample(&self, count: usize) -> Result<Tensor> {
        let count = count.clamp(1, self.len());
        self.batch(&(0..count).map(|i| i * (self.len() / count)).collect::<Vec<_>>())
    }

    /// Painted images by number. (B, 3, size, size) in [−1, 1].
    pub fn batch(&self, numbers: &[usize]) -> Result<Tensor> {
        let length = 3 * self.settings.size * self.settings.size;
        self.tensor(
            numbers.len(),
            numbers.iter().flat_map(|number| &self.planes[number * length..][..length]),
        )
    }

    fn tensor<'a>(&self, count: usize, planes: impl Iterator<Item = &'a u8>) -> Result<Tensor> {
        let size = self.settings.size;
        let values: Vec<f32> = planes.map(|byte| f32::from(*byte) / 127.5 - 1.0).collect();
        Ok(Tensor::from_vec(values, (count, 3, size, size), &Device::Cpu)?)
    }

    /// A caption of image `number`; what it says is drawn from `rng`.
    pub fn caption(&self, number: usize, rng: &mut impl Rng) -> String {
        let (person, scene) = self.subject(number);
        let all = rng.random_bool(self.settings.full_captions);
        let attributes = if all { usize::MAX } else { rng.random_range(0..=5) };
        let options = CaptionOptions { subject: "person", attributes, drop: self.settings.drop };
        synthetic::caption(&person, &scene, options, rng.random())
    }

    fn subject(&self, number: usize) -> (Person, Scene) {
        let (person, image) = (number as u64 / self.settings.each, number as u64 % self.settings.each);
        let person = Person::new(self.settings.seed, self.settings.first + person);
        let scene = Scene::draw_for(&person, image);
        (person, scene)
    }

    fn planes_of(&self, number: usize) -> Vec<u8> {
        let (person, scene) = self.subject(number);
        let rgb = synthetic::paint(&person, &scene, self.settings.size, 1);
        (0..3).flat_map(|channel| rgb.iter().skip(channel).step_by(3).copied()).collect()
    }
}
