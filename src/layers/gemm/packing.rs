//! Packing of operands: stored values to the words that [`microkernel`](super::microkernel) reads.

use half::{bf16, f16};

use super::isa::ElemType;
#[cfg(target_arch = "x86_64")]
use super::isa::{has_avx512, mask};
use super::microkernel::NR;

/// A stored value of an operand.
pub(in crate::layers) trait Value: Copy + Send + Sync {
    fn wide(self) -> f32;

    /// The first `count` (at most 16) values from `from` on, then zeros.
    ///
    /// # Safety
    /// `from` points to `count` values; the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self, count: usize) -> std::arch::x86_64::__m512;

    /// The first `count` (at most 32) values from `from` on as words of two bf16, then zeros.
    ///
    /// # Safety
    /// `from` points to `count` values; the processor has AVX-512 and multiplies bf16.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
    unsafe fn load_pairs(from: *const Self, count: usize) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        unsafe {
            let low = Self::load(from, count.min(16));
            let high = match count.saturating_sub(16) {
                0 => _mm512_setzero_ps(),
                rest => Self::load(from.add(16), rest.min(16)),
            };
            std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    /// The first `count` (at most 16) values from `from` on, each as a bf16 in the lower half of a word.
    ///
    /// # Safety
    /// Likewise.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
    unsafe fn load_halves(from: *const Self, count: usize) -> std::arch::x86_64::__m512i {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        unsafe {
            let narrow = _mm512_cvtneps_pbh(Self::load(from, count));
            _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(narrow))
        }
    }
}

impl Value for f32 {
    fn wide(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    unsafe fn load(from: *const Self, count: usize) -> std::arch::x86_64::__m512 {
        // SAFETY: the mask leaves out what lies beyond `count`.
        unsafe { std::arch::x86_64::_mm512_maskz_loadu_ps(mask(count), from) }
    }
}

impl Value for bf16 {
    fn wide(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    unsafe fn load(from: *const Self, count: usize) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the mask leaves out what lies beyond `count`.
        let half = unsafe { _mm256_maskz_loadu_epi16(mask(count), from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
    }

    // They are stored as they are wanted.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
    unsafe fn load_pairs(from: *const Self, count: usize) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        let mask = if count >= 32 { u32::MAX } else { (1 << count) - 1 };
        // SAFETY: the mask leaves out what lies beyond `count`.
        _mm512_castsi512_ps(unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) })
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
    unsafe fn load_halves(from: *const Self, count: usize) -> std::arch::x86_64::__m512i {
        use std::arch::x86_64::*;
        // SAFETY: likewise.
        _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(mask(count), from.cast()) })
    }
}

impl Value for f16 {
    fn wide(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    unsafe fn load(from: *const Self, count: usize) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the mask leaves out what lies beyond `count`.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask(count), from.cast()) })
    }
}

/// ElemType of two values each, rounded to bf16 (to nearest, ties to even).
fn pair(first: f32, second: f32) -> u32 {
    u32::from(bf16::from_f32(first).to_bits()) | u32::from(bf16::from_f32(second).to_bits()) << 16
}

/// Packs values that follow each other along the depth, row by row: word `w` of row `i` goes to
/// `to[i · step + w]`. `from(i)` is where row `i` begins.
///
/// # Safety
/// Each row has `depth` values, and `to` has room for `rows` of them.
pub(in crate::layers) unsafe fn pack_contiguous<V: Value>(
    elem: ElemType,
    rows: usize,
    depth: usize,
    from: impl Fn(usize) -> *const V,
    to: &mut [u32],
    step: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        for i in 0..rows {
            let to = to[i * step..][..depth.div_ceil(elem.per())].as_mut_ptr();
            // SAFETY: the processor has AVX-512, and bf16 where words are pairs; the row has `depth` values.
            unsafe {
                match elem {
                    ElemType::F32 => x86::copy_f32(from(i), depth, to),
                    ElemType::Bf16 => x86::copy_bf16(from(i), depth, to),
                }
            }
        }
        return;
    }
    for i in 0..rows {
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts(from(i), depth) };
        let to = &mut to[i * step..];
        match elem {
            ElemType::F32 => to.iter_mut().zip(row).for_each(|(to, value)| *to = value.wide().to_bits()),
            ElemType::Bf16 => to.iter_mut().zip(row.chunks(2)).for_each(|(to, values)| {
                *to = pair(values[0].wide(), values.get(1).map_or(0.0, |value| value.wide()));
            }),
        }
    }
}

