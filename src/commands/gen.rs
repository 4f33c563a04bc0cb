//! `difflora gen`: photos of a person (+ prompt) → LoRA file (+ pictures).

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::face::open_encoder;
use super::models;
use super::photos::Photos;
use crate::cli::Common;
use crate::diffusion::noise;
use crate::failure::Failure;
use crate::hypernet::{Hypernet, ModelId};
use crate::identity::clip::ImageEncoder;
use crate::identity::one_person::{SAME_PERSON, mean_direction, outliers};
use crate::identity::{Face, FaceEncoder, Identity, Quality, catalog, cosine};
use crate::layers::Visit;
use crate::lora::apply::{self, Branch, Originals, Unmatched};
use crate::lora::change::Changes;
use crate::lora::file::{self, Format};
use crate::lora::strength::Strength;
use crate::lora::{Lora, LoraError, TRIGGER_PHRASE};
use crate::picture::PictureFormat;
use crate::sdxl::pipeline::{Drawing, Painter, Sampler, Sdxl, Sizes, Step, Tiling};
use crate::sdxl::preview::LatentColours;
use crate::{files, progress, weights};

/// Arguments of `difflora gen`.
///
/// With neither --ref nor --lora it draws with the base model alone. The built-in model `tiny` draws portraits of
/// 64×64 pixels of painted people: it is there to try the program and to prove the method.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pictures of one person: files, patterns such as 'me/*.jpg', or folders. Those that show somebody else are
    /// left out.
    #[arg(long = "ref", value_name = "PHOTO|DIR", num_args = 1.., env = "DIFFLORA_REF")]
    reference: Vec<PathBuf>,
    /// Which face of the pictures, 1 for the largest.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_FACE")]
    face: u32,
    /// What to draw; several prompts draw several pictures. Without it only the LoRA is made.
    #[arg(long, value_name = "TEXT", num_args = 1.., env = "DIFFLORA_PROMPT")]
    prompt: Vec<String>,
    /// What not to draw.
    #[arg(long, value_name = "TEXT", env = "DIFFLORA_NEGATIVE_PROMPT")]
    negative_prompt: Option<String>,
    /// The hypernetwork: a folder, or the built-in one.
    #[arg(long, value_name = "NAME|DIR", default_value = models::BUILT_IN, env = "DIFFLORA_HYPERNET")]
    hypernet: String,
    /// The base model: a folder in diffusers' layout, one `.safetensors` in LDM layout, a hub repository
    /// owner/name[@revision], or a name: tiny (built in), sdxl.
    #[arg(long, value_name = "NAME|DIR|FILE|REPO", default_value = models::BUILT_IN, env = "DIFFLORA_BASE")]
    base: String,
    #[command(flatten)]
    base_options: models::BaseOptions,
    /// The encoder of whole pictures that the hypernetwork was trained with.
    #[arg(long, value_name = "NAME|DIR", default_value = models::BUILT_IN, env = "DIFFLORA_IMAGE_ENCODER")]
    image_encoder: String,
    /// The encoder of faces that the hypernetwork was trained with; by itself the one that it names.
    #[arg(long, value_name = "NAME|DIR", env = "DIFFLORA_FACE_ENCODER")]
    face_encoder: Option<String>,
    /// Further LoRA files, each with an optional weight: 0.8, or by part, unet=0.8,te=0.4,down.1=0.5. Parts are
    /// unet, te, te1, te2, down, down.N, mid, up, up.N.
    #[arg(long, value_name = "FILE[:WEIGHT]", num_args = 1.., env = "DIFFLORA_LORA")]
    lora: Vec<String>,
    /// Weight of the person's LoRA.
    #[arg(
        long,
        value_name = "F",
        default_value_t = 1.0,
        allow_negative_numbers = true,
        env = "DIFFLORA_LORA_SCALE"
    )]
    lora_scale: f64,
    /// Merge LoRAs into the weights, or apply them beside the weights.
    #[arg(long, value_enum, default_value = "merge", env = "DIFFLORA_LORA_MODE")]
    lora_mode: LoraMode,
    /// Let LoRAs change only what follows the prompt, not the negative prompt; needs --lora-mode runtime.
    #[arg(long, env = "DIFFLORA_LORA_POSITIVE_ONLY")]
    lora_positive_only: bool,
    /// Sampling steps of a picture.
    #[arg(long, value_name = "N", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=1000), env = "DIFFLORA_STEPS")]
    steps: u32,
    /// How much the prompt counts; 1 or less draws without the second pass.
    #[arg(long, value_name = "F", default_value_t = 3.0, env = "DIFFLORA_GUIDANCE")]
    guidance: f64,
    /// Sampling method of a picture; the one that the base model names where it is not given.
    #[arg(long, value_enum, env = "DIFFLORA_SAMPLER")]
    sampler: Option<Sampler>,
    /// Pixels across, a multiple of 8 (in small models: of what their VAE says); the base model's own size where it is
    /// not given.
    #[arg(long, value_name = "PX", env = "DIFFLORA_WIDTH")]
    width: Option<usize>,
    /// Pixels down, likewise.
    #[arg(long, value_name = "PX", env = "DIFFLORA_HEIGHT")]
    height: Option<usize>,
    /// Size before the picture was made smaller, as SDXL is told; the picture's own where it is not given. A small one
    /// asks for the look of an enlarged picture.
    #[arg(long, value_name = "WxH", value_parser = width_and_height, env = "DIFFLORA_ORIGINAL_SIZE")]
    original_size: Option<[usize; 2]>,
    /// Size that the picture was brought to, as SDXL is told; its own where it is not given.
    #[arg(long, value_name = "WxH", value_parser = width_and_height, env = "DIFFLORA_TARGET_SIZE")]
    target_size: Option<[usize; 2]>,
    /// Rows and columns that were cut off above and to the left, as SDXL is told; 0,0 centres the subject.
    #[arg(long, value_name = "TOP,LEFT", value_parser = top_and_left, default_value = "0,0", env = "DIFFLORA_CROP")]
    crop: [usize; 2],
    /// Decode the picture in strips: the same picture in a fraction of the memory.
    #[arg(long, value_enum, default_value = "auto", env = "DIFFLORA_VAE_TILING")]
    vae_tiling: Tiling,
    /// Pictures of each prompt.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000), env = "DIFFLORA_NUM_IMAGES")]
    num_images: u32,
    /// Seed of the pictures' noise; picture k of a call uses seed + k.
    #[arg(long, default_value_t = 0, env = "DIFFLORA_SEED")]
    seed: u64,
    /// Start every picture from the tensor `latents` (1, C, height/8, width/8) of this safetensors file, unit normal,
    /// instead of the seed's noise.
    #[arg(long, value_name = "FILE", env = "DIFFLORA_INIT_LATENTS")]
    init_latents: Option<PathBuf>,
    /// Sampling steps of the LoRA; the hypernetwork's own number where it is not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), env = "DIFFLORA_IDENTITY_STEPS")]
    identity_steps: Option<u32>,
    /// Guidance in the sampling of the LoRA.
    #[arg(long, value_name = "F", env = "DIFFLORA_IDENTITY_GUIDANCE")]
    identity_guidance: Option<f64>,
    /// Seed of the LoRA's noise.
    #[arg(long, value_name = "N", default_value_t = 0, env = "DIFFLORA_IDENTITY_SEED")]
    identity_seed: u64,
    /// Number type of the base model.
    #[arg(long, value_enum, default_value = "f32", env = "DIFFLORA_DTYPE")]
    dtype: Precision,
    /// Where to compute.
    #[arg(long, value_name = "auto|cpu|cuda[:N]|metal", default_value = "auto", env = "DIFFLORA_DEVICE")]
    device: String,
    /// Picture to write (.png, .jpg or .webp), or a folder for several; `difflora.png` where it is not given. With
    /// --json each picture has its settings beside it, in a file of its name that ends in .json.
    #[arg(long, value_name = "FILE|DIR", env = "DIFFLORA_OUT")]
    out: Option<PathBuf>,
    /// Write no prompt and no settings into pictures.
    #[arg(long, env = "DIFFLORA_NO_METADATA")]
    no_metadata: bool,
    /// Every N steps write what the picture looks like so far, small and rough: `me.preview.png` beside `me.png`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_PREVIEW")]
    preview: Option<u32>,
    /// LoRA to write; `difflora.safetensors` where neither it nor --prompt is given.
    #[arg(long, value_name = "FILE.safetensors", env = "DIFFLORA_LORA_OUT")]
    lora_out: Option<PathBuf>,
    /// Spelling of the layers' names in the LoRA.
    #[arg(long, value_enum, default_value = "kohya", env = "DIFFLORA_LORA_FORMAT")]
    lora_format: Format,
}

