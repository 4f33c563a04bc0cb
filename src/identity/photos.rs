//! Photos that the user named, by file, pattern or folder: found, and looked at in parallel.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::image::{Image, files_in, has_image_name};
use crate::progress;

/// Photos, and the files beside them that are none.
#[derive(Debug)]
pub struct Photos {
    photos: Vec<Photo>,
    /// Files of folders and patterns whose names are not those of images.
    passed_over: Vec<PathBuf>,
}

#[derive(Debug)]
struct Photo {
    path: PathBuf,
    /// Whether the user named this very file.
    named: bool,
}

/// What was seen in the photos.
#[derive(Debug)]
pub struct Seen<T> {
    /// In the order of the photos.
    pub photos: Vec<(PathBuf, T)>,
    /// Files that could not be used, each with the reason.
    pub left_out: Vec<(PathBuf, String)>,
}

impl Photos {
    /// The photos that `arguments` mean: files, folders with all that is in them, and patterns with `*`, `?` and
    /// `[…]`. Each file comes once, where it was named first.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for folders without an image and patterns that nothing fits.
    pub fn find(arguments: &[PathBuf]) -> Result<Self> {
        let mut found = Self { photos: Vec::new(), passed_over: Vec::new() };
        for path in arguments {
            let text = path.to_string_lossy();
            if path.is_dir() {
                if !found.add(files_in(path)?) {
                    return Err(Failure::unusable(path, "there is no image in this folder"));
                }
            } else if !path.exists() && text.contains(['*', '?', '[']) {
                // What is hidden is left out, as in folders.
                let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
                let matches = glob::glob_with(&text, options)
                    .map_err(|error| Failure::Usage(format!("`{text}` is no pattern: {error}")))?;
                let mut files: Vec<PathBuf> = matches.filter_map(std::result::Result::ok).collect();
                files.retain(|file| file.is_file());
                if !found.add(files) {
                    return Err(Failure::unusable(path, "no image fits this pattern"));
                }
            } else if !found.photos.iter().any(|photo| photo.path == *path) {
                found.photos.push(Photo { path: path.clone(), named: true });
            }
        }
        Ok(found)
    }

    /// Adds files that were not named themselves; tells whether any is an image by its name.
    fn add(&mut self, files: Vec<PathBuf>) -> bool {
        let mut any = false;
        for path in files {
            // Images of kinds that are not read are tried, so that the reason is told.
            let other = ["avif", "heic", "heif", "jxl"];
            let candidate = has_image_name(&path)
                || path.extension().is_some_and(|e| other.iter().any(|other| e.eq_ignore_ascii_case(other)));
            any |= candidate;
            if !candidate {
                self.passed_over.push(path);
            } else if !self.photos.iter().any(|photo| photo.path == path) {
                self.photos.push(Photo { path, named: false });
            }
        }
        any
    }

