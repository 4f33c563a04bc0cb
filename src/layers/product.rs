//! Matrix products in blocks that stay in the caches, with operands packed as they are read.
//!
//! A block of the right operand (some hundred columns, up to [`DEEPEST`] words deep) is packed into the second-level cache;
//! then the left operand passes by, 12 rows at a time. How an operand is packed is its own matter ([`Left`], [`Right`]): a
//! convolution gathers its patches straight into the block, and weights of 16 bits are widened, or stay pairs of bf16,
//! on the way. A left operand that several blocks need is packed once, or not at all where it lies in memory as the tile
//! reads it. Every sum is taken in the same order whatever the number of threads.

use std::cell::RefCell;
use std::ops::Range;

#[cfg(feature = "onednn")]
use super::onednn;
use super::slices::{self, Shared, Weight};
use super::tile::{COLUMNS, DEPTH, ROWS, Words, pack_across, pack_along, pack_lines, prefetch, tile};

/// Columns of the right operand that are packed together.
const BLOCK: usize = 256;
/// Most words along the depth that are packed together; sums pass through memory as often as this is exceeded. With
/// [`BLOCK`] columns of 4 bytes, 640 KiB.
const DEEPEST: usize = 640;
/// Most words of a left operand that is packed whole, 32 MiB; what is larger is packed as it passes by.
const WHOLE: usize = 8 << 20;

/// The operand whose rows are the rows of the result.
pub(super) trait Left: Sync {
    /// Packs `rows` (at most 12) at `depth`, one every `step` words.
    fn pack_rows(&self, words: Words, rows: Range<usize>, depth: Range<usize>, to: &mut [u32], step: usize);

    /// The rows as they lie in memory, where that is as words.
    fn lines(&self, _words: Words) -> Option<Lines> {
        None
    }
}

/// Rows of words in memory: the first, and how far it is to the next.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    first: *const u32,
    step: usize,
}

// SAFETY: they are read only, by tasks that end before the operand is given back.
unsafe impl Send for Lines {}
// SAFETY: likewise.
unsafe impl Sync for Lines {}