/// How LoRAs change the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LoraMode {
    /// Once, into the weights: drawing costs nothing extra.
    Merge,
    /// Beside the weights, at each step.
    Runtime,
}

/// A number type for weights. Where the device is a CPU they are widened as they are used: half the memory, and the
/// arithmetic of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Precision {
    F32,
    F16,
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// `1024x768` → width and height.
fn width_and_height(text: &str) -> std::result::Result<[usize; 2], String> {
    two_numbers(text, 'x')
        .filter(|size| !size.contains(&0))
        .ok_or("write WIDTHxHEIGHT, for example 1024x768".into())
}

/// `0,128` → top and left.
fn top_and_left(text: &str) -> std::result::Result<[usize; 2], String> {
    two_numbers(text, ',').ok_or("write TOP,LEFT, for example 0,128".into())
}

fn two_numbers(text: &str, between: char) -> Option<[usize; 2]> {
    let (first, second) = text.split_once(between)?;
    Some([first.trim().parse().ok()?, second.trim().parse().ok()?])
}

/// Makes the LoRA, and draws.
pub fn run(args: Args, common: &Common) -> Result<()> {
    let start = Instant::now();
    let outputs = Outputs::plan(&args)?;
    let device = device(&args.device)?;
    let base_files = models::find_base(&args.base, &args.base_options)?;
    let base = models::identify(&base_files, &args.base, models::BASE_WEIGHTS)?;

    let person = if args.reference.is_empty() { None } else { Some(make_lora(&args, &base)?) };
    let mut report = json!({});
    if let Some((lora, told)) = &person {
        report["person"] = told.clone();
        if let Some(path) = &outputs.lora {
            let levels = models::block_layout(&base_files)?;
            file::write(path, lora, args.lora_format, &levels)?;
            report["lora"] = json!(path);
            say(common, format_args!("LoRA    {}", path.display()));
        }
    }
    if !args.prompt.is_empty() {
        if args.base == models::BUILT_IN {
            progress::note(
                "the built-in model `tiny` draws painted portraits of 64×64 pixels, to try the program and to \
                 prove the method; real pictures need an SDXL folder (--base) and a hypernetwork for it (--hypernet)",
            );
        }
        let loras = chosen_loras(&args, person.as_ref().map(|(lora, _)| lora), &base_files)?;
        let mut model = Sdxl::open(&base_files, args.dtype.into(), &device)?;
        apply_loras(&mut model, &loras, &args)?;
        report["pictures"] = draw(&args, model, &base, &loras, &outputs.pictures, common)?;
    }
    report["seconds"] = json!(start.elapsed().as_secs_f64());
    if common.json {
        println!("{report:#}");
    }
    Ok(())
}

