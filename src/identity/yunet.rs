//! YuNet's network, computed here: stem, five stages of two blocks, a pyramid of three levels, a head a level.
//!
//! A block is a 1×1 convolution, a depthwise 3×3 convolution and a ReLU, which are done row by row while the rows lie
//! in the cache. rten takes 33 ms for 640×640 pixels on two cores, most of it in depthwise convolutions; this takes a
//! fraction of that with the same numbers to rounding (the test holds both together).

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use super::onnx_header::Weights;
use crate::image::Image;
use crate::layers::vectorised;

/// Numbers in a vector; rows are multiples of it.
const LANES: usize = 16;

/// Outputs of a 1×1 convolution that are summed together.
const OUTPUTS: usize = 4;

/// Numbers that a head gives a cell: class, object, box (4), points (10).
pub(super) const PER_CELL: usize = 16;

/// The network.
pub(super) struct Yunet {
    stem: Products,
    /// 0: at a half of the image's size, 1 to 4: at a quarter, …, 9 and 10: at a 32nd.
    stages: Vec<Block>,
    /// For strides 32, 16 and 8.
    laterals: Vec<Block>,
    /// For strides 8, 16 and 32.
    heads: Vec<Block>,
}

impl Yunet {
    /// Takes the weights of OpenCV Zoo's `face_detection_yunet_2023mar.onnx`, whose convolutions stand in a fixed order.
    ///
    /// # Errors
    /// Another number of convolutions, or others than these.
    pub fn new(onnx: &[u8]) -> Result<Self> {
        let weights = Weights::parse(onnx)?;
        let convolutions = &weights.convolutions;
        ensure!(convolutions.len() == 53, "it has {} convolutions, YuNet has 53", convolutions.len());
        let tensor = |name: &str, numbers: usize| -> Result<&[f32]> {
            let values = weights.values.get(name).with_context(|| format!("it has no weight `{name}`"))?;
            ensure!(
                values.len() == numbers,
                "weight `{name}` has {} numbers, wanted {numbers}",
                values.len()
            );
            Ok(values)
        };
        let products = |at: usize, inputs: usize, outputs: usize| -> Result<Products> {
            let [weight, bias] = &convolutions[at];
            Ok(Products::new(tensor(weight, inputs * outputs)?, tensor(bias, outputs)?))
        };
        let block = |at: usize, inputs: usize, outputs: usize, pool: bool| -> Result<Block> {
            let [weight, bias] = &convolutions[at + 1];
            Ok(Block {
                pointwise: products(at, inputs, outputs)?,
                depthwise: tensor(weight, outputs * 9)?.to_vec(),
                bias: tensor(bias, outputs)?.to_vec(),
                relu: true,
                pool,
            })
        };
        // Inputs, outputs, and whether the size is halved afterwards.
        let narrow = [(16, 16, true), (16, 16, false), (16, 32, false), (32, 32, false), (32, 64, true)];
        let stages = narrow.into_iter().chain([(64, 64, false); 6]).enumerate();
        let stages = stages.map(|(i, (inputs, outputs, pool))| block(1 + 2 * i, inputs, outputs, pool));
        let laterals = (0..3).map(|i| block(23 + 2 * i, 64, 64, false));
        // The head's four parts stand one after the other, each with its three levels.
        let head = |level: usize| -> Result<Block> {
            let mut whole = Block {
                pointwise: Products::default(),
                depthwise: vec![],
                bias: vec![],
                relu: false,
                pool: false,
            };
            let (mut weight, mut bias) = (Vec::new(), Vec::new());
            for (part, outputs) in [(0, 1), (2, 1), (1, 4), (3, 10)] {
                let at = 29 + 6 * part + 2 * level;
                let ([pw, pb], [dw, db]) = (&convolutions[at], &convolutions[at + 1]);
                weight.extend(tensor(pw, 64 * outputs)?);
                bias.extend(tensor(pb, outputs)?);
                whole.depthwise.extend(tensor(dw, 9 * outputs)?);
                whole.bias.extend(tensor(db, outputs)?);
            }
            whole.pointwise = Products::new(&weight, &bias);
            Ok(whole)
        };
        Ok(Self {
            stem: products(0, 27, 16)?,
            stages: stages.collect::<Result<_>>()?,
            laterals: laterals.collect::<Result<_>>()?,
            heads: (0..3).map(head).collect::<Result<_>>()?,
        })
    }

