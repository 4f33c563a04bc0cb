//! Matrix products in blocks that stay in the caches, with operands packed as they are read.
//!
//! A block of the right operand (some hundred columns, up to [`KC`] words deep) is packed into the second-level cache;
//! then the left operand passes by, 12 rows at a time. How an operand is packed is its own matter ([`PackA`], [`PackB`]): a
//! convolution gathers its patches straight into the block, and weights of 16 bits are widened, or stay pairs of bf16,
//! on the way. A left operand that several blocks need is packed once, or not at all where it lies in memory as the tile
//! reads it. Every sum is taken in the same order whatever the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use super::isa::ElemType;
use super::microkernel::{self, DEPTH, MR, NR, Tile, prefetch};
#[cfg(feature = "onednn")]
use super::onednn;
use super::operands::{Accumulate, Lines, Output, OutputLayout, PackA, PackB, Size};
use crate::layers::cpu::{self, Shared};

/// Columns of the right operand that are packed together.
const NC: usize = 256;
/// Most words along the depth that are packed together; sums pass through memory as often as this is exceeded. With
/// [`NC`] columns of 4 bytes, 640 KiB.
const KC: usize = 640;
/// Most words of a left operand that is packed whole, 32 MiB; what is larger is packed as it passes by.
const MAX_PACKED_A: usize = 8 << 20;

/// left · right in new memory, all of which `place` reaches.
pub(in crate::layers) fn matmul<L: PackA, R: PackB>(
    elem: ElemType,
    size: Size,
    left: &L,
    right: &R,
    start: Accumulate,
    place: OutputLayout,
) -> Vec<f32> {
    assert!(size.k > 0 && !matches!(start, Accumulate::Output) && is_dense(size, place));
    let len = size.m * size.n;
    if len == 0 {
        return Vec::new();
    }
    let mut out: Vec<f32> = Vec::with_capacity(len);
    // SAFETY: `place` is a permutation of 0..m · n, so that every value is within the capacity and is written.
    unsafe {
        write(elem, size, left, right, Output { to: Shared::new(out.as_mut_ptr()), start, place });
        out.set_len(len);
    }
    out
}

/// Whether `place` reaches each of m · n values once.
fn is_dense(size: Size, place: OutputLayout) -> bool {
    place.row == place.part.min(size.n)
        && (place.part >= size.n
            || (size.n.is_multiple_of(place.part) && place.part_step == size.m * place.part))
}

/// left · right, added to the start of `output`.
///
/// # Safety
/// `output.to` may be written wherever its layout reaches for i < m and j < n; different (i, j) are different places.
pub(in crate::layers) unsafe fn write<L: PackA, R: PackB>(
    elem: ElemType,
    size: Size,
    left: &L,
    right: &R,
    output: Output,
) {
    let Output { start, place, .. } = output;
    if let Accumulate::Rows(values) = start {
        assert!(values.len() == size.m || values.len() == size.m * (size.n / place.part));
    }
    if let Accumulate::Columns(values) = start {
        assert!(values.len() >= size.n);
    }
    // With few rows the time goes into reading and packing the right operand.
    let threads = cpu::threads_for(size.m.max(MR) * size.n * size.k);
    let (row_parts, column_parts) = shares(size, threads);
    let rows = size.m.div_ceil(row_parts).next_multiple_of(MR);
    let columns = size.n.div_ceil(column_parts).next_multiple_of(NR);
    let mut whole = WHOLE_LEFT.take();
    // Half a word at the end would bring a value that does not belong to the row.
    let lines = match left.lines(elem).filter(|_| size.k.is_multiple_of(elem.per())) {
        // oneDNN packs for itself.
        None if column_parts > 1 && !(cfg!(feature = "onednn") && elem == ElemType::Bf16) => {
            packed_whole(elem, size, left, &mut whole)
        }
        lines => lines,
    };
    let operands = Operands { elem, size, left, lines, right };
    let work = |task: usize| {
        let (i, j) = (task % row_parts * rows, task / row_parts * columns);
        let rows = i.min(size.m)..(i + rows).min(size.m);
        let columns = j.min(size.n)..(j + columns).min(size.n);
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        // SAFETY: the tasks part the result.
        unsafe { block(&operands, rows, columns, output) }
    };
    cpu::for_each_on(threads, row_parts * column_parts, work);
    WHOLE_LEFT.set(whole);
}

