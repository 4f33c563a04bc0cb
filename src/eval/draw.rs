//! Generates the images of all methods and people that are not there yet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::eval::image_store::{ImageStore, Made};
use crate::eval::methods::{LoraSources, Method};
use crate::eval::prompts::PromptSet;
use crate::eval::renderer::{PromptBatch, Renderer, Sampling};
use crate::eval::subjects::{EmbeddedSubject, Subject};
use crate::files;
use crate::progress;
use crate::threads::in_threads_or_turn;

/// What is generated, and where it is kept.
pub struct Drawing<'a> {
    /// The base.
    pub renderer: &'a Renderer,
    /// LoRAs of all people.
    pub sources: &'a LoraSources<'a>,
    /// Prompts of each person.
    pub prompts: &'a PromptSet,
    /// How images are sampled.
    pub sampling: &'a Sampling,
    /// Where they are kept.
    pub store: &'a ImageStore,
}

/// The folder that the images of `subject` by `method` are in: that of the class word where all share them.
pub fn folder_name<'a>(method: &Method, subject: &'a Subject) -> &'a str {
    if method.is_shared() { &subject.class } else { &subject.id }
}

/// Images of one person by one method.
struct Job<'a> {
    method: &'a Method,
    subject: usize,
    missing: Vec<usize>,
}

impl Drawing<'_> {
    /// Generates the missing images of `methods`; images that are there are kept.
    ///
    /// # Errors
    /// Errors of the networks, with the person; [`crate::failure::Failure::Unusable`] for LoRA files.
    pub fn run(&self, methods: &[Method], subjects: &[Subject], embedded: &[EmbeddedSubject]) -> Result<()> {
        let jobs = self.jobs(methods, subjects, embedded)?;
        let batches = self.batches(subjects)?;
        let images: usize = jobs.iter().map(|job| job.missing.len()).sum();
        let bar = progress::bar(images as u64, "generating");
        let device = self.renderer.model.device();
        in_threads_or_turn(device, jobs.len(), |i| {
            let subject = &subjects[jobs[i].subject];
            let batches = &batches[subject.class.as_str()];
            self.job(&jobs[i], subject, &embedded[jobs[i].subject], batches, |count| bar.inc(count))
                .with_context(|| format!("`{}`", subject.id))
        })?;
        bar.finish_and_clear();
        Ok(())
    }

    /// What is to be generated. Images of a LoRA that is no longer the one of this evaluation are removed first.
    fn jobs<'a>(
        &self,
        methods: &'a [Method],
        subjects: &[Subject],
        embedded: &[EmbeddedSubject],
    ) -> Result<Vec<Job<'a>>> {
        let (mut jobs, mut seen, mut removed) = (Vec::new(), BTreeSet::new(), 0);
        for (i, subject) in subjects.iter().enumerate() {
            for method in
                methods.iter().filter(|method| method.is_drawn() && self.sources.has(method, subject))
            {
                let (key, folder) = (method.key(), folder_name(method, subject));
                if seen.insert((key.clone(), folder)) {
                    let origin = self.sources.origin(method, subject, &embedded[i].condition)?;
                    removed += self.store.begin(&key, folder, &origin)?;
                    let missing = self.store.missing(&key, folder, self.prompts.prompts.len());
                    jobs.push(Job { method, subject: i, missing });
                }
            }
        }
        if removed > 0 {
            progress::note(format_args!("{removed} images of other LoRAs or photos are generated again"));
        }
        jobs.retain(|job| !job.missing.is_empty());
        Ok(jobs)
    }

    /// The prompts of each class word, in batches.
    fn batches<'a>(&self, subjects: &'a [Subject]) -> Result<BTreeMap<&'a str, Vec<(usize, PromptBatch)>>> {
        let mut all = BTreeMap::new();
        for subject in subjects {
            if all.contains_key(subject.class.as_str()) {
                continue;
            }
            let texts = self.prompts.texts(&subject.class);
            let prompts: Vec<(String, u64)> = texts
                .into_iter()
                .zip(&self.prompts.prompts)
                .map(|(text, prompt)| (text, prompt.grain))
                .collect();
            let size = self.renderer.batch_size();
            let batches = prompts
                .chunks(size)
                .enumerate()
                .map(|(i, chunk)| Ok((i * size, self.renderer.batch(chunk, self.sampling)?)));
            all.insert(subject.class.as_str(), batches.collect::<Result<_>>()?);
        }
        Ok(all)
    }

    fn job(
        &self,
        job: &Job,
        subject: &Subject,
        embedded: &EmbeddedSubject,
        batches: &[(usize, PromptBatch)],
        done: impl Fn(u64),
    ) -> Result<()> {
        let (key, folder) = (job.method.key(), folder_name(job.method, subject));
        let Made { origin, mut times } = self.store.made(&key, folder);
        times.encode = embedded.seconds;
        let lora = self.sources.lora(job.method, subject, &embedded.condition, &mut times)?;
        let clock = Instant::now();
        let merged = self.renderer.merge(lora.as_ref())?;
        times.merge = clock.elapsed().as_secs_f64();
        drop(lora);
        for (begin, batch) in batches {
            let numbers = *begin..begin + batch.texts().len();
            if !job.missing.iter().any(|number| numbers.contains(number)) {
                continue;
            }
            let clock = Instant::now();
            let images = self.renderer.render(batch, &merged)?;
            times.draw += clock.elapsed().as_secs_f64();
            times.images += images.len();
            for ((number, image), text) in numbers.zip(&images).zip(batch.texts()) {
                let Sampling { steps, guidance, seed, .. } = self.sampling;
                let parameters = format!(
                    "{text}\nSteps: {steps}, CFG scale: {guidance}, Seed: {seed}, {}",
                    files::version_mark()
                );
                self.store.save(&key, folder, number, image, &parameters)?;
            }
            self.store.save_made(&key, folder, &Made { origin: origin.clone(), times })?;
            done(images.len() as u64);
        }
        Ok(())
    }
}
