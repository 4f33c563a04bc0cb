//! The first stage: a VAE that keeps faces sharp enough to be told apart.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;
use rand::seq::index;
use serde::{Deserialize, Serialize};

use super::gallery::{self, Gallery};
use crate::model_files::{DIFFUSERS_WEIGHTS, save_component};
use crate::picture::{Picture, contact_sheet};
use crate::progress;
use crate::sdxl::vae::{Vae, VaeConfig};
use crate::train;
use crate::train::run::{self, End, Keeping, Plan};
use crate::train::shards::Loss;
use crate::weights::{self, Trainable};

/// Sizes and recipe of the VAE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `vae/config.json`; the scaling factor is measured.
    pub model: VaeConfig,
    /// Weight of the Kullback-Leibler divergence to the unit normal, a mean over latents.
    pub divergence: f64,
    /// Weight of the absolute error of the differences between neighbouring pixels.
    pub edges: f64,
    /// Steps between sheets of pictures.
    pub sheet_every: u64,
    /// Steps, batch, rate.
    pub plan: Plan,
}

/// What decides the VAE: a checkpoint of other settings is refused.
#[derive(Serialize)]
struct Recipe<'a> {
    seed: u64,
    pictures: &'a gallery::Settings,
    vae: &'a Settings,
}

/// Trains the VAE and writes it to `out`/vae.
pub fn train(all: &super::Settings, gallery: &mut Gallery, keeping: &Keeping, out: &Path) -> Result<End> {
    let settings = &all.vae;
    gallery.paint()?;
    let gallery = &*gallery;
    let trainable = Trainable::new(all.seed);
    let vae = Vae::new(&settings.model, trainable.builder(&Device::Cpu))?;
    let vars = trainable.vars();
    start_at_unit_scale(&vae, &vars, &gallery.batch(&(0..64.min(gallery.len())).collect::<Vec<_>>())?)?;

    let recipe = Recipe { seed: all.seed, pictures: &all.pictures, vae: settings };
    let shown = gallery.strangers(16)?;
    let samples = settings.plan.samples_a_shard()?;
    let loss = |step: u64, shard: usize| {
        let mut rng = train::rng(all.seed, step * settings.plan.shards as u64 + shard as u64);
        let numbers = index::sample(&mut rng, gallery.len(), samples).into_vec();
        loss(&vae, settings, &gallery.batch(&numbers)?, &mut rng)
    };
    let (end, ema) = run::run(&settings.plan, &recipe, keeping, &vars, loss, |step, ema| {
        if step % settings.sheet_every == 0 {
            let path = keeping.folder.join(format!("vae-{step:06}.png"));
            ema.averaged(|| sheet(&vae, &shown)?.save(&path, None))?;
        }
        Ok(())
    })?;
    if end == End::Finished {
        finish(&settings.model, gallery, ema.averages(), out)?;
    }
    Ok(end)
}

/// Reconstruction, its edges, and the divergence. `x` (B, 3, H, W) in [−1, 1].
fn loss(vae: &Vae, settings: &Settings, x: &Tensor, rng: &mut impl Rng) -> Result<Loss> {
    let (mean, logvar) = vae.encode(x)?;
    let noise = train::normal(rng, mean.shape())?;
    let z = (&mean + (&logvar * 0.5)?.exp()? * noise)?;
    let error = (vae.decode(&z)? - x)?;
    let absolute = error.abs()?.mean_all()?;
    // mean of ½ (μ² + σ² − 1 − ln σ²)
    let divergence = ((mean.sqr()? + logvar.exp()?)? - &logvar)?.mean_all()?.affine(0.5, -0.5)?;
    let mut value = (&absolute + (&divergence * settings.divergence)?)?;
    let mut parts = vec![("l1", number(&absolute)?), ("divergence", number(&divergence)?)];
    if settings.edges > 0.0 {
        let difference = |axis: usize| -> Result<Tensor> {
            let length = error.dim(axis)? - 1;
            Ok((error.narrow(axis, 1, length)? - error.narrow(axis, 0, length)?)?.abs()?.mean_all()?)
        };
        let edges = (difference(2)? + difference(3)?)?;
        parts.push(("edges", number(&edges)?));
        value = (value + (edges * settings.edges)?)?;
    }
    Ok(Loss { value, parts })
}

