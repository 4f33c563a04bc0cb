//! `difflora face`: detect, embed, compare and cut out faces.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::cli::Common;
use crate::failure::Failure;
use crate::files;
use crate::identity::align::{SIDE, align};
use crate::identity::detect::{Detector, Face};
use crate::identity::recognise::{Recogniser, cosine};
use crate::picture::{Picture, pictures_in};
use crate::progress;

/// Arguments of `difflora face`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Print box, five landmarks and score of each face, the largest first.
    Detect {
        #[command(flatten)]
        pictures: Pictures,
    },
    /// Write one unit vector a picture, under its file name.
    Embed {
        #[command(flatten)]
        pictures: Pictures,
        #[command(flatten)]
        encoder: Encoder,
        /// The .safetensors file to write.
        #[arg(long, value_name = "FILE", env = "DIFFLORA_OUT")]
        out: PathBuf,
    },
    /// Print the cosine between the largest faces of all pictures.
    Compare {
        #[command(flatten)]
        pictures: Pictures,
        #[command(flatten)]
        encoder: Encoder,
    },
    /// Write the largest face of each picture, upright and centred as recognisers take it.
    Crop {
        #[command(flatten)]
        pictures: Pictures,
        /// The folder to write into.
        #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
        out: PathBuf,
        /// Height and width in pixels.
        #[arg(long, default_value_t = SIDE as u32, value_parser = clap::value_parser!(u32).range(16..=4096))]
        size: u32,
    },
}

#[derive(Debug, clap::Args)]
struct Pictures {
    /// Pictures, or folders of them.
    #[arg(required = true, value_name = "PICTURE|DIR")]
    pictures: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Encoder {
    /// The recogniser: the condition of the hypernetwork, or the judge of `eval`.
    #[arg(long, visible_alias = "encoder", env = "DIFFLORA_FACE_ENCODER", default_value = "mobilefacenet")]
    face_encoder: EncoderName,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum EncoderName {
    /// 512 numbers, the condition of the hypernetwork.
    Mobilefacenet,
    /// 128 numbers, the judge of `eval`.
    Sface,
}

impl Encoder {
    fn load(&self) -> Result<Recogniser> {
        match self.face_encoder {
            EncoderName::Mobilefacenet => Recogniser::mobilefacenet(),
            EncoderName::Sface => Recogniser::sface(),
        }
    }
}

/// Does what was asked for.
pub fn run(args: Args, common: &Common) -> Result<()> {
    match args.action {
        Action::Detect { pictures } => detect(&pictures, common.json),
        Action::Embed { pictures, encoder, out } => embed(&pictures, &encoder.load()?, &out, common.json),
        Action::Compare { pictures, encoder } => compare(&pictures, &encoder.load()?, common.json),
        Action::Crop { pictures, out, size } => crop(&pictures, &out, size as usize, common.json),
    }
}

fn detect(pictures: &Pictures, json: bool) -> Result<()> {
    let detector = Detector::yunet()?;
    let (mut list, mut found) = (Vec::new(), 0);
    let mut nothing = None;
    pictures.for_each(|file, picture| {
        let search = detector.search(picture)?;
        found += search.faces.len();
        nothing = search.largest(&file.display().to_string()).err();
        if json {
            list.push(Found { file: file.to_path_buf(), faces: search.faces });
        } else {
            print(&describe(file, &search.faces))?;
        }
        Ok(())
    })?;
    if json {
        print_json(&list)?;
    }
    match nothing {
        Some(error) if found == 0 => Err(error),
        _ => Ok(()),
    }
}

fn embed(pictures: &Pictures, recogniser: &Recogniser, out: &Path, json: bool) -> Result<()> {
    files::check_writable(out)?;
    let people = People::embed(pictures, recogniser)?;
    let bytes: Vec<Vec<u8>> = people
        .vectors
        .iter()
        .map(|vector| vector.iter().flat_map(|value| value.to_le_bytes()).collect())
        .collect();
    let names = people.names();
    let tensors = names.iter().zip(&bytes).zip(&people.vectors).map(|((name, bytes), vector)| {
        let view = TensorView::new(Dtype::F32, vec![vector.len()], bytes).expect("four bytes a number");
        (name.as_str(), view)
    });
    let network = recogniser.network();
    let about = [("face_encoder", network.name().to_string()), ("face_encoder_sha256", network.sha256())];
    let about: HashMap<String, String> = about.map(|(key, value)| (key.to_string(), value)).into();
    files::write_whole(out, &safetensors::serialize(tensors, Some(about))?)?;
    if json {
        print_json(&json!({ "out": out, "names": names, "face_encoder": network.name() }))
    } else {
        print(&format!("{} faces in `{}`", names.len(), out.display()))
    }
}

fn compare(pictures: &Pictures, recogniser: &Recogniser, json: bool) -> Result<()> {
    let people = People::embed(pictures, recogniser)?;
    let cosines: Vec<Vec<f32>> =
        people.vectors.iter().map(|a| people.vectors.iter().map(|b| cosine(a, b)).collect()).collect();
    if json {
        let name = recogniser.network().name();
        return print_json(&json!({ "files": people.files, "cosine": cosines, "face_encoder": name }));
    }
    let count = people.files.len();
    let head: String = (1..=count).map(|column| format!("{column:>7}")).collect();
    print(&format!("   {head}"))?;
    for (row, (file, cosines)) in people.files.iter().zip(&cosines).enumerate() {
        let numbers: String = cosines.iter().map(|cosine| format!("{cosine:>7.3}")).collect();
        print(&format!("{:>3}{numbers}  {}", row + 1, file.display()))?;
    }
    Ok(())
}

fn crop(pictures: &Pictures, out: &Path, size: usize, json: bool) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make the folder `{}`", out.display()))?;
    let detector = Detector::yunet()?;
    let (mut sources, mut faces) = (Vec::new(), Vec::new());
    pictures.for_each(|file, picture| {
        let face = largest(&detector, file, picture)?;
        sources.push(file.to_path_buf());
        faces.push(align(picture, &face.points, size));
        Ok(())
    })?;
    let mut written = Vec::new();
    for ((name, face), source) in short_names(&sources).iter().zip(&faces).zip(&sources) {
        let path = out.join(Path::new(&name.replace(['/', '\\'], "-")).with_extension("png"));
        face.save(&path, None)?;
        written.push(json!({ "file": source, "face": path }));
    }
    if json {
        print_json(&written)
    } else {
        print(&format!("{} faces in `{}`", written.len(), out.display()))
    }
}

/// A line of `detect --json`.
#[derive(serde::Serialize)]
struct Found {
    file: PathBuf,
    faces: Vec<Face>,
}

/// The largest face of each picture as a unit vector.
struct People {
    files: Vec<PathBuf>,
    vectors: Vec<Vec<f32>>,
}

impl People {
    fn embed(pictures: &Pictures, recogniser: &Recogniser) -> Result<Self> {
        let detector = Detector::yunet()?;
        let mut people = Self { files: Vec::new(), vectors: Vec::new() };
        pictures.for_each(|file, picture| {
            let face = largest(&detector, file, picture)?;
            people.files.push(file.to_path_buf());
            people.vectors.push(recogniser.embed(picture, &face)?);
            Ok(())
        })?;
        Ok(people)
    }

