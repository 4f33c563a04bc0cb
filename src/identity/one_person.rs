//! Several photos of one person → one direction, without the photos that show somebody else.
//!
//! Each photo is held against the mean of the others. Of the recognisers here, photos of one person taken years apart
//! have cosines of 0.53 and more, of two people 0.23 and less; [`SAME_PERSON`] lies between.

use super::cosine;

/// A photo whose cosine to the mean of the others is lower shows somebody else.
pub const SAME_PERSON: f32 = 0.3;

/// A photo that was left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outlier {
    /// Its place among the photos.
    pub photo: usize,
    /// Its cosine to the mean of those that were still there.
    pub cosine: f32,
}

/// The photos that show somebody else, in the order in which they are left out: the least like the others first,
/// until all that remain are alike. Two photos cannot tell which of them is wrong, so two always remain.
pub fn outliers(faces: &[Vec<f32>]) -> Vec<Outlier> {
    let mut kept: Vec<usize> = (0..faces.len()).collect();
    let mut outliers = Vec::new();
    while kept.len() > 2 {
        let like_the_others = |&photo: &usize| {
            let others: Vec<&[f32]> =
                kept.iter().filter(|&&other| other != photo).map(|&other| &faces[other][..]).collect();
            Outlier { photo, cosine: cosine(&faces[photo], &mean_direction(&others)) }
        };
        let worst = kept.iter().map(like_the_others).min_by(|a, b| a.cosine.total_cmp(&b.cosine));
        match worst {
            Some(worst) if worst.cosine < SAME_PERSON => {
                kept.retain(|&photo| photo != worst.photo);
                outliers.push(worst);
            }
            _ => break,
        }
    }
    outliers
}

/// The direction of the sum of unit vectors.
pub fn mean_direction<V: AsRef<[f32]>>(vectors: &[V]) -> Vec<f32> {
    let width = vectors.first().map_or(0, |vector| vector.as_ref().len());
    let sum: Vec<f32> = (0..width).map(|i| vectors.iter().map(|vector| vector.as_ref()[i]).sum()).collect();
    let length = sum.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    sum.into_iter().map(|x| x / length).collect()
}

/// Groups of faces by person, each a list of places in `faces`; the largest group first, otherwise in the order of
/// their first face.
///
/// A face joins the group whose mean it is most like, if its cosine to it is `threshold` or more, and founds one
/// otherwise; groups whose means are as alike as that are then joined, so that the order of the faces matters little.
pub fn groups(faces: &[Vec<f32>], threshold: f32) -> Vec<Vec<usize>> {
    let mut groups: Vec<(Vec<usize>, Vec<f32>)> = Vec::new();
    for (face, vector) in faces.iter().enumerate() {
        let nearest = groups
            .iter_mut()
            .map(|group| (cosine(&group.1, vector), group))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(cosine, _)| *cosine >= threshold);
        match nearest {
            Some((_, (members, sum))) => {
                members.push(face);
                sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
            }
            None => groups.push((vec![face], vector.clone())),
        }
    }
    while let Some((into, from)) = nearest_pair(&groups, threshold) {
        let (members, sum) = groups.remove(from);
        groups[into].0.extend(members);
        groups[into].1.iter_mut().zip(sum).for_each(|(own, value)| *own += value);
    }
    let mut groups: Vec<Vec<usize>> = groups.into_iter().map(|(members, _)| members).collect();
    groups.iter_mut().for_each(|group| group.sort_unstable());
    groups.sort_by_key(|group| (std::cmp::Reverse(group.len()), group[0]));
    groups
}

/// The two groups whose means are most alike, the earlier first, if their cosine is `threshold` or more.
fn nearest_pair(groups: &[(Vec<usize>, Vec<f32>)], threshold: f32) -> Option<(usize, usize)> {
    let pairs = (0..groups.len()).flat_map(|a| (a + 1..groups.len()).map(move |b| (a, b)));
    pairs
        .map(|(a, b)| (cosine(&groups[a].1, &groups[b].1), (a, b)))
        .filter(|(cosine, _)| *cosine >= threshold)
        .max_by(|x, y| x.0.total_cmp(&y.0))
        .map(|(_, pair)| pair)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unit vectors at these angles, in degrees.
    fn at(angles: &[f32]) -> Vec<Vec<f32>> {
        angles.iter().map(|angle| vec![angle.to_radians().cos(), angle.to_radians().sin()]).collect()
    }

    #[test]
    fn the_one_photo_of_somebody_else_is_left_out() {
        let found = outliers(&at(&[0.0, 20.0, 95.0, -10.0]));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].photo, 2);
        assert!((found[0].cosine - (95f32 - 10.0 / 3.0).to_radians().cos()).abs() < 0.01, "{found:?}");
    }

    #[test]
    fn alike_photos_and_pairs_stay() {
        assert_eq!(outliers(&at(&[0.0, 50.0, 25.0])), []);
        assert_eq!(outliers(&at(&[0.0, 170.0])), []);
        assert_eq!(outliers(&[]), []);
    }

    #[test]
    fn the_mean_direction_is_a_unit_vector_between() {
        let mean = mean_direction(&at(&[10.0, 50.0]));
        assert!((mean[1].atan2(mean[0]).to_degrees() - 30.0).abs() < 1e-3);
        assert!((mean.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn people_are_told_apart_in_any_order() {
        let order = at(&[0.0, 80.0, 10.0, 85.0, -5.0, 180.0]);
        assert_eq!(groups(&order, 0.8), [vec![0, 2, 4], vec![1, 3], vec![5]]);
        // The two at the ends found groups of their own until those between join them.
        assert_eq!(groups(&at(&[0.0, 40.0, 10.0, 30.0]), 0.86), [[0, 1, 2, 3]]);
    }
}
