//! The operations of `ops.rs` on tensors of a CUDA device.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, DevicePtr, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use super::call::{Arg, Backend, Call, Module, Operand};
use super::ops::{self, AttentionSizes, Channels, GroupSizes, LayerSizes, Strided};
use crate::layers::Activation;

impl Module {
    /// The kernels as the build script compiled them: machine code, and PTX for newer GPUs.
    fn binary(self) -> &'static [u8] {
        match self {
            Self::Attention => include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")),
            Self::Norm => include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin")),
            Self::Optimiser => include_bytes!(concat!(env!("OUT_DIR"), "/optimiser.fatbin")),
            Self::Pointwise => include_bytes!(concat!(env!("OUT_DIR"), "/pointwise.fatbin")),
        }
    }
}

/// Loaded files and looked-up kernels, each for one GPU, by its number.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, Module), Arc<CudaModule>>,
    kernels: HashMap<(usize, String), CudaFunction>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

/// The kernel of a call, loaded the first time.
fn kernel(stream: &Stream, call: &Call) -> Result<CudaFunction> {
    let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let gpu = stream.context().ordinal();
    if let Some(kernel) = loaded.kernels.get(&(gpu, call.kernel.clone())) {
        return Ok(kernel.clone());
    }
    let module = match loaded.modules.get(&(gpu, call.module)) {
        Some(module) => module.clone(),
        None => {
            let module = stream.context().load_module(Ptx::from_binary(call.module.binary().to_vec())).w()?;
            loaded.modules.insert((gpu, call.module), module.clone());
            module
        }
    };
    let kernel = module.load_function(&call.kernel).w()?;
    loaded.kernels.insert((gpu, call.kernel.clone()), kernel.clone());
    Ok(kernel)
}

struct Gpu<'a>(&'a CudaDevice);

impl Backend for Gpu<'_> {
    type Buffer = CudaStorage;

    fn alloc(&self, dtype: DType, len: usize) -> Result<CudaStorage> {
        // SAFETY: every operation writes all values of its outputs before they are read; the tests in `emulated.rs` hold
        // them to that. CUDA has no empty blocks of memory.
        let storage = unsafe { self.0.alloc_uninit(&Shape::from(len.max(1)), dtype) };
        let mebibytes = (len * dtype.size_in_bytes()) >> 20;
        storage.map_err(|error| error.context(format!("{mebibytes} MiB of GPU memory were asked for")))
    }

    fn operand(&self, buffer: &CudaStorage) -> Result<Operand> {
        Ok(address(buffer, 0, &self.0.cuda_stream())?.0)
    }

    fn run(&self, call: Call) -> Result<()> {
        let stream = self.0.cuda_stream();
        let kernel = kernel(&stream, &call)?;
        let mut builder = stream.launch_builder(&kernel);
        for arg in &call.args {
            match arg {
                Arg::Pointer(value) | Arg::U64(value) => builder.arg(value),
                Arg::U32(value) => builder.arg(value),
                Arg::F32(value) => builder.arg(value),
            };
        }
        let [grid, block] = [call.grid, call.block].map(|[x, y, z]| (x, y, z));
        let sizes = LaunchConfig { grid_dim: grid, block_dim: block, shared_mem_bytes: 0 };
        // SAFETY: arguments are of the types that the kernel declares and inside their buffers, which `emulated.rs` tests.
        unsafe { builder.launch(sizes) }.w()?;
        Ok(())
    }
}

type Stream = Arc<CudaStream>;

/// Where the values of `storage` from `offset` on lie. What was queued before is waited for; the guard is kept until the
/// kernel is queued.
fn address<'a>(
    storage: &'a CudaStorage,
    offset: usize,
    stream: &'a Stream,
) -> Result<(Operand, SyncOnDrop<'a>)> {
    fn of<'a, T: CudaDType + 'static>(
        storage: &'a CudaStorage,
        stream: &'a Stream,
    ) -> Result<(u64, SyncOnDrop<'a>)> {
        Ok(storage.as_cuda_slice::<T>()?.device_ptr(stream))
    }
    let dtype = storage.dtype();
    let (start, guard) = match dtype {
        DType::F32 => of::<f32>(storage, stream)?,
        DType::F16 => of::<f16>(storage, stream)?,
        DType::BF16 => of::<bf16>(storage, stream)?,
        _ => bail!("no CUDA kernels for {dtype:?}"),
    };
    Ok((Operand { address: start + (offset * dtype.size_in_bytes()) as u64, dtype }, guard))
}

