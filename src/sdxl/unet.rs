//! SDXL's UNet: noisy latents, timestep, text and image sizes → predicted noise or velocity.
//!
//! Podell et al. 2023 (arXiv 2307.01952), in diffusers' naming (`UNet2DConditionModel`). The layout is read from
//! the model's own `unet/config.json`, so that models of any width and depth run. Unlike candle's, it has SDXL's
//! own conditioning: the pooled text and the six size numbers enter through `add_embedding`.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{Conditioning, DownBlock, LevelSizes, MidBlock, TransformerSize, UpBlock};
pub use super::unet_config::{Depths, PerLevel, UNetConfig};
use crate::layers::{Activation, Conv2d, ConvGeometry, GroupNorm, Layer, Linear, Visit, compute_dtype};

/// Models with a level of so many channels are recomputed in training; SDXL's widest has 1280.
const RECOMPUTED_WIDTH: usize = 512;

/// The network.
#[derive(Clone, Debug)]
pub struct UNet {
    /// As read.
    pub config: UNetConfig,
    /// Whether a backward pass computes what lies inside ResNet and transformer blocks again, instead of finding it
    /// kept (gradient checkpointing): a third more work in a fraction of the memory, the same gradients. By itself for
    /// models as wide as SDXL. Without variables to train it changes nothing.
    pub recompute: bool,
    conv_in: Conv2d,
    time_embedding: Embedding,
    add_embedding: Embedding,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// What the UNet predicts from.
#[derive(Clone, Copy, Debug)]
pub struct UNetInput<'a> {
    /// Noisy latents, (B, C, H, W).
    pub latents: &'a Tensor,
    /// (B), f32.
    pub timesteps: &'a Tensor,
    /// Text tokens, (B, N, D).
    pub context: &'a Tensor,
    /// Pooled text, (B, P).
    pub pooled: &'a Tensor,
    /// Original height and width, crop top and left, target height and width: (B, 6).
    pub time_ids: &'a Tensor,
    /// Input of models that were distilled with guidance; has no part in others.
    pub guidance_scale: Option<f64>,
}

impl UNet {
    /// Builds the network that `config` describes, on the weights of `vb` (diffusers' names).
    ///
    /// # Errors
    /// An unsupported option, or a weight that is missing or of another shape.
    pub fn new(config: &UNetConfig, vb: VarBuilder) -> Result<Self> {
        config.refuse_unsupported().context("unet/config.json")?;
        let channels = &config.block_out_channels;
        let levels = channels.len();
        let embedding = 4 * channels[0];
        let norm = (config.norm_num_groups, config.norm_eps);
        let transformer = |level: usize, depth: usize| TransformerSize {
            depth,
            heads: config.attention_head_dim.at(level),
            context: config.cross_attention_dim,
        };

        let conv_in = Conv2d::new(config.in_channels, channels[0], ConvGeometry::same(3), vb.pp("conv_in"))?;
        let mut time_embedding = Embedding::new(channels[0], embedding, vb.pp("time_embedding"))?;
        if let Some(width) = config.time_cond_proj_dim {
            let cond_proj = Linear::without_bias(width, channels[0], vb.pp("time_embedding.cond_proj"))?;
            time_embedding.cond_proj = Some(cond_proj);
        }
        let add_embedding =
            Embedding::new(config.projection_class_embeddings_input_dim, embedding, vb.pp("add_embedding"))?;

        let mut skips = vec![channels[0]];
        let mut width = channels[0];
        let mut down_blocks = Vec::new();
        for (level, &channel) in channels.iter().enumerate() {
            let layers = match config.down_block_types[level].as_str() {
                "CrossAttnDownBlock2D" => 0..config.layers_per_block,
                _ => 0..0,
            };
            let attention: Vec<_> = layers
                .map(|layer| transformer(level, config.transformer_layers_per_block.at(level, layer)))
                .collect();
            let inputs: Vec<usize> =
                (0..config.layers_per_block).map(|i| if i == 0 { width } else { channel }).collect();
            width = channel;
            skips.extend(std::iter::repeat_n(width, inputs.len()));
            let last = level + 1 == levels;
            if !last {
                skips.push(width);
            }
            let vb = vb.pp("down_blocks").pp(level);
            let sizes = LevelSizes { inputs: &inputs, width, embedding, norm, attention: &attention };
            down_blocks.push(DownBlock::new(sizes, !last, vb)?);
        }
        let lowest = levels - 1;
        let mid_block = match config.mid_block_type.as_deref() {
            None => None,
            Some("UNetMidBlock2D") => Some(MidBlock::new(width, embedding, norm, None, vb.pp("mid_block"))?),
            Some(_) => {
                let size = transformer(lowest, config.transformer_layers_per_block.at(lowest, 0));
                Some(MidBlock::new(width, embedding, norm, Some(size), vb.pp("mid_block"))?)
            }
        };
        let mut up_blocks = Vec::new();
        for (i, kind) in config.up_block_types.iter().enumerate() {
            let level = levels - 1 - i;
            let depth = |layer: usize| match &config.reverse_transformer_layers_per_block {
                Some(reverse) => reverse.at(i, layer),
                None => config.transformer_layers_per_block.at(level, layer),
            };
            let layers = if kind == "CrossAttnUpBlock2D" { 0..config.layers_per_block + 1 } else { 0..0 };
            let attention: Vec<_> = layers.map(|layer| transformer(level, depth(layer))).collect();
            let mut inputs = Vec::new();
            for _ in 0..=config.layers_per_block {
                let skip = skips.pop().context("more layers on the way up than on the way down")?;
                inputs.push(width + skip);
                width = channels[level];
            }
            let vb = vb.pp("up_blocks").pp(i);
            let sizes = LevelSizes { inputs: &inputs, width, embedding, norm, attention: &attention };
            up_blocks.push(UpBlock::new(sizes, level > 0, vb)?);
        }
        let conv_norm_out = GroupNorm::new(norm.0, width, norm.1, vb.pp("conv_norm_out"))?;
        let conv_out = Conv2d::new(width, config.out_channels, ConvGeometry::same(3), vb.pp("conv_out"))?;
        Ok(Self {
            config: config.clone(),
            recompute: channels.iter().any(|&width| width >= RECOMPUTED_WIDTH),
            conv_in,
            time_embedding,
            add_embedding,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out,
            conv_out,
        })
    }

