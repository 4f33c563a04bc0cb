//! Products with the factors of a LoRA, whose rank is far smaller than their other sides.
//!
//! All read the long operand once, where it lies: packing it would take as long as the product.

use crate::layers::cpu::{self, Shared};
use crate::layers::gemm::isa::{self, ElemType};
use crate::layers::gemm::microkernel::{self, MR, NR, Tile};

/// Sizes of a product between (rows, width) and (rank, width).
#[derive(Clone, Copy)]
pub(in crate::layers) struct SkinnyGemm {
    pub rows: usize,
    pub width: usize,
    pub rank: usize,
    /// Whether it runs on all threads.
    pub parallel: bool,
}

/// Largest rank that pays; wider factors are for a general product.
const LARGEST_RANK: usize = 32;

impl SkinnyGemm {
    /// Whether these kernels take it.
    pub(in crate::layers) fn fits(self) -> bool {
        isa::has_avx512()
            && (1..=LARGEST_RANK).contains(&self.rank)
            && self.width > 0
            && self.width.is_multiple_of(NR)
            && self.rows > 0
    }

    /// scale · x·factorᵀ for `x` (rows, width) and `factor` (R, width) → (rows, R), and then zeros up to a whole tile.
    pub(in crate::layers) fn into_rank(self, x: &[f32], factor: &[f32], scale: f32) -> Vec<f32> {
        let Self { rows, width, rank, .. } = self;
        assert!(self.fits() && x.len() >= rows * width && factor.len() >= rank * width);
        let mut h = vec![0f32; rows.next_multiple_of(MR) * rank];
        let together = self.rows_of_a_task();
        self.for_chunks(&mut h[..rows * rank], together * rank, |i, h| {
            let x = &x[i * together * width..][..h.len() / rank * width];
            // SAFETY: `fits` has seen to AVX-512.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                x86::dots(x, factor, width, rank, scale, h);
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = (x, h, factor, scale);
        });
        h
    }

    /// Adds h·factor to `out` (rows, width); `h` as [`SkinnyGemm::into_rank`] gives it, `factor` (R, width).
    pub(in crate::layers) fn add_from_rank(self, h: &[f32], factor: &[f32], out: &mut [f32]) {
        let Self { rows, width, rank, .. } = self;
        assert!(self.fits() && h.len() >= rows.next_multiple_of(MR) * rank && factor.len() >= rank * width);
        let together = self.rows_of_a_task();
        self.for_chunks(&mut out[..rows * width], together * width, |task, out| {
            let count = out.len() / width;
            for i in (0..count).step_by(MR) {
                let left = h[(task * together + i) * rank..].as_ptr().cast();
                for j in (0..width).step_by(NR) {
                    // SAFETY: `h` has whole tiles of rows, and the panels part the columns.
                    unsafe {
                        microkernel::compute(
                            ElemType::F32,
                            &Tile {
                                rows: MR.min(count - i),
                                columns: NR,
                                depth: rank,
                                left,
                                step: rank,
                                right: factor[j..].as_ptr().cast(),
                                right_step: width,
                                out: out[i * width + j..].as_mut_ptr(),
                                row: width,
                                add: true,
                            },
                        );
                    }
                }
            }
        });
    }

    /// hᵀ·x (R, width), the gradient of the factor; `h` (rows, R), `x` (rows, width).
    pub(in crate::layers) fn factor_gradient(self, h: &[f32], x: &[f32]) -> Vec<f32> {
        let Self { rows, width, rank, .. } = self;
        assert!(self.fits() && h.len() >= rows * rank && x.len() >= rows * width);
        let turned = transposed(&h[..rows * rank], rank, rank.next_multiple_of(MR));
        let mut gradient = vec![0f32; rank * width];
        let out = Shared::new(gradient.as_mut_ptr());
        let panel = |j: usize| {
            let j = j * NR;
            for r in (0..rank).step_by(MR) {
                // SAFETY: `turned` has whole tiles of rows, and each panel writes its own columns.
                unsafe {
                    microkernel::compute(
                        ElemType::F32,
                        &Tile {
                            rows: MR.min(rank - r),
                            columns: NR,
                            depth: rows,
                            left: turned[r * rows..].as_ptr().cast(),
                            step: rows,
                            right: x[j..].as_ptr().cast(),
                            right_step: width,
                            out: out.get().add(r * width + j),
                            row: width,
                            add: false,
                        },
                    );
                }
            }
        };
        match self.parallel {
            true => cpu::for_each(width / NR, panel),
            false => (0..width / NR).for_each(panel),
        }
        gradient
    }

    /// Whole tiles, and some tasks for each thread.
    fn rows_of_a_task(self) -> usize {
        self.rows.div_ceil(4 * cpu::threads()).next_multiple_of(MR)
    }

    fn for_chunks(self, out: &mut [f32], size: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
        match self.parallel {
            true => cpu::for_chunks(out, size, work),
            false => out.chunks_mut(size).enumerate().for_each(|(i, out)| work(i, out)),
        }
    }
}

