//! Image files in folders.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::failure::Failure;

/// Extensions of image files.
const EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"];

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
        if entry.file_name().to_string_lossy().starts_with('.') {
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

/// Whether a file is an image by its extension.
pub fn has_image_name(path: &Path) -> bool {
    path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)))
}
