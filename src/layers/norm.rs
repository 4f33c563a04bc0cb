//! GroupNorm (with SiLU fused where it follows) and LayerNorm.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Module, Result, Shape, Tensor};
use candle_nn::VarBuilder;

use super::Layer;
use crate::layers::cpu::{self, lanes_dot, lanes_sum};
use crate::layers::cuda::{self, Saved};

/// Normalises each of `groups` groups of channels of an image (B, C, H, W).
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// `channels` in `groups`; weight 1 and bias 0 at the start.
    pub fn new(groups: usize, channels: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            candle_core::bail!("{channels} channels do not part into {groups} groups");
        }
        let weight = vb.get_with_hints(channels, "weight", candle_nn::Init::Const(1.0))?;
        let bias = vb.get_with_hints(channels, "bias", candle_nn::Init::Const(0.0))?;
        Ok(Self { weight, bias, groups, eps })
    }

    /// Itself as a layer that an adapter may change.
    pub fn layer(&mut self) -> Layer<'_> {
        Layer::Norm { weight: &mut self.weight, bias: &mut self.bias }
    }

    /// SiLU(norm(x)) in one pass. (B, C, …) → same.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, true)
    }

    /// Mean and deviation of an image that lies in parts, one below the other: each (B, C, h, W).
    pub fn statistics(&self, parts: &[Tensor]) -> Result<GroupStatistics> {
        let grouped = |x: &Tensor| x.to_dtype(DType::F32)?.reshape((x.dim(0)?, self.groups, ()));
        let total: usize = parts.iter().map(Tensor::elem_count).sum();
        // Each part's mean counts by its size.
        let average = |of: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Tensor> {
            let mut sum: Option<Tensor> = None;
            for part in parts {
                let share = part.elem_count() as f64 / total as f64;
                let mean = (of(&grouped(part)?)?.mean_keepdim(D::Minus1)? * share)?; // (B, groups, 1)
                sum = Some(match sum {
                    Some(sum) => (sum + mean)?,
                    None => mean,
                });
            }
            sum.ok_or_else(|| candle_core::Error::Msg("an image of no parts has no statistics".into()))
        };
        let mean = average(&|x| Ok(x.clone()))?;
        let variance = average(&|x| x.broadcast_sub(&mean)?.sqr())?;
        Ok(GroupStatistics { inverse: (variance + self.eps)?.sqrt()?.recip()?, mean })
    }

    /// SiLU(norm(x)) of a part (B, C, h, W) of an image whose statistics are known → same.
    pub fn forward_silu_with(&self, x: &Tensor, statistics: &GroupStatistics) -> Result<Tensor> {
        let (b, c, _, _) = x.dims4()?;
        let channels = |values: &Tensor| {
            let each = (b, self.groups, c / self.groups);
            values.broadcast_as(each)?.reshape((b, c, 1, 1))
        };
        let wide = |weight: &Tensor| weight.to_dtype(DType::F32)?.reshape((1, c, 1, 1));
        let scale = channels(&statistics.inverse)?.broadcast_mul(&wide(&self.weight)?)?;
        let shift = wide(&self.bias)?.broadcast_sub(&(channels(&statistics.mean)? * &scale)?)?;
        let y = x.to_dtype(DType::F32)?.broadcast_mul(&scale)?.broadcast_add(&shift)?;
        super::Activation::Silu.apply(&y)?.to_dtype(x.dtype())
    }

    fn apply(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let (b, c) = (x.dim(0)?, x.dim(1)?);
        if cpu::is_cpu_f32(x) || cuda::applies(x) {
            let (weight, bias) = (super::like(&self.weight, x)?, super::like(&self.bias, x)?);
            let inner = x.elem_count() / (b * c);
            let op = NormOp {
                length: x.elem_count() / (b * self.groups),
                scale: Scale::Channels { per_group: c / self.groups, inner },
                eps: self.eps as f32,
                silu,
                saved: Saved::default(),
            };
            return x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op);
        }
        let y = x.to_dtype(DType::F32)?.reshape((b, self.groups, ()))?;
        let y = composite(&y, self.eps)?.reshape(x.shape())?;
        let mut channels = vec![1; x.rank()];
        channels[1] = c;
        let wide = |weight: &Tensor| weight.to_dtype(DType::F32)?.reshape(channels.clone());
        let y = y.broadcast_mul(&wide(&self.weight)?)?.broadcast_add(&wide(&self.bias)?)?;
        if silu { y.silu()?.to_dtype(x.dtype()) } else { y.to_dtype(x.dtype()) }
    }
}

