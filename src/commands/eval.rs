//! `difflora eval`: does a generated LoRA draw the person? Held-out people, drawn in several ways from the same
//! noise, before judges that no training has seen.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;

use crate::dataset::manifest::{Header, ImageSettings, Row, read_manifest};
use crate::device;
use crate::diffusion::noise;
use crate::eval::metrics::{Attributes, Figures, Obedience, Seen, Target, asked, measure, obedience, paired};
use crate::eval::tables::{interval, obeyed, plain, table};
use crate::failure::Failure;
use crate::files;
use crate::hypernet::{Hypernet, SampleOptions};
use crate::identity::clip::ImageEncoder;
use crate::identity::{self, FaceEncoder, Identity, cosine};
use crate::image::{Image, contact_sheet};
use crate::lora::Lora;
use crate::lora::adapter::AdapterFile;
use crate::lora::apply::{Originals, Unmatched, merge};
use crate::lora::block_weights::BlockWeights;
use crate::lora::file;
use crate::lora::ldm_keys::BlockLayout;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::recipes::dreambooth::functional_loss::{Refinement, learning_rate, refine};
use crate::registry;
use crate::sdxl::pipeline::{GenerationParams, Sampler, Sdxl, Step, Tiling};
use crate::sdxl::text::TextConditioning;
use crate::statistics::Mean;
use crate::synthetic::attribute_classifier::{AttributeClassifier, Record};
use crate::synthetic::scenes::{paint_image, reference_scene};
use crate::synthetic::{CaptionOptions, Colour, Expression, Glasses, Hat, Person, Scene, Style, caption};
use crate::threads::in_threads_or_turn;
use crate::weights::model_id::ModelId;

/// Arguments of `difflora eval`.
///
/// Generates images of held-out people with no LoRA, the mean LoRA, the hypernetwork's LoRA from one photo and from
/// another person's photo, the LoRA of the nearest training person, the person's own DreamBooth LoRA, and that LoRA
/// through the autoencoder; all from the same noise and prompts. SFace, which took part in no training, measures the
/// similarity to other photos of the person.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset folder of `build-dataset`.
    #[arg(
        help_heading = "Input",
        long,
        value_name = "DIR",
        required_unless_present = "base_only",
        env = "DIFFLORA_DATASET"
    )]
    dataset: Option<PathBuf>,
    /// Hypernetwork: tiny (built in), a folder, or a hub repository.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR|REPO", default_value = registry::BUILT_IN, env = "DIFFLORA_HYPERNET")]
    hypernet: String,
    /// Base model of the LoRAs.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    base: String,
    #[command(flatten)]
    base_options: registry::BaseOptions,
    /// CLIP image encoder.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_IMAGE_ENCODER")]
    image_encoder: String,
    /// Attribute classifier, which measures prompt accuracy and factors [default: the built-in one].
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", env = "DIFFLORA_JUDGE")]
    judge: Option<String>,
    /// Maximum number of held-out people [default: all].
    #[arg(help_heading = "Input", long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), env = "DIFFLORA_PEOPLE")]
    people: Option<u64>,
    /// Images per person and method; four prompts alternate.
    #[arg(help_heading = "Sampling", long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64), alias = "pictures", env = "DIFFLORA_IMAGES")]
    images: u64,
    /// Number of sampling steps.
    #[arg(help_heading = "Sampling", long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000), env = "DIFFLORA_STEPS")]
    steps: u64,
    /// Classifier-free guidance scale; 1 or less disables guidance.
    #[arg(
        help_heading = "Sampling",
        long,
        value_name = "X",
        default_value_t = 3.0,
        env = "DIFFLORA_GUIDANCE"
    )]
    guidance: f64,
    /// Sampling method.
    #[arg(help_heading = "Sampling", long, value_enum, default_value_t = Sampler::Euler, env = "DIFFLORA_SAMPLER")]
    sampler: Sampler,
    /// Latents to sample and average per person.
    #[arg(help_heading = "Identity", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000), env = "DIFFLORA_SAMPLES")]
    samples: u64,
    /// Factor on the generated latent: distance from the mean LoRA.
    #[arg(
        help_heading = "Identity",
        long,
        value_name = "X",
        default_value_t = 1.0,
        env = "DIFFLORA_STRENGTH"
    )]
    strength: f64,
    /// Evaluate the generated LoRA after this many fine-tuning steps on the photo as well, as `gen --refine`.
    #[arg(help_heading = "Identity", long, value_name = "STEPS", value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_REFINE")]
    refine: Option<u32>,
    /// Learning rate of --refine.
    #[arg(help_heading = "Identity", long, value_name = "F", default_value_t = 1e-3, requires = "refine", value_parser = learning_rate, env = "DIFFLORA_REFINE_RATE")]
    refine_rate: f64,
    /// Seed of all noise.
    #[arg(help_heading = "Sampling", long, default_value_t = 0, env = "DIFFLORA_SEED")]
    seed: u64,
    /// Device to compute on; `auto` is the GPU in builds with CUDA, else the CPU.
    #[arg(
        help_heading = "Advanced",
        long,
        value_name = "auto|cpu|cuda[:N]|metal",
        default_value = "auto",
        env = "DIFFLORA_DEVICE"
    )]
    device: String,
    /// Folder for table.json, table.md and sheet.png, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: Option<PathBuf>,
    /// Evaluate only the base model, on N images (100) from random captions.
    #[arg(help_heading = "Input", long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "100", value_parser = clap::value_parser!(u64).range(1..=100_000), env = "DIFFLORA_BASE_ONLY")]
    base_only: Option<u64>,
}

