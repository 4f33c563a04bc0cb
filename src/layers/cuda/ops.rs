//! Which kernels an operation runs, on what memory, in which sizes.

use candle_core::{DType, Result, bail};

use super::call::{Arg, Backend, Call, Module, Operand, small, suffix, vector};
use crate::layers::Activation;

/// Gradients of weight and bias where they are wanted.
type Trained<T> = Option<[T; 2]>;

/// Threads of a block where each has values of its own.
const THREADS: usize = 256;

/// The kernel `name` for the type of `like`, `v` values at once.
fn name(name: &str, like: Operand, v: usize) -> Result<String> {
    Ok(format!("{name}_{}{}", suffix(like.dtype)?, if v > 1 { "_v" } else { "" }))
}

/// Runs a kernel with a thread for each `v` of `count` values.
fn flat<B: Backend>(
    b: &B,
    module: Module,
    kernel: String,
    count: usize,
    v: usize,
    args: Vec<Arg>,
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let grid = [count.div_ceil(v).div_ceil(THREADS), 1, 1];
    b.run(Call::new(module, kernel, grid, [THREADS as u32, 1, 1], args)?)
}

fn pointer(operand: Operand) -> Arg {
    Arg::Pointer(operand.address)
}

fn count(count: usize) -> Arg {
    Arg::U64(count as u64)
}

/// Whole warps for a row of `values`, at most [`THREADS`].
fn warps(values: usize) -> u32 {
    (values.next_multiple_of(32).clamp(32, THREADS)) as u32
}

/// Numbered as in `pointwise.cu`.
fn kind(activation: Activation) -> Arg {
    Arg::U32(match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::QuickGelu => 3,
    })
}

pub(super) fn activate<B: Backend>(b: &B, activation: Activation, x: Operand, n: usize) -> Result<B::Buffer> {
    let out = b.alloc(x.dtype, n)?;
    let y = b.operand(&out)?;
    let v = vector(&[x, y], &[]); // the last threads count singly
    let args = vec![pointer(x), pointer(y), count(n), kind(activation)];
    flat(b, Module::Pointwise, name("activate", x, v)?, n, v, args)?;
    Ok(out)
}

pub(super) fn activate_grad<B: Backend>(
    b: &B,
    activation: Activation,
    [x, grad]: [Operand; 2],
    n: usize,
) -> Result<B::Buffer> {
    let out = b.alloc(x.dtype, n)?;
    let y = b.operand(&out)?;
    let v = vector(&[x, grad, y], &[]);
    let args = vec![pointer(x), pointer(grad), pointer(y), count(n), kind(activation)];
    flat(b, Module::Pointwise, name("activate_grad", x, v)?, n, v, args)?;
    Ok(out)
}

/// `x` (rows, 2·width) → (rows, width).
pub(super) fn geglu<B: Backend>(b: &B, x: Operand, rows: usize, width: usize) -> Result<B::Buffer> {
    let n = rows * width;
    let out = b.alloc(x.dtype, n)?;
    let y = b.operand(&out)?;
    let v = vector(&[x, y], &[width]);
    let args = vec![pointer(x), pointer(y), count(n), small(width)?];
    flat(b, Module::Pointwise, name("geglu", x, v)?, n, v, args)?;
    Ok(out)
}

/// The gradient of `x`.
pub(super) fn geglu_grad<B: Backend>(
    b: &B,
    [x, grad]: [Operand; 2],
    rows: usize,
    width: usize,
) -> Result<B::Buffer> {
    let n = rows * width;
    let out = b.alloc(x.dtype, 2 * n)?;
    let y = b.operand(&out)?;
    let v = vector(&[x, grad, y], &[width]);
    let args = vec![pointer(x), pointer(grad), pointer(y), count(n), small(width)?];
    flat(b, Module::Pointwise, name("geglu_grad", x, v)?, n, v, args)?;
    Ok(out)
}

/// Which bias belongs to the `i`-th value: `i / inner % channels`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Channels {
    pub(super) channels: usize,
    pub(super) inner: usize,
}

