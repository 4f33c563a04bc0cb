//! Does a generated LoRA show the person? Images of people by several methods from the same noise and prompts, kept in
//! a folder, and measured by networks that took part in no training.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use serde_json::json;

use crate::dataset::lora_dataset::LoraDataset;
use crate::eval::baselines::NearestNeighbour;
use crate::eval::csv;
use crate::eval::draw::{Drawing, folder_name};
use crate::eval::html::{PersonRow, thumbnail};
use crate::eval::image_store::ImageStore;
use crate::eval::judged::{Judged, judge};
use crate::eval::measures::{Images, measures};
use crate::eval::methods::{Generator, LoraSources, Method, PeopleOptions};
use crate::eval::metrics::{
    Likeness, Measurement, Metrics, Observation, RequestedClasses, Target, paired_difference,
};
use crate::eval::prompts::PromptSet;
use crate::eval::renderer::Renderer;
use crate::eval::report::{Difference, Findings, MethodRow, PeopleReport, sheet};
use crate::eval::subjects::{EmbeddedSubject, Subject};
use crate::eval::weight_space::{WeightSpace, compare};
use crate::failure::Failure;
use crate::hypernet::row_source::RowSource;
use crate::image::Image;
use crate::progress;
use crate::statistics::Mean;
use crate::threads::{in_threads, in_threads_or_turn};

/// Who is evaluated, with what.
pub struct People<'a> {
    /// All people.
    pub subjects: &'a [Subject],
    /// Prompts of each person's images.
    pub prompts: &'a PromptSet,
    /// Those that the hypernetwork was trained on, where they are known.
    pub training_people: Option<&'a NearestNeighbour>,
    /// Own and training LoRAs, where they are known; the held-out ones begin with the subjects.
    pub loras: Option<&'a LoraDataset>,
}

/// Generates the images that are not yet in the folder `images`, and measures all.
///
/// # Errors
/// Errors of the networks, with the person; [`crate::failure::Failure::Unusable`] for LoRA files and images.
pub fn evaluate(
    renderer: &Renderer,
    generator: Option<&Generator>,
    people: &People,
    options: &PeopleOptions,
    images: &Path,
) -> Result<Findings> {
    let sources = LoraSources {
        base: &renderer.model,
        block_layout: &renderer.block_layout,
        generator,
        training_people: people.training_people,
        refinement: options.refinement,
    };
    let store = ImageStore::open(images, &store_settings(renderer, people, options))?;
    let embedded = embed(renderer, generator, people.subjects)?;
    if !options.judge_only {
        let drawing = Drawing {
            renderer,
            sources: &sources,
            prompts: people.prompts,
            sampling: &options.sampling,
            store: &store,
        };
        drawing.run(&options.methods, people.subjects, &embedded)?;
    }
    let drawn = options.methods.iter().filter(|method| method.is_drawn());
    let drawn: Vec<(Method, Vec<bool>)> =
        drawn.map(|method| (method.clone(), has_images(method, people, &sources, &store, options))).collect();
    if options.judge_only && drawn.iter().all(|(_, has)| !has.contains(&true)) {
        let why = "no person has all images of any method; generate them first, without --judge-only";
        return Err(Failure::unusable(images, why));
    }
    let judged = judge(&renderer.judges, &store, people.subjects, &drawn, people.prompts.prompts.len())?;
    let prompts = prompt_vectors(renderer, people)?;
    let table = Table { people, renderer, embedded: &embedded, drawn: &drawn, judged: &judged, prompts };
    let (methods, left_out) = table.rows(&options.methods);
    for why in &left_out {
        progress::note(format_args!("left out: {why}"));
    }
    if options.require_all && !left_out.is_empty() {
        return Err(Failure::Usage(format!("--require: {}", left_out.join("; "))).into());
    }
    let report = PeopleReport {
        people: people.subjects.len(),
        renderer,
        generator,
        options,
        prompts: people.prompts,
        differences: differences(&methods),
        methods,
        left_out,
        weight_space: weight_space(generator, people, &embedded)?,
    };
    Ok(Findings {
        report: report.to_json(),
        text: report.to_markdown(),
        sheet: table.sheet(&store)?,
        html: Some(report.to_html(table.html_rows(&store)?)?),
        csv: Some(table.csv()),
        rows: report.methods,
    })
}

