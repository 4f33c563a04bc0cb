//! One module, four spellings.
//!
//! | where | example |
//! |---|---|
//! | diffusers path, our own name | `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q` |
//! | kohya, LDM path | `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q` |
//! | kohya, diffusers path | `lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q` |
//! | PEFT | `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q` |
//!
//! The LDM paths are those of Stability's own checkpoints; sd-scripts trains on them, so they are the native
//! names of SDXL LoRAs. Rules as in sd-scripts' `library/sdxl_model_util.py` and diffusers'
//! `loaders/lora_conversion_utils.py`.

use super::LoraError;
use super::ldm_keys::{BlockLayout, from_ldm, to_ldm};

/// What a tensor is to its layer. Names of the formats' own, see [`Part::suffix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A.
    Down,
    /// B.
    Up,
    /// The core of a Tucker decomposition, between A and B.
    Mid,
    /// The scale.
    Alpha,
    /// DoRA's magnitudes as LyCORIS and sd-scripts store them.
    DoraScale,
    /// DoRA's magnitudes as PEFT stores them.
    Magnitude,
    /// LoHa: the left factor of the first product.
    HadaW1A,
    /// LoHa: the right factor of the first product.
    HadaW1B,
    /// LoHa: the left factor of the second product.
    HadaW2A,
    /// LoHa: the right factor of the second product.
    HadaW2B,
    /// LoHa: the Tucker core of the first product.
    HadaT1,
    /// LoHa: the Tucker core of the second product.
    HadaT2,
    /// LoKr: the first matrix.
    LokrW1,
    /// LoKr: the left factor of the first matrix.
    LokrW1A,
    /// LoKr: the right factor of the first matrix.
    LokrW1B,
    /// LoKr: the second matrix.
    LokrW2,
    /// LoKr: the left factor of the second matrix.
    LokrW2A,
    /// LoKr: the right factor of the second matrix.
    LokrW2B,
    /// LoKr: the Tucker core of the second matrix.
    LokrT2,
    /// The difference itself.
    Diff,
    /// The difference of the bias.
    DiffB,
    /// The difference of a norm's weight.
    WNorm,
    /// The difference of a norm's bias.
    BNorm,
    /// IA3: what the weight's rows or columns are multiplied by, less one.
    Ia3,
    /// IA3: whether columns are meant.
    OnInput,
    /// OFT and BOFT: the skew-symmetric blocks.
    OftBlocks,
    /// OFT and BOFT: a factor of each output.
    Rescale,
    /// GLoRA: W · a1 · a2 is added.
    A1,
    /// GLoRA: see [`Part::A1`].
    A2,
    /// GLoRA: b1 · b2 is added.
    B1,
    /// GLoRA: see [`Part::B1`].
    B2,
}

/// Suffixes of LyCORIS (`modules/*.py`, `weight_list`) and sd-scripts.
const SUFFIXES: [(&str, Part); 30] = [
    ("lora_down.weight", Part::Down),
    ("lora_up.weight", Part::Up),
    ("lora_mid.weight", Part::Mid),
    ("alpha", Part::Alpha),
    ("dora_scale", Part::DoraScale),
    ("lora_magnitude_vector", Part::Magnitude),
    ("hada_w1_a", Part::HadaW1A),
    ("hada_w1_b", Part::HadaW1B),
    ("hada_w2_a", Part::HadaW2A),
    ("hada_w2_b", Part::HadaW2B),
    ("hada_t1", Part::HadaT1),
    ("hada_t2", Part::HadaT2),
    ("lokr_w1", Part::LokrW1),
    ("lokr_w1_a", Part::LokrW1A),
    ("lokr_w1_b", Part::LokrW1B),
    ("lokr_w2", Part::LokrW2),
    ("lokr_w2_a", Part::LokrW2A),
    ("lokr_w2_b", Part::LokrW2B),
    ("lokr_t2", Part::LokrT2),
    ("diff", Part::Diff),
    ("diff_b", Part::DiffB),
    ("w_norm", Part::WNorm),
    ("b_norm", Part::BNorm),
    ("on_input", Part::OnInput),
    ("oft_blocks", Part::OftBlocks),
    ("rescale", Part::Rescale),
    ("a1.weight", Part::A1),
    ("a2.weight", Part::A2),
    ("b1.weight", Part::B1),
    ("b2.weight", Part::B2),
];

