//! SDXL's UNet: noisy latents, timestep, text and image sizes → predicted noise or velocity.
//!
//! Podell et al. 2023 (arXiv 2307.01952), in diffusers' naming (`UNet2DConditionModel`). The layout is read from
//! the model's own `unet/config.json`, so that models of any width and depth run. Unlike candle's, it has SDXL's
//! own conditioning: the pooled text and the six size numbers enter through `add_embedding`.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::blocks::{Conditioning, DownBlock, LevelSizes, MidBlock, TransformerSize, UpBlock};
use crate::layers::{Activation, Conv2d, ConvGeometry, GroupNorm, Layer, Linear, Visit, compute_dtype};

/// `unet/config.json`. Keys that only repeat a default of SDXL may be absent; an option that is present with a
/// value that is not implemented is refused by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UNetConfig {
    /// Side of the latents that the model was trained for.
    pub sample_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// `DownBlock2D` or `CrossAttnDownBlock2D`, a level each.
    pub down_block_types: Vec<String>,
    /// `UpBlock2D` or `CrossAttnUpBlock2D`, from the lowest level up.
    pub up_block_types: Vec<String>,
    /// Channels a level.
    pub block_out_channels: Vec<usize>,
    /// ResNet blocks a level on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Width of the text context.
    pub cross_attention_dim: usize,
    /// Transformer blocks in each attention of a level; the last is the middle block's too.
    pub transformer_layers_per_block: Depths,
    /// The same on the way up, from the lowest level; that of the way down turned round where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverse_transformer_layers_per_block: Option<Depths>,
    /// `UNetMidBlock2DCrossAttn`, also where it is absent; `UNetMidBlock2D`, one ResNet block, in SSD-1B; null, none at
    /// all, in KOALA.
    #[serde(default = "default_mid_block")]
    pub mid_block_type: Option<String>,
    /// Width of the embedding of the guidance scale in models that were distilled with it (LCM); these need no second
    /// pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_cond_proj_dim: Option<usize>,
    /// Heads a level: diffusers keeps the misnomer `attention_head_dim` for their number.
    pub attention_head_dim: PerLevel,
    /// Width of the sinusoid for each of the six size numbers.
    pub addition_time_embed_dim: usize,
    /// Pooled text width + 6 · `addition_time_embed_dim`.
    pub projection_class_embeddings_input_dim: usize,
    /// Must be `text_time`.
    pub addition_embed_type: String,
    /// Groups of every GroupNorm.
    #[serde(default = "default_groups")]
    pub norm_num_groups: usize,
    /// ε of the GroupNorms in ResNet blocks.
    #[serde(default = "default_eps")]
    pub norm_eps: f64,
    /// Must be true: SDXL projects tokens, not pixels.
    #[serde(default)]
    pub use_linear_projection: bool,
    /// Whatever else the file holds; checked by [`UNetConfig::refuse_unsupported`].
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

fn default_groups() -> usize {
    32
}

fn default_eps() -> f64 {
    1e-5
}

#[allow(clippy::unnecessary_wraps)]
fn default_mid_block() -> Option<String> {
    Some("UNetMidBlock2DCrossAttn".into())
}

/// Which value of an option is implemented; `null` always is, and is what an absent option means.
enum Allowed {
    Null,
    Any,
    Flag(bool),
    Number(f64),
    Word(&'static str),
}

/// The options of diffusers 0.42's `UNet2DConditionModel` that [`UNetConfig`] has no field for. Any other is unknown.
const SUPPORTED: [(&str, Allowed); 32] = [
    ("act_fn", Allowed::Word("silu")),
    ("addition_embed_type_num_heads", Allowed::Any), // of another kind of embedding
    ("attention_type", Allowed::Word("default")),
    ("center_input_sample", Allowed::Flag(false)),
    ("class_embed_type", Allowed::Null),
    ("class_embeddings_concat", Allowed::Flag(false)),
    ("conv_in_kernel", Allowed::Number(3.0)),
    ("conv_out_kernel", Allowed::Number(3.0)),
    ("cross_attention_norm", Allowed::Null),
    ("downsample_padding", Allowed::Number(1.0)),
    ("dropout", Allowed::Any), // only in training
    ("dual_cross_attention", Allowed::Flag(false)),
    ("encoder_hid_dim", Allowed::Null),
    ("encoder_hid_dim_type", Allowed::Null),
    ("flip_sin_to_cos", Allowed::Flag(true)),
    ("freq_shift", Allowed::Number(0.0)),
    ("mid_block_only_cross_attention", Allowed::Flag(false)),
    ("mid_block_scale_factor", Allowed::Number(1.0)),
    ("num_attention_heads", Allowed::Null),
    ("num_class_embeds", Allowed::Null),
    ("only_cross_attention", Allowed::Flag(false)),
    ("resnet_out_scale_factor", Allowed::Number(1.0)),
    ("resnet_skip_time_act", Allowed::Flag(false)),
    ("resnet_time_scale_shift", Allowed::Word("default")),
    ("time_embedding_act_fn", Allowed::Null),
    ("time_embedding_dim", Allowed::Null),
    ("time_embedding_type", Allowed::Word("positional")),
    ("timestep_post_act", Allowed::Null),
    ("upcast_attention", Allowed::Any), // the softmax is computed in f32 in any case
    ("_class_name", Allowed::Any),
    ("_diffusers_version", Allowed::Any),
    ("_name_or_path", Allowed::Any),
];

/// One number for all levels, or one each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerLevel {
    /// The same on every level.
    All(usize),
    /// From the highest resolution down.
    Each(Vec<usize>),
}

