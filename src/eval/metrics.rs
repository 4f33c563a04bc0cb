//! From what was seen in drawn images to the numbers of the table. An image in which no face is found has no
//! similarity: it counts as a miss.

use serde::Serialize;

use crate::identity::cosine;
use crate::statistics::{Mean, correlation, rank};
use crate::synthetic::{Facing, Identity, Scene};

/// What was seen in one drawn image.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The recogniser's vector of the largest face, where one was found.
    pub face: Option<Vec<f32>>,
    /// What the judge of attributes saw, where there is one.
    pub attributes: Option<Attributes>,
}

/// What the judge of attributes saw.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// As [`Scene::classes`].
    pub classes: [usize; Scene::CLASSES],
    /// As [`Identity::to_array`].
    pub factors: [f32; Identity::COUNT],
}

/// Who the images should show.
#[derive(Clone, Debug)]
pub struct Target {
    /// The recogniser's mean vector of the photos that were not the condition.
    pub face: Vec<f32>,
    /// How the person was made.
    pub factors: [f32; Identity::COUNT],
}

/// How one way of drawing did. Means and intervals are over people.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
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
    /// Correlation over people of the factors that the judge sees in the images with the true ones, mean over
    /// the factors that it can see.
    pub factor_correlation: Option<f64>,
    /// How often the prompt was obeyed, per attribute.
    pub obedience: Vec<Obedience>,
    /// Similarity of each person, in order; for paired differences.
    #[serde(skip)]
    pub per_person: Vec<Option<f64>>,
}

/// How often prompts were obeyed in one attribute.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Obedience {
    /// As in [`Scene::class_words`].
    pub attribute: &'static str,
    /// Part of the images that show what was asked for.
    pub right: f64,
    /// Images whose prompt says something about it.
    pub asked: usize,
}

/// Measures images: `shown[i]` are those that should show `people[i]`, drawn from `asked`. `visible` are the
/// numbers of the factors that the judge can see.
pub fn measure(
    shown: &[&[Seen]],
    people: &[Target],
    asked: &[[Option<usize>; Scene::CLASSES]],
    visible: &[usize],
) -> Figures {
    let mut figures: [Vec<f64>; 6] = Default::default();
    let [similarity, with_misses, detection, others, gap, first] = &mut figures;
    let (mut ranks, mut per_person) = (Vec::new(), Vec::new());
    for (i, images) in shown.iter().enumerate() {
        let mut own = Vec::new();
        let (mut different, mut hits) = (Vec::new(), 0);
        for face in images.iter().filter_map(|seen| seen.face.as_ref()) {
            let cosines: Vec<f64> =
                people.iter().map(|person| f64::from(cosine(face, &person.face))).collect();
            own.push(cosines[i]);
            different.extend(cosines.iter().enumerate().filter(|(other, _)| *other != i).map(|(_, c)| *c));
            let place = rank(&cosines, i);
            ranks.push(place as f64);
            hits += usize::from(place == 1);
        }
        let count = images.len().max(1) as f64;
        // The sum of nothing is −0, which would be printed so.
        with_misses.push((own.iter().sum::<f64>() + 0.0) / count);
        detection.push(own.len() as f64 / count);
        first.push(hits as f64 / count);
        let (same, different) = (mean(&own), mean(&different));
        similarity.extend(same);
        others.extend(different);
        gap.extend(same.zip(different).map(|(same, different)| same - different));
        per_person.push(same);
    }
    let [similarity, similarity_misses_zero, detection, similarity_to_others, same_minus_different, rank_1] =
        figures.map(|values| Mean::of(&values));
    let images = shown.iter().flat_map(|images| images.iter().zip(asked));
    Figures {
        similarity,
        similarity_misses_zero,
        detection,
        similarity_to_others,
        same_minus_different,
        rank_1,
        mean_rank: mean(&ranks),
        factor_correlation: factor_correlation(shown, people, visible),
        obedience: obedience(images.filter_map(|(seen, asked)| Some((seen.attributes.as_ref()?, asked)))),
        per_person,
    }
}

/// How often each attribute that was asked for is there.
pub fn obedience<'a>(
    images: impl Iterator<Item = (&'a Attributes, &'a [Option<usize>; Scene::CLASSES])>,
) -> Vec<Obedience> {
    let mut counts = [(0, 0); Scene::CLASSES];
    for (seen, asked) in images {
        for ((right, all), (seen, asked)) in counts.iter_mut().zip(seen.classes.iter().zip(asked)) {
            *right += usize::from(Some(*seen) == *asked);
            *all += usize::from(asked.is_some());
        }
    }
    let words = Scene::class_words().into_iter().zip(counts).filter(|(_, (_, asked))| *asked > 0);
    words
        .map(|((attribute, _), (right, asked))| Obedience {
            attribute,
            right: right as f64 / asked as f64,
            asked,
        })
        .collect()
}