/// Other spellings of the two factors: PEFT, diffusers 0.2x, and diffusers before 0.20
/// (`…attn1.processor.to_out_lora.down.weight`).
const FACTORS: [(&str, Part); 8] = [
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
];

impl Part {
    /// What follows the stem and a dot in a kohya file.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Ia3 => "weight",
            part => SUFFIXES.iter().find(|(_, other)| *other == part).map_or("", |(suffix, _)| suffix),
        }
    }
}

/// What a key says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// A part of a layer: its diffusers path, and which part.
    Layer(String, Part),
    /// A part of an adapter of a kind that is not implemented.
    Other(&'static str),
    /// Nothing that is known.
    Unknown,
}

/// Takes a key of any of the spellings apart.
pub fn parse(key: &str, layout: &BlockLayout) -> Key {
    if let Some(kind) = other_kind(key) {
        return Key::Other(kind);
    }
    let Some((stem, part)) = split_part(key) else { return Key::Unknown };
    match module(stem, layout) {
        Some(module) => Key::Layer(module, part),
        None => Key::Unknown,
    }
}

/// The kohya stem with LDM path.
pub fn kohya(module: &str, layout: &BlockLayout) -> Result<String, LoraError> {
    let no_name = || LoraError::NoName { module: module.to_string(), format: "kohya" };
    if let Some(stem) = kohya_text(module) {
        return Ok(stem);
    }
    let ldm = to_ldm(module, layout).ok_or_else(no_name)?;
    Ok(format!("lora_unet_{}", ldm.replace('.', "_")))
}

/// The kohya stem with diffusers path.
pub fn kohya_diffusers(module: &str) -> String {
    kohya_text(module).unwrap_or_else(|| format!("lora_unet_{}", module.replace('.', "_")))
}

/// The PEFT stem.
pub fn peft(module: &str) -> String {
    if module.starts_with("text_encoder") { module.to_string() } else { format!("unet.{module}") }
}

fn kohya_text(module: &str) -> Option<String> {
    let (prefix, rest) = match (module.strip_prefix("text_encoder."), module.strip_prefix("text_encoder_2."))
    {
        (Some(rest), _) => ("lora_te1_", rest),
        (_, Some(rest)) => ("lora_te2_", rest),
        _ => return None,
    };
    Some(format!("{prefix}{}", rest.replace('.', "_")))
}

/// Names of adapter kinds that are not implemented, by what only their keys contain.
fn other_kind(key: &str) -> Option<&'static str> {
    let kinds = [
        (".lokr_t1", "LoKr with a decomposed first matrix of a convolution"),
        (".bm.weight", "GLoRA with a Tucker factor"),
        (".q_layer.weight", "T-LoRA"),
        (".ia3_l.", "PEFT's IA3"),
        (".oft_r.", "PEFT's OFT"),
        (".oft_R.", "PEFT's OFT"),
        (".boft_", "PEFT's BOFT"),
        (".lora_embedding_", "LoRA of an embedding"),
        (".vera_lambda_", "VeRA"),
    ];
    kinds.into_iter().find_map(|(mark, kind)| key.contains(mark).then_some(kind))
}

/// What a file without any known key seems to be.
pub(super) fn guess(keys: &[String]) -> Option<&'static str> {
    let marks = [
        ("double_blocks", "this is a LoRA for Flux"),
        ("single_transformer_blocks", "this is a LoRA for Flux"),
        ("lora_prior_", "this is a LoRA for Stable Cascade"),
        ("joint_blocks", "this is a LoRA for Stable Diffusion 3"),
        ("lora_transformer_", "this is a LoRA for a diffusion transformer, not for SDXL's UNet"),
        ("transformer.transformer_blocks", "this is a LoRA for a diffusion transformer, not for SDXL's UNet"),
        ("control_model.", "this is a ControlNet"),
        ("controlnet", "this is a ControlNet"),
        ("model.diffusion_model.", "this is a whole checkpoint: give it as --base"),
        ("first_stage_model.", "this is a whole checkpoint: give it as --base"),
        ("ip_adapter.", "this is an IP-Adapter"),
        ("clip_g", "this is a textual inversion embedding"),
        ("emb_params", "this is a textual inversion embedding"),
        ("model.layers.", "this belongs to a language model"),
        ("down_blocks.", "these are a model's own weights: give its folder as --base"),
        ("text_model.", "these are a text encoder's own weights"),
    ];
    marks.into_iter().find_map(|(mark, guess)| keys.iter().any(|key| key.contains(mark)).then_some(guess))
}

