//! The transformer of CLIP, which its text encoders and its image encoder share.
//!
//! Per layer x += attention(norm(x)); x += fc2(act(fc1(norm(x)))). Names and order are those of transformers 5.23,
//! `models/clip/modeling_clip.py`, `CLIPEncoderLayer`.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::{Activation, Layer, LayerNorm, Linear, Visit, attention};

/// Layers one after another.
#[derive(Clone, Debug)]
pub struct ClipTransformer {
    layers: Vec<ClipLayer>,
}

/// Sizes of a [`ClipTransformer`]; the names are those of a CLIP `config.json`.
#[derive(Clone, Copy, Debug)]
pub struct ClipTransformerSizes {
    /// Width of a token, D.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads a layer.
    pub num_attention_heads: usize,
    /// The feed-forward part's non-linearity.
    pub hidden_act: Activation,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
}

impl ClipTransformer {
    /// `vb` stands at `…encoder.layers`.
    pub fn new(sizes: &ClipTransformerSizes, vb: VarBuilder) -> Result<Self> {
        let layers =
            (0..sizes.num_hidden_layers).map(|i| ClipLayer::new(sizes, vb.pp(i))).collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// Input and output of the last layer: `x` (B, N, D) → two of (B, N, D), `hidden_states[-2]` and
    /// `[-1]` of transformers.
    pub fn forward(&self, x: &Tensor, causal: bool) -> Result<(Tensor, Tensor)> {
        let (mut before, mut x) = (x.clone(), x.clone());
        for layer in &self.layers {
            before = x;
            x = layer.forward(&before, causal)?;
        }
        Ok((before, x))
    }

    /// Calls `visit` with `{layer}.self_attn.q_proj` and so on, for every linear layer and norm in order.
    pub fn visit_layers(&mut self, visit: &mut Visit) {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            for (name, layer) in [
                ("layer_norm1", layer.layer_norm1.layer()),
                ("self_attn.q_proj", Layer::Linear(&mut layer.q_proj)),
                ("self_attn.k_proj", Layer::Linear(&mut layer.k_proj)),
                ("self_attn.v_proj", Layer::Linear(&mut layer.v_proj)),
                ("self_attn.out_proj", Layer::Linear(&mut layer.out_proj)),
                ("layer_norm2", layer.layer_norm2.layer()),
                ("mlp.fc1", Layer::Linear(&mut layer.fc1)),
                ("mlp.fc2", Layer::Linear(&mut layer.fc2)),
            ] {
                visit(&format!("{i}.{name}"), layer);
            }
        }
    }
}

#[derive(Clone, Debug)]
struct ClipLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
    layer_norm2: LayerNorm,
    fc1: Linear,
    act: Activation,
    fc2: Linear,
}

impl ClipLayer {
    fn new(sizes: &ClipTransformerSizes, vb: VarBuilder) -> Result<Self> {
        let (width, inner, eps) = (sizes.hidden_size, sizes.intermediate_size, sizes.layer_norm_eps);
        let projection = |name: &str| Linear::new(width, width, vb.pp("self_attn").pp(name));
        Ok(Self {
            layer_norm1: LayerNorm::new(width, eps, vb.pp("layer_norm1"))?,
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            heads: sizes.num_attention_heads,
            layer_norm2: LayerNorm::new(width, eps, vb.pp("layer_norm2"))?,
            fc1: Linear::new(width, inner, vb.pp("mlp.fc1"))?,
            act: sizes.hidden_act,
            fc2: Linear::new(inner, width, vb.pp("mlp.fc2"))?,
        })
    }

    /// (B, N, D) → same.
    fn forward(&self, x: &Tensor, causal: bool) -> Result<Tensor> {
        let h = self.layer_norm1.forward(x)?;
        let (q, k, v) = (self.q_proj.forward(&h)?, self.k_proj.forward(&h)?, self.v_proj.forward(&h)?);
        let x = (x + self.out_proj.forward(&attention(&q, &k, &v, self.heads, causal)?)?)?;
        let h = self.act.apply(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?)?;
        x + self.fc2.forward(&h)?
    }
}
