//! `difflora train-lora`: a folder of one person's images → LoRA (DreamBooth); or many people, a LoRA each.

mod args;
mod options;

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

pub use args::Args;

use crate::commands::output::{Output, print_line};
use crate::files::{self, FolderLock};
use crate::image::files_in;
use crate::progress;
use crate::recipes::dreambooth::batch_trainer::JobQueue;
use crate::recipes::dreambooth::lora_trainer::{CHECKPOINT, Job};
use crate::recipes::dreambooth::setup::{self, RunConfig};
use crate::recipes::dreambooth::training_folder::TrainingFolder;
use crate::threads::in_threads;
use crate::train::checkpoint;

/// Side of the latents up to which a base is a small one, for which the preset `tiny` is made.
const SMALL_LATENTS: usize = 32;

/// Trains the LoRAs and writes them.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let base = args.base_options.open(&args.base)?;
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
    // Of a person alone and of many together, the one that comes second is refused.
    match alone {
        true => FolderLock::require_free(files::folder_of(&args.out))?,
        false => jobs.iter().try_for_each(|job| FolderLock::require_free(&job.folder))?,
    }
    let folders = jobs.iter().map(|job| match TrainingFolder::read(&job.images) {
        // Of many people, one who fails is reported when the turn comes.
        Err(_) if !alone => Ok(TrainingFolder::default()),
        read => read,
    });
    let folders = folders.collect::<Result<Vec<_>>>()?;
    let side = if settings.images.resolution == 0 { base.native_size } else { settings.images.resolution };
    let several = !alone && args.people_per_batch > 1;
    settings.check_run(side, several, args.options.class_images.is_some())?;

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

/// The people to train, and where each LoRA goes.
fn jobs(args: &Args) -> Result<Vec<Job>> {
    let people = match (&args.many, &args.images) {
        (Some(folder), _) => {
            let people = Job::of_people(folder, &args.out)?;
            std::fs::create_dir_all(&args.out)
                .with_context(|| format!("cannot make `{}`", args.out.display()))?;
            people
        }
        (None, Some(images)) => vec![Job::new(images, args.out.clone())],
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