/// The same turned over: word `w` of row `i` goes to `to[w · step + i]`, and rows from `rows` to the next multiple of
/// 16 are zeros.
///
/// # Safety
/// Each row has `depth` values, and `to` has room.
pub(in crate::layers) unsafe fn pack_strided<V: Value>(
    elem: ElemType,
    rows: usize,
    depth: usize,
    from: impl Fn(usize) -> *const V,
    to: &mut [u32],
    step: usize,
) {
    let count = depth.div_ceil(elem.per());
    if rows == 0 || count == 0 {
        return;
    }
    assert!((count - 1) * step + rows.next_multiple_of(16) <= to.len());
    for first in (0..rows).step_by(16) {
        let rows = (rows - first).min(16);
        #[cfg(target_arch = "x86_64")]
        if has_avx512() {
            let mut starts = [std::ptr::null(); 16];
            starts.iter_mut().enumerate().take(rows).for_each(|(i, start)| *start = from(first + i));
            // SAFETY: as above; the assertion bounds what is written.
            unsafe {
                match elem {
                    ElemType::F32 => x86::turn_f32(&starts[..rows], depth, to.as_mut_ptr().add(first), step),
                    ElemType::Bf16 => {
                        x86::turn_bf16(&starts[..rows], depth, to.as_mut_ptr().add(first), step)
                    }
                }
            }
            continue;
        }
        for i in 0..16 {
            // SAFETY: the caller's promise.
            let row =
                if i < rows { unsafe { std::slice::from_raw_parts(from(first + i), depth) } } else { &[] };
            let at = |k: usize| row.get(k).map_or(0.0, |value| value.wide());
            for w in 0..count {
                to[w * step + first + i] = match elem {
                    ElemType::F32 => at(w).to_bits(),
                    ElemType::Bf16 => pair(at(2 * w), at(2 * w + 1)),
                };
            }
        }
    }
}

/// Packs rows of runs of `taps` (at most 16) bf16 that are turned around each, as pairs: run `o` of row `i` begins at
/// `run(o, i)` and goes to values `o · taps` and on of row `i`, `step` words from row to row.
///
/// # Safety
/// Each run has `taps` values.
pub(in crate::layers) unsafe fn pack_transposed(
    rows: usize,
    runs: usize,
    taps: usize,
    run: impl Fn(usize, usize) -> *const bf16,
    to: &mut [u32],
    step: usize,
) {
    let length = runs * taps;
    assert!(taps <= 16 && (rows == 0 || (rows - 1) * step + length.div_ceil(2) <= to.len()));
    for o in 0..runs {
        for i in 0..rows {
            let from = run(o, i);
            let row = to[i * step..].as_mut_ptr().cast::<bf16>();
            #[cfg(target_arch = "x86_64")]
            if o * taps + 16 <= length && has_avx512() {
                // SAFETY: the processor has AVX-512; what is written beyond this run belongs to the row's next one.
                unsafe { x86::turn_run(from, taps, row.add(o * taps)) };
                continue;
            }
            for t in 0..taps {
                // SAFETY: the caller's promise; the assertion bounds what is written.
                unsafe { *row.add(o * taps + t) = *from.add(taps - 1 - t) };
            }
        }
    }
    if length % 2 == 1 {
        (0..rows).for_each(|i| to[i * step + length / 2] &= 0xffff);
    }
}