/// Writes x + bias (+ residual) to `out`, which may be `x`.
pub(super) fn add_bias<B: Backend>(
    b: &B,
    [x, bias, out]: [Operand; 3],
    residual: Option<Operand>,
    n: usize,
    Channels { channels, inner }: Channels,
) -> Result<()> {
    let run = if inner == 1 { channels } else { inner };
    let operands: Vec<Operand> = [x, bias, out].into_iter().chain(residual).collect();
    let v = vector(&operands, &[run, n]);
    let residual = residual.map_or(Arg::Pointer(0), pointer);
    let args =
        vec![pointer(x), pointer(bias), residual, pointer(out), count(n), small(channels)?, small(inner)?];
    flat(b, Module::Pointwise, name("add_bias", x, v)?, n, v, args)
}

/// Sums over rows of `x` (rows, columns) → (columns).
pub(super) fn column_sums<B: Backend>(b: &B, x: Operand, rows: usize, columns: usize) -> Result<B::Buffer> {
    let out = b.alloc(x.dtype, columns)?;
    let y = b.operand(&out)?;
    let splits = (rows / 128).clamp(1, 32);
    let partial = b.alloc(DType::F32, splits * columns)?;
    let sums = b.operand(&partial)?;
    if columns > 0 {
        columns_call(b, "column_sums", [x, sums], x, [rows, columns, splits])?;
        columns_call(b, "sum_splits", [sums, y], x, [splits, columns, 1])?;
    }
    Ok(out)
}

fn columns_call<B: Backend>(
    b: &B,
    kernel: &str,
    [from, to]: [Operand; 2],
    like: Operand,
    [rows, columns, splits]: [usize; 3],
) -> Result<()> {
    let args = vec![pointer(from), pointer(to), small(rows)?, small(columns)?];
    let grid = [columns.div_ceil(32), splits, 1];
    b.run(Call::new(Module::Pointwise, name(kernel, like, 1)?, grid, [32, 8, 1], args)?)
}

/// Sums over the pixels of `x` (rows, inner), and where `batch` is more than 1 over the samples (batch, rows / batch):
/// → (rows / batch), or (rows) where `over_batch` is not wanted.
pub(super) fn channel_sums<B: Backend>(
    b: &B,
    x: Operand,
    [batch, channels, inner]: [usize; 3],
    over_batch: bool,
) -> Result<B::Buffer> {
    let rows = batch * channels;
    let partial = b.alloc(DType::F32, rows)?;
    let sums = b.operand(&partial)?;
    let out = b.alloc(x.dtype, if over_batch { channels } else { rows })?;
    let y = b.operand(&out)?;
    if rows > 0 {
        let args = vec![pointer(x), pointer(sums), small(inner)?];
        let block = [warps(inner.div_ceil(4)), 1, 1];
        b.run(Call::new(Module::Pointwise, name("row_sums", x, 1)?, [rows, 1, 1], block, args)?)?;
        let size = if over_batch { [batch, channels, 1] } else { [1, rows, 1] };
        columns_call(b, "sum_splits", [sums, y], x, size)?;
    }
    Ok(out)
}

/// Each pixel of `x` (planes, h, w) becomes four.
pub(super) fn upsample<B: Backend>(b: &B, x: Operand, [planes, h, w]: [usize; 3]) -> Result<B::Buffer> {
    let n = planes * h * w;
    let out = b.alloc(x.dtype, 4 * n)?;
    let args = vec![pointer(x), pointer(b.operand(&out)?), count(n), small(w)?];
    flat(b, Module::Pointwise, name("upsample", x, 1)?, n, 1, args)?;
    Ok(out)
}

/// The gradient of the (planes, h, w) that were upsampled.
pub(super) fn upsample_grad<B: Backend>(
    b: &B,
    grad: Operand,
    [planes, h, w]: [usize; 3],
) -> Result<B::Buffer> {
    if !grad.address.is_multiple_of(2 * grad.dtype.size_in_bytes() as u64) {
        bail!("a gradient that is not aligned");
    }
    let n = planes * h * w;
    let out = b.alloc(grad.dtype, n)?;
    let args = vec![pointer(grad), pointer(b.operand(&out)?), count(n), small(w)?];
    flat(b, Module::Pointwise, name("upsample_grad", grad, 1)?, n, 1, args)?;
    Ok(out)
}

/// Each matrix of `x` (batch, rows, columns) turned over.
pub(super) fn transpose<B: Backend>(
    b: &B,
    x: Operand,
    [batch, rows, columns]: [usize; 3],
) -> Result<B::Buffer> {
    let out = b.alloc(x.dtype, batch * rows * columns)?;
    if batch * rows * columns > 0 {
        let args = vec![pointer(x), pointer(b.operand(&out)?), small(rows)?, small(columns)?];
        let grid = [columns.div_ceil(32), rows.div_ceil(32), batch];
        b.run(Call::new(Module::Pointwise, name("transpose", x, 1)?, grid, [32, 8, 1], args)?)?;
    }
    Ok(out)
}

