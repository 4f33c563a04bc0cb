//! How well the cosine of two embeddings tells whether both show one person, over all pairs of labelled images.
//!
//! AUC = P(genuine > impostor) + ½ P(equal), the Mann–Whitney statistic. At a threshold t, FAR is the share of
//! impostor pairs with a cosine of t or more, FRR that of genuine pairs below t; at the EER both are equal.

use std::path::Path;

use serde::Serialize;

/// Cosines of pairs: of one person and of two.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// Both images show one person.
    pub genuine: Vec<f32>,
    /// They show two people.
    pub impostor: Vec<f32>,
}

/// Result of [`Pairs::verify`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Verification {
    /// Probability that a genuine pair is more alike than an impostor pair.
    pub auc: f64,
    /// The error rate where false accepts and false rejects are equally frequent.
    pub equal_error_rate: f64,
    /// The cosine at which that is.
    pub equal_error_threshold: f64,
    /// (1 − FAR + 1 − FRR) / 2 at the best threshold: both kinds of pairs count alike, however many there are.
    pub best_accuracy: f64,
    /// The cosine at which that is, in the middle of the gap between the pairs.
    pub best_threshold: f64,
    /// Share of genuine pairs accepted where one impostor pair of 1,000 is.
    pub accepted_at_far_1e3: f64,
}

/// Mean, spread and counts of some cosines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// How many pairs.
    pub pairs: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation.
    pub deviation: f64,
    /// The smallest.
    pub least: f32,
    /// The largest.
    pub most: f32,
    /// How many lie in each tenth from −1 to 1: [−1, −0.9), …, [0.9, 1].
    pub histogram: [usize; 20],
}

impl Pairs {
    /// All pairs of `vectors` (unit vectors), labelled by the `person` of each.
    pub fn of<P: PartialEq>(vectors: &[Vec<f32>], person: &[P]) -> Self {
        let mut pairs = Self::default();
        for (a, one) in vectors.iter().enumerate() {
            for (b, other) in vectors.iter().enumerate().skip(a + 1) {
                let list = if person[a] == person[b] { &mut pairs.genuine } else { &mut pairs.impostor };
                list.push(super::cosine(one, other));
            }
        }
        pairs
    }

    /// The measures; none without pairs of both kinds.
    pub fn verify(&self) -> Option<Verification> {
        let (genuine, impostor) = (sorted(&self.genuine), sorted(&self.impostor));
        if genuine.is_empty() || impostor.is_empty() {
            return None;
        }
        let (g, i) = (genuine.len() as f64, impostor.len() as f64);
        let below = |list: &[f32], t: f32| list.partition_point(|&cosine| cosine < t);
        let wins: f64 = genuine
            .iter()
            .map(|&t| {
                let (less, up_to) = (below(&impostor, t), impostor.partition_point(|&cosine| cosine <= t));
                (less + up_to) as f64 / 2.0
            })
            .sum();
        // Every place where a rate changes: the cosines themselves, and one beyond them all.
        let mut places = sorted(&[&self.genuine[..], &self.impostor[..]].concat());
        places.dedup();
        places.push(places[places.len() - 1].next_up());
        let rates = |t: f32| (1.0 - below(&impostor, t) as f64 / i, below(&genuine, t) as f64 / g);
        let (mut best, mut equal) = ((0.0, 0.0), (f64::INFINITY, 0.0, 0.0));
        for (at, &t) in places.iter().enumerate() {
            let (far, frr) = rates(t);
            // Any threshold between the cosine before and this one gives the same rates.
            let middle =
                if at == 0 { f64::from(t) } else { (f64::from(places[at - 1]) + f64::from(t)) / 2.0 };
            let accuracy = 1.0 - (far + frr) / 2.0;
            if accuracy > best.0 {
                best = (accuracy, middle);
            }
            if (far - frr).abs() < equal.0 {
                equal = ((far - frr).abs(), (far + frr) / 2.0, middle);
            }
        }
        let strict = impostor[(i * 0.999).ceil() as usize - 1];
        Some(Verification {
            auc: wins / (g * i),
            equal_error_rate: equal.1,
            equal_error_threshold: equal.2,
            best_accuracy: best.0,
            best_threshold: best.1,
            accepted_at_far_1e3: 1.0 - genuine.partition_point(|&cosine| cosine <= strict) as f64 / g,
        })
    }
}

impl Spread {
    /// Of these cosines; none of no cosines.
    pub fn of(cosines: &[f32]) -> Option<Self> {
        let sorted = sorted(cosines);
        let (&least, &most) = (sorted.first()?, sorted.last()?);
        let n = cosines.len() as f64;
        let mean = cosines.iter().map(|&cosine| f64::from(cosine)).sum::<f64>() / n;
        let variance = cosines.iter().map(|&cosine| (f64::from(cosine) - mean).powi(2)).sum::<f64>() / n;
        let mut histogram = [0; 20];
        for cosine in cosines {
            histogram[(((cosine + 1.0) * 10.0).max(0.0) as usize).min(19)] += 1;
        }
        Some(Self { pairs: cosines.len(), mean, deviation: variance.sqrt(), least, most, histogram })
    }
}

