//! People who share one frozen base: who waits, who learns at the moment, and what is written when one is done.

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
use crate::hypernet::ModelId;
use crate::identity::FaceEncoder;
use crate::lora::file::{self, Format};
use crate::lora::keys::BlockLayout;
use crate::progress;
use crate::recipes::dreambooth::config::Settings;
use crate::recipes::dreambooth::image_dataset::{self, Encoders, Lessons, Scaling};
use crate::recipes::dreambooth::lockstep::{Downs, Networks, Site, Student};
use crate::recipes::dreambooth::lora_trainer::Learner;
use crate::recipes::dreambooth::loss::{self, Lesson, Objective};
use crate::recipes::dreambooth::metadata::{self, SETTINGS_STAMP};
use crate::recipes::dreambooth::previews::Easel;
use crate::sdxl::text::TextConditioning;
use crate::weights::header::Header;

/// What is the same for all people.
pub struct Room {
    /// Without adapters.
    pub networks: Networks,
    /// Noise levels.
    pub schedule: NoiseSchedule,
    /// From the VAE's latents to the UNet's.
    pub scaling: Scaling,
    /// Class images.
    pub class: Option<Lessons>,
    /// For samples along the way.
    pub easel: Option<Easel>,
    /// What they show.
    pub sample_prompts: Vec<String>,
    /// The same, encoded without adapters.
    pub sample_words: Option<TextConditioning>,
    /// Layers that are adapted.
    pub sites: Vec<Site>,
    /// `down` of each at the start.
    pub downs: Downs,
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
    /// How people are taught.
    pub settings: Settings,
}

/// Somebody who is to be learnt.
pub struct Person {
    /// As warnings and logs say.
    pub name: String,
    /// Folder of the images.
    pub images: PathBuf,
    /// The LoRA to write.
    pub out: PathBuf,
    /// State, log and samples.
    pub folder: PathBuf,
}

/// A LoRA that was written, the number of its images, and the mean loss of the last steps.
pub type Done = (PathBuf, usize, f64);

/// Who waits, and what has become of the others.
pub struct Queue {
    waiting: Mutex<Waiting>,
    done: Mutex<Vec<Done>>,
    failed: Mutex<Vec<String>>,
}

/// The encoders go when the last person is called.
struct Waiting {
    people: VecDeque<Person>,
    encoders: Option<Arc<(Encoders, FaceEncoder)>>,
    /// Of the first person, where they were encoded beforehand.
    lessons: Option<Box<Lessons>>,
}

/// What a person brings to the seat.
enum Material {
    /// Images and captions that are still to be encoded, by these.
    Raw(Arc<(Encoders, FaceEncoder)>),
    Encoded(Box<Lessons>),
}

impl Queue {
    /// Everybody waits.
    pub fn new(people: VecDeque<Person>, encoders: Encoders, faces: FaceEncoder) -> Self {
        let waiting = Waiting { people, encoders: Some(Arc::new((encoders, faces))), lessons: None };
        Self { waiting: Mutex::new(waiting), done: Mutex::default(), failed: Mutex::default() }
    }

    /// Encodes the first person's images and captions now; the encoders go if nobody else waits.
    pub fn encode_the_first(&mut self, settings: &Settings, side: usize) -> Result<()> {
        let waiting = self.waiting.get_mut().expect("nobody panics in the queue");
        if let (Some(person), Some(encoders)) = (waiting.people.front(), &waiting.encoders) {
            waiting.lessons = Some(Box::new(encode(person, settings, side, encoders)?));
        }
        if waiting.people.len() < 2 {
            waiting.encoders = None;
        }
        Ok(())
    }

    /// The next person.
    fn next(&self) -> Option<(Person, Material)> {
        let mut waiting = self.waiting.lock().expect("nobody panics in the queue");
        let person = waiting.people.pop_front()?;
        if let Some(lessons) = waiting.lessons.take() {
            return Some((person, Material::Encoded(lessons)));
        }
        let last = waiting.people.is_empty();
        let encoders = if last { waiting.encoders.take() } else { waiting.encoders.clone() };
        encoders.map(|encoders| (person, Material::Raw(encoders)))
    }