/// The generated LoRAs against own and training ones.
fn weight_space(
    generator: Option<&Generator>,
    people: &People,
    embedded: &[EmbeddedSubject],
) -> Result<Option<WeightSpace>> {
    let (Some(Generator { hypernet, options, .. }), Some(loras)) = (generator, people.loras) else {
        return Ok(None);
    };
    let codec = &hypernet.codec;
    let latents = embedded.iter().map(|subject| hypernet.sample_latent(&subject.condition.identity, options));
    let latents = Tensor::cat(&latents.collect::<Result<Vec<_>>>()?, 0)?;
    let generated = codec.decode(&latents)?.to_device(&Device::Cpu)?;
    let own = loras.held_out.vectors.batch(&(0..embedded.len()).collect::<Vec<_>>())?;
    let mean = Tensor::from_vec(
        codec.layout.to_vector(&codec.mean_lora()?)?,
        (1, codec.layout.parameters()),
        &Device::Cpu,
    )?;
    compare(&codec.layout, &generated, &own, &mean, &loras.train.vectors).map(Some)
}

/// Whether each person has all images of `method`. Without `judge_only` they were generated for all that have a LoRA.
fn has_images(
    method: &Method,
    people: &People,
    sources: &LoraSources,
    store: &ImageStore,
    options: &PeopleOptions,
) -> Vec<bool> {
    let has = |subject: &Subject| {
        let missing =
            || store.missing(&method.key(), folder_name(method, subject), people.prompts.prompts.len());
        if options.judge_only { missing().is_empty() } else { sources.has(method, subject) }
    };
    people.subjects.iter().map(has).collect()
}

/// All that decides what an image shows, but the LoRA.
fn store_settings(renderer: &Renderer, people: &People, options: &PeopleOptions) -> serde_json::Value {
    let prompts: Vec<_> = people.prompts.prompts.iter().map(|prompt| (&prompt.text, prompt.grain)).collect();
    json!({ "base": renderer.base, "sampling": options.sampling.to_json(), "prompts": prompts })
}

/// Detects and embeds everyone's photos.
fn embed(
    renderer: &Renderer,
    generator: Option<&Generator>,
    subjects: &[Subject],
) -> Result<Vec<EmbeddedSubject>> {
    let bar = progress::bar(subjects.len() as u64, "faces");
    let encoder = generator.map(|generator| &generator.image_encoder);
    let embedded = in_threads_or_turn(renderer.model.device(), subjects.len(), |i| {
        progress::check()?;
        let embedded = subjects[i].embed(&renderer.judges, encoder);
        bar.inc(1);
        embedded.with_context(|| format!("`{}`", subjects[i].id))
    })?;
    bar.finish_and_clear();
    Ok(embedded)
}

/// Of each image encoder the vectors of the prompts, where it has a text encoder.
type PromptVectors = Vec<Option<Vec<Vec<f32>>>>;

/// The prompts of each class word by each image encoder.
fn prompt_vectors<'a>(renderer: &Renderer, people: &People<'a>) -> Result<BTreeMap<&'a str, PromptVectors>> {
    let mut all = BTreeMap::new();
    for subject in people.subjects {
        if !all.contains_key(subject.class.as_str()) {
            let texts = people.prompts.texts(&subject.class);
            let vectors = renderer.judges.encoders.iter().map(|encoder| encoder.embed_prompts(&texts));
            all.insert(subject.class.as_str(), vectors.collect::<Result<_>>()?);
        }
    }
    Ok(all)
}

