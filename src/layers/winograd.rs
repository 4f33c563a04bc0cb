//! Convolution with kernels of 3 × 3 by Winograd's minimal filtering, F(4 × 4, 3 × 3): 36 products for 16 pixels and a
//! channel, where sums over patches take 144.
//!
//! Y = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A for tiles Y of 4 × 4 pixels, patches d of 6 × 6 and kernels g (Lavin and Gray
//! 2016, arXiv 1509.09308). The polynomials behind it are evaluated at 0, ±√½, ±√2 and ∞, not at 0, ±1, ±2 and ∞ as there:
//! pairs ±p, ±1/p make less than half the error (Alam et al. 2022, "Winograd Convolution for Deep Neural Networks:
//! Efficient Point Selection", ACM TECS 21).
//!
//! For some hundred tiles at a time the patches are transformed into 36 matrices (channels × tiles); then the kernels are
//! transformed, 12 rows of them after the other and never all, matmul by those matrices, and what comes out is
//! transformed back while it is in the cache. Every sum is taken in the same order whatever the number of threads.

mod transforms;

use std::cell::RefCell;
use std::ops::Range;

use self::transforms::{Lanes, sort, transform_kernels, transform_patch, transform_sums};
use crate::layers::cpu::{self, Shared, Weight};
use crate::layers::gemm::isa::ElemType;
use crate::layers::gemm::microkernel::{self, DEPTH, MR, NR, STRIDE, Tile};
use crate::layers::gemm::operands::as_stored;
use crate::layers::gemm::packing::{pack_gathered, pack_strided};

/// Side of a tile of the output.
const TILE: usize = 4;
/// Side of the patch that it is made of.
const PATCH: usize = TILE + 2;
/// Values of a transformed patch: so many matrices are matmul.
const POINTS: usize = PATCH * PATCH;
/// Values of a kernel.
const TAPS: usize = 9;
/// Bytes of transformed patches that are in use at a time.
const CACHED: usize = 8 << 20;

/// The kernels of a convolution: that of row `r` and depth `d` are the 9 values from `r · row + d · depth` on.
pub(super) struct Kernels<'a> {
    weight: Weight<'a>,
    row: usize,
    depth: usize,
    turned: bool,
}

impl<'a> Kernels<'a> {
    /// Those of `weight` (out, in, 3, 3), as they stand.
    pub(super) fn forward(weight: Weight<'a>, c_in: usize) -> Self {
        Self { weight, row: c_in * TAPS, depth: TAPS, turned: false }
    }

    /// The same from outputs to inputs, turned around: what brings gradients back.
    pub(super) fn backward(weight: Weight<'a>, c_in: usize) -> Self {
        Self { weight, row: TAPS, depth: c_in * TAPS, turned: true }
    }

    /// Transforms those of `rows` and `depth`: point `p` of row `i` and depth `d` goes to
    /// `to[(p · MR + i) · STRIDE + d]`.
    fn transform(&self, rows: Range<usize>, depth: Range<usize>, to: &mut [u32]) {
        let mut taps = [[0u32; 16]; TAPS];
        for (i, row) in rows.enumerate() {
            for first in depth.clone().step_by(16) {
                let count = (depth.end - first).min(16);
                let start = |k: usize| row * self.row + (first + k) * self.depth;
                as_stored!(self.weight, values => {
                    let kernel = |k: usize| values[start(k)..start(k) + TAPS].as_ptr();
                    // SAFETY: every kernel has 9 values.
                    unsafe { pack_strided(ElemType::F32, count, TAPS, kernel, taps.as_flattened_mut(), 16) }
                });
                transform_kernels(&taps, self.turned, &mut to[i * STRIDE + first - depth.start..]);
            }
        }
    }
}

/// Sizes of a convolution with stride 1.
#[derive(Clone, Copy)]
pub(super) struct Winograd {
    pub b: usize,
    pub c_in: usize,
    pub c_out: usize,
    pub h: usize,
    pub w: usize,
    /// Zeros above and to the left.
    pub pad: usize,
    pub h_out: usize,
    pub w_out: usize,
}

/// Tiles that lie side by side in one row of one sample, among 16.
struct Run {
    lane: usize,
    count: usize,
    sample: usize,
    y: usize,
    x: usize,
}

/// Tiles that are computed together.
struct Part {
    /// The rows of tiles that they lie in, counted through all samples.
    rows: Range<usize>,
    /// Where the patches begin, 16 by 16 up to a multiple of 32: the last one once more where there are less, and what
    /// comes of it is not written.
    places: Vec<[u32; 16]>,
    /// The same tiles as runs.
    runs: Vec<Vec<Run>>,
}

