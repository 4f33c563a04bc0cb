//! Stored values of operands, and how 16 or 32 of them are loaded at once.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use crate::layers::gemm::isa::mask;

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
