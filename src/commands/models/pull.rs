//! `difflora models pull`: fetches a model from the hub.

use std::path::PathBuf;

use anyhow::Result;

use super::on_the_hub;
use crate::commands::output::print_line;
use crate::failure::Failure;
use crate::identity::catalog::{self, FaceModel};
use crate::progress;
use crate::registry::hyperlora::{self, LICENCES, Variant};
use crate::weights::hub::{self, Weights};

/// Arguments of `difflora models pull`. An interrupted download continues where it ended.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// sdxl, owner/name[@revision][:file.safetensors], a face encoder, or hyperlora[:edit].
    name: String,
    /// Prefer half-precision weights: half the download.
    #[arg(long)]
    fp16: bool,
    /// Servers to ask one after the other where the hub fails, such as https://hf-mirror.com; they are sent no token.
    #[arg(long, value_name = "URL", num_args = 1.., value_parser = mirror, env = "DIFFLORA_MIRROR")]
    mirror: Vec<String>,
    /// Accept the licences that are shown for hyperlora.
    #[arg(long, alias = "accept-license", env = "DIFFLORA_ACCEPT_LICENCE")]
    accept_licence: bool,
}

/// Fetches the model and prints its folder.
pub(super) fn run(args: &Args) -> Result<()> {
    if hub::offline() {
        return Err(Failure::Usage("HF_HUB_OFFLINE forbids the network; unset it to fetch".into()).into());
    }
    let mut mirrors = args.mirror.iter();
    let folder = loop {
        match (fetch(args), mirrors.next()) {
            (Err(error), Some(mirror)) if !is_final(&error) => {
                progress::warn(format_args!("{error:#}; asking `{mirror}`"));
                hub::set_mirror(Some(mirror));
            }
            (outcome, _) => break outcome?,
        }
    };
    print_line!("{}", folder.display())
}

/// Whether another server would not help: wrong arguments, and an interruption.
fn is_final(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Failure::Usage(_) | Failure::Interrupted { .. }))
}

/// The URL of a server.
fn mirror(text: &str) -> Result<String, String> {
    let host = ["https://", "http://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    match host.filter(|host| !host.trim_matches('/').is_empty() && !host.contains(char::is_whitespace)) {
        Some(_) => Ok(text.into()),
        None => Err("write the URL of a server, such as https://hf-mirror.com".into()),
    }
}

/// Fetches the model; gives its folder.
fn fetch(args: &Args) -> Result<PathBuf> {
    match (Variant::parse(&args.name)?, catalog::find(&args.name)) {
        (Some(variant), _) => pull_hyperlora(variant, args.accept_licence),
        (None, Some(model)) => pull_faces(model),
        (None, None) => on_the_hub(&args.name)?.fetch(if args.fp16 { Weights::Half } else { Weights::Any }),
    }
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
    let fetched = variant.fetch()?;
    if let Some(model) = catalog::find(hyperlora::FACE_ENCODER) {
        pull_faces(model)?;
    }
    Ok(variant.cached().0.unwrap_or(fetched))
}

/// Fetches a face encoder, whose licence is shown.
fn pull_faces(model: &FaceModel) -> Result<PathBuf> {
    progress::note(format_args!("{}: {}; licence: {}", model.name, model.about, model.licence));
    model.fetch()
}