    /// The cells of strides 8, 16 and 32, row by row, [`PER_CELL`] numbers each: class and object probability, box and
    /// points as the network gives them. The image's sides are multiples of 32.
    pub fn run(&self, image: &Image) -> [Vec<f32>; 3] {
        assert!(
            image.width.is_multiple_of(32) && image.height.is_multiple_of(32),
            "sides are multiples of 32"
        );
        let pixels = Pixels::new(image);
        let stage = |range: Range<usize>, x: Map| {
            self.stages[range].iter().fold(x, |x, block| block.forward(&Rows::Map(&x)))
        };
        let x = self.stages[0].forward(&Rows::Stem { pixels: &pixels, stem: &self.stem });
        let at_8 = stage(1..7, x);
        let at_16 = stage(7..9, at_8.halved());
        let at_32 = stage(9..11, at_16.halved());
        let [top, middle, bottom] = &self.laterals[..] else { unreachable!("there are three") };
        let p32 = top.forward(&Rows::Map(&at_32));
        let p16 = middle.forward(&Rows::Map(&at_16.plus_doubled(&p32)));
        let p8 = bottom.forward(&Rows::Map(&at_8.plus_doubled(&p16)));
        let [a, b, c] = &self.heads[..] else { unreachable!("there are three") };
        [(a, p8), (b, p16), (c, p32)].map(|(head, level)| head.forward(&Rows::Map(&level)).cells())
    }
}

/// A feature map. Each row holds its channels one after the other, `stride` numbers each; those beyond `width` are
/// finite and mean nothing.
struct Map {
    channels: usize,
    width: usize,
    height: usize,
    stride: usize,
    values: Buffer,
}

impl Map {
    fn new(channels: usize, width: usize, height: usize) -> Self {
        let stride = width.next_multiple_of(LANES);
        Self { channels, width, height, stride, values: Buffer::new(height * channels * stride) }
    }

    fn row(&self, y: usize) -> &[f32] {
        let length = self.channels * self.stride;
        &self.values[y * length..][..length]
    }

    /// The largest of each 2×2.
    fn halved(&self) -> Self {
        let mut half = Self::new(self.channels, self.width / 2, self.height / 2);
        let length = half.channels * half.stride;
        for (y, out) in half.values.chunks_exact_mut(length).enumerate() {
            pool(self.row(2 * y), self.row(2 * y + 1), self.stride, out, half.stride);
        }
        half
    }

    /// The sum with a map of half the size, each of whose numbers stands for four.
    fn plus_doubled(&self, half: &Self) -> Self {
        let mut sum = Self::new(self.channels, self.width, self.height);
        sum.values.copy_from_slice(&self.values);
        let length = self.channels * self.stride;
        for (y, out) in sum.values.chunks_exact_mut(length).enumerate() {
            let channels = half.row(y / 2).chunks_exact(half.stride);
            for (out, small) in out.chunks_exact_mut(self.stride).zip(channels) {
                for (two, small) in out.chunks_exact_mut(2).zip(small) {
                    two.iter_mut().for_each(|value: &mut f32| *value += small);
                }
            }
        }
        sum
    }

