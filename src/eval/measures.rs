//! The measures beside the main ones: further recognisers, image encoders, diversity, copying, and times.

use serde::Serialize;

use crate::eval::distribution::{frechet, kid};
use crate::eval::image_store::Times;
use crate::eval::judged::Judged;
use crate::eval::judges::Judges;
use crate::eval::metrics::{Likeness, Observation, Target, mean_of};
use crate::eval::subjects::EmbeddedSubject;
use crate::identity::cosine;
use crate::statistics::Mean;

/// A measure of one method: the mean over people and its interval.
#[derive(Clone, Debug, Serialize)]
pub struct Measure {
    /// Title of the column, with the network that measured.
    pub name: String,
    /// Over people.
    #[serde(flatten)]
    pub value: Mean,
}

/// The images of one method.
pub struct Images<'a> {
    /// A row a person.
    pub judged: &'a [&'a Judged],
    /// Who they are.
    pub people: &'a [&'a EmbeddedSubject],
    /// The images without a LoRA of the same people.
    pub base: Option<&'a [&'a Judged]>,
    /// Of each person and image encoder the vectors of the prompts, where the encoder has a text encoder.
    pub prompts: &'a [&'a [Option<Vec<Vec<f32>>>]],
}

/// All measures of `images`, and why others are left out.
pub fn measures(judges: &Judges, images: &Images) -> (Vec<Measure>, Vec<String>) {
    let Images { judged, people, base, prompts } = *images;
    let observations: Vec<&[Observation]> = judged.iter().map(|judged| &judged.observations[..]).collect();
    let targets: Vec<&Target> = people.iter().map(|person| &person.target).collect();
    let (mut all, mut left_out) = (Vec::new(), Vec::new());
    let mut add = |name: String, values: &[Option<f64>]| {
        all.extend(mean_of(values).map(|value| Measure { name, value }));
    };
    for (at, id) in judges.recogniser_ids().iter().enumerate().skip(1) {
        let likeness = Likeness::of(&observations, &targets, at);
        add(format!("similarity, {}", id.name), &likeness.same);
        add(format!("rank 1, {}", id.name), &likeness.first);
    }
    for (at, encoder) in judges.encoders.iter().enumerate() {
        let (title, name) = (encoder.title, &encoder.id.name);
        let of_people =
            |of: &dyn Fn(usize) -> Option<f64>| -> Vec<Option<f64>> { (0..people.len()).map(of).collect() };
        add(
            format!("{title} to other photos, {name}"),
            &of_people(&|i| likeness_to_photos(observations[i], targets[i], at)),
        );
        if let Some(base) = base {
            let kept = of_people(&|i| likeness_to_base(observations[i], &base[i].observations, at));
            add(format!("{title} to the image without a LoRA, {name}"), &kept);
        }
        let texts = of_people(&|i| likeness_to_prompts(observations[i], prompts[i][at].as_ref()?, at));
        add(format!("CLIP-T, {name}"), &texts);
        let generated: Vec<Vec<f32>> = observations
            .iter()
            .flat_map(|images| images.iter().map(|image| image.images[at].clone()))
            .collect();
        let photos: Vec<Vec<f32>> =
            targets.iter().flat_map(|target| target.images.iter().map(|photo| photo[at].clone())).collect();
        let name = format!("Fréchet distance, {title} {name}");
        match frechet(&generated, &photos) {
            Ok(value) => add(name, &[Some(value)]),
            Err(error) => left_out.push(format!("{name}: {error}")),
        }
        let name = format!("KID, {title} {}", encoder.id.name);
        match generated.len().min(photos.len()) {
            few if few < KID_IMAGES => {
                left_out.push(format!("{name}: it needs {KID_IMAGES} images and photos, and there are {few}"))
            }
            _ => add(name, &[kid(&generated, &photos).ok()]),
        }
    }
    let copied: Vec<Option<f64>> =
        observations.iter().zip(people).map(|(images, person)| copy_score(images, person)).collect();
    add("copy score".into(), &copied);
    add(
        "face diversity (1 − SSIM)".into(),
        &judged.iter().map(|judged| judged.diversity).collect::<Vec<_>>(),
    );
    let times: Vec<Times> =
        judged.iter().map(|judged| judged.times).filter(|times| times.images > 0).collect();
    let mut add_time = |name: &str, of: &dyn Fn(&Times) -> f64| {
        let values = times.iter().map(|times| Some(of(times)).filter(|value| *value > 0.0));
        add(name.into(), &values.collect::<Vec<_>>());
    };
    add_time("encode, s", &|times| times.encode);
    add_time("sample, s", &|times| times.sample);
    add_time("decode, s", &|times| times.decode);
    add_time("merge, s", &|times| times.merge);
    add_time("draw, s an image", &|times| times.draw / times.images as f64);
    add_time("LoRA, MB", &|times| times.lora_bytes as f64 / 1e6);
    (all, left_out)
}

/// Fewest images on each side for KID.
const KID_IMAGES: usize = 50;

/// Mean cosine of each image to its prompt, by encoder number `at` (CLIP-T).
fn likeness_to_prompts(images: &[Observation], prompts: &[Vec<f32>], at: usize) -> Option<f64> {
    mean(images.iter().zip(prompts).map(|(image, prompt)| f64::from(cosine(&image.images[at], prompt))))
}

/// Mean cosine of the images to the person's photos that are not the condition, by encoder number `at`.
fn likeness_to_photos(images: &[Observation], target: &Target, at: usize) -> Option<f64> {
    mean(images.iter().flat_map(|image| {
        target.images.iter().map(move |photo| f64::from(cosine(&image.images[at], &photo[at])))
    }))
}

/// Mean cosine of each image to that of the same prompt and noise without a LoRA: how little the LoRA changes that is
/// not the person (PuLID's CLIP-I, arXiv 2404.16022).
fn likeness_to_base(images: &[Observation], base: &[Observation], at: usize) -> Option<f64> {
    mean(images.iter().zip(base).map(|(image, base)| f64::from(cosine(&image.images[at], &base.images[at]))))
}

/// Likeness to the reference photo beyond that to other photos of the person, by the first recogniser: what is copied
/// from the photo and is not the person.
fn copy_score(images: &[Observation], person: &EmbeddedSubject) -> Option<f64> {
    let reference = person.photo_observation.faces.as_ref()?.first()?;
    let others = person.target.faces.first()?;
    let faces = images.iter().filter_map(|image| image.faces.as_ref()?.first());
    mean(faces.map(|face| f64::from(cosine(face, reference)) - f64::from(cosine(face, others))))
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for value in values {
        sum += value;
        count += 1;
    }
    (count > 0).then(|| sum / f64::from(count))
}
