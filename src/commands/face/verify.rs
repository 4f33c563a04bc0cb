//! How well a recogniser tells the people of the user's own images apart.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::inputs::{Encoder, Images, People};
use super::print_json;
use crate::failure::Failure;
use crate::identity::verification::{Pairs, Spread};
use crate::output::print_line;

/// Embeds all images, compares each with each, and prints what tells people apart.
pub fn verify(folder: &Path, encoder: &Encoder, json: bool) -> Result<()> {
    if !folder.is_dir() {
        return Err(Failure::Usage(format!(
            "`{}` is no folder: give one with a folder for each person in it, or with files such as anna-1.jpg",
            folder.display()
        ))
        .into());
    }
    let encoder = encoder.load()?;
    let people = People::embed(&Images { images: vec![folder.to_path_buf()] }, &encoder)?;
    let names: Vec<String> = people.files.iter().map(|file| person(folder, file)).collect();
    let pairs = Pairs::of(&people.vectors, &names);
    let mut different = names.clone();
    different.sort();
    different.dedup();
    let Some(found) = pairs.verify() else {
        let why = format!(
            "its {} images with a face show {} {}: wanted two people or more, one of them in two images or more; \
             the name is that of the folder inside it, or what stands before the last `-`, `_` or space of a file's name",
            names.len(),
            different.len(),
            if different.len() == 1 { "person" } else { "people with one image each" },
        );
        return Err(Failure::unusable(folder, why));
    };
    let [genuine, impostor] = [&pairs.genuine, &pairs.impostor].map(|cosines| Spread::of(cosines));
    let [_, (name, _)] = encoder.provenance();
    if json {
        return print_json(&json!({
            "face_encoder": name,
            "pictures": names.len(),
            "people": different.len(),
            "verification": found,
            "genuine": genuine,
            "impostor": impostor,
            "left_out": people.left_out,
        }));
    }
    print_line!("{name}: {} images of {} people", names.len(), different.len())?;
    for (kind, spread) in [("one person", genuine), ("two people", impostor)] {
        if let Some(Spread { pairs, mean, deviation, least, most, .. }) = spread {
            print_line!(
                "  {pairs} pairs of {kind}: cosine {mean:.3} ± {deviation:.3}, {least:.3} to {most:.3}"
            )?;
        }
    }
    print_line!(
        "  AUC {:.4}, equal error rate {:.4} at {:.3}, best accuracy {:.4} at {:.3}, accepted at FAR 1e-3 {:.4}",
        found.auc,
        found.equal_error_rate,
        found.equal_error_threshold,
        found.best_accuracy,
        found.best_threshold,
        found.accepted_at_far_1e3
    )
}

/// Whose image a file is: the name of its folder inside `root`; for a file that lies in `root` itself, what stands
/// before the last `-`, `_` or space of its name.
fn person(root: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(root).unwrap_or(file);
    match inside.parent() {
        Some(folder) if folder != Path::new("") => folder.to_string_lossy().into_owned(),
        _ => {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            let end = name.rfind(['-', '_', ' ']).filter(|&end| end > 0);
            name[..end.unwrap_or(name.len())].to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_are_named_by_folder_or_by_the_start_of_the_file_name() {
        for (file, name) in [
            ("album/anna/1.jpg", "anna"),
            ("album/anna/old/1.jpg", "anna/old"),
            ("album/anna-1.jpg", "anna"),
            ("album/anna_b_02.png", "anna_b"),
            ("album/anna.png", "anna"),
            ("album/-1.png", "-1"),
        ] {
            assert_eq!(person(Path::new("album"), Path::new(file)), name);
        }
    }
}