    /// Cell by cell, all channels of each; the first two as probabilities.
    fn cells(&self) -> Vec<f32> {
        let mut cells = Vec::with_capacity(self.width * self.height * self.channels);
        for y in 0..self.height {
            let row = self.row(y);
            for x in 0..self.width {
                let start = cells.len();
                cells.extend(row.iter().skip(x).step_by(self.stride));
                cells[start..start + 2]
                    .iter_mut()
                    .for_each(|value: &mut f32| *value = 1.0 / (1.0 + (-*value).exp()));
            }
        }
        cells
    }
}

/// Finite numbers in memory that is used again by its thread: fresh pages cost a fifth of the whole time.
struct Buffer(Vec<f32>);

thread_local! {
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

impl Buffer {
    fn new(length: usize) -> Self {
        let mut values = SPARE.with_borrow_mut(|spare| {
            let fits = spare.iter().position(|values| values.capacity() >= length);
            fits.map(|at| spare.swap_remove(at)).or_else(|| spare.pop()).unwrap_or_default()
        });
        values.resize(length, 0.0);
        Self(values)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        SPARE.with_borrow_mut(|spare| spare.push(std::mem::take(&mut self.0)));
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

/// The image as the stem takes it: blue, green and red, 0 to 255, even and odd columns apart, a row of zeros above
/// and [`LANES`] zeros before each.
struct Pixels {
    width: usize,
    height: usize,
    pitch: usize,
    values: Buffer,
}

impl Pixels {
    fn new(image: &Image) -> Self {
        let half = image.width / 2;
        let pitch = half.next_multiple_of(LANES) + LANES;
        let mut values = Buffer::new((image.height + 1) * 6 * pitch);
        values[..6 * pitch].fill(0.0);
        let rows = values[6 * pitch..].par_chunks_exact_mut(6 * pitch);
        rows.zip(image.rgb.par_chunks_exact(image.width * 3)).for_each(|(out, row)| {
            for (plane, out) in out.chunks_exact_mut(pitch).enumerate() {
                let (channel, odd) = (2 - plane / 2, plane % 2);
                out[..LANES].fill(0.0);
                for (out, two) in out[LANES..].iter_mut().zip(row.chunks_exact(6)) {
                    *out = f32::from(two[3 * odd + channel]);
                }
            }
        });
        Self { width: half, height: image.height / 2, pitch, values }
    }
}

/// Where a block's input comes from.
enum Rows<'a> {
    Map(&'a Map),
    /// The stem's convolution of 3×3 pixels with stride 2, computed where it is needed.
    Stem {
        pixels: &'a Pixels,
        stem: &'a Products,
    },
}

impl Rows<'_> {
    /// Width and height.
    fn size(&self) -> (usize, usize) {
        match self {
            Self::Map(map) => (map.width, map.height),
            Self::Stem { pixels, .. } => (pixels.width, pixels.height),
        }
    }

    /// Row `y`, its channels one after the other; `buffer` is there for one that is computed.
    fn row<'b>(&'b self, y: usize, stride: usize, buffer: &'b mut Vec<f32>) -> &'b [f32] {
        match self {
            Self::Map(map) => map.row(y),
            Self::Stem { pixels, stem } => {
                buffer.resize(stem.bias.len() * stride, 0.0);
                // Weight (channel, ky, kx): row 2y − 1 + ky, which stands one lower, and column 2x − 1 + kx.
                let taps: [usize; 27] = std::array::from_fn(|tap| {
                    let (channel, ky, kx) = (tap / 9, tap / 3 % 3, tap % 3);
                    let (odd, before) = (usize::from(kx != 1), usize::from(kx == 0));
                    ((2 * y + ky) * 6 + 2 * channel + odd) * pixels.pitch + LANES - before
                });
                let mut out = Sums { values: buffer, pitch: stride, shift: 0, relu: true };
                sums(stem, &pixels.values, &taps, stride, &mut out);
                buffer
            }
        }
    }
}

/// Weighted sums of rows: a 1×1 convolution, or one with the given taps.
#[derive(Default)]
struct Products {
    /// (outputs / OUTPUTS, inputs, OUTPUTS)
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Products {
    /// From a weight (outputs, inputs) and a bias (outputs).
    fn new(weight: &[f32], bias: &[f32]) -> Self {
        let inputs = weight.len() / bias.len();
        let arranged = weight
            .chunks_exact(OUTPUTS * inputs)
            .flat_map(|rows| (0..inputs).flat_map(move |i| (0..OUTPUTS).map(move |o| rows[o * inputs + i])));
        Self { weight: arranged.collect(), bias: bias.to_vec() }
    }
}

/// 1×1 convolution, depthwise 3×3 convolution, ReLU and, at the end of a stage, the largest of each 2×2.
struct Block {
    pointwise: Products,
    /// (outputs, 3, 3)
    depthwise: Vec<f32>,
    bias: Vec<f32>,
    relu: bool,
    pool: bool,
}

impl Block {
    fn forward(&self, x: &Rows) -> Map {
        let (width, height) = x.size();
        let shrink = 1 + usize::from(self.pool);
        let mut out = Map::new(self.bias.len(), width / shrink, height / shrink);
        // A band computes two rows of its neighbours; small maps are not worth a second thread.
        let threads = if width * height < 1000 { 1 } else { rayon::current_num_threads() };
        let band = out.height.div_ceil(2 * threads).max(4);
        let (length, stride) = (out.channels * out.stride, out.stride);
        if threads == 1 {
            self.band(x, 0, stride, &mut out.values);
        } else {
            let bands = out.values.par_chunks_mut(band * length).enumerate();
            bands.for_each(|(at, rows)| self.band(x, at * band * shrink, stride, rows));
        }
        out
    }

    /// Rows of the output, which begin at row `first` before they are halved.
    fn band(&self, x: &Rows, first: usize, out_stride: usize, out: &mut [f32]) {
        let (width, height) = x.size();
        let stride = width.next_multiple_of(LANES);
        let channels = self.bias.len();
        // Three rows after the 1×1 convolution, with zeros on both sides.
        let pitch = stride + 2 * LANES;
        let (mut ring, mut nothing) = (Buffer::new(3 * channels * pitch), Buffer::new(channels * pitch));
        ring.fill(0.0);
        nothing.fill(0.0);
        let (mut buffer, mut pair) = (Vec::new(), Buffer::new(2 * channels * stride));
        let mut fill = |ring: &mut [f32], y: usize| {
            let slot = &mut ring[y % 3 * channels * pitch..][..channels * pitch];
            let row = x.row(y, stride, &mut buffer);
            let inputs = row.len() / stride;
            let taps: Vec<usize> = (0..inputs).map(|i| i * stride).collect();
            let mut out = Sums { values: &mut *slot, pitch, shift: LANES, relu: false };
            sums(&self.pointwise, row, &taps, stride, &mut out);
            for channel in slot.chunks_exact_mut(pitch) {
                channel[LANES + width..].fill(0.0);
            }
        };
        let mut done = first.saturating_sub(1);
        let length = channels * out_stride;
        let shrink = 1 + usize::from(self.pool);
        for (at, out) in out.chunks_exact_mut(length).enumerate() {
            for half in 0..shrink {
                let y = first + at * shrink + half;
                while done < height.min(y + 2) {
                    fill(&mut ring, done);
                    done += 1;
                }
                let slot = |y: Option<usize>| match y {
                    Some(y) if y < height => &ring[y % 3 * channels * pitch..][..channels * pitch],
                    _ => &nothing[..],
                };
                let rows = [slot(y.checked_sub(1)), slot(Some(y)), slot(Some(y + 1))];
                let out = if self.pool {
                    &mut pair[half * channels * stride..][..channels * stride]
                } else {
                    &mut *out
                };
                depthwise(self, rows, pitch, out, stride);
            }
            if self.pool {
                let (upper, lower) = pair.split_at(channels * stride);
                pool(upper, lower, stride, out, out_stride);
            }
        }
    }
}

/// Where sums go: output o begins at `o · pitch + shift`.
struct Sums<'a> {
    values: &'a mut [f32],
    pitch: usize,
    shift: usize,
    /// Whether negative sums become 0.
    relu: bool,
}

/// `out[o, x] = bias[o] + Σ_i weight[o, i] · from[taps[i] + x]`, for x < `width`, a multiple of [`LANES`].
fn sums(products: &Products, from: &[f32], taps: &[usize], width: usize, out: &mut Sums) {
    if can_fuse() {
        fused_sums(products, from, taps, width, out);
    } else {
        tiles::<false>(products, from, taps, width, out);
    }
}

vectorised! {
    fn fused_sums(products: &Products, from: &[f32], taps: &[usize], width: usize, out: &mut Sums) {
        tiles::<true>(products, from, taps, width, out);
    }
}

#[inline(always)]
fn tiles<const FUSE: bool>(products: &Products, from: &[f32], taps: &[usize], width: usize, out: &mut Sums) {
    let mut x = 0;
    while x + 2 * LANES <= width {
        tile::<FUSE, { 2 * LANES }>(products, from, taps, x, out);
        x += 2 * LANES;
    }
    if x < width {
        tile::<FUSE, LANES>(products, from, taps, x, out);
    }
}

/// [`sums`] of `WIDE` columns from `x` on.
#[inline(always)]
fn tile<const FUSE: bool, const WIDE: usize>(
    products: &Products,
    from: &[f32],
    taps: &[usize],
    x: usize,
    out: &mut Sums,
) {
    let groups = products.weight.chunks_exact(taps.len() * OUTPUTS).zip(products.bias.chunks_exact(OUTPUTS));
    for (group, (weights, bias)) in groups.enumerate() {
        let mut sums = [[0.0f32; WIDE]; OUTPUTS];
        for (sum, &bias) in sums.iter_mut().zip(bias) {
            *sum = [bias; WIDE];
        }
        for (&tap, weights) in taps.iter().zip(weights.chunks_exact(OUTPUTS)) {
            let values: &[f32; WIDE] = from[tap + x..][..WIDE].try_into().expect("as long as this");
            for (sum, &weight) in sums.iter_mut().zip(weights) {
                for (sum, &value) in sum.iter_mut().zip(values) {
                    *sum = multiply_add::<FUSE>(value, weight, *sum);
                }
            }
        }
        for (o, sum) in sums.iter().enumerate() {
            let to = &mut out.values[(group * OUTPUTS + o) * out.pitch + out.shift + x..][..WIDE];
            for (to, &sum) in to.iter_mut().zip(sum) {
                *to = if out.relu { sum.max(0.0) } else { sum };
            }
        }
    }
}

/// The depthwise convolution and ReLU of a block: three rows with [`LANES`] zeros before each channel → one.
fn depthwise(block: &Block, rows: [&[f32]; 3], pitch: usize, out: &mut [f32], stride: usize) {
    if can_fuse() {
        fused_depthwise(block, rows, pitch, out, stride);
    } else {
        depthwise_row::<false>(block, rows, pitch, out, stride);
    }
}

vectorised! {
    fn fused_depthwise(block: &Block, rows: [&[f32]; 3], pitch: usize, out: &mut [f32], stride: usize) {
        depthwise_row::<true>(block, rows, pitch, out, stride);
    }
}

#[inline(always)]
fn depthwise_row<const FUSE: bool>(
    block: &Block,
    rows: [&[f32]; 3],
    pitch: usize,
    out: &mut [f32],
    stride: usize,
) {
    for (channel, out) in out.chunks_exact_mut(stride).enumerate() {
        let weight: &[f32; 9] = block.depthwise[channel * 9..][..9].try_into().expect("as long as this");
        let bias = block.bias[channel];
        let rows = rows.map(|row| &row[channel * pitch + LANES - 1..][..stride + 2]);
        for x in (0..stride).step_by(LANES) {
            let mut sums = [bias; LANES];
            for (row, weights) in rows.iter().zip(weight.chunks_exact(3)) {
                for (dx, &weight) in weights.iter().enumerate() {
                    let values: &[f32; LANES] = row[x + dx..][..LANES].try_into().expect("as long as this");
                    for (sum, &value) in sums.iter_mut().zip(values) {
                        *sum = multiply_add::<FUSE>(value, weight, *sum);
                    }
                }
            }
            for (out, &sum) in out[x..x + LANES].iter_mut().zip(&sums) {
                *out = if block.relu { sum.max(0.0) } else { sum };
            }
        }
    }
}

/// Whether the processor multiplies and adds in one instruction; where it does not, `mul_add` is a slow function.
fn can_fuse() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    true
}

#[inline(always)]
fn multiply_add<const FUSE: bool>(a: f32, b: f32, sum: f32) -> f32 {
    if FUSE { a.mul_add(b, sum) } else { a * b + sum }
}

vectorised! {
    /// The largest of each 2×2 of two rows.
    fn pool(upper: &[f32], lower: &[f32], stride: usize, out: &mut [f32], out_stride: usize) {
        let channels = upper.chunks_exact(stride).zip(lower.chunks_exact(stride));
        for (out, (upper, lower)) in out.chunks_exact_mut(out_stride).zip(channels) {
            for (out, (a, b)) in out.iter_mut().zip(upper.chunks_exact(2).zip(lower.chunks_exact(2))) {
                *out = a[0].max(a[1]).max(b[0].max(b[1]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::onnx::Network;

    /// cls, obj, bbox and kps of each stride, as the file has them.
    const OUTPUTS: [&str; 12] = [
        "cls_8", "obj_8", "bbox_8", "kps_8", "cls_16", "obj_16", "bbox_16", "kps_16", "cls_32", "obj_32",
        "bbox_32", "kps_32",
    ];

    #[test]
    fn it_gives_the_numbers_of_the_onnx_file() {
        let bytes = include_bytes!("../assets/face/yunet.onnx");
        let (reference, yunet) =
            (Network::embedded("yunet", bytes, &OUTPUTS).unwrap(), Yunet::new(bytes).unwrap());
        for (width, height) in [(320, 320), (96, 160), (32, 32), (448, 64)] {
            let mut state = 1u32;
            let rgb = std::iter::repeat_with(|| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            });
            let image = Image { width, height, rgb: rgb.take(width * height * 3).collect() };
            let plane = |c: usize| image.rgb.iter().skip(c).step_by(3).map(|&value| f32::from(value));
            let input: Vec<f32> = plane(2).chain(plane(1)).chain(plane(0)).collect();
            let theirs = reference.run([1, 3, height, width], &input).unwrap();
            // Twice, so that memory is used again.
            yunet.run(&image);
            for (level, ours) in yunet.run(&image).iter().enumerate() {
                let theirs = &theirs[4 * level..][..4];
                assert_eq!(ours.len(), theirs[0].len() * PER_CELL);
                for (cell, ours) in ours.chunks_exact(PER_CELL).enumerate() {
                    let parts = theirs.iter().zip([1, 1, 4, 10]);
                    let wanted: Vec<f32> =
                        parts.flat_map(|(part, n)| &part[cell * n..][..n]).copied().collect();
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4 * b.abs().max(1.0);
                    assert!(
                        ours.iter().zip(&wanted).all(near),
                        "{width}×{height} {level} {cell}: {ours:?} {wanted:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn another_network_is_refused() {
        let error = Yunet::new(include_bytes!("../assets/face/mobilefacenet512.onnx")).err().unwrap();
        assert!(error.to_string().contains("50 convolutions"), "{error}");
    }
}
