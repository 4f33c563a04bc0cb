//! The two networks before the bases: an MLP that makes tokens of a face vector, and a perceiver whose queries look at
//! themselves, at those tokens and at CLIP's.
//!
//! ```text
//! x = LN(reshape(W e + b))                                  id_projector: (B, E) → (B, T, D)
//! z = latents;  x = proj_in(x);  y = proj_in_2(clip)        no positional embedding
//! z += attn1(LN z, LN z);  z += attn2(LN z, LN x);  z += attn3(LN z, LN y);  z += W2 gelu(W1 LN z)      each layer
//! proj_out(z)                                               (B, N, K)
//! ```

use anyhow::Result;
use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;

use super::EPS;
use crate::layers::{Activation, LayerNorm, Linear, attention, compute_dtype};
use crate::weights::model_folder::ModelFiles;

/// ArcFace's vector → tokens.
#[derive(Clone, Debug)]
pub(super) struct IdProjector {
    linear: Linear,
    norm: LayerNorm,
    width: usize,
}

impl IdProjector {
    /// `vb` stands at the root of `id_projector.safetensors`.
    pub fn new(face: usize, tokens: usize, width: usize, vb: VarBuilder) -> Result<Self> {
        let linear = Linear::new(face, tokens * width, vb.pp("0"))?;
        Ok(Self { linear, norm: LayerNorm::new(width, EPS, vb.pp("2"))?, width })
    }

    /// (B, E) → (B, T, D)
    pub fn forward(&self, e: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.linear.forward(e)?.reshape((e.dim(0)?, (), self.width))?;
        self.norm.forward(&x)
    }
}

/// The sizes of a [`Resampler`], as its tensors have them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// N, learned queries.
    pub queries: usize,
    /// D, width of a query.
    pub width: usize,
    /// Width of the tokens made of the face vector.
    pub face_width: usize,
    /// Width of CLIP's tokens.
    pub clip_width: usize,
    /// Width of all heads together.
    pub inner: usize,
    /// Heads.
    pub heads: usize,
    /// Width inside the feed-forward part.
    pub hidden: usize,
    /// Layers.
    pub depth: usize,
    /// K, numbers of an output vector.
    pub outputs: usize,
}

impl Sizes {
    /// Reads them from the shapes in `resampler.safetensors`.
    pub fn read(files: &ModelFiles, head_width: usize) -> Result<Self> {
        let stored = files.reader("", "resampler")?;
        let matrix = |name: &str| match stored.shape(name)?[..] {
            [rows, columns] => Ok([rows, columns]),
            ref other => Err(stored.unusable(format!("`{name}` has shape {other:?}, wanted a matrix"))),
        };
        let [_, queries, width] = stored.shape("latents")?[..] else {
            return Err(stored.unusable("`latents` is not of the form [1, queries, width]"));
        };
        let [inner, _] = matrix("layers.0.attn1.to_q.weight")?;
        if !inner.is_multiple_of(head_width) || inner == 0 {
            return Err(stored
                .unusable(format!("attention of width {inner} does not part into heads of {head_width}")));
        }
        let number = |name: &String| name.strip_prefix("layers.")?.split('.').next()?.parse::<usize>().ok();
        Ok(Self {
            queries,
            width,
            face_width: matrix("proj_in.weight")?[1],
            clip_width: matrix("proj_in_2.weight")?[1],
            inner,
            heads: inner / head_width,
            hidden: matrix("layers.0.ff.net.0.proj.weight")?[0],
            depth: stored.names().iter().filter_map(number).max().map_or(0, |last| last + 1),
            outputs: matrix("proj_out.weight")?[0],
        })
    }
}

/// The perceiver.
#[derive(Clone, Debug)]
pub(super) struct Resampler {
    latents: Tensor,
    proj_in: Linear,
    proj_in_2: Linear,
    pub layers: Vec<Layer>,
    proj_out: Linear,
}

impl Resampler {
    /// `vb` stands at the root of `resampler.safetensors`.
    pub fn new(sizes: &Sizes, vb: VarBuilder) -> Result<Self> {
        let Sizes { queries, width, face_width, clip_width, outputs, .. } = *sizes;
        // They are added to activations.
        let added = compute_dtype(vb.dtype(), vb.device());
        let latents =
            vb.get_with_hints_dtype((1, queries, width), "latents", candle_nn::Init::Const(0.0), added)?;
        Ok(Self {
            latents: latents.to_dtype(added)?,
            proj_in: Linear::new(face_width, width, vb.pp("proj_in"))?,
            proj_in_2: Linear::new(clip_width, width, vb.pp("proj_in_2"))?,
            layers: (0..sizes.depth)
                .map(|i| Layer::new(sizes, vb.pp("layers").pp(i)))
                .collect::<candle_core::Result<_>>()?,
            proj_out: Linear::new(width, outputs, vb.pp("proj_out"))?,
        })
    }

