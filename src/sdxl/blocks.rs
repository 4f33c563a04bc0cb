//! The UNet's building blocks: ResNet and transformer layers, and the levels made of them.

use anyhow::{Context, Result};
use candle_core::{Module, Result as Computed, Tensor};
use candle_nn::VarBuilder;

use crate::layers::{
    Conv2d, ConvGeometry, GroupNorm, Layer, LayerNorm, Linear, Pass, Visit, add_to_channels, attention,
    checkpointed, geglu, image_to_tokens, tokens_to_image, upsample_nearest2x,
};

/// Groups and ε of a level's GroupNorms.
pub(super) type Norm = (usize, f64);

/// One attention of a level.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransformerSize {
    pub depth: usize,
    pub heads: usize,
    pub context: usize,
}

/// The conditioning that every block takes besides its input.
#[derive(Clone, Copy)]
pub(super) struct Conditioning<'a> {
    /// Embedding of timestep, pooled text and sizes (B, E), after SiLU.
    pub emb: &'a Tensor,
    /// Text (B, N, D).
    pub context: &'a Tensor,
    /// Gradient checkpointing: keep only the inputs of each segment and recompute it in the backward pass.
    pub recompute: bool,
}

impl Conditioning<'_> {
    /// `forward(layer, inputs, pass)`, recomputed in the backward pass if `recompute` is set.
    fn piece<L: Clone + Send + Sync + 'static>(
        &self,
        layer: &L,
        inputs: &[&Tensor],
        forward: fn(&L, &[Tensor], Pass) -> Computed<Tensor>,
    ) -> Computed<Tensor> {
        if self.recompute {
            let layer = layer.clone();
            return checkpointed(inputs, move |inputs, pass| forward(&layer, inputs, pass));
        }
        let inputs: Vec<Tensor> = inputs.iter().copied().cloned().collect();
        forward(layer, &inputs, Pass::Forward)
    }
}

/// Sizes of a level.
#[derive(Clone, Copy)]
pub(super) struct LevelSizes<'a> {
    /// Channels that each ResNet block is given.
    pub(super) inputs: &'a [usize],
    /// Channels that each gives.
    pub(super) width: usize,
    /// Width of the embedding of time and sizes.
    pub(super) embedding: usize,
    pub(super) norm: Norm,
    /// Of the transformer behind each block; empty on a level without attention.
    pub(super) attention: &'a [TransformerSize],
}

/// One level on the way down; pushes what the way up will need onto `skips`.
#[derive(Clone, Debug)]
pub(super) struct DownBlock {
    layers: Layers,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    pub(super) fn new(sizes: LevelSizes, downsample: bool, vb: VarBuilder) -> Result<Self> {
        let layers = Layers::new(sizes, vb.clone())?;
        let halve = ConvGeometry { stride: 2, ..ConvGeometry::same(3) };
        let width = sizes.width;
        let downsampler =
            downsample.then(|| Conv2d::new(width, width, halve, vb.pp("downsamplers.0.conv"))).transpose()?;
        Ok(Self { layers, downsampler })
    }

    pub(super) fn forward(&self, x: &Tensor, cond: Conditioning, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for i in 0..self.layers.resnets.len() {
            x = self.layers.forward(i, &[&x], cond)?;
            skips.push(x.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }

    pub(super) fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        self.layers.visit_layers(path, visit);
        if let Some(downsampler) = &mut self.downsampler {
            visit(&format!("{path}.downsamplers.0.conv"), Layer::Conv(downsampler));
        }
    }
}

/// The lowest level: ResNet, attention, ResNet; in distilled models the first alone.
#[derive(Clone, Debug)]
pub(super) struct MidBlock {
    first: Resnet,
    rest: Option<(Transformer, Resnet)>,
}

impl MidBlock {
    pub(super) fn new(
        width: usize,
        embedding: usize,
        norm: Norm,
        attention: Option<TransformerSize>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let first = Resnet::new(width, width, embedding, norm, vb.pp("resnets.0"))?;
        let rest = |size| -> Result<_> {
            let attention = Transformer::new(width, norm.0, size, vb.pp("attentions.0"))?;
            Ok((attention, Resnet::new(width, width, embedding, norm, vb.pp("resnets.1"))?))
        };
        Ok(Self { first, rest: attention.map(rest).transpose()? })
    }

