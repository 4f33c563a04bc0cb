//! The attribute classifier, trained on painted images: cross entropy for each attribute, squared error for each factor
//! of the person.

use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;
use serde_json::{Value, json};

use crate::image::Image;
use crate::limits::require_memory;
use crate::progress;
use crate::recipes::encoder::config::{HELD_OUT, Recipe, paint, soften};
use crate::synthetic::attribute_classifier::{self, Config, Network, NetworkConfig, Record, Truth};
use crate::synthetic::{Identity, Person, World};
use crate::threads::in_threads;
use crate::train;
use crate::train::gradients::{Figure, Loss};
use crate::train::trainer::{self, Outcome, RunOptions};
use crate::weights::Trainable;
use crate::weights::model_folder::{ModelFiles, TRANSFORMERS_WEIGHTS, save_component};

/// Trains the classifier on `device`, measures it on held-out people on the CPU and writes it to `out`.
pub fn train(
    recipe: &Recipe<NetworkConfig>,
    run_options: &RunOptions,
    out: &Path,
    device: &Device,
) -> Result<(Outcome, Value)> {
    let model = &recipe.model;
    let trainable = Trainable::new(recipe.seed);
    let network = trainable.checked(Network::new(model, trainable.builder(device)))?;
    let side = model.image_size;
    let channels = 3 + model.channels.first().copied().unwrap_or(0);
    let factors = [recipe.plan.batch, side, side, channels, 4];
    require_memory("the images of a step", &factors, "`batch` or `image_size`")?;

    let (shards, samples) = (recipe.plan.shards as u64, recipe.plan.samples_a_shard()?);
    let loss = |step: u64, shard: usize| {
        let number = step * shards + shard as u64;
        let mut rng = train::rng(recipe.seed, number);
        let (mut images, mut truth) = (Vec::with_capacity(samples), Vec::with_capacity(samples));
        for person in number * samples as u64..(number + 1) * samples as u64 {
            let (image, right) = sample(model, recipe.seed, person);
            images.push(grain(soften(image, &mut rng), &mut rng));
            truth.push(right);
        }
        let pixels = attribute_classifier::pixels(&images, model.image_size)?.to_device(device)?;
        error(model.world, &network.forward(&pixels)?, &truth)
    };
    let (end, ema) = trainer::run(&recipe.plan, recipe, run_options, &trainable.vars(), loss, |_, _| Ok(()))?;
    if end != Outcome::Finished {
        return Ok((end, Value::Null));
    }
    let write = |config: Value| {
        save_component(out, "", TRANSFORMERS_WEIGHTS, &config, ema.averages(), candle_core::DType::F16)
    };
    // Measured as it will be opened, with weights of 16 bits.
    write(json!(model))?;
    let record = measure(out, model, recipe.seed)?;
    write(json!(Config { network: model.clone(), judge: record.clone() }))?;
    Ok((end, json!(record)))
}

/// Person `number` in a scene, and what is to be seen.
fn sample(model: &NetworkConfig, seed: u64, number: u64) -> (Image, Truth) {
    let person = Person::new(seed, number);
    let scene = model.world.scene(&person, 0);
    let labels = model.world.labels(&person, &scene);
    (paint(&person, &scene, model.image_size), (labels, person.identity.to_array()))
}

/// A little noise on half of the images, as codecs leave it.
fn grain(mut image: Image, rng: &mut impl Rng) -> Image {
    if rng.random_bool(0.5) {
        let deviation = rng.random_range(0.0..6.0f32);
        for byte in &mut image.rgb {
            *byte = (f32::from(*byte) + deviation * rng.sample::<f32, _>(StandardNormal)).round() as u8;
        }
    }
    image
}

/// `outputs` (B, [`attribute_classifier::outputs`]) against what is to be seen: mean cross entropy of the attributes plus twice the
/// mean squared error of the factors, so that both parts start at about the same height.
fn error(world: World, outputs: &Tensor, truth: &[Truth]) -> Result<Loss> {
    let device = outputs.device();
    let mut entropy = outputs.narrow(0, 0, 1)?.sum_all()?.zeros_like()?;
    let ranges = attribute_classifier::class_outputs(world);
    let count = ranges.len();
    for (i, range) in ranges.into_iter().enumerate() {
        let right: Vec<u32> = truth.iter().map(|(classes, _)| classes[i] as u32).collect();
        let logits = outputs.narrow(1, range.start, range.len())?;
        entropy = (entropy + candle_nn::loss::cross_entropy(&logits, &Tensor::new(right, device)?)?)?;
    }
    let entropy = (entropy / count as f64)?;
    let range = attribute_classifier::factor_outputs(world);
    let right: Vec<f32> =
        truth.iter().flat_map(|(_, factors)| factors.map(attribute_classifier::scaled)).collect();
    let right = Tensor::from_vec(right, (truth.len(), range.len()), device)?;
    let squares = (outputs.narrow(1, range.start, range.len())? - right)?.sqr()?.mean_all()?;
    let parts = vec![("entropy", Figure::from(&entropy)), ("squares", Figure::from(&squares))];
    Ok(Loss { value: (entropy + (squares * 2.0)?)?, parts })
}

/// People for the measurement.
const HELD_OUT_PEOPLE: u64 = 2000;

fn measure(out: &Path, model: &NetworkConfig, seed: u64) -> Result<Record> {
    let build = |vb| Network::new(model, vb);
    let files = ModelFiles::folder(out)?;
    let network = files.load("", TRANSFORMERS_WEIGHTS, candle_core::DType::F32, &Device::Cpu, build)?;
    const TOGETHER: u64 = 50;
    let parts = in_threads((HELD_OUT_PEOPLE / TOGETHER) as usize, |part| {
        progress::check()?;
        let (mut images, mut truth) = (Vec::new(), Vec::new());
        for number in (0..TOGETHER).map(|i| HELD_OUT + part as u64 * TOGETHER + i) {
            let (image, right) = sample(model, seed, number);
            images.push(image);
            truth.push(right);
        }
        Ok((
            network.forward(&attribute_classifier::pixels(&images, model.image_size)?)?.to_vec2::<f32>()?,
            truth,
        ))
    })?;
    let (rows, truth): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let record = Record::measure(model.world, &rows.concat(), &truth.concat());
    let accuracies = record.attributes.iter().map(|a| format!("{} {:.1} %", a.name, 100.0 * a.accuracy));
    let seen = record.factors.iter().filter(|factor| factor.r2 > 0.2).count();
    progress::note(format_args!(
        "on {HELD_OUT_PEOPLE} held-out people the classifier names {}; {seen} of {} factors with R² above 0.2",
        accuracies.collect::<Vec<_>>().join(", "),
        Identity::COUNT
    ));
    Ok(record)
}
