//! W + B·A for a thin product: what a merged LoRA adds to a weight, in one pass over memory.

use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor};
use gemm::Parallelism;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::layers::cpu::{self, Matrix, Product, vectorised};

/// Values that a thread widens at a time: 256 KiB of f32, which stay in its cache.
const NC: usize = 1 << 16;

/// `weight` (out, …) + `up` (out, R) · `down` (R, rest), computed in f32 and rounded once to the weight's type.
///
/// The result is a new tensor: whoever holds the old one keeps the old values.
pub fn add_low_rank(weight: &Tensor, up: &Tensor, down: &Tensor) -> Result<Tensor> {
    let known = matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16);
    if known && matches!(weight.device(), Device::Cpu) {
        let factor = |factor: &Tensor| factor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous();
        return weight.contiguous()?.apply_op3_no_bwd(&factor(up)?, &factor(down)?, &AddLowRank);
    }
    let on = |factor: &Tensor| factor.to_device(weight.device())?.to_dtype(DType::F32);
    let product = on(up)?.matmul(&on(down)?)?.reshape(weight.shape())?;
    (weight.to_dtype(DType::F32)? + product)?.to_dtype(weight.dtype())
}

struct AddLowRank;

impl CustomOp3 for AddLowRank {
    fn name(&self) -> &'static str {
        "add-low-rank"
    }

    fn cpu_fwd(
        &self,
        weight: &CpuStorage,
        weight_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
        down: &CpuStorage,
        down_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = weight_layout.shape();
        let ((out, rank), (inner, width)) = (up_layout.shape().dims2()?, down_layout.shape().dims2()?);
        if inner != rank || shape.dims().first() != Some(&out) || shape.elem_count() != out * width {
            candle_core::bail!("{out}×{rank} times {inner}×{width} cannot be added to {shape:?}");
        }
        let up = cpu::operand(up, up_layout)?;
        let down = cpu::operand(down, down_layout)?;
        let factors = Factors { up, down, rank, width };
        let Some((begin, end)) = weight_layout.contiguous_offsets() else {
            candle_core::bail!("a kernel was given a weight that is not contiguous: {weight_layout:?}")
        };
        let sum = match weight {
            CpuStorage::F32(values) => CpuStorage::F32(factors.added_to(&values[begin..end])),
            CpuStorage::F16(values) => CpuStorage::F16(factors.added_to(&values[begin..end])),
            CpuStorage::BF16(values) => CpuStorage::BF16(factors.added_to(&values[begin..end])),
            _ => candle_core::bail!("a weight that is no float takes no LoRA"),
        };
        Ok((sum, shape.clone()))
    }
}

struct Factors<'a> {
    /// (out, R)
    up: &'a [f32],
    /// (R, width)
    down: &'a [f32],
    rank: usize,
    width: usize,
}

impl Factors<'_> {
    fn added_to<T: Stored>(&self, weight: &[T]) -> Vec<T> {
        let mut sum = vec![T::default(); weight.len()];
        let rows = (NC / self.width.max(1)).max(1);
        let size = rows * self.width;
        let work = |wide: &mut Vec<f32>, (i, (sum, weight)): (usize, (&mut [T], &[T]))| {
            wide.resize(weight.len(), 0.0);
            T::widen(weight, wide);
            self.add_rows(i * rows, wide);
            T::narrow(wide, sum);
        };
        if cpu::threads() == 1 {
            let mut wide = Vec::new();
            let blocks = sum.chunks_mut(size).zip(weight.chunks(size)).enumerate();
            blocks.for_each(|block| work(&mut wide, block));
        } else {
            let blocks = sum.par_chunks_mut(size).zip(weight.par_chunks(size)).enumerate();
            blocks.for_each_init(Vec::new, |wide, block| work(wide, block));
        }
        sum
    }

    /// Adds the product's rows from `first` on to `rows`.
    fn add_rows(&self, first: usize, rows: &mut [f32]) {
        let Self { rank, width, .. } = *self;
        let m = rows.len() / width;
        let up = &self.up[first * rank..(first + m) * rank];
        let product = Product { m, n: width, k: rank, scale: 1.0, add: true, parallelism: Parallelism::None };
        product.write(
            Matrix { values: up, row: rank, column: 1 },
            Matrix { values: self.down, row: width, column: 1 },
            rows,
            width,
        );
    }
}

