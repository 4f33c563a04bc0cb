//! `difflora face`: detect, embed, compare, cut out and group faces.

mod draw;
mod embed_image;
mod verify;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::failure::Failure;
use crate::files;
use crate::identity::align::{SIDE, align};
use crate::identity::catalog;
use crate::identity::detect::Face;
use crate::identity::one_person::{groups, mean_direction};
use crate::identity::photos::{Photos, Seen};
use crate::identity::{FaceEncoder, Quality, cosine};
use crate::output::Output;
use crate::output::print_line;
use crate::progress;

/// Arguments of `difflora face`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Print box, five landmarks, score and quality of each face, largest first.
    Detect {
        #[command(flatten)]
        images: Images,
        #[command(flatten)]
        encoder: Encoder,
        /// Write the image with boxes, landmarks and numbers: a PNG file for one image, else a folder.
        #[arg(long, value_name = "FILE.png|DIR", env = "DIFFLORA_DRAW")]
        draw: Option<PathBuf>,
    },
    /// Write one unit vector per image, under its file name.
    Embed {
        #[command(flatten)]
        images: Images,
        #[command(flatten)]
        encoder: Encoder,
        #[command(flatten)]
        image_encoder: embed_image::ImageEncoderArgs,
        /// Safetensors file to write.
        #[arg(long, value_name = "FILE", env = "DIFFLORA_OUT")]
        out: PathBuf,
    },
    /// Print the cosine similarity of the largest faces, image by image.
    Compare {
        #[command(flatten)]
        images: Images,
        #[command(flatten)]
        encoder: Encoder,
    },
    /// Write the largest face of each image, aligned as recognisers expect it.
    Crop {
        #[command(flatten)]
        images: Images,
        #[command(flatten)]
        encoder: Encoder,
        /// Folder to write.
        #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
        out: PathBuf,
        /// Side in pixels, usually 112 or 512. Multiples of 128 use insightface's slightly wider template.
        #[arg(long, default_value_t = SIDE as u32, value_parser = clap::value_parser!(u32).range(16..=4096), env = "DIFFLORA_SIZE")]
        size: u32,
    },
    /// Time the networks of a face encoder.
    Bench {
        #[command(flatten)]
        encoder: Encoder,
        /// Runs of each network; the median is printed.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000), env = "DIFFLORA_RUNS")]
        runs: u32,
    },
    /// Group images by the person of their largest face.
    ///
    /// Groups are merged while the mean cosine between their faces reaches the threshold (average linkage), so that
    /// one image that resembles two people does not join them.
    Dedupe {
        #[command(flatten)]
        images: Images,
        #[command(flatten)]
        encoder: Encoder,
        /// Mean cosine from which two groups are one person [default for photos: mobilefacenet 0.4, sface 0.363,
        /// ArcFace 0.28]. `difflora face verify` measures it on your own images; drawings and paintings need a higher
        /// one.
        #[arg(long, value_name = "COSINE", value_parser = cosine_value, env = "DIFFLORA_THRESHOLD")]
        threshold: Option<f32>,
    },
    /// Measure how well an encoder separates people: AUC, equal error rate, best threshold.
    Verify {
        /// Folder with one folder per person, or with files such as anna-1.jpg, anna-2.jpg, ben-1.jpg.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        #[command(flatten)]
        encoder: Encoder,
    },
}

#[derive(Debug, clap::Args)]
struct Images {
    /// Images, patterns such as 'me/*.jpg', or folders.
    #[arg(required = true, value_name = "IMAGE|DIR")]
    images: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Encoder {
    /// mobilefacenet (512 values), sface (128 values), antelopev2, buffalo_l, auraface, or a folder of ONNX files.
    #[arg(
        long,
        visible_alias = "encoder",
        value_name = "NAME|DIR",
        env = "DIFFLORA_FACE_ENCODER",
        default_value = "mobilefacenet"
    )]
    face_encoder: String,
}

impl Encoder {
    fn load(&self) -> Result<FaceEncoder> {
        open_encoder(&self.face_encoder)
    }
}

