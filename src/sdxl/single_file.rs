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

mod configs;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value};

use self::configs::{Levels, Prediction, configs, levels};
use super::architecture::{self, Shapes};
use super::ldm_names::{open_clip_name, unet_name, vae_name};
use super::tokenizer::clip_vocabulary;
use crate::failure::Failure;
use crate::files;
use crate::lora::ldm_keys::BlockLayout;
use crate::progress;
use crate::weights::assembled::{Assembled, Form, Place};
use crate::weights::header::Header;
use crate::weights::model_folder::ModelFiles;

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const TEXT: &str = "conditioner.embedders.0.transformer.";
const TEXT_2: &str = "conditioner.embedders.1.model.";

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
    Ok(Header::read(&mut crate::files::open_input(path)?)?)
}

/// Pickles can run programs; torch writes them bare or inside a zip.
fn refuse_pickle(path: &Path) -> Result<()> {
    let mut start = [0u8; 4];
    let read = crate::files::open_input(path).and_then(|mut file| file.read(&mut start));
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

    use serde_json::json;

    use super::super::counts;
    use super::super::ldm_names::layer_and_kind;
    use super::super::unet::{UNet, UNetConfig};
    use super::configs::unet_config;
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
