//! HyperLoRA's released weights: where they lie, what belongs to them, and under which licences they come.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::failure::Failure;
use crate::hypernet::hyperlora::{FILES, Shapes};
use crate::identity::catalog::{self, FACE_MODELS};
use crate::progress;
use crate::weights::hub::{self, Repository};
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;
use crate::weights::sha256;

/// The publisher's repository on the hub.
pub const REPOSITORY: &str = "bytedance-research/HyperLoRA";

/// The image encoder that the weights were trained with, on the hub.
pub const CLIP: &str = "openai/clip-vit-large-patch14";

/// Its files.
pub const CLIP_FILES: [&str; 3] = ["config.json", "model.safetensors", "preprocessor_config.json"];

/// SHA-256 of its `model.safetensors`, as several public projects pin it independently of each other.
pub const CLIP_SHA256: &str = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb";

/// The face encoder that the weights were trained with.
pub const FACE_ENCODER: &str = "antelopev2";

/// Refuses another known recogniser in the place of [`FACE_ENCODER`]'s: its vectors mean another person. Unknown bytes,
/// as of another export of the same network, are used with a warning.
///
/// # Errors
/// [`Failure::Usage`] with both names.
pub fn check_face_encoder(found: &ModelId) -> Result<()> {
    let Some(wanted) = catalog::find(FACE_ENCODER) else { return Ok(()) };
    let wanted = ModelId { name: wanted.name.into(), sha256: wanted.recogniser.sha256.into() };
    let builtin = catalog::is_known(&found.name) && catalog::find(&found.name).is_none();
    if builtin || FACE_MODELS.iter().any(|model| model.recogniser.sha256 == found.sha256) {
        return wanted.demand(found, "face encoder");
    }
    if let Err(error) = wanted.demand(found, "face encoder") {
        progress::warn(format_args!("{error}; it is used because its bytes are of no other known encoder"));
    }
    Ok(())
}

/// Warns where an image encoder is not [`CLIP`].
pub fn check_image_encoder(found: &ModelId) {
    let wanted = ModelId { name: CLIP.into(), sha256: CLIP_SHA256.into() };
    if let Err(error) = wanted.demand(found, "image encoder") {
        progress::warn(format_args!("{error}; it is used, but the likeness may suffer"));
    }
}

/// What is fetched for them, and under which licence, as the publishers say.
pub const LICENCES: [(&str, &str); 3] = [
    ("HyperLoRA's weights, bytedance-research/HyperLoRA", "CC BY-NC 4.0: non-commercial, with credit"),
    ("antelopev2 (SCRFD, glintr100, 2d106det)", "non-commercial research only (InsightFace)"),
    ("CLIP ViT-L/14, openai/clip-vit-large-patch14", "OpenAI's; its code is MIT"),
];

/// One of the two sets of weights, which have the same shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// For likeness.
    Fidelity,
    /// For prompts that change much.
    Edit,
}

impl Variant {
    /// Both, the default first.
    pub const ALL: [Self; 2] = [Self::Fidelity, Self::Edit];

    /// Reads `hyperlora`, `hyperlora:fidelity` and `hyperlora:edit`; nothing for other names.
    ///
    /// # Errors
    /// [`Failure::Usage`] for a variant that there is not.
    pub fn parse(name: &str) -> Result<Option<Self>> {
        match name.strip_prefix("hyperlora") {
            Some("" | ":fidelity") => Ok(Some(Self::Fidelity)),
            Some(":edit") => Ok(Some(Self::Edit)),
            Some(other) if other.starts_with(':') => {
                let why =
                    format!("there is no `{name}`: write hyperlora, hyperlora:fidelity or hyperlora:edit");
                Err(Failure::Usage(why).into())
            }
            _ => Ok(None),
        }
    }

