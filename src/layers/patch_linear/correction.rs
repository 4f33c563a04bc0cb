//! The correction of a vector, window by window: as layers, and fused for a patch at a time.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::{Sizes, Span, Tile, cut};
use crate::layers::activation::{gelu_tanh, gelu_tanh_slope};
use crate::layers::cpu::Matrix;
use crate::layers::linear_op::add_rows;
use crate::layers::{Activation, Linear};

/// x + widen·GELU(narrow·x + position), window by window: a convolution whose kernel is its stride, and its transpose.
#[derive(Clone, Debug)]
pub struct Correction {
    /// (C, window)
    narrow: Linear,
    /// (window, C). Zero, so that training starts at the map alone.
    widen: Linear,
    /// (windows, C): which part of the vector this is; kernels are shared, parts are not alike.
    pub(super) position: Tensor,
    pub(super) window: usize,
}

impl Correction {
    /// For vectors of `length` values.
    pub fn new(length: usize, window: usize, channels: usize, vb: VarBuilder) -> Result<Self> {
        let init = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Self {
            narrow: Linear::new(window, channels, vb.pp("narrow"))?,
            widen: Linear::zeros(channels, window, vb.pp("widen"))?,
            position: vb.get_with_hints((length.div_ceil(window), channels), "position", init)?,
            window,
        })
    }

    /// `x` (B, P) → same; the last window is filled up with zeros.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, p) = x.dims2()?;
        let windows = p.div_ceil(self.window);
        let padded = x.pad_with_zeros(1, 0, windows * self.window - p)?;
        let h = self.narrow.forward(&padded.reshape((b, windows, self.window))?)?; // (B, windows, C)
        let h = Activation::GeluTanh.apply(&h.broadcast_add(&self.position)?)?;
        let y = self.widen.forward(&h)?.reshape((b, windows * self.window))?;
        x + y.narrow(1, 0, p)?
    }

    /// All its weights in one row, in the order of [`Corrector`].
    pub(super) fn end_to_end(&self) -> Result<Tensor> {
        let parts = [
            Some(&self.narrow.weight),
            self.narrow.bias.as_ref(),
            Some(&self.widen.weight),
            self.widen.bias.as_ref(),
            Some(&self.position),
        ];
        Tensor::cat(&parts.into_iter().flatten().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?, 0)
    }
}

/// The weights of a [`Correction`] as they lie in one row.
pub(super) struct Corrector<'a> {
    narrow: &'a [f32],
    narrow_bias: &'a [f32],
    widen: &'a [f32],
    widen_bias: &'a [f32],
    position: &'a [f32],
}

/// Where the gradients of a [`Corrector`] go.
pub(super) struct Gradients<'a> {
    /// Those of the shared weights are added.
    pub(super) sums: &'a mut [f32],
    /// Those of a patch's positions, (windows, C).
    pub(super) positions: &'a mut [f32],
}

impl<'a> Corrector<'a> {
    pub(super) fn new(weights: &'a [f32], sizes: &Sizes) -> Option<Self> {
        let kernel = sizes.window * sizes.channels;
        let (narrow, rest) = weights.split_at_checked(kernel)?;
        let (narrow_bias, rest) = rest.split_at_checked(sizes.channels)?;
        let (widen, rest) = rest.split_at_checked(kernel)?;
        let (widen_bias, position) = rest.split_at_checked(sizes.window)?;
        (sizes.channels > 0).then_some(Self { narrow, narrow_bias, widen, widen_bias, position })
    }

    /// Values before the positions.
    pub(super) fn shared(sizes: &Sizes) -> usize {
        2 * sizes.window * sizes.channels + sizes.channels + sizes.window
    }

    /// `tile.y` from `tile.x`.
    pub(super) fn forward(&self, span: &Span, sizes: &Sizes, tile: &mut Tile) {
        let Sizes { batch, window, channels, .. } = *sizes;
        let rows = batch * span.windows;
        let position = &self.position[span.first * channels..][..span.windows * channels];
        tile.hidden.clear();
        for _ in 0..batch {
            for position in position.chunks_exact(channels) {
                tile.hidden.extend(position.iter().zip(self.narrow_bias).map(|(a, b)| a + b));
            }
        }
        sizes.product([rows, channels, window], true).write(
            Matrix { values: &tile.x, row: window, column: 1 },
            Matrix { values: self.narrow, row: 1, column: window },
            &mut tile.hidden,
            channels,
        );
        tile.bent.resize(rows * channels, 0.0);
        gelu_tanh(&tile.hidden, &mut tile.bent);
        tile.y.clear();
        for x in tile.x.chunks_exact(window) {
            tile.y.extend(x.iter().zip(self.widen_bias).map(|(x, bias)| x + bias));
        }
        sizes.product([rows, window, channels], true).write(
            Matrix { values: &tile.bent, row: channels, column: 1 },
            Matrix { values: self.widen, row: 1, column: channels },
            &mut tile.y,
            window,
        );
        cut(&mut tile.y, span);
    }

    /// Turns `tile.grad` from the gradient of `y` into that of `x` where it is `wanted`, and gives those of the weights.
    pub(super) fn backward(
        &self,
        span: &Span,
        sizes: &Sizes,
        tile: &mut Tile,
        wanted: bool,
        Gradients { sums, positions }: Gradients,
    ) {
        let Sizes { batch, window, channels, .. } = *sizes;
        let (rows, kernel) = (batch * span.windows, window * channels);
        let (narrow, rest) = sums.split_at_mut(kernel);
        let (narrow_bias, rest) = rest.split_at_mut(channels);
        let (widen, widen_bias) = rest.split_at_mut(kernel);
        sizes.product([window, channels, rows], true).write(
            Matrix { values: &tile.grad, row: 1, column: window },
            Matrix { values: &tile.bent, row: channels, column: 1 },
            widen,
            channels,
        );
        add_rows(&tile.grad, widen_bias);
        tile.grad_bent.resize(rows * channels, 0.0);
        sizes.product([rows, channels, window], false).write(
            Matrix { values: &tile.grad, row: window, column: 1 },
            Matrix { values: self.widen, row: channels, column: 1 },
            &mut tile.grad_bent,
            channels,
        );
        tile.grad_hidden.resize(rows * channels, 0.0);
        gelu_tanh_slope(&tile.hidden, &tile.grad_bent, &mut tile.grad_hidden);
        sizes.product([channels, window, rows], true).write(
            Matrix { values: &tile.grad_hidden, row: 1, column: channels },
            Matrix { values: &tile.x, row: window, column: 1 },
            narrow,
            window,
        );
        add_rows(&tile.grad_hidden, narrow_bias);
        positions.fill(0.0);
        add_rows(&tile.grad_hidden, positions);
        if wanted {
            sizes.product([rows, window, channels], true).write(
                Matrix { values: &tile.grad_hidden, row: channels, column: 1 },
                Matrix { values: self.narrow, row: window, column: 1 },
                &mut tile.grad,
                window,
            );
            cut(&mut tile.grad, span);
        }
    }
}
