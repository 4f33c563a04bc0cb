//! LoRA files: safetensors in any of the spellings of [`keys`](super::keys), with metadata.
//!
//! Written files are equal byte for byte for equal LoRAs: tensors and metadata are sorted, nothing holds the date
//! unless the caller puts it there. Metadata follow sd-scripts (`ss_…`, `library/train_util.py`) and Stability's
//! ModelSpec 1.0.1 (`modelspec.…`), which user interfaces read to label a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::Tensor;
use safetensors::tensor::View;

use super::adapter::{Adapter, AdapterFile, AdapterKind, Magnitude};
use super::embedding::{self, Embedding, take_pairs};
use super::foreign::{self, bundled_embeddings};
use super::keys::{self, Key, Part};
use super::ldm_keys::BlockLayout;
use super::parts::{Parts, is_finite};
use super::peft_config::{self, ConfigFile, PeftConfig};
use super::{Lora, LoraError, listed, listed_for_user, metadata};
use crate::failure::Failure;
use crate::files::open_input;
use crate::named::named;
use crate::progress;
use crate::weights::header::{Entry, Header, Storage};
use crate::weights::sha256;

named! {
    /// How the keys of a file are spelled.
    pub enum Format {
        /// `lora_unet_…` with LDM block names and alpha, as sd-scripts writes for SDXL; read by all programs. (diffusers
        /// 0.42.1 uses one alpha for all attention layers; write peft for it where alphas differ.)
        Kohya = "kohya",
        /// `lora_unet_…` with diffusers block names and alpha.
        KohyaDiffusers = "kohya-diffusers",
        /// `unet.….lora_A.weight`; without alpha, which is multiplied into `lora_B`.
        Peft = "peft",
    }
}

/// Reads a LoRA of linear layers, of any known spelling. Keys that belong to no layer are named in a warning.
///
/// `layout` is that of the model that the LoRA is for; LDM paths depend on it.
///
/// # Errors
/// [`Failure::Unusable`] with a [`LoraError`] that tells what is wrong with the file.
pub fn read(path: &Path, layout: &BlockLayout) -> Result<Lora> {
    let adapters = read_adapters(path, layout)?;
    adapters.into_lora().map_err(|error| Failure::unusable(path, error))
}

/// Reads a file of any kind and spelling, or a folder with one. What is left out of it is named in a warning.
///
/// # Errors
/// As [`read`].
pub fn read_adapters(path: &Path, layout: &BlockLayout) -> Result<AdapterFile> {
    Reading { layout, missing: Missing::Warn }.read(path)
}

/// What to do with a LoRA of which a part is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Missing {
    /// Say what, and how much of the file it is.
    #[default]
    Warn,
    /// Fail.
    Refuse,
}

impl Missing {
    /// Warns of what is left out of `file`, or refuses it.
    ///
    /// # Errors
    /// [`LoraError::Incomplete`].
    pub fn report(self, file: impl std::fmt::Display, why: String) -> Result<(), LoraError> {
        match self {
            Self::Warn => progress::warn(format_args!("`{file}`: {why}")),
            Self::Refuse => return Err(LoraError::Incomplete { why }),
        }
        Ok(())
    }
}

/// How files are read.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// That of the model that the LoRA is for; LDM paths depend on it.
    pub layout: &'a BlockLayout,
    /// What happens where a part of a file is left out.
    pub missing: Missing,
}

impl Reading<'_> {
    /// As [`read_adapters`].
    ///
    /// # Errors
    /// As [`read`], and [`LoraError::Incomplete`].
    pub fn read(&self, path: &Path) -> Result<AdapterFile> {
        let mut file = open(path)?;
        let mut read = || -> Result<AdapterFile> {
            let config = ConfigFile::beside(&weights_in(path)?)?;
            let (adapters, unknown) = from_reader(&mut file, self.layout, config.as_ref())?;
            for why in left_out(&mut file, &unknown)? {
                self.missing.report(path.display(), why)?;
            }
            Ok(adapters)
        };
        read().map_err(|error| Failure::unusable(path, format!("{error:#}")))
    }
}

