//! The transformer of configs/hypernet-sdxl.toml at its true size with random weights: 50 DDIM steps for one person, and
//! training steps. Prints one line of JSON; `scripts/bench_hypernet_dit.py` runs it beside PyTorch.

use std::time::Instant;

use candle_core::{Device, Tensor};
use difflora::diffusion::noise::normal;
use difflora::diffusion::sampler::{Ddim, ddim};
use difflora::diffusion::schedule::NoiseSchedule;
use difflora::hypernet::diffusion_of_latents;
use difflora::hypernet::dit::{Dit, DitConfig, DitSize, Position};
use difflora::hypernet::mixer::{Mixer, MixerConfig, MixerKind};
use difflora::train::adamw::{AdamW, AdamWOptions};
use difflora::train::ema::Ema;
use difflora::train::shards::gradients;
use difflora::weights::{Trainable, frozen};

/// The latent of configs/hypernet-sdxl.toml and its tokens.
const LATENT: usize = 38_556;
const TOKEN: usize = 612;
/// Widths of ArcFace's and CLIP ViT-H's embeddings.
const FACE: usize = 512;
const IMAGE: usize = 1024;

/// Peak of resident memory in MB; Linux only.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|text| text.trim_end_matches("kB").trim().parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e3
}

fn main() -> anyhow::Result<()> {
    difflora::layers::keep_freed_memory();
    let argument = |name: &str, otherwise: usize| {
        let given = std::env::args().skip_while(|text| text != name).nth(1);
        given.and_then(|text| text.parse().ok()).unwrap_or(otherwise)
    };
    let (batch, steps) = (argument("--batch", 4), argument("--steps", 4));
    let (depth, width, heads) = DitSize::B.sizes();
    let position = Position::Learned;
    let config = DitConfig { latent: LATENT, token: TOKEN, width, depth, heads, position, clusters: 0 };
    let mixing = MixerConfig { kind: MixerKind::Moe, face: FACE, image: IMAGE, width };
    let schedule = NoiseSchedule::new(&diffusion_of_latents())?;
    let random = |stream, shape: (usize, usize)| normal(1, stream, shape, &Device::Cpu);

    let trainable = Trainable::new(0);
    let vb = trainable.builder(&Device::Cpu);
    let (mixer, dit) = (Mixer::new(&mixing, vb.pp("mixer"))?, Dit::new(&config, vb.pp("dit"))?);
    let vars = trainable.vars();
    let parameters: usize = vars.values().map(|var| var.elem_count()).sum();

    // Sampling, through weights that get no gradients.
    let named = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect();
    let vb = frozen(named, candle_core::DType::F32, &Device::Cpu);
    let still = (Mixer::new(&mixing, vb.pp("mixer"))?, Dit::new(&config, vb.pp("dit"))?);
    let begin = Instant::now();
    let condition = still.0.forward(&random(0, (1, FACE))?, &random(1, (1, IMAGE))?)?.condition;
    let predict =
        |x: &Tensor, t: f64| Ok(still.1.forward(x, &Tensor::full(t as f32, 1, x.device())?, &condition)?);
    let fresh = |_| anyhow::bail!("no noise is needed");
    let z = ddim(predict, random(2, (1, LATENT))?, Ddim { schedule: &schedule, steps: 50, eta: 0.0 }, fresh)?;
    let checked = z.sum_all()?.to_scalar::<f32>()?;
    let sampling = begin.elapsed().as_secs_f64();
    let sampling_peak = peak();

    let mut optimiser = AdamW::new(vars.clone(), AdamWOptions::default())?;
    let mut ema = Ema::new(vars.clone(), 0.9999)?;
    let (face, image, x0) =
        (random(3, (batch, FACE))?, random(4, (batch, IMAGE))?, random(5, (batch, LATENT))?);
    let mut times = Vec::new();
    for step in 0..=steps as u64 {
        let begin = Instant::now();
        let sum = gradients(&vars, 1, |_| {
            let eps = random(10 + step, (batch, LATENT))?;
            let t: Vec<usize> = (0..batch).map(|i| (i * 997 + 13) % 1000).collect();
            let x_t = schedule.add_noise(&x0, &eps, &t)?;
            let t: Vec<f32> = t.into_iter().map(|t| t as f32).collect();
            let condition = mixer.forward(&face, &image)?.condition;
            let guess = dit.forward(&x_t, &Tensor::new(t, &Device::Cpu)?, &condition)?;
            Ok((guess - &x0)?.sqr()?.mean_all()?.into())
        })?;
        optimiser.step(&sum.gradients, 1e-4)?;
        ema.follow(step + 1)?;
        times.push(begin.elapsed().as_secs_f64());
    }
    // The first one makes the memory.
    let step = times[1..].iter().copied().fold(f64::INFINITY, f64::min);
    println!(
        "{}",
        serde_json::json!({
            "parameters": parameters, "sampling_s": sampling, "sampling_mb": sampling_peak, "step_s": step,
            "step_mb": peak(), "finite": checked.is_finite(),
        })
    );
    Ok(())
}
