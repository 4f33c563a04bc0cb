//! Which model a name on the command line means.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use include_dir::{Dir, include_dir};

use crate::failure::Failure;
use crate::hypernet::ModelId;
use crate::lora::keys::BlockLayout;
use crate::model_files::ModelFiles;
use crate::sdxl::single_file;
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

/// How to find a base model.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct BaseOptions {
    /// For a base in one file: a JSON file (keys `unet`, `vae`, `text_encoder`, `text_encoder_2`, `scheduler`,
    /// `tokenizer`, `tokenizer_2`, `model_index`) or a diffusers folder with the settings that its tensors do not tell.
    #[arg(long, value_name = "FILE|DIR", env = "DIFFLORA_BASE_CONFIG")]
    pub base_config: Option<PathBuf>,
}

/// The base model that `name` stands for: the built-in one, a folder in diffusers' layout, or one file in LDM layout.
///
/// # Errors
/// [`Failure::Usage`] for a name that is none of them.
pub fn find_base(name: &str, options: &BaseOptions) -> Result<ModelFiles> {
    let path = Path::new(name);
    if path.is_file() {
        return single_file::open(path, options.base_config.as_deref());
    }
    if options.base_config.is_some() {
        return Err(Failure::Usage("--base-config is for a --base that is one file".into()).into());
    }
    find(name, "base")
}

/// The model `part` that `name` stands for: the built-in one, or a folder.
///
/// # Errors
/// [`Failure::Usage`] for a name that is neither.
pub fn find(name: &str, part: &'static str) -> Result<ModelFiles> {
    if name == BUILT_IN {
        return built_in(part);
    }
    let path = Path::new(name);
    if path.is_dir() {
        return ModelFiles::folder(path);
    }
    if path.exists() {
        return Err(Failure::unusable(path, "this model is read from a folder"));
    }
    Err(Failure::Usage(format!(
        "there is no {part} `{name}`: give a folder, or `{BUILT_IN}` for the built-in one"
    ))
    .into())
}

/// Name and SHA-256 of a model's weights, given the weight file that stands for it.
pub fn identify(files: &ModelFiles, name: &str, weights: &str) -> Result<ModelId> {
    let (folder, file) = weights.rsplit_once('/').unwrap_or(("", weights));
    let sha256 = files.sha256(folder, file.trim_end_matches(".safetensors"))?;
    // The folder's own name: a path of this machine says nothing elsewhere.
    let short = Path::new(name).file_name().map_or(name.into(), |last| last.to_string_lossy());
    Ok(ModelId { name: short.into(), sha256 })
}

/// How many layers each level of a base's UNet has: the LDM spelling of LoRA layers depends on it.
pub fn block_layout(files: &ModelFiles) -> Result<BlockLayout> {
    let config: UNetConfig = files.config("unet/config.json")?;
    Ok(BlockLayout::uniform(config.block_out_channels.len(), config.layers_per_block))
}
