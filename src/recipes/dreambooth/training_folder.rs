//! A folder of training images as kohya's sd-scripts, OneTrainer and phones leave it: what is an image, which captions
//! belong to it, and what is skipped.
//!
//! * `10_sks person/` inside the folder (sd-scripts): 10 repeats, trigger `sks`, class `person`.
//! * Captions in `NAME.txt`, `NAME.caption`, `NAME.png.txt`, in any case of the ending. Of several lines one is drawn
//!   each time, as sd-scripts does with wildcards.
//! * Captions in `metadata.jsonl` (Hugging Face datasets): `{"file_name": "a.png", "text": "…"}` a line.
//! * Masks (`NAME-masklabel.png`, `NAME_mask.png`) are skipped, and images that difflora generated, unless the folder
//!   holds nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;

use crate::failure::Failure;
use crate::files;
use crate::image::{files_in, has_image_name};

/// The largest caption file that is read, in bytes.
const MAX_CAPTION: u64 = 1 << 16;

/// Captions of a whole folder, as Hugging Face's `imagefolder` has them.
const METADATA: &str = "metadata.jsonl";

/// The largest `metadata.jsonl` that is read, in bytes.
const MAX_METADATA: u64 = 1 << 26;

/// Endings of a file name, without the extension, that mark a mask of the image named before it.
const MASKS: [&str; 5] = ["-masklabel", "-condlabel", "_mask", "-mask", ".mask"];

/// Extensions of images that this program may be unable to decode; opening them says how to convert them.
const CONTAINERS: [&str; 4] = ["heic", "heif", "hif", "avif"];

/// An image file and what its folder says of it.
#[derive(Debug, PartialEq)]
pub struct Entry {
    /// The image.
    pub path: PathBuf,
    /// Lines of its caption file; empty without one.
    pub captions: Vec<String>,
    /// From a folder named `10_sks person`.
    pub concept: Option<Concept>,
}

/// What a folder's name in sd-scripts' layout says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Concept {
    /// Times that each image comes in an epoch, relative to the other folders'.
    pub repeats: usize,
    /// Trigger and class, as captions call the subject.
    pub called: String,
}

impl Concept {
    /// Reads `10_sks person`. Numbers above 999 are years, not repeats.
    pub fn parse(name: &str) -> Option<Self> {
        let (number, called) = name.split_once('_')?;
        let repeats = number.parse().ok().filter(|repeats| (1..1000).contains(repeats))?;
        let called = called.trim();
        (!called.is_empty()).then(|| Self { repeats, called: called.to_string() })
    }
}

/// What a folder holds.
#[derive(Debug, Default)]
pub struct TrainingFolder {
    /// Images in the order of their paths.
    pub images: Vec<Entry>,
    /// Masks beside images.
    pub masks: usize,
    /// Images that difflora generated, where there are others.
    pub generated: usize,
    /// Tables of captions in a format that is not read.
    pub tables: Vec<PathBuf>,
}

impl TrainingFolder {
    /// Lists a folder and the folders inside it; no image is decoded.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a folder that cannot be read, and for captions that are not UTF-8 or over 64 KiB.
    pub fn read(folder: &Path) -> Result<Self> {
        let files = files_in(folder)?;
        let captions = Captions::of(&files)?;
        let tables = files.iter().filter(|file| file.file_name().is_some_and(|name| name == "metadata.csv"));
        let tables: Vec<PathBuf> = tables.cloned().collect();
        let mut images: Vec<PathBuf> = files
            .into_iter()
            .filter(|path| has_image_name(path) || has_extension(path, &CONTAINERS))
            .collect();
        let stems: BTreeSet<PathBuf> = images.iter().map(|path| path.with_extension("")).collect();
        let found = images.len();
        images.retain(|path| !is_mask(&path.with_extension(""), &stems));
        let mut read = Self { masks: found - images.len(), tables, ..Self::default() };
        let generated: BTreeSet<PathBuf> =
            images.iter().filter(|path| files::is_generated(path)).cloned().collect();
        if generated.len() < images.len() {
            images.retain(|path| !generated.contains(path));
            read.generated = generated.len();
        }
        for path in images {
            let captions = captions.beside(&path)?;
            let depth = path.strip_prefix(folder).unwrap_or(&path).components().count();
            let concept = path
                .ancestors()
                .skip(1)
                .take(depth)
                .find_map(|folder| Concept::parse(&folder.file_name()?.to_string_lossy()));
            read.images.push(Entry { path, captions, concept });
        }
        Ok(read)
    }

    /// Trigger and class from the folders' names, where all images have the same.
    pub fn called(&self) -> Option<&str> {
        let mut names = self.images.iter().map(|image| Some(image.concept.as_ref()?.called.as_str()));
        let first = names.next()??;
        names.all(|name| name == Some(first)).then_some(first)
    }

    /// What was found, as a note before training: `6 images, 2 with captions; skipped 3 masks`.
    pub fn summary(&self, unreadable: usize) -> String {
        let captioned = self.images.iter().filter(|image| !image.captions.is_empty()).count();
        let used = self.images.len() - unreadable;
        let mut text = format!(
            "{} image files found, {used} used, {captioned} with a caption",
            self.images.len() + self.masks + self.generated
        );
        let skipped =
            [(self.masks, "masks"), (self.generated, "generated by difflora"), (unreadable, "unreadable")];
        for (count, what) in skipped.iter().filter(|(count, _)| *count > 0) {
            text.push_str(&format!("; skipped {count} {what}"));
        }
        let concepts: BTreeSet<_> = self
            .images
            .iter()
            .filter_map(|image| image.concept.as_ref())
            .map(|c| (&c.called, c.repeats))
            .collect();
        for (called, repeats) in concepts {
            text.push_str(&format!("; `{called}` with {repeats} repeats, from the folder's name"));
        }
        text
    }
}

