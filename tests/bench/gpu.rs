//! The layers on a GPU: held against the CPU, and timed. `scripts/gpu.sh` runs it and puts PyTorch beside it.
//!
//! `gpu check [--device cuda]` prints a line of JSON for each operation and type: the largest difference of values and
//! gradients to those of the CPU in f32 as a share of the largest value, and whether that is within the rounding of the
//! type. It fails where one is not.
//!
//! `gpu ops [--device cuda] [--dtype float16] [--seconds S] [--small]` prints an object, operation → median
//! milliseconds, at SDXL's shapes for 1024 × 1024 with guidance, or at small ones.

use std::time::Instant;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarBuilder;
use difflora::device;
use difflora::diffusion::noise::normal;
use difflora::layers::{
    Activation, Conv2d, ConvGeometry, GroupNorm, LayerNorm, add_to_channels, attention, geglu,
    image_to_tokens, layer_norm_modulated, linear, tokens_to_image, upsample_nearest2x,
};

type Operation = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// An operation on tensors of these shapes, all of which get a gradient.
struct Case {
    name: &'static str,
    shapes: Vec<Vec<usize>>,
    run: Operation,
}

fn case(
    name: &'static str,
    shapes: &[&[usize]],
    run: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
) -> Case {
    Case { name, shapes: shapes.iter().map(|shape| shape.to_vec()).collect(), run: Box::new(run) }
}

/// The tensors by name, as a layer takes them.
fn weights(named: &[(&str, &Tensor)]) -> VarBuilder<'static> {
    let tensors = named.iter().map(|(name, tensor)| ((*name).to_string(), (*tensor).clone())).collect();
    VarBuilder::from_tensors(tensors, named[0].1.dtype(), named[0].1.device())
}

fn group_norm(x: &[Tensor], groups: usize) -> Result<GroupNorm> {
    GroupNorm::new(groups, x[1].dim(0)?, 1e-5, weights(&[("weight", &x[1]), ("bias", &x[2])]))
}

fn conv(x: &[Tensor], geometry: ConvGeometry) -> Result<Tensor> {
    let (out, input, ..) = x[1].dims4()?;
    Conv2d::new(input, out, geometry, weights(&[("weight", &x[1]), ("bias", &x[2])]))?.forward(&x[0])
}

fn cases() -> Vec<Case> {
    let halves = ConvGeometry { kernel: 3, stride: 2, pad_before: 0, pad_after: 1 };
    vec![
        case("silu", &[&[3, 1001]], |x| Activation::Silu.apply(&x[0])),
        case("gelu", &[&[3, 1001]], |x| Activation::Gelu.apply(&x[0])),
        case("gelu tanh", &[&[3, 1001]], |x| Activation::GeluTanh.apply(&x[0])),
        case("quick gelu", &[&[3, 1001]], |x| Activation::QuickGelu.apply(&x[0])),
        case("geglu", &[&[5, 80]], |x| geglu(&x[0])),
        case("geglu odd", &[&[5, 74]], |x| geglu(&x[0])),
        case("upsample", &[&[2, 3, 7, 5]], |x| upsample_nearest2x(&x[0])),
        case("tokens", &[&[2, 40, 7, 5]], |x| tokens_to_image(&image_to_tokens(&x[0])?, 7, 5)),
        case("add to channels", &[&[2, 6, 7, 5], &[2, 6]], |x| add_to_channels(&x[0], &x[1])),
        case("group norm", &[&[2, 64, 16, 16], &[64], &[64]], |x| group_norm(x, 32)?.forward(&x[0])),
        case("group norm silu", &[&[2, 64, 16, 16], &[64], &[64]], |x| {
            group_norm(x, 32)?.forward_silu(&x[0])
        }),
        case("group norm silu large", &[&[1, 8, 96, 96], &[8], &[8]], |x| {
            group_norm(x, 2)?.forward_silu(&x[0])
        }),
        case("group norm silu odd", &[&[2, 6, 7, 5], &[6], &[6]], |x| group_norm(x, 3)?.forward_silu(&x[0])),
        case("layer norm", &[&[2, 130, 640], &[640], &[640]], |x| {
            LayerNorm::new(640, 1e-5, weights(&[("weight", &x[1]), ("bias", &x[2])]))?.forward(&x[0])
        }),
        case("layer norm odd", &[&[2, 3, 77], &[77], &[77]], |x| {
            LayerNorm::new(77, 1e-5, weights(&[("weight", &x[1]), ("bias", &x[2])]))?.forward(&x[0])
        }),
        case("modulated norm", &[&[3, 70, 64], &[3, 1, 64], &[3, 1, 64]], |x| {
            layer_norm_modulated(&x[0], &x[1], &x[2], 1e-6)
        }),
        case("linear", &[&[2, 65, 96], &[80, 96], &[80]], |x| linear(&x[0], &x[1], Some(&x[2]))),
        case("linear without bias", &[&[2, 65, 96], &[80, 96]], |x| linear(&x[0], &x[1], None)),
        case("conv 3", &[&[2, 16, 17, 17], &[24, 16, 3, 3], &[24]], |x| conv(x, ConvGeometry::same(3))),
        case("conv 1", &[&[2, 16, 17, 17], &[24, 16, 1, 1], &[24]], |x| conv(x, ConvGeometry::same(1))),
        case("conv 3 by halves", &[&[2, 16, 16, 16], &[24, 16, 3, 3], &[24]], move |x| conv(x, halves)),
        case("attention", &[&[2, 130, 128], &[2, 130, 128], &[2, 130, 128]], |x| {
            attention(&x[0], &x[1], &x[2], 2, false)
        }),
        case("attention to 77", &[&[2, 100, 128], &[2, 77, 128], &[2, 77, 128]], |x| {
            attention(&x[0], &x[1], &x[2], 2, false)
        }),
        case("attention causal", &[&[2, 77, 192], &[2, 77, 192], &[2, 77, 192]], |x| {
            attention(&x[0], &x[1], &x[2], 3, true)
        }),
        case("attention heads of 13", &[&[1, 67, 39], &[1, 67, 39], &[1, 67, 39]], |x| {
            attention(&x[0], &x[1], &x[2], 3, false)
        }),
        case("attention heads of 128", &[&[1, 66, 256], &[1, 40, 256], &[1, 40, 256]], |x| {
            attention(&x[0], &x[1], &x[2], 2, false)
        }),
        case("attention heads of 300", &[&[1, 20, 300], &[1, 20, 300], &[1, 20, 300]], |x| {
            attention(&x[0], &x[1], &x[2], 1, false)
        }),
    ]
}

