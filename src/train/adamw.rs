//! AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as `torch.optim.AdamW` computes it:
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
//! w ← w − η λ w − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! candle's own keeps its moments to itself, so that a run could not be resumed.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, InplaceOp2, Layout, Storage, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::layers::{self, vectorised};
use crate::train::gradients::Gradients;
use crate::train::muon::MuonOptions;

/// AdamW over named variables, with clipping of the gradient's norm.
///
/// A step without a gradient for a variable leaves that variable and its moments as they are.
pub struct AdamW {
    options: AdamWOptions,
    slots: BTreeMap<String, Slot>,
    step: u64,
}

/// Constants of [`AdamW`]; the learning rate comes with each step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWOptions {
    /// β₁ and β₂.
    pub betas: [f64; 2],
    /// ε
    pub eps: f64,
    /// λ
    pub weight_decay: f64,
    /// Gradients longer than this, all variables together, are shortened to it; 0 leaves them as they are.
    pub clip: f64,
    /// Matrices and kernels are trained by Muon instead, at the same learning rate and decay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonOptions>,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 1e-2, clip: 1.0, muon: None }
    }
}

struct Slot {
    var: Var,
    /// Running mean of the gradient.
    first: Tensor,
    /// Running mean of its square.
    second: Tensor,
    /// Factor on the learning rate.
    rate: f64,
}

impl AdamW {
    /// Over `vars`, all at the same rate, with moments of zero.
    pub fn new(vars: BTreeMap<String, Var>, options: AdamWOptions) -> Result<Self> {
        let slot = |(name, var): (String, Var)| -> Result<_> {
            let slot = Slot { first: var.zeros_like()?, second: var.zeros_like()?, rate: 1.0, var };
            Ok((name, slot))
        };
        Ok(Self { options, slots: vars.into_iter().map(slot).collect::<Result<_>>()?, step: 0 })
    }

    /// Multiplies the learning rate of the variables whose name starts with `prefix` by `factor`.
    pub fn scale_rate(&mut self, prefix: &str, factor: f64) {
        for (_, slot) in self.slots.iter_mut().filter(|(name, _)| name.starts_with(prefix)) {
            slot.rate *= factor;
        }
    }

