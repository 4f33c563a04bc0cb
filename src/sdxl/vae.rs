//! Variational autoencoder between images and latents: diffusers' `AutoencoderKL`, differentiable.
//!
//! `mean, logvar = encode(x)`, `z = mean + exp(logvar / 2) · ε`, `x = decode(z)`; the diffusion model sees
//! `scaling_factor · z`. The names of the weights and the computation are those of diffusers 0.42,
//! `models/autoencoders/autoencoder_kl.py`; a parity test holds values and gradients against it.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::layers::{Activation, Conv2d, ConvGeometry, GroupNorm, Linear, attention, upsample_nearest2x};

/// `vae/config.json`. What a file leaves out has diffusers' default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VaeConfig {
    /// Channels of an image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// One name a level; only `DownEncoderBlock2D` is known.
    pub down_block_types: Vec<String>,
    /// One name a level; only `UpDecoderBlock2D` is known.
    pub up_block_types: Vec<String>,
    /// Channels of each level, from the image inwards; each level but the last halves the side.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks a level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Only `Silu` is known.
    pub act_fn: Activation,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of every GroupNorm.
    pub norm_num_groups: usize,
    /// Side of the images that it was trained on, in pixels; no part of the computation.
    pub sample_size: usize,
    /// Latents are multiplied by it before diffusion; SDXL ships 0.13025.
    pub scaling_factor: f64,
    /// Subtracted from latents before scaling.
    pub shift_factor: Option<f64>,
    /// Mean of each latent channel.
    pub latents_mean: Option<Vec<f64>>,
    /// Standard deviation of each latent channel.
    pub latents_std: Option<Vec<f64>>,
    /// Whether it must run in f32, because its activations overflow f16 (SDXL's do).
    pub force_upcast: bool,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the innermost blocks attend over all pixels.
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DOWN_BLOCK.into()],
            up_block_types: vec![UP_BLOCK.into()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

const DOWN_BLOCK: &str = "DownEncoderBlock2D";
const UP_BLOCK: &str = "UpDecoderBlock2D";

impl VaeConfig {
    /// A network of these sizes with every other setting as in SDXL.
    pub fn sized(block_out_channels: &[usize], layers_per_block: usize, norm_num_groups: usize) -> Self {
        Self {
            down_block_types: vec![DOWN_BLOCK.into(); block_out_channels.len()],
            up_block_types: vec![UP_BLOCK.into(); block_out_channels.len()],
            block_out_channels: block_out_channels.to_vec(),
            layers_per_block,
            norm_num_groups,
            ..Self::default()
        }
    }

    /// Pixels along the side of the square that one latent pixel stands for; 8 in SDXL.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len().max(1) - 1)
    }

    /// The whole `config.json`, as diffusers opens it.
    pub fn to_json(&self) -> Value {
        let mut config = json!(self);
        config["_class_name"] = json!("AutoencoderKL");
        config
    }

    /// Refuses what this implementation does not compute, naming the setting.
    fn check(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        ensure!(levels > 0, "`block_out_channels` is empty");
        for (key, types, known) in [
            ("down_block_types", &self.down_block_types, DOWN_BLOCK),
            ("up_block_types", &self.up_block_types, UP_BLOCK),
        ] {
            ensure!(
                types.len() == levels,
                "`{key}` has {} entries, `block_out_channels` {levels}",
                types.len()
            );
            if let Some(other) = types.iter().find(|name| *name != known) {
                anyhow::bail!("`{key}` asks for `{other}`; only `{known}` is supported");
            }
        }
        ensure!(self.act_fn == Activation::Silu, "`act_fn` is {:?}; only silu is supported", self.act_fn);
        for (key, values) in [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)] {
            if let Some(values) = values {
                ensure!(
                    values.len() == self.latent_channels,
                    "`{key}` has {} entries, `latent_channels` is {}",
                    values.len(),
                    self.latent_channels
                );
            }
        }
        ensure!(
            self.latents_mean.is_some() == self.latents_std.is_some(),
            "`latents_mean` and `latents_std` come only together"
        );
        Ok(())
    }
}

/// Encoder and decoder.
#[derive(Clone, Debug)]
pub struct Vae {
    config: VaeConfig,
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
}