fn number(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

/// Sets the last convolution of the encoder so that latents start with mean 0, deviation 1 and little noise: with
/// PyTorch's start the decoder first has to find a signal under noise of deviation 1.
fn start_at_unit_scale(vae: &Vae, vars: &BTreeMap<String, Var>, x: &Tensor) -> Result<()> {
    let var = |name: &str| vars.get(name).with_context(|| format!("this VAE has no `{name}`"));
    let (weight, bias) = (var("quant_conv.weight")?, var("quant_conv.bias")?);
    let channels = vae.config().latent_channels;
    let (mean, _) = vae.encode(x)?;
    let rows = mean.detach().transpose(0, 1)?.flatten_from(1)?; // (C, B·h·w)
    let centre = rows.mean(1)?;
    let deviation = rows.broadcast_sub(&centre.unsqueeze(1)?)?.sqr()?.mean(1)?.sqrt()?;
    let shape = (channels, 1, 1, 1);
    let upper = weight.narrow(0, 0, channels)?.broadcast_div(&deviation.reshape(shape)?)?;
    let lower = (weight.narrow(0, channels, channels)? * 0.1)?;
    weight.set(&Tensor::cat(&[upper, lower], 0)?.detach())?;
    let upper = ((bias.narrow(0, 0, channels)? - centre)? / deviation)?;
    let lower = (bias.narrow(0, channels, channels)? - 5.0)?;
    Ok(bias.set(&Tensor::cat(&[upper, lower], 0)?.detach())?)
}

/// Measures the scale of the latents, writes the model and says how well it reconstructs strangers.
fn finish(
    config: &VaeConfig,
    gallery: &Gallery,
    average: &BTreeMap<String, Tensor>,
    out: &Path,
) -> Result<()> {
    let tensors = average.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    let vae = Vae::new(config, weights::frozen(tensors, DType::F32, &Device::Cpu))?;
    let count = 1024.min(gallery.len());
    let stride = gallery.len() / count;
    let mut latents = Vec::new();
    for numbers in (0..count).map(|i| i * stride).collect::<Vec<_>>().chunks(64) {
        latents.push(vae.encode(&gallery.batch(numbers)?)?.0);
    }
    let latents = Tensor::cat(&latents, 0)?.flatten_all()?;
    let centre = number(&latents.mean(0)?)?;
    let deviation = number(&(latents - centre)?.sqr()?.mean(0)?)?.sqrt();
    let config = VaeConfig { scaling_factor: 1.0 / deviation, force_upcast: false, ..config.clone() };
    save_component(out, "vae", DIFFUSERS_WEIGHTS, &config.to_json(), average, DType::F32)?;
    let x = gallery.strangers(64)?;
    let error =
        (vae.decode(&vae.encode(&x)?.0)?.clamp(-1f32, 1f32)? - &x)?.sqr()?.flatten_from(1)?.mean(1)?;
    let psnr =
        error.to_vec1::<f32>()?.iter().map(|mse| 10.0 * (4.0 / f64::from(*mse)).log10()).sum::<f64>() / 64.0;
    progress::note(format_args!(
        "the VAE reconstructs strangers at {psnr:.2} dB; latents have mean {centre:.2} and deviation {deviation:.2}"
    ));
    Ok(())
}

/// Pictures above what comes back. `x` (B, 3, H, W).
fn sheet(vae: &Vae, x: &Tensor) -> Result<Picture> {
    let pictures = |x: &Tensor| -> Result<Vec<Picture>> {
        (0..x.dim(0)?).map(|i| Picture::from_tensor(&x.get(i)?.clamp(-1f32, 1f32)?)).collect()
    };
    let (before, after) = (pictures(x)?, pictures(&vae.decode(&vae.encode(x)?.0)?)?);
    let rows: Vec<Vec<&Picture>> = before
        .chunks(8)
        .zip(after.chunks(8))
        .flat_map(|(before, after)| [before.iter().collect(), after.iter().collect()])
        .collect();
    Ok(contact_sheet(&rows, 128, 2))
}