/// (rows, width) → (width, rows), and then zeros up to `height` rows.
pub(in crate::layers) fn transposed(x: &[f32], width: usize, height: usize) -> Vec<f32> {
    let rows = x.len() / width;
    let mut turned = vec![0f32; height * rows];
    for (i, row) in x.chunks_exact(width).enumerate() {
        row.iter().enumerate().for_each(|(j, value)| turned[j * rows + i] = *value);
    }
    turned
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Rows of the factor at once; with three rows of x, 24 sums.
    const FACTORS: usize = 8;

    /// scale · x·factorᵀ for the rows of `x`.
    ///
    /// # Safety
    /// The processor has AVX-512; `width` is a multiple of 16, and the slices have the sizes that it tells.
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
    pub(in crate::layers) unsafe fn dots(
        x: &[f32],
        factor: &[f32],
        width: usize,
        rank: usize,
        scale: f32,
        h: &mut [f32],
    ) {
        let rows = h.len() / rank;
        for first in (0..rank).step_by(FACTORS) {
            let count = FACTORS.min(rank - first);
            let factor = &factor[first * width..][..count * width];
            let mut i = 0;
            while i < rows {
                let (x, h) = (&x[i * width..], &mut h[i * rank + first..]);
                // SAFETY: there are so many rows left.
                unsafe {
                    if rows - i >= 3 {
                        some::<3>(x, factor, width, [rank, count], scale, h);
                        i += 3;
                    } else {
                        some::<1>(x, factor, width, [rank, count], scale, h);
                        i += 1;
                    }
                }
            }
        }
    }

    /// The same for `M` rows and `count` of `rank` factors.
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
    unsafe fn some<const M: usize>(
        x: &[f32],
        factor: &[f32],
        width: usize,
        [rank, count]: [usize; 2],
        scale: f32,
        h: &mut [f32],
    ) {
        assert!(x.len() >= M * width && factor.len() >= count * width);
        // The last row once more where there are fewer than eight.
        let mut factors = [factor.as_ptr(); FACTORS];
        for (r, start) in factors.iter_mut().enumerate() {
            *start = factor[r.min(count - 1) * width..].as_ptr();
        }
        let mut sums = [[_mm512_setzero_ps(); FACTORS]; M];
        for j in (0..width).step_by(16) {
            // SAFETY: the assertion.
            unsafe {
                let mut values = [_mm512_setzero_ps(); M];
                for (i, values) in values.iter_mut().enumerate() {
                    *values = _mm512_loadu_ps(x.as_ptr().add(i * width + j));
                }
                for (r, factor) in factors.iter().enumerate() {
                    let factor = _mm512_loadu_ps(factor.add(j));
                    for (sums, values) in sums.iter_mut().zip(&values) {
                        sums[r] = _mm512_fmadd_ps(*values, factor, sums[r]);
                    }
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate().take(count) {
                h[i * rank + r] = scale * _mm512_reduce_add_ps(*sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 251) as f32 / 128.0 - 0.98).collect()
    }

    /// Σ a · b over what `at` tells of each step.
    fn naive(steps: usize, at: impl Fn(usize) -> (f32, f32)) -> f32 {
        (0..steps).map(at).map(|(a, b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
    }

    #[test]
    fn they_are_the_naive_sums() {
        for (rows, width, rank) in [(1, 32, 1), (13, 64, 8), (100, 96, 5), (40, 32, 17), (7, 64, 32)] {
            let thin = SkinnyGemm { rows, width, rank, parallel: true };
            if !thin.fits() {
                eprintln!("skipped: no AVX-512 here");
                return;
            }
            let (x, factor, start) =
                (values(rows * width, 1), values(rank * width, 2), values(rows * width, 3));
            let near = |a: f32, b: f32| assert!((a - b).abs() < 1e-3, "{rows}×{width}×{rank}: {a} {b}");
            let h = thin.into_rank(&x, &factor, 0.5);
            for i in 0..rows {
                for r in 0..rank {
                    let sum = naive(width, |j| (x[i * width + j], factor[r * width + j]));
                    near(h[i * rank + r], 0.5 * sum);
                }
            }
            let mut out = start.clone();
            thin.add_from_rank(&h, &factor, &mut out);
            for i in 0..rows {
                for j in 0..width {
                    let sum: f32 = naive(rank, |r| (h[i * rank + r], factor[r * width + j]));
                    assert!(
                        (out[i * width + j] - start[i * width + j] - sum).abs() < 1e-2 + 1e-5 * sum.abs()
                    );
                }
            }
            let gradient = thin.factor_gradient(&h, &x);
            for r in 0..rank {
                for j in 0..width {
                    let sum = naive(rows, |i| (h[i * rank + r], x[i * width + j]));
                    assert!((gradient[r * width + j] - sum).abs() < 1e-2 + 1e-5 * sum.abs());
                }
            }
        }
    }
}