/// Packs lines that run across the depth: word `w` of column `j` comes from the `j`-th values of the lines `w`, or `2 w`
/// and `2 w + 1`, and goes to `to[w · step + j]`; `line(k)` is where line `k` of `depth` begins. At most 32 columns.
///
/// # Safety
/// Each line has `columns` values.
pub(in crate::layers) unsafe fn pack_lines<V: Value>(
    elem: ElemType,
    columns: usize,
    depth: usize,
    line: impl Fn(usize) -> *const V,
    to: &mut [u32],
    step: usize,
) {
    let count = depth.div_ceil(elem.per());
    assert!(columns <= NR && (count == 0 || (count - 1) * step + columns.next_multiple_of(16) <= to.len()));
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512, and bf16 where words are pairs; the caller's promise.
        unsafe {
            match elem {
                ElemType::F32 => x86::lines_f32(columns, depth, line, to.as_mut_ptr(), step),
                ElemType::Bf16 => x86::lines_bf16(columns, depth, line, to.as_mut_ptr(), step),
            }
        }
        return;
    }
    // SAFETY: the caller's promise.
    let at = |k: usize, j: usize| if k < depth { unsafe { (*line(k).add(j)).wide() } } else { 0.0 };
    for w in 0..count {
        for (j, to) in to[w * step..][..columns].iter_mut().enumerate() {
            *to = match elem {
                ElemType::F32 => at(w, j).to_bits(),
                ElemType::Bf16 => pair(at(2 * w, j), at(2 * w + 1, j)),
            };
        }
    }
}

