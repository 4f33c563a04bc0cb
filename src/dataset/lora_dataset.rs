//! A dataset folder: LoRA vectors on disk, embeddings as tensors, by split.
//!
//! A hundred thousand LoRAs do not fit in memory: [`Vectors`] reads rows on demand and caches them up to a limit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Tensor;

use crate::dataset::embeddings::read_embeddings;
use crate::dataset::manifest::{Header, Row, read_manifest};
use crate::dataset::vectors::{Reader, Vectors, block_layout, layout_of};
use crate::failure::Failure;
use crate::lora::canonical::{Canonical, Form};
use crate::lora::file;
use crate::lora::layout::LoraLayout;
use crate::progress;
use crate::threads::in_threads;
use crate::weights::model_folder::ModelFiles;

/// A dataset folder of `build-dataset`.
pub struct LoraDataset {
    /// Base, encoders, layout without its `down`s.
    pub header: Header,
    /// With its shared `down`s.
    pub layout: LoraLayout,
    /// Canonical form of the factors.
    pub form: Form,
    /// Hash of the settings that all rows were made with.
    pub settings_hash: String,
    /// People to train on.
    pub train: Split,
    /// People to evaluate on.
    pub held_out: Split,
}

/// M people.
pub struct Split {
    /// Their LoRA vectors, M rows of P values.
    pub vectors: Vectors,
    /// Face embeddings (R, F): every reference image of every person.
    pub faces: Tensor,
    /// Image embeddings (R, I) of the same images.
    pub images: Tensor,
    /// Of each of these R rows, the person (0 … M − 1).
    pub owners: Vec<usize>,
}

/// How a dataset is read.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Leave people out whose files are missing, with a warning, instead of refusing the dataset.
    pub skip_missing: bool,
    /// Bytes of LoRA vectors that are cached in memory; others are read again each time.
    pub memory: usize,
    /// Canonical form of the factors.
    pub form: FormWanted,
}

/// Which [`Form`] a dataset is read in.
#[derive(Clone, Debug)]
pub enum FormWanted {
    /// A new one, with the first training person as the reference.
    New(Canonical),
    /// That of an autoencoder.
    Of(Form),
}

impl Default for ReadOptions {
    /// Two gigabytes, factors as they are.
    fn default() -> Self {
        Self { skip_missing: false, memory: 2 << 30, form: FormWanted::New(Canonical::None) }
    }
}

/// Minimum number of people to train on: PCA and ridge regression would fit fewer exactly.
pub const FEWEST: usize = 16;

impl LoraDataset {
    /// Opens the folder, and looks at every LoRA once.
    ///
    /// # Errors
    /// [`Failure::Unusable`] with the files or rows: files that are missing; LoRAs of other modules, ranks or alphas
    /// or with values that are not finite; rows of several settings; fewer than 16 people to learn from or none held
    /// out. [`Failure::Usage`] for a canonical form where `A` is shared.
    pub fn open(folder: &Path, options: &ReadOptions) -> Result<Self> {
        let files = ModelFiles::folder(folder)?;
        let header = Header::read(folder)?;
        let unusable = |why: String| files.unusable("manifest.jsonl", why);
        let rows = present(folder, read_manifest(folder)?, options.skip_missing).map_err(unusable)?;
        let settings_hash = one_settings_hash(&rows).map_err(unusable)?;
        if let Some(row) = rows.iter().find(|row| !["train", "held-out"].contains(&row.split.as_str())) {
            let why = format!("`{}` is in split `{}`, neither `train` nor `held-out`", row.id, row.split);
            return Err(unusable(why));
        }
        let split = |name: &str| -> Vec<&Row> { rows.iter().filter(|row| row.split == name).collect() };
        let (train, held_out) = (split("train"), split("held-out"));
        if train.len() < FEWEST || held_out.is_empty() {
            return Err(unusable(format!(
                "{} people to learn from and {} held out; at least {FEWEST} and 1 are needed, build a larger dataset",
                train.len(),
                held_out.len()
            )));
        }
        let first = folder.join(&train[0].lora);
        let (layout, blocks) = match header.layout.clone() {
            Some(layout) => {
                let layout = if layout.shared_down {
                    let downs: BTreeMap<_, _> = files.tensors("", "basis")?.into_iter().collect();
                    let layout = layout.with_shared_down(downs);
                    layout.map_err(|error| files.unusable("basis.safetensors", error))?
                } else {
                    layout
                };
                let paths: Vec<PathBuf> = train.iter().map(|row| folder.join(&row.lora)).collect();
                let blocks = block_layout(&paths, &layout)?;
                (layout, blocks)
            }
            None => layout_of(&first)?,
        };
        let form = match &options.form {
            FormWanted::New(Canonical::None) => Form::default(),
            FormWanted::New(_) if layout.shared_down => {
                let why = "all LoRAs of this dataset share their `down`s, so that nothing can be turned; take \
                           canonical = \"none\"";
                return Err(Failure::Usage(why.into()).into());
            }
            FormWanted::New(kind) => Form::new(*kind, &file::read(&first, &blocks)?)?,
            FormWanted::Of(form) => form.clone(),
        };
        let reader = Reader { layout, blocks, form };
        // The held-out people are few, and read once.
        let memory = options.memory.saturating_sub(4 * reader.layout.parameters() * held_out.len());
        let mut mismatches = Mismatches::default();
        let train = Split::read(folder, &train, &reader, memory, &mut mismatches)?;
        let held_out = Split::read(folder, &held_out, &reader, options.memory - memory, &mut mismatches)?;
        mismatches.check().map_err(unusable)?;
        if (train.faces.dim(1)?, train.images.dim(1)?) != (held_out.faces.dim(1)?, held_out.images.dim(1)?) {
            return Err(unusable("the embeddings of the two splits have other widths".into()));
        }
        let Reader { layout, form, .. } = reader;
        let header = Header { layout: Some(layout.clone()), ..header };
        Ok(Self { header, layout, form, settings_hash, train, held_out })
    }
}

