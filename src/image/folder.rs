//! Image files in folders.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Result;

use crate::failure::Failure;
use crate::progress;

/// Extensions of image files.
const EXTENSIONS: [&str; 10] = ["png", "jpg", "jpeg", "jfif", "jpe", "webp", "bmp", "tif", "tiff", "gif"];

/// Names that systems and network drives leave in folders of images; some hold small copies of these.
const SYSTEM_FILES: [&str; 10] = [
    "__MACOSX",
    "Thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "@eaDir",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
];

/// The image files in a folder and in the folders inside it, by their extension and sorted by path; what is hidden
/// is left out.
pub fn images_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = files_in(folder)?;
    files.retain(|path| has_image_name(path));
    Ok(files)
}

/// All files in a folder and in the folders inside it, sorted by path; what is hidden is left out.
pub fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(folder).map_err(|error| Failure::unusable(folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Failure::unusable(folder, error))?;
        let path = entry.path();
        if is_skipped(&entry.file_name()) {
            note_skipped(&path);
            continue;
        }
        if path.is_dir() {
            // A link to a folder may lead in a circle.
            match path.is_symlink() {
                true => note_once(&path, "a link to a folder is not followed; name the folder itself"),
                false => found.extend(files_in(&path)?),
            }
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Says once that a folder of a system is passed over, whose files have the names of images.
pub fn note_skipped(path: &Path) {
    let is_system = |name: &OsStr| SYSTEM_FILES.iter().any(|system| name == *system);
    if path.file_name().is_some_and(is_system) && path.is_dir() {
        note_once(path, "passed over: the system keeps no photos there, but copies or parts of them");
    }
}

/// Notes something about a path, which may be listed several times.
fn note_once(path: &Path, what: &str) {
    static NOTED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if NOTED.lock().is_ok_and(|mut noted| noted.insert(path.to_path_buf())) {
        progress::note(format_args!("`{}`: {what}", path.display()));
    }
}

/// Whether files and folders of this name are never read as images: what is hidden, what archives and systems put
/// beside images, and the folders of training states.
pub fn is_skipped(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with('.') || SYSTEM_FILES.contains(&&*name) || name.ends_with(".training")
}

/// Whether a file is an image by its extension.
pub fn has_image_name(path: &Path) -> bool {
    path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)))
}

/// Paths of `count` images for an output `out`: `out` itself for one; `0001.png`, … in a folder, which may be written
/// with a separator at the end and need not exist; else `me-0001.png`, … for `me.png`.
pub fn numbered(out: &Path, count: usize) -> Vec<PathBuf> {
    if is_written_as_folder(out) || out.is_dir() {
        return (1..=count).map(|i| out.join(format!("{i:04}.png"))).collect();
    }
    if count == 1 {
        return vec![out.to_path_buf()];
    }
    let (stem, extension) = (out.with_extension(""), out.extension().unwrap_or_default());
    let numbered = |i: usize| {
        let mut name = stem.clone().into_os_string();
        name.push(format!("-{i:04}."));
        name.push(extension);
        PathBuf::from(name)
    };
    (1..=count).map(numbered).collect()
}

/// Whether a path ends in a separator, as in `images/`.
pub fn is_written_as_folder(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().last().is_some_and(|last| std::path::is_separator(char::from(*last)))
}

/// A PNG in the folder `out` for each image, named after it; no two have one name.
pub fn pngs_for(out: &Path, sources: &[PathBuf]) -> Vec<PathBuf> {
    let mut taken = HashSet::new();
    let target = |name: String| {
        let name = name.replace(['/', '\\'], "-");
        let short = Path::new(&name).with_extension("png");
        // `a.jpg` and `a.webp` do not fall on one file.
        let file = if taken.insert(short.clone()) { short } else { PathBuf::from(format!("{name}.png")) };
        out.join(file)
    };
    short_names(sources).into_iter().map(target).collect()
}

/// File names where they differ, else whole paths.
pub fn short_names(files: &[PathBuf]) -> Vec<String> {
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut times = HashMap::new();
    for file in files {
        *times.entry(name(file)).or_insert(0) += 1;
    }
    files
        .iter()
        .map(|file| if times[&name(file)] == 1 { name(file) } else { file.display().to_string() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_images_are_numbered_behind_the_stem_or_in_the_folder() {
        let paths = |out: &str, count| numbered(Path::new(out), count);
        assert_eq!(paths("me.png", 1), [PathBuf::from("me.png")]);
        assert_eq!(paths("a/me.webp", 2), ["a/me-0001.webp", "a/me-0002.webp"].map(PathBuf::from));
        assert_eq!(paths("new/", 1), [PathBuf::from("new/0001.png")]);
    }

    #[test]
    fn drawings_of_different_images_have_different_names() {
        let sources = ["x/a.jpg", "x/a.webp", "y/b.jpg", "z/b.jpg"].map(PathBuf::from);
        let names = pngs_for(Path::new("out"), &sources);
        assert_eq!(names, ["out/a.png", "out/a.webp.png", "out/y-b.png", "out/z-b.png"].map(PathBuf::from));
    }
}
