//! Ridge regression in closed form: the linear guess of a latent from face and image embedding.
//!
//! W = argmin ‖X·Wᵀ + b − Y‖² + penalty · M · ‖W‖². It is the baseline that a diffusion transformer has to
//! beat, and the transformer can start from it: it then models only what the linear guess leaves over.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

/// y = x·Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Ridge {
    /// (out, in)
    weight: Tensor,
    /// (out)
    bias: Tensor,
}

/// A ridge regression together with what it says about rows that it has not seen.
#[derive(Clone, Debug)]
pub struct CrossFit {
    /// Fitted on all rows with the best penalty.
    pub ridge: Ridge,
    /// The same without the rows of fold 0, 1, …: what a network that corrects the guess must be trained on, since
    /// for a seen row the guess is better than it will ever be for a new person.
    pub without_fold: Vec<Ridge>,
    /// The penalty with the smallest error on rows left out.
    pub penalty: f64,
    /// ‖Y − out of fold‖² / ‖Y − mean‖², over the rows that were looked at.
    pub relative_error: f64,
}

/// All that a ridge regression has to know of its rows, in 64 bits: any number of rows takes the same memory.
#[derive(Clone, Debug)]
struct Sums {
    count: usize,
    /// Σx (1, in) and Σy (1, out)
    x: Tensor,
    y: Tensor,
    /// Σxᵀx (in, in) and Σxᵀy (in, out)
    xx: Tensor,
    xy: Tensor,
}

fn as_f64(x: &Tensor) -> candle_core::Result<Tensor> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.contiguous()
}

impl Sums {
    /// Of `x` (M, in) and `y` (M, out).
    fn of(x: &Tensor, y: &Tensor) -> Result<Self> {
        let count = x.dim(0)?;
        ensure!(count > 0 && y.dim(0)? == count, "{count} conditions for {} targets", y.dim(0)?);
        let (x, y) = (as_f64(x)?, as_f64(y)?);
        let x_t = x.t()?.contiguous()?;
        let (xx, xy) = (x_t.matmul(&x)?, x_t.matmul(&y)?);
        Ok(Self { count, x: x.sum_keepdim(0)?, y: y.sum_keepdim(0)?, xx, xy })
    }

    fn plus(self, other: &Self) -> Result<Self> {
        Ok(Self {
            count: self.count + other.count,
            x: (self.x + &other.x)?,
            y: (self.y + &other.y)?,
            xx: (self.xx + &other.xx)?,
            xy: (self.xy + &other.xy)?,
        })
    }

    fn fit(&self, penalty: f64) -> Result<Ridge> {
        ensure!(penalty > 0.0, "the penalty of a ridge regression is positive, not {penalty}");
        let count = self.count as f64;
        let (x_mean, y_mean) = ((&self.x / count)?, (&self.y / count)?);
        let x_sum_t = self.x.t()?.contiguous()?;
        let xx = (&self.xx - x_sum_t.matmul(&x_mean)?)?;
        let xy = (&self.xy - x_sum_t.matmul(&y_mean)?)?;
        let weight_t = inverse(&xx, penalty * count)?.matmul(&xy)?; // (in, out)
        let bias = (y_mean - x_mean.matmul(&weight_t)?)?.squeeze(0)?;
        let weight = weight_t.t()?.to_dtype(DType::F32)?.contiguous()?;
        Ok(Ridge { weight, bias: bias.to_dtype(DType::F32)? })
    }
}

impl Ridge {
    /// Fits `y` (M, out) on `x` (M, in). The penalty is for each row, so that it means the same for any M.
    pub fn fit(x: &Tensor, y: &Tensor, penalty: f64) -> Result<Self> {
        Sums::of(x, y)?.fit(penalty)
    }

