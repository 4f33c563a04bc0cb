//! Resizing with Pillow's numbers, bit for bit: CLIP's and the detector's published pre-processing is defined by it
//! (`src/libImaging/Resample.c`: two passes, each rounded to bytes).

use std::borrow::Cow;

use super::Image;

/// How [`Image::resize`] weighs its neighbours; both widen when they shrink an image (antialiasing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Triangle, Pillow's `BILINEAR`.
    Bilinear,
    /// Keys' cubic with a = −0.5, Pillow's `BICUBIC`.
    Bicubic,
}

impl Image {
    /// The image at another size, equal to Pillow's `resize` bit for bit.
    pub fn resize(&self, width: usize, height: usize, filter: Filter) -> Self {
        assert!(width > 0 && height > 0, "an image has at least one pixel");
        let mut image = Cow::Borrowed(self);
        if width != self.width {
            let taps = taps(self.width, width, filter);
            let mut rgb = vec![0; width * self.height * 3];
            for (row, out) in image.rgb.chunks_exact(self.width * 3).zip(rgb.chunks_exact_mut(width * 3)) {
                for (pixel, (first, weights)) in out.chunks_exact_mut(3).zip(&taps) {
                    let mut sums = [HALF; 3];
                    for (from, weight) in row[first * 3..].chunks_exact(3).zip(weights) {
                        for (sum, &value) in sums.iter_mut().zip(from) {
                            *sum += weight * i32::from(value);
                        }
                    }
                    pixel.copy_from_slice(&sums.map(to_byte));
                }
            }
            image = Cow::Owned(Self { width, height: self.height, rgb });
        }
        if height != self.height {
            let taps = taps(self.height, height, filter);
            let stride = width * 3;
            let mut rgb = vec![0; stride * height];
            let mut sums = vec![0; stride];
            for (out, (first, weights)) in rgb.chunks_exact_mut(stride).zip(&taps) {
                sums.fill(HALF);
                for (row, weight) in image.rgb[first * stride..].chunks_exact(stride).zip(weights) {
                    for (sum, &value) in sums.iter_mut().zip(row) {
                        *sum += weight * i32::from(value);
                    }
                }
                out.iter_mut().zip(&sums).for_each(|(out, &sum)| *out = to_byte(sum));
            }
            image = Cow::Owned(Self { width, height, rgb });
        }
        image.into_owned()
    }
}

/// Fixed-point bits of Pillow's weights: 32 − 8 for the byte − 2 for headroom.
const WEIGHT_BITS: u32 = 22;

/// For each output pixel the first input pixel that it reads and the weights from there on (`precompute_coeffs`).
fn taps(from: usize, to: usize, filter: Filter) -> Vec<(usize, Vec<i32>)> {
    let scale = from as f64 / to as f64;
    let spread = scale.max(1.0);
    let support = spread * if filter == Filter::Bicubic { 2.0 } else { 1.0 };
    (0..to)
        .map(|out| {
            let centre = (out as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let mut weights: Vec<f64> =
                (first..end).map(|at| kernel((at as f64 - centre + 0.5) * (1.0 / spread), filter)).collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            let one = f64::from(1 << WEIGHT_BITS);
            // Rounds half away from zero, as the C code does by adding ±0.5 and cutting.
            let fixed =
                weights.iter().map(|weight| (weight * one + 0.5f64.copysign(*weight)) as i32).collect();
            (first, fixed)
        })
        .collect()
}

fn kernel(x: f64, filter: Filter) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    match filter {
        Filter::Bilinear if x < 1.0 => 1.0 - x,
        Filter::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
        _ => 0.0,
    }
}

/// A half in fixed point, so that [`to_byte`] rounds.
const HALF: i32 = 1 << (WEIGHT_BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}
