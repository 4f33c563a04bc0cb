//! Which model a name means: a built-in one, a folder, a file, or a repository of the Hugging Face hub.

pub mod hyperlora;
pub mod listing;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use include_dir::{Dir, include_dir};

use crate::failure::Failure;
use crate::lora::ldm_keys::BlockLayout;
use crate::lora::{file, metadata};
use crate::sdxl::unet::UNetConfig;
use crate::sdxl::vae::VaeConfig;
use crate::sdxl::{architecture, single_file};
use crate::weights::header::Header;
use crate::weights::hub::Repository;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;

/// The bundle that this program carries: a small SDXL and a hypernetwork for it, made by `scripts/make-tiny.sh`.
static TINY: Dir = include_dir!("$CARGO_MANIFEST_DIR/src/assets/tiny");

/// The name of the built-in bundle.
pub const BUILT_IN: &str = "tiny";

/// Stability AI's SDXL on the hub.
pub const SDXL: &str = "stabilityai/stable-diffusion-xl-base-1.0";

/// Short names of hub repositories.
pub const NAMES: [(&str, &str); 1] = [("sdxl", SDXL)];

/// The licence of a well-known base on the hub, as its model card names it.
pub fn licence(id: &str) -> Option<&'static str> {
    (id == SDXL).then_some("CreativeML Open RAIL++-M")
}

/// Contents of a hypernetwork folder.
const HYPERNET_FILES: [&str; 4] = ["config.json", "dit.safetensors", "lae.safetensors", "stats.safetensors"];

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

/// Where to look for a base model.
#[derive(Clone, Debug, Default)]
pub struct BaseOptions {
    /// Settings of a single-file base that its tensors do not show: a diffusers folder, or a JSON file with the keys
    /// `unet`, `vae`, `text_encoder`, `text_encoder_2`, `scheduler`, `tokenizer`, `tokenizer_2`, `model_index`.
    pub base_config: Option<PathBuf>,
    /// Branch, tag or commit of a base on the hub.
    pub revision: Option<String>,
    /// Use only cached models, never the network (as HF_HUB_OFFLINE).
    pub offline: bool,
}

/// The base model that `name` stands for: a built-in one, a folder in diffusers' layout, one file in LDM layout, or a
/// repository on the hub.
///
/// # Errors
/// [`Failure::Usage`] for a name that is none of them, [`Failure::Unusable`] for one that cannot be had.
pub fn find_base(name: &str, options: &BaseOptions) -> Result<ModelFiles> {
    let path = Path::new(name);
    let found = if name == BUILT_IN || path.exists() {
        path.to_path_buf()
    } else if let Some(repository) = repository(name, options.revision.as_deref()) {
        repository.open(options.offline)?
    } else {
        return Err(Failure::Usage(format!(
            "there is no base `{name}`: give a folder in diffusers' layout, a `.safetensors` with a whole model, a \
             repository `owner/name` of the Hugging Face hub, or a name: {BUILT_IN}, sdxl"
        ))
        .into());
    };
    if found.is_file() {
        return single_file::open(&found, options.base_config.as_deref());
    }
    if options.base_config.is_some() {
        return Err(Failure::Usage("--base-config is for a --base that is one file".into()).into());
    }
    if name == BUILT_IN { built_in("base") } else { ModelFiles::folder(found) }
}

/// The hypernetwork that `name` stands for: the built-in one, HyperLoRA's, a folder, or a repository on the hub.
///
/// # Errors
/// [`Failure::Usage`] for a name that is none of them, [`Failure::Unusable`] for one that cannot be had.
pub fn find_hypernet(name: &str, offline: bool) -> Result<ModelFiles> {
    if let Some(files) = find_hyperlora(name)? {
        return Ok(files);
    }
    match Repository::parse(name).filter(|_| !Path::new(name).exists()) {
        Some(repository) => ModelFiles::folder(repository.open_files(&HYPERNET_FILES, offline)?),
        None => find(name, "hypernet"),
    }
}

/// HyperLoRA's weights, where `name` means them: by their name, or a folder or cached repository that holds them.
///
/// # Errors
/// [`Failure::Unusable`] where they are not on this machine; they are never fetched unasked.
pub fn find_hyperlora(name: &str) -> Result<Option<ModelFiles>> {
    if let Some(variant) = hyperlora::Variant::parse(name)? {
        return variant.open().map(Some);
    }
    if name == BUILT_IN {
        return Ok(None);
    }
    let repository = Repository::parse(name).filter(|_| !Path::new(name).exists());
    let folder = match &repository {
        Some(repository) => repository.folder(),
        None => Some(PathBuf::from(name)),
    };
    match folder.and_then(|folder| hyperlora::inside(&folder)) {
        Some(folder) => ModelFiles::folder(folder).map(Some),
        None if repository.is_some_and(|repository| repository.id == hyperlora::REPOSITORY) => {
            hyperlora::Variant::Fidelity.open().map(Some)
        }
        None => Ok(None),
    }
}

