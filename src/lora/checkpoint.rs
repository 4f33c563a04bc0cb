//! LoRAs merged into a model's weight files.
//!
//! Each weight file is written anew with the same names, shapes and number types, so that one file stays one file and
//! a folder keeps its parts. Tensors pass one by one: however large the model is, memory holds one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::Tensor;
use safetensors::tensor::View;

use super::adapter::Adapter;
use super::weighted_file::WeightedFile;
use super::{LoraError, apply, metadata};
use crate::failure::Failure;
use crate::files;
use crate::progress;
use crate::weights::assembled::Form;
use crate::weights::header::{Entry, Header, Storage};
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS};

/// LoRAs that fit a base, ready to be merged into it.
pub struct Merge<'a> {
    base: &'a ModelFiles,
    files: Vec<WeightFile>,
    loras: &'a [WeightedFile],
    /// Layers of the base that change.
    pub modules: usize,
    /// Layers of each LoRA for which the base has no place, in the order of the LoRAs.
    pub left_out: Vec<Vec<String>>,
}

impl<'a> Merge<'a> {
    /// Reads the headers of the base's weight files, and checks every LoRA against them before anything is written.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a LoRA that is made for another base, and for weights of fewer than 16 bits.
    pub fn new(base: &'a ModelFiles, loras: &'a [WeightedFile]) -> Result<Self> {
        let files = weight_files(base)?;
        let (modules, left_out) = check(&files, loras)?;
        Ok(Self { base, files, loras, modules, left_out })
    }

    /// Writes the base with all LoRAs to `out`, a new folder, or a file where the base is one; returns the time that
    /// the merging took without reading and writing.
    ///
    /// # Errors
    /// Files that cannot be read or written; nothing is left half-written.
    pub fn write(&self, out: &Path) -> Result<Duration> {
        let mut merging = Duration::ZERO;
        match self.base {
            ModelFiles::Assembled(_) => {
                let tensors = self.files.iter().map(|file| file.header.tensors.len() as u64).sum();
                let bar = progress::bar(tensors, "merging");
                for file in &self.files {
                    files::write_with(out, |to| self.write_file(file, to, &bar, &mut merging))?;
                }
                bar.finish_and_clear();
            }
            _ => self.write_folder(out, &mut merging)?,
        }
        Ok(merging)
    }

    /// What the LoRAs change of a layer, each with its weight there.
    fn of(&self, module: &str) -> Vec<(&'a Adapter, f64)> {
        let adapter =
            |lora: &'a WeightedFile| Some((lora.adapters.modules.get(module)?, lora.weights.of(module)));
        self.loras.iter().filter_map(adapter).collect()
    }

    /// `anna.safetensors:0.7, …`, for the metadata.
    fn recipe(&self) -> String {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let recipe = |lora: &WeightedFile| format!("{}:{}", name(&lora.path), lora.weight);
        self.loras.iter().map(recipe).collect::<Vec<_>>().join(", ")
    }

    /// Writes a weight file with all changes of it.
    fn write_file(
        &self,
        file: &WeightFile,
        to: &mut File,
        bar: &indicatif::ProgressBar,
        merging: &mut Duration,
    ) -> Result<()> {
        let mut header = file.header.clone();
        // The hash is that of other bytes now.
        header.metadata.remove(metadata::DATA_HASH);
        header.metadata.insert(metadata::MERGED.into(), self.recipe());
        to.write_all(&header.to_bytes())?;
        let mut from = file.bytes.open()?;
        for entry in &file.header.tensors {
            progress::check()?;
            match self.merged_weight(file, entry, &mut from, merging)? {
                Some(tensor) => to.write_all(&View::data(&&tensor))?,
                None => {
                    let place = file.header.place(entry);
                    from.seek(SeekFrom::Start(place.start))?;
                    std::io::copy(&mut from.by_ref().take(place.end - place.start), to)?;
                }
            }
            bar.inc(1);
        }
        Ok(())
    }

    /// A tensor with all changes of the layers that lie in it, where there are some.
    fn merged_weight(
        &self,
        file: &WeightFile,
        entry: &Entry,
        from: &mut Box<dyn Source>,
        merging: &mut Duration,
    ) -> Result<Option<Tensor>> {
        let mut changed: Option<Tensor> = None;
        for target in file.places.get(&entry.key).into_iter().flatten() {
            let adapters = self.of(&target.module);
            if adapters.is_empty()
                || (!target.is_weight && adapters.iter().all(|(adapter, _)| adapter.bias.is_none()))
            {
                continue;
            }
            let stored = match changed.take() {
                Some(tensor) => tensor,
                None => file.header.load(from, entry)?,
            };
            let begin = Instant::now();
            let part = target.form.take(stored.clone())?;
            let bias = if target.is_weight { None } else { apply::bias_delta(Some(&part), &adapters)? };
            let part = match bias {
                _ if target.is_weight => apply::merged_weight(&part, &adapters)?,
                Some(adapter) => apply::merged_bias(&part, &adapter)?,
                None => part,
            };
            changed = Some(target.form.put(&stored, part)?);
            *merging += begin.elapsed();
        }
        Ok(changed)
    }