impl Vae {
    /// Builds both halves from the weights in `vb`.
    pub fn new(config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        config.check().context("this VAE cannot be used")?;
        let latent = config.latent_channels;
        let pointwise = |wanted: bool, channels: usize, name: &str| {
            wanted.then(|| Conv2d::new(channels, channels, ConvGeometry::same(1), vb.pp(name))).transpose()
        };
        Ok(Self {
            encoder: Encoder::new(config, vb.pp("encoder"))?,
            quant_conv: pointwise(config.use_quant_conv, 2 * latent, "quant_conv")?,
            post_quant_conv: pointwise(config.use_post_quant_conv, latent, "post_quant_conv")?,
            decoder: Decoder::new(config, vb.pp("decoder"))?,
            config: config.clone(),
        })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.encoder.conv_in.weight.device()
    }

    /// The settings that it was built from.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Mean and log-variance of the latents of images in [−1, 1]: `x` (B, 3, H, W) → two of (B, C, H/f, W/f),
    /// log-variance within −30…20 as in diffusers.
    pub fn encode(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, _, h, w) = x.dims4()?;
        let factor = self.config.factor();
        ensure!(
            h % factor == 0 && w % factor == 0,
            "an image of {w}×{h} pixels cannot be encoded: both sides must be multiples of {factor}"
        );
        let mut moments = self.encoder.forward(x)?;
        if let Some(conv) = &self.quant_conv {
            moments = conv.forward(&moments)?;
        }
        let c = self.config.latent_channels;
        let mean = moments.narrow(1, 0, c)?.contiguous()?;
        let logvar = moments.narrow(1, c, c)?.contiguous()?.clamp(-30f32, 20f32)?;
        Ok((mean, logvar))
    }

    /// Images of latents that are not scaled: `z` (B, C, h, w) → (B, 3, h·f, w·f), in about [−1, 1].
    pub fn decode(&self, z: &Tensor) -> Result<Tensor> {
        match &self.post_quant_conv {
            Some(conv) => self.decoder.forward(&conv.forward(z)?),
            None => self.decoder.forward(z),
        }
    }

    /// The same images as [`Vae::decode`] gives, in a fraction of the memory: beyond the innermost level the image
    /// is worked on in strips of about `pixels` pixels.
    ///
    /// Tiles that are decoded each for itself and blended, as diffusers' tiling does, differ in brightness and contrast,
    /// because each GroupNorm sees one tile. Here every norm is given the statistics of all strips and every
    /// convolution the rows of its neighbours, so that there is no seam to hide.
    pub fn decode_in_strips(&self, z: &Tensor, pixels: usize) -> Result<Tensor> {
        match &self.post_quant_conv {
            Some(conv) => self.decoder.forward_in_strips(&conv.forward(z)?, pixels),
            None => self.decoder.forward_in_strips(z, pixels),
        }
    }

    /// The type of its weights.
    pub fn dtype(&self) -> DType {
        self.decoder.conv_in.weight.dtype()
    }

    /// Output of the encoder, scaled for the diffusion model: (z − shift) · scaling_factor. (B, C, h, w) → same.
    pub fn to_latents(&self, z: &Tensor) -> Result<Tensor> {
        let (shift, scale) = self.shift_and_scale(z)?;
        Ok(z.broadcast_sub(&shift)?.broadcast_mul(&scale)?)
    }

    /// The reverse of [`Vae::to_latents`], before [`Vae::decode`].
    pub fn from_latents(&self, latents: &Tensor) -> Result<Tensor> {
        let (shift, scale) = self.shift_and_scale(latents)?;
        Ok(latents.broadcast_div(&scale)?.broadcast_add(&shift)?)
    }

    /// Per channel, both (1, C, 1, 1). diffusers: `latents · std / scaling_factor + mean`.
    fn shift_and_scale(&self, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let c = self.config.latent_channels;
        let shift = match &self.config.latents_mean {
            Some(mean) => mean.clone(),
            None => vec![self.config.shift_factor.unwrap_or(0.0); c],
        };
        let std = self.config.latents_std.clone().unwrap_or(vec![1.0; c]);
        let scale: Vec<f64> = std.iter().map(|std| self.config.scaling_factor / std).collect();
        let channels =
            |values: Vec<f64>| Tensor::from_vec(values, (1, c, 1, 1), like.device())?.to_dtype(like.dtype());
        Ok((channels(shift)?, channels(scale)?))
    }
}

