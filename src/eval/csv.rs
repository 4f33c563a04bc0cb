//! A line for each image, for other programs.

use crate::eval::judged::Judged;
use crate::eval::metrics::Target;
use crate::identity::cosine;

/// The head of the table: recognisers and image encoders by name.
pub fn head(recognisers: &[String], encoders: &[String]) -> String {
    let mut columns: Vec<String> =
        ["method", "person", "image", "prompt", "face_found"].map(String::from).into();
    columns.extend(recognisers.iter().map(|name| format!("similarity {name}")));
    columns.extend(encoders.iter().cloned());
    columns.iter().map(|column| quoted(column)).collect::<Vec<_>>().join(",") + "\n"
}

/// A person's lines: `prompts` are those of the images of `judged`, which should show `target`.
pub fn lines(method: &str, person: &str, prompts: &[String], judged: &Judged, target: &Target) -> String {
    let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.6}"));
    let mut text = String::new();
    for (i, (image, prompt)) in judged.observations.iter().zip(prompts).enumerate() {
        let mut cells = vec![quoted(method), quoted(person), i.to_string(), quoted(prompt)];
        cells.push(u8::from(image.faces.is_some()).to_string());
        cells.extend(
            target.faces.iter().enumerate().map(|(at, own)| {
                number(image.faces.as_ref().map(|faces| f64::from(cosine(&faces[at], own))))
            }),
        );
        cells.extend(image.images.iter().enumerate().map(|(at, vector)| {
            let cosines: Vec<f64> =
                target.images.iter().map(|photo| f64::from(cosine(vector, &photo[at]))).collect();
            number((!cosines.is_empty()).then(|| cosines.iter().sum::<f64>() / cosines.len() as f64))
        }));
        text += &(cells.join(",") + "\n");
    }
    text
}

/// A field as RFC 4180 wants it.
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::image_store::Times;
    use crate::eval::metrics::Observation;

    #[test]
    fn fields_with_commas_are_quoted_and_a_missing_face_is_empty() {
        let image = |faces: Option<Vec<Vec<f32>>>| Observation {
            faces,
            images: vec![vec![1.0, 0.0]],
            attributes: None,
        };
        let judged = Judged {
            observations: vec![image(Some(vec![vec![0.6, 0.8]])), image(None)],
            pixels_from_own: None,
            diversity: None,
            times: Times::default(),
        };
        let target =
            Target { faces: vec![vec![1.0, 0.0]], images: vec![vec![vec![0.0, 1.0]]], factors: None };
        let prompts = ["a man, \"old\"".to_string(), "a man".into()];
        assert_eq!(
            head(&["sface".into()], &["CLIP-I".into()]),
            "method,person,image,prompt,face_found,similarity sface,CLIP-I\n"
        );
        assert_eq!(
            lines("own", "a", &prompts, &judged, &target),
            "own,a,0,\"a man, \"\"old\"\"\",1,0.600000,0.000000\nown,a,1,a man,0,,0.000000\n"
        );
    }
}
