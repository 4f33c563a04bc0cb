//! Trains many LoRAs on one frozen base: a queue of jobs, the LoRAs that share each forward pass, and the files
//! written when one is finished.
//!
//! This loop is not [`descend`](crate::train::trainer::descend), which makes the steps of one state: here each forward
//! pass serves the states of several people, who begin and end at different steps, and of whom one may fail without the
//! others. A step of each is [`State::update`](crate::train::state::State::update), as there.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use candle_core::Device;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::diffusion::schedule::NoiseSchedule;
use crate::failure::Failure;
use crate::files;
use crate::identity::FaceEncoder;
use crate::lora::file::{self, Format};
use crate::lora::ldm_keys::BlockLayout;
use crate::progress;
use crate::recipes::dreambooth::config::Settings;
use crate::recipes::dreambooth::image_dataset::{self, Encoders, ImageDataset, Scaling};
use crate::recipes::dreambooth::lockstep::{Networks, SharedDown, TargetModule, TrainableLora};
use crate::recipes::dreambooth::lora_trainer::{Job, LoraTrainer, SharedData, SharedStart};
use crate::recipes::dreambooth::loss::{self, Objective, PersonGradients};
use crate::recipes::dreambooth::metadata::{self, SETTINGS_STAMP};
use crate::recipes::dreambooth::previews::{PreviewPrompts, Previewer};
use crate::sdxl::text::TextConditioning;
use crate::train::trainer;
use crate::weights::header::Header;
use crate::weights::model_id::ModelId;

/// Settings and models that all LoRAs of a run share.
pub struct BatchTrainer {
    /// Without adapters.
    pub networks: Networks,
    /// Noise levels.
    pub schedule: NoiseSchedule,
    /// From the VAE's latents to the UNet's.
    pub scaling: Scaling,
    /// Class images.
    pub class: Option<ImageDataset>,
    /// For samples along the way.
    pub previewer: Option<Previewer>,
    /// Prompts of the previews.
    pub preview_prompts: PreviewPrompts,
    /// The same, encoded without adapters.
    pub preview_captions: Option<Vec<TextConditioning>>,
    /// Layers that are adapted.
    pub modules: Vec<TargetModule>,
    /// `down` of each at the start.
    pub downs: SharedDown,
    /// Length of the weights of these layers.
    pub weight_norm: f64,
    /// For the spelling of layers in files.
    pub layout: BlockLayout,
    /// The base.
    pub base: ModelId,
    /// Where it lies.
    pub device: Device,
    /// Side of the images.
    pub side: usize,
    /// Whether it computes in f16.
    pub half: bool,
    /// Go on from checkpoints.
    pub resume: bool,
    /// Whether there is one person only, whose failure is the run's.
    pub alone: bool,
    /// Training settings.
    pub settings: Settings,
}

/// A LoRA that was written, the number of its images, and the mean loss of the last steps.
pub type Done = (PathBuf, usize, f64);

/// Jobs to start, and the results of finished ones.
pub struct JobQueue {
    pending: Mutex<Pending>,
    done: Mutex<Vec<Done>>,
    failed: Mutex<Vec<String>>,
}

/// The encoders are freed when the last job starts.
struct Pending {
    people: VecDeque<Job>,
    encoders: Option<Arc<(Encoders, FaceEncoder)>>,
    /// Of the first job, when encoded in advance.
    dataset: Option<Box<ImageDataset>>,
}

/// Training data of a job.
enum JobData {
    /// Not encoded yet; the encoders to use.
    Raw(Arc<(Encoders, FaceEncoder)>),
    Encoded(Box<ImageDataset>),
}

impl JobQueue {
    /// A queue of `people`.
    pub fn new(people: VecDeque<Job>, encoders: Encoders, faces: FaceEncoder) -> Self {
        let pending = Pending { people, encoders: Some(Arc::new((encoders, faces))), dataset: None };
        Self { pending: Mutex::new(pending), done: Mutex::default(), failed: Mutex::default() }
    }

    /// Encodes the first job's images and captions now; frees the encoders if it is the only job.
    pub fn encode_first(&mut self, settings: &Settings, side: usize) -> Result<()> {
        let pending = self.pending.get_mut().expect("no thread panics while it holds the queue");
        if let (Some(person), Some(encoders)) = (pending.people.front(), &pending.encoders) {
            pending.dataset = Some(Box::new(encode(person, settings, side, encoders)?));
        }
        if pending.people.len() < 2 {
            pending.encoders = None;
        }
        Ok(())
    }

