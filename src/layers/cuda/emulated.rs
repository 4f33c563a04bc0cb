//! The CUDA kernels on the CPU, held against the CPU's own: a C++ compiler builds `kernels/*.cu` with a header that
//! stands for CUDA (`tests/cuda/host_cuda.h`), and the operations of `ops.rs` run on it as they do on a GPU.
//!
//! Beside the values this proves that every argument has the type that the kernel declares, that no value outside a
//! buffer is written, that every value of an output is (buffers start as NaN), that vectors are aligned, that all threads come to
//! each barrier, and that the order in which threads run between barriers does not matter.

use std::ffi::{CStr, CString, c_char, c_void};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};

use candle_core::{DType, Device, Module as _, Result, Shape, Tensor, Var, bail};
use half::{bf16, f16};

use super::call::{Arg, Backend, Call, Operand};
use super::ops::{self, AttentionSizes, Channels, GroupSizes, LayerSizes, Strided};
use crate::diffusion::noise::normal;
use crate::layers::{
    self, Activation, add_to_channels, attention, geglu, image_to_tokens, upsample_nearest2x,
};

/// The library of kernels.
struct Library(*mut c_void);
// SAFETY: only its functions are looked up, and those run under a lock.
unsafe impl Send for Library {}
// SAFETY: likewise.
unsafe impl Sync for Library {}

impl Library {
    /// Builds and opens the kernels; `None` where there is no C++ compiler.
    fn build() -> Option<Self> {
        let compiler =
            std::env::var("CXX").ok().into_iter().chain(["c++", "g++", "clang++"].map(String::from));
        let compiler = compiler.into_iter().find(|name| {
            Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
        })?;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernels.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda/kernels.cpp");
        let output = Command::new(compiler)
            .args(["-std=c++17", "-O1", "-w", "-fPIC", "-shared", source, "-o"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let name = CString::new(file.to_str().unwrap()).unwrap();
        // SAFETY: the library was just built from our sources, and has no code that runs when it is opened.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "the kernels do not load");
        Some(Self(handle))
    }

    fn symbol(&self, name: &str) -> *mut c_void {
        let symbol = CString::new(name).unwrap();
        // SAFETY: the library stays open.
        let address = unsafe { libc::dlsym(self.0, symbol.as_ptr()) };
        assert!(!address.is_null(), "no kernel {name}");
        address
    }
}

static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
/// The emulation has one state for the process.
static ONE: Mutex<()> = Mutex::new(());

/// The CPU in the place of a GPU.
struct Host {
    library: &'static Library,
    _one: MutexGuard<'static, ()>,
}

/// Values between guards; 16-byte aligned, or `shift` values beyond that.
struct Buffer {
    words: Vec<u128>,
    dtype: DType,
    len: usize,
    shift: usize,
}

/// Words before and after the values.
const GUARD: usize = 4;

impl Buffer {
    fn new(dtype: DType, len: usize, shift: usize) -> Self {
        let words = ((len + shift) * dtype.size_in_bytes()).div_ceil(16) + 2 * GUARD;
        // All ones are NaN in every type, before, between and after the values.
        Self { words: vec![u128::MAX; words], dtype, len, shift }
    }

    fn upload(x: &Tensor, dtype: DType, shift: usize) -> Result<Self> {
        let mut buffer = Self::new(dtype, x.elem_count(), shift);
        let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let size = dtype.size_in_bytes();
        let start = buffer.start();
        let bytes = buffer.bytes_mut();
        for (i, value) in values.into_iter().enumerate() {
            let to = &mut bytes[start + i * size..][..size];
            match dtype {
                DType::F32 => to.copy_from_slice(&value.to_ne_bytes()),
                DType::F16 => to.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
                _ => to.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
            }
        }
        Ok(buffer)
    }

    fn start(&self) -> usize {
        16 * GUARD + self.shift * self.dtype.size_in_bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: words are plain bytes.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), 16 * self.words.len()) }
    }

    /// The values; fails where something was written around them.
    fn download(&mut self, shape: impl Into<Shape>) -> Result<Tensor> {
        let (start, size, len, dtype) = (self.start(), self.dtype.size_in_bytes(), self.len, self.dtype);
        let bytes = self.bytes_mut();
        let (before, rest) = bytes.split_at(start);
        let (values, after) = rest.split_at(len * size);
        assert!(before.iter().chain(after).all(|byte| *byte == 255), "a kernel wrote outside its buffer");
        let values: Vec<f32> = values
            .chunks_exact(size)
            .map(|bytes| match dtype {
                DType::F32 => f32::from_ne_bytes(bytes.try_into().unwrap()),
                DType::F16 => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f32(),
                _ => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f32(),
            })
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }
}

