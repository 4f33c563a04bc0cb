//! LoRA files: safetensors in any of the spellings of [`keys`](super::keys), with metadata.
//!
//! Written files are equal byte for byte for equal LoRAs: tensors and metadata are sorted, nothing holds the date
//! unless the caller puts it there. Metadata follow sd-scripts (`ss_…`, `library/train_util.py`) and Stability's
//! ModelSpec 1.0.1 (`modelspec.…`), which user interfaces read to label a file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use super::keys::{self, BlockLayout, Key, Part};
use super::{Lora, LoraError, LoraLayer, listed};
use crate::failure::Failure;
use crate::progress;

/// How the keys of a file are spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `lora_unet_` and LDM paths, with alpha: what sd-scripts writes for SDXL, and what all programs read.
    /// (diffusers 0.42.1 takes one alpha for all attention layers of such a file; where they differ, use
    /// [`Format::Peft`] for it.)
    Kohya,
    /// `lora_unet_` and diffusers paths, with alpha.
    KohyaDiffusers,
    /// `unet.….lora_A.weight`. The spelling has no place for alpha; where it is not R, `up` is scaled instead.
    Peft,
}

/// Reads a LoRA of any known spelling. Keys that belong to no layer are named in a warning.
///
/// `layout` is that of the model that the LoRA is for; LDM paths depend on it.
///
/// # Errors
/// [`Failure::Unusable`] with a [`LoraError`] that tells what is wrong with the file.
pub fn read(path: &Path, layout: &BlockLayout) -> Result<Lora> {
    let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
    let (lora, unknown) =
        from_bytes(&bytes, layout).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
    if !unknown.is_empty() {
        progress::warn(format!(
            "{} tensors of `{}` belong to no known layer and are left out: {}",
            unknown.len(),
            path.display(),
            listed(&unknown)
        ));
    }
    Ok(lora)
}

/// Reads a LoRA from memory; returns it with the keys that belong to no known layer.
pub fn from_bytes(bytes: &[u8], layout: &BlockLayout) -> Result<(Lora, Vec<String>)> {
    let (_, header) = SafeTensors::read_metadata(bytes).context("not a whole safetensors file")?;
    let metadata: BTreeMap<String, String> =
        header.metadata().clone().unwrap_or_default().into_iter().collect();
    let tensors = crate::weights::read_bytes(bytes)?;
    let count = tensors.len();

    let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
    let mut unknown = Vec::new();
    for (key, tensor) in tensors {
        match keys::parse(&key, layout) {
            Key::Layer(module, part) => {
                let parts = parts.entry(module).or_default();
                match part {
                    Part::Down => parts.down = Some(tensor),
                    Part::Up => parts.up = Some(tensor),
                    Part::Alpha => parts.alpha = Some(tensor),
                }
            }
            Key::Other(kind) => return Err(LoraError::Kind { key, kind }.into()),
            Key::Unknown => unknown.push(key),
        }
    }
    unknown.sort();
    if parts.is_empty() {
        return Err(LoraError::NoLayers { count, examples: unknown }.into());
    }
    let alphas = AdapterAlphas::of(&metadata);
    let mut layers = BTreeMap::new();
    for (module, parts) in parts {
        let layer = parts.into_layer(&module, &alphas)?;
        layers.insert(module, layer);
    }
    Ok((Lora { layers, metadata }, unknown))
}

/// What a file holds of one layer.
#[derive(Default)]
struct Parts {
    down: Option<Tensor>,
    up: Option<Tensor>,
    alpha: Option<Tensor>,
}

impl Parts {
    fn into_layer(self, module: &str, alphas: &AdapterAlphas) -> Result<LoraLayer, LoraError> {
        let half = |missing| LoraError::Half { module: module.to_string(), missing };
        let down = matrix(self.down.ok_or_else(|| half("down"))?, module)?;
        let up = matrix(self.up.ok_or_else(|| half("up"))?, module)?;
        let not_finite = || LoraError::NotFinite { module: module.to_string() };
        let stored = match self.alpha {
            Some(alpha) => {
                let values = alpha.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                Some(*values.first().ok_or_else(not_finite)?)
            }
            None => alphas.get(module),
        };
        // sd-scripts: without alpha, or with alpha 0, ΔW is not scaled.
        let alpha = stored.filter(|alpha| *alpha != 0.0).unwrap_or(down.dims()[0] as f32);
        if !(alpha.is_finite() && is_finite(&down)? && is_finite(&up)?) {
            return Err(not_finite());
        }
        LoraLayer::new(module, down, up, alpha)
    }
}