/// Packs all rows of the left operand at once, unless they are too many.
fn packed_whole<L: PackA>(elem: ElemType, size: Size, left: &L, whole: &mut Vec<u32>) -> Option<Lines> {
    // An odd number of cache lines from row to row, so that rows lie in different sets of the cache.
    let step = (size.k.div_ceil(elem.per()).div_ceil(16) | 1) * 16;
    let rows = size.m.next_multiple_of(MR);
    if rows * step > MAX_PACKED_A {
        return None;
    }
    if whole.len() < rows * step {
        whole.resize(rows * step, 0);
    }
    let together = size.m.div_ceil(4 * cpu::threads()).next_multiple_of(MR);
    cpu::for_chunks(&mut whole[..rows * step], together * step, |i, to| {
        let rows = (i * together).min(size.m)..((i + 1) * together).min(size.m);
        for (i, to) in rows.clone().step_by(MR).zip(to.chunks_mut(MR * step)) {
            left.pack_rows(elem, i..(i + MR).min(rows.end), 0..size.k, to, step);
        }
    });
    Some(Lines { first: whole.as_ptr(), step })
}

/// Into how many parts rows and columns go: columns so that a block fits the cache, and both so that every thread has
/// work.
fn shares(size: Size, threads: usize) -> (usize, usize) {
    let (mut row_parts, mut column_parts) = (1, size.n.div_ceil(NC));
    while row_parts * column_parts < threads {
        let (rows, columns) = (size.m.div_ceil(row_parts), size.n.div_ceil(column_parts));
        if rows >= columns && rows > MR {
            row_parts += 1;
        } else if columns > NR {
            column_parts += 1;
        } else {
            break;
        }
    }
    // Parts of whole panels, of which every thread gets as many.
    let panels = |parts: usize| size.n.div_ceil(NR).div_ceil(parts);
    if row_parts == 1 && column_parts > 1 && column_parts < 16 * threads {
        let first = column_parts.next_multiple_of(threads);
        let work = |parts: usize| panels(parts) * parts;
        column_parts = (first..=2 * first).step_by(threads).min_by_key(|parts| work(*parts)).unwrap_or(first);
    }
    (row_parts, column_parts)
}

/// Memory of this thread for packed operands, kept from call to call.
#[derive(Default)]
struct Scratch {
    left: Vec<u32>,
    right: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// A left operand that is packed whole.
    static WHOLE_LEFT: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// The operands of a product.
struct Operands<'a, L, R> {
    elem: ElemType,
    size: Size,
    left: &'a L,
    /// Rows of the left operand that need not be packed.
    lines: Option<Lines>,
    right: &'a R,
}

