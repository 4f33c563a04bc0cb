//! A dataset folder as tensors: LoRA vectors and embeddings, apart by split, and how well guesses agree with them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::build_dataset::{Header, Row, read_manifest};
use crate::failure::Failure;
use crate::lora::file;
use crate::lora::keys::BlockLayout;
use crate::lora::layout::LoraLayout;
use crate::model_files::ModelFiles;
use crate::train::shards::in_threads;
use crate::weights;

/// What `build-dataset` wrote.
pub struct LoraSet {
    /// Base, encoders, layout without its `down`s.
    pub header: Header,
    /// With its shared `down`s.
    pub layout: LoraLayout,
    /// The settings that all rows were made with.
    pub stamp: String,
    /// People to learn from.
    pub train: Split,
    /// People to judge by.
    pub held_out: Split,
}

/// M people.
pub struct Split {
    /// LoRA vectors (M, P).
    pub vectors: Tensor,
    /// Face embeddings (R, F): every reference picture of every person.
    pub faces: Tensor,
    /// Image embeddings (R, I) of the same pictures.
    pub images: Tensor,
    /// Of each of these R rows, the person (0 … M − 1).
    pub owners: Vec<usize>,
}

/// Fewer people teach nothing: PCA and ridge regression would fit them exactly.
pub const FEWEST: usize = 16;

impl LoraSet {
    /// Reads the folder.
    ///
    /// # Errors
    /// [`Failure::Unusable`] with the file: one that is missing, of other modules or with values that are not
    /// finite; rows of several settings; fewer than 16 people to learn from or none held out.
    pub fn read(folder: &Path) -> Result<Self> {
        let files = ModelFiles::folder(folder)?;
        let header: Header = files.json("dataset.json")?;
        let layout = if header.layout.shared_down {
            let downs: BTreeMap<_, _> = files.tensors("", "basis")?.into_iter().collect();
            let layout = header.layout.clone().with_shared_down(downs);
            layout.map_err(|error| files.unusable("basis.safetensors", error))?
        } else {
            header.layout.clone()
        };
        let rows = read_manifest(folder)?;
        let unusable = |why: String| files.unusable("manifest.jsonl", why);
        let stamp = one_stamp(&rows).map_err(unusable)?;
        let split = |name: &str| -> Vec<&Row> { rows.iter().filter(|row| row.split == name).collect() };
        let (train, held_out) = (split("train"), split("held-out"));
        if let Some(row) = rows.iter().find(|row| !["train", "held-out"].contains(&row.split.as_str())) {
            let why = format!("`{}` is in split `{}`, neither `train` nor `held-out`", row.id, row.split);
            return Err(unusable(why));
        }
        if train.len() < FEWEST || held_out.is_empty() {
            return Err(unusable(format!(
                "{} people to learn from and {} held out; at least {FEWEST} and 1 are needed, build a larger dataset",
                train.len(),
                held_out.len()
            )));
        }
        let blocks = block_layout(&folder.join(&train[0].lora), &layout)?;
        let read = |rows: &[&Row]| Split::read(folder, rows, &layout, &blocks);
        let (train, held_out) = (read(&train)?, read(&held_out)?);
        if (train.faces.dim(1)?, train.images.dim(1)?) != (held_out.faces.dim(1)?, held_out.images.dim(1)?) {
            return Err(unusable("the embeddings of the two splits have other widths".into()));
        }
        Ok(Self { header, layout, stamp, train, held_out })
    }
}

/// The settings of all rows, or which rows differ.
fn one_stamp(rows: &[Row]) -> Result<String, String> {
    let mut by_stamp: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for row in rows {
        by_stamp.entry(&row.settings).or_default().push(&row.id);
    }
    if by_stamp.len() > 1 {
        let list = |(stamp, ids): (&&str, &Vec<&str>)| {
            let some = ids.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            format!(
                "\n  {stamp}: {some}{}",
                if ids.len() > 5 { format!(" and {} more", ids.len() - 5) } else { String::new() }
            )
        };
        let list: String = by_stamp.iter().map(list).collect();
        return Err(format!("its rows were made with several settings, keep one:{list}"));
    }
    Ok(by_stamp.keys().next().copied().unwrap_or_default().to_string())
}

/// The UNet's levels, which the names in a file depend on: those under which it has the modules of `layout`.
fn block_layout(path: &Path, layout: &LoraLayout) -> Result<BlockLayout> {
    let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
    let mut first = None;
    // SDXL's own comes first, so that its complaint is shown when none fits.
    let others = (1..=4).flat_map(|levels| (1..=4).map(move |layers| BlockLayout::uniform(levels, layers)));
    for blocks in std::iter::once(BlockLayout::default()).chain(others) {
        let vector = file::from_bytes(&bytes, &blocks).and_then(|(lora, _)| Ok(layout.to_vector(&lora)?));
        match vector {
            Ok(_) => return Ok(blocks),
            Err(error) => first = first.or(Some(error)),
        }
    }
    let why = first.map_or_else(|| "no layout fits".to_string(), |error| format!("{error:#}"));
    Err(Failure::unusable(path, why))
}