    /// Chooses among `penalties` by cross validation and fits on all rows. `chunk(fold, i)` gives conditions (M, in)
    /// and targets (M, out) of the i-th part of a fold, and nothing behind its last: rows are read part by part.
    ///
    /// The errors that choose are those of each fold's first parts, up to [`JUDGED`] rows.
    pub fn cross_fit(
        folds: usize,
        penalties: &[f64],
        chunk: impl Fn(usize, usize) -> Result<Option<(Tensor, Tensor)>>,
    ) -> Result<CrossFit> {
        ensure!(folds >= 2, "cross validation needs two folds at least, not {folds}");
        let mut sums = Vec::with_capacity(folds);
        for fold in 0..folds {
            let mut sum: Option<Sums> = None;
            for i in 0.. {
                let Some((x, y)) = chunk(fold, i)? else { break };
                let part = Sums::of(&x, &y)?;
                sum = Some(match sum {
                    Some(sum) => sum.plus(&part)?,
                    None => part,
                });
            }
            let sum = sum.filter(|sum| sum.count >= 2);
            sums.push(sum.with_context(|| format!("fold {fold} of {folds} has fewer than two rows"))?);
        }
        let together = |left_out: Option<usize>| -> Result<Sums> {
            let mut kept = sums.iter().enumerate().filter(|(fold, _)| Some(*fold) != left_out);
            let (_, first) = kept.next().context("no fold is left")?;
            kept.try_fold(first.clone(), |sum, (_, other)| sum.plus(other))
        };
        let without = (0..folds).map(|fold| together(Some(fold))).collect::<Result<Vec<_>>>()?;
        let all = together(None)?;
        let mean = (&all.y / all.count as f64)?.to_dtype(DType::F32)?;
        let mut best: Option<(f64, f64, Vec<Ridge>)> = None;
        for penalty in penalties {
            let parts = without.iter().map(|sums| sums.fit(*penalty)).collect::<Result<Vec<_>>>()?;
            let (mut error, mut spread) = (0.0, 0.0);
            for (fold, ridge) in parts.iter().enumerate() {
                let mut judged = 0;
                for i in 0.. {
                    let Some((x, y)) = chunk(fold, i)? else { break };
                    let y = y.to_device(&Device::Cpu)?;
                    error += power(&(ridge.forward(&x.to_device(&Device::Cpu)?)? - &y)?)?;
                    spread += power(&y.broadcast_sub(&mean)?)?;
                    judged += y.dim(0)?;
                    if judged >= JUDGED {
                        break;
                    }
                }
            }
            let relative = error / spread;
            if best.as_ref().is_none_or(|(least, ..)| relative < *least) {
                best = Some((relative, *penalty, parts));
            }
        }
        let (relative_error, penalty, without_fold) = best.context("no penalty to choose from")?;
        Ok(CrossFit { ridge: all.fit(penalty)?, without_fold, penalty, relative_error })
    }

    /// The same on `device`; a fit is on the CPU.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        Ok(Self { weight: self.weight.to_device(device)?, bias: self.bias.to_device(device)? })
    }

    /// `x` (B, in) → (B, out).
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        crate::layers::linear(x, &self.weight, Some(&self.bias))
    }

    /// Tensors of a file: `weight` (out, in) and `bias` (out), each after `prefix` and a dot.
    pub fn tensors(&self, prefix: &str) -> HashMap<String, Tensor> {
        HashMap::from([
            (format!("{prefix}.weight"), self.weight.clone()),
            (format!("{prefix}.bias"), self.bias.clone()),
        ])
    }

    /// From stored tensors.
    pub fn new(input: usize, output: usize, vb: candle_nn::VarBuilder) -> candle_core::Result<Self> {
        Ok(Self { weight: vb.get((output, input), "weight")?, bias: vb.get(output, "bias")? })
    }
}

/// Rows of each fold whose errors choose the penalty.
pub const JUDGED: usize = 4096;

fn power(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?)
}

