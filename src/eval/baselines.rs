//! The nearest-neighbour baseline: the LoRA of the training person with the most similar face.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Tensor;

use crate::dataset::manifest::Row;
use crate::failure::Failure;
use crate::identity::cosine;
use crate::weights;

/// The people that the hypernetwork was trained on.
pub struct NearestNeighbour {
    /// Mean face vector and LoRA file of each.
    people: Vec<(Vec<f32>, PathBuf)>,
}

impl NearestNeighbour {
    /// Reads the face vectors of the training people `rows` of a dataset folder.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a file of embeddings that is missing or has no `face`.
    pub fn read(dataset: &Path, rows: &[Row]) -> Result<Self> {
        let read = |row: &Row| {
            let path = dataset.join(&row.embeddings);
            let tensors = weights::read_file(&path)?;
            let faces = tensors.get("face").map(Tensor::to_vec2::<f32>);
            let faces = faces.and_then(|faces| mean_vector(&faces.ok()?));
            let faces = faces.ok_or_else(|| Failure::unusable(&path, "it has no rows of `face`"))?;
            Ok((faces, dataset.join(&row.lora)))
        };
        Ok(Self { people: rows.iter().map(read).collect::<Result<_>>()? })
    }

    /// LoRA file of the person whose face has the largest cosine to `face`.
    pub fn nearest(&self, face: &[f32]) -> Option<&Path> {
        let similarity = |person: &(Vec<f32>, PathBuf)| cosine(&person.0, face);
        let nearest = self.people.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
        nearest.map(|(_, lora)| lora.as_path())
    }
}

/// The mean of vectors; only its direction is used.
pub(super) fn mean_vector(vectors: &[Vec<f32>]) -> Option<Vec<f32>> {
    let (first, rest) = vectors.split_first()?;
    let mut sum = first.clone();
    for vector in rest {
        sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
    }
    sum.iter_mut().for_each(|value| *value /= vectors.len() as f32);
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_similar_person_is_found() {
        let known =
            NearestNeighbour { people: vec![(vec![1.0, 0.0], "a".into()), (vec![0.6, 0.8], "b".into())] };
        assert_eq!(known.nearest(&[0.0, 2.0]), Some(Path::new("b")));
        assert_eq!(NearestNeighbour { people: Vec::new() }.nearest(&[1.0]), None);
        assert_eq!(mean_vector(&[vec![1.0, 0.0], vec![0.0, 1.0]]), Some(vec![0.5, 0.5]));
    }
}