impl PerLevel {
    fn at(&self, level: usize) -> usize {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values.get(level).copied().unwrap_or(1),
        }
    }

    fn fits(&self, levels: usize) -> bool {
        matches!(self, Self::All(_)) || matches!(self, Self::Each(values) if values.len() == levels)
    }
}

/// Transformer blocks in each attention: one number for all, one for each level, or one for each layer of a level, as in
/// the distilled SSD-1B.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Depths {
    /// The same everywhere below.
    All(usize),
    /// One each.
    Each(Vec<Depths>),
}

impl Depths {
    /// Of a layer of a level.
    fn at(&self, level: usize, layer: usize) -> usize {
        match self {
            Self::All(depth) => *depth,
            Self::Each(levels) => match levels.get(level) {
                Some(Self::All(depth)) => *depth,
                Some(Self::Each(layers)) => layers.get(layer).map_or(1, |depth| depth.at(0, 0)),
                None => 1,
            },
        }
    }

    /// Whether each of `levels` levels has one number, or one for each of `layers` layers.
    fn fits(&self, levels: usize, layers: usize) -> bool {
        let one = |level: &Self| match level {
            Self::All(_) => true,
            Self::Each(each) => {
                each.len() == layers && each.iter().all(|depth| matches!(depth, Self::All(_)))
            }
        };
        match self {
            Self::All(_) => true,
            Self::Each(each) => each.len() == levels && each.iter().all(one),
        }
    }

    /// Whether the layers of a level have numbers of their own.
    fn is_nested(&self) -> bool {
        matches!(self, Self::Each(levels) if levels.iter().any(|level| matches!(level, Self::Each(_))))
    }
}

impl UNetConfig {
    /// Whether guidance takes a second pass without the prompt. A model that was distilled with guidance takes the
    /// scale as an input instead.
    pub fn takes_two_passes(&self, guidance_scale: f64) -> bool {
        guidance_scale > 1.0 && self.time_cond_proj_dim.is_none()
    }

    /// Refuses layouts and options that are not implemented, by name.
    pub fn refuse_unsupported(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        ensure!(levels > 0, "`block_out_channels` is empty");
        ensure!(
            self.down_block_types.len() == levels && self.up_block_types.len() == levels,
            "`down_block_types`, `up_block_types` and `block_out_channels` differ in length"
        );
        for kind in self.down_block_types.iter().chain(&self.up_block_types) {
            ensure!(
                ["DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]
                    .contains(&kind.as_str()),
                "block type `{kind}` is not one of SDXL's"
            );
        }
        ensure!(
            self.attention_head_dim.fits(levels)
                && self.transformer_layers_per_block.fits(levels, self.layers_per_block),
            "`transformer_layers_per_block` and `attention_head_dim` need one number a level"
        );
        if let Some(reverse) = &self.reverse_transformer_layers_per_block {
            ensure!(
                reverse.fits(levels, self.layers_per_block + 1),
                "`reverse_transformer_layers_per_block` needs one number a level, or one for each of its {} layers",
                self.layers_per_block + 1
            );
        }
        ensure!(
            self.reverse_transformer_layers_per_block.is_some()
                || !self.transformer_layers_per_block.is_nested(),
            "`transformer_layers_per_block` has numbers for single layers; then `reverse_transformer_layers_per_block` \
             must say those of the way up"
        );
        if let Some(kind) = &self.mid_block_type {
            ensure!(
                ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"].contains(&kind.as_str()),
                "`mid_block_type` = `{kind}` is not supported"
            );
        }
        if let Some(width) = self.time_cond_proj_dim {
            ensure!(width >= 4, "`time_cond_proj_dim` = {width} is too small for an embedding");
        }
        ensure!(
            self.addition_embed_type == "text_time",
            "`addition_embed_type` is `{}`, SDXL's is `text_time`",
            self.addition_embed_type
        );
        ensure!(self.use_linear_projection, "`use_linear_projection` is false, SDXL's is true");
        for (key, value) in self.other.iter().filter(|(_, value)| !value.is_null()) {
            let known = SUPPORTED.iter().find(|(name, _)| name == key);
            let fits = match known {
                Some((_, Allowed::Null)) | None => false,
                Some((_, Allowed::Any)) => true,
                Some((_, Allowed::Flag(flag))) => *value == *flag,
                Some((_, Allowed::Number(number))) => value.as_f64() == Some(*number),
                Some((_, Allowed::Word(word))) => *value == *word,
            };
            ensure!(fits, "`{key}` = {value} is not supported");
        }
        Ok(())
    }
}

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

