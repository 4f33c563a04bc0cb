//! A folder of photos with a folder for each person.
//!
//! ```text
//! PEOPLE/anna/1.jpg 2.jpg …      photos, sorted by name: the first are the condition
//! PEOPLE/anna/class.txt          the word of the person in prompts, `person` by default
//! PEOPLE/anna/lora.safetensors   the person's own LoRA, where there is one
//! ```

use std::path::Path;

use anyhow::Result;

use crate::eval::subjects::{Photos, Subject};
use crate::failure::Failure;
use crate::files;
use crate::image::images_in;
use crate::progress;

/// The word of a person in prompts.
const CLASS_FILE: &str = "class.txt";
/// The person's own LoRA.
const OWN_LORA: &str = "lora.safetensors";
/// Longest class word, in bytes.
const MOST_BYTES: u64 = 256;

/// Reads a folder of people, the first `references` photos of each being the condition; at most `maximum` people.
///
/// Images that this program generated are no photos. People with no photo to judge against stay, and are counted in a
/// note.
///
/// # Errors
/// [`Failure::Unusable`] for a folder without people, or a class word that cannot be read.
pub fn read(folder: &Path, references: usize, class: &str, maximum: Option<usize>) -> Result<Vec<Subject>> {
    let entries = std::fs::read_dir(folder).map_err(|error| Failure::unusable(folder, error))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Failure::unusable(folder, error))?;
        if entry.path().is_dir() && !crate::image::is_skipped(&entry.file_name()) {
            names.push(entry.path());
        }
    }
    names.sort();
    let mut subjects = Vec::new();
    for path in names {
        let mut photos = images_in(&path)?;
        photos.retain(|photo| !files::is_generated(photo));
        if photos.is_empty() {
            progress::note(format_args!("`{}` is left out: no photo is in it", path.display()));
            continue;
        }
        let class_file = path.join(CLASS_FILE);
        let class = match class_file.exists() {
            true => files::read_text(&class_file, MOST_BYTES)?.trim().to_string(),
            false => class.to_string(),
        };
        if class.is_empty() || class.contains(['\n', '/', '\\']) {
            return Err(Failure::unusable(&class_file, "it holds one word, such as `woman`"));
        }
        let own = path.join(OWN_LORA);
        subjects.push(Subject {
            id: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            class,
            own_lora: own.exists().then_some(own),
            references,
            photos: Photos::Files(photos),
        });
    }
    subjects.truncate(maximum.unwrap_or(usize::MAX));
    if subjects.is_empty() {
        return Err(Failure::unusable(folder, "it has no folder with photos; it wants one for each person"));
    }
    let judged = subjects.iter().filter(|subject| subject.photos.count() > references).count();
    if judged < subjects.len() {
        progress::note(format_args!(
            "{} of {} people have no photo beside the condition: similarity to the person is not measured for them",
            subjects.len() - judged,
            subjects.len()
        ));
    }
    Ok(subjects)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;

    #[test]
    fn people_are_folders_and_generated_images_are_no_photos() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let root = folder.path();
        for name in ["b", "a", "empty"] {
            std::fs::create_dir(root.join(name))?;
        }
        let image = Image::filled(8, 8, [1, 2, 3]);
        for file in ["a/1.png", "a/2.png", "b/1.png"] {
            image.save(&root.join(file), None)?;
        }
        image.save(&root.join("b/0.png"), Some("a person\nSteps: 1, Version: difflora 0.1.0"))?;
        std::fs::write(root.join("b/class.txt"), "woman\n")?;
        let people = read(root, 1, "person", None)?;
        let seen: Vec<_> =
            people.iter().map(|p| (p.id.as_str(), p.class.as_str(), p.photos.count())).collect();
        assert_eq!(seen, [("a", "person", 2), ("b", "woman", 1)]);
        assert_eq!(read(root, 1, "person", Some(1))?.len(), 1);
        assert!(read(&root.join("a"), 1, "person", None).is_err());
        std::fs::write(root.join("b/class.txt"), " ")?;
        let Err(error) = read(root, 1, "person", None) else { panic!() };
        assert!(error.to_string().contains("class.txt"), "{error}");
        Ok(())
    }
}
