//! Convolutions by cuDNN, forward and backward, products of 16-bit floats summed in f32.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::cudnn::sys::{
    cudnnConvolutionBwdDataAlgo_t as DataAlgorithm, cudnnConvolutionBwdFilterAlgo_t as FilterAlgorithm,
    cudnnConvolutionFwdAlgo_t as ForwardAlgorithm, cudnnConvolutionMode_t as Mode, cudnnMathType_t as Math,
    cudnnTensorFormat_t as Format,
};
use candle_core::cuda_backend::cudarc::cudnn::{
    ConvBackwardData, ConvBackwardFilter, ConvDescriptor, ConvForward, Cudnn, CudnnDataType,
    FilterDescriptor, TensorDescriptor,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use super::gpu::{Input, add_bias_to, channel_sums, tensor, zeros};
use crate::layers::{ConvGeometry, Pass};

/// A convolution of `x` (B, C, H, W) with `weight` (out, C, k, k).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Convolution {
    x: [usize; 4],
    weight: [usize; 4],
    y: [usize; 4],
    padding: usize,
    stride: usize,
}

/// cuDNN's choice for a convolution, with the bytes that it works in.
#[derive(Clone, Copy)]
enum Choice {
    Forward(ForwardAlgorithm, usize),
    Data(DataAlgorithm, usize),
    Filter(FilterAlgorithm, usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Direction {
    Forward,
    Data,
    Filter,
}

thread_local! {
    /// A handle belongs to one thread.
    static HANDLES: RefCell<HashMap<DeviceId, Arc<Cudnn>>> = RefCell::default();
    static CHOICES: RefCell<HashMap<(DeviceId, Direction, DType, Convolution), Choice>> = RefCell::default();
}

fn handle(device: &CudaDevice) -> Result<Arc<Cudnn>> {
    HANDLES.with_borrow_mut(|handles| {
        if let Some(handle) = handles.get(&device.id()) {
            return Ok(handle.clone());
        }
        let handle = Cudnn::new(device.cuda_stream())?;
        handles.insert(device.id(), handle.clone());
        Ok(handle)
    })
}

/// Types that cuDNN convolves.
trait Float: CudaDType + CudnnDataType + DeviceRepr + Copy {
    const DTYPE: DType;
    const ONE: Self;
    const ZERO: Self;
    /// Tensor cores for 16 bits; for f32 the same arithmetic as on the CPU, not TF32.
    const MATH: Math;
}

impl Float for f32 {
    const DTYPE: DType = DType::F32;
    const ONE: Self = 1.0;
    const ZERO: Self = 0.0;
    const MATH: Math = Math::CUDNN_FMA_MATH;
}

impl Float for f16 {
    const DTYPE: DType = DType::F16;
    const ONE: Self = f16::ONE;
    const ZERO: Self = f16::ZERO;
    const MATH: Math = Math::CUDNN_TENSOR_OP_MATH;
}

impl Float for bf16 {
    const DTYPE: DType = DType::BF16;
    const ONE: Self = bf16::ONE;
    const ZERO: Self = bf16::ZERO;
    const MATH: Math = Math::CUDNN_TENSOR_OP_MATH;
}

struct Descriptors<T: Float> {
    conv: ConvDescriptor<f32>,
    x: TensorDescriptor<T>,
    weight: FilterDescriptor<T>,
    y: TensorDescriptor<T>,
}

impl Convolution {
    fn descriptors<T: Float>(&self, device: &CudaDevice) -> Result<Descriptors<T>> {
        let handle = handle(device)?;
        let ints = |sizes: [usize; 4]| sizes.map(|size| size as i32);
        let (pad, stride) = (self.padding as i32, self.stride as i32);
        // Sums in f32, whatever the values are.
        let mut conv = handle.create_conv2d::<f32>(
            [pad, pad],
            [stride, stride],
            [1, 1],
            Mode::CUDNN_CROSS_CORRELATION,
        )?;
        conv.set_math_type(T::MATH)?;
        Ok(Descriptors {
            conv,
            x: handle.create_4d_tensor(Format::CUDNN_TENSOR_NCHW, ints(self.x))?,
            weight: handle.create_4d_filter(Format::CUDNN_TENSOR_NCHW, ints(self.weight))?,
            y: handle.create_4d_tensor(Format::CUDNN_TENSOR_NCHW, ints(self.y))?,
        })
    }

    /// cuDNN's choice, asked for once.
    fn choice<T: Float>(
        &self,
        device: &CudaDevice,
        direction: Direction,
        choose: impl FnOnce() -> Result<Choice>,
    ) -> Result<Choice> {
        let key = (device.id(), direction, T::DTYPE, *self);
        if let Some(choice) = CHOICES.with_borrow(|choices| choices.get(&key).copied()) {
            return Ok(choice);
        }
        let choice = choose()?;
        CHOICES.with_borrow_mut(|choices| choices.insert(key, choice));
        Ok(choice)
    }

    fn forward_of<T: Float>(&self, x: Input, weight: Input) -> Result<CudaStorage> {
        let device = x.0.device();
        let Descriptors { conv, x: x_desc, weight: w_desc, y: y_desc } = self.descriptors::<T>(device)?;
        let op = ConvForward { conv: &conv, x: &x_desc, w: &w_desc, y: &y_desc };
        let choose = || {
            let algorithm = op.pick_algorithm()?;
            Ok(Choice::Forward(algorithm, op.get_workspace_size(algorithm)?))
        };
        let Choice::Forward(algorithm, bytes) = self.choice::<T>(device, Direction::Forward, choose)? else {
            bail!("cuDNN's choices are mixed up");
        };
        let mut workspace = workspace(device, bytes)?;
        // SAFETY: cuDNN writes all of it.
        let mut y = unsafe { device.alloc::<T>(self.y.iter().product())? };
        // SAFETY: sizes and types are those of the descriptors.
        unsafe {
            op.launch(
                algorithm,
                Some(&mut workspace),
                (T::ONE, T::ZERO),
                &view::<T>(x)?,
                &view::<T>(weight)?,
                &mut y,
            )?;
        }
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    }

    fn data_of<T: Float>(&self, weight: Input, grad: Input) -> Result<CudaStorage> {
        let device = grad.0.device();
        let Descriptors { conv, x: x_desc, weight: w_desc, y: y_desc } = self.descriptors::<T>(device)?;
        let op = ConvBackwardData { conv: &conv, dx: &x_desc, w: &w_desc, dy: &y_desc };
        let choose = || {
            let algorithm = op.pick_algorithm()?;
            Ok(Choice::Data(algorithm, op.get_workspace_size(algorithm)?))
        };
        let Choice::Data(algorithm, bytes) = self.choice::<T>(device, Direction::Data, choose)? else {
            bail!("cuDNN's choices are mixed up");
        };
        let mut workspace = workspace(device, bytes)?;
        // SAFETY: cuDNN writes all of it.
        let mut out = unsafe { device.alloc::<T>(self.x.iter().product())? };
        // SAFETY: sizes and types are those of the descriptors.
        unsafe {
            op.launch(
                algorithm,
                Some(&mut workspace),
                (T::ONE, T::ZERO),
                &mut out,
                &view::<T>(weight)?,
                &view::<T>(grad)?,
            )?;
        }
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }

    fn filter_of<T: Float>(&self, x: Input, grad: Input) -> Result<CudaStorage> {
        let device = grad.0.device();
        let Descriptors { conv, x: x_desc, weight: w_desc, y: y_desc } = self.descriptors::<T>(device)?;
        let op = ConvBackwardFilter { conv: &conv, x: &x_desc, dw: &w_desc, dy: &y_desc };
        let choose = || {
            let algorithm = op.pick_algorithm()?;
            Ok(Choice::Filter(algorithm, op.get_workspace_size(algorithm)?))
        };
        let Choice::Filter(algorithm, bytes) = self.choice::<T>(device, Direction::Filter, choose)? else {
            bail!("cuDNN's choices are mixed up");
        };
        let mut workspace = workspace(device, bytes)?;
        // SAFETY: cuDNN writes all of it.
        let mut out = unsafe { device.alloc::<T>(self.weight.iter().product())? };
        // SAFETY: sizes and types are those of the descriptors.
        unsafe {
            op.launch(
                algorithm,
                Some(&mut workspace),
                (T::ONE, T::ZERO),
                &view::<T>(x)?,
                &mut out,
                &view::<T>(grad)?,
            )?;
        }
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }

    /// `x` convolved, and a bias added for each channel.
    fn forward(&self, x: Input, weight: Input, bias: Option<Input>) -> Result<CudaStorage> {
        let y = match x.0.dtype() {
            DType::F16 => self.forward_of::<f16>(x, weight)?,
            DType::BF16 => self.forward_of::<bf16>(x, weight)?,
            _ => self.forward_of::<f32>(x, weight)?,
        };
        if let Some(bias) = bias {
            add_bias_to(&y, self.y.iter().product(), bias, self.y[2] * self.y[3])?;
        }
        Ok(y)
    }

    /// The gradient of x.
    fn grad_input(&self, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let out = with_inputs([weight, grad], |[weight, grad]| match grad.0.dtype() {
            DType::F16 => self.data_of::<f16>(weight, grad),
            DType::BF16 => self.data_of::<bf16>(weight, grad),
            _ => self.data_of::<f32>(weight, grad),
        })?;
        Ok(tensor(out, self.x.to_vec()))
    }

    /// The gradient of the weight.
    fn grad_weight(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let out = with_inputs([x, grad], |[x, grad]| match grad.0.dtype() {
            DType::F16 => self.filter_of::<f16>(x, grad),
            DType::BF16 => self.filter_of::<bf16>(x, grad),
            _ => self.filter_of::<f32>(x, grad),
        })?;
        Ok(tensor(out, self.weight.to_vec()))
    }
}

fn workspace(device: &CudaDevice, bytes: usize) -> Result<CudaSlice<u8>> {
    // SAFETY: cuDNN reads nothing from it that it has not written.
    unsafe { device.alloc::<u8>(bytes.max(1)) }
}

fn view<'a, T: Float>((storage, layout): Input<'a>) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("a convolution was given {layout:?}"),
    }
}