/// Evaluates a hypernetwork, or a base model alone.
pub fn run(args: Args, output: &Output) -> Result<()> {
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out)
            .with_context(|| format!("cannot make the folder `{}`", out.display()))?;
        files::check_writable(&out.join("table.json"))?;
    }
    let begin = Instant::now();
    let (mut report, text, sheet) = match (args.base_only, &args.dataset) {
        (Some(count), _) => judge_base(&args, count)?,
        (None, Some(dataset)) => judge_people(&args, dataset)?,
        (None, None) => return Err(Failure::Usage("eval needs --dataset, or --base-only".into()).into()),
    };
    report["seconds"] = json!(begin.elapsed().as_secs_f64().round());
    if let Some(out) = &args.out {
        files::write_whole(
            &out.join("table.json"),
            (serde_json::to_string_pretty(&report)? + "\n").as_bytes(),
        )?;
        files::write_whole(&out.join("table.md"), text.as_bytes())?;
        sheet.save(&out.join("sheet.png"), None)?;
    }
    if output.json {
        print_line!("{report}")?;
    } else {
        crate::output::print(format_args!("{text}"))?;
    }
    Ok(())
}

/// The report, its table, and the contact sheet.
type Findings = (serde_json::Value, String, Image);

/// One row of the table.
#[derive(Serialize)]
struct Method {
    method: &'static str,
    #[serde(skip)]
    title: &'static str,
    #[serde(flatten)]
    figures: Figures,
    /// Mean difference of the images to those with the own LoRA, in parts of the range of a pixel.
    pixels_from_own: Option<Mean>,
}

/// A paired difference in similarity.
#[derive(Serialize)]
struct Difference {
    of: &'static str,
    over: &'static str,
    similarity: Option<Mean>,
}

