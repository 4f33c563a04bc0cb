//! Errors of a reconstruction, plain and weighed, in one pass: long vectors need no further blocks of their size.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use crate::layers::cpu;

/// mean((x − x̂)²), or mean(|x − x̂|) where not `squared`, and mean(|x|·|x − x̂|) → (2).
pub fn reconstruction_errors(x: &Tensor, x_hat: &Tensor, squared: bool) -> Result<Tensor> {
    if x.shape() != x_hat.shape() {
        candle_core::bail!("{:?} is no reconstruction of {:?}", x_hat.shape(), x.shape());
    }
    if cpu::is_cpu_f32(x) && cpu::is_cpu_f32(x_hat) && !x.track_op() {
        return x.contiguous()?.apply_op2(&x_hat.contiguous()?, Errors { squared });
    }
    let error = (x - x_hat)?;
    let plain = if squared { error.sqr()? } else { error.abs()? };
    Tensor::stack(&[plain.mean_all()?, (x.abs()? * error.abs()?)?.mean_all()?], 0)
}

struct Errors {
    squared: bool,
}

const CHUNK: usize = 16_384;

impl CustomOp2 for Errors {
    fn name(&self) -> &'static str {
        "reconstruction-errors"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        x_hat: &CpuStorage,
        x_hat_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, x_hat) = (cpu::operand(x, x_layout)?, cpu::operand(x_hat, x_hat_layout)?);
        let parts = cpu::map_indices_on(cpu::threads(), x.len().div_ceil(CHUNK), |i| {
            let chunk = i * CHUNK..((i + 1) * CHUNK).min(x.len());
            errors(&x[chunk.clone()], &x_hat[chunk], self.squared)
        });
        let sum = |which: usize| parts.iter().map(|part| f64::from(part[which])).sum::<f64>();
        let means = [0, 1].map(|which| (sum(which) / x.len() as f64) as f32);
        Ok((CpuStorage::F32(means.to_vec()), 2.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        x_hat: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if !x_hat.track_op() {
            return Ok((None, None));
        }
        let grad = (grad / x.elem_count() as f64)?.to_vec1::<f32>()?;
        let values = cpu::with_values(x, |x| {
            cpu::with_values(x_hat, |x_hat| {
                let mut out = vec![0f32; x.len()];
                cpu::for_chunks(&mut out, CHUNK, |i, out| {
                    let begin = i * CHUNK;
                    let (x, x_hat) = (&x[begin..][..out.len()], &x_hat[begin..][..out.len()]);
                    slopes(x, x_hat, self.squared, &grad, out);
                });
                out
            })
        })??;
        Ok((None, Some(Tensor::from_vec(values, x_hat.shape(), x_hat.device())?)))
    }
}

cpu::vectorised! {
    /// Σ (x − x̂)² or Σ |x − x̂|, and Σ |x|·|x − x̂|.
    fn errors(x: &[f32], x_hat: &[f32], squared: bool) -> [f32; 2] {
        let mut sums = [[0f32; 16]; 2];
        let mut add = |x: &[f32], x_hat: &[f32]| {
            for (lane, (x, x_hat)) in x.iter().zip(x_hat).enumerate() {
                let error = (x - x_hat).abs();
                sums[0][lane] += if squared { error * error } else { error };
                sums[1][lane] += x.abs() * error;
            }
        };
        let ((blocks, rest), (blocks_hat, rest_hat)) = (x.as_chunks::<16>(), x_hat.as_chunks::<16>());
        blocks.iter().zip(blocks_hat).for_each(|(x, x_hat)| add(x, x_hat));
        add(rest, rest_hat);
        sums.map(|lanes| lanes.iter().sum())
    }
}

cpu::vectorised! {
    /// d/dx̂ of both, times their gradients.
    fn slopes(x: &[f32], x_hat: &[f32], squared: bool, grad: &[f32], out: &mut [f32]) {
        let (plain, weighed) = (grad[0], grad[1]);
        for ((out, x), x_hat) in out.iter_mut().zip(x).zip(x_hat) {
            let error = x_hat - x;
            let sign = if error > 0.0 { 1.0 } else if error < 0.0 { -1.0 } else { 0.0 };
            let slope = if squared { 2.0 * error } else { sign };
            *out = plain * slope + weighed * x.abs() * sign;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::diffusion::noise::normal;

    #[test]
    fn values_and_gradients_are_those_of_single_operations() -> Result<()> {
        let x = Var::from_tensor(&normal(1, 0, (3, 7001), &Device::Cpu)?)?;
        let x_hat = Var::from_tensor(&normal(1, 1, (3, 7001), &Device::Cpu)?)?;
        let weights = Tensor::new(&[0.7f32, 0.2], &Device::Cpu)?;
        for squared in [true, false] {
            // A variable as the first operand takes the way of single operations.
            let [ours, theirs] = [&x.detach(), x.as_tensor()].map(|x| -> Result<_> {
                let errors = reconstruction_errors(x, &x_hat, squared)?;
                let grads = (&errors * &weights)?.sum_all()?.backward()?;
                let grad =
                    grads.get(&x_hat).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"))?;
                Ok((errors.to_vec1::<f32>()?, grad))
            });
            let ((ours, grad), (theirs, their_grad)) = (ours?, theirs?);
            assert!(ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-5));
            let apart = (grad - &their_grad)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(apart < 1e-5 * their_grad.abs()?.max_all()?.to_scalar::<f32>()?, "{apart}");
        }
        Ok(())
    }
}
