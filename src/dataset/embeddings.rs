//! Face and image embeddings of a person's reference images.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Tensor};

use crate::dataset::manifest::Row;
use crate::failure::Failure;
use crate::weights;

/// `face` (R, F) and `image` (R, I) of one row.
pub(super) fn read_embeddings(folder: &Path, row: &Row) -> Result<(Tensor, Tensor)> {
    let path = folder.join(&row.embeddings);
    let tensors = weights::read_file(&path)?;
    let (face, image) = (embedding(&path, &tensors, "face")?, embedding(&path, &tensors, "image")?);
    if face.dim(0)? != image.dim(0)? {
        return Err(Failure::unusable(&path, "`face` and `image` have different numbers of rows"));
    }
    Ok((face, image))
}

fn embedding(path: &Path, tensors: &HashMap<String, Tensor>, name: &str) -> Result<Tensor> {
    let unusable = |why: String| Failure::unusable(path, why);
    let tensor = tensors.get(name).ok_or_else(|| unusable(format!("tensor `{name}` is missing")))?;
    if tensor.rank() != 2 || tensor.elem_count() == 0 {
        return Err(unusable(format!("`{name}` has shape {:?}, wanted references × width", tensor.dims())));
    }
    let tensor = tensor.to_dtype(DType::F32)?;
    if !tensor.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
        return Err(unusable(format!("`{name}` holds values that are not finite")));
    }
    Ok(tensor)
}