/// A threshold from −1 to 1.
fn cosine_value(text: &str) -> std::result::Result<f32, String> {
    match text.parse() {
        Ok(value) if (-1.0..=1.0).contains(&value) => Ok(value),
        _ => Err("wanted a cosine from -1 to 1".into()),
    }
}

/// The face encoder of a name or a folder; says under which licence it comes when it is not built in.
pub(super) fn open_encoder(name: &str) -> Result<FaceEncoder> {
    let encoder = FaceEncoder::open(name)?;
    if let Some(model) = catalog::find(name) {
        progress::note(format_args!("face encoder `{name}`: {}; licence: {}", model.about, model.licence));
    }
    Ok(encoder)
}

/// Does what was asked for.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let json = output.json;
    match args.action {
        Action::Detect { images, encoder, draw } => detect(&images, &encoder.load()?, draw.as_deref(), json),
        Action::Embed { images, encoder, image_encoder, out } => match image_encoder.encoder() {
            Some(name) => embed_image::embed(&images, &encoder, name, &image_encoder, &out, json),
            None => embed(&images, &encoder, &out, json),
        },
        Action::Compare { images, encoder } => compare(&images, &encoder.load()?, json),
        Action::Crop { images, encoder, out, size } => {
            crop(&images, &encoder.load()?, &out, size as usize, json)
        }
        Action::Bench { encoder, runs } => bench(&encoder.load()?, runs, json),
        Action::Dedupe { images, encoder, threshold } => dedupe(&images, &encoder.load()?, threshold, json),
        Action::Verify { folder, encoder } => verify::verify(&folder, &encoder, json),
    }
}

fn detect(images: &Images, encoder: &FaceEncoder, out: Option<&Path>, json: bool) -> Result<()> {
    let photos = Photos::find(&images.images)?;
    let drawings = out.map(|out| drawings(&photos, out)).transpose()?;
    let seen = photos.look(|at, file, image| {
        let search = encoder.search(image)?;
        if let Some(drawings) = &drawings {
            draw::draw(image, &search.faces).save(&drawings[at], None)?;
        }
        let quality = search.faces.first().map(|face| Quality::of(image, face, &search.faces));
        let nothing = search.largest(&file.display().to_string()).err();
        Ok((search.faces, quality, nothing))
    })?;
    let mut nothing = None;
    let (mut list, mut found) = (Vec::new(), 0);
    for (file, (faces, quality, error)) in seen.photos {
        found += faces.len();
        nothing = error.or(nothing);
        if json {
            list.push(Found { file, faces, quality });
        } else {
            print_line!("{}", describe(&file, &faces, quality.as_ref()))?;
        }
    }
    if json {
        print_json(&list)?;
    }
    match nothing {
        Some(error) if found == 0 => Err(error),
        _ => Ok(()),
    }
}

/// Where the drawing of each image goes.
fn drawings(photos: &Photos, out: &Path) -> Result<Vec<PathBuf>> {
    if photos.only().is_some() && !out.is_dir() {
        let png = out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
        if !png {
            let why = format!("drawings are written as PNG: name `{}` with .png", out.display());
            return Err(Failure::Usage(why).into());
        }
        files::check_writable(out)?;
        return Ok(vec![out.to_path_buf()]);
    }
    pngs_in(out, photos)
}

fn embed(images: &Images, encoder: &Encoder, out: &Path, json: bool) -> Result<()> {
    files::check_writable(out)?;
    let encoder = encoder.load()?;
    let people = People::embed(images, &encoder)?;
    let names = short_names(&people.files);
    let vectors = people.vectors.iter().map(|vector| (vec![vector.len()], &vector[..]));
    let [_, (name, sha256)] = encoder.provenance();
    write_vectors(out, &names, vectors, [("face_encoder", name.into()), ("face_encoder_sha256", sha256)])?;
    if json {
        print_json(&json!({ "out": out, "names": names, "face_encoder": name, "left_out": people.left_out }))
    } else {
        print_line!("{} faces in `{}`", names.len(), out.display())
    }
}

