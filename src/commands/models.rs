//! `difflora models`: models by name; and which model a name on any command line means.

mod show;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use include_dir::{Dir, include_dir};
use serde_json::json;

use crate::failure::Failure;
use crate::files as disk;
use crate::hypernet::ModelId;
use crate::identity::catalog::{self, FaceModel};
use crate::lora::keys::BlockLayout;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::sdxl::architecture;
use crate::sdxl::single_file;
use crate::sdxl::text::{ClipTextConfig, ClipTextModel};
use crate::sdxl::unet::UNet;
use crate::sdxl::unet::UNetConfig;
use crate::sdxl::vae::{Vae, VaeConfig};
use crate::weights::hub::{self, Repository, Weights};
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS};
use crate::weights::sha256;

/// The bundle that this program carries: a small SDXL and a hypernetwork for it, made by `scripts/make-tiny.sh`.
static TINY: Dir = include_dir!("$CARGO_MANIFEST_DIR/src/assets/tiny");

/// The name of the built-in bundle.
pub const BUILT_IN: &str = "tiny";

/// Stability AI's SDXL on the hub.
pub const SDXL: &str = "stabilityai/stable-diffusion-xl-base-1.0";

/// Short names of hub repositories.
const NAMES: [(&str, &str); 1] = [("sdxl", SDXL)];

/// The licence of a well-known base on the hub, as its model card names it.
pub fn licence(id: &str) -> Option<&'static str> {
    (id == SDXL).then_some("CreativeML Open RAIL++-M")
}

/// What a hypernetwork's folder holds.
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

/// Arguments of `difflora models`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List known names and the base models in the hub's cache.
    List,
    /// Print the folder of a cached hub model.
    Path {
        /// sdxl, or owner/name[@revision].
        name: String,
    },
    /// Download the newest version of a hub model, only the files that are used; or a face encoder (antelopev2,
    /// buffalo_l, auraface), whose licence is shown.
    Pull {
        /// sdxl, owner/name[@revision][:file.safetensors], or a face encoder.
        name: String,
        /// Prefer half-precision weights: half the download.
        #[arg(long)]
        fp16: bool,
    },
    /// Check every tensor of a model (name, shape, finite values) and the hub's checksums.
    Verify {
        /// A folder, a file, owner/name[@revision], or a name.
        name: String,
        #[command(flatten)]
        options: BaseOptions,
    },
    /// Parameters and multiply-adds of a model, part by part.
    Show(show::Args),
}

/// Runs what was asked for.
pub fn run(args: Args, output: &Output) -> Result<()> {
    match args.command {
        Command::List => list(output),
        Command::Path { name } => {
            print_line!("{}", on_the_hub(&name)?.cached()?.display())?;
            Ok(())
        }
        Command::Pull { name, fp16 } => {
            if hub::offline() {
                return Err(
                    Failure::Usage("HF_HUB_OFFLINE forbids the network; unset it to fetch".into()).into()
                );
            }
            let folder = match catalog::find(&name) {
                Some(model) => pull_faces(model)?,
                None => on_the_hub(&name)?.fetch(if fp16 { Weights::Half } else { Weights::Any })?,
            };
            print_line!("{}", folder.display())?;
            Ok(())
        }
        Command::Verify { name, options } => verify(&name, &options, output),
        Command::Show(args) => show::run(&args, output),
    }
}

/// Fetches a face encoder and holds its files against their checksums.
fn pull_faces(model: &FaceModel) -> Result<PathBuf> {
    progress::note(format_args!("{}: {}; licence: {}", model.name, model.about, model.licence));
    let repository = Repository { id: model.repo.into(), revision: "main".into(), file: None };
    let folder = repository.fetch_files(model.files().map(|file| file.path))?;
    for file in model.files() {
        let path = folder.join(file.path);
        let found = sha256::of_file(&path)?;
        if found != file.sha256 {
            let why = format!(
                "its SHA-256 is {found}, that of {} is {}; delete it and pull again",
                model.name, file.sha256
            );
            return Err(Failure::unusable(&path, why));
        }
    }
    Ok(folder)
}

fn on_the_hub(name: &str) -> Result<Repository> {
    if name == BUILT_IN {
        return Err(
            Failure::Usage(format!("`{BUILT_IN}` is inside the program and lies in no folder")).into()
        );
    }
    repository(name, None).ok_or_else(|| {
        Failure::Usage(format!("`{name}` is no model of the hub: write owner/name[@revision], or sdxl"))
            .into()
    })
}

