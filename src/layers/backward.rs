//! The backward pass, with the gradient of each large weight in one block of memory.
//!
//! candle adds every gradient that it is given to a tensor of zeros: the gradient of a weight passes through three blocks
//! as large as the weight, one that is used twice through five. Inside [`backward`] our operations on the CPU write the
//! gradient of a variable where it stays, and add to it where the variable is used again.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Shape, Tensor, TensorId};

use crate::layers::cpu::{self, Shared};

thread_local! {
    /// Of the backward pass that this thread is in.
    static GATHERED: RefCell<Option<HashMap<TensorId, Block>>> = const { RefCell::new(None) };
}

struct Block {
    values: Vec<f32>,
    shape: Shape,
}

/// The gradients of `loss`, a scalar, as [`Tensor::backward`] gives them.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    // A checkpointed piece goes backward within a backward pass, with variables of its own.
    let outer = GATHERED.replace(Some(HashMap::new()));
    let store = loss.backward();
    let gathered = GATHERED.replace(outer).unwrap_or_default();
    let mut store = store?;
    for (id, Block { values, shape }) in gathered {
        let gradient = Tensor::from_vec(values, shape, loss.device())?;
        let gradient = match store.get_id(id) {
            Some(other) => (other + gradient)?,
            None => gradient,
        };
        store.insert_id(id, gradient);
    }
    Ok(store)
}

/// The gradient of `weight`, f32 on the CPU, for candle to add up; none where [`backward`] keeps it. `write` gets the place
/// of the values, and whether it must add to them.
///
/// # Safety
/// `write` writes every value of the weight's shape, and reads none that it need not add to.
pub(super) unsafe fn gradient(
    weight: &Tensor,
    mut write: impl FnMut(Shared, bool),
) -> Result<Option<Tensor>> {
    if !cpu::is_cpu_f32(weight) {
        candle_core::bail!("a weight of {:?} is trained", weight.dtype());
    }
    let fresh = |write: &mut dyn FnMut(Shared, bool)| {
        let mut values = Vec::with_capacity(weight.elem_count());
        write(Shared::new(values.as_mut_ptr()), false);
        // SAFETY: the caller promises that all values are written.
        unsafe { values.set_len(weight.elem_count()) }
        values
    };
    GATHERED.with_borrow_mut(|gathered| match gathered {
        Some(gathered) if weight.is_variable() => {
            match gathered.get_mut(&weight.id()) {
                Some(block) => write(Shared::new(block.values.as_mut_ptr()), true),
                None => {
                    gathered.insert(
                        weight.id(),
                        Block { values: fresh(&mut write), shape: weight.shape().clone() },
                    );
                }
            }
            Ok(None)
        }
        _ => Tensor::from_vec(fresh(&mut write), weight.shape(), weight.device()).map(Some),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::layers::{checkpointed, expand_patches, linear, project_patches};

    #[test]
    fn gradients_are_those_of_candles_own_pass() -> Result<()> {
        let draw = |i: u64, shape: &[usize]| Var::from_tensor(&normal(1, i, shape, &Device::Cpu)?);
        let (weight, basis) = (draw(0, &[6, 6])?, draw(1, &[6, 3])?);
        let x = normal(2, 0, (4, 6), &Device::Cpu)?;
        // Each weight twice, once of them inside a checkpointed piece; and one of them in an operation of candle's.
        let loss = || -> Result<Tensor> {
            let inner = (weight.as_tensor().clone(), basis.as_tensor().clone());
            let h = linear(&x, &weight, None)?;
            let h = checkpointed(&[&h], move |x, _| {
                linear(&x[0], &inner.0, None)? * inner.1.sum_all()?.to_scalar::<f32>()? as f64
            })?;
            let y = expand_patches(&project_patches(&h, &basis, None)?, &basis, None, 6)?;
            (y.sqr()?.mean_all()? + weight.sqr()?.mean_all()?)? + basis.as_tensor().sin()?.sum_all()?
        };
        let (ours, theirs) = (backward(&loss()?)?, loss()?.backward()?);
        for var in [&weight, &basis] {
            let of =
                |store: &GradStore| store.get(var).cloned().ok_or_else(|| candle_core::Error::msg("none"));
            let (ours, theirs) = (of(&ours)?, of(&theirs)?);
            let apart =
                ((ours - &theirs)?.abs()?.max_all()? / theirs.abs()?.max_all()?)?.to_scalar::<f32>()?;
            assert!(apart < 1e-5, "{apart}");
        }
        assert!(GATHERED.with_borrow(Option::is_none));
        Ok(())
    }
}