/// `(stem, part)` of a key.
fn split_part(key: &str) -> Option<(&str, Part)> {
    for (suffix, part) in SUFFIXES {
        if let Some(stem) = key.strip_suffix(suffix).and_then(|stem| stem.strip_suffix('.')) {
            return Some((stem, part));
        }
    }
    for (suffix, part) in FACTORS {
        if let Some(stem) = key.strip_suffix(suffix) {
            return Some((stem, part));
        }
    }
    // PEFT with the adapter's name inside: `….lora_A.default.weight`, `….lora_magnitude_vector.default.weight`.
    let named = key.strip_suffix(".weight").unwrap_or(key);
    if let Some((stem, part)) = named.rsplit_once('.').and_then(|(rest, _)| rest.rsplit_once('.')) {
        match part {
            "lora_A" if named != key => return Some((stem, Part::Down)),
            "lora_B" if named != key => return Some((stem, Part::Up)),
            "lora_magnitude_vector" => return Some((stem, Part::Magnitude)),
            _ => {}
        }
    }
    if let Some(stem) = named.strip_suffix(".lora_magnitude_vector") {
        return Some((stem, Part::Magnitude));
    }
    // A bare `.weight` is IA3's in a file of adapters, and a model's own in a checkpoint.
    let is_adapter = key.starts_with("lora_") || key.starts_with("lycoris_");
    (named != key && is_adapter).then_some((named, Part::Ia3))
}

