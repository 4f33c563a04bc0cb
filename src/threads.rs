//! Work on as many threads as there are cores, with results in order.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use candle_core::Device;

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
pub fn in_threads_with<T: Send>(
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
