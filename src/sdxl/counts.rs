//! Parameters and multiply-adds of a model, from its configs alone.
//!
//! The networks are built on zero-stride weights, and the shapes that they ask for are recorded. A weight of n numbers costs n multiply-adds wherever it is applied: a convolution at each pixel of its
//! output, a linear layer at each token, the time embedding once. Biases, norms and non-linearities are not counted.
//! So *On the Scalability of Diffusion-based Text-to-Image Generation* counts (Li et al. 2024, arXiv 2404.02883). The
//! products of attention, Q·Kᵀ and the sum over values, are 2·N·M·D for N queries of width D over M keys; they are
//! counted separately, because at 1024² they change which variant is cheaper.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use serde::Serialize;

use super::architecture;
use super::text::{ClipTextConfig, ClipTextModel};
use super::unet::{UNet, UNetConfig};
use super::vae::{Vae, VaeConfig};
use crate::failure::Failure;
use crate::weights::model_folder::ModelFiles;

/// Parameters and MACs of a part of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Numbers in its weights.
    pub parameters: u64,
    /// Multiply-adds of its convolutions and linear layers in one pass.
    pub multiply_adds: u64,
    /// Multiply-adds of its attention products in one pass, not part of the others.
    pub attention_products: u64,
}

impl Cost {
    /// Both countings together.
    pub fn with_attention(&self) -> u64 {
        self.multiply_adds + self.attention_products
    }
}

