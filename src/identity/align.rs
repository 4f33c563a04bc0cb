//! Alignment: the similarity that brings five landmarks onto the ArcFace template, and the warp.
//!
//! The least-squares similarity of Umeyama (1991) with its guard against reflection. In the plane it has a closed
//! form: with points as complex numbers, q ≈ a·p + b, a = Σ (q − q̄)·conj(p − p̄) / Σ |p − p̄|², b = q̄ − a·p̄.

use crate::image::Image;

/// Side of an aligned face in pixels.
pub const SIDE: usize = 112;

/// Where eyes, nose and mouth corners lie in a 112×112 face: left eye, right eye, nose, left and right mouth corner
/// as seen in the image. insightface, `utils/face_align.py`, `arcface_dst`.
pub const TEMPLATE: [[f32; 2]; 5] =
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]];

/// Where eyes, nose and mouth corners lie in a face of `side`×`side` pixels: [`TEMPLATE`] enlarged, in multiples of
/// 128 with a margin of 8 pixels at each side, as insightface's `estimate_norm` has it.
fn template(side: usize) -> [[f32; 2]; 5] {
    let (unit, shift) =
        if !side.is_multiple_of(SIDE) && side.is_multiple_of(128) { (128, 8.0) } else { (SIDE, 0.0) };
    let scale = side as f32 / unit as f32;
    TEMPLATE.map(|[x, y]| [(x + shift) * scale, y * scale])
}

/// The face whose landmarks are `points`, turned and scaled onto the template of `side`×`side` pixels, bilinear, black
/// beyond the image's edge. Recognisers take [`SIDE`].
pub fn align(image: &Image, points: &[[f32; 2]; 5], side: usize) -> Image {
    warp(image, &Similarity::fit(points, &template(side)), side)
}

/// The square of `side`×`side` pixels that `similarity` brings `image` to, bilinear, black beyond its edge.
pub(super) fn warp(image: &Image, similarity: &Similarity, side: usize) -> Image {
    let mut rgb = Vec::with_capacity(side * side * 3);
    for v in 0..side {
        for u in 0..side {
            let (x, y) = similarity.invert(u as f64, v as f64);
            rgb.extend(bilinear(image, x, y));
        }
    }
    Image { width: side, height: side, rgb }
}

/// (x, y) ↦ (a·x − b·y + tx, b·x + a·y + ty): rotation, one scale and a shift.
#[derive(Clone, Copy, Debug)]
pub struct Similarity {
    /// Scale times the cosine of the angle.
    pub a: f64,
    /// Scale times the sine of the angle.
    pub b: f64,
    /// Shift to the right.
    pub tx: f64,
    /// Shift downwards.
    pub ty: f64,
}

impl Similarity {
    /// The similarity that brings `from` nearest to `to` in the sum of squared distances.
    pub fn fit(from: &[[f32; 2]; 5], to: &[[f32; 2]; 5]) -> Self {
        let mean = |points: &[[f32; 2]; 5], axis: usize| {
            points.iter().map(|p| f64::from(p[axis])).sum::<f64>() / 5.0
        };
        let (px, py, qx, qy) = (mean(from, 0), mean(from, 1), mean(to, 0), mean(to, 1));
        let (mut a, mut b, mut spread) = (0.0, 0.0, 0.0);
        for (p, q) in from.iter().zip(to) {
            let (x, y) = (f64::from(p[0]) - px, f64::from(p[1]) - py);
            let (u, v) = (f64::from(q[0]) - qx, f64::from(q[1]) - qy);
            a += x * u + y * v;
            b += x * v - y * u;
            spread += x * x + y * y;
        }
        // Five points in one place fit any similarity; a tiny spread keeps the numbers finite.
        let spread = spread.max(1e-12);
        let (a, b) = (a / spread, b / spread);
        Self { a, b, tx: qx - a * px + b * py, ty: qy - b * px - a * py }
    }

    /// The point that is brought to (`u`, `v`).
    pub fn invert(&self, u: f64, v: f64) -> (f64, f64) {
        let (u, v) = (u - self.tx, v - self.ty);
        let square = (self.a * self.a + self.b * self.b).max(1e-24);
        ((self.a * u + self.b * v) / square, (self.a * v - self.b * u) / square)
    }
}

/// The colour at (`x`, `y`), where whole numbers are the centres of pixels; neighbours outside count as black.
fn bilinear(image: &Image, x: f64, y: f64) -> [u8; 3] {
    let (left, top) = (x.floor(), y.floor());
    let (fx, fy) = (x - left, y - top);
    let mut sum = [0.0; 3];
    for (dy, wy) in [(0.0, 1.0 - fy), (1.0, fy)] {
        for (dx, wx) in [(0.0, 1.0 - fx), (1.0, fx)] {
            let (x, y) = (left + dx, top + dy);
            if x >= 0.0 && y >= 0.0 && x < image.width as f64 && y < image.height as f64 {
                let pixel = image.pixel(x as usize, y as usize);
                for (sum, value) in sum.iter_mut().zip(pixel) {
                    *sum += wx * wy * f64::from(value);
                }
            }
        }
    }
    sum.map(|value| value.round() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turned_and_scaled_template_is_found_again() {
        let turned = TEMPLATE.map(|[x, y]| [3.0 * x + 2.0 * y - 40.0, -2.0 * x + 3.0 * y + 7.0]);
        let fit = Similarity::fit(&TEMPLATE, &turned);
        assert!((fit.a - 3.0).abs() < 1e-5 && (fit.b + 2.0).abs() < 1e-5, "{fit:?}");
        assert!((fit.tx + 40.0).abs() < 1e-3 && (fit.ty - 7.0).abs() < 1e-3, "{fit:?}");
        let (x, y) = fit.invert(f64::from(turned[2][0]), f64::from(turned[2][1]));
        assert!((x - 56.0252).abs() < 1e-3 && (y - 71.7366).abs() < 1e-3);
    }

    #[test]
    fn a_face_that_lies_on_the_template_is_only_cut_out() {
        let rgb = (0..150 * 130 * 3).map(|at| (at * 31 % 256) as u8).collect();
        let image = Image { width: 150, height: 130, rgb };
        let points = TEMPLATE.map(|[x, y]| [x + 20.0, y + 10.0]);
        assert_eq!(align(&image, &points, SIDE), image.crop(20, 10, SIDE, SIDE));
    }

    #[test]
    fn multiples_of_128_have_a_margin_at_the_sides() {
        assert_eq!(template(224)[2], TEMPLATE[2].map(|at| 2.0 * at));
        assert_eq!(template(512)[2], [4.0 * (TEMPLATE[2][0] + 8.0), 4.0 * TEMPLATE[2][1]]);
        assert_eq!(template(896)[2], TEMPLATE[2].map(|at| 8.0 * at));
    }

    #[test]
    fn landmarks_in_one_place_give_a_image_and_no_panic() {
        let image = Image::filled(8, 8, [1, 2, 3]);
        assert_eq!(align(&image, &[[4.0, 4.0]; 5], SIDE).width, SIDE);
    }
}
