//! Images as tokens and back, and what is added to all pixels of a channel: one step of the graph each, where candle's
//! operations take three, and backward two passes over memory for every step.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use crate::layers::cpu;
use crate::layers::cuda;

/// Each pixel's channels as a token. (B, D, H, W) → (B, H·W, D).
pub fn image_to_tokens(x: &Tensor) -> Result<Tensor> {
    let (b, d, h, w) = x.dims4()?;
    if cpu::is_cpu_f32(x) || cuda::applies(x) {
        return x.contiguous()?.apply_op1(TurnOp { to: (b, h * w, d).into() });
    }
    x.reshape((b, d, h * w))?.transpose(1, 2)
}

/// Tokens as the pixels of an image. (B, H·W, D) → (B, D, H, W).
pub fn tokens_to_image(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, n, d) = x.dims3()?;
    if n != h * w {
        candle_core::bail!("{n} tokens are no image of {h} × {w}");
    }
    if cpu::is_cpu_f32(x) || cuda::applies(x) {
        return x.contiguous()?.apply_op1(TurnOp { to: (b, d, h, w).into() });
    }
    x.transpose(1, 2)?.reshape((b, d, h, w))
}

/// The matrices of a batch turned over, in the shape `to`.
struct TurnOp {
    to: Shape,
}

/// The rows and columns of each matrix: tokens (B, N, D) lie as N rows, images (B, D, H, W) as D rows.
fn matrix(shape: &Shape) -> (usize, usize) {
    let dims = shape.dims();
    (dims[1], dims[2..].iter().product())
}

fn turned(x: &[f32], (rows, columns): (usize, usize)) -> Vec<f32> {
    let mut y = vec![0f32; x.len()];
    let size = rows * columns;
    if size > 0 {
        cpu::for_chunks(&mut y, size, |i, y| turn(&x[i * size..][..size], rows, columns, y));
    }
    y
}

impl CustomOp1 for TurnOp {
    fn name(&self) -> &'static str {
        "turn"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = turned(cpu::operand(x, layout)?, matrix(layout.shape()));
        Ok((CpuStorage::F32(y), self.to.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::gpu::transpose((x, layout), matrix(layout.shape()), &self.to)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if cuda::applies(x) {
            return cuda::gpu::transpose_tensor(&grad, matrix(&self.to), x.shape()).map(Some);
        }
        let values = cpu::with_values(&grad, |grad| turned(grad, matrix(&self.to)))?;
        Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
    }
}

cpu::vectorised! {
    /// y[j, i] = x[i, j], in squares that stay in the first-level cache.
    fn turn(x: &[f32], rows: usize, columns: usize, y: &mut [f32]) {
        const SIDE: usize = 16;
        for first in (0..rows).step_by(SIDE) {
            let height = SIDE.min(rows - first);
            for j in 0..columns {
                let y = &mut y[j * rows + first..][..height];
                for (i, y) in y.iter_mut().enumerate() {
                    *y = x[(first + i) * columns + j];
                }
            }
        }
    }
}

/// `x` (B, C, H, W) plus `shift` (B, C) in every pixel → (B, C, H, W).
pub fn add_to_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let (b, c, _, _) = x.dims4()?;
    if shift.dims() != [b, c] {
        candle_core::bail!("{:?} is no shift of the channels of {:?}", shift.shape(), x.shape());
    }
    let on_cuda = cuda::applies(x) && cuda::applies(shift) && x.dtype() == shift.dtype();
    if on_cuda || cpu::is_cpu_f32(x) && cpu::is_cpu_f32(shift) {
        return x.contiguous()?.apply_op2(&shift.contiguous()?, ShiftOp);
    }
    x.broadcast_add(&shift.unsqueeze(2)?.unsqueeze(3)?)
}

struct ShiftOp;

