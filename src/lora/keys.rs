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

use super::ldm_keys::{BlockLayout, from_ldm, to_ldm};
use super::{LoraError, foreign};

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
    /// The bias of B, which PEFT trains with `lora_bias`: alpha / R times it is added to the layer's bias.
    UpBias,
    /// What replaces the weight (ComfyUI's name; PEFT's `modules_to_save`).
    SetWeight,
    /// What replaces the bias: PEFT's `bias: all` and `lora_only`. The suffix is this program's own.
    SetBias,
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
const SUFFIXES: [(&str, Part); 33] = [
    ("lora_down.weight", Part::Down),
    ("lora_up.weight", Part::Up),
    ("lora_mid.weight", Part::Mid),
    ("lora_up.bias", Part::UpBias),
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
    ("set_weight", Part::SetWeight),
    ("set_bias", Part::SetBias),
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
const FACTORS: [(&str, Part); 12] = [
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    (".lora_B.bias", Part::UpBias),
    (".lora.up.bias", Part::UpBias),
    (".lora_linear_layer.up.bias", Part::UpBias),
    ("_lora.up.bias", Part::UpBias),
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
    if let Some(kind) = foreign::kind(key) {
        return Key::Other(kind);
    }
    let Some((stem, part)) = split_part(key) else { return Key::Unknown };
    match module(stem, layout) {
        Some(module) => Key::Layer(module, part),
        None => Key::Unknown,
    }
}

/// The layer whose weight or bias a key replaces, in files of PEFT: `base_model.model.conv_in.weight`,
/// `….to_q.base_layer.bias`, and before PEFT 0.5 `….conv_in.modules_to_save.weight`.
pub fn replaced(key: &str, layout: &BlockLayout) -> Option<(String, Part)> {
    let (path, part) = match (key.strip_suffix(".weight"), key.strip_suffix(".bias")) {
        (Some(path), _) => (path, Part::SetWeight),
        (_, Some(path)) => (path, Part::SetBias),
        _ => return None,
    };
    let wrappers = [".modules_to_save", ".original_module"];
    let path = wrappers.iter().find_map(|wrapper| path.split_once(wrapper)).map_or(path, |(path, _)| path);
    let path = path.strip_suffix(".base_layer").unwrap_or(path);
    Some((module(path, layout)?, part))
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
    if let Some((stem, "lora_B")) =
        key.strip_suffix(".bias").and_then(|named| named.rsplit_once('.')?.0.rsplit_once('.'))
    {
        return Some((stem, Part::UpBias));
    }
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
    let is_adapter = ["lora_unet", "lora_te", "lycoris_"].iter().any(|prefix| key.starts_with(prefix));
    (named != key && is_adapter).then_some((named, Part::Ia3))
}

/// What precedes the part of a key, for example `base_model.model.unet.down_blocks.1.attentions.0.proj_in`.
pub fn stem(key: &str) -> Option<&str> {
    split_part(key).map(|(stem, _)| stem)
}

/// What wrappers of a model leave at the beginning of its module names: PEFT, torch.compile, DistributedDataParallel,
/// FullyShardedDataParallel.
const WRAPPERS: [&str; 4] = ["base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module."];

/// The same and that of gradient checkpointing inside a name, in which dots may have become underscores.
const INNER_WRAPPERS: [&str; 5] =
    ["base_model_model", "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// How the text encoders' modules begin. sd-scripts (`lora_te_` for SD 1.x), its OFT, PEFT and diffusers, OneTrainer's
/// OMI names (`clip_l.`), ComfyUI's saver (`text_encoders.clip_l.transformer.`), and the checkpoint's own.
const TEXT_ENCODERS: [(&str, &str); 14] = [
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te1.", "text_encoder"),
    ("lora_te2.", "text_encoder_2"),
    ("oft_te1_", "text_encoder"),
    ("oft_te2_", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("clip_l.", "text_encoder"),
    ("clip_g.", "text_encoder_2"),
    ("conditioner.embedders.0.", "text_encoder"),
];

/// How the UNet's modules begin, where they do not begin at once.
const UNETS: [&str; 7] = [
    "lora_unet_",
    "lora_unet.",
    "oft_unet_",
    "lycoris_",
    "unet.",
    "model.diffusion_model.",
    "diffusion_model.",
];

/// The diffusers path of a stem.
fn module(stem: &str, layout: &BlockLayout) -> Option<String> {
    let replaced = stem.replace(".processor.", ".");
    let stem = without_wrappers(&replaced);
    for (prefix, encoder) in TEXT_ENCODERS {
        if let Some(rest) = stem.strip_prefix(prefix) {
            let rest = without_wrappers(rest);
            let path = words(rest.strip_prefix("transformer.").unwrap_or(rest))?;
            // transformers 5 leaves `text_model.` out.
            return match path.split('.').next()? {
                "encoder" | "embeddings" | "final_layer_norm" => Some(format!("{encoder}.text_model.{path}")),
                "text_model" | "text_projection" => Some(format!("{encoder}.{path}")),
                _ => None,
            };
        }
    }
    let mut rest = stem;
    while let Some(inner) = UNETS.iter().find_map(|prefix| rest.strip_prefix(prefix)) {
        rest = without_wrappers(inner);
    }
    let path = words(rest)?;
    let path = match path.split('.').next()? {
        "input_blocks" | "middle_block" | "output_blocks" | "time_embed" | "label_emb" | "out" => {
            from_ldm(&path, layout)?
        }
        "down_blocks" | "up_blocks" | "mid_block" | "time_embedding" | "add_embedding" | "conv_in"
        | "conv_out" | "conv_norm_out" => path,
        _ => return None,
    };
    // The oldest diffusers files leave the index of the output projection out.
    Some(if path.ends_with(".to_out") { format!("{path}.0") } else { path })
}

/// A name without the wrappers that it begins with, each of which may be there more than once.
fn without_wrappers(mut name: &str) -> &str {
    while let Some(inner) = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)) {
        name = inner;
    }
    name
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
        if let Some(wrapper) = INNER_WRAPPERS.iter().find(ends_there) {
            rest = &rest[wrapper.len()..];
            rest = rest.strip_prefix('_').unwrap_or(rest);
            continue;
        }
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
            // OneTrainer's OMI names; wrappers, alone, nested, inside, and as sd-scripts flattens them.
            "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight",
            "unet._orig_mod.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
            "_orig_mod.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
            "module.unet.module._orig_mod.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
            "unet.base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
            "base_model.model.model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
            "base_model.model.diffusion_model.module.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight",
            "unet.down_blocks.1._orig_mod.attentions.0.transformer_blocks.0._orig_mod.attn1.to_out.0.lora_B.weight",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0._checkpoint_wrapped_module.attn1.to_out.0.lora_B.weight",
            "lora_unet__orig_mod_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0__orig_mod_attn1_to_out_0.lora_up.weight",
        ] {
            assert_eq!(parse(key, &layout), Key::Layer(path.to_string(), Part::Up), "{key}");
        }
        let te = "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj";
        for key in [
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj.alpha",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj.alpha",
            "text_encoder_2.encoder.layers.31.self_attn.out_proj.alpha",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.out_proj.alpha",
            "clip_g.text_model.encoder.layers.31.self_attn.out_proj.alpha",
            "clip_g.transformer.text_model.encoder.layers.31.self_attn.out_proj.alpha",
            "text_encoder_2._orig_mod.text_model.encoder.layers.31.self_attn.out_proj.alpha",
            "base_model.model.text_encoder_2.base_model.model.text_model.encoder.layers.31.self_attn.out_proj.alpha",
            "lora_te2__orig_mod_text_model_encoder_layers_31_self_attn_out_proj.alpha",
            "oft_te2_text_model_encoder_layers_31_self_attn_out_proj.alpha",
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
        for suffix in ["lora_B.bias", "lora_B.default.bias", "lora.up.bias"] {
            let key = format!("unet.down_blocks.1.attentions.0.proj_in.{suffix}");
            assert_eq!(parse(&key, &layout), Key::Layer(module.clone(), Part::UpBias), "{key}");
        }
        let oft = "oft_unet_input_blocks_4_1_proj_in.oft_blocks";
        assert_eq!(parse(oft, &layout), Key::Layer(module.clone(), Part::OftBlocks));
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
            // Models whose words are SDXL's and whose blocks are not.
            "transformer_blocks.0.attn1.to_q.lora_A.weight",
            "diffusion_model.layers.0.attn1.to_q.lora_A.weight",
            "text_encoder_2.layers.0.self_attn.q_proj.lora_A.weight",
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
