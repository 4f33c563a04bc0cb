//! Augmentation: a crop of a size that the model takes, mirrored and recoloured at will.

use rand::Rng;

use crate::image::{Filter, Image};

/// An image brought to a size, and its original size and crop, SDXL's size conditioning.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// Of the size that was asked for.
    pub image: Image,
    /// Width and height before.
    pub original: [usize; 2],
    /// Rows and columns that were cut off above and to the left, after scaling.
    pub crop: [usize; 2],
}

/// Scales an image so that it covers `width`×`height`, and cuts out the part at `place`: from (0, 0) for the upper left
/// to (1, 1) for the lower right, (0.5, 0.5) for the middle.
pub fn cut(image: &Image, [width, height]: [usize; 2], place: [f64; 2]) -> Cut {
    let original = [image.width, image.height];
    let scale = (width as f64 / image.width as f64).max(height as f64 / image.height as f64);
    let scaled = |from: usize, to: usize| ((from as f64 * scale).round() as usize).max(to);
    let (wide, high) = (scaled(image.width, width), scaled(image.height, height));
    let part = |room: usize, place: f64| ((room as f64 * place) as usize).min(room);
    let (left, top) = (part(wide - width, place[0]), part(high - height, place[1]));
    let image = image.resize(wide, high, Filter::Bicubic).crop(left, top, width, height);
    Cut { image, original, crop: [top, left] }
}

impl Cut {
    /// Left and right exchanged; the columns cut off on the left are then those that were cut off on the right, as in
    /// diffusers' `train_text_to_image_lora_sdxl.py`.
    pub fn mirrored(&self) -> Self {
        let scale = (self.image.width as f64 / self.original[0] as f64)
            .max(self.image.height as f64 / self.original[1] as f64);
        let wide = (self.original[0] as f64 * scale).round() as usize;
        let left = wide.saturating_sub(self.crop[1] + self.image.width);
        Self { image: self.image.mirrored(), original: self.original, crop: [self.crop[0], left] }
    }
}

/// Sizes of about the area of a square of `side` pixels, from twice as wide as high to twice as high as wide, in
/// multiples of `step`, widest last.
pub fn buckets(side: usize, step: usize) -> Vec<[usize; 2]> {
    let at_least = (side / 2).next_multiple_of(step).max(step);
    (at_least..=2 * side)
        .step_by(step)
        .map(|width| [width, side * side / width / step * step])
        .filter(|[width, height]| *height >= at_least && *width <= 2 * height && *height <= 2 * width)
        .collect()
}

/// The bucket whose proportions are nearest to those of an image.
pub fn nearest_bucket(buckets: &[[usize; 2]], [width, height]: [usize; 2]) -> usize {
    let proportion = (width as f64 / height as f64).ln();
    let far = |[width, height]: [usize; 2]| ((width as f64 / height as f64).ln() - proportion).abs();
    (0..buckets.len()).min_by(|a, b| far(buckets[*a]).total_cmp(&far(buckets[*b]))).unwrap_or(0)
}

/// Brightness, contrast and saturation each times a factor within 1 ± `amount`, in this order (torchvision's
/// `ColorJitter` without hue).
pub fn jitter_colour(image: &Image, amount: f64, rng: &mut impl Rng) -> Image {
    let mut factor = || (1.0 + amount * (2.0 * rng.random::<f64>() - 1.0)) as f32;
    let (brightness, contrast, saturation) = (factor(), factor(), factor());
    let grey = |[r, g, b]: [f32; 3]| 0.299 * r + 0.587 * g + 0.114 * b;
    let mut pixels: Vec<[f32; 3]> = image
        .rgb
        .chunks_exact(3)
        .map(|p| [p[0], p[1], p[2]].map(|value| (f32::from(value) * brightness).min(255.0)))
        .collect();
    let mean = pixels.iter().map(|pixel| f64::from(grey(*pixel))).sum::<f64>() / pixels.len().max(1) as f64;
    for pixel in &mut pixels {
        let contrasted =
            pixel.map(|value| (mean as f32 + (value - mean as f32) * contrast).clamp(0.0, 255.0));
        let level = grey(contrasted);
        *pixel = contrasted.map(|value| level + (value - level) * saturation);
    }
    let rgb = pixels.iter().flatten().map(|value| value.round().clamp(0.0, 255.0) as u8).collect();
    Image { rgb, ..*image }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise;

    fn gradient(width: usize, height: usize) -> Image {
        let rgb = (0..width * height * 3).map(|at| (at * 37 % 251) as u8).collect();
        Image { width, height, rgb }
    }

    #[test]
    fn a_cut_covers_its_size_and_tells_what_is_missing() {
        let wide = gradient(200, 100);
        let middle = cut(&wide, [64, 64], [0.5, 0.5]);
        assert_eq!((middle.image.width, middle.image.height), (64, 64));
        assert_eq!((middle.original, middle.crop), ([200, 100], [0, 32]));
        assert_eq!(cut(&wide, [64, 64], [1.0, 1.0]).crop, [0, 64]);
        let right = cut(&wide, [64, 64], [1.0, 0.0]).mirrored();
        assert_eq!(
            (right.crop, right.image.pixel(0, 5)),
            ([0, 0], cut(&wide, [64, 64], [1.0, 0.0]).image.pixel(63, 5))
        );
        let same = gradient(64, 64);
        assert_eq!(cut(&same, [64, 64], [0.5, 0.5]).image, same);
        assert_eq!(cut(&gradient(3, 500), [64, 64], [0.5, 0.5]).image.width, 64);
    }

    #[test]
    fn buckets_have_the_area_and_the_steps() {
        let buckets = buckets(1024, 64);
        assert!(
            buckets.contains(&[1024, 1024])
                && buckets.contains(&[832, 1216])
                && buckets.contains(&[1216, 832])
        );
        for [width, height] in &buckets {
            assert!(width % 64 == 0 && height % 64 == 0 && width * height <= 1024 * 1024);
            assert!(width * height >= 1024 * 1024 * 9 / 10, "{width}×{height}");
        }
        assert_eq!(buckets[nearest_bucket(&buckets, [3000, 3000])], [1024, 1024]);
        assert_eq!(buckets[nearest_bucket(&buckets, [2000, 3000])], [832, 1216]);
        assert_eq!(buckets[nearest_bucket(&buckets, [9000, 100])], *buckets.last().unwrap());
    }

    #[test]
    fn colours_change_within_bounds_and_by_the_seed() {
        let image = gradient(20, 10);
        let jitter = |amount, seed| jitter_colour(&image, amount, &mut noise::generator(seed, 0));
        assert_eq!(jitter(0.0, 1), image);
        assert_eq!(jitter(0.2, 1), jitter(0.2, 1));
        assert_ne!(jitter(0.2, 1), jitter(0.2, 2));
        let grey = Image::filled(4, 4, [100; 3]);
        let jittered = jitter_colour(&grey, 0.2, &mut noise::generator(1, 0));
        assert!(jittered.rgb.iter().all(|value| (79..=121).contains(value)), "{:?}", jittered.rgb);
    }
}
