//! Builds a dataset of LoRAs: a DreamBooth LoRA of each painted person, all with the same scenes, noise and frozen
//! `down`s, and embeddings of reference photos.
//!
//! The folder can be continued after an interruption at any moment: a person counts once its row is in the manifest,
//! and rows whose files are missing are built again.

use std::collections::{BTreeMap, HashMap};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::dataset::manifest::{HEADER, Header, ImageSettings, MANIFEST, Row, SETTINGS, read_manifest};
use crate::failure::Failure;
use crate::files::{self, FolderLock};
use crate::identity::FaceEncoder;
use crate::identity::clip::{ImageEncoder, ImageInput};
use crate::identity::hyperlora::FacePreparation;
use crate::image::Image;
use crate::limits::require_memory;
use crate::lora::Lora;
use crate::lora::file::{self, Format};
use crate::lora::layout::LoraLayout;
use crate::lora::ldm_keys::BlockLayout;
use crate::progress;
use crate::recipes::dreambooth::lockstep::{self, Frozen, LockstepConfig, LockstepDataset, SharedDown};
use crate::sdxl::pipeline::Sdxl;
use crate::synthetic::Person;
use crate::synthetic::scenes::{paint_image, reference_scene, training_captions, training_scenes};
use crate::threads::in_threads_or_turn;
use crate::weights::header;
use crate::weights::model_id::ModelId;
use crate::weights::sha256;

/// The shared `down`s.
pub const BASIS: &str = "basis.safetensors";

/// The file given by `--config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetSettings {
    /// The population.
    pub people: Population,
    /// Training and reference images.
    // Written under its first name, which the hash of settings in existing datasets covers.
    #[serde(rename(serialize = "pictures"), alias = "pictures")]
    pub images: ImageSettings,
    /// People whose LoRAs train together in one forward pass.
    pub people_per_batch: u64,
    /// Input of the image encoder, and which of its outputs is kept: `output = "projected"` or
    /// `"penultimate"`, `blank_background = true` keeps the background out of the identity.
    #[serde(default, skip_serializing_if = "ImageInput::is_default")]
    pub image_input: ImageInput,
    /// What is recorded of each reference image beside both embeddings.
    #[serde(default, skip_serializing_if = "Records::is_default")]
    pub records: Records,
    /// DreamBooth training of each person.
    pub recipe: LockstepConfig,
    /// Training of the shared basis; without it the `down`s are random.
    pub basis: Option<Basis>,
}

/// Conditions as HyperLoRA takes them, for hypernetworks that are trained on the dataset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Records {
    /// `clip_tokens` (references, N, D) in the embeddings: `hidden_states[-2]` of the image encoder, the class token first,
    /// of the crop that it is shown.
    pub clip_tokens: bool,
    /// `crops/ID-N.png`: the face on a grey background, which the image encoder is then shown for its tokens. Needs a
    /// face encoder with SCRFD and 106 landmarks.
    pub grey_crops: bool,
}

impl Records {
    /// Whether nothing more is recorded.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Painted people by number: first the training people, then the held-out ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Population {
    /// Seed of the population; the base model must have been trained on another.
    pub seed: u64,
    /// People to train the hypernetwork on.
    pub train: u64,
    /// People to evaluate it on.
    pub held_out: u64,
}

/// Training of the shared basis, on people who are in neither split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Basis {
    /// Number of people.
    pub people: u64,
    /// Training steps.
    pub steps: u64,
}

/// Hash of everything that decides the values of a LoRA: settings and base. Twelve digits of SHA-256.
///
/// # Errors
/// The settings cannot be written as JSON.
pub fn settings_hash(settings: &DatasetSettings, base: &ModelId) -> Result<String> {
    Ok(sha256::of_bytes(&serde_json::to_vec(&(settings, base))?)[..12].to_string())
}