fn say(common: &Common, line: std::fmt::Arguments) {
    if !common.json {
        println!("{line}");
    }
}

/// Where results go; checked before the work begins.
struct Outputs {
    lora: Option<PathBuf>,
    pictures: Vec<PathBuf>,
}

impl Outputs {
    fn plan(args: &Args) -> Result<Self> {
        if args.reference.is_empty() && args.prompt.is_empty() {
            return Err(Failure::Usage(
                "nothing to do: give --ref PHOTO for a LoRA, --prompt TEXT for a picture, or both".into(),
            )
            .into());
        }
        if args.reference.is_empty() && args.lora_out.is_some() {
            return Err(Failure::Usage("--lora-out needs --ref: the LoRA is made from a photo".into()).into());
        }
        if args.lora_positive_only && args.lora_mode == LoraMode::Merge {
            let why =
                "--lora-positive-only needs --lora-mode runtime: what is merged changes both predictions";
            return Err(Failure::Usage(why.into()).into());
        }
        if args.prompt.is_empty() && args.out.is_some() {
            return Err(Failure::Usage("--out needs --prompt, which says what to draw".into()).into());
        }
        let lora = match &args.lora_out {
            Some(path) => Some(path.clone()),
            None => args.prompt.is_empty().then(|| PathBuf::from("difflora.safetensors")),
        };
        let count = args.prompt.len() * args.num_images as usize;
        let out = args.out.clone().unwrap_or_else(|| PathBuf::from("difflora.png"));
        let pictures: Vec<PathBuf> = if out.is_dir() {
            (1..=count).map(|i| out.join(format!("{i:04}.png"))).collect()
        } else if count == 1 {
            vec![out]
        } else {
            let (stem, extension) = (out.with_extension(""), out.extension().unwrap_or_default());
            let (stem, extension) = (stem.display(), extension.to_string_lossy());
            (1..=count).map(|i| PathBuf::from(format!("{stem}-{i:04}.{extension}"))).collect()
        };
        for path in pictures.iter().chain(&lora) {
            files::check_writable(path)?;
        }
        for path in &pictures {
            PictureFormat::of(path)?;
        }
        Ok(Self { lora, pictures })
    }
}