/// All that was measured.
struct Table<'a> {
    people: &'a People<'a>,
    renderer: &'a Renderer,
    embedded: &'a [EmbeddedSubject],
    /// Methods with images, and who has them.
    drawn: &'a [(Method, Vec<bool>)],
    /// For each of these a row a person.
    judged: &'a [Vec<Option<Judged>>],
    prompts: BTreeMap<&'a str, PromptVectors>,
}

impl Table<'_> {
    /// The rows of all methods, and why measures are left out.
    fn rows(&self, methods: &[Method]) -> (Vec<MethodRow>, Vec<String>) {
        let mut left_out = Vec::new();
        let rows = methods.iter().filter_map(|method| self.row(method, &mut left_out)).collect();
        left_out.dedup();
        (rows, left_out)
    }

    /// The row of a method; none where no person has images of it.
    fn row(&self, method: &Method, left_out: &mut Vec<String>) -> Option<MethodRow> {
        let visible = self.renderer.judges.visible_factors();
        let requested: Vec<RequestedClasses> =
            self.people.prompts.prompts.iter().map(|prompt| prompt.requested.clone()).collect();
        let all: Vec<&Target> = self.embedded.iter().map(|subject| &subject.target).collect();
        if *method == Method::Photo {
            let photos: Vec<&[Observation]> = self
                .embedded
                .iter()
                .map(|subject| std::slice::from_ref(&subject.photo_observation))
                .collect();
            let measurement = Measurement {
                observations: &photos,
                targets: &all,
                requested: &requested,
                visible: &visible,
            };
            let mut metrics = Metrics::compute(&measurement);
            metrics.prompt_accuracy.clear(); // photos have no prompt
            return Some(MethodRow {
                method: method.clone(),
                metrics,
                pixels_from_own: None,
                measures: Vec::new(),
            });
        }
        let (whose, judged) = self.of(method)?;
        let observations: Vec<&[Observation]> =
            judged.iter().map(|judged| &judged.observations[..]).collect();
        let targets: Vec<&Target> = whose.iter().map(|i| all[*i]).collect();
        let measurement = Measurement {
            observations: &observations,
            targets: &targets,
            requested: &requested,
            visible: &visible,
        };
        let distances: Vec<f64> = judged.iter().filter_map(|judged| judged.pixels_from_own).collect();
        let embedded: Vec<&EmbeddedSubject> = whose.iter().map(|i| &self.embedded[*i]).collect();
        let base = self.of(&Method::NoLora).filter(|(base, _)| *base == whose).map(|(_, judged)| judged);
        let prompts: Vec<&[Option<Vec<Vec<f32>>>]> =
            whose.iter().map(|i| &self.prompts[self.people.subjects[*i].class.as_str()][..]).collect();
        let images = Images { judged: &judged, people: &embedded, base: base.as_deref(), prompts: &prompts };
        let (measures, why) = measures(&self.renderer.judges, &images);
        left_out.extend(why);
        Some(MethodRow {
            method: method.clone(),
            metrics: Metrics::compute(&measurement),
            pixels_from_own: Mean::of(&distances),
            measures,
        })
    }

    /// Who has images of `method`, and what was seen on them. A shuffled person has the images of the next one.
    fn of(&self, method: &Method) -> Option<(Vec<usize>, Vec<&Judged>)> {
        let shown = if *method == Method::Shuffled { &Method::Generated } else { method };
        let at = self.drawn.iter().position(|(drawn, _)| drawn == shown)?;
        let present = self.judged[at].iter().enumerate();
        let (whose, mut judged): (Vec<usize>, Vec<&Judged>) =
            present.filter_map(|(i, judged)| Some((i, judged.as_ref()?))).unzip();
        if *method == Method::Shuffled {
            // The noise is the same for all, so another person's LoRA gives the images that it gave that person.
            if judged.len() < 2 {
                return None;
            }
            judged.rotate_left(1);
        }
        (!whose.is_empty()).then_some((whose, judged))
    }

    /// Everyone's images by each method: the first and the last prompt.
    fn html_rows(&self, store: &ImageStore) -> Result<Vec<PersonRow>> {
        let last = self.people.prompts.prompts.len() - 1;
        let prompts = if last == 0 { vec![0] } else { vec![0, last] };
        let all: Vec<&Target> = self.embedded.iter().map(|subject| &subject.target).collect();
        in_threads(self.people.subjects.len(), |i| {
            let subject = &self.people.subjects[i];
            let mut images = vec![("photo".to_string(), thumbnail(&self.embedded[i].condition.photos[0])?)];
            let mut values = Vec::new();
            for ((method, has), judged) in self.drawn.iter().zip(self.judged) {
                let similarity = judged[i].as_ref().and_then(|judged| {
                    let mut row: Vec<&[Observation]> = vec![&[]; all.len()];
                    row[i] = &judged.observations;
                    Likeness::of(&row, &all, 0).same[i]
                });
                values.push((method.title(), similarity));
                for prompt in prompts.iter().filter(|_| has[i]) {
                    let path = store.path(&method.key(), folder_name(method, subject), *prompt);
                    images.push((method.title(), thumbnail(&Image::open(&path)?)?));
                }
            }
            Ok(PersonRow { id: subject.id.clone(), values, images })
        })
    }

    /// A line an image.
    fn csv(&self) -> String {
        let judges = &self.renderer.judges;
        let recognisers: Vec<String> = judges.recogniser_ids().into_iter().map(|id| id.name).collect();
        let encoders: Vec<String> =
            judges.encoders.iter().map(|encoder| format!("{} {}", encoder.title, encoder.id.name)).collect();
        let mut text = csv::head(&recognisers, &encoders);
        for ((method, _), row) in self.drawn.iter().zip(self.judged) {
            for ((subject, judged), embedded) in self.people.subjects.iter().zip(row).zip(self.embedded) {
                if let Some(judged) = judged {
                    let prompts = self.people.prompts.texts(&subject.class);
                    text += &csv::lines(&method.key(), &subject.id, &prompts, judged, &embedded.target);
                }
            }
        }
        text
    }

    /// A row for each of the first people: the photo, then no LoRA, generated and own LoRA for the first and last prompt.
    fn sheet(&self, store: &ImageStore) -> Result<Image> {
        let last = self.people.prompts.prompts.len() - 1;
        let prompts = if last == 0 { vec![0] } else { vec![0, last] };
        let shown = [Method::NoLora, Method::Generated, Method::Own];
        let mut shown: Vec<&(Method, Vec<bool>)> =
            self.drawn.iter().filter(|(method, _)| shown.contains(method)).collect();
        if shown.len() < 2 {
            shown = self.drawn.iter().take(3).collect();
        }
        let mut rows: Vec<Vec<Image>> = Vec::new();
        for (i, subject) in self.people.subjects.iter().enumerate().take(6) {
            let mut row = vec![self.embedded[i].condition.photos[0].clone()];
            for prompt in &prompts {
                for (method, has) in &shown {
                    if has[i] {
                        row.push(Image::open(&store.path(
                            &method.key(),
                            folder_name(method, subject),
                            *prompt,
                        ))?);
                    }
                }
            }
            rows.push(row);
        }
        Ok(sheet(&rows.iter().map(|row| row.iter().collect()).collect::<Vec<_>>()))
    }
}

/// Similarity of the generated LoRA against each other method, paired by person.
fn differences(methods: &[MethodRow]) -> Vec<Difference> {
    let Some(of) = methods.iter().find(|row| row.method == Method::Generated) else { return Vec::new() };
    let others = methods.iter().filter(|row| ![Method::Generated, Method::Photo].contains(&row.method));
    others
        .filter(|row| row.metrics.per_person.len() == of.metrics.per_person.len())
        .map(|over| Difference {
            of: of.method.clone(),
            over: over.method.clone(),
            similarity: paired_difference(&of.metrics, &over.metrics),
        })
        .collect()
}
