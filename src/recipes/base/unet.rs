//! The second stage: UNet and both text encoders learn together to draw images from captions.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;
use rand::seq::index;
use rand_distr::StandardNormal;
use serde::{Deserialize, Serialize};

use crate::diffusion::sampler::{self, Ddim};
use crate::diffusion::schedule::{NoiseSchedule, Prediction, SchedulerConfig};
use crate::image::{Image, contact_sheet};
use crate::progress;
use crate::recipes::base::quality::Quality;
use crate::sdxl::folder::SdxlParts;
use crate::sdxl::text::{ClipTextConfig, ClipTextModel, TextConditioning, TextEncoders};
use crate::sdxl::tokenizer::{ClipTokenizer, build_vocabulary};
use crate::sdxl::unet::{UNet, UNetConfig, UNetInput};
use crate::sdxl::vae::{Vae, VaeConfig};
use crate::synthetic;
use crate::synthetic::attribute_classifier::AttributeClassifier;
use crate::synthetic::image_set::PaintedImages;
use crate::threads::{in_threads, in_threads_or_turn};
use crate::train::gradients::{Figure, Loss};
use crate::train::trainer::{self, Outcome, RunOptions, TrainerConfig};
use crate::train::{self, checkpoint};
use crate::weights::Trainable;
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS};

/// Sizes and recipe of the denoiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Part of the captions that are replaced by the empty prompt, for guidance.
    pub empty: f64,
    /// γ of the min-SNR weights; 0 weighs all timesteps alike.
    #[serde(default)]
    pub min_snr: f64,
    /// Weighs squared errors of x_0 by 1 / max(1 − ᾱ, this), which from there on is the v-loss; for `sample` models.
    /// 0 leaves it out.
    #[serde(default)]
    pub velocity_floor: f64,
    /// Further weight of the error on the head.
    #[serde(default)]
    pub head: f64,
    /// Further weight of the error at eyes and mouth.
    #[serde(default)]
    pub features: f64,
    /// Noises drawn for each sample, of which the nearest to its latent is taken: immiscible diffusion
    /// (arXiv 2505.18521).
    #[serde(default = "one")]
    pub noise_candidates: usize,
    /// Timesteps are T·u^power for u uniform in [0, 1): 1 draws all alike, more draws small ones more often, where
    /// eyes and mouths are decided.
    #[serde(default = "uniform")]
    pub timestep_power: f64,
    /// Tokens and positions start with this many times transformers' deviation of 0.02.
    pub embedding_scale: f64,
    /// Steps between sheets of images.
    pub sheet_every: u64,
    /// Steps, batch, rate.
    pub plan: TrainerConfig,
    /// `text_encoder/config.json`; what depends on the vocabulary is filled in.
    pub text_encoder: ClipTextConfig,
    /// `text_encoder_2/config.json`, likewise.
    pub text_encoder_2: ClipTextConfig,
    /// `unet/config.json`.
    pub model: UNetConfig,
    /// `scheduler/scheduler_config.json`.
    pub scheduler: SchedulerConfig,
}

fn uniform() -> f64 {
    1.0
}

fn one() -> usize {
    1
}

impl Settings {
    /// Weights of the samples' errors by their timesteps. `t` (B) → (B)
    fn weights(&self, schedule: &NoiseSchedule, t: &[usize]) -> Result<Vec<f64>> {
        let mut weights = match self.min_snr {
            gamma if gamma > 0.0 => schedule.min_snr_weights(t, gamma)?,
            _ => vec![1.0; t.len()],
        };
        if self.velocity_floor > 0.0 {
            ensure!(
                schedule.config.prediction_type == Prediction::Sample,
                "velocity_floor needs prediction_type = \"sample\""
            );
            for (weight, t) in weights.iter_mut().zip(t) {
                *weight /= (1.0 - schedule.alphas_bar[*t]).max(self.velocity_floor);
            }
        }
        Ok(weights)
    }
}

