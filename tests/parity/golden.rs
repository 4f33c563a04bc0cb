//! Golden files: tensors made by the reference libraries, with configurations as JSON in the metadata.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

/// One golden file.
pub struct Golden {
    name: String,
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Golden {
    /// `tests/data/golden/NAME.safetensors`.
    pub fn open(name: &str) -> Self {
        let path =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/golden/{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        Self {
            name: name.into(),
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap(),
            metadata: header.metadata().clone().unwrap_or_default(),
        }
    }

    /// The tensor `key`, as stored.
    pub fn get(&self, key: &str) -> Tensor {
        self.tensors.get(key).unwrap_or_else(|| panic!("{} has no tensor {key}", self.name)).clone()
    }

    /// All tensors under `prefix`, without it.
    pub fn under(&self, prefix: &str) -> HashMap<String, Tensor> {
        self.tensors
            .iter()
            .filter_map(|(key, tensor)| Some((key.strip_prefix(prefix)?.to_string(), tensor.clone())))
            .collect()
    }

    /// The metadata entry `key`, read as JSON.
    pub fn json<T: serde::de::DeserializeOwned>(&self, key: &str) -> T {
        serde_json::from_str(&self.metadata[key]).unwrap()
    }
}

/// Fails unless every value of `ours` is within `tolerance` of `theirs`, relative to the largest of `theirs`.
#[track_caller]
pub fn assert_close(ours: &Tensor, theirs: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(ours.dims(), theirs.dims(), "{what}: shapes differ");
    let values = |t: &Tensor| {
        t.to_dtype(DType::F64).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f64>()).unwrap()
    };
    let (ours, theirs) = (values(ours), values(theirs));
    let largest = theirs.iter().fold(1e-12f64, |a, x| a.max(x.abs()));
    for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        let difference = (a - b).abs() / largest;
        assert!(
            difference <= tolerance,
            "{what}: value {i} is {a}, wanted {b} (off by {difference:.2e} of the largest)"
        );
    }
}
