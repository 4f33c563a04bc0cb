//! Several photos of one person → one direction, without the photos that show another person.
//!
//! Each photo is held against the mean of the others. Of the recognisers here, photos of one person taken years apart
//! have cosines of 0.53 and more, of two people 0.23 and less; [`SAME_PERSON`] lies between.

use super::cosine;

/// A photo whose cosine to the mean of the others is lower shows another person.
pub const SAME_PERSON: f32 = 0.3;

/// A photo that was left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outlier {
    /// Its place among the photos.
    pub photo: usize,
    /// Its cosine to the mean of those that were still there.
    pub cosine: f32,
}

/// The photos that show another person, in the order in which they are left out: the least like the others first,
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
}
