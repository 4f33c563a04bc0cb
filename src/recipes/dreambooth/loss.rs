//! The loss of DreamBooth: how far the UNet's answer is from the noise, or the velocity, that was put in.
//!
//! As diffusers' `train_dreambooth_lora_sdxl.py`: the mean over the person's samples, and the mean over the class
//! images' times λ (prior preservation, arXiv 2208.12242, eq. 2). With min-SNR γ (arXiv 2303.09556) the person's
//! samples are weighted by min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v, as the paper and diffusers'
//! `train_text_to_image_lora_sdxl.py` have it; class images are not.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};

use crate::diffusion::schedule::NoiseSchedule;
use crate::recipes::dreambooth::targets::{Networks, TrainableLora};
use crate::sdxl::text::TextConditioning;
use crate::sdxl::unet::UNetInput;
use crate::train::gradients::Gradients;

/// How samples are weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// γ of min-SNR; 0 for none.
    pub min_snr_gamma: f64,
    /// λ, the weight of the class images.
    pub prior_weight: f64,
}

impl Default for Objective {
    fn default() -> Self {
        Self { min_snr_gamma: 0.0, prior_weight: 1.0 }
    }
}

/// The text conditioning of the captions.
#[derive(Clone, Debug)]
pub enum Captions {
    /// Output of frozen text encoders.
    Encoded(TextConditioning),
    /// Token numbers of both tokenizers, (n, N) each, for text encoders that train.
    Tokens(Tensor, Tensor),
}

/// Samples of one person's LoRA in one forward pass: the person's samples, then the class images.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Clean latents, (n, C, h, w).
    pub x0: Tensor,
    /// Noise, (n, C, h, w).
    pub eps: Tensor,
    /// One a sample.
    pub timesteps: Vec<usize>,
    /// Captions.
    pub captions: Captions,
    /// Sizes and crops, (n, 6).
    pub time_ids: Tensor,
    /// How many of the samples, at the end, are class images.
    pub class_images: usize,
    /// Factor on the loss whose gradient is taken, against underflow in 16 bits.
    pub scale: f64,
}

/// The losses of a forward pass.
pub struct Losses {
    /// Σ scale · loss over the people, with its graph.
    pub total: Tensor,
    /// The loss of each.
    pub each: Vec<f64>,
}

/// The losses of the people whose batches are given; `networks` has their adapters attached in the same order.
/// All batches hold equally many samples of one shape.
pub fn losses(
    networks: &Networks,
    schedule: &NoiseSchedule,
    objective: &Objective,
    batches: &[Batch],
) -> Result<Losses> {
    let first = batches.first().context("a forward pass needs samples")?;
    let n = first.timesteps.len();
    ensure!(
        batches.iter().all(|batch| batch.timesteps.len() == n && batch.x0.dims() == first.x0.dims()),
        "people who share a forward pass need equally many samples of one size"
    );
    let joined = |part: fn(&Batch) -> &Tensor| -> Result<Tensor> {
        let parts: Vec<&Tensor> = batches.iter().map(part).collect();
        Ok(if let [one] = parts[..] { one.clone() } else { Tensor::cat(&parts, 0)? })
    };
    let (x0, eps) = (joined(|batch| &batch.x0)?, joined(|batch| &batch.eps)?);
    let t: Vec<usize> = batches.iter().flat_map(|batch| batch.timesteps.iter().copied()).collect();
    let x_t = schedule.add_noise(&x0, &eps, &t)?;
    let target = schedule.target(&x0, &eps, &t)?;
    let text = conditioning(networks, batches)?;
    let times: Vec<f32> = t.iter().map(|&t| t as f32).collect();
    let times = Tensor::from_vec(times, t.len(), x0.device())?;

    let dtype = networks.unet.compute_dtype();
    let out = networks
        .unet
        .forward(&UNetInput {
            latents: &x_t.to_dtype(dtype)?,
            timesteps: &times,
            context: &text.context.to_dtype(dtype)?,
            pooled: &text.pooled.to_dtype(dtype)?,
            time_ids: &joined(|batch| &batch.time_ids)?,
            guidance_scale: None,
        })?
        .to_dtype(DType::F32)?;
    let errors = (out - target)?.sqr()?.flatten_from(1)?.mean(1)?; // (K · n)
    let weights =
        batches.iter().map(|batch| weights(schedule, objective, batch)).collect::<Result<Vec<_>>>()?;
    let weighted = (errors * Tensor::from_vec(weights.concat(), t.len(), x0.device())?)?;
    let each = weighted.reshape((batches.len(), n))?.sum(1)?; // (K)
    let scales: Vec<f32> = batches.iter().map(|batch| batch.scale as f32).collect();
    let total = (&each * Tensor::from_vec(scales, batches.len(), x0.device())?)?.sum_all()?;
    Ok(Losses { total, each: each.to_vec1::<f32>()?.into_iter().map(f64::from).collect() })
}

