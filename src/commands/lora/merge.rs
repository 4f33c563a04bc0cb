//! `difflora lora merge --base`: LoRAs into a model's weights, for good.
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
use serde_json::json;

use crate::commands::lora::{COMPONENTS, Given, module_of, tell};
use crate::failure::Failure;
use crate::files;
use crate::lora::adapter::Adapter;
use crate::lora::apply;
use crate::lora::metadata;
use crate::lora::{LoraError, listed_for_user};
use crate::output::Output;
use crate::progress;
use crate::weights::header::{Entry, Header, Storage};
use crate::weights::model_folder::{Form, ModelFiles};

/// Writes `base` with all `loras`, whose reading began at `begin`, to `out`: a folder for a folder, a file for a file.
pub(super) fn run(
    base: &ModelFiles,
    loras: &[Given],
    begin: Instant,
    out: &Path,
    output: &Output,
) -> Result<()> {
    let read = begin.elapsed();
    check_target(base, out)?;
    let files = weight_files(base)?;
    let matched = check(&files, loras)?;
    let names = loras.iter().map(|lora| lora.path.file_name().unwrap_or_default().to_string_lossy());
    let merge = Merge {
        loras,
        recipe: names
            .zip(loras)
            .map(|(name, lora)| format!("{name}:{}", lora.weight))
            .collect::<Vec<_>>()
            .join(", "),
    };
    let mut spent = Duration::ZERO;
    match base {
        ModelFiles::Assembled(_) => {
            let bar =
                progress::bar(files.iter().map(|file| file.header.tensors.len() as u64).sum(), "merging");
            for file in &files {
                files::write_with(out, |to| merge.write(file, to, &bar, &mut spent))?;
            }
            bar.finish_and_clear();
        }
        _ => merge.write_folder(base, &files, out, &mut spent)?,
    }
    let kind = if matches!(base, ModelFiles::Assembled(_)) { "file" } else { "folder" };
    let mut told = json!({ kind: out.display().to_string(), "modules": matched });
    if output.json {
        let lora = |lora: &Given| json!({ "file": lora.path.display().to_string(), "weight": lora.weight, "modules": lora.adapters.modules.len() });
        told["loras"] = loras.iter().map(lora).collect();
        // Reading the LoRAs, adding them up in memory, and all of it with reading and writing of the model.
        let [loras, merging, all] = [read, spent, begin.elapsed()].map(|time| time.as_secs_f64());
        told["seconds"] = json!({ "loras": loras, "merging": merging, "all": all });
    }
    tell(&told, output)
}

/// The result of a file is a file, that of a folder a new folder.
fn check_target(base: &ModelFiles, out: &Path) -> Result<()> {
    let is_file = out.extension().is_some_and(|kind| kind == "safetensors");
    let refuse = |why: String| Err(Failure::Usage(format!("--out `{}`: {why}", out.display())).into());
    match base {
        ModelFiles::Assembled(_) if !is_file => {
            refuse("the base is one file, and so is the result; name it NAME.safetensors".into())
        }
        ModelFiles::Assembled(_) => files::check_writable(out),
        _ if is_file => refuse("the base is a folder, and so is the result; name a folder".into()),
        _ if out.exists() => refuse("it exists already; name a folder that does not, or remove it".into()),
        _ if !files::folder_of(out).is_dir() => {
            refuse(format!("there is no folder `{}`; make it first", files::folder_of(out).display()))
        }
        _ => Ok(()),
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

/// Makes sure that every LoRA is made for this base before anything is written; gives how many layers are changed.
fn check(files: &[WeightFile], loras: &[Given]) -> Result<usize> {
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
                    "it changes the bias of `{module}`, and the base has none to add it to; draw with it by \
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
        if !missing.is_empty() {
            progress::warn(format_args!(
                "{} layers of `{}` have no place in this base and are left out: {}",
                missing.len(),
                lora.path.display(),
                listed_for_user(&missing)
            ));
        }
    }
    Ok(matched.len())
}

/// What is merged.
struct Merge<'a> {
    loras: &'a [Given],
    /// `anna.safetensors:0.7, …`, for the metadata.
    recipe: String,
}

impl<'a> Merge<'a> {
    /// What the LoRAs change of a layer, each with its weight there.
    fn of(&self, module: &str) -> Vec<(&'a Adapter, f64)> {
        let adapter = |lora: &'a Given| Some((lora.adapters.modules.get(module)?, lora.weights.of(module)));
        self.loras.iter().filter_map(adapter).collect()
    }

    /// Writes a weight file with all changes of it.
    fn write(
        &self,
        file: &WeightFile,
        to: &mut File,
        bar: &indicatif::ProgressBar,
        spent: &mut Duration,
    ) -> Result<()> {
        let mut header = file.header.clone();
        // The hash is that of other bytes now.
        header.metadata.remove(metadata::DATA_HASH);
        header.metadata.insert(metadata::MERGED.into(), self.recipe.clone());
        to.write_all(&header.to_bytes())?;
        let mut from = file.bytes.open()?;
        for entry in &file.header.tensors {
            progress::check()?;
            match self.merged_weight(file, entry, &mut from, spent)? {
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
        spent: &mut Duration,
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
            let part = match apply::bias_delta(&adapters)? {
                _ if target.is_weight => apply::merged_weight(&part, &adapters)?,
                Some(adapter) => apply::merged_bias(&part, &adapter)?,
                None => part,
            };
            changed = Some(target.form.put(&stored, part)?);
            *spent += begin.elapsed();
        }
        Ok(changed)
    }

    /// Writes a whole folder: under another name beside `out` first, which is taken at the end.
    fn write_folder(
        &self,
        base: &ModelFiles,
        files: &[WeightFile],
        out: &Path,
        spent: &mut Duration,
    ) -> Result<()> {
        let touched = |file: &&WeightFile| {
            let mut targets = file.places.values().flatten();
            targets.any(|target| !self.of(&target.module).is_empty())
        };
        let changed: Vec<&WeightFile> = files.iter().filter(touched).collect();
        let beside =
            tempfile::Builder::new().prefix(&files::temporary_prefix()).tempdir_in(files::folder_of(out));
        let beside = beside.with_context(|| format!("cannot make `{}`", out.display()))?;
        for name in file_names(base)? {
            progress::check()?;
            let target = beside.path().join(&name);
            let folder = files::folder_of(&target);
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
            if changed.iter().any(|file| file.name == name) {
                continue;
            }
            match base {
                ModelFiles::Folder(root) => {
                    std::fs::copy(root.join(&name), &target)
                        .with_context(|| format!("cannot copy `{name}`"))?;
                }
                _ => files::write_whole(&target, &base.read(&name)?)?,
            }
        }
        let bar = progress::bar(changed.iter().map(|file| file.header.tensors.len() as u64).sum(), "merging");
        for file in changed {
            files::write_with(&beside.path().join(&file.name), |to| self.write(file, to, &bar, spent))?;
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
