//! Diagnostics of models: caches, what is built in, what was downloaded, and the hub.

use std::path::Path;

use serde_json::json;

use super::{Check, folder};
use crate::identity::catalog::{self, FACE_MODELS, FaceModel};
use crate::registry;
use crate::registry::hyperlora::{FACE_ENCODER, LICENCES, Variant};
use crate::weights::hub::{self, Repository};
use crate::weights::sha256;

/// Space that SDXL's files take with room for a merged copy, in bytes.
const SDXL_SPACE: u64 = 15_000_000_000;

/// The folders that models and their hashes are cached in.
pub fn folders() -> Vec<Check> {
    let hashes = sha256::cache_file();
    let hashes = hashes.as_deref().and_then(Path::parent).map(|hashes| folder("hash cache", hashes, 0));
    std::iter::once(folder("hub cache", &hub::cache_folder(), SDXL_SPACE)).chain(hashes).collect()
}

/// Every known model: built in, face encoders, HyperLoRA, and base models in the hub's cache.
pub fn all() -> Vec<Check> {
    let mut checks = built_in_models();
    checks.extend(FACE_MODELS.iter().map(face_encoder));
    checks.extend(Variant::ALL.map(hyperlora_weights));
    checks.extend(hub_models());
    checks
}

/// The models inside the program.
fn built_in_models() -> Vec<Check> {
    let tiny = match registry::built_in("base").and_then(|_| registry::built_in("hypernet")) {
        Ok(_) => Check::ok("model", "tiny: base and hypernetwork, built in; Apache-2.0"),
        Err(error) => {
            Check::problem("model", format!("{error:#}"), "run `scripts/make-tiny.sh OUT --install`")
        }
    };
    let faces = [("mobilefacenet", "MIT package, training data not stated"), ("sface", "Apache-2.0")];
    let face = |(name, licence): (&str, &str)| {
        Check::ok("face encoder", format!("{name}: built in; {licence}"))
            .with(json!({ "name": name, "licence": licence, "state": "built in" }))
    };
    std::iter::once(tiny).chain(faces.map(face)).collect()
}

/// A face encoder that can be downloaded: whether it is there, and whether its bytes are the known ones.
fn face_encoder(model: &FaceModel) -> Check {
    let found = catalog::installed(model);
    let state = match &found {
        None => "not downloaded",
        Some(files) if files.iter().all(|file| file.matches) => "SHA-256 matches",
        Some(_) => "SHA-256 differs",
    };
    let text = format!("{}: {state}; {}", model.name, model.licence);
    let check = match found.iter().flatten().find(|file| !file.matches) {
        Some(file) => Check::problem(
            "face encoder",
            format!("{text}: `{}`", file.path.display()),
            format!("delete the file and run `difflora models pull {}`", model.name),
        ),
        // Not having an optional model is no restriction of what was set up.
        None => Check::ok("face encoder", text),
    };
    check.with(json!({ "name": model.name, "licence": model.licence, "state": state }))
}

/// HyperLoRA's weights: whether they are there, and what else they need.
fn hyperlora_weights(variant: Variant) -> Check {
    let (_, missing) = variant.cached();
    let (name, licence) = (variant.name(), LICENCES[0].1);
    let faces = catalog::find(FACE_ENCODER).is_some_and(|model| catalog::installed(model).is_some());
    let clip = registry::find_clip(None, true).is_ok();
    let remedy = format!("run `difflora models pull {name} --accept-licence`");
    let (state, check) = match missing.len() {
        0 if faces && clip => ("complete", Check::ok("hypernetwork", format!("{name}: complete; {licence}"))),
        4 => ("not downloaded", Check::ok("hypernetwork", format!("{name}: not downloaded; {licence}"))),
        0 => {
            let text =
                format!("{name}: CLIP ViT-L/14 or {FACE_ENCODER}, which it needs, is missing; {licence}");
            ("without encoders", Check::note("hypernetwork", text, remedy))
        }
        _ => {
            let text = format!("{name}: incomplete, without {}; {licence}", missing.join(", "));
            ("incomplete", Check::note("hypernetwork", text, remedy))
        }
    };
    check.with(json!({ "name": name, "licence": licence, "state": state }))
}

/// Base models in the hub's cache.
fn hub_models() -> Vec<Check> {
    registry::listing::cached_bases()
        .map(|repository| {
            let id = &repository.id;
            let whole = repository.cached().is_ok();
            let licence = registry::licence(id).unwrap_or("licence: see its model card");
            let details = json!({ "name": id, "licence": licence, "complete": whole });
            let check = match whole {
                true => Check::ok(
                    "model",
                    format!("{id}: complete; {licence}; `models verify` checks its hashes"),
                ),
                false => Check::note(
                    "model",
                    format!("{id}: incomplete; {licence}"),
                    format!("run `difflora models pull {id}`"),
                ),
            };
            check.with(details)
        })
        .collect()
}

/// Whether the hub may be asked at all.
pub fn network() -> Check {
    match hub::offline() {
        true => Check::ok("hub", "HF_HUB_OFFLINE forbids the network"),
        false => Check::ok("hub", "not checked; `--online` does"),
    }
}

/// Asks the hub for SDXL's list of files.
pub fn reachability() -> Check {
    if hub::offline() {
        return Check::note("hub", "HF_HUB_OFFLINE forbids the network", "unset HF_HUB_OFFLINE");
    }
    let sdxl = Repository { id: registry::SDXL.into(), revision: "main".into(), file: None };
    match sdxl.ask() {
        Ok(()) => Check::ok("hub", "reachable"),
        Err(error) => {
            Check::problem("hub", format!("{error:#}"), "check network, proxy, HF_ENDPOINT and HF_TOKEN")
        }
    }
}
