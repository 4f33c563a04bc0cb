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
    /// Reads the folder with the default [`ReadOptions`].
    ///
    /// # Errors
    /// As [`LoraDataset::open`].
    #[cfg(test)]
    pub fn read(folder: &Path) -> Result<Self> {
        Self::open(folder, &ReadOptions::default())
    }

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

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device};

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::hypernet::delta_metrics::DeltaSpace;
    use crate::hypernet::pca::Pca;
    use crate::hypernet::row_source::RowSource;
    use crate::lora::file::Format;
    use crate::lora::ldm_keys::BlockLayout;
    use crate::lora::{Lora, LoraLayer};
    use crate::weights::model_id::ModelId;

    const MODULES: [&str; 2] = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    ];
    const RANK: usize = 2;

    /// A dataset of `train` and 12 held-out people: `up` depends linearly on four hidden factors, and so do the
    /// embeddings of two noisy reference images.
    pub fn write_dataset(folder: &Path, train: usize) {
        let random = |stream, shape: &[usize]| normal(21, stream, shape, &Device::Cpu).unwrap();
        for part in ["loras", "embeddings"] {
            std::fs::create_dir_all(folder.join(part)).unwrap();
        }
        let downs: BTreeMap<String, Tensor> =
            MODULES.iter().zip(0..).map(|(name, i)| (name.to_string(), random(i, &[RANK, 6]))).collect();
        safetensors::serialize_to_file(&downs, None, &folder.join("basis.safetensors")).unwrap();
        let (up_map, face_map, image_map) =
            (random(2, &[4, 2 * 8 * RANK]), random(3, &[4, 6]), random(4, &[4, 5]));
        let mut manifest = String::new();
        let mut layout = None;
        for i in 0..train + 12 {
            let factors = random(100 + i as u64, &[1, 4]);
            let ups = factors.matmul(&up_map).unwrap().reshape((2, 8, RANK)).unwrap();
            let layers = MODULES.iter().enumerate().map(|(at, name)| {
                let down = downs[*name].clone();
                (name.to_string(), LoraLayer { down, up: ups.get(at).unwrap(), alpha: 2.0 })
            });
            let lora = Lora { layers: layers.collect(), ..Lora::default() };
            let seen = |map: &Tensor, stream: u64| {
                let clean = factors.matmul(map).unwrap().repeat((2, 1)).unwrap();
                let noise = (random(stream + i as u64, clean.dims()) * 0.05).unwrap();
                (clean + noise).unwrap()
            };
            let embeddings =
                BTreeMap::from([("face", seen(&face_map, 1000)), ("image", seen(&image_map, 2000))]);
            let row = Row {
                id: format!("p{i}"),
                split: if i < train { "train" } else { "held-out" }.into(),
                person: (21, i as u64),
                lora: format!("loras/p{i}.safetensors"),
                embeddings: format!("embeddings/p{i}.safetensors"),
                loss: 0.1,
                settings: "one".into(),
            };
            file::write(&folder.join(&row.lora), &lora, Format::Kohya, &BlockLayout::uniform(2, 1)).unwrap();
            safetensors::serialize_to_file(&embeddings, None, &folder.join(&row.embeddings)).unwrap();
            manifest += &(serde_json::to_string(&row).unwrap() + "\n");
            layout.get_or_insert_with(|| LoraLayout::of(&lora).with_shared_down(downs.clone()).unwrap());
        }
        let id = |name: &str| ModelId { name: name.into(), sha256: format!("{name}0123456789") };
        let header = Header {
            base: id("base"),
            face_encoder: id("face"),
            image_encoder: id("image"),
            image_input: Default::default(),
            layout,
        };
        std::fs::write(folder.join("dataset.json"), serde_json::to_vec(&header).unwrap()).unwrap();
        std::fs::write(folder.join("manifest.jsonl"), manifest).unwrap();
    }

    fn refusal(folder: &Path) -> String {
        let error = LoraDataset::read(folder).err().expect("the dataset is damaged");
        assert!(
            error.chain().any(|cause| matches!(cause.downcast_ref(), Some(Failure::Unusable(_)))),
            "{error:#}"
        );
        format!("{error:#}")
    }

    #[test]
    fn a_dataset_is_read_with_all_references_of_everybody() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(folder.path(), 20);
        let set = LoraDataset::read(folder.path()).unwrap();
        assert_eq!((set.train.vectors.count(), set.train.vectors.width()), (20, 2 * 8 * RANK));
        assert_eq!((set.train.faces.dims(), set.held_out.images.dims()), (&[40, 6][..], &[24, 5][..]));
        assert_eq!(set.held_out.references()[3], [6, 7]);
        let owners = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let each: Vec<u32> = set.held_out.owners.iter().map(|owner| *owner as u32).collect();
        let rows = owners.index_select(&Tensor::new(each, &Device::Cpu).unwrap(), 0).unwrap();
        assert_eq!(
            set.held_out.mean_per_person(&rows).unwrap().to_vec2::<f32>().unwrap(),
            owners.to_vec2::<f32>().unwrap()
        );
    }

    #[test]
    fn no_more_rows_are_kept_than_the_memory_allows() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(folder.path(), 20);
        let whole = LoraDataset::read(folder.path()).unwrap();
        assert_eq!((whole.train.vectors.held(), whole.held_out.vectors.held()), (20, 12));
        let row = 4 * whole.layout.parameters();
        for (memory, held) in [(0, [0, 0]), (12 * row + row / 2, [0, 12]), (17 * row, [5, 12])] {
            let set =
                LoraDataset::open(folder.path(), &ReadOptions { memory, ..ReadOptions::default() }).unwrap();
            let rows = |set: &LoraDataset| set.train.vectors.all().unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(rows(&set), rows(&whole));
            assert_eq!([set.train.vectors.held(), set.held_out.vectors.held()], held);
        }
    }

    /// Writes the LoRA of a row again.
    fn change(folder: &Path, id: &str, work: impl Fn(&mut LoraLayer)) {
        let path = folder.join(format!("loras/{id}.safetensors"));
        let blocks = BlockLayout::uniform(2, 1);
        let mut lora = file::read(&path, &blocks).unwrap();
        lora.layers.values_mut().for_each(work);
        file::write(&path, &lora, Format::Kohya, &blocks).unwrap();
    }

    #[test]
    fn rows_that_do_not_belong_with_the_others_are_listed_by_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(folder.path(), 20);
        for id in ["p0", "p4", "p25"] {
            change(folder.path(), id, |layer| {
                layer.up = layer.up.narrow(1, 0, 1).unwrap().contiguous().unwrap();
                layer.down = layer.down.narrow(0, 0, 1).unwrap().contiguous().unwrap();
            });
        }
        change(folder.path(), "p3", |layer| layer.alpha = 1.0);
        change(folder.path(), "p9", |layer| layer.up = (&layer.up * f64::NAN).unwrap());
        let message = refusal(folder.path());
        for part in ["p0, p4, p25: ", "rank 1, wanted 2", "p3: ", "alpha 1, wanted 2", "p9: ", "not finite"] {
            assert!(message.contains(part), "{part} in {message}");
        }
    }

    #[test]
    fn people_whose_files_are_missing_are_left_out_when_asked() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(folder.path(), 20);
        std::fs::remove_file(folder.path().join("loras/p7.safetensors")).unwrap();
        std::fs::remove_file(folder.path().join("embeddings/p22.safetensors")).unwrap();
        let message = refusal(folder.path());
        assert!(message.contains("2 people") && message.contains("--skip-missing"), "{message}");
        let options = ReadOptions { skip_missing: true, ..ReadOptions::default() };
        let set = LoraDataset::open(folder.path(), &options).unwrap();
        assert_eq!((set.train.people(), set.held_out.people()), (19, 11));
    }

    #[test]
    fn a_layout_that_was_left_out_is_that_of_the_first_lora_and_a_form_undoes_other_factorisations() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(folder.path(), 20);
        let path = folder.path().join("dataset.json");
        let mut header: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let shared = ReadOptions { form: FormWanted::New(Canonical::Svd), ..ReadOptions::default() };
        let refused = LoraDataset::open(folder.path(), &shared).err().unwrap();
        assert!(refused.to_string().contains("canonical"), "{refused}");
        header.as_object_mut().unwrap().remove("layout");
        std::fs::write(&path, serde_json::to_vec(&header).unwrap()).unwrap();
        // The first LoRA decides, so it stays; every other is factored anew: B·R and R⁻¹·A with R = [[1, 1], [0, 1]].
        let form = |kind| {
            let options = ReadOptions { form: FormWanted::New(kind), ..ReadOptions::default() };
            let set = LoraDataset::open(folder.path(), &options).unwrap();
            assert_eq!(set.layout.parameters(), 2 * (8 + 6) * RANK);
            set.train.vectors.batch(&[1, 2]).unwrap()
        };
        let before = [Canonical::None, Canonical::Svd, Canonical::Procrustes].map(form);
        for id in ["p1", "p2"] {
            change(folder.path(), id, |layer| {
                let turn = Tensor::new(&[[1f32, 1.0], [0.0, 1.0]], &Device::Cpu).unwrap();
                let back = Tensor::new(&[[1f32, -1.0], [0.0, 1.0]], &Device::Cpu).unwrap();
                layer.up = layer.up.matmul(&turn).unwrap();
                layer.down = back.matmul(&layer.down).unwrap();
            });
        }
        let far = |(kind, before): (Canonical, &Tensor)| {
            let change = (form(kind) - before).unwrap().abs().unwrap().max_all().unwrap();
            change.to_scalar::<f32>().unwrap()
        };
        assert!(far((Canonical::None, &before[0])) > 0.5);
        assert!(far((Canonical::Svd, &before[1])) < 1e-3);
        assert!(far((Canonical::Procrustes, &before[2])) < 1e-3);
    }

    #[test]
    fn components_of_turned_loras_are_worth_something_again_in_a_canonical_form() {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(folder.path(), 60);
        let path = folder.path().join("dataset.json");
        let mut header: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        header.as_object_mut().unwrap().remove("layout");
        std::fs::write(&path, serde_json::to_vec(&header).unwrap()).unwrap();
        // Everybody's factors turned by an angle of their own.
        for i in 0..72 {
            change(folder.path(), &format!("p{i}"), |layer| {
                let (sin, cos) = (2.4 * i as f32).sin_cos();
                let turn = Tensor::new(&[[cos, -sin], [sin, cos]], &Device::Cpu).unwrap();
                layer.up = layer.up.matmul(&turn).unwrap();
                layer.down = turn.t().unwrap().matmul(&layer.down).unwrap();
            });
        }
        // The error of ΔW behind as many components as there are factors: turned, they need more.
        let error = |kind| {
            let options = ReadOptions { form: FormWanted::New(kind), ..ReadOptions::default() };
            let set = LoraDataset::open(folder.path(), &options).unwrap();
            let (train, new) = (set.train.vectors.all().unwrap(), set.held_out.vectors.all().unwrap());
            let mean = train.mean_keepdim(0).unwrap();
            let basis = Pca::fit(&train.broadcast_sub(&mean).unwrap(), 4).unwrap().basis;
            let z = new.broadcast_sub(&mean).unwrap().matmul(&basis.t().unwrap()).unwrap();
            let guess = z.matmul(&basis).unwrap().broadcast_add(&mean).unwrap();
            let space = DeltaSpace::new(&set.layout, &Device::Cpu).unwrap();
            let alike = space.agreement(&guess, &new, &mean).unwrap();
            alike.iter().map(|alike| alike.relative_error).sum::<f64>() / alike.len() as f64
        };
        let [none, svd, aligned] = [Canonical::None, Canonical::Svd, Canonical::Procrustes].map(error);
        eprintln!("error of ΔW: none {none:.3}, svd {svd:.3}, procrustes {aligned:.3}");
        assert!(aligned < 0.5 * none && aligned < svd, "none {none}, svd {svd}, procrustes {aligned}");
    }

    #[test]
    fn damaged_datasets_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert!(refusal(folder.path()).contains("dataset.json"));
        write_dataset(folder.path(), 8);
        assert!(refusal(folder.path()).contains("8 people"));
        write_dataset(folder.path(), 20);
        std::fs::remove_file(path("loras/p7.safetensors")).unwrap();
        assert!(refusal(folder.path()).contains("p7.safetensors"));

        write_dataset(folder.path(), 20);
        let bad = Tensor::full(f32::NAN, (2, 6), &Device::Cpu).unwrap();
        let image = Tensor::ones((2, 5), DType::F32, &Device::Cpu).unwrap();
        let embeddings = BTreeMap::from([("face", bad), ("image", image)]);
        safetensors::serialize_to_file(&embeddings, None, &path("embeddings/p3.safetensors")).unwrap();
        assert!(refusal(folder.path()).contains("not finite"));

        write_dataset(folder.path(), 20);
        let manifest = std::fs::read_to_string(path("manifest.jsonl")).unwrap();
        std::fs::write(path("manifest.jsonl"), manifest.replacen("\"one\"", "\"two\"", 1)).unwrap();
        let message = refusal(folder.path());
        assert!(
            message.contains("two: p0") && message.contains("one: p1, p2, p3, p4, p5 and 26 more"),
            "{message}"
        );
    }
}