    /// Writes a whole folder: under another name beside `out` first, which is taken at the end.
    fn write_folder(&self, out: &Path, merging: &mut Duration) -> Result<()> {
        let touched = |file: &&WeightFile| {
            let mut targets = file.places.values().flatten();
            targets.any(|target| !self.of(&target.module).is_empty())
        };
        let changed: Vec<&WeightFile> = self.files.iter().filter(touched).collect();
        let beside =
            files::temporary_folder(out).with_context(|| format!("cannot make `{}`", out.display()))?;
        for name in file_names(self.base)? {
            progress::check()?;
            let target = beside.path().join(&name);
            let folder = files::folder_of(&target);
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
            if changed.iter().any(|file| file.name == name) {
                continue;
            }
            match self.base {
                ModelFiles::Folder(root) => {
                    std::fs::copy(root.join(&name), &target)
                        .with_context(|| format!("cannot copy `{name}`"))?;
                }
                _ => files::write_whole(&target, &self.base.read(&name)?)?,
            }
        }
        let bar = progress::bar(changed.iter().map(|file| file.header.tensors.len() as u64).sum(), "merging");
        for file in changed {
            files::write_with(&beside.path().join(&file.name), |to| {
                self.write_file(file, to, &bar, merging)
            })?;
        }
        bar.finish_and_clear();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(beside.path(), std::fs::Permissions::from_mode(0o755))?;
        }
        std::fs::rename(beside.path(), out).with_context(|| format!("cannot write `{}`", out.display()))?;
        // Its place is taken; there is nothing left to remove.
        let _ = beside.keep();
        Ok(())
    }
}

/// One weight file of a base.
struct WeightFile {
    /// Its path in the base's folder.
    name: String,
    bytes: Bytes,
    header: Header,
    /// What a LoRA can change in it, by the key of the tensor that it lies in.
    places: BTreeMap<String, Vec<Target>>,
}