/// Of `candidates` normal noises for each sample the one nearest to it. `x0` (B, …) → the same shape.
fn nearest_noise(rng: &mut impl Rng, x0: &Tensor, candidates: usize) -> Result<Tensor> {
    if candidates < 2 {
        return Ok(train::normal(rng, x0.shape(), x0.device())?);
    }
    let rows = x0.flatten_from(1)?.to_vec2::<f32>()?;
    let mut nearest = Vec::with_capacity(x0.elem_count());
    for row in &rows {
        let mut best = (f32::INFINITY, Vec::new());
        for _ in 0..candidates {
            let noise: Vec<f32> = row.iter().map(|_| rng.sample(StandardNormal)).collect();
            let distance = row.iter().zip(&noise).map(|(x, noise)| (x - noise) * (x - noise)).sum();
            if distance < best.0 {
                best = (distance, noise);
            }
        }
        nearest.extend(best.1);
    }
    Ok(Tensor::from_vec(nearest, x0.shape(), x0.device())?)
}

/// Everything of the model that is not the VAE.
struct Denoiser {
    text: TextEncoders,
    unet: UNet,
    schedule: NoiseSchedule,
    size: usize,
    device: Device,
}

/// Inputs of a run besides its settings.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// Where the UNet and the text encoders compute; images are decoded by the CPU.
    pub device: &'a Device,
    /// Weights of this model instead of random ones.
    pub from: Option<&'a Path>,
    /// Measures generated images along the way.
    pub classifier: Option<&'a AttributeClassifier>,
}

/// Trains UNet and text encoders on the latents of `out`/vae and writes the whole model to `out`. They start from the
/// weights of a model, or from random ones.
pub fn train(
    all: &crate::recipes::base::config::Settings,
    images: &PaintedImages,
    run_options: &RunOptions,
    out: &Path,
    start: &Start,
) -> Result<Outcome> {
    let mut settings = all.unet.clone();
    let vocabulary = build_vocabulary(&words())?;
    let tokens = serde_json::from_str::<BTreeMap<String, u32>>(&vocabulary.0)?.len();
    for (config, class) in [
        (&mut settings.text_encoder, "CLIPTextModel"),
        (&mut settings.text_encoder_2, "CLIPTextModelWithProjection"),
    ] {
        config.architectures = vec![class.into()];
        config.vocab_size = tokens;
        config.eos_token_id = tokens as u32 - 1;
    }
    let settings = &settings;

    let files = ModelFiles::folder(out)?;
    let config: VaeConfig = files.config("vae/config.json").context("the VAE comes first: --stage vae")?;
    let vae = files.load("vae", DIFFUSERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| Vae::new(&config, vb))?;
    let vae_weights: BTreeMap<String, Tensor> =
        files.tensors("vae", DIFFUSERS_WEIGHTS)?.into_iter().collect();
    all.check_latents(&config)?;
    let latents = latents(&vae, all, images, run_options.folder)?;

    let trainable = Trainable::new(all.seed);
    let vb = trainable.builder(start.device);
    let unet = trainable.checked(UNet::new(&settings.model, vb.pp("unet")))?;
    let text = |config, name| trainable.checked(ClipTextModel::new(config, vb.pp(name)));
    let encoder = text(&settings.text_encoder, "text_encoder")?;
    let encoder_2 = text(&settings.text_encoder_2, "text_encoder_2")?;
    let vars = trainable.vars();
    for (_, var) in vars.iter().filter(|(name, _)| name.contains("_embedding.weight")) {
        var.set(&(var.as_tensor() * settings.embedding_scale)?.detach())?;
    }
    if let Some(from) = start.from {
        start_from(from, &vars)?;
    }
    let write = |average: &BTreeMap<String, Tensor>| -> Result<()> {
        let part = |prefix: &str| -> BTreeMap<String, Tensor> {
            let own = |(name, tensor): (&String, &Tensor)| {
                Some((name.strip_prefix(prefix)?.to_string(), tensor.clone()))
            };
            average.iter().filter_map(own).collect()
        };
        let mut scheduler = serde_json::to_value(&settings.scheduler)?;
        scheduler["_class_name"] = "DDIMScheduler".into();
        scheduler["clip_sample"] = false.into();
        SdxlParts {
            text_encoder: (&settings.text_encoder, &part("text_encoder.")),
            text_encoder_2: (&settings.text_encoder_2, &part("text_encoder_2.")),
            unet: (&settings.model, &part("unet.")),
            vae: (&config, &vae_weights),
            vocabulary: (&vocabulary.0, &vocabulary.1),
            scheduler: &scheduler,
        }
        .write(out, DType::F16)
    };
    // The tokenizers are read from files as those of any other model are.
    write(&vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect())?;
    let tokenizers = [ClipTokenizer::new(&files, "tokenizer")?, ClipTokenizer::new(&files, "tokenizer_2")?];
    let text = TextEncoders::new(tokenizers, [encoder, encoder_2]);
    let schedule = NoiseSchedule::new(&settings.scheduler)?;
    let denoiser = Denoiser { text, unet, schedule, size: all.images.size, device: start.device.clone() };

    let seed = all.seed.wrapping_add(1);
    let loss = |step: u64, shard: usize| denoiser.loss(settings, images, &latents, (seed, step, shard));
    let (end, ema) = trainer::run(&settings.plan, all, run_options, &vars, loss, |step, ema| {
        if step % settings.sheet_every == 0 {
            let path = run_options.folder.join(format!("unet-{step:06}.png"));
            trainer::optional(ema.averaged(|| {
                denoiser.sheet(&vae, images)?.save(&path, None)?;
                let Some(classifier) = start.classifier else { return Ok(()) };
                let quality =
                    Quality::measure(images, classifier, |prompts| denoiser.generate(&vae, prompts, 8))?;
                quality.append(&run_options.folder.join("unet-quality.jsonl"), step, settings.plan.batch)
            }));
            trainer::optional(write(ema.averages()));
        }
        Ok(())
    })?;
    write(ema.averages())?;
    Ok(end)
}

