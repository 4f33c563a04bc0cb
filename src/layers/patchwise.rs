//! Products patch by patch: a long vector in patches, each with a small matrix of its own.
//!
//! The matrices of all patches lie below each other in one `basis`, which may be as large as the rest of a network
//! together. Its gradient is computed in place of the views, transposes and sums that candle's batched product makes
//! of it.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use gemm::Parallelism;

use super::slices::{self, Matrix, Product};

/// Each patch along its own rows: `x` (N, B, P), `basis` (N·C, P) → x·basisᵀ, (N, B, C).
pub fn project_patches(x: &Tensor, basis: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::of(x, basis, |sizes| sizes.width)?;
    if slices::is_cpu_f32(x) && slices::is_cpu_f32(basis) {
        return x.contiguous()?.apply_op2(&basis.contiguous()?, PatchOp { sizes, way: Way::Project });
    }
    x.contiguous()?.matmul(&basis.reshape((sizes.patches, sizes.rows, sizes.width))?.transpose(1, 2)?)
}

/// The transposed map: `z` (N, B, C), `basis` (N·C, P) → z·basis, (N, B, P).
pub fn expand_patches(z: &Tensor, basis: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::of(z, basis, |sizes| sizes.rows)?;
    if slices::is_cpu_f32(z) && slices::is_cpu_f32(basis) {
        return z.contiguous()?.apply_op2(&basis.contiguous()?, PatchOp { sizes, way: Way::Expand });
    }
    z.contiguous()?.matmul(&basis.reshape((sizes.patches, sizes.rows, sizes.width))?)
}

#[derive(Clone, Copy)]
struct Sizes {
    /// N
    patches: usize,
    /// B
    batch: usize,
    /// C
    rows: usize,
    /// P
    width: usize,
}

impl Sizes {
    fn of(x: &Tensor, basis: &Tensor, last: impl Fn(&Self) -> usize) -> Result<Self> {
        let (patches, batch, columns) = x.dims3()?;
        let (rows, width) = basis.dims2()?;
        let sizes = Self { patches, batch, rows: rows / patches.max(1), width };
        if !rows.is_multiple_of(patches.max(1)) || columns != last(&sizes) {
            candle_core::bail!(
                "{:?} does not go through {patches} patches of {:?}",
                x.shape(),
                basis.shape()
            );
        }
        Ok(sizes)
    }

    /// left · right of every patch, (m, k) · (k, n); an operand that is marked lies transposed.
    fn products(&self, [m, n, k]: [usize; 3], left: (&[f32], bool), right: (&[f32], bool)) -> Vec<f32> {
        let mut out = vec![0f32; self.patches * m * n];
        fn matrix((values, turned): (&[f32], bool), patch: usize, rows: usize, columns: usize) -> Matrix<'_> {
            let values = &values[patch * rows * columns..][..rows * columns];
            let (row, column) = if turned { (1, rows) } else { (columns, 1) };
            Matrix { values, row, column }
        }
        slices::for_chunks(&mut out, (m * n).max(1), |patch, out| {
            Product { m, n, k, scale: 1.0, add: false, parallelism: Parallelism::None }.write(
                matrix(left, patch, m, k),
                matrix(right, patch, k, n),
                out,
                n,
            );
        });
        out
    }

    /// (N, B, C)
    fn project(&self, x: &[f32], basis: &[f32]) -> Vec<f32> {
        self.products([self.batch, self.rows, self.width], (x, false), (basis, true))
    }

    /// (N, B, P)
    fn expand(&self, z: &[f32], basis: &[f32]) -> Vec<f32> {
        self.products([self.batch, self.width, self.rows], (z, false), (basis, false))
    }

    /// zᵀ·x, (N·C, P)
    fn outer(&self, z: &[f32], x: &[f32]) -> Vec<f32> {
        self.products([self.rows, self.width, self.batch], (z, true), (x, false))
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

impl CustomOp2 for PatchOp {
    fn name(&self) -> &'static str {
        "patches"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        basis: &CpuStorage,
        basis_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Sizes { patches, batch, rows, width } = self.sizes;
        let (x, basis) = (slices::operand(x, x_layout)?, slices::operand(basis, basis_layout)?);
        let (y, last) = match self.way {
            Way::Project => (self.sizes.project(x, basis), rows),
            Way::Expand => (self.sizes.expand(x, basis), width),
        };
        Ok((CpuStorage::F32(y), (patches, batch, last).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        basis: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (grad_x, grad_basis) = slices::with_values(&grad, |grad| {
            slices::with_values(x, |values| {
                slices::with_values(basis, |basis_values| {
                    let grad_x = x.track_op().then(|| match self.way {
                        Way::Project => self.sizes.expand(grad, basis_values),
                        Way::Expand => self.sizes.project(grad, basis_values),
                    });
                    let grad_basis = basis.track_op().then(|| match self.way {
                        Way::Project => self.sizes.outer(grad, values),
                        Way::Expand => self.sizes.outer(values, grad),
                    });
                    (grad_x, grad_basis)
                })
            })
        })???;
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        Ok((tensor(grad_x, x)?, tensor(grad_basis, basis)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::diffusion::noise::normal;

    /// Value and gradients of Σ weight · f(x, basis).
    fn gradients(
        x: &Var,
        basis: &Var,
        weight: &Tensor,
        y: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let y = y(x, basis)?;
        let grads = (&y * weight)?.sum_all()?.backward()?;
        let of = |var: &Var| grads.get(var).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"));
        Ok(vec![y, of(x)?, of(basis)?])
    }

    #[test]
    fn values_and_gradients_are_those_of_batched_products() -> Result<()> {
        let (n, b, c, p) = (5, 3, 2, 7);
        let draw = |i: u64, shape: &[usize]| Var::from_tensor(&normal(1, i, shape, &Device::Cpu)?);
        let (x, z, basis) = (draw(0, &[n, b, p])?, draw(1, &[n, b, c])?, draw(2, &[n * c, p])?);
        let batched = |basis: &Tensor| basis.reshape((n, c, p));
        let pairs = [
            (
                gradients(&x, &basis, &z, project_patches)?,
                gradients(&x, &basis, &z, |x, basis| x.matmul(&batched(basis)?.transpose(1, 2)?))?,
            ),
            (
                gradients(&z, &basis, &x, expand_patches)?,
                gradients(&z, &basis, &x, |z, basis| z.matmul(&batched(basis)?))?,
            ),
        ];
        for (ours, theirs) in pairs {
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert_eq!(ours.dims(), theirs.dims());
                let apart = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(apart < 1e-5, "{apart}");
            }
        }
        assert!(project_patches(&z, &basis).is_err() && expand_patches(&x, &basis).is_err());
        Ok(())
    }
}
