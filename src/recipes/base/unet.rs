//! The second stage: UNet and both text encoders learn together to draw images from captions.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;
use rand::seq::index;
use serde::{Deserialize, Serialize};

use crate::diffusion::sampler;
use crate::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
use crate::image::{Image, contact_sheet};
use crate::progress;
use crate::sdxl::folder::SdxlParts;
use crate::sdxl::text::{ClipTextConfig, ClipTextModel, TextConditioning, TextEncoders};
use crate::sdxl::tokenizer::{ClipTokenizer, build_vocabulary};
use crate::sdxl::unet::{UNet, UNetConfig};
use crate::sdxl::vae::{Vae, VaeConfig};
use crate::synthetic;
use crate::synthetic::image_set::Gallery;
use crate::train::shards::{Loss, in_threads};
use crate::train::trainer::{self, End, Keeping, Plan};
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
    /// Timesteps are T·u^power for u uniform in [0, 1): 1 draws all alike, more draws small ones more often, where
    /// eyes and mouths are decided.
    #[serde(default = "uniform")]
    pub timestep_power: f64,
    /// Tokens and positions start with this many times transformers' deviation of 0.02.
    pub embedding_scale: f64,
    /// Steps between sheets of images.
    pub sheet_every: u64,
    /// Steps, batch, rate.
    pub plan: Plan,
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

/// Everything of the model that is not the VAE.
struct Drawing {
    text: TextEncoders,
    unet: UNet,
    schedule: NoiseSchedule,
    size: usize,
}

