//! `difflora models pull`: fetches a model from the hub.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::on_the_hub;
use crate::failure::Failure;
use crate::identity::catalog::{self, FaceModel};
use crate::output::print_line;
use crate::progress;
use crate::registry::hyperlora::{self, CLIP, CLIP_FILES, CLIP_SHA256, LICENCES, Variant};
use crate::weights::hub::{self, Repository, Weights};
use crate::weights::sha256;

/// Arguments of `difflora models pull`. An interrupted download continues where it ended.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// sdxl, owner/name[@revision][:file.safetensors], a face encoder, or hyperlora[:edit].
    name: String,
    /// Prefer half-precision weights: half the download.
    #[arg(long)]
    fp16: bool,
    /// Accept the licences that are shown for hyperlora.
    #[arg(long, alias = "accept-license", env = "DIFFLORA_ACCEPT_LICENCE")]
    accept_licence: bool,
}

/// Fetches the model and prints its folder.
pub(super) fn run(args: &Args) -> Result<()> {
    if hub::offline() {
        return Err(Failure::Usage("HF_HUB_OFFLINE forbids the network; unset it to fetch".into()).into());
    }
    let folder = match (Variant::parse(&args.name)?, catalog::find(&args.name)) {
        (Some(variant), _) => pull_hyperlora(variant, args.accept_licence)?,
        (None, Some(model)) => pull_faces(model)?,
        (None, None) => {
            on_the_hub(&args.name)?.fetch(if args.fp16 { Weights::Half } else { Weights::Any })?
        }
    };
    print_line!("{}", folder.display())
}

/// Fetches HyperLoRA's weights, CLIP and antelopev2, once their licences are accepted.
fn pull_hyperlora(variant: Variant, accepted: bool) -> Result<PathBuf> {
    let name = variant.name();
    let licences: Vec<String> =
        LICENCES.iter().map(|(what, licence)| format!("\n  {what}: {licence}")).collect();
    let licences = licences.concat();
    if !accepted {
        let why = format!(
            "`{name}` comes under the licences of its publishers:{licences}\nread them at https://huggingface.co/{} and \
             call again with --accept-licence (some 5.3 GB are fetched)",
            hyperlora::REPOSITORY
        );
        return Err(Failure::Usage(why).into());
    }
    progress::note(format_args!("{name}, under the licences of its publishers:{licences}"));
    let files = variant.files();
    let folder = hyperlora::repository().fetch_files(files.iter().map(String::as_str))?;
    hub::verify_checksums(&folder)?;
    let clip = Repository { id: CLIP.into(), revision: "main".into(), file: None };
    let clip = clip.fetch_files(CLIP_FILES.into_iter())?;
    check(&clip.join("model.safetensors"), CLIP, CLIP_SHA256)?;
    if let Some(model) = catalog::find(hyperlora::FACE_ENCODER) {
        pull_faces(model)?;
    }
    let (found, _) = variant.cached();
    Ok(found.unwrap_or(folder))
}

/// Fetches a face encoder and holds its files against their checksums.
fn pull_faces(model: &FaceModel) -> Result<PathBuf> {
    progress::note(format_args!("{}: {}; licence: {}", model.name, model.about, model.licence));
    let repository = Repository { id: model.repo.into(), revision: "main".into(), file: None };
    let folder = repository.fetch_files(model.files_and_landmarks().map(|file| file.path))?;
    for file in model.files_and_landmarks() {
        check(&folder.join(file.path), model.name, file.sha256)?;
    }
    Ok(folder)
}

/// Refuses a file whose SHA-256 is not that of `model`.
fn check(path: &Path, model: &str, wanted: &str) -> Result<()> {
    let found = sha256::of_file(path)?;
    if found == wanted {
        return Ok(());
    }
    let why = format!("its SHA-256 is {found}, that of {model} is {wanted}; delete it and pull again");
    Err(Failure::unusable(path, why))
}
