//! Gradients of a batch that is cut into shards, one graph and one thread each.
//!
//! On the CPU this is nearly as many times faster as there are cores, where parallel kernels wait for each other
//! at every operation. A GPU is busy with one shard, so there they run one after the other. The number of shards is a
//! setting and the sums run in their order, so that the result does not depend on the machine's cores.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor, Var};

use crate::layers::backward;
use crate::train::adamw::blend;
use crate::train::distributed;

/// Gradients by the name of their variable.
pub type Gradients = BTreeMap<String, Tensor>;

/// What one shard found.
pub struct Loss {
    /// Mean over the samples of the shard, a scalar with its graph.
    pub value: Tensor,
    /// Figures for the log, likewise means.
    pub parts: Vec<(&'static str, f64)>,
}

impl From<Tensor> for Loss {
    fn from(value: Tensor) -> Self {
        Self { value, parts: Vec::new() }
    }
}

/// Means over the shards.
pub struct Sum {
    /// The loss.
    pub loss: f64,
    /// The figures of [`Loss::parts`].
    pub parts: Vec<(&'static str, f64)>,
    /// Of every variable that the loss depends on.
    pub gradients: Gradients,
}

/// Runs `loss(shard)` for `shard` in `0..shards` on as many threads as there are cores, or one after the other on a GPU,
/// and averages losses and gradients in the order of the shards. All shards must hold equally many samples. In a
/// [`parallel`] group each process runs its part of the shards, and all get the same means.
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

/// [`in_threads`] where `device` is the CPU; one after the other on a GPU, which is busy with one.
pub fn in_threads_or_turn<T: Send>(
    device: &Device,
    count: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    if device.is_cpu() { in_threads(count, work) } else { (0..count).map(work).collect() }
}

/// `work(0)`, `work(1)`, … `work(count − 1)` on as many threads as there are cores; results in order.
///
/// # Errors
/// The first error in that order.
pub fn in_threads<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let mut results = Vec::with_capacity(count);
    in_threads_with(count, work, |result| {
        results.push(result);
        Ok(())
    })?;
    Ok(results)
}

/// The same, with results that are handed on in order as soon as all before them are there, so that large ones need not
/// be kept.
fn in_threads_with<T: Send>(
    count: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()> + Send,
) -> Result<()> {
    if count == 1 {
        return take(work(0)?);
    }
    struct Waiting<T> {
        results: BTreeMap<usize, Result<T>>,
        /// How many have been handed on, and how that went.
        taken: usize,
        outcome: Result<()>,
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count);
    let next = AtomicUsize::new(0);
    let waiting = Mutex::new((Waiting { results: BTreeMap::new(), taken: 0, outcome: Ok(()) }, &mut take));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        return;
                    }
                    let result = work(i);
                    let (waiting, take) =
                        &mut *waiting.lock().expect("nothing panics while it holds the results");
                    waiting.results.insert(i, result);
                    while let Some(result) = waiting.results.remove(&waiting.taken) {
                        waiting.taken += 1;
                        if waiting.outcome.is_ok() {
                            waiting.outcome = result.and_then(&mut **take);
                        }
                    }
                }
            });
        }
    });
    waiting.into_inner().expect("nothing panics while it holds the results").0.outcome
}
