//! Two-dimensional convolution as a matrix product over patches, which are gathered block by block as the product packs
//! them; backward with a stride as matrices (im2col), a few samples at a time. Large ones with kernels of 3 × 3 are
//! computed by Winograd's method, forward and with respect to the input.

mod patches;

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Layout, Module, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use gemm::Parallelism;

use self::patches::{OutputPixels, PatchRows, Patches, Turned};
use super::Pass;
use super::linear::uniform;
use super::lora_linear::Adapter;
use super::winograd::{Kernels, Winograd};
use crate::layers::cpu::{self, Matrix, Product, Weight};
use crate::layers::gemm::isa::ElemType;
use crate::layers::gemm::matmul::matmul;
use crate::layers::gemm::operands::{Accumulate, ContiguousDepth, OutputLayout, Size};

/// A convolution; `weight` (out, in, k, k), `bias` (out).
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// (out, in, k, k)
    pub weight: Tensor,
    /// (out)
    pub bias: Option<Tensor>,
    /// A LoRA applied at run time: y + scale · up(down(x)); `down` (R, in, k, k), or (K, R, in, k, k) for K people,
    /// looks where the weight looks, `up` is a matrix (out, R), or (K, out, R).
    pub adapter: Option<Adapter>,
    geometry: ConvGeometry,
}

/// Where a kernel looks: `kernel`², moved by `stride`, over a border of zeros.
#[derive(Clone, Copy, Debug)]
pub struct ConvGeometry {
    /// Side of the kernel.
    pub kernel: usize,
    /// Step between output pixels.
    pub stride: usize,
    /// Zeros above and to the left.
    pub pad_before: usize,
    /// Zeros below and to the right.
    pub pad_after: usize,
}

impl ConvGeometry {
    /// Keeps the size: odd kernel, stride 1.
    pub fn same(kernel: usize) -> Self {
        Self { kernel, stride: 1, pad_before: kernel / 2, pad_after: kernel / 2 }
    }

    fn output(&self, size: usize) -> usize {
        (size + self.pad_before + self.pad_after - self.kernel) / self.stride + 1
    }
}

impl Conv2d {
    /// A convolution with bias, initialised as PyTorch does.
    pub fn new(input: usize, output: usize, geometry: ConvGeometry, vb: VarBuilder) -> Result<Self> {
        let bias = Some(vb.get_with_hints(output, "bias", uniform(input * geometry.kernel.pow(2)))?);
        Ok(Self { bias, ..Self::without_bias(input, output, geometry, vb)? })
    }

    /// A convolution without bias.
    pub fn without_bias(input: usize, output: usize, geometry: ConvGeometry, vb: VarBuilder) -> Result<Self> {
        let k = geometry.kernel;
        let weight = vb.get_with_hints((output, input, k, k), "weight", uniform(input * k * k))?;
        Ok(Self { weight, bias: None, adapter: None, geometry })
    }
}

impl Module for Conv2d {
    /// `x` (B, in, H, W) → (B, out, H', W'); with an adapter of K people B is K · samples.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_last(x, Pass::Forward)
    }
}

impl Conv2d {
    /// The same for the last layer of a checkpointed piece: in [`Pass::Recompute`] the values may be zeros.
    pub fn forward_last(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let y = conv2d(x, &self.weight, self.bias.as_ref(), self.geometry, pass)?;
        match &self.adapter {
            Some(adapter) => y + adapter.forward_conv(x, self.geometry)?,
            None => Ok(y),
        }
    }
}

impl Adapter {
    fn forward_conv(&self, x: &Tensor, geometry: ConvGeometry) -> Result<Tensor> {
        let h = if self.down.rank() == 4 {
            conv2d(x, &self.down, None, geometry, Pass::Forward)?
        } else {
            let people = self.down.dim(0)?;
            let samples = x.dim(0)? / people;
            let own = |k| {
                let x = x.narrow(0, k * samples, samples)?;
                conv2d(&x, &self.down.get(k)?, None, geometry, Pass::Forward)
            };
            Tensor::cat(&(0..people).map(own).collect::<Result<Vec<_>>>()?, 0)?
        };
        let (b, rank, height, width) = h.dims4()?;
        if let Ok((out, _)) = self.up.dims2() {
            let up = self.up.reshape((out, rank, 1, 1))?;
            return conv2d(&h, &up, None, ConvGeometry::same(1), Pass::Forward)? * self.scale;
        }
        let (people, out, _) = self.up.dims3()?;
        let h = h.reshape((people, b / people, rank, height * width))?;
        let up = super::like(&self.up, x)?.unsqueeze(1)?;
        (up.broadcast_matmul(&h)?.reshape((b, out, height, width))?) * self.scale
    }
}

