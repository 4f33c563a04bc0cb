//! Domain randomisation: what real photos vary in and painted ones do not, so that an encoder trained on paintings
//! looks at the face (Tobin et al. 2017, arXiv 1703.06907).

use rand::Rng;
use rand_distr::StandardNormal;

use crate::image::{Filter, Image};

/// `image` with light, colour, sharpness, noise and an edge of it changed at random, each with probability `share`.
/// A `share` of 0 changes nothing and draws nothing from `rng`.
pub fn randomise(mut image: Image, share: f64, rng: &mut impl Rng) -> Image {
    if share <= 0.0 {
        return image;
    }
    let sometimes = |rng: &mut dyn rand::RngCore| rng.random_bool(share);
    if sometimes(rng) {
        relight(&mut image, rng);
    }
    if sometimes(rng) {
        recolour(&mut image, rng);
    }
    if sometimes(rng) {
        let side = image.width;
        let small = rng.random_range((side / 4).max(1)..side.max(2));
        image = image.resize(small, small, Filter::Bicubic).resize(side, side, Filter::Bicubic);
    }
    if sometimes(rng) {
        cover_edge(&mut image, rng);
    }
    if sometimes(rng) {
        let deviation = rng.random_range(0.0..12.0f32);
        for byte in &mut image.rgb {
            *byte = (f32::from(*byte) + deviation * rng.sample::<f32, _>(StandardNormal)).round() as u8;
        }
    }
    image
}

/// A slope of brightness in a random direction: from 0.6 to 1.4 times at the ends.
fn relight(image: &mut Image, rng: &mut impl Rng) {
    let (angle, strength) = (rng.random_range(0.0..std::f32::consts::TAU), rng.random_range(0.0..0.4f32));
    let (width, height) = (image.width as f32, image.height as f32);
    for (index, pixel) in image.rgb.chunks_exact_mut(3).enumerate() {
        let x = 2.0 * (index % image.width) as f32 / width - 1.0;
        let y = 2.0 * (index / image.width) as f32 / height - 1.0;
        let factor = 1.0 + strength * (x * angle.cos() + y * angle.sin()).clamp(-1.0, 1.0);
        pixel.iter_mut().for_each(|byte| *byte = (f32::from(*byte) * factor).round() as u8);
    }
}

/// White balance, gamma and saturation.
fn recolour(image: &mut Image, rng: &mut impl Rng) {
    let gains: [f32; 3] = std::array::from_fn(|_| rng.random_range(0.85..1.18));
    let gamma = rng.random_range(0.75..1.35f32);
    let saturation = rng.random_range(0.6..1.3f32);
    for pixel in image.rgb.chunks_exact_mut(3) {
        let values: [f32; 3] =
            std::array::from_fn(|c| (gains[c] * f32::from(pixel[c]) / 255.0).clamp(0.0, 1.0).powf(gamma));
        let grey = 0.30 * values[0] + 0.59 * values[1] + 0.11 * values[2];
        for (byte, value) in pixel.iter_mut().zip(values) {
            *byte = (255.0 * (grey + saturation * (value - grey))).round() as u8;
        }
    }
}

/// A flat strip along one edge, up to a sixth of the side wide, as crops of other detectors and hair leave it.
fn cover_edge(image: &mut Image, rng: &mut impl Rng) {
    let (edge, colour) = (rng.random_range(0..4), std::array::from_fn::<u8, 3, _>(|_| rng.random()));
    let strip = rng.random_range(0..=image.width / 6);
    let (width, height) = (image.width, image.height);
    for (index, pixel) in image.rgb.chunks_exact_mut(3).enumerate() {
        let (x, y) = (index % width, index / width);
        if [x, y, width - 1 - x, height - 1 - y][edge] < strip {
            pixel.copy_from_slice(&colour);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Person, Scene, paint};
    use crate::train;

    #[test]
    fn images_keep_their_size_and_change_with_the_seed_alone() {
        let (person, scene) = (Person::new(1, 1), Scene::draw(1, 1));
        let image = Image { width: 32, height: 32, rgb: paint(&person, &scene, 32, 1) };
        let changed = |share: f64, seed: u64| randomise(image.clone(), share, &mut train::rng(seed, 0));
        assert_eq!(changed(0.0, 1).rgb, image.rgb);
        assert_eq!(changed(1.0, 1).rgb, changed(1.0, 1).rgb);
        assert_ne!(changed(1.0, 1).rgb, changed(1.0, 2).rgb);
        assert_eq!(changed(1.0, 3).rgb.len(), image.rgb.len());
    }
}
