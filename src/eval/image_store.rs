//! The folder that generated images are kept in, so that an evaluation can go on and be judged again.
//!
//! ```text
//! settings.json                what all images were made with
//! METHOD/SUBJECT/0000.png      image of prompt 0
//! METHOD/SUBJECT/made.json     origin of the LoRA, seconds of each stage
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::Failure;
use crate::files::{self, FolderLock};
use crate::image::Image;

/// File name of the settings.
const SETTINGS: &str = "settings.json";
/// File name of the record of a method and subject.
const MADE: &str = "made.json";

/// Largest settings file, in bytes.
const MOST_BYTES: u64 = 16 << 20;

/// A folder of generated images.
pub struct ImageStore {
    folder: PathBuf,
    _lock: FolderLock,
}

/// How the images of one method and subject were made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Made {
    /// Hash of what decides the LoRA.
    pub origin: String,
    /// What they took.
    #[serde(flatten)]
    pub times: Times,
}

/// What the images of one method and subject took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Times {
    /// Photos → embeddings, in seconds.
    pub encode: f64,
    /// Embeddings → latent, in seconds.
    pub sample: f64,
    /// Latent → LoRA, in seconds.
    pub decode: f64,
    /// LoRA → merged weights, in seconds.
    pub merge: f64,
    /// Prompts → images, in seconds, for all images together.
    pub draw: f64,
    /// Images in `draw`.
    pub images: usize,
    /// Size of the LoRA as a file of f32, in bytes.
    pub lora_bytes: u64,
}

impl ImageStore {
    /// Opens or makes `folder` for images made with `settings`.
    ///
    /// # Errors
    /// [`Failure::Usage`] where it holds images of other settings, with what differs, or where another process writes.
    pub fn open(folder: &Path, settings: &Value) -> Result<Self> {
        let lock = FolderLock::acquire(folder)?;
        let path = folder.join(SETTINGS);
        if path.exists() {
            let known: Value = serde_json::from_str(&files::read_text(&path, MOST_BYTES)?)
                .map_err(|error| Failure::unusable(&path, error))?;
            if known != *settings {
                let why = format!(
                    "`{}` holds images of other settings ({}); choose another --out, or delete the folder",
                    folder.display(),
                    differences(&known, settings).join("; ")
                );
                return Err(Failure::Usage(why).into());
            }
        } else {
            files::write_whole(&path, (serde_json::to_string_pretty(settings)? + "\n").as_bytes())?;
        }
        Ok(Self { folder: folder.to_path_buf(), _lock: lock })
    }

    /// File of image `number`.
    pub fn path(&self, method: &str, subject: &str, number: usize) -> PathBuf {
        self.folder.join(method).join(subject).join(format!("{number:04}.png"))
    }

    /// The numbers below `count` whose images are missing.
    pub fn missing(&self, method: &str, subject: &str, count: usize) -> Vec<usize> {
        (0..count).filter(|number| !self.path(method, subject, *number).is_file()).collect()
    }

    /// Begins with a LoRA of `origin`: images of another one are removed. Returns how many.
    ///
    /// # Errors
    /// A file that cannot be removed or written.
    pub fn begin(&self, method: &str, subject: &str, origin: &str) -> Result<usize> {
        let folder = self.folder.join(method).join(subject);
        if self.made(method, subject).origin == origin {
            return Ok(0);
        }
        let mut removed = 0;
        // The record last: until it is written, what is left still counts as the old origin's.
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "png") {
                std::fs::remove_file(entry.path())
                    .with_context(|| format!("cannot remove `{}`", entry.path().display()))?;
                removed += 1;
            }
        }
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        self.save_made(method, subject, &Made { origin: origin.to_string(), ..Made::default() })?;
        Ok(removed)
    }

    /// Keeps image `number`, with `parameters` as its metadata.
    pub fn save(
        &self,
        method: &str,
        subject: &str,
        number: usize,
        image: &Image,
        parameters: &str,
    ) -> Result<()> {
        let path = self.path(method, subject, number);
        let folder = files::folder_of(&path);
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        image.save(&path, Some(parameters))
    }

    /// Reads the first `count` images.
    ///
    /// # Errors
    /// [`Failure::Unusable`] with the file for one that is missing or damaged.
    pub fn images(&self, method: &str, subject: &str, count: usize) -> Result<Vec<Image>> {
        (0..count).map(|number| Image::open(&self.path(method, subject, number))).collect()
    }

    /// The record of a method and subject; empty where there is none.
    pub fn made(&self, method: &str, subject: &str) -> Made {
        let text = std::fs::read_to_string(self.folder.join(method).join(subject).join(MADE));
        text.ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// Keeps the record of a method and subject.
    pub fn save_made(&self, method: &str, subject: &str, made: &Made) -> Result<()> {
        let path = self.folder.join(method).join(subject).join(MADE);
        files::write_whole(&path, (serde_json::to_string_pretty(made)? + "\n").as_bytes())
    }
}

/// `key: old, now new` for each top-level key that differs.
fn differences(known: &Value, wanted: &Value) -> Vec<String> {
    let empty = serde_json::Map::new();
    let (known, wanted) = (known.as_object().unwrap_or(&empty), wanted.as_object().unwrap_or(&empty));
    let keys: std::collections::BTreeSet<&String> = known.keys().chain(wanted.keys()).collect();
    let short = |value: Option<&Value>| {
        let text = value.map_or("none".into(), Value::to_string);
        let end = text.char_indices().nth(60).map_or(text.len(), |(at, _)| at);
        if end < text.len() { format!("{}…", &text[..end]) } else { text }
    };
    keys.into_iter()
        .filter(|key| known.get(*key) != wanted.get(*key))
        .map(|key| format!("{key}: {}, now {}", short(known.get(key)), short(wanted.get(key))))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn images_are_kept_as_they_are_and_other_settings_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let folder = folder.path().join("images");
        let image = Image { width: 2, height: 1, rgb: vec![0, 127, 255, 1, 2, 3] };
        {
            let store = ImageStore::open(&folder, &json!({ "steps": 4, "seed": 0 }))?;
            assert_eq!(store.begin("own", "a", "one")?, 0);
            assert_eq!(store.missing("own", "a", 2), [0, 1]);
            store.save("own", "a", 1, &image, "a person")?;
            let times = Times { draw: 1.5, images: 1, ..Times::default() };
            store.save_made("own", "a", &Made { origin: "one".into(), times })?;
        }
        let store = ImageStore::open(&folder, &json!({ "steps": 4, "seed": 0 }))?;
        assert_eq!(store.begin("own", "a", "one")?, 0);
        assert_eq!(store.missing("own", "a", 2), [0]);
        assert_eq!(store.made("own", "a").times.draw, 1.5);
        assert_eq!(store.made("own", "b"), Made::default());
        let error = store.images("own", "a", 2).unwrap_err().to_string();
        assert!(error.contains("0000.png"), "{error}");
        store.save("own", "a", 0, &image, "a person")?;
        assert_eq!(store.images("own", "a", 2)?[1].rgb, image.rgb);
        assert_eq!(store.begin("own", "a", "two")?, 2, "images of another LoRA are not kept");
        assert_eq!(store.missing("own", "a", 2), [0, 1]);
        assert_eq!(store.made("own", "a").times, Times::default());
        drop(store);
        let Err(error) = ImageStore::open(&folder, &json!({ "steps": 5, "seed": 0 })) else { panic!() };
        assert!(error.to_string().contains("steps: 4, now 5"), "{error}");
        Ok(())
    }
}