impl Host {
    /// `None`, with a line that says so, where there is no C++ compiler.
    fn new() -> Option<Self> {
        let one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some(library) = LIBRARY.get_or_init(Library::build) else {
            eprintln!("skipped: no C++ compiler to build the CUDA kernels for the CPU");
            return None;
        };
        Some(Self { library, _one: one })
    }

    /// Threads of a block run in order, or the last first.
    fn set_order(&self, last_first: bool) {
        let set = self.library.symbol("host_set_order");
        // SAFETY: it is declared so.
        let set: extern "C" fn(i32) = unsafe { std::mem::transmute(set) };
        set(last_first.into());
    }

    fn upload(&self, x: &Tensor, dtype: DType, shift: usize) -> Result<(Buffer, Operand)> {
        let buffer = Buffer::upload(x, dtype, shift)?;
        let operand = self.operand(&buffer)?;
        Ok((buffer, operand))
    }
}

impl Backend for Host {
    type Buffer = Buffer;

    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        Ok(Buffer::new(dtype, len, 0))
    }

    fn operand(&self, buffer: &Buffer) -> Result<Operand> {
        let address = buffer.words.as_ptr() as u64 + buffer.start() as u64;
        Ok(Operand { address, dtype: buffer.dtype })
    }

    fn run(&self, call: Call) -> Result<()> {
        let Call { module, kernel, grid, block, mut args } = call;
        let (launch, signature, file, error) = (
            self.library.symbol(&format!("host_{kernel}")),
            self.library.symbol(&format!("signature_{kernel}")),
            self.library.symbol(&format!("file_{kernel}")),
            self.library.symbol("host_error"),
        );
        // SAFETY: they are declared so.
        let (launch, signature, file, error) = unsafe {
            (
                std::mem::transmute::<
                    *mut c_void,
                    extern "C" fn(*const u32, *const u32, *mut *mut c_void) -> i32,
                >(launch),
                std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(signature),
                std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(file),
                std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(error),
            )
        };
        // SAFETY: both are C strings that stay.
        let text = |pointer| unsafe { CStr::from_ptr(pointer) }.to_str().unwrap().to_string();
        let given: String = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(_) => 'p',
                Arg::U64(_) => 'U',
                Arg::U32(_) => 'u',
                Arg::F32(_) => 'f',
            })
            .collect();
        assert_eq!(given, text(signature()), "arguments of {kernel}");
        let name = format!("{module:?}.cu").to_lowercase();
        assert!(text(file()).ends_with(&name), "{kernel} is not in {name}");
        let mut params: Vec<*mut c_void> = args
            .iter_mut()
            .map(|arg| match arg {
                Arg::Pointer(value) | Arg::U64(value) => std::ptr::from_mut(value).cast(),
                Arg::U32(value) => std::ptr::from_mut(value).cast(),
                Arg::F32(value) => std::ptr::from_mut(value).cast(),
            })
            .collect();
        if launch(grid.as_ptr(), block.as_ptr(), params.as_mut_ptr()) != 0 {
            bail!("{kernel}: {}", text(error()));
        }
        Ok(())
    }
}

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// How far apart results may be, as a share of the largest value: the rounding of the type (2⁻²⁴, 2⁻¹¹, 2⁻⁸ and half of
/// it), times `roundings` of intermediate values, with room for the order of sums in f32 and for the CPU's error function
/// (1.5e-7).
fn tolerance(dtype: DType, roundings: f32) -> f32 {
    match dtype {
        DType::F32 => 4e-6,
        DType::F16 => roundings * 4.9e-4 + 4e-6,
        _ => roundings * 3.9e-3 + 4e-6,
    }
}

#[track_caller]
fn assert_close(ours: &Tensor, theirs: &Tensor, tolerance: f32, what: &str) {
    let theirs = theirs.reshape(ours.shape()).unwrap();
    let largest = theirs.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let ours = ours.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        assert!((a - b).abs() <= tolerance * largest.max(0.1), "{what}: value {i} is {a}, not {b}");
    }
}

