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
    /// The penalty with the smallest error on rows left out.
    pub penalty: f64,
    /// Predictions (M, out), each from a fit without its own fold: what a network that corrects the guess must
    /// be trained on, since for a seen row the guess is better than it will ever be for a new person.
    pub out_of_fold: Tensor,
    /// ‖Y − out of fold‖² / ‖Y − mean‖².
    pub relative_error: f64,
}

impl Ridge {
    /// Fits `y` (M, out) on `x` (M, in). The penalty is for each row, so that it means the same for any M.
    pub fn fit(x: &Tensor, y: &Tensor, penalty: f64) -> Result<Self> {
        let (count, input) = x.dims2()?;
        ensure!(count > 0 && y.dim(0)? == count, "{count} conditions for {} targets", y.dim(0)?);
        ensure!(penalty > 0.0, "the penalty of a ridge regression is positive, not {penalty}");
        let as_f64 = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.contiguous();
        let (x, y) = (as_f64(x)?, as_f64(y)?);
        let (x_mean, y_mean) = (x.mean_keepdim(0)?, y.mean_keepdim(0)?);
        let (x, y) = (x.broadcast_sub(&x_mean)?, y.broadcast_sub(&y_mean)?);
        let damping = penalty * count as f64;
        let x_t = x.t()?.contiguous()?;
        // The smaller of the two equivalent systems.
        let weight_t = if input <= count {
            solve(&x_t.matmul(&x)?, damping, &x_t.matmul(&y)?)?
        } else {
            x_t.matmul(&solve(&x.matmul(&x_t)?, damping, &y)?)?
        };
        let bias = (y_mean - x_mean.matmul(&weight_t)?)?.squeeze(0)?;
        let weight = weight_t.t()?.to_dtype(DType::F32)?.contiguous()?;
        Ok(Self { weight, bias: bias.to_dtype(DType::F32)? })
    }

    /// [`Ridge::cross_fit_in`] with row i in fold i mod `folds`.
    pub fn cross_fit(x: &Tensor, y: &Tensor, penalties: &[f64], folds: usize) -> Result<CrossFit> {
        let fold_of: Vec<usize> = (0..x.dim(0)?).map(|i| i % folds.max(1)).collect();
        Self::cross_fit_in(x, y, penalties, &fold_of)
    }

    /// Chooses among `penalties` by cross validation and fits on all rows; row i is in fold `fold_of[i]`.
    pub fn cross_fit_in(x: &Tensor, y: &Tensor, penalties: &[f64], fold_of: &[usize]) -> Result<CrossFit> {
        let count = x.dim(0)?;
        let folds = fold_of.iter().max().map_or(0, |last| last + 1);
        ensure!(
            fold_of.len() == count && folds >= 2 && count >= 2 * folds,
            "{count} rows do not part into {folds} folds"
        );
        let of_fold = |fold: usize| (0..count).filter(move |i| fold_of[*i] == fold);
        let rows = |rows: Vec<u32>| Tensor::from_vec(rows.clone(), rows.len(), x.device());
        let parts = (0..folds)
            .map(|fold| {
                let others = (0..count).filter(|i| fold_of[*i] != fold).map(|i| i as u32).collect();
                Ok((rows(others)?, rows(of_fold(fold).map(|i| i as u32).collect())?))
            })
            .collect::<Result<Vec<_>>>()?;
        let spread = y.broadcast_sub(&y.mean_keepdim(0)?)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
        let mut best: Option<(f64, f64, Tensor)> = None;
        for penalty in penalties {
            let mut guesses = Vec::with_capacity(folds);
            for (others, own) in &parts {
                let ridge = Self::fit(&x.index_select(others, 0)?, &y.index_select(others, 0)?, *penalty)?;
                guesses.push(ridge.forward(&x.index_select(own, 0)?)?);
            }
            // The guesses come fold by fold: put each back in its place.
            let mut place = vec![0u32; count];
            for (at, row) in (0..folds).flat_map(of_fold).enumerate() {
                place[row] = at as u32;
            }
            let place = Tensor::from_vec(place, count, x.device())?;
            let guess = Tensor::cat(&guesses, 0)?.index_select(&place, 0)?;
            let error = (&guess - y)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
            let relative = f64::from(error) / f64::from(spread);
            if best.as_ref().is_none_or(|(least, ..)| relative < *least) {
                best = Some((relative, *penalty, guess));
            }
        }
        let (relative_error, penalty, out_of_fold) = best.context("no penalty to choose from")?;
        Ok(CrossFit { ridge: Self::fit(x, y, penalty)?, penalty, out_of_fold, relative_error })
    }

