//! Fine-tunes a predicted LoRA on the photos that it was predicted from, by the functional loss.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use indicatif::ProgressBar;
use rand::Rng;

use crate::image::{Filter, Image};
use crate::layers::Adapter;
use crate::lora::{Lora, LoraLayer};
use crate::progress;
use crate::recipes::dreambooth::functional_loss::{Adapters, FunctionalBatch, loss};
use crate::sdxl::pipeline::Sdxl;
use crate::sdxl::text::TextConditioning;
use crate::train;
use crate::train::adamw::AdamWOptions;
use crate::train::shards::gradients;
use crate::train::state::State;
use crate::train::trainer::descend;

/// How a predicted LoRA is fine-tuned on the photos that it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Refinement {
    /// Steps of AdamW.
    pub steps: u32,
    /// Its learning rate.
    pub rate: f64,
    /// Of timesteps, noise and the order of photos.
    pub seed: u64,
    /// Whether `A` trains too; not where all LoRAs share it.
    pub downs: bool,
    /// What the photos show, for example `a photo of a person`.
    pub caption: &'static str,
}

/// Loss on the photos before and after [`refine`], over the same noise and timesteps.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Refined {
    /// Of the predicted LoRA.
    pub before: f64,
    /// Of the fine-tuned LoRA.
    pub after: f64,
}

/// Caption of photos of a person whom DiffLoRA's LoRAs call so.
pub const CAPTION: &str = "a photo of a person";

/// Fine-tunes a LoRA on photos of the person (squares of any size), all with one caption.
///
/// A few steps from a good start, as HyperDreamBooth (arXiv 2307.06949, section 3.3) takes them.
pub fn refine(
    base: &Sdxl,
    lora: &Lora,
    photos: &[Image],
    options: Refinement,
    bar: &ProgressBar,
) -> Result<(Lora, Refined)> {
    let photos = Photos::encode(base, photos, options.caption)?;
    let Trainable { vars, adapters } = Trainable::of(lora, options.downs, base.device())?;
    let loss_at = |step: u64| photos.loss(&adapters, options.seed, step);
    let before = photos.validation_loss(loss_at)?;
    let adamw = AdamWOptions { betas: [0.9, 0.99], weight_decay: 0.0, ..AdamWOptions::default() };
    let mut state = State::new(vars.clone(), adamw, None)?;
    let gradients = |step: u64| {
        progress::check()?;
        gradients(&vars, 1, |_| Ok(loss_at(step)?.into()))
    };
    descend(
        &mut state,
        options.steps.into(),
        |_| options.rate,
        gradients,
        |_, made| {
            bar.set_message(format!("loss {:.4}", made.loss));
            bar.inc(1);
            Ok(ControlFlow::<()>::Continue(()))
        },
    )?;
    let after = photos.validation_loss(loss_at)?;
    Ok((trained(lora, &vars)?, Refined { before, after }))
}

/// The photos and their mirror images as latents.
struct Photos<'a> {
    base: &'a Sdxl,
    /// (N, C, h, w)
    latents: Tensor,
    /// Of a batch.
    captions: TextConditioning,
    batch: usize,
    size: usize,
}

impl<'a> Photos<'a> {
    fn encode(base: &'a Sdxl, photos: &[Image], caption: &str) -> Result<Self> {
        let size = base.native_size();
        let mut images = Vec::new();
        for photo in photos {
            let photo = photo.square(size, Filter::Bicubic);
            // Mirrored too: one photo is little to learn from.
            images.extend([photo.mirrored().to_tensor(base.device())?, photo.to_tensor(base.device())?]);
        }
        let images = Tensor::stack(&images, 0)?.to_dtype(base.vae.dtype())?;
        let latents = base.vae.to_latents(&base.vae.encode(&images)?.0)?;
        // On a small base a step averages over several noises at once.
        let batch = if size <= 128 { 8 } else { 1 };
        let captions = base.text.encode_prompts(&vec![caption; batch])?;
        Ok(Self { base, latents, captions, batch, size })
    }