    /// Prediction for noisy latents, (B, C, H, W): noise or velocity, by its scheduler config.
    pub fn forward(&self, input: &UNetInput) -> Result<Tensor> {
        self.forward_watched(input, &mut |_, _| {})
    }

    /// [`UNet::forward`], with `watch` called on the output of each part: `conv_in`, `down_blocks.0`, …, `mid_block`,
    /// `up_blocks.0`, ….
    pub fn forward_watched(&self, input: &UNetInput, watch: &mut dyn FnMut(&str, &Tensor)) -> Result<Tensor> {
        let UNetInput { latents, timesteps, context, pooled, time_ids, guidance_scale } = *input;
        let (b, _, _, _) = latents.dims4()?;
        let dtype = latents.dtype();
        let time = sinusoid(timesteps, self.config.block_out_channels[0])?.to_dtype(dtype)?;
        let sizes = sinusoid(&time_ids.flatten_all()?, self.config.addition_time_embed_dim)?;
        let sizes = sizes.reshape((b, ()))?.to_dtype(dtype)?; // (B, 6 · addition_time_embed_dim)
        let added = Tensor::cat(&[pooled, &sizes], 1)?;
        let time = match (&self.time_embedding.cond_proj, guidance_scale) {
            (Some(cond_proj), Some(scale)) => {
                let (_, width) = cond_proj.weight.dims2()?;
                let scale = guidance_embedding(scale, width, latents.device())?.to_dtype(dtype)?;
                time.broadcast_add(&cond_proj.forward(&scale)?)?
            }
            _ => time,
        };
        let emb = (self.time_embedding.forward(&time)? + self.add_embedding.forward(&added)?)?;
        let emb = Activation::Silu.apply(&emb)?; // every ResNet block begins with SiLU(emb)

        let cond = Conditioning { emb: &emb, context, recompute: self.recompute };
        let mut x = self.conv_in.forward(latents)?;
        watch("conv_in", &x);
        let mut skips = vec![x.clone()];
        for (i, block) in self.down_blocks.iter().enumerate() {
            x = block.forward(&x, cond, &mut skips)?;
            watch(&format!("down_blocks.{i}"), &x);
        }
        if let Some(mid_block) = &self.mid_block {
            x = mid_block.forward(&x, cond)?;
            watch("mid_block", &x);
        }
        for (i, block) in self.up_blocks.iter().enumerate() {
            x = block.forward(&x, cond, &mut skips)?;
            watch(&format!("up_blocks.{i}"), &x);
        }
        Ok(self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)?)
    }

    /// The type in which it computes: that of the latents and the text that it is given.
    pub fn compute_dtype(&self) -> DType {
        compute_dtype(self.conv_in.weight.dtype(), self.conv_in.weight.device())
    }

    /// Visits every linear layer, by its diffusers path without `.weight`.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&str, &mut Linear)) {
        self.visit_layers(&mut |path, layer| {
            if let Layer::Linear(linear) = layer {
                visit(path, linear);
            }
        });
    }

    /// Visits every layer that a LoRA file may change, by its diffusers path without `.weight`.
    pub fn visit_layers(&mut self, visit: &mut Visit) {
        visit("conv_in", Layer::Conv(&mut self.conv_in));
        self.time_embedding.visit_layers("time_embedding", visit);
        self.add_embedding.visit_layers("add_embedding", visit);
        for (i, block) in self.down_blocks.iter_mut().enumerate() {
            block.visit_layers(&format!("down_blocks.{i}"), visit);
        }
        if let Some(mid_block) = &mut self.mid_block {
            mid_block.visit_layers("mid_block", visit);
        }
        for (i, block) in self.up_blocks.iter_mut().enumerate() {
            block.visit_layers(&format!("up_blocks.{i}"), visit);
        }
        visit("conv_norm_out", self.conv_norm_out.layer());
        visit("conv_out", Layer::Conv(&mut self.conv_out));
    }
}

