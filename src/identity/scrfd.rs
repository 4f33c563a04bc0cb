//! SCRFD (Guo et al. 2021, arXiv 2105.04714) as InsightFace's packs carry it: its letterbox, its nine outputs and its
//! suppression, after `python-package/insightface/model_zoo/scrfd.py`.
//!
//! Outputs are scores, boxes and points, each for every stride. Cell (c, r) of stride s has its anchors at
//! (c·s, r·s), without half a cell; box = [x − l·s, y − t·s, x + r·s, y + b·s], point = (x + dx·s, y + dy·s).

use anyhow::{Result, bail, ensure};

use super::face::Face;
use super::onnx::Network;
use super::onnx_header::Header;
use crate::image::Image;

/// Least score of a face.
pub(super) const MIN_SCORE: f32 = 0.5;

/// Faces that overlap more than this are one.
pub(super) const SAME_FACE: f32 = 0.4;

/// Strides and anchors of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    strides: &'static [usize],
    anchors: usize,
}

impl Layout {
    /// Architecture by the number of outputs, as in insightface.
    ///
    /// # Errors
    /// Other numbers of outputs, and files without landmarks.
    pub fn of(header: &Header) -> Result<Self> {
        match header.outputs.len() {
            9 => Ok(Self { strides: &[8, 16, 32], anchors: 2 }),
            15 => Ok(Self { strides: &[8, 16, 32, 64, 128], anchors: 1 }),
            count @ (6 | 10) => {
                bail!(
                    "its {count} outputs have no landmarks; take a file whose name ends in `bnkps` or `kps`"
                )
            }
            count => {
                let names: Vec<String> = header.outputs.iter().map(ToString::to_string).collect();
                bail!("it has {count} outputs ({}), SCRFD with landmarks has 9 or 15", names.join(", "))
            }
        }
    }

    /// All anchors as candidates in pixels of the square input with `side` pixels, those of `least` or more, best
    /// first; the very best however low its score.
    ///
    /// # Errors
    /// Names the output whose length does not fit.
    pub fn decode(
        &self,
        network: &Network,
        outputs: &[Vec<f32>],
        side: usize,
        least: f32,
    ) -> Result<Vec<Face>> {
        let levels = self.strides.len();
        let mut faces = Vec::new();
        let mut best: Option<Face> = None;
        for (level, &stride) in self.strides.iter().enumerate() {
            let columns = side / stride;
            let cells = columns * columns * self.anchors;
            for (kind, numbers) in [(0, 1), (1, 4), (2, 10)] {
                let at = kind * levels + level;
                ensure!(
                    outputs[at].len() == cells * numbers,
                    "its output `{}` has {} numbers for {side}×{side} pixels, wanted {cells}·{numbers} (stride {stride})",
                    network.output_names()[at],
                    outputs[at].len()
                );
            }
            let [scores, bounds, points] = [0, 1, 2].map(|kind| &outputs[kind * levels + level]);
            let s = stride as f32;
            for (anchor, &score) in scores.iter().enumerate() {
                if score < least && best.as_ref().is_some_and(|best| score <= best.score) {
                    continue;
                }
                let cell = anchor / self.anchors;
                let (x, y) = ((cell % columns) as f32 * s, (cell / columns) as f32 * s);
                let b = &bounds[anchor * 4..][..4];
                let k = &points[anchor * 10..][..10];
                let face = Face {
                    bounds: [x - b[0] * s, y - b[1] * s, x + b[2] * s, y + b[3] * s],
                    points: std::array::from_fn(|i| [x + k[2 * i] * s, y + k[2 * i + 1] * s]),
                    score,
                };
                if best.as_ref().is_none_or(|best| score > best.score) {
                    best = Some(face.clone());
                }
                if score >= least {
                    faces.push(face);
                }
            }
        }
        if faces.is_empty() {
            faces.extend(best);
        }
        faces.sort_by(|a, b| b.score.total_cmp(&a.score));
        Ok(faces)
    }
}

/// The image at the upper left of a black square of `frame` pixels, its longer side `size` pixels long, and how many
/// pixels of the square one of its own became.
pub(super) fn letterbox(image: &Image, size: usize, frame: usize) -> (Image, f32) {
    let (w, h) = (image.width as f64, image.height as f64);
    let ratio = h / w;
    let (width, height) = if ratio > 1.0 {
        (((size as f64 / ratio) as usize).max(1), size)
    } else {
        (size, ((size as f64 * ratio) as usize).max(1))
    };
    let mut framed = Image::filled(frame, frame, [0; 3]);
    framed.paste(&bilinear(image, width, height), 0, 0);
    (framed, (height as f64 / h) as f32)
}

/// Bilinear without antialiasing, pixel centres at halves, in the fixed point of OpenCV's `resize` of bytes
/// (`modules/imgproc/src/resize.cpp`: factors of 11 bits, sums cut to 16): the detector has seen images that were made
/// small in this way, and a random network moves faces by a pixel when grey levels are rounded otherwise.
fn bilinear(image: &Image, width: usize, height: usize) -> Image {
    // The two pixels around a place, and their factors in 1/2048.
    let taps = |from: usize, to: usize| -> Vec<([usize; 2], [i32; 2])> {
        let scale = from as f64 / to as f64;
        (0..to)
            .map(|at| {
                let x = (((at as f64 + 0.5) * scale - 0.5) as f32).clamp(0.0, (from - 1) as f32);
                let (first, share) = (x as usize, x.fract());
                let factors = [1.0 - share, share].map(|share| (share * 2048.0).round_ties_even() as i32);
                ([first, (first + 1).min(from - 1)], factors)
            })
            .collect()
    };
    let (columns, rows) = (taps(image.width, width), taps(image.height, height));
    let mut rgb = Vec::with_capacity(width * height * 3);
    for (lines, shares) in &rows {
        for (places, factors) in &columns {
            let corners = lines.map(|y| places.map(|x| image.pixel(x, y)));
            rgb.extend((0..3).map(|c| {
                let along = corners.map(|[a, b]| i32::from(a[c]) * factors[0] + i32::from(b[c]) * factors[1]);
                let parts = [0, 1].map(|line| (shares[line] * (along[line] >> 4)) >> 16);
                ((parts[0] + parts[1] + 2) >> 2) as u8
            }));
        }
    }
    Image { width, height, rgb }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_letterbox_keeps_proportions_and_lies_at_the_upper_left() {
        let (framed, scale) = letterbox(&Image::filled(200, 100, [9; 3]), 64, 96);
        assert_eq!((framed.width, framed.height, scale), (96, 96, 0.32));
        assert_eq!(
            (framed.pixel(63, 31), framed.pixel(64, 31), framed.pixel(63, 32)),
            ([9; 3], [0; 3], [0; 3])
        );
        assert_eq!(letterbox(&Image::filled(1, 5000, [9; 3]), 64, 64).0.pixel(0, 63), [9; 3]);
    }

    #[test]
    fn halving_takes_the_mean_of_two_and_no_more() {
        let rgb = [0u8, 100, 200, 40].iter().flat_map(|&value| [value; 3]).collect();
        let image = Image { width: 4, height: 1, rgb };
        assert_eq!(bilinear(&image, 2, 1).rgb, [50, 50, 50, 120, 120, 120]);
    }
}
