//! Plain slices of tensors, and the loops that run over them.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor};
use gemm::Parallelism;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::layers::gemm::isa::ElemType;

/// Whether the hand-written kernels apply to `x`.
pub(super) fn is_cpu_f32(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32
}

/// Whether the kernels take `weight` as it is stored: f32, or 16 bits that are widened or matmul as they are packed.
pub(super) fn is_cpu_weight(weight: &Tensor) -> bool {
    matches!(weight.device(), Device::Cpu) && matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// The values of a contiguous f32 operand of a custom operation.
pub(super) fn operand<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a kernel was given a tensor that is not contiguous: {layout:?}"),
    }
}

/// Runs `work` on the values of a contiguous f32 tensor on the CPU.
pub(super) fn with_values<T>(x: &Tensor, work: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(work(operand(storage, layout)?)),
        _ => candle_core::bail!("a CPU kernel was given a tensor on another device"),
    }
}

/// A weight as stored.
#[derive(Clone, Copy)]
pub(super) enum Weight<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Weight<'a> {
    /// The values of a contiguous operand.
    pub(super) fn operand(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a kernel was given a weight that is not contiguous: {layout:?}")
        };
        Ok(match storage {
            CpuStorage::F16(values) => Self::F16(&values[start..end]),
            CpuStorage::BF16(values) => Self::Bf16(&values[start..end]),
            values => Self::F32(&values.as_slice::<f32>()?[start..end]),
        })
    }

    /// The values in `range`, as f32, into `out`.
    pub(super) fn widen(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(values) => out.copy_from_slice(&values[range]),
            Self::F16(values) => values[range].convert_to_f32_slice(out),
            Self::Bf16(values) => values[range].convert_to_f32_slice(out),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// How its products are computed: of bf16 where it is stored so and the processor can, else of f32.
    pub(super) fn elem_type(&self) -> ElemType {
        match self {
            Self::Bf16(_) => ElemType::for_bf16(),
            _ => ElemType::F32,
        }
    }
}

/// Runs `work` on a contiguous weight on the CPU.
pub(super) fn with_weight<T>(weight: &Tensor, work: impl FnOnce(Weight) -> T) -> Result<T> {
    let (storage, layout) = weight.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(work(Weight::operand(storage, layout)?)),
        _ => candle_core::bail!("a CPU kernel was given a weight on another device"),
    }
}

/// Threads for one kernel: all of the machine's, or one where a training loop runs a shard a thread.
pub(super) fn threads() -> usize {
    // candle reads /proc/cpuinfo at every call, which takes longer than a small kernel.
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(candle_core::utils::get_num_threads)
}

/// Multiply-adds, or what takes as long, from which on other threads are woken: some 300 µs of one thread. Waking costs
/// each of them 20 to 50, and they look for more work for a while before they sleep again.
const WORTH_SHARING: usize = 1 << 24;

/// A value of an element-wise kernel (exponential, norm, copy), in multiply-adds.
const ELEMENT: usize = 32;

/// Threads for a kernel of `work` multiply-adds.
pub(super) fn threads_for(work: usize) -> usize {
    if work < WORTH_SHARING { 1 } else { threads() }
}

/// The threads as `gemm` wants them.
pub(super) fn parallelism() -> Parallelism {
    match threads() {
        1 => Parallelism::None,
        n => Parallelism::Rayon(n),
    }
}

/// Calls `work(i, chunk)` for the `i`-th chunk of `size` values of `out`, on all threads where there are many values.
///
/// With one thread it runs where it is called: rayon would send the work of several shards to its one worker.
pub(super) fn for_chunks<T: Send>(out: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    for_chunks_on(threads_for(out.len() * ELEMENT), out, size, work);
}

/// The same on `threads` threads, one or all ([`threads_for`]).
pub(super) fn for_chunks_on<T: Send>(
    threads: usize,
    out: &mut [T],
    size: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    if threads == 1 {
        out.chunks_mut(size).enumerate().for_each(|(i, chunk)| work(i, chunk));
    } else {
        out.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| work(i, chunk));
    }
}

/// Calls `work(0)`, …, `work(count − 1)` on all threads.
pub(super) fn for_each(count: usize, work: impl Fn(usize) + Sync + Send) {
    for_each_on(threads(), count, work);
}

/// The same on `threads` threads, likewise.
pub(super) fn for_each_on(threads: usize, count: usize, work: impl Fn(usize) + Sync + Send) {
    if threads == 1 || count == 1 {
        (0..count).for_each(work);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(work);
    }
}

/// `work(0)`, …, `work(count − 1)` on `threads` threads, in order.
pub(super) fn map_indices_on<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> T + Sync + Send,
) -> Vec<T> {
    if threads == 1 || count == 1 {
        (0..count).map(work).collect()
    } else {
        (0..count).into_par_iter().with_max_len(1).map(work).collect()
    }
}

