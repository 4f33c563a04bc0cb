//! The file that `train-encoder --config` takes, and the portraits that both trainings see.

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::identity::clip::ClipVisionConfig;
use crate::image::{Filter, Image};
use crate::synthetic::attribute_classifier::NetworkConfig;
use crate::synthetic::{self, Person, Scene, World};
use crate::train::trainer::TrainerConfig;

/// The file given by `--config`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The image encoder: the second condition of the hypernetwork.
    pub image: Recipe<ClipVisionConfig>,
    /// The attribute classifier that judges generated portraits.
    pub judge: Recipe<NetworkConfig>,
}

/// How one of them is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe<C> {
    /// Of weights, people and scenes; no other training may use it for its people.
    pub seed: u64,
    /// Sizes of the network, as in its `config.json`.
    pub model: C,
    /// How the scenes of the image encoder vary.
    #[serde(default)]
    pub world: World,
    /// Probability of each change of light, colour, sharpness, noise and edges of the image encoder's images.
    #[serde(default)]
    pub randomise: f64,
    /// Steps, batch, rate.
    pub plan: TrainerConfig,
}

/// Number of the first person who is kept out of the training.
pub const HELD_OUT: u64 = 1 << 40;

/// Paints a person as the trainings see them, one point a pixel, with the grain of the scene.
pub fn paint(person: &Person, scene: &Scene, size: usize) -> Image {
    Image { width: size, height: size, rgb: synthetic::paint(person, scene, size, 1) }
}

/// Half of the images lose some sharpness: drawn portraits, and photos that were scaled, are softer than painted
/// ones.
pub fn soften(image: Image, rng: &mut impl Rng) -> Image {
    let side = image.width;
    if rng.random_bool(0.5) {
        return image;
    }
    let small = rng.random_range(side / 2..side);
    image.resize(small, small, Filter::Bicubic).resize(side, side, Filter::Bicubic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_in_the_repository_are_read() {
        let text = include_str!("../../../configs/encoder-tiny.toml");
        let settings: Settings = toml::from_str(text).unwrap();
        for plan in [settings.image.plan, settings.judge.plan] {
            plan.samples_a_shard().unwrap();
        }
    }
}