    /// As [`Variant::parse`] reads it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fidelity => "hyperlora",
            Self::Edit => "hyperlora:edit",
        }
    }

    /// Its folder in the repository.
    fn folder(self) -> &'static str {
        match self {
            Self::Fidelity => "sdxl_hyper_id_lora_v1_fidelity",
            Self::Edit => "sdxl_hyper_id_lora_v1_edit",
        }
    }

    /// Its files in the repository.
    pub fn files(self) -> [String; 4] {
        FILES.map(|file| format!("{}/{file}", self.folder()))
    }

    /// Its folder in the hub's cache, and which of its files are not there.
    pub fn cached(self) -> (Option<PathBuf>, Vec<&'static str>) {
        let folder = repository().folder().map(|folder| folder.join(self.folder()));
        let lacks = |file: &&str| !folder.as_ref().is_some_and(|folder| folder.join(file).is_file());
        let missing = FILES.into_iter().filter(|file| lacks(file)).collect();
        (folder, missing)
    }

    /// Fetches the weights and [`CLIP`] from the hub and checks their hashes; gives the folder of the repository. Their
    /// licences have to be accepted first.
    ///
    /// # Errors
    /// The hub cannot be reached; [`Failure::Unusable`] for a file of other bytes.
    pub fn fetch(self) -> Result<PathBuf> {
        let folder = repository().fetch_files(self.files().iter().map(String::as_str))?;
        hub::verify_checksums(&folder)?;
        let clip = Repository { id: CLIP.into(), revision: "main".into(), file: None };
        let clip = clip.fetch_files(CLIP_FILES.into_iter())?;
        sha256::demand(&clip.join("model.safetensors"), CLIP, CLIP_SHA256)?;
        Ok(folder)
    }

    /// The weights in the hub's cache. They are never fetched unasked: their licence has to be accepted first.
    ///
    /// # Errors
    /// [`Failure::Unusable`] that names the missing files, where they are looked for, and the command that fetches them.
    pub fn open(self) -> Result<ModelFiles> {
        let (folder, missing) = self.cached();
        if let (Some(folder), []) = (&folder, &missing[..]) {
            return ModelFiles::folder(folder);
        }
        let place = hub::cache_folder().join(format!("models--{}", REPOSITORY.replace('/', "--")));
        let name = self.name();
        Err(Failure::Unusable(format!(
            "cannot use `{name}`: {} not on this machine (looked for in `{}`, folder {}); with a network, `difflora models \
             pull {name} --accept-licence` fetches them ({})",
            list(&missing),
            place.display(),
            self.folder(),
            LICENCES[0].1
        ))
        .into())
    }
}

/// `a` is; `a`, `b` are.
fn list(files: &[&str]) -> String {
    let names: Vec<String> = files.iter().map(|file| format!("`{file}`")).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}

/// The repository on the hub.
pub fn repository() -> Repository {
    Repository { id: REPOSITORY.into(), revision: "main".into(), file: None }
}

/// HyperLoRA's weights in `folder`, or in that of a variant in it; nothing for folders of other hypernetworks.
pub fn inside(folder: &Path) -> Option<PathBuf> {
    let folders = std::iter::once(folder.to_path_buf())
        .chain(Variant::ALL.map(|variant| folder.join(variant.folder())));
    folders.into_iter().find(|folder| Shapes::are_in(&ModelFiles::Folder(folder.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_told_by_name_and_folders_by_their_files() {
        for (name, variant) in [
            ("hyperlora", Variant::Fidelity),
            ("hyperlora:fidelity", Variant::Fidelity),
            ("hyperlora:edit", Variant::Edit),
        ] {
            assert_eq!(Variant::parse(name).unwrap(), Some(variant));
        }
        assert_eq!(Variant::parse("hyperlora-mine").unwrap(), None);
        assert!(Variant::parse("hyperlora:x").unwrap_err().to_string().contains("hyperlora:edit"));
        let root = tempfile::tempdir().unwrap();
        assert_eq!(inside(root.path()), None);
        let edit = root.path().join("sdxl_hyper_id_lora_v1_edit");
        std::fs::create_dir(&edit).unwrap();
        std::fs::write(edit.join(FILES[3]), "x").unwrap();
        assert_eq!(inside(root.path()), Some(edit.clone()));
        assert_eq!(inside(&edit), Some(edit));
    }

    #[test]
    fn other_known_recognisers_are_refused_with_both_names() {
        let id = |name: &str, sha256: &str| ModelId { name: name.into(), sha256: sha256.into() };
        let buffalo = catalog::find("buffalo_l").unwrap().recogniser.sha256;
        let error = check_face_encoder(&id("buffalo_l", buffalo)).unwrap_err().to_string();
        assert!(error.contains("antelopev2") && error.contains("buffalo_l"), "{error}");
        assert!(check_face_encoder(&id("mobilefacenet512", "0123")).is_err());
        let antelope = catalog::find("antelopev2").unwrap().recogniser.sha256;
        assert!(check_face_encoder(&id("antelopev2", antelope)).is_ok());
        assert!(check_face_encoder(&id("mine", "0123")).is_ok());
    }
}