/// The device that `name` stands for.
fn device(name: &str) -> Result<Device> {
    let missing =
        |what: &str| Failure::Usage(format!("this build has no {what}; build it with --features {what}"));
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(Device::cuda_if_available(0)?),
        "metal" if candle_core::utils::metal_is_available() => Ok(Device::new_metal(0)?),
        "metal" => Err(missing("metal").into()),
        _ => match name.strip_prefix("cuda") {
            Some(_) if !candle_core::utils::cuda_is_available() => Err(missing("cuda").into()),
            Some(number) => {
                let number = number.trim_start_matches(':');
                let number = if number.is_empty() { Ok(0) } else { number.parse() };
                let number =
                    number.map_err(|_| Failure::Usage(format!("`{name}` is no device: write cuda:0")))?;
                Ok(Device::new_cuda(number)?)
            }
            None => {
                Err(Failure::Usage(format!("`{name}` is no device; it is auto, cpu, cuda[:N] or metal"))
                    .into())
            }
        },
    }
}

/// Photos → identity → LoRA, with what is worth telling about it.
fn make_lora(args: &Args, base: &ModelId) -> Result<(Lora, Value)> {
    let hypernet = Hypernet::open(&models::find(&args.hypernet, "hypernet")?, &Device::Cpu)?;
    let config = &hypernet.denoiser.config;
    hypernet.codec.base.demand(base, "base model")?;
    let image_files = models::find(&args.image_encoder, "image_encoder")?;
    let image_id = models::identify(&image_files, &args.image_encoder, models::ENCODER_WEIGHTS)?;
    config.image_encoder.demand(&image_id, "image encoder")?;
    let face_name = match &args.face_encoder {
        Some(name) => name,
        // A name that stands for a folder of another machine is asked for instead.
        None if catalog::is_known(&config.face_encoder.name) => &config.face_encoder.name,
        None => catalog::BUILT_IN,
    };
    let faces = open_encoder(face_name)?;
    let [_, (name, sha256)] = faces.provenance();
    config.face_encoder.demand(&ModelId { name: name.into(), sha256 }, "face encoder")?;
    let images = ImageEncoder::open(&image_files)?.with_input(config.image_input);
    let references = look_at(args, &faces, &images)?;
    let hashes: Vec<&str> = references.used.iter().map(|(_, photo)| photo.sha256.as_str()).collect();
    let identity = Identity {
        face: mean_direction(&references.used.iter().map(|(_, photo)| &photo.face[..]).collect::<Vec<_>>()),
        image: Some(mean_direction(
            &references.used.iter().map(|(_, photo)| &photo.image[..]).collect::<Vec<_>>(),
        )),
    };
    let mut options = hypernet.options();
    options.seed = args.identity_seed;
    options.steps = args.identity_steps.map_or(options.steps, |steps| steps as usize);
    options.guidance = args.identity_guidance.unwrap_or(options.guidance);
    let start = Instant::now();
    let mut lora = hypernet.generate(&identity, &options)?;
    for (module, layer) in &lora.layers {
        let sum = layer.up.abs()?.sum_all()?.to_scalar::<f32>()?;
        ensure!(sum.is_finite(), "the hypernetwork made NaN or infinity for `{module}`; nothing is written");
    }
    let rank = lora.layers.values().next().map_or(0, crate::lora::LoraLayer::rank);
    let alpha = lora.layers.values().next().map_or(0.0, |layer| layer.alpha);
    let base_version = if args.base == models::BUILT_IN { "difflora_tiny" } else { "sdxl_base_v1-0" };
    for (key, value) in [
        ("ss_network_module", "networks.lora".to_string()),
        ("ss_network_dim", rank.to_string()),
        ("ss_network_alpha", alpha.to_string()),
        ("ss_base_model_version", base_version.to_string()),
        (TRIGGER_PHRASE, "person".to_string()),
        ("modelspec.title", "a person, by difflora".to_string()),
        ("difflora.version", env!("CARGO_PKG_VERSION").to_string()),
        ("difflora.hypernet", args.hypernet.clone()),
        ("difflora.base", base.name.clone()),
        ("difflora.base_sha256", base.sha256.clone()),
        ("difflora.face_encoder", config.face_encoder.name.clone()),
        ("difflora.face_encoder_sha256", config.face_encoder.sha256.clone()),
        ("difflora.reference_sha256", hashes.join(",")),
        ("difflora.identity_seed", options.seed.to_string()),
        ("difflora.identity_steps", options.steps.to_string()),
    ] {
        lora.metadata.insert(key.into(), value);
    }
    let told = json!({
        "references": references.told(),
        "left_out": references.left_out,
        "modules": lora.layers.len(),
        "rank": rank,
        "seconds": start.elapsed().as_secs_f64(),
    });
    Ok((lora, told))
}