    /// Prediction for noisy latents: noise or velocity, by its scheduler config.
    ///
    /// # Shapes
    /// `latents` (B, C, H, W), `timesteps` (B) f32, `context` (B, N, D) text tokens, `pooled` (B, P),
    /// `time_ids` (B, 6): original height and width, crop top and left, target height and width → (B, C, H, W).
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        context: &Tensor,
        pooled: &Tensor,
        time_ids: &Tensor,
    ) -> Result<Tensor> {
        self.forward_watched(latents, timesteps, context, pooled, time_ids, None, &mut |_, _| {})
    }

    /// [`UNet::forward`] for models that were distilled with guidance: `guidance_scale` is their input, and has
    /// no part in others.
    pub fn forward_guided(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        context: &Tensor,
        pooled: &Tensor,
        time_ids: &Tensor,
        guidance_scale: f64,
    ) -> Result<Tensor> {
        let scale = Some(guidance_scale);
        self.forward_watched(latents, timesteps, context, pooled, time_ids, scale, &mut |_, _| {})
    }

    /// [`UNet::forward_guided`], with `watch` called on the output of each part: `conv_in`, `down_blocks.0`, …, `mid_block`,
    /// `up_blocks.0`, ….
    #[allow(clippy::too_many_arguments)]
    pub fn forward_watched(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        context: &Tensor,
        pooled: &Tensor,
        time_ids: &Tensor,
        guidance_scale: Option<f64>,
        watch: &mut dyn FnMut(&str, &Tensor),
    ) -> Result<Tensor> {
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// `unet/config.json` of stabilityai/stable-diffusion-xl-base-1.0, as diffusers 0.42 saves it.
    fn sdxl() -> Value {
        serde_json::from_str(
            r#"{
            "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
            "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20], "attention_type": "default", "block_out_channels": [320, 640, 1280],
            "center_input_sample": false, "class_embed_type": null, "class_embeddings_concat": false,
            "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": null,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "downsample_padding": 1, "dropout": 0.0, "dual_cross_attention": false, "encoder_hid_dim": null,
            "encoder_hid_dim_type": null, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
            "layers_per_block": 2, "mid_block_only_cross_attention": null, "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
            "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
            "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0,
            "resnet_skip_time_act": false, "resnet_time_scale_shift": "default",
            "reverse_transformer_layers_per_block": null, "sample_size": 128, "time_cond_proj_dim": null,
            "time_embedding_act_fn": null, "time_embedding_dim": null, "time_embedding_type": "positional",
            "timestep_post_act": null, "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": null,
            "use_linear_projection": true
        }"#,
        )
        .unwrap()
    }

    #[test]
    fn every_option_of_sdxl_is_taken_and_every_other_value_refused_by_name() {
        let check =
            |config: Value| serde_json::from_value::<UNetConfig>(config).unwrap().refuse_unsupported();
        check(sdxl()).unwrap();
        for (key, value) in [
            ("act_fn", json!("gelu")),
            ("class_embed_type", json!("timestep")),
            ("time_embedding_dim", json!(64)),
            ("resnet_time_scale_shift", json!("scale_shift")),
            ("mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
            ("mid_block_scale_factor", json!(0.5)),
            ("flip_sin_to_cos", json!(false)),
            ("reverse_transformer_layers_per_block", json!([[4, 4], 2, 1])),
            ("transformer_layers_per_block", json!([1, [2, 2], [4, 4]])),
            ("transformer_layers_per_block", json!([1, 2])),
            ("time_cond_proj_dim", json!(1)),
            ("encoder_hid_dim", json!(768)),
            ("addition_embed_type", json!("image")),
            ("use_linear_projection", json!(false)),
            ("an_option_of_next_year", json!(1)),
        ] {
            let mut config = sdxl();
            config[key] = value;
            let message = format!("{:#}", check(config).unwrap_err());
            assert!(message.contains(key), "{key}: {message}");
        }
    }
}