    /// `x` (B, in) → (B, out).
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        crate::layers::linear(x, &self.weight, Some(&self.bias))
    }

    /// What a file stores: `weight` (out, in) and `bias` (out), each after `prefix` and a dot.
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

/// Solves (`a` + `damping` · I) · x = `y` for a symmetric, positive `a` (n, n) f64 and `y` (n, k), by Cholesky.
fn solve(a: &Tensor, damping: f64, y: &Tensor) -> Result<Tensor> {
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
    let mut y: Vec<Vec<f64>> = y.to_vec2()?;
    let subtract = |y: &mut [Vec<f64>], to: usize, from: usize, factor: f64| {
        let (to, from) = if to < from {
            let (head, tail) = y.split_at_mut(from);
            (&mut head[to], &tail[0])
        } else {
            let (head, tail) = y.split_at_mut(to);
            (&mut tail[0], &head[from])
        };
        to.iter_mut().zip(from).for_each(|(a, b)| *a -= factor * b);
    };
    for (i, row) in l.iter().enumerate() {
        for (j, factor) in row[..i].iter().enumerate() {
            subtract(&mut y, i, j, *factor);
        }
        y[i].iter_mut().for_each(|x| *x /= row[i]);
    }
    for i in (0..n).rev() {
        for (j, row) in l.iter().enumerate().skip(i + 1) {
            subtract(&mut y, i, j, row[i]);
        }
        y[i].iter_mut().for_each(|x| *x /= l[i][i]);
    }
    let columns = y.first().map_or(0, Vec::len);
    Ok(Tensor::from_vec(y.concat(), (n, columns), &Device::Cpu)?)
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

    #[test]
    fn both_forms_of_the_normal_equations_agree() {
        // 12 rows of 12 values use the primal form; a thirteenth, constant value forces the dual one.
        let (x, y) = (random(12, 12, 3), random(12, 2, 4));
        let wide = Tensor::cat(&[&x, &Tensor::zeros((12, 1), DType::F32, &Device::Cpu).unwrap()], 1).unwrap();
        let a = Ridge::fit(&x, &y, 0.1).unwrap().forward(&x).unwrap();
        let b = Ridge::fit(&wide, &y, 0.1).unwrap().forward(&wide).unwrap();
        assert!(worst(&(a - b).unwrap()) < 1e-5);
    }

    #[test]
    fn out_of_fold_predictions_do_not_know_their_own_row() {
        let (x, y) = (random(30, 5, 5), random(30, 2, 6));
        let fit = Ridge::cross_fit(&x, &y, &[0.01, 0.1, 1.0], 5).unwrap();
        let own: Vec<u32> = (0..30).filter(|i| i % 5 == 3).collect();
        let others: Vec<u32> = (0..30).filter(|i| i % 5 != 3).collect();
        let rows =
            |x: &Tensor, rows: &[u32]| x.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap();
        let alone = Ridge::fit(&rows(&x, &others), &rows(&y, &others), fit.penalty).unwrap();
        let expected = alone.forward(&rows(&x, &own)).unwrap();
        assert!(worst(&(rows(&fit.out_of_fold, &own) - expected).unwrap()) < 1e-6);
    }
}