/// Normal values that the type `dtype` holds, as f32 on the CPU.
fn draw(stream: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    normal(3, stream, shape, &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F32)
}

/// The value of a case on `device` in `dtype`, and its gradients; all as f32 on the CPU.
fn evaluate(case: &Case, device: &Device, dtype: DType, stored: DType) -> Result<Vec<Tensor>> {
    let inputs = case.shapes.iter().enumerate().map(|(i, shape)| {
        let values = draw(i as u64, shape, stored)?;
        let values = if i == 1 && [2, 4].contains(&shape.len()) { (values * 0.1)? } else { values };
        let values = values.to_dtype(stored)?.to_dtype(dtype)?;
        Var::from_tensor(&values.to_device(device)?)
    });
    let vars = inputs.collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = (case.run)(&tensors)?;
    let grad = draw(99, y.dims(), stored)?.to_dtype(dtype)?.to_device(device)?;
    let store = (&y * grad)?.sum_all()?.backward()?;
    let host = |x: &Tensor| x.to_dtype(DType::F32)?.to_device(&Device::Cpu);
    let mut results = vec![host(&y.detach())?];
    for var in &vars {
        let gradient = store.get(var).ok_or_else(|| candle_core::Error::msg("no gradient"))?;
        results.push(host(gradient)?);
    }
    Ok(results)
}

/// Whether every operation is right on `device`.
fn check(device: &Device) -> Result<bool> {
    let mut right = true;
    for case in cases() {
        for (dtype, name, tolerance) in
            [(DType::F32, "f32", 2e-5), (DType::F16, "f16", 1e-2), (DType::BF16, "bf16", 6e-2)]
        {
            let theirs = evaluate(&case, &Device::Cpu, DType::F32, dtype)?;
            let line = match evaluate(&case, device, dtype, dtype) {
                Ok(ours) => {
                    let mut worst = 0f32;
                    for (ours, theirs) in ours.iter().zip(&theirs) {
                        let largest = theirs.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?.max(1e-3);
                        let apart =
                            (ours - theirs)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? / largest;
                        // The larger of two numbers is never NaN.
                        worst = if apart.is_nan() { f32::INFINITY } else { worst.max(apart) };
                    }
                    let ok = worst <= tolerance;
                    right &= ok;
                    serde_json::json!({ "name": case.name, "dtype": name, "difference": worst, "ok": ok })
                }
                Err(error) => {
                    // candle does not convolve bf16 on the CPU.
                    let ok = device.is_cpu() && dtype != DType::F32;
                    right &= ok;
                    let why = error.to_string();
                    let why = why.lines().next().unwrap_or_default();
                    serde_json::json!({ "name": case.name, "dtype": name, "error": why, "ok": ok })
                }
            };
            println!("{line}");
        }
    }
    Ok(right)
}