/// Sizes of a GroupNorm of (batch, channels, inner).
#[derive(Clone, Copy, Debug)]
pub(in crate::layers) struct GroupSizes {
    pub(in crate::layers) batch: usize,
    pub(in crate::layers) channels: usize,
    pub(in crate::layers) groups: usize,
    /// Pixels of a channel.
    pub(in crate::layers) inner: usize,
    pub(in crate::layers) eps: f32,
    pub(in crate::layers) silu: bool,
}

/// Values whose mean one block of `group_partials` computes.
const CHUNK: usize = 256 * 32;

impl GroupSizes {
    fn rows(&self) -> usize {
        self.batch * self.groups
    }

    fn length(&self) -> usize {
        self.channels / self.groups * self.inner
    }

    fn count(&self) -> usize {
        self.batch * self.channels * self.inner
    }
}

/// The normalised image, and mean and 1/std of each group for the backward pass, (batch, groups, 2) in f32.
pub(super) fn group_norm<B: Backend>(
    b: &B,
    s: GroupSizes,
    [x, weight, bias]: [Operand; 3],
) -> Result<(B::Buffer, B::Buffer)> {
    let (rows, length, n) = (s.rows(), s.length(), s.count());
    let chunks = length.div_ceil(CHUNK);
    let (out, stats) = (b.alloc(x.dtype, n)?, b.alloc(DType::F32, 2 * rows)?);
    let partial = b.alloc(DType::F32, 2 * rows * chunks)?;
    let (y, stats_at, partial_at) = (b.operand(&out)?, b.operand(&stats)?, b.operand(&partial)?);
    if n > 0 {
        let v = vector(&[x, y], &[s.inner]);
        let args = vec![pointer(x), pointer(partial_at), small(length)?];
        let kernel = name("group_partials", x, v)?;
        b.run(Call::new(Module::Norm, kernel, [chunks, rows, 1], [THREADS as u32, 1, 1], args)?)?;
        let args = vec![
            pointer(partial_at),
            pointer(stats_at),
            small(rows)?,
            small(length)?,
            small(chunks)?,
            Arg::F32(s.eps),
        ];
        flat(b, Module::Norm, "group_stats_f32".into(), 32 * rows, 1, args)?;
        let mut args = [x, weight, bias, stats_at, y].map(pointer).to_vec();
        args.extend([count(n), small(length)?, small(s.channels)?, small(s.inner)?, Arg::U32(s.silu.into())]);
        flat(b, Module::Norm, name("group_apply", x, v)?, n, v, args)?;
    }
    Ok((out, stats))
}

/// Gradients of x, and where `trained` of weight and bias.
pub(super) fn group_norm_grad<B: Backend>(
    b: &B,
    s: GroupSizes,
    [x, weight, bias, stats, grad]: [Operand; 5],
    trained: bool,
) -> Result<(B::Buffer, Trained<B::Buffer>)> {
    let (rows, length, n) = (s.rows(), s.length(), s.count());
    let out = b.alloc(x.dtype, n)?;
    let sums = b.alloc(DType::F32, 2 * s.batch * s.channels)?;
    let means = b.alloc(DType::F32, 2 * rows)?;
    let (y, sums_at, means_at) = (b.operand(&out)?, b.operand(&sums)?, b.operand(&means)?);
    let (per_group, silu) = (s.channels / s.groups, Arg::U32(s.silu.into()));
    if n > 0 {
        let mut args = [x, weight, bias, stats, grad, sums_at].map(pointer).to_vec();
        args.extend([small(s.channels)?, small(per_group)?, small(s.inner)?, silu]);
        let block = [warps(s.inner.div_ceil(4)), 1, 1];
        let grid = [s.batch * s.channels, 1, 1];
        b.run(Call::new(Module::Norm, name("group_sums", x, 1)?, grid, block, args)?)?;
        let mut args = [sums_at, weight, means_at].map(pointer).to_vec();
        args.extend([small(rows)?, small(length)?, small(s.channels)?, small(per_group)?]);
        flat(b, Module::Norm, name("group_means", x, 1)?, 32 * rows, 1, args)?;
        let v = vector(&[x, grad, y], &[s.inner]);
        let mut args = [x, weight, bias, stats, means_at, grad, y].map(pointer).to_vec();
        args.extend([count(n), small(length)?, small(s.channels)?, small(s.inner)?, silu]);
        flat(b, Module::Norm, name("group_grad", x, v)?, n, v, args)?;
    }
    if !trained {
        return Ok((out, None));
    }
    let [grad_w, grad_b] = [b.alloc(x.dtype, s.channels)?, b.alloc(x.dtype, s.channels)?];
    let mut args = [sums_at, b.operand(&grad_w)?, b.operand(&grad_b)?].map(pointer).to_vec();
    args.extend([small(s.batch)?, small(s.channels)?]);
    flat(b, Module::Norm, name("group_weight_grad", x, 1)?, s.channels, 1, args)?;
    Ok((out, Some([grad_w, grad_b])))
}