/// A number type that weights are kept in.
trait Stored: Copy + Default + Send + Sync {
    fn widen(stored: &[Self], wide: &mut [f32]);
    fn narrow(wide: &[f32], stored: &mut [Self]);
}

impl Stored for f32 {
    fn widen(stored: &[Self], wide: &mut [f32]) {
        wide.copy_from_slice(stored);
    }

    fn narrow(wide: &[f32], stored: &mut [Self]) {
        stored.copy_from_slice(wide);
    }
}

impl Stored for f16 {
    fn widen(stored: &[Self], wide: &mut [f32]) {
        stored.convert_to_f32_slice(wide);
    }

    fn narrow(wide: &[f32], stored: &mut [Self]) {
        stored.convert_from_f32_slice(wide);
    }
}

impl Stored for bf16 {
    fn widen(stored: &[Self], wide: &mut [f32]) {
        widen_bf16(stored, wide);
    }

    fn narrow(wide: &[f32], stored: &mut [Self]) {
        narrow_bf16(wide, stored);
    }
}

vectorised! {
    fn widen_bf16(stored: &[bf16], to: &mut [f32]) {
        for (to, stored) in to.iter_mut().zip(stored) {
            *to = f32::from_bits(u32::from(stored.to_bits()) << 16);
        }
    }
}

vectorised! {
    /// To the nearest, ties to even, as `bf16::from_f32`, whose branches the compiler makes no vectors of.
    fn narrow_bf16(from: &[f32], stored: &mut [bf16]) {
        for (stored, from) in stored.iter_mut().zip(from) {
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let quiet = bits >> 16 | 0x40;
            let kept = if from.is_nan() { quiet } else { rounded };
            *stored = bf16::from_bits(kept as u16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise::normal;

    fn random(stream: u64, shape: &[usize]) -> Tensor {
        normal(6, stream, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn every_type_is_changed_in_f32_and_rounded_once() {
        // More than one block, a last one that is not full, and a convolution.
        for shape in [&[700, 150][..], &[1, 3], &[5, 4, 3, 3]] {
            let (out, width) = (shape[0], shape[1..].iter().product::<usize>());
            let (up, down) = (random(1, &[out, 4]), random(2, &[4, width]));
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let weight = random(3, shape).to_dtype(dtype).unwrap();
                let sum = add_low_rank(&weight, &up, &down).unwrap();
                assert_eq!((sum.dtype(), sum.dims()), (dtype, shape));
                let product = up.matmul(&down).unwrap().reshape(shape).unwrap();
                let wanted = (weight.to_dtype(DType::F32).unwrap() + product).unwrap();
                let far = (sum.to_dtype(DType::F32).unwrap() - &wanted).unwrap().abs().unwrap();
                let far = far.max_all().unwrap().to_scalar::<f32>().unwrap();
                // Values stay below 16: half a step of each type.
                let step = match dtype {
                    DType::F32 => 4e-6,
                    DType::F16 => 0.0040,
                    _ => 0.0315,
                };
                assert!(far <= step, "{shape:?} {dtype:?}: {far}");
            }
        }
    }

    #[test]
    fn bf16_is_rounded_as_the_half_crate_rounds() {
        let odd =
            [0.0, -0.0, 1.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, f32::MIN_POSITIVE];
        let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff, 0xffc0_0001, 0x7f80_0001]
            .map(f32::from_bits);
        let values: Vec<f32> = odd.into_iter().chain(ties).collect();
        let mut rounded = vec![bf16::ZERO; values.len()];
        narrow_bf16(&values, &mut rounded);
        for (value, rounded) in values.iter().zip(rounded) {
            assert_eq!(rounded.to_bits(), bf16::from_f32(*value).to_bits(), "{value}");
        }
    }

    #[test]
    fn factors_of_another_size_are_refused() {
        let weight = random(1, &[6, 5]);
        for (up, down) in [([6, 2], [3, 5]), ([5, 2], [2, 6]), ([6, 2], [2, 4])] {
            assert!(add_low_rank(&weight, &random(2, &up), &random(3, &down)).is_err());
        }
    }
}