fn judge_people(args: &Args, dataset: &Path) -> Result<Findings> {
    let mut bench = Bench::open(args)?;
    let header: Header = Header::read(dataset)?;
    let hypernet_files = registry::find_hypernet(&args.hypernet, args.base_options.offline)?;
    let hypernet = Hypernet::open(&hypernet_files, bench.model.device())?;
    hypernet.codec.base.demand(&bench.base, "base model")?;
    let face_encoder = &hypernet.denoiser.config.face_encoder.name;
    if identity::catalog::is_known(face_encoder) {
        bench.faces = FaceEncoder::open(face_encoder)?;
    }
    if header.base.sha256 != bench.base.sha256 {
        let why = format!("its LoRAs are for the base `{}`, not for `{}`", header.base.name, bench.base.name);
        return Err(Failure::unusable(&dataset.join("dataset.json"), why));
    }
    let rows = read_manifest(dataset)?;
    let (held_out, known): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(|row| row.split == "held-out");
    let count = args.people.map_or(held_out.len(), |people| held_out.len().min(people as usize));
    if count < 2 {
        let why = format!("it has {} held-out people; two at least can be told apart", held_out.len());
        return Err(Failure::unusable(&dataset.join("manifest.jsonl"), why));
    }
    let known = Known::read(dataset, &known)?;
    let encoder_files = registry::find(&args.image_encoder, "image_encoder")?;
    let image_id = registry::identify(&encoder_files, &args.image_encoder, registry::ENCODER_WEIGHTS)?;
    hypernet.denoiser.config.image_encoder.demand(&image_id, "image encoder")?;
    let image_encoder = ImageEncoder::open(&encoder_files)?.with_input(hypernet.denoiser.config.image_input);
    let [_, (name, sha256)] = bench.faces.provenance();
    let face_id = ModelId { name: name.into(), sha256 };
    hypernet.denoiser.config.face_encoder.demand(&face_id, "face encoder")?;
    let ImageSettings { world, size, seed, references, .. } = ImageSettings::read(dataset)?;
    ensure!(
        references > 1,
        "`{}` has {references} reference images a person; one is the condition, so two are needed",
        dataset.display()
    );

    let prompts: Vec<Scene> = (0..args.images).map(prompt).collect();
    let words: Vec<String> = prompts.iter().map(say).collect();
    let stage = bench.stage(&prompts, &words, args)?;
    let options = SampleOptions {
        seed: args.seed,
        samples: args.samples as usize,
        strength: args.strength,
        ..hypernet.options()
    };

    // No LoRA and the mean LoRA know nobody, and the noise is the same for all: they are drawn once for all.
    let ways = 4 + u64::from(args.refine.is_some());
    let bar = progress::bar(ways * count as u64 + 2, "drawing");
    let draw = |lora: Option<&Lora>| -> Result<Drawn> {
        let drawn = bench.draw(&stage, lora)?;
        bar.inc(1);
        Ok(drawn)
    };
    let mean_lora = hypernet.codec.mean_lora()?;
    let common = in_threads_or_turn(bench.model.device(), 2, |i| draw([None, Some(&mean_lora)][i]))?;
    let sitters = in_threads_or_turn(bench.model.device(), count, |i| {
        let row = &held_out[i];
        let who = || format!("`{}`", row.id);
        let scenes = (0..references).map(|i| reference_scene(world, seed, i));
        let person = Person::new(row.person.0, row.person.1);
        let photos: Vec<Image> = scenes.map(|scene| paint_image(&person, &scene, size)).collect();
        let sitter = bench.sitter(&person, &photos, &image_encoder).with_context(who)?;
        let generated = hypernet.generate(&sitter.condition, &options).with_context(who)?;
        let own = bench.lora(&dataset.join(&row.lora))?;
        let nearest = match known.nearest(&sitter.condition.face) {
            Some(path) => Some(draw(Some(&bench.lora(&path)?)).with_context(who)?),
            None => None,
        };
        let refined = match args.refine {
            Some(steps) => {
                let how = Refinement {
                    steps,
                    rate: args.refine_rate,
                    seed: args.seed,
                    downs: !hypernet.codec.layout.shared_down,
                };
                let photo = std::slice::from_ref(&sitter.photo);
                let (lora, _) =
                    refine(&bench.model, &generated, photo, how, &ProgressBar::hidden()).with_context(who)?;
                Some(draw(Some(&lora)).with_context(who)?)
            }
            None => None,
        };
        let difflora = draw(Some(&generated)).with_context(who)?;
        let latent = hypernet.codec.encode(&hypernet.codec.vector(&own)?)?;
        let restored = draw(Some(&hypernet.codec.lora(&latent)?)).with_context(who)?;
        let own = draw(Some(&own)).with_context(who)?;
        Ok(Portrayed { difflora, refined, own, restored, nearest, sitter })
    })?;
    bar.finish_and_clear();

    let targets: Vec<Target> = sitters.iter().map(|portrayed| portrayed.sitter.target.clone()).collect();
    let asked: Vec<_> = prompts.iter().map(asked).collect();
    let visible = bench.visible();
    let own: Vec<&Drawn> = sitters.iter().map(|portrayed| &portrayed.own).collect();
    let method = |method, title, drawn: Vec<&Drawn>| {
        let seen: Vec<&[Seen]> = drawn.iter().map(|drawn| drawn.seen.as_slice()).collect();
        let apart: Vec<f64> = drawn.iter().zip(&own).map(|(drawn, own)| drawn.pixels_from(own)).collect();
        Method {
            method,
            title,
            figures: measure(&seen, &targets, &asked, &visible),
            pixels_from_own: Mean::of(&apart),
        }
    };
    let of = |pick: fn(&Portrayed) -> Option<&Drawn>| -> Option<Vec<&Drawn>> {
        sitters.iter().map(pick).collect()
    };
    let difflora: Vec<&Drawn> = sitters.iter().map(|portrayed| &portrayed.difflora).collect();
    // With the same noise for all, the LoRA made for somebody else draws what it drew for that person.
    let mut shuffled = difflora.clone();
    shuffled.rotate_left(1);
    let mut methods = vec![
        method("no-lora", "no LoRA", vec![&common[0]; count]),
        method("mean-lora", "mean LoRA", vec![&common[1]; count]),
        method("shuffled", "DiffLoRA, another's photo", shuffled),
    ];
    let nearest = of(|portrayed| portrayed.nearest.as_ref());
    methods.extend(nearest.map(|drawn| method("nearest", "nearest training LoRA", drawn)));
    methods.push(method("difflora", "DiffLoRA", difflora));
    let refined = of(|portrayed| portrayed.refined.as_ref());
    methods.extend(refined.map(|drawn| method("refined", "DiffLoRA, refined", drawn)));
    let restored = sitters.iter().map(|portrayed| &portrayed.restored).collect();
    methods.push(method("restored", "own LoRA through the autoencoder", restored));
    methods.push(method("own", "own DreamBooth LoRA", own.clone()));
    let photos: Vec<&[Seen]> =
        sitters.iter().map(|portrayed| std::slice::from_ref(&portrayed.sitter.photo_seen)).collect();
    let mut figures = measure(&photos, &targets, &asked, &visible);
    // It was not drawn from a prompt.
    figures.obedience.clear();
    methods.push(Method { method: "photo", title: "the photo itself", figures, pixels_from_own: None });

    let figures = |name: &str| methods.iter().find(|method| method.method == name);
    let differences: Vec<Difference> =
        ["no-lora", "mean-lora", "shuffled", "nearest", "refined", "restored", "own"]
            .into_iter()
            .filter_map(|over| {
                let (of, against) = (figures("difflora")?, figures(over)?);
                Some(Difference { of: "difflora", over, similarity: paired(&of.figures, &against.figures) })
            })
            .collect();
    let text = people_table(&methods, &differences, count, args, &words, &bench);
    let report = json!({
        "people": count,
        "pictures": args.images,
        "prompts": words,
        "drawing": { "steps": args.steps, "guidance": args.guidance, "seed": args.seed },
        "generating": { "steps": options.steps, "guidance": options.guidance, "samples": options.samples, "strength": options.strength },
        "refining": args.refine.map(|steps| json!({ "steps": steps, "rate": args.refine_rate })),
        "base": bench.base,
        "hypernet": args.hypernet,
        "recogniser": bench.recogniser_id(),
        "judge": bench.record(),
        "rank_1_by_chance": 1.0 / count as f64,
        "methods": methods,
        "differences": differences,
    });
    Ok((report, text, people_sheet(&sitters, &common[0])))
}