enum Bytes {
    OnDisk(PathBuf),
    InProgram(&'static [u8]),
}

/// The weight or the bias of a layer.
struct Target {
    module: String,
    is_weight: bool,
    form: Form,
}

trait Source: Read + Seek {}
impl<T: Read + Seek> Source for T {}

impl Bytes {
    fn open(&self) -> Result<Box<dyn Source>> {
        Ok(match self {
            Self::OnDisk(path) => Box::new(File::open(path).map_err(|error| Failure::unusable(path, error))?),
            Self::InProgram(bytes) => Box::new(Cursor::new(*bytes)),
        })
    }
}

/// All weight files of a base, with the layers that lie in them.
fn weight_files(base: &ModelFiles) -> Result<Vec<WeightFile>> {
    let open = |name: &str, bytes: Bytes| -> Result<WeightFile> {
        let header = Header::read(&mut bytes.open()?).map_err(|error| base.unusable(name, error))?;
        Ok(WeightFile { name: name.to_string(), bytes, header, places: BTreeMap::new() })
    };
    let mut files = Vec::new();
    if let ModelFiles::Assembled(model) = base {
        files.push(open("", Bytes::OnDisk(model.file.clone()))?);
    }
    for (folder, stem, prefix) in COMPONENTS {
        if !base.exists(&format!("{folder}/config.json")) {
            continue;
        }
        if let ModelFiles::Assembled(model) = base {
            for (name, place) in model.tensors.get(folder).into_iter().flatten() {
                if let Some((module, is_weight)) = module_of(prefix, name) {
                    let target = Target { module, is_weight, form: place.form };
                    files[0].places.entry(place.stored.clone()).or_default().push(target);
                }
            }
            continue;
        }
        for name in base.weight_files(folder, stem)?.1 {
            let bytes = match base {
                ModelFiles::Folder(root) => Bytes::OnDisk(root.join(&name)),
                _ => Bytes::InProgram(base.built_in_bytes(&name)?),
            };
            let mut file = open(&name, bytes)?;
            for entry in &file.header.tensors {
                if let Some((module, is_weight)) = module_of(prefix, &entry.key) {
                    let target = Target { module, is_weight, form: Form::Whole };
                    file.places.entry(entry.key.clone()).or_default().push(target);
                }
            }
            files.push(file);
        }
    }
    Ok(files)
}

/// Checks that every LoRA is made for this base. Returns how many layers change, and the layers of each LoRA that have
/// no place.
fn check(files: &[WeightFile], loras: &[WeightedFile]) -> Result<(usize, Vec<Vec<String>>)> {
    let mut shapes = BTreeMap::new();
    let mut biased = BTreeSet::new();
    for file in files {
        for entry in &file.header.tensors {
            for target in file.places.get(&entry.key).into_iter().flatten() {
                if target.is_weight {
                    shapes.insert(&target.module, (target.form.shape(&entry.shape), file, entry));
                } else {
                    biased.insert(&target.module);
                }
            }
        }
    }
    let mut matched = BTreeSet::new();
    let mut left_out = Vec::new();
    for lora in loras {
        let refuse = |error: LoraError| Err(Failure::unusable(&lora.path, error));
        let mut missing = Vec::new();
        for (module, adapter) in &lora.adapters.modules {
            let Some((shape, file, entry)) = shapes.get(module) else {
                missing.push(module.clone());
                continue;
            };
            if !adapter.fits(shape) {
                let (lora, model) = (adapter.target(), shape.clone());
                return refuse(LoraError::Size { module: module.clone(), lora, model, guess: None });
            }
            if adapter.bias.is_some() && !biased.contains(module) {
                let why = format!(
                    "it changes the bias of `{module}`, and the base has none to add it to; load it with \
                     `difflora gen --lora` instead"
                );
                return Err(Failure::unusable(&lora.path, why));
            }
            if !matches!(entry.storage, Storage::F64 | Storage::F32 | Storage::F16 | Storage::BF16) {
                let place = if file.name.is_empty() {
                    entry.key.clone()
                } else {
                    format!("{}: {}", file.name, entry.key)
                };
                let why = format!(
                    "`{place}` of the base is stored as {}; LoRAs are merged into numbers of 16 bits or more",
                    entry.storage.name()
                );
                return Err(Failure::Unusable(why).into());
            }
            matched.insert(module);
        }
        if missing.len() == lora.adapters.modules.len() {
            return refuse(LoraError::NoPlace { count: missing.len(), modules: missing, guess: None });
        }
        left_out.push(missing);
    }
    Ok((matched.len(), left_out))
}

/// All files of a model's folder.
fn file_names(base: &ModelFiles) -> Result<Vec<String>> {
    let mut names = Vec::new();
    match base {
        ModelFiles::Folder(root) => list_folder(root, root, &mut names)?,
        ModelFiles::BuiltIn { dir, .. } => {
            let mut folders = vec![*dir];
            while let Some(folder) = folders.pop() {
                folders.extend(folder.dirs());
                let paths = folder.files().filter_map(|file| file.path().strip_prefix(dir.path()).ok());
                names.extend(paths.map(|path| path.to_string_lossy().into_owned()));
            }
        }
        ModelFiles::Assembled(_) => {}
    }
    Ok(names)
}

fn list_folder(root: &Path, folder: &Path, names: &mut Vec<String>) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|error| Failure::unusable(folder, error))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            list_folder(root, &path, names)?;
        } else if let Ok(name) = path.strip_prefix(root) {
            names.push(name.to_string_lossy().replace('\\', "/"));
        }
    }
    Ok(())
}

/// Components that LoRAs change: folder, weight file, and what module paths begin with.
pub(super) const COMPONENTS: [(&str, &str, &str); 3] = [
    ("unet", DIFFUSERS_WEIGHTS, ""),
    ("text_encoder", TRANSFORMERS_WEIGHTS, "text_encoder."),
    ("text_encoder_2", TRANSFORMERS_WEIGHTS, "text_encoder_2."),
];

/// The module whose weight or bias a tensor is, and whether it is the weight.
pub(super) fn module_of(prefix: &str, name: &str) -> Option<(String, bool)> {
    let (path, is_weight) = match (name.strip_suffix(".weight"), name.strip_suffix(".bias")) {
        (Some(path), _) => (path, true),
        (_, Some(path)) => (path, false),
        _ => return None,
    };
    // transformers 5 leaves `text_model.` out.
    let bare = !prefix.is_empty() && !path.starts_with("text_model.") && path != "text_projection";
    Some((format!("{prefix}{}{path}", if bare { "text_model." } else { "" }), is_weight))
}