/// The rows whose files are there.
fn present(folder: &Path, rows: Vec<Row>, skip_missing: bool) -> Result<Vec<Row>, String> {
    let gone = |row: &Row| -> Option<String> {
        [&row.lora, &row.embeddings].into_iter().find(|file| !folder.join(file).exists()).cloned()
    };
    let (mut kept, mut missing) = (Vec::with_capacity(rows.len()), Vec::new());
    for row in rows {
        match gone(&row) {
            Some(file) => missing.push(file),
            None => kept.push(row),
        }
    }
    if missing.is_empty() {
        return Ok(kept);
    }
    let list = some_of(&missing);
    if !skip_missing {
        return Err(format!(
            "files of {} people are missing: {list}; --skip-missing goes on without them",
            missing.len()
        ));
    }
    progress::warn(format_args!("{} people are left out, whose files are missing: {list}", missing.len()));
    Ok(kept)
}

/// Up to ten names, and how many more there are.
fn some_of(names: &[String]) -> String {
    let some = names.iter().take(10).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > 10 { format!("{some} and {} more", names.len() - 10) } else { some }
}

/// LoRAs that do not belong with the others, by what is wrong with them.
#[derive(Default)]
struct Mismatches(BTreeMap<String, Vec<String>>);

impl Mismatches {
    fn check(self) -> Result<(), String> {
        if self.0.is_empty() {
            return Ok(());
        }
        let list: String = self.0.iter().map(|(why, rows)| format!("\n  {}: {why}", some_of(rows))).collect();
        Err(format!("these rows do not belong with the others, take them out of the manifest:{list}"))
    }
}

/// The settings of all rows, or which rows differ.
fn one_settings_hash(rows: &[Row]) -> Result<String, String> {
    let mut by_hash: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for row in rows {
        by_hash.entry(&row.settings).or_default().push(&row.id);
    }
    if by_hash.len() > 1 {
        let list = |(settings_hash, ids): (&&str, &Vec<&str>)| {
            let some = ids.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            format!(
                "\n  {settings_hash}: {some}{}",
                if ids.len() > 5 { format!(" and {} more", ids.len() - 5) } else { String::new() }
            )
        };
        let list: String = by_hash.iter().map(list).collect();
        return Err(format!("its rows were made with several settings, keep one:{list}"));
    }
    Ok(by_hash.keys().next().copied().unwrap_or_default().to_string())
}

impl Split {
    fn read(
        folder: &Path,
        rows: &[&Row],
        reader: &Reader,
        memory: usize,
        mismatches: &mut Mismatches,
    ) -> Result<Self> {
        let files = rows.iter().map(|row| folder.join(&row.lora)).collect();
        let vectors = Vectors::new(files, reader.clone(), memory);
        let bar = progress::bar(rows.len() as u64, "LoRAs");
        let people = in_threads(rows.len(), |i| {
            progress::check()?;
            bar.inc(1);
            // A file that cannot be read at all stands in the list too.
            let why = vectors.row(i).err().map(|error| format!("{error:#}"));
            Ok((why, read_embeddings(folder, rows[i])?))
        })?;
        bar.finish_and_clear();
        let mut owners = Vec::new();
        let (mut faces, mut images) = (Vec::<Tensor>::new(), Vec::<Tensor>::new());
        for (i, (row, (why, (face, image)))) in rows.iter().zip(people).enumerate() {
            if let Some(why) = why {
                // The reason without the path, so that rows with the same one stand together.
                let path = format!("cannot use `{}`: ", vectors.file(i).display());
                let why = why.strip_prefix(&path).unwrap_or(&why).to_string();
                mismatches.0.entry(why).or_default().push(row.id.clone());
            }
            if let (Some(first), Some(other)) = (faces.first(), images.first())
                && (first.dim(1)?, other.dim(1)?) != (face.dim(1)?, image.dim(1)?)
            {
                let why = "its embeddings have other widths than those of the first row";
                return Err(Failure::unusable(&folder.join(&row.embeddings), why));
            }
            owners.extend(std::iter::repeat_n(i, face.dim(0)?));
            faces.push(face);
            images.push(image);
        }
        Ok(Self { vectors, faces: Tensor::cat(&faces, 0)?, images: Tensor::cat(&images, 0)?, owners })
    }

    /// M
    pub fn people(&self) -> usize {
        self.owners.last().map_or(0, |last| last + 1)
    }

    /// The reference rows of each person.
    pub fn references(&self) -> Vec<Vec<u32>> {
        let mut references = vec![Vec::new(); self.people()];
        for (row, owner) in self.owners.iter().enumerate() {
            references[*owner].push(row as u32);
        }
        references
    }

    /// The mean of the rows of each person: (R, …) → (M, …).
    pub fn mean_per_person(&self, references: &Tensor) -> Result<Tensor> {
        let means = self.references().into_iter().map(|rows| -> Result<Tensor> {
            Ok(references.index_select(&Tensor::new(rows, references.device())?, 0)?.mean(0)?)
        });
        Ok(Tensor::stack(&means.collect::<Result<Vec<_>>>()?, 0)?)
    }
}