fn random(stream: u64, shape: &[usize], dtype: DType) -> Tensor {
    let x = normal(11, stream, shape, &Device::Cpu).unwrap();
    x.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

/// The value of `f`, and its gradients where the gradient of the value is `grad`.
fn gradients(
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[&Tensor],
    grad: &Tensor,
) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let store = (&y * grad.reshape(y.shape()).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
    (y.detach(), vars.iter().map(|var| store.get(var).unwrap().clone()).collect())
}

/// Runs `test` for each type, both orders of threads, and operands that are aligned and that are not.
fn everywhere(test: impl Fn(&Host, DType, usize) -> Result<()>) -> Result<()> {
    let Some(host) = Host::new() else { return Ok(()) };
    for dtype in TYPES {
        for (last_first, shift) in [(false, 0), (true, 0), (false, 1)] {
            host.set_order(last_first);
            test(&host, dtype, shift)?;
        }
    }
    Ok(())
}

#[test]
fn rounding_to_sixteen_bits_is_that_of_the_cpu() -> Result<()> {
    let Some(host) = Host::new() else { return Ok(()) };
    // Halves to even, subnormal and largest numbers, the first beyond.
    let values = [
        1.0 + 1.0 / 2048.0,
        1.0 + 3.0 / 2048.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        65_504.0,
        65_519.0,
        65_520.0,
        6e-8,
        2.9e-8,
        3e-8,
        6.1e-5,
        1e-30,
        -0.0,
        -1.5,
        3.39e38,
        2047.5,
    ];
    let x = Tensor::from_slice(&values, (1, values.len()), &Device::Cpu)?;
    for dtype in [DType::F16, DType::BF16] {
        let (_kept, at) = host.upload(&x, DType::F32, 0)?;
        let mut sums = host.alloc(dtype, values.len())?;
        let to = host.operand(&sums)?;
        let kernel = format!("sum_splits_{}", super::call::suffix(dtype)?);
        let args = vec![
            Arg::Pointer(at.address),
            Arg::Pointer(to.address),
            Arg::U32(1),
            Arg::U32(values.len() as u32),
        ];
        host.run(Call::new(super::call::Module::Pointwise, kernel, [1, 1, 1], [32, 8, 1], args)?)?;
        let rounded = sums.download(values.len())?.to_vec1::<f32>()?;
        let expected = x.to_dtype(dtype)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(rounded, expected, "{dtype:?}");
    }
    Ok(())
}

#[test]
fn activations() -> Result<()> {
    everywhere(|host, dtype, shift| {
        for n in [1, 1003] {
            let (x, g) = (random(0, &[n], dtype), random(1, &[n], dtype));
            let x = (x * 3.0)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let ((_x, x_at), (_g, g_at)) = (host.upload(&x, dtype, shift)?, host.upload(&g, dtype, shift)?);
            for kind in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu] {
                let (y, grads) = gradients(&|x| kind.apply(&x[0]), &[&x], &g);
                let ours = ops::activate(host, kind, x_at, n)?.download(n)?;
                assert_close(&ours, &y, tolerance(dtype, 1.0), "activation");
                let ours = ops::activate_grad(host, kind, [x_at, g_at], n)?.download(n)?;
                assert_close(&ours, &grads[0], tolerance(dtype, 1.0), "its gradient");
            }
        }
        Ok(())
    })
}

#[test]
fn gated_feed_forward() -> Result<()> {
    everywhere(|host, dtype, shift| {
        for (rows, width) in [(5, 24), (3, 37)] {
            let (x, g) = (random(0, &[rows, 2 * width], dtype), random(1, &[rows, width], dtype));
            let ((_x, x_at), (_g, g_at)) = (host.upload(&x, dtype, shift)?, host.upload(&g, dtype, shift)?);
            let (y, grads) = gradients(&|x| geglu(&x[0]), &[&x], &g);
            let ours = ops::geglu(host, x_at, rows, width)?.download(y.shape())?;
            assert_close(&ours, &y, tolerance(dtype, 1.0), "geglu");
            let ours = ops::geglu_grad(host, [x_at, g_at], rows, width)?.download(x.shape())?;
            assert_close(&ours, &grads[0], tolerance(dtype, 1.0), "its gradient");
        }
        Ok(())
    })
}