/// What one photo tells.
struct Reference {
    face: Vec<f32>,
    image: Vec<f32>,
    sha256: String,
    faces: usize,
    chosen: Face,
    quality: Quality,
}

/// The photos of the person.
struct References {
    used: Vec<(PathBuf, Reference)>,
    /// Files that could not be used or that show somebody else, with the reason.
    left_out: Value,
}

impl References {
    fn told(&self) -> Value {
        let told = |(file, photo): &(PathBuf, Reference)| {
            json!({
                "file": file,
                "faces": photo.faces,
                "face": photo.chosen,
                "quality": photo.quality,
                "hints": photo.quality.hints(),
            })
        };
        self.used.iter().map(told).collect()
    }
}

/// Encodes the photos and leaves out those that show somebody else; says what will make the likeness suffer.
fn look_at(args: &Args, faces: &FaceEncoder, images: &ImageEncoder) -> Result<References> {
    let seen = Photos::find(&args.reference)?.look(|_, path, picture| {
        let search = faces.search(picture)?;
        let chosen = search.face(args.face as usize, &path.display().to_string())?;
        Ok(Reference {
            face: faces.embed(picture, chosen)?,
            image: images.embed(picture, chosen)?,
            sha256: sha256_of(&std::fs::read(path)?),
            faces: search.faces.len(),
            chosen: chosen.clone(),
            quality: Quality::of(picture, chosen, &search.faces),
        })
    })?;
    let mut left_out = seen.left_out_json();
    for (path, photo) in &seen.photos {
        if photo.faces > 1 {
            let which = if args.face == 1 { "the largest".into() } else { format!("number {}", args.face) };
            progress::note(format_args!(
                "{} faces in `{}`: {which} is taken, at {:.0?}; --face N takes another",
                photo.faces,
                path.display(),
                photo.chosen.bounds
            ));
        }
        for hint in photo.quality.hints() {
            progress::note(format_args!("`{}`: {hint}", path.display()));
        }
    }
    let vectors: Vec<Vec<f32>> = seen.photos.iter().map(|(_, photo)| photo.face.clone()).collect();
    let outliers = outliers(&vectors);
    for outlier in &outliers {
        let path = &seen.photos[outlier.photo].0;
        let why = format!(
            "its face does not look like the others (cosine {:.2} to their mean, wanted {SAME_PERSON})",
            outlier.cosine
        );
        progress::warn(format_args!("`{}` is left out: {why}", path.display()));
        if let Value::Array(left_out) = &mut left_out {
            left_out.push(json!({ "file": path, "why": why }));
        }
    }
    let used: Vec<(PathBuf, Reference)> = seen
        .photos
        .into_iter()
        .enumerate()
        .filter(|(at, _)| outliers.iter().all(|outlier| outlier.photo != *at))
        .map(|(_, photo)| photo)
        .collect();
    if let [(one, a), (two, b)] = &used[..]
        && cosine(&a.face, &b.face) < SAME_PERSON
    {
        progress::warn(format_args!(
            "`{}` and `{}` seem to show two people (cosine {:.2}); both are used. `difflora face dedupe` groups \
             pictures by person",
            one.display(),
            two.display(),
            cosine(&a.face, &b.face)
        ));
    }
    Ok(References { used, left_out })
}

