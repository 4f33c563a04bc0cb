//! A frozen linear layer and the LoRA beside it as one operation: y = x·Wᵀ + b + s·(x·downᵀ)·upᵀ.
//!
//! The graph keeps x alone, and the adapter adds into the layer's own output: no other value of the output's size is
//! made, forward or backward.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use gemm::Parallelism;

use super::Pass;
use super::linear_op::{self, linear};
use crate::layers::cpu::{self, Matrix, Product, Weight};
use crate::layers::gemm::skinny::{SkinnyGemm, transposed};

/// LoRA factors of one linear layer, for one person or for several at once.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// (R, in), or (K, R, in) for the K people whose samples follow each other in the batch.
    pub down: Tensor,
    /// (out, R), or (K, out, R).
    pub up: Tensor,
    /// weight · alpha / R.
    pub scale: f64,
}

impl Adapter {
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.up.rank() == 2 {
            return linear(&linear(x, &self.down, None)?, &self.up, None)? * self.scale;
        }
        let people = self.up.dim(0)?;
        let mut shape = x.dims().to_vec();
        let width = x.dim(candle_core::D::Minus1)?;
        let rows = x.elem_count() / width / people;
        let x = x.reshape((people, rows, width))?;
        let h = if self.down.rank() == 2 {
            linear(&x, &self.down, None)? // one `down` shared by all
        } else {
            x.matmul(&super::like(&self.down, &x)?.t()?)?
        };
        let y = h.matmul(&super::like(&self.up, &h)?.t()?)?;
        if let Some(last) = shape.last_mut() {
            *last = self.up.dim(1)?;
        }
        y.reshape(shape)? * self.scale
    }
}

/// The layer with its adapter, `x` (…, in) → (…, out); `None` where the pieces have to be computed one by one: on other
/// devices, or when the layer itself is trained.
pub(super) fn lora_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    adapter: &Adapter,
    pass: Pass,
) -> Result<Option<Tensor>> {
    let trained = weight.track_op() || bias.is_some_and(Tensor::track_op);
    let factors = [&adapter.down, &adapter.up];
    if trained
        || !cpu::is_cpu_f32(x)
        || !cpu::is_cpu_weight(weight)
        || !factors.into_iter().all(cpu::is_cpu_f32)
    {
        return Ok(None);
    }
    let (n, k) = weight.dims2()?;
    let people = if adapter.up.rank() == 3 { adapter.up.dim(0)? } else { 1 };
    let rank = adapter.up.dim(candle_core::D::Minus1)?;
    let rows = x.elem_count() / k;
    let shared = adapter.down.rank() == 2;
    let fits = x.dims().last() == Some(&k)
        && rows.is_multiple_of(people)
        && adapter.up.elem_count() == people * n * rank
        && adapter.down.elem_count() == if shared { rank * k } else { people * rank * k };
    if !fits {
        candle_core::bail!(
            "a layer {k} → {n} with an adapter of {:?} and {:?} was given {:?}",
            adapter.down.shape(),
            adapter.up.shape(),
            x.shape()
        );
    }
    let op = LoraLinearOp {
        weight: weight.contiguous()?,
        bias: bias.map(|bias| super::like(bias, x)?.contiguous()).transpose()?,
        pass,
        sizes: Sizes { people, rows: rows / people, k, n, rank, shared, scale: adapter.scale as f32 },
    };
    x.contiguous()?.apply_op3(&adapter.down.contiguous()?, &adapter.up.contiguous()?, op).map(Some)
}

struct LoraLinearOp {
    weight: Tensor,
    bias: Option<Tensor>,
    pass: Pass,
    sizes: Sizes,
}

#[derive(Clone, Copy)]
struct Sizes {
    people: usize,
    /// Of one person.
    rows: usize,
    k: usize,
    n: usize,
    rank: usize,
    /// Whether all people have one `down`.
    shared: bool,
    scale: f32,
}

/// A matrix that lies row by row.
fn rows(values: &[f32], width: usize) -> Matrix<'_> {
    Matrix { values, row: width, column: 1 }
}

/// The same turned over.
fn columns(values: &[f32], width: usize) -> Matrix<'_> {
    Matrix { values, row: 1, column: width }
}

impl Sizes {
    /// Threads inside a product, where there is one person; otherwise each person has a thread.
    fn product(&self, m: usize, n: usize, k: usize, scale: f32, add: bool) -> Product {
        let parallelism = if self.people == 1 { cpu::parallelism() } else { Parallelism::None };
        Product { m, n, k, scale, add, parallelism }
    }

    /// Threads over the people.
    fn threads(&self) -> usize {
        cpu::threads_for(self.people * self.rows * self.rank * (self.k + self.n))
    }