/// Writes a .safetensors of one tensor (shape, values) an image; `about` tells what made them.
fn write_vectors<'a>(
    out: &Path,
    names: &[String],
    tensors: impl Iterator<Item = (Vec<usize>, &'a [f32])>,
    about: [(&str, String); 2],
) -> Result<()> {
    let tensors: Vec<(Vec<usize>, Vec<u8>)> = tensors
        .map(|(shape, values)| (shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = names.iter().zip(&tensors).map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("four bytes a number"))
    });
    let about: HashMap<String, String> = about.map(|(key, value)| (key.to_string(), value)).into();
    files::write_whole(out, &safetensors::serialize(views, Some(about))?)
}

fn compare(images: &Images, encoder: &FaceEncoder, json: bool) -> Result<()> {
    let people = People::embed(images, encoder)?;
    let cosines: Vec<Vec<f32>> =
        people.vectors.iter().map(|a| people.vectors.iter().map(|b| cosine(a, b)).collect()).collect();
    if json {
        let [_, (name, _)] = encoder.provenance();
        return print_json(&json!({ "files": people.files, "cosine": cosines, "face_encoder": name }));
    }
    let count = people.files.len();
    let head: String = (1..=count).map(|column| format!("{column:>7}")).collect();
    print_line!("   {head}")?;
    for (row, (file, cosines)) in people.files.iter().zip(&cosines).enumerate() {
        let numbers: String = cosines.iter().map(|cosine| format!("{cosine:>7.3}")).collect();
        print_line!("{:>3}{numbers}  {}", row + 1, file.display())?;
    }
    Ok(())
}

fn crop(images: &Images, encoder: &FaceEncoder, out: &Path, size: usize, json: bool) -> Result<()> {
    let photos = Photos::find(&images.images)?;
    let targets = pngs_in(out, &photos)?;
    let seen = photos.look(|at, file, image| {
        let search = encoder.search(image)?;
        let face = search.largest(&file.display().to_string())?;
        align(image, &face.points, size).save(&targets[at], None)?;
        Ok((search.faces.len(), targets[at].clone()))
    })?;
    tell_several(&seen, |(faces, _)| *faces);
    if json {
        let written: Vec<_> =
            seen.photos.iter().map(|(file, (_, face))| json!({ "file": file, "face": face })).collect();
        print_json(&written)
    } else {
        print_line!("{} faces in `{}`", seen.photos.len(), out.display())
    }
}

fn dedupe(images: &Images, encoder: &FaceEncoder, threshold: Option<f32>, json: bool) -> Result<()> {
    let threshold = threshold.unwrap_or(encoder.same_person());
    let people = People::embed(images, encoder)?;
    let mut list = Vec::new();
    for (number, members) in groups(&people.vectors, threshold).into_iter().enumerate() {
        let vectors: Vec<&[f32]> = members.iter().map(|&face| &people.vectors[face][..]).collect();
        let centre = mean_direction(&vectors);
        let rows: Vec<(&Path, f32)> = members
            .iter()
            .map(|&face| (people.files[face].as_path(), cosine(&people.vectors[face], &centre)))
            .collect();
        if json {
            let images: Vec<_> =
                rows.iter().map(|(file, cosine)| json!({ "file": file, "cosine": cosine })).collect();
            list.push(json!({ "person": number + 1, "pictures": images }));
            continue;
        }
        let images = if rows.len() == 1 { "image" } else { "images" };
        print_line!("person {}: {} {images}", number + 1, rows.len())?;
        for (file, cosine) in rows {
            print_line!("  {cosine:.3}  {}", file.display())?;
        }
    }
    if json {
        let [_, (name, _)] = encoder.provenance();
        print_json(
            &json!({ "people": list, "threshold": threshold, "face_encoder": name, "left_out": people.left_out }),
        )?;
    }
    Ok(())
}

