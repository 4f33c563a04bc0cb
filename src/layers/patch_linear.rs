//! A linear map of a long vector patch by patch: each patch has rows of its own in one `basis`, and the vector may be
//! corrected by a small network that looks at one window after the other.
//!
//! On the CPU basis and correction are one operation, which takes a patch of all samples at a time. Of what lies between
//! the vector and its latent nothing is kept; the backward pass computes it again, patch by patch.

mod correction;

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use gemm::Parallelism;

pub use self::correction::Correction;
use self::correction::{Corrector, Gradients};
use super::{like, linear};
use crate::layers::backward::gradient;
use crate::layers::cpu::{self, Matrix, Product, Shared, Weight};

/// Each patch of the corrected vector along its own rows: `x` (B, P), `basis` (L, patch) → (B, L).
pub fn project_patches(x: &Tensor, basis: &Tensor, before: Option<&Correction>) -> Result<Tensor> {
    let (batch, length) = x.dims2()?;
    let sizes = Sizes::of(batch, length, basis, before)?;
    if sizes.fuse(x, basis, before) {
        return sizes.apply(x, basis, before, Way::Project);
    }
    let x = match before {
        Some(correction) => correction.forward(x)?,
        None => x.clone(),
    };
    let Sizes { patches, patch, rows, .. } = sizes;
    if patches == 1 && patch == length {
        return linear(&x, basis, None);
    }
    let basis = like(basis, &x)?;
    let x = x.pad_with_zeros(1, 0, patches * patch - length)?.reshape((batch, patches, patch))?;
    let basis = basis.reshape((patches, rows, patch))?.transpose(1, 2)?;
    let z = x.transpose(0, 1)?.contiguous()?.matmul(&basis)?; // (patches, B, L / patches)
    z.transpose(0, 1)?.contiguous()?.reshape((batch, patches * rows))
}