/// (`a` + `damping` · I)⁻¹ of a symmetric, positive `a` (n, n) f64, by Cholesky.
fn inverse(a: &Tensor, damping: f64) -> Result<Tensor> {
    let mut l: Vec<Vec<f64>> = a.to_vec2()?;
    let n = l.len();
    for i in 0..n {
        let (done, rest) = l.split_at_mut(i);
        let row = &mut rest[0];
        for (j, other) in done.iter().enumerate() {
            let dot: f64 = row[..j].iter().zip(&other[..j]).map(|(a, b)| a * b).sum();
            row[j] = (row[j] - dot) / other[j];
        }
        let square: f64 = row[..i].iter().map(|x| x * x).sum();
        let pivot = row[i] + damping - square;
        ensure!(
            pivot > 0.0,
            "the normal equations of the ridge regression are not positive: raise the penalty"
        );
        row[i] = pivot.sqrt();
    }
    // L⁻¹ row by row: row i is (e_i − Σ_{j<i} L_ij · row j) / L_ii, zero behind its i-th value.
    let mut lower: Vec<Vec<f64>> = Vec::with_capacity(n);
    for (i, l) in l.iter().enumerate() {
        let mut row = vec![0.0; n];
        row[i] = 1.0;
        for (factor, done) in l[..i].iter().zip(&lower) {
            row[..i].iter_mut().zip(done).for_each(|(x, y)| *x -= factor * y);
        }
        row[..=i].iter_mut().for_each(|x| *x /= l[i]);
        lower.push(row);
    }
    let lower = Tensor::from_vec(lower.concat(), (n, n), &Device::Cpu)?;
    Ok(lower.t()?.contiguous()?.matmul(&lower)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| (((i + 1) * (2 * seed + 7919) * 31 % 1009) as f32 / 1009.0 - 0.5) * 2.0)
            .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn worst(x: &Tensor) -> f32 {
        x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    }

    #[test]
    fn a_linear_relation_is_found_when_the_penalty_is_small() {
        let (x, w) = (random(50, 4, 1), random(4, 3, 2));
        let y = (x.matmul(&w).unwrap() + 0.5).unwrap();
        let ridge = Ridge::fit(&x, &y, 1e-9).unwrap();
        assert!(worst(&(ridge.forward(&x).unwrap() - &y).unwrap()) < 1e-5);
    }

    /// Rows in chunks of three, row i in fold i mod `folds`.
    fn chunks<'a>(
        x: &'a Tensor,
        y: &'a Tensor,
        folds: usize,
    ) -> impl Fn(usize, usize) -> Result<Option<(Tensor, Tensor)>> + 'a {
        move |fold, i| {
            let rows: Vec<u32> = (0..x.dim(0)? as u32).filter(|row| *row as usize % folds == fold).collect();
            let Some(rows) = rows.chunks(3).nth(i) else { return Ok(None) };
            let rows = Tensor::new(rows, &Device::Cpu)?;
            Ok(Some((x.index_select(&rows, 0)?, y.index_select(&rows, 0)?)))
        }
    }

    #[test]
    fn more_values_than_rows_are_no_trouble() {
        let (x, y) = (random(12, 30, 3), random(12, 2, 4));
        // (XXᵀ + λI)⁻¹ from the other side: X(XᵀX + λI)⁻¹ = (XXᵀ + λI)⁻¹X.
        let centred = |x: &Tensor| as_f64(&x.broadcast_sub(&x.mean_keepdim(0).unwrap()).unwrap()).unwrap();
        let (cx, cy) = (centred(&x), centred(&y));
        let gram = cx.matmul(&cx.t().unwrap()).unwrap();
        let dual = gram.matmul(&inverse(&gram, 1.2).unwrap().matmul(&cy).unwrap()).unwrap();
        let guess = Ridge::fit(&x, &y, 0.1).unwrap().forward(&x).unwrap();
        let guess =
            (as_f64(&guess).unwrap().broadcast_sub(&as_f64(&y).unwrap().mean_keepdim(0).unwrap())).unwrap();
        assert!(worst(&(guess - dual).unwrap().to_dtype(DType::F32).unwrap()) < 1e-5);
    }

    #[test]
    fn each_fold_is_guessed_without_its_own_rows() {
        let (x, y) = (random(30, 5, 5), random(30, 2, 6));
        let fit = Ridge::cross_fit(5, &[0.01, 0.1, 1.0], chunks(&x, &y, 5)).unwrap();
        let rows =
            |x: &Tensor, rows: &[u32]| x.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap();
        let others: Vec<u32> = (0..30).filter(|i| i % 5 != 3).collect();
        let alone = Ridge::fit(&rows(&x, &others), &rows(&y, &others), fit.penalty).unwrap();
        let own: Vec<u32> = (0..30).filter(|i| i % 5 == 3).collect();
        let guess = |ridge: &Ridge| ridge.forward(&rows(&x, &own)).unwrap();
        assert!(worst(&(guess(&fit.without_fold[3]) - guess(&alone)).unwrap()) < 1e-6);
        let whole = Ridge::fit(&x, &y, fit.penalty).unwrap();
        assert!(worst(&(guess(&fit.ridge) - guess(&whole)).unwrap()) < 1e-6);
        // Noise cannot be guessed: no better than the mean.
        assert!(fit.relative_error > 0.8, "{}", fit.relative_error);
    }
}
