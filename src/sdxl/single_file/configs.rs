//! The configs of a model in one file, from the shapes of its tensors.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{CONFIGS, TEXT, TEXT_2, UNET, VAE};
use crate::sdxl::architecture::Shapes;

/// Head width of SDXL's UNet and of both its text encoders.
const HEAD_WIDTH: usize = 64;

/// What the UNet predicts, and the noise level that it was trained to begin at.
pub(super) struct Prediction {
    /// `prediction_type` of diffusers' schedulers.
    kind: &'static str,
    zero_terminal_snr: bool,
}

impl Prediction {
    /// By the marks that programs leave: a tensor `v_pred` (ComfyUI, `comfy/supported_models.py`, class SDXL), ModelSpec's
    /// `modelspec.prediction_type` (sd-scripts, `library/sai_model_spec.py`, writes `v` and `epsilon`), or the settings
    /// of sd-scripts' training; `ztsnr` or `ss_zero_terminal_snr` for the noise.
    ///
    /// # Errors
    /// A type that is neither.
    pub(super) fn of(shapes: &Shapes, metadata: &BTreeMap<String, String>) -> Result<Self> {
        const NOTED: &str = "modelspec.prediction_type";
        let is_true = |key: &str| metadata.get(key).is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let noted = metadata.get(NOTED).map(|value| value.to_lowercase().replace('-', "_"));
        let kind = match noted.as_deref().unwrap_or_default() {
            _ if shapes.contains_key("v_pred") => "v_prediction",
            "v" | "v_pred" | "vpred" | "v_prediction" | "velocity" => "v_prediction",
            "" if is_true("ss_v_parameterization") => "v_prediction",
            "" | "eps" | "epsilon" | "e" => "epsilon",
            other => bail!(
                "its metadata `{NOTED}` are `{other}`; models that predict `epsilon` or `v` are supported"
            ),
        };
        let zero_terminal_snr = shapes.contains_key("ztsnr") || is_true("ss_zero_terminal_snr");
        Ok(Self { kind, zero_terminal_snr })
    }
}

/// One level of the UNet.
#[derive(Debug, PartialEq)]
pub(super) struct Level {
    pub(super) channels: usize,
    /// Transformer blocks in the attention of each layer on the way down; empty where the level has no attention.
    pub(super) down: Vec<usize>,
    /// The same on the way up, of one layer more.
    pub(super) up: Vec<usize>,
}

/// The UNet's levels from the highest resolution, and what lies below them.
#[derive(Debug, PartialEq)]
pub(super) struct Levels {
    pub(super) all: Vec<Level>,
    pub(super) resnets: usize,
    pub(super) middle: Middle,
}

/// The lowest block.
#[derive(Debug, PartialEq)]
pub(super) enum Middle {
    /// ResNet, attention of this depth, ResNet.
    Attention(usize),
    /// One ResNet, as in SSD-1B and Segmind Vega.
    Resnet,
    /// None, as in KOALA-700M.
    None,
}

/// Reads the levels off the blocks' names and shapes.
pub(super) fn levels(shapes: &Shapes) -> Result<Levels> {
    let mut widths: Vec<usize> = Vec::new();
    let mut down: Vec<Vec<Option<usize>>> = Vec::new();
    let mut open = false;
    for block in 1.. {
        let place = format!("{UNET}input_blocks.{block}");
        if shapes.contains_key(&format!("{place}.0.op.weight")) {
            open = false;
            continue;
        }
        let Some(shape) = shapes.get(&format!("{place}.0.in_layers.2.weight")) else { break };
        let channels = *shape.first().context("a convolution without channels")?;
        if !open {
            widths.push(channels);
            down.push(Vec::new());
        }
        ensure!(
            widths.last() == Some(&channels),
            "`{place}` has {channels} channels, the block before it, of the same level, has others"
        );
        if let Some(layers) = down.last_mut() {
            layers.push(depth(shapes, &format!("{place}.1")));
        }
        open = true;
    }
    let resnets =
        down.last().context("it holds no UNet blocks (`model.diffusion_model.input_blocks.…`)")?.len();
    ensure!(
        down.iter().all(|layers| layers.len() == resnets),
        "the UNet's levels differ in their number of layers"
    );
    let mut all = Vec::new();
    for (level, (channels, down)) in widths.iter().zip(down).enumerate() {
        let first = (widths.len() - 1 - level) * (resnets + 1);
        let place = |layer: usize| format!("{UNET}output_blocks.{}.1", first + layer);
        let up: Vec<_> = (0..=resnets).map(|layer| depth(shapes, &place(layer))).collect();
        let part = |layers: &[Option<usize>]| -> Result<Vec<usize>> {
            let depths: Vec<usize> = layers.iter().copied().flatten().collect();
            ensure!(
                depths.is_empty() || depths.len() == layers.len(),
                "on level {level} of the UNet some layers have attention and some do not"
            );
            Ok(depths)
        };
        all.push(Level { channels: *channels, down: part(&down)?, up: part(&up)? });
    }
    let has = |layer: usize| shapes.contains_key(&format!("{UNET}middle_block.{layer}.in_layers.2.weight"));
    let middle = match (has(0), depth(shapes, &format!("{UNET}middle_block.1")), has(2)) {
        (true, Some(depth), true) => Middle::Attention(depth),
        (true, None, false) => Middle::Resnet,
        (false, None, false) => Middle::None,
        _ => bail!("the UNet's middle block (`{UNET}middle_block.…`) lacks a part"),
    };
    Ok(Levels { all, resnets, middle })
}