/// Runs `work` with the places of contiguous operands, which are all of one device.
fn with_storages<const N: usize, T>(
    inputs: [(&CudaStorage, &Layout); N],
    work: impl FnOnce(&Gpu, [Operand; N]) -> Result<T>,
) -> Result<T> {
    let device = inputs[0].0.device();
    let stream = device.cuda_stream();
    let mut guards = Vec::with_capacity(N);
    let mut operands = [Operand { address: 0, dtype: DType::F32 }; N];
    for (operand, (storage, layout)) in operands.iter_mut().zip(inputs) {
        let Some((start, _)) = layout.contiguous_offsets() else {
            bail!("a CUDA kernel was given a tensor that is not contiguous: {layout:?}");
        };
        let (at, guard) = address(storage, start, &stream)?;
        *operand = at;
        guards.push(guard);
    }
    let result = work(&Gpu(device), operands);
    drop(guards);
    result
}

/// The same with tensors.
fn with_tensors<const N: usize, T>(
    inputs: [&Tensor; N],
    work: impl FnOnce(&Gpu, [Operand; N]) -> Result<T>,
) -> Result<T> {
    let held = inputs.map(|input| input.storage_and_layout());
    let mut storages = Vec::with_capacity(N);
    for (storage, layout) in &held {
        match &**storage {
            Storage::Cuda(storage) => storages.push((storage, *layout)),
            _ => bail!("a CUDA kernel was given a tensor on another device"),
        }
    }
    match <[_; N]>::try_from(storages) {
        Ok(storages) => with_storages(storages, work),
        Err(_) => bail!("a CUDA kernel was given the wrong number of tensors"),
    }
}

/// A tensor without a graph.
pub(in crate::layers) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

pub(super) type Input<'a> = (&'a CudaStorage, &'a Layout);

pub(in crate::layers) fn activate(activation: Activation, x: Input) -> Result<(CudaStorage, Shape)> {
    let y = with_storages([x], |gpu, [at]| ops::activate(gpu, activation, at, x.1.shape().elem_count()))?;
    Ok((y, x.1.shape().clone()))
}

pub(in crate::layers) fn activate_grad(activation: Activation, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let out = with_tensors([x, grad], |gpu, at| ops::activate_grad(gpu, activation, at, x.elem_count()))?;
    Ok(tensor(out, x.shape()))
}

/// (…, 2D) → (…, D)
pub(in crate::layers) fn geglu(x: Input) -> Result<(CudaStorage, Shape)> {
    let mut dims = x.1.dims().to_vec();
    let Some(width) = dims.last_mut() else { bail!("GEGLU of a single value") };
    *width /= 2;
    let width = *width;
    let shape = Shape::from(dims);
    let rows = shape.elem_count() / width.max(1);
    Ok((with_storages([x], |gpu, [at]| ops::geglu(gpu, at, rows, width))?, shape))
}

pub(in crate::layers) fn geglu_grad(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let width = grad.dim(candle_core::D::Minus1)?;
    let rows = grad.elem_count() / width.max(1);
    Ok(tensor(with_tensors([x, grad], |gpu, at| ops::geglu_grad(gpu, at, rows, width))?, x.shape()))
}

/// (B, C, H, W) → (B, C, 2H, 2W)
pub(in crate::layers) fn upsample(x: Input) -> Result<(CudaStorage, Shape)> {
    let (b, c, h, w) = x.1.shape().dims4()?;
    let y = with_storages([x], |gpu, [at]| ops::upsample(gpu, at, [b * c, h, w]))?;
    Ok((y, (b, c, 2 * h, 2 * w).into()))
}

/// The gradient of the (B, C, H, W) that was upsampled.
pub(in crate::layers) fn upsample_grad(grad: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = grad.dims4()?;
    let out = with_tensors([grad], |gpu, [at]| ops::upsample_grad(gpu, at, [b * c, h / 2, w / 2]))?;
    Ok(tensor(out, (b, c, h / 2, w / 2)))
}

/// The matrices (rows, columns) of a batch turned over.
pub(in crate::layers) fn transpose(
    x: Input,
    (rows, columns): (usize, usize),
    to: &Shape,
) -> Result<(CudaStorage, Shape)> {
    let batch = x.1.shape().elem_count() / (rows * columns).max(1);
    let y = with_storages([x], |gpu, [at]| ops::transpose(gpu, at, [batch, rows, columns]))?;
    Ok((y, to.clone()))
}

pub(in crate::layers) fn transpose_tensor(
    x: &Tensor,
    (rows, columns): (usize, usize),
    to: &Shape,
) -> Result<Tensor> {
    let batch = x.elem_count() / (rows * columns).max(1);
    let y = with_tensors([x], |gpu, [at]| ops::transpose(gpu, at, [batch, rows, columns]))?;
    Ok(tensor(y, to))
}