fn bench(encoder: &FaceEncoder, runs: u32, json: bool) -> Result<()> {
    let times = encoder.time(runs as usize)?.map(|time| time.as_secs_f64() * 1e3);
    let [(detector, _), (recogniser, _)] = encoder.provenance();
    let [detection, recognition] = times;
    if json {
        return print_json(&json!({
            "detector": { "name": detector, "milliseconds": detection },
            "recogniser": { "name": recogniser, "milliseconds": recognition },
        }));
    }
    print_line!("{detector} at 640×640 pixels: {detection:.1} ms\n{recogniser}, a face: {recognition:.1} ms")
}

/// An image in `detect --json`.
#[derive(serde::Serialize)]
struct Found {
    file: PathBuf,
    faces: Vec<Face>,
    /// Of the largest face.
    quality: Option<Quality>,
}

/// The largest face of each image as a unit vector.
struct People {
    files: Vec<PathBuf>,
    vectors: Vec<Vec<f32>>,
    left_out: serde_json::Value,
}

impl People {
    fn embed(images: &Images, encoder: &FaceEncoder) -> Result<Self> {
        let seen = Photos::find(&images.images)?.look(|_, file, image| {
            let search = encoder.search(image)?;
            let face = search.largest(&file.display().to_string())?;
            Ok((search.faces.len(), encoder.embed(image, face)?))
        })?;
        tell_several(&seen, |(faces, _)| *faces);
        let left_out = seen.left_out_json();
        let (files, vectors) = seen.photos.into_iter().map(|(file, (_, vector))| (file, vector)).unzip();
        Ok(Self { files, vectors, left_out })
    }
}

/// Says which images have several faces.
fn tell_several<T>(seen: &Seen<T>, faces: impl Fn(&T) -> usize) {
    for (file, story) in &seen.photos {
        if faces(story) > 1 {
            progress::note(format_args!(
                "{} faces in `{}`: the largest is taken",
                faces(story),
                file.display()
            ));
        }
    }
}

/// A PNG in the folder `out`, which is made, for each photo, named after it.
fn pngs_in(out: &Path, photos: &Photos) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make the folder `{}`", out.display()))?;
    let sources: Vec<PathBuf> = photos.paths().map(Path::to_path_buf).collect();
    let mut taken = HashSet::new();
    let mut target = |name: String| {
        let name = name.replace(['/', '\\'], "-");
        let short = Path::new(&name).with_extension("png");
        // `a.jpg` and `a.webp` do not fall on one file.
        let file = if taken.insert(short.clone()) { short } else { PathBuf::from(format!("{name}.png")) };
        out.join(file)
    };
    Ok(short_names(&sources).into_iter().map(&mut target).collect())
}

/// File names where they differ, else whole paths.
fn short_names(files: &[PathBuf]) -> Vec<String> {
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut times = HashMap::new();
    for file in files {
        *times.entry(name(file)).or_insert(0) += 1;
    }
    files
        .iter()
        .map(|file| if times[&name(file)] == 1 { name(file) } else { file.display().to_string() })
        .collect()
}

fn describe(file: &Path, faces: &[Face], quality: Option<&Quality>) -> String {
    let mut text =
        format!("{}: {} {}", file.display(), faces.len(), if faces.len() == 1 { "face" } else { "faces" });
    for face in faces {
        let [left, top, right, bottom] = face.bounds;
        text +=
            &format!("\n  score {:.3}  box {left:.1} {top:.1} {right:.1} {bottom:.1}  points", face.score);
        text.extend(face.points.iter().map(|[x, y]| format!("  {x:.1} {y:.1}")));
    }
    if let Some(quality) = quality {
        text += &format!(
            "\n  the largest: {:.0} pixels wide, sharpness {:.1}, turned {:.0}, up {:.0}, leaning {:.0} degrees",
            quality.width, quality.sharpness, quality.yaw, quality.pitch, quality.roll
        );
        text.extend(quality.hints().iter().map(|hint| format!("\n  {hint}")));
    }
    text
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print_line!("{}", serde_json::to_string_pretty(value)?)
}
