//! Names of the Latent Diffusion Models code (LDM) and of OpenCLIP → diffusers' and transformers' names.

use std::borrow::Cow;

use crate::lora::ldm_keys::{self, BlockLayout};
use crate::weights::assembled::Form;

/// The diffusers names of a stored tensor, and the form in which each lies in it.
pub(super) type Names = Option<Vec<(String, Form)>>;

/// A name that ends in `.weight` or `.bias`, taken apart.
pub(super) fn layer_and_kind(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))
}

/// Of the UNet's tensor `name` of `rank` axes.
pub(super) fn unet_name(name: &str, layout: &BlockLayout, rank: usize) -> Names {
    let (layer, kind) = layer_and_kind(name)?;
    // On levels without attention the upsampler follows the ResNet; its place moves up by one.
    let moved = layer.strip_suffix(".1.conv").filter(|block| block.starts_with("output_blocks."));
    let layer = moved.map_or(Cow::Borrowed(layer), |block| Cow::Owned(format!("{block}.2.conv")));
    let matrix = layer.ends_with(".proj_in") || layer.ends_with(".proj_out");
    let form = if matrix && rank == 4 { Form::Pointwise } else { Form::Whole };
    Some(vec![(format!("{}.{kind}", ldm_keys::from_ldm(&layer, layout)?), form)])
}

/// LDM name ↔ diffusers name of what lies in the VAE's middle.
const VAE_MIDDLE: [(&str, &str); 8] = [
    ("block_1", "resnets.0"),
    ("block_2", "resnets.1"),
    ("attn_1.norm", "attentions.0.group_norm"),
    ("attn_1.q", "attentions.0.to_q"),
    ("attn_1.k", "attentions.0.to_k"),
    ("attn_1.v", "attentions.0.to_v"),
    ("attn_1.proj_out", "attentions.0.to_out.0"),
    ("attn_1.to_out.0", "attentions.0.to_out.0"),
];

/// Of the VAE's tensor `name` of `rank` axes.
pub(super) fn vae_name(name: &str, levels: usize, rank: usize) -> Names {
    let (layer, kind) = layer_and_kind(name)?;
    let layer = layer.replace("nin_shortcut", "conv_shortcut");
    let (side, rest) = layer.split_once('.').unwrap_or((layer.as_str(), ""));
    let mut form = Form::Whole;
    let ours = match (side, rest) {
        ("quant_conv" | "post_quant_conv", "") => side.to_string(),
        (_, "conv_in" | "conv_out") => format!("{side}.{rest}"),
        (_, "norm_out") => format!("{side}.conv_norm_out"),
        _ if rest.starts_with("mid.") => {
            let rest = rest.strip_prefix("mid.")?;
            if rest.starts_with("attn_1.") && rank == 4 {
                form = Form::Pointwise;
            }
            let (ldm, ours) = VAE_MIDDLE.iter().find(|(ldm, _)| {
                rest.strip_prefix(ldm).is_some_and(|after| after.is_empty() || after.starts_with('.'))
            })?;
            format!("{side}.mid_block.{ours}{}", &rest[ldm.len()..])
        }
        _ => {
            let (way, rest) = rest.split_once('.')?;
            let (level, rest) = rest.split_once('.')?;
            let level: usize = level.parse().ok()?;
            let (blocks, level) = match (side, way) {
                ("encoder", "down") => ("down_blocks", level),
                // LDM counts the decoder's levels from the image inwards.
                ("decoder", "up") => ("up_blocks", levels.checked_sub(level + 1)?),
                _ => return None,
            };
            let inner = match rest.split_once('.')? {
                ("block", rest) => format!("resnets.{rest}"),
                ("downsample", "conv") => "downsamplers.0.conv".to_string(),
                ("upsample", "conv") => "upsamplers.0.conv".to_string(),
                _ => return None,
            };
            format!("{side}.{blocks}.{level}.{inner}")
        }
    };
    Some(vec![(format!("{ours}.{kind}"), form)])
}

/// OpenCLIP name ↔ transformers name within a layer.
const OPEN_CLIP: [(&str, &str); 5] = [
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
];

/// Of the second text encoder's tensor `name`.
pub(super) fn open_clip_name(name: &str) -> Names {
    let whole = |ours: String| Some(vec![(ours, Form::Whole)]);
    match name {
        "positional_embedding" => return whole("text_model.embeddings.position_embedding.weight".into()),
        "token_embedding.weight" => return whole("text_model.embeddings.token_embedding.weight".into()),
        "text_projection.weight" => return whole("text_projection.weight".into()),
        "text_projection" => return Some(vec![("text_projection.weight".into(), Form::Transposed)]),
        _ => {}
    }
    if let Some(kind) = name.strip_prefix("ln_final.") {
        return whole(format!("text_model.final_layer_norm.{kind}"));
    }
    let (layer, rest) = name.strip_prefix("transformer.resblocks.")?.split_once('.')?;
    let place = format!("text_model.encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        let third =
            |(n, part): (usize, &str)| (format!("{place}.self_attn.{part}_proj.{kind}"), Form::Third(n));
        return Some(["q", "k", "v"].into_iter().enumerate().map(third).collect());
    }
    let (inner, kind) = layer_and_kind(rest)?;
    let (_, ours) = OPEN_CLIP.iter().find(|(theirs, _)| *theirs == inner)?;
    whole(format!("{place}.{ours}.{kind}"))
}