#[derive(Clone, Debug)]
struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<Level>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        let channels = &config.block_out_channels;
        let last = channels.len() - 1;
        let mut down_blocks = Vec::new();
        for (i, &out) in channels.iter().enumerate() {
            let vb = vb.pp("down_blocks").pp(i);
            let input = channels[i.saturating_sub(1)];
            // diffusers pads below and to the right only, then convolves with stride 2.
            let halve = ConvGeometry { kernel: 3, stride: 2, pad_before: 0, pad_after: 1 };
            let resize =
                (i < last).then(|| Conv2d::new(out, out, halve, vb.pp("downsamplers.0.conv"))).transpose()?;
            down_blocks.push(Level {
                resnets: resnets(input, out, config.layers_per_block, config, vb.pp("resnets"))?,
                resize,
            });
        }
        Ok(Self {
            conv_in: Conv2d::new(config.in_channels, channels[0], ConvGeometry::same(3), vb.pp("conv_in"))?,
            down_blocks,
            mid_block: MidBlock::new(channels[last], config, vb.pp("mid_block"))?,
            conv_norm_out: norm(channels[last], config, vb.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(
                channels[last],
                2 * config.latent_channels,
                ConvGeometry::same(3),
                vb.pp("conv_out"),
            )?,
        })
    }

    /// (B, 3, H, W) → (B, 2C, H/f, W/f).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for level in &self.down_blocks {
            for resnet in &level.resnets {
                x = resnet.forward(&x)?;
            }
            if let Some(conv) = &level.resize {
                x = conv.forward(&x)?;
            }
        }
        let x = self.mid_block.forward(&x)?;
        Ok(self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)?)
    }
}

#[derive(Clone, Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<Level>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (inner, last) = (channels[0], channels.len() - 1);
        let mut up_blocks = Vec::new();
        for (i, &out) in channels.iter().enumerate() {
            let vb = vb.pp("up_blocks").pp(i);
            let input = channels[i.saturating_sub(1)];
            let resize = (i < last)
                .then(|| Conv2d::new(out, out, ConvGeometry::same(3), vb.pp("upsamplers.0.conv")))
                .transpose()?;
            up_blocks.push(Level {
                resnets: resnets(input, out, config.layers_per_block + 1, config, vb.pp("resnets"))?,
                resize,
            });
        }
        Ok(Self {
            conv_in: Conv2d::new(config.latent_channels, inner, ConvGeometry::same(3), vb.pp("conv_in"))?,
            mid_block: MidBlock::new(inner, config, vb.pp("mid_block"))?,
            up_blocks,
            conv_norm_out: norm(channels[last], config, vb.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(
                channels[last],
                config.out_channels,
                ConvGeometry::same(3),
                vb.pp("conv_out"),
            )?,
        })
    }

    /// (B, C, h, w) → (B, 3, h·f, w·f).
    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut x = self.mid_block.forward(&self.conv_in.forward(z)?)?;
        for level in &self.up_blocks {
            for resnet in &level.resnets {
                x = resnet.forward(&x)?;
            }
            if let Some(conv) = &level.resize {
                x = conv.forward(&upsample_nearest2x(&x)?)?;
            }
        }
        Ok(self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)?)
    }
}

impl Decoder {
    /// Output of `forward`, see [`Vae::decode_in_strips`].
    fn forward_in_strips(&self, z: &Tensor, pixels: usize) -> Result<Tensor> {
        let x = self.mid_block.forward(&self.conv_in.forward(z)?)?;
        let mut strips = split(&x, pixels)?;
        drop(x);
        for level in &self.up_blocks {
            for resnet in &level.resnets {
                strips = resnet.forward_in_strips(strips)?;
            }
            if let Some(conv) = &level.resize {
                let mut larger = Vec::new();
                for strip in strips {
                    larger.extend(split(&upsample_nearest2x(&strip)?, pixels)?);
                }
                strips = convolve(conv, larger, |x| Ok(x.clone()))?;
            }
        }
        let statistics = self.conv_norm_out.statistics(&strips)?;
        let normalise = |x: &Tensor| Ok(self.conv_norm_out.forward_silu_with(x, &statistics)?);
        Ok(Tensor::cat(&convolve(&self.conv_out, strips, normalise)?, 2)?)
    }
}

/// Cuts an image (B, C, H, W) into strips (B, C, h, W) of at most `pixels` pixels, or of one row.
fn split(x: &Tensor, pixels: usize) -> Result<Vec<Tensor>> {
    let (_, _, height, width) = x.dims4()?;
    let rows = (pixels / width).clamp(1, height);
    let strip = |first: usize| Ok(x.narrow(2, first, rows.min(height - first))?.force_contiguous()?);
    (0..height).step_by(rows).map(strip).collect()
}