/// Sentences about the parts of a file that are not used, whose keys are `unknown`.
fn left_out(file: &mut (impl Read + Seek), unknown: &[String]) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    let tokens: Vec<String> = bundled_embeddings(unknown).into_iter().map(String::from).collect();
    if !tokens.is_empty() {
        warnings.push(format!(
            "its textual inversion embeddings for {} lack the vectors of SDXL's two text encoders (clip_l and clip_g) \
             and are not used; in a prompt these words have the meaning that the base gives them",
            listed(&tokens)
        ));
    }
    let others: Vec<String> = unknown.iter().filter(|key| !key.starts_with("bundle_emb.")).cloned().collect();
    if !others.is_empty() {
        let header = Header::read(file)?;
        let size = |entry: &&Entry| entry.shape.iter().product::<usize>() as f64;
        let all: f64 = header.tensors.iter().map(|entry| size(&entry)).sum();
        let lost: f64 =
            header.tensors.iter().filter(|entry| others.contains(&entry.key)).map(|e| size(&e)).sum();
        warnings.push(format!(
            "{} of {} tensors, {:.0} % of its weights, belong to no known layer and are left out: {}",
            others.len(),
            header.tensors.len(),
            100.0 * lost / all.max(1.0),
            listed_for_user(&others)
        ));
    }
    Ok(warnings)
}

/// The weights of a LoRA that was saved as a folder: PEFT's, diffusers', or the only `.safetensors` there is; for a
/// file the file itself.
///
/// # Errors
/// [`Failure::Unusable`] for a folder that holds none, or several.
pub fn weights_in(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let known = [peft_config::WEIGHTS, "pytorch_lora_weights.safetensors"].map(|name| path.join(name));
    if let Some(file) = known.into_iter().find(|file| file.is_file()) {
        return Ok(file);
    }
    let entries = std::fs::read_dir(path).map_err(|error| Failure::unusable(path, error))?;
    let entries = entries.collect::<Result<Vec<_>, _>>().map_err(|error| Failure::unusable(path, error))?;
    let mut found: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    found.retain(|file| file.extension().is_some_and(|kind| kind == "safetensors") && file.is_file());
    found.sort();
    match found.as_slice() {
        [file] => Ok(file.clone()),
        [] => Err(Failure::unusable(path, "the folder holds no .safetensors file")),
        files => {
            let names: Vec<String> = files
                .iter()
                .filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned()))
                .collect();
            Err(Failure::unusable(
                path,
                format!("the folder holds several files; name one of {}", listed(&names)),
            ))
        }
    }
}

/// Opens a file, or the weights in a folder, for reading.
///
/// # Errors
/// [`Failure::Unusable`] when it is missing or not to be read.
pub fn open(path: &Path) -> Result<File> {
    open_input(&weights_in(path)?).map_err(|error| Failure::unusable(path, error))
}

/// Reads a LoRA of linear layers from memory; returns it with the keys that belong to no known layer.
pub fn from_bytes(bytes: &[u8], layout: &BlockLayout) -> Result<(Lora, Vec<String>)> {
    let (adapters, unknown) = adapters_from_bytes(bytes, layout)?;
    Ok((adapters.into_lora()?, unknown))
}

/// Reads a file of any kind from memory; returns it with the keys that belong to no known layer.
pub fn adapters_from_bytes(bytes: &[u8], layout: &BlockLayout) -> Result<(AdapterFile, Vec<String>)> {
    from_reader(&mut std::io::Cursor::new(bytes), layout, None)
}

fn from_reader(
    file: &mut (impl Read + Seek),
    layout: &BlockLayout,
    beside: Option<&ConfigFile>,
) -> Result<(AdapterFile, Vec<String>)> {
    let header = Header::read(file)?;
    let config = PeftConfig::of(&header, beside)?;
    let (modules, mut unknown) = sorted(&header, layout, &config)?;
    let mut adapters = BTreeMap::new();
    for (module, entries) in modules {
        let stem = entries.values().find_map(|entry| keys::stem(&entry.key)).unwrap_or(&module);
        let mut parts = BTreeMap::new();
        for (part, entry) in &entries {
            if entry.shape.contains(&0) {
                let (part, shape) = (part.suffix().to_string(), entry.shape.clone());
                return Err(LoraError::Part { module: entry.key.clone(), part, shape }.into());
            }
            let tensor = header.load(file, entry)?;
            if !is_finite(&tensor) && *part == Part::Alpha && alpha_may_be_infinite(&entries) {
                continue;
            }
            if !is_finite(&tensor) {
                return Err(LoraError::NotFinite { module: entry.key.clone() }.into());
            }
            parts.insert(*part, tensor);
        }
        let whole_lokr_scale = config.whole_lokr_scale(&module, stem);
        let noted = |rank| config.alpha(&module, stem, rank);
        let adapter = Parts { module: &module, parts }.into_adapter(&noted, whole_lokr_scale)?;
        adapters.insert(module, adapter);
    }
    let mut embeddings = Vec::new();
    for (name, keys) in take_pairs(&mut unknown) {
        let mut load = |key: &String| -> Result<Tensor> {
            let entry = header.tensors.iter().find(|entry| entry.key == *key);
            Ok(header.load(file, entry.with_context(|| format!("`{key}`"))?)?)
        };
        let [clip_l, clip_g] = [load(&keys[0])?, load(&keys[1])?];
        embeddings.push(embedding::bundled(&name, clip_l, clip_g)?);
    }
    Ok((AdapterFile { modules: adapters, embeddings, metadata: header.metadata }, unknown))
}

