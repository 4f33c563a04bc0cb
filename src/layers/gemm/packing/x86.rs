//! Packing with AVX-512.

use std::arch::x86_64::*;

use super::values::Value;
use crate::layers::gemm::isa::mask;

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