/// `x` (B, in, H, W), `weight` (out, in, k, k), `bias` (out) → (B, out, H', W').
fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, g: ConvGeometry, pass: Pass) -> Result<Tensor> {
    let bias = bias.map(|bias| super::like(bias, x)).transpose()?;
    if cpu::is_cpu_f32(x) && cpu::is_cpu_weight(weight) {
        let none = Tensor::zeros(0, x.dtype(), x.device())?;
        return x.contiguous()?.apply_op3(
            &weight.contiguous()?,
            bias.as_ref().unwrap_or(&none),
            ConvOp(g, pass),
        );
    }
    #[cfg(feature = "cudnn")]
    if super::cuda::applies(x) {
        let weight = super::like(weight, x)?;
        return super::cuda::convolution::conv2d(x, &weight, bias.as_ref(), g, pass);
    }
    let (x, padding) = if g.pad_before == g.pad_after {
        (x.clone(), g.pad_before)
    } else {
        let x = x.pad_with_zeros(2, g.pad_before, g.pad_after)?;
        (x.pad_with_zeros(3, g.pad_before, g.pad_after)?, 0)
    };
    let y = x.conv2d(&super::like(weight, &x)?, padding, g.stride, 1, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?),
        None => Ok(y),
    }
}

struct ConvOp(ConvGeometry, Pass);

/// Sizes of one convolution.
#[derive(Clone, Copy)]
struct Sizes {
    g: ConvGeometry,
    b: usize,
    c_in: usize,
    c_out: usize,
    h: usize,
    w: usize,
    h_out: usize,
    w_out: usize,
}

impl Sizes {
    fn new(g: ConvGeometry, x: &Shape, weight: &Shape) -> Result<Self> {
        let (b, c_in, h, w) = x.dims4()?;
        let (c_out, weight_in, _, _) = weight.dims4()?;
        if weight_in != c_in || h + g.pad_before + g.pad_after < g.kernel {
            candle_core::bail!("convolution with weight {weight:?} was given {x:?}");
        }
        Ok(Self { g, b, c_in, c_out, h, w, h_out: g.output(h), w_out: g.output(w) })
    }

    /// Values in one patch: the inner size of the product.
    fn patch(&self) -> usize {
        self.c_in * self.g.kernel * self.g.kernel
    }

    fn pixels_out(&self) -> usize {
        self.h_out * self.w_out
    }

    fn sample_in(&self) -> usize {
        self.c_in * self.h * self.w
    }

    fn sample_out(&self) -> usize {
        self.c_out * self.pixels_out()
    }

    /// Whether the input itself is the matrix of patches.
    fn is_pointwise(&self) -> bool {
        self.g.kernel == 1 && self.g.stride == 1 && self.g.pad_before == 0
    }

    /// Samples that share one product, so that its matrices fill the caches without leaving them.
    fn group(&self) -> usize {
        (512 / self.pixels_out()).clamp(1, self.b)
    }

    /// The output columns whose input column, x·stride + kx − pad, lies in the image.
    fn inside(&self, kx: usize) -> Range<usize> {
        let ConvGeometry { stride, pad_before, .. } = self.g;
        let first = pad_before.saturating_sub(kx).div_ceil(stride);
        let last = match (self.w + pad_before).checked_sub(kx + 1) {
            Some(room) => (room / stride + 1).min(self.w_out),
            None => 0,
        };
        first..last.max(first)
    }

    /// Threads over the groups of samples, or inside the product when there is one group.
    fn inner_parallelism(&self) -> Parallelism {
        if self.b.div_ceil(self.group()) > 1 { Parallelism::None } else { cpu::parallelism() }
    }