    /// What was written, sorted, and who failed and why.
    pub fn results(&self) -> (Vec<Done>, Vec<String>) {
        let mut done = self.done.lock().expect("nobody panics in the queue").clone();
        done.sort_by(|a, b| a.0.cmp(&b.0));
        (done, self.failed.lock().expect("nobody panics in the queue").clone())
    }
}

/// A person's images and captions, as the networks take them. Warns of what makes a poor LoRA.
fn encode(
    person: &Person,
    settings: &Settings,
    side: usize,
    (encoders, faces): &(Encoders, FaceEncoder),
) -> Result<Lessons> {
    let images = image_dataset::read_images(&person.images, &settings.caption())?;
    image_dataset::warn_of_poor_images(&person.name, &images, faces)?;
    Lessons::new(images, settings, side, encoders)
}

impl Room {
    /// Teaches people of the queue, up to `seats` at once, until nobody waits. A person's LoRA is written when the
    /// person's steps are made; somebody else takes the seat.
    ///
    /// Ctrl-C saves everybody's state.
    pub fn teach(&self, queue: &Queue, seats: usize, bar: &ProgressBar) -> Result<()> {
        let mut learners: Vec<Learner> = Vec::new();
        loop {
            while learners.len() < seats
                && let Some((person, material)) = queue.next()
            {
                let name = person.name.clone();
                match self.seat(person, material, queue) {
                    Ok(learner) => {
                        bar.inc(learner.as_ref().map_or(0, Learner::step));
                        learners.extend(learner);
                    }
                    Err(error) => self.give_up(&name, error, queue)?,
                }
                bar.reset_eta();
            }
            if learners.is_empty() {
                return Ok(());
            }
            if progress::interrupted() {
                learners.iter().try_for_each(Learner::save)?;
                progress::check()?;
            }
            if !learners.iter().any(Learner::is_done) {
                let outcomes = self.step(&mut learners)?;
                bar.inc(outcomes.len() as u64);
                let mut still = Vec::new();
                for (learner, outcome) in learners.into_iter().zip(outcomes) {
                    match outcome {
                        Ok(()) => still.push(learner),
                        Err(error) => self.give_up(&learner.name, error, queue)?,
                    }
                }
                learners = still;
                let loss = learners.iter().map(Learner::loss).sum::<f64>() / learners.len().max(1) as f64;
                bar.set_message(format!("loss {loss:.4}"));
            }
            let (done, still): (Vec<_>, Vec<_>) = learners.into_iter().partition(Learner::is_done);
            learners = still;
            for learner in done {
                self.write(&learner)?;
                let done = (learner.out.clone(), learner.lessons.len(), learner.loss());
                queue.done.lock().expect("nobody panics in the queue").push(done);
            }
        }
    }

    /// Reads a person's images and state; nothing when the person's LoRA is there already.
    fn seat(&self, person: Person, material: Material, queue: &Queue) -> Result<Option<Learner>> {
        let settings = &self.settings;
        std::fs::create_dir_all(&person.folder)
            .with_context(|| format!("cannot make `{}`", person.folder.display()))?;
        let lessons = match material {
            Material::Encoded(lessons) => *lessons,
            Material::Raw(encoders) => encode(&person, settings, self.side, &encoders)?,
        };
        let count = lessons.len();
        let stamp = self.stamp(&lessons)?;
        if self.resume && !self.alone && person.out.exists() {
            let written = Header::read(&mut file::open(&person.out)?)
                .map_err(|error| Failure::unusable(&person.out, error))?;
            if written.metadata.get(SETTINGS_STAMP) == Some(&metadata::hash(&stamp)) {
                queue.done.lock().expect("nobody panics in the queue").push((person.out, count, f64::NAN));
                return Ok(None);
            }
        }
        let learner = Learner::new(
            person.name,
            person.out,
            person.folder,
            lessons,
            (&self.sites, &self.downs, self.weight_norm),
            settings,
            stamp,
            self.resume,
            self.half,
        )?;
        let text = toml::to_string(settings)?;
        files::write_whole(&learner.folder.join("settings.toml"), text.as_bytes())?;
        Ok(Some(learner))
    }

