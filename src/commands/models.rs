//! `difflora models`: lists, downloads, checks and measures models.

mod pull;
mod show;

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::failure::Failure;
use crate::files as disk;
use crate::output::Output;
use crate::output::print_line;
use crate::registry::hyperlora::{self, Variant};
use crate::registry::{self, BUILT_IN, BaseOptions, NAMES};
use crate::sdxl::architecture;
use crate::sdxl::text::{ClipTextConfig, ClipTextModel};
use crate::sdxl::unet::UNet;
use crate::sdxl::unet::UNetConfig;
use crate::sdxl::vae::{Vae, VaeConfig};
use crate::weights::hub::{self, Repository};
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS};

/// Arguments of `difflora models`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List known names and the models in the hub's cache.
    List,
    /// Print the folder of a cached hub model.
    Path {
        /// sdxl, or owner/name[@revision].
        name: String,
    },
    /// Download the newest version of a hub model, only the files that are used; a face encoder (antelopev2, buffalo_l,
    /// auraface), whose licence is shown; or HyperLoRA's weights with the encoders that they need.
    Pull(pull::Args),
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
        Command::Pull(args) => pull::run(&args),
        Command::Verify { name, options } => verify(&name, &options, output),
        Command::Show(args) => show::run(&args, output),
    }
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
    for variant in Variant::ALL {
        let (folder, missing) = variant.cached();
        let state = match missing.len() {
            0 => "whole",
            4 => "not fetched",
            _ => "in part",
        };
        let folder = folder.filter(|folder| folder.is_dir());
        rows.push((variant.name().to_string(), hyperlora::REPOSITORY.to_string(), state, folder));
    }
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
        print_line!("{}", format!("{name:<14} {id:<42} {state:<12} {folder}").trim_end())?;
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
