//! Times the layers one by one; `scripts/bench_kernels.py` runs it beside PyTorch.
//!
//! `layers [--dtype float32|bfloat16] [--only TEXT] [--seconds S]` prints a JSON object: operation → median
//! milliseconds. Names and sizes are those of the script.

use std::time::Instant;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use difflora::layers::{
    Conv2d, ConvGeometry, GroupNorm, LayerNorm, attention, geglu, keep_freed_memory, linear,
    upsample_nearest2x,
};

type Call = Box<dyn Fn() -> Result<Tensor>>;

struct Bench {
    dtype: DType,
    only: String,
    seconds: f64,
    results: Vec<(String, f64)>,
}

impl Bench {
    /// Normal values in the type of activations.
    fn draw(&self, shape: &[usize]) -> Result<Tensor> {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
    }

    /// The same as weights.
    fn weights(&self, named: &[(&str, &[usize])]) -> Result<VarBuilder<'static>> {
        let draw = |(name, shape): &(&str, &[usize])| {
            Ok(((*name).to_string(), self.draw(shape)?.to_dtype(self.dtype)?))
        };
        let tensors = named.iter().map(draw).collect::<Result<_>>()?;
        Ok(VarBuilder::from_tensors(tensors, self.dtype, &Device::Cpu))
    }

    fn time(&mut self, name: &str, make: impl Fn(&Self) -> Result<Call>) -> Result<()> {
        if !name.contains(&self.only) {
            return Ok(());
        }
        let call = make(self)?;
        call()?;
        let (mut taken, begin) = (Vec::new(), Instant::now());
        while taken.len() < 3 || begin.elapsed().as_secs_f64() < self.seconds && taken.len() < 200 {
            let start = Instant::now();
            std::hint::black_box(call()?);
            taken.push(start.elapsed().as_secs_f64() * 1e3);
        }
        taken.sort_by(f64::total_cmp);
        self.results.push((name.to_string(), taken[taken.len() / 2]));
        Ok(())
    }

    fn linear(&mut self, rows: usize, inner: usize, outer: usize) -> Result<()> {
        self.time(&format!("linear {rows}x{inner}x{outer}"), |bench| {
            let vb = bench.weights(&[("weight", &[outer, inner]), ("bias", &[outer])])?;
            let (w, b) = (vb.get((outer, inner), "weight")?, vb.get(outer, "bias")?);
            let x = bench.draw(&[rows, inner])?;
            Ok(Box::new(move || linear(&x, &w, Some(&b))))
        })
    }

    fn conv(&mut self, name: &str, sizes: [usize; 4], kernel: usize, stride: usize) -> Result<()> {
        let [b, inner, outer, side] = sizes;
        self.time(name, |bench| {
            let vb = bench.weights(&[("weight", &[outer, inner, kernel, kernel]), ("bias", &[outer])])?;
            let geometry = ConvGeometry { stride, ..ConvGeometry::same(kernel) };
            let conv = Conv2d::new(inner, outer, geometry, vb)?;
            let x = bench.draw(&[b, inner, side, side])?;
            Ok(Box::new(move || conv.forward(&x)))
        })
    }

    fn attention(&mut self, name: &str, sizes: [usize; 4], width: usize) -> Result<()> {
        let [b, heads, queries, keys] = sizes;
        self.time(name, |bench| {
            let q = bench.draw(&[b, queries, heads * width])?;
            let (k, v) = (bench.draw(&[b, keys, heads * width])?, bench.draw(&[b, keys, heads * width])?);
            Ok(Box::new(move || attention(&q, &k, &v, heads, false)))
        })
    }

    fn group_norm(&mut self, name: &str, [b, channels, side]: [usize; 3], silu: bool) -> Result<()> {
        self.time(name, |bench| {
            let vb = bench.weights(&[("weight", &[channels]), ("bias", &[channels])])?;
            let norm = GroupNorm::new(32, channels, 1e-5, vb)?;
            let x = bench.draw(&[b, channels, side, side])?;
            Ok(Box::new(move || if silu { norm.forward_silu(&x) } else { norm.forward(&x) }))
        })
    }
}

