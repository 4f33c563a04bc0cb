//! The files of a model, on disk or built in: configs, weights, and saving them again.
//!
//! A model is a folder as diffusers and transformers write it: one folder a component, each with a `config.json`
//! and a `.safetensors`. [`ModelFiles::load`] builds a network from such weights and says which tensors were
//! missing and which were never asked for: a config that does not fit its weights must not draw noise in silence.
//! A model that lies otherwise, in one file under other names, is an [`Assembled`] folder: names and forms are
//! translated as tensors are asked for.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use include_dir::Dir;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::assembled::Assembled;
pub use super::component::TensorReader;
use super::component::{Entries, Ledger, ShardIndex, Weights};
use super::safetensors::Stored;
use crate::failure::Failure;
use crate::files::{self, write_whole};
use crate::limits;
use crate::weights::sha256;

/// Where a diffusers component keeps its weights: `diffusion_pytorch_model.safetensors`.
pub const DIFFUSERS_WEIGHTS: &str = "diffusion_pytorch_model";

/// Where a transformers component keeps its weights: `model.safetensors`.
pub const TRANSFORMERS_WEIGHTS: &str = "model";

/// The largest config, vocabulary or index that is read, in bytes.
const MAX_PART: u64 = 1 << 28;

/// Why a folder of pickles is not read, and what to do about it.
const PICKLED_FOLDER: &str = "pickled weights can run programs and are not read; convert the folder once with\n  \
     python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('OLD').save_pretrained('NEW')\"";

/// A model's folder.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// On disk.
    Folder(PathBuf),
    /// Inside the program.
    BuiltIn {
        /// Name in messages, for example `tiny`.
        name: &'static str,
        /// The folder, or one below it.
        dir: &'static Dir<'static>,
    },
    /// In one weight file of another layout.
    Assembled(Arc<Assembled>),
}

/// The type in which weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightType {
    dtype: DType,
    /// Whether tensors that are stored as f16 stay so.
    halves: bool,
}

impl WeightType {
    /// `dtype`; but where that is f32 on a CPU, weights that are stored as f16 stay so: kernels widen them as they pack
    /// them, so that the results are the same to the bit, in half the memory and without the time to fill it.
    ///
    /// Code that changes such a weight has to widen it first ([`crate::lora::apply::widen`]), lest the change be rounded.
    pub fn as_good_as(dtype: DType, device: &Device) -> Self {
        Self { dtype, halves: dtype == DType::F32 && matches!(device, Device::Cpu) }
    }

    /// The same with at least f32.
    pub fn upcast(self) -> Self {
        Self { dtype: DType::F32, ..self }
    }
}

impl From<DType> for WeightType {
    fn from(dtype: DType) -> Self {
        Self { dtype, halves: false }
    }
}

/// How the weights of a network are loaded.
struct Loading<'a> {
    weights: WeightType,
    device: &'a Device,
    /// Check them, and build the network of zeros.
    only_check: bool,
}

impl ModelFiles {
    /// A folder on disk.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when there is none.
    pub fn folder(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        if !path.is_dir() {
            let why = if path.exists() { "it is a file, wanted a model's folder" } else { "no such folder" };
            return Err(Failure::unusable(&path, why));
        }
        Ok(Self::Folder(path))
    }

    /// Name in messages: the path, or the name of the built-in model.
    pub fn name(&self) -> String {
        match self {
            Self::Folder(path) => path.display().to_string(),
            Self::BuiltIn { name, .. } => (*name).to_string(),
            Self::Assembled(model) => model.file.display().to_string(),
        }
    }

    /// Whether there is such a file, for example `vae/config.json`.
    pub fn exists(&self, file: &str) -> bool {
        match self {
            Self::Folder(path) => path.join(file).is_file(),
            Self::BuiltIn { dir, .. } => dir.get_file(dir.path().join(file)).is_some(),
            Self::Assembled(model) => model.texts.contains_key(file),
        }
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when it is missing or cannot be read.
    pub fn read(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        match self {
            Self::Folder(path) => {
                let path = path.join(file);
                files::read_input(&path, MAX_PART).map(Cow::Owned)
            }
            Self::BuiltIn { dir, .. } => self.embedded(dir, file).map(Cow::Borrowed),
            Self::Assembled(model) => match model.texts.get(file) {
                Some(text) => Ok(Cow::Owned(text.as_bytes().to_vec())),
                None => Err(self.unusable(file, "a model in one file has no such part")),
            },
        }
    }

    /// The bytes of a file of a model that lies inside the program.
    pub fn built_in_bytes(&self, file: &str) -> Result<&'static [u8]> {
        match self {
            Self::BuiltIn { dir, .. } => self.embedded(dir, file),
            _ => Err(self.unusable(file, "it lies outside the program")),
        }
    }