/// Sets every variable to its value in the model `from`, whose words and sizes must be the same.
fn start_from(from: &Path, vars: &BTreeMap<String, Var>) -> Result<()> {
    let files = ModelFiles::folder(from)?;
    for (part, stem) in [
        ("unet", DIFFUSERS_WEIGHTS),
        ("text_encoder", TRANSFORMERS_WEIGHTS),
        ("text_encoder_2", TRANSFORMERS_WEIGHTS),
    ] {
        let weights = files.tensors(part, stem)?;
        let prefix = format!("{part}.");
        let own = vars.iter().filter_map(|(name, var)| Some((name.strip_prefix(&prefix)?, var)));
        for (name, var) in own {
            let weight = weights.get(name).with_context(|| format!("`{part}` has no `{name}`"));
            weight
                .and_then(|weight| Ok(var.set(&weight.to_dtype(DType::F32)?.to_device(var.device())?)?))
                .map_err(|error| files.unusable(part, format!("no start for this training: {error:#}")))?;
        }
    }
    Ok(())
}

/// Every word of the captions, and the few that prompts of people's own add.
fn words() -> Vec<&'static str> {
    let mut words = synthetic::vocabulary();
    words.push(",");
    words
}

/// The scaled latents of all images, made once and kept in `folder`. (images, C, h, w).
fn latents(
    vae: &Vae,
    all: &crate::recipes::base::config::Settings,
    images: &PaintedImages,
    folder: &Path,
) -> Result<Tensor> {
    let path = folder.join("latents.safetensors");
    // The scale was measured on the trained weights, so it stands for them.
    let made_of = serde_json::json!({ "pictures": all.images, "vae": vae.config() });
    if path.exists()
        && let Ok(saved) = checkpoint::load(&path, &made_of)
        && let Some(latents) = saved.part("latents").remove("all")
    {
        return Ok(latents);
    }
    let bar = progress::bar(images.len() as u64, "encoding");
    let chunk = 32;
    let parts = in_threads(images.len().div_ceil(chunk), |i| {
        progress::check()?;
        let numbers: Vec<usize> = (i * chunk..images.len().min((i + 1) * chunk)).collect();
        let z = vae.to_latents(&vae.encode(&images.batch(&numbers)?)?.0)?;
        bar.inc(numbers.len() as u64);
        Ok(z)
    })?;
    bar.finish_and_clear();
    let latents = Tensor::cat(&parts, 0)?;
    let part = BTreeMap::from([("all".to_string(), latents.clone())]);
    checkpoint::save(&path, 0, &made_of, &[("latents", part)])?;
    Ok(latents)
}

