//! The image encoder, trained by contrast: for P people with two images each in different scenes,
//!
//! ```text
//! loss = ½ (CE(s·A·Bᵀ) + CE(s·B·Aᵀ)),   A, B unit rows (P, D),   s = e^`logit_scale`, learned
//! ```
//!
//! as CLIP contrasts images and texts (arXiv 2103.00020, figure 3). The images are squares around the face, as
//! [`portrait_crop`](crate::identity::portrait_crop) cuts them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::Init;
use rand::Rng;
use rand_distr::StandardNormal;
use serde_json::{Value, json};

use crate::identity::clip::{ClipPreprocessor, ClipVision, ClipVisionConfig, ImageEncoder};
use crate::identity::crop::{MARGIN, square_around};
use crate::identity::{FaceEncoder, cosine};
use crate::image::Image;
use crate::limits::require_memory;
use crate::progress;
use crate::recipes::encoder::config::{HELD_OUT, Recipe, paint, soften};
use crate::recipes::encoder::randomise::randomise;
use crate::synthetic::Person;
use crate::threads::in_threads;
use crate::train;
use crate::train::gradients::{Figure, Loss};
use crate::train::trainer::{self, Outcome, RunOptions};
use crate::weights::Trainable;
use crate::weights::model_folder::{ModelFiles, TRANSFORMERS_WEIGHTS, save_component, save_json};

/// Trains the encoder on `device`, writes it to `out` and measures it on held-out people on the CPU.
pub fn train(
    recipe: &Recipe<ClipVisionConfig>,
    run_options: &RunOptions,
    out: &Path,
    device: &Device,
) -> Result<(Outcome, Value)> {
    let trainable = Trainable::new(recipe.seed);
    let vb = trainable.builder(device);
    let network = trainable.checked(ClipVision::new(&recipe.model, vb.clone()))?;
    let (side, patch) = (recipe.model.image_size, recipe.model.patch_size.max(1));
    let tokens = (side / patch) * (side / patch) + 1;
    let width = recipe.model.hidden_size + recipe.model.num_attention_heads * tokens;
    for factors in [&[recipe.plan.batch, side, side, 3, 4], &[recipe.plan.batch, tokens, width, 4, 1]] {
        require_memory("the images of a step", factors, "`batch` or `image_size`")?;
    }
    let scale = vb.get_with_hints(1, SCALE, Init::Const((1.0f64 / 0.07).ln()))?;
    let preprocessor = ClipPreprocessor::sized(recipe.model.image_size);

    let (shards, samples) = (recipe.plan.shards as u64, recipe.plan.samples_a_shard()?);
    anyhow::ensure!(samples.is_multiple_of(2), "a shard of {samples} images is no two images a person");
    let people = samples as u64 / 2;
    let loss = |step: u64, shard: usize| {
        let number = step * shards + shard as u64;
        let mut rng = train::rng(recipe.seed, number);
        let mut pixels = Vec::with_capacity(samples);
        for image in 0..2 {
            for person in number * people..(number + 1) * people {
                let person = Person::new(recipe.seed, person);
                let square = training_image(recipe, &person, image, &mut rng);
                pixels.push(preprocessor.apply(&square, &Device::Cpu)?);
            }
        }
        contrast(&network.forward(&Tensor::stack(&pixels, 0)?.to_device(device)?)?, &scale)
    };
    let (end, ema) = trainer::run(&recipe.plan, recipe, run_options, &trainable.vars(), loss, |_, _| Ok(()))?;
    if end != Outcome::Finished {
        return Ok((end, Value::Null));
    }
    let weights: BTreeMap<String, Tensor> = ema
        .averages()
        .iter()
        .filter(|(name, _)| *name != SCALE)
        .map(|(n, t)| (n.clone(), t.clone()))
        .collect();
    save_component(out, "", TRANSFORMERS_WEIGHTS, &recipe.model.to_json(), &weights, DType::F16)?;
    save_json(&out.join("preprocessor_config.json"), &json!(preprocessor))?;
    Ok((end, measure(&ImageEncoder::open(&ModelFiles::folder(out)?)?, recipe)?))
}

/// The logarithm of the inverse temperature; it is of no use after the training.
const SCALE: &str = "logit_scale";

/// `embeddings` (2·P, D), first images before second ones, and the logarithm of the scale (1).
fn contrast(embeddings: &Tensor, scale: &Tensor) -> Result<Loss> {
    let people = embeddings.dim(0)? / 2;
    let length = embeddings.sqr()?.sum_keepdim(D::Minus1)?.affine(1.0, 1e-12)?.sqrt()?;
    let unit = embeddings.broadcast_div(&length)?;
    let logits = unit.narrow(0, 0, people)?.matmul(&unit.narrow(0, people, people)?.t()?)?;
    let logits = logits.broadcast_mul(&scale.exp()?)?; // (P, P)
    let same = Tensor::arange(0, people as u32, logits.device())?;
    let value = ((candle_nn::loss::cross_entropy(&logits, &same)?
        + candle_nn::loss::cross_entropy(&logits.t()?.contiguous()?, &same)?)?
        * 0.5)?;
    let found = logits.argmax(1)?.eq(&same)?.to_dtype(DType::F32)?.mean_all()?;
    let parts = vec![("found", Figure::from(&found)), ("scale", Figure::from(&scale.exp()?.squeeze(0)?))];
    Ok(Loss { value, parts })
}