/// Packs 16 columns that lie `columns` apart (one word each) in `from`, for every offset of `depth`:
/// `to[w · step + j]`.
///
/// # Safety
/// Every offset plus every column points into `from`, and `to` has room.
pub(in crate::layers) unsafe fn pack_gathered(
    elem: ElemType,
    from: *const f32,
    depth: &[usize],
    columns: &[u32; 16],
    to: &mut [u32],
    step: usize,
) {
    let count = depth.len().div_ceil(elem.per());
    assert!(count == 0 || (count - 1) * step + 16 <= to.len());
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512, and bf16 where words are pairs; the caller's promise.
        unsafe {
            match elem {
                ElemType::F32 => x86::gather_f32(from, depth, columns, to.as_mut_ptr(), step),
                ElemType::Bf16 => x86::gather_bf16(from, depth, columns, to.as_mut_ptr(), step),
            }
        }
        return;
    }
    // SAFETY: the caller's promise.
    let at = |k: usize, j: u32| unsafe { *from.add(depth[k] + j as usize) };
    for w in 0..count {
        for (to, &j) in to[w * step..].iter_mut().zip(columns) {
            *to = match elem {
                ElemType::F32 => at(w, j).to_bits(),
                ElemType::Bf16 => {
                    pair(at(2 * w, j), if 2 * w + 1 < depth.len() { at(2 * w + 1, j) } else { 0.0 })
                }
            };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Value, mask};

    /// 16 words of one row, from value `k` on.
    macro_rules! words_of {
        (f32, $V:ident, $row:expr, $k:expr, $depth:expr) => {
            $V::load($row.add($k), $depth - $k)
        };
        (bf16, $V:ident, $row:expr, $k:expr, $depth:expr) => {
            $V::load_pairs($row.add($k), $depth - $k)
        };
    }

    macro_rules! pack_forms {
        ($kind:ident, $feature:literal, $per:literal, $copy:ident, $turn:ident) => {
            /// # Safety
            /// `from` has `depth` values, `to` as many words as they fill.
            #[target_feature(enable = $feature)]
            pub(in crate::layers) unsafe fn $copy<V: Value>(from: *const V, depth: usize, to: *mut u32) {
                for k in (0..depth).step_by(16 * $per) {
                    let count = (depth - k).div_ceil($per);
                    // SAFETY: the mask leaves out what lies beyond the end.
                    unsafe {
                        let words = words_of!($kind, V, from, k, depth);
                        _mm512_mask_storeu_ps(to.add(k / $per).cast(), mask(count), words);
                    }
                }
            }

            /// # Safety
            /// Each row has `depth` values; `to` has room for 16 words every `step`.
            #[target_feature(enable = $feature)]
            pub(in crate::layers) unsafe fn $turn<V: Value>(
                rows: &[*const V],
                depth: usize,
                to: *mut u32,
                step: usize,
            ) {
                for k in (0..depth).step_by(16 * $per) {
                    let mut block = [_mm512_setzero_ps(); 16];
                    for (block, row) in block.iter_mut().zip(rows) {
                        // SAFETY: as above.
                        *block = unsafe { words_of!($kind, V, row, k, depth) };
                    }
                    transpose(&mut block);
                    let count = (depth - k).div_ceil($per).min(16);
                    for (w, elem) in block.iter().enumerate().take(count) {
                        // SAFETY: the caller's promise.
                        unsafe { _mm512_storeu_ps(to.add((k / $per + w) * step).cast(), *elem) };
                    }
                }
            }
        };
    }

    pack_forms!(f32, "avx512f,avx512vl,avx512dq,avx512bw", 1, copy_f32, turn_f32);
    pack_forms!(bf16, "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16", 2, copy_bf16, turn_bf16);

    /// Turns `taps` values around; `to` has room for 16.
    ///
    /// # Safety
    /// `from` has `taps` values.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    pub(in crate::layers) unsafe fn turn_run(from: *const half::bf16, taps: usize, to: *mut half::bf16) {
        let places = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let places = _mm256_sub_epi16(_mm256_set1_epi16(taps as i16 - 1), places);
        // SAFETY: the mask leaves out what lies beyond; the caller's promise.
        unsafe {
            let values = _mm256_maskz_loadu_epi16(mask(taps), from.cast());
            _mm256_storeu_si256(to.cast(), _mm256_permutexvar_epi16(places, values));
        }
    }

    /// # Safety
    /// As [`super::pack_lines`].
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
    pub(in crate::layers) unsafe fn lines_f32<V: Value>(
        columns: usize,
        depth: usize,
        line: impl Fn(usize) -> *const V,
        to: *mut u32,
        step: usize,
    ) {
        for k in 0..depth {
            // SAFETY: the caller's promise.
            unsafe {
                let line = line(k);
                for j in (0..columns).step_by(16) {
                    _mm512_storeu_ps(to.add(k * step + j).cast(), V::load(line.add(j), columns - j));
                }
            }
        }
    }

    /// # Safety
    /// As [`super::pack_lines`].
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
    pub(in crate::layers) unsafe fn lines_bf16<V: Value>(
        columns: usize,
        depth: usize,
        line: impl Fn(usize) -> *const V,
        to: *mut u32,
        step: usize,
    ) {
        for (w, k) in (0..depth).step_by(2).enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let (first, second) = (line(k), (k + 1 < depth).then(|| line(k + 1)));
                for j in (0..columns).step_by(16) {
                    let low = V::load_halves(first.add(j), columns - j);
                    let high = second
                        .map_or(_mm512_setzero_si512(), |second| V::load_halves(second.add(j), columns - j));
                    let words = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                    _mm512_storeu_si512(to.add(w * step + j).cast(), words);
                }
            }
        }
    }

    /// How 16 columns lie in the source.
    enum Lie {
        Together,
        TwoEights,
        Apart,
    }

    fn lie(columns: &[u32; 16]) -> Lie {
        let follow = |columns: &[u32]| columns.windows(2).all(|pair| pair[1] == pair[0] + 1);
        match (follow(columns), follow(&columns[..8]) && follow(&columns[8..])) {
            (true, _) => Lie::Together,
            (_, true) => Lie::TwoEights,
            _ => Lie::Apart,
        }
    }

    macro_rules! gathered {
        ($from:ident, $depth:ident, $columns:ident, $load:ident => $body:expr) => {
            match lie($columns) {
                Lie::Together => {
                    let $load = |offset: usize| _mm512_loadu_ps($from.add(offset + $columns[0] as usize));
                    $body
                }
                Lie::TwoEights => {
                    let $load = |offset: usize| {
                        let low = _mm256_loadu_ps($from.add(offset + $columns[0] as usize));
                        let high = _mm256_loadu_ps($from.add(offset + $columns[8] as usize));
                        _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)
                    };
                    $body
                }
                Lie::Apart => {
                    let places = _mm512_loadu_si512($columns.as_ptr().cast());
                    let $load = |offset: usize| _mm512_i32gather_ps::<4>(places, $from.add(offset).cast());
                    $body
                }
            }
        };
    }

    /// # Safety
    /// As [`super::pack_gathered`].
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
    pub(in crate::layers) unsafe fn gather_f32(
        from: *const f32,
        depth: &[usize],
        columns: &[u32; 16],
        to: *mut u32,
        step: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            gathered!(from, depth, columns, load => {
                for (w, offset) in depth.iter().enumerate() {
                    _mm512_storeu_ps(to.add(w * step).cast(), load(*offset));
                }
            });
        }
    }

    /// # Safety
    /// As [`super::pack_gathered`].
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
    pub(in crate::layers) unsafe fn gather_bf16(
        from: *const f32,
        depth: &[usize],
        columns: &[u32; 16],
        to: *mut u32,
        step: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            gathered!(from, depth, columns, load => {
                for (w, offsets) in depth.chunks(2).enumerate() {
                    let first = load(offsets[0]);
                    let second = offsets.get(1).map_or(_mm512_setzero_ps(), |offset| load(*offset));
                    let narrow = |x| _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)));
                    let words = _mm512_or_si512(narrow(first), _mm512_slli_epi32(narrow(second), 16));
                    _mm512_storeu_si512(to.add(w * step).cast(), words);
                }
            });
        }
    }

    /// Turns a square of 16 × 16 words over.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transpose(rows: &mut [__m512; 16]) {
        let mut pairs = [_mm512_setzero_ps(); 16];
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let double = |x: __m512| _mm512_castps_pd(x);
        let mut fours = [_mm512_setzero_ps(); 16];
        for i in 0..4 {
            for j in 0..2 {
                let (a, b) = (double(pairs[4 * i + j]), double(pairs[4 * i + 2 + j]));
                fours[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        // Lane l of fours[4 i + c] holds column 4 l + c of rows 4 i to 4 i + 3.
        for c in 0..4 {
            let even = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
            let odd = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
            let even_low = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
            let odd_low = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
            rows[c] = _mm512_shuffle_f32x4(even, even_low, 0x88);
            rows[8 + c] = _mm512_shuffle_f32x4(even, even_low, 0xdd);
            rows[4 + c] = _mm512_shuffle_f32x4(odd, odd_low, 0x88);
            rows[12 + c] = _mm512_shuffle_f32x4(odd, odd_low, 0xdd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turned_runs_are_pairs_of_the_values_turned_around() {
        for (rows, runs, taps) in
            [(1usize, 1usize, 1usize), (5, 7, 9), (12, 40, 9), (3, 4, 16), (2, 9, 1), (4, 5, 3)]
        {
            let values: Vec<bf16> = (0..rows * runs * taps).map(|i| bf16::from_bits(i as u16 + 1)).collect();
            let step = (runs * taps).div_ceil(2) + 1;
            let mut packed = vec![u32::MAX; rows * step];
            // SAFETY: each run has `taps` values.
            unsafe {
                let run = |o: usize, i: usize| values[(o * rows + i) * taps..].as_ptr();
                pack_transposed(rows, runs, taps, run, &mut packed, step);
            }
            for (i, row) in packed.chunks_exact(step).enumerate() {
                for k in 0..runs * taps {
                    let (o, t) = (k / taps, k % taps);
                    let got = (row[k / 2] >> (16 * (k % 2))) as u16;
                    assert_eq!(
                        got,
                        values[(o * rows + i) * taps + taps - 1 - t].to_bits(),
                        "{taps}: {i}, {k}"
                    );
                }
                if runs * taps % 2 == 1 {
                    assert_eq!(row[runs * taps / 2] >> 16, 0);
                }
                assert_eq!(row[step - 1], u32::MAX);
            }
        }
    }
}
