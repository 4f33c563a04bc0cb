//! From images to what the measures need of them, one person after the other.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Context, Result};

use crate::eval::draw::folder_name;
use crate::eval::image_store::{ImageStore, Times};
use crate::eval::judges::Judges;
use crate::eval::methods::Method;
use crate::eval::metrics::Observation;
use crate::eval::renderer::pixel_distance;
use crate::eval::similarity::ssim;
use crate::eval::subjects::Subject;
use crate::image::Image;
use crate::progress;
use crate::threads::in_threads;

/// The images of one person by one method.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Of each image.
    pub observations: Vec<Observation>,
    /// Mean pixel distance to the images with the person's own LoRA.
    pub pixels_from_own: Option<f64>,
    /// Mean of 1 − SSIM over the pairs of aligned faces; none with fewer than two faces.
    pub diversity: Option<f64>,
    /// What they took.
    pub times: Times,
}

/// Measures the first `count` images of each of `methods` that are there: for each method a row a person.
///
/// Only one person's images by two methods are in memory in each thread.
///
/// # Errors
/// An image that is missing or damaged, and errors of the networks.
pub fn judge(
    judges: &Judges,
    store: &ImageStore,
    subjects: &[Subject],
    methods: &[(Method, Vec<bool>)],
    count: usize,
) -> Result<Vec<Vec<Option<Judged>>>> {
    let shared = shared(judges, store, subjects, methods, count)?;
    let own_images = methods.iter().filter(|(method, _)| !method.is_shared());
    let images: usize = own_images.map(|(_, has)| has.iter().filter(|has| **has).count() * count).sum();
    let bar = progress::bar(images as u64, "judging");
    let own_key = Method::Own.key();
    let of_person = |i: usize| -> Result<Vec<Option<Judged>>> {
        let subject = &subjects[i];
        let own = methods.iter().find(|(method, has)| *method == Method::Own && has[i]);
        let own = own.map(|_| store.images(&own_key, &subject.id, count)).transpose()?;
        let one = |(method, has): &(Method, Vec<bool>)| -> Result<Option<Judged>> {
            if !has[i] {
                return Ok(None);
            }
            progress::check()?;
            let (key, folder) = (method.key(), folder_name(method, subject));
            let images = store.images(&key, folder, count)?;
            let mut judged = match shared.get(&(key.clone(), folder)) {
                Some(judged) => judged.clone(),
                None => {
                    bar.inc(count as u64);
                    Judged::of(judges, &images, store.made(&key, folder).times)?
                }
            };
            judged.pixels_from_own = own.as_ref().map(|own| pixel_distance(&images, own));
            Ok(Some(judged))
        };
        methods.iter().map(one).collect::<Result<_>>().with_context(|| format!("`{}`", subject.id))
    };
    let by_person = in_threads(subjects.len(), of_person)?;
    bar.finish_and_clear();
    let mut by_method: Vec<Vec<Option<Judged>>> = methods.iter().map(|_| Vec::new()).collect();
    for person in by_person {
        for (row, judged) in by_method.iter_mut().zip(person) {
            row.push(judged);
        }
    }
    Ok(by_method)
}

/// The images that all people of a class word share, by method and class word.
fn shared<'a>(
    judges: &Judges,
    store: &ImageStore,
    subjects: &'a [Subject],
    methods: &[(Method, Vec<bool>)],
    count: usize,
) -> Result<BTreeMap<(String, &'a str), Judged>> {
    let mut all = BTreeMap::new();
    for (method, has) in methods.iter().filter(|(method, _)| method.is_shared()) {
        for (subject, _) in subjects.iter().zip(has).filter(|(_, has)| **has) {
            if let Entry::Vacant(place) = all.entry((method.key(), folder_name(method, subject))) {
                progress::check()?;
                let (key, class) = place.key();
                let judged =
                    Judged::of(judges, &store.images(key, class, count)?, store.made(key, class).times)?;
                place.insert(judged);
            }
        }
    }
    Ok(all)
}

impl Judged {
    fn of(judges: &Judges, images: &[Image], times: Times) -> Result<Self> {
        let (observations, faces): (Vec<_>, Vec<_>) = judges.observe_faces(images)?.into_iter().unzip();
        let diversity = diversity(&faces.into_iter().flatten().collect::<Vec<_>>());
        Ok(Self { observations, pixels_from_own: None, diversity, times })
    }
}

fn diversity(faces: &[Image]) -> Option<f64> {
    let mut distances = Vec::new();
    for (i, one) in faces.iter().enumerate() {
        distances.extend(faces[..i].iter().map(|other| 1.0 - ssim(one, other)));
    }
    (!distances.is_empty()).then(|| distances.iter().sum::<f64>() / distances.len() as f64)
}