fn with_inputs<T>(inputs: [&Tensor; 2], work: impl FnOnce([Input; 2]) -> Result<T>) -> Result<T> {
    let [(a, a_layout), (b, b_layout)] = inputs.map(|input| input.storage_and_layout());
    match (&*a, &*b) {
        (Storage::Cuda(a), Storage::Cuda(b)) => work([(a, a_layout), (b, b_layout)]),
        _ => bail!("a convolution on CUDA was given a tensor on another device"),
    }
}

/// `x` (B, in, H, W), `weight` (out, in, k, k), `bias` (out), all of one type → (B, out, H', W').
pub(in crate::layers) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    g: ConvGeometry,
    pass: Pass,
) -> Result<Tensor> {
    // cuDNN pads alike on all sides.
    let (x, padding) = if g.pad_before == g.pad_after {
        (x.contiguous()?, g.pad_before)
    } else {
        let x = x.pad_with_zeros(2, g.pad_before, g.pad_after)?;
        (x.pad_with_zeros(3, g.pad_before, g.pad_after)?.contiguous()?, 0)
    };
    let ((b, c, h, w), (out, c_in, k, _)) = (x.dims4()?, weight.dims4()?);
    if c != c_in || h + 2 * padding < k || w + 2 * padding < k {
        bail!("convolution with weight {:?} was given {:?}", weight.shape(), x.shape());
    }
    let size = |size: usize| (size + 2 * padding - k) / g.stride + 1;
    let sizes = Convolution {
        x: [b, c, h, w],
        weight: [out, c, k, k],
        y: [b, out, size(h), size(w)],
        padding,
        stride: g.stride,
    };
    let weight = weight.contiguous()?;
    // There are no empty tensors on CUDA: without a bias the weight stands in its place.
    x.apply_op3(&weight, bias.unwrap_or(&weight), ConvolutionOp { sizes, bias: bias.is_some(), pass })
}

struct ConvolutionOp {
    sizes: Convolution,
    /// Whether the third operand is a bias.
    bias: bool,
    pass: Pass,
}

impl CustomOp3 for ConvolutionOp {
    fn name(&self) -> &'static str {
        "conv2d"
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
        bail!("a convolution for CUDA was given tensors on the CPU")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        w: &CudaStorage,
        w_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = Shape::from(self.sizes.y.to_vec());
        let y = match self.pass {
            Pass::Forward => {
                let bias = self.bias.then_some((b, b_layout));
                self.sizes.forward((x, x_layout), (w, w_layout), bias)?
            }
            Pass::Recompute => zeros(x, &shape)?,
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
        let grad_x = x.track_op().then(|| self.sizes.grad_input(w, &grad));
        let grad_w = w.track_op().then(|| self.sizes.grad_weight(x, &grad));
        let grad_b = (self.bias && b.track_op()).then(|| channel_sums(&grad, true));
        Ok((grad_x.transpose()?, grad_w.transpose()?, grad_b.transpose()?))
    }
}
