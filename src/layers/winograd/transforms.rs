//! The transforms of Winograd's convolution: pixels, kernels and products to the six points and back, 16 at a time.

use super::{PATCH, POINTS, TAPS, TILE};
use crate::layers::cpu;
use crate::layers::gemm::microkernel::{MR, NR, STRIDE};

/// √½ and √2: with their negatives, 0 and ∞, where the polynomials are evaluated.
const A: f32 = std::f32::consts::FRAC_1_SQRT_2;
const B: f32 = std::f32::consts::SQRT_2;

/// Bᵀ d: the values at the six points of what stands in six places.
#[inline(always)]
fn to_points(d: [f32; PATCH]) -> [f32; PATCH] {
    let (even, odd) = (d[4] - d[2] * 2.0, (d[3] - d[1] * 2.0) * A);
    let (even_2, odd_2) = (d[4] - d[2] * 0.5, (d[3] - d[1] * 0.5) * B);
    [
        d[0] + d[4] - d[2] * 2.5,
        even + odd,
        even - odd,
        even_2 + odd_2,
        even_2 - odd_2,
        d[1] + d[5] - d[3] * 2.5,
    ]
}

/// G g: likewise of the three places of a kernel.
#[inline(always)]
fn kernel_to_points(g: [f32; 3]) -> [f32; PATCH] {
    let (even, odd) = ((g[0] + g[2] * 0.5) * (-2.0 / 3.0), g[1] * (-2.0 / 3.0 * A));
    let (even_2, odd_2) = ((g[0] + g[2] * 2.0) * (1.0 / 6.0), g[1] * (B / 6.0));
    [g[0], even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, g[2]]
}

/// Aᵀ m: the four pixels of products at the six points.
#[inline(always)]
fn from_points(m: [f32; PATCH]) -> [f32; TILE] {
    let (even, odd) = (m[1] + m[2], (m[1] - m[2]) * A);
    let (even_2, odd_2) = (m[3] + m[4], (m[3] - m[4]) * B);
    [m[0] + even + even_2, odd + odd_2, even * 0.5 + even_2 * 2.0, odd * 0.5 + odd_2 * 2.0 + m[5]]
}

/// A value for each of 16 tiles or kernels; the innermost loops below run over them, in vectors.
pub(super) type Lanes = [f32; 16];

cpu::vectorised! {
    /// Sorts a row by the remainder of places to 4, with `pad` (at most 2) zeros before it and as many as there is room
    /// for behind.
    pub(super) fn sort(row: &[f32], pad: usize, to: &mut [f32]) {
        let length = to.len() / TILE;
        let (a, rest) = to.split_at_mut(length);
        let (b, rest) = rest.split_at_mut(length);
        let (c, d) = rest.split_at_mut(length);
        // The first four, all that are whole, and the last ones.
        let (head, rest) = row.split_at(row.len().min(TILE - pad));
        let mut first = [0f32; TILE];
        first[pad..][..head.len()].copy_from_slice(head);
        [a[0], b[0], c[0], d[0]] = first;
        let (whole, tail) = rest.as_chunks::<TILE>();
        let whole = &whole[..whole.len().min(length - 1)];
        let end = whole.len() + 1;
        let places = a[1..end].iter_mut().zip(&mut b[1..end]).zip(&mut c[1..end]).zip(&mut d[1..end]);
        for ((((a, b), c), d), four) in places.zip(whole) {
            [*a, *b, *c, *d] = *four;
        }
        for (k, places) in [a, b, c, d].into_iter().enumerate() {
            if end < length {
                places[end] = tail.get(k).copied().unwrap_or(0.0);
                places[end + 1..].fill(0.0);
            }
        }
    }
}

cpu::vectorised! {
    /// Bᵀ d B of 16 patches.
    #[allow(clippy::needless_range_loop)] // Plain loops over lanes become vectors.
    pub(super) fn transform_patch(patch: &[[u32; 16]; POINTS], points: &mut [Lanes; POINTS]) {
        let mut half = [[0f32; 16]; POINTS];
        for j in 0..PATCH {
            for lane in 0..16 {
                let at = |i: usize| f32::from_bits(patch[i * PATCH + j][lane]);
                let column = to_points([at(0), at(1), at(2), at(3), at(4), at(5)]);
                for i in 0..PATCH {
                    half[i * PATCH + j][lane] = column[i];
                }
            }
        }
        for i in 0..PATCH {
            for lane in 0..16 {
                let at = |j: usize| half[i * PATCH + j][lane];
                let row = to_points([at(0), at(1), at(2), at(3), at(4), at(5)]);
                for j in 0..PATCH {
                    points[i * PATCH + j][lane] = row[j];
                }
            }
        }
    }
}

cpu::vectorised! {
    /// G g Gᵀ of 16 kernels; point `p` goes to `to[p · MR · STRIDE..]`.
    #[allow(clippy::needless_range_loop)] // Plain loops over lanes become vectors.
    pub(super) fn transform_kernels(taps: &[[u32; 16]; TAPS], turned: bool, to: &mut [u32]) {
        let mut half = [[0f32; 16]; 3 * PATCH];
        for j in 0..3 {
            let taps: [_; 3] = std::array::from_fn(|i| &taps[if turned { 8 - 3 * i - j } else { 3 * i + j }]);
            for lane in 0..16 {
                let at = |i: usize| f32::from_bits(taps[i][lane]);
                let column = kernel_to_points([at(0), at(1), at(2)]);
                for i in 0..PATCH {
                    half[i * 3 + j][lane] = column[i];
                }
            }
        }
        for i in 0..PATCH {
            let mut points = [[0u32; 16]; PATCH];
            for lane in 0..16 {
                let at = |j: usize| half[i * 3 + j][lane];
                let row = kernel_to_points([at(0), at(1), at(2)]);
                for j in 0..PATCH {
                    points[j][lane] = row[j].to_bits();
                }
            }
            for (j, values) in points.iter().enumerate() {
                to[(i * PATCH + j) * MR * STRIDE..][..16].copy_from_slice(values);
            }
        }
    }
}

cpu::vectorised! {
    /// Aᵀ m A + `start` of 16 tiles (6, 6, 32), as 4 rows of 16 · 4 pixels.
    #[allow(clippy::needless_range_loop)] // Plain loops over lanes become vectors.
    pub(super) fn transform_sums(sums: &[f32], start: f32, pixels: &mut [[f32; TILE * 16]; TILE]) {
        let mut half = [[0f32; 16]; TILE * PATCH];
        for j in 0..PATCH {
            let column: [&Lanes; PATCH] =
                std::array::from_fn(|i| sums[(i * PATCH + j) * NR..].first_chunk().expect("16 of 32 sums"));
            for lane in 0..16 {
                let at = |i: usize| column[i][lane];
                let column = from_points([at(0), at(1), at(2), at(3), at(4), at(5)]);
                for i in 0..TILE {
                    half[i * PATCH + j][lane] = column[i];
                }
            }
        }
        for i in 0..TILE {
            let mut row = [[0f32; 16]; TILE];
            for lane in 0..16 {
                let at = |j: usize| half[i * PATCH + j][lane];
                let four = from_points([at(0), at(1), at(2), at(3), at(4), at(5)]);
                for j in 0..TILE {
                    row[j][lane] = four[j] + start;
                }
            }
            for lane in 0..16 {
                for j in 0..TILE {
                    pixels[i][TILE * lane + j] = row[j][lane];
                }
            }
        }
    }
}
