//! Recomputation (gradient checkpointing): a piece of a network keeps its inputs alone and runs again in the backward
//! pass, so that memory holds the inner values of one piece at a time. Chen et al. 2016, arXiv 1604.06174.
//!
//! A piece stands in candle's graph as one operation on its inputs and on the variables inside it, so that an ordinary
//! `backward` finds every gradient, and pieces mix with whatever comes before and after them.
//!
//! Gradients do not need the output itself, so the last layer of a piece, which would only compute it, is left out when
//! the piece runs again ([`Pass`]).

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, Var,
};

use crate::layers::backward::backward;
use crate::layers::{cpu, cuda};

/// Which run of a piece this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The first: the output is wanted.
    Forward,
    /// In the backward pass: only gradients are needed; the values of the output are not read.
    Recompute,
}

/// `piece(inputs)`, of which the graph keeps nothing but the inputs. Its gradients are those of `piece(inputs)` itself.
///
/// The first two inputs are kept as they are; further ones that need a gradient are copied and should be small. The
/// piece must give the same whenever it runs, but for the values of its output in [`Pass::Recompute`].
pub fn checkpointed(
    inputs: &[&Tensor],
    piece: impl Fn(&[Tensor], Pass) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let detached: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
    let y = piece(&detached, Pass::Forward)?;
    // No gradient goes through detached inputs: what is left of the graph begins at the variables inside.
    let variables: Vec<Tensor> =
        y.sorted_nodes().into_iter().filter(|node| node.is_variable()).cloned().collect();
    let y = y.detach();
    let tracked: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
    if variables.is_empty() && !tracked.contains(&true) {
        return Ok(y);
    }
    let small = inputs.iter().skip(2).filter(|input| input.track_op()).copied();
    let small = end_to_end(variables.iter().chain(small), &y)?;
    let none = Tensor::zeros(1, DType::F32, y.device())?;
    let kept = |i: usize| inputs.get(i).copied().unwrap_or(&none);
    let op = Segment {
        run: Box::new(piece),
        inputs: detached,
        tracked,
        variables,
        result: Mutex::new(Some(y.contiguous()?)),
    };
    kept(0).apply_op3(kept(1), &small, op)
}

/// All values in one row of f32.
fn end_to_end<'a>(tensors: impl Iterator<Item = &'a Tensor>, beside: &Tensor) -> Result<Tensor> {
    let mut rows = Vec::new();
    for tensor in tensors {
        rows.push(tensor.flatten_all()?.to_dtype(DType::F32)?);
    }
    // CUDA has no empty tensors.
    if rows.is_empty() { Tensor::zeros(1, DType::F32, beside.device()) } else { Tensor::cat(&rows, 0) }
}

/// Part of a network: its output from its inputs.
type Run = dyn Fn(&[Tensor], Pass) -> Result<Tensor> + Send + Sync;

struct Segment {
    run: Box<Run>,
    /// Without their graphs.
    inputs: Vec<Tensor>,
    /// Which of them need a gradient.
    tracked: Vec<bool>,
    /// Variables trained inside the segment.
    variables: Vec<Tensor>,
    /// Output of the segment, until it is taken into the graph.
    result: Mutex<Option<Tensor>>,
}

impl Segment {
    fn result(&self) -> Result<(Storage, Shape)> {
        let result = self.result.lock().ok().and_then(|mut result| result.take());
        let Some(y) = result else { candle_core::bail!("a checkpointed piece was applied twice") };
        let storage = y.storage_and_layout().0.try_clone(y.layout())?;
        Ok((storage, y.shape().clone()))
    }
}

