//! Operands of the products that a convolution is made of: patches, output pixels and turned kernels, packed as they are
//! read.

use std::cell::RefCell;
use std::ops::Range;

use super::{ConvGeometry, Sizes};
use crate::layers::cpu::Weight;
use crate::layers::gemm::isa::ElemType;
use crate::layers::gemm::microkernel::NR;
use crate::layers::gemm::operands::{PackA, PackB};
use crate::layers::gemm::packing::{pack_contiguous, pack_gathered, pack_strided, pack_transposed};

/// The patches of an image as the right operand of a product: one column for each output pixel of each sample.
pub(super) struct Patches<'a> {
    pub(super) x: &'a [f32],
    pub(super) s: Sizes,
}

impl Patches<'_> {
    /// The rows of the image with their border, channels `channels` of the samples that hold `columns`, into `border`.
    /// Returns how many rows each of them has, and where the patch of each column begins.
    fn with_border(
        &self,
        columns: Range<usize>,
        channels: Range<usize>,
        border: &mut Vec<f32>,
    ) -> (usize, Vec<u32>) {
        let (s, ConvGeometry { kernel, stride, pad_before, .. }) = (&self.s, self.s.g);
        let pixels = s.pixels_out();
        let width = (s.w_out - 1) * stride + kernel;
        // The output rows of each sample that these columns touch.
        let (first, last) = (columns.start / pixels, (columns.end - 1) / pixels);
        let touched = |sample: usize| {
            let from = columns.start.max(sample * pixels) - sample * pixels;
            let to = columns.end.min((sample + 1) * pixels) - sample * pixels;
            from / s.w_out..(to - 1) / s.w_out + 1
        };
        let most = (first..=last).map(|sample| touched(sample).len()).max().unwrap_or(0);
        let rows = (most - 1) * stride + kernel;
        border.clear();
        for sample in first..=last {
            for c in channels.clone() {
                let image = &self.x[(sample * s.c_in + c) * s.h * s.w..][..s.h * s.w];
                for row in touched(sample).start * stride..touched(sample).start * stride + rows {
                    let end = border.len() + width;
                    match row.checked_sub(pad_before) {
                        Some(row) if row < s.h => {
                            let seen = s.w.min(width - pad_before);
                            border.resize(end - width + pad_before, 0.0);
                            border.extend_from_slice(&image[row * s.w..][..seen]);
                            border.resize(end, 0.0);
                        }
                        _ => border.resize(end, 0.0),
                    }
                }
            }
        }
        let begin = |column: usize| {
            let (sample, pixel) = (column / pixels, column % pixels);
            let (y, x) = (pixel / s.w_out - touched(sample).start, pixel % s.w_out);
            (((sample - first) * channels.len() * rows + y * stride) * width + x * stride) as u32
        };
        (rows, columns.clone().map(begin).collect())
    }
}

impl PackB for Patches<'_> {
    fn pack_columns(
        &self,
        elem: ElemType,
        columns: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        thread_local! {
            static BORDER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        let (s, ConvGeometry { kernel, stride, .. }) = (&self.s, self.s.g);
        let mut border = BORDER.take();
        let (from, offsets, begins) = if s.is_pointwise() {
            let pixels = s.pixels_out();
            let begin = |column: usize| (column / pixels * s.sample_in() + column % pixels) as u32;
            let offsets = depth.map(|c| c * pixels).collect();
            (self.x, offsets, columns.map(begin).collect::<Vec<_>>())
        } else {
            let taps = kernel * kernel;
            let channels = depth.start / taps..(depth.end - 1) / taps + 1;
            let width = (s.w_out - 1) * stride + kernel;
            let (rows, begins) = self.with_border(columns, channels.clone(), &mut border);
            let offset = |d: usize| {
                let (c, ky, kx) = (d / taps - channels.start, d / kernel % kernel, d % kernel);
                (c * rows + ky) * width + kx
            };
            (border.as_slice(), depth.map(offset).collect::<Vec<_>>(), begins)
        };
        let furthest = offsets.iter().max().zip(begins.iter().max()).map(|(a, b)| a + *b as usize);
        assert!(furthest.is_some_and(|furthest| furthest < from.len()));
        for (half, begins) in begins.chunks(16).enumerate() {
            // The last column once more where there are less than 16: its sums are not written.
            let places = std::array::from_fn(|i| begins[i.min(begins.len() - 1)]);
            let to = &mut to[half / 2 * step + half % 2 * 16..];
            // SAFETY: the assertion above.
            unsafe { pack_gathered(elem, from.as_ptr(), &offsets, &places, to, NR) }
        }
        BORDER.set(border);
    }

    fn depth_unit(&self) -> usize {
        self.s.g.kernel * self.s.g.kernel
    }
}

/// The patches of an image as the left operand of a product: a row for each value of a patch, the output pixels of all
/// samples along the depth.
pub(super) struct PatchRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) s: Sizes,
}

