//! Multi-head attention that never holds the whole score matrix.

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use gemm::Parallelism;

use crate::layers::cpu::{self, Matrix, Product, Shared, Weight};
use crate::layers::cuda::Saved;
#[cfg(feature = "cuda")]
use crate::layers::cuda::gpu;
use crate::layers::gemm::isa::ElemType;
use crate::layers::gemm::microkernel::{self, Tile};
use crate::layers::gemm::operands::{ContiguousDepth, PackA, PackB, StridedDepth};

/// softmax(q·kᵀ/√d)·v for each head. `q` (B, N, H·d), `k` and `v` (B, M, H·d) → (B, N, H·d).
///
/// With `causal`, a query sees the keys up to its own place (N = M).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (_, _, width) = q.dims3()?;
    if heads == 0 || !width.is_multiple_of(heads) {
        candle_core::bail!("width {width} does not part into {heads} heads");
    }
    if cpu::is_cpu_f32(q) {
        let op = AttentionOp { heads, causal, saved: Saved::default() };
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op);
    }
    #[cfg(feature = "flash-attn")]
    if let Some(y) = flash(q, k, v, heads, causal)? {
        return Ok(y);
    }
    #[cfg(feature = "cuda")]
    if gpu::takes_attention([q, k, v], width / heads) {
        return q.apply_op3(k, v, AttentionOp { heads, causal, saved: Saved::default() });
    }
    composite(q, k, v, heads, causal, SCORES)
}

/// The same by FlashAttention 2, where it can be: 16 bits on a CUDA device, a head of a multiple of 8 and at most 256
/// values, and nothing that needs a gradient, since candle-flash-attn has no backward pass.
#[cfg(feature = "flash-attn")]
fn flash(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Option<Tensor>> {
    let (b, n, width) = q.dims3()?;
    let d = width / heads;
    let fits = q.device().is_cuda()
        && matches!(q.dtype(), DType::F16 | DType::BF16)
        && [k, v].iter().all(|x| x.dtype() == q.dtype())
        && d.is_multiple_of(8)
        && d <= 256
        && ![q, k, v].iter().any(|x| x.track_op());
    if !fits {
        return Ok(None);
    }
    let split = |x: &Tensor| x.reshape((b, x.dim(1)?, heads, d));
    let y =
        candle_flash_attn::flash_attn(&split(q)?, &split(k)?, &split(v)?, 1.0 / (d as f32).sqrt(), causal)?;
    y.reshape((b, n, width)).map(Some)
}

/// The same in candle's operations, with at most about `scores` scores at once.
fn composite(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
    scores: usize,
) -> Result<Tensor> {
    let (b, n, width) = q.dims3()?;
    let m = k.dim(1)?;
    let split = |x: &Tensor, n: usize| {
        x.reshape((b, n, heads, width / heads))?.transpose(1, 2)?.contiguous()?.to_dtype(DType::F32)
    };
    let scale = 1.0 / ((width / heads) as f64).sqrt();
    let (q_heads, k_t, v_heads) = (split(q, n)?, split(k, m)?.t()?, split(v, m)?);
    let rows = (scores / (b * heads * m)).clamp(1, n);
    let mut blocks = Vec::new();
    for first in (0..n).step_by(rows) {
        let rows = rows.min(n - first);
        let scores = (q_heads.narrow(2, first, rows)?.contiguous()?.matmul(&k_t)? * scale)?; // (B, H, rows, M)
        let scores = if causal {
            let seen = |i: usize| i % m <= first + i / m;
            let hidden: Vec<f32> =
                (0..rows * m).map(|i| if seen(i) { 0.0 } else { f32::NEG_INFINITY }).collect();
            scores.broadcast_add(&Tensor::from_vec(hidden, (rows, m), q.device())?)?
        } else {
            scores
        };
        blocks.push(candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v_heads)?);
    }
    let y = if blocks.len() == 1 { blocks.remove(0) } else { Tensor::cat(&blocks, 2)? };
    y.transpose(1, 2)?.reshape((b, n, width))?.to_dtype(q.dtype())
}

/// Scores that the composite form holds at once: 256 MiB of f32.
const SCORES: usize = 1 << 26;

struct AttentionOp {
    heads: usize,
    causal: bool,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    saved: Saved,
}

/// Queries whose scores are held at once, backward.
const MR: usize = 128;

