//! Image files in folders.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::failure::Failure;

/// Extensions of image files.
const EXTENSIONS: [&str; 10] = ["png", "jpg", "jpeg", "jfif", "jpe", "webp", "bmp", "tif", "tiff", "gif"];

/// Names that macOS and Windows leave in folders of images.
const SYSTEM_FILES: [&str; 3] = ["__MACOSX", "Thumbs.db", "desktop.ini"];

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
            continue;
        }
        if path.is_dir() {
            // A link to a folder may lead in a circle.
            if !path.is_symlink() {
                found.extend(files_in(&path)?);
            }
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
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