/// Sizes of a LayerNorm: `sets` times `per_set` rows, each set with its own weight and bias (sets, width).
#[derive(Clone, Copy, Debug)]
pub(in crate::layers) struct LayerSizes {
    pub(in crate::layers) sets: usize,
    pub(in crate::layers) per_set: usize,
    pub(in crate::layers) width: usize,
    pub(in crate::layers) eps: f32,
    /// Whether values are multiplied by 1 + weight, a modulation, and not by the weight.
    pub(in crate::layers) modulation: bool,
}

impl LayerSizes {
    fn rows(&self) -> usize {
        self.sets * self.per_set
    }

    fn offset(&self) -> Arg {
        Arg::F32(if self.modulation { 1.0 } else { 0.0 })
    }
}

/// The normalised rows, and mean and 1/std of each for the backward pass, (rows, 2) in f32.
pub(super) fn layer_norm<B: Backend>(
    b: &B,
    s: LayerSizes,
    [x, weight, bias]: [Operand; 3],
) -> Result<(B::Buffer, B::Buffer)> {
    let out = b.alloc(x.dtype, s.rows() * s.width)?;
    let stats = b.alloc(DType::F32, 2 * s.rows())?;
    let y = b.operand(&out)?;
    if s.rows() * s.width > 0 {
        let v = vector(&[x, weight, bias, y], &[s.width]);
        let mut args = [x, weight, bias, y, b.operand(&stats)?].map(pointer).to_vec();
        args.extend([small(s.width)?, small(s.per_set)?, s.offset(), Arg::F32(s.eps)]);
        let block = [warps(s.width.div_ceil(v)), 1, 1];
        b.run(Call::new(Module::Norm, name("layer_norm", x, v)?, [s.rows(), 1, 1], block, args)?)?;
    }
    Ok((out, stats))
}

/// Gradients of x, and where `trained` of weight and bias.
pub(super) fn layer_norm_grad<B: Backend>(
    b: &B,
    s: LayerSizes,
    [x, weight, stats, grad]: [Operand; 4],
    trained: bool,
) -> Result<(B::Buffer, Trained<B::Buffer>)> {
    let out = b.alloc(x.dtype, s.rows() * s.width)?;
    let y = b.operand(&out)?;
    let empty = s.rows() * s.width == 0;
    if !empty {
        let v = vector(&[x, weight, grad, y], &[s.width]);
        let mut args = [x, weight, stats, grad, y].map(pointer).to_vec();
        args.extend([small(s.width)?, small(s.per_set)?, s.offset()]);
        let block = [warps(s.width.div_ceil(v)), 1, 1];
        b.run(Call::new(Module::Norm, name("layer_norm_grad", x, v)?, [s.rows(), 1, 1], block, args)?)?;
    }
    if !trained {
        return Ok((out, None));
    }
    let values = s.sets * s.width;
    let splits = (s.per_set / 64).clamp(1, 64);
    let partial = b.alloc(DType::F32, 2 * values * splits)?;
    let [grad_w, grad_b] = [b.alloc(x.dtype, values)?, b.alloc(x.dtype, values)?];
    if values > 0 {
        let sums = b.operand(&partial)?;
        let mut args = [x, stats, grad, sums].map(pointer).to_vec();
        args.extend([small(s.width)?, small(s.per_set)?]);
        let grid = [s.width.div_ceil(32), splits, s.sets];
        b.run(Call::new(Module::Norm, name("layer_norm_sums", x, 1)?, grid, [32, 8, 1], args)?)?;
        let mut args = [sums, b.operand(&grad_w)?, b.operand(&grad_b)?].map(pointer).to_vec();
        args.extend([small(s.width)?, small(splits)?, small(s.sets)?]);
        flat(b, Module::Norm, name("layer_weight_grad", x, 1)?, 2 * values, 1, args)?;
    }
    Ok((out, Some([grad_w, grad_b])))
}