/// How many transformer blocks lie under `place`.
fn depth(shapes: &Shapes, place: &str) -> Option<usize> {
    let block = |i: &usize| shapes.contains_key(&format!("{place}.transformer_blocks.{i}.norm1.weight"));
    shapes.contains_key(&format!("{place}.proj_in.weight")).then(|| (0..).take_while(block).count())
}

/// Every JSON of the folder, with sizes from the tensors and all else as in SDXL.
pub(super) fn configs(
    shapes: &Shapes,
    levels: &Levels,
    prediction: Prediction,
) -> Result<BTreeMap<String, String>> {
    let unet = unet_config(shapes, levels)?;
    let tokenizer = |pad: &str| {
        json!({
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad,
        })
    };
    let values = [
        unet,
        vae_config(shapes)?,
        text_config(shapes)?,
        text_2_config(shapes)?,
        json!({
            "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": prediction.kind,
            "steps_offset": 1, "timestep_spacing": "leading", "interpolation_type": "linear",
            "use_karras_sigmas": false, "clip_sample": false, "set_alpha_to_one": false,
            "rescale_betas_zero_snr": prediction.zero_terminal_snr,
        }),
        tokenizer("<|endoftext|>"),
        tokenizer("!"),
        json!({
            "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": true,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        }),
    ];
    Ok(CONFIGS
        .iter()
        .zip(values)
        .map(|((_, file), value)| ((*file).to_string(), value.to_string()))
        .collect())
}

/// Axis `axis` of a tensor that must be there.
fn size(shapes: &Shapes, name: &str, axis: usize) -> Result<usize> {
    let shape = shapes.get(name).with_context(|| format!("the tensor `{name}` is missing"))?;
    shape.get(axis).copied().with_context(|| format!("tensor `{name}` has shape {shape:?}"))
}

pub(super) fn unet_config(shapes: &Shapes, levels: &Levels) -> Result<Value> {
    let of = |name: &str, axis: usize| size(shapes, &format!("{UNET}{name}"), axis);
    let kind = |depths: &[usize], way: &str| {
        format!("{}{way}Block2D", if depths.is_empty() { "" } else { "CrossAttn" })
    };
    let widths: Vec<usize> = levels.all.iter().map(|level| level.channels).collect();
    let pooled = text_projection_size(shapes)?;
    let added = of("label_emb.0.0.weight", 1)?;
    ensure!(
        added > pooled && (added - pooled).is_multiple_of(6),
        "`{UNET}label_emb.0.0.weight` takes {added} numbers, which is no pooled text of {pooled} and six sizes"
    );
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": of("input_blocks.0.0.weight", 1)?,
        "out_channels": of("out.2.weight", 0)?,
        "block_out_channels": widths,
        "layers_per_block": levels.resnets,
        "down_block_types": levels.all.iter().map(|level| kind(&level.down, "Down")).collect::<Vec<_>>(),
        "up_block_types": levels.all.iter().rev().map(|level| kind(&level.up, "Up")).collect::<Vec<_>>(),
        "cross_attention_dim": text_width(shapes)?,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (added - pooled) / 6,
        "projection_class_embeddings_input_dim": added,
        "use_linear_projection": true,
    });
    let (down, up) = depths(levels)?;
    config["transformer_layers_per_block"] = down;
    if let Some(up) = up {
        config["reverse_transformer_layers_per_block"] = up;
    }
    match levels.middle {
        Middle::Attention(_) => {}
        Middle::Resnet => config["mid_block_type"] = json!("UNetMidBlock2D"),
        Middle::None => config["mid_block_type"] = Value::Null,
    }
    if widths.iter().all(|width| width.is_multiple_of(HEAD_WIDTH)) {
        config["attention_head_dim"] =
            json!(widths.iter().map(|width| width / HEAD_WIDTH).collect::<Vec<_>>());
    }
    Ok(config)
}