impl AttentionOp {
    /// softmax(scale · q·kᵀ) for the queries `first..first + rows` of one head, into `scores` (rows, m).
    fn weights(&self, q: Matrix, k: Matrix, first: usize, size: [usize; 3], scores: &mut [f32]) {
        let [rows, m, d] = size;
        let scale = 1.0 / (d as f32).sqrt();
        Product { m: rows, n: m, k: d, scale, add: false, parallelism: Parallelism::None }.write(
            q,
            Matrix { row: k.column, column: k.row, ..k },
            scores,
            m,
        );
        softmax_rows(&mut scores[..rows * m], m, self.causal.then_some(first));
    }

    /// Multiply-adds of a forward pass; the exponential of a score is as much as 16.
    fn work(&self, [b, n, m, width]: [usize; 4]) -> usize {
        b * n * m * (2 * width + 16 * self.heads)
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32], size: [usize; 4]) -> Vec<f32> {
        let [b, n, m, width] = size;
        let d = width / self.heads;
        if b * n * m == 0 {
            return vec![0.0; b * n * width];
        }
        // With few heads a head's queries are parted, so that every thread has some.
        let threads = cpu::threads_for(self.work(size));
        let wanted = threads.div_ceil(b * self.heads).min(n.div_ceil(microkernel::MR));
        let parts = n.div_ceil(QUERIES).max(wanted);
        let each = n.div_ceil(parts).next_multiple_of(microkernel::MR);
        let mut y = vec![0f32; b * n * width];
        let out = Shared::new(y.as_mut_ptr());
        cpu::for_each_on(threads, b * self.heads * parts, |task| {
            let (sample, head, first) =
                (task / parts / self.heads, task / parts % self.heads, task % parts * each);
            let queries = first.min(n)..(first + each).min(n);
            if queries.is_empty() {
                return;
            }
            let part = |x, row: usize| head_of(x, row, head * d, width).values;
            let at = sample * n * width + head * d;
            let head = Head {
                q: part(q, sample * n),
                k: part(k, sample * m),
                v: part(v, sample * m),
                keys: m,
                d,
                width,
                causal: self.causal,
            };
            // SAFETY: each task writes the rows of its queries in the columns of its head.
            unsafe { head.attend(queries, out.get().add(at)) }
        });
        y
    }

    /// Gradients of q, k and v; the weights are computed again, block by block.
    fn backward(&self, q: &[f32], k: &[f32], v: &[f32], grad: &[f32], size: [usize; 4]) -> [Vec<f32>; 3] {
        let [b, n, m, width] = size;
        let d = width / self.heads;
        let threads = cpu::threads_for(3 * self.work(size));
        let heads = cpu::map_indices_on(threads, b * self.heads, |i| {
            let (sample, column) = (i / self.heads, i % self.heads * d);
            let part = |x, row: usize| head_of(x, row, column, width);
            let [q, grad] = [q, grad].map(|x| part(x, sample * n));
            let [k, v] = [k, v].map(|x| part(x, sample * m));
            self.backward_head([q, k, v, grad], [n, m, d])
        });
        let join = |which: usize, rows: usize| {
            let mut whole = vec![0f32; b * rows * width];
            cpu::for_chunks(&mut whole, rows * width, |sample, whole| {
                for (head, parts) in heads[sample * self.heads..][..self.heads].iter().enumerate() {
                    let rows = whole.chunks_exact_mut(width).zip(parts[which].chunks_exact(d));
                    rows.for_each(|(row, part)| row[head * d..][..d].copy_from_slice(part));
                }
            });
            whole
        };
        [join(0, n), join(1, m), join(2, m)]
    }

    /// The same for one head, each gradient as (rows, d).
    fn backward_head(&self, [q, k, v, grad]: [Matrix; 4], [n, m, d]: [usize; 3]) -> [Vec<f32>; 3] {
        let scale = 1.0 / (d as f32).sqrt();
        let [mut grad_q, mut grad_k, mut grad_v] = [n, m, m].map(|rows| vec![0f32; rows * d]);
        let [mut p, mut dp] = [(); 2].map(|()| vec![0f32; MR.min(n) * m]);
        let product = |m, n, k, scale, add| Product { m, n, k, scale, add, parallelism: Parallelism::None };
        let v_t = Matrix { row: v.column, column: v.row, ..v };
        for first in (0..n).step_by(MR) {
            let rows = MR.min(n - first);
            let [q, g] = [q, grad].map(|x| Matrix { values: &x.values[first * x.row..], ..x });
            self.weights(q, k, first, [rows, m, d], &mut p);
            product(m, d, rows, 1.0, true).write(Matrix { values: &p, row: 1, column: m }, g, &mut grad_v, d);
            product(rows, m, d, 1.0, false).write(g, v_t, &mut dp, m);
            softmax_slope(&p[..rows * m], m, &mut dp);
            let ds = Matrix { values: &dp, row: m, column: 1 };
            product(rows, d, m, scale, false).write(ds, k, &mut grad_q[first * d..], d);
            let ds_t = Matrix { row: 1, column: m, ..ds };
            product(m, d, rows, scale, true).write(ds_t, q, &mut grad_k, d);
        }
        [grad_q, grad_k, grad_v]
    }
}