/// Queries, keys or values: (samples, rows, heads·d) with the distances between samples and between rows, in values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strided {
    pub(super) at: Operand,
    pub(super) sample: usize,
    pub(super) row: usize,
}

/// Sizes of attention of `n` queries to `m` keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionSizes {
    pub(super) batch: usize,
    pub(super) n: usize,
    pub(super) m: usize,
    pub(super) heads: usize,
    /// Values of a head, at most [`WIDEST_HEAD`].
    pub(super) d: usize,
    pub(super) causal: bool,
}

/// The widest head that the attention kernels take.
pub(super) const WIDEST_HEAD: usize = 128;

/// Queries or keys of a block.
const ROWS: usize = 64;

impl AttentionSizes {
    fn call(&self, kernel: &str, qkv: [Strided; 3], grad: Option<Operand>, rest: &[Operand]) -> Result<Call> {
        let dtype = qkv[0].at.dtype;
        if !(1..=WIDEST_HEAD).contains(&self.d) || self.m == 0 || qkv.iter().any(|x| x.at.dtype != dtype) {
            bail!("no attention kernel for {self:?} of {dtype:?}");
        }
        let padded = if self.d <= 64 { 64 } else { 128 };
        let mut args: Vec<Arg> = qkv.iter().map(|x| pointer(x.at)).collect();
        args.extend(qkv.iter().flat_map(|x| [count(x.sample), count(x.row)]));
        args.extend([small(self.n)?, small(self.m)?, small(self.d)?, Arg::U32(self.causal.into())]);
        let threads = if dtype == DType::F32 {
            256
        } else {
            let strides = qkv.iter().flat_map(|x| [x.sample, x.row]);
            let runs: Vec<usize> = strides.chain([self.d]).collect();
            let operands: Vec<Operand> = qkv.iter().map(|x| x.at).chain(grad).collect();
            args.push(Arg::U32((vector(&operands, &runs) > 1).into()));
            128
        };
        args.extend(grad.into_iter().chain(rest.iter().copied()).map(pointer));
        let rows = if kernel == "attention_grad_kv" { self.m } else { self.n };
        let kernel = format!("{kernel}_{}_d{padded}", suffix(dtype)?);
        Call::new(
            Module::Attention,
            kernel,
            [rows.div_ceil(ROWS), self.heads, self.batch],
            [threads, 1, 1],
            args,
        )
    }

    fn values(&self, rows: usize) -> usize {
        self.batch * rows * self.heads * self.d
    }
}

/// softmax(q·kᵀ/√d)·v, and for the backward pass log2 Σ exp2 of the scores, (batch, heads, n) in f32.
pub(super) fn attention<B: Backend>(
    b: &B,
    s: AttentionSizes,
    qkv: [Strided; 3],
) -> Result<(B::Buffer, B::Buffer)> {
    let y = b.alloc(qkv[0].at.dtype, s.values(s.n))?;
    let lse = b.alloc(DType::F32, s.batch * s.heads * s.n)?;
    if s.values(s.n) > 0 {
        b.run(s.call("attention", qkv, None, &[b.operand(&y)?, b.operand(&lse)?])?)?;
    }
    Ok((y, lse))
}

