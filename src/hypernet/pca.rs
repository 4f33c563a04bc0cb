//! Principal components of many long vectors, in closed form by the Gram matrix where they fit in memory.
//!
//! With M samples of P ≫ M values the M×M matrix X·Xᵀ has the same eigenvalues as XᵀX, and its eigenvectors u
//! give the components Xᵀu/√λ. The eigenvectors come from orthogonal iteration with Rayleigh–Ritz steps, whose
//! small matrices a cyclic Jacobi solver takes; the residual ‖Gv − λv‖ is tested, so that what is returned is
//! right or an error. (A linear algebra crate for this one function would be a large dependency.)

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::row_source::RowSource;

/// The first principal components of centred rows, of the whole or of each patch by itself.
#[derive(Clone, Debug)]
pub struct Pca {
    /// (L, patch): for one patch after the other its orthonormal rows, in the order of falling variance; the largest
    /// value of each is positive. The last patch is filled up with zeros.
    pub basis: Tensor,
    /// Variance along each component (L).
    pub variances: Vec<f64>,
    /// Variance of all rows together: Σ over all components, kept or not.
    pub total: f64,
}

/// Rows that take no more than so many bytes together are read once and solved exactly; others are streamed.
pub const EXACT: usize = 2 << 30;

impl Pca {
    /// The first `components` of `rows` (M, P), which are centred already.
    ///
    /// # Errors
    /// Rows that span fewer dimensions than asked for.
    pub fn fit(rows: &dyn RowSource, components: usize) -> Result<Self> {
        Self::fit_patches(rows, rows.width(), components, EXACT)
    }

    /// The first `components` of each run of `patch` values.
    ///
    /// Rows of at most `exact` bytes are taken into memory and solved by their Gram matrices. Of more rows nothing is
    /// kept but the components searched for: subspace iteration (Halko et al. 2011, algorithm 4.4), each of whose
    /// seven rounds reads all rows once.
    ///
    /// # Errors
    /// As [`Pca::fit`], for a patch.
    pub fn fit_patches(rows: &dyn RowSource, patch: usize, components: usize, exact: usize) -> Result<Self> {
        let (count, width) = (rows.count(), rows.width());
        ensure!(
            components >= 1 && components <= count && components <= patch,
            "{components} components need at least as many LoRAs and values, there are {count} and {patch}"
        );
        let patches: Vec<Span> = (0..width.div_ceil(patch))
            .map(|i| Span { begin: i * patch, length: patch.min(width - i * patch), components })
            .collect();
        let size = patches.len() * components * patch;
        let mut pca = Start {
            patch,
            components,
            count,
            flat: Vec::with_capacity(size),
            variances: Vec::new(),
            total: 0.0,
        };
        if count.saturating_mul(width).saturating_mul(4) <= exact {
            let rows = rows.all()?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            for span in &patches {
                pca.take(span, span.by_gram(&rows.narrow(1, span.begin, span.length)?.contiguous()?)?)?;
            }
        } else {
            for (span, found) in patches.iter().zip(by_iteration(rows, &patches)?) {
                pca.take(span, found)?;
            }
        }
        let basis = Tensor::from_vec(pca.flat, (patches.len() * components, patch), &Device::Cpu)?;
        Ok(Self { basis, variances: pca.variances, total: pca.total })
    }

    /// Share of the variance that the components leave out, for the rows they were fitted on.
    pub fn left_out(&self) -> f64 {
        1.0 - self.variances.iter().sum::<f64>() / self.total
    }
}

/// A [`Pca`] that grows patch by patch: in f64 the components of all would take more memory than the rows.
struct Start {
    patch: usize,
    components: usize,
    count: usize,
    flat: Vec<f32>,
    variances: Vec<f64>,
    total: f64,
}