    /// Moves each variable that has a gradient; gives the norm of the gradient before clipping.
    ///
    /// # Errors
    /// A gradient that is not finite: nothing is changed then.
    pub fn step(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<f64> {
        let norm = norm(gradients)?;
        anyhow::ensure!(
            norm.is_finite(),
            "the gradient of step {} is not finite; a lower learning rate may help",
            self.step
        );
        let clip = self.options.clip;
        // The constant is PyTorch's.
        let scale = if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.step += 1;
        let [beta1, beta2] = self.options.betas;
        for (name, gradient) in gradients {
            let slot = self.slots.get_mut(name).with_context(|| format!("`{name}` is not trained here"))?;
            let rate = learning_rate * slot.rate;
            if let Some(muon) = self.options.muon.as_ref().filter(|muon| muon.takes(name, slot.var.dims())) {
                let (momentum, direction) = muon.direction(&slot.first, &(gradient * scale)?)?;
                slot.first = momentum;
                let rate = rate * muon.rate;
                let kept = (slot.var.as_tensor() * (1.0 - rate * self.options.weight_decay))?;
                slot.var.set(&(kept - (direction * rate)?)?.detach())?;
                continue;
            }
            let update = Update {
                betas: [beta1 as f32, beta2 as f32],
                take: [((1.0 - beta1) * scale) as f32, ((1.0 - beta2) * scale * scale) as f32],
                keep: (1.0 - rate * self.options.weight_decay) as f32,
                step: (rate / (1.0 - beta1.powf(self.step as f64))) as f32,
                root: (1.0 - beta2.powf(self.step as f64)).sqrt() as f32,
                eps: self.options.eps as f32,
            };
            slot.update(gradient, &update)?;
        }
        Ok(norm)
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Both moments of every variable, as `first.NAME` and `second.NAME`.
    pub fn moments(&self) -> BTreeMap<String, Tensor> {
        let mut moments = BTreeMap::new();
        for (name, slot) in &self.slots {
            moments.insert(format!("first.{name}"), slot.first.clone());
            moments.insert(format!("second.{name}"), slot.second.clone());
        }
        moments
    }

    /// Takes up the moments of an optimiser over the same variables after `steps` steps.
    ///
    /// # Errors
    /// A moment that is missing or of another shape.
    pub fn set_moments(&mut self, moments: &HashMap<String, Tensor>, steps: u64) -> Result<()> {
        for (name, slot) in &mut self.slots {
            let take = |which: &str| -> Result<Tensor> {
                let key = format!("{which}.{name}");
                let tensor = moments.get(&key).with_context(|| format!("moment `{key}` is missing"))?;
                anyhow::ensure!(tensor.shape() == slot.var.shape(), "moment `{key}` has another shape");
                // A copy, because moments change in place.
                Ok(tensor.to_dtype(slot.var.dtype())?.to_device(slot.var.device())?.copy()?)
            };
            (slot.first, slot.second) = (take("first")?, take("second")?);
        }
        self.step = steps;
        Ok(())
    }
}

/// Length of all gradients together.
pub fn norm(gradients: &Gradients) -> Result<f64> {
    let (here, elsewhere): (Vec<&Tensor>, Vec<&Tensor>) =
        gradients.values().partition(|gradient| in_place(gradient) && gradient.is_contiguous());
    let mut sum = 0f64;
    for gradient in here {
        let (storage, layout) = gradient.storage_and_layout();
        if let Storage::Cpu(storage) = &*storage {
            // In pieces of f32, which are quick and lose little; no square is stored.
            let pieces = values(storage, layout)?.chunks(1 << 14);
            sum += pieces.map(|piece| f64::from(sum_of_squares(piece))).sum::<f64>();
        }
    }
    if !elsewhere.is_empty() {
        let squares = elsewhere
            .into_iter()
            .map(|gradient| -> candle_core::Result<Tensor> { layers::square_sums(gradient) });
        // All at once: a GPU is waited for as often as something is read.
        let squares = Tensor::cat(&squares.collect::<candle_core::Result<Vec<_>>>()?, 0)?.to_vec1::<f32>()?;
        sum += squares.into_iter().map(f64::from).sum::<f64>();
    }
    Ok(sum.sqrt())
}

vectorised! {
    fn sum_of_squares(values: &[f32]) -> f32 {
        let (blocks, rest) = values.as_chunks::<32>();
        let mut lanes = [0f32; 32];
        for block in blocks {
            for (lane, x) in lanes.iter_mut().zip(block) {
                *lane += x * x;
            }
        }
        lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
    }
}

/// `kept` ← keep · kept + take · new, in place.
pub(super) fn blend(kept: &mut Tensor, new: &Tensor, keep: f64, take: f64) -> Result<()> {
    if in_place(kept) {
        kept.inplace_op2(&new.contiguous()?, &Blend { keep: keep as f32, take: take as f32 })?;
    } else if !layers::blend_on_gpu(kept, new, [keep as f32, take as f32])? {
        *kept = ((&*kept * keep)? + (new * take)?)?.detach();
    }
    Ok(())
}

/// Whether the loops over plain slices apply.
fn in_place(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32
}

impl Slot {
    /// The moments follow the gradient, and the variable the moments.
    fn update(&mut self, gradient: &Tensor, update: &Update) -> Result<()> {
        if in_place(&self.var) && in_place(gradient) {
            let gradient = gradient.contiguous()?;
            let (storage, layout) = gradient.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { anyhow::bail!("a gradient left the CPU") };
            let gradient = values(storage, layout)?;
            let changed = [self.var.as_tensor(), &self.first, &self.second];
            // In one pass: these are the longest arrays of a training.
            return Ok(with_values_mut(changed, |changed| {
                by_parts(changed, [gradient], |[w, first, second], [gradient]| {
                    adamw(update, w, first, second, gradient);
                });
            })?);
        }
        let ([beta1, beta2], [take1, take2]) = (update.betas, update.take);
        let constants = [beta1, beta2, take1, take2, update.keep, update.step, update.root, update.eps];
        if layers::adamw_on_gpu([self.var.as_tensor(), &self.first, &self.second, gradient], constants)? {
            return Ok(());
        }
        let [[beta1, beta2], [first, second]] = [update.betas, update.take].map(|pair| pair.map(f64::from));
        blend(&mut self.first, gradient, beta1, first)?;
        self.second = ((&self.second * beta2)? + (gradient.sqr()? * second)?)?.detach();
        let root = ((self.second.sqrt()? / f64::from(update.root))? + f64::from(update.eps))?;
        let weight = (self.var.as_tensor() * f64::from(update.keep))?;
        Ok(self.var.set(&(weight - ((&self.first / root)? * f64::from(update.step))?)?.detach())?)
    }
}

struct Blend {
    keep: f32,
    take: f32,
}

struct Update {
    /// β₁ and β₂.
    betas: [f32; 2],
    /// Factors of the gradient and of its square, clipping included.
    take: [f32; 2],
    /// 1 − η λ
    keep: f32,
    /// η / (1 − β₁ᵗ)
    step: f32,
    /// √(1 − β₂ᵗ)
    root: f32,
    eps: f32,
}

impl InplaceOp2 for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        ly: &Layout,
        x: &CpuStorage,
        lx: &Layout,
    ) -> candle_core::Result<()> {
        by_parts([values_mut(y, ly)?], [values(x, lx)?], |[y], [x]| {
            for (y, x) in y.iter_mut().zip(x) {
                *y = self.keep * *y + self.take * x;
            }
        });
        Ok(())
    }
}

