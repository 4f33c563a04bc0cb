//! From observations of generated images to the numbers of the table. An image in which no face is found has no
//! similarity: it counts as a miss.

use serde::Serialize;

use crate::identity::cosine;
use crate::statistics::{Mean, correlation, rank};
use crate::synthetic::{Facing, Identity, Person, Scene, World};

/// Measurements of one image.
#[derive(Clone, Debug)]
pub struct Observation {
    /// Each recogniser's vector of the largest face, where one was found.
    pub faces: Option<Vec<Vec<f32>>>,
    /// Each image encoder's unit vector of the whole image.
    pub images: Vec<Vec<f32>>,
    /// Of the attribute classifier, where there is one.
    pub attributes: Option<Attributes>,
}

/// Predictions of the attribute classifier.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// One class for each of [`World::attributes`].
    pub classes: Vec<usize>,
    /// As [`Identity::to_array`].
    pub factors: [f32; Identity::COUNT],
}

/// The person that images should show.
#[derive(Clone, Debug)]
pub struct Target {
    /// Each recogniser's mean vector of the photos that are not the condition; empty where there are none.
    pub faces: Vec<Vec<f32>>,
    /// Each image encoder's vectors of these photos.
    pub images: Vec<Vec<Vec<f32>>>,
    /// True factors of a painted person.
    pub factors: Option<[f32; Identity::COUNT]>,
}

/// What the images of one method are measured against.
pub struct Measurement<'a> {
    /// Of each person the images.
    pub observations: &'a [&'a [Observation]],
    /// Whom they should show.
    pub targets: &'a [&'a Target],
    /// What each prompt asks for.
    pub requested: &'a [RequestedClasses],
    /// Indices of the factors that the classifier predicts well.
    pub visible: &'a [usize],
}

/// Metrics of one method. Means and intervals are over people.
#[derive(Clone, Debug, Serialize)]
pub struct Metrics {
    /// Cosine to the person, over the images with a face.
    pub similarity: Option<Mean>,
    /// The same with 0 for every image without a face.
    pub similarity_misses_zero: Option<Mean>,
    /// Part of the images in which a face was found.
    pub detection: Option<Mean>,
    /// Cosine to the other people.
    pub similarity_to_others: Option<Mean>,
    /// Cosine to the person minus cosine to the others.
    pub same_minus_different: Option<Mean>,
    /// Part of the images that are more like the person than like any other; misses count as wrong.
    pub rank_1: Option<Mean>,
    /// Mean place of the person among all people, over the images with a face.
    pub mean_rank: Option<f64>,
    /// Correlation over people of the factors that the classifier predicts for the images with the true ones, mean over
    /// the factors that it predicts well.
    pub factor_correlation: Option<f64>,
    /// Of each attribute that the prompts ask for.
    #[serde(rename = "obedience")]
    pub prompt_accuracy: Vec<PromptAccuracy>,
    /// Similarity of each person, in order; for paired differences.
    #[serde(skip)]
    pub per_person: Vec<Option<f64>>,
}

/// Share of images that show the attribute that their prompt asks for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptAccuracy {
    /// As in [`World::attributes`].
    pub attribute: &'static str,
    /// Share of [`Self::images`].
    #[serde(rename = "right")]
    pub accuracy: f64,
    /// Images whose prompt asks for it.
    #[serde(rename = "asked")]
    pub images: usize,
}

/// Likeness to the person by one recogniser, each value a person's mean.
#[derive(Clone, Debug, Default)]
pub struct Likeness {
    /// Cosine to the person; none without a face or a photo to compare with.
    pub same: Vec<Option<f64>>,
    /// The same with 0 for every image without a face.
    pub with_misses: Vec<Option<f64>>,
    /// Cosine to the other people.
    pub different: Vec<Option<f64>>,
    /// Part of the images that are most like the person.
    pub first: Vec<Option<f64>>,
    /// Place of the person among all, of each image with a face.
    pub ranks: Vec<f64>,
}