    fn names(&self) -> Vec<String> {
        short_names(&self.files)
    }
}

impl Pictures {
    /// Runs `story` on each picture. One that was named must do; one that was found in a folder is left out with a
    /// warning when it cannot be read or shows no face.
    fn for_each(&self, mut story: impl FnMut(&Path, &Picture) -> Result<()>) -> Result<()> {
        let mut files = Vec::new();
        for path in &self.pictures {
            if path.is_dir() {
                let found = pictures_in(path)?;
                if found.is_empty() {
                    return Err(Failure::unusable(path, "there is no picture in this folder"));
                }
                files.extend(found.into_iter().map(|file| (file, false)));
            } else {
                files.push((path.clone(), true));
            }
        }
        let bar = progress::bar(files.len() as u64, "faces");
        let (mut done, mut left_out) = (0, None);
        for (file, named) in &files {
            progress::check()?;
            match Picture::open(file).and_then(|picture| story(file, &picture)) {
                Ok(()) => done += 1,
                Err(error) if *named || error.downcast_ref::<Failure>().is_none() => return Err(error),
                Err(error) => {
                    bar.suspend(|| progress::warn(format!("left out: {error:#}")));
                    left_out = Some(error);
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        match left_out {
            Some(error) if done == 0 => Err(error),
            _ => Ok(()),
        }
    }
}

/// The largest face of a picture; says so when there are several.
fn largest(detector: &Detector, file: &Path, picture: &Picture) -> Result<Face> {
    let search = detector.search(picture)?;
    let face = search.largest(&file.display().to_string())?;
    if search.faces.len() > 1 {
        progress::note(format!("{} faces in `{}`; the largest is used", search.faces.len(), file.display()));
    }
    Ok(face.clone())
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

fn describe(file: &Path, faces: &[Face]) -> String {
    let mut text =
        format!("{}: {} {}", file.display(), faces.len(), if faces.len() == 1 { "face" } else { "faces" });
    for face in faces {
        let [left, top, right, bottom] = face.bounds;
        text +=
            &format!("\n  score {:.3}  box {left:.1} {top:.1} {right:.1} {bottom:.1}  points", face.score);
        text.extend(face.points.iter().map(|[x, y]| format!("  {x:.1} {y:.1}")));
    }
    text
}

fn print(text: &str) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("cannot write to standard output")
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}
