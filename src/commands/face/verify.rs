//! How well a recogniser tells the people of the user's own images apart.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::inputs::Encoder;
use super::print_json;
use crate::commands::output::print_line;
use crate::failure::Failure;
use crate::identity::photos::EmbeddedFaces;
use crate::identity::verification::{Pairs, Spread, person_of};

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
    let people = EmbeddedFaces::of(&[folder.to_path_buf()], &encoder)?;
    let names: Vec<String> = people.files.iter().map(|file| person_of(folder, file)).collect();
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