/// Where the captions of images stand.
struct Captions {
    /// Caption files by their name without the ending: that of the image, with or without its extension.
    files: BTreeMap<PathBuf, PathBuf>,
    /// From `metadata.jsonl`, by image.
    rows: BTreeMap<PathBuf, String>,
}

/// A line of `metadata.jsonl`; other columns are not read.
#[derive(Deserialize)]
struct MetadataRow {
    file_name: String,
    #[serde(alias = "caption", alias = "prompt")]
    text: Option<String>,
}

impl Captions {
    /// Those among `files`.
    fn of(files: &[PathBuf]) -> Result<Self> {
        let mut captions = Self { files: BTreeMap::new(), rows: BTreeMap::new() };
        for ending in ["txt", "caption"] {
            for file in files.iter().filter(|file| has_extension(file, &[ending])) {
                captions.files.entry(file.with_extension("")).or_insert_with(|| file.clone());
            }
        }
        for file in files.iter().filter(|file| file.file_name().is_some_and(|name| name == METADATA)) {
            let text = utf8(file, MAX_METADATA)?;
            for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let row: MetadataRow = serde_json::from_str(line)
                    .map_err(|error| Failure::unusable(file, format!("line {}: {error}", number + 1)))?;
                if let Some(text) = row.text {
                    captions.rows.insert(file.with_file_name(row.file_name), text.trim().to_string());
                }
            }
        }
        Ok(captions)
    }

    /// The lines for one image; an empty file is an empty caption.
    fn beside(&self, image: &Path) -> Result<Vec<String>> {
        let Some(file) = self.files.get(image).or_else(|| self.files.get(&image.with_extension(""))) else {
            return Ok(self.rows.get(image).cloned().into_iter().collect());
        };
        let text = utf8(file, MAX_CAPTION)?;
        let lines: Vec<String> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect();
        Ok(if lines.is_empty() { vec![String::new()] } else { lines })
    }
}

/// A text file without the byte order mark that editors on Windows put in front.
fn utf8(path: &Path, most: u64) -> Result<String> {
    let text = String::from_utf8(files::read_input(path, most)?).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::unusable(path, format!("byte {} is not UTF-8; save it as UTF-8", at + 1))
    })?;
    Ok(text.trim_start_matches('\u{feff}').to_string())
}

fn has_extension(path: &Path, endings: &[&str]) -> bool {
    path.extension().is_some_and(|own| endings.iter().any(|ending| own.eq_ignore_ascii_case(ending)))
}

/// Whether an image is the mask of another one.
fn is_mask(stem: &Path, stems: &BTreeSet<PathBuf>) -> bool {
    let Some(name) = stem.file_name().and_then(|name| name.to_str()) else { return false };
    MASKS
        .iter()
        .filter_map(|ending| name.strip_suffix(ending))
        .any(|image| !image.is_empty() && stems.contains(&stem.with_file_name(image)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_other_trainers_are_read_as_they_are_meant() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for (name, text) in [
            ("10_sks person/a.png", ""),
            ("10_sks person/a.caption", "one\n\n two \n"),
            ("10_sks person/b.png", ""),
            ("10_sks person/b.TXT", "shouted"),
            ("10_sks person/b-masklabel.png", ""),
            ("c.jpg", ""),
            ("c.jpg.txt", ""),
            ("d.HEIC", ""),
            ("2024_summer/e.png", ""),
            ("f/g.png", ""),
            ("f/h.png", "Version: difflora 0.1.0"),
            ("f/metadata.jsonl", "{\"file_name\": \"g.png\", \"text\": \"from the table\", \"id\": 1}\n\n"),
            ("__MACOSX/f.png", ""),
            ("__MACOSX/._f.png", ""),
            ("me.training/samples/step-2.png", ""),
            ("Thumbs.db", ""),
        ] {
            std::fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            std::fs::write(at(name), text).unwrap();
        }
        let read = TrainingFolder::read(folder.path()).unwrap();
        let concept = Some(Concept { repeats: 10, called: "sks person".into() });
        let entry = |name: &str, captions: &[&str], concept: &Option<Concept>| Entry {
            path: at(name),
            captions: captions.iter().map(|caption| (*caption).to_string()).collect(),
            concept: concept.clone(),
        };
        let wanted = [
            entry("10_sks person/a.png", &["one", "two"], &concept),
            entry("10_sks person/b.png", &["shouted"], &concept),
            entry("2024_summer/e.png", &[], &None),
            entry("c.jpg", &[""], &None),
            entry("d.HEIC", &[], &None),
            entry("f/g.png", &["from the table"], &None),
        ];
        assert_eq!(read.images, wanted);
        assert_eq!((read.masks, read.generated, read.called()), (1, 1, None));
        let summary = read.summary(1);
        for words in ["8 image files found, 5 used, 4 with", "1 masks", "1 generated", "10 repeats"] {
            assert!(summary.contains(words), "{summary}");
        }
        let inside = TrainingFolder::read(&at("10_sks person")).unwrap();
        assert_eq!(inside.called(), Some("sks person"));
        std::fs::write(at("c.jpg.txt"), vec![b'a'; 70_000]).unwrap();
        assert!(TrainingFolder::read(folder.path()).unwrap_err().to_string().contains("more than the limit"));
    }
}