impl Start {
    fn take(&mut self, span: &Span, mut found: Found) -> Result<()> {
        let Self { patch, components, count, .. } = *self;
        let whole = span.length == patch;
        let (first, last) = (found.values[0], found.values[found.values.len() - 1]);
        // The Gram matrix is in f32: smaller eigenvalues are rounding.
        ensure!(
            !whole || (found.values.len() == components && last > 1e-6 * first),
            "{count} LoRAs span fewer than {components} dimensions; take a shorter latent or more LoRAs"
        );
        // In f32 the directions of small variance lean on the large ones; orthogonal again in f64.
        orthonormalise(&mut found.rows);
        for row in &found.rows {
            let peak = row.iter().copied().fold(0.0, |a: f64, b| if b.abs() > a.abs() { b } else { a });
            let sign = if peak < 0.0 { -1.0 } else { 1.0 };
            self.flat.extend(row.iter().map(|x| (sign * x) as f32));
            self.flat.extend(std::iter::repeat_n(0f32, patch - span.length));
        }
        // A last patch that is shorter than its components has no more.
        self.flat.extend(std::iter::repeat_n(0f32, (components - found.rows.len()) * patch));
        self.variances.extend(found.values.iter().map(|x| x / count as f64));
        self.variances.extend(std::iter::repeat_n(0.0, components - found.values.len()));
        self.total += found.total / count as f64;
        Ok(())
    }
}

/// Where a patch lies, and how many components it gets.
struct Span {
    begin: usize,
    length: usize,
    components: usize,
}

/// The eigenvectors of a patch as rows (k, length), with their eigenvalues and the sum of all.
struct Found {
    rows: Vec<Vec<f64>>,
    values: Vec<f64>,
    total: f64,
}

impl Span {
    /// From all rows (M, length) of the patch.
    fn by_gram(&self, rows: &Tensor) -> Result<Found> {
        let (count, width) = rows.dims2()?;
        let components = self.components.min(width);
        let by_rows = count <= width;
        let gram = if by_rows { rows.matmul(&rows.t()?)? } else { rows.t()?.contiguous()?.matmul(rows)? };
        let gram = gram.to_dtype(DType::F64)?;
        let total = trace(&gram)?;
        let (values, vectors) = largest_eigenpairs(&gram, components)?;
        let vectors = if by_rows { vectors.to_dtype(DType::F32)?.matmul(rows)? } else { vectors };
        Ok(Found { rows: vectors.to_dtype(DType::F64)?.to_vec2()?, values, total })
    }
}