/// Gradients of q, k and v.
pub(super) fn attention_grad<B: Backend>(
    b: &B,
    s: AttentionSizes,
    qkv: [Strided; 3],
    [y, lse, grad]: [Operand; 3],
) -> Result<[B::Buffer; 3]> {
    let dtype = y.dtype;
    let [out_q, out_k, out_v] =
        [b.alloc(dtype, s.values(s.n))?, b.alloc(dtype, s.values(s.m))?, b.alloc(dtype, s.values(s.m))?];
    let delta = b.alloc(DType::F32, s.batch * s.heads * s.n)?;
    if s.values(s.n) == 0 {
        bail!("no gradient of attention without queries");
    }
    let delta_at = b.operand(&delta)?;
    let mut args = [y, grad, delta_at].map(pointer).to_vec();
    args.extend([small(s.n)?, small(s.heads)?, small(s.d)?]);
    let grid = [(32 * s.n * s.heads).div_ceil(THREADS), s.batch, 1];
    let kernel = name("attention_delta", y, 1)?;
    b.run(Call::new(Module::Attention, kernel, grid, [THREADS as u32, 1, 1], args)?)?;
    b.run(s.call("attention_grad_q", qkv, Some(grad), &[lse, delta_at, b.operand(&out_q)?])?)?;
    let outs = [lse, delta_at, b.operand(&out_k)?, b.operand(&out_v)?];
    b.run(s.call("attention_grad_kv", qkv, Some(grad), &outs)?)?;
    Ok([out_q, out_k, out_v])
}

/// One step of AdamW in place on [weight, first moment, second moment], from a gradient; all f32.
pub(super) fn adamw<B: Backend>(b: &B, at: [Operand; 4], n: usize, constants: [f32; 8]) -> Result<()> {
    let mut args = at.map(pointer).to_vec();
    args.push(count(n));
    args.extend(constants.map(Arg::F32));
    flat(b, Module::Optimiser, "adamw_f32".into(), n, 1, args)
}

/// kept ← keep · kept + take · x in place, f32.
pub(super) fn blend<B: Backend>(
    b: &B,
    [kept, x]: [Operand; 2],
    n: usize,
    [keep, take]: [f32; 2],
) -> Result<()> {
    let args = vec![pointer(kept), pointer(x), count(n), Arg::F32(keep), Arg::F32(take)];
    flat(b, Module::Optimiser, "blend_f32".into(), n, 1, args)
}

/// Sums of the squares of `x`, f32, one for each of [`square_blocks`] blocks.
pub(super) fn square_sums<B: Backend>(b: &B, x: Operand, n: usize) -> Result<B::Buffer> {
    let blocks = square_blocks(n);
    let out = b.alloc(DType::F32, blocks)?;
    let args = vec![pointer(x), pointer(b.operand(&out)?), count(n)];
    let block = [THREADS as u32, 1, 1];
    b.run(Call::new(Module::Optimiser, "square_sums_f32".into(), [blocks, 1, 1], block, args)?)?;
    Ok(out)
}

