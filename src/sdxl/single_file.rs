//! A whole SDXL in one `.safetensors`, in the layout of the Latent Diffusion Models code (LDM), as most fine-tuned
//! models are handed around.
//!
//! | prefix | part | names |
//! |---|---|---|
//! | `model.diffusion_model.` | UNet | LDM |
//! | `first_stage_model.` | VAE | LDM |
//! | `conditioner.embedders.0.transformer.` | text encoder 1 | transformers |
//! | `conditioner.embedders.1.model.` | text encoder 2 | OpenCLIP: query, key and value in one matrix, projection transposed |
//!
//! Sizes are read off the tensors' shapes. What they do not tell (heads, groups of norms, scheduler, scaling of
//! latents) is SDXL's unless `--base-config` says otherwise. Nothing is copied here: the result says where each tensor
//! of the usual folder lies in the file. The names were checked against diffusers 0.42.1,
//! `loaders/single_file_utils.py` (`scripts/golden_single_file.py`).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value, json};

use super::architecture::{self, Shapes};
use super::ldm_names::{open_clip_name, unet_name, vae_name};
use super::tokenizer::clip_vocabulary;
use crate::failure::Failure;
use crate::files;
use crate::lora::ldm_keys::BlockLayout;
use crate::progress;
use crate::weights::header::Header;
use crate::weights::model_folder::{Assembled, Form, ModelFiles, Place};

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const TEXT: &str = "conditioner.embedders.0.transformer.";
const TEXT_2: &str = "conditioner.embedders.1.model.";

/// Head width of SDXL's UNet and of both its text encoders.
const HEAD_WIDTH: usize = 64;

/// The configs of a model's folder, each with its key in a `--base-config` file.
const CONFIGS: [(&str, &str); 8] = [
    ("unet", "unet/config.json"),
    ("vae", "vae/config.json"),
    ("text_encoder", "text_encoder/config.json"),
    ("text_encoder_2", "text_encoder_2/config.json"),
    ("scheduler", "scheduler/scheduler_config.json"),
    ("tokenizer", "tokenizer/tokenizer_config.json"),
    ("tokenizer_2", "tokenizer_2/tokenizer_config.json"),
    ("model_index", "model_index.json"),
];

/// Opens the model in `path`; `base_config` is a JSON file with the keys `unet`, `vae`, `text_encoder`,
/// `text_encoder_2`, `scheduler`, `tokenizer`, `tokenizer_2` and `model_index`, or a diffusers folder, whose settings
/// win over those that are inferred.
///
/// # Errors
/// [`Failure::Unusable`] for files that are damaged, pickled, or of another architecture, with its name.
pub fn open(path: &Path, base_config: Option<&Path>) -> Result<ModelFiles> {
    refuse_pickle(path)?;
    let unusable = |why: anyhow::Error| Failure::unusable(path, format!("{why:#}"));
    let header = header(path).map_err(unusable)?;
    let shapes = header.tensors.iter().map(|entry| (entry.key.clone(), entry.shape.clone())).collect();
    if let Some(other) = architecture::of_tensors(&shapes) {
        return Err(Failure::unusable(path, other));
    }
    let levels = levels(&shapes).map_err(unusable)?;
    let prediction = Prediction::of(&shapes, &header.metadata).map_err(unusable)?;
    let mut texts = configs(&shapes, &levels, prediction).map_err(unusable)?;
    let overridden = base_config.map(|config| overrides(config, &mut texts)).transpose()?.unwrap_or_default();
    vocabularies(&mut texts, overridden).map_err(unusable)?;
    let tensors = places(&shapes, &levels).map_err(unusable)?;
    let texts = texts.into_iter().map(|(file, text)| (file, Cow::Owned(text))).collect();
    Ok(ModelFiles::Assembled(Arc::new(Assembled { file: path.to_path_buf(), texts, tensors })))
}

fn header(path: &Path) -> Result<Header> {
    Ok(Header::read(&mut std::fs::File::open(path)?)?)
}