/// `transformer_layers_per_block`, and `reverse_transformer_layers_per_block` where the way up is not the way down turned
/// round.
fn depths(levels: &Levels) -> Result<(Value, Option<Value>)> {
    let same = |layers: &[usize]| layers.iter().all(|depth| *depth == layers[0]);
    let one = |layers: &[usize]| match layers {
        [] => json!(1),
        _ if same(layers) => json!(layers[0]),
        _ => json!(layers),
    };
    let mut down: Vec<Value> = levels.all.iter().map(|level| one(&level.down)).collect();
    if let (Middle::Attention(middle), Some(lowest)) = (&levels.middle, levels.all.last()) {
        ensure!(
            lowest.down.first().is_none_or(|depth| depth == middle),
            "the UNet's middle block is {middle} transformer blocks deep, its lowest level {:?}; no config of \
             diffusers says that",
            lowest.down
        );
        if lowest.down.is_empty() {
            down[levels.all.len() - 1] = json!(middle);
        }
    }
    let symmetric = levels
        .all
        .iter()
        .all(|level| same(&level.down) && same(&level.up) && level.down.first() == level.up.first());
    let up = levels.all.iter().rev().map(|level| one(&level.up)).collect();
    Ok((Value::Array(down), (!symmetric).then_some(up)))
}

/// Width of the text that the UNet's attention listens to.
fn text_width(shapes: &Shapes) -> Result<usize> {
    let listens = |name: &&String| name.starts_with(UNET) && name.ends_with(".attn2.to_k.weight");
    let name = shapes.keys().find(listens).context("the UNet has no attention to the text")?;
    size(shapes, name, 1)
}

fn vae_config(shapes: &Shapes) -> Result<Value> {
    let of = |name: &str, axis: usize| size(shapes, &format!("{VAE}{name}"), axis);
    let has = |name: &str| shapes.contains_key(&format!("{VAE}{name}"));
    let levels = (0..).take_while(|i| has(&format!("encoder.down.{i}.block.0.conv1.weight"))).count();
    let widths = (0..levels)
        .map(|i| of(&format!("encoder.down.{i}.block.0.conv1.weight"), 0))
        .collect::<Result<Vec<usize>>>()?;
    ensure!(levels > 0, "it holds no VAE (`{VAE}…`); give a file that does, or a diffusers folder");
    let layers = (0..).take_while(|j| has(&format!("encoder.down.0.block.{j}.conv1.weight"))).count();
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "in_channels": of("encoder.conv_in.weight", 1)?,
        "out_channels": of("decoder.conv_out.weight", 0)?,
        "latent_channels": of("decoder.conv_in.weight", 1)?,
        "block_out_channels": widths,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "layers_per_block": layers,
        "mid_block_add_attention": has("decoder.mid.attn_1.q.weight"),
        "use_quant_conv": has("quant_conv.weight"),
        "use_post_quant_conv": has("post_quant_conv.weight"),
        "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": true, "act_fn": "silu",
    }))
}

fn text_config(shapes: &Shapes) -> Result<Value> {
    let of = |name: &str, axis: usize| size(shapes, &format!("{TEXT}text_model.{name}"), axis);
    let layer =
        |i: &usize| shapes.contains_key(&format!("{TEXT}text_model.encoder.layers.{i}.layer_norm1.weight"));
    let width = of("embeddings.token_embedding.weight", 1)?;
    let tokens = of("embeddings.token_embedding.weight", 0)?;
    let mut config = json!({
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
        "vocab_size": tokens,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": of("encoder.layers.0.mlp.fc1.weight", 0)?,
        "num_hidden_layers": (0..).take_while(layer).count(),
        "max_position_embeddings": of("embeddings.position_embedding.weight", 0)?,
        "eos_token_id": tokens - 1,
    });
    if width.is_multiple_of(HEAD_WIDTH) {
        config["num_attention_heads"] = json!(width / HEAD_WIDTH);
    }
    Ok(config)
}

/// Outputs of the second text encoder's projection, which OpenCLIP stores as (in, out) and transformers as a linear layer's
/// weight (out, in).
fn text_projection_size(shapes: &Shapes) -> Result<usize> {
    let linear = format!("{TEXT_2}text_projection.weight");
    match shapes.contains_key(&linear) {
        true => size(shapes, &linear, 0),
        false => size(shapes, &format!("{TEXT_2}text_projection"), 1),
    }
}

fn text_2_config(shapes: &Shapes) -> Result<Value> {
    let of = |name: &str, axis: usize| size(shapes, &format!("{TEXT_2}{name}"), axis);
    let layer = |i: &usize| shapes.contains_key(&format!("{TEXT_2}transformer.resblocks.{i}.ln_1.weight"));
    let (tokens, width) = (of("token_embedding.weight", 0)?, of("token_embedding.weight", 1)?);
    let mut config = json!({
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_act": "gelu",
        "vocab_size": tokens,
        "hidden_size": width,
        "projection_dim": text_projection_size(shapes)?,
        "intermediate_size": of("transformer.resblocks.0.mlp.c_fc.weight", 0)?,
        "num_hidden_layers": (0..).take_while(layer).count(),
        "max_position_embeddings": of("positional_embedding", 0)?,
        "eos_token_id": tokens - 1,
    });
    if width.is_multiple_of(HEAD_WIDTH) {
        config["num_attention_heads"] = json!(width / HEAD_WIDTH);
    }
    Ok(config)
}