/// `x` plus a bias for each channel; the `i`-th value is of channel `i / inner % channels`.
pub(in crate::layers) fn add_bias(x: Input, bias: Input, inner: usize) -> Result<(CudaStorage, Shape)> {
    let (shape, channels) = (x.1.shape().clone(), bias.1.shape().elem_count());
    let y = with_storages([x, bias], |gpu, [x, bias]| {
        let out = gpu.alloc(x.dtype, shape.elem_count())?;
        let to = gpu.operand(&out)?;
        ops::add_bias(gpu, [x, bias, to], None, shape.elem_count(), Channels { channels, inner })?;
        Ok(out)
    })?;
    Ok((y, shape))
}

/// Adds a bias to `y` in place, likewise.
pub(super) fn add_bias_to(y: &CudaStorage, count: usize, bias: Input, inner: usize) -> Result<()> {
    let layout = Layout::contiguous(count);
    let channels = bias.1.shape().elem_count();
    with_storages([(y, &layout), bias], |gpu, [y, bias]| {
        ops::add_bias(gpu, [y, bias, y], None, count, Channels { channels, inner })
    })
}

/// Sums over the rows of (…, channels) → (channels).
pub(in crate::layers) fn column_sums(x: &Tensor, channels: usize) -> Result<Tensor> {
    let rows = x.elem_count() / channels.max(1);
    let out = with_tensors([x], |gpu, [at]| ops::column_sums(gpu, at, rows, channels))?;
    Ok(tensor(out, channels))
}

/// Sums over the pixels of (B, C, H, W) → (B, C), or over the samples too → (C).
pub(in crate::layers) fn channel_sums(x: &Tensor, over_batch: bool) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let out = with_tensors([x], |gpu, [at]| ops::channel_sums(gpu, at, [b, c, h * w], over_batch))?;
    Ok(if over_batch { tensor(out, c) } else { tensor(out, (b, c)) })
}

/// A normalised tensor, and its statistics for the backward pass.
pub(in crate::layers) fn group_norm(s: GroupSizes, inputs: [Input; 3]) -> Result<(CudaStorage, Tensor)> {
    let (y, stats) = with_storages(inputs, |gpu, at| ops::group_norm(gpu, s, at))?;
    Ok((y, tensor(stats, (s.batch, s.groups, 2))))
}

/// Gradients of x, and where `trained` of weight and bias, from [x, weight, bias, statistics, grad].
pub(in crate::layers) fn group_norm_grad(
    s: GroupSizes,
    inputs: [&Tensor; 5],
    trained: bool,
) -> Result<(Tensor, Option<[Tensor; 2]>)> {
    let (x, rest) = with_tensors(inputs, |gpu, at| ops::group_norm_grad(gpu, s, at, trained))?;
    let shape = inputs[1].shape();
    Ok((tensor(x, inputs[0].shape()), rest.map(|rest| rest.map(|grad| tensor(grad, shape)))))
}

pub(in crate::layers) fn layer_norm(s: LayerSizes, inputs: [Input; 3]) -> Result<(CudaStorage, Tensor)> {
    let (y, stats) = with_storages(inputs, |gpu, at| ops::layer_norm(gpu, s, at))?;
    Ok((y, tensor(stats, (s.sets * s.per_set, 2))))
}

/// Gradients of x, and where `trained` of weight and bias, from [x, weight, statistics, grad].
pub(in crate::layers) fn layer_norm_grad(
    s: LayerSizes,
    inputs: [&Tensor; 4],
    trained: bool,
) -> Result<(Tensor, Option<[Tensor; 2]>)> {
    let (x, rest) = with_tensors(inputs, |gpu, at| ops::layer_norm_grad(gpu, s, at, trained))?;
    let shape = inputs[1].shape();
    Ok((tensor(x, inputs[0].shape()), rest.map(|rest| rest.map(|grad| tensor(grad, shape)))))
}

/// Sizes and places of attention; rows may lie apart, as the parts of one projection do.
fn attention_inputs(
    layouts: [&Layout; 3],
    heads: usize,
    causal: bool,
) -> Result<(AttentionSizes, [[usize; 3]; 3])> {
    let (batch, n, width) = layouts[0].shape().dims3()?;
    let (_, m, _) = layouts[1].shape().dims3()?;
    if layouts[1..].iter().any(|layout| layout.dims() != [batch, m, width]) {
        bail!("attention of {:?} over {:?} and {:?}", layouts[0], layouts[1], layouts[2]);
    }
    let mut places = [[0; 3]; 3];
    for (place, layout) in places.iter_mut().zip(layouts) {
        let &[sample, row, 1] = layout.stride() else {
            bail!("attention was given values that lie apart: {layout:?}")
        };
        *place = [layout.start_offset(), sample, row];
    }
    Ok((AttentionSizes { batch, n, m, heads, d: width / heads, causal }, places))
}