fn sha256_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A LoRA with its name, strength and short hash, for the picture's text.
struct Chosen {
    name: String,
    strength: Strength,
    hash: String,
    changes: Changes,
}

/// The person's LoRA and those of `--lora`.
fn chosen_loras(
    args: &Args,
    person: Option<&Lora>,
    base: &crate::model_files::ModelFiles,
) -> Result<Vec<Chosen>> {
    let layout = models::block_layout(base)?;
    let mut chosen = Vec::new();
    if let Some(lora) = person {
        let name = args
            .lora_out
            .as_deref()
            .and_then(Path::file_stem)
            .map_or("person".into(), |stem| stem.to_string_lossy());
        let hash = lora_hash(&file::to_bytes(lora, args.lora_format, &layout)?);
        let strength = Strength::all(args.lora_scale);
        chosen.push(Chosen { name: name.into(), strength, hash, changes: lora.into() });
    }
    for text in &args.lora {
        let (path, strength) = Strength::split(text)?;
        let changes = file::read_changes(&path, &layout)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        chosen.push(Chosen { name, strength, hash: lora_hash(&std::fs::read(&path)?), changes });
    }
    Ok(chosen)
}

/// Puts the LoRAs into UNet and text encoders.
///
/// # Errors
/// [`Failure::Unusable`] for a LoRA that is not made for this base.
fn apply_loras(model: &mut Sdxl, chosen: &[Chosen], args: &Args) -> Result<()> {
    let mut order: Vec<&Chosen> = chosen.iter().collect();
    // f32 sums depend on their order; the order on the command line must not count.
    let weight = |chosen: &Chosen| chosen.strength.everywhere();
    order.sort_by(|a, b| a.hash.cmp(&b.hash).then(weight(a).total_cmp(&weight(b))));
    let loras: Vec<(&Changes, Strength)> =
        order.iter().map(|chosen| (&chosen.changes, chosen.strength.clone())).collect();
    if loras.is_empty() {
        return Ok(());
    }
    for chosen in chosen {
        let alone = [(&chosen.changes, chosen.strength.clone())];
        let missing = apply::check(|visit| layers(model, visit), &alone, Unmatched::Allow)
            .map_err(|error| Failure::Unusable(format!("cannot use the LoRA `{}`: {error}", chosen.name)))?;
        if !missing.is_empty() {
            progress::warn(format_args!(
                "{} of {} layers of the LoRA `{}` have no place in this base and are left out: {}",
                missing.len(),
                chosen.changes.modules.len(),
                chosen.name,
                crate::lora::listed(&missing)
            ));
        }
    }
    match args.lora_mode {
        LoraMode::Merge => {
            apply::merge(|visit| layers(model, visit), &loras, Unmatched::Allow, Originals::Drop)?;
        }
        LoraMode::Runtime => {
            let guided = args.lora_positive_only && args.guidance > 1.0;
            let branch = if guided { Branch::Positive } else { Branch::Both };
            // A prompt's batch is one, so text encoders have no halves.
            apply::attach(|visit| model.text.visit_layers(visit), &loras, Unmatched::Ignore, Branch::Both)?;
            apply::attach(|visit| model.unet.visit_layers(visit), &loras, Unmatched::Ignore, branch)
                .map_err(|error| match error {
                    LoraError::Kind { .. } => Failure::Usage(format!("--lora-positive-only: {error}")).into(),
                    other => anyhow::Error::from(other),
                })?;
        }
    }
    Ok(())
}

/// All layers of a model that a LoRA may change.
fn layers(model: &mut Sdxl, visit: &mut Visit) {
    model.unet.visit_layers(visit);
    model.text.visit_layers(visit);
}

