//! Algebra on ΔW = up · down through its thin factors: sums, inner products, and the singular value decomposition,
//! which costs as much as the rank allows and never as much as ΔW.
//!
//! SVD of a product: QR of both factors, then of the small R×R core (one-sided Jacobi, Golub and Van Loan, Matrix
//! Computations, section 8.6.3), all in f64. A ΔW without factors is projected on its largest directions first
//! (Halko et al. 2011, algorithm 4.4).

use candle_core::{DType, Device, Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// ΔW (out, in) as a product.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// (R, in) f32.
    pub down: Tensor,
    /// (out, R) f32.
    pub up: Tensor,
}

/// The singular values of a ΔW, falling, and what belongs to each.
pub struct Svd {
    /// K rows of length out.
    left: Vec<Vec<f64>>,
    /// K.
    pub values: Vec<f64>,
    /// K rows of length in.
    right: Vec<Vec<f64>>,
}

impl LowRank {
    /// Σ factor · ΔW, exactly: the factors of all beside each other.
    pub fn sum(terms: &[(&Self, f64)]) -> Result<Self> {
        let downs: Vec<&Tensor> = terms.iter().map(|(thin, _)| &thin.down).collect();
        let ups = terms.iter().map(|(thin, factor)| &thin.up * *factor).collect::<Result<Vec<_>>>()?;
        Ok(Self { down: Tensor::cat(&downs, 0)?, up: Tensor::cat(&ups, 1)? })
    }

    /// Σ over all places of ΔW · ΔW', through R×R' products.
    pub fn dot(&self, other: &Self) -> Result<f64> {
        let f64 = |tensor: &Tensor| tensor.to_dtype(DType::F64);
        let ups = f64(&self.up)?.t()?.matmul(&f64(&other.up)?)?;
        let downs = f64(&self.down)?.matmul(&f64(&other.down)?.t()?)?;
        (ups * downs)?.sum_all()?.to_scalar()
    }

    /// Its singular value decomposition; K = min(R, out, in).
    pub fn svd(&self) -> Result<Svd> {
        let columns = self.up.t()?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let rows = self.down.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let (left, left_core) = orthonormal(&columns);
        let (right, right_core) = orthonormal(&rows);
        // core[i][j] = Σ over r of left_core[i][r] · right_core[j][r]
        let core: Vec<Vec<f64>> =
            left_core.iter().map(|a| right_core.iter().map(|b| dot(a, b)).collect()).collect();
        let (u, values, v) = small_svd(core);
        let keep = values.len().min(self.up.dim(0)?).min(self.down.dim(1)?);
        let combine = |weights: &[Vec<f64>], basis: &[Vec<f64>]| -> Vec<Vec<f64>> {
            weights.iter().take(keep).map(|weights| combination(weights, basis)).collect()
        };
        Ok(Svd { left: combine(&u, &left), values: values[..keep].to_vec(), right: combine(&v, &right) })
    }

    /// The `rank` largest directions of a `delta` (out, in) that has no factors.
    pub fn project(delta: &Tensor, rank: usize) -> Result<Self> {
        let (out, input) = delta.dims2()?;
        let block = (rank + 16).min(out).min(input);
        let delta = delta.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let transposed = delta.t()?.contiguous()?;
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let start: Vec<f64> = (0..block * input).map(|_| rng.sample(StandardNormal)).collect();
        let mut rows = Tensor::from_vec(start, (block, input), &Device::Cpu)?;
        let mut left = rows.matmul(&transposed)?; // (block, out)
        // The error falls by (σ_block / σ_rank)² a round.
        for _ in 0..6 {
            left = basis_of(&left)?;
            rows = basis_of(&left.matmul(&delta)?)?;
            left = rows.matmul(&transposed)?;
        }
        let left = basis_of(&left)?;
        let down = left.matmul(&delta)?.to_dtype(DType::F32)?;
        Ok(Self { down, up: left.t()?.contiguous()?.to_dtype(DType::F32)? })
    }
}

impl Svd {
    /// The smallest rank that keeps `share` of Σ σ².
    pub fn rank_for(&self, share: f64) -> usize {
        let total: f64 = self.values.iter().map(|value| value * value).sum();
        let mut kept = 0.0;
        let place = self.values.iter().position(|value| {
            kept += value * value;
            kept >= share * total
        });
        place.map_or(self.values.len(), |place| place + 1)
    }