    /// Tokens of the face vector `x` (B, T, Dx) and CLIP's `clip` (B, M, Dy) → (B, N, K).
    pub fn forward(&self, x: &Tensor, clip: &Tensor) -> candle_core::Result<Tensor> {
        let queries = self.queries(x.dim(0)?)?;
        let [x, y] = self.tokens(x, clip)?;
        let z = self.layers.iter().try_fold(queries, |z, layer| layer.forward(&z, &x, &y))?;
        self.proj_out.forward(&z)
    }

    /// The learned queries, (B, N, D).
    pub fn queries(&self, b: usize) -> candle_core::Result<Tensor> {
        let (_, n, width) = self.latents.dims3()?;
        self.latents.broadcast_as((b, n, width))?.contiguous()
    }

    /// What the layers look at, (B, T, D) and (B, M, D).
    pub fn tokens(&self, x: &Tensor, clip: &Tensor) -> candle_core::Result<[Tensor; 2]> {
        Ok([self.proj_in.forward(x)?, self.proj_in_2.forward(clip)?])
    }
}

/// Self-attention, attention to the face, attention to CLIP's tokens, and the feed-forward part.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    norm_attn1: LayerNorm,
    attn1: Attention,
    norm_attn2_l: LayerNorm,
    norm_attn2_x: LayerNorm,
    attn2: Attention,
    norm_attn3_l: LayerNorm,
    norm_attn3_y: LayerNorm,
    attn3: Attention,
    norm_ff: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Layer {
    fn new(sizes: &Sizes, vb: VarBuilder) -> candle_core::Result<Self> {
        let Sizes { width, hidden, .. } = *sizes;
        let norm = |name: &str| LayerNorm::new(width, EPS, vb.pp(name));
        let attn = |name: &str| Attention::new(sizes, vb.pp(name));
        Ok(Self {
            norm_attn1: norm("norm_attn1")?,
            attn1: attn("attn1")?,
            norm_attn2_l: norm("norm_attn2_l")?,
            norm_attn2_x: norm("norm_attn2_x")?,
            attn2: attn("attn2")?,
            norm_attn3_l: norm("norm_attn3_l")?,
            norm_attn3_y: norm("norm_attn3_y")?,
            attn3: attn("attn3")?,
            norm_ff: norm("norm_ff")?,
            fc1: Linear::new(width, hidden, vb.pp("ff.net.0.proj"))?,
            fc2: Linear::new(hidden, width, vb.pp("ff.net.2"))?,
        })
    }

    /// `z` (B, N, D), `x` (B, T, D), `y` (B, M, D) → (B, N, D)
    pub fn forward(&self, z: &Tensor, x: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
        let t = self.norm_attn1.forward(z)?;
        let z = (z + self.attn1.forward(&t, &t)?)?;
        let z =
            (&z + self.attn2.forward(&self.norm_attn2_l.forward(&z)?, &self.norm_attn2_x.forward(x)?)?)?;
        let z =
            (&z + self.attn3.forward(&self.norm_attn3_l.forward(&z)?, &self.norm_attn3_y.forward(y)?)?)?;
        let h = Activation::Gelu.apply(&self.fc1.forward(&self.norm_ff.forward(&z)?)?)?;
        z + self.fc2.forward(&h)?
    }
}

/// Attention whose keys and values are the conditions alone, without biases.
#[derive(Clone, Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(sizes: &Sizes, vb: VarBuilder) -> candle_core::Result<Self> {
        let Sizes { width, inner, heads, .. } = *sizes;
        let linear = |name: &str| Linear::without_bias(width, inner, vb.pp(name));
        Ok(Self {
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: Linear::without_bias(inner, width, vb.pp("to_out.0"))?,
            heads,
        })
    }

    /// `q` (B, N, D), `kv` (B, M, D) → (B, N, D)
    fn forward(&self, q: &Tensor, kv: &Tensor) -> candle_core::Result<Tensor> {
        let (q, k, v) = (self.to_q.forward(q)?, self.to_k.forward(kv)?, self.to_v.forward(kv)?);
        self.to_out.forward(&attention(&q, &k, &v, self.heads, false)?)
    }
}