/// Detection rate of the base and what it makes of captions.
fn judge_base(args: &Args, count: u64) -> Result<Findings> {
    let bench = Bench::open(args)?;
    let scenes: Vec<Scene> = (0..count).map(|i| Scene::draw(args.seed, i)).collect();
    let words: Vec<String> = scenes
        .iter()
        .enumerate()
        .map(|(i, scene)| {
            // Zero to five words about who it is, as in training.
            let options = CaptionOptions { attributes: i % 6, ..CaptionOptions::default() };
            caption(&Person::new(args.seed, i as u64), scene, options, args.seed)
        })
        .collect();
    let bar = progress::bar(count, "drawing");
    let batches: Vec<usize> = (0..scenes.len()).step_by(BATCH).collect();
    let drawn = in_threads_or_turn(bench.model.device(), batches.len(), |batch| {
        let range = batches[batch]..scenes.len().min(batches[batch] + BATCH);
        let drawn = bench.draw(&bench.stage(&scenes[range.clone()], &words[range.clone()], args)?, None)?;
        bar.inc(range.len() as u64);
        Ok(drawn)
    })?;
    bar.finish_and_clear();

    let seen: Vec<&Seen> = drawn.iter().flat_map(|drawn| &drawn.seen).collect();
    let found = |wanted: &dyn Fn(&Scene) -> bool| {
        let hits = scenes.iter().zip(&seen).filter(|(scene, _)| wanted(scene));
        let hits: Vec<f64> = hits.map(|(_, seen)| f64::from(u8::from(seen.face.is_some()))).collect();
        Mean::of(&hits)
    };
    let mut detection = vec![("all", found(&|_| true))];
    detection.extend(Style::ALL.iter().map(|style| (style.word(), found(&|scene| scene.style == *style))));
    let asked: Vec<_> = scenes.iter().map(asked).collect();
    let judged = seen.iter().zip(&asked).filter_map(|(seen, asked)| Some((seen.attributes.as_ref()?, asked)));
    let obedience = obedience(judged);

    let head = ["", "images", "face found"].map(String::from);
    let rows: Vec<Vec<String>> = detection
        .iter()
        .filter_map(|(style, mean)| {
            Some(vec![(*style).into(), mean.as_ref()?.n.to_string(), plain(mean.map(|mean| mean.mean))])
        })
        .collect();
    let mut text = table(&head, &rows);
    if let Some(record) = bench.record() {
        text += &("\n".to_string() + &obedience_table(&obedience, record));
    }
    let detection: serde_json::Map<String, serde_json::Value> =
        detection.into_iter().map(|(style, mean)| (style.into(), json!(mean))).collect();
    let report = json!({
        "pictures": count,
        "base": bench.base,
        "drawing": { "steps": args.steps, "guidance": args.guidance, "seed": args.seed },
        "detection": detection,
        "obedience": obedience,
        "judge": bench.record(),
    });
    let images: Vec<&Image> = drawn.iter().flat_map(|drawn| &drawn.images).take(100).collect();
    let rows: Vec<Vec<&Image>> = images.chunks(10).map(<[_]>::to_vec).collect();
    Ok((report, text, sheet(&rows)))
}