/// Whether an alpha beside these parts scales nothing: whole changes have the scale 1 (LyCORIS, `lokr.py` and
/// `full.py`; ComfyUI, `weight_adapter/lokr.py`), and OFT is not bounded. Some programs write an alpha of 10⁹ and more
/// for "whole", which is infinite in f16.
fn alpha_may_be_infinite(parts: &BTreeMap<Part, &Entry>) -> bool {
    let has = |part: Part| parts.contains_key(&part);
    (has(Part::LokrW1) && has(Part::LokrW2))
        || [Part::Diff, Part::SetWeight, Part::WNorm, Part::Ia3, Part::OftBlocks].into_iter().any(has)
}

/// The entries of a file by module and part.
pub(super) type Modules<'a> = BTreeMap<String, BTreeMap<Part, &'a Entry>>;

/// Sorts the keys of a file by the modules they belong to; returns them with the keys that belong to none.
///
/// # Errors
/// [`LoraError::NoLayers`], [`LoraError::OtherBlocks`], [`LoraError::Kind`] and [`LoraError::Twice`].
pub(super) fn sorted<'a>(
    header: &'a Header,
    layout: &BlockLayout,
    config: &PeftConfig,
) -> Result<(Modules<'a>, Vec<String>), LoraError> {
    let mut modules: Modules = BTreeMap::new();
    let mut rest: Vec<&Entry> = Vec::new();
    let mut place =
        |module: String, part, entry: &'a Entry| match modules.entry(module).or_default().insert(part, entry)
        {
            Some(other) => Err(LoraError::Twice { first: other.key.clone(), second: entry.key.clone() }),
            None => Ok(()),
        };
    for entry in &header.tensors {
        match keys::parse(&entry.key, layout) {
            Key::Layer(module, part) => place(module, part, entry)?,
            Key::Other(kind) => return Err(LoraError::Kind { key: entry.key.clone(), kind }),
            Key::Unknown => rest.push(entry),
        }
    }
    let raw = |entry: &Entry| entry.key.starts_with("base_model.model.");
    let mut unknown = Vec::new();
    let is_adapter = rest.len() < header.tensors.len();
    let mut replaced: BTreeMap<(String, Part), &Entry> = BTreeMap::new();
    for entry in rest {
        let may_replace = config.replaces() || (is_adapter && raw(entry));
        match keys::replaced(&entry.key, layout).filter(|_| may_replace) {
            // With `bias: all` PEFT stores a module that it saves whole under three names, one of them as it was before.
            Some(_) if entry.key.contains(".original_module.") => {}
            Some(place) if entry.key.contains(".modules_to_save.") => {
                replaced.entry(place).or_insert(entry);
            }
            Some(place) => {
                replaced.insert(place, entry);
            }
            None => unknown.push(entry.key.clone()),
        }
    }
    for ((module, part), entry) in replaced {
        place(module, part, entry)?;
    }
    unknown.sort();
    // An alpha alone is no change.
    if modules.values().all(|parts| parts.keys().all(|part| *part == Part::Alpha)) {
        let guess = foreign::guess(&unknown);
        return Err(LoraError::NoLayers { count: header.tensors.len(), examples: unknown, guess });
    }
    let in_blocks = |key: &&String| key.starts_with("lora_unet_") && key.contains("put_blocks_");
    if let (Some(base), Some(example)) =
        (header.metadata.get(metadata::BASE), unknown.iter().find(in_blocks).cloned())
    {
        let (base, count) = (base.clone(), unknown.iter().filter(in_blocks).count());
        return Err(LoraError::OtherBlocks { count, example, base });
    }
    Ok((modules, unknown))
}

/// Writes `lora` whole or not at all.
///
/// `layout` is that of the model that the LoRA is for; LDM paths depend on it.
pub fn write(path: &Path, lora: &Lora, format: Format, layout: &BlockLayout) -> Result<()> {
    write_adapters(path, &lora.into(), format, layout)
}

/// Writes changes of any kind whole or not at all.
pub fn write_adapters(
    path: &Path,
    adapters: &AdapterFile,
    format: Format,
    layout: &BlockLayout,
) -> Result<()> {
    let bytes = adapters_to_bytes(adapters, format, layout)
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    crate::files::write_whole(path, &bytes)
}