/// HyperLoRA's image encoder: a folder, or OpenAI's CLIP on the hub.
///
/// # Errors
/// As [`find_hypernet`].
pub fn find_clip(name: Option<&str>, offline: bool) -> Result<ModelFiles> {
    match name {
        Some(name) => find(name, "image_encoder"),
        None => {
            let clip = Repository { id: hyperlora::CLIP.into(), revision: "main".into(), file: None };
            ModelFiles::folder(clip.open_files(&hyperlora::CLIP_FILES, offline)?)
        }
    }
}

/// The hub repository that `name` stands for: a short name or `owner/name`, with an optional `@revision`.
pub fn repository(name: &str, revision: Option<&str>) -> Option<Repository> {
    let (short, of) = name.split_once('@').unwrap_or((name, ""));
    let full = match NAMES.iter().find(|(known, _)| *known == short) {
        Some((_, id)) if of.is_empty() => (*id).to_string(),
        Some((_, id)) => format!("{id}@{of}"),
        None => name.to_string(),
    };
    let mut repository = Repository::parse(&full)?;
    if let Some(revision) = revision {
        repository.revision = revision.to_string();
    }
    Some(repository)
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

/// A base model and what its configs say, read once.
pub struct Base {
    /// As the user named it.
    pub name: String,
    /// Its files.
    pub files: ModelFiles,
    /// Layers on each level of the UNet: LDM names of LoRA layers depend on it.
    pub block_layout: BlockLayout,
    /// Side in pixels of the images that it was trained on.
    pub native_size: usize,
    /// Side of their latents.
    pub latent_size: usize,
}

impl Base {
    /// Finds the base model `name` and reads its configs.
    ///
    /// # Errors
    /// As [`find_base`]; [`Failure::Unusable`] for a model that is not SDXL.
    pub fn open(name: &str, options: &BaseOptions) -> Result<Self> {
        let files = find_base(name, options)?;
        architecture::require_sdxl(&files)?;
        Self::describe(name, files)
    }

    /// As [`Base::open`], for a model that need not be SDXL nor have a VAE.
    pub fn open_any(name: &str, options: &BaseOptions) -> Result<Self> {
        Self::describe(name, find_base(name, options)?)
    }

    fn describe(name: &str, files: ModelFiles) -> Result<Self> {
        let unet: UNetConfig = files.config("unet/config.json")?;
        let factor = match files.exists("vae/config.json") {
            true => files.config::<VaeConfig>("vae/config.json")?.factor(),
            false => 8,
        };
        Ok(Self {
            name: name.to_string(),
            block_layout: BlockLayout::uniform(unet.block_out_channels.len(), unet.layers_per_block),
            native_size: unet.sample_size * factor,
            latent_size: unet.sample_size,
            files,
        })
    }

    /// Name and SHA-256 of the UNet's weights; reads all of them.
    pub fn id(&self) -> Result<ModelId> {
        identify(&self.files, &self.name, BASE_WEIGHTS)
    }
}

/// Name and SHA-256 of a model, the hash taken of `weights`, its main weight file.
pub fn identify(files: &ModelFiles, name: &str, weights: &str) -> Result<ModelId> {
    let (folder, file) = weights.rsplit_once('/').unwrap_or(("", weights));
    let sha256 = files.sha256(folder, file.trim_end_matches(".safetensors"))?;
    // The folder's own name: a path of this machine says nothing elsewhere.
    let short = Path::new(name).file_name().map_or(name.into(), |last| last.to_string_lossy());
    Ok(ModelId { name: short.into(), sha256 })
}

/// The block layout of LoRA files for which the user names no base: that of the built-in base where the metadata of one
/// name it, else SDXL's.
///
/// # Errors
/// [`Failure::Usage`] for files of different bases.
pub fn block_layout_of_loras(loras: &[PathBuf]) -> Result<BlockLayout> {
    let mut bases: Vec<(&PathBuf, String)> = Vec::new();
    for path in loras {
        // A file that cannot be read is refused when the command reads it, behind its other checks.
        let Some(header) = file::open(path).ok().and_then(|mut file| Header::read(&mut file).ok()) else {
            continue;
        };
        bases.extend(header.metadata.get(metadata::BASE).map(|base| (path, base.clone())));
    }
    let Some((tiny, _)) = bases.iter().find(|(_, base)| base == BUILT_IN) else {
        return Ok(BlockLayout::default());
    };
    if let Some((other, base)) = bases.iter().find(|(_, base)| base != BUILT_IN) {
        return Err(Failure::Usage(format!(
            "`{}` was made for the base `{BUILT_IN}`, `{}` for `{base}`: LoRAs of one base can be combined",
            tiny.display(),
            other.display()
        ))
        .into());
    }
    Ok(Base::open_any(BUILT_IN, &BaseOptions::default())?.block_layout)
}