/// The operand whose columns are the columns of the result.
pub(super) trait Right: Sync {
    /// Packs `columns` at `depth` into panels of 32 columns, `step` words from one panel to the next.
    fn pack_columns(
        &self,
        words: Words,
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

/// What the sums are added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing.
    Zero,
    /// What earlier blocks along the depth have left in the output.
    Output,
    /// One value for each row of each part of the columns, (parts, m); or for each row of all parts.
    Rows(&'a [f32]),
    /// One value a column.
    Columns(&'a [f32]),
}

/// Where the result goes: value (i, j) to `(j / part) · part_step + i · row + j % part`.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// From one row to the next.
    pub row: usize,
    /// Columns that lie together, such as the pixels of one sample.
    pub part: usize,
    /// From one part to the next.
    pub part_step: usize,
}

impl Place {
    /// A row-major matrix of `n` columns.
    pub(super) fn matrix(n: usize) -> Self {
        Self { row: n, part: n.max(1), part_step: 0 }
    }
}

/// left (m × k) · right (k × n).
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// left · right in new memory, all of which `place` reaches.
pub(super) fn multiplied<L: Left, R: Right>(
    words: Words,
    size: Size,
    left: &L,
    right: &R,
    start: Start,
    place: Place,
) -> Vec<f32> {
    assert!(size.k > 0 && !matches!(start, Start::Output) && is_dense(size, place));
    let len = size.m * size.n;
    if len == 0 {
        return Vec::new();
    }
    let mut out: Vec<f32> = Vec::with_capacity(len);
    // SAFETY: `place` is a permutation of 0..m · n, so that every value is within the capacity and is written.
    unsafe {
        write(words, size, left, right, start, Shared::new(out.as_mut_ptr()), place);
        out.set_len(len);
    }
    out
}

/// Whether `place` reaches each of m · n values once.
fn is_dense(size: Size, place: Place) -> bool {
    place.row == place.part.min(size.n)
        && (place.part >= size.n
            || (size.n.is_multiple_of(place.part) && place.part_step == size.m * place.part))
}

/// left · right, added to `start`.
///
/// # Safety
/// `out` may be written wherever `place` reaches for i < m and j < n; different (i, j) are different places.
pub(super) unsafe fn write<L: Left, R: Right>(
    words: Words,
    size: Size,
    left: &L,
    right: &R,
    start: Start,
    out: Shared,
    place: Place,
) {
    if let Start::Rows(values) = start {
        assert!(values.len() == size.m || values.len() == size.m * (size.n / place.part));
    }
    if let Start::Columns(values) = start {
        assert!(values.len() >= size.n);
    }
    // With few rows the time goes into reading and packing the right operand.
    let threads = slices::threads_for(size.m.max(ROWS) * size.n * size.k);
    let (row_parts, column_parts) = shares(size, threads);
    let rows = size.m.div_ceil(row_parts).next_multiple_of(ROWS);
    let columns = size.n.div_ceil(column_parts).next_multiple_of(COLUMNS);
    let mut whole = WHOLE_LEFT.take();
    // Half a word at the end would bring a value that does not belong to the row.
    let lines = match left.lines(words).filter(|_| size.k.is_multiple_of(words.per())) {
        // oneDNN packs for itself.
        None if column_parts > 1 && !(cfg!(feature = "onednn") && words == Words::Bf16) => {
            packed_whole(words, size, left, &mut whole)
        }
        lines => lines,
    };
    let work = |task: usize| {
        let (i, j) = (task % row_parts * rows, task / row_parts * columns);
        let rows = i.min(size.m)..(i + rows).min(size.m);
        let columns = j.min(size.n)..(j + columns).min(size.n);
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        // SAFETY: the tasks part the result.
        unsafe { block(words, rows, columns, size, left, lines, right, start, out, place) }
    };
    slices::for_each_on(threads, row_parts * column_parts, work);
    WHOLE_LEFT.set(whole);
}

/// Packs all rows of the left operand at once, unless they are too many.
fn packed_whole<L: Left>(words: Words, size: Size, left: &L, whole: &mut Vec<u32>) -> Option<Lines> {
    // An odd number of cache lines from row to row, so that rows lie in different sets of the cache.
    let step = (size.k.div_ceil(words.per()).div_ceil(16) | 1) * 16;
    let rows = size.m.next_multiple_of(ROWS);
    if rows * step > WHOLE {
        return None;
    }
    if whole.len() < rows * step {
        whole.resize(rows * step, 0);
    }
    let together = size.m.div_ceil(4 * slices::threads()).next_multiple_of(ROWS);
    slices::for_chunks(&mut whole[..rows * step], together * step, |i, to| {
        let rows = (i * together).min(size.m)..((i + 1) * together).min(size.m);
        for (i, to) in rows.clone().step_by(ROWS).zip(to.chunks_mut(ROWS * step)) {
            left.pack_rows(words, i..(i + ROWS).min(rows.end), 0..size.k, to, step);
        }
    });
    Some(Lines { first: whole.as_ptr(), step })
}

/// Into how many parts rows and columns go: columns so that a block fits the cache, and both so that every thread has
/// work.
fn shares(size: Size, threads: usize) -> (usize, usize) {
    let (mut row_parts, mut column_parts) = (1, size.n.div_ceil(BLOCK));
    while row_parts * column_parts < threads {
        let (rows, columns) = (size.m.div_ceil(row_parts), size.n.div_ceil(column_parts));
        if rows >= columns && rows > ROWS {
            row_parts += 1;
        } else if columns > COLUMNS {
            column_parts += 1;
        } else {
            break;
        }
    }
    // Parts of whole panels, of which every thread gets as many.
    let panels = |parts: usize| size.n.div_ceil(COLUMNS).div_ceil(parts);
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

/// The rows and columns that one task computes.
///
/// # Safety
/// As [`write`]; `lines` are those of the left operand.
#[allow(clippy::too_many_arguments)]
unsafe fn block<L: Left, R: Right>(
    words: Words,
    rows: Range<usize>,
    columns: Range<usize>,
    size: Size,
    left: &L,
    lines: Option<Lines>,
    right: &R,
    start: Start,
    out: Shared,
    place: Place,
) {
    #[cfg(feature = "onednn")]
    if words == Words::Bf16 {
        // SAFETY: the caller's promise.
        let done =
            unsafe { onednn::block(rows.clone(), columns.clone(), size, left, right, start, out, place) };
        if done {
            return;
        }
    }
    let per = words.per();
    let unit = right.depth_unit() * per;
    // What may be packed at once.
    let most = DEPTH * per;
    let piece = if unit <= most { most / unit * unit } else { most };
    // Blocks of about the same depth: every one of them passes over the sums.
    let deep = size.k.div_ceil(size.k.div_ceil(DEEPEST * per)).next_multiple_of(if unit <= most {
        unit
    } else {
        per
    });
    let step = deep.div_ceil(per) * COLUMNS;
    // Taken out, not borrowed: packing is foreign code.
    let mut scratch = SCRATCH.take();
    let left_step = deep.div_ceil(per).next_multiple_of(16) + 16;
    if scratch.left.len() < ROWS * left_step {
        scratch.left.resize(ROWS * left_step, 0);
    }
    let panels = columns.len().div_ceil(COLUMNS);
    if scratch.right.len() < panels * step {
        scratch.right.resize(panels * step, 0);
    }
    for first in (0..size.k).step_by(deep) {
        let depth = first..(first + deep).min(size.k);
        let count = depth.len().div_ceil(per);
        for k in depth.clone().step_by(piece) {
            let to = &mut scratch.right[(k - first) / per * COLUMNS..];
            right.pack_columns(words, columns.clone(), k..(k + piece).min(depth.end), to, step);
        }
        for i in rows.clone().step_by(ROWS) {
            let height = ROWS.min(rows.end - i);
            let (left, left_step) = match lines {
                // SAFETY: all rows of a whole tile are there.
                Some(Lines { first: line, step }) if height == ROWS => unsafe {
                    (line.add(i * step + first / per), step)
                },
                _ => {
                    left.pack_rows(words, i..i + height, depth.clone(), &mut scratch.left, left_step);
                    (scratch.left.as_ptr(), left_step)
                }
            };
            let sums = Tile { words, height, width: COLUMNS, count, m: size.m, left, left_step };
            for (panel, j) in columns.clone().step_by(COLUMNS).enumerate() {
                let sums = Tile { width: COLUMNS.min(columns.end - j), ..sums };
                if let Some(lines) = lines {
                    // The next rows come nearer meanwhile, a share with each tile.
                    let share = count.div_ceil(panels).next_multiple_of(16);
                    for row in (i + ROWS..i + 2 * ROWS).take_while(|row| *row < rows.end) {
                        for w in (panel * share..((panel + 1) * share).min(count)).step_by(16) {
                            prefetch(lines.first.wrapping_add(row * lines.step + first / per + w));
                        }
                    }
                }
                // SAFETY: the operands are packed; the caller's promise.
                unsafe {
                    let right = scratch.right.as_ptr().add(panel * step);
                    sums.write(right, i, j, if first == 0 { start } else { Start::Output }, out.get(), place);
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// One tile of one depth block.
#[derive(Clone, Copy)]
struct Tile {
    words: Words,
    height: usize,
    width: usize,
    count: usize,
    /// Rows of the whole result.
    m: usize,
    left: *const u32,
    left_step: usize,
}

impl Tile {
    /// Adds its sums to the places of rows from `i` and columns from `j` on.
    ///
    /// # Safety
    /// As [`tile`], and [`write`] for the places.
    unsafe fn write(&self, right: *const u32, i: usize, j: usize, start: Start, out: *mut f32, place: Place) {
        let Self { words, height, width, count, m, left, left_step } = *self;
        let at = |j: usize| j / place.part * place.part_step + j % place.part;
        let together = j % place.part + width <= place.part;
        let mut apart = [0f32; ROWS * COLUMNS];
        // SAFETY: the caller's promise.
        unsafe {
            let (to, row) = if together {
                (out.add(i * place.row + at(j)), place.row)
            } else {
                if matches!(start, Start::Output) {
                    for (r, values) in apart.chunks_exact_mut(COLUMNS).enumerate().take(height) {
                        for (c, value) in values.iter_mut().enumerate().take(width) {
                            *value = *out.add((i + r) * place.row + at(j + c));
                        }
                    }
                }
                (apart.as_mut_ptr(), COLUMNS)
            };
            for r in 0..height {
                match start {
                    Start::Rows(values) => {
                        let value = |j: usize| values[(j / place.part * m + i + r) % values.len()];
                        if together {
                            let value = value(j);
                            (0..width).for_each(|c| *to.add(r * row + c) = value);
                        } else {
                            (0..width).for_each(|c| *to.add(r * row + c) = value(j + c));
                        }
                    }
                    Start::Columns(values) => {
                        std::ptr::copy_nonoverlapping(values[j..].as_ptr(), to.add(r * row), width);
                    }
                    Start::Zero | Start::Output => break,
                }
            }
            tile(
                words,
                height,
                width,
                count,
                left,
                left_step,
                right,
                COLUMNS,
                to,
                row,
                !matches!(start, Start::Zero),
            );
            if !together {
                for (r, values) in apart.chunks_exact(COLUMNS).enumerate().take(height) {
                    for (c, value) in values.iter().enumerate().take(width) {
                        *out.add((i + r) * place.row + at(j + c)) = *value;
                    }
                }
            }
        }
    }
}

/// Lines that run along the depth: rows of the left operand, columns of the right one.
pub(super) struct Along<'a> {
    values: Weight<'a>,
    step: usize,
}

/// Lines that run across the depth: columns of the left operand, rows of the right one.
pub(super) struct Across<'a> {
    values: Weight<'a>,
    step: usize,
}

/// Whether `count` lines of `length` values, `step` apart, lie in `values` values.
fn fit(count: usize, length: usize, step: usize, values: usize) -> bool {
    count == 0 || length == 0 || (count - 1) * step + length <= values
}

impl<'a> Along<'a> {
    /// `count` lines of `depth` values, `step` apart.
    pub(super) fn new(values: Weight<'a>, step: usize, count: usize, depth: usize) -> Self {
        assert!(fit(count, depth, step, values.len()));
        Self { values, step }
    }
}

impl<'a> Across<'a> {
    /// `depth` lines of `count` values, `step` apart.
    pub(super) fn new(values: Weight<'a>, step: usize, count: usize, depth: usize) -> Self {
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
pub(super) use as_stored;

impl Left for Along<'_> {
    fn pack_rows(&self, words: Words, rows: Range<usize>, depth: Range<usize>, to: &mut [u32], step: usize) {
        let first = |i: usize| (rows.start + i) * self.step + depth.start;
        as_stored!(self.values, values => {
            // SAFETY: `new` has checked that all lines are there.
            unsafe { pack_along(words, rows.len(), depth.len(), |i| values[first(i)..].as_ptr(), to, step) }
        });
    }

    fn lines(&self, words: Words) -> Option<Lines> {
        let (first, step) = match (words, self.values) {
            (Words::F32, Weight::F32(values)) => (values.as_ptr().cast(), self.step),
            (Words::Bf16, Weight::Bf16(values))
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

impl Left for Across<'_> {
    fn pack_rows(&self, words: Words, rows: Range<usize>, depth: Range<usize>, to: &mut [u32], step: usize) {
        assert!(words == Words::F32);
        let mut line = [0f32; ROWS];
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

impl Right for Along<'_> {
    fn pack_columns(
        &self,
        words: Words,
        columns: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        for (panel, j) in columns.clone().step_by(COLUMNS).enumerate() {
            let width = COLUMNS.min(columns.end - j);
            let to = &mut to[panel * step..];
            let first = |i: usize| (j + i) * self.step + depth.start;
            as_stored!(self.values, values => {
                // SAFETY: `new` has checked that all lines are there.
                unsafe { pack_across(words, width, depth.len(), |i| values[first(i)..].as_ptr(), to, COLUMNS) }
            });
        }
    }
}

impl Right for Across<'_> {
    fn pack_columns(
        &self,
        words: Words,
        columns: Range<usize>,
        depth: Range<usize>,
        to: &mut [u32],
        step: usize,
    ) {
        for (panel, j) in columns.clone().step_by(COLUMNS).enumerate() {
            let width = COLUMNS.min(columns.end - j);
            let to = &mut to[panel * step..];
            let line = |k: usize| (depth.start + k) * self.step + j;
            as_stored!(self.values, values => {
                // SAFETY: `new` has checked that all lines are there.
                unsafe { pack_lines(words, width, depth.len(), |k| values[line(k)..].as_ptr(), to, COLUMNS) }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            for words in [Words::F32, Words::for_bf16()] {
                let left = Along::new(Weight::F32(&a), k, m, k);
                let (start, place) = (Start::Columns(&bias), Place::matrix(n));
                let one = multiplied(words, size, &left, &Along::new(Weight::F32(&b), k, n, k), start, place);
                let two =
                    multiplied(words, size, &left, &Across::new(Weight::F32(&across), n, n, k), start, place);
                // Products of these values are exact; sums of 1029 of them are not.
                let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                let most = 2e-4 + 1e-5 * largest;
                assert!(apart(&one, &expected) < most, "{words:?} {m}×{n}×{k}: {}", apart(&one, &expected));
                assert_eq!(one, two, "{words:?} {m}×{n}×{k}");
            }
        }
    }

    #[test]
    fn weights_of_16_bits_give_what_the_same_weights_give_in_32() {
        let size = Size { m: 9, n: 40, k: 77 };
        let (a, b) = (values(9 * 77, 1), values(40 * 77, 2));
        let left = Along::new(Weight::F32(&a), 77, 9, 77);
        let product = |words, weight| {
            let right = Along::new(weight, 77, 40, 77);
            multiplied(words, size, &left, &right, Start::Zero, Place::matrix(40))
        };
        let f16: Vec<_> = b.iter().map(|b| half::f16::from_f32(*b)).collect();
        let bf16: Vec<_> = b.iter().map(|b| half::bf16::from_f32(*b)).collect();
        let expected = product(Words::F32, Weight::F32(&b));
        assert_eq!(product(Words::F32, Weight::F16(&f16)), expected);
        assert_eq!(product(Words::F32, Weight::Bf16(&bf16)), expected);
        assert_eq!(
            product(Words::for_bf16(), Weight::Bf16(&bf16)),
            product(Words::for_bf16(), Weight::F32(&b))
        );
    }

    #[test]
    fn parts_of_columns_lie_where_they_are_told_to() {
        // Three samples of 21 pixels: tiles begin in one and end in the next.
        let (size, part) = (Size { m: 14, n: 63, k: 300 }, 21);
        let (a, b, bias) = (values(14 * 300, 1), values(63 * 300, 2), values(3 * 14, 3));
        let expected = naive(size, &a, &b, |i, j| bias[j / part * 14 + i]);
        let place = Place { row: part, part, part_step: 14 * part };
        let (left, right) =
            (Along::new(Weight::F32(&a), 300, 14, 300), Along::new(Weight::F32(&b), 300, 63, 300));
        let got = multiplied(Words::F32, size, &left, &right, Start::Rows(&bias), place);
        let moved: Vec<f32> =
            (0..14 * 63).map(|at| got[at % 63 / part * 14 * part + at / 63 * part + at % part]).collect();
        assert!(apart(&moved, &expected) < 1e-4);
    }
}
