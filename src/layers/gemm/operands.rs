//! Inputs and outputs of a product: packing of both operands, the start of the sums, the output layout.

use std::ops::Range;

use super::isa::ElemType;
use super::microkernel::{MR, NR};
use super::packing::{pack_contiguous, pack_lines, pack_strided};
use crate::layers::cpu::{Shared, Weight};

/// The operand whose rows are the rows of the result.
pub(in crate::layers) trait PackA: Sync {
    /// Packs `rows` (at most 12) at `depth`, one every `step` elem.
    fn pack_rows(&self, elem: ElemType, rows: Range<usize>, depth: Range<usize>, to: &mut [u32], step: usize);

    /// The rows as they lie in memory, where that is as elem.
    fn lines(&self, _elem: ElemType) -> Option<Lines> {
        None
    }
}

/// Rows of words in memory: the first, and how far it is to the next.
#[derive(Clone, Copy)]
pub(in crate::layers) struct Lines {
    pub(in crate::layers) first: *const u32,
    pub(in crate::layers) step: usize,
}

// SAFETY: they are read only, by tasks that end before the operand is given back.
unsafe impl Send for Lines {}
// SAFETY: likewise.
unsafe impl Sync for Lines {}

/// The operand whose columns are the columns of the result.
pub(in crate::layers) trait PackB: Sync {
    /// Packs `columns` at `depth` into panels of 32 columns, `step` words from one panel to the next.
    fn pack_columns(
        &self,
        elem: ElemType,
        columns: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    );

    /// Blocks along the depth begin at multiples of this.
    fn depth_unit(&self) -> usize {
        1
    }
}

/// Initial values of the sums.
#[derive(Clone, Copy)]
pub(in crate::layers) enum Accumulate<'a> {
    /// Nothing.
    Zero,
    /// Sums of earlier blocks along the depth, in the output.
    Output,
    /// One value for each row of each part of the columns, (parts, m); or for each row of all parts.
    Rows(&'a [f32]),
    /// One value a column.
    Columns(&'a [f32]),
}

/// Where the result goes: value (i, j) to `(j / part) · part_step + i · row + j % part`.
#[derive(Clone, Copy)]
pub(in crate::layers) struct OutputLayout {
    /// From one row to the next.
    pub row: usize,
    /// Columns that lie together, such as the pixels of one sample.
    pub part: usize,
    /// From one part to the next.
    pub part_step: usize,
}

/// Memory for a product.
#[derive(Clone, Copy)]
pub(in crate::layers) struct Output<'a> {
    pub to: Shared,
    pub start: Accumulate<'a>,
    pub place: OutputLayout,
}

impl Output<'_> {
    /// For the block of the depth from `first` on.
    pub(in crate::layers) fn after(self, first: usize) -> Self {
        Self { start: if first == 0 { self.start } else { Accumulate::Output }, ..self }
    }
}

impl OutputLayout {
    /// A row-major matrix of `n` columns.
    pub(in crate::layers) fn matrix(n: usize) -> Self {
        Self { row: n, part: n.max(1), part_step: 0 }
    }
}

/// left (m × k) · right (k × n).
#[derive(Clone, Copy)]
pub(in crate::layers) struct Size {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// Lines that run along the depth: rows of the left operand, columns of the right one.
pub(in crate::layers) struct ContiguousDepth<'a> {
    values: Weight<'a>,
    pub(in crate::layers) step: usize,
}

/// Lines that run across the depth: columns of the left operand, rows of the right one.
pub(in crate::layers) struct StridedDepth<'a> {
    values: Weight<'a>,
    pub(in crate::layers) step: usize,
}

/// Whether `count` lines of `length` values, `step` apart, lie in `values` values.
fn fit(count: usize, length: usize, step: usize, values: usize) -> bool {
    count == 0 || length == 0 || (count - 1) * step + length <= values
}

impl<'a> ContiguousDepth<'a> {
    /// `count` lines of `depth` values, `step` apart.
    pub(in crate::layers) fn new(values: Weight<'a>, step: usize, count: usize, depth: usize) -> Self {
        assert!(fit(count, depth, step, values.len()));
        Self { values, step }
    }
}

impl<'a> StridedDepth<'a> {
    /// `depth` lines of `count` values, `step` apart.
    pub(in crate::layers) fn new(values: Weight<'a>, step: usize, count: usize, depth: usize) -> Self {
        assert!(fit(depth, count, step, values.len()));
        Self { values, step }
    }
}

/// Calls a packing function with the values of a weight, whatever their type.
macro_rules! as_stored {
    ($weight:expr, $values:ident => $body:expr) => {
        match $weight {
            Weight::F32($values) => $body,
            Weight::F16($values) => $body,
            Weight::Bf16($values) => $body,
        }
    };
}
pub(in crate::layers) use as_stored;

impl PackA for ContiguousDepth<'_> {
    fn pack_rows(
        &self,
        elem: ElemType,
        rows: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        let first = |i: usize| (rows.start + i) * self.step + depth.start;
        as_stored!(self.values, values => {
            // SAFETY: `new` has checked that all lines are there.
            unsafe { pack_contiguous(elem, rows.len(), depth.len(), |i| values[first(i)..].as_ptr(), to, step) }
        });
    }

    fn lines(&self, elem: ElemType) -> Option<Lines> {
        let (first, step) = match (elem, self.values) {
            (ElemType::F32, Weight::F32(values)) => (values.as_ptr().cast(), self.step),
            (ElemType::Bf16, Weight::Bf16(values))
                if self.step.is_multiple_of(2) && values.as_ptr().cast::<u32>().is_aligned() =>
            {
                (values.as_ptr().cast(), self.step / 2)
            }
            _ => return None,
        };
        // Rows at multiples of 2 KiB would drive each other out of the cache.
        (step % 512 != 0).then_some(Lines { first, step })
    }
}

impl PackA for StridedDepth<'_> {
    fn pack_rows(
        &self,
        elem: ElemType,
        rows: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        assert!(elem == ElemType::F32);
        let mut line = [0f32; MR];
        let line = &mut line[..rows.len()];
        for (w, k) in depth.enumerate() {
            let start = k * self.step + rows.start;
            self.values.widen(start..start + rows.len(), line);
            for (i, value) in line.iter().enumerate() {
                to[i * step + w] = value.to_bits();
            }
        }
    }
}

impl PackB for ContiguousDepth<'_> {
    fn pack_columns(
        &self,
        elem: ElemType,
        columns: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        for (panel, j) in columns.clone().step_by(NR).enumerate() {
            let width = NR.min(columns.end - j);
            let to = &mut to[panel * step..];
            let first = |i: usize| (j + i) * self.step + depth.start;
            as_stored!(self.values, values => {
                // SAFETY: `new` has checked that all lines are there.
                unsafe { pack_strided(elem, width, depth.len(), |i| values[first(i)..].as_ptr(), to, NR) }
            });
        }
    }
}

impl PackB for StridedDepth<'_> {
    fn pack_columns(
        &self,
        elem: ElemType,
        columns: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        for (panel, j) in columns.clone().step_by(NR).enumerate() {
            let width = NR.min(columns.end - j);
            let to = &mut to[panel * step..];
            let line = |k: usize| (depth.start + k) * self.step + j;
            as_stored!(self.values, values => {
                // SAFETY: `new` has checked that all lines are there.
                unsafe { pack_lines(elem, width, depth.len(), |k| values[line(k)..].as_ptr(), to, NR) }
            });
        }
    }
}
