//! The files that describe a dataset folder: `manifest.jsonl`, `dataset.json` and `settings.toml`.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::files;
use crate::identity::clip::ImageInput;
use crate::limits;
use crate::lora::layout::LoraLayout;
use crate::synthetic::World;
use crate::weights::model_folder::ModelFiles;
use crate::weights::model_id::ModelId;

/// File name of the rows.
pub const MANIFEST: &str = "manifest.jsonl";
/// File name of the [`Header`].
pub const HEADER: &str = "dataset.json";
/// File name of the settings that the dataset was built with.
pub const SETTINGS: &str = "settings.toml";

/// One line of manifest.jsonl.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Name of the person and of its files.
    pub id: String,
    /// `train` or `held-out`.
    pub split: String,
    /// Population seed and number of the painted person.
    pub person: (u64, u64),
    /// The LoRA, relative to the dataset.
    pub lora: String,
    /// `face` (references, 512) and `image` (references, D), relative to the dataset.
    pub embeddings: String,
    /// Mean training loss of the group over the last tenth of the steps.
    pub loss: f64,
    /// Hash of settings and base; rows with different hashes do not belong together.
    pub settings: String,
}

/// `dataset.json`: what all rows share.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The base model of the LoRAs.
    pub base: ModelId,
    /// The face encoder of the embeddings.
    pub face_encoder: ModelId,
    /// The encoder of whole images.
    pub image_encoder: ModelId,
    /// Its input, and which of its outputs was kept.
    #[serde(default, skip_serializing_if = "ImageInput::is_default")]
    pub image_input: ImageInput,
    /// Modules, rank and alpha; shared `down`s are in basis.safetensors. A header written by hand may omit the layout,
    /// which is then that of the first LoRA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<LoraLayout>,
}

impl Header {
    /// Reads `folder`/dataset.json.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when it is missing or has unknown or missing keys.
    pub fn read(folder: &Path) -> Result<Self> {
        ModelFiles::folder(folder)?.config(HEADER)
    }
}

/// The images of a dataset; scenes are the same for all people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSettings {
    /// How scenes vary and what captions say.
    // Left out where it is the first world: the hash of settings in existing datasets knows none.
    #[serde(default, skip_serializing_if = "World::is_varied")]
    pub world: World,
    /// Side in pixels.
    pub size: usize,
    /// Training images of each LoRA.
    pub scenes: u64,
    /// Seed of those scenes.
    pub seed: u64,
    /// Plain photos that a person is embedded from; no LoRA is trained on them.
    pub references: u64,
}

impl ImageSettings {
    /// Reads the images' part of `folder`/settings.toml.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when the file is missing or does not say how the images were made.
    pub fn read(folder: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Settings {
            #[serde(alias = "pictures")]
            images: ImageSettings,
        }
        let path = folder.join(SETTINGS);
        let settings: Settings = limits::read_toml(&path)?;
        Ok(settings.images)
    }
}

/// The largest manifest that is read, in bytes: some ten million rows.
const MAX_MANIFEST: u64 = 1 << 32;

/// Reads the rows of `folder`/manifest.jsonl. A last line that was cut off by a crash is left out.
///
/// # Errors
/// [`Failure::Unusable`] when the file is missing, or with the number of a line that is no row.
pub fn read_manifest(folder: &Path) -> Result<Vec<Row>> {
    let path = folder.join(MANIFEST);
    let text = files::read_text(&path, MAX_MANIFEST)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_str(line)
                .map_err(|error| Failure::unusable(&path, format!("line {}: {error}", i + 1)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_settings_are_read_under_both_names() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["images", "pictures"] {
            let text =
                format!("[{name}]\nsize = 64\nscenes = 16\nseed = 7\nreferences = 4\n[people]\nseed = 1\n");
            std::fs::write(folder.path().join(SETTINGS), text).unwrap();
            let wanted = ImageSettings { world: World::Varied, size: 64, scenes: 16, seed: 7, references: 4 };
            assert_eq!(ImageSettings::read(folder.path()).unwrap(), wanted);
        }
    }
}
