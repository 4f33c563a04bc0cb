//! The instruction sets that the kernels have forms for, and the words that they multiply.

/// Contents of one word of a packed operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::layers) enum ElemType {
    /// One f32.
    F32,
    /// Two bf16, where the processor multiplies them ([`ElemType::for_bf16`]).
    Bf16,
}

impl ElemType {
    /// How operands are packed where the weights are bf16: as pairs where the processor multiplies them.
    pub(in crate::layers) fn for_bf16() -> Self {
        if has_bf16() { Self::Bf16 } else { Self::F32 }
    }

    /// Values in a word.
    pub(in crate::layers) fn per(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }
}

/// Whether the processor has AVX-512, as far as the kernels here use it.
pub(in crate::layers) fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        has!("avx512f")
            && has!("avx512vl")
            && has!("avx512dq")
            && has!("avx512bw")
            && has!("avx2")
            && has!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The best instruction set that the kernels here have a form for.
pub(in crate::layers) fn instruction_set() -> &'static str {
    if has_bf16() {
        return "AVX-512 with BF16";
    }
    if has_avx512() {
        return "AVX-512";
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        return "AVX2";
    }
    "portable"
}

/// Whether the processor multiplies bf16.
fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        has_avx512() && std::arch::is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The first `count` of 16 lanes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(in crate::layers) fn mask(count: usize) -> u16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}