/// SDXL's layers for two samples of 1024 × 1024, or small ones; names as in `scripts/gpu.sh`.
fn timed(small: bool) -> Vec<Case> {
    let s = if small { 32 } else { 1 };
    let attention = |name, heads: usize, n: usize, m: usize| {
        let (n, width) = (n / s, 64 * heads);
        case(name, &[&[2, n, width], &[2, m, width], &[2, m, width]], move |x| {
            attention(&x[0], &x[1], &x[2], heads, false)
        })
    };
    let narrow = if small { 8 } else { 1 };
    let conv3 = |name, c: usize, out: usize, side: usize| {
        let (c, out, side) = (c / narrow, out / narrow, side / s);
        case(name, &[&[2, c, side, side], &[out, c, 3, 3], &[out]], |x| conv(x, ConvGeometry::same(3)))
    };
    let norm = |name, c: usize, side: usize| {
        let side = side / s;
        case(name, &[&[2, c, side, side], &[c], &[c]], |x| group_norm(x, 32)?.forward_silu(&x[0]))
    };
    let dense = |name, rows: usize, input: usize, out: usize| {
        let (input, out) = (input / narrow, out / narrow);
        case(name, &[&[rows / s, input], &[out, input], &[out]], |x| linear(&x[0], &x[1], Some(&x[2])))
    };
    vec![
        dense("linear 8192x640x640", 8192, 640, 640),
        dense("linear 2048x1280x1280", 2048, 1280, 1280),
        dense("linear 2048x1280x10240", 2048, 1280, 10240),
        dense("linear 2048x5120x1280", 2048, 5120, 1280),
        conv3("conv3 2x320x128", 320, 320, 128),
        conv3("conv3 2x640x64", 640, 640, 64),
        conv3("conv3 2x1280x32", 1280, 1280, 32),
        attention("attention 10x4096x4096", 10, 4096, 4096 / s),
        attention("attention 20x1024x1024", 20, 1024, 1024 / s),
        attention("attention 10x4096x77", 10, 4096, 77),
        norm("group_norm_silu 2x320x128", 320, 128),
        norm("group_norm_silu 2x640x64", 640, 64),
        norm("group_norm_silu 2x1280x32", 1280, 32),
        case("layer_norm 8192x640", &[&[8192 / s, 640], &[640], &[640]], |x| {
            LayerNorm::new(640, 1e-5, weights(&[("weight", &x[1]), ("bias", &x[2])]))?.forward(&x[0])
        }),
        case("geglu 8192x5120", &[&[8192 / s, 5120]], |x| geglu(&x[0])),
        case("upsample 2x640x64", &[&[2, 640, 64 / s, 64 / s]], |x| upsample_nearest2x(&x[0])),
    ]
}

/// Median milliseconds of `work`, the GPU waited for.
fn median(device: &Device, seconds: f64, work: impl Fn() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        work()?;
    }
    device.synchronize()?;
    let (mut taken, begin) = (Vec::new(), Instant::now());
    while taken.len() < 3 || begin.elapsed().as_secs_f64() < seconds && taken.len() < 200 {
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        taken.push(start.elapsed().as_secs_f64() * 1e3);
    }
    taken.sort_by(f64::total_cmp);
    Ok(taken[taken.len() / 2])
}

fn ops(device: &Device, dtype: DType, seconds: f64, small: bool) -> Result<()> {
    let mut results = serde_json::Map::new();
    for case in timed(small) {
        let vars =
            case.shapes.iter().enumerate().map(|(i, shape)| {
                Var::from_tensor(&normal(5, i as u64, &shape[..], device)?.to_dtype(dtype)?)
            });
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let plain: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().detach()).collect();
        let tracked: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let forward = median(device, seconds, || (case.run)(&plain).map(|_| ()));
        let both = median(device, seconds, || (case.run)(&tracked)?.sum_all()?.backward().map(|_| ()));
        let figure = |result: Result<f64>| match result {
            Ok(ms) => serde_json::json!(ms),
            Err(error) => serde_json::json!(error.to_string().lines().next().unwrap_or_default()),
        };
        results.insert(case.name.to_string(), figure(forward));
        results.insert(format!("{} with gradients", case.name), figure(both));
    }
    println!("{}", serde_json::Value::Object(results));
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str| arguments.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].clone());
    let device = device::open(option("--device").as_deref().unwrap_or("cuda"))?;
    let dtype = match option("--dtype").as_deref() {
        Some("bfloat16") => DType::BF16,
        Some("float32") => DType::F32,
        _ => DType::F16,
    };
    match arguments.get(1).map(String::as_str) {
        Some("check") => anyhow::ensure!(check(&device)?, "an operation differs from the CPU's"),
        Some("ops") => {
            let seconds = option("--seconds").and_then(|text| text.parse().ok()).unwrap_or(0.2);
            ops(&device, dtype, seconds, arguments.iter().any(|argument| argument == "--small"))?;
        }
        _ => println!("usage: gpu check|ops [--device cuda] [--dtype float16] [--seconds S] [--small]"),
    }
    Ok(())
}
