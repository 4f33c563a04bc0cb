//! Measures with intervals.

use serde::Serialize;

/// A mean over people, with the interval that covers the true mean in 95 of 100 such samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Half the width of the 95 % interval, by Student's t; unknown with fewer than two values.
    pub half_width: Option<f64>,
    /// How many values there were.
    pub n: usize,
}

impl Mean {
    /// The mean of independent `values`: x̄ ± t · s / √n; none of no values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let half_width = (n > 1).then(|| {
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
            student_t(n - 1) * (variance / n as f64).sqrt()
        });
        Some(Self { mean, half_width, n })
    }
}

/// The t that 97.5 % of Student's distribution with `freedom` degrees lie below: exact for 1 and 2, from there on
/// within 0.004 by the expansion around the normal quantile (Abramowitz and Stegun 1964, 26.7.5).
fn student_t(freedom: usize) -> f64 {
    match freedom {
        0 => f64::INFINITY,
        1 => (std::f64::consts::PI * 0.475).tan(),
        2 => 0.95 * (2.0 / (4.0 * 0.975 * 0.025f64)).sqrt(),
        _ => {
            let (z, v) = (1.959_963_984_540_054_f64, freedom as f64);
            let odd =
                |coefficients: &[f64]| coefficients.iter().rev().fold(0.0, |sum, c| sum * z * z + c) * z;
            z + odd(&[1.0, 1.0]) / (4.0 * v)
                + odd(&[3.0, 16.0, 5.0]) / (96.0 * v.powi(2))
                + odd(&[-15.0, 17.0, 19.0, 3.0]) / (384.0 * v.powi(3))
                + odd(&[-945.0, -1920.0, 1482.0, 776.0, 79.0]) / (92_160.0 * v.powi(4))
        }
    }
}

/// The place of `right` when all are sorted from the largest, the first being 1; a tie counts against it.
pub fn rank(values: &[f64], right: usize) -> usize {
    1 + values.iter().enumerate().filter(|(i, value)| *i != right && **value >= values[right]).count()
}

/// Pearson's correlation; 0 where one side does not vary.
pub fn correlation(pairs: &[(f64, f64)]) -> f64 {
    let n = pairs.len() as f64;
    let (x, y) = pairs.iter().fold((0.0, 0.0), |(x, y), pair| (x + pair.0 / n, y + pair.1 / n));
    let sum = |of: &dyn Fn(f64, f64) -> f64| pairs.iter().map(|pair| of(pair.0 - x, pair.1 - y)).sum::<f64>();
    let (xy, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    // What rounding leaves of equal values is no variation.
    let varies = |squares: f64, mean: f64| squares > 1e-12 * n * mean.mul_add(mean, 1e-12);
    if varies(xx, x) && varies(yy, y) { xy / (xx * yy).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_the_one_in_the_textbook() {
        // R: t.test(c(2, 4, 4, 5, 7))$conf.int is 2.1444 to 6.6556.
        let mean = Mean::of(&[2.0, 4.0, 4.0, 5.0, 7.0]).unwrap();
        assert_eq!((mean.mean, mean.n), (4.4, 5));
        assert!((mean.half_width.unwrap() - 2.2556).abs() < 2e-3, "{mean:?}");
        assert_eq!(Mean::of(&[3.0]), Some(Mean { mean: 3.0, half_width: None, n: 1 }));
        assert_eq!(Mean::of(&[]), None);
    }

    #[test]
    fn quantiles_are_those_of_the_tables() {
        let table = [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (63, 1.9983)];
        for (freedom, t) in table {
            assert!((student_t(freedom) - t).abs() < 0.004, "{freedom}: {}", student_t(freedom));
        }
    }

    #[test]
    fn the_largest_has_rank_one_and_ties_count_against_it() {
        assert_eq!(rank(&[0.1, 0.9, 0.5], 1), 1);
        assert_eq!(rank(&[0.1, 0.9, 0.5], 0), 3);
        assert_eq!(rank(&[0.5, 0.5], 0), 2);
    }

    #[test]
    fn correlation_sees_lines_and_nothing_in_what_does_not_vary() {
        let along: Vec<(f64, f64)> = (0..5).map(|i| (f64::from(i), 3.0 - 2.0 * f64::from(i))).collect();
        assert!((correlation(&along) + 1.0).abs() < 1e-12);
        let still: Vec<(f64, f64)> = (0..5).map(|i| (0.1, f64::from(i))).collect();
        assert_eq!(correlation(&still), 0.0);
        // numpy.corrcoef([1, 2, 3, 4], [1, 3, 2, 4]) is 0.8.
        assert!((correlation(&[(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]) - 0.8).abs() < 1e-12);
    }
}