#[test]
fn bias_residual_and_their_sums() -> Result<()> {
    everywhere(|host, dtype, shift| {
        for (rows, channels, inner) in [(7, 40, 1), (3, 5, 1), (2, 6, 24), (2, 3, 35), (300, 33, 1)] {
            let shape = [rows, channels, inner];
            let (x, bias, residual) =
                (random(0, &shape, dtype), random(1, &[channels], dtype), random(2, &shape, dtype));
            let wide = bias.reshape((1, channels, 1))?;
            let ((_x, x_at), (_b, b_at), (_r, r_at)) = (
                host.upload(&x, dtype, shift)?,
                host.upload(&bias, dtype, shift)?,
                host.upload(&residual, dtype, 0)?,
            );
            let sizes = Channels { channels, inner };
            for with in [None, Some(r_at)] {
                let mut out = host.alloc(dtype, x.elem_count())?;
                ops::add_bias(host, [x_at, b_at, host.operand(&out)?], with, x.elem_count(), sizes)?;
                let mut y = x.broadcast_add(&wide)?;
                if with.is_some() {
                    y = (y + &residual)?;
                }
                assert_close(&out.download(x.shape())?, &y, tolerance(dtype, 1.0), "bias");
            }
            let sums = if inner == 1 {
                ops::column_sums(host, x_at, rows, channels)?.download(channels)?
            } else {
                let each = ops::channel_sums(host, x_at, shape, false)?.download((rows, channels))?;
                assert_close(&each, &x.sum(2)?, tolerance(dtype, 1.0), "sums of pixels");
                ops::channel_sums(host, x_at, shape, true)?.download(channels)?
            };
            assert_close(&sums, &x.sum((0, 2))?, tolerance(dtype, 1.0), "the gradient of a bias");
        }
        // What is added to all pixels of a channel of one sample.
        let (x, shift_by) = (random(0, &[2, 3, 4, 5], dtype), random(1, &[2, 3], dtype));
        let ((_x, x_at), (_s, s_at)) = (host.upload(&x, dtype, shift)?, host.upload(&shift_by, dtype, 0)?);
        let mut out = host.alloc(dtype, x.elem_count())?;
        let sizes = Channels { channels: 6, inner: 20 };
        ops::add_bias(host, [x_at, s_at, host.operand(&out)?], None, x.elem_count(), sizes)?;
        let y = add_to_channels(&x, &shift_by)?;
        assert_close(&out.download(x.shape())?, &y, tolerance(dtype, 1.0), "a shift of channels");
        Ok(())
    })
}

#[test]
fn upsampling_and_transposition() -> Result<()> {
    everywhere(|host, dtype, shift| {
        for (b, c, h, w) in [(1, 2, 3, 5), (2, 3, 7, 8), (1, 40, 33, 1)] {
            let (x, g) = (random(0, &[b, c, h, w], dtype), random(1, &[b, c, 2 * h, 2 * w], dtype));
            let ((_x, x_at), (_g, g_at)) = (host.upload(&x, dtype, shift)?, host.upload(&g, dtype, 0)?);
            let (y, grads) = gradients(&|x| upsample_nearest2x(&x[0]), &[&x], &g);
            let ours = ops::upsample(host, x_at, [b * c, h, w])?.download(y.shape())?;
            assert_close(&ours, &y, 0.0, "upsampling");
            let ours = ops::upsample_grad(host, g_at, [b * c, h, w])?.download(x.shape())?;
            assert_close(&ours, &grads[0], tolerance(dtype, 1.0), "its gradient");
            let turned = image_to_tokens(&x)?;
            let ours = ops::transpose(host, x_at, [b, c, h * w])?.download(turned.shape())?;
            assert_close(&ours, &turned, 0.0, "transposition");
        }
        Ok(())
    })
}