impl PackA for PatchRows<'_> {
    fn pack_rows(
        &self,
        elem: ElemType,
        rows: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        assert!(elem == ElemType::F32);
        let (s, ConvGeometry { kernel, stride, pad_before, .. }) = (&self.s, self.s.g);
        for (i, row) in rows.enumerate() {
            let (c, ky, kx) = (row / (kernel * kernel), row / kernel % kernel, row % kernel);
            let inside = s.inside(kx);
            let to = &mut to[i * step..][..depth.len()];
            let mut at = depth.start;
            while at < depth.end {
                let (sample, y, x) = (at / s.pixels_out(), at / s.w_out % s.h_out, at % s.w_out);
                let end = (at + s.w_out - x).min(depth.end);
                let to = &mut to[at - depth.start..end - depth.start];
                at = end;
                let from = (y * stride + ky).wrapping_sub(pad_before);
                let seen = inside.start.max(x)..inside.end.min(x + to.len());
                if from >= s.h || seen.is_empty() {
                    to.fill(0);
                    continue;
                }
                to[..seen.start - x].fill(0);
                to[seen.end - x..].fill(0);
                let start =
                    ((sample * s.c_in + c) * s.h + from) * s.w + seen.start * stride + kx - pad_before;
                let (to, source) = (&mut to[seen.start - x..seen.end - x], &self.x[start..]);
                if stride == 1 {
                    to.iter_mut().zip(source).for_each(|(to, value)| *to = value.to_bits());
                } else {
                    let source = source.iter().step_by(stride);
                    to.iter_mut().zip(source).for_each(|(to, value)| *to = value.to_bits());
                }
            }
        }
    }
}

/// The output's gradient (B, out, pixels) as the right operand: a column for each channel, the pixels of all samples along
/// the depth.
pub(super) struct OutputPixels<'a> {
    pub(super) grad: &'a [f32],
    pub(super) s: Sizes,
}

impl PackB for OutputPixels<'_> {
    fn pack_columns(
        &self,
        elem: ElemType,
        columns: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        assert!(elem == ElemType::F32);
        let pixels = self.s.pixels_out();
        let mut at = depth.start;
        while at < depth.end {
            let (sample, pixel) = (at / pixels, at % pixels);
            let count = (pixels - pixel).min(depth.end - at);
            let image = &self.grad[sample * self.s.sample_out()..][..self.s.sample_out()];
            for (panel, channel) in columns.clone().step_by(NR).enumerate() {
                let width = NR.min(columns.end - channel);
                let to = &mut to[panel * step + (at - depth.start) * NR..];
                let from = |i: usize| image[(channel + i) * pixels + pixel..][..count].as_ptr();
                // SAFETY: each of these lines has `count` values.
                unsafe { pack_strided(elem, width, count, from, to, NR) }
            }
            at += count;
        }
    }
}

/// A kernel (out, in, k, k) turned around, as the left operand that brings gradients from outputs to inputs: a row for
/// each input channel, (out, k, k) along the depth.
pub(super) struct Turned<'a> {
    pub(super) weight: Weight<'a>,
    pub(super) taps: usize,
    pub(super) c_in: usize,
}

impl PackA for Turned<'_> {
    fn pack_rows(
        &self,
        elem: ElemType,
        rows: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        thread_local! {
            static TURNED: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
        }
        let (taps, length) = (self.taps, depth.len());
        if let (ElemType::Bf16, Weight::Bf16(values)) = (elem, self.weight)
            && taps <= 16
            && depth.start.is_multiple_of(taps)
            && length.is_multiple_of(taps)
        {
            let first = depth.start / taps;
            let run = |o, i| values[((first + o) * self.c_in + rows.start + i) * taps..][..taps].as_ptr();
            // SAFETY: each run has `taps` values.
            unsafe { pack_transposed(rows.len(), length / taps, taps, run, to, step) };
            return;
        }
        let [mut lines, mut kernels] = TURNED.take();
        lines.resize(rows.len() * length, 0.0);
        kernels.resize(rows.len() * taps, 0.0);
        for o in depth.start / taps..depth.end.div_ceil(taps) {
            let start = (o * self.c_in + rows.start) * taps;
            self.weight.widen(start..start + kernels.len(), &mut kernels);
            let here = depth.start.max(o * taps)..depth.end.min((o + 1) * taps);
            for (line, kernel) in lines.chunks_exact_mut(length).zip(kernels.chunks_exact(taps)) {
                let line = &mut line[here.start - depth.start..here.end - depth.start];
                let turned = kernel.iter().rev().skip(here.start - o * taps);
                line.iter_mut().zip(turned).for_each(|(value, weight)| *value = *weight);
            }
        }
        // SAFETY: every line has `length` values.
        unsafe {
            let line = |i: usize| lines[i * length..].as_ptr();
            pack_contiguous(elem, rows.len(), length, line, to, step);
        }
        TURNED.set([lines, kernels]);
    }
}
