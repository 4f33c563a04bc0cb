//! `face compare` and `face dedupe`: which images show one person.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::inputs::Images;
use super::print_json;
use crate::commands::output::print_line;
use crate::identity::clustering::by_person;
use crate::identity::photos::EmbeddedFaces;
use crate::identity::{FaceEncoder, cosine};

pub(super) fn compare(images: &Images, encoder: &FaceEncoder, json: bool) -> Result<()> {
    let people = EmbeddedFaces::of(&images.images, encoder)?;
    let cosines: Vec<Vec<f32>> =
        people.vectors.iter().map(|a| people.vectors.iter().map(|b| cosine(a, b)).collect()).collect();
    if json {
        let [_, (name, _)] = encoder.provenance();
        let files: Vec<String> = people.files.iter().map(|file| file.display().to_string()).collect();
        return print_json(&json!({ "files": files, "cosine": cosines, "face_encoder": name }));
    }
    let count = people.files.len();
    let head: String = (1..=count).map(|column| format!("{column:>7}")).collect();
    print_line!("   {head}")?;
    for (row, (file, cosines)) in people.files.iter().zip(&cosines).enumerate() {
        let numbers: String = cosines.iter().map(|cosine| format!("{cosine:>7.3}")).collect();
        print_line!("{:>3}{numbers}  {}", row + 1, file.display())?;
    }
    Ok(())
}

pub(super) fn dedupe(
    images: &Images,
    encoder: &FaceEncoder,
    threshold: Option<f32>,
    json: bool,
) -> Result<()> {
    let threshold = threshold.unwrap_or(encoder.same_person());
    let people = EmbeddedFaces::of(&images.images, encoder)?;
    let mut list = Vec::new();
    for (number, person) in by_person(&people.vectors, threshold).into_iter().enumerate() {
        let rows = person.into_iter().map(|(face, cosine)| (people.files[face].as_path(), cosine));
        let rows: Vec<(&Path, f32)> = rows.collect();
        if json {
            let images: Vec<_> = rows
                .iter()
                .map(|(file, cosine)| json!({ "file": file.display().to_string(), "cosine": cosine }))
                .collect();
            list.push(json!({ "person": number + 1, "pictures": images }));
            continue;
        }
        let images = if rows.len() == 1 { "image" } else { "images" };
        print_line!("person {}: {} {images}", number + 1, rows.len())?;
        for (file, cosine) in rows {
            print_line!("  {cosine:.3}  {}", file.display())?;
        }
    }
    if json {
        let [_, (name, _)] = encoder.provenance();
        print_json(
            &json!({ "people": list, "threshold": threshold, "face_encoder": name, "left_out": people.left_out }),
        )?;
    }
    Ok(())
}