/// A pointer into an output whose parts several threads write, each its own.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: it is a mere address; who writes through it promises to write what no one else does.
unsafe impl Send for Shared {}
// SAFETY: likewise.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(first: *mut f32) -> Self {
        Self(first)
    }

    pub(super) fn get(self) -> *mut f32 {
        self.0
    }
}

/// Compiles a function for the widest vectors of the processor that it meets: the body stands three times,
/// with AVX-512, with AVX2, and plain. Closures inside inherit the instruction set.
macro_rules! vectorised {
    ($(#[$attribute:meta])* $visible:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        $visible fn $name($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                fn wide($($argument: $type),*) $(-> $result)? $body
                #[target_feature(enable = "avx2,fma")]
                fn medium($($argument: $type),*) $(-> $result)? $body
                use std::arch::is_x86_feature_detected as has;
                if has!("avx512f") && has!("avx512vl") && has!("avx512dq") && has!("avx512bw") {
                    // SAFETY: the processor has the instructions that `wide` is compiled for.
                    return unsafe { wide($($argument),*) };
                }
                if has!("avx2") && has!("fma") {
                    // SAFETY: likewise.
                    return unsafe { medium($($argument),*) };
                }
            }
            $body
        }
    };
}
pub(crate) use vectorised;

/// A row-major or transposed matrix over a slice: the value at (i, j) is `values[i * row + j * column]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub values: &'a [f32],
    pub row: usize,
    pub column: usize,
}

/// `out[i * out_row + j] (+)= scale · Σ_k a[i, k] · b[k, j]`, for i < m and j < n.
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub scale: f32,
    /// Add to what is in `out`.
    pub add: bool,
    pub parallelism: Parallelism,
}

impl Product {
    pub(super) fn write(&self, a: Matrix, b: Matrix, out: &mut [f32], out_row: usize) {
        let Self { m, n, .. } = *self;
        if m == 0 || n == 0 {
            return;
        }
        assert!((m - 1) * out_row + n <= out.len());
        // SAFETY: the assert bounds every element that is written, and `out` is borrowed mutably.
        unsafe { self.write_to(a, b, out.as_mut_ptr(), out_row) }
    }

    /// The same where other threads write beside it.
    ///
    /// # Safety
    /// From `out` on there are `n` values in each of `m` rows, `out_row` apart, which this call may write; where it adds
    /// they are initialised.
    pub(super) unsafe fn write_to(&self, a: Matrix, b: Matrix, out: *mut f32, out_row: usize) {
        let Self { m, n, k, .. } = *self;
        if m == 0 || n == 0 {
            return;
        }
        let end = |rows: usize, columns: usize, matrix: &Matrix| {
            (rows.max(1) - 1) * matrix.row + (columns.max(1) - 1) * matrix.column
        };
        assert!(end(m, k, &a) < a.values.len() && end(k, n, &b) < b.values.len());
        let parallelism = if threads_for(m * n * k) == 1 { Parallelism::None } else { self.parallelism };
        // SAFETY: the assert bounds every element that is read; for those written the caller vouches.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out,
                1,
                out_row as isize,
                self.add,
                a.values.as_ptr(),
                a.column as isize,
                a.row as isize,
                b.values.as_ptr(),
                b.column as isize,
                b.row as isize,
                1.0,
                self.scale,
                false,
                false,
                false,
                parallelism,
            )
        }
    }
}

/// e^x to 2 ulp, in operations that the compiler turns into vectors. (Cephes `expf` polynomial.)
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding 1.5 · 2^23 rounds to the nearest integer, which is then in the lowest bits.
    let shifted = x * std::f32::consts::LOG2_E + 12_582_912.0;
    let n = shifted - 12_582_912.0;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits((shifted.to_bits() + 127) << 23)
}

/// Σ f(x) in 16 running sums, which the compiler keeps in one vector.
#[inline(always)]
pub(super) fn lanes_sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = values.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|x| f(*x)).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Puts f(x) in the place of each x; their sum, likewise.
#[inline(always)]
pub(super) fn lanes_map_sum(values: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let mut chunks = values.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = f(*x);
            *lane += *x;
        }
    }
    let mut rest = 0.0;
    for x in chunks.into_remainder() {
        *x = f(*x);
        rest += *x;
    }
    lanes.iter().sum::<f32>() + rest
}

/// The largest value, likewise.
#[inline(always)]
pub(super) fn lanes_max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = larger(*lane, *x));
    }
    lanes.iter().copied().fold(rest, larger)
}

/// Σ a · (b − shift), likewise.
#[inline(always)]
pub(super) fn lanes_dot(a: &[f32], b: &[f32], shift: f32) -> f32 {
    let mut lanes = [0f32; 16];
    let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(a, b)| a * (b - shift)).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * (b - shift);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

vectorised! {
    /// Σ x.
    pub(super) fn sum(values: &[f32]) -> f32 {
        lanes_sum(values, |x| x)
    }
}