/// The diffusers path of a stem.
fn module(stem: &str, layout: &BlockLayout) -> Option<String> {
    let stem = stem.strip_prefix("base_model.model.").unwrap_or(stem).replace(".processor.", ".");
    // With both encoders in one wrapper, LyCORIS and OneTrainer write `lora_te1_`, sd-scripts for SD 1.x `lora_te_`.
    let text = [
        ("lora_te1_", "text_encoder"),
        ("lora_te_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("text_encoder.", "text_encoder"),
        ("text_encoder_2.", "text_encoder_2"),
    ];
    for (prefix, encoder) in text {
        if let Some(rest) = stem.strip_prefix(prefix) {
            let path = words(rest)?;
            // transformers 5 leaves `text_model.` out.
            let inner = ["encoder", "embeddings", "final_layer_norm"].contains(&path.split('.').next()?);
            return Some(if inner {
                format!("{encoder}.text_model.{path}")
            } else {
                format!("{encoder}.{path}")
            });
        }
    }
    let prefixes = ["lora_unet_", "lycoris_", "unet.", "model.diffusion_model.", "diffusion_model."];
    let rest = prefixes.into_iter().find_map(|prefix| stem.strip_prefix(prefix)).unwrap_or(&stem);
    let path = words(rest)?;
    let top = path.split('.').next()?;
    let ldm = ["input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"];
    let path = if ldm.contains(&top) { from_ldm(&path, layout)? } else { path };
    // The oldest diffusers files leave the index of the output projection out.
    Some(if path.ends_with(".to_out") { format!("{path}.0") } else { path })
}

/// Words that contain an underscore; everything else parts at dots and underscores.
const COMPOUND: [&str; 40] = [
    "transformer_blocks",
    "down_blocks",
    "up_blocks",
    "mid_block",
    "input_blocks",
    "middle_block",
    "output_blocks",
    "time_emb_proj",
    "time_embedding",
    "time_embed",
    "add_embedding",
    "label_emb",
    "linear_1",
    "linear_2",
    "in_layers",
    "out_layers",
    "emb_layers",
    "skip_connection",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "proj_in",
    "proj_out",
    "to_out",
    "to_q",
    "to_k",
    "to_v",
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "text_projection",
    "conv_norm_out",
    "layer_norm1",
    "layer_norm2",
    "final_layer_norm",
    "token_embedding",
    "position_embedding",
];

/// A path in which dots may have become underscores, with its dots back; nothing when a word is unknown.
fn words(flat: &str) -> Option<String> {
    const SIMPLE: [&str; 24] = [
        "attentions",
        "resnets",
        "downsamplers",
        "upsamplers",
        "attn1",
        "attn2",
        "ff",
        "net",
        "proj",
        "conv",
        "conv1",
        "conv2",
        "norm",
        "norm1",
        "norm2",
        "norm3",
        "op",
        "out",
        "encoder",
        "embeddings",
        "layers",
        "mlp",
        "fc1",
        "fc2",
    ];
    let flat = flat.replace('.', "_");
    let mut rest = flat.as_str();
    let mut path: Vec<&str> = Vec::new();
    while !rest.is_empty() {
        let ends_there = |word: &&&str| {
            rest.strip_prefix(**word).is_some_and(|after| after.is_empty() || after.starts_with('_'))
        };
        let compound = COMPOUND.iter().find(ends_there).copied();
        let word = match compound {
            Some(word) => word,
            None => {
                let word = rest.split('_').next()?;
                let is_index = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
                if !is_index && !SIMPLE.contains(&word) {
                    return None;
                }
                &rest[..word.len()]
            }
        };
        path.push(word);
        rest = &rest[word.len()..];
        rest = rest.strip_prefix('_').unwrap_or(rest);
    }
    (!path.is_empty()).then(|| path.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_leads_to_the_same_module() {
        let layout = BlockLayout::default();
        let path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0";
        for key in [
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
            "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.up.weight",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.default.weight",
            "base_model.model.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
        ] {
            assert_eq!(parse(key, &layout), Key::Layer(path.to_string(), Part::Up), "{key}");
        }
        let te = "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj";
        for key in [
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj.alpha",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj.alpha",
            "text_encoder_2.encoder.layers.31.self_attn.out_proj.alpha",
        ] {
            assert_eq!(parse(key, &layout), Key::Layer(te.to_string(), Part::Alpha), "{key}");
        }
    }

    #[test]
    fn other_adapters_and_strange_keys_are_told_apart() {
        let layout = BlockLayout::default();
        let stem = "lora_unet_input_blocks_4_1_proj_in";
        let module = "down_blocks.1.attentions.0.proj_in".to_string();
        for (suffix, part) in SUFFIXES {
            let key = format!("{stem}.{suffix}");
            assert_eq!(parse(&key, &layout), Key::Layer(module.clone(), part), "{key}");
            assert_eq!(part.suffix(), suffix);
        }
        assert_eq!(parse(&format!("{stem}.weight"), &layout), Key::Layer(module.clone(), Part::Ia3));
        for key in
            ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.mine.weight"]
        {
            let key = format!("base_model.model.unet.down_blocks.1.attentions.0.proj_in.{key}");
            assert_eq!(parse(&key, &layout), Key::Layer(module.clone(), Part::Magnitude), "{key}");
        }
        assert_eq!(parse(&format!("{stem}.bm.weight"), &layout), Key::Other("GLoRA with a Tucker factor"));
        for key in [
            "",
            "alpha",
            ".alpha",
            ".lora_A.x.weight",
            "lora_unet_.alpha",
            "conv_in.weight",
            "lora_unet_input_blocks_99_1_proj_in.alpha",
            "lora_unet_input_blocks_99999999999999999999_1_proj_in.alpha",
            "lora_unet_output_blocks_4_2_conv.alpha",
            "lora_unet_müsli.lora_up.weight",
        ] {
            assert_eq!(parse(key, &layout), Key::Unknown, "{key}");
        }
    }

    /// The layers of one attention of SDXL, `depth` transformer blocks deep: what sd-scripts trains.
    fn attention(prefix: &str, depth: usize) -> Vec<String> {
        let mut layers = vec![format!("{prefix}.proj_in"), format!("{prefix}.proj_out")];
        for k in 0..depth {
            for inner in ["ff.net.0.proj", "ff.net.2"] {
                layers.push(format!("{prefix}.transformer_blocks.{k}.{inner}"));
            }
            for (attn, inner) in ["attn1", "attn2"]
                .into_iter()
                .flat_map(|a| ["to_q", "to_k", "to_v", "to_out.0"].map(|i| (a, i)))
            {
                layers.push(format!("{prefix}.transformer_blocks.{k}.{attn}.{inner}"));
            }
        }
        layers
    }

    /// All 722 layers by their diffusers paths.
    fn sdxl_layers() -> Vec<String> {
        let places = [
            ("down_blocks.1", 2, 2),
            ("down_blocks.2", 2, 10),
            ("up_blocks.0", 3, 10),
            ("up_blocks.1", 3, 2),
        ];
        let mut layers = attention("mid_block.attentions.0", 10);
        for (block, count, depth) in places {
            layers.extend((0..count).flat_map(|i| attention(&format!("{block}.attentions.{i}"), depth)));
        }
        layers
    }

    #[test]
    fn comfyui_finds_every_kohya_key_among_the_names_it_makes_of_the_checkpoint() {
        // comfy/lora.py, `model_lora_keys_unet`: `lora_unet_` and the checkpoint's own name, dots as underscores.
        // The transformers of the checkpoint, with their depths:
        let mut checkpoint = attention("middle_block.1", 10);
        for (side, blocks) in [
            ("input_blocks", vec![(4, 2), (5, 2), (7, 10), (8, 10)]),
            ("output_blocks", vec![(0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2)]),
        ] {
            checkpoint
                .extend(blocks.iter().flat_map(|(i, depth)| attention(&format!("{side}.{i}.1"), *depth)));
        }
        let theirs: std::collections::BTreeSet<String> =
            checkpoint.iter().map(|path| format!("lora_unet_{}", path.replace('.', "_"))).collect();
        let layout = BlockLayout::default();
        let ours = sdxl_layers().iter().map(|module| kohya(module, &layout).unwrap()).collect();
        assert_eq!(theirs.len(), 722);
        assert_eq!(theirs, ours);
        // Both encoders: `lora_te1_` and `lora_te2_` with the names of transformers.
        let module = "text_encoder_2.text_model.encoder.layers.31.mlp.fc1";
        assert_eq!(kohya(module, &layout).unwrap(), "lora_te2_text_model_encoder_layers_31_mlp_fc1");
    }

    #[test]
    fn a1111_turns_diffusers_names_into_the_same_layers() {
        // extensions-builtin/Lora/networks.py, `convert_diffusers_name_to_compvis`, for attentions.
        let convert = |stem: &str| -> String {
            let rest = stem.strip_prefix("lora_unet_").unwrap();
            if let Some(suffix) = rest.strip_prefix("mid_block_attentions_0_") {
                return format!("diffusion_model_middle_block_1_{suffix}");
            }
            let (side, rest) = rest.split_once("_blocks_").unwrap();
            let (level, rest) = rest.split_once("_attentions_").unwrap();
            let (index, suffix) = rest.split_once('_').unwrap();
            let block = 3 * level.parse::<usize>().unwrap() + index.parse::<usize>().unwrap();
            match side {
                "down" => format!("diffusion_model_input_blocks_{}_1_{suffix}", block + 1),
                _ => format!("diffusion_model_output_blocks_{block}_1_{suffix}"),
            }
        };
        let layout = BlockLayout::default();
        for module in sdxl_layers() {
            let ldm = kohya(&module, &layout).unwrap().replace("lora_unet_", "diffusion_model_");
            assert_eq!(convert(&kohya_diffusers(&module)), ldm);
            for stem in [kohya(&module, &layout).unwrap(), kohya_diffusers(&module), peft(&module)] {
                let key = format!("{stem}.alpha");
                assert_eq!(parse(&key, &layout), Key::Layer(module.clone(), Part::Alpha), "{key}");
            }
        }
    }
}