/// Queries of one task: few enough that their sums stay in the cache, many enough to pay for packing the keys.
const QUERIES: usize = 516;
/// Most keys whose scores are held at once: as many as a packed row has elem.
const KEYS: usize = microkernel::DEPTH;

/// One head of one sample; rows lie `width` apart.
struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    keys: usize,
    d: usize,
    width: usize,
    causal: bool,
}

/// Running softmax state of a block of queries (Dao et al. 2022, FlashAttention, arXiv 2205.14135).
struct Gathered {
    /// The largest score of each query.
    top: Vec<f32>,
    /// Σ exp(score − top) of each query.
    total: Vec<f32>,
    /// Σ exp(score − top) · v, (queries, d).
    sums: Vec<f32>,
}

/// Some rows of [`Gathered`].
struct GatheredRows<'a> {
    top: &'a mut [f32],
    total: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Head<'_> {
    /// Attention of `queries`, written to rows `width` apart.
    ///
    /// # Safety
    /// `y` has `d` values to write in each of the rows of `queries`.
    unsafe fn attend(&self, queries: Range<usize>, y: *mut f32) {
        let Self { d, width, .. } = *self;
        let n = queries.len();
        let (depths, columns) = (d.div_ceil(microkernel::DEPTH), d.div_ceil(microkernel::NR));
        let seen = if self.causal { queries.end } else { self.keys };
        let each = seen.div_ceil(seen.div_ceil(KEYS)).next_multiple_of(microkernel::NR);
        // No more than this head needs: for few and short keys clearing a whole block takes longer than the products.
        let key_panels = each / microkernel::NR;
        let panel = microkernel::NR * d.min(microkernel::DEPTH).max(each);
        let keys = ContiguousDepth::new(Weight::F32(self.k), width, self.keys, d);
        let values = StridedDepth::new(Weight::F32(self.v), width, d, self.keys);
        let q = ContiguousDepth::new(Weight::F32(self.q), width, queries.end, d);
        let mut packed_k = vec![0u32; depths * key_panels * panel];
        let mut packed_v = vec![0u32; columns * panel];
        let mut left = vec![0u32; depths * microkernel::MR * microkernel::STRIDE];
        let mut scores = vec![0f32; microkernel::MR * microkernel::STRIDE];
        let mut gathered =
            Gathered { top: vec![f32::NEG_INFINITY; n], total: vec![0.0; n], sums: vec![0.0; n * d] };
        for first in (0..seen).step_by(each) {
            let block = first..(first + each).min(seen);
            for (i, from) in (0..d).step_by(microkernel::DEPTH).enumerate() {
                let depth = from..(from + microkernel::DEPTH).min(d);
                keys.pack_columns(
                    ElemType::F32,
                    block.clone(),
                    depth,
                    &mut packed_k[i * key_panels * panel..],
                    panel,
                );
            }
            values.pack_columns(ElemType::F32, 0..d, block.clone(), &mut packed_v, panel);
            for row in (0..n).step_by(microkernel::MR) {
                let rows = row..(row + microkernel::MR).min(n);
                let height = rows.len();
                for (i, from) in (0..d).step_by(microkernel::DEPTH).enumerate() {
                    let depth = from..(from + microkernel::DEPTH).min(d);
                    let count = depth.len();
                    let left = &mut left[i * microkernel::MR * microkernel::STRIDE..];
                    let absolute = queries.start + rows.start..queries.start + rows.end;
                    q.pack_rows(ElemType::F32, absolute, depth, left, microkernel::STRIDE);
                    for (j, from) in (0..block.len()).step_by(microkernel::NR).enumerate() {
                        let right = packed_k[(i * key_panels + j) * panel..].as_ptr();
                        let to = scores[from..].as_mut_ptr();
                        let width = microkernel::NR.min(block.len() - from);
                        // SAFETY: both are packed, and a row of scores has room for all keys.
                        unsafe {
                            microkernel::compute(
                                ElemType::F32,
                                &Tile {
                                    rows: height,
                                    columns: width,
                                    depth: count,
                                    left: left.as_ptr(),
                                    step: microkernel::STRIDE,
                                    right,
                                    right_step: microkernel::NR,
                                    out: to,
                                    row: microkernel::STRIDE,
                                    add: i > 0,
                                },
                            )
                        }
                    }
                }
                let causal = self.causal.then_some([queries.start + row + 1, first]);
                let now = &mut gathered;
                let so_far = GatheredRows {
                    top: &mut now.top[rows.clone()],
                    total: &mut now.total[rows.clone()],
                    sums: &mut now.sums[row * d..][..height * d],
                };
                let scale = 1.0 / (d as f32).sqrt();
                weigh(&mut scores, block.len(), causal, scale, so_far);
                for (j, from) in (0..d).step_by(microkernel::NR).enumerate() {
                    let right = packed_v[j * panel..].as_ptr();
                    let to = gathered.sums[row * d + from..].as_mut_ptr();
                    let width = microkernel::NR.min(d - from);
                    // SAFETY: both are packed, and a row of sums has `d` values.
                    unsafe {
                        microkernel::compute(
                            ElemType::F32,
                            &Tile {
                                rows: height,
                                columns: width,
                                depth: block.len(),
                                left: scores.as_ptr().cast(),
                                step: microkernel::STRIDE,
                                right,
                                right_step: microkernel::NR,
                                out: to,
                                row: d,
                                add: first > 0,
                            },
                        )
                    }
                }
            }
        }
        for (i, (sums, total)) in gathered.sums.chunks_exact(d).zip(&gathered.total).enumerate() {
            // SAFETY: the caller's promise.
            let y = unsafe { std::slice::from_raw_parts_mut(y.add((queries.start + i) * width), d) };
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum / total);
        }
    }
}