    /// How it is computed with fewer products, where that is quicker: with weights of bf16 too, unless it is oneDNN that
    /// multiplies them.
    fn winograd(&self, elem: ElemType) -> Option<Winograd> {
        let ConvGeometry { kernel, stride, pad_before: pad, pad_after } = self.g;
        let Self { b, c_in, c_out, h, w, h_out, w_out, .. } = *self;
        let fits = kernel == 3 && stride == 1 && pad < kernel && pad_after < kernel;
        Some(Winograd { b, c_in, c_out, h, w, pad, h_out, w_out })
            .filter(|winograd| fits && winograd.is_quicker())
            .filter(|_| elem == ElemType::F32 || !cfg!(feature = "onednn"))
    }

    fn forward(&self, x: &[f32], weight: Weight, bias: &[f32]) -> Vec<f32> {
        if let Some(winograd) = self.winograd(weight.elem_type()) {
            return winograd.convolve(x, &Kernels::forward(weight, self.c_in), bias);
        }
        let (pixels, k) = (self.pixels_out(), self.patch());
        let size = Size { m: self.c_out, n: self.b * pixels, k };
        let place = OutputLayout { row: pixels, part: pixels, part_step: self.sample_out() };
        let start = if bias.is_empty() { Accumulate::Zero } else { Accumulate::Rows(bias) };
        let left = ContiguousDepth::new(weight, k, self.c_out, k);
        matmul(weight.elem_type(), size, &left, &Patches { x, s: *self }, start, place)
    }

    /// The output gradients of `count` samples as one matrix (out, count · pixels).
    fn side_by_side(&self, grad: &[f32], count: usize, together: &mut [f32]) {
        let (pixels, columns) = (self.pixels_out(), count * self.pixels_out());
        for s in 0..count {
            for channel in 0..self.c_out {
                let from = &grad[(s * self.c_out + channel) * pixels..][..pixels];
                together[channel * columns + s * pixels..][..pixels].copy_from_slice(from);
            }
        }
    }

    fn grad_input(&self, weight: Weight, grad: &[f32]) -> Vec<f32> {
        let ConvGeometry { kernel, stride, pad_before, pad_after } = self.g;
        if stride == 1 && pad_before < kernel && pad_after < kernel {
            // The convolution of the output's gradient with the kernel turned around.
            let around = ConvGeometry {
                pad_before: kernel - 1 - pad_before,
                pad_after: kernel - 1 - pad_after,
                ..self.g
            };
            let Self { b, c_in, c_out, h, w, h_out, w_out, .. } = *self;
            let back =
                Self { g: around, b, c_in: c_out, c_out: c_in, h: h_out, w: w_out, h_out: h, w_out: w };
            if let Some(winograd) = back.winograd(weight.elem_type()) {
                return winograd.convolve(grad, &Kernels::backward(weight, c_in), &[]);
            }
            let left = Turned { weight, taps: kernel * kernel, c_in };
            let size = Size { m: c_in, n: b * h * w, k: back.patch() };
            let place = OutputLayout { row: h * w, part: h * w, part_step: self.sample_in() };
            return matmul(
                weight.elem_type(),
                size,
                &left,
                &Patches { x: grad, s: back },
                Accumulate::Zero,
                place,
            );
        }
        let mut wide = vec![0f32; weight.len()];
        weight.widen(0..weight.len(), &mut wide);
        let weight = &wide[..];
        let (pixels, k, group) = (self.pixels_out(), self.patch(), self.group());
        let parallelism = self.inner_parallelism();
        let mut grad_x = vec![0f32; self.b * self.sample_in()];
        cpu::for_chunks(&mut grad_x, group * self.sample_in(), |i, grad_x| {
            let count = grad_x.len() / self.sample_in();
            let columns = count * pixels;
            with_scratch(k * columns, self.c_out * columns, |patches, together| {
                self.side_by_side(&grad[i * group * self.sample_out()..], count, together);
                Product { m: k, n: columns, k: self.c_out, scale: 1.0, add: false, parallelism }.write(
                    Matrix { values: weight, row: 1, column: k },
                    Matrix { values: together, row: columns, column: 1 },
                    patches,
                    columns,
                );
                if count == 1 {
                    let patches = &*patches;
                    cpu::for_chunks(grad_x, self.h * self.w, |channel, grad_x| {
                        scatter(self, patches, columns, 0, channel, grad_x);
                    });
                    return;
                }
                for (s, grad_x) in grad_x.chunks_exact_mut(self.sample_in()).enumerate() {
                    scatter(self, patches, columns, s * pixels, 0, grad_x);
                }
            });
        });
        grad_x
    }