impl Module for GroupNorm {
    /// (B, C, …) → same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, false)
    }
}

/// Statistics of a [`GroupNorm`], for an image that is processed in parts.
#[derive(Clone, Debug)]
pub struct GroupStatistics {
    /// (B, groups, 1)
    mean: Tensor,
    /// 1/√(variance + ε), (B, groups, 1)
    inverse: Tensor,
}

/// Normalises the last axis.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Over `width` values; weight 1 and bias 0 at the start.
    pub fn new(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", candle_nn::Init::Const(1.0))?;
        let bias = vb.get_with_hints(width, "bias", candle_nn::Init::Const(0.0))?;
        Ok(Self { weight, bias, eps })
    }

    /// Itself as a layer that an adapter may change.
    pub fn layer(&mut self) -> Layer<'_> {
        Layer::Norm { weight: &mut self.weight, bias: &mut self.bias }
    }
}

impl Module for LayerNorm {
    /// (…, D) → same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        normalise_last(x, &self.weight, &self.bias, self.eps)
    }
}

/// LayerNorm without weight and bias, as DiT uses before its modulation. (…, D) → same.
pub fn layer_norm_plain(x: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let one = Tensor::ones(width, x.dtype(), x.device())?;
    normalise_last(x, &one, &one.zeros_like()?, eps)
}

/// LayerNorm shifted and scaled by a condition, norm(x)·(1 + scale) + shift (adaLN, Peebles and Xie 2023). `x` (B, N, D),
/// the others (B, 1, D) → (B, N, D).
pub fn layer_norm_modulated(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::applies(x) {
        let (b, n, d) = x.dims3()?;
        for modulation in [shift, scale] {
            if modulation.dims() != [b, 1, d] {
                candle_core::bail!("{:?} is no modulation of {:?}", modulation.shape(), x.shape());
            }
        }
        let sizes =
            cuda::ops::LayerSizes { sets: b, per_set: n, width: d, eps: eps as f32, modulation: true };
        let (scale, shift) = (super::like(scale, x)?, super::like(shift, x)?);
        let op = ModulatedOp { sizes, saved: Saved::default() };
        return x.contiguous()?.apply_op3(&scale.contiguous()?, &shift.contiguous()?, op);
    }
    layer_norm_plain(x, eps)?.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
}

fn normalise_last(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if cpu::is_cpu_f32(x) || cuda::applies(x) {
        let (weight, bias) = (super::like(weight, x)?, super::like(bias, x)?);
        let op = NormOp {
            length: width,
            scale: Scale::Last,
            eps: eps as f32,
            silu: false,
            saved: Saved::default(),
        };
        return x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op);
    }
    composite(&x.to_dtype(DType::F32)?, eps)?
        .broadcast_mul(&weight.to_dtype(DType::F32)?)?
        .broadcast_add(&bias.to_dtype(DType::F32)?)?
        .to_dtype(x.dtype())
}

/// (x − mean) / √(variance + eps) over the last axis.
fn composite(x: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)
}

/// Both norms: runs of `length` values, each normalised by itself.
struct NormOp {
    length: usize,
    scale: Scale,
    eps: f32,
    silu: bool,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    saved: Saved,
}