    fn embedded(&self, dir: &'static Dir<'static>, file: &str) -> Result<&'static [u8]> {
        let found = dir.get_file(dir.path().join(file));
        found
            .map(|found| found.contents())
            .ok_or_else(|| self.unusable(file, "the built-in model has no such file"))
    }

    /// A file of UTF-8 text.
    pub fn text(&self, file: &str) -> Result<String> {
        String::from_utf8(self.read(file)?.into_owned()).map_err(|error| self.unusable(file, error))
    }

    /// A JSON file.
    ///
    /// # Errors
    /// [`Failure::Unusable`] with the file and the place in it.
    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<T> {
        serde_json::from_slice(&self.read(file)?).map_err(|error| self.unusable(file, error))
    }

    /// A component's `config.json`, without the keys that start with `_`, which are remarks of diffusers.
    pub fn config<T: DeserializeOwned>(&self, file: &str) -> Result<T> {
        let mut config: serde_json::Map<String, Value> = self.json(file)?;
        config.retain(|key, _| !key.starts_with('_'));
        let config = Value::Object(config);
        limits::check_json(&config).map_err(|why| self.unusable(file, why))?;
        serde_json::from_value(config).map_err(|error| self.unusable(file, error))
    }

    /// A network built from the weights of the component in `folder`, which lie in `stem.safetensors`, in
    /// `stem.fp16.safetensors`, or in the parts that `stem.safetensors.index.json` lists.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for files that are missing or damaged, and when `build` asks for tensors that are not
    /// there, or of another shape, or leaves some out.
    pub fn load<T>(
        &self,
        folder: &str,
        stem: &str,
        weights: impl Into<WeightType>,
        device: &Device,
        build: impl FnOnce(VarBuilder<'static>) -> Result<T>,
    ) -> Result<T> {
        self.build([folder, stem], Loading { weights: weights.into(), device, only_check: false }, build)
    }

    /// Checks the weights as [`ModelFiles::load`] does, and keeps none: what `build` is given is all zeros.
    pub fn check<T>(
        &self,
        folder: &str,
        stem: &str,
        build: impl FnOnce(VarBuilder<'static>) -> Result<T>,
    ) -> Result<()> {
        let (weights, device) = (DType::F32.into(), &Device::Cpu);
        self.build([folder, stem], Loading { weights, device, only_check: true }, build).map(|_| ())
    }

    fn build<T>(
        &self,
        [folder, stem]: [&str; 2],
        Loading { weights: WeightType { dtype, halves }, device, only_check }: Loading,
        build: impl FnOnce(VarBuilder<'static>) -> Result<T>,
    ) -> Result<T> {
        let (file, weights) = self.weights(folder, stem)?;
        let names = weights.names();
        let ledger = Arc::new(Ledger { weights, only_check, halves, ..Ledger::default() });
        let vb = VarBuilder::from_backend(Box::new(Entries(ledger.clone())), dtype, device.clone());
        let built = build(vb).map_err(|error| self.unusable(&file, format!("{error:#}")))?;
        let asked = ledger.asked.lock().expect("no thread panics while it holds the names");
        let missing: Vec<&String> = asked.difference(&names).collect();
        if !missing.is_empty() {
            return Err(self.unusable(&file, format!("{} missing", list(&missing))));
        }
        // Old transformers stored the numbers 0, 1, 2, … of the positions.
        let unused: Vec<&String> =
            names.difference(&asked).filter(|name| !name.ends_with("position_ids")).collect();
        if !unused.is_empty() {
            return Err(self.unusable(
                &file,
                format!("{} of no use to the network that `config.json` describes", list(&unused)),
            ));
        }
        Ok(built)
    }

    /// All tensors of a component by name, as stored.
    pub fn tensors(&self, folder: &str, stem: &str) -> Result<HashMap<String, Tensor>> {
        let (file, weights) = self.weights(folder, stem)?;
        weights
            .names()
            .into_iter()
            .map(|name| Ok((name.clone(), weights.load(&name, None)?)))
            .collect::<candle_core::Result<_>>()
            .map_err(|error| self.unusable(&file, error))
    }

    /// A component's tensors, to be read one by one.
    pub fn reader(&self, folder: &str, stem: &str) -> Result<TensorReader<'_>> {
        let (file, weights) = self.weights(folder, stem)?;
        Ok(TensorReader { files: self, file, weights })
    }

    /// F16 where the tensor `name` is stored so and `device` is the CPU, whose products widen it as they read it; else F32.
    /// (Products with weights of bf16 would round what they multiply.)
    pub fn narrow_dtype(&self, stem: &str, name: &str, device: &Device) -> DType {
        // Loading the file reports what is wrong with it.
        let narrow = || self.weights("", stem).is_ok_and(|(_, weights)| weights.is_half(name));
        if device.is_cpu() && narrow() { DType::F16 } else { DType::F32 }
    }

    /// SHA-256 of a component's weights, in hexadecimal; of the whole file where the model is one file. That of a large
    /// file on disk is remembered, see [`hashes`].
    pub fn sha256(&self, folder: &str, stem: &str) -> Result<String> {
        match self {
            Self::Assembled(model) => sha256::remembered(std::slice::from_ref(&model.file)),
            Self::Folder(path) => {
                let parts: Vec<PathBuf> =
                    self.weight_files(folder, stem)?.1.iter().map(|part| path.join(part)).collect();
                sha256::remembered(&parts)
            }
            Self::BuiltIn { dir, .. } => {
                let mut hash = Sha256::new();
                for part in self.weight_files(folder, stem)?.1 {
                    hash.update(self.embedded(dir, &part)?);
                }
                Ok(sha256::in_hex(hash))
            }
        }
    }

    /// The file that stands for a component's weights in messages, and the files that they lie in.
    pub fn weight_files(&self, folder: &str, stem: &str) -> Result<(String, BTreeSet<String>)> {
        let place =
            |file: &str| if folder.is_empty() { file.to_string() } else { format!("{folder}/{file}") };
        for variant in ["", ".fp16"] {
            let whole = place(&format!("{stem}{variant}.safetensors"));
            if self.exists(&whole) {
                return Ok((whole.clone(), BTreeSet::from([whole])));
            }
            let index = place(&format!("{stem}.safetensors.index{variant}.json"));
            if self.exists(&index) {
                let parts = self.json::<ShardIndex>(&index)?.weight_map;
                if let Some(name) = parts.values().find(|name| name.contains(['/', '\\'])) {
                    return Err(self.unusable(&index, format!("the part `{name}` lies outside the folder")));
                }
                return Ok((index, parts.values().map(|file| place(file)).collect()));
            }
        }
        let pickle = ["diffusion_pytorch_model.bin", "pytorch_model.bin"].map(place);
        let pickle = pickle.into_iter().find(|file| self.exists(file));
        let whole = place(&format!("{stem}.safetensors"));
        Err(match pickle {
            Some(file) => self.unusable(&file, PICKLED_FOLDER),
            None => self.unusable(&whole, "no such file"),
        })
    }

    fn weights(&self, folder: &str, stem: &str) -> Result<(String, Weights)> {
        if let Self::Assembled(model) = self {
            let part = Stored::open(&model.file).map_err(|error| self.unusable(folder, error))?;
            let places = model.tensors.get(folder).cloned().unwrap_or_default();
            return Ok((folder.to_string(), Weights { parts: vec![part], places: Some(places) }));
        }
        let (file, names) = self.weight_files(folder, stem)?;
        let mut parts = Vec::new();
        for name in &names {
            let opened = match self {
                Self::BuiltIn { dir, .. } => Stored::in_program(self.embedded(dir, name)?),
                Self::Folder(path) => Stored::open(&path.join(name)),
                Self::Assembled(model) => Stored::open(&model.file),
            };
            parts.push(opened.map_err(|error| self.unusable(name, error))?);
        }
        Ok((file, Weights { parts, places: None }))
    }

    /// An error about one of the files.
    pub fn unusable(&self, file: &str, why: impl std::fmt::Display) -> anyhow::Error {
        match self {
            Self::Folder(path) => Failure::unusable(&path.join(file), why),
            Self::BuiltIn { name, .. } => Failure::unusable(Path::new(&format!("{name}:{file}")), why),
            Self::Assembled(model) => {
                Failure::unusable(Path::new(&format!("{}:{file}", model.file.display())), why)
            }
        }
    }
}

/// `3 tensors are`, with the first few names.
fn list(names: &[&String]) -> String {
    let shown: Vec<String> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
    match names.len() {
        1 => format!("the tensor {} is", shown[0]),
        n if n <= shown.len() => format!("the tensors {} are", shown.join(", ")),
        n => format!("{n} tensors ({}, …) are", shown.join(", ")),
    }
}

/// Writes the component `folder` of the model in `root`: `config.json` and `stem.safetensors`, each whole or not
/// at all. `weights` are stored as `dtype`.
pub fn save_component(
    root: &Path,
    folder: &str,
    stem: &str,
    config: &Value,
    weights: &BTreeMap<String, Tensor>,
    dtype: DType,
) -> Result<()> {
    let folder = root.join(folder);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let mut stored = BTreeMap::new();
    for (name, tensor) in weights {
        stored.insert(name, tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?.contiguous()?);
    }
    // transformers refuses files that do not say which framework's layout they have.
    let layout = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(stored, Some(layout)).context("cannot serialise the weights")?;
    write_whole(&folder.join(format!("{stem}.safetensors")), &bytes)?;
    save_json(&folder.join("config.json"), config)
}

/// Writes a JSON file as diffusers does: indented by two, with a line end.
pub fn save_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).context("cannot serialise a config")?;
    text.push('\n');
    write_whole(path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(names: &[&str]) -> (tempfile::TempDir, ModelFiles) {
        let root = tempfile::tempdir().unwrap();
        let one = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let weights = names.iter().map(|name| ((*name).to_string(), one.clone())).collect();
        let config = serde_json::json!({ "_class_name": "Two", "width": 3 });
        save_component(root.path(), "part", "model", &config, &weights, DType::F16).unwrap();
        let files = ModelFiles::folder(root.path()).unwrap();
        (root, files)
    }

    fn load(files: &ModelFiles, names: &[&str]) -> Result<Vec<Tensor>> {
        files.load("part", "model", DType::F32, &Device::Cpu, |vb| {
            names.iter().map(|name| Ok(vb.get((2, 3), name)?)).collect()
        })
    }

    #[test]
    fn saved_weights_and_configs_come_back() {
        let (_root, files) = saved(&["a", "b"]);
        let tensors = load(&files, &["a", "b"]).unwrap();
        assert_eq!(tensors[0].to_vec2::<f32>().unwrap(), [[1.0; 3]; 2]);
        let config: BTreeMap<String, usize> = files.config("part/config.json").unwrap();
        assert_eq!(config, BTreeMap::from([("width".to_string(), 3)]));
        assert_eq!(files.tensors("part", "model").unwrap()["a"].dtype(), DType::F16);
    }

    #[test]
    fn missing_unused_and_misshapen_tensors_are_named() {
        let (_root, files) = saved(&["a", "b"]);
        let message = |names: &[&str]| format!("{:#}", load(&files, names).unwrap_err());
        assert!(message(&["a", "b", "c", "d"]).contains("the tensors `c`, `d` are missing"));
        assert!(message(&["a"]).contains("the tensor `b` is of no use"));
        let wrong =
            files.load("part", "model", DType::F32, &Device::Cpu, |vb| Ok(vb.get((3, 2), "a")?)).unwrap_err();
        assert!(format!("{wrong:#}").contains("`a` has shape [2, 3], wanted [3, 2]"), "{wrong:#}");
        assert!(wrong.chain().any(|cause| cause.is::<Failure>()));
    }

    #[test]
    fn weights_in_parts_or_in_half_precision_are_found() {
        let (root, files) = saved(&["a", "b"]);
        let at = |name: &str| root.path().join("part").join(name);
        std::fs::rename(at("model.safetensors"), at("model.fp16.safetensors")).unwrap();
        assert_eq!(load(&files, &["a", "b"]).unwrap().len(), 2);
        std::fs::remove_file(at("model.fp16.safetensors")).unwrap();

        for (name, value) in [("a", 1f32), ("b", 2.0)] {
            let tensor = Tensor::full(value, (2, 3), &Device::Cpu).unwrap();
            let weights = HashMap::from([(name, tensor)]);
            candle_core::safetensors::save(&weights, at(&format!("{name}.safetensors"))).unwrap();
        }
        let index = |map: Value, variant: &str| {
            let name = format!("model.safetensors.index{variant}.json");
            std::fs::write(at(&name), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        };
        for variant in [".fp16", ""] {
            index(serde_json::json!({ "a": "a.safetensors", "b": "b.safetensors" }), variant);
            let tensors = load(&files, &["a", "b"]).unwrap();
            assert_eq!(tensors[1].to_vec2::<f32>().unwrap(), [[2.0; 3]; 2]);
        }
        let message = |files: &ModelFiles| format!("{:#}", load(files, &["a", "b"]).unwrap_err());
        index(serde_json::json!({ "a": "a.safetensors", "b": "../b.safetensors" }), "");
        assert!(message(&files).contains("outside the folder"), "{}", message(&files));
        index(serde_json::json!({ "a": "a.safetensors", "b": "c.safetensors" }), "");
        assert!(message(&files).contains("c.safetensors"), "{}", message(&files));
    }

    #[test]
    fn a_damaged_config_is_told_with_file_and_line() {
        let (root, files) = saved(&["a"]);
        std::fs::write(root.path().join("part/config.json"), "{\n \"width\": x\n}").unwrap();
        let message =
            format!("{:#}", files.config::<BTreeMap<String, usize>>("part/config.json").unwrap_err());
        assert!(message.contains("part/config.json") && message.contains("line 2"), "{message}");
    }
}