    /// Patches (patch, pixels of all samples) times the output's gradient (pixels, out), turned over.
    fn grad_weight(&self, x: &[f32], grad: &[f32]) -> Vec<f32> {
        let size = Size { m: self.patch(), n: self.c_out, k: self.b * self.pixels_out() };
        let (left, right) = (PatchRows { x, s: *self }, OutputPixels { grad, s: *self });
        let turned =
            matmul(ElemType::F32, size, &left, &right, Accumulate::Zero, OutputLayout::matrix(self.c_out));
        (0..self.c_out).flat_map(|o| turned.iter().skip(o).step_by(self.c_out)).copied().collect()
    }

    fn grad_bias(&self, grad: &[f32]) -> Vec<f32> {
        let mut sums = vec![0f32; self.c_out];
        for (channel, values) in grad.chunks_exact(self.pixels_out()).enumerate() {
            sums[channel % self.c_out] += cpu::sum(values);
        }
        sums
    }
}

/// Runs `work` on two buffers of this thread that keep their memory from call to call; their content is arbitrary.
fn with_scratch(first: usize, second: usize, work: impl FnOnce(&mut [f32], &mut [f32])) {
    thread_local! {
        static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
    }
    // Taken out, not borrowed: rayon may start another convolution on this thread before `work` is done.
    let [mut a, mut b] = SCRATCH.take();
    a.resize(first.max(a.len()), 0.0);
    b.resize(second.max(b.len()), 0.0);
    work(&mut a[..first], &mut b[..second]);
    SCRATCH.set([a, b]);
}

cpu::vectorised! {
    /// Adds columns `at..` of `patches` back to the pixels they came from, in the channels of `sample` from `first` on.
    fn scatter(s: &Sizes, patches: &[f32], columns: usize, at: usize, first: usize, sample: &mut [f32]) {
        let ConvGeometry { kernel, stride, pad_before, .. } = s.g;
        let taps = kernel * kernel;
        for row in 0..sample.len() / (s.h * s.w) * taps {
            let (c, ky, kx) = (row / taps, row / kernel % kernel, row % kernel);
            let inside = s.inside(kx);
            let source = &patches[(first * taps + row) * columns + at..][..s.pixels_out()];
            for (y, source) in source.chunks_exact(s.w_out).enumerate() {
                let from = (y * stride + ky).wrapping_sub(pad_before);
                if from >= s.h || inside.is_empty() {
                    continue;
                }
                let start = (c * s.h + from) * s.w + inside.start * stride + kx - pad_before;
                let source = &source[inside.clone()];
                if stride == 1 {
                    for (value, source) in sample[start..].iter_mut().zip(source) {
                        *value += source;
                    }
                } else {
                    for (value, source) in sample[start..].iter_mut().step_by(stride).zip(source) {
                        *value += source;
                    }
                }
            }
        }
    }
}

impl CustomOp3 for ConvOp {
    fn name(&self) -> &'static str {
        "conv2d"
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
        let s = Sizes::new(self.0, x_layout.shape(), w_layout.shape())?;
        if self.1 == Pass::Recompute {
            let y = vec![0.0; s.b * s.sample_out()];
            return Ok((CpuStorage::F32(y), (s.b, s.c_out, s.h_out, s.w_out).into()));
        }
        let y =
            s.forward(cpu::operand(x, x_layout)?, Weight::operand(w, w_layout)?, cpu::operand(b, b_layout)?);
        Ok((CpuStorage::F32(y), (s.b, s.c_out, s.h_out, s.w_out).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = Sizes::new(self.0, x.shape(), w.shape())?;
        let grad = grad.contiguous()?;
        cpu::with_values(&grad, |grad| {
            let device = x.device();
            let grad_x = if x.track_op() {
                let values = cpu::with_weight(w, |w| s.grad_input(w, grad))?;
                Some(Tensor::from_vec(values, x.shape(), device)?)
            } else {
                None
            };
            let grad_w = if w.track_op() {
                let values = cpu::with_values(x, |x| s.grad_weight(x, grad))?;
                Some(Tensor::from_vec(values, w.shape(), device)?)
            } else {
                None
            };
            let grad_b =
                if b.track_op() { Some(Tensor::from_vec(s.grad_bias(grad), s.c_out, device)?) } else { None };
            Ok((grad_x, grad_w, grad_b))
        })?
    }
}