impl Likeness {
    /// By recogniser number `at`.
    pub fn of(observations: &[&[Observation]], targets: &[&Target], at: usize) -> Self {
        let known: Vec<usize> = (0..targets.len()).filter(|i| targets[*i].faces.len() > at).collect();
        let mut all = Self::default();
        for (i, images) in observations.iter().enumerate() {
            let Some(place_of_own) = known.iter().position(|other| *other == i) else {
                for values in [&mut all.same, &mut all.with_misses, &mut all.different, &mut all.first] {
                    values.push(None);
                }
                continue;
            };
            let mut own = Vec::new();
            let (mut different, mut hits) = (Vec::new(), 0);
            for faces in images.iter().filter_map(|image| image.faces.as_ref()) {
                let cosines: Vec<f64> = known
                    .iter()
                    .map(|other| f64::from(cosine(&faces[at], &targets[*other].faces[at])))
                    .collect();
                own.push(cosines[place_of_own]);
                let others = cosines.iter().enumerate().filter(|(other, _)| *other != place_of_own);
                different.extend(others.map(|(_, c)| *c));
                let place = rank(&cosines, place_of_own);
                all.ranks.push(place as f64);
                hits += usize::from(place == 1);
            }
            let count = images.len().max(1) as f64;
            // The sum of nothing is −0, which would be printed so.
            all.with_misses.push(Some((own.iter().sum::<f64>() + 0.0) / count));
            all.first.push(Some(hits as f64 / count));
            all.same.push(mean(&own));
            all.different.push(mean(&different));
        }
        all
    }
}

/// The mean of the values that are there, with its interval.
pub fn mean_of(values: &[Option<f64>]) -> Option<Mean> {
    Mean::of(&values.iter().copied().flatten().collect::<Vec<_>>())
}

impl Metrics {
    /// By the first recogniser and the attribute classifier.
    pub fn compute(of: &Measurement) -> Self {
        let Measurement { observations, targets, requested, visible } = of;
        let likeness = Likeness::of(observations, targets, 0);
        let found = |images: &&[Observation]| {
            let found = images.iter().filter(|image| image.faces.is_some()).count();
            found as f64 / images.len().max(1) as f64
        };
        let gap = likeness.same.iter().zip(&likeness.different);
        let gap: Vec<Option<f64>> = gap.map(|(same, different)| Some((*same)? - (*different)?)).collect();
        let images = observations.iter().flat_map(|images| images.iter().zip(*requested));
        let images = images.filter_map(|(image, requested)| Some((image.attributes.as_ref()?, requested)));
        Self {
            similarity: mean_of(&likeness.same),
            similarity_misses_zero: mean_of(&likeness.with_misses),
            detection: Mean::of(&observations.iter().map(found).collect::<Vec<_>>()),
            similarity_to_others: mean_of(&likeness.different),
            same_minus_different: mean_of(&gap),
            rank_1: mean_of(&likeness.first),
            mean_rank: mean(&likeness.ranks),
            factor_correlation: factor_correlation(observations, targets, visible),
            prompt_accuracy: prompt_accuracy(images),
            per_person: likeness.same,
        }
    }
}

/// The class of each of [`World::attributes`] that a prompt asks for; `None` where it says nothing.
pub type RequestedClasses = Vec<Option<usize>>;

