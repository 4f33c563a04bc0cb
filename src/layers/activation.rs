//! SiLU, the GELUs, GEGLU and nearest upsampling, each a single pass forward and backward.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};

use crate::layers::cpu;
use crate::layers::cuda;

/// An element-wise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x · σ(x)
    Silu,
    /// x · Φ(x), by the error function
    Gelu,
    /// The tanh approximation of GELU (DiT).
    GeluTanh,
    /// x · σ(1.702 x) (CLIP-L)
    QuickGelu,
}

impl Activation {
    /// Applies it to every value of `x`.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        if cpu::is_cpu_f32(x) || cuda::applies(x) {
            return x.contiguous()?.apply_op1(PointwiseOp(self));
        }
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
        }
    }

    /// Value and derivative at `x`.
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => gated(x, 1.0),
            Self::QuickGelu => gated(x, 1.702),
            Self::Gelu => {
                let phi = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
                // 1/√(2π)
                let density = 0.398_942_3 * cpu::exp(-0.5 * x * x);
                (x * phi, phi + x * density)
            }
            Self::GeluTanh => {
                // 0.5 (1 + tanh u) = σ(2u), u = √(2/π) (x + 0.044715 x³)
                let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
                let s = 1.0 / (1.0 + cpu::exp(-2.0 * u));
                let du = 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x);
                (x * s, s + x * s * (1.0 - s) * 2.0 * du)
            }
        }
    }
}

/// x · σ(k x) and its derivative.
#[inline(always)]
fn gated(x: f32, k: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + cpu::exp(-k * x));
    (x * s, s * (1.0 + k * x * (1.0 - s)))
}

/// The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_7) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    (1.0 - p * cpu::exp(-a * a)).copysign(x)
}

struct PointwiseOp(Activation);

const CHUNK: usize = 16_384;

impl CustomOp1 for PointwiseOp {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = cpu::operand(x, layout)?;
        let mut y = vec![0f32; x.len()];
        cpu::for_chunks(&mut y, CHUNK, |i, y| {
            let x = &x[i * CHUNK..];
            match self.0 {
                Activation::Silu => silu(x, y),
                Activation::Gelu => gelu(x, y),
                Activation::GeluTanh => gelu_tanh(x, y),
                Activation::QuickGelu => quick_gelu(x, y),
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::gpu::activate(self.0, (x, layout))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if cuda::applies(x) {
            return cuda::gpu::activate_grad(self.0, x, &grad).map(Some);
        }
        let values = cpu::with_values(x, |x| {
            cpu::with_values(&grad, |grad| {
                let mut out = vec![0f32; x.len()];
                cpu::for_chunks(&mut out, CHUNK, |i, out| {
                    let (x, grad) = (&x[i * CHUNK..], &grad[i * CHUNK..]);
                    match self.0 {
                        Activation::Silu => silu_slope(x, grad, out),
                        Activation::Gelu => gelu_slope(x, grad, out),
                        Activation::GeluTanh => gelu_tanh_slope(x, grad, out),
                        Activation::QuickGelu => quick_gelu_slope(x, grad, out),
                    }
                });
                out
            })
        })??;
        Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
    }
}

/// The feed-forward gate of SDXL: the first half of the last axis times GELU of the second. (…, 2D) → (…, D).
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    if cpu::is_cpu_f32(x) || cuda::applies(x) {
        return x.contiguous()?.apply_op1(GegluOp);
    }
    let value = x.narrow(D::Minus1, 0, width)?;
    value * x.narrow(D::Minus1, width, width)?.gelu_erf()?
}

struct GegluOp;

impl CustomOp1 for GegluOp {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut shape = layout.dims().to_vec();
        let width = shape.last().copied().unwrap_or(0) / 2;
        if let Some(last) = shape.last_mut() {
            *last = width;
        }
        let x = cpu::operand(x, layout)?;
        let mut y = vec![0f32; x.len() / 2];
        cpu::for_chunks(&mut y, width, |i, y| {
            geglu_row(&x[i * 2 * width..][..2 * width], y);
        });
        Ok((CpuStorage::F32(y), shape.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::gpu::geglu((x, layout))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let width = x.dim(D::Minus1)? / 2;
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if cuda::applies(x) {
            return cuda::gpu::geglu_grad(x, &grad).map(Some);
        }
        let values = cpu::with_values(x, |x| {
            cpu::with_values(&grad, |grad| {
                let mut out = vec![0f32; x.len()];
                cpu::for_chunks(&mut out, 2 * width, |i, out| {
                    geglu_slope(&x[i * 2 * width..], &grad[i * width..], width, out);
                });
                out
            })
        })??;
        Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
    }
}

/// Each pixel becomes four. (B, C, H, W) → (B, C, 2H, 2W).
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if cpu::is_cpu_f32(x) || cuda::applies(x) {
        return x.contiguous()?.apply_op1(UpsampleOp);
    }
    // Broadcasting is differentiable everywhere; candle's own upsampling overwrites gradients.
    x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.contiguous()?.reshape((
        b,
        c,
        2 * h,
        2 * w,
    ))
}

struct UpsampleOp;

impl CustomOp1 for UpsampleOp {
    fn name(&self) -> &'static str {
        "upsample"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, c, h, w) = layout.shape().dims4()?;
        let x = cpu::operand(x, layout)?;
        let mut y = vec![0f32; 4 * x.len()];
        double_rows(x, w, &mut y);
        Ok((CpuStorage::F32(y), (b, c, 2 * h, 2 * w).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::gpu::upsample((x, layout))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (grad, w) = (grad.contiguous()?, x.dim(D::Minus1)?);
        #[cfg(feature = "cuda")]
        if cuda::applies(x) {
            return cuda::gpu::upsample_grad(&grad).map(Some);
        }
        let values = cpu::with_values(&grad, |grad| {
            let mut out = vec![0f32; x.elem_count()];
            let together = (CHUNK / w).max(1) * w;
            cpu::for_chunks(&mut out, together, |i, out| add_fours(&grad[4 * i * together..], w, out));
            out
        })?;
        Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
    }
}

/// The loops, one function each, so that each is compiled as vectors.
macro_rules! loops {
    ($($variant:ident $forward:ident $backward:ident;)*) => {$(
        cpu::vectorised! {
            pub(super) fn $forward(x: &[f32], y: &mut [f32]) {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = Activation::$variant.at(*x).0);
            }
        }
        cpu::vectorised! {
            pub(super) fn $backward(x: &[f32], grad: &[f32], out: &mut [f32]) {
                for ((out, x), grad) in out.iter_mut().zip(x).zip(grad) {
                    *out = Activation::$variant.at(*x).1 * grad;
                }
            }
        }
    )*};
}