impl Denoiser {
    /// Mean squared error of one shard's predictions.
    fn loss(
        &self,
        settings: &Settings,
        images: &PaintedImages,
        latents: &Tensor,
        (seed, step, shard): (u64, u64, usize),
    ) -> Result<Loss> {
        let TrainerConfig { batch, shards, .. } = settings.plan;
        let samples = batch / shards;
        let mut rng = train::rng(seed, step * shards as u64 + shard as u64);
        let numbers = index::sample(&mut rng, images.len(), samples).into_vec();
        let captions: Vec<String> = numbers
            .iter()
            .map(|number| {
                let caption = images.caption(*number, &mut rng);
                if rng.random_bool(settings.empty) { String::new() } else { caption }
            })
            .collect();
        // One u from each of `batch` equal parts, so that every batch sees the whole range.
        let all = settings.scheduler.num_train_timesteps;
        let t: Vec<usize> = (0..samples)
            .map(|i| ((shard * samples + i) as f64 + rng.random::<f64>()) / batch as f64)
            .map(|u| ((u.powf(settings.timestep_power) * all as f64) as usize).min(all - 1))
            .collect();
        let rows: Vec<u32> = numbers.iter().map(|number| *number as u32).collect();
        // Latents and noise come from the CPU, where both are equal whatever computes the rest.
        let x0 = latents.index_select(&Tensor::from_vec(rows, samples, latents.device())?, 0)?;
        let noise = nearest_noise(&mut rng, &x0, settings.noise_candidates)?.to_device(&self.device)?;
        let x0 = x0.to_device(&self.device)?;
        let x_t = self.schedule.add_noise(&x0, &noise, &t)?;
        let target = self.schedule.target(&x0, &noise, &t)?;
        let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
        let conditioning = self.text.encode_prompts(&captions)?;
        let times: Vec<f32> = t.iter().map(|t| *t as f32).collect();
        let output = self.predict(&x_t, &times, &conditioning)?;
        let mut errors = (output - target)?.sqr()?;
        let plain = Figure::from(&errors.mean_all()?);
        if settings.head > 0.0 || settings.features > 0.0 {
            let weights = images
                .weights(&numbers, x0.dim(3)?, settings.head, settings.features)?
                .to_device(x0.device())?;
            errors = errors.broadcast_mul(&weights)?;
        }
        let errors = errors.flatten_from(1)?.mean(1)?; // (B)
        let weights = settings.weights(&self.schedule, &t)?;
        let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
        let value = (errors * Tensor::from_vec(weights, samples, x0.device())?)?.mean(0)?;
        Ok(Loss { value, parts: vec![("error", plain)] })
    }

    /// The UNet's answer; images are uncropped squares of the size trained on.
    fn predict(&self, x: &Tensor, times: &[f32], conditioning: &TextConditioning) -> Result<Tensor> {
        let b = x.dim(0)?;
        ensure!(times.len() == b, "{} timesteps for {b} samples", times.len());
        let size = self.size as f32;
        let sizes = Tensor::new(&[size, size, 0.0, 0.0, size, size], x.device())?.broadcast_as((b, 6))?;
        let times = Tensor::new(times, x.device())?;
        self.unet.forward(&UNetInput {
            latents: x,
            timesteps: &times,
            context: &conditioning.context,
            pooled: &conditioning.pooled,
            time_ids: &sizes.contiguous()?,
            guidance_scale: None,
        })
    }