    /// The next job.
    fn next(&self) -> Option<(Job, JobData)> {
        let mut pending = self.pending.lock().expect("no thread panics while it holds the queue");
        let person = pending.people.pop_front()?;
        if let Some(dataset) = pending.dataset.take() {
            return Some((person, JobData::Encoded(dataset)));
        }
        let last = pending.people.is_empty();
        let encoders = if last { pending.encoders.take() } else { pending.encoders.clone() };
        encoders.map(|encoders| (person, JobData::Raw(encoders)))
    }

    /// Finished LoRAs sorted by path, and the failures.
    pub fn results(&self) -> (Vec<Done>, Vec<String>) {
        let mut done = self.done.lock().expect("no thread panics while it holds the queue").clone();
        done.sort_by(|a, b| a.0.cmp(&b.0));
        (done, self.failed.lock().expect("no thread panics while it holds the queue").clone())
    }
}

/// A person's images and captions, as the networks take them. Warns of what makes a poor LoRA.
fn encode(
    person: &Job,
    settings: &Settings,
    side: usize,
    (encoders, faces): &(Encoders, FaceEncoder),
) -> Result<ImageDataset> {
    let images = image_dataset::read_images(&person.images, |folder| settings.caption(folder))?;
    image_dataset::warn_of_poor_images(&person.name, &images, faces)?;
    ImageDataset::new(images, settings, side, encoders)
}

impl BatchTrainer {
    /// Trains the queued LoRAs, at most `slots` concurrently; writes each when it finishes and starts the next.
    ///
    /// Ctrl-C saves the state of all that are in training.
    pub fn train(&self, queue: &JobQueue, slots: usize, bar: &ProgressBar) -> Result<()> {
        let mut trainers: Vec<LoraTrainer> = Vec::new();
        loop {
            while trainers.len() < slots
                && let Some((person, data)) = queue.next()
            {
                let name = person.name.clone();
                match self.start(person, data, queue) {
                    Ok(trainer) => {
                        bar.inc(trainer.as_ref().map_or(0, LoraTrainer::step));
                        trainers.extend(trainer);
                    }
                    Err(error) => self.fail(&name, error, queue)?,
                }
                bar.reset_eta();
            }
            if trainers.is_empty() {
                return Ok(());
            }
            if progress::interrupted() {
                trainers.iter().try_for_each(LoraTrainer::save)?;
                let step = trainers.iter().map(|trainer| trainer.step()).max().unwrap_or(0);
                progress::check().map_err(|error| Failure::with_hint(error, &trainer::resume_hint(step)))?;
            }
            if !trainers.iter().any(LoraTrainer::is_done) {
                let outcomes = self.step(&mut trainers)?;
                bar.inc(outcomes.len() as u64);
                let mut still = Vec::new();
                for (trainer, outcome) in trainers.into_iter().zip(outcomes) {
                    match outcome {
                        Ok(()) => still.push(trainer),
                        Err(error) => self.fail(&trainer.name, error, queue)?,
                    }
                }
                trainers = still;
                let loss = trainers.iter().map(LoraTrainer::loss).sum::<f64>() / trainers.len().max(1) as f64;
                bar.set_message(format!("loss {loss:.4}"));
            }
            let (done, still): (Vec<_>, Vec<_>) = trainers.into_iter().partition(LoraTrainer::is_done);
            trainers = still;
            for trainer in done {
                self.write(&trainer)?;
                let done = (trainer.out.clone(), trainer.dataset.len(), trainer.loss());
                queue.done.lock().expect("no thread panics while it holds the queue").push(done);
            }
        }
    }

    /// Reads a person's images and state; nothing when the person's LoRA is there already.
    fn start(&self, person: Job, data: JobData, queue: &JobQueue) -> Result<Option<LoraTrainer>> {
        let settings = &self.settings;
        std::fs::create_dir_all(&person.folder)
            .with_context(|| format!("cannot make `{}`", person.folder.display()))?;
        let dataset = match data {
            JobData::Encoded(dataset) => *dataset,
            JobData::Raw(encoders) => encode(&person, settings, self.side, &encoders)?,
        };
        let count = dataset.len();
        let stamp = self.stamp(&dataset)?;
        if self.resume && !self.alone && person.out.exists() {
            let written = Header::read(&mut file::open(&person.out)?)
                .map_err(|error| Failure::unusable(&person.out, error))?;
            if written.metadata.get(SETTINGS_STAMP) == Some(&metadata::hash(&stamp)) {
                queue.done.lock().expect("no thread panics while it holds the queue").push((
                    person.out,
                    count,
                    f64::NAN,
                ));
                return Ok(None);
            }
        }
        let shared = SharedStart {
            modules: &self.modules,
            downs: &self.downs,
            weight_norm: self.weight_norm,
            settings,
            resume: self.resume,
            half: self.half,
        };
        let trainer = LoraTrainer::new(person, dataset, stamp, &shared)?;
        let text = toml::to_string(settings)?;
        files::write_whole(&trainer.folder.join("settings.toml"), text.as_bytes())?;
        Ok(Some(trainer))
    }