/// Trains UNet and text encoders on the latents of `out`/vae and writes the whole model to `out`. They start from the
/// weights of the model `from`, or from noise.
pub fn train(
    all: &crate::recipes::base::config::Settings,
    gallery: &mut Gallery,
    keeping: &Keeping,
    out: &Path,
    from: Option<&Path>,
) -> Result<End> {
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
    let latents = latents(&vae, all, gallery, keeping.folder)?;
    let gallery = &*gallery;

    let trainable = Trainable::new(all.seed);
    let vb = trainable.builder(&Device::Cpu);
    let unet = UNet::new(&settings.model, vb.pp("unet"))?;
    let encoder = ClipTextModel::new(&settings.text_encoder, vb.pp("text_encoder"))?;
    let encoder_2 = ClipTextModel::new(&settings.text_encoder_2, vb.pp("text_encoder_2"))?;
    let vars = trainable.vars();
    for (_, var) in vars.iter().filter(|(name, _)| name.contains("_embedding.weight")) {
        var.set(&(var.as_tensor() * settings.embedding_scale)?.detach())?;
    }
    if let Some(from) = from {
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
    let text = TextEncoders {
        tokenizer: ClipTokenizer::new(&files, "tokenizer")?,
        encoder,
        tokenizer_2: ClipTokenizer::new(&files, "tokenizer_2")?,
        encoder_2,
    };
    let schedule = NoiseSchedule::new(&settings.scheduler)?;
    let drawing = Drawing { text, unet, schedule, size: all.images.size };

    let seed = all.seed.wrapping_add(1);
    let loss = |step: u64, shard: usize| drawing.loss(settings, gallery, &latents, (seed, step, shard));
    let (end, ema) = trainer::run(&settings.plan, all, keeping, &vars, loss, |step, ema| {
        if step % settings.sheet_every == 0 {
            let path = keeping.folder.join(format!("unet-{step:06}.png"));
            ema.averaged(|| drawing.sheet(&vae)?.save(&path, None))?;
            write(ema.averages())?;
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
                .and_then(|weight| Ok(var.set(&weight.to_dtype(DType::F32)?)?))
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
    gallery: &mut Gallery,
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
    gallery.paint()?;
    let bar = progress::bar(gallery.len() as u64, "encoding");
    let chunk = 32;
    let parts = in_threads(gallery.len().div_ceil(chunk), |i| {
        progress::check()?;
        let numbers: Vec<usize> = (i * chunk..gallery.len().min((i + 1) * chunk)).collect();
        let z = vae.to_latents(&vae.encode(&gallery.batch(&numbers)?)?.0)?;
        bar.inc(numbers.len() as u64);
        Ok(z)
    })?;
    bar.finish_and_clear();
    let latents = Tensor::cat(&parts, 0)?;
    let part = BTreeMap::from([("all".to_string(), latents.clone())]);
    checkpoint::save(&path, 0, &made_of, &[("latents", part)])?;
    Ok(latents)
}

impl Drawing {
    /// Mean squared error of one shard's predictions.
    fn loss(
        &self,
        settings: &Settings,
        gallery: &Gallery,
        latents: &Tensor,
        (seed, step, shard): (u64, u64, usize),
    ) -> Result<Loss> {
        let Plan { batch, shards, .. } = settings.plan;
        let samples = batch / shards;
        let mut rng = train::rng(seed, step * shards as u64 + shard as u64);
        let numbers = index::sample(&mut rng, gallery.len(), samples).into_vec();
        let captions: Vec<String> = numbers
            .iter()
            .map(|number| {
                let caption = gallery.caption(*number, &mut rng);
                if rng.random_bool(settings.empty) { String::new() } else { caption }
            })
            .collect();
        // One u from each of `batch` equal parts, so that every batch sees the whole range.
        let all = settings.scheduler.num_train_timesteps;
        let t: Vec<usize> = (0..samples)
            .map(|i| ((shard * samples + i) as f64 + rng.random::<f64>()) / batch as f64)
            .map(|u| ((u.powf(settings.timestep_power) * all as f64) as usize).min(all - 1))
            .collect();
        let numbers: Vec<u32> = numbers.iter().map(|number| *number as u32).collect();
        let x0 = latents.index_select(&Tensor::from_vec(numbers, samples, latents.device())?, 0)?;
        let noise = train::normal(&mut rng, x0.shape(), x0.device())?;
        let x_t = self.schedule.add_noise(&x0, &noise, &t)?;
        let target = self.schedule.target(&x0, &noise, &t)?;
        let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
        let conditioning = self.text.encode_prompts(&captions)?;
        let times: Vec<f32> = t.iter().map(|t| *t as f32).collect();
        let output = self.predict(&x_t, &times, &conditioning)?;
        let errors = (output - target)?.sqr()?.flatten_from(1)?.mean(1)?; // (B)
        let plain = f64::from(errors.mean(0)?.to_scalar::<f32>()?);
        let value = if settings.min_snr > 0.0 {
            let weights = self.schedule.min_snr_weights(&t, settings.min_snr)?;
            let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
            (errors * Tensor::from_vec(weights, samples, &Device::Cpu)?)?.mean(0)?
        } else {
            errors.mean(0)?
        };
        Ok(Loss { value, parts: vec![("error", plain)] })
    }

    /// The UNet's answer; images are uncropped squares of the size trained on.
    fn predict(&self, x: &Tensor, times: &[f32], conditioning: &TextConditioning) -> Result<Tensor> {
        let b = x.dim(0)?;
        ensure!(times.len() == b, "{} timesteps for {b} samples", times.len());
        let size = self.size as f32;
        let sizes = Tensor::new(&[size, size, 0.0, 0.0, size, size], x.device())?.broadcast_as((b, 6))?;
        let times = Tensor::new(times, x.device())?;
        self.unet.forward(x, &times, &conditioning.context, &conditioning.pooled, &sizes.contiguous()?)
    }

    /// Images of the prompts of [`PROMPTS`], drawn with guidance.
    fn sheet(&self, vae: &Vae) -> Result<Image> {
        let columns = 6;
        let rows = in_threads(PROMPTS.len(), |row| {
            let UNetConfig { in_channels, sample_size, .. } = self.unet.config;
            let shape = (columns, in_channels, sample_size, sample_size);
            let x = train::normal(&mut train::rng(7, row as u64), &shape.into(), &Device::Cpu)?;
            let prompts = [vec![""; columns], vec![PROMPTS[row]; columns]].concat();
            let conditioning = self.text.encode_prompts(&prompts)?;
            let denoise = |x: &Tensor, t: f64| {
                let both = Tensor::cat(&[x, x], 0)?;
                let output = self.predict(&both, &vec![t as f32; 2 * columns], &conditioning)?.detach();
                let (empty, told) = (output.narrow(0, 0, columns)?, output.narrow(0, columns, columns)?);
                Ok((&empty + ((told - &empty)? * 4.0)?)?)
            };
            let z = sampler::ddim(denoise, x, &self.schedule, 20, 0.0, |_| unreachable!("eta is 0"))?;
            let images = vae.decode(&vae.from_latents(&z)?)?.clamp(-1f32, 1f32)?;
            (0..columns).map(|i| Image::from_tensor(&images.get(i)?)).collect::<Result<Vec<_>>>()
        })?;
        let rows: Vec<Vec<&Image>> = rows.iter().map(|row| row.iter().collect()).collect();
        Ok(contact_sheet(&rows, 128, 2))
    }
}

/// What the sheets along the way show.
const PROMPTS: [&str; 6] = [
    "a photo of a person",
    "a photo of a person, black hair, smiling, red background",
    "a photo of a person, dark skin, serious, blue background",
    "a photo of a person, pale skin, blond hair, wearing glasses, green background",
    "a sketch of a person, wearing cap, white background",
    "a painting of a person, full beard, facing left, yellow background",
];

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