/// Which weight belongs to the `i`-th value of a row.
#[derive(Clone, Copy)]
enum Scale {
    /// LayerNorm: the `i`-th.
    Last,
    /// GroupNorm: that of its channel; `inner` pixels a channel, `per_group` channels a row.
    Channels { per_group: usize, inner: usize },
}

impl NormOp {
    /// Mean and 1/std of one row.
    #[inline(always)]
    fn statistics(&self, row: &[f32]) -> (f32, f32) {
        let n = self.length as f32;
        let mean = lanes_sum(row, |x| x) / n;
        let variance = lanes_sum(row, |x| (x - mean) * (x - mean)) / n;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }

    fn forward(&self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let mut y = vec![0f32; x.len()];
        let together = (16_384 / self.length).max(1);
        cpu::for_chunks(&mut y, together * self.length, |i, y| {
            forward_rows(self, &x[i * together * self.length..][..y.len()], i * together, weight, bias, y);
        });
        y
    }

    /// Gradients of x, weight and bias; the last two are empty unless they are wanted.
    fn backward(&self, inputs: [&[f32]; 4], trained: bool) -> [Vec<f32>; 3] {
        let [x, weight, ..] = inputs;
        let mut grad_x = vec![0f32; x.len()];
        if trained {
            let (mut grad_w, mut grad_b) = (vec![0f32; weight.len()], vec![0f32; weight.len()]);
            backward_rows(self, inputs, 0, &mut grad_x, Some([&mut grad_w, &mut grad_b]));
            return [grad_x, grad_w, grad_b];
        }
        let together = (16_384 / self.length).max(1);
        cpu::for_chunks(&mut grad_x, together * self.length, |i, grad_x| {
            backward_rows(self, inputs, i * together, grad_x, None);
        });
        [grad_x, Vec::new(), Vec::new()]
    }
}

cpu::vectorised! {
    /// Normalises the rows of `x`, the first of which is row `first` of the whole.
    fn forward_rows(op: &NormOp, x: &[f32], first: usize, weight: &[f32], bias: &[f32], y: &mut [f32]) {
        for (r, (x, y)) in x.chunks_exact(op.length).zip(y.chunks_exact_mut(op.length)).enumerate() {
            let (mean, inverse) = op.statistics(x);
            match op.scale {
                Scale::Last => {
                    for ((y, x), (w, b)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                        *y = (x - mean) * inverse * w + b;
                    }
                }
                Scale::Channels { per_group, inner } => {
                    let channel = (first + r) * per_group % weight.len();
                    for (c, (x, y)) in x.chunks_exact(inner).zip(y.chunks_exact_mut(inner)).enumerate() {
                        let w = inverse * weight[channel + c];
                        let b = bias[channel + c] - mean * w;
                        if op.silu {
                            for (y, x) in y.iter_mut().zip(x) {
                                let v = x * w + b;
                                *y = v / (1.0 + cpu::exp(-v));
                            }
                        } else {
                            y.iter_mut().zip(x).for_each(|(y, x)| *y = x * w + b);
                        }
                    }
                }
            }
        }
    }
}

