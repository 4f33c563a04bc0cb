//! From a base model and settings to a trainer, ready for the first job.

use std::collections::VecDeque;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device};

use crate::failure::Failure;
use crate::identity::FaceEncoder;
use crate::limits::require_memory;
use crate::lora::ldm_keys::BlockLayout;
use crate::recipes::dreambooth::batch_trainer::{BatchTrainer, JobQueue};
use crate::recipes::dreambooth::config::Settings;
use crate::recipes::dreambooth::image_dataset::{Encoders, ImageDataset, Scaling};
use crate::recipes::dreambooth::lockstep::Networks;
use crate::recipes::dreambooth::lora_trainer::Job;
use crate::recipes::dreambooth::previews::{PreviewPrompts, Previewer};
use crate::recipes::dreambooth::{class_images, image_dataset, targets};
use crate::sdxl::pipeline::SdxlLoader;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;

/// A run for one person or many.
pub struct RunConfig<'a> {
    /// Files of the base.
    pub files: &'a ModelFiles,
    /// Name and hash of the base.
    pub base: ModelId,
    /// Of the base; names of layers in LoRA files depend on it.
    pub layout: BlockLayout,
    /// Where to train.
    pub device: Device,
    /// Side of the images in pixels.
    pub side: usize,
    /// Folder of class images, which is filled up where the settings ask for more.
    pub class_folder: Option<&'a Path>,
    /// How the training folder calls the person, for the prompt of previews.
    pub called: Option<&'a str>,
    /// Continue from checkpoints.
    pub resume: bool,
    /// Whether there is one person only, whose failure is the run's.
    pub alone: bool,
    /// Training settings.
    pub settings: Settings,
}

/// Loads the base, encodes captions and class images, and queues `jobs`.
///
/// The text encoders and the VAE are freed before the UNet is loaded, where there is one job only.
///
/// # Errors
/// [`Failure::Usage`] for a rank or a size that the base does not have; errors of the files.
pub fn open(run: RunConfig, jobs: Vec<Job>) -> Result<(BatchTrainer, JobQueue)> {
    let RunConfig { files, base, layout, device, side, class_folder, called, resume, alone, settings } = run;
    let usage = |error: anyhow::Error| Failure::Usage(format!("{error:#}"));
    let model = SdxlLoader::open(files, DType::from(settings.training.dtype), &device)?;
    model.latent_shape(side, side).map_err(usage)?;
    let batch = settings.training.batch;
    let channels = model.vae.block_out_channels.first().map_or(0, |channels| 3 + channels);
    require_memory("the images of a step", &[batch, side, side, channels, 4], "--batch or --resolution")?;
    let (text, vae) = (model.load_text()?, model.load_vae()?);
    let mut networks =
        Networks { unet: model.skeleton()?.unet, text: settings.lora.text_encoders.then(|| text.clone()) };
    let rank = settings.lora.rank;
    let modules =
        |networks: &Networks| targets::target_modules(networks, settings.lora.targets, rank).map_err(usage);
    modules(&networks)?; // names and shapes are enough to refuse a rank before anything long begins

    let class_folder = class_folder.filter(|_| settings.objective.class_images > 0);
    let previewer = (settings.samples.every > 0 || class_folder.is_some())
        .then(|| Previewer::new(&model, &text, vae.clone(), side))
        .transpose()?;
    if let (Some(folder), Some(previewer)) = (class_folder, &previewer) {
        class_images::complete(folder, &model, &text, previewer, &settings)?;
    }
    let preview_prompts = PreviewPrompts::new(&settings, || settings.caption(called))?;
    let preview_captions = previewer.as_ref().map(|_| preview_prompts.encode(&text)).transpose()?;
    let scaling = Scaling::of(&vae, &device)?;
    let encoders = Encoders { vae, text, device: device.clone() };
    let class = match class_folder {
        Some(folder) => {
            let mut images = image_dataset::read_images(folder, |_| settings.class_prompt())?;
            images.truncate(settings.objective.class_images as usize);
            Some(ImageDataset::new(images, &settings, side, &encoders)?)
        }
        None => None,
    };
    let mut queue = JobQueue::new(VecDeque::from(jobs), encoders, FaceEncoder::builtin()?);
    if alone {
        queue.encode_first(&settings, side)?; // 3.6 GB of encoders in f32 SDXL go before 10 GB of UNet come
    }

    networks.unet = model.load_unet()?;
    networks.visit_layers(&mut |_, mut layer| layer.set_adapter(None));
    let modules = modules(&networks)?;
    let downs = targets::random_shared_down(&modules, rank, settings.seed)?;
    let weight_norm = targets::weight_norm(&networks, &modules)?;
    let half = networks.unet.compute_dtype() == DType::F16;
    let trainer = BatchTrainer {
        networks,
        schedule: model.schedule,
        scaling,
        class,
        previewer: previewer.filter(|_| settings.samples.every > 0),
        preview_prompts,
        preview_captions,
        modules,
        downs,
        weight_norm,
        layout,
        base,
        device,
        side,
        half,
        resume,
        alone,
        settings,
    };
    Ok((trainer, queue))
}