    /// Images of `prompts`, one each, from noise of (`seed`, place in the list); chunks run on threads of their own.
    pub(super) fn generate(&self, vae: &Vae, prompts: &[String], seed: u64) -> Result<Vec<Image>> {
        let chunks: Vec<&[String]> = prompts.chunks(8).collect();
        let images = in_threads_or_turn(&self.device, chunks.len(), |chunk| {
            progress::check()?;
            let count = chunks[chunk].len();
            let UNetConfig { in_channels, sample_size, .. } = self.unet.config;
            let shape = (count, in_channels, sample_size, sample_size);
            let x = train::normal(&mut train::rng(seed, chunk as u64), &shape.into(), &self.device)?;
            let texts: Vec<&str> =
                std::iter::repeat_n("", count).chain(chunks[chunk].iter().map(String::as_str)).collect();
            let conditioning = self.text.encode_prompts(&texts)?;
            let denoise = |x: &Tensor, t: f64| {
                let both = Tensor::cat(&[x, x], 0)?;
                let output = self.predict(&both, &vec![t as f32; 2 * count], &conditioning)?.detach();
                let (empty, conditioned) = (output.narrow(0, 0, count)?, output.narrow(0, count, count)?);
                Ok((&empty + ((conditioned - &empty)? * GUIDANCE)?)?)
            };
            let ddim = Ddim { schedule: &self.schedule, steps: 20, eta: 0.0 };
            let z = sampler::ddim(denoise, x, ddim, |_| unreachable!("eta is 0"))?;
            let z = z.to_device(&Device::Cpu)?;
            let images = vae.decode(&vae.from_latents(&z)?)?.clamp(-1f32, 1f32)?;
            (0..count).map(|i| Image::from_tensor(&images.get(i)?)).collect::<Result<Vec<_>>>()
        })?;
        Ok(images.into_iter().flatten().collect())
    }

    /// Painted images of held-out people, and below each what is generated from its caption.
    fn sheet(&self, vae: &Vae, images: &PaintedImages) -> Result<Image> {
        let numbers = images.held_out(24);
        let captions: Vec<String> = numbers
            .iter()
            .map(|number| images.caption(*number, &mut train::rng(7, *number as u64)))
            .collect();
        let painted = images.batch(&numbers)?;
        let painted: Vec<Image> =
            (0..numbers.len()).map(|i| Image::from_tensor(&painted.get(i)?)).collect::<Result<_>>()?;
        let generated = self.generate(vae, &captions, 7)?;
        let rows: Vec<Vec<&Image>> = painted
            .chunks(8)
            .zip(generated.chunks(8))
            .flat_map(|(above, below)| [above.iter().collect(), below.iter().collect()])
            .collect();
        Ok(contact_sheet(&rows, 128, 2))
    }
}

/// Guidance scale of the sheets and measurements along the way.
const GUIDANCE: f64 = 2.5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_further_round_starts_from_the_weights_of_another_model() {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/pipeline/two");
        let wanted =
            ModelFiles::folder(&from).unwrap().tensors("unet", DIFFUSERS_WEIGHTS).unwrap()["conv_in.weight"]
                .to_dtype(DType::F32)
                .unwrap();
        let var = Var::zeros(wanted.shape(), DType::F32, &Device::Cpu).unwrap();
        start_from(&from, &BTreeMap::from([("unet.conv_in.weight".to_string(), var.clone())])).unwrap();
        let apart = (var.as_tensor() - &wanted).unwrap().abs().unwrap().max_all().unwrap();
        assert_eq!(apart.to_scalar::<f32>().unwrap(), 0.0);

        let other = Var::zeros((1, 2), DType::F32, &Device::Cpu).unwrap();
        for name in ["unet.conv_in.weight", "text_encoder.nothing"] {
            let vars = BTreeMap::from([(name.to_string(), other.clone())]);
            let error = start_from(&from, &vars).unwrap_err();
            assert!(error.chain().any(|cause| cause.is::<crate::failure::Failure>()), "{name}: {error:#}");
        }
    }
}
