//! y = x·Wᵀ + b as one operation with its own gradient.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::Pass;
use super::backward::gradient;
use super::cpu::{self, Shared, Weight};
#[cfg(feature = "cuda")]
use super::cuda::{self, gpu};
use super::gemm::isa::ElemType;
use super::gemm::operands::{Accumulate, ContiguousDepth, Output, OutputLayout, Size, StridedDepth};
use crate::layers::gemm::matmul::{self, matmul};

/// x·Wᵀ + b. `x` (…, in), `weight` (out, in), `bias` (out) → (…, out).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_in(x, weight, bias, Pass::Forward)
}

pub(super) fn linear_in(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, pass: Pass) -> Result<Tensor> {
    let (output, input) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == input => *last = output,
        _ => candle_core::bail!("linear layer {input} → {output} was given {:?}", x.shape()),
    }
    let bias = bias.map(|bias| super::like(bias, x)).transpose()?;
    if cpu::is_cpu_f32(x) && cpu::is_cpu_weight(weight) {
        // Whatever its shape: a gradient would be copied for each change of it.
        let none = Tensor::zeros(0, x.dtype(), x.device())?;
        let (weight, bias) = (weight.contiguous()?, bias.as_ref().unwrap_or(&none));
        return x.contiguous()?.apply_op3(&weight, bias, LinearOp { pass, bias: true });
    }
    #[cfg(feature = "cuda")]
    if cuda::applies(x) {
        let weight = super::like(weight, x)?.contiguous()?;
        let op = LinearOp { pass, bias: bias.is_some() };
        // There are no empty tensors on CUDA: without a bias the weight stands in its place.
        let bias = bias.as_ref().unwrap_or(&weight);
        return x.contiguous()?.apply_op3(&weight, bias, op);
    }
    let y = x.reshape(((), input))?.matmul(&super::like(weight, x)?.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias)?,
        None => y,
    };
    y.reshape(shape)
}

struct LinearOp {
    pass: Pass,
    /// Whether the third operand is a bias; on the CPU an empty one is none.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    bias: bool,
}

impl CustomOp3 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, k) = w_layout.shape().dims2()?;
        let (rows, shape) = (x_layout.shape().elem_count() / k, with_last(x_layout.dims(), n));
        let (x, b) = (cpu::operand(x, x_layout)?, cpu::operand(b, b_layout)?);
        let y = match self.pass {
            Pass::Forward => product(x, Weight::operand(w, w_layout)?, b, [rows, n, k]),
            Pass::Recompute => vec![0.0; rows * n],
        };
        Ok((CpuStorage::F32(y), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        w: &CudaStorage,
        w_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (n, k) = w_layout.shape().dims2()?;
        let (rows, shape) = (x_layout.shape().elem_count() / k, with_last(x_layout.dims(), n));
        let y = match self.pass {
            Pass::Forward => {
                let bias = self.bias.then_some((b, b_layout));
                gpu::linear((x, x_layout), (w, w_layout), bias, [rows, n, k])?
            }
            Pass::Recompute => gpu::zeros(x, &shape)?,
        };
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (n, k) = w.dims2()?;
        let rows = x.elem_count() / k;
        #[cfg(feature = "cuda")]
        if cuda::applies(x) {
            let flat = grad.reshape((rows, n))?;
            let grad_x = x.track_op().then(|| flat.matmul(&w.detach())?.reshape(x.shape()));
            let grad_w = w.track_op().then(|| flat.t()?.matmul(&x.detach().reshape((rows, k))?));
            let grad_b = (self.bias && b.track_op()).then(|| gpu::column_sums(&grad, n));
            return Ok((grad_x.transpose()?, grad_w.transpose()?, grad_b.transpose()?));
        }
        let grad_x = if x.track_op() {
            let values =
                cpu::with_weight(w, |w| cpu::with_values(&grad, |grad| grad_input(grad, w, [rows, n, k])))??;
            Some(Tensor::from_vec(values, x.shape(), x.device())?)
        } else {
            None
        };
        let grad_w = if w.track_op() { grad_weight(&grad, x, w)? } else { None };
        let grad_b = if b.track_op() { Some(column_sums(&grad.reshape((rows, n))?)?) } else { None };
        Ok((grad_x, grad_w, grad_b))
    }
}