#[test]
fn group_norm() -> Result<()> {
    everywhere(|host, dtype, shift| {
        // One value a channel; odd sizes; more than one chunk of a group, the last one short.
        for (b, c, groups, inner, silu) in [
            (2, 6, 3, 1, false),
            (2, 4, 2, 15, true),
            (1, 4, 2, 24, true),
            (1, 2, 1, 9000, true),
            (2, 2, 1, 4104, false),
        ] {
            let shape = [b, c, inner, 1];
            let x = ((random(0, &shape, dtype) * 2.0)? + 5.0)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let (weight, bias) = (random(1, &[c], dtype), random(2, &[c], dtype));
            let g = random(3, &shape, dtype);
            let of = |x: &[Tensor]| {
                let map = [("weight", &x[1]), ("bias", &x[2])].map(|(name, x)| (name.to_string(), x.clone()));
                let vb = candle_nn::VarBuilder::from_tensors(map.into(), DType::F32, &Device::Cpu);
                let norm = layers::GroupNorm::new(groups, c, 1e-5, vb)?;
                if silu { norm.forward_silu(&x[0]) } else { norm.forward(&x[0]) }
            };
            let (y, grads) = gradients(&of, &[&x, &weight, &bias], &g);
            let ((_x, x_at), (_w, w_at), (_b, b_at), (_g, g_at)) = (
                host.upload(&x, dtype, shift)?,
                host.upload(&weight, dtype, 0)?,
                host.upload(&bias, dtype, shift)?,
                host.upload(&g, dtype, shift)?,
            );
            let sizes = GroupSizes { batch: b, channels: c, groups, inner, eps: 1e-5, silu };
            let (mut ours, stats) = ops::group_norm(host, sizes, [x_at, w_at, b_at])?;
            assert_close(&ours.download(&shape[..])?, &y, tolerance(dtype, 1.0), "group norm");
            let inputs = [x_at, w_at, b_at, host.operand(&stats)?, g_at];
            let (mut grad_x, trained) = ops::group_norm_grad(host, sizes, inputs, true)?;
            let [mut grad_w, mut grad_b] = trained.unwrap();
            for (ours, theirs) in
                [(&mut grad_x, &grads[0]), (&mut grad_w, &grads[1]), (&mut grad_b, &grads[2])]
            {
                assert_close(
                    &ours.download(theirs.shape())?,
                    theirs,
                    5.0 * tolerance(dtype, 0.3),
                    "its gradients",
                );
            }
        }
        Ok(())
    })
}

#[test]
fn layer_norm_and_modulation() -> Result<()> {
    everywhere(|host, dtype, shift| {
        for (sets, per_set, width, modulation) in
            [(1, 5, 24, false), (1, 130, 37, false), (2, 3, 40, true), (3, 70, 7, true), (1, 2, 2056, false)]
        {
            let shape = [sets, per_set, width];
            let x = ((random(0, &shape, dtype) * 2.0)? + 3.0)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let (weight, bias) = (random(1, &[sets, 1, width], dtype), random(2, &[sets, 1, width], dtype));
            let g = random(3, &shape, dtype);
            let of = |x: &[Tensor]| {
                let scale = if modulation { (&x[1] + 1.0)? } else { x[1].clone() };
                layers::layer_norm_plain(&x[0], 1e-5)?.broadcast_mul(&scale)?.broadcast_add(&x[2])
            };
            let (y, grads) = gradients(&of, &[&x, &weight, &bias], &g);
            let ((_x, x_at), (_w, w_at), (_b, b_at), (_g, g_at)) = (
                host.upload(&x, dtype, shift)?,
                host.upload(&weight, dtype, shift)?,
                host.upload(&bias, dtype, 0)?,
                host.upload(&g, dtype, 0)?,
            );
            let sizes = LayerSizes { sets, per_set, width, eps: 1e-5, modulation };
            let (mut ours, stats) = ops::layer_norm(host, sizes, [x_at, w_at, b_at])?;
            assert_close(&ours.download(&shape[..])?, &y, tolerance(dtype, 1.0), "layer norm");
            let inputs = [x_at, w_at, host.operand(&stats)?, g_at];
            let (mut grad_x, trained) = ops::layer_norm_grad(host, sizes, inputs, true)?;
            let [mut grad_w, mut grad_b] = trained.unwrap();
            for (ours, theirs) in
                [(&mut grad_x, &grads[0]), (&mut grad_w, &grads[1]), (&mut grad_b, &grads[2])]
            {
                assert_close(
                    &ours.download(theirs.shape())?,
                    theirs,
                    5.0 * tolerance(dtype, 0.3),
                    "its gradients",
                );
            }
        }
        Ok(())
    })
}