    /// The share of Σ σ² that the first `rank` hold.
    pub fn kept(&self, rank: usize) -> f64 {
        let energy = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let total = energy(&self.values);
        if total == 0.0 { 1.0 } else { energy(&self.values[..rank.min(self.values.len())]) / total }
    }

    /// The nearest ΔW of `rank`, its singular values shared equally between the factors. Ranks beyond K are zeros.
    pub fn truncate(&self, rank: usize) -> Result<LowRank> {
        let scaled = |rows: &[Vec<f64>]| -> Result<Tensor> {
            let width = rows.first().map_or(0, Vec::len);
            let mut flat = Vec::with_capacity(rank * width);
            for (row, value) in rows.iter().zip(&self.values).take(rank) {
                flat.extend(row.iter().map(|x| (x * value.sqrt()) as f32));
            }
            flat.resize(rank * width, 0.0);
            Tensor::from_vec(flat, (rank, width), &Device::Cpu)
        };
        Ok(LowRank { down: scaled(&self.right)?, up: scaled(&self.left)?.t()?.contiguous()? })
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn combination(weights: &[f64], rows: &[Vec<f64>]) -> Vec<f64> {
    let mut sum = vec![0.0; rows.first().map_or(0, Vec::len)];
    for (weight, row) in weights.iter().zip(rows) {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
    }
    sum
}

/// Orthonormal rows that span `rows` (Gram–Schmidt, each row twice), and the coordinates of the rows in them:
/// `rows[r] = Σ over i of core[i][r] · basis[i]`. A row that the others span adds a basis row of zeros.
fn orthonormal(rows: &[Vec<f64>]) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut basis: Vec<Vec<f64>> = Vec::with_capacity(rows.len());
    for row in rows {
        let mut rest = row.clone();
        for _ in 0..2 {
            for other in &basis {
                let along = dot(&rest, other);
                rest.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let (length, before) = (dot(&rest, &rest).sqrt(), dot(row, row).sqrt());
        // What is left of a row that the others span is rounding.
        let scale = if length > 1e-12 * before { 1.0 / length } else { 0.0 };
        basis.push(rest.into_iter().map(|x| x * scale).collect());
    }
    let core = basis.iter().map(|direction| rows.iter().map(|row| dot(direction, row)).collect()).collect();
    (basis, core)
}

fn basis_of(rows: &Tensor) -> Result<Tensor> {
    let (basis, _) = orthonormal(&rows.to_vec2::<f64>()?);
    Tensor::from_vec(basis.concat(), rows.shape(), &Device::Cpu)
}

/// Rows u, values and rows v with matrix = Σ value · u vᵀ, values falling.
///
/// The rows are turned in pairs until all are orthogonal; their lengths are then the values.
pub(super) fn small_svd(mut rows: Vec<Vec<f64>>) -> (Vec<Vec<f64>>, Vec<f64>, Vec<Vec<f64>>) {
    let n = rows.len();
    let mut turns: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| if i == j { 1.0 } else { 0.0 }).collect()).collect();
    // Convergence is quadratic; ten sweeps are plenty.
    for _ in 0..40 {
        let mut turned = false;
        for p in 0..n {
            for q in p + 1..n {
                let (a, b, c) = (dot(&rows[p], &rows[p]), dot(&rows[q], &rows[q]), dot(&rows[p], &rows[q]));
                if c.abs() <= 1e-15 * (a * b).sqrt() || c == 0.0 {
                    continue;
                }
                turned = true;
                let zeta = (b - a) / (2.0 * c);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cosine = 1.0 / (1.0 + t * t).sqrt();
                for matrix in [&mut rows, &mut turns] {
                    let (head, tail) = matrix.split_at_mut(q);
                    for (x, y) in head[p].iter_mut().zip(&mut tail[0]) {
                        (*x, *y) = (cosine * (*x - t * *y), cosine * (t * *x + *y));
                    }
                }
            }
        }
        if !turned {
            break;
        }
    }
    // rows = turns · matrix, so matrix = turnsᵀ · rows.
    let lengths: Vec<f64> = rows.iter().map(|row| dot(row, row).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| lengths[*j].total_cmp(&lengths[*i]));
    let direction = |i: &usize| {
        let scale = if lengths[*i] > 0.0 { 1.0 / lengths[*i] } else { 0.0 };
        rows[*i].iter().map(|x| x * scale).collect()
    };
    (
        order.iter().map(|i| turns[*i].clone()).collect(),
        order.iter().map(|i| lengths[*i]).collect(),
        order.iter().map(direction).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise::normal;

    fn random(stream: u64, out: usize, rank: usize, input: usize) -> LowRank {
        let normal = |stream, shape: (usize, usize)| normal(4, stream, shape, &Device::Cpu).unwrap();
        LowRank { down: normal(stream, (rank, input)), up: normal(stream + 1, (out, rank)) }
    }

    fn whole(thin: &LowRank) -> Tensor {
        thin.up.matmul(&thin.down).unwrap()
    }

    fn norm(tensor: &Tensor) -> f64 {
        tensor
            .to_dtype(DType::F64)
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
            .sqrt()
    }

    #[test]
    fn all_singular_values_together_give_the_matrix_back() {
        for (out, rank, input) in [(20, 5, 30), (4, 6, 9), (30, 1, 7), (12, 12, 12)] {
            let thin = random(1, out, rank, input);
            let svd = thin.svd().unwrap();
            assert!(svd.values.windows(2).all(|pair| pair[0] >= pair[1]));
            let back = svd.truncate(rank).unwrap();
            assert!(norm(&(whole(&back) - whole(&thin)).unwrap()) < 1e-5 * norm(&whole(&thin)));
            let energy = svd.values.iter().map(|value| value * value).sum::<f64>().sqrt();
            assert!((energy / norm(&whole(&thin)) - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn truncation_loses_exactly_the_small_singular_values() {
        let thin = random(7, 40, 8, 25);
        let svd = thin.svd().unwrap();
        for rank in [1, 3, 7] {
            let lost = norm(&(whole(&svd.truncate(rank).unwrap()) - whole(&thin)).unwrap());
            let tail = svd.values[rank..].iter().map(|value| value * value).sum::<f64>().sqrt();
            assert!((lost / tail - 1.0).abs() < 1e-4, "{lost} {tail}");
            assert!((svd.kept(rank) + (tail / norm(&whole(&thin))).powi(2) - 1.0).abs() < 1e-6);
            assert_eq!(svd.rank_for(svd.kept(rank) - 1e-9), rank);
        }
        assert_eq!(svd.rank_for(1.0 - 1e-12), 8);
    }

    #[test]
    fn factors_that_say_the_same_twice_have_singular_values_of_zero() {
        let thin = random(9, 20, 3, 30);
        let twice = LowRank::sum(&[(&thin, 1.0), (&thin, 0.5)]).unwrap();
        let svd = twice.svd().unwrap();
        assert!(svd.values[2] > 1.0 && svd.values[3] < 1e-9, "{:?}", svd.values);
        let back = svd.truncate(3).unwrap();
        assert!(norm(&(whole(&back) - (whole(&thin) * 1.5).unwrap()).unwrap()) < 1e-5 * norm(&whole(&thin)));
        let zero = LowRank { down: thin.down.clone(), up: thin.up.zeros_like().unwrap() };
        assert_eq!(norm(&whole(&zero.svd().unwrap().truncate(2).unwrap())), 0.0);
    }

    #[test]
    fn inner_products_need_no_whole_matrix() {
        let (a, b) = (random(1, 20, 5, 30), random(5, 20, 3, 30));
        let by_hand = (whole(&a) * whole(&b)).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((a.dot(&b).unwrap() - f64::from(by_hand)).abs() < 1e-3, "{by_hand}");
        assert!((a.dot(&a).unwrap().sqrt() / norm(&whole(&a)) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_matrix_without_factors_is_projected_on_its_largest_directions() {
        let exact = random(3, 60, 4, 50);
        let found = LowRank::project(&whole(&exact), 4).unwrap();
        assert!(norm(&(whole(&found) - whole(&exact)).unwrap()) < 1e-5 * norm(&whole(&exact)));
        // A flat spectrum, where the projection is worst: nearly as good as the best of that rank.
        let full = random(11, 60, 50, 50);
        let best = full.svd().unwrap();
        let found = LowRank::project(&whole(&full), 4).unwrap().svd().unwrap();
        assert!(found.kept(4) > 0.0 && found.values[0] > 0.999 * best.values[0], "{:?}", &found.values[..4]);
        assert!(found.values[3] > 0.99 * best.values[3], "{:?} {:?}", &found.values[..4], &best.values[..4]);
    }
}