    /// Settings that must be equal to resume from a state: all that decide the LoRA.
    fn stamp(&self, dataset: &ImageDataset) -> Result<Value> {
        let mut settings = serde_json::to_value(&self.settings)?;
        if let Some(map) = settings.as_object_mut() {
            map.remove("samples");
            if let Some(training) = map.get_mut("training").and_then(Value::as_object_mut) {
                training.remove("checkpoint_every");
            }
        }
        Ok(json!({
            "settings": settings,
            "base": self.base,
            "side": self.side,
            "pictures": { "count": dataset.len(), "sha256": dataset.sha256 },
            "class_pictures": self.class.as_ref().map(|class| json!({ "count": class.len(), "sha256": class.sha256 })),
        }))
    }

    /// One step of all `trainers`; an outcome each.
    fn step(&self, trainers: &mut [LoraTrainer]) -> Result<Vec<Result<()>>> {
        let settings = &self.settings;
        let weights = Objective {
            min_snr_gamma: settings.objective.min_snr_gamma,
            prior_weight: settings.objective.prior_weight,
        };
        let shared = SharedData {
            settings,
            class: self.class.as_ref(),
            scaling: &self.scaling,
            timesteps: self.schedule.alphas_bar.len(),
            device: &self.device,
        };
        let batches = |part: u64| trainers.iter().map(|trainer| trainer.batch(&shared, part)).collect();
        let loras: Vec<&TrainableLora> = trainers.iter().map(|trainer| &trainer.lora).collect();
        let passes = settings.training.accumulate;
        let gradients = loss::gradients(&self.networks, &self.schedule, &weights, &loras, passes, batches)?;
        let apply = |(trainer, (gradients, loss)): (&mut LoraTrainer, PersonGradients)| {
            trainer.apply(gradients, loss, settings)?;
            trainer::optional(self.sample(trainer).with_context(|| trainer.name.clone()));
            Ok(())
        };
        Ok(trainers.iter_mut().zip(gradients).map(apply).collect())
    }

    /// Writes a contact sheet at the steps that ask for one.
    fn sample(&self, trainer: &LoraTrainer) -> Result<()> {
        let (Some(previewer), Some(captions)) = (&self.previewer, &self.preview_captions) else {
            return Ok(());
        };
        if !trainer.step().is_multiple_of(self.settings.samples.every) {
            return Ok(());
        }
        let path = trainer.folder.join(format!("samples/step-{:06}.png", trainer.step()));
        let lora = trainer.result();
        let mut networks = self.networks.clone();
        networks.attach(&[&lora])?;
        let adapted = networks.text.as_ref().map(|text| self.preview_prompts.encode(text)).transpose()?;
        previewer.sheet(&self.networks, &lora, adapted.as_ref().unwrap_or(captions), &self.settings, &path)
    }

    fn write(&self, trainer: &LoraTrainer) -> Result<()> {
        let mut changes = trainer.result().adapters()?;
        changes.metadata = metadata::of(self, trainer);
        file::write_adapters(&trainer.out, &changes, Format::Kohya, &self.layout)?;
        if let Err(error) = trainer.save() {
            progress::warn(format_args!(
                "{}: the LoRA is written, but not its state: {error:#}",
                trainer.name
            ));
        }
        Ok(())
    }

    /// The stamp of a trainer's settings, for the LoRA's metadata.
    pub fn stamp_of(&self, trainer: &LoraTrainer) -> Option<String> {
        self.stamp(&trainer.dataset).ok().map(|stamp| metadata::hash(&stamp))
    }

    /// One of many who cannot go on is named, and the others do; the only one's error is the run's.
    fn fail(&self, name: &str, error: anyhow::Error, queue: &JobQueue) -> Result<()> {
        if self.alone || matches!(error.downcast_ref(), Some(Failure::Interrupted { .. })) {
            return Err(error);
        }
        progress::warn(format_args!("{name}: {error:#}"));
        queue
            .failed
            .lock()
            .expect("no thread panics while it holds the queue")
            .push(format!("{name}: {error:#}"));
        Ok(())
    }
}