cpu::vectorised! {
    /// Per row: g = dL/d(normalised value); dx = (g − mean(g) − x̂ · mean(g · x̂)) / std.
    /// `grad_x` begins at row `first`; `sums` are the gradients of weight and bias.
    fn backward_rows(op: &NormOp, inputs: [&[f32]; 4], first: usize, grad_x: &mut [f32], sums: Option<[&mut [f32]; 2]>) {
        let [x, weight, bias, grad] = inputs;
        let n = op.length as f32;
        let mut g = vec![0f32; op.length];
        let mut sums = sums;
        for (i, grad_x) in grad_x.chunks_exact_mut(op.length).enumerate() {
            let r = first + i;
            let x = &x[r * op.length..][..op.length];
            let grad = &grad[r * op.length..][..op.length];
            let (mean, inverse) = op.statistics(x);
            match op.scale {
                Scale::Last => {
                    if let Some([grad_w, grad_b]) = &mut sums {
                        for ((sum, grad), x) in grad_w.iter_mut().zip(grad).zip(x) {
                            *sum += grad * (x - mean) * inverse;
                        }
                        grad_b.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
                    }
                    g.iter_mut().zip(grad).zip(weight).for_each(|((g, grad), weight)| *g = grad * weight);
                }
                Scale::Channels { per_group, inner } => {
                    let first = r * per_group % weight.len();
                    for c in 0..per_group {
                        let (w, b) = (weight[first + c], bias[first + c]);
                        let x = &x[c * inner..][..inner];
                        let grad = &grad[c * inner..][..inner];
                        let g = &mut g[c * inner..][..inner];
                        if op.silu {
                            for ((g, x), grad) in g.iter_mut().zip(x).zip(grad) {
                                let v = (x - mean) * inverse * w + b;
                                let s = 1.0 / (1.0 + cpu::exp(-v));
                                *g = grad * s * (1.0 + v * (1.0 - s));
                            }
                        } else {
                            g.copy_from_slice(grad);
                        }
                        if let Some([grad_w, grad_b]) = &mut sums {
                            grad_b[first + c] += lanes_sum(g, |g| g);
                            grad_w[first + c] += lanes_dot(g, x, mean) * inverse;
                        }
                        g.iter_mut().for_each(|g| *g *= w);
                    }
                }
            }
            let mean_g = lanes_sum(&g, |g| g) / n;
            let mean_gx = lanes_dot(&g, x, mean) * inverse / n;
            for ((out, g), x) in grad_x.iter_mut().zip(&g).zip(x) {
                *out = inverse * (g - mean_g - (x - mean) * inverse * mean_gx);
            }
        }
    }
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        "norm"
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
        let y =
            self.forward(cpu::operand(x, x_layout)?, cpu::operand(w, w_layout)?, cpu::operand(b, b_layout)?);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
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
        let inputs = [(x, x_layout), (w, w_layout), (b, b_layout)];
        let (count, weights) = (x_layout.shape().elem_count(), w_layout.shape().elem_count());
        let (y, statistics) = match self.cuda_sizes(count, weights) {
            CudaSizes::Group(sizes) => cuda::gpu::group_norm(sizes, inputs)?,
            CudaSizes::Layer(sizes) => cuda::gpu::layer_norm(sizes, inputs)?,
        };
        self.saved.keep(statistics)?;
        Ok((y, x_layout.shape().clone()))
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
        let trained = w.track_op() || b.track_op();
        #[cfg(feature = "cuda")]
        if cuda::applies(x) {
            let statistics = self.saved.get()?;
            let (grad_x, rest) = match self.cuda_sizes(x.elem_count(), w.elem_count()) {
                CudaSizes::Group(sizes) => {
                    cuda::gpu::group_norm_grad(sizes, [x, w, b, statistics, &grad], trained)?
                }
                CudaSizes::Layer(sizes) => {
                    cuda::gpu::layer_norm_grad(sizes, [x, w, statistics, &grad], trained)?
                }
            };
            let [grad_w, grad_b] = rest.map_or([None, None], |rest| rest.map(Some));
            return Ok((Some(grad_x), grad_w, grad_b));
        }
        let [grad_x, grad_w, grad_b] = cpu::with_values(x, |x| {
            cpu::with_values(w, |w| {
                cpu::with_values(b, |b| {
                    cpu::with_values(&grad, |grad| self.backward([x, w, b, grad], trained))
                })
            })
        })????;
        let wanted = |input: &Tensor, values: Vec<f32>| {
            input.track_op().then(|| Tensor::from_vec(values, input.shape(), input.device())).transpose()
        };
        Ok((wanted(x, grad_x)?, wanted(w, grad_w)?, wanted(b, grad_b)?))
    }
}

/// What the CUDA kernels take for either norm.
#[cfg(feature = "cuda")]
enum CudaSizes {
    Group(cuda::ops::GroupSizes),
    Layer(cuda::ops::LayerSizes),
}

