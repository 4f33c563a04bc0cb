//! `difflora portraits`: paint people of the small world.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use crate::commands::values::seed;
use crate::failure::Failure;
use crate::files;
use crate::image::Image;
use crate::output::{Output, print_line};
use crate::progress;
use crate::synthetic::{self, CaptionOptions, Detail, Person, Scene, World};
use crate::train;

/// Arguments of `difflora portraits`.
///
/// Writes OUT/person-0001/0001.png, its caption 0001.txt, and the attributes and scenes in person.json. --seed and
/// number determine a person: the same command writes the same bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder to write, created if missing.
    #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: PathBuf,
    /// Number of people.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1_000_000), env = "DIFFLORA_PEOPLE")]
    people: u64,
    /// Images per person.
    #[arg(long, value_name = "K", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=100_000), alias = "pictures", env = "DIFFLORA_IMAGES")]
    images: u64,
    /// Number of the first person.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=1_000_000_000), env = "DIFFLORA_FIRST")]
    first: u64,
    /// Seed of the population; -1 takes a random one.
    #[arg(long, default_value_t = 0, env = "DIFFLORA_SEED", allow_negative_numbers = true, value_parser = seed)]
    seed: u64,
    /// How scenes vary: `varied`, or `aligned` with the face at one place, more styles and things, and captions that
    /// name all of it.
    #[arg(long, value_enum, default_value = "varied", env = "DIFFLORA_WORLD")]
    world: World,
    /// Show all people in the same scenes, generated from this seed.
    #[arg(long, value_name = "SEED", env = "DIFFLORA_SCENES", allow_negative_numbers = true, value_parser = seed)]
    scenes: Option<u64>,
    /// Side in pixels.
    #[arg(long, value_name = "PX", default_value_t = 64, value_parser = clap::value_parser!(u16).range(8..=1024), env = "DIFFLORA_SIZE")]
    size: u16,
    /// Samples per pixel side (antialiasing).
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8), env = "DIFFLORA_SUPERSAMPLE")]
    supersample: u8,
    /// Word for the person in captions.
    #[arg(long, value_name = "WORDS", default_value = "person", env = "DIFFLORA_SUBJECT")]
    subject: String,
    /// Mention up to N attributes of the person in captions, such as hair and skin.
    #[arg(long, value_name = "N", default_value_t = 0, env = "DIFFLORA_ATTRIBUTES")]
    attributes: usize,
}

/// Paints the people.
pub fn run(args: Args, output: &Output) -> Result<()> {
    check_writable(&args.out)?;
    let bar = progress::bar(args.people * args.images, "painting");
    (args.first..args.first + args.people).into_par_iter().try_for_each(|number| {
        let person = Person::new(args.seed, number);
        paint_person(&person, &args, || bar.inc(1))
    })?;
    bar.finish_and_clear();
    if output.json {
        let last = args.first + args.people - 1;
        let report =
            json!({ "out": args.out, "first": args.first, "last": last, "pictures_each": args.images });
        print_line!("{report}")?;
    } else {
        let (images, people, out) = (args.people * args.images, args.people, args.out.display());
        progress::note(format_args!("painted {images} images of {people} people in `{out}`"));
    }
    Ok(())
}

/// Writes the images and captions of one person, then what is known about them.
fn paint_person(person: &Person, args: &Args, painted: impl Fn()) -> Result<()> {
    let folder = args.out.join(format!("person-{:04}", person.number));
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
    let options = CaptionOptions { subject: &args.subject, attributes: args.attributes, drop: 0.0 };
    let mut records = Vec::new();
    for number in 1..=args.images {
        progress::check()?;
        let scene = match args.scenes {
            Some(seed) => args.world.shared_scene(seed, number),
            None => args.world.scene(person, number),
        };
        let rgb = synthetic::paint(person, &scene, args.size.into(), args.supersample.into());
        let caption = match (args.world, args.attributes) {
            (World::Varied, _) => synthetic::caption(person, &scene, options, args.seed),
            (World::Aligned, attributes) => {
                let detail = if attributes == 0 { Detail::Short } else { Detail::All };
                synthetic::describe(
                    person,
                    &scene,
                    &args.subject,
                    detail,
                    &mut train::rng(args.seed, scene.grain),
                )
            }
        };
        let image = format!("{number:04}.png");
        Image { width: args.size.into(), height: args.size.into(), rgb }.save(&folder.join(&image), None)?;
        let text = folder.join(&image).with_extension("txt");
        files::write_whole(&text, format!("{caption}\n").as_bytes())?;
        records.push(serde_json::to_string(&Record { image, caption, scene })?);
        painted();
    }
    files::write_whole(&folder.join("person.json"), about(person, &records)?.as_bytes())
}

/// What is known about one image.
#[derive(Serialize)]
struct Record {
    #[serde(rename = "picture")]
    image: String,
    caption: String,
    scene: Scene,
}

/// `person.json`: seed, number, identity words and factors, and one line an image.
fn about(person: &Person, records: &[String]) -> Result<String> {
    let Person { seed, number, identity } = person;
    let words = serde_json::to_string(&synthetic::identity_words(identity))?;
    let factors = serde_json::to_string(identity)?;
    let images = records.join(",\n");
    Ok(format!(
        "{{\"seed\":{seed},\"number\":{number},\"words\":{words},\n\"identity\":{factors},\n\"pictures\":[\n{images}\n]}}\n"
    ))
}

/// Makes the folder and tries to write in it, before any work is done.
fn check_writable(folder: &Path) -> Result<()> {
    let place = || format!("`--out {}`", folder.display());
    if folder.exists() && !folder.is_dir() {
        return Err(Failure::Usage(format!("{} is not a folder", place())).into());
    }
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", place()))?;
    tempfile::tempfile_in(folder).with_context(|| format!("cannot write in the folder {}", place()))?;
    Ok(())
}