vectorised! {
    fn adamw(update: &Update, w: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32]) {
        let ([beta1, beta2], [take1, take2]) = (update.betas, update.take);
        let moments = first.iter_mut().zip(second);
        for ((w, (first, second)), g) in w.iter_mut().zip(moments).zip(gradient) {
            *first = beta1 * *first + take1 * g;
            *second = beta2 * *second + take2 * g * g;
            *w = update.keep * *w - update.step * *first / (second.sqrt() / update.root + update.eps);
        }
    }
}

/// Values from which on a thread of its own is worth starting.
const MANY: usize = 1 << 20;

/// `work` on parts of what is `changed` and of what stands beside it in `others`, on all cores where there is much.
fn by_parts<const M: usize, const N: usize>(
    mut changed: [&mut [f32]; M],
    others: [&[f32]; N],
    work: impl Fn([&mut [f32]; M], [&[f32]; N]) + Sync,
) {
    let length = changed.first().map_or(0, |values| values.len());
    // Asking for the number of cores reads a dozen files, which takes longer than a small tensor.
    if length <= MANY {
        return work(changed, others);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let part = length.div_ceil(cores).max(MANY);
    if length <= part {
        return work(changed, others);
    }
    std::thread::scope(|scope| {
        for begin in (0..length).step_by(part) {
            let count = part.min(length - begin);
            let parts = changed.each_mut().map(|values| {
                let (part, rest) = std::mem::take(values).split_at_mut(count);
                *values = rest;
                part
            });
            let (others, work) = (others.map(|values| &values[begin..][..count]), &work);
            scope.spawn(move || work(parts, others));
        }
    });
}

/// Calls `work` with the values of contiguous f32 tensors on the CPU, no two of which share their memory; it may change
/// all of them, where an operation of candle's changes one.
fn with_values_mut<const N: usize>(
    tensors: [&Tensor; N],
    work: impl FnOnce([&mut [f32]; N]),
) -> candle_core::Result<()> {
    /// Holds one tensor and goes on to the next.
    struct Hold<'a> {
        rest: &'a [&'a Tensor],
        held: &'a RefCell<Vec<(*mut f32, usize)>>,
        last: &'a dyn Fn(),
    }
    impl InplaceOp1 for Hold<'_> {
        fn name(&self) -> &'static str {
            "hold"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let values = values_mut(storage, layout)?;
            self.held.borrow_mut().push((values.as_mut_ptr(), values.len()));
            match self.rest {
                [] => (self.last)(),
                [next, rest @ ..] => next.inplace_op1(&Hold { rest, ..*self })?,
            }
            Ok(())
        }
    }
    let held = RefCell::new(Vec::with_capacity(N));
    let work = Cell::new(Some(work));
    let last = || {
        // SAFETY: the operations that run around this call hold each tensor's memory for writing.
        let slice =
            |(first, count): (*mut f32, usize)| unsafe { std::slice::from_raw_parts_mut(first, count) };
        let all: Vec<&mut [f32]> = held.take().into_iter().map(slice).collect();
        if let (Some(work), Ok(all)) = (work.take(), <[&mut [f32]; N]>::try_from(all)) {
            work(all);
        }
    };
    match &tensors[..] {
        [] => Ok(()),
        [first, rest @ ..] => first.inplace_op1(&Hold { rest, held: &held, last: &last }),
    }
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("an optimiser was given a tensor that is not contiguous: {layout:?}"),
    }
}

fn values_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(values)) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("an optimiser was given a tensor that is not contiguous f32: {layout:?}"),
    }
}