/// Open models and settings for building one dataset folder, which stays locked until this is dropped.
pub struct DatasetBuilder {
    /// The dataset folder.
    pub out: PathBuf,
    /// How it is built.
    pub settings: DatasetSettings,
    /// The base model.
    pub model: Sdxl,
    /// Its blocks, for the names of layers in LoRA files.
    pub blocks: BlockLayout,
    /// Detects and embeds faces.
    pub faces: FaceEncoder,
    /// Embeds whole images.
    pub image_encoder: ImageEncoder,
    /// Cuts out faces on a grey background, where the settings ask for it.
    pub preparation: Option<FacePreparation>,
    /// [`settings_hash`] of settings and base.
    pub settings_hash: String,
    /// Held open; the operating system releases the lock when the process ends.
    pub lock: FolderLock,
}

/// Everything that one person's files are written from.
struct Finished {
    person: Person,
    lora: Lora,
    loss: f64,
}

impl DatasetBuilder {
    fn frozen(&self) -> Frozen<'_> {
        Frozen { unet: &self.model.unet, schedule: &self.model.schedule }
    }

    /// Refuses settings that together need more memory than there is, before anything is painted or trained.
    ///
    /// # Errors
    /// [`Failure::Usage`] with the settings to lower.
    pub fn check_memory(&self) -> Result<()> {
        let DatasetSettings { images, recipe, basis, people_per_batch, .. } = &self.settings;
        let (scenes, side) = (images.scenes as usize, images.size);
        let vae = self.model.vae.config();
        let channels = 3 + vae.block_out_channels.first().copied().unwrap_or(0);
        let sizes = "`images.scenes` or `images.size`";
        require_memory("the images of a person", &[scenes, side, side, channels, 4], sizes)?;
        let people = basis.as_ref().map_or(0, |basis| basis.people).max(*people_per_batch) as usize;
        let lower = "`basis.people`, `people_per_batch` or `images.scenes`";
        let side = side / vae.factor();
        require_memory("the latents", &[people, scenes, side, side, vae.latent_channels, 4], lower)?;
        let channels = self.model.unet.config.block_out_channels.first().copied().unwrap_or(0);
        let lower = "`basis.people`, `people_per_batch` or `recipe.batch`";
        require_memory("the images of a step", &[people, recipe.batch, side, side, channels, 4], lower)?;
        let mut outputs = 0;
        self.model.unet.clone().visit_linears(&mut |_, linear| {
            outputs += linear.weight.dims()[0];
        });
        // Weight, gradient and two moments of each `up`.
        let lower = "`basis.people`, `people_per_batch` or `recipe.rank`";
        require_memory("the LoRAs in training", &[people, recipe.rank, outputs, 4, 4], lower)
    }

    /// The face encoder's name and hash.
    pub fn face_encoder(&self) -> ModelId {
        let [_, (name, sha256)] = self.faces.provenance();
        ModelId { name: name.into(), sha256 }
    }

    /// Latents of `people` in the training scenes of `seed`, with the captions.
    fn training_set(&self, people: &[Person], seed: u64) -> Result<LockstepDataset> {
        let ImageSettings { world, size, scenes, .. } = self.settings.images;
        let scenes = training_scenes(world, seed, scenes);
        let captions = training_captions(world, &scenes, seed);
        let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
        let mut latents = Vec::new();
        for person in people {
            let images = scenes
                .iter()
                .map(|scene| paint_image(person, scene, size).to_tensor(&Device::Cpu))
                .collect::<Result<Vec<_>>>()?;
            let images = Tensor::stack(&images, 0)?.to_device(self.model.device())?;
            let (mean, _) = self.model.vae.encode(&images)?;
            latents.push(self.model.vae.to_latents(&mean)?);
        }
        Ok(LockstepDataset {
            latents: Tensor::stack(&latents, 0)?,
            captions: self.model.text.encode_prompts(&captions)?,
            size,
        })
    }

    /// The shared `down`s: read from basis.safetensors if it exists, otherwise random or trained, and written there.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when the file was made with other settings or another base.
    pub fn basis(&self) -> Result<SharedDown> {
        let path = &self.out.join(BASIS);
        if path.exists() {
            return self.read_basis(path);
        }
        let recipe = &self.settings.recipe;
        let mut downs = lockstep::random_shared_down(&self.model.unet, recipe)?;
        if let Some(basis) = &self.settings.basis {
            // A population of its own.
            let people = population(self.settings.people.seed ^ 0xba515, 1..=basis.people);
            let recipe = LockstepConfig { steps: basis.steps, ..recipe.clone() };
            let data = self.training_set(&people, self.settings.images.seed)?;
            let bar = progress::bar(basis.steps, "basis");
            downs = lockstep::train_shared_down(self.frozen(), &downs, &data, &recipe, |loss| {
                bar.set_message(format!("loss {:.4}", loss / basis.people as f64));
                bar.inc(1);
                progress::check()
            })?;
            bar.finish_and_clear();
        }
        let header = HashMap::from([("settings".to_string(), self.settings_hash.clone())]);
        files::write_whole(path, &safetensors::serialize(&downs, Some(header))?)?;
        Ok(downs)
    }

    fn read_basis(&self, path: &Path) -> Result<SharedDown> {
        let tensors = crate::weights::read_file(path)?;
        let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
            .map_err(|error| Failure::unusable(path, error))?;
        let made_with = header.metadata().as_ref().and_then(|metadata| metadata.get("settings"));
        if let Some(hash) = made_with.filter(|hash| **hash != self.settings_hash) {
            let why = format!(
                "it was made with other settings or another base ({hash}, now {}); choose another --out",
                self.settings_hash
            );
            return Err(Failure::unusable(path, why));
        }
        Ok(tensors.into_iter().collect())
    }

    /// The layout of LoRA vectors with these shared `down`s.
    pub fn vector_layout(&self, downs: &SharedDown) -> Result<LoraLayout> {
        let recipe = &self.settings.recipe;
        let mut layers: BTreeMap<String, (Tensor, usize)> = BTreeMap::new();
        self.model.unet.clone().visit_linears(&mut |path, linear| {
            if let (Some(down), Ok((out, _))) = (downs.get(path), linear.weight.dims2()) {
                layers.insert(path.to_string(), (down.clone(), out));
            }
        });
        let lora = Lora {
            layers: layers
                .into_iter()
                .map(|(path, (down, out))| {
                    let up = Tensor::zeros((out, recipe.rank), DType::F32, &Device::Cpu)?;
                    let layer = crate::lora::LoraLayer::new(&path, down, up, recipe.alpha as f32)?;
                    Ok((path, layer))
                })
                .collect::<Result<_>>()?,
            metadata: Default::default(),
        };
        Ok(LoraLayout::of(&lora).with_shared_down(downs.clone())?)
    }

    /// Mean cosine of each person's two LoRAs, trained on different images, timesteps and noise, each centred on the
    /// mean of its run: an upper bound, about, for any predictor.
    pub fn repeatability(&self, downs: &SharedDown, count: u64) -> Result<f64> {
        let layout = self.vector_layout(downs)?;
        let people = population(self.settings.people.seed, 1..=count);
        let bar = progress::bar(2 * self.settings.recipe.steps, "repeatability");
        let mut runs = Vec::new();
        for again in 0..2u64 {
            let data = self.training_set(&people, self.settings.images.seed + 1000 * again)?;
            let recipe = LockstepConfig {
                seed: self.settings.recipe.seed + 1000 * again,
                ..self.settings.recipe.clone()
            };
            let loras = lockstep::train(self.frozen(), downs, &data, &recipe, |_| {
                bar.inc(1);
                progress::check()
            })?;
            let rows: Vec<Vec<f32>> =
                loras.iter().map(|lora| Ok(layout.to_vector(lora)?)).collect::<Result<_>>()?;
            let rows = Tensor::new(rows, &Device::Cpu)?;
            runs.push(rows.broadcast_sub(&rows.mean_keepdim(0)?)?);
        }
        bar.finish_and_clear();
        let dot = |a: &Tensor, b: &Tensor| -> Result<Vec<f32>> { Ok((a * b)?.sum(1)?.to_vec1()?) };
        let (ab, aa, bb) = (dot(&runs[0], &runs[1])?, dot(&runs[0], &runs[0])?, dot(&runs[1], &runs[1])?);
        let cosines =
            ab.iter().zip(aa.iter().zip(&bb)).map(|(ab, (aa, bb))| f64::from(ab / (aa * bb).sqrt()));
        Ok(cosines.sum::<f64>() / count as f64)
    }

    /// Writes dataset.json and settings.toml.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when the dataset was begun with another face encoder.
    pub fn write_header(&self, header: &Header) -> Result<()> {
        let path = self.out.join(HEADER);
        if let Ok(bytes) = std::fs::read(&path)
            && let Ok(begun) = serde_json::from_slice::<Header>(&bytes)
            && begun.face_encoder.sha256 != header.face_encoder.sha256
        {
            let (begun, asked) = (&begun.face_encoder.name, &header.face_encoder.name);
            let why = format!(
                "it was begun with the face encoder `{begun}`, not with `{asked}`; choose another --out"
            );
            return Err(Failure::unusable(&path, why));
        }
        files::write_whole(&path, serde_json::to_string_pretty(header)?.as_bytes())?;
        files::write_whole(&self.out.join(SETTINGS), toml::to_string(&self.settings)?.as_bytes())
    }

    /// Trains a LoRA for each person without a row, or whose files are missing; returns the number of rows.
    ///
    /// Rows are appended as groups finish. At the end the manifest is written in the order of people, so that the same
    /// settings give the same bytes.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for rows of other settings; failures of training and of writing.
    pub fn train_all(&self, downs: &SharedDown) -> Result<usize> {
        let Population { train, held_out, .. } = self.settings.people;
        let path = self.out.join(MANIFEST);
        let known = self.known_rows(&path)?;
        let all: Vec<u64> = (1..=train + held_out).collect();
        let present = |number: &u64| known.get(number).is_some_and(|row| self.has_files(row));
        // Groups are the same in every run: the loss of a row is the mean over its group.
        let groups: Vec<&[u64]> = all
            .chunks(self.settings.people_per_batch.max(1) as usize)
            .filter(|group| !group.iter().all(present))
            .collect();
        let manifest = OpenOptions::new().create(true).append(true).open(&path);
        let manifest = Mutex::new(manifest.with_context(|| format!("cannot write `{}`", path.display()))?);
        let bar = progress::bar(train + held_out, "people");
        bar.set_position(all.iter().filter(|number| present(number)).count() as u64);
        bar.reset_eta();
        in_threads_or_turn(self.model.device(), groups.len(), |group| {
            let missing: Vec<u64> = groups[group].iter().filter(|number| !present(number)).copied().collect();
            let known_loss = groups[group].iter().find_map(|number| Some(known.get(number)?.loss));
            for finished in self.train_group(downs, &missing, known_loss)? {
                let number = finished.person.number;
                let row = self.write_files(finished).with_context(|| format!("person {number}"))?;
                if !known.contains_key(&number) {
                    let line = serde_json::to_string(&row)? + "\n";
                    let mut manifest = manifest.lock().expect("no thread panics while it writes a row");
                    manifest.write_all(line.as_bytes())?;
                    manifest.sync_data()?;
                }
                bar.inc(1);
            }
            Ok(())
        })?;
        bar.finish_and_clear();
        self.sort_manifest(&path)
    }

    /// Rows by the number of their person. An incomplete last line is cut off the file, so that rows can be appended.
    fn known_rows(&self, path: &Path) -> Result<BTreeMap<u64, Row>> {
        if !path.exists() {
            return Ok(BTreeMap::new());
        }
        let rows = read_manifest(&self.out)?;
        if let Some(row) = rows.iter().find(|row| row.settings != self.settings_hash) {
            let why = format!(
                "`{}` was made with other settings or another base ({}, now {}); choose another --out",
                row.id, row.settings, self.settings_hash
            );
            return Err(Failure::unusable(path, why));
        }
        let Population { seed, train, held_out } = self.settings.people;
        let foreign = |row: &&Row| row.person.0 != seed || !(1..=train + held_out).contains(&row.person.1);
        if let Some(row) = rows.iter().find(foreign) {
            let why = format!(
                "`{}` is person {} of seed {}; the settings have {} people of seed {seed}",
                row.id,
                row.person.1,
                row.person.0,
                train + held_out
            );
            return Err(Failure::unusable(path, why));
        }
        truncate_to_whole_lines(path)?;
        let missing: Vec<&str> =
            rows.iter().filter(|row| !self.has_files(row)).map(|row| row.id.as_str()).collect();
        if let Some(first) = missing.first() {
            let count = missing.len();
            progress::warn(format_args!(
                "files of {count} people are missing or cut off ({first}, …): they are built again"
            ));
        }
        let mut known = BTreeMap::new();
        for row in rows {
            known.entry(row.person.1).or_insert(row);
        }
        Ok(known)
    }

    /// Whether the files of a person are there and whole.
    fn has_files(&self, row: &Row) -> bool {
        let is_whole = |file: &String| {
            let file = std::fs::File::open(self.out.join(file));
            file.is_ok_and(|mut file| header::Header::read(&mut file).is_ok())
        };
        [&row.lora, &row.embeddings].into_iter().all(is_whole)
    }

    /// Writes the manifest again, one row a person in the order of their numbers; returns their count.
    fn sort_manifest(&self, path: &Path) -> Result<usize> {
        let text = std::fs::read_to_string(path).map_err(|error| Failure::unusable(path, error))?;
        let mut lines = BTreeMap::new();
        for (line, row) in text.lines().zip(read_manifest(&self.out)?) {
            lines.entry(row.person.1).or_insert(line);
        }
        let sorted: String = lines.values().flat_map(|line| [line, "\n"]).collect();
        if sorted != text {
            files::write_whole(path, sorted.as_bytes())?;
        }
        Ok(lines.len())
    }

    /// LoRAs of people who train together. `known_loss` is that of their group, where some of it has rows already.
    fn train_group(
        &self,
        downs: &SharedDown,
        numbers: &[u64],
        known_loss: Option<f64>,
    ) -> Result<Vec<Finished>> {
        let people = population(self.settings.people.seed, numbers.iter().copied());
        let data = self.training_set(&people, self.settings.images.seed)?;
        let (mut loss, mut losses) = (0.0, 0.0);
        let steps = self.settings.recipe.steps;
        let mut step = 0;
        let loras = lockstep::train(self.frozen(), downs, &data, &self.settings.recipe, |value| {
            step += 1;
            if 10 * step > 9 * steps {
                (loss, losses) = (loss + value / people.len() as f64, losses + 1.0);
            }
            progress::check()
        })?;
        // 15 digits are the same number after they were read from the manifest, 17 need not be.
        let rounded = |loss: f64| format!("{loss:.14e}").parse().unwrap_or(loss);
        let loss = known_loss.unwrap_or(rounded(loss / losses));
        Ok(people.into_iter().zip(loras).map(|(person, lora)| Finished { person, lora, loss }).collect())
    }

    /// Writes one person's LoRA, embeddings and portrait; returns the row to append once they are there.
    fn write_files(&self, finished: Finished) -> Result<Row> {
        let Finished { person, mut lora, loss } = finished;
        let id = format!("person-{:06}", person.number);
        let split = if person.number <= self.settings.people.train { "train" } else { "held-out" };
        let row = Row {
            lora: format!("loras/{id}.safetensors"),
            embeddings: format!("embeddings/{id}.safetensors"),
            split: split.into(),
            person: (person.seed, person.number),
            loss,
            settings: self.settings_hash.clone(),
            id,
        };
        for layer in lora.layers.values() {
            ensure!(
                layer.up.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite(),
                "the LoRA holds NaN or infinity"
            );
        }
        lora.metadata.insert(crate::lora::metadata::TRIGGER_PHRASE.into(), "person".into());
        let references = self.references(&person);
        let (embeddings, crops) = self.embed(&references, &row.id)?;
        for (number, crop) in (1..).zip(&crops) {
            crop.save(&self.out.join(format!("crops/{}-{number}.png", row.id)), None)?;
        }
        references[0].save(&self.out.join(format!("portraits/{}.png", row.id)), None)?;
        file::write(&self.out.join(&row.lora), &lora, Format::Kohya, &self.blocks)?;
        files::write_whole(&self.out.join(&row.embeddings), &safetensors::serialize(&embeddings, None)?)?;
        Ok(row)
    }

    /// Plain photos of a person, in scenes that no LoRA is trained on.
    fn references(&self, person: &Person) -> Vec<Image> {
        let ImageSettings { world, size, references, seed, .. } = self.settings.images;
        let scenes = (0..references.max(1)).map(|i| reference_scene(world, seed, i));
        scenes.map(|scene| paint_image(person, &scene, size)).collect()
    }

    /// `face` (references, 512), `image` (references, D) and what [`Records`] names; and the crops that are kept.
    fn embed(&self, references: &[Image], id: &str) -> Result<(BTreeMap<String, Tensor>, Vec<Image>)> {
        let (mut face, mut image) = (Vec::new(), Vec::new());
        let (mut tokens, mut crops) = (Vec::new(), Vec::new());
        for reference in references {
            let found = self.faces.search(reference)?;
            // Images without a detected face are left out.
            if let Some(first) = found.faces.first() {
                face.push(self.faces.embed(reference, first)?);
                image.push(self.image_encoder.embed(reference, first)?);
                let shown = match &self.preparation {
                    Some(preparation) => preparation.prepare(reference, id, Some(1))?.clip,
                    None => self.image_encoder.shown(reference, first),
                };
                if self.settings.records.clip_tokens {
                    tokens.push(self.image_encoder.tokens(&shown)?);
                }
                if self.settings.records.grey_crops {
                    crops.push(shown);
                }
            }
        }
        ensure!(!face.is_empty(), "no face was found in any reference image of `{id}`");
        let tensor = |rows: Vec<Vec<f32>>| Tensor::new(rows, &Device::Cpu);
        let mut tensors =
            BTreeMap::from([("face".to_string(), tensor(face)?), ("image".to_string(), tensor(image)?)]);
        if !tokens.is_empty() {
            tensors.insert("clip_tokens".into(), Tensor::stack(&tokens, 0)?);
        }
        Ok((tensors, crops))
    }
}