loops! {
    Silu silu silu_slope;
    Gelu gelu gelu_slope;
    GeluTanh gelu_tanh gelu_tanh_slope;
    QuickGelu quick_gelu quick_gelu_slope;
}

cpu::vectorised! {
    /// Each row of `w` values becomes two of 2w.
    fn double_rows(x: &[f32], w: usize, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(w).zip(y.chunks_exact_mut(4 * w)) {
            let (upper, lower) = y.split_at_mut(2 * w);
            upper.chunks_exact_mut(2).zip(x).for_each(|(pair, x)| pair.fill(*x));
            lower.copy_from_slice(upper);
        }
    }
}

cpu::vectorised! {
    /// Each value of `out` is the sum of its four of `grad`.
    fn add_fours(grad: &[f32], w: usize, out: &mut [f32]) {
        for (out, grad) in out.chunks_exact_mut(w).zip(grad.chunks_exact(4 * w)) {
            let (upper, lower) = grad.split_at(2 * w);
            let pairs = upper.chunks_exact(2).zip(lower.chunks_exact(2));
            out.iter_mut().zip(pairs).for_each(|(out, (u, l))| *out = u[0] + u[1] + l[0] + l[1]);
        }
    }
}

cpu::vectorised! {
    fn geglu_row(x: &[f32], y: &mut [f32]) {
        let (value, gate) = x.split_at(y.len());
        for ((y, v), g) in y.iter_mut().zip(value).zip(gate) {
            *y = v * Activation::Gelu.at(*g).0;
        }
    }
}

cpu::vectorised! {
    fn geglu_slope(x: &[f32], grad: &[f32], width: usize, out: &mut [f32]) {
        let rows = x.chunks_exact(2 * width).zip(grad.chunks_exact(width));
        for (out, (x, grad)) in out.chunks_exact_mut(2 * width).zip(rows) {
            let (out_value, out_gate) = out.split_at_mut(width);
            let (value, gate) = x.split_at(width);
            for ((((ov, og), v), g), grad) in out_value.iter_mut().zip(out_gate).zip(value).zip(gate).zip(grad) {
                let (gelu, slope) = Activation::Gelu.at(*g);
                *ov = grad * gelu;
                *og = grad * v * slope;
            }
        }
    }
}