    fn person<'a>(&self, values: &'a [f32], person: usize, size: usize) -> &'a [f32] {
        &values[person * size..][..size]
    }

    fn down<'a>(&self, down: &'a [f32], person: usize) -> &'a [f32] {
        self.person(down, if self.shared { 0 } else { person }, self.rank * self.k)
    }

    /// A product with a factor of one person, `width` wide.
    fn thin(&self, width: usize) -> SkinnyGemm {
        SkinnyGemm { rows: self.rows, width, rank: self.rank, parallel: self.people == 1 }
    }

    /// Whether both factors are thin enough for kernels of their own.
    fn is_thin(&self) -> bool {
        self.thin(self.k).fits() && self.thin(self.n).fits()
    }

    /// x·downᵀ of one person, (rows, R).
    fn hidden(&self, x: &[f32], down: &[f32], person: usize) -> Vec<f32> {
        let mut h = vec![0f32; self.rows * self.rank];
        let (x, down) = (self.person(x, person, self.rows * self.k), self.down(down, person));
        let product = self.product(self.rows, self.rank, self.k, 1.0, false);
        product.write(rows(x, self.k), columns(down, self.k), &mut h, self.rank);
        h
    }

    /// Adds s·(x·downᵀ)·upᵀ.
    fn forward(&self, x: &[f32], down: &[f32], up: &[f32], y: &mut [f32]) {
        cpu::for_chunks_on(self.threads(), y, self.rows * self.n, |person, y| {
            if self.is_thin() {
                let (x, down) = (self.person(x, person, self.rows * self.k), self.down(down, person));
                let h = self.thin(self.k).into_rank(x, down, self.scale);
                let up = transposed(self.person(up, person, self.n * self.rank), self.rank, self.rank);
                return self.thin(self.n).add_from_rank(&h, &up, y);
            }
            let h = self.hidden(x, down, person);
            let up = self.person(up, person, self.n * self.rank);
            let product = self.product(self.rows, self.n, self.rank, self.scale, true);
            product.write(rows(&h, self.rank), columns(up, self.rank), y, self.n);
        });
    }

    /// Gradients of `down` and `up`, and s·grad·up (rows, R), of one person.
    fn backward(&self, [x, down, up, grad]: [&[f32]; 4], person: usize) -> [Vec<f32>; 3] {
        let Self { rows: count, k, n, rank, scale, .. } = *self;
        if self.is_thin() {
            let (x, down) = (self.person(x, person, count * k), self.down(down, person));
            let up = transposed(self.person(up, person, n * rank), rank, rank);
            let grad = self.person(grad, person, count * n);
            let h = self.thin(k).into_rank(x, down, scale);
            let grad_h = self.thin(n).into_rank(grad, &up, scale);
            let grad_up = transposed(&self.thin(n).factor_gradient(&h, grad), n, n);
            return [self.thin(k).factor_gradient(&grad_h, x), grad_up, grad_h];
        }
        let h = self.hidden(x, down, person);
        let (x, up) = (self.person(x, person, count * k), self.person(up, person, n * rank));
        let grad = self.person(grad, person, count * n);
        let [mut grad_down, mut grad_up] = [vec![0f32; rank * k], vec![0f32; n * rank]];
        let mut grad_h = vec![0f32; count * rank];
        self.product(count, rank, n, scale, false).write(rows(grad, n), rows(up, rank), &mut grad_h, rank);
        self.product(n, rank, count, scale, false).write(
            columns(grad, n),
            rows(&h, rank),
            &mut grad_up,
            rank,
        );
        self.product(rank, k, count, 1.0, false).write(columns(&grad_h, rank), rows(x, k), &mut grad_down, k);
        [grad_down, grad_up, grad_h]
    }

    /// Adds grad_h·down.
    fn add_grad_input(&self, grad_h: &[[Vec<f32>; 3]], down: &[f32], grad_x: &mut [f32]) {
        cpu::for_chunks_on(self.threads(), grad_x, self.rows * self.k, |person, grad_x| {
            let [_, _, grad_h] = &grad_h[person];
            if self.is_thin() {
                return self.thin(self.k).add_from_rank(grad_h, self.down(down, person), grad_x);
            }
            let product = self.product(self.rows, self.k, self.rank, 1.0, true);
            product.write(rows(grad_h, self.rank), rows(self.down(down, person), self.k), grad_x, self.k);
        });
    }

    /// The people's gradients after each other, or their sum where they share the factor.
    fn together(&self, parts: Vec<Vec<f32>>, shared: bool) -> Vec<f32> {
        if !shared {
            return parts.concat();
        }
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or_default();
        for part in parts {
            sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        }
        sum
    }
}