/// What the caption of `scene` asks for. Nothing is said of a face that looks ahead.
pub fn asked(scene: &Scene) -> [Option<usize>; Scene::CLASSES] {
    let (words, classes) = (Scene::class_words(), scene.classes());
    let said = |i: usize| words[i].0 != "facing" || classes[i] != Facing::Ahead as usize;
    std::array::from_fn(|i| said(i).then_some(classes[i]))
}

/// The mean difference between two ways of drawing the same people: the interval is of the differences.
pub fn paired(of: &Figures, over: &Figures) -> Option<Mean> {
    let pairs = of.per_person.iter().zip(&over.per_person);
    Mean::of(&pairs.filter_map(|(of, over)| Some((*of)? - (*over)?)).collect::<Vec<_>>())
}

fn factor_correlation(shown: &[&[Seen]], people: &[Target], visible: &[usize]) -> Option<f64> {
    let of_factor = |factor: &usize| {
        let judged = |images: &[Seen]| {
            let values: Option<Vec<f64>> = images
                .iter()
                .map(|seen| Some(f64::from(seen.attributes.as_ref()?.factors[*factor])))
                .collect();
            mean(&values?)
        };
        let pairs = shown.iter().zip(people);
        let pairs: Option<Vec<(f64, f64)>> = pairs
            .map(|(images, person)| Some((judged(images)?, f64::from(person.factors[*factor]))))
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
    fn people() -> Vec<Target> {
        [[1.0, 0.0], [0.0, 1.0]]
            .map(|face| Target { face: face.into(), factors: [face[0]; Identity::COUNT] })
            .into()
    }

    fn seen(face: Option<[f32; 2]>, factor: f32) -> Seen {
        let classes = Scene::draw(1, 1).classes();
        let attributes = Some(Attributes { classes, factors: [factor; Identity::COUNT] });
        Seen { face: face.map(Vec::from), attributes }
    }

    #[test]
    fn a_face_that_is_not_found_is_a_miss() {
        let (first, second) =
            ([seen(Some([1.0, 0.0]), 0.9), seen(None, 0.9)], [seen(Some([0.6, 0.8]), 0.2), seen(None, 0.2)]);
        let asked = [asked(&Scene::draw(1, 1)); 2];
        let figures = measure(&[&first, &second], &people(), &asked, &[0, 3]);
        let mean = |mean: Option<Mean>| (mean.unwrap().mean * 1e4).round() / 1e4;
        assert_eq!(mean(figures.similarity), 0.9);
        assert_eq!(mean(figures.similarity_misses_zero), 0.45);
        assert_eq!(mean(figures.detection), 0.5);
        assert_eq!(mean(figures.similarity_to_others), 0.3);
        assert_eq!(mean(figures.same_minus_different), 0.6);
        assert_eq!(mean(figures.rank_1), 0.5);
        assert_eq!(figures.mean_rank, Some(1.0));
        let nobody = measure(&[&[seen(None, 0.0)], &[seen(None, 0.0)]], &people(), &asked, &[]);
        assert!(
            nobody.similarity.is_none() && nobody.similarity_misses_zero.unwrap().mean.is_sign_positive()
        );
        assert!((figures.factor_correlation.unwrap() - 1.0).abs() < 1e-9);
        assert!(figures.obedience.iter().all(|attribute| attribute.right == 1.0));
    }

    #[test]
    fn the_same_images_for_everybody_show_nobody() {
        let same = [seen(Some([0.6, 0.8]), 0.5)];
        let figures = measure(&[&same, &same], &people(), &[asked(&Scene::draw(1, 1))], &[0]);
        assert!(figures.same_minus_different.unwrap().mean.abs() < 1e-6);
        assert_eq!(figures.rank_1.unwrap().mean, 0.5);
        assert_eq!(figures.factor_correlation, Some(0.0));
        assert!(paired(&figures, &figures).unwrap().mean.abs() < 1e-12);
    }

    #[test]
    fn obedience_counts_only_what_the_caption_says() {
        let scene = Scene { yaw: 0.0, ..Scene::draw(1, 1) };
        assert_eq!(asked(&scene)[1], None);
        assert_eq!(asked(&Scene { yaw: 0.3, ..scene.clone() })[1], Some(2));
        let mut wrong = seen(None, 0.0).attributes.unwrap();
        wrong.classes = scene.classes();
        wrong.classes[5] = (wrong.classes[5] + 1) % 8;
        let told = obedience([(&wrong, &asked(&scene))].into_iter());
        assert_eq!(told.len(), Scene::CLASSES - 1);
        for attribute in told {
            assert_eq!(attribute.right, if attribute.attribute == "background" { 0.0 } else { 1.0 });
        }
    }
}