/// Images of the base that are drawn together.
const BATCH: usize = 4;

/// What is asked for in image `i` of a person: photos that show who it is, and one with things on the face.
fn prompt(i: u64) -> Scene {
    let (expression, background) = match i % 4 {
        0 => (Expression::Smiling, Colour::Red),
        1 => (Expression::Neutral, Colour::Blue),
        2 => (Expression::Surprised, Colour::White),
        _ => (Expression::Neutral, Colour::Green),
    };
    let plain = Scene::draw(0, i).plain();
    let scene = Scene { expression, background, yaw: 0.0, ..plain };
    if i % 4 == 3 { Scene { glasses: Glasses::Clear, hat: Hat::Cap, ..scene } } else { scene }
}

/// The caption of a scene that says nothing about the person.
fn say(scene: &Scene) -> String {
    caption(&Person::new(0, 0), scene, CaptionOptions::default(), 0)
}

/// The base model and everybody who looks at its images.
struct Bench {
    base: ModelId,
    model: Sdxl,
    layout: BlockLayout,
    faces: FaceEncoder,
    recogniser: identity::Judge,
    attributes: Option<AttributeClassifier>,
}

/// What is drawn: noise and prompts of the same number.
struct Stage {
    seed: u64,
    /// What tells each sample's noise from the others'.
    grains: Vec<u64>,
    /// (B, C, h, w)
    noise: Tensor,
    prompts: TextConditioning,
    negative: TextConditioning,
    params: GenerationParams,
}

/// Images, and what was seen in them.
struct Drawn {
    images: Vec<Image>,
    seen: Vec<Seen>,
}

impl Drawn {
    /// Mean difference to images of the same noise and prompts, in parts of the range of a pixel.
    fn pixels_from(&self, other: &Self) -> f64 {
        let both = self.images.iter().zip(&other.images).flat_map(|(a, b)| a.rgb.iter().zip(&b.rgb));
        let apart: Vec<f64> = both.map(|(a, b)| f64::from(a.abs_diff(*b)) / 255.0).collect();
        apart.iter().sum::<f64>() / apart.len() as f64
    }
}

/// A held-out person.
struct Sitter {
    photo: Image,
    photo_seen: Seen,
    condition: Identity,
    target: Target,
}

