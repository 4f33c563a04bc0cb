//! `unet/config.json`: the architecture of a UNet, and which options are supported.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

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
    pub(super) fn at(&self, level: usize) -> usize {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values.get(level).copied().unwrap_or(1),
        }
    }

    pub(super) fn fits(&self, levels: usize) -> bool {
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
    pub(super) fn at(&self, level: usize, layer: usize) -> usize {
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
    pub(super) fn fits(&self, levels: usize, layers: usize) -> bool {
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
    pub(super) fn is_nested(&self) -> bool {
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