/// The bytes of a LoRA file. Factors keep their number type.
pub fn to_bytes(lora: &Lora, format: Format, layout: &BlockLayout) -> Result<Vec<u8>> {
    adapters_to_bytes(&lora.into(), format, layout)
}

/// The bytes of a file of any kind. Tensors keep their number type.
///
/// # Errors
/// [`LoraError::NoName`] for a module, [`LoraError::Kind`] for a kind, that the format has no name for.
pub fn adapters_to_bytes(adapters: &AdapterFile, format: Format, layout: &BlockLayout) -> Result<Vec<u8>> {
    let mut tensors = BTreeMap::new();
    for (module, adapter) in &adapters.modules {
        if format == Format::Peft {
            tensors.extend(peft_tensors(module, adapter)?);
            continue;
        }
        let stem = match format {
            Format::Kohya => keys::kohya(module, layout)?,
            _ => keys::kohya_diffusers(module),
        };
        for (part, tensor) in adapter.parts()? {
            tensors.insert(format!("{stem}.{}", part.suffix()), tensor);
        }
    }
    if format != Format::Peft {
        tensors.extend(adapters.embeddings.iter().flat_map(Embedding::tensors));
    }
    // Wider numbers first, so that each tensor is aligned to its own size.
    let mut order: Vec<(&String, &Tensor)> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(Tensor::dtype(tensor).size_in_bytes()));
    let mut data = Vec::new();
    let mut entries = Vec::new();
    for (key, tensor) in order {
        let storage = Storage::of(tensor).with_context(|| {
            format!("`{key}`: numbers of type {:?} are not written", Tensor::dtype(tensor))
        })?;
        entries.push((key.as_str(), storage, tensor.dims()));
        data.extend_from_slice(&View::data(tensor));
    }
    let mut metadata = metadata::of(adapters, format == Format::Peft);
    metadata.insert(metadata::DATA_HASH.to_string(), format!("0x{}", sha256::of_bytes(&data)));
    let mut bytes = Header::of(metadata, entries).to_bytes();
    bytes.extend(data);
    Ok(bytes)
}

/// PEFT has names for LoRA of linear layers and convolutions and for DoRA's magnitudes.
fn peft_tensors(module: &str, adapter: &Adapter) -> Result<Vec<(String, Tensor)>, LoraError> {
    let stem = keys::peft(module);
    let kind = || LoraError::Kind { key: module.to_string(), kind: adapter.kind_name() };
    let AdapterKind::LowRank { down, up, mid: None, alpha } = &adapter.kind else { return Err(kind()) };
    let scale = f64::from(*alpha) / down.dims()[0] as f64;
    let up = if scale == 1.0 { up.clone() } else { (up * scale)? };
    let mut tensors =
        vec![(format!("{stem}.lora_A.weight"), down.clone()), (format!("{stem}.lora_B.weight"), up)];
    match &adapter.magnitude {
        None => {}
        Some(Magnitude { on_input: true, .. }) => return Err(kind()),
        Some(Magnitude { values, .. }) => {
            let values = values.flatten_all()?;
            let values = if down.rank() == 4 { values.reshape((1, (), 1, 1))? } else { values };
            tensors.push((format!("{stem}.lora_magnitude_vector"), values));
        }
    }
    if adapter.bias.is_some() {
        return Err(kind());
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::layout::tests::any_lora;
    use candle_core::Device;
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
            (vec![(ALPHA, Tensor::new(1f32, &Device::Cpu).unwrap())], "none of its 1 tensors"),
            (
                vec![("lora_unet_mid_block_attentions_0_proj_in.dora_scale", down.clone())],
                "dora_scale of shape [2, 3]",
            ),
            (vec![(DOWN, down.clone())], "lacks its `up` factor"),
            (vec![(UP, up.clone())], "lacks its `down` factor"),
            (vec![(DOWN, down.clone()), (UP, nan)], "not finite"),
            (vec![(DOWN, down.clone()), (UP, factor(4, 3, 1.0))], "are not (R, in) and (out, R)"),
            (
                vec![(DOWN, factor(2, 9, 1.0).reshape((2, 1, 3, 3)).unwrap()), (UP, up.clone())],
                "LoCon is not supported",
            ),
            (
                vec![("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", up.clone())],
                "lacks its `hada_w1_b`",
            ),
            (
                vec![("lora_unet_mid_block_attentions_0_proj_in.bm.weight", up)],
                "GLoRA with a Tucker factor is not",
            ),
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
        let hash = format!("0x{}", sha256::of_bytes(&bytes[8 + header..]));
        assert_eq!(again.metadata[metadata::DATA_HASH], hash);
        assert_eq!(again.metadata["ss_network_dim"], "2");
        Ok(())
    }
}