/// The costs of a model for one prompt, one step without guidance and one image.
pub struct ModelCost {
    /// Width of the image in pixels.
    pub width: usize,
    /// Its height.
    pub height: usize,
    /// Length of the prompt.
    pub tokens: u64,
    /// Each part by its name.
    pub parts: [(&'static str, Cost); 5],
}

impl ModelCost {
    /// From the configs of a model; width and height are its native size where they are not given.
    ///
    /// # Errors
    /// [`Failure::Usage`] for a size that the VAE cannot decode; [`Failure::Unusable`] with the config that is wrong.
    pub fn of(files: &ModelFiles, size: [Option<usize>; 2]) -> Result<Self> {
        architecture::require_sdxl(files)?;
        let config: UNetConfig = files.config("unet/config.json")?;
        let vae_config: VaeConfig = files.config("vae/config.json")?;
        let one: ClipTextConfig = files.config("text_encoder/config.json")?;
        let two: ClipTextConfig = files.config("text_encoder_2/config.json")?;

        let factor = vae_config.factor();
        let [width, height] = size.map(|side| side.unwrap_or(config.sample_size * factor));
        if width == 0 || height == 0 || !width.is_multiple_of(factor) || !height.is_multiple_of(factor) {
            let why = format!("{width}×{height} pixels: this model needs multiples of {factor}");
            return Err(Failure::Usage(why).into());
        }
        let tokens = one.max_position_embeddings as u64;
        let latents = [(height / factor) as u64, (width / factor) as u64];
        let unusable =
            |file: &'static str| move |error: anyhow::Error| files.unusable(file, format!("{error:#}"));
        let [encoder, decoder] =
            vae(&vae_config, [height as u64, width as u64]).map_err(unusable("vae/config.json"))?;
        let parts = [
            ("text_encoder", text_encoder(&one, tokens).map_err(unusable("text_encoder/config.json"))?),
            ("text_encoder_2", text_encoder(&two, tokens).map_err(unusable("text_encoder_2/config.json"))?),
            ("unet", unet(&config, latents, tokens).map_err(unusable("unet/config.json"))?),
            ("vae decoder", decoder),
            ("vae encoder", encoder),
        ];
        Ok(Self { width, height, tokens, parts })
    }
}

/// The cost of one text encoder for a prompt of `tokens`.
pub fn text_encoder(config: &ClipTextConfig, tokens: u64) -> Result<Cost> {
    let (_, weights) = recorded(|vb| ClipTextModel::new(config, vb))?;
    Ok(sum(&weights, |name| match name {
        _ if name.contains("embedding") => (0, 0),
        _ if name.starts_with("text_projection") => (1, 0), // of the one pooled token
        _ if name.ends_with("q_proj.weight") => (tokens, tokens),
        _ => (tokens, 0),
    }))
}

/// The cost of one step for latents of `height` × `width` and a text of `tokens`; guidance takes two of them.
pub fn unet(config: &UNetConfig, [height, width]: [u64; 2], tokens: u64) -> Result<Cost> {
    let (_, weights) = recorded(|vb| UNet::new(config, vb))?;
    Ok(unet_sum(&weights, config.block_out_channels.len(), [height, width], tokens))
}

fn unet_sum(weights: &[(String, Vec<u64>)], levels: usize, size: [u64; 2], tokens: u64) -> Cost {
    sum(weights, |name| {
        // An odd side is halved upwards.
        let pixels: u64 = size.iter().map(|side| side.div_ceil(1 << level(name, levels))).product();
        match name {
            _ if name.contains("time_emb") || name.starts_with("add_embedding") => (1, 0),
            _ if name.ends_with("attn2.to_k.weight") || name.ends_with("attn2.to_v.weight") => (tokens, 0),
            _ if name.ends_with("attn1.to_q.weight") => (pixels, pixels),
            _ if name.ends_with("attn2.to_q.weight") => (pixels, tokens),
            _ => (pixels, 0),
        }
    })
}

/// The costs of encoding and of decoding an image of `height` × `width` pixels.
pub fn vae(config: &VaeConfig, [height, width]: [u64; 2]) -> Result<[Cost; 2]> {
    let (_, weights) = recorded(|vb| Vae::new(config, vb))?;
    let levels = config.block_out_channels.len();
    let half = |names: [&str; 2]| {
        let half: Vec<_> =
            weights.iter().filter(|(name, _)| names.iter().any(|n| name.starts_with(n))).cloned().collect();
        sum(&half, |name| {
            let inner = name.split_once('.').map_or(name, |(_, inner)| inner);
            let innermost = ["quant_conv", "post_quant_conv", "encoder.conv_out", "decoder.conv_in"];
            let level =
                if innermost.iter().any(|n| name.starts_with(n)) { levels - 1 } else { level(inner, levels) };
            let pixels = (height * width) >> (2 * level);
            (pixels, if name.ends_with("to_q.weight") { pixels } else { 0 })
        })
    };
    Ok([half(["encoder.", "quant_conv."]), half(["decoder.", "post_quant_conv."])])
}

/// How often the side has been halved where a layer's output lies.
fn level(name: &str, levels: usize) -> usize {
    let mut parts = name.split('.');
    let (side, number) = (parts.next(), parts.next().and_then(|number| number.parse::<usize>().ok()));
    match (side, number) {
        (Some("down_blocks"), Some(i)) => i + usize::from(name.contains("downsamplers")),
        (Some("up_blocks"), Some(i)) => levels - 1 - i - usize::from(name.contains("upsamplers")),
        (Some("mid_block"), _) => levels - 1,
        _ => 0,
    }
}

/// Adds up weights by name and shape, given how often each is applied, and how many keys the queries that it makes
/// are held against.
fn sum(weights: &[(String, Vec<u64>)], applied: impl Fn(&str) -> (u64, u64)) -> Cost {
    let mut cost = Cost::default();
    for (name, shape) in weights {
        let numbers: u64 = shape.iter().product();
        cost.parameters += numbers;
        if let [outputs, _, ..] = shape[..] {
            let (times, keys) = applied(name);
            cost.multiply_adds += numbers * times;
            cost.attention_products += 2 * times * keys * outputs;
        }
    }
    cost
}

/// A network without weights, and names and shapes of the weights that it asked for.
pub(super) fn recorded<T>(build: impl FnOnce(VarBuilder) -> Result<T>) -> Result<(T, NamesAndShapes)> {
    let record = Arc::new(Record::default());
    let built = build(VarBuilder::from_backend(Box::new(Recorder(record.clone())), DType::F32, Device::Cpu))?;
    let weights = record.0.lock().expect("no thread panics while it holds the record").clone();
    Ok((built, weights))
}

type NamesAndShapes = Vec<(String, Vec<u64>)>;

#[derive(Default)]
struct Record(Mutex<NamesAndShapes>);

struct Recorder(Arc<Record>);

impl SimpleBackend for Recorder {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let sizes = shape.dims().iter().map(|size| *size as u64).collect();
        self.0.0.lock().expect("no thread panics while it holds the record").push((name.to_string(), sizes));
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("tensor `{name}` was asked for without its shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::unet::UNetInput;
    use super::*;

    /// A UNet of base width `channels`, its widths `times` that, and `depth` transformer blocks a level, 0 for a level
    /// without attention.
    fn config(channels: usize, times: &[usize], depth: &[usize], context: usize) -> UNetConfig {
        let kind =
            |way: &str, depth: &usize| format!("{}{way}Block2D", if *depth > 0 { "CrossAttn" } else { "" });
        // diffusers takes the middle block's depth from the last level even when that has no attention itself.
        let depths: Vec<usize> = depth.iter().map(|depth| (*depth).max(1)).collect();
        serde_json::from_value(json!({
            "sample_size": 32, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
            "block_out_channels": times.iter().map(|times| times * channels).collect::<Vec<_>>(),
            "down_block_types": depth.iter().map(|depth| kind("Down", depth)).collect::<Vec<_>>(),
            "up_block_types": depth.iter().rev().map(|depth| kind("Up", depth)).collect::<Vec<_>>(),
            "transformer_layers_per_block": depths, "attention_head_dim": 1, "cross_attention_dim": context,
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
            "addition_embed_type": "text_time", "use_linear_projection": true,
        }))
        .unwrap()
    }

    /// The paper's networks are given the text as context only.
    fn without_added_conditioning(config: &UNetConfig, side: u64) -> Cost {
        let (_, mut weights) = recorded(|vb| UNet::new(config, vb)).unwrap();
        weights.retain(|(name, _)| !name.starts_with("add_embedding"));
        unet_sum(&weights, config.block_out_channels.len(), [side, side], 77)
    }

    #[test]
    fn the_paper_s_unets_have_their_parameters_and_multiply_adds() {
        // Parameters counted with diffusers 0.42.1 on meta tensors; they and the first multiply-adds are those of
        // table 1 of the paper to its printed digits (32×32 latents, 77 tokens of width 1024), but for TD4, where
        // 1.235 billion are printed as 1.24. The second multiply-adds have the attention products.
        let (sdxl, sd2) = (&[1, 2, 4][..], &[1, 2, 4, 4][..]);
        type Row = (usize, &'static [usize], &'static [usize], u64, f64, f64);
        let table: [Row; 14] = [
            (320, sdxl, &[0, 2, 10], 2_391_824_644, 198.29, 200.77),
            (128, sdxl, &[0, 2, 10], 423_971_332, 34.88, 35.87),
            (192, sdxl, &[0, 2, 10], 902_336_260, 74.54, 76.03),
            (384, sdxl, &[0, 2, 10], 3_402_948_100, 282.38, 285.36),
            (320, sdxl, &[0, 2, 2], 849_373_444, 98.00, 99.37),
            (320, sdxl, &[0, 2, 4], 1_234_986_244, 123.08, 124.72),
            (320, sdxl, &[0, 2, 12], 2_777_437_444, 223.36, 226.12),
            (320, sdxl, &[0, 2, 14], 3_163_050_244, 248.43, 251.46),
            (320, sdxl, &[0, 4, 4], 1_321_930_244, 142.96, 145.70),
            (320, sdxl, &[0, 4, 8], 2_093_155_844, 193.10, 196.39),
            (320, sdxl, &[0, 4, 12], 2_864_381_444, 243.24, 247.09),
            (384, sdxl, &[0, 4, 12], 4_072_645_636, 346.29, 350.91),
            (320, sd2, &[1, 1, 1, 0], 865_910_724, 86.27, 90.55),
            (512, sd2, &[1, 1, 1, 0], 2_191_746_564, 218.95, 225.78),
        ];
        for (channels, times, depth, parameters, plain, whole) in table {
            let cost = without_added_conditioning(&config(channels, times, depth, 1024), 32);
            let giga = |count: u64| (count as f64 / 1e7).round() / 100.0;
            assert_eq!(cost.parameters, parameters, "{channels} {depth:?}");
            assert_eq!(giga(cost.multiply_adds), plain, "{channels} {depth:?}");
            assert_eq!(giga(cost.with_attention()), whole, "{channels} {depth:?}");
        }
    }

    #[test]
    fn at_sdxl_s_own_size_a_shallow_variant_saves_28_percent_without_attention_products_and_20_with() {
        let cost = |depth: &[usize]| unet(&config(320, &[1, 2, 4], depth, 2048), [128, 128], 77).unwrap();
        let (sdxl, shallow) = (cost(&[0, 2, 10]), cost(&[0, 4, 4]));
        assert_eq!(sdxl.parameters, 2_567_463_684); // UNet2DConditionModel of stable-diffusion-xl-base-1.0
        assert_eq!(shallow.parameters, 1_416_304_644);
        let giga = |count: u64| (count as f64 / 1e8).round() / 10.0;
        assert_eq!((giga(sdxl.multiply_adds), giga(sdxl.with_attention())), (2988.7, 3380.6));
        assert_eq!((giga(shallow.multiply_adds), giga(shallow.with_attention())), (2191.0, 2697.8));
        let saved = |part: u64, whole: u64| (100.0 * (1.0 - part as f64 / whole as f64)).round();
        // At 32×32 latents without added conditioning the plain counting gives the paper's 28 %.
        let paper = |depth: &[usize]| without_added_conditioning(&config(320, &[1, 2, 4], depth, 1024), 32);
        assert_eq!(saved(paper(&[0, 4, 4]).multiply_adds, paper(&[0, 2, 10]).multiply_adds), 28.0);
        assert_eq!(saved(shallow.multiply_adds, sdxl.multiply_adds), 27.0);
        assert_eq!(saved(shallow.with_attention(), sdxl.with_attention()), 20.0);
    }

    #[test]
    fn a_shallow_variant_runs_and_holds_the_counted_parameters() {
        let config = config(32, &[1, 2, 4], &[0, 4, 4], 16);
        let trainable = crate::weights::Trainable::new(0);
        let net = UNet::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        let held: usize = trainable.vars().values().map(|var| var.elem_count()).sum();
        assert_eq!(unet(&config, [8, 8], 5).unwrap().parameters, held as u64);
        let normal = |dims: &[usize]| {
            crate::diffusion::noise::normal(1, 0, Shape::from_dims(dims), &Device::Cpu).unwrap()
        };
        let (timesteps, time_ids) = (normal(&[1]).abs().unwrap(), normal(&[1, 6]).abs().unwrap());
        let context = normal(&[1, 5, 16]);
        let out = net.forward(&UNetInput {
            latents: &normal(&[1, 4, 8, 8]),
            timesteps: &timesteps,
            context: &context,
            pooled: &normal(&[1, 1280]),
            time_ids: &time_ids,
            guidance_scale: None,
        });
        let sum = out.unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(sum.is_finite() && sum > 0.0);
    }

    #[test]
    fn text_encoders_and_vae_of_sdxl_have_their_parameters() {
        let one = ClipTextConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_attention_heads: 12,
            ..ClipTextConfig::default()
        };
        let two = ClipTextConfig {
            architectures: vec!["CLIPTextModelWithProjection".into()],
            hidden_size: 1280,
            intermediate_size: 5120,
            projection_dim: 1280,
            num_hidden_layers: 32,
            num_attention_heads: 20,
            ..ClipTextConfig::default()
        };
        // Counted with transformers 5.23 and diffusers 0.42.1 on meta tensors.
        assert_eq!(text_encoder(&one, 77).unwrap().parameters, 123_060_480);
        assert_eq!(text_encoder(&two, 77).unwrap().parameters, 694_659_840);
        let config = VaeConfig::sized(&[128, 256, 512, 512], 2, 32);
        let [encode, decode] = vae(&config, [1024, 1024]).unwrap();
        assert_eq!(encode.parameters + decode.parameters, 83_653_863);
        // Each of its parts by hand: the convolutions of a VAE with one level are all at the image's size.
        let [encode, decode] = vae(&VaeConfig::sized(&[32], 1, 32), [8, 4]).unwrap();
        let resnet = 2 * 32 * 32 * 9;
        let attention = 4 * 32 * 32;
        let inner = 3 * resnet + attention;
        assert_eq!(encode.multiply_adds, 32 * (3 * 32 * 9 + inner + 32 * 8 * 9 + 8 * 8));
        assert_eq!(decode.multiply_adds, 32 * (4 * 4 + 4 * 32 * 9 + inner + resnet + 32 * 3 * 9));
        assert_eq!(decode.attention_products, 2 * 32 * 32 * 32);
    }
}