/// Two linear layers with SiLU between.
#[derive(Clone, Debug)]
struct Embedding {
    /// Embedding of the guidance scale, added to the timestep's.
    cond_proj: Option<Linear>,
    linear_1: Linear,
    linear_2: Linear,
}

impl Embedding {
    fn new(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            cond_proj: None,
            linear_1: Linear::new(input, output, vb.pp("linear_1"))?,
            linear_2: Linear::new(output, output, vb.pp("linear_2"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.linear_2.forward(&Activation::Silu.apply(&self.linear_1.forward(x)?)?)?)
    }

    fn visit_layers(&mut self, path: &str, visit: &mut Visit) {
        if let Some(cond_proj) = &mut self.cond_proj {
            visit(&format!("{path}.cond_proj"), Layer::Linear(cond_proj));
        }
        visit(&format!("{path}.linear_1"), Layer::Linear(&mut self.linear_1));
        visit(&format!("{path}.linear_2"), Layer::Linear(&mut self.linear_2));
    }
}

/// cos and sin of `values` at `width`/2 frequencies from 1 to 1/10000, in f32 whatever the model's type. (B) → (B, width).
pub fn sinusoid(values: &Tensor, width: usize) -> Result<Tensor> {
    let half = width / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| (-(10_000f64.ln()) * i as f64 / half as f64).exp() as f32).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), values.device())?;
    let angles = values.to_dtype(DType::F32)?.unsqueeze(1)?.broadcast_mul(&frequencies)?;
    Ok(Tensor::cat(&[angles.cos()?, angles.sin()?], 1)?)
}

/// Embedding of the guidance scale for distilled models, (1, width): sin and cos of 1000·(scale − 1) at `width`/2
/// frequencies. diffusers' `get_guidance_scale_embedding`; in f32 as there, since the angles are large.
fn guidance_embedding(scale: f64, width: usize, device: &Device) -> Result<Tensor> {
    let half = width / 2;
    let step = 10_000f32.ln() / (half - 1) as f32;
    let w = (scale - 1.0) as f32 * 1000.0;
    let angles: Vec<f32> = (0..half).map(|i| w * (i as f32 * -step).exp()).collect();
    let mut values: Vec<f32> = angles.iter().map(|x| x.sin()).chain(angles.iter().map(|x| x.cos())).collect();
    values.resize(width, 0.0); // an odd width ends with a zero
    Ok(Tensor::from_vec(values, (1, width), device)?)
}