fn main() -> Result<()> {
    keep_freed_memory();
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str| arguments.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].clone());
    let dtype = match option("--dtype").as_deref() {
        Some("bfloat16") => DType::BF16,
        _ => DType::F32,
    };
    let seconds = option("--seconds").and_then(|text| text.parse().ok()).unwrap_or(0.3);
    let mut bench = Bench { dtype, only: option("--only").unwrap_or_default(), seconds, results: Vec::new() };
    for (rows, inner, outer) in [
        (2, 1280, 1280),
        (154, 2048, 1280),
        (512, 1280, 1280),
        (512, 1280, 10240),
        (1024, 1280, 1280),
        (2048, 640, 5120),
        (2048, 5120, 1280),
        (4096, 640, 640),
    ] {
        bench.linear(rows, inner, outer)?;
    }
    bench.conv("conv3 2x320x64", [2, 320, 320, 64], 3, 1)?;
    bench.conv("conv3 2x640x32", [2, 640, 640, 32], 3, 1)?;
    bench.conv("conv3 2x1280x16", [2, 1280, 1280, 16], 3, 1)?;
    bench.conv("conv3 2x2560x1280x16", [2, 2560, 1280, 16], 3, 1)?;
    bench.conv("conv3/2 2x320x64", [2, 320, 320, 64], 3, 2)?;
    bench.conv("conv1 2x640x320x64", [2, 640, 320, 64], 1, 1)?;
    bench.conv("conv3 2x4x320x64", [2, 4, 320, 64], 3, 1)?;
    bench.conv("conv3 2x320x4x64", [2, 320, 4, 64], 3, 1)?;
    bench.conv("conv3 1x512x64", [1, 512, 512, 64], 3, 1)?;
    bench.conv("conv3 1x512x128", [1, 512, 512, 128], 3, 1)?;
    bench.conv("conv3 1x256x256", [1, 256, 256, 256], 3, 1)?;
    bench.conv("conv3 1x128x512", [1, 128, 128, 512], 3, 1)?;
    bench.attention("attention 2x20x256", [2, 20, 256, 256], 64)?;
    bench.attention("attention 1x20x1024", [1, 20, 1024, 1024], 64)?;
    bench.attention("attention 1x10x4096", [1, 10, 4096, 4096], 64)?;
    bench.attention("attention 2x10x1024x77", [2, 10, 1024, 77], 64)?;
    bench.attention("attention 1x1x4096 d512", [1, 1, 4096, 4096], 512)?;
    bench.time("geglu 2048x10240", |bench| {
        let x = bench.draw(&[2048, 10240])?;
        Ok(Box::new(move || geglu(&x)))
    })?;
    bench.group_norm("group_norm 2x320x64", [2, 320, 64], false)?;
    bench.group_norm("group_norm_silu 2x320x64", [2, 320, 64], true)?;
    bench.group_norm("group_norm_silu 1x128x512", [1, 128, 512], true)?;
    bench.time("layer_norm 2048x1280", |bench| {
        let norm = LayerNorm::new(1280, 1e-5, bench.weights(&[("weight", &[1280]), ("bias", &[1280])])?)?;
        let x = bench.draw(&[2048, 1280])?;
        Ok(Box::new(move || norm.forward(&x)))
    })?;
    bench.time("upsample 2x640x32", |bench| {
        let x = bench.draw(&[2, 640, 32, 32])?;
        Ok(Box::new(move || upsample_nearest2x(&x)))
    })?;
    let lines: Vec<String> = bench.results.iter().map(|(name, ms)| format!("\"{name}\": {ms:.4}")).collect();
    println!("{{{}}}", lines.join(", "));
    Ok(())
}