/// A held-out person as drawn.
struct Portrayed {
    sitter: Sitter,
    difflora: Drawn,
    refined: Option<Drawn>,
    own: Drawn,
    /// With the own LoRA as the autoencoder restores it.
    restored: Drawn,
    nearest: Option<Drawn>,
}

impl Bench {
    fn open(args: &Args) -> Result<Self> {
        let files = registry::find_base(&args.base, &args.base_options)?;
        let model = Sdxl::open(&files, DType::F32, &device::open(&args.device)?)?;
        let attributes = match &args.judge {
            Some(name) => Some(AttributeClassifier::open(&registry::find(name, "judge")?)?),
            None => match registry::built_in("judge") {
                Ok(files) => Some(AttributeClassifier::open(&files)?),
                Err(error) => {
                    progress::note(format_args!("prompts and factors are not judged: {error:#}"));
                    None
                }
            },
        };
        Ok(Self {
            base: registry::identify(&files, &args.base, registry::BASE_WEIGHTS)?,
            layout: registry::block_layout(&files)?,
            faces: FaceEncoder::builtin()?,
            recogniser: identity::Judge::sface()?,
            attributes,
            model,
        })
    }

    /// Noise is by the scene's place in the list that it came from: `grain` is its own number.
    fn stage(&self, scenes: &[Scene], words: &[String], args: &Args) -> Result<Stage> {
        let size = self.model.native_size();
        let shape = self.model.latent_shape(size, size)?;
        let grains: Vec<u64> = scenes.iter().map(|scene| scene.grain).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Ok(Stage {
            seed: args.seed,
            noise: grain_noise(args.seed, &grains, 0, &shape)?.to_device(self.model.device())?,
            grains,
            prompts: self.model.text.encode_prompts(&words)?,
            negative: self.model.negative(None)?,
            params: GenerationParams {
                steps: args.steps as usize,
                guidance_scale: args.guidance,
                sampler: args.sampler,
                sizes: None,
                vae_tiling: Tiling::Auto,
            },
        })
    }

    /// Draws with `lora` merged in a copy of the model; weights that it does not change are shared.
    fn draw(&self, stage: &Stage, lora: Option<&Lora>) -> Result<Drawn> {
        let mut model = self.model.clone();
        if let Some(lora) = lora {
            let loras = [(&AdapterFile::from(lora), BlockWeights::all(1.0))];
            merge(|visit| model.unet.visit_layers(visit), &loras, Unmatched::Refuse, Originals::Drop)?;
        }
        let Stage { seed, grains, noise, prompts, negative, params } = stage;
        let fresh = |step: usize| {
            Ok(grain_noise(*seed, grains, 1 + step as u64, &noise.dims()[1..])?.to_device(noise.device())?)
        };
        let step = |_: &Step| progress::check();
        let images = model.pipeline().generate(noise, prompts, negative, *params, fresh, step)?;
        let seen = self.look(&images)?;
        Ok(Drawn { images, seen })
    }

    fn look(&self, images: &[Image]) -> Result<Vec<Seen>> {
        let attributes: Vec<Option<Attributes>> = match &self.attributes {
            Some(judge) => {
                let both = judge.classes(images)?.into_iter().zip(judge.factors(images)?);
                both.map(|(classes, factors)| Some(Attributes { classes, factors })).collect()
            }
            None => vec![None; images.len()],
        };
        let look = |(image, attributes): (&Image, Option<Attributes>)| {
            let faces = self.faces.detect(image)?;
            let face = faces.first().map(|face| self.recogniser.embed(image, face)).transpose()?;
            Ok(Seen { face, attributes })
        };
        images.iter().zip(attributes).map(look).collect()
    }

    /// The first photo with a face is the condition; the others tell what the person looks like.
    fn sitter(&self, person: &Person, photos: &[Image], image_encoder: &ImageEncoder) -> Result<Sitter> {
        let mut condition = None;
        let mut others: Vec<Vec<f32>> = Vec::new();
        for photo in photos {
            let search = self.faces.search(photo)?;
            let Some(face) = search.faces.first() else { continue };
            if condition.is_none() {
                let image = Some(image_encoder.embed(photo, face)?);
                condition = Some((photo, Identity { face: self.faces.embed(photo, face)?, image }));
            } else {
                others.push(self.recogniser.embed(photo, face)?);
            }
        }
        let (photo, condition) = condition.context("no face was found in any reference image")?;
        let seen = self.look(std::slice::from_ref(photo))?.pop();
        Ok(Sitter {
            photo: photo.clone(),
            photo_seen: seen.context("an image was looked at")?,
            condition,
            target: Target {
                face: mean_vector(&others).context("a face was found in one reference image only")?,
                factors: person.identity.to_array(),
            },
        })
    }