    pub(super) fn forward(&self, x: &Tensor, cond: Conditioning) -> Result<Tensor> {
        let x = self.first.forward(&[x], cond)?;
        let Some((attention, second)) = &self.rest else { return Ok(x) };
        Ok(second.forward(&[&attention.forward(&x, cond)?], cond)?)
    }

    pub(super) fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        self.first.visit_layers(&format!("{path}.resnets.0"), visit);
        if let Some((attention, second)) = &mut self.rest {
            attention.visit_layers(&format!("{path}.attentions.0"), visit);
            second.visit_layers(&format!("{path}.resnets.1"), visit);
        }
    }
}

/// One level on the way up; pops from `skips`.
#[derive(Clone, Debug)]
pub(super) struct UpBlock {
    layers: Layers,
    upsampler: Option<Conv2d>,
}

impl UpBlock {
    pub(super) fn new(sizes: LevelSizes, upsample: bool, vb: VarBuilder) -> Result<Self> {
        let layers = Layers::new(sizes, vb.clone())?;
        let width = sizes.width;
        let upsampler = upsample
            .then(|| Conv2d::new(width, width, ConvGeometry::same(3), vb.pp("upsamplers.0.conv")))
            .transpose()?;
        Ok(Self { layers, upsampler })
    }

    pub(super) fn forward(&self, x: &Tensor, cond: Conditioning, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for i in 0..self.layers.resnets.len() {
            let skip = skips.pop().context("more layers on the way up than on the way down")?;
            x = self.layers.forward(i, &[&x, &skip], cond)?;
        }
        let Some(upsampler) = &self.upsampler else { return Ok(x) };
        // A side that was odd on the way down comes back one pixel too long; nearest upsampling to the odd size is
        // the same without that pixel.
        let skip = skips.last().context("an upsampler above the highest level")?;
        let (_, _, h, w) = skip.dims4()?;
        Ok(cond.piece(&(upsampler.clone(), h, w), &[&x], |(conv, h, w), x, pass| {
            let x = upsample_nearest2x(&x[0])?.narrow(2, 0, *h)?.narrow(3, 0, *w)?.contiguous()?;
            conv.forward_last(&x, pass)
        })?)
    }

    pub(super) fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        self.layers.visit_layers(path, visit);
        if let Some(upsampler) = &mut self.upsampler {
            visit(&format!("{path}.upsamplers.0.conv"), Layer::Conv(upsampler));
        }
    }
}

/// The ResNet blocks of a level, each followed by a transformer where the level has attention.
#[derive(Clone, Debug)]
struct Layers {
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer>,
}

impl Layers {
    fn new(sizes: LevelSizes, vb: VarBuilder) -> Result<Self> {
        let LevelSizes { inputs, width, embedding, norm, attention } = sizes;
        let mut layers = Self { resnets: Vec::new(), attentions: Vec::new() };
        for (i, &input) in inputs.iter().enumerate() {
            layers.resnets.push(Resnet::new(input, width, embedding, norm, vb.pp("resnets").pp(i))?);
            if let Some(size) = attention.get(i) {
                layers.attentions.push(Transformer::new(width, norm.0, *size, vb.pp("attentions").pp(i))?);
            }
        }
        Ok(layers)
    }

    fn forward(&self, i: usize, x: &[&Tensor], cond: Conditioning) -> Result<Tensor> {
        let x = self.resnets[i].forward(x, cond)?;
        Ok(match self.attentions.get(i) {
            Some(attention) => attention.forward(&x, cond)?,
            None => x,
        })
    }

    fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        for (i, resnet) in self.resnets.iter_mut().enumerate() {
            resnet.visit_layers(&format!("{path}.resnets.{i}"), visit);
        }
        for (i, attention) in self.attentions.iter_mut().enumerate() {
            attention.visit_layers(&format!("{path}.attentions.{i}"), visit);
        }
    }
}

/// Two convolutions around the time embedding, beside a shortcut.
#[derive(Clone, Debug)]
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    fn new(
        input: usize,
        output: usize,
        embedding: usize,
        (groups, eps): Norm,
        vb: VarBuilder,
    ) -> Result<Self> {
        let shortcut = |vb| Conv2d::new(input, output, ConvGeometry::same(1), vb);
        Ok(Self {
            norm1: GroupNorm::new(groups, input, eps, vb.pp("norm1"))?,
            conv1: Conv2d::new(input, output, ConvGeometry::same(3), vb.pp("conv1"))?,
            time_emb_proj: Linear::new(embedding, output, vb.pp("time_emb_proj"))?,
            norm2: GroupNorm::new(groups, output, eps, vb.pp("norm2"))?,
            conv2: Conv2d::new(output, output, ConvGeometry::same(3), vb.pp("conv2"))?,
            conv_shortcut: (input != output).then(|| shortcut(vb.pp("conv_shortcut"))).transpose()?,
        })
    }

    /// `x`, one or more images (B, C, H, W) whose channels are joined → (B, C', H, W).
    fn forward(&self, x: &[&Tensor], cond: Conditioning) -> Computed<Tensor> {
        let inputs = [x, &[cond.emb]].concat();
        cond.piece(self, &inputs, |resnet, inputs, pass| match inputs {
            [x @ .., emb] => resnet.compute(&Tensor::cat(x, 1)?, emb, pass),
            [] => candle_core::bail!("a ResNet block without inputs"),
        })
    }

    /// `x` (B, C, H, W), `emb` (B, E) after SiLU → (B, C', H, W).
    fn compute(&self, x: &Tensor, emb: &Tensor, pass: Pass) -> Computed<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let h = add_to_channels(&h, &self.time_emb_proj.forward(emb)?)?;
        let h = self.conv2.forward_last(&self.norm2.forward_silu(&h)?, pass)?;
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward_last(x, pass)? + h,
            None => x + h,
        }
    }

    fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        visit(&format!("{path}.norm1"), self.norm1.layer());
        visit(&format!("{path}.conv1"), Layer::Conv(&mut self.conv1));
        visit(&format!("{path}.time_emb_proj"), Layer::Linear(&mut self.time_emb_proj));
        visit(&format!("{path}.norm2"), self.norm2.layer());
        visit(&format!("{path}.conv2"), Layer::Conv(&mut self.conv2));
        if let Some(shortcut) = &mut self.conv_shortcut {
            visit(&format!("{path}.conv_shortcut"), Layer::Conv(shortcut));
        }
    }
}

/// Pixels as tokens through transformer blocks, and back, beside a shortcut (`Transformer2DModel`).
#[derive(Clone, Debug)]
struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

impl Transformer {
    fn new(width: usize, groups: usize, size: TransformerSize, vb: VarBuilder) -> Result<Self> {
        let blocks = (0..size.depth)
            .map(|i| TransformerBlock::new(width, size, vb.pp("transformer_blocks").pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self {
            // diffusers fixes this ε, apart from `norm_eps` (transformers/transformer_2d.py).
            norm: GroupNorm::new(groups, width, 1e-6, vb.pp("norm"))?,
            proj_in: Linear::new(width, width, vb.pp("proj_in"))?,
            blocks,
            proj_out: Linear::new(width, width, vb.pp("proj_out"))?,
        })
    }

    /// `x` (B, D, H, W) → same.
    fn forward(&self, x: &Tensor, cond: Conditioning) -> Computed<Tensor> {
        let ends = (self.norm.clone(), self.proj_in.clone());
        let mut y = cond.piece(&ends, &[x], |(norm, proj_in), x, pass| {
            proj_in.forward_last(&image_to_tokens(&norm.forward(&x[0])?)?, pass) // (B, H·W, D)
        })?;
        for block in &self.blocks {
            y = cond.piece(block, &[&y, cond.context], |block, inputs, pass| {
                block.forward(&inputs[0], &inputs[1], pass)
            })?;
        }
        cond.piece(&self.proj_out, &[x, &y], |proj_out, inputs, pass| {
            let (_, _, h, w) = inputs[0].dims4()?;
            &inputs[0] + tokens_to_image(&proj_out.forward_last(&inputs[1], pass)?, h, w)?
        })
    }

    fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        visit(&format!("{path}.norm"), self.norm.layer());
        visit(&format!("{path}.proj_in"), Layer::Linear(&mut self.proj_in));
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit_layers(&format!("{path}.transformer_blocks.{i}"), visit);
        }
        visit(&format!("{path}.proj_out"), Layer::Linear(&mut self.proj_out));
    }
}