    /// The photos' paths, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.photos.iter().map(|photo| photo.path.as_path())
    }

    /// The one photo, where the user named one file and nothing else.
    pub fn only(&self) -> Option<&Path> {
        match &self.photos[..] {
            [Photo { path, named: true }] if self.passed_over.is_empty() => Some(path),
            _ => None,
        }
    }

    /// Opens all photos and shows each, with its place, to `look`, many at once. A file that the user named must do;
    /// one that was found in a folder or by a pattern is left out when it cannot be read or shows no face, and named
    /// at the end.
    ///
    /// # Errors
    /// What is wrong with the first named file that will not do, or with all files when none will.
    pub fn look<T: Send>(&self, look: impl Fn(usize, &Path, &Image) -> Result<T> + Sync) -> Result<Seen<T>> {
        let bar = progress::bar(self.photos.len() as u64, "faces");
        let one = |(at, photo): (usize, &Photo)| -> Result<T> {
            progress::check()?;
            let seen = Image::open(&photo.path).and_then(|image| look(at, &photo.path, &image));
            bar.inc(1);
            seen
        };
        let results: Vec<Result<T>> = self.photos.par_iter().enumerate().map(one).collect();
        bar.finish_and_clear();
        progress::check()?;

        let mut seen = Seen { photos: Vec::new(), left_out: Vec::new() };
        let mut telling: Option<anyhow::Error> = None;
        for (photo, result) in self.photos.iter().zip(results) {
            match result {
                Ok(result) => seen.photos.push((photo.path.clone(), result)),
                Err(error) if photo.named || error.downcast_ref::<Failure>().is_none() => return Err(error),
                Err(error) => {
                    seen.left_out.push((photo.path.clone(), format!("{error:#}")));
                    let no_face =
                        |error: &anyhow::Error| matches!(error.downcast_ref(), Some(Failure::NoFace(_)));
                    if telling.as_ref().is_none_or(|telling| !no_face(telling)) {
                        telling = Some(error);
                    }
                }
            }
        }
        self.tell_left_out(&seen.left_out);
        match telling {
            Some(error) if seen.photos.is_empty() => Err(error),
            _ => Ok(seen),
        }
    }

    fn tell_left_out(&self, left_out: &[(PathBuf, String)]) {
        if !self.passed_over.is_empty() {
            let names: Vec<String> =
                self.passed_over.iter().map(|path| format!("`{}`", path.display())).collect();
            let files = if names.len() == 1 { "file that is no image" } else { "files that are no images" };
            progress::note(format_args!("passed over {} {files}: {}", names.len(), names.join(", ")));
        }
        if !left_out.is_empty() {
            let files = if left_out.len() == 1 { "image was" } else { "images were" };
            let mut text = format!("{} {files} left out:", left_out.len());
            for (_, why) in left_out {
                text += &format!("\n  {why}");
            }
            progress::warn(text);
        }
    }
}

impl<T> Seen<T> {
    /// `left_out` for a report in JSON.
    pub fn left_out_json(&self) -> Value {
        self.left_out
            .iter()
            .map(|(file, why)| json!({ "file": file.display().to_string(), "why": why }))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_patterns_and_folders_are_found_each_once() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for name in ["b.png", "a.JPG", "notes.txt", "old.heic", "deep/c.webp", ".hidden.png", "x[1].png"] {
            std::fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            std::fs::write(at(name), "x").unwrap();
        }
        let names = |arguments: &[PathBuf]| -> Vec<String> {
            let photos = Photos::find(arguments).unwrap();
            photos.paths().map(|path| path.strip_prefix(root.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(&[at("b.png"), at("*.png")]), ["b.png", "x[1].png"]);
        assert_eq!(names(&[at("x[1].png")]), ["x[1].png"]);
        let folder = Photos::find(&[root.path().to_path_buf()]).unwrap();
        assert_eq!(folder.photos.len(), 5);
        assert_eq!(folder.passed_over, [at("notes.txt")]);
        assert!(folder.only().is_none() && Photos::find(&[at("b.png")]).unwrap().only().is_some());
        for (argument, said) in
            [("*.gif", "no image fits"), ("no[", "no pattern"), ("*.txt", "no image fits")]
        {
            let error = Photos::find(&[at(argument)]).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn the_order_of_the_photos_is_kept_and_junk_is_left_out_with_its_reason() {
        let root = tempfile::tempdir().unwrap();
        for (name, grey) in [("1.png", 10), ("2.png", 20), ("4.png", 40)] {
            Image::filled(4, 4, [grey; 3]).save(&root.path().join(name), None).unwrap();
        }
        std::fs::write(root.path().join("3.png"), "text").unwrap();
        let photos = Photos::find(&[root.path().to_path_buf()]).unwrap();
        let seen = photos.look(|_, _, image| Ok(image.rgb[0])).unwrap();
        assert_eq!(seen.photos.iter().map(|(_, grey)| *grey).collect::<Vec<_>>(), [10, 20, 40]);
        assert!(seen.left_out.len() == 1 && seen.left_out[0].1.contains("3.png"), "{:?}", seen.left_out);
        let named = Photos::find(&[root.path().join("3.png")]).unwrap();
        assert!(named.look(|_, _, _| Ok(())).is_err());
    }
}