/// Whether the kernels take heads of `d` values that lie beside each other in `x`.
pub(in crate::layers) fn takes_attention(x: [&Tensor; 3], d: usize) -> bool {
    let dtype = x[0].dtype();
    (1..=ops::WIDEST_HEAD).contains(&d)
        && x.iter().all(|x| super::applies(x) && x.dtype() == dtype && x.stride().last() == Some(&1))
}

/// softmax(q·kᵀ/√d)·v, and what the backward pass needs of the scores.
pub(in crate::layers) fn attention(
    inputs: [Input; 3],
    heads: usize,
    causal: bool,
) -> Result<(CudaStorage, Tensor)> {
    let (s, places) = attention_inputs(inputs.map(|(_, layout)| layout), heads, causal)?;
    let device = inputs[0].0.device();
    let stream = device.cuda_stream();
    let mut guards = Vec::with_capacity(3);
    let mut strided = Vec::with_capacity(3);
    for ((storage, _), [start, sample, row]) in inputs.into_iter().zip(places) {
        let (at, guard) = address(storage, start, &stream)?;
        strided.push(Strided { at, sample, row });
        guards.push(guard);
    }
    let (y, lse) = ops::attention(&Gpu(device), s, [strided[0], strided[1], strided[2]])?;
    drop(guards);
    Ok((y, tensor(lse, (s.batch, s.heads, s.n))))
}

/// Gradients of [q, k, v], from the result, what the forward pass kept and the gradient.
pub(in crate::layers) fn attention_grad(
    qkv: [&Tensor; 3],
    [y, lse, grad]: [&Tensor; 3],
    heads: usize,
    causal: bool,
) -> Result<[Tensor; 3]> {
    let (s, places) = attention_inputs(qkv.map(Tensor::layout), heads, causal)?;
    // From their first value on; strides are passed beside.
    let held = qkv.map(|x| x.storage_and_layout());
    let mut storages = Vec::with_capacity(3);
    for (storage, _) in &held {
        match &**storage {
            Storage::Cuda(storage) => storages.push(storage),
            _ => bail!("a CUDA kernel was given a tensor on another device"),
        }
    }
    let stream = storages[0].device().cuda_stream();
    let mut guards = Vec::with_capacity(3);
    let mut strided = Vec::with_capacity(3);
    for (storage, [start, sample, row]) in storages.into_iter().zip(places) {
        let (at, guard) = address(storage, start, &stream)?;
        strided.push(Strided { at, sample, row });
        guards.push(guard);
    }
    let outs = with_tensors([y, lse, grad], |gpu, saved| {
        ops::attention_grad(gpu, s, [strided[0], strided[1], strided[2]], saved)
    })?;
    drop(guards);
    let mut shapes = qkv.into_iter().map(Tensor::shape);
    Ok(outs.map(|out| tensor(out, shapes.next().unwrap_or(y.shape()))))
}

/// x·Wᵀ + b of `rows` rows, k → n.
pub(in crate::layers) fn linear(
    x: Input,
    weight: Input,
    bias: Option<Input>,
    [rows, n, k]: [usize; 3],
) -> Result<CudaStorage> {
    let turned = weight.1.transpose(0, 1)?;
    let Some((start, _)) = x.1.contiguous_offsets() else { bail!("a linear layer was given {:?}", x.1) };
    let flat = Layout::contiguous_with_offset((rows, k), start);
    let y = x.0.matmul(weight.0, (1, rows, n, k), &flat, &turned)?;
    if let Some(bias) = bias {
        add_bias_to(&y, rows * n, bias, 1)?;
    }
    Ok(y)
}

/// One step of AdamW in place; see [`super::adamw`].
pub(super) fn adamw(tensors: [&Tensor; 4], constants: [f32; 8]) -> Result<()> {
    with_tensors(tensors, |gpu, at| ops::adamw(gpu, at, tensors[0].elem_count(), constants))
}

/// kept ← keep · kept + take · x, in place.
pub(super) fn blend(kept: &Tensor, x: &Tensor, factors: [f32; 2]) -> Result<()> {
    with_tensors([kept, x], |gpu, at| ops::blend(gpu, at, kept.elem_count(), factors))
}

/// Sums of squares whose sum is that of `x`.
pub(super) fn square_sums(x: &Tensor) -> Result<Tensor> {
    let n = x.elem_count();
    Ok(tensor(with_tensors([x], |gpu, [at]| ops::square_sums(gpu, at, n))?, ops::square_blocks(n)))
}

/// Zeros of the type and device of `like`.
pub(in crate::layers) fn zeros(like: &CudaStorage, shape: &Shape) -> Result<CudaStorage> {
    like.device().zeros_impl(shape, like.dtype())
}
