//! Products of bf16 by oneDNN, for processors with AMX, which our own kernels do not use.
//!
//! oneDNN takes over where [`crate::layers::gemm::matmul`] has a block to compute: operands are packed as always, by the same
//! functions, and its kernels multiply them, some hundred rows and columns at once. Panels of 32 columns with pairs along
//! the depth side by side are what oneDNN calls `BA16a32b2a`. So linear layers, convolutions and gradients with respect
//! to inputs are served alike, no weight is stored twice, and threads stay ours: each calls oneDNN for blocks of its own,
//! and oneDNN starts none.

mod library;

use std::cell::RefCell;
use std::ops::Range;

use library::Product;

use crate::layers::cpu::vectorised;
use crate::layers::gemm::isa::ElemType;
use crate::layers::gemm::microkernel::{DEPTH, NR};
use crate::layers::gemm::operands::{Accumulate, Output, PackA, PackB, Size};

/// Rows that are matmul at once.
const MR: usize = 192;
/// Most words along the depth that are matmul at once; sums pass through memory as often as this is exceeded.
const KC: usize = 1536;
/// Blocks of fewer rows are quicker without.
const FEWEST_ROWS: usize = 16;
/// ElemType along the depth are filled up with zeros to a multiple of this.
const UNIT: usize = 16;

/// Whether the library is found and of a version that is used.
pub(in crate::layers) fn is_available() -> bool {
    library::is_there()
}

/// Memory of this thread for packed operands and sums, kept from call to call.
#[derive(Default)]
struct Scratch {
    left: Vec<u32>,
    right: Vec<u32>,
    sums: Vec<f32>,
}

/// Computes some rows and columns of a product of bf16. `false` where oneDNN cannot: they have to be computed anew then.
///
/// # Safety
/// `output.to` may be written wherever its layout reaches for these rows and columns.
pub(in crate::layers) unsafe fn block<L: PackA, R: PackB>(
    rows: Range<usize>,
    columns: Range<usize>,
    size: Size,
    left: &L,
    right: &R,
    output: Output,
) -> bool {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    if rows.len() < FEWEST_ROWS || !library::is_there() {
        return false;
    }
    let (elem, per) = (ElemType::Bf16, ElemType::Bf16.per());
    let unit = right.depth_unit() * per;
    let deep = size.k.div_ceil(size.k.div_ceil(KC * per)).next_multiple_of(unit);
    // What may be packed at once.
    let most = DEPTH * per;
    let piece = if unit <= most { most / unit * unit } else { most };
    // Taken out, not borrowed: packing is foreign code.
    let mut scratch = SCRATCH.take();
    for from in (0..size.k).step_by(deep) {
        let depth = from..(from + deep).min(size.k);
        let count = depth.len().div_ceil(per);
        let filled = count.next_multiple_of(UNIT);
        let step = filled * NR;
        let packed = grown(&mut scratch.right, columns.len().div_ceil(NR) * step);
        for k in depth.clone().step_by(piece) {
            let to = &mut packed[(k - from) / per * NR..];
            right.pack_columns(elem, columns.clone(), k..(k + piece).min(depth.end), to, step);
        }
        for panel in packed.chunks_exact_mut(step) {
            panel[count * NR..].fill(0);
        }
        for i in rows.clone().step_by(MR) {
            let rows = i..(i + MR).min(rows.end);
            let lines = grown(&mut scratch.left, rows.len() * filled);
            left.pack_rows(elem, rows.clone(), depth.clone(), lines, filled);
            for row in lines.chunks_exact_mut(filled) {
                row[count..].fill(0);
            }
            let sums = grown(&mut scratch.sums, rows.len() * columns.len());
            let product = Product { rows: rows.len(), columns: columns.len(), depth: filled * per };
            if !library::multiply(product, lines, packed, sums) {
                return false;
            }
            let output = output.after(from);
            for (i, sums) in rows.zip(sums.chunks_exact(columns.len())) {
                // SAFETY: the caller's promise.
                unsafe { put(i, columns.clone(), sums, size, output) }
            }
        }
    }
    SCRATCH.set(scratch);
    true
}

/// The first `count` values of memory that only grows; their content is arbitrary.
fn grown<T: Copy + Default>(memory: &mut Vec<T>, count: usize) -> &mut [T] {
    memory.resize(memory.len().max(count), T::default());
    &mut memory[..count]
}

/// Adds a row of sums to what it begins with.
///
/// # Safety
/// As [`block`].
unsafe fn put(
    i: usize,
    columns: Range<usize>,
    sums: &[f32],
    size: Size,
    Output { to: out, start, place }: Output,
) {
    for part in columns.start / place.part..columns.end.div_ceil(place.part) {
        let here = columns.start.max(part * place.part)..columns.end.min((part + 1) * place.part);
        let sums = &sums[here.start - columns.start..][..here.len()];
        // SAFETY: the caller's promise.
        let out = unsafe {
            let to = out.get().add(part * place.part_step + i * place.row + here.start % place.part);
            if !matches!(start, Accumulate::Output) {
                to.copy_from_nonoverlapping(sums.as_ptr(), sums.len());
            }
            std::slice::from_raw_parts_mut(to, sums.len())
        };
        match start {
            Accumulate::Zero => {}
            Accumulate::Output => add(out, sums),
            Accumulate::Rows(values) => add_number(out, values[(part * size.m + i) % values.len()]),
            Accumulate::Columns(values) => add(out, &values[here]),
        }
    }
}