/// `person` in a scene of their own, cropped about where the detector would find the face.
fn training_image(
    recipe: &Recipe<ClipVisionConfig>,
    person: &Person,
    image: u64,
    rng: &mut impl Rng,
) -> Image {
    let size = recipe.model.image_size;
    let scene = recipe.world.scene(person, image);
    let painted = randomise(soften(paint(person, &scene, size), rng), recipe.randomise, rng);
    // YuNet's boxes on 239 painted portraits, in half frames: the middle lies 0.12·yaw ± 0.02 right and
    // 0.135 ± 0.048 below the head's place, the longer side is 1.43 ± 0.10; all by the scale of the head.
    let mut normal = || rng.sample::<f32, _>(StandardNormal);
    let x = scene.shift[0] + scene.scale * (0.12 * scene.yaw + 0.02 * normal());
    let y = scene.shift[1] + scene.scale * (0.135 + 0.048 * normal());
    let side = scene.scale * (1.43 + 0.10 * normal());
    let half = size as f32 / 2.0;
    square_around(&painted, [(x + 1.0) * half, (y + 1.0) * half], MARGIN * side * half, size)
}

/// People for the measurement.
const HELD_OUT_PEOPLE: u64 = 100;

/// How well held-out people are found again: embeds two images of each, cut out where the detector finds the face.
fn measure(encoder: &ImageEncoder, recipe: &Recipe<ClipVisionConfig>) -> Result<Value> {
    let faces = FaceEncoder::builtin()?;
    let bar = progress::bar(HELD_OUT_PEOPLE, "measuring");
    let found = in_threads(HELD_OUT_PEOPLE as usize, |number| {
        progress::check()?;
        let person = Person::new(recipe.seed, HELD_OUT + number as u64);
        let embed = |image: u64| -> Result<Option<Vec<f32>>> {
            let image = paint(&person, &recipe.world.scene(&person, image), recipe.model.image_size);
            let face = faces.detect(&image)?.into_iter().next();
            face.map(|face| encoder.embed(&image, &face)).transpose()
        };
        let pair = embed(0)?.zip(embed(1)?);
        bar.inc(1);
        Ok(pair)
    })?;
    bar.finish_and_clear();
    let pairs: Vec<_> = found.into_iter().flatten().collect();
    let (mut same, mut different, mut first) = (Vec::new(), Vec::new(), 0);
    for (i, (one, _)) in pairs.iter().enumerate() {
        let near: Vec<f32> = pairs.iter().map(|(_, other)| cosine(one, other)).collect();
        first += usize::from(near.iter().all(|other| *other <= near[i]));
        same.push(near[i]);
        different.extend(near.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, other)| *other));
    }
    anyhow::ensure!(pairs.len() > 1, "the detector found next to no face in painted images");
    let top = first as f64 / pairs.len() as f64;
    let area = area(&same, &mut different);
    let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
    let (same, different) = (mean(&same), mean(&different));
    progress::note(format_args!(
        "of {} held-out people {:.0} % are found again among all; same or different: area {area:.3}, cosine {same:.2} \
         against {different:.2}",
        pairs.len(),
        100.0 * top
    ));
    Ok(json!({ "people": pairs.len(), "top1": top, "auc": area, "same": same, "different": different }))
}

/// Area under the receiver's curve: how often a value of `same` is above one of `different`.
fn area(same: &[f32], different: &mut [f32]) -> f64 {
    different.sort_by(f32::total_cmp);
    let below: usize = same.iter().map(|value| different.partition_point(|other| other < value)).sum();
    below as f64 / (same.len() * different.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_who_lie_together_cost_nothing_and_mixed_up_ones_much() -> Result<()> {
        let cost = |rows: [[f32; 3]; 4]| -> Result<f32> {
            let embeddings = Tensor::new(&rows, &Device::Cpu)?;
            Ok(contrast(&embeddings, &Tensor::new(&[3f32], &Device::Cpu)?)?.value.to_scalar()?)
        };
        let (a, b) = ([2.0, 0.0, 0.0], [0.0, 0.5, 0.0]);
        assert!(cost([a, b, a, b])? < 1e-6);
        assert!((cost([a, b, b, a])? - 3f32.exp()).abs() < 1e-3);
        assert!(
            (cost([a, a, a, a])? - 2f32.ln()).abs() < 1e-4,
            "of a guess: the logarithm of the number of people"
        );
        Ok(())
    }

    #[test]
    fn the_area_is_one_for_apart_and_a_half_for_alike() {
        assert_eq!(area(&[0.9, 0.8], &mut [0.1, 0.3, 0.2]), 1.0);
        assert_eq!(area(&[0.25], &mut [0.1, 0.3, 0.2, 0.4]), 0.5);
    }
}