impl Part {
    fn panels(&self) -> usize {
        self.places.len() / 2
    }
}

/// Memory of this thread, kept from call to call.
#[derive(Default)]
struct Scratch {
    patches: Vec<f32>,
    border: Vec<f32>,
    kernels: Vec<u32>,
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Winograd {
    fn tiles_high(&self) -> usize {
        self.h_out.div_ceil(TILE)
    }

    fn tiles_wide(&self) -> usize {
        self.w_out.div_ceil(TILE)
    }

    fn tiles(&self) -> usize {
        self.b * self.tiles_high() * self.tiles_wide()
    }

    /// Whether it is quicker than sums over patches: there are channels enough to make up for the transforms, and tiles
    /// enough that at most half of the products are left. A sample is judged by itself, so that it is computed alone as
    /// it is among others.
    pub(super) fn is_quicker(&self) -> bool {
        let direct = TAPS * self.h_out * self.w_out;
        let products = POINTS * (self.tiles_high() * self.tiles_wide()).next_multiple_of(NR);
        self.c_in.min(self.c_out) >= 32 && 2 * products <= direct
    }

    /// `x` (b, c_in, h, w), `bias` (c_out) or none → (b, c_out, h_out, w_out).
    pub(super) fn convolve(&self, x: &[f32], kernels: &Kernels, bias: &[f32]) -> Vec<f32> {
        assert!(x.len() == self.b * self.c_in * self.h * self.w);
        assert!(bias.is_empty() || bias.len() == self.c_out);
        let len = self.b * self.c_out * self.h_out * self.w_out;
        let mut out: Vec<f32> = Vec::with_capacity(len);
        let operands = Operands { x, kernels, bias, out: Shared::new(out.as_mut_ptr()) };
        let (tiles, threads) = (self.tiles(), cpu::threads());
        let most = (CACHED / (POINTS * 4 * self.c_in) / NR * NR).clamp(NR, 256);
        let parts = tiles.div_ceil(most);
        // Each thread takes tiles of its own where there are many, else rows of the same tiles.
        let apart = threads > 1 && parts >= 2 * threads;
        let parts = if apart { parts.next_multiple_of(threads) } else { parts };
        let count = tiles.div_ceil(parts).next_multiple_of(NR);
        let compute = |i: usize| {
            let part = self.part(i * count..((i + 1) * count).min(tiles));
            self.compute(&operands, &part, !apart);
        };
        if apart {
            cpu::for_each(tiles.div_ceil(count), compute);
        } else {
            (0..tiles.div_ceil(count)).for_each(compute);
        }
        // SAFETY: every pixel lies in a tile, and all tiles are written.
        unsafe { out.set_len(len) };
        out
    }

    /// Computes the tiles of `part`, in all channels, on this thread or `together` with the others.
    fn compute(&self, operands: &Operands, part: &Part, together: bool) {
        let for_each = |count: usize, work: &(dyn Fn(usize) + Sync)| {
            if together { cpu::for_each(count, work) } else { (0..count).for_each(work) }
        };
        // An odd number of cache lines, so that the 36 matrices lie in different sets of the cache.
        let step = part.panels() * self.c_in * NR + 16;
        let mut patches = SCRATCH.with_borrow_mut(|scratch| std::mem::take(&mut scratch.patches));
        patches.clear();
        patches.reserve(POINTS * step);
        let to = Shared::new(patches.as_mut_ptr());
        for_each(self.c_in.div_ceil(8), &|i| {
            let channels = 8 * i..(8 * (i + 1)).min(self.c_in);
            // SAFETY: the channels part the matrices, which have room for 36 · `step` values.
            unsafe { self.transform_patches(operands.x, part, channels, to, step) }
        });
        for_each(self.c_out.div_ceil(MR), &|i| {
            let rows = MR * i..(MR * (i + 1)).min(self.c_out);
            // SAFETY: all channels are transformed; the rows part the output.
            unsafe { self.multiply(operands, part, to, step, rows) }
        });
        SCRATCH.with_borrow_mut(|scratch| scratch.patches = patches);
    }

    /// `tiles` and where they lie.
    fn part(&self, tiles: Range<usize>) -> Part {
        let wide = self.tiles_wide();
        let rows = tiles.start / wide..(tiles.end - 1) / wide + 1;
        let end = tiles.start + tiles.len().next_multiple_of(NR);
        let place = |j: usize| {
            let j = j.min(tiles.end - 1);
            ((j / wide - rows.start) * PATCH * self.line() + j % wide) as u32
        };
        let places = (tiles.start..end).step_by(16).map(|j| std::array::from_fn(|lane| place(j + lane)));
        let run = |from: usize, lane: usize, end: usize| {
            let (row, x) = (from / wide, from % wide);
            let (sample, y) = (row / self.tiles_high(), row % self.tiles_high());
            Run { lane, count: (wide - x).min(end - from), sample, y: TILE * y, x: TILE * x }
        };
        let runs = tiles.clone().step_by(16).map(|first| {
            let end = (first + 16).min(tiles.end);
            let (mut runs, mut from) = (Vec::new(), first);
            while from < end {
                let run = run(from, from - first, end);
                from += run.count;
                runs.push(run);
            }
            runs
        });
        Part { rows: rows.clone(), places: places.collect(), runs: runs.collect() }
    }

    /// Values of a row of pixels with its border, sorted by the remainder of their columns to 4.
    fn line(&self) -> usize {
        TILE * (self.tiles_wide() + 1)
    }

    /// Transforms the patches of `part` in `channels`: point `p` of channel `c` and tile `j` goes to
    /// `to[p · step + (j / 32 · c_in + c) · 32 + j % 32]`.
    ///
    /// # Safety
    /// `to` has room for 36 · `step` values, and no one else uses these.
    unsafe fn transform_patches(
        &self,
        x: &[f32],
        part: &Part,
        channels: Range<usize>,
        to: Shared,
        step: usize,
    ) {
        let mut border = SCRATCH.with_borrow_mut(|scratch| std::mem::take(&mut scratch.border));
        // Each row of tiles has its 6 rows of pixels, sorted so that what 16 neighbouring tiles need lies together.
        let line = self.line();
        border.resize(part.rows.len() * PATCH * line, 0.0);
        let offsets: [usize; POINTS] = std::array::from_fn(|p| {
            let (i, j) = (p / PATCH, p % PATCH);
            i * line + j % TILE * (line / TILE) + j / TILE
        });
        let (mut patch, mut points) = ([[0u32; 16]; POINTS], [[0f32; 16]; POINTS]);
        for c in channels {
            for (row, lines) in part.rows.clone().zip(border.chunks_exact_mut(PATCH * line)) {
                let (sample, y) = (row / self.tiles_high(), row % self.tiles_high() * TILE);
                let plane = &x[(sample * self.c_in + c) * self.h * self.w..][..self.h * self.w];
                for (i, line) in lines.chunks_exact_mut(line).enumerate() {
                    match (y + i).checked_sub(self.pad).filter(|y| *y < self.h) {
                        Some(y) => sort(&plane[y * self.w..][..self.w], self.pad, line),
                        None => line.fill(0.0),
                    }
                }
            }
            for (half, places) in part.places.iter().enumerate() {
                // SAFETY: the places are tiles of these rows, which have 6 lines each; the caller's promise.
                unsafe {
                    pack_gathered(
                        ElemType::F32,
                        border.as_ptr(),
                        &offsets,
                        places,
                        patch.as_flattened_mut(),
                        16,
                    );
                    transform_patch(&patch, &mut points);
                    let to = to.get().add((half / 2 * self.c_in + c) * NR + half % 2 * 16);
                    for (point, values) in points.iter().enumerate() {
                        to.add(point * step).cast::<Lanes>().write(*values);
                    }
                }
            }
        }
        SCRATCH.with_borrow_mut(|scratch| scratch.border = border);
    }

    /// Computes `rows` of the output, at most 12 channels, for tiles whose patches are transformed.
    ///
    /// # Safety
    /// `patches` is what `transform_patches` has filled for all channels; no one else writes these rows.
    unsafe fn multiply(
        &self,
        operands: &Operands,
        part: &Part,
        patches: Shared,
        step: usize,
        rows: Range<usize>,
    ) {
        let Operands { kernels, bias, out, .. } = *operands;
        let panels = part.panels();
        let (mut transformed, mut sums) = SCRATCH.with_borrow_mut(|scratch| {
            (std::mem::take(&mut scratch.kernels), std::mem::take(&mut scratch.sums))
        });
        transformed.resize(POINTS * MR * STRIDE, 0);
        let panel_size = MR * POINTS * NR;
        if sums.len() < panels * panel_size {
            sums.resize(panels * panel_size, 0.0);
        }
        let deep = self.c_in.div_ceil(self.c_in.div_ceil(DEPTH)).next_multiple_of(16);
        for first in (0..self.c_in).step_by(deep) {
            let depth = first..(first + deep).min(self.c_in);
            kernels.transform(rows.clone(), depth.clone(), &mut transformed);
            for point in 0..POINTS {
                let left = transformed[point * MR * STRIDE..][..MR * STRIDE].as_ptr();
                for panel in 0..panels {
                    let sums =
                        sums[panel * panel_size + point * NR..][..panel_size - point * NR].as_mut_ptr();
                    // SAFETY: the caller's promise; the sums of each row have 36 · 32 places.
                    unsafe {
                        let right = patches.get().add(point * step + (panel * self.c_in + first) * NR);
                        microkernel::compute(
                            ElemType::F32,
                            &Tile {
                                rows: rows.len(),
                                columns: NR,
                                depth: depth.len(),
                                left,
                                step: STRIDE,
                                right: right.cast(),
                                right_step: NR,
                                out: sums,
                                row: POINTS * NR,
                                add: first > 0,
                            },
                        );
                    }
                }
            }
        }
        let mut pixels = [[0f32; TILE * 16]; TILE];
        for (half, runs) in part.runs.iter().enumerate() {
            let panel = &sums[half / 2 * panel_size..][..panel_size];
            for (row, sums) in rows.clone().zip(panel.chunks_exact(POINTS * NR)) {
                let start = bias.get(row).copied().unwrap_or(0.0);
                transform_sums(&sums[half % 2 * 16..], start, &mut pixels);
                for run in runs {
                    let plane = (run.sample * self.c_out + row) * self.h_out * self.w_out;
                    let width = (TILE * run.count).min(self.w_out - run.x);
                    for (i, line) in pixels.iter().enumerate().take(self.h_out - run.y) {
                        let line = &line[TILE * run.lane..][..width];
                        // SAFETY: the run lies in the image.
                        unsafe {
                            let to = out.get().add(plane + (run.y + i) * self.w_out + run.x);
                            std::ptr::copy_nonoverlapping(line.as_ptr(), to, width);
                        }
                    }
                }
            }
        }
        SCRATCH.with_borrow_mut(|scratch| (scratch.kernels, scratch.sums) = (transformed, sums));
    }
}

/// What a convolution computes with, and where to.
struct Operands<'a> {
    x: &'a [f32],
    kernels: &'a Kernels<'a>,
    bias: &'a [f32],
    out: Shared,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values as normal noise has, from a linear congruential generator.
    fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 2f32.sqrt()).collect()
    }

    /// The convolution in f64; `kernel(row, depth, tap)`.
    fn naive(s: &Winograd, x: &[f32], kernel: impl Fn(usize, usize, usize) -> f32, bias: &[f32]) -> Vec<f64> {
        let at = |sample: usize, c: usize, y: usize, x_: usize| {
            let (y, x_) = (y.wrapping_sub(s.pad), x_.wrapping_sub(s.pad));
            if y < s.h && x_ < s.w { f64::from(x[((sample * s.c_in + c) * s.h + y) * s.w + x_]) } else { 0.0 }
        };
        let mut out = Vec::new();
        for sample in 0..s.b {
            for row in 0..s.c_out {
                let kernel: Vec<f64> =
                    (0..s.c_in * TAPS).map(|k| f64::from(kernel(row, k / TAPS, k % TAPS))).collect();
                for pixel in 0..s.h_out * s.w_out {
                    let (y, x_) = (pixel / s.w_out, pixel % s.w_out);
                    let taps = kernel
                        .iter()
                        .enumerate()
                        .map(|(k, weight)| weight * at(sample, k / TAPS, y + k % TAPS / 3, x_ + k % 3));
                    out.push(taps.sum::<f64>() + bias.get(row).map_or(0.0, |b| f64::from(*b)));
                }
            }
        }
        out
    }

    fn sized(b: usize, c_in: usize, c_out: usize, h: usize, w: usize, pad: [usize; 2]) -> Winograd {
        let side = |side: usize| side + pad[0] + pad[1] - 2;
        Winograd { b, c_in, c_out, h, w, pad: pad[0], h_out: side(h), w_out: side(w) }
    }

    /// Root of the mean square, and the largest.
    fn size(values: impl Iterator<Item = f64>) -> (f64, f64) {
        let values: Vec<f64> = values.map(f64::abs).collect();
        let mean = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
        (mean.sqrt(), values.into_iter().fold(0.0, f64::max))
    }

    #[test]
    fn images_of_any_size_and_border_give_the_naive_sums() {
        for s in [
            sized(1, 1, 1, 1, 1, [1, 1]),
            sized(1, 3, 5, 7, 9, [1, 1]),
            sized(2, 17, 13, 16, 16, [1, 1]),
            sized(1, 300, 14, 6, 70, [1, 1]),
            sized(3, 20, 30, 9, 5, [0, 0]),
            sized(2, 5, 6, 4, 4, [2, 2]),
            sized(1, 4, 4, 5, 8, [0, 1]),
            sized(1, 40, 25, 40, 136, [1, 0]),
        ] {
            let Winograd { b, c_in, c_out, h, w, .. } = s;
            let (x, bias) = (noise(b * c_in * h * w, 1), noise(c_out, 2));
            let weight = noise(c_in * c_out * TAPS, 3);
            let compare = |got: Vec<f32>, expected: Vec<f64>, which: &str| {
                let apart = size(got.iter().zip(&expected).map(|(a, b)| f64::from(*a) - b)).1;
                let most = 5e-6 * size(expected.into_iter()).1;
                assert!(apart < most, "{which} {c_in}×{h}×{w}: {apart:.1e}, wanted {most:.1e}");
            };
            let kernels = Kernels::forward(Weight::F32(&weight), c_in);
            let kernel = |row, depth, tap| weight[(row * c_in + depth) * TAPS + tap];
            compare(s.convolve(&x, &kernels, &bias), naive(&s, &x, kernel, &bias), "forward");
            let kernels = Kernels::backward(Weight::F32(&weight), c_out);
            let kernel = |row, depth, tap| weight[(depth * c_out + row) * TAPS + 8 - tap];
            compare(s.convolve(&x, &kernels, &[]), naive(&s, &x, kernel, &[]), "backward");
        }
    }

    #[test]
    fn the_error_on_noise_is_a_few_times_that_of_sums_over_patches() {
        // Of the size of the results; with 320 channels sums over patches in f32 make 4e-7, at most 2e-6. The points
        // 0, ±1, ±2 would make 3.5e-6 and up to 5e-5.
        let s = sized(1, 320, 32, 16, 16, [1, 1]);
        let (x, weight) = (noise(320 * 256, 1), noise(320 * 32 * TAPS, 2));
        let expected = naive(&s, &x, |row, depth, tap| weight[(row * 320 + depth) * TAPS + tap], &[]);
        let got = s.convolve(&x, &Kernels::forward(Weight::F32(&weight), 320), &[]);
        let (error, largest) = size(got.iter().zip(&expected).map(|(a, b)| f64::from(*a) - b));
        let (unit, _) = size(expected.into_iter());
        assert!(error / unit < 2.2e-6, "{:.1e}", error / unit);
        assert!(largest / unit < 1.5e-5, "{:.1e}", largest / unit);
    }

    #[test]
    fn a_sample_gives_the_same_alone_and_among_others() {
        let weight = noise(33 * 40 * TAPS, 1);
        let kernels = Kernels::forward(Weight::F32(&weight), 33);
        let x = noise(9 * 33 * 24 * 40, 2);
        let together = sized(9, 33, 40, 24, 40, [1, 1]).convolve(&x, &kernels, &[]);
        let alone = x.chunks_exact(33 * 24 * 40);
        let alone: Vec<f32> =
            alone.flat_map(|x| sized(1, 33, 40, 24, 40, [1, 1]).convolve(x, &kernels, &[])).collect();
        assert!(alone == together);
        for side in [4, 8, 12, 16, 20, 64] {
            let quicker = |b| sized(b, 64, 64, side, side, [1, 1]).is_quicker();
            assert!(quicker(1) == quicker(8) && quicker(1) == (side >= 16));
        }
    }

    #[test]
    fn weights_of_16_bits_give_what_the_same_weights_give_in_32() {
        let weight = noise(18 * 13 * TAPS, 1);
        let s = sized(1, 18, 13, 12, 9, [1, 1]);
        let x = noise(18 * 12 * 9, 2);
        let of = |weight| s.convolve(&x, &Kernels::forward(weight, 18), &[]);
        let f16: Vec<_> = weight.iter().map(|w| half::f16::from_f32(*w)).collect();
        let wide: Vec<f32> = f16.iter().map(|w| w.to_f32()).collect();
        assert!(of(Weight::F16(&f16)) == of(Weight::F32(&wide)));
        let bf16: Vec<_> = weight.iter().map(|w| half::bf16::from_f32(*w)).collect();
        let wide: Vec<f32> = bf16.iter().map(|w| w.to_f32()).collect();
        assert!(of(Weight::Bf16(&bf16)) == of(Weight::F32(&wide)));
    }
}
