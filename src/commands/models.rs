//! Which model a name on the command line means.

use anyhow::{Result, bail};
use include_dir::{Dir, include_dir};
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::hypernet::ModelId;
use crate::lora::keys::BlockLayout;
use crate::model_files::ModelFiles;
use crate::sdxl::unet::UNetConfig;

/// The bundle that this program carries: a small SDXL and a hypernetwork for it, made by `scripts/make-tiny.sh`.
static TINY: Dir = include_dir!("$CARGO_MANIFEST_DIR/src/assets/tiny");

/// The name of the built-in bundle.
pub const BUILT_IN: &str = "tiny";

/// The file whose hash stands for a base model.
pub const BASE_WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
/// The file whose hash stands for an image encoder.
pub const ENCODER_WEIGHTS: &str = "model.safetensors";

/// A part of the built-in bundle: `base`, `hypernet`, `image_encoder` or `judge`.
pub fn built_in(part: &'static str) -> Result<ModelFiles> {
    match TINY.get_dir(part) {
        Some(dir) => Ok(ModelFiles::BuiltIn { name: BUILT_IN, dir }),
        None => bail!("this build carries no `{part}`; make it with scripts/make-tiny.sh and build again"),
    }
}

/// The model `part` that `name` stands for: the built-in one, or a folder.
///
/// # Errors
/// [`Failure::Usage`] for a name that is neither.
pub fn find(name: &str, part: &'static str) -> Result<ModelFiles> {
    if name == BUILT_IN {
        return built_in(part);
    }
    let path = std::path::Path::new(name);
    if path.is_dir() {
        return ModelFiles::folder(path);
    }
    if path.exists() {
        return Err(Failure::unusable(path, "models are read from folders in diffusers' layout"));
    }
    Err(Failure::Usage(format!(
        "there is no {part} `{name}`: give a folder, or `{BUILT_IN}` for the built-in one"
    ))
    .into())
}

/// Name and SHA-256 of a model's weights, given the weight file that stands for it.
pub fn identify(files: &ModelFiles, name: &str, weights: &str) -> Result<ModelId> {
    let sha256 = Sha256::digest(files.read(weights)?);
    // The folder's own name: a path of this machine says nothing elsewhere.
    let short = std::path::Path::new(name).file_name().map_or(name.into(), |last| last.to_string_lossy());
    Ok(ModelId { name: short.into(), sha256: sha256.iter().map(|byte| format!("{byte:02x}")).collect() })
}

/// How many layers each level of a base's UNet has: the LDM spelling of LoRA layers depends on it.
pub fn block_layout(files: &ModelFiles) -> Result<BlockLayout> {
    let config: UNetConfig = files.config("unet/config.json")?;
    Ok(BlockLayout::uniform(config.block_out_channels.len(), config.layers_per_block))
}
