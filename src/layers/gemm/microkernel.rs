//! The innermost loop of every matrix product: a tile of 12 × 32 sums over packed operands.
//!
//! Operands lie in 32-bit elem, each of which holds one f32, or two bf16 that follow each other along the depth
//! (`vdpbf16ps` multiplies both and adds in f32). The left operand is packed as up to 12 rows of elem, the right one as
//! panels of 32 columns, word by word. Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication",
//! tells why this form is fast.
//!
//! There are three forms: AVX-512, AVX2 and plain Rust. All add along the depth in the same order, whatever part of the
//! product a tile is; only fused multiply-add makes them differ.

use super::isa::ElemType;
#[cfg(target_arch = "x86_64")]
use super::isa::has_avx512;

/// Rows of a tile.
pub(in crate::layers) const MR: usize = 12;
/// Columns of a tile and of a packed panel.
pub(in crate::layers) const NR: usize = 32;
/// Most words along the depth that are packed at once.
pub(in crate::layers) const DEPTH: usize = 256;
/// ElemType from one packed row of the left operand to the next; not a power of two, so that rows lie in different sets
/// of the cache.
pub(in crate::layers) const STRIDE: usize = DEPTH + 16;

/// Asks for the cache line of `at`, which is soon read; any address will do.
#[inline(always)]
pub(in crate::layers) fn prefetch(at: *const u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it is but a hint, and SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::*;
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// A tile of sums and the packed operands that it is made of:
/// `out[i · row + j] = or += Σ left[i · step + w] · right[w · right_step + j]` for i < rows, j < columns and w < depth.
#[derive(Clone, Copy)]
pub(in crate::layers) struct Tile {
    /// At most 12.
    pub rows: usize,
    /// At most 32.
    pub columns: usize,
    /// Words.
    pub depth: usize,
    /// Packed rows; read to the next multiple of 4, all 12 without AVX-512.
    pub left: *const u32,
    /// Words from one row to the next.
    pub step: usize,
    /// `depth` rows of 32 words.
    pub right: *const u32,
    /// Words from one of these rows to the next.
    pub right_step: usize,
    /// The sums.
    pub out: *mut f32,
    /// Values from one row of them to the next.
    pub row: usize,
    /// Add to what is in `out`.
    pub add: bool,
}

/// Computes a tile.
///
/// # Safety
/// The operands are there as [`Tile`] says, and `out` may be written within its bounds.
pub(in crate::layers) unsafe fn compute(elem: ElemType, tile: &Tile) {
    debug_assert!(tile.rows <= MR && tile.columns <= NR);
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            // SAFETY: the processor has AVX-512, and bf16 where words are pairs.
            return unsafe {
                match elem {
                    ElemType::F32 => x86::tile_f32(tile),
                    ElemType::Bf16 => x86::tile_bf16(tile),
                }
            };
        }
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") {
            // SAFETY: the processor has AVX2 and FMA.
            return unsafe { x86::tile_avx2(tile) };
        }
    }
    debug_assert!(elem == ElemType::F32, "pairs need a processor that multiplies bf16");
    // SAFETY: the caller's promise.
    unsafe { tile_plain::<{ cfg!(target_arch = "aarch64") }>(tile) }
}

/// Six rows and 16 columns at a time, which is what 16 vectors of 8 hold.
///
/// # Safety
/// As [`compute`].
#[inline(always)]
unsafe fn tile_plain<const FUSED: bool>(tile: &Tile) {
    let Tile { rows, columns, depth, left, step, right, right_step, out, row, add } = *tile;
    for i in (0..rows).step_by(6) {
        for j in (0..columns).step_by(16) {
            let mut sums = [[0f32; 16]; 6];
            for w in 0..depth {
                // SAFETY: the caller's promise.
                let b = unsafe { &*right.add(w * right_step + j).cast::<[f32; 16]>() };
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: the panel has room for all 12 rows.
                    let a = unsafe { *left.add((i + r) * step + w).cast::<f32>() };
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = if FUSED { a.mul_add(*b, *sum) } else { a * b + *sum };
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate().take(rows - i) {
                let count = (columns - j).min(16);
                // SAFETY: the caller's promise.
                let out = unsafe { std::slice::from_raw_parts_mut(out.add((i + r) * row + j), count) };
                if add {
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                } else {
                    out.copy_from_slice(&sums[..count]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Tile, tile_plain};
    use crate::layers::gemm::isa::mask;

    macro_rules! tile_forms {
        ($feature:literal, $tile:ident, $tile_of:ident, $multiply:expr) => {
            /// # Safety
            /// As [`crate::layers::gemm::microkernel`].
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $tile(tile: &Tile) {
                // SAFETY: the caller's promise; rows are read in fours.
                unsafe {
                    match tile.rows {
                        0..=4 => $tile_of::<4>(tile),
                        5..=8 => $tile_of::<8>(tile),
                        _ => $tile_of::<12>(tile),
                    }
                }
            }

            #[target_feature(enable = $feature)]
            unsafe fn $tile_of<const R: usize>(tile: &Tile) {
                let Tile { rows, columns, depth, left, step, right, right_step, out, row, add } = *tile;
                // What the sums are added to comes into the cache while they are computed.
                for i in 0..R {
                    for j in [0, 16, 31] {
                        _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(i * row + j).cast());
                    }
                }
                let mut sums = [[_mm512_setzero_ps(); 2]; R];
                for w in 0..depth {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let b = right.add(w * right_step).cast::<f32>();
                        let b = [_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16))];
                        for (i, sums) in sums.iter_mut().enumerate() {
                            let a = _mm512_set1_ps(*left.add(i * step + w).cast::<f32>());
                            sums[0] = $multiply(sums[0], a, b[0]);
                            sums[1] = $multiply(sums[1], a, b[1]);
                        }
                    }
                }
                let masks = [mask(columns), mask(columns.saturating_sub(16))];
                for (i, sums) in sums.iter().enumerate() {
                    if i >= rows {
                        break;
                    }
                    for (j, (sum, mask)) in sums.iter().zip(masks).enumerate() {
                        // SAFETY: the masks leave out what lies beyond `columns`.
                        unsafe {
                            let out = out.wrapping_add(i * row + 16 * j);
                            let sum = if add {
                                _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), *sum)
                            } else {
                                *sum
                            };
                            _mm512_mask_storeu_ps(out, mask, sum);
                        }
                    }
                }
            }
        };
    }

    tile_forms!("avx512f,avx512vl,avx512dq,avx512bw", tile_f32, tile_f32_of, |sum, a, b| {
        _mm512_fmadd_ps(a, b, sum)
    });
    tile_forms!(
        "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16",
        tile_bf16,
        tile_bf16_of,
        |sum, a: __m512, b: __m512| {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    );

    /// # Safety
    /// As [`crate::layers::gemm::microkernel`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile_avx2(tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile_plain::<true>(tile) }
    }
}
