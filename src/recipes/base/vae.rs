//! The first stage: a VAE that keeps faces sharp enough to be recognised.
//!
//! The encoder is set in closed form (see [`crate::recipes::base::patch_pca`]); the decoder is trained to undo it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand::seq::index;
use serde::{Deserialize, Serialize};

use crate::image::{Image, contact_sheet};
use crate::progress;
use crate::recipes::base::patch_pca::Patches;
use crate::sdxl::vae::{Vae, VaeConfig};
use crate::synthetic::image_set::{self, PaintedImages};
use crate::train;
use crate::train::gradients::{Figure, Loss};
use crate::train::trainer::{self, Outcome, RunOptions, TrainerConfig};
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, save_component};
use crate::weights::{self, Trainable};

/// Sizes and recipe of the VAE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `vae/config.json`; the scaling factor is measured.
    pub model: VaeConfig,
    /// Standard deviation of the noise that is added to latents, so that the decoder forgives a denoiser's errors.
    pub noise: f64,
    /// The deviation is uniform in [0, `noise`], by sample, instead of `noise` for all.
    #[serde(default)]
    pub noise_varies: bool,
    /// Further weight of the error on the head.
    #[serde(default)]
    pub head: f64,
    /// Further weight of the error at eyes and mouth.
    #[serde(default)]
    pub features: f64,
    /// Weight of the absolute error of the differences between neighbouring pixels.
    pub edges: f64,
    /// Steps between sheets of images.
    pub sheet_every: u64,
    /// Steps, batch, rate.
    pub plan: TrainerConfig,
}

/// Settings that decide the VAE: a checkpoint of others is refused.
#[derive(Serialize)]
struct Recipe<'a> {
    seed: u64,
    images: &'a image_set::Settings,
    vae: &'a Settings,
}

/// Trains the VAE on `device` and writes it to `out`/vae; it is measured on the CPU.
pub fn train(
    all: &crate::recipes::base::config::Settings,
    images: &PaintedImages,
    run_options: &RunOptions,
    out: &Path,
    device: &Device,
) -> Result<Outcome> {
    let settings = &all.vae;
    all.check_images()?;
    let trainable = Trainable::new(all.seed);
    let vae = trainable.checked(Vae::new(&settings.model, trainable.builder(device)))?;
    let mut vars = trainable.vars();
    let patches = Patches::fit(
        &images.batch(&images.spread(FITTED_IMAGES))?,
        settings.model.latent_channels,
        1 << (settings.model.block_out_channels.len() - 1),
    )?;
    patches.write(&settings.model, &vars)?;
    progress::note(format_args!("the latents keep {:.2} % of the variance of a patch", 100.0 * patches.kept));
    let set: BTreeMap<String, Tensor> = vars
        .iter()
        .map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach())))
        .collect::<Result<_>>()?;
    let encoder =
        Vae::new(&settings.model, weights::frozen(set.clone().into_iter().collect(), DType::F32, device))?;
    vars.retain(|name, _| name.starts_with("decoder.") || name.starts_with("post_quant_conv."));

    let recipe = Recipe { seed: all.seed, images: &all.images, vae: settings };
    let shown = images.batch(&images.held_out(16))?.to_device(device)?;
    let samples = settings.plan.samples_a_shard()?;
    let loss = |step: u64, shard: usize| {
        let mut rng = train::rng(all.seed, step * settings.plan.shards as u64 + shard as u64);
        let numbers = index::sample(&mut rng, images.len(), samples).into_vec();
        loss(&encoder, &vae, settings, images, &numbers, &mut rng)
    };
    let (end, ema) = trainer::run(&settings.plan, &recipe, run_options, &vars, loss, |step, ema| {
        if step % settings.sheet_every == 0 {
            let path = run_options.folder.join(format!("vae-{step:06}.png"));
            trainer::optional(ema.averaged(|| sheet(&vae, &shown)?.save(&path, None)));
        }
        Ok(())
    })?;
    if end == Outcome::Finished {
        let mut weights = set;
        weights.extend(ema.averages().clone());
        finish(&settings.model, images, &weights, out)?;
    }
    Ok(end)
}