#[test]
fn optimiser() -> Result<()> {
    let Some(host) = Host::new() else { return Ok(()) };
    for n in [1, 1000, 9001] {
        let [w, m, v, g] = [0, 1, 2, 3].map(|stream| random(stream, &[n], DType::F32));
        let v = v.sqr()?;
        let [(mut w_, w_at), (mut m_, m_at), (mut v_, v_at), (_g, g_at)] =
            [&w, &m, &v, &g].map(|x| host.upload(x, DType::F32, 0).unwrap());
        // Twice the first step's rate, with a gradient shortened to a half.
        let [beta1, beta2, take1, take2, keep, step, root, eps] =
            [0.9f32, 0.99, 0.05, 0.0025, 0.999, 0.02, 0.1, 1e-8];
        ops::adamw(&host, [w_at, m_at, v_at, g_at], n, [beta1, beta2, take1, take2, keep, step, root, eps])?;
        let scaled = |x: &Tensor, a: f32, y: &Tensor, b: f32| (x * f64::from(a))? + (y * f64::from(b))?;
        let (m, v) = (scaled(&m, beta1, &g, take1)?, scaled(&v, beta2, &g.sqr()?, take2)?);
        let below = ((v.sqrt()? / f64::from(root))? + f64::from(eps))?;
        let w = scaled(&w, keep, &(&m / below)?, -step)?;
        for (ours, theirs) in [(&mut w_, &w), (&mut m_, &m), (&mut v_, &v)] {
            assert_close(&ours.download(n)?, theirs, tolerance(DType::F32, 1.0), "AdamW");
        }
        ops::blend(&host, [m_at, g_at], n, [0.75, 0.25])?;
        assert_close(&m_.download(n)?, &scaled(&m, 0.75, &g, 0.25)?, tolerance(DType::F32, 1.0), "blend");
        let sums = ops::square_sums(&host, g_at, n)?.download(ops::square_blocks(n))?;
        assert_close(&sums.sum_all()?, &g.sqr()?.sum_all()?, tolerance(DType::F32, 1.0), "squares");
    }
    Ok(())
}

#[test]
fn attention_forward_and_backward() -> Result<()> {
    everywhere(|host, dtype, shift| {
        // Cross-attention to few keys; more than one tile of each, the last one short; heads that are odd, 64 and wide.
        for (b, n, m, heads, d, causal) in [
            (2, 5, 7, 3, 8, false),
            (1, 70, 77, 2, 64, false),
            (1, 67, 67, 1, 13, true),
            (1, 130, 130, 1, 16, true),
            (1, 66, 40, 1, 128, false),
            (1, 3, 35, 1, 90, false),
        ] {
            let width = heads * d;
            let draw = |stream: u64, rows: usize| random(stream, &[b, rows, width], dtype);
            let (q, k, v, g) = (draw(0, n), draw(1, m), draw(2, m), draw(3, n));
            let of = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], heads, causal);
            let (y, grads) = gradients(&of, &[&q, &k, &v], &g);
            // Keys and values as two thirds of one tensor, as a joint projection gives them.
            let joint = Tensor::cat(&[&k, &k, &v], 2)?;
            let ((_q, q_at), (_j, j_at), (_g, g_at)) = (
                host.upload(&q, dtype, shift)?,
                host.upload(&joint, dtype, shift)?,
                host.upload(&g, dtype, 0)?,
            );
            let third = |i: usize| Strided {
                at: Operand { address: j_at.address + (i * width * dtype.size_in_bytes()) as u64, dtype },
                sample: m * 3 * width,
                row: 3 * width,
            };
            let qkv = [Strided { at: q_at, sample: n * width, row: width }, third(1), third(2)];
            let sizes = AttentionSizes { batch: b, n, m, heads, d, causal };
            let (mut ours, lse) = ops::attention(host, sizes, qkv)?;
            // Weights are rounded before they meet the values: two roundings.
            let what = format!("attention {n} to {m} by {d} of {dtype:?}");
            assert_close(&ours.download(y.shape())?, &y, 2.0 * tolerance(dtype, 1.0), &what);
            let saved = [host.operand(&ours)?, host.operand(&lse)?, g_at];
            let ours = ops::attention_grad(host, sizes, qkv, saved)?;
            for (mut ours, theirs) in ours.into_iter().zip(&grads) {
                assert_close(&ours.download(theirs.shape())?, theirs, 4.0 * tolerance(dtype, 1.0), &what);
            }
        }
        Ok(())
    })
}