    /// What must be the same for a state to be taken up: all that decides the LoRA.
    fn stamp(&self, lessons: &Lessons) -> Result<Value> {
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
            "pictures": { "count": lessons.len(), "sha256": lessons.sha256 },
            "class_pictures": self.class.as_ref().map(|class| json!({ "count": class.len(), "sha256": class.sha256 })),
        }))
    }

    /// One step of all `learners`; an outcome each.
    fn step(&self, learners: &mut [Learner]) -> Result<Vec<Result<()>>> {
        let settings = &self.settings;
        let weights = Objective {
            min_snr_gamma: settings.objective.min_snr_gamma,
            prior_weight: settings.objective.prior_weight,
        };
        let batches = |part: u64| {
            let batch = |learner: &Learner| {
                let timesteps = self.schedule.alphas_bar.len();
                learner.batch(settings, self.class.as_ref(), &self.scaling, timesteps, part, &self.device)
            };
            learners.iter().map(batch).collect()
        };
        let students: Vec<&Student> = learners.iter().map(|learner| &learner.student).collect();
        let passes = settings.training.accumulate;
        let lessons = loss::gradients(&self.networks, &self.schedule, &weights, &students, passes, batches)?;
        let learnt = |(learner, (gradients, loss)): (&mut Learner, Lesson)| {
            learner.learn(gradients, loss, settings)?;
            self.sample(learner)
        };
        Ok(learners.iter_mut().zip(lessons).map(learnt).collect())
    }

    /// Draws a sheet when its time has come.
    fn sample(&self, learner: &Learner) -> Result<()> {
        let (Some(easel), Some(words)) = (&self.easel, &self.sample_words) else { return Ok(()) };
        if !learner.step().is_multiple_of(self.settings.samples.every) {
            return Ok(());
        }
        let path = learner.folder.join(format!("samples/step-{:06}.png", learner.step()));
        let student = learner.result();
        let told: Vec<&str> = self.sample_prompts.iter().map(String::as_str).collect();
        let mut networks = self.networks.clone();
        networks.attach(&[&student])?;
        let adapted = networks.text.as_ref().map(|text| text.encode_prompts(&told)).transpose()?;
        easel.sheet(&self.networks, &student, adapted.as_ref().unwrap_or(words), &self.settings, &path)
    }

    fn write(&self, learner: &Learner) -> Result<()> {
        let mut changes = learner.result().changes()?;
        changes.metadata = metadata::of(self, learner);
        file::write_changes(&learner.out, &changes, Format::Kohya, &self.layout)?;
        if let Err(error) = learner.save() {
            progress::warn(format_args!(
                "{}: the LoRA is written, but not its state: {error:#}",
                learner.name
            ));
        }
        Ok(())
    }

    /// The stamp of a learner's settings, for the LoRA's metadata.
    pub fn stamp_of(&self, learner: &Learner) -> Option<String> {
        self.stamp(&learner.lessons).ok().map(|stamp| metadata::hash(&stamp))
    }

    /// One of many who cannot go on is named, and the others do; the only one's error is the run's.
    fn give_up(&self, name: &str, error: anyhow::Error, queue: &Queue) -> Result<()> {
        if self.alone || matches!(error.downcast_ref(), Some(Failure::Interrupted(_))) {
            return Err(error);
        }
        progress::warn(format_args!("{name}: {error:#}"));
        queue.failed.lock().expect("nobody panics in the queue").push(format!("{name}: {error:#}"));
        Ok(())
    }
}