    fn lora(&self, path: &Path) -> Result<Lora> {
        file::read(path, &self.layout)
    }

    fn record(&self) -> Option<&Record> {
        self.attributes.as_ref().map(AttributeClassifier::record)
    }

    /// The factors that the judge of attributes can see: it explains half of their variance or more.
    fn visible(&self) -> Vec<usize> {
        let factors = self.record().map_or(&[][..], |record| &record.factors);
        factors.iter().enumerate().filter(|(_, factor)| factor.r2 >= 0.5).map(|(i, _)| i).collect()
    }

    fn recogniser_id(&self) -> ModelId {
        let (name, sha256) = self.recogniser.provenance();
        ModelId { name: name.into(), sha256 }
    }
}

/// The people that the hypernetwork has learned from.
struct Known {
    /// Mean of the face vectors, and the LoRA.
    people: Vec<(Vec<f32>, PathBuf)>,
}

impl Known {
    fn read(dataset: &Path, rows: &[Row]) -> Result<Self> {
        let read = |row: &Row| {
            let path = dataset.join(&row.embeddings);
            let tensors = crate::weights::read_file(&path)?;
            let faces = tensors.get("face").map(Tensor::to_vec2::<f32>);
            let faces = faces.and_then(|faces| mean_vector(&faces.ok()?));
            let faces = faces.ok_or_else(|| Failure::unusable(&path, "it has no rows of `face`"))?;
            Ok((faces, dataset.join(&row.lora)))
        };
        Ok(Self { people: rows.iter().map(read).collect::<Result<_>>()? })
    }

    /// The LoRA of the person with the most similar face.
    fn nearest(&self, face: &[f32]) -> Option<PathBuf> {
        let similarity = |person: &(Vec<f32>, PathBuf)| cosine(&person.0, face);
        let nearest = self.people.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
        nearest.map(|(_, lora)| lora.clone())
    }
}

/// The mean of vectors; only its direction is used.
fn mean_vector(vectors: &[Vec<f32>]) -> Option<Vec<f32>> {
    let (first, rest) = vectors.split_first()?;
    let mut sum = first.clone();
    for vector in rest {
        sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
    }
    sum.iter_mut().for_each(|value| *value /= vectors.len() as f32);
    Some(sum)
}

/// Unit normal noise of `shape` for each sample, (B, C, h, w): the start is draw 0, what a sampler adds comes after.
fn grain_noise(seed: u64, grains: &[u64], draw: u64, shape: &[usize]) -> Result<Tensor> {
    let one = |grain: &u64| noise::normal(seed, grain + (draw << 40), shape, &Device::Cpu);
    let noise: Vec<Tensor> = grains.iter().map(one).collect::<candle_core::Result<_>>()?;
    Ok(Tensor::stack(&noise, 0)?)
}

