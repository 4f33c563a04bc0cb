//! `face detect`: box, landmarks, score and quality of each face.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::crop::pngs_in;
use super::inputs::Images;
use super::print_json;
use crate::commands::output::print_line;
use crate::failure::Failure;
use crate::files;
use crate::identity::draw::draw;
use crate::identity::landmarks::{LandmarkDetector, Landmarks};
use crate::identity::photos::Photos;
use crate::identity::{Face, FaceEncoder, Quality};

pub(super) fn detect(
    images: &Images,
    encoder: &FaceEncoder,
    landmarks: Option<&LandmarkDetector>,
    out: Option<&Path>,
    json: bool,
) -> Result<()> {
    let photos = Photos::find(&images.images)?;
    let drawings = out.map(|out| drawings(&photos, out)).transpose()?;
    let seen = photos.look(|at, file, image| {
        let search = encoder.search(image)?;
        let find = |face: &Face| landmarks.map(|landmarks| landmarks.find(image, face)).transpose();
        let landmarks = search.faces.iter().map(find).collect::<Result<Vec<_>>>()?;
        if let Some(drawings) = &drawings {
            let landmarks: Vec<&Landmarks> = landmarks.iter().flatten().collect();
            draw(image, &search.faces, &landmarks).save(&drawings[at], Some("difflora face detect"))?;
        }
        let quality = search.faces.first().map(|face| Quality::of(image, face, &search.faces));
        let nothing = search.largest(&file.display().to_string()).err();
        let landmarks = landmarks.into_iter().map(|points| points.map(|points| points.to_vec()));
        let faces = search.faces.into_iter().zip(landmarks);
        let faces: Vec<FoundFace> = faces.map(|(face, landmarks)| FoundFace { face, landmarks }).collect();
        Ok((faces, quality, nothing))
    })?;
    let mut nothing = None;
    let (mut list, mut found) = (Vec::new(), 0);
    for (file, (faces, quality, error)) in seen.photos {
        found += faces.len();
        nothing = error.or(nothing);
        if json {
            list.push(Found { file: file.display().to_string(), faces, quality });
        } else {
            print_line!("{}", describe(&file, &faces, quality.as_ref()))?;
        }
    }
    if json {
        print_json(&list)?;
    }
    match nothing {
        Some(error) if found == 0 => Err(error),
        _ => Ok(()),
    }
}

/// Where the drawing of each image goes.
fn drawings(photos: &Photos, out: &Path) -> Result<Vec<PathBuf>> {
    if photos.only().is_some() && !out.is_dir() {
        let png = out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
        if !png {
            let why = format!("drawings are written as PNG: name `{}` with .png", out.display());
            return Err(Failure::Usage(why).into());
        }
        let sources: Vec<PathBuf> = photos.paths().map(Path::to_path_buf).collect();
        files::refuse_inputs(&[out], &sources)?;
        files::check_writable(out)?;
        return Ok(vec![out.to_path_buf()]);
    }
    pngs_in(out, photos)
}

/// An image in `detect --json`.
#[derive(serde::Serialize)]
struct Found {
    file: String,
    faces: Vec<FoundFace>,
    /// Of the largest face.
    quality: Option<Quality>,
}

/// A face in `detect --json`.
#[derive(serde::Serialize)]
struct FoundFace {
    #[serde(flatten)]
    face: Face,
    /// 106 points, with `--landmarks`.
    #[serde(skip_serializing_if = "Option::is_none")]
    landmarks: Option<Vec<[f32; 2]>>,
}

fn describe(file: &Path, faces: &[FoundFace], quality: Option<&Quality>) -> String {
    let mut text =
        format!("{}: {} {}", file.display(), faces.len(), if faces.len() == 1 { "face" } else { "faces" });
    for FoundFace { face, landmarks } in faces {
        let [left, top, right, bottom] = face.bounds;
        text +=
            &format!("\n  score {:.3}  box {left:.1} {top:.1} {right:.1} {bottom:.1}  points", face.score);
        text.extend(face.points.iter().map(|[x, y]| format!("  {x:.1} {y:.1}")));
        if let Some(landmarks) = landmarks {
            text += "\n  landmarks";
            text.extend(landmarks.iter().map(|[x, y]| format!("  {x:.1} {y:.1}")));
        }
    }
    if let Some(quality) = quality {
        text += &format!(
            "\n  the largest: {:.0} pixels wide, sharpness {:.1}, turned {:.0}, up {:.0}, leaning {:.0} degrees",
            quality.width, quality.sharpness, quality.yaw, quality.pitch, quality.roll
        );
        text.extend(quality.hints().iter().map(|hint| format!("\n  {hint}")));
    }
    text
}
