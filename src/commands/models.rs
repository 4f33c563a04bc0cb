//! `difflora models`: lists, downloads, checks and measures models.

mod pull;
mod show;

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::commands::output::{Output, print_line};
use crate::commands::run_args::BaseOptionArgs;
use crate::failure::Failure;
use crate::files as disk;
use crate::registry::listing::{self, Listed};
use crate::registry::{self, BUILT_IN, BaseOptions};
use crate::sdxl::loader;
use crate::weights::hub::{self, Repository};
use crate::weights::model_folder::ModelFiles;

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
        options: BaseOptionArgs,
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
        Command::Pull(args) => pull::run(&args)
            .map_err(|error| Failure::with_hint(error, "the same command continues the download")),
        Command::Verify { name, options } => verify(&name, &options.options(), output),
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
    let models = listing::all();
    if output.json {
        return print_line!("{:#}", json!(models));
    }
    for Listed { name, id, state, folder } in models {
        let folder = folder.map(|folder| folder.display().to_string()).unwrap_or_default();
        print_line!("{}", format!("{name:<14} {id:<42} {state:<12} {folder}").trim_end())?;
    }
    Ok(())
}

/// Checks every part of a model without keeping it.
fn verify(name: &str, options: &BaseOptions, output: &Output) -> Result<()> {
    let files = registry::find_base(name, options)?;
    loader::verify(&files)?;
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
