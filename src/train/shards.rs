//! Gradients of a batch that is cut into shards, one graph and one thread each.
//!
//! On the CPU this is nearly as many times faster as there are cores, where parallel kernels wait for each other
//! at every operation. A GPU is busy with one shard, so there they run one after the other. The number of shards is a
//! setting and the sums run in their order, so that the result does not depend on the machine's cores.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use candle_core::Var;

use crate::layers::backward;
use crate::threads::in_threads_with;
use crate::train::adamw::blend;
use crate::train::distributed;
use crate::train::gradients::{Loss, Sum};

/// Runs `loss(shard)` for `shard` in `0..shards` on as many threads as there are cores, or one after the other on a GPU,
/// and averages losses and gradients in the order of the shards. All shards must hold equally many samples. In a
/// process group each process runs its part of the shards, and all get the same means.
pub fn gradients(
    vars: &BTreeMap<String, Var>,
    shards: usize,
    loss: impl Fn(usize) -> Result<Loss> + Sync,
) -> Result<Sum> {
    let one = |shard: usize| -> Result<Sum> {
        let Loss { value, parts } = loss(shard)?;
        let mut store = backward(&value)?;
        let gradients =
            vars.iter().filter_map(|(name, var)| Some((name.clone(), store.remove(var)?.detach()))).collect();
        let parts = parts.iter().map(|(name, figure)| Ok((*name, figure.read()?))).collect::<Result<_>>()?;
        Ok(Sum {
            loss: f64::from(value.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()?),
            parts,
            gradients,
        })
    };
    let group = distributed::group();
    let own = group.map_or(Ok(0..shards), |group| group.own_shards(shards))?;
    let shards = own.len();
    let mut total = None;
    if vars.values().all(|var| var.device().is_cpu()) {
        in_threads_with(shards, |shard| one(own.start + shard), |sum| add(&mut total, sum))?;
    } else {
        for shard in own {
            add(&mut total, one(shard)?)?;
        }
    }
    let mut total: Sum = total.ok_or_else(|| anyhow!("a batch needs at least one shard"))?;
    if shards > 1 {
        let part = 1.0 / shards as f64;
        total.loss *= part;
        total.parts.iter_mut().for_each(|mean| mean.1 *= part);
        for gradient in total.gradients.values_mut() {
            *gradient = (&*gradient * part)?;
        }
    }
    if let Some(group) = group {
        group.mean(&mut total)?;
    }
    Ok(total)
}

fn add(total: &mut Option<Sum>, sum: Sum) -> Result<()> {
    let Some(total) = total else {
        *total = Some(sum);
        return Ok(());
    };
    total.loss += sum.loss;
    for (mean, part) in total.parts.iter_mut().zip(sum.parts) {
        mean.1 += part.1;
    }
    for (name, gradient) in sum.gradients {
        match total.gradients.get_mut(&name) {
            Some(together) => blend(together, &gradient, 1.0, 1.0)?,
            None => {
                total.gradients.insert(name, gradient);
            }
        }
    }
    Ok(())
}
