//! One painted photo of each person of a dataset as a row of numbers, beside the LoRAs of the same people.

use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::dataset::manifest::{ImageSettings, Row, read_manifest};
use crate::hypernet::row_source::RowSource;
use crate::synthetic::Person;
use crate::synthetic::scenes::{paint_image, reference_scene};

/// The painted people of a dataset.
pub struct PaintedRows {
    /// People to train on.
    pub train: PaintedSplit,
    /// People to evaluate on.
    pub held_out: PaintedSplit,
}

/// People of one split; their first reference photos are painted when they are asked for.
pub struct PaintedSplit {
    people: Vec<(u64, u64)>,
    images: ImageSettings,
}

impl PaintedRows {
    /// Reads which people there are.
    ///
    /// # Errors
    /// As [`read_manifest`] and [`ImageSettings::read`].
    pub fn read(dataset: &Path) -> Result<Self> {
        let images = ImageSettings::read(dataset)?;
        let (held_out, train): (Vec<Row>, Vec<Row>) =
            read_manifest(dataset)?.into_iter().partition(|row| row.split == "held-out");
        let split = |rows: Vec<Row>| PaintedSplit {
            people: rows.into_iter().map(|row| row.person).collect(),
            images: images.clone(),
        };
        Ok(Self { train: split(train), held_out: split(held_out) })
    }
}

impl PaintedSplit {
    /// Side of an image, in pixels.
    pub fn side(&self) -> usize {
        self.images.size
    }
}

impl RowSource for PaintedSplit {
    fn count(&self) -> usize {
        self.people.len()
    }

    /// Three planes, red first.
    fn width(&self) -> usize {
        3 * self.images.size.pow(2)
    }

    fn batch(&self, places: &[usize]) -> Result<Tensor> {
        let ImageSettings { world, size, seed, .. } = self.images;
        let scene = reference_scene(world, seed, 0);
        let mut values = Vec::with_capacity(places.len() * self.width());
        for place in places {
            let (population, number) = self.people[*place];
            let image = paint_image(&Person::new(population, number), &scene, size);
            for channel in 0..3 {
                values.extend(image.rgb.iter().skip(channel).step_by(3).map(|byte| f32::from(*byte) / 255.0));
            }
        }
        Ok(Tensor::from_vec(values, (places.len(), self.width()), &Device::Cpu)?)
    }
}
