//! `difflora train-encoder`: the two small networks that look at portraits of the small world.

mod image;
mod judge;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::Common;
use crate::dataset::{self, Person, Scene};
use crate::failure::Failure;
use crate::identity::clip::{ClipPreprocessor, ClipVisionConfig};
use crate::model_files::{TRANSFORMERS_WEIGHTS, save_component, save_json};
use crate::picture::{Filter, Picture};
use crate::progress;
use crate::train::run::{End, Keeping, Plan};

/// Arguments of `difflora train-encoder`.
///
/// Learns from portraits that are painted on the way; nothing is read but the settings. OUT becomes a folder as
/// transformers writes it (CLIPVisionModelWithProjection); checkpoint and log go to OUT/training.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which network.
    #[arg(long, value_enum, env = "DIFFLORA_KIND")]
    kind: Kind,
    /// Folder for the network; made where it is missing.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: PathBuf,
    /// Sizes and recipe, as in configs/encoder-tiny.toml.
    #[arg(long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    config: PathBuf,
    /// Go on from the last checkpoint of the same settings.
    #[arg(long, env = "DIFFLORA_RESUME")]
    resume: bool,
    /// Steps to train, instead of the number in the settings.
    #[arg(long, value_name = "N", env = "DIFFLORA_STEPS")]
    steps: Option<u64>,
    /// Stop after so many minutes with a checkpoint; --resume goes on.
    #[arg(long, value_name = "MINUTES", env = "DIFFLORA_MINUTES")]
    minutes: Option<f64>,
}

/// The networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// The image encoder: pictures of one person lie together, whatever the scene.
    Image,
    /// The judge: names what a picture shows; for evaluation only.
    Judge,
}

/// The file given by `--config`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    image: Recipe,
    judge: Recipe,
}

/// How one of them is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    /// Of weights, people and scenes; no other training may use it for its people.
    seed: u64,
    /// `config.json`; for the judge `projection_dim` follows from what it is asked.
    model: ClipVisionConfig,
    /// Steps, batch, rate.
    plan: Plan,
}

/// Trains the network that was asked for.
pub fn run(args: Args, common: &Common) -> Result<()> {
    let text =
        std::fs::read_to_string(&args.config).map_err(|error| Failure::unusable(&args.config, error))?;
    let settings: Settings = toml::from_str(&text).map_err(|error| Failure::unusable(&args.config, error))?;
    let training = args.out.join("training");
    std::fs::create_dir_all(&training)
        .with_context(|| format!("cannot make the folder `{}`", training.display()))?;
    let (name, mut recipe) = match args.kind {
        Kind::Image => ("image", settings.image),
        Kind::Judge => ("judge", settings.judge),
    };
    recipe.plan.steps = args.steps.unwrap_or(recipe.plan.steps);
    let keeping = Keeping {
        folder: &training,
        name,
        resume: args.resume,
        deadline: args.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes)),
        save_every: Duration::from_secs(120),
    };
    let (end, figures) = match args.kind {
        Kind::Image => image::train(&recipe, &keeping, &args.out)?,
        Kind::Judge => judge::train(&recipe, &keeping, &args.out)?,
    };
    if let End::Paused { step } = end {
        progress::note(format_args!("{name} stops at step {step}; --resume goes on"));
    }
    if common.json {
        println!("{}", json!({ "kind": name, "finished": end == End::Finished, "figures": figures }));
    }
    Ok(())
}

/// Number of the first person who is kept out of the training.
const HELD_OUT: u64 = 1 << 40;

/// Paints somebody as the trainings see them, one point a pixel, with the grain of the scene.
fn paint(person: &Person, scene: &Scene, size: usize) -> Picture {
    Picture { width: size, height: size, rgb: dataset::paint(person, scene, size, 1) }
}

/// Half of the pictures lose some sharpness: drawn portraits, and photos that were scaled, are softer than painted
/// ones.
fn soften(picture: Picture, rng: &mut impl Rng) -> Picture {
    let side = picture.width;
    if rng.random_bool(0.5) {
        return picture;
    }
    let small = rng.random_range(side / 2..side);
    picture.resize(small, small, Filter::Bicubic).resize(side, side, Filter::Bicubic)
}

/// Writes the folder: `config.json`, `model.safetensors` with 16-bit floats, `preprocessor_config.json`.
fn save(
    out: &Path,
    config: &Value,
    preprocessor: &ClipPreprocessor,
    weights: &BTreeMap<String, Tensor>,
) -> Result<()> {
    save_component(out, "", TRANSFORMERS_WEIGHTS, config, weights, DType::F16)?;
    save_json(&out.join("preprocessor_config.json"), &json!(preprocessor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::judge::{Judge, Record, outputs};
    use crate::identity::Face;
    use crate::identity::clip::{ClipVision, ImageEncoder};
    use crate::model_files::ModelFiles;
    use crate::weights::Trainable;

    /// A network of one narrow layer with random weights, written as a training writes it.
    fn written(out: &Path, more: Value) {
        let model = ClipVisionConfig {
            image_size: 16,
            patch_size: 8,
            hidden_size: 8,
            intermediate_size: 8,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            projection_dim: outputs(),
            ..ClipVisionConfig::default()
        };
        let trainable = Trainable::new(5);
        ClipVision::new(&model, trainable.builder(&candle_core::Device::Cpu)).unwrap();
        let weights =
            trainable.vars().into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
        let mut config = model.to_json();
        config["judge"] = more;
        save(out, &config, &ClipPreprocessor::sized(16), &weights).unwrap();
    }

    #[test]
    fn what_is_written_opens_as_encoder_and_as_judge() {
        let out = tempfile::tempdir().unwrap();
        let record = Record { people: 3, attributes: Vec::new(), factors: Vec::new() };
        written(out.path(), json!(record));
        let files = ModelFiles::folder(out.path()).unwrap();
        let painted = paint(&Person::new(5, 1), &Scene::draw(5, 1), 32);

        let face = Face { bounds: [8.0, 6.0, 24.0, 28.0], points: [[0.0; 2]; 5], score: 1.0 };
        let embedding = ImageEncoder::open(&files).unwrap().embed(&painted, &face).unwrap();
        assert_eq!(embedding.len(), outputs());
        assert!((embedding.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);

        let judge = Judge::open(&files).unwrap();
        assert_eq!(judge.record(), &record);
        let pictures = vec![painted; 65];
        let classes = judge.classes(&pictures).unwrap();
        assert_eq!(classes.len(), 65);
        assert_eq!(classes[0], classes[64]);
        assert!(judge.factors(&pictures).unwrap().iter().flatten().all(|factor| factor.is_finite()));
    }

    #[test]
    fn an_encoder_that_is_no_judge_is_refused() {
        let out = tempfile::tempdir().unwrap();
        written(out.path(), Value::Null);
        let error = Judge::open(&ModelFiles::folder(out.path()).unwrap()).unwrap_err();
        assert!(format!("{error:#}").contains("config.json"), "{error:#}");
    }

    #[test]
    fn the_settings_in_the_repository_are_read() {
        let settings: Settings = toml::from_str(include_str!("../../configs/encoder-tiny.toml")).unwrap();
        for recipe in [settings.image, settings.judge] {
            recipe.plan.samples_a_shard().unwrap();
        }
    }
}