impl CustomOp3 for Segment {
    fn name(&self) -> &'static str {
        "checkpointed"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.result()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("a checkpointed piece left the CPU"),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match self.result()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("a checkpointed piece left the CUDA device"),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        match self.result()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("a checkpointed piece left the Metal device"),
        }
    }

    /// Runs the piece again, with variables for inputs, and goes backward from there.
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        small: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut inputs = self.inputs.clone();
        for (input, tracked) in inputs.iter_mut().zip(&self.tracked) {
            if *tracked {
                *input = Var::from_tensor(input)?.into_inner();
            }
        }
        let y = (self.run)(&inputs, Pass::Recompute)?;
        let grads = if cpu::is_cpu_f32(&y) || cuda::applies(&y) {
            backward(&y.apply_op1(Seed(grad.contiguous()?))?)?
        } else {
            backward(&(y * grad)?.sum_all()?)? // dΣ(y · grad)/dy = grad
        };
        let of = |tensor: &Tensor| grads.get(tensor).map_or_else(|| tensor.zeros_like(), |g| Ok(g.clone()));
        let wanted: Vec<Option<Tensor>> = inputs
            .iter()
            .zip(&self.tracked)
            .map(|(input, tracked)| tracked.then(|| of(input)).transpose())
            .collect::<Result<_>>()?;
        let whole = |i: usize| wanted.get(i).cloned().flatten();
        let variables: Vec<Tensor> = self.variables.iter().map(of).collect::<Result<_>>()?;
        let others = variables.iter().chain(wanted.iter().skip(2).flatten());
        let others = small.track_op().then(|| end_to_end(others, grad)).transpose()?;
        Ok((whole(0), whole(1), others))
    }
}

/// A number whose gradient is given: where a backward pass begins.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), ().into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, y: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((cuda::gpu::zeros(y, &().into())?, ().into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Device, Module};

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::layers::{Activation, Adapter, Linear};

    /// Two adapted layers that listen to a second and a third input as well.
    fn piece() -> Result<(Vec<Var>, Arc<Run>)> {
        let draw = |i: u64, shape: (usize, usize)| normal(1, i, shape, &Device::Cpu);
        let mut vars = Vec::new();
        let mut layers = Vec::new();
        for i in 0..2 {
            let (down, up) =
                (Var::from_tensor(&draw(4 * i, (2, 6))?)?, Var::from_tensor(&draw(4 * i + 1, (6, 2))?)?);
            let adapter = Adapter { down: down.as_tensor().clone(), up: up.as_tensor().clone(), scale: 0.5 };
            layers.push(Linear { weight: draw(4 * i + 2, (6, 6))?, bias: None, adapter: Some(adapter) });
            vars.extend([down, up]);
        }
        let run = move |x: &[Tensor], pass| {
            let h = Activation::Silu.apply(&(layers[0].forward(&x[0])? + &x[1])?.broadcast_mul(&x[2])?)?;
            layers[1].forward_last(&h, pass)? + &x[0]
        };
        Ok((vars, Arc::new(run)))
    }

    #[test]
    fn gradients_of_inputs_and_variables_are_those_of_the_piece_itself() -> Result<()> {
        let (vars, run) = piece()?;
        let draw = |i: u64, shape: (usize, usize)| Var::from_tensor(&normal(2, i, shape, &Device::Cpu)?);
        let inputs = [draw(0, (3, 6))?, draw(1, (3, 6))?, draw(2, (1, 6))?];
        let weight = normal(3, 0, (3, 6), &Device::Cpu)?;
        let frozen = normal(4, 0, (3, 6), &Device::Cpu)?;
        for tracked in [[true, true, true], [false, true, false], [true, false, false], [false; 3]] {
            let x: Vec<Tensor> = inputs
                .iter()
                .zip(tracked)
                .map(|(input, tracked)| {
                    let x = (input.as_tensor() * 1.5)?;
                    Ok(if tracked { x } else { x.detach() })
                })
                .collect::<Result<_>>()?;
            let backward = |y: Tensor| ((y * &weight)? + &frozen)?.sum_all()?.backward();
            let plain = backward(run(&x, Pass::Forward)?)?;
            let piece = Arc::clone(&run);
            let again = backward(checkpointed(&[&x[0], &x[1], &x[2]], move |x, pass| piece(x, pass))?)?;
            for var in vars.iter().chain(&inputs) {
                let values = |grads: &candle_core::backprop::GradStore| {
                    grads.get(var).map(|grad| grad.flatten_all()?.to_vec1::<f32>()).transpose()
                };
                assert_eq!(values(&plain)?, values(&again)?, "{tracked:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn without_anything_to_train_the_graph_ends() -> Result<()> {
        let x = normal(1, 0, (2, 3), &Device::Cpu)?;
        let y = checkpointed(&[&x], |x, _| &x[0] * 2.0)?;
        assert!(!y.track_op());
        Ok(())
    }
}