fn people_table(
    methods: &[Method],
    differences: &[Difference],
    people: usize,
    args: &Args,
    words: &[String],
    bench: &Bench,
) -> String {
    let attributes: Vec<&str> =
        methods[0].figures.obedience.iter().map(|obedience| obedience.attribute).collect();
    let mut head =
        vec!["method", "similarity", "similarity (missing = 0)", "face found", "same − different", "rank 1"];
    head.push("distance to own LoRA");
    head.extend(bench.attributes.is_some().then_some("factors"));
    head.extend(&attributes);
    let rows: Vec<Vec<String>> = methods
        .iter()
        .map(|Method { title, figures, pixels_from_own, .. }| {
            let mut row = vec![
                (*title).to_string(),
                interval(figures.similarity),
                interval(figures.similarity_misses_zero),
                plain(figures.detection.map(|mean| mean.mean)),
                interval(figures.same_minus_different),
                plain(figures.rank_1.map(|mean| mean.mean)),
                plain(pixels_from_own.map(|mean| mean.mean)),
            ];
            row.extend(bench.attributes.is_some().then(|| plain(figures.factor_correlation)));
            row.extend(attributes.iter().map(|attribute| obeyed(&figures.obedience, attribute)));
            row
        })
        .collect();
    let head: Vec<String> = head.into_iter().map(String::from).collect();
    let mut text = table(&head, &rows);
    text += &format!(
        "\n{people} held-out people, {} images each way from the same noise, {} steps, guidance {}, seed {}. \
         Similarity: cosine of SFace to the person's other photos, 95 % intervals over people; rank 1 by chance \
         {:.3}. Distance to own LoRA: mean absolute pixel difference to its images, as a fraction of the range.\n\
         Images without a LoRA and with the mean LoRA are the same for everyone and generated once.\n",
        args.images,
        args.steps,
        args.guidance,
        args.seed,
        1.0 / people as f64
    );
    if let Some(record) = bench.record() {
        text += &format!(
            "Factors: correlation with the truth of the {} factors that the attribute classifier sees in painted photos.\n",
            bench.visible().len()
        );
        let known: Vec<String> = record
            .attributes
            .iter()
            .filter(|attribute| attributes.contains(&attribute.name.as_str()))
            .map(|attribute| format!("{} {:.2}", attribute.name, attribute.accuracy))
            .collect();
        text += &format!("Accuracy of the attribute classifier on painted images: {}.\n", known.join(", "));
    }
    text += "\nDiffLoRA against, in similarity to the person, pair by pair:\n";
    for difference in differences {
        text += &format!("- {}: {}\n", difference.over, interval(difference.similarity));
    }
    let mut once = words.to_vec();
    once.dedup();
    text += "\nPrompts:\n";
    for words in once.iter().take(4) {
        text += &format!("- {words}\n");
    }
    text
}

fn obedience_table(list: &[Obedience], record: &Record) -> String {
    let head = ["attribute", "images", "prompt accuracy", "classifier on paintings"].map(String::from);
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|Obedience { attribute, asked, .. }| {
            let judge = record.attributes.iter().find(|known| known.name == *attribute);
            vec![
                (*attribute).to_string(),
                asked.to_string(),
                obeyed(list, attribute),
                judge.map_or("–".into(), |known| format!("{:.2}", known.accuracy)),
            ]
        })
        .collect();
    table(&head, &rows)
}

/// A row a person: the photo, then for the first and the last prompt no LoRA, DiffLoRA, own LoRA.
fn people_sheet(sitters: &[Portrayed], base: &Drawn) -> Image {
    let row = |portrayed: &'_ Portrayed| -> Vec<Image> {
        let mut row = vec![portrayed.sitter.photo.clone()];
        let last = base.images.len() - 1;
        for prompt in if last == 0 { vec![0] } else { vec![0, last] } {
            let ways = [base, &portrayed.difflora, &portrayed.own];
            row.extend(ways.map(|drawn| drawn.images[prompt].clone()));
        }
        row
    };
    let rows: Vec<Vec<Image>> = sitters.iter().take(6).map(row).collect();
    sheet(&rows.iter().map(|row| row.iter().collect()).collect::<Vec<_>>())
}

/// Small images are shown at twice their size.
fn sheet(rows: &[Vec<&Image>]) -> Image {
    let side = rows.iter().flatten().map(|image| image.width.max(image.height)).max().unwrap_or(64);
    contact_sheet(rows, if side <= 128 { 2 * side } else { side }, 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_prompts_take_turns_and_say_what_they_are_judged_by() {
        let words: Vec<String> = (0..4).map(|i| say(&prompt(i))).collect();
        assert_eq!(words[0], "a photo of a person, smiling, red background");
        assert_eq!(words[3], "a photo of a person, neutral, wearing glasses, wearing cap, green background");
        assert_eq!(say(&prompt(5)), words[1]);
        assert_ne!(prompt(5).grain, prompt(1).grain, "the same words are drawn from other noise");
    }

    #[test]
    fn the_most_similar_person_is_found() {
        let known = Known { people: vec![(vec![1.0, 0.0], "a".into()), (vec![0.6, 0.8], "b".into())] };
        assert_eq!(known.nearest(&[0.0, 2.0]), Some("b".into()));
        assert_eq!(Known { people: Vec::new() }.nearest(&[1.0]), None);
        assert_eq!(mean_vector(&[vec![1.0, 0.0], vec![0.0, 1.0]]), Some(vec![0.5, 0.5]));
    }
}