/// What the UNet predicts, and the noise level that it was trained to begin at.
struct Prediction {
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
    fn of(shapes: &Shapes, metadata: &BTreeMap<String, String>) -> Result<Self> {
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

/// Pickles can run programs; torch writes them bare or inside a zip.
fn refuse_pickle(path: &Path) -> Result<()> {
    let mut start = [0u8; 4];
    let read = std::fs::File::open(path).and_then(|mut file| file.read(&mut start));
    let count = read.map_err(|error| Failure::unusable(path, error))?;
    let named =
        path.extension().is_some_and(|kind| ["ckpt", "pt", "pth", "bin", "pkl"].iter().any(|k| kind == *k));
    // A safetensors file begins with the length of its header, which is never 0x04034b50 at this size.
    if count == 4 && (start == *b"PK\x03\x04" || (start[0] == 0x80 && start[1] < 6)) || named {
        let why = format!(
            "pickled weights can run programs and are not read; convert the file once with\n  \
             python -c \"import torch, safetensors.torch as s; w = torch.load('{}', weights_only=True, \
             map_location='cpu'); w = w.get('state_dict', w); s.save_file({{k: v.contiguous() for k, v in \
             w.items() if torch.is_tensor(v)}}, 'model.safetensors')\"",
            path.display()
        );
        return Err(Failure::unusable(path, why));
    }
    Ok(())
}

/// One level of the UNet.
#[derive(Debug, PartialEq)]
struct Level {
    channels: usize,
    /// Transformer blocks in the attention of each layer on the way down; empty where the level has no attention.
    down: Vec<usize>,
    /// The same on the way up, of one layer more.
    up: Vec<usize>,
}

/// The UNet's levels from the highest resolution, and what lies below them.
#[derive(Debug, PartialEq)]
struct Levels {
    all: Vec<Level>,
    resnets: usize,
    middle: Middle,
}

/// The lowest block.
#[derive(Debug, PartialEq)]
enum Middle {
    /// ResNet, attention of this depth, ResNet.
    Attention(usize),
    /// One ResNet, as in SSD-1B and Segmind Vega.
    Resnet,
    /// None, as in KOALA-700M.
    None,
}

/// Reads the levels off the blocks' names and shapes.
fn levels(shapes: &Shapes) -> Result<Levels> {
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
fn configs(shapes: &Shapes, levels: &Levels, prediction: Prediction) -> Result<BTreeMap<String, String>> {
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

fn unet_config(shapes: &Shapes, levels: &Levels) -> Result<Value> {
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

/// The largest config or vocabulary that is read, in bytes.
const MAX_TEXT: u64 = 1 << 26;

/// Lets the settings in `config` win; gives the tokenizers' folders whose vocabulary comes from there.
fn overrides(config: &Path, texts: &mut BTreeMap<String, String>) -> Result<Vec<&'static str>> {
    let read = |path: &Path| files::read_text(path, MAX_TEXT);
    let parse = |path: &Path| -> Result<Map<String, Value>> {
        serde_json::from_str(&read(path)?).map_err(|error| Failure::unusable(path, error))
    };
    let mut own = Vec::new();
    if config.is_dir() {
        for (_, file) in CONFIGS.iter().filter(|(_, file)| config.join(file).is_file()) {
            merge(texts, file, parse(&config.join(file))?)?;
        }
        for folder in ["tokenizer", "tokenizer_2"] {
            let files = ["vocab.json", "merges.txt", "tokenizer.json"].map(|name| format!("{folder}/{name}"));
            for file in files.iter().filter(|file| config.join(file).is_file()) {
                texts.insert(file.clone(), read(&config.join(file))?);
                if !own.contains(&folder) {
                    own.push(folder);
                }
            }
        }
        return Ok(own);
    }
    for (key, value) in parse(config)? {
        let known = CONFIGS.iter().find(|(name, _)| *name == key);
        let (Some((_, file)), Value::Object(settings)) = (known, value) else {
            let names: Vec<&str> = CONFIGS.iter().map(|(name, _)| *name).collect();
            let why = format!("`{key}` is not one of the objects {}", names.join(", "));
            return Err(Failure::unusable(config, why));
        };
        merge(texts, file, settings)?;
    }
    Ok(own)
}

fn merge(texts: &mut BTreeMap<String, String>, file: &str, settings: Map<String, Value>) -> Result<()> {
    let text = texts.get_mut(file).with_context(|| format!("no `{file}`"))?;
    let mut merged: Map<String, Value> = serde_json::from_str(text)?;
    merged.extend(settings);
    *text = Value::Object(merged).to_string();
    Ok(())
}

/// Gives both tokenizers CLIP's vocabulary where they have no other, and makes sure that nothing is left open.
fn vocabularies(texts: &mut BTreeMap<String, String>, own: Vec<&str>) -> Result<()> {
    let field = |texts: &BTreeMap<String, String>, file: &str, key: &str| -> Result<Value> {
        Ok(serde_json::from_str::<Value>(&texts[file])?[key].take())
    };
    for (file, key) in [
        ("unet/config.json", "attention_head_dim"),
        ("text_encoder/config.json", "num_attention_heads"),
        ("text_encoder_2/config.json", "num_attention_heads"),
    ] {
        if field(texts, file, key)?.is_null() {
            bail!(
                "the tensors do not tell `{key}` of `{file}`, and it is not SDXL's; give it with --base-config"
            );
        }
    }
    for (folder, encoder) in [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")] {
        if own.contains(&folder) {
            continue;
        }
        let (vocabulary, merges) = clip_vocabulary()?;
        let tokens = field(texts, &format!("{encoder}/config.json"), "vocab_size")?;
        ensure!(
            tokens == 49408,
            "its {encoder} knows {tokens} tokens, CLIP's vocabulary has 49408; give a folder with `{folder}/vocab.json` \
             as --base-config"
        );
        texts.insert(format!("{folder}/vocab.json"), vocabulary);
        texts.insert(format!("{folder}/merges.txt"), merges.to_string());
    }
    Ok(())
}

/// Ends of names of weights in formats that are not read.
const QUANTISED: [(&str, &str); 5] = [
    (".weight.absmax", "bitsandbytes 4-bit"),
    (".weight.quant_map", "bitsandbytes 4-bit"),
    (".SCB", "bitsandbytes 8-bit"),
    (".qweight", "GPTQ or SVDQuant"),
    (".weight_scale_2", "NVFP4"),
];

/// The factor of a weight in ComfyUI's scaled checkpoints, whose numbers are stored divided by it in 8 bits
/// (`comfy/ops.py`, `scaled_fp8_ops`; `weight_scale` since 2025).
fn scale_of(stored: &str, shapes: &Shapes) -> Option<String> {
    let layer = stored.strip_suffix(".weight")?;
    ["scale_weight", "weight_scale"]
        .into_iter()
        .map(|end| format!("{layer}.{end}"))
        .find(|scale| shapes.contains_key(scale))
}

/// The factors and marks of such checkpoints; those of the inputs are for products in 8 bits.
fn is_scale(stored: &str) -> bool {
    let ends =
        [".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8"];
    ends.iter().any(|end| stored.ends_with(end))
}

/// Numbers of training, of CLIP's loss and of its image encoder, and old buffers; images do not depend on them.
fn is_left_over(stored: &str) -> bool {
    let ends = ["logit_scale", "position_ids", "attn_mask", "num_batches_tracked"];
    let of_vae =
        |rest: &str| ["model_ema.", "loss.", "discriminator."].iter().any(|part| rest.starts_with(part));
    ends.iter().any(|end| stored.ends_with(end))
        || stored.strip_prefix(VAE).is_some_and(of_vae)
        || stored == format!("{TEXT}text_projection.weight")
        || stored.strip_prefix(TEXT).is_some_and(|rest| rest.starts_with("vision_model."))
        || stored.strip_prefix(TEXT_2).is_some_and(|rest| rest.starts_with("visual."))
}

/// Where each tensor of each component lies.
fn places(shapes: &Shapes, levels: &Levels) -> Result<BTreeMap<String, BTreeMap<String, Place>>> {
    let layout = BlockLayout::uniform(levels.all.len(), levels.resnets);
    let vae_levels =
        (0..).take_while(|i| shapes.contains_key(&format!("{VAE}encoder.down.{i}.block.0.conv1.weight")));
    let vae_levels = vae_levels.count();
    let mut found: BTreeMap<String, BTreeMap<String, Place>> = BTreeMap::new();
    let (mut strange, mut unused) = (Vec::new(), Vec::new());
    for (stored, shape) in shapes {
        if let Some(quantised) = QUANTISED.iter().find(|(end, _)| stored.ends_with(end)) {
            bail!(
                "`{stored}`: it is a {} checkpoint, which is not supported; give one of 16 bits",
                quantised.1
            );
        }
        if is_scale(stored) || is_left_over(stored) {
            continue;
        }
        let (component, names) = if let Some(name) = stored.strip_prefix(UNET) {
            ("unet", unet_name(name, &layout, shape.len()))
        } else if let Some(name) = stored.strip_prefix(VAE) {
            ("vae", vae_name(name, vae_levels, shape.len()))
        } else if let Some(name) = stored.strip_prefix(TEXT) {
            ("text_encoder", name.starts_with("text_model.").then(|| vec![(name.to_string(), Form::Whole)]))
        } else if let Some(name) = stored.strip_prefix(TEXT_2) {
            ("text_encoder_2", open_clip_name(name))
        } else {
            unused.push(stored);
            continue;
        };
        match names {
            Some(names) => {
                for (name, form) in names {
                    let place = Place { scale: scale_of(stored, shapes), ..Place::new(stored, form) };
                    found.entry(component.to_string()).or_default().insert(name, place);
                }
            }
            None => strange.push(stored.as_str()),
        }
    }
    if let Some(first) = strange.first() {
        return Err(anyhow!("{} tensors have names that no SDXL has, the first is `{first}`", strange.len()));
    }
    // The average of the weights in training, and the marks of velocity models.
    unused.retain(|name| !name.starts_with("model_ema.") && !["v_pred", "ztsnr"].contains(&name.as_str()));
    if let Some(first) = unused.first() {
        progress::note(format_args!(
            "{} tensors are of no use and left out, the first is `{first}`",
            unused.len()
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::counts;
    use super::super::ldm_names::layer_and_kind;
    use super::super::unet::{UNet, UNetConfig};
    use super::*;
    use crate::lora::ldm_keys;

    /// Names and shapes of a UNet's weights in LDM layout, and what else its config is read from.
    fn ldm(config: &UNetConfig) -> Shapes {
        let layout = BlockLayout::uniform(config.block_out_channels.len(), config.layers_per_block);
        let (_, weights) = counts::recorded(|vb| UNet::new(config, vb)).unwrap();
        let stored = |(name, shape): (String, Vec<u64>)| {
            let (layer, kind) = layer_and_kind(&name).unwrap();
            let layer =
                ldm_keys::to_ldm(layer, &layout).unwrap_or_else(|| panic!("`{name}` has no LDM name"));
            (format!("{UNET}{layer}.{kind}"), shape.into_iter().map(|size| size as usize).collect())
        };
        let mut shapes: Shapes = weights.into_iter().map(stored).collect();
        shapes.insert(format!("{TEXT_2}text_projection"), vec![1280, 1280]);
        shapes
    }

    #[test]
    fn distilled_unets_are_told_from_their_tensors() {
        // Layers, depths and middle blocks as in ComfyUI's `comfy/model_detection.py`; parameters counted with diffusers
        // 0.42.1 on meta tensors, and to their printed digits those that the models' cards give.
        let both = "UNetMidBlock2DCrossAttn";
        let one = "UNetMidBlock2D";
        type Row = (&'static str, usize, Value, Option<Value>, Option<&'static str>, u64);
        let table: [Row; 6] = [
            ("SDXL", 2, json!([1, 2, 10]), None, Some(both), 2_567_463_684),
            (
                "SSD-1B",
                2,
                json!([1, 2, 4]),
                Some(json!([[4, 4, 10], [2, 1, 1], 1])),
                Some(one),
                1_331_334_404,
            ),
            ("Segmind Vega", 2, json!([1, 1, 2]), None, Some(one), 745_225_604),
            ("KOALA-700M", 1, json!([1, 2, 5]), None, None, 782_822_724),
            ("KOALA-1B", 1, json!([1, 2, 6]), None, Some(both), 1_161_184_324),
            ("single layers", 2, json!([1, [2, 1], [4, 3]]), Some(json!([[4, 3, 2], 1, 1])), Some(one), 0),
        ];
        for (name, layers, depths, reverse, middle, parameters) in table {
            let config: UNetConfig = serde_json::from_value(json!({
                "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": layers,
                "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": depths, "reverse_transformer_layers_per_block": reverse,
                "mid_block_type": middle, "cross_attention_dim": 2048, "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
                "use_linear_projection": true,
            }))
            .unwrap();
            let shapes = ldm(&config);
            let levels = levels(&shapes).unwrap();
            let read: UNetConfig = serde_json::from_value(unet_config(&shapes, &levels).unwrap()).unwrap();
            let weights = |config: &UNetConfig| -> BTreeSet<(String, Vec<u64>)> {
                counts::recorded(|vb| UNet::new(config, vb)).unwrap().1.into_iter().collect()
            };
            assert_eq!(weights(&read), weights(&config), "{name}");
            assert_eq!(read.attention_head_dim, config.attention_head_dim, "{name}");
            let placed: BTreeSet<String> =
                places(&shapes, &levels).unwrap()["unet"].keys().cloned().collect();
            assert_eq!(placed, weights(&config).into_iter().map(|(name, _)| name).collect(), "{name}");
            let counted = counts::unet(&read, [128, 128], 77).unwrap().parameters;
            assert!(parameters == 0 || counted == parameters, "{name}: {counted}");
        }
    }

    #[test]
    fn a_unet_with_half_a_middle_block_is_refused() {
        let mut shapes = Shapes::new();
        shapes.insert(format!("{UNET}input_blocks.1.0.in_layers.2.weight"), vec![320, 320, 3, 3]);
        shapes.insert(format!("{UNET}middle_block.2.in_layers.2.weight"), vec![320, 320, 3, 3]);
        let message = levels(&shapes).unwrap_err().to_string();
        assert!(message.contains("middle block"), "{message}");
    }
}