/// Draws every picture that was asked for and writes it; gives what was written.
fn draw(
    args: &Args,
    model: Sdxl,
    base: &ModelId,
    loras: &[Chosen],
    paths: &[PathBuf],
    common: &Common,
) -> Result<Value> {
    let usage = |error: anyhow::Error| Failure::Usage(format!("{error:#}"));
    let size = model.native_size();
    let (width, height) = (args.width.unwrap_or(size), args.height.unwrap_or(size));
    let shape = model.latent_shape(width, height).map_err(usage)?;
    let given = args.init_latents.as_deref().map(|path| init_latents(path, shape)).transpose()?;
    let sampler = args.sampler.or(model.sampler).unwrap_or_else(|| {
        progress::note("the base model names no sampler that difflora has; it draws with euler");
        Sampler::Euler
    });
    sampler.check(&model.schedule, args.steps as usize).map_err(usage)?;
    let drawing = Drawing {
        steps: args.steps as usize,
        guidance_scale: args.guidance,
        sampler,
        sizes: Some(Sizes {
            original: args.original_size.unwrap_or([width, height]),
            crop: args.crop,
            target: args.target_size.unwrap_or([width, height]),
        }),
        vae_tiling: args.vae_tiling,
    };
    for prompt in args.prompt.iter().chain(&args.negative_prompt) {
        if let Some(end) = model.text.cut(prompt)? {
            let most = model.text.tokenizer.max_length();
            progress::warn(format_args!("a prompt has more than {most} tokens; this end is left out: {end}"));
        }
    }
    let negative = model.negative(args.negative_prompt.as_deref())?;
    let prompts = args.prompt.iter().map(|prompt| model.text.encode_prompts(&[prompt]));
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let device = model.device().clone();
    let Sdxl { text, unet, vae, schedule, .. } = model;
    drop(text); // 3 GB in SDXL, and not needed from here on
    let painter = Painter { unet: &unet, vae: &vae, schedule: &schedule };
    let colours = args.preview.map(|_| LatentColours::fit(&vae, &device)).transpose()?;
    let preview = args.preview.zip(colours);

    let bar = progress::bar(paths.len() as u64 * u64::from(args.steps), "drawing");
    let mut written = Vec::new();
    for (k, path) in paths.iter().enumerate() {
        let which = k / args.num_images as usize;
        let settings = Settings {
            prompt: &args.prompt[which],
            negative_prompt: args.negative_prompt.as_deref(),
            sampler,
            steps: args.steps,
            guidance: args.guidance,
            seed: args.seed.wrapping_add(k as u64),
            size: [width, height],
            base,
            loras,
        };
        let seed = settings.seed;
        let shape = (1, shape[0], shape[1], shape[2]);
        let latents = match &given {
            Some(latents) => latents.clone(),
            None => noise::normal(seed, 0, shape, &Device::Cpu)?,
        };
        // Stream 0 is the start, so that fresh noise never repeats it.
        let fresh = |step: usize| Ok(noise::normal(seed, 1 + step as u64, shape, &Device::Cpu)?);
        let step = |step: &Step| {
            bar.inc(1);
            match &preview {
                Some((every, colours)) if step.number.is_multiple_of(*every as usize) => {
                    colours.picture(&step.denoised()?)?.save(&path.with_extension("preview.png"), None)?;
                }
                _ => {}
            }
            progress::check()
        };
        let pictures = painter.draw(&latents, &prompts[which], &negative, drawing, fresh, step)?;
        let Some(picture) = pictures.first() else { bail!("no picture was drawn") };
        let text = settings.parameters();
        picture.save(path, (!args.no_metadata).then_some(&text))?;
        let mut told = settings.to_json();
        told["file"] = json!(path);
        if common.json {
            files::write_whole(&path.with_extension("json"), format!("{told:#}\n").as_bytes())?;
        } else {
            bar.suspend(|| println!("picture {}", path.display()));
        }
        written.push(told);
    }
    bar.finish_and_clear();
    Ok(written.into())
}

/// The tensor `latents` of a file, (1, C, h, w).
fn init_latents(path: &Path, shape: [usize; 3]) -> Result<Tensor> {
    let wanted = [1, shape[0], shape[1], shape[2]];
    let latents = weights::read_file(path)?
        .remove("latents")
        .ok_or_else(|| Failure::unusable(path, "it holds no tensor `latents`"))?;
    if latents.dims() != wanted {
        let why = format!("`latents` has shape {:?}, this model and size want {wanted:?}", latents.dims());
        return Err(Failure::unusable(path, why));
    }
    if !latents.dtype().is_float() {
        let why = format!("`latents` holds {:?}, wanted floating-point numbers", latents.dtype());
        return Err(Failure::unusable(path, why));
    }
    let latents = latents.to_dtype(DType::F32)?;
    if !latents.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
        return Err(Failure::unusable(path, "`latents` holds NaN or infinity"));
    }
    Ok(latents)
}