/// Blocks for a sum over `n` values: 16 values a thread, at most 64 blocks.
pub(super) fn square_blocks(n: usize) -> usize {
    n.div_ceil(16 * THREADS).clamp(1, 64)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Takes down what would run, at addresses aligned as CUDA's are.
    #[derive(Default)]
    struct Plan(RefCell<Vec<Call>>);

    impl Backend for Plan {
        type Buffer = Operand;

        fn alloc(&self, dtype: DType, _: usize) -> Result<Operand> {
            Ok(Operand { address: 256, dtype })
        }

        fn operand(&self, buffer: &Operand) -> Result<Operand> {
            Ok(*buffer)
        }

        fn run(&self, call: Call) -> Result<()> {
            self.0.borrow_mut().push(call);
            Ok(())
        }
    }

    fn at(dtype: DType) -> Operand {
        Operand { address: 512, dtype }
    }

    #[test]
    fn every_launch_of_sdxl_is_within_cudas_limits_and_moves_vectors() -> Result<()> {
        let dtype = DType::F16;
        let x = at(dtype);
        // With guidance a batch of 2; the VAE decodes one image of 1024², of which a convolution has up to 512 channels.
        let images = [
            (2, 320, 128),
            (2, 640, 64),
            (2, 1280, 32),
            (2, 1920, 64),
            (1, 512, 128),
            (1, 512, 256),
            (1, 256, 1024),
            (1, 128, 1024),
        ];
        for (batch, channels, side) in images {
            let plan = Plan::default();
            let inner = side * side;
            let sizes = GroupSizes { batch, channels, groups: 32, inner, eps: 1e-5, silu: true };
            group_norm(&plan, sizes, [x; 3])?;
            group_norm_grad(&plan, sizes, [x, x, x, at(DType::F32), x], true)?;
            activate(&plan, Activation::Silu, x, batch * channels * inner)?;
            add_bias(&plan, [x; 3], None, batch * channels * inner, Channels { channels, inner })?;
            channel_sums(&plan, x, [batch, channels, inner], true)?;
            upsample(&plan, x, [batch * channels, side, side])?;
            upsample_grad(&plan, x, [batch * channels, side, side])?;
            transpose(&plan, x, [batch, channels, inner])?;
            let calls = plan.0.into_inner();
            let vectors: Vec<bool> = ["group_partials", "group_apply", "group_grad", "activate", "add_bias"]
                .iter()
                .map(|name| calls.iter().any(|call| call.kernel == format!("{name}_f16_v")))
                .collect();
            assert_eq!(vectors, [true; 5], "{batch} × {channels} × {side}²");
        }
        for (rows, width) in [(8192, 640), (2048, 1280), (154, 768), (154, 1280)] {
            let plan = Plan::default();
            let sizes = LayerSizes { sets: 1, per_set: rows, width, eps: 1e-5, modulation: false };
            layer_norm(&plan, sizes, [x; 3])?;
            layer_norm_grad(&plan, sizes, [x, x, at(DType::F32), x], true)?;
            geglu(&plan, x, rows, 4 * width)?;
            geglu_grad(&plan, [x; 2], rows, 4 * width)?;
            column_sums(&plan, x, rows, 8 * width)?;
            let calls = plan.0.into_inner();
            assert!(calls.iter().filter(|call| call.kernel.ends_with("_v")).count() == 4, "{rows} × {width}");
            // A row is a block of whole warps, none of them idle.
            let row = calls
                .iter()
                .find(|call| call.kernel == "layer_norm_f16_v")
                .map(|call| call.block[0] as usize);
            assert_eq!(row, Some((width / 8).next_multiple_of(32).min(256)));
        }
        for (n, m, heads) in [(4096, 4096, 10), (4096, 77, 10), (1024, 1024, 20), (1024, 77, 20)] {
            let plan = Plan::default();
            let width = 64 * heads;
            let part = |rows| Strided { at: x, sample: rows * width, row: width };
            let sizes = AttentionSizes { batch: 2, n, m, heads, d: 64, causal: false };
            let qkv = [part(n), part(m), part(m)];
            attention(&plan, sizes, qkv)?;
            attention_grad(&plan, sizes, qkv, [x, at(DType::F32), x])?;
            let calls = plan.0.into_inner();
            assert_eq!(calls.len(), 4);
            assert_eq!(calls[0].grid, [n.div_ceil(64) as u32, heads as u32, 2]);
            // The flag for tiles in vectors stands behind strides and sizes.
            assert!(calls.iter().all(|call| call.kernel.contains("delta") || call.args[13] == Arg::U32(1)));
        }
        Ok(())
    }

    #[test]
    fn what_cuda_does_not_take_is_refused_before_a_launch() {
        let plan = Plan::default();
        let x = at(DType::F32);
        let part = Strided { at: x, sample: 300, row: 300 };
        let sizes = AttentionSizes { batch: 1, n: 1, m: 1, heads: 1, d: 300, causal: false };
        assert!(attention(&plan, sizes, [part; 3]).is_err(), "a head that is too wide");
        let sizes = AttentionSizes { batch: 70_000, n: 1, m: 1, heads: 1, d: 8, causal: false };
        assert!(attention(&plan, sizes, [part; 3]).is_err(), "more samples than blocks along z");
        assert!(transpose(&plan, x, [1, usize::MAX >> 8, 2]).is_err(), "more rows than a u32 holds");
        assert!(upsample_grad(&plan, Operand { address: 4, dtype: DType::F32 }, [1, 2, 2]).is_err());
        assert!(activate(&plan, Activation::Silu, at(DType::U8), 1).is_err(), "a type without kernels");
        assert!(plan.0.into_inner().is_empty());
    }

    #[test]
    fn nothing_is_launched_for_nothing() -> Result<()> {
        let plan = Plan::default();
        let x = at(DType::F32);
        activate(&plan, Activation::Silu, x, 0)?;
        geglu(&plan, x, 0, 8)?;
        upsample(&plan, x, [0, 4, 4])?;
        transpose(&plan, x, [2, 0, 4])?;
        column_sums(&plan, x, 4, 0)?;
        layer_norm(&plan, LayerSizes { sets: 1, per_set: 0, width: 4, eps: 0.0, modulation: false }, [x; 3])?;
        assert!(plan.0.into_inner().is_empty());
        Ok(())
    }
}
