//! `difflora portraits`: paint people of the small world.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::json;

use crate::commands::output::{Output, print_line};
use crate::commands::values::{named, seed};
use crate::failure::Failure;
use crate::progress;
use crate::synthetic::portraits::Portraits;
use crate::synthetic::{Person, World};

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
    #[arg(long, value_parser = named::<World>(), default_value = "varied", env = "DIFFLORA_WORLD")]
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
    let portraits = Portraits {
        images: args.images,
        world: args.world,
        scenes: args.scenes,
        size: args.size.into(),
        supersample: args.supersample.into(),
        subject: args.subject,
        attributes: args.attributes,
    };
    (args.first..args.first + args.people).into_par_iter().try_for_each(|number| {
        let folder = args.out.join(format!("person-{number:04}"));
        portraits.paint(&Person::new(args.seed, number), &folder, || bar.inc(1))
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
