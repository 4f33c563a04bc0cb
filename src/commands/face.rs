//! `difflora face`: detect, embed, compare, cut out and group faces.

mod crop;
mod detect;
mod embed;
mod embed_image;
mod group;
mod inputs;
mod verify;

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use self::inputs::{Encoder, Images};
use crate::commands::output::{Output, print_line};
use crate::identity::FaceEncoder;
use crate::identity::align::SIDE;

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
        /// Find 106 landmarks of each face too, with 2d106det.onnx of the face encoder, else of antelopev2.
        #[arg(long, env = "DIFFLORA_LANDMARKS")]
        landmarks: bool,
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

/// Runs the action.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let json = output.json;
    match args.action {
        Action::Detect { images, encoder, draw, landmarks } => {
            let landmarks = landmarks.then(|| encoder.load_landmarks()).transpose()?;
            detect::detect(&images, &encoder.load()?, landmarks.as_ref(), draw.as_deref(), json)
        }
        Action::Embed { images, encoder, image_encoder, out } => match image_encoder.encoder() {
            Some(name) => embed_image::embed(&images, &encoder, name, &image_encoder, &out, json),
            None => embed::embed(&images, &encoder, &out, json),
        },
        Action::Compare { images, encoder } => group::compare(&images, &encoder.load()?, json),
        Action::Crop { images, encoder, out, size } => {
            crop::crop(&images, &encoder.load()?, &out, size as usize, json)
        }
        Action::Bench { encoder, runs } => bench(&encoder.load()?, runs, json),
        Action::Dedupe { images, encoder, threshold } => {
            group::dedupe(&images, &encoder.load()?, threshold, json)
        }
        Action::Verify { folder, encoder } => verify::verify(&folder, &encoder, json),
    }
}

/// A threshold from −1 to 1.
fn cosine_value(text: &str) -> std::result::Result<f32, String> {
    match text.parse() {
        Ok(value) if (-1.0..=1.0).contains(&value) => Ok(value),
        _ => Err("wanted a cosine from -1 to 1".into()),
    }
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

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print_line!("{}", serde_json::to_string_pretty(value)?)
}