/// The rows and columns that one task computes.
///
/// # Safety
/// As [`write`]; `lines` are those of the left operand.
unsafe fn block<L: PackA, R: PackB>(
    &Operands { elem, size, left, lines, right }: &Operands<L, R>,
    rows: Range<usize>,
    columns: Range<usize>,
    output: Output,
) {
    #[cfg(feature = "onednn")]
    if elem == ElemType::Bf16 {
        // SAFETY: the caller's promise.
        let done = unsafe { onednn::block(rows.clone(), columns.clone(), size, left, right, output) };
        if done {
            return;
        }
    }
    let per = elem.per();
    let unit = right.depth_unit() * per;
    // What may be packed at once.
    let most = DEPTH * per;
    let piece = if unit <= most { most / unit * unit } else { most };
    // Blocks of about the same depth: every one of them passes over the sums.
    let deep =
        size.k.div_ceil(size.k.div_ceil(KC * per)).next_multiple_of(if unit <= most { unit } else { per });
    let step = deep.div_ceil(per) * NR;
    // Taken out, not borrowed: packing is foreign code.
    let mut scratch = SCRATCH.take();
    let left_step = deep.div_ceil(per).next_multiple_of(16) + 16;
    if scratch.left.len() < MR * left_step {
        scratch.left.resize(MR * left_step, 0);
    }
    let panels = columns.len().div_ceil(NR);
    if scratch.right.len() < panels * step {
        scratch.right.resize(panels * step, 0);
    }
    for first in (0..size.k).step_by(deep) {
        let depth = first..(first + deep).min(size.k);
        let count = depth.len().div_ceil(per);
        for k in depth.clone().step_by(piece) {
            let to = &mut scratch.right[(k - first) / per * NR..];
            right.pack_columns(elem, columns.clone(), k..(k + piece).min(depth.end), to, step);
        }
        for i in rows.clone().step_by(MR) {
            let height = MR.min(rows.end - i);
            let (left, left_step) = match lines {
                // SAFETY: all rows of a whole tile are there.
                Some(Lines { first: line, step }) if height == MR => unsafe {
                    (line.add(i * step + first / per), step)
                },
                _ => {
                    left.pack_rows(elem, i..i + height, depth.clone(), &mut scratch.left, left_step);
                    (scratch.left.as_ptr(), left_step)
                }
            };
            let sums = RowTiles { elem, height, width: NR, count, m: size.m, left, left_step };
            for (panel, j) in columns.clone().step_by(NR).enumerate() {
                let sums = RowTiles { width: NR.min(columns.end - j), ..sums };
                if let Some(lines) = lines {
                    // The next rows come nearer meanwhile, a share with each tile.
                    let share = count.div_ceil(panels).next_multiple_of(16);
                    for row in (i + MR..i + 2 * MR).take_while(|row| *row < rows.end) {
                        for w in (panel * share..((panel + 1) * share).min(count)).step_by(16) {
                            prefetch(lines.first.wrapping_add(row * lines.step + first / per + w));
                        }
                    }
                }
                // SAFETY: the operands are packed; the caller's promise.
                unsafe {
                    let right = scratch.right.as_ptr().add(panel * step);
                    sums.write(right, [i, j], output.after(first));
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// A tile of one depth block, without its right operand.
#[derive(Clone, Copy)]
struct RowTiles {
    elem: ElemType,
    height: usize,
    width: usize,
    count: usize,
    /// Rows of the whole result.
    m: usize,
    left: *const u32,
    left_step: usize,
}

impl RowTiles {
    /// Adds its sums to the places of rows from `i` and columns from `j` on.
    ///
    /// # Safety
    /// As [`microkernel::compute`], and [`write`] for the places.
    unsafe fn write(&self, right: *const u32, [i, j]: [usize; 2], Output { to: out, start, place }: Output) {
        let out = out.get();
        let Self { elem, height, width, count, m, left, left_step } = *self;
        let at = |j: usize| j / place.part * place.part_step + j % place.part;
        let together = j % place.part + width <= place.part;
        let mut apart = [0f32; MR * NR];
        // SAFETY: the caller's promise.
        unsafe {
            let (to, row) = if together {
                (out.add(i * place.row + at(j)), place.row)
            } else {
                if matches!(start, Accumulate::Output) {
                    for (r, values) in apart.chunks_exact_mut(NR).enumerate().take(height) {
                        for (c, value) in values.iter_mut().enumerate().take(width) {
                            *value = *out.add((i + r) * place.row + at(j + c));
                        }
                    }
                }
                (apart.as_mut_ptr(), NR)
            };
            for r in 0..height {
                match start {
                    Accumulate::Rows(values) => {
                        let value = |j: usize| values[(j / place.part * m + i + r) % values.len()];
                        if together {
                            let value = value(j);
                            (0..width).for_each(|c| *to.add(r * row + c) = value);
                        } else {
                            (0..width).for_each(|c| *to.add(r * row + c) = value(j + c));
                        }
                    }
                    Accumulate::Columns(values) => {
                        std::ptr::copy_nonoverlapping(values[j..].as_ptr(), to.add(r * row), width);
                    }
                    Accumulate::Zero | Accumulate::Output => break,
                }
            }
            microkernel::compute(
                elem,
                &Tile {
                    rows: height,
                    columns: width,
                    depth: count,
                    left,
                    step: left_step,
                    right,
                    right_step: NR,
                    out: to,
                    row,
                    add: !matches!(start, Accumulate::Zero),
                },
            );
            if !together {
                for (r, values) in apart.chunks_exact(NR).enumerate().take(height) {
                    for (c, value) in values.iter().enumerate().take(width) {
                        *out.add((i + r) * place.row + at(j + c)) = *value;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::cpu::Weight;
    use crate::layers::gemm::operands::{ContiguousDepth, StridedDepth};

    /// Values that are no multiples of each other, within ±1, and exact in bf16.
    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 251) as f32 / 128.0 - 0.98).map(rounded).collect()
    }

    fn rounded(x: f32) -> f32 {
        half::bf16::from_f32(x).to_f32()
    }

    fn naive(size: Size, left: &[f32], right: &[f32], start: impl Fn(usize, usize) -> f32) -> Vec<f32> {
        let Size { m, n, k } = size;
        let sum =
            |i: usize, j: usize| (0..k).map(|d| f64::from(left[i * k + d] * right[j * k + d])).sum::<f64>();
        (0..m * n).map(|at| (sum(at / n, at % n) + f64::from(start(at / n, at % n))) as f32).collect()
    }

    fn apart(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn products_of_odd_sizes_are_the_naive_sums() {
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (13, 33, 300), (37, 70, 1029), (12, 32, 256), (100, 545, 17)]
        {
            let size = Size { m, n, k };
            let (a, b) = (values(m * k, 1), values(n * k, 2));
            let across: Vec<f32> = (0..k * n).map(|at| b[at % n * k + at / n]).collect();
            let bias = values(n, 3);
            let expected = naive(size, &a, &b, |_, j| bias[j]);
            for elem in [ElemType::F32, ElemType::for_bf16()] {
                let left = ContiguousDepth::new(Weight::F32(&a), k, m, k);
                let (start, place) = (Accumulate::Columns(&bias), OutputLayout::matrix(n));
                let one =
                    matmul(elem, size, &left, &ContiguousDepth::new(Weight::F32(&b), k, n, k), start, place);
                let two = matmul(
                    elem,
                    size,
                    &left,
                    &StridedDepth::new(Weight::F32(&across), n, n, k),
                    start,
                    place,
                );
                // Products of these values are exact; sums of 1029 of them are not.
                let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                let most = 2e-4 + 1e-5 * largest;
                assert!(apart(&one, &expected) < most, "{elem:?} {m}×{n}×{k}: {}", apart(&one, &expected));
                assert_eq!(one, two, "{elem:?} {m}×{n}×{k}");
            }
        }
    }

    #[test]
    fn weights_of_16_bits_give_what_the_same_weights_give_in_32() {
        let size = Size { m: 9, n: 40, k: 77 };
        let (a, b) = (values(9 * 77, 1), values(40 * 77, 2));
        let left = ContiguousDepth::new(Weight::F32(&a), 77, 9, 77);
        let product = |elem, weight| {
            let right = ContiguousDepth::new(weight, 77, 40, 77);
            matmul(elem, size, &left, &right, Accumulate::Zero, OutputLayout::matrix(40))
        };
        let f16: Vec<_> = b.iter().map(|b| half::f16::from_f32(*b)).collect();
        let bf16: Vec<_> = b.iter().map(|b| half::bf16::from_f32(*b)).collect();
        let expected = product(ElemType::F32, Weight::F32(&b));
        assert_eq!(product(ElemType::F32, Weight::F16(&f16)), expected);
        assert_eq!(product(ElemType::F32, Weight::Bf16(&bf16)), expected);
        assert_eq!(
            product(ElemType::for_bf16(), Weight::Bf16(&bf16)),
            product(ElemType::for_bf16(), Weight::F32(&b))
        );
    }

    #[test]
    fn parts_of_columns_lie_where_they_are_told_to() {
        // Three samples of 21 pixels: tiles begin in one and end in the next.
        let (size, part) = (Size { m: 14, n: 63, k: 300 }, 21);
        let (a, b, bias) = (values(14 * 300, 1), values(63 * 300, 2), values(3 * 14, 3));
        let expected = naive(size, &a, &b, |i, j| bias[j / part * 14 + i]);
        let place = OutputLayout { row: part, part, part_step: 14 * part };
        let (left, right) = (
            ContiguousDepth::new(Weight::F32(&a), 300, 14, 300),
            ContiguousDepth::new(Weight::F32(&b), 300, 63, 300),
        );
        let got = matmul(ElemType::F32, size, &left, &right, Accumulate::Rows(&bias), place);
        let moved: Vec<f32> =
            (0..14 * 63).map(|at| got[at % 63 / part * 14 * part + at / 63 * part + at % part]).collect();
        assert!(apart(&moved, &expected) < 1e-4);
    }
}
