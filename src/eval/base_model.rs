//! How good a base model is alone: detection rate and prompt accuracy over random captions.

use anyhow::Result;
use serde_json::json;

use crate::eval::metrics::Observation;
use crate::eval::metrics::{PromptAccuracy, prompt_accuracy, requested_classes};
use crate::eval::renderer::{Renderer, Sampling};
use crate::eval::report::{Findings, sheet};
use crate::eval::tables::{accuracy_of, plain, table};
use crate::image::Image;
use crate::progress;
use crate::statistics::Mean;
use crate::synthetic::attribute_classifier::Record;
use crate::synthetic::{CaptionOptions, Detail, Person, Scene, Style, World, caption, describe};
use crate::threads::in_threads_or_turn;
use crate::train;

/// Images of a batch.
const BATCH: usize = 4;

/// Generates and measures `count` images of random scenes.
pub fn evaluate(renderer: &Renderer, count: u64, sampling: &Sampling) -> Result<Findings> {
    let world = renderer.judges.world();
    let scenes: Vec<Scene> = (0..count).map(|i| world.shared_scene(sampling.seed, i)).collect();
    let people: Vec<Person> = (0..count).map(|i| Person::new(sampling.seed, i)).collect();
    let captions: Vec<String> =
        (0..scenes.len()).map(|i| caption_of(world, i, &people[i], &scenes[i])).collect();
    let rendered = render(renderer, &scenes, &captions, sampling)?;

    let observations = || rendered.iter().map(|(_, observation)| observation);
    let detection = |wanted: &dyn Fn(&Scene) -> bool| {
        let chosen = scenes.iter().zip(observations()).filter(|(scene, _)| wanted(scene));
        let found: Vec<f64> =
            chosen.map(|(_, observation)| f64::from(u8::from(observation.faces.is_some()))).collect();
        Mean::of(&found)
    };
    let mut detections = vec![("all", detection(&|_| true))];
    detections
        .extend(Style::ALL.iter().map(|style| (style.word(), detection(&|scene| scene.style == *style))));
    let requested: Vec<_> = scenes
        .iter()
        .zip(&people)
        .map(|(scene, person)| requested_classes(world, Some(person), scene))
        .collect();
    let pairs = observations().zip(&requested);
    let accuracy = prompt_accuracy(
        pairs.filter_map(|(observation, requested)| Some((observation.attributes.as_ref()?, requested))),
    );

    let record = renderer.judges.record();
    let mut text = detection_table(&detections);
    if let Some(record) = record {
        text += &format!("\n{}", accuracy_table(&accuracy, record));
    }
    let detections: serde_json::Map<String, serde_json::Value> =
        detections.into_iter().map(|(style, mean)| (style.into(), json!(mean))).collect();
    let report = json!({
        "pictures": count,
        "base": renderer.base,
        "drawing": sampling.to_json(),
        "detection": detections,
        "obedience": accuracy,
        "judge": record,
    });
    let images: Vec<&Image> = rendered.iter().map(|(image, _)| image).take(100).collect();
    let rows: Vec<Vec<&Image>> = images.chunks(10).map(<[_]>::to_vec).collect();
    Ok(Findings { report, text, sheet: sheet(&rows), html: None, csv: None, rows: Vec::new() })
}

/// In the varied world zero to five words about the person in turn, as in training; in the aligned one everything.
fn caption_of(world: World, i: usize, person: &Person, scene: &Scene) -> String {
    match world {
        World::Varied => {
            let options = CaptionOptions { attributes: i % 6, ..CaptionOptions::default() };
            caption(person, scene, options, person.seed)
        }
        World::Aligned => {
            describe(person, scene, "person", Detail::All, &mut train::rng(person.seed, i as u64))
        }
    }
}

fn render(
    renderer: &Renderer,
    scenes: &[Scene],
    captions: &[String],
    sampling: &Sampling,
) -> Result<Vec<(Image, Observation)>> {
    let bar = progress::bar(scenes.len() as u64, "generating");
    let batches: Vec<usize> = (0..scenes.len()).step_by(BATCH).collect();
    let rendered = in_threads_or_turn(renderer.model.device(), batches.len(), |batch| {
        let range = batches[batch]..scenes.len().min(batches[batch] + BATCH);
        let prompts: Vec<(String, u64)> =
            range.clone().map(|i| (captions[i].clone(), scenes[i].grain)).collect();
        let images = renderer.render(&renderer.batch(&prompts, sampling)?, &renderer.merge(None)?)?;
        let observations = renderer.judges.observe(&images)?;
        bar.inc(range.len() as u64);
        Ok(images.into_iter().zip(observations).collect::<Vec<_>>())
    })?;
    bar.finish_and_clear();
    Ok(rendered.into_iter().flatten().collect())
}

fn detection_table(detections: &[(&str, Option<Mean>)]) -> String {
    let head = ["", "images", "face found"].map(String::from);
    let row = |(style, mean): &(&str, Option<Mean>)| {
        Some(vec![(*style).into(), mean.as_ref()?.n.to_string(), plain(mean.map(|mean| mean.mean))])
    };
    table(&head, &detections.iter().filter_map(row).collect::<Vec<_>>())
}

fn accuracy_table(list: &[PromptAccuracy], record: &Record) -> String {
    let head = ["attribute", "images", "prompt accuracy", "classifier on paintings"].map(String::from);
    let row = |PromptAccuracy { attribute, images, .. }: &PromptAccuracy| {
        let known = record.attributes.iter().find(|known| known.name == *attribute);
        vec![
            (*attribute).to_string(),
            images.to_string(),
            accuracy_of(list, attribute),
            known.map_or("–".into(), |known| format!("{:.2}", known.accuracy)),
        ]
    };
    table(&head, &list.iter().map(row).collect::<Vec<_>>())
}