#[cfg(feature = "cuda")]
impl NormOp {
    /// For `count` values, and weights for `weights` channels or columns.
    fn cuda_sizes(&self, count: usize, weights: usize) -> CudaSizes {
        let eps = self.eps;
        match self.scale {
            Scale::Last => CudaSizes::Layer(cuda::ops::LayerSizes {
                sets: 1,
                per_set: count / self.length.max(1),
                width: self.length,
                eps,
                modulation: false,
            }),
            Scale::Channels { per_group, inner } => CudaSizes::Group(cuda::ops::GroupSizes {
                batch: count / (weights * inner).max(1),
                channels: weights,
                groups: weights / per_group,
                inner,
                eps,
                silu: self.silu,
            }),
        }
    }
}

/// norm(x)·(1 + scale) + shift on CUDA.
#[cfg(feature = "cuda")]
struct ModulatedOp {
    sizes: cuda::ops::LayerSizes,
    saved: Saved,
}

#[cfg(feature = "cuda")]
impl CustomOp3 for ModulatedOp {
    fn name(&self) -> &'static str {
        "modulated-norm"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("a modulated norm for CUDA was given tensors on the CPU")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        scale: &CudaStorage,
        scale_layout: &Layout,
        shift: &CudaStorage,
        shift_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let inputs = [(x, x_layout), (scale, scale_layout), (shift, shift_layout)];
        let (y, statistics) = cuda::gpu::layer_norm(self.sizes, inputs)?;
        self.saved.keep(statistics)?;
        Ok((y, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let trained = scale.track_op() || shift.track_op();
        let inputs = [x, scale, self.saved.get()?, &grad.contiguous()?];
        let (grad_x, rest) = cuda::gpu::layer_norm_grad(self.sizes, inputs, trained)?;
        let [grad_scale, grad_shift] = rest.map_or([None, None], |rest| rest.map(Some));
        Ok((Some(grad_x), grad_scale, grad_shift))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::diffusion::noise::normal;

    #[test]
    fn norms_of_half_precision_are_computed_in_f32() -> Result<()> {
        // Squares of 1000 are beyond the largest f16.
        let x = (normal(1, 0, (2, 4, 3, 5), &Device::Cpu)? * 1000.0)?;
        let vb = crate::weights::Trainable::new(1).builder(&Device::Cpu);
        let (group, layer) = (GroupNorm::new(2, 4, 1e-5, vb.pp("g"))?, LayerNorm::new(5, 1e-5, vb.pp("l"))?);
        let half = x.to_dtype(DType::F16)?;
        let pairs = [
            (group.forward_silu(&x)?, group.forward_silu(&half)?),
            (layer.forward(&x)?, layer.forward(&half)?),
        ];
        for (wide, narrow) in pairs {
            assert_eq!(narrow.dtype(), DType::F16);
            let apart = (wide - narrow.to_dtype(DType::F32)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(apart < 5e-3, "{apart}");
        }
        Ok(())
    }

    #[test]
    fn an_image_in_parts_is_normalised_as_the_whole() -> Result<()> {
        let x = ((normal(1, 0, (2, 4, 7, 5), &Device::Cpu)? * 3.0)? + 10.0)?;
        let norm = GroupNorm::new(2, 4, 1e-5, crate::weights::Trainable::new(1).builder(&Device::Cpu))?;
        let parts = [x.narrow(2, 0, 2)?, x.narrow(2, 2, 5)?].map(|part| part.contiguous());
        let parts: Vec<Tensor> = parts.into_iter().collect::<Result<_>>()?;
        let statistics = norm.statistics(&parts)?;
        let ours: Vec<Tensor> =
            parts.iter().map(|part| norm.forward_silu_with(part, &statistics)).collect::<Result<_>>()?;
        let apart =
            (norm.forward_silu(&x)? - Tensor::cat(&ours, 2)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(apart < 1e-5, "{apart}");
        Ok(())
    }
}