fn list(output: &Output) -> Result<()> {
    let state = |repository: &Repository| match (repository.cached(), repository.folder()) {
        (Ok(folder), _) => ("whole", Some(folder)),
        (Err(_), Some(folder)) => ("in part", Some(folder)),
        (Err(_), None) => ("not fetched", None),
    };
    let named = NAMES.iter().filter_map(|(name, id)| Some((*name, Repository::parse(id)?)));
    let cached = hub::repositories().into_iter().filter(|it| NAMES.iter().all(|(_, id)| *id != it.id));
    // Models of other kinds share the cache; only those with an index of parts can be bases.
    let cached =
        cached.filter(|it| it.folder().is_some_and(|folder| folder.join("model_index.json").exists()));
    let mut rows = vec![(BUILT_IN.to_string(), String::new(), "built in", None)];
    for (name, repository) in named.chain(cached.map(|repository| ("", repository))) {
        let (state, folder) = state(&repository);
        rows.push((name.to_string(), repository.id, state, folder));
    }
    if output.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, id, state, folder)| json!({ "name": name, "id": id, "state": state, "folder": folder }))
            .collect();
        print_line!("{:#}", json!(rows))?;
        return Ok(());
    }
    for (name, id, state, folder) in rows {
        let folder = folder.map(|folder| folder.display().to_string()).unwrap_or_default();
        print_line!("{}", format!("{name:<6} {id:<42} {state:<12} {folder}").trim_end())?;
    }
    Ok(())
}

/// Checks every part of a model without keeping it.
fn verify(name: &str, options: &BaseOptions, output: &Output) -> Result<()> {
    let files = find_base(name, options)?;
    architecture::require_sdxl(&files)?;
    let unet: UNetConfig = files.config("unet/config.json")?;
    files.check("unet", DIFFUSERS_WEIGHTS, |vb| UNet::new(&unet, vb))?;
    let vae: VaeConfig = files.config("vae/config.json")?;
    files.check("vae", DIFFUSERS_WEIGHTS, |vb| Vae::new(&vae, vb))?;
    for folder in ["text_encoder", "text_encoder_2"] {
        let config: ClipTextConfig = files.config(&format!("{folder}/config.json"))?;
        files.check(folder, TRANSFORMERS_WEIGHTS, |vb| ClipTextModel::new(&config, vb))?;
    }
    let mut checksums = 0;
    if !Path::new(name).exists() {
        checksums = match &files {
            ModelFiles::Folder(folder) => hub::verify_checksums(folder)?,
            ModelFiles::Assembled(model) => hub::verify_checksums(disk::folder_of(&model.file))?,
            ModelFiles::BuiltIn { .. } => 0,
        };
    }
    if output.json {
        print_line!("{:#}", json!({ "base": name, "whole": true, "checksums": checksums }))?;
    } else {
        print_line!(
            "{name}: every weight is there, of the right shape and finite; {checksums} checksums agree"
        )?;
    }
    Ok(())
}

/// How to find a base model.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct BaseOptions {
    /// Settings of a single-file base that its tensors do not show: a diffusers folder, or a JSON file with the keys
    /// `unet`, `vae`, `text_encoder`, `text_encoder_2`, `scheduler`, `tokenizer`, `tokenizer_2`, `model_index`.
    #[arg(help_heading = "Model", long, value_name = "FILE|DIR", env = "DIFFLORA_BASE_CONFIG")]
    pub base_config: Option<PathBuf>,
    /// Branch, tag or commit of a base on the hub.
    #[arg(help_heading = "Model", long, value_name = "REVISION", env = "DIFFLORA_REVISION")]
    pub revision: Option<String>,
    /// Use only cached models, never the network (as HF_HUB_OFFLINE).
    #[arg(help_heading = "Model", long, env = "DIFFLORA_OFFLINE")]
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

/// The hypernetwork that `name` stands for: the built-in one, a folder, or a repository on the hub.
///
/// # Errors
/// [`Failure::Usage`] for a name that is none of them, [`Failure::Unusable`] for one that cannot be had.
pub fn find_hypernet(name: &str, offline: bool) -> Result<ModelFiles> {
    match Repository::parse(name).filter(|_| name != BUILT_IN && !Path::new(name).exists()) {
        Some(repository) => ModelFiles::folder(repository.open_files(&HYPERNET_FILES, offline)?),
        None => find(name, "hypernet"),
    }
}

/// The hub repository that `name` stands for.
fn repository(name: &str, revision: Option<&str>) -> Option<Repository> {
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

/// The side in pixels of the images that a base was trained for.
pub fn native_size(files: &ModelFiles) -> Result<usize> {
    let unet: UNetConfig = files.config("unet/config.json")?;
    let vae: VaeConfig = files.config("vae/config.json")?;
    Ok(unet.sample_size * vae.factor())
}