cpu::vectorised! {
    /// Turns scores into exp(scale · score − top) and brings what was gathered before to the new top. With `causal`
    /// [seen, first], row i sees the keys before seen + i, and the first of these keys is `first`.
    fn weigh(
        scores: &mut [f32],
        keys: usize,
        causal: Option<[usize; 2]>,
        scale: f32,
        gathered: GatheredRows,
    ) {
        let GatheredRows { top, total, sums } = gathered;
        let d = sums.len() / top.len();
        let rows = scores.chunks_exact_mut(microkernel::STRIDE).zip(top).zip(total).zip(sums.chunks_exact_mut(d));
        for (i, (((row, top), total), sums)) in rows.enumerate() {
            let seen = causal.map_or(keys, |[seen, first]| (seen + i).saturating_sub(first).min(keys));
            let (row, unseen) = row[..keys].split_at_mut(seen);
            unseen.fill(0.0);
            if row.is_empty() {
                continue;
            }
            let highest = cpu::lanes_max(row) * scale;
            if highest > *top {
                // 0 where nothing was gathered yet.
                let shrink = cpu::exp(*top - highest) * f32::from(*top > f32::NEG_INFINITY);
                *total *= shrink;
                sums.iter_mut().for_each(|sum| *sum *= shrink);
                *top = highest;
            }
            let top = *top;
            *total += cpu::lanes_map_sum(row, |score| cpu::exp(score * scale - top));
        }
    }
}

cpu::vectorised! {
    /// Softmax of each row of `m` scores; with `causal`, row i sees the first `causal + i + 1`.
    fn softmax_rows(scores: &mut [f32], m: usize, causal: Option<usize>) {
        for (i, row) in scores.chunks_exact_mut(m).enumerate() {
            let (row, unseen) = row.split_at_mut(causal.map_or(m, |first| first + i + 1));
            unseen.fill(0.0);
            let top = row.iter().copied().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b });
            let inverse = 1.0 / cpu::lanes_map_sum(row, |score| cpu::exp(score - top));
            row.iter_mut().for_each(|score| *score *= inverse);
        }
    }
}

cpu::vectorised! {
    /// dL/dscore = p · (dL/dp − Σ p · dL/dp), in place of dL/dp.
    fn softmax_slope(p: &[f32], m: usize, dp: &mut [f32]) {
        for (p, dp) in p.chunks_exact(m).zip(dp.chunks_exact_mut(m)) {
            let dot = cpu::lanes_dot(p, dp, 0.0);
            for (dp, p) in dp.iter_mut().zip(p) {
                *dp = p * (*dp - dot);
            }
        }
    }
}