    /// The loss of a batch that `seed` and `step` choose.
    fn loss(&self, adapters: &Adapters, seed: u64, step: u64) -> Result<Tensor> {
        let mut rng = train::rng(seed, step);
        let count = self.latents.dim(0)? as u32;
        let chosen: Vec<u32> = (0..self.batch).map(|_| rng.random_range(0..count)).collect();
        let chosen = Tensor::new(chosen, self.base.device())?;
        let latents = self.latents.index_select(&chosen, 0)?.unsqueeze(0)?;
        let data = FunctionalBatch { latents, captions: self.captions.clone(), size: self.size };
        loss(&self.base.unet, &self.base.schedule, adapters, &data, &mut rng)
    }

    /// Mean loss over noises that no training step uses.
    fn validation_loss(&self, loss_at: impl Fn(u64) -> Result<Tensor>) -> Result<f64> {
        let count = (32 / self.batch) as u64;
        let losses = (0..count).map(|i| Ok(f64::from(loss_at(u64::MAX - i)?.to_scalar::<f32>()?)));
        Ok(losses.sum::<Result<f64>>()? / count as f64)
    }
}

/// The factors of a LoRA as variables, and the adapters that they belong to.
struct Trainable {
    /// By `up.MODULE` and `down.MODULE`.
    vars: BTreeMap<String, Var>,
    adapters: Adapters,
}

impl Trainable {
    fn of(lora: &Lora, downs: bool, device: &Device) -> Result<Self> {
        let mut vars: BTreeMap<String, Var> = BTreeMap::new();
        let mut adapters = Adapters::new();
        for (module, layer) in &lora.layers {
            let mut factor = |which: &str, value: &Tensor, trains: bool| -> Result<Tensor> {
                let value = value.to_device(device)?.to_dtype(DType::F32)?;
                if !trains {
                    return Ok(value);
                }
                let var = Var::from_tensor(&value)?;
                let tensor = var.as_tensor().clone();
                vars.insert(format!("{which}.{module}"), var);
                Ok(tensor)
            };
            let up = factor("up", &layer.up, true)?;
            let down = factor("down", &layer.down, downs)?;
            adapters.insert(module.clone(), Adapter { down, up, scale: layer.scale() });
        }
        Ok(Self { vars, adapters })
    }
}

/// The LoRA with the values of the variables.
fn trained(lora: &Lora, vars: &BTreeMap<String, Var>) -> Result<Lora> {
    let mut refined = lora.clone();
    for (module, layer) in &mut refined.layers {
        let value = |which: &str, old: &Tensor| -> Result<Tensor> {
            match vars.get(&format!("{which}.{module}")) {
                Some(var) => Ok(var.as_tensor().detach().to_device(&Device::Cpu)?),
                None => Ok(old.clone()),
            }
        };
        let (up, down) = (value("up", &layer.up)?, value("down", &layer.down)?);
        *layer = LoraLayer::new(module, down, up, layer.alpha)?;
    }
    Ok(refined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipes::dreambooth::functional_loss::tests::{lora, tiny};

    #[test]
    fn refining_lowers_the_loss_on_the_photos_and_repeats() {
        let base = tiny();
        let photo = Image::filled(80, 64, [200, 30, 40]);
        let how = Refinement { steps: 6, rate: 1e-2, seed: 1, downs: false, caption: CAPTION };
        let start = lora(1, 0.05);
        let (refined, losses) =
            refine(&base, &start, std::slice::from_ref(&photo), how, &ProgressBar::hidden()).unwrap();
        assert!(losses.after < losses.before, "{losses:?}");
        let values = |lora: &Lora, pick: fn(&LoraLayer) -> &Tensor| -> Vec<f32> {
            lora.layers
                .values()
                .flat_map(|layer| pick(layer).flatten_all().unwrap().to_vec1::<f32>().unwrap())
                .collect()
        };
        assert_eq!(values(&refined, |layer| &layer.down), values(&start, |layer| &layer.down));
        let (again, _) = refine(&base, &start, &[photo], how, &ProgressBar::hidden()).unwrap();
        assert_eq!(values(&refined, |layer| &layer.up), values(&again, |layer| &layer.up));
        assert_ne!(values(&refined, |layer| &layer.up), values(&start, |layer| &layer.up));
    }
}