impl Split {
    fn read(folder: &Path, rows: &[&Row], layout: &LoraLayout, blocks: &BlockLayout) -> Result<Self> {
        let people = in_threads(rows.len(), |i| person(folder, rows[i], layout, blocks))?;
        let mut owners = Vec::new();
        let (mut vectors, mut faces, mut images) = (Vec::new(), Vec::<Tensor>::new(), Vec::<Tensor>::new());
        for (i, (row, (vector, face, image))) in rows.iter().zip(people).enumerate() {
            if let (Some(first), Some(other)) = (faces.first(), images.first())
                && (first.dim(1)?, other.dim(1)?) != (face.dim(1)?, image.dim(1)?)
            {
                let why = "its embeddings have other widths than those of the first row";
                return Err(Failure::unusable(&folder.join(&row.embeddings), why));
            }
            owners.extend(std::iter::repeat_n(i, face.dim(0)?));
            vectors.extend(vector);
            faces.push(face);
            images.push(image);
        }
        Ok(Self {
            vectors: Tensor::from_vec(vectors, (rows.len(), layout.parameters()), &Device::Cpu)?,
            faces: Tensor::cat(&faces, 0)?,
            images: Tensor::cat(&images, 0)?,
            owners,
        })
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

    /// A row a person (M, …) → a row a reference (R, …).
    pub fn per_reference(&self, people: &Tensor) -> Result<Tensor> {
        let owners: Vec<u32> = self.owners.iter().map(|owner| *owner as u32).collect();
        Ok(people.index_select(&Tensor::new(owners, people.device())?, 0)?)
    }

    /// The mean of the rows of each person: (R, …) → (M, …).
    pub fn mean_per_person(&self, references: &Tensor) -> Result<Tensor> {
        let means = self.references().into_iter().map(|rows| -> Result<Tensor> {
            Ok(references.index_select(&Tensor::new(rows, references.device())?, 0)?.mean(0)?)
        });
        Ok(Tensor::stack(&means.collect::<Result<Vec<_>>>()?, 0)?)
    }
}

/// Vector, face embeddings and image embeddings of one row.
fn person(
    folder: &Path,
    row: &Row,
    layout: &LoraLayout,
    blocks: &BlockLayout,
) -> Result<(Vec<f32>, Tensor, Tensor)> {
    let path = folder.join(&row.lora);
    let lora = file::read(&path, blocks)?;
    let vector = layout.to_vector(&lora).map_err(|error| Failure::unusable(&path, error))?;
    if !vector.iter().all(|x| x.is_finite()) {
        return Err(Failure::unusable(&path, "it holds values that are not finite; train this LoRA again"));
    }
    let path = folder.join(&row.embeddings);
    let tensors = weights::read_file(&path)?;
    let (face, image) = (embedding(&path, &tensors, "face")?, embedding(&path, &tensors, "image")?);
    if face.dim(0)? != image.dim(0)? {
        return Err(Failure::unusable(&path, "`face` and `image` have different numbers of rows"));
    }
    Ok((vector, face, image))
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

/// How well guesses of standardised LoRA vectors agree with the truth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Σ‖x̂ − x‖² / Σ‖x‖²; the mean LoRA, which is zero here, has 1.
    pub relative_error: f64,
    /// Mean cosine between x̂ and x; 0 where x̂ is zero.
    pub cosine: f64,
}

impl Agreement {
    /// Of `guess` (B, P) with `truth` (B, P).
    pub fn of(guess: &Tensor, truth: &Tensor) -> Result<Self> {
        let rows = |x: Tensor| -> Result<Vec<f64>> { Ok(x.sum(1)?.to_dtype(DType::F64)?.to_vec1()?) };
        let error: f64 = rows((guess - truth)?.sqr()?)?.iter().sum();
        let power = rows(truth.sqr()?)?;
        let cosines = rows((guess * truth)?)?
            .into_iter()
            .zip(power.iter().zip(rows(guess.sqr()?)?))
            .map(|(dot, (a, b))| if b > 0.0 { dot / (a * b).sqrt() } else { 0.0 });
        Ok(Self {
            relative_error: error / power.iter().sum::<f64>(),
            cosine: cosines.sum::<f64>() / power.len() as f64,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::hypernet::ModelId;
    use crate::lora::file::Format;
    use crate::lora::{Lora, LoraLayer};

    const MODULES: [&str; 2] = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    ];
    const RANK: usize = 2;

    /// A dataset of `train` and 12 held-out people: `up` depends linearly on four hidden factors, and so do the
    /// embeddings of two noisy reference pictures.
    pub(in crate::commands) fn write_dataset(folder: &Path, train: usize) {
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
            layout: layout.unwrap(),
        };
        std::fs::write(folder.join("dataset.json"), serde_json::to_vec(&header).unwrap()).unwrap();
        std::fs::write(folder.join("manifest.jsonl"), manifest).unwrap();
    }

    fn refusal(folder: &Path) -> String {
        let error = LoraSet::read(folder).err().expect("the dataset is damaged");
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
        let set = LoraSet::read(folder.path()).unwrap();
        assert_eq!(set.train.vectors.dims(), [20, 2 * 8 * RANK]);
        assert_eq!((set.train.faces.dims(), set.held_out.images.dims()), (&[40, 6][..], &[24, 5][..]));
        assert_eq!(set.held_out.references()[3], [6, 7]);
        let owners = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let rows = set.held_out.per_reference(&owners).unwrap();
        assert_eq!(
            set.held_out.mean_per_person(&rows).unwrap().to_vec2::<f32>().unwrap(),
            owners.to_vec2::<f32>().unwrap()
        );
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

    #[test]
    fn the_mean_lora_has_error_one_and_cosine_zero() {
        let truth = normal(1, 0, (5, 9), &Device::Cpu).unwrap();
        let mean = Agreement::of(&truth.zeros_like().unwrap(), &truth).unwrap();
        assert_eq!(mean, Agreement { relative_error: 1.0, cosine: 0.0 });
        let half = Agreement::of(&(&truth * 0.5).unwrap(), &truth).unwrap();
        assert!((half.relative_error - 0.25).abs() < 1e-6 && (half.cosine - 1.0).abs() < 1e-6);
    }
}