/// Whose image a file is: the name of its folder inside `root`; for a file that lies in `root` itself, what stands
/// before the last `-`, `_` or space of its name.
pub fn person_of(root: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(root).unwrap_or(file);
    match inside.parent() {
        Some(folder) if folder != Path::new("") => folder.to_string_lossy().into_owned(),
        _ => {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            let end = name.rfind(['-', '_', ' ']).filter(|&end| end > 0);
            name[..end.unwrap_or(name.len())].to_string()
        }
    }
}

fn sorted(cosines: &[f32]) -> Vec<f32> {
    let mut sorted = cosines.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two logistic distributions with scale 1, `apart` from each other, by their quantiles.
    fn logistic(n: usize, apart: f32) -> Pairs {
        let quantile = |k: usize| {
            let p = (k as f32 + 0.5) / n as f32;
            (p / (1.0 - p)).ln()
        };
        let impostor: Vec<f32> = (0..n).map(quantile).collect();
        Pairs { genuine: impostor.iter().map(|x| x + apart).collect(), impostor }
    }

    #[test]
    fn two_logistic_distributions_have_the_closed_form() {
        // With r = e^d: AUC = r (r − 1 − d) / (r − 1)²; FAR = FRR at d/2, where both are 1 / (1 + e^{d/2}).
        for apart in [0.5f64, 1.0, 3.0] {
            let found = logistic(4000, apart as f32).verify().unwrap();
            let r = apart.exp();
            let auc = r * (r - 1.0 - apart) / (r - 1.0).powi(2);
            assert!((found.auc - auc).abs() < 2e-4, "{apart}: {found:?}, wanted {auc}");
            let error = 1.0 / (1.0 + (apart / 2.0).exp());
            assert!((found.equal_error_rate - error).abs() < 1e-3, "{apart}: {found:?}, wanted {error}");
            assert!((found.equal_error_threshold - apart / 2.0).abs() < 0.01, "{apart}: {found:?}");
            assert!((found.best_accuracy - (1.0 - error)).abs() < 1e-3, "{apart}: {found:?}");
            // Four impostors of 4,000 lie above this quantile, and this share of the genuine.
            let p = 0.999 - 0.5 / 4000f64;
            let accepted = 1.0 / (1.0 + ((p / (1.0 - p)).ln() - apart).exp());
            assert!((found.accepted_at_far_1e3 - accepted).abs() < 1e-3, "{apart}: {found:?} {accepted}");
        }
    }

    #[test]
    fn ties_count_half_and_order_decides_the_rest() {
        let auc = |genuine: &[f32], impostor: &[f32]| {
            Pairs { genuine: genuine.to_vec(), impostor: impostor.to_vec() }.verify().unwrap().auc
        };
        assert_eq!(auc(&[0.5, 0.5], &[0.5]), 0.5);
        assert_eq!(auc(&[0.9, 0.2], &[0.3, 0.1]), 0.75);
        assert_eq!(auc(&[0.1], &[0.9]), 0.0);
        assert_eq!(Pairs::default().verify(), None);
    }

    #[test]
    fn pairs_that_can_be_told_apart_have_no_errors_and_a_threshold_between() {
        let found = Pairs { genuine: vec![0.6, 0.9], impostor: vec![0.2, -0.1, 0.0] }.verify().unwrap();
        assert_eq!((found.auc, found.equal_error_rate, found.best_accuracy), (1.0, 0.0, 1.0));
        assert!((found.best_threshold - 0.4).abs() < 1e-6 && found.accepted_at_far_1e3 == 1.0, "{found:?}");
    }

    #[test]
    fn pairs_are_genuine_within_a_person() {
        let vectors = [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]].map(Vec::from);
        let pairs = Pairs::of(&vectors, &["a", "a", "b"]);
        assert_eq!((pairs.genuine.len(), pairs.impostor.len()), (1, 2));
        assert!((pairs.genuine[0] - 0.8).abs() < 1e-6);
        let spread = Spread::of(&[-1.0, 0.05, 1.0, 0.95]).unwrap();
        assert_eq!((spread.histogram[0], spread.histogram[10], spread.histogram[19]), (1, 1, 2));
        assert!((spread.mean - 0.25).abs() < 1e-6 && spread.pairs == 4 && spread.least == -1.0);
    }

    #[test]
    fn people_are_named_by_folder_or_by_the_start_of_the_file_name() {
        for (file, name) in [
            ("album/anna/1.jpg", "anna"),
            ("album/anna/old/1.jpg", "anna/old"),
            ("album/anna-1.jpg", "anna"),
            ("album/anna_b_02.png", "anna_b"),
            ("album/anna.png", "anna"),
            ("album/-1.png", "-1"),
        ] {
            assert_eq!(person_of(Path::new("album"), Path::new(file)), name);
        }
    }
}