/// Self-attention, attention to the text, feed-forward.
#[derive(Clone, Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl TransformerBlock {
    fn new(width: usize, size: TransformerSize, vb: VarBuilder) -> Result<Self> {
        let norm = |name| LayerNorm::new(width, 1e-5, vb.pp(name));
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::new(width, width, size.heads, vb.pp("attn1"))?,
            norm2: norm("norm2")?,
            attn2: Attention::new(width, size.context, size.heads, vb.pp("attn2"))?,
            norm3: norm("norm3")?,
            ff_in: Linear::new(width, 8 * width, vb.pp("ff.net.0.proj"))?,
            ff_out: Linear::new(4 * width, width, vb.pp("ff.net.2"))?,
        })
    }

    /// `x` (B, N, D), `context` (B, M, D') → (B, N, D).
    fn forward(&self, x: &Tensor, context: &Tensor, pass: Pass) -> Computed<Tensor> {
        let h = self.norm1.forward(x)?;
        let x = (x + self.attn1.forward(&h, &h)?)?;
        let x = (&x + self.attn2.forward(&self.norm2.forward(&x)?, context)?)?;
        let h = geglu(&self.ff_in.forward(&self.norm3.forward(&x)?)?)?;
        &x + self.ff_out.forward_last(&h, pass)?
    }

    fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        visit(&format!("{path}.norm1"), self.norm1.layer());
        self.attn1.visit_layers(&format!("{path}.attn1"), visit);
        visit(&format!("{path}.norm2"), self.norm2.layer());
        self.attn2.visit_layers(&format!("{path}.attn2"), visit);
        visit(&format!("{path}.norm3"), self.norm3.layer());
        visit(&format!("{path}.ff.net.0.proj"), Layer::Linear(&mut self.ff_in));
        visit(&format!("{path}.ff.net.2"), Layer::Linear(&mut self.ff_out));
    }
}

/// Queries from the image, keys and values from the image or the text.
#[derive(Clone, Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(width: usize, context: usize, heads: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            to_q: Linear::without_bias(width, width, vb.pp("to_q"))?,
            to_k: Linear::without_bias(context, width, vb.pp("to_k"))?,
            to_v: Linear::without_bias(context, width, vb.pp("to_v"))?,
            to_out: Linear::new(width, width, vb.pp("to_out.0"))?,
            heads,
        })
    }

    /// `x` (B, N, D), `context` (B, M, D') → (B, N, D).
    fn forward(&self, x: &Tensor, context: &Tensor) -> Computed<Tensor> {
        let (q, k, v) = (self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?);
        self.to_out.forward(&attention(&q, &k, &v, self.heads, false)?)
    }

    fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        visit(&format!("{path}.to_q"), Layer::Linear(&mut self.to_q));
        visit(&format!("{path}.to_k"), Layer::Linear(&mut self.to_k));
        visit(&format!("{path}.to_v"), Layer::Linear(&mut self.to_v));
        visit(&format!("{path}.to_out.0"), Layer::Linear(&mut self.to_out));
    }
}
