//! How alike two images are by their pixels: PSNR and SSIM.

use crate::image::Image;

/// Side of SSIM's window, in pixels, and the deviation of its Gaussian: those of the paper.
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;

/// Structural similarity of two images of one size, from −1 to 1: the mean over the three colours of [`ssim_of`].
///
/// # Panics
/// Images of different sizes, or smaller than 11×11 pixels.
pub fn ssim(a: &Image, b: &Image) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height), "images of one size");
    let plane = |image: &Image, channel: usize| -> Vec<f64> {
        image.rgb.iter().skip(channel).step_by(3).map(|byte| f64::from(*byte)).collect()
    };
    let of = |channel| ssim_of(&plane(a, channel), &plane(b, channel), [a.height, a.width], 255.0);
    (0..3).map(of).sum::<f64>() / 3.0
}

/// Structural similarity of two planes of `[height, width]` values with the given `range`: the mean over all places
/// where the window fits (Wang et al. 2004, IEEE TIP 13(4); equal to scikit-image's `structural_similarity` with
/// `gaussian_weights`, `sigma` 1.5, `use_sample_covariance` false, without its border).
///
/// # Panics
/// Planes of another size, or smaller than 11×11.
pub fn ssim_of(a: &[f64], b: &[f64], [height, width]: [usize; 2], range: f64) -> f64 {
    assert_eq!((a.len(), b.len()), (height * width, height * width), "planes of {height}×{width}");
    assert!(width >= WINDOW && height >= WINDOW, "at least {WINDOW} values a side");
    let weights: Vec<f64> = (0..WINDOW)
        .map(|i| (-(i as f64 - (WINDOW / 2) as f64).powi(2) / (2.0 * SIGMA * SIGMA)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|weight| weight / total).collect();
    let (inner, lines) = (width - WINDOW + 1, height - WINDOW + 1);
    let mean = |values: &dyn Fn(usize) -> f64| -> Vec<f64> {
        let mut rows = vec![0.0; inner * height];
        for y in 0..height {
            for x in 0..inner {
                rows[y * inner + x] =
                    weights.iter().enumerate().map(|(i, weight)| weight * values(y * width + x + i)).sum();
            }
        }
        let column =
            |at: usize| weights.iter().enumerate().map(|(i, weight)| weight * rows[at + i * inner]).sum();
        (0..inner * lines).map(column).collect()
    };
    let (ma, mb) = (mean(&|i| a[i]), mean(&|i| b[i]));
    let (aa, bb, ab) = (mean(&|i| a[i] * a[i]), mean(&|i| b[i] * b[i]), mean(&|i| a[i] * b[i]));
    let (c1, c2) = ((0.01 * range).powi(2), (0.03 * range).powi(2));
    let at = |i: usize| {
        let (va, vb) = (aa[i] - ma[i] * ma[i], bb[i] - mb[i] * mb[i]);
        let covariance = ab[i] - ma[i] * mb[i];
        (2.0 * ma[i] * mb[i] + c1) * (2.0 * covariance + c2)
            / ((ma[i] * ma[i] + mb[i] * mb[i] + c1) * (va + vb + c2))
    };
    (0..inner * lines).map(at).sum::<f64>() / (inner * lines) as f64
}

/// Peak signal-to-noise ratio of two images of one size, in dB; see [`psnr_of`].
///
/// # Panics
/// Images of different sizes.
pub fn psnr(a: &Image, b: &Image) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height), "images of one size");
    let values = |image: &Image| -> Vec<f64> { image.rgb.iter().map(|byte| f64::from(*byte)).collect() };
    psnr_of(&values(a), &values(b), 255.0)
}

/// 10·log₁₀(range² / MSE) in dB, infinite for equal values.
pub fn psnr_of(a: &[f64], b: &[f64], range: f64) -> f64 {
    let squares: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    10.0 * (range.powi(2) * a.len() as f64 / squares).log10()
}