/// All that a picture depends on.
struct Settings<'a> {
    prompt: &'a str,
    negative_prompt: Option<&'a str>,
    sampler: Sampler,
    steps: u32,
    guidance: f64,
    seed: u64,
    /// Width and height.
    size: [usize; 2],
    base: &'a ModelId,
    loras: &'a [Chosen],
}

impl Settings<'_> {
    /// The text that A1111 and its relatives read from a picture (`modules/infotext_utils.py`,
    /// `parse_generation_parameters`).
    fn parameters(&self) -> String {
        let mut text = self.prompt.to_string();
        for lora in self.loras {
            text.push_str(&format!(" <lora:{}:{}>", lora.name, lora.strength.everywhere()));
        }
        if let Some(negative) = self.negative_prompt {
            text.push_str(&format!("\nNegative prompt: {negative}"));
        }
        let [width, height] = self.size;
        text.push_str(&format!(
            "\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {width}x{height}, Model hash: {}, Model: {}",
            self.steps,
            self.sampler.a1111_name(),
            self.guidance,
            self.seed,
            &self.base.sha256[..10],
            quoted(&self.base.name),
        ));
        if !self.loras.is_empty() {
            let hashes: Vec<String> =
                self.loras.iter().map(|lora| format!("{}: {}", lora.name, &lora.hash[..12])).collect();
            text.push_str(&format!(", Lora hashes: {}", quoted(&hashes.join(", "))));
        }
        text.push_str(&format!(", Version: difflora {}", env!("CARGO_PKG_VERSION")));
        text
    }

    /// The same for programs.
    fn to_json(&self) -> Value {
        let loras: Vec<Value> = self
            .loras
            .iter()
            .map(|lora| json!({ "name": lora.name, "weight": lora.strength.everywhere(), "hash": lora.hash }))
            .collect();
        json!({
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "sampler": self.sampler.to_possible_value().map(|value| value.get_name().to_string()),
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "width": self.size[0],
            "height": self.size[1],
            "model": { "name": self.base.name, "sha256": self.base.sha256 },
            "loras": loras,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }
}

/// A value as A1111 writes it: in quotation marks where it holds a separator.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n', '"']) { json!(value).to_string() } else { value.to_string() }
}

/// What A1111 calls a LoRA's hash: SHA-256 of a `.safetensors` behind its header, so that other metadata does not
/// change it (`modules/hashes.py`, `addnet_hash_safetensors`).
fn lora_hash(bytes: &[u8]) -> String {
    let header = bytes.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length) as usize);
    sha256_of(bytes.get(header.saturating_add(8)..).unwrap_or(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_spelt_as_a1111_spells_them() {
        let base = ModelId { name: "my: model".into(), sha256: "0123456789abcdef".into() };
        let (strength, changes) = (Strength::all(0.8), Changes::default());
        let loras = [Chosen { name: "anna".into(), strength, hash: "fedcba9876543210".into(), changes }];
        let settings = Settings {
            prompt: "a cat",
            negative_prompt: Some("blurry"),
            sampler: Sampler::Dpmpp2mKarras,
            steps: 20,
            guidance: 7.5,
            seed: 42,
            size: [1024, 768],
            base: &base,
            loras: &loras,
        };
        let wanted = format!(
            "a cat <lora:anna:0.8>\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, \
             Seed: 42, Size: 1024x768, Model hash: 0123456789, Model: \"my: model\", \
             Lora hashes: \"anna: fedcba987654\", Version: difflora {}",
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(settings.parameters(), wanted);
        assert_eq!(settings.to_json()["sampler"], "dpmpp-2m-karras");
    }

    #[test]
    fn a_lora_s_hash_leaves_out_its_header() {
        let file =
            |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), b"data"].concat();
        assert_eq!(lora_hash(&file("{}")), lora_hash(&file("{\"__metadata__\": {}}")));
        assert_eq!(lora_hash(&file("{}")), sha256_of(b"data"));
    }

    #[test]
    fn sizes_are_read_in_pairs() {
        assert_eq!(width_and_height("1024x768"), Ok([1024, 768]));
        assert_eq!(top_and_left("0, 128"), Ok([0, 128]));
        assert!(width_and_height("0x768").is_err() && width_and_height("12").is_err());
        assert!(top_and_left("-1,0").is_err());
    }
}
