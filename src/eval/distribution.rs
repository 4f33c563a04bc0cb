//! Distances between two sets of images, by the features of an image encoder: Fréchet distance and KID.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

/// Fréchet distance of the Gaussians fitted to rows of features, |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½): FID where the
/// features are Inception's (Heusel et al. 2017, arXiv 1706.08500).
///
/// # Errors
/// Fewer rows than twice the width on a side: the covariance would be of the sample and not of the images.
pub fn frechet(a: &[Vec<f32>], b: &[Vec<f32>]) -> Result<f64> {
    let width = a.first().or(b.first()).map_or(0, Vec::len);
    for rows in [a, b] {
        ensure!(
            rows.len() >= 2 * width.max(1),
            "a Fréchet distance in {width} dimensions needs {} images on each side, and there are {}",
            2 * width.max(1),
            rows.len()
        );
    }
    let ((mean_a, cov_a), (mean_b, cov_b)) = (gaussian(a)?, gaussian(b)?);
    let between = (mean_a - mean_b)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    let overlap = trace_of_root(&cov_a.matmul(&cov_b)?)?;
    Ok(between + trace(&cov_a)? + trace(&cov_b)? - 2.0 * overlap)
}

/// Kernel distance of rows of features: the unbiased estimate of MMD² with the kernel (x·y/D + 1)³ (Bińkowski et al.
/// 2018, arXiv 1801.01401).
///
/// # Errors
/// Fewer than two rows on a side.
pub fn kid(a: &[Vec<f32>], b: &[Vec<f32>]) -> Result<f64> {
    ensure!(a.len() > 1 && b.len() > 1, "a kernel distance needs two images on each side");
    let kernel = |x: &[f32], y: &[f32]| {
        let product: f64 = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        (product / x.len() as f64 + 1.0).powi(3)
    };
    let within = |rows: &[Vec<f32>]| {
        let mut sum = 0.0;
        for (i, x) in rows.iter().enumerate() {
            sum += rows[..i].iter().map(|y| kernel(x, y)).sum::<f64>();
        }
        2.0 * sum / (rows.len() * (rows.len() - 1)) as f64
    };
    let across: f64 = a.iter().map(|x| b.iter().map(|y| kernel(x, y)).sum::<f64>()).sum();
    Ok(within(a) + within(b) - 2.0 * across / (a.len() * b.len()) as f64)
}

/// Mean (1, D) and unbiased covariance (D, D), f64.
fn gaussian(rows: &[Vec<f32>]) -> Result<(Tensor, Tensor)> {
    let (count, width) = (rows.len(), rows[0].len());
    let x = Tensor::from_vec(rows.concat(), (count, width), &Device::Cpu)?.to_dtype(DType::F64)?;
    let mean = x.mean_keepdim(0)?;
    let centred = x.broadcast_sub(&mean)?;
    let covariance = (centred.t()?.contiguous()?.matmul(&centred)? / (count - 1) as f64)?;
    Ok((mean, covariance))
}

/// tr A^½ of a product of two covariances, whose eigenvalues are real and not negative: the coupled Newton–Schulz
/// iteration (Higham 2008, Functions of Matrices, equation 6.35), Y → (A / |A|)^½. An eigenvalue λ grows by up to 1.5 a
/// round until it is √λ, so that after these rounds nothing above 10⁻¹⁶ of the largest is missing.
fn trace_of_root(a: &Tensor) -> Result<f64> {
    const ROUNDS: usize = 60;
    let norm = a.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>()?;
    if norm == 0.0 {
        return Ok(0.0);
    }
    let eye = Tensor::eye(a.dim(0)?, DType::F64, a.device())?;
    let (mut y, mut z) = ((a / norm)?, eye.clone());
    for _ in 0..ROUNDS {
        let t = ((&eye * 3.0)? - z.matmul(&y)?)?.affine(0.5, 0.0)?;
        let next = y.matmul(&t)?;
        let moved = (&next - &y)?.abs()?.max_all()?.to_scalar::<f64>()?;
        z = t.matmul(&z)?;
        y = next;
        if moved < 1e-13 {
            break;
        }
    }
    Ok(trace(&y)? * norm.sqrt())
}

fn trace(matrix: &Tensor) -> Result<f64> {
    let eye = Tensor::eye(matrix.dim(0)?, DType::F64, matrix.device())?;
    Ok((matrix * eye)?.sum_all()?.to_scalar()?)
}