vectorised! {
    fn add(out: &mut [f32], values: &[f32]) {
        out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
    }
}

vectorised! {
    fn add_number(out: &mut [f32], value: f32) {
        out.iter_mut().for_each(|out| *out += value);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Module, Result, Tensor, Var};
    use candle_nn::VarBuilder;

    use super::*;
    use crate::layers::cpu::Weight;
    use crate::layers::gemm::matmul::matmul;
    use crate::layers::gemm::operands::ContiguousDepth;
    use crate::layers::{Conv2d, ConvGeometry, Linear};

    /// Whether there is something to test.
    fn is_there() -> bool {
        let there = library::is_there() && ElemType::for_bf16() == ElemType::Bf16;
        if !there {
            eprintln!("skipped: no oneDNN here, or no processor that multiplies bf16");
        }
        there
    }

    /// Values within ±1 that are exact in bf16, so that only the order of sums differs from products of f32.
    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 255) as f32 / 128.0 - 1.0).collect()
    }

    fn tensor(shape: &[usize], seed: usize) -> Result<Tensor> {
        Tensor::from_vec(values(shape.iter().product(), seed), shape, &Device::Cpu)
    }

    fn apart(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, x| if x <= worst { worst } else { x })
    }

    #[test]
    fn blocks_of_odd_sizes_are_those_of_our_own_kernel() {
        if !is_there() {
            return;
        }
        for (m, n, k, part) in [(16, 1, 1, 1), (37, 70, 1029, 70), (200, 545, 17, 545), (193, 63, 3333, 21)] {
            let size = Size { m, n, k };
            let (a, b) = (values(m * k, 1), values(n * k, 2));
            let (left, right) = (
                ContiguousDepth::new(Weight::F32(&a), k, m, k),
                ContiguousDepth::new(Weight::F32(&b), k, n, k),
            );
            let place = OutputLayout { row: part, part, part_step: m * part };
            let (columns, rows) = (values(n, 3), values(m * (n / part), 4));
            for start in [Accumulate::Zero, Accumulate::Columns(&columns), Accumulate::Rows(&rows)] {
                let own = matmul(ElemType::F32, size, &left, &right, start, place);
                let mut out = vec![f32::NAN; m * n];
                // SAFETY: `place` is a permutation of 0..m · n.
                let done = unsafe {
                    block(0..m, 0..n, size, &left, &right, start, Shared::new(out.as_mut_ptr()), place)
                };
                assert!(done && apart(&out, &own) < 1e-3, "{m}×{n}×{k}: {}", apart(&out, &own));
            }
        }
    }

    /// Output and gradient with respect to the input of a layer with weights of f32, and of the same in bf16.
    fn compare(x: &Tensor, layer: impl Fn(DType) -> Result<Box<dyn Module>>) -> Result<()> {
        let results = [DType::F32, DType::BF16].map(|dtype| -> Result<[Vec<f32>; 2]> {
            let x = Var::from_tensor(x)?;
            let y = layer(dtype)?.forward(&x)?;
            let grads = (&y * tensor(y.dims(), 5)?)?.sum_all()?.backward()?;
            let grad = grads.get(&x).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"))?;
            Ok([y.flatten_all()?.to_vec1::<f32>()?, grad.flatten_all()?.to_vec1()?])
        });
        let [own, ours] = results;
        for (own, ours) in own?.iter().zip(&ours?) {
            assert!(apart(own, ours) < 2e-3, "{}", apart(own, ours));
        }
        Ok(())
    }

    #[test]
    fn layers_and_their_gradients_are_those_of_our_own_kernel() -> Result<()> {
        if !is_there() {
            return Ok(());
        }
        let (weight, bias) = (tensor(&[70, 3100], 1)?, tensor(&[70], 2)?);
        compare(&tensor(&[37, 3100], 3)?, |dtype| {
            let (weight, bias) = (weight.to_dtype(dtype)?, Some(bias.clone()));
            Ok(Box::new(Linear { weight, bias, adapter: None }))
        })?;
        // Deeper than what is packed, and than what is matmul, at once.
        let (weight, bias) = (tensor(&[20, 360, 3, 3], 1)?, tensor(&[20], 2)?);
        for geometry in [ConvGeometry::same(3), ConvGeometry { stride: 2, ..ConvGeometry::same(3) }] {
            compare(&tensor(&[2, 360, 9, 7], 3)?, |dtype| {
                let tensors = [("weight", &weight), ("bias", &bias)];
                let tensors = tensors
                    .map(|(name, tensor)| -> Result<_> { Ok((name.to_string(), tensor.to_dtype(dtype)?)) });
                let vb = VarBuilder::from_tensors(
                    tensors.into_iter().collect::<Result<_>>()?,
                    dtype,
                    &Device::Cpu,
                );
                Ok(Box::new(Conv2d::new(360, 20, geometry, vb)?))
            })?;
        }
        Ok(())
    }
}
