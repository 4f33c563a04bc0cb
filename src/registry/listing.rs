//! The models that have a name or lie in the hub's cache.

use std::path::PathBuf;

use serde::Serialize;

use super::hyperlora::{self, Variant};
use super::{BUILT_IN, NAMES};
use crate::weights::hub::{self, Repository};

/// A model that the user can name.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Short name; empty for repositories that have none.
    pub name: String,
    /// Repository on the hub; empty for the built-in model.
    pub id: String,
    /// `built in`, `whole`, `in part` or `not fetched`.
    pub state: &'static str,
    /// Its folder, where anything of it is on this machine.
    pub folder: Option<PathBuf>,
}

/// All of them: the built-in one, those with a name, and other base models in the hub's cache.
pub fn all() -> Vec<Listed> {
    let built_in = Listed { name: BUILT_IN.into(), id: String::new(), state: "built in", folder: None };
    let named = NAMES.iter().filter_map(|(name, id)| Some(of_hub(name, Repository::parse(id)?)));
    let others = cached_bases().filter(|it| NAMES.iter().all(|(_, id)| *id != it.id));
    let mut all = vec![built_in];
    all.extend(Variant::ALL.map(of_hyperlora));
    all.extend(named);
    all.extend(others.map(|repository| of_hub("", repository)));
    all
}

/// Repositories in the hub's cache that can be bases: models of other kinds have no index of parts.
pub fn cached_bases() -> impl Iterator<Item = Repository> {
    let is_base =
        |it: &Repository| it.folder().is_some_and(|folder| folder.join("model_index.json").exists());
    hub::repositories().into_iter().filter(is_base)
}

fn of_hub(name: &str, repository: Repository) -> Listed {
    let (state, folder) = match (repository.cached(), repository.folder()) {
        (Ok(folder), _) => ("whole", Some(folder)),
        (Err(_), Some(folder)) => ("in part", Some(folder)),
        (Err(_), None) => ("not fetched", None),
    };
    Listed { name: name.into(), id: repository.id, state, folder }
}

fn of_hyperlora(variant: Variant) -> Listed {
    let (folder, missing) = variant.cached();
    let state = match missing.len() {
        0 => "whole",
        4 => "not fetched",
        _ => "in part",
    };
    let folder = folder.filter(|folder| folder.is_dir());
    Listed { name: variant.name().into(), id: hyperlora::REPOSITORY.into(), state, folder }
}