/// One head's columns of a (rows, width) matrix, from `row` on.
fn head_of(x: &[f32], row: usize, column: usize, width: usize) -> Matrix<'_> {
    Matrix { values: &x[row * width + column..], row: width, column: 1 }
}

fn sizes(q: &Shape, k: &Shape) -> Result<[usize; 4]> {
    let (b, n, width) = q.dims3()?;
    let (_, m, _) = k.dims3()?;
    Ok([b, n, m, width])
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let size = sizes(q_layout.shape(), k_layout.shape())?;
        let [b, _, m, width] = size;
        if k_layout.dims() != [b, m, width] || v_layout.dims() != [b, m, width] {
            candle_core::bail!("attention of {q_layout:?} over {k_layout:?} and {v_layout:?}");
        }
        let y = self.forward(
            cpu::operand(q, q_layout)?,
            cpu::operand(k, k_layout)?,
            cpu::operand(v, v_layout)?,
            size,
        );
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let (y, scores) = gpu::attention(inputs, self.heads, self.causal)?;
        self.saved.keep(scores)?;
        Ok((y, q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let size = sizes(q.shape(), k.shape())?;
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            let saved = [_y, self.saved.get()?, &grad];
            let grads = gpu::attention_grad([q, k, v], saved, self.heads, self.causal)?;
            let [grad_q, grad_k, grad_v] = grads.map(Some);
            return Ok((grad_q, grad_k, grad_v));
        }
        let [grad_q, grad_k, grad_v] = cpu::with_values(q, |q| {
            cpu::with_values(k, |k| {
                cpu::with_values(v, |v| cpu::with_values(&grad, |grad| self.backward(q, k, v, grad, size)))
            })
        })????;
        let wanted = |input: &Tensor, values: Vec<f32>| {
            input.track_op().then(|| Tensor::from_vec(values, input.shape(), input.device())).transpose()
        };
        Ok((wanted(q, grad_q)?, wanted(k, grad_k)?, wanted(v, grad_v)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::diffusion::noise::normal;

    #[test]
    fn both_forms_agree_however_the_queries_are_parted() -> Result<()> {
        let draw = |i: u64, n: usize| normal(3, i, (2, n, 12), &Device::Cpu);
        let (q, k, v) = (draw(0, 7)?, draw(1, 7)?, draw(2, 7)?);
        for causal in [false, true] {
            let whole = attention(&q, &k, &v, 3, causal)?;
            for scores in [1, 100, 200, 1 << 20] {
                let parts = composite(&q, &k, &v, 3, causal, scores)?;
                let apart = (&whole - parts)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(apart < 1e-6, "{scores} scores, causal {causal}: {apart}");
            }
        }
        Ok(())
    }

    #[test]
    fn many_queries_and_keys_and_wide_heads_agree_with_the_plain_form() -> Result<()> {
        for (n, m, heads, d, causal) in
            [(530, 601, 2, 5, false), (300, 300, 1, 9, true), (13, 40, 1, 300, false)]
        {
            let draw = |i: u64, n: usize| normal(5, i, (2, n, heads * d), &Device::Cpu)? * 2.0;
            let (q, k, v) = (draw(0, n)?, draw(1, m)?, draw(2, m)?);
            let plain = composite(&q, &k, &v, heads, causal, SCORES)?;
            let apart =
                (attention(&q, &k, &v, heads, causal)? - plain)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(apart < 1e-5, "{n} queries, {m} keys, {heads} heads of {d}: {apart}");
        }
        Ok(())
    }

    #[test]
    fn softmax_of_half_precision_is_computed_in_f32() -> Result<()> {
        // q·k is 40² · 64 = 102,400 before the scale, beyond the largest f16.
        let q = Tensor::full(40f32, (1, 4, 64), &Device::Cpu)?.to_dtype(DType::F16)?;
        let v = normal(1, 0, (1, 4, 64), &Device::Cpu)?.to_dtype(DType::F16)?;
        let y = attention(&q, &q, &v, 1, false)?.to_dtype(DType::F32)?;
        let mean = v.to_dtype(DType::F32)?.mean_keepdim(1)?;
        let apart = y.broadcast_sub(&mean)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(apart < 2e-3, "equal scores average the values: {apart}");
        Ok(())
    }
}