impl CustomOp2 for ShiftOp {
    fn name(&self) -> &'static str {
        "add-to-channels"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, shift) = (cpu::operand(x, x_layout)?, cpu::operand(shift, shift_layout)?);
        let mut y = x.to_vec();
        if let Some(pixels) = y.len().checked_div(shift.len()) {
            let together = (16_384 / pixels.max(1)).max(1);
            cpu::for_chunks(&mut y, together * pixels.max(1), |i, y| {
                add_to_rows(y, pixels, &shift[i * together..]);
            });
        }
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        shift: &CudaStorage,
        shift_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let pixels = x_layout.dims()[2..].iter().product();
        cuda::gpu::add_bias((x, x_layout), (shift, shift_layout), pixels)
    }

    fn bwd(
        &self,
        x: &Tensor,
        shift: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if cuda::applies(x) {
            let sums = shift.track_op().then(|| cuda::gpu::channel_sums(&grad.contiguous()?, false));
            return Ok((x.track_op().then(|| grad.clone()), sums.transpose()?));
        }
        let sums = shift.track_op().then(|| grad.flatten_from(2)?.sum(2)).transpose()?;
        Ok((x.track_op().then(|| grad.clone()), sums))
    }
}

cpu::vectorised! {
    fn add_to_rows(y: &mut [f32], pixels: usize, shift: &[f32]) {
        for (row, shift) in y.chunks_exact_mut(pixels).zip(shift) {
            row.iter_mut().for_each(|y| *y += shift);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::diffusion::noise::normal;

    fn draw(stream: u64, shape: &[usize]) -> Result<Var> {
        Var::from_tensor(&normal(9, stream, shape, &Device::Cpu)?)
    }

    /// Whether two results and their gradients with respect to `vars` are the same.
    fn assert_same(ours: &Tensor, theirs: &Tensor, vars: &[&Var]) -> Result<()> {
        let g = normal(9, 7, ours.shape(), &Device::Cpu)?;
        let grads = |y: &Tensor| (y * &g)?.sum_all()?.backward();
        let (our_grads, their_grads) = (grads(ours)?, grads(theirs)?);
        let mut pairs = vec![(ours.clone(), theirs.clone())];
        for var in vars {
            let [Some(ours), Some(theirs)] = [&our_grads, &their_grads].map(|grads| grads.get(var).cloned())
            else {
                panic!("no gradient");
            };
            pairs.push((ours, theirs));
        }
        for (ours, theirs) in pairs {
            assert_eq!(ours.dims(), theirs.dims());
            let apart = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(apart < 1e-5, "{apart}");
        }
        Ok(())
    }

    #[test]
    fn tokens_are_the_transposed_image_and_pixels_bring_it_back() -> Result<()> {
        for shape in [[2, 3, 4, 5], [1, 33, 7, 3], [3, 16, 4, 4]] {
            let [b, d, h, w] = shape;
            let x = draw(1, &shape)?;
            let theirs = x.reshape((b, d, h * w))?.transpose(1, 2)?;
            assert_same(&image_to_tokens(&x)?, &theirs, &[&x])?;
            let y = draw(2, &[b, h * w, d])?;
            assert_same(&tokens_to_image(&y, h, w)?, &y.transpose(1, 2)?.reshape(&shape)?, &[&y])?;
            let there_and_back =
                (tokens_to_image(&image_to_tokens(&x)?, h, w)? - x.as_tensor())?.abs()?.max_all()?;
            assert_eq!(there_and_back.to_scalar::<f32>()?, 0.0);
        }
        assert!(tokens_to_image(draw(2, &[1, 6, 2])?.as_tensor(), 2, 2).is_err());
        Ok(())
    }

    #[test]
    fn a_shift_is_added_to_every_pixel_of_its_channel() -> Result<()> {
        let (x, shift) = (draw(1, &[3, 5, 4, 6])?, draw(2, &[3, 5])?);
        let theirs = x.broadcast_add(&shift.unsqueeze(2)?.unsqueeze(3)?)?;
        assert_same(&add_to_channels(&x, &shift)?, &theirs, &[&x, &shift])?;
        assert!(add_to_channels(&x, draw(2, &[5, 3])?.as_tensor()).is_err());
        Ok(())
    }
}
