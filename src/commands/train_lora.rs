//! `difflora train-lora`: a folder of one person's images → LoRA (DreamBooth); or many people, a LoRA each.

mod args;
mod options;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

pub use args::Args;

use crate::failure::Failure;
use crate::files::{self, FolderLock};
use crate::image::files_in;
use crate::output::{Output, print_line};
use crate::progress;
use crate::recipes::dreambooth::batch_trainer::JobQueue;
use crate::recipes::dreambooth::config::{Crop, Settings};
use crate::recipes::dreambooth::image_dataset;
use crate::recipes::dreambooth::lora_trainer::{CHECKPOINT, Job};
use crate::recipes::dreambooth::setup::{self, RunConfig};
use crate::recipes::dreambooth::training_folder::TrainingFolder;
use crate::registry::Base;
use crate::threads::in_threads;
use crate::train::checkpoint;

/// Side of the latents up to which a base is a small one, for which the preset `tiny` is made.
const SMALL_LATENTS: usize = 32;

/// Trains the LoRAs and writes them.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let base = Base::open(&args.base, &args.base_options)?;
    let base_id = base.id()?;
    let preset = if base.latent_size <= SMALL_LATENTS { "tiny" } else { "sdxl-dreambooth" };
    let settings = args.options.settings(args.config.as_deref(), preset)?;
    let jobs = jobs(&args)?;
    refuse_inputs(&args, &jobs)?;
    let alone = args.many.is_none();
    if args.resume {
        let states = jobs.iter().map(|job| job.folder.join(CHECKPOINT));
        let finished = jobs.iter().filter(|_| !alone).map(|job| job.out.clone());
        checkpoint::require_any(&states.chain(finished).collect::<Vec<_>>())?;
    }
    let _lock = FolderLock::acquire(if alone { &jobs[0].folder } else { &args.out })?;
    let folders = jobs.iter().map(|job| match TrainingFolder::read(&job.images) {
        // Of many people, one who fails is reported when the turn comes.
        Err(_) if !alone => Ok(TrainingFolder::default()),
        read => read,
    });
    let folders = folders.collect::<Result<Vec<_>>>()?;
    let side = if settings.images.resolution == 0 { base.native_size } else { settings.images.resolution };
    check_options(&args, &settings, side)?;

    let steps = folders.iter().map(|folder| settings.steps(folder.images.len())).sum();
    let run = RunConfig {
        files: &base.files,
        base: base_id,
        layout: base.block_layout,
        device: args.device.open()?,
        side,
        class_folder: args.options.class_images.as_deref(),
        called: folders.first().filter(|_| alone).and_then(TrainingFolder::called),
        resume: args.resume,
        alone,
        settings,
    };
    let (trainer, queue) = setup::open(run, jobs)?;
    let bar = progress::bar(steps, "lora");
    let slots = if alone { 1 } else { args.people_per_batch as usize };
    let groups = if alone { 1 } else { args.groups as usize };
    in_threads(groups, |_| trainer.train(&queue, slots, &bar))?;
    bar.finish_and_clear();
    report(&args, output, &queue)
}

/// Refuses options that exclude each other.
fn check_options(args: &Args, settings: &Settings, side: usize) -> Result<()> {
    let buckets = settings.images.crop == Crop::Buckets;
    let class_images = settings.objective.class_images > 0;
    let why = if buckets && args.many.is_some() && args.people_per_batch > 1 {
        "people in one forward pass need images of one size: --crop center or random".into()
    } else if buckets && class_images {
        "class images are squares: use --crop center or random with them".into()
    } else if buckets && !side.is_multiple_of(16) {
        format!("buckets need a --resolution in multiples of 16, not {side}")
    } else if class_images && args.options.class_images.is_none() {
        "class images need a folder: --class-images DIR".into()
    } else {
        return Ok(());
    };
    Err(Failure::Usage(why).into())
}

/// The people to train, and where each LoRA goes.
fn jobs(args: &Args) -> Result<Vec<Job>> {
    let person = |images: &Path, out: PathBuf| Job {
        name: images.file_name().map_or("images".into(), |name| name.to_string_lossy().into()),
        images: images.to_path_buf(),
        folder: out.with_extension("training"),
        out,
    };
    let people = match (&args.many, &args.images) {
        (Some(folder), _) => {
            let folders = image_dataset::people_in(folder)?;
            std::fs::create_dir_all(&args.out)
                .with_context(|| format!("cannot make `{}`", args.out.display()))?;
            let out = |folder: &Path| {
                let mut name = folder.file_name().unwrap_or_default().to_os_string();
                name.push(".safetensors");
                args.out.join(name)
            };
            folders.iter().map(|folder| person(folder, out(folder))).collect()
        }
        (None, Some(images)) => vec![person(images, args.out.clone())],
        (None, None) => Vec::new(),
    };
    for Job { out, .. } in &people {
        files::check_writable(out)?;
    }
    Ok(people)
}

/// Refuses to write over the images or the config.
fn refuse_inputs(args: &Args, jobs: &[Job]) -> Result<()> {
    let mut inputs: Vec<PathBuf> = args.config.iter().cloned().collect();
    for job in jobs {
        // A folder that cannot be read is reported when its turn comes. A LoRA among the images is an older result.
        let files = files_in(&job.images).unwrap_or_default();
        inputs.extend(
            files.into_iter().filter(|file| file.extension().is_none_or(|kind| kind != "safetensors")),
        );
    }
    files::refuse_inputs(&jobs.iter().map(|job| job.out.as_path()).collect::<Vec<_>>(), &inputs)
}

/// Prints the written LoRAs; failures among many people are an error.
fn report(args: &Args, output: &Output, queue: &JobQueue) -> Result<()> {
    let (done, failed) = queue.results();
    if output.json {
        let loras: Vec<_> = done
            .iter()
            .map(|(lora, images, loss)| json!({ "lora": lora.display().to_string(), "pictures": images, "loss": loss }))
            .collect();
        match (&args.many, &loras[..]) {
            (None, [one]) => print_line!("{one}")?,
            _ => print_line!("{}", json!({ "loras": loras, "failed": failed }))?,
        }
    } else {
        for (lora, _, _) in &done {
            print_line!("LoRA    {}", lora.display())?;
        }
    }
    if let Some(first) = failed.first() {
        anyhow::bail!("{} of {} people failed, first: {first}", failed.len(), failed.len() + done.len());
    }
    Ok(())
}