/// Absolute error of the reconstruction of images by number, and of its edges.
fn loss(
    encoder: &Vae,
    vae: &Vae,
    settings: &Settings,
    images: &PaintedImages,
    numbers: &[usize],
    rng: &mut impl Rng,
) -> Result<Loss> {
    let device = vae.device();
    let x = images.batch(numbers)?.to_device(device)?;
    let (mean, _) = encoder.encode(&x)?;
    let mut noise = (train::normal(rng, mean.shape(), mean.device())? * settings.noise)?;
    if settings.noise_varies {
        let share: Vec<f32> = numbers.iter().map(|_| rng.random()).collect();
        noise = noise.broadcast_mul(&Tensor::from_vec(share, (numbers.len(), 1, 1, 1), mean.device())?)?;
    }
    let mut error = (vae.decode(&(mean + noise)?)? - &x)?;
    if settings.head > 0.0 || settings.features > 0.0 {
        let side = x.dim(3)?;
        let weights = images.weights(numbers, side, settings.head, settings.features)?;
        error = error.broadcast_mul(&weights.to_device(device)?)?;
    }
    let mut value = error.abs()?.mean_all()?;
    let mut parts = vec![("l1", Figure::from(&value))];
    if settings.edges > 0.0 {
        let difference = |axis: usize| -> Result<Tensor> {
            let length = error.dim(axis)? - 1;
            Ok((error.narrow(axis, 1, length)? - error.narrow(axis, 0, length)?)?.abs()?.mean_all()?)
        };
        let edges = (difference(2)? + difference(3)?)?;
        parts.push(("edges", Figure::from(&edges)));
        value = (value + (edges * settings.edges)?)?;
    }
    Ok(Loss { value, parts })
}

fn number(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

/// Images whose patches the principal components are fitted to.
pub(super) const FITTED_IMAGES: usize = 2048;

/// Measures the scale of the latents, writes the model and says how well it reconstructs held-out people.
fn finish(
    config: &VaeConfig,
    images: &PaintedImages,
    average: &BTreeMap<String, Tensor>,
    out: &Path,
) -> Result<()> {
    let tensors = average.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    let vae = Vae::new(config, weights::frozen(tensors, DType::F32, &Device::Cpu))?;
    let mut latents = Vec::new();
    for numbers in images.spread(1024).chunks(64) {
        latents.push(vae.encode(&images.batch(numbers)?)?.0);
    }
    let latents = Tensor::cat(&latents, 0)?.flatten_all()?;
    let centre = number(&latents.mean(0)?)?;
    let deviation = number(&(latents - centre)?.sqr()?.mean(0)?)?.sqrt();
    let config = VaeConfig { scaling_factor: 1.0 / deviation, force_upcast: false, ..config.clone() };
    save_component(out, "vae", DIFFUSERS_WEIGHTS, &config.to_json(), average, DType::F16)?;
    let x = images.batch(&images.held_out(64))?;
    let error =
        (vae.decode(&vae.encode(&x)?.0)?.clamp(-1f32, 1f32)? - &x)?.sqr()?.flatten_from(1)?.mean(1)?;
    let psnr =
        error.to_vec1::<f32>()?.iter().map(|mse| 10.0 * (4.0 / f64::from(*mse)).log10()).sum::<f64>() / 64.0;
    progress::note(format_args!(
        "the VAE reconstructs held-out people at {psnr:.2} dB; latents have mean {centre:.2} and deviation {deviation:.2}"
    ));
    Ok(())
}

/// Images above what comes back. `x` (B, 3, H, W).
fn sheet(vae: &Vae, x: &Tensor) -> Result<Image> {
    let images = |x: &Tensor| -> Result<Vec<Image>> {
        (0..x.dim(0)?).map(|i| Image::from_tensor(&x.get(i)?.clamp(-1f32, 1f32)?)).collect()
    };
    let (before, after) = (images(x)?, images(&vae.decode(&vae.encode(x)?.0)?)?);
    let rows: Vec<Vec<&Image>> = before
        .chunks(8)
        .zip(after.chunks(8))
        .flat_map(|(before, after)| [before.iter().collect(), after.iter().collect()])
        .collect();
    Ok(contact_sheet(&rows, 128, 2))
}