/// The shape of (…, in) with another last axis.
pub(super) fn with_last(dims: &[usize], last: usize) -> Shape {
    let mut dims = dims.to_vec();
    if let Some(width) = dims.last_mut() {
        *width = last;
    }
    dims.into()
}

/// x·Wᵀ + b of `rows` rows, k → n; an empty `bias` is none.
pub(super) fn product(x: &[f32], weight: Weight, bias: &[f32], [rows, n, k]: [usize; 3]) -> Vec<f32> {
    let start = if bias.is_empty() { Accumulate::Zero } else { Accumulate::Columns(bias) };
    let (left, right) =
        (ContiguousDepth::new(Weight::F32(x), k, rows, k), ContiguousDepth::new(weight, k, n, k));
    matmul(weight.elem_type(), Size { m: rows, n, k }, &left, &right, start, OutputLayout::matrix(n))
}

/// Its gradient with respect to x: grad (rows, n) · W (n, k).
pub(super) fn grad_input(grad: &[f32], weight: Weight, [rows, n, k]: [usize; 3]) -> Vec<f32> {
    let (left, right) =
        (ContiguousDepth::new(Weight::F32(grad), n, rows, n), StridedDepth::new(weight, k, k, n));
    matmul(
        weight.elem_type(),
        Size { m: rows, n: k, k: n },
        &left,
        &right,
        Accumulate::Zero,
        OutputLayout::matrix(k),
    )
}

/// The gradient of W (n, k): gradᵀ (n, rows) · x (rows, k).
fn grad_weight(grad: &Tensor, x: &Tensor, w: &Tensor) -> Result<Option<Tensor>> {
    let ((m, n), rows) = (w.dims2()?, grad.elem_count() / w.dim(0)?);
    let size = Size { m, n, k: rows };
    cpu::with_values(grad, |grad| {
        cpu::with_values(x, |x| {
            let left = StridedDepth::new(Weight::F32(grad), m, m, rows);
            let right = StridedDepth::new(Weight::F32(x), n, n, rows);
            let write = |out: Shared, add: bool| {
                let start = if add { Accumulate::Output } else { Accumulate::Zero };
                let output = Output { to: out, start, place: OutputLayout::matrix(n) };
                // SAFETY: the gradient has n rows of k values.
                unsafe { matmul::write(ElemType::F32, size, &left, &right, output) }
            };
            // SAFETY: a product writes all its values.
            unsafe { gradient(w, write) }
        })
    })??
}

/// Sums over the rows of (rows, n) → (n).
fn column_sums(x: &Tensor) -> Result<Tensor> {
    let mut sums = vec![0f32; x.dim(1)?];
    cpu::with_values(x, |x| add_rows(x, &mut sums))?;
    Tensor::from_vec(sums, x.dim(1)?, x.device())
}

cpu::vectorised! {
    /// Adds the rows of `x` to `sums`.
    pub(super) fn add_rows(x: &[f32], sums: &mut [f32]) {
        for row in x.chunks_exact(sums.len()) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::diffusion::noise::normal;

    #[test]
    fn inputs_of_any_rank_have_the_gradients_of_a_plain_product() -> Result<()> {
        let draw = |i: u64, shape: &[usize]| Var::from_tensor(&normal(4, i, shape, &Device::Cpu)?);
        let (weight, bias) = (draw(0, &[5, 6])?, draw(1, &[5])?);
        for shape in [&[4, 6][..], &[2, 3, 6], &[2, 1, 3, 6]] {
            let x = draw(2, shape)?;
            let ours = linear(&x, &weight, Some(&bias))?;
            let flat = x.reshape(((), 6))?.matmul(&weight.t()?)?.broadcast_add(&bias)?;
            let theirs = flat.reshape(with_last(shape, 5))?;
            let g = normal(4, 3, ours.shape(), &Device::Cpu)?;
            let grads = |y: &Tensor| (y * &g)?.sum_all()?.backward();
            let (our_grads, their_grads) = (grads(&ours)?, grads(&theirs)?);
            let mut pairs = vec![(ours, theirs)];
            for var in [&x, &weight, &bias] {
                let grads = [&our_grads, &their_grads].map(|grads| grads.get(var).cloned());
                let [Some(ours), Some(theirs)] = grads else { panic!("no gradient") };
                pairs.push((ours, theirs));
            }
            for (ours, theirs) in pairs {
                let apart = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(apart < 1e-5, "{shape:?}: {apart}");
            }
        }
        Ok(())
    }
}