/// A factor as a matrix; the factors of 1×1 convolutions have two more axes of size 1.
fn matrix(tensor: Tensor, module: &str) -> Result<Tensor, LoraError> {
    match *tensor.dims() {
        [_, _] => Ok(tensor),
        [rows, columns, 1, 1] => Ok(tensor.reshape((rows, columns))?),
        [_, _, _, _] => Err(LoraError::Kind { key: module.to_string(), kind: "LoRA of a convolution" }),
        _ => Err(LoraError::Kind { key: module.to_string(), kind: "a factor that is no matrix" }),
    }
}

fn is_finite(tensor: &Tensor) -> Result<bool, LoraError> {
    // A sum is finite only if all its terms are; in f64 finite f32 cannot overflow.
    let sum = tensor.to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?;
    Ok(sum.is_finite())
}

/// Alphas that diffusers keeps in the metadata of PEFT files, as JSON under `lora_adapter_metadata`:
/// `unet.lora_alpha` for all, `unet.alpha_pattern` for single modules.
struct AdapterAlphas(serde_json::Map<String, serde_json::Value>);

impl AdapterAlphas {
    fn of(metadata: &BTreeMap<String, String>) -> Self {
        let json = metadata.get("lora_adapter_metadata").and_then(|text| serde_json::from_str(text).ok());
        Self(json.unwrap_or_default())
    }

    fn get(&self, module: &str) -> Option<f32> {
        let stem = keys::peft(module);
        let (model, path) = stem.split_once('.')?;
        let number = |value: &serde_json::Value| value.as_f64().map(|alpha| alpha as f32);
        let patterns = self.0.get(&format!("{model}.alpha_pattern")).and_then(|value| value.as_object());
        let single = patterns.into_iter().flatten().find(|(pattern, _)| {
            path.strip_suffix(pattern.as_str())
                .is_some_and(|before| before.is_empty() || before.ends_with('.'))
        });
        match single {
            Some((_, value)) => number(value),
            None => self.0.get(&format!("{model}.lora_alpha")).and_then(number),
        }
    }
}

/// Writes `lora` whole or not at all.
///
/// `layout` is that of the model that the LoRA is for; LDM paths depend on it.
pub fn write(path: &Path, lora: &Lora, format: Format, layout: &BlockLayout) -> Result<()> {
    let bytes =
        to_bytes(lora, format, layout).with_context(|| format!("cannot write `{}`", path.display()))?;
    crate::files::write_whole(path, &bytes)
}

/// The bytes of a LoRA file. Factors keep their number type.
pub fn to_bytes(lora: &Lora, format: Format, layout: &BlockLayout) -> Result<Vec<u8>> {
    let mut tensors = BTreeMap::new();
    for (module, layer) in &lora.layers {
        let (stem, down, up) = match format {
            Format::Kohya => (keys::kohya(module, layout)?, "lora_down", "lora_up"),
            Format::KohyaDiffusers => (keys::kohya_diffusers(module), "lora_down", "lora_up"),
            Format::Peft => (keys::peft(module), "lora_A", "lora_B"),
        };
        tensors.insert(format!("{stem}.{down}.weight"), layer.down.clone());
        if format == Format::Peft {
            let scaled = if layer.scale() == 1.0 { layer.up.clone() } else { (&layer.up * layer.scale())? };
            tensors.insert(format!("{stem}.{up}.weight"), scaled);
        } else {
            tensors.insert(format!("{stem}.{up}.weight"), layer.up.clone());
            tensors.insert(format!("{stem}.alpha"), Tensor::new(layer.alpha, &Device::Cpu)?);
        }
    }
    let (header, data) = lay_out(&tensors)?;
    let mut metadata = described(lora, format);
    metadata.insert("modelspec.hash_sha256".to_string(), format!("0x{:x}", Sha256::digest(&data)));

    let mut fields = BTreeMap::from([("__metadata__", serde_json::to_value(metadata)?)]);
    fields.extend(header.iter().map(|(name, value)| (name.as_str(), value.clone())));
    let mut json = serde_json::to_string(&fields)?.into_bytes();
    json.resize(json.len().next_multiple_of(8), b' '); // the format wants the data aligned
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes.extend(data);
    Ok(bytes)
}

