//! Which model a user has given, when it is not an SDXL that can be drawn with.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;

use super::text::ClipTextConfig;
use super::unet::UNetConfig;
use super::vae::VaeConfig;
use crate::weights::model_folder::ModelFiles;

/// Shape of each tensor by its name in the file.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// Fails unless the configs of a diffusers folder are those of an SDXL whose parts fit each other.
///
/// # Errors
/// [`crate::failure::Failure::Unusable`] that says which model it is instead, or which part is missing.
pub fn require_sdxl(files: &ModelFiles) -> Result<()> {
    if !files.exists("model_index.json") {
        return Err(files.unusable("model_index.json", "it is missing; is this a diffusers SDXL folder?"));
    }
    let index: Value = files.json("model_index.json")?;
    if let Some(other) = of_index(&index, &unet_of(files)) {
        return Err(files.unusable("model_index.json", other));
    }
    for part in ["unet", "vae", "text_encoder", "text_encoder_2"] {
        if !files.exists(&format!("{part}/config.json")) {
            return Err(
                files.unusable(&format!("{part}/config.json"), format!("the part `{part}` is missing"))
            );
        }
    }
    let unet: UNetConfig = files.config("unet/config.json")?;
    let vae: VaeConfig = files.config("vae/config.json")?;
    let one: ClipTextConfig = files.config("text_encoder/config.json")?;
    let two: ClipTextConfig = files.config("text_encoder_2/config.json")?;
    let misfits = [
        (
            unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels,
            format!(
                "`in_channels` {} and `out_channels` {} do not fit the VAE's `latent_channels` {}; inpainting and \
                 instruction models (8 or 9 channels) are not supported",
                unet.in_channels, unet.out_channels, vae.latent_channels
            ),
        ),
        (
            unet.cross_attention_dim != one.hidden_size + two.hidden_size,
            format!(
                "`cross_attention_dim` {} is not the sum of the text encoders' `hidden_size` {} and {}",
                unet.cross_attention_dim, one.hidden_size, two.hidden_size
            ),
        ),
        (
            unet.projection_class_embeddings_input_dim
                != two.projection_dim + 6 * unet.addition_time_embed_dim,
            format!(
                "`projection_class_embeddings_input_dim` {} is not text_encoder_2's `projection_dim` {} and six times \
                 `addition_time_embed_dim` {}",
                unet.projection_class_embeddings_input_dim, two.projection_dim, unet.addition_time_embed_dim
            ),
        ),
        (
            !two.with_projection(),
            "text_encoder_2 is no `CLIPTextModelWithProjection`, as its `architectures` should say"
                .to_string(),
        ),
    ];
    match misfits.into_iter().find(|(misfit, _)| *misfit) {
        Some((_, why)) => Err(files.unusable("unet/config.json", why)),
        None => Ok(()),
    }
}

/// The UNet's config where there is one, whatever model it is of.
fn unet_of(files: &ModelFiles) -> Value {
    files.json("unet/config.json").unwrap_or_default()
}

/// The model family of a `model_index.json` that is not SDXL; `unet` is the UNet's config.
fn of_index(index: &Value, unet: &Value) -> Option<String> {
    let class = index["_class_name"].as_str().unwrap_or_default();
    let width = unet["cross_attention_dim"].as_u64();
    let absent = |part: &str| index[part].is_null() || index[part][0].is_null();
    let it = match class {
        _ if class.starts_with("StableDiffusionXL") && absent("text_encoder") && width == Some(1280) => {
            "it is the SDXL refiner, which improves images of another model; give the base model"
        }
        "StableDiffusionXLInpaintPipeline" if unet["in_channels"] == 9 => {
            "it is an SDXL inpainting model; give a text-to-image model"
        }
        _ if class.starts_with("StableDiffusionXL") => return None,
        _ if class.starts_with("StableDiffusion3") => "it is Stable Diffusion 3, which is no SDXL",
        _ if class.starts_with("Flux") => "it is FLUX, which is no SDXL",
        _ if class.starts_with("StableDiffusion") && width == Some(768) => {
            "it is Stable Diffusion 1 (1.4 or 1.5), which is no SDXL"
        }
        _ if class.starts_with("StableDiffusion") && width == Some(1024) => {
            "it is Stable Diffusion 2, which is no SDXL"
        }
        "" => "it has no `_class_name`",
        other => return Some(format!("it is a `{other}`; difflora needs a `StableDiffusionXLPipeline`")),
    };
    Some(it.to_string())
}

/// The model family of a single file that is not SDXL, by its tensors.
pub(super) fn of_tensors(shapes: &Shapes) -> Option<String> {
    let any = |part: &str| shapes.keys().any(|name| name.contains(part));
    let starts = |prefix: &str| shapes.keys().any(|name| name.starts_with(prefix));
    let unet = starts("model.diffusion_model.");
    let it = if any("lora_up") || any("lora_down") || any("lora_A") || any("hada_w1") || any("lokr_w") {
        "it is a LoRA; give it as --lora, and a base model as --base"
    } else if any("joint_blocks.") {
        "it is Stable Diffusion 3, which is no SDXL"
    } else if any("double_blocks.") {
        "it is FLUX, which is no SDXL"
    } else if shapes.contains_key("edm_mean") {
        "it is Playground 2.5, whose EDM noise levels are not supported"
    } else if starts("cond_stage_model.transformer.") {
        "it is Stable Diffusion 1 (1.4 or 1.5), which is no SDXL"
    } else if starts("cond_stage_model.model.") {
        "it is Stable Diffusion 2, which is no SDXL"
    } else if starts("conditioner.embedders.0.model.") {
        "it is the SDXL refiner, which improves images of another model; give the base model"
    } else if starts("down_blocks.") || starts("encoder.down_blocks.") || starts("text_model.") {
        "it is one part of a diffusers folder; give the folder"
    } else if !unet {
        "it holds no `model.diffusion_model.…`, so it is no whole model"
    } else if !starts("conditioner.embedders.1.model.") || !starts("conditioner.embedders.0.transformer.") {
        "it holds a UNet without SDXL's two text encoders (`conditioner.embedders.…`); give a file with all parts"
    } else if shapes
        .get("model.diffusion_model.input_blocks.0.0.weight")
        .is_some_and(|s| s.get(1) == Some(&9))
    {
        "it is an SDXL inpainting model; give a text-to-image model"
    } else {
        return None;
    };
    Some(it.to_string())
}