impl CustomOp3 for LoraLinearOp {
    fn name(&self) -> &'static str {
        "adapted"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        down: &CpuStorage,
        down_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Sizes { people, rows, k, n, .. } = self.sizes;
        let shape = linear_op::with_last(x_layout.dims(), n);
        if self.pass == Pass::Recompute {
            return Ok((CpuStorage::F32(vec![0.0; people * rows * n]), shape));
        }
        let x = cpu::operand(x, x_layout)?;
        let product = |bias: &[f32]| {
            cpu::with_weight(&self.weight, |w: Weight| linear_op::product(x, w, bias, [people * rows, n, k]))
        };
        let mut y = match &self.bias {
            Some(bias) => cpu::with_values(bias, product)??,
            None => product(&[])?,
        };
        self.sizes.forward(x, cpu::operand(down, down_layout)?, cpu::operand(up, up_layout)?, &mut y);
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        down: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Sizes { people, rows, k, n, shared, .. } = self.sizes;
        let grad = grad.contiguous()?;
        let (parts, grad_x) = cpu::with_values(&grad, |grad| {
            cpu::with_values(x, |values| {
                cpu::with_values(down, |down| {
                    cpu::with_values(up, |up| -> Result<_> {
                        let parts = cpu::map_indices_on(self.sizes.threads(), people, |person| {
                            self.sizes.backward([values, down, up, grad], person)
                        });
                        let grad_x = if x.track_op() {
                            let mut grad_x = cpu::with_weight(&self.weight, |weight| {
                                linear_op::grad_input(grad, weight, [people * rows, n, k])
                            })?;
                            self.sizes.add_grad_input(&parts, down, &mut grad_x);
                            Some(grad_x)
                        } else {
                            None
                        };
                        Ok((parts, grad_x))
                    })
                })
            })
        })?????;
        let (mut downs, mut ups) = (Vec::new(), Vec::new());
        for [down, up, _] in parts {
            downs.push(down);
            ups.push(up);
        }
        let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let wanted = |parts: Vec<Vec<f32>>, like: &Tensor, shared: bool| {
            like.track_op().then(|| tensor(self.sizes.together(parts, shared), like)).transpose()
        };
        let grad_x = grad_x.map(|values| tensor(values, x)).transpose()?;
        Ok((grad_x, wanted(downs, down, shared)?, wanted(ups, up, false)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Module, Var};

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::layers::Linear;

    #[test]
    fn it_is_the_layer_and_the_adapter_one_by_one() -> Result<()> {
        let draw = |i: u64, shape: &[usize]| normal(7, i, shape, &Device::Cpu);
        let rank = 2;
        // No factors, people with and without a `down` of their own; sizes with and without kernels of their
        // own.
        let shapes = |[k, n]: [usize; 2]| {
            [
                (k, n, vec![rank, k], vec![n, rank]),
                (k, n, vec![rank, k], vec![3, n, rank]),
                (k, n, vec![3, rank, k], vec![3, n, rank]),
            ]
        };
        for (k, n, down, up) in [[6, 9], [64, 96]].into_iter().flat_map(shapes) {
            let x = Var::from_tensor(&draw(0, &[6, 4, k])?)?;
            let (down, up) = (Var::from_tensor(&draw(1, &down)?)?, Var::from_tensor(&draw(2, &up)?)?);
            let (weight, bias) = (draw(3, &[n, k])?, draw(4, &[n])?);
            let adapter = Adapter { down: down.as_tensor().clone(), up: up.as_tensor().clone(), scale: 0.7 };
            let together =
                Linear { weight: weight.clone(), bias: Some(bias.clone()), adapter: Some(adapter.clone()) };
            // A weight that is trained is computed one by one.
            let apart = Linear { weight: Var::from_tensor(&weight)?.into_inner(), ..together.clone() };
            let (ours, theirs) = (together.forward(&x)?, apart.forward(&x)?);
            let g = draw(5, &[6, 4, n])?;
            let (our_grads, their_grads) =
                ((&ours * &g)?.sum_all()?.backward()?, (&theirs * &g)?.sum_all()?.backward()?);
            let mut pairs = vec![(ours, theirs)];
            for var in [&x, &down, &up] {
                let grads = [&our_grads, &their_grads].map(|grads| grads.get(var).cloned());
                let [Some(ours), Some(theirs)] = grads else { panic!("no gradient") };
                pairs.push((ours, theirs));
            }
            for (ours, theirs) in pairs {
                let apart = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(apart < 1e-4, "{:?}: {apart}", adapter.up.shape());
            }
        }
        Ok(())
    }

    #[test]
    fn a_weight_of_sixteen_bits_is_computed_as_the_same_weight_in_f32() -> Result<()> {
        let draw = |i: u64, shape: (usize, usize)| normal(8, i, shape, &Device::Cpu);
        let (weight, adapter) = (
            draw(0, (9, 6))?.to_dtype(DType::F16)?,
            Adapter { down: draw(1, (2, 6))?, up: draw(2, (9, 2))?, scale: 1.0 },
        );
        let x = draw(3, (5, 6))?;
        let layer =
            |weight: Tensor| Linear { weight, bias: None, adapter: Some(adapter.clone()) }.forward(&x);
        let apart = (layer(weight.to_dtype(DType::F32)?)? - layer(weight)?)?.abs()?.max_all()?;
        assert_eq!(apart.to_scalar::<f32>()?, 0.0);
        Ok(())
    }
}