/// Accuracy of each attribute over the images whose prompts ask for it.
pub fn prompt_accuracy<'a>(
    images: impl Iterator<Item = (&'a Attributes, &'a RequestedClasses)>,
) -> Vec<PromptAccuracy> {
    // The attributes of the varied world are the first of the aligned one's.
    let names = World::Aligned.attributes().into_iter().map(|(name, _)| name);
    let mut rows: Vec<(&'static str, usize, usize)> = names.map(|name| (name, 0, 0)).collect();
    for (predicted, requested) in images {
        let classes = predicted.classes.iter().zip(requested);
        for ((_, right, all), (predicted, requested)) in rows.iter_mut().zip(classes) {
            *right += usize::from(Some(*predicted) == *requested);
            *all += usize::from(requested.is_some());
        }
    }
    rows.into_iter()
        .filter(|(_, _, images)| *images > 0)
        .map(|(attribute, right, images)| PromptAccuracy {
            attribute,
            accuracy: right as f64 / images as f64,
            images,
        })
        .collect()
}

/// The classes that the caption of `scene` asks for, those of `person` included where the caption describes one. It says
/// nothing of a face that looks ahead.
pub fn requested_classes(world: World, person: Option<&Person>, scene: &Scene) -> RequestedClasses {
    let names = world.attributes().into_iter().map(|(name, _)| name);
    let labels = world.labels(person.unwrap_or(&Person::new(0, 0)), scene);
    let requested = |(name, class): (&'static str, usize)| match name {
        "facing" => (class != Facing::Ahead as usize).then_some(class),
        "hair_style" | "hair_colour" | "beard" | "eye_colour" => person.map(|_| class),
        _ => Some(class),
    };
    names.zip(labels).map(requested).collect()
}

/// The mean difference in similarity between two methods over the same people; the interval is of the differences.
pub fn paired_difference(of: &Metrics, over: &Metrics) -> Option<Mean> {
    let pairs = of.per_person.iter().zip(&over.per_person);
    Mean::of(&pairs.filter_map(|(of, over)| Some((*of)? - (*over)?)).collect::<Vec<_>>())
}

fn factor_correlation(
    observations: &[&[Observation]],
    targets: &[&Target],
    visible: &[usize],
) -> Option<f64> {
    let of_factor = |factor: &usize| {
        let predicted = |images: &[Observation]| {
            let values: Option<Vec<f64>> = images
                .iter()
                .map(|image| Some(f64::from(image.attributes.as_ref()?.factors[*factor])))
                .collect();
            mean(&values?)
        };
        let pairs = observations.iter().zip(targets);
        let pairs: Option<Vec<(f64, f64)>> = pairs
            .map(|(images, target)| Some((predicted(images)?, f64::from(target.factors?[*factor]))))
            .collect();
        Some(correlation(&pairs?))
    };
    mean(&visible.iter().map(of_factor).collect::<Option<Vec<_>>>()?)
}

fn mean(values: &[f64]) -> Option<f64> {
    Mean::of(values).map(|mean| mean.mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two people whose faces are at right angles.
    fn targets() -> Vec<Target> {
        [[1.0, 0.0], [0.0, 1.0]]
            .map(|face| Target {
                faces: vec![face.into()],
                images: Vec::new(),
                factors: Some([face[0]; Identity::COUNT]),
            })
            .into()
    }

    fn requested(scene: &Scene) -> RequestedClasses {
        requested_classes(World::Varied, None, scene)
    }

    fn compute(
        observations: &[&[Observation]],
        requested: &[RequestedClasses],
        visible: &[usize],
    ) -> Metrics {
        let targets = targets();
        let targets: Vec<&Target> = targets.iter().collect();
        Metrics::compute(&Measurement { observations, targets: &targets, requested, visible })
    }

    fn observation(face: Option<[f32; 2]>, factor: f32) -> Observation {
        let classes = Scene::draw(1, 1).classes().to_vec();
        let attributes = Some(Attributes { classes, factors: [factor; Identity::COUNT] });
        Observation { faces: face.map(|face| vec![face.into()]), images: Vec::new(), attributes }
    }

    #[test]
    fn a_face_that_is_not_found_is_a_miss() {
        let (first, second) = (
            [observation(Some([1.0, 0.0]), 0.9), observation(None, 0.9)],
            [observation(Some([0.6, 0.8]), 0.2), observation(None, 0.2)],
        );
        let asked = vec![requested(&Scene::draw(1, 1)); 2];
        let metrics = compute(&[&first, &second], &asked, &[0, 3]);
        let mean = |mean: Option<Mean>| (mean.unwrap().mean * 1e4).round() / 1e4;
        assert_eq!(mean(metrics.similarity), 0.9);
        assert_eq!(mean(metrics.similarity_misses_zero), 0.45);
        assert_eq!(mean(metrics.detection), 0.5);
        assert_eq!(mean(metrics.similarity_to_others), 0.3);
        assert_eq!(mean(metrics.same_minus_different), 0.6);
        assert_eq!(mean(metrics.rank_1), 0.5);
        assert_eq!(metrics.mean_rank, Some(1.0));
        let missed = compute(&[&[observation(None, 0.0)], &[observation(None, 0.0)]], &asked, &[]);
        assert!(
            missed.similarity.is_none() && missed.similarity_misses_zero.unwrap().mean.is_sign_positive()
        );
        assert!((metrics.factor_correlation.unwrap() - 1.0).abs() < 1e-9);
        assert!(metrics.prompt_accuracy.iter().all(|attribute| attribute.accuracy == 1.0));
    }

    #[test]
    fn a_person_without_a_photo_to_compare_with_is_not_measured() {
        let mut targets = targets();
        targets.push(Target { faces: Vec::new(), images: Vec::new(), factors: None });
        let targets: Vec<&Target> = targets.iter().collect();
        let images = [observation(Some([1.0, 0.0]), 0.9)];
        let likeness = Likeness::of(&[&images, &images, &images], &targets, 0);
        assert_eq!(likeness.same, [Some(1.0), Some(0.0), None]);
        assert_eq!(likeness.first, [Some(1.0), Some(0.0), None]);
        assert_eq!(likeness.ranks, [1.0, 2.0]);
    }

    #[test]
    fn the_same_images_for_everyone_identify_no_one() {
        let same = [observation(Some([0.6, 0.8]), 0.5)];
        let metrics = compute(&[&same, &same], &[requested(&Scene::draw(1, 1))], &[0]);
        assert!(metrics.same_minus_different.unwrap().mean.abs() < 1e-6);
        assert_eq!(metrics.rank_1.unwrap().mean, 0.5);
        assert_eq!(metrics.factor_correlation, Some(0.0));
        assert!(paired_difference(&metrics, &metrics).unwrap().mean.abs() < 1e-12);
    }

    #[test]
    fn prompt_accuracy_counts_only_what_the_caption_says() {
        let scene = Scene { yaw: 0.0, ..Scene::draw(1, 1) };
        assert_eq!(requested(&scene)[1], None);
        assert_eq!(requested(&Scene { yaw: 0.3, ..scene.clone() })[1], Some(2));
        let mut wrong = observation(None, 0.0).attributes.unwrap();
        wrong.classes = scene.classes().to_vec();
        wrong.classes[5] = (wrong.classes[5] + 1) % 8;
        let rows = prompt_accuracy([(&wrong, &requested(&scene))].into_iter());
        assert_eq!(rows.len(), Scene::CLASSES - 1);
        for attribute in rows {
            assert_eq!(attribute.accuracy, if attribute.attribute == "background" { 0.0 } else { 1.0 });
        }
    }

    #[test]
    fn captions_of_the_aligned_world_ask_for_hair_only_where_they_describe_a_person() {
        let (person, scene) = (Person::new(1, 1), World::Aligned.shared_scene(1, 1));
        let with = requested_classes(World::Aligned, Some(&person), &scene);
        let without = requested_classes(World::Aligned, None, &scene);
        assert_eq!(with.len(), World::Aligned.attributes().len());
        let classes = |of: &RequestedClasses| of.iter().flatten().count();
        assert_eq!(classes(&with), classes(&without) + 4);
    }
}