/// The transposed map, then the correction: `z` (B, L), `basis` (L, patch) → (B, `length`).
pub fn expand_patches(
    z: &Tensor,
    basis: &Tensor,
    after: Option<&Correction>,
    length: usize,
) -> Result<Tensor> {
    let (batch, latent) = z.dims2()?;
    if latent != basis.dim(0)? {
        candle_core::bail!("{:?} does not go through a basis of {:?}", z.shape(), basis.shape());
    }
    let sizes = Sizes::of(batch, length, basis, after)?;
    if sizes.fuse(z, basis, after) {
        return sizes.apply(z, basis, after, Way::Expand);
    }
    let Sizes { patches, patch, rows, .. } = sizes;
    let basis = like(basis, z)?;
    let x = if patches == 1 && patch == length {
        z.matmul(&basis)?
    } else {
        let z = z.reshape((batch, patches, rows))?.transpose(0, 1)?.contiguous()?;
        let x = z.matmul(&basis.reshape((patches, rows, patch))?)?; // (patches, B, patch)
        x.transpose(0, 1)?.contiguous()?.reshape((batch, patches * patch))?.narrow(1, 0, length)?
    };
    match after {
        Some(correction) => correction.forward(&x),
        None => Ok(x),
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    /// B
    batch: usize,
    /// P
    length: usize,
    /// Patches of the vector; the last may be shorter.
    patches: usize,
    /// Values in a patch.
    patch: usize,
    /// Values of the latent for a patch.
    rows: usize,
    /// Values in a window of the correction, 1 without one.
    window: usize,
    /// C; 0 without a correction.
    channels: usize,
}

/// Patches that a thread takes at a time; sums over them are taken in this order on every machine.
const TOGETHER: usize = 16;

impl Sizes {
    fn of(batch: usize, length: usize, basis: &Tensor, correction: Option<&Correction>) -> Result<Self> {
        let (latent, patch) = basis.dims2()?;
        let patches = length.div_ceil(patch.max(1));
        if patches == 0 || !latent.is_multiple_of(patches) {
            candle_core::bail!("vectors of {length} values do not go through a basis of {:?}", basis.shape());
        }
        let (window, channels) = match correction {
            Some(correction) => (correction.window, correction.position.dim(1)?),
            None => (1, 0),
        };
        Ok(Self { batch, length, patches, patch, rows: latent / patches, window, channels })
    }

    /// Whether the fused form applies: not to one dense patch, which is an ordinary product, nor to windows that reach
    /// from one patch into the next.
    fn fuse(&self, x: &Tensor, basis: &Tensor, correction: Option<&Correction>) -> bool {
        let plain = |weight: &Tensor| cpu::is_cpu_f32(weight);
        plain(x)
            && if basis.track_op() { plain(basis) } else { cpu::is_cpu_weight(basis) }
            && correction.is_none_or(|correction| plain(&correction.position))
            && self.patches > 1
            && self.patch.is_multiple_of(self.window)
            && self.batch > 0
    }

    fn apply(&self, x: &Tensor, basis: &Tensor, correction: Option<&Correction>, way: Way) -> Result<Tensor> {
        let correction = match correction {
            Some(correction) => correction.end_to_end()?,
            None => Tensor::zeros(0, x.dtype(), x.device())?,
        };
        x.contiguous()?.apply_op3(&basis.contiguous()?, &correction, PatchOp { sizes: *self, way })
    }

    fn latent(&self) -> usize {
        self.patches * self.rows
    }

    fn span(&self, index: usize) -> Span {
        let begin = index * self.patch;
        let length = self.patch.min(self.length - begin);
        let windows = length.div_ceil(self.window);
        Span { index, begin, length, width: windows * self.window, first: begin / self.window, windows }
    }

    /// Calls `work` with one run of patches after the other, on all threads; results in order.
    fn runs<T: Send>(&self, work: impl Fn(&mut dyn Iterator<Item = Span>) -> T + Sync + Send) -> Vec<T> {
        cpu::map_indices_on(cpu::threads(), self.patches.div_ceil(TOGETHER), |run| {
            let patches: Range<usize> = run * TOGETHER..((run + 1) * TOGETHER).min(self.patches);
            work(&mut patches.map(|index| self.span(index)))
        })
    }

    /// Values of the latents `z` (B, L) for a patch, times its rows, into `x` (B, width).
    fn expand(&self, span: &Span, z: &[f32], basis: &[f32], x: &mut [f32]) {
        self.product([self.batch, span.width, self.rows], false).write(
            Matrix { values: &z[span.index * self.rows..], row: self.latent(), column: 1 },
            Matrix { values: basis, row: self.patch, column: 1 },
            x,
            span.width,
        );
        cut(x, span);
    }

    /// A patch `x` (B, width) along its rows, into its part of the latents `z` (B, L).
    ///
    /// # Safety
    /// No other thread writes that part.
    unsafe fn project(&self, span: &Span, x: &[f32], basis: &[f32], z: Shared) {
        let x = Matrix { values: x, row: span.width, column: 1 };
        let basis = Matrix { values: basis, row: 1, column: self.patch };
        // SAFETY: promised by the caller.
        unsafe {
            let place = z.get().add(span.index * self.rows);
            self.product([self.batch, self.rows, span.width], false).write_to(x, basis, place, self.latent());
        }
    }

    /// (m × k) · (k × n), by the thread that calls it.
    fn product(&self, [m, n, k]: [usize; 3], add: bool) -> Product {
        Product { m, n, k, scale: 1.0, add, parallelism: Parallelism::None }
    }
}

/// A patch of the vector.
struct Span {
    index: usize,
    /// Its first value.
    begin: usize,
    /// Values that are there.
    length: usize,
    /// With zeros up to the end of its last window.
    width: usize,
    /// Its first window.
    first: usize,
    windows: usize,
}

/// The patch of all samples, and what the correction makes of it.
#[derive(Default)]
struct Tile {
    /// (B, width) before the correction.
    x: Vec<f32>,
    /// (B · windows, C) before and after GELU.
    hidden: Vec<f32>,
    bent: Vec<f32>,
    /// (B, width) after it.
    y: Vec<f32>,
    /// Gradient of `y`, then of `x`.
    grad: Vec<f32>,
    /// Of `bent`, and of `hidden`.
    grad_bent: Vec<f32>,
    grad_hidden: Vec<f32>,
}

/// Copies a patch of every sample of `from` (B, P) into `to` (B, width).
fn gather(from: &[f32], span: &Span, sizes: &Sizes, to: &mut Vec<f32>) {
    to.clear();
    for row in from.chunks_exact(sizes.length) {
        to.extend_from_slice(&row[span.begin..][..span.length]);
        to.resize(to.len() + span.width - span.length, 0.0);
    }
}

/// Zeros beyond the end of the vector.
fn cut(x: &mut [f32], span: &Span) {
    if span.length < span.width {
        x.chunks_exact_mut(span.width).for_each(|row| row[span.length..].fill(0.0));
    }
}

/// # Safety
/// `to` has the `length` values of a patch in B rows of P, which no other thread writes.
unsafe fn scatter(from: &[f32], span: &Span, sizes: &Sizes, to: Shared) {
    for (sample, row) in from.chunks_exact(span.width).enumerate() {
        // SAFETY: promised by the caller.
        unsafe {
            let to = to.get().add(sample * sizes.length + span.begin);
            to.copy_from_nonoverlapping(row.as_ptr(), span.length);
        }
    }
}

/// The rows of a patch; those of 16 bits in `wide`.
fn rows_of<'a>(basis: Weight<'a>, span: &Span, sizes: &Sizes, wide: &'a mut Vec<f32>) -> &'a [f32] {
    let range = span.index * sizes.rows * sizes.patch..(span.index + 1) * sizes.rows * sizes.patch;
    match basis {
        Weight::F32(values) => &values[range],
        basis => {
            wide.resize(range.len(), 0.0);
            basis.widen(range, wide);
            wide
        }
    }
}

#[derive(Clone, Copy)]
enum Way {
    Project,
    Expand,
}

struct PatchOp {
    sizes: Sizes,
    way: Way,
}

impl PatchOp {
    /// `tile.x`, and `tile.y` where there is a correction.
    fn fill(
        &self,
        span: &Span,
        input: &[f32],
        basis: &[f32],
        corrector: Option<&Corrector>,
        tile: &mut Tile,
    ) {
        let sizes = &self.sizes;
        match self.way {
            Way::Project => gather(input, span, sizes, &mut tile.x),
            Way::Expand => {
                tile.x.resize(sizes.batch * span.width, 0.0);
                sizes.expand(span, input, basis, &mut tile.x);
            }
        }
        if let Some(corrector) = corrector {
            corrector.forward(span, sizes, tile);
        }
    }

    fn forward(&self, input: &[f32], basis: Weight, correction: &[f32]) -> Vec<f32> {
        let sizes = &self.sizes;
        let corrector = Corrector::new(correction, sizes);
        let width = match self.way {
            Way::Project => sizes.latent(),
            Way::Expand => sizes.length,
        };
        let mut out: Vec<f32> = Vec::with_capacity(sizes.batch * width);
        let place = Shared::new(out.as_mut_ptr());
        sizes.runs(|spans| {
            let (mut tile, mut wide) = (Tile::default(), Vec::new());
            for span in spans {
                let basis = rows_of(basis, &span, sizes, &mut wide);
                self.fill(&span, input, basis, corrector.as_ref(), &mut tile);
                let y = if corrector.is_some() { &tile.y } else { &tile.x };
                match self.way {
                    // SAFETY: each patch has `rows` values of its own in the latent of each sample.
                    Way::Project => unsafe { sizes.project(&span, y, basis, place) },
                    // SAFETY: patches do not overlap.
                    Way::Expand => unsafe { scatter(y, &span, sizes, place) },
                }
            }
        });
        // SAFETY: the patches have written all values.
        unsafe { out.set_len(sizes.batch * width) }
        out
    }

    /// The gradient of the correction; those of input and basis, where they are wanted, go to their places.
    ///
    /// # Safety
    /// `grad_input` has as many values as `input`, `grad_basis` as the basis, and these are there where they are added to.
    unsafe fn backward(
        &self,
        [input, correction, grad]: [&[f32]; 3],
        basis: Weight,
        grad_input: Option<Shared>,
        grad_basis: Option<(Shared, bool)>,
    ) -> Vec<f32> {
        let sizes = &self.sizes;
        let Sizes { batch, patch, rows, channels, .. } = *sizes;
        let corrector = Corrector::new(correction, sizes);
        let shared = if corrector.is_some() { Corrector::shared(sizes) } else { 0 };
        let mut whole = vec![0f32; correction.len()];
        let positions = Shared::new(whole[shared..].as_mut_ptr());
        // The gradient of a patch's rows: latentᵀ · x.
        let outer = |span: &Span, latent: &[f32], x: &[f32]| {
            let Some((place, add)) = grad_basis else { return };
            let latent = Matrix { values: &latent[span.index * rows..], row: 1, column: sizes.latent() };
            let x = Matrix { values: x, row: span.width, column: 1 };
            // SAFETY: each patch has rows of its own; where the last is shorter, zeros fill them up.
            unsafe {
                let place = place.get().add(span.index * rows * patch);
                sizes.product([rows, span.width, batch], add).write_to(latent, x, place, patch);
                if !add {
                    (0..rows).for_each(|row| {
                        place.add(row * patch + span.width).write_bytes(0, patch - span.width)
                    });
                }
            }
        };
        let parts = sizes.runs(|spans| {
            let (mut tile, mut wide, mut sums) = (Tile::default(), Vec::new(), vec![0f32; shared]);
            for span in spans {
                let basis = rows_of(basis, &span, sizes, &mut wide);
                self.fill(&span, input, basis, corrector.as_ref(), &mut tile);
                match self.way {
                    Way::Project => {
                        outer(&span, grad, if corrector.is_some() { &tile.y } else { &tile.x });
                        tile.grad.resize(batch * span.width, 0.0);
                        sizes.expand(&span, grad, basis, &mut tile.grad);
                    }
                    Way::Expand => gather(grad, &span, sizes, &mut tile.grad),
                }
                if let Some(corrector) = &corrector {
                    let wanted = matches!(self.way, Way::Expand) || grad_input.is_some();
                    // SAFETY: each patch has windows of its own.
                    let positions = unsafe {
                        let first = positions.get().add(span.first * channels);
                        std::slice::from_raw_parts_mut(first, span.windows * channels)
                    };
                    let gradients = Gradients { sums: &mut sums, positions };
                    corrector.backward(&span, sizes, &mut tile, wanted, gradients);
                }
                match (self.way, grad_input) {
                    // SAFETY: patches do not overlap.
                    (Way::Project, Some(place)) => unsafe { scatter(&tile.grad, &span, sizes, place) },
                    (Way::Project, None) => {}
                    (Way::Expand, place) => {
                        outer(&span, input, &tile.grad);
                        if let Some(place) = place {
                            // SAFETY: likewise.
                            unsafe { sizes.project(&span, &tile.grad, basis, place) }
                        }
                    }
                }
            }
            sums
        });
        for part in parts {
            whole.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        whole
    }
}

impl CustomOp3 for PatchOp {
    fn name(&self) -> &'static str {
        "patches"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        basis: &CpuStorage,
        basis_layout: &Layout,
        correction: &CpuStorage,
        correction_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, correction) = (cpu::operand(x, x_layout)?, cpu::operand(correction, correction_layout)?);
        let y = self.forward(x, Weight::operand(basis, basis_layout)?, correction);
        let width = y.len() / self.sizes.batch;
        Ok((CpuStorage::F32(y), (self.sizes.batch, width).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        basis: &Tensor,
        correction: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let mut grad_x = x.track_op().then(|| Vec::<f32>::with_capacity(x.elem_count()));
        let mut grad_correction = Vec::new();
        let mut backward = |grad_basis: Option<(Shared, bool)>| -> Result<()> {
            let place = grad_x.as_mut().map(|values| Shared::new(values.as_mut_ptr()));
            grad_correction = cpu::with_values(x, |x| {
                cpu::with_values(correction, |correction| {
                    cpu::with_values(&grad, |grad| {
                        cpu::with_weight(basis, |basis| {
                            // SAFETY: both places have as many values as what they are gradients of.
                            unsafe { self.backward([x, correction, grad], basis, place, grad_basis) }
                        })
                    })
                })
            })????;
            Ok(())
        };
        let grad_basis = if basis.track_op() {
            let mut result = Ok(());
            // SAFETY: a backward pass writes the rows of every patch.
            let gradient = unsafe { gradient(basis, |place, add| result = backward(Some((place, add)))) }?;
            result?;
            gradient
        } else {
            backward(None)?;
            None
        };
        if let Some(values) = &mut grad_x {
            // SAFETY: the backward pass has written all of them.
            unsafe { values.set_len(x.elem_count()) }
        }
        let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let grad_x = grad_x.map(|values| tensor(values, x)).transpose()?;
        let grad_correction =
            correction.track_op().then(|| tensor(grad_correction, correction)).transpose()?;
        Ok((grad_x, grad_basis, grad_correction))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::weights::Trainable;

    const WINDOW: usize = 4;

    /// A basis of 3 rows for each of the patches of 37 values, and a correction away from its zeros.
    fn weights(patch: usize) -> Result<(Var, Correction, Vec<Var>)> {
        let basis = Var::from_tensor(&normal(1, 0, (3 * 37usize.div_ceil(patch), patch), &Device::Cpu)?)?;
        let trainable = Trainable::new(1);
        let correction = Correction::new(37, WINDOW, 5, trainable.builder(&Device::Cpu))?;
        let vars: Vec<Var> = trainable.vars().into_values().collect();
        for (var, i) in vars.iter().zip(1..) {
            var.set(&(normal(2, i, var.shape(), &Device::Cpu)? * 0.3)?)?;
        }
        Ok((basis, correction, vars))
    }

    /// Value and gradients of Σ weight · y.
    fn gradients(y: &Tensor, vars: &[&Var]) -> Result<Vec<Tensor>> {
        let grads = (y * normal(3, 0, y.shape(), &Device::Cpu)?)?.sum_all()?.backward()?;
        let of = |var: &&Var| match grads.get(var) {
            Some(gradient) => Ok(gradient.clone()),
            None => var.zeros_like(),
        };
        std::iter::once(Ok(y.clone())).chain(vars.iter().map(of)).collect()
    }

    fn assert_alike(ours: &[Tensor], theirs: &[Tensor]) -> Result<()> {
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert_eq!(ours.dims(), theirs.dims());
            let apart = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(apart < 2e-5 * theirs.abs()?.max_all()?.to_scalar::<f32>()?.max(1.0), "{apart}");
        }
        Ok(())
    }

    #[test]
    fn values_and_gradients_are_those_of_batched_products() -> Result<()> {
        // Patches that end with a window and such that do not, the last one shorter; many, few, and one.
        for patch in [1, 4, 8, 12, 6, 37] {
            let (basis, correction, vars) = weights(patch)?;
            let x = Var::from_tensor(&normal(4, 0, (2, 37), &Device::Cpu)?)?;
            let z = Var::from_tensor(&normal(4, 1, (2, basis.dim(0)?), &Device::Cpu)?)?;
            let patches = 37usize.div_ceil(patch);
            let blocks = basis.reshape((patches, 3, patch))?;
            for correction in [None, Some(&correction)] {
                let corrected = |x: &Tensor| correction.map_or_else(|| Ok(x.clone()), |c| c.forward(x));
                let all: Vec<&Var> = [&x, &z, &basis].into_iter().chain(&vars).collect();
                let rows = corrected(&x)?.pad_with_zeros(1, 0, patches * patch - 37)?;
                let rows = rows.reshape((2, patches, patch))?.transpose(0, 1)?.contiguous()?;
                let theirs = rows.matmul(&blocks.transpose(1, 2)?)?.transpose(0, 1)?.reshape((2, ()))?;
                let ours = project_patches(&x, &basis, correction)?;
                assert_alike(&gradients(&ours, &all)?, &gradients(&theirs, &all)?)?;
                let latents = z.reshape((2, patches, 3))?.transpose(0, 1)?.contiguous()?;
                let theirs = latents.matmul(&blocks)?.transpose(0, 1)?.reshape((2, patches * patch))?;
                let theirs = corrected(&theirs.narrow(1, 0, 37)?)?;
                let ours = expand_patches(&z, &basis, correction, 37)?;
                assert_alike(&gradients(&ours, &all)?, &gradients(&theirs, &all)?)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_basis_of_16_bits_is_widened_as_it_is_read() -> Result<()> {
        let (basis, correction, _) = weights(8)?;
        let half = basis.to_dtype(candle_core::DType::F16)?.detach();
        let wide = half.to_dtype(candle_core::DType::F32)?;
        let x = normal(4, 0, (2, 37), &Device::Cpu)?;
        let both = |basis: &Tensor| -> Result<Vec<Tensor>> {
            let z = project_patches(&x, basis, Some(&correction))?;
            Ok(vec![expand_patches(&z, basis, Some(&correction), 37)?, z])
        };
        assert_alike(&both(&half)?, &both(&wide)?)
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() -> Result<()> {
        let basis = normal(1, 0, (15, 8), &Device::Cpu)?;
        assert!(project_patches(&normal(1, 1, (2, 60), &Device::Cpu)?, &basis, None).is_err());
        assert!(expand_patches(&normal(1, 1, (2, 14), &Device::Cpu)?, &basis, None, 37).is_err());
        Ok(())
    }
}
