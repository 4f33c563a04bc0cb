//! `difflora models`: lists, downloads, checks and measures models.

mod show;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use crate::failure::Failure;
use crate::files as disk;
use crate::identity::catalog::{self, FaceModel};
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::registry::{self, BUILT_IN, BaseOptions, NAMES};
use crate::sdxl::architecture;
use crate::sdxl::text::{ClipTextConfig, ClipTextModel};
use crate::sdxl::unet::UNet;
use crate::sdxl::unet::UNetConfig;
use crate::sdxl::vae::{Vae, VaeConfig};
use crate::weights::hub::{self, Repository, Weights};
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS};
use crate::weights::sha256;

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
    registry::repository(name, None).ok_or_else(|| {
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
    let files = registry::find_base(name, options)?;
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
