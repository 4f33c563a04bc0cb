//! The tensor algebra of adapter kinds: Tucker and Kronecker products, rotations by Cayley's transform, norms along an
//! axis.

use candle_core::{DType, Device, Result, Tensor};

/// Added to DoRA's norms by LyCORIS: ε of f32.
const NORM_EPS: f64 = f32::EPSILON as f64;

pub(super) fn f32(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(DType::F32)
}

/// (n, …) → (n, rest).
pub(super) fn flat(tensor: &Tensor) -> Result<Tensor> {
    if tensor.rank() == 2 { Ok(tensor.clone()) } else { tensor.reshape((tensor.dim(0)?, ())) }
}

/// `values` (n) shaped to be multiplied along the outputs or the inputs of a weight of `axes` axes.
pub(super) fn along(values: &Tensor, on_input: bool, axes: usize) -> Result<Tensor> {
    let mut shape = vec![1; axes];
    shape[usize::from(on_input)] = values.elem_count();
    values.reshape(shape)
}

/// Norm of each output's weights (out, 1, …), or of each input's (1, in, …).
pub(super) fn norms(weight: &Tensor, on_input: bool) -> Result<Tensor> {
    let lines = if on_input { weight.transpose(0, 1)?.contiguous()? } else { weight.clone() };
    let norms = (flat(&lines)?.sqr()?.sum(1)?.sqrt()? + NORM_EPS)?;
    along(&norms, on_input, weight.rank())
}

/// Σ over i, j of core[i, j, …] · a[i, p] · b[j, q] → (p, q, …). `a` (R, out), `b` (R, in), `core` (R, R, k, k).
pub(super) fn tucker(a: &Tensor, b: &Tensor, core: &Tensor) -> Result<Tensor> {
    let (i, j, kh, kw) = core.dims4()?;
    let (out, input) = (a.dim(1)?, b.dim(1)?);
    let core = core.permute((0, 2, 3, 1))?.reshape((i * kh * kw, j))?;
    let inner = core.matmul(b)?.reshape((i, kh * kw * input))?;
    let outer = a.t()?.contiguous()?.matmul(&inner)?.reshape((out, kh, kw, input))?;
    outer.permute((0, 3, 1, 2))?.contiguous()
}

/// (a, c) ⊗ (b, d) → (a·b, c·d).
pub(super) fn kronecker(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let ((a, c), (b, d)) = (first.dims2()?, second.dims2()?);
    let product = first.reshape((a, 1, c, 1))?.broadcast_mul(&second.reshape((1, b, 1, d))?)?;
    product.reshape((a * b, c * d))
}

/// W' − W where each block of outputs is turned: OFT multiplies block n by Rᵀ, BOFT by R stage after stage, with
/// outputs shuffled in between so that all meet (LyCORIS `functional/diag_oft.py`, `functional/boft.py`).
pub(super) fn turned(
    weight: &Tensor,
    blocks: &Tensor,
    rescale: Option<&Tensor>,
    constraint: f32,
    times: f64,
) -> Result<Tensor> {
    let shape = weight.shape();
    let (out, rest) = flat(weight)?.dims2()?;
    let rotations = rotations(blocks, f64::from(constraint) * out as f64, times, weight.device())?;
    if let Ok((count, size, _)) = rotations.dims3() {
        let rows = weight.reshape((count, size, rest))?;
        let turned = rotations.transpose(1, 2)?.contiguous()?.matmul(&rows)?.reshape(shape)?;
        return match rescale {
            None => turned - weight,
            // The rescaling is not drawn towards 1 with `times`.
            Some(rescale) => turned.broadcast_mul(rescale)? - weight,
        };
    }
    let (stages, count, size, _) = rotations.dims4()?;
    let mut rows = flat(weight)?;
    for stage in 0..stages {
        let step = (1 << stage) * (size / 2);
        let shuffled = rows.reshape((out / (2 * step), 2, step, rest))?.transpose(1, 2)?.contiguous()?;
        let turned = rotations.get(stage)?.matmul(&shuffled.reshape((count, size, rest))?)?;
        rows = turned
            .reshape((out / (2 * step), step, 2, rest))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((out, rest))?;
    }
    let turned = rows.reshape(shape)?;
    match rescale {
        None => turned - weight,
        Some(rescale) => turned.broadcast_mul(rescale)? - weight,
    }
}

/// times · R + (1 − times) · I with R = (I + Q)(I − Q)⁻¹ for each Q = block − blockᵀ; same shape, f32.
fn rotations(blocks: &Tensor, constraint: f64, times: f64, device: &Device) -> Result<Tensor> {
    let size = blocks.dim(candle_core::D::Minus1)?;
    let values = blocks.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let mut skew = vec![0.0; values.len()];
    for (block, skew) in values.chunks_exact(size * size).zip(skew.chunks_exact_mut(size * size)) {
        for i in 0..size {
            for j in 0..size {
                skew[i * size + j] = block[i * size + j] - block[j * size + i];
            }
        }
    }
    if constraint > 0.0 {
        let norm = skew.iter().map(|x| x * x).sum::<f64>().sqrt() + 1e-8;
        if norm > constraint {
            skew.iter_mut().for_each(|x| *x *= constraint / norm);
        }
    }
    let mut turned = Vec::with_capacity(skew.len());
    for q in skew.chunks_exact(size * size) {
        let rotation = cayley(q, size);
        turned.extend(rotation.iter().enumerate().map(|(at, r)| {
            let one = if at / size == at % size { 1.0 } else { 0.0 };
            (times * r + (1.0 - times) * one) as f32
        }));
    }
    Tensor::from_vec(turned, blocks.shape(), &Device::Cpu)?.to_device(device)
}

/// (I + Q)(I − Q)⁻¹ of a skew-symmetric `q`, by Gauss–Jordan with pivots. I − Q is never singular: its
/// eigenvalues are 1 − iλ.
fn cayley(q: &[f64], n: usize) -> Vec<f64> {
    // Both factors commute, so this is the X of (I − Q) X = I + Q.
    let one = |i: usize, j: usize| if i == j { 1.0 } else { 0.0 };
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let left = (0..n).map(|j| one(i, j) - q[i * n + j]);
            left.chain((0..n).map(|j| one(i, j) + q[i * n + j])).collect()
        })
        .collect();
    for column in 0..n {
        let pivot = (column..n).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs()));
        rows.swap(column, pivot.unwrap_or(column));
        let scale = 1.0 / rows[column][column];
        rows[column].iter_mut().for_each(|x| *x *= scale);
        let pivot_row = rows[column].clone();
        for (i, row) in rows.iter_mut().enumerate() {
            let factor = row[column];
            if i != column && factor != 0.0 {
                row.iter_mut().zip(&pivot_row).for_each(|(x, p)| *x -= factor * p);
            }
        }
    }
    rows.iter().flat_map(|row| row[n..].iter().copied()).collect()
}