/// `conv` of `before(x)` for an image in strips. `conv` has a kernel of 3 and keeps the size; `before` treats each
/// pixel by itself. A strip is let go when the next one is done.
fn convolve(
    conv: &Conv2d,
    strips: Vec<Tensor>,
    before: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let mut out = Vec::with_capacity(strips.len());
    let mut strips = strips.into_iter().peekable();
    let mut above: Option<Tensor> = None;
    while let Some(strip) = strips.next() {
        let rows = strip.dim(2)?;
        let last = strip.narrow(2, rows - 1, 1)?.force_contiguous()?;
        let below = strips.peek().map(|next| next.narrow(2, 0, 1)).transpose()?;
        let skipped = usize::from(above.is_some());
        let parts: Vec<Tensor> = [above, Some(strip), below].into_iter().flatten().collect();
        let x = before(&Tensor::cat(&parts, 2)?)?;
        drop(parts);
        out.push(conv.forward(&x)?.narrow(2, skipped, rows)?.force_contiguous()?);
        above = Some(last);
    }
    Ok(out)
}

/// Residual blocks at one size of image, and the convolution on the way to the next.
#[derive(Clone, Debug)]
struct Level {
    resnets: Vec<Resnet>,
    resize: Option<Conv2d>,
}

fn resnets(
    input: usize,
    out: usize,
    count: usize,
    config: &VaeConfig,
    vb: VarBuilder,
) -> Result<Vec<Resnet>> {
    (0..count).map(|i| Resnet::new(if i == 0 { input } else { out }, out, config, vb.pp(i))).collect()
}

fn norm(channels: usize, config: &VaeConfig, vb: VarBuilder) -> Result<GroupNorm> {
    Ok(GroupNorm::new(config.norm_num_groups, channels, 1e-6, vb)?)
}

#[derive(Clone, Debug)]
struct MidBlock {
    before: Resnet,
    attention: Option<PixelAttention>,
    after: Resnet,
}

impl MidBlock {
    fn new(channels: usize, config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        let attention = config
            .mid_block_add_attention
            .then(|| PixelAttention::new(channels, config, vb.pp("attentions.0")))
            .transpose()?;
        Ok(Self {
            before: Resnet::new(channels, channels, config, vb.pp("resnets.0"))?,
            attention,
            after: Resnet::new(channels, channels, config, vb.pp("resnets.1"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.before.forward(x)?;
        match &self.attention {
            Some(attention) => self.after.forward(&attention.forward(&x)?),
            None => self.after.forward(&x),
        }
    }
}

/// x + conv(silu(norm(conv(silu(norm(x)))))).
#[derive(Clone, Debug)]
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    fn new(input: usize, out: usize, config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        let same = ConvGeometry::same(3);
        Ok(Self {
            norm1: norm(input, config, vb.pp("norm1"))?,
            conv1: Conv2d::new(input, out, same, vb.pp("conv1"))?,
            norm2: norm(out, config, vb.pp("norm2"))?,
            conv2: Conv2d::new(out, out, same, vb.pp("conv2"))?,
            conv_shortcut: (input != out)
                .then(|| Conv2d::new(input, out, ConvGeometry::same(1), vb.pp("conv_shortcut")))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        Ok(match &self.conv_shortcut {
            Some(conv) => (conv.forward(x)? + h)?,
            None => (x + h)?,
        })
    }
}

impl Resnet {
    /// Output of `forward`, on an image in strips.
    fn forward_in_strips(&self, x: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let statistics = self.norm1.statistics(&x)?;
        let h = convolve(&self.conv1, x.clone(), |x| Ok(self.norm1.forward_silu_with(x, &statistics)?))?;
        let statistics = self.norm2.statistics(&h)?;
        let h = convolve(&self.conv2, h, |x| Ok(self.norm2.forward_silu_with(x, &statistics)?))?;
        let add = |(x, h): (Tensor, Tensor)| -> Result<Tensor> {
            Ok(match &self.conv_shortcut {
                Some(conv) => (conv.forward(&x)? + h)?,
                None => (x + h)?,
            })
        };
        x.into_iter().zip(h).map(add).collect()
    }
}

/// Every pixel attends to every other, with one head.
#[derive(Clone, Debug)]
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl PixelAttention {
    fn new(channels: usize, config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        let linear = |name: &str| Linear::new(channels, channels, vb.pp(name));
        Ok(Self {
            group_norm: norm(channels, config, vb.pp("group_norm"))?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let tokens = self.group_norm.forward(x)?.reshape((b, c, h * w))?.transpose(1, 2)?.contiguous()?; // (B, N, C)
        let (q, k, v) =
            (self.to_q.forward(&tokens)?, self.to_k.forward(&tokens)?, self.to_v.forward(&tokens)?);
        let y = self.to_out.forward(&attention(&q, &k, &v, 1, false)?)?; // (B, N, C)
        Ok((x + y.transpose(1, 2)?.reshape((b, c, h, w))?)?)
    }
}