fn population(seed: u64, numbers: impl IntoIterator<Item = u64>) -> Vec<Person> {
    numbers.into_iter().map(|number| Person::new(seed, number)).collect()
}

/// Cuts off what follows the last line end.
fn truncate_to_whole_lines(path: &Path) -> Result<()> {
    let cannot = || format!("cannot write `{}`", path.display());
    let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if whole < bytes.len() {
        progress::warn(format_args!("`{}`: the incomplete last row is removed", path.display()));
        let file = OpenOptions::new().write(true).open(path).with_context(cannot)?;
        file.set_len(whole as u64).with_context(cannot)?;
        file.sync_all().with_context(cannot)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::clip::ImageOutput;

    #[test]
    fn the_config_decides_what_the_image_encoder_is_shown() {
        let text = std::fs::read_to_string("configs/dataset-tiny.toml").unwrap();
        let plain: DatasetSettings = toml::from_str(&text).unwrap();
        let blanked = format!("{text}\n[image_input]\noutput = \"penultimate\"\nblank_background = true\n");
        let blanked: DatasetSettings = toml::from_str(&blanked).unwrap();
        assert_eq!(plain.image_input, ImageInput::default());
        let wanted = ImageInput { output: ImageOutput::Penultimate, blank_background: true };
        assert_eq!(blanked.image_input, wanted);
        // The default is not written, so that the hash of older datasets stays; another choice is another dataset.
        assert!(!toml::to_string(&plain).unwrap().contains("image_input"));
        let base = ModelId { name: "base".into(), sha256: "00".into() };
        assert_ne!(settings_hash(&plain, &base).unwrap(), settings_hash(&blanked, &base).unwrap());
        assert_eq!(toml::from_str::<DatasetSettings>(&toml::to_string(&blanked).unwrap()).unwrap(), blanked);
    }
}