/// One person's gradients by the name of the variable, and the loss.
pub type PersonGradients = (Gradients, f64);

/// Gradients and losses of `loras`, each the mean over `passes` forward passes; `batches(pass)` gives their batches in
/// the same order. Gradients are those of the scaled losses.
pub fn gradients(
    networks: &Networks,
    schedule: &NoiseSchedule,
    objective: &Objective,
    loras: &[&TrainableLora],
    passes: u64,
    batches: impl Fn(u64) -> Result<Vec<Batch>>,
) -> Result<Vec<PersonGradients>> {
    let mut each: Vec<PersonGradients> = loras.iter().map(|_| Default::default()).collect();
    for pass in 0..passes {
        let mut networks = networks.clone();
        networks.attach(loras)?;
        let losses = losses(&networks, schedule, objective, &batches(pass)?)?;
        let mut store = losses.total.backward()?;
        for ((lora, (sum, loss)), own) in loras.iter().zip(&mut each).zip(losses.each) {
            *loss += own / passes as f64;
            for (name, var) in lora.vars() {
                let Some(gradient) = store.remove(var) else { continue };
                let gradient = gradient.detach();
                let gradient = if passes == 1 { gradient } else { (gradient / passes as f64)? };
                let gradient = match sum.remove(name) {
                    Some(before) => (before + gradient)?,
                    None => gradient,
                };
                sum.insert(name.clone(), gradient);
            }
        }
    }
    Ok(each)
}

/// Text conditioning of all captions.
fn conditioning(networks: &Networks, batches: &[Batch]) -> Result<TextConditioning> {
    let mut encoded = (Vec::new(), Vec::new());
    let mut tokens = (Vec::new(), Vec::new());
    for batch in batches {
        match &batch.captions {
            Captions::Encoded(text) => {
                encoded.0.push(&text.context);
                encoded.1.push(&text.pooled);
            }
            Captions::Tokens(one, two) => {
                tokens.0.push(one);
                tokens.1.push(two);
            }
        }
    }
    if tokens.0.is_empty() {
        return Ok(TextConditioning {
            context: Tensor::cat(&encoded.0, 0)?,
            pooled: Tensor::cat(&encoded.1, 0)?,
        });
    }
    ensure!(encoded.0.is_empty(), "text encoders train for all people of a forward pass or for none");
    let text = networks.text.as_ref().context("captions are tokens, but no text encoder trains")?;
    text.encode_ids(&Tensor::cat(&tokens.0, 0)?, &Tensor::cat(&tokens.1, 0)?)
}

/// The weight of each sample's mean squared error.
fn weights(schedule: &NoiseSchedule, objective: &Objective, batch: &Batch) -> Result<Vec<f32>> {
    let own = batch.timesteps.len() - batch.class_images;
    let mut weights = vec![1.0 / own as f64; own];
    if objective.min_snr_gamma > 0.0 {
        let by_snr = schedule.min_snr_weights(&batch.timesteps[..own], objective.min_snr_gamma)?;
        weights.iter_mut().zip(by_snr).for_each(|(weight, factor)| *weight *= factor);
    }
    weights.resize(batch.timesteps.len(), objective.prior_weight / batch.class_images.max(1) as f64);
    Ok(weights.into_iter().map(|weight| weight as f32).collect())
}