/// Header entries and data of a safetensors file. The `safetensors` crate keeps metadata in a hash map, whose
/// order changes from run to run.
fn lay_out(tensors: &BTreeMap<String, Tensor>) -> Result<(BTreeMap<String, serde_json::Value>, Vec<u8>)> {
    use safetensors::tensor::View;
    let mut header = BTreeMap::new();
    let mut data = Vec::new();
    // Wider numbers first, so that each tensor is aligned to its own size.
    let mut order: Vec<(&String, &Tensor)> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(Tensor::dtype(tensor).size_in_bytes()));
    for (name, tensor) in order {
        let begin = data.len();
        data.extend_from_slice(&View::data(tensor));
        let entry = serde_json::json!({
            "dtype": View::dtype(tensor), "shape": tensor.dims(), "data_offsets": [begin, data.len()],
        });
        header.insert(name.clone(), entry);
    }
    Ok((header, data))
}

/// The LoRA's own metadata, over what every file says.
fn described(lora: &Lora, format: Format) -> BTreeMap<String, String> {
    let one = |values: Vec<String>| {
        let same = values.windows(2).all(|pair| pair[0] == pair[1]);
        if same { values.into_iter().next().unwrap_or_default() } else { "Dynamic".to_string() }
    };
    let rank = one(lora.layers.values().map(|layer| layer.rank().to_string()).collect());
    let alpha = one(lora.layers.values().map(|layer| layer.alpha.to_string()).collect());
    let alpha = if format == Format::Peft { rank.clone() } else { alpha };
    let standard = [
        ("format", "pt".to_string()),
        ("ss_network_module", "networks.lora".to_string()),
        ("ss_network_dim", rank),
        ("ss_network_alpha", alpha),
        ("ss_base_model_version", "sdxl_base_v1-0".to_string()),
        ("ss_v2", "False".to_string()),
        ("modelspec.sai_model_spec", "1.0.1".to_string()),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora".to_string()),
        ("modelspec.implementation", "https://github.com/Stability-AI/generative-models".to_string()),
        ("modelspec.title", "difflora LoRA".to_string()),
        ("modelspec.resolution", "1024x1024".to_string()),
    ];
    let mut metadata: BTreeMap<String, String> =
        standard.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    for (key, value) in &lora.metadata {
        // What follows from the tensors is said anew; diffusers' own note is about the file that was read.
        if !["ss_network_dim", "ss_network_alpha", "lora_adapter_metadata"].contains(&key.as_str()) {
            metadata.insert(key.clone(), value.clone());
        }
    }
    metadata
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::layout::tests::any_lora;
    use proptest::prelude::*;

    fn factor(rows: usize, columns: usize, value: f32) -> Tensor {
        Tensor::full(value, (rows, columns), &Device::Cpu).unwrap()
    }

    fn file(tensors: &[(&str, Tensor)]) -> Vec<u8> {
        let tensors = tensors.iter().map(|(key, tensor)| (key.to_string(), tensor.clone()));
        safetensors::serialize(tensors, None).unwrap()
    }

    fn read_tensors(tensors: &[(&str, Tensor)]) -> Result<(Lora, Vec<String>)> {
        from_bytes(&file(tensors), &BlockLayout::default())
    }

    const UP: &str = "lora_unet_input_blocks_4_1_proj_in.lora_up.weight";
    const DOWN: &str = "lora_unet_input_blocks_4_1_proj_in.lora_down.weight";
    const ALPHA: &str = "lora_unet_input_blocks_4_1_proj_in.alpha";
    const MODULE: &str = "down_blocks.1.attentions.0.proj_in";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_is_written_is_read_again(lora in any_lora()) {
            let layout = BlockLayout::default();
            for format in [Format::Kohya, Format::KohyaDiffusers, Format::Peft] {
                let bytes = to_bytes(&lora, format, &layout).unwrap();
                prop_assert_eq!(&bytes, &to_bytes(&lora, format, &layout).unwrap());
                let (again, unknown) = from_bytes(&bytes, &layout).unwrap();
                prop_assert!(unknown.is_empty());
                prop_assert_eq!(lora.layers.keys().collect::<Vec<_>>(), again.layers.keys().collect::<Vec<_>>());
                for (module, layer) in &lora.layers {
                    let other = &again.layers[module];
                    if format != Format::Peft {
                        prop_assert_eq!(layer.alpha, other.alpha);
                    }
                    let far = (layer.delta().unwrap() - other.delta().unwrap()).unwrap().abs().unwrap();
                    let far = far.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
                    // PEFT has alpha / R multiplied in beforehand: one more rounding of numbers up to 16.
                    prop_assert!(far <= if format == Format::Peft { 1e-4 } else { 0.0 }, "{format:?} {far}");
                }
                // Writing what was read gives the same file again.
                prop_assert_eq!(bytes, to_bytes(&again, format, &layout).unwrap());
            }
        }
    }

    #[test]
    fn a_missing_alpha_and_alpha_zero_are_the_rank() -> Result<()> {
        let halves = [(DOWN, factor(2, 3, 1.0)), (UP, factor(4, 2, 1.0))];
        let alpha = |value: f32| Tensor::new(value, &Device::Cpu).unwrap();
        assert_eq!(read_tensors(&halves)?.0.layers[MODULE].alpha, 2.0);
        for (stored, read) in [(0.0, 2.0), (1.0, 1.0), (8.0, 8.0)] {
            let [down, up] = halves.clone();
            assert_eq!(read_tensors(&[down, up, (ALPHA, alpha(stored))])?.0.layers[MODULE].alpha, read);
        }
        Ok(())
    }

    #[test]
    fn alphas_in_diffusers_metadata_count() {
        let json = r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}"#;
        let alphas = AdapterAlphas::of(&[("lora_adapter_metadata".to_string(), json.to_string())].into());
        assert_eq!(alphas.get("mid_block.attn1.to_q"), Some(2.0));
        assert_eq!(alphas.get("mid_block.attn1.to_k"), Some(8.0));
        assert_eq!(alphas.get("text_encoder.text_model.x"), None);
    }

    #[test]
    fn factors_of_one_by_one_convolutions_are_matrices() -> Result<()> {
        let down = factor(2, 3, 1.0).reshape((2, 3, 1, 1))?;
        let up = factor(4, 2, 1.0).reshape((4, 2, 1, 1))?;
        assert_eq!(read_tensors(&[(DOWN, down), (UP, up)])?.0.layers[MODULE].shape(), (4, 3));
        Ok(())
    }

    #[test]
    fn unknown_keys_are_reported_and_do_not_disturb() -> Result<()> {
        let strange = factor(1, 1, 0.0);
        let (lora, unknown) =
            read_tensors(&[(DOWN, factor(2, 3, 1.0)), (UP, factor(4, 2, 1.0)), ("emb", strange)])?;
        assert_eq!(lora.layers.len(), 1);
        assert_eq!(unknown, ["emb"]);
        Ok(())
    }

    #[test]
    fn unusable_files_say_why() {
        let nan = factor(4, 2, f32::NAN);
        let (down, up) = (factor(2, 3, 1.0), factor(4, 2, 1.0));
        for (tensors, words) in [
            (vec![("model.weight", down.clone())], "none of its 1 tensors"),
            (vec![(DOWN, down.clone())], "lacks its `up` factor"),
            (vec![(UP, up.clone())], "lacks its `down` factor"),
            (vec![(DOWN, down.clone()), (UP, nan)], "not finite"),
            (vec![(DOWN, down.clone()), (UP, factor(4, 3, 1.0))], "are not (R, in) and (out, R)"),
            (vec![(DOWN, factor(2, 9, 1.0).reshape((2, 1, 3, 3)).unwrap()), (UP, up.clone())], "convolution"),
            (vec![("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", up)], "LoHa is not supported"),
            (vec![], "none of its 0 tensors"),
        ] {
            let error = format!("{:#}", read_tensors(&tensors).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        for bytes in [&b""[..], b"picture", &[255; 64], &file(&[(DOWN, down)])[..40]] {
            assert!(from_bytes(bytes, &BlockLayout::default()).is_err());
        }
    }

    #[test]
    fn the_hash_in_the_metadata_is_that_of_the_tensor_bytes() -> Result<()> {
        let (lora, _) = read_tensors(&[(DOWN, factor(2, 3, 1.0)), (UP, factor(4, 2, 0.5))])?;
        let bytes = to_bytes(&lora, Format::Kohya, &BlockLayout::default())?;
        let header = u64::from_le_bytes(bytes[..8].try_into()?) as usize;
        let (again, _) = from_bytes(&bytes, &BlockLayout::default())?;
        let hash = format!("0x{:x}", Sha256::digest(&bytes[8 + header..]));
        assert_eq!(again.metadata["modelspec.hash_sha256"], hash);
        assert_eq!(again.metadata["ss_network_dim"], "2");
        Ok(())
    }
}