/// Of all patches at once, from rows that are read round after round.
fn by_iteration(rows: &dyn RowSource, patches: &[Span]) -> Result<Vec<Found>> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    // A few directions more than wanted: the error falls by λ_block/λ_k a round.
    let mut bases: Vec<Vec<Vec<f64>>> = patches
        .iter()
        .map(|span| {
            let block = (2 * span.components + 8).min(span.length).min(rows.count());
            (0..block).map(|_| (0..span.length).map(|_| rng.sample(StandardNormal)).collect()).collect()
        })
        .collect();
    let tensor = |basis: &[Vec<f64>]| -> Result<Tensor> {
        let shape = (basis.len(), basis[0].len());
        Ok(Tensor::from_vec(basis.iter().flatten().map(|x| *x as f32).collect(), shape, &Device::Cpu)?)
    };
    for _ in 0..6 {
        let directions = bases.iter_mut().map(|basis| {
            orthonormalise(basis);
            tensor(basis)
        });
        let directions = directions.collect::<Result<Vec<_>>>()?;
        let mut images: Vec<Option<Tensor>> = vec![None; patches.len()];
        rows.each(&mut |_, batch| {
            for ((span, q), image) in patches.iter().zip(&directions).zip(&mut images) {
                let x = batch.narrow(1, span.begin, span.length)?.contiguous()?;
                let part = q.matmul(&x.t()?)?.matmul(&x)?; // (block, length)
                *image = Some(match image.take() {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
            Ok(())
        })?;
        for (basis, image) in bases.iter_mut().zip(images) {
            if let Some(image) = image {
                *basis = image.to_dtype(DType::F64)?.to_vec2()?;
            }
        }
    }
    // Rayleigh–Ritz: the best eigenvectors within the span.
    let directions = bases.iter_mut().map(|basis| {
        orthonormalise(basis);
        tensor(basis)
    });
    let directions = directions.collect::<Result<Vec<_>>>()?;
    let mut inner: Vec<(Option<Tensor>, f64)> = vec![(None, 0.0); patches.len()];
    rows.each(&mut |_, batch| {
        for ((span, q), (gram, total)) in patches.iter().zip(&directions).zip(&mut inner) {
            let x = batch.narrow(1, span.begin, span.length)?.contiguous()?;
            let z = q.matmul(&x.t()?)?.to_dtype(DType::F64)?; // (block, B)
            let part = z.matmul(&z.t()?)?;
            *gram = Some(match gram.take() {
                Some(sum) => (sum + part)?,
                None => part,
            });
            *total += f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(())
    })?;
    let solve = |((span, q), (gram, total)): ((&Span, Tensor), (Option<Tensor>, f64))| -> Result<Found> {
        let gram = gram.ok_or_else(|| anyhow::anyhow!("no rows to take components of"))?;
        let (values, rotation) = largest_eigenpairs(&gram, span.components.min(gram.dim(0)?))?;
        let vectors = rotation.matmul(&q.to_dtype(DType::F64)?)?;
        Ok(Found { rows: vectors.to_vec2()?, values, total })
    };
    patches.iter().zip(directions).zip(inner).map(solve).collect()
}

fn trace(matrix: &Tensor) -> Result<f64> {
    (0..matrix.dim(0)?)
        .try_fold(0.0, |sum, i| -> Result<f64> { Ok(sum + matrix.get(i)?.get(i)?.to_scalar::<f64>()?) })
}

/// The `k` largest eigenvalues of the symmetric `matrix` (n, n) f64, falling, and their vectors (k, n).
pub fn largest_eigenpairs(matrix: &Tensor, k: usize) -> Result<(Vec<f64>, Tensor)> {
    let n = matrix.dim(0)?;
    ensure!(k >= 1 && k <= n, "{k} eigenvectors of a {n}×{n} matrix");
    // Twice the wanted directions: the error falls by λ_block/λ_k an iteration.
    let block = (2 * k + 16).min(n);
    if n <= 256 || 3 * block > 2 * n {
        let (values, vectors) = jacobi(matrix.to_vec2()?);
        let vectors = Tensor::from_vec(vectors.concat(), (n, n), &Device::Cpu)?;
        return Ok((values[..k].to_vec(), vectors.narrow(0, 0, k)?));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut basis: Vec<Vec<f64>> =
        (0..block).map(|_| (0..n).map(|_| rng.sample(StandardNormal)).collect()).collect();
    for _ in 0..100 {
        for _ in 0..4 {
            orthonormalise(&mut basis);
            let q = Tensor::from_vec(basis.concat(), (block, n), &Device::Cpu)?;
            basis = q.matmul(matrix)?.to_vec2()?;
        }
        orthonormalise(&mut basis);
        // Rayleigh–Ritz: the best eigenvectors within the span.
        let q = Tensor::from_vec(basis.concat(), (block, n), &Device::Cpu)?;
        let image = q.matmul(matrix)?;
        let (values, rotation) = jacobi(image.matmul(&q.t()?)?.to_vec2()?);
        let rotation = Tensor::from_vec(rotation.concat(), (block, block), &Device::Cpu)?;
        let (vectors, image) = (rotation.matmul(&q)?, rotation.matmul(&image)?);
        let lambda = Tensor::from_slice(&values, (block, 1), &Device::Cpu)?;
        let residual = (&image - vectors.broadcast_mul(&lambda)?)?.sqr()?.sum(1)?.to_vec1::<f64>()?;
        if residual[..k].iter().all(|r| r.sqrt() <= 1e-7 * values[0]) {
            return Ok((values[..k].to_vec(), vectors.narrow(0, 0, k)?));
        }
        basis = image.to_vec2()?;
    }
    anyhow::bail!(
        "the eigenvectors of a {n}×{n} matrix were not found; are there values that are not finite?"
    )
}

/// All eigenvalues of a symmetric matrix, falling, and their vectors as rows, by cyclic Jacobi rotations.
///
/// Golub and Van Loan, Matrix Computations, algorithm 8.5.2 (`symSchur2`).
fn jacobi(mut a: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = a.len();
    let mut v: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| if i == j { 1.0 } else { 0.0 }).collect()).collect();
    let size: f64 = a.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
    // Convergence is quadratic; 10 sweeps are plenty, 60 are reached only by values that are not finite.
    for _ in 0..60 {
        let off = a
            .iter()
            .enumerate()
            .flat_map(|(i, row)| row.iter().skip(i + 1))
            .map(|x| x * x)
            .sum::<f64>()
            .sqrt();
        if off <= 1e-14 * size {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q].abs() <= 1e-17 * size {
                    continue;
                }
                let tau = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = tau.signum() / (tau.abs() + (1.0 + tau * tau).sqrt());
                let t = if tau == 0.0 { 1.0 } else { t };
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = t * c;
                for row in &mut a {
                    let (x, y) = (row[p], row[q]);
                    row[p] = c * x - s * y;
                    row[q] = s * x + c * y;
                }
                rotate_rows(&mut a, p, q, c, s);
                rotate_rows(&mut v, p, q, c, s);
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| a[*j][*j].total_cmp(&a[*i][*i]));
    (order.iter().map(|i| a[*i][*i]).collect(), order.iter().map(|i| v[*i].clone()).collect())
}

/// Rows p < q become c·p − s·q and s·p + c·q.
fn rotate_rows(rows: &mut [Vec<f64>], p: usize, q: usize, c: f64, s: f64) {
    let (head, tail) = rows.split_at_mut(q);
    for (x, y) in head[p].iter_mut().zip(&mut tail[0]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

/// Gram–Schmidt, each row twice (Kahan: twice is enough).
fn orthonormalise(rows: &mut [Vec<f64>]) {
    let dot = |a: &[f64], b: &[f64]| -> f64 {
        let mut lanes = [0f64; 8];
        let (heads_a, heads_b) = (a.chunks_exact(8), b.chunks_exact(8));
        let rest: f64 = heads_a.remainder().iter().zip(heads_b.remainder()).map(|(a, b)| a * b).sum();
        for (a, b) in heads_a.zip(heads_b) {
            lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += a * b);
        }
        lanes.iter().sum::<f64>() + rest
    };
    for i in 0..rows.len() {
        let (done, rest) = rows.split_at_mut(i);
        let row = &mut rest[0];
        for _ in 0..2 {
            for other in &*done {
                let along = dot(row, other);
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
            let length = dot(row, row).sqrt();
            if length > 0.0 {
                row.iter_mut().for_each(|x| *x /= length);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> = (0..rows * columns).map(|_| rng.sample(StandardNormal)).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn worst(x: &Tensor) -> f64 {
        x.abs().unwrap().max_all().unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap()
    }

    #[test]
    fn rows_inside_the_span_are_restored_exactly() {
        for (count, width) in [(30, 200), (200, 30)] {
            let rows = random(count, 12, 1).matmul(&random(12, width, 2)).unwrap();
            let pca = Pca::fit(&rows, 12).unwrap();
            let back = rows.matmul(&pca.basis.t().unwrap()).unwrap().matmul(&pca.basis).unwrap();
            assert!(worst(&(back - &rows).unwrap()) < 1e-4 * worst(&rows));
            assert!(pca.left_out().abs() < 1e-5);
        }
    }

    #[test]
    fn the_basis_is_orthonormal_and_its_variances_are_those_of_the_projections() {
        let rows = random(60, 300, 3);
        let pca = Pca::fit(&rows, 40).unwrap();
        let gram = pca.basis.matmul(&pca.basis.t().unwrap()).unwrap();
        assert!(worst(&(gram - Tensor::eye(40, DType::F32, &Device::Cpu).unwrap()).unwrap()) < 1e-5);
        let z = rows.matmul(&pca.basis.t().unwrap()).unwrap();
        let power = z.sqr().unwrap().mean(0).unwrap().to_vec1::<f32>().unwrap();
        for (power, variance) in power.iter().zip(&pca.variances) {
            assert!((f64::from(*power) - variance).abs() < 1e-3 * variance, "{power} {variance}");
        }
        assert!(pca.variances.windows(2).all(|pair| pair[0] >= pair[1]));
    }

    #[test]
    fn iteration_and_jacobi_find_the_same_subspace() {
        // 400 > 256, so that the block iteration runs; a flat spectrum is its hardest case.
        let x = random(400, 900, 4).to_dtype(DType::F64).unwrap();
        let gram = x.matmul(&x.t().unwrap()).unwrap();
        let (values, vectors) = largest_eigenpairs(&gram, 20).unwrap();
        let (all, exact) = jacobi(gram.to_vec2().unwrap());
        for (a, b) in values.iter().zip(&all) {
            assert!((a - b).abs() < 1e-9 * all[0], "{a} {b}");
        }
        let exact = Tensor::from_vec(exact[..20].concat(), (20, 400), &Device::Cpu).unwrap();
        let overlap = vectors.matmul(&exact.t().unwrap()).unwrap().sqr().unwrap().sum_all().unwrap();
        assert!((overlap.to_scalar::<f64>().unwrap() - 20.0).abs() < 1e-6);
    }

    #[test]
    fn streamed_rows_have_the_components_of_the_same_rows_in_memory() {
        // Strengths that fall like those of LoRAs, in four patches, the last of which is short.
        let strengths: Vec<f32> = (0..60).map(|i| 0.9f32.powi(i)).collect();
        let strengths = Tensor::from_vec(strengths, (1, 60), &Device::Cpu).unwrap();
        let rows = random(90, 60, 8).broadcast_mul(&strengths).unwrap().matmul(&random(60, 330, 9)).unwrap();
        let exact = Pca::fit_patches(&rows, 100, 6, EXACT).unwrap();
        let streamed = Pca::fit_patches(&rows, 100, 6, 0).unwrap();
        assert_eq!(streamed.basis.dims(), [24, 100]);
        assert!(worst(&(&exact.basis - &streamed.basis).unwrap()) < 1e-3);
        assert!((exact.total - streamed.total).abs() < 1e-4 * exact.total);
        for (a, b) in exact.variances.iter().zip(&streamed.variances) {
            assert!((a - b).abs() < 1e-4 * a, "{a} {b}");
        }
        let padding = exact.basis.narrow(0, 18, 6).unwrap().narrow(1, 30, 70).unwrap();
        assert_eq!(worst(&padding), 0.0);
    }

    #[test]
    fn a_patch_has_the_components_of_its_values_alone() {
        let rows = random(40, 200, 10);
        let patches = Pca::fit_patches(&rows, 100, 5, EXACT).unwrap();
        let second = Pca::fit(&rows.narrow(1, 100, 100).unwrap().contiguous().unwrap(), 5).unwrap();
        assert!(worst(&(patches.basis.narrow(0, 5, 5).unwrap() - &second.basis).unwrap()) < 1e-5);
    }

    #[test]
    fn too_few_rows_are_refused_with_the_numbers() {
        let message = Pca::fit(&random(5, 50, 5), 8).unwrap_err().to_string();
        assert!(message.contains('8') && message.contains('5'), "{message}");
        let flat = random(20, 3, 6).matmul(&random(3, 50, 7)).unwrap();
        assert!(Pca::fit(&flat, 8).is_err());
    }
}
