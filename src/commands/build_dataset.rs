//! `difflora build-dataset`: portraits of many people → a LoRA of each, and a manifest.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::device;
use crate::failure::Failure;
use crate::files;
use crate::hypernet::ModelId;
use crate::identity::catalog::open_encoder;
use crate::identity::clip::{ImageEncoder, ImageInput};
use crate::identity::{FaceEncoder, catalog};
use crate::image::Image;
use crate::lora::Lora;
use crate::lora::file::{self, Format};
use crate::lora::keys::BlockLayout;
use crate::lora::layout::LoraLayout;
use crate::output::Output;
use crate::output::print_line;
use crate::progress;
use crate::recipes::dreambooth::lockstep::{self, Frozen, LockstepConfig, LockstepDataset, SharedDown};
use crate::registry;
use crate::sdxl::pipeline::Sdxl;
use crate::synthetic::{self, CaptionOptions, Person, Scene};
use crate::train::shards::in_threads_or_turn;
use crate::weights::sha256;

/// Arguments of `difflora build-dataset`.
///
/// Paints the people of the small world, trains a DreamBooth LoRA for each, and embeds their faces. OUT holds
/// manifest.jsonl with one row per person, loras/, embeddings/, portraits/ and the shared basis. Run the same command
/// again to continue.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Dataset folder, created if missing.
    #[arg(help_heading = "Output", long, value_name = "DIR", env = "DIFFLORA_OUT")]
    pub out: PathBuf,
    /// Settings file, as configs/dataset-tiny.toml.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_CONFIG")]
    pub config: PathBuf,
    /// Base model of the LoRAs.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_BASE")]
    pub base: String,
    #[command(flatten)]
    pub base_options: registry::BaseOptions,
    /// CLIP image encoder.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = registry::BUILT_IN, env = "DIFFLORA_IMAGE_ENCODER")]
    pub image_encoder: String,
    /// Face encoder; hypernetworks for this dataset are conditioned on it.
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", default_value = catalog::BUILT_IN, env = "DIFFLORA_FACE_ENCODER")]
    pub face_encoder: String,
    /// Device to compute on; `auto` is the GPU in builds with CUDA, else the CPU.
    #[arg(
        help_heading = "Advanced",
        long,
        value_name = "auto|cpu|cuda[:N]|metal",
        default_value = "auto",
        env = "DIFFLORA_DEVICE"
    )]
    pub device: String,
    /// Repeatability: train this many people twice, with other images and noise, and print the cosine of their two
    /// LoRAs.
    #[arg(help_heading = "Advanced", long, value_name = "N", default_value_t = 0, env = "DIFFLORA_SIGNAL")]
    pub signal: u64,
    /// Stop after the basis and the repeatability.
    #[arg(help_heading = "Advanced", long, env = "DIFFLORA_SIGNAL_ONLY")]
    pub signal_only: bool,
}

/// The file given by `--config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Who.
    pub people: People,
    /// What each is learnt from.
    // Written under its first name, which the hash of settings in existing datasets covers.
    #[serde(rename(serialize = "pictures"), alias = "pictures")]
    pub images: Images,
    /// People in one forward pass.
    pub people_per_batch: u64,
    /// What of a photo the image encoder is shown, and which of its outputs is kept: `output = "projected"` or
    /// `"penultimate"`, `blank_background = true` against backgrounds that leak into the identity.
    #[serde(default, skip_serializing_if = "ImageInput::is_default")]
    pub image_input: ImageInput,
    /// DreamBooth of each person.
    pub recipe: LockstepConfig,
    /// How the shared basis is learnt; without it the `down`s are random.
    pub basis: Option<Basis>,
}

/// Painted people by their numbers: first those to learn from, then those held out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct People {
    /// Seed of the population; the base model must have been trained on another.
    pub seed: u64,
    /// For training the hypernetwork.
    pub train: u64,
    /// For judging it.
    pub held_out: u64,
}

/// The scenes, the same for all people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// Pixels on a side.
    pub size: usize,
    /// Images a LoRA is trained on.
    pub scenes: u64,
    /// Seed of those scenes.
    pub seed: u64,
    /// Plain photos a person is embedded from; none is trained on.
    pub references: u64,
}

/// People who teach the basis and are in neither split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Basis {
    /// How many.
    pub people: u64,
    /// Steps of learning it.
    pub steps: u64,
}

/// One line of manifest.jsonl.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Name of the person and of its files.
    pub id: String,
    /// `train` or `held-out`.
    pub split: String,
    /// Population and number of the painted person.
    pub person: (u64, u64),
    /// The LoRA, relative to the dataset.
    pub lora: String,
    /// `face` (references, 512) and `image` (references, D), relative to the dataset.
    pub embeddings: String,
    /// Mean training loss of the group over the last tenth of the steps.
    pub loss: f64,
    /// Of settings and base: rows with another one do not belong together.
    pub settings: String,
}

/// `dataset.json`: what all rows share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Header {
    /// The model that the LoRAs are for.
    pub base: ModelId,
    /// The recogniser of the embeddings.
    pub face_encoder: ModelId,
    /// The encoder of whole images.
    pub image_encoder: ModelId,
    /// What it was shown, and which output was kept.
    #[serde(default, skip_serializing_if = "ImageInput::is_default")]
    pub image_input: ImageInput,
    /// Modules, rank and alpha; the shared `down`s lie in basis.safetensors.
    pub layout: LoraLayout,
}

/// Everything that stays the same from person to person.
pub struct Workshop {
    pub settings: Settings,
    pub model: Sdxl,
    pub layout: BlockLayout,
    pub faces: FaceEncoder,
    pub image_encoder: ImageEncoder,
}

/// Builds the dataset, or the rest of it.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let text =
        std::fs::read_to_string(&args.config).map_err(|error| Failure::unusable(&args.config, error))?;
    let settings: Settings = toml::from_str(&text).map_err(|error| Failure::unusable(&args.config, error))?;
    let device = device::open(&args.device)?;
    for folder in ["loras", "embeddings", "portraits"] {
        std::fs::create_dir_all(args.out.join(folder))
            .with_context(|| format!("cannot make the folder `{}`", args.out.join(folder).display()))?;
    }
    let base_files = registry::find_base(&args.base, &args.base_options)?;
    let base = registry::identify(&base_files, &args.base, registry::BASE_WEIGHTS)?;
    let image_files = registry::find(&args.image_encoder, "image_encoder")?;
    let image_encoder = registry::identify(&image_files, &args.image_encoder, registry::ENCODER_WEIGHTS)?;
    let model = Sdxl::open(&base_files, DType::F32, &device)?;
    let unet = &model.unet.config;
    let workshop = Workshop {
        layout: BlockLayout::uniform(unet.block_out_channels.len(), unet.layers_per_block),
        faces: open_encoder(&args.face_encoder)?,
        image_encoder: ImageEncoder::open(&image_files)?.with_input(settings.image_input),
        model,
        settings,
    };
    let stamp = stamp(&workshop.settings, &base)?;
    let downs = workshop.basis(&args.out.join("basis.safetensors"), &stamp)?;
    if args.signal > 0 {
        let cosine = workshop.signal(&downs, args.signal)?;
        if output.json {
            print_line!("{}", serde_json::json!({ "signal": cosine, "people": args.signal }))?;
        } else {
            print_line!(
                "signal: {} people trained twice, cosine of their centred LoRAs {cosine:.3}",
                args.signal
            )?;
        }
        if args.signal_only {
            return Ok(());
        }
    }
    let header = Header {
        base,
        face_encoder: workshop.face_encoder(),
        image_encoder,
        image_input: workshop.settings.image_input,
        layout: workshop.vector_layout(&downs)?,
    };
    let path = args.out.join("dataset.json");
    if let Ok(bytes) = std::fs::read(&path)
        && let Ok(begun) = serde_json::from_slice::<Header>(&bytes)
        && begun.face_encoder.sha256 != header.face_encoder.sha256
    {
        let (begun, asked) = (begun.face_encoder.name, header.face_encoder.name);
        let why =
            format!("it was begun with the face encoder `{begun}`, not with `{asked}`; take another --out");
        return Err(Failure::unusable(&path, why));
    }
    files::write_whole(&path, serde_json::to_string_pretty(&header)?.as_bytes())?;
    files::write_whole(&args.out.join("settings.toml"), toml::to_string(&workshop.settings)?.as_bytes())?;
    let rows = workshop.train_all(&args.out, &downs, &stamp)?;
    if output.json {
        print_line!("{}", serde_json::json!({ "people": rows, "out": args.out }))?;
    } else {
        print_line!("{rows} people in {}", args.out.display())?;
    }
    Ok(())
}

/// Reads a dataset's rows. A last line that was cut off by a crash is left out.
pub fn read_manifest(folder: &Path) -> Result<Vec<Row>> {
    let path = folder.join("manifest.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|error| Failure::unusable(&path, error))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_str(line)
                .map_err(|error| Failure::unusable(&path, format!("line {}: {error}", i + 1)))
        })
        .collect()
}

/// SHA-256 of what decides a LoRA, shortened.
pub fn stamp(settings: &Settings, base: &ModelId) -> Result<String> {
    Ok(sha256::of_bytes(&serde_json::to_vec(&(settings, base))?)[..12].to_string())
}

impl Workshop {
    pub fn frozen(&self) -> Frozen<'_> {
        Frozen { unet: &self.model.unet, schedule: &self.model.schedule }
    }

    pub fn face_encoder(&self) -> ModelId {
        let [_, (name, sha256)] = self.faces.provenance();
        ModelId { name: name.into(), sha256 }
    }

    /// The images of `people` in the scenes of `seed`, as latents, and the captions.
    pub fn lessons(&self, people: &[Person], seed: u64) -> Result<LockstepDataset> {
        let Images { size, scenes, .. } = self.settings.images;
        let list: Vec<Scene> = (0..scenes).map(|i| scene(seed, i)).collect();
        let said = CaptionOptions { subject: "person", attributes: 0, drop: 0.0 };
        let captions: Vec<String> =
            list.iter().map(|scene| synthetic::caption(&people[0], scene, said, seed)).collect();
        let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
        let mut latents = Vec::new();
        for person in people {
            let images = list
                .iter()
                .map(|scene| image(person, scene, size)?.to_tensor(&Device::Cpu))
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

    pub fn people(&self, seed: u64, numbers: impl IntoIterator<Item = u64>) -> Vec<Person> {
        numbers.into_iter().map(|number| Person::new(seed, number)).collect()
    }

    /// The shared `down`s: read when they are there, otherwise random or learnt, and kept in `path`.
    pub fn basis(&self, path: &Path, stamp: &str) -> Result<SharedDown> {
        if path.exists() {
            let tensors = crate::weights::read_file(path)?;
            return Ok(tensors.into_iter().collect());
        }
        let recipe = &self.settings.recipe;
        let mut downs = lockstep::random_shared_down(&self.model.unet, recipe)?;
        if let Some(basis) = &self.settings.basis {
            // A population of its own.
            let people = self.people(self.settings.people.seed ^ 0xba515, 1..=basis.people);
            let recipe = LockstepConfig { steps: basis.steps, ..recipe.clone() };
            let lessons = self.lessons(&people, self.settings.images.seed)?;
            let bar = progress::bar(basis.steps, "basis");
            downs = lockstep::train_shared_down(self.frozen(), &downs, &lessons, &recipe, |loss| {
                bar.set_message(format!("loss {:.4}", loss / basis.people as f64));
                bar.inc(1);
                progress::check()
            })?;
            bar.finish_and_clear();
        }
        let header = std::collections::HashMap::from([("settings".to_string(), stamp.to_string())]);
        files::write_whole(path, &safetensors::serialize(&downs, Some(header))?)?;
        Ok(downs)
    }

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

    /// Mean cosine of each person's two LoRAs, trained with other images, timesteps and noise, around the means
    /// of both runs: about what any predictor can reach.
    pub fn signal(&self, downs: &SharedDown, count: u64) -> Result<f64> {
        let layout = self.vector_layout(downs)?;
        let people = self.people(self.settings.people.seed, 1..=count);
        let bar = progress::bar(2 * self.settings.recipe.steps, "signal");
        let mut runs = Vec::new();
        for again in 0..2u64 {
            let lessons = self.lessons(&people, self.settings.images.seed + 1000 * again)?;
            let recipe = LockstepConfig {
                seed: self.settings.recipe.seed + 1000 * again,
                ..self.settings.recipe.clone()
            };
            let loras = lockstep::train(self.frozen(), downs, &lessons, &recipe, |_| {
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

    /// Trains everybody who has no row yet; gives the number of rows.
    pub fn train_all(&self, out: &Path, downs: &SharedDown, stamp: &str) -> Result<usize> {
        let People { seed, train, held_out } = self.settings.people;
        let path = out.join("manifest.jsonl");
        let mut done = std::collections::BTreeSet::new();
        if path.exists() {
            for row in read_manifest(out)? {
                if row.settings != stamp {
                    let why = format!(
                        "`{}` was made with other settings or another base ({}, now {stamp}); take another --out",
                        row.id, row.settings
                    );
                    return Err(Failure::unusable(&path, why));
                }
                done.insert(row.person.1);
            }
        }
        let left: Vec<u64> = (1..=train + held_out).filter(|number| !done.contains(number)).collect();
        let groups: Vec<&[u64]> = left.chunks(self.settings.people_per_batch.max(1) as usize).collect();
        let manifest = OpenOptions::new().create(true).append(true).open(&path);
        let manifest = Mutex::new(manifest.with_context(|| format!("cannot write `{}`", path.display()))?);
        let bar = progress::bar(train + held_out, "people");
        bar.set_position(done.len() as u64);
        bar.reset_eta();
        in_threads_or_turn(self.model.device(), groups.len(), |group| {
            let people = self.people(seed, groups[group].iter().copied());
            let lessons = self.lessons(&people, self.settings.images.seed)?;
            let (mut loss, mut losses) = (0.0, 0.0);
            let steps = self.settings.recipe.steps;
            let mut step = 0;
            let loras = lockstep::train(self.frozen(), downs, &lessons, &self.settings.recipe, |value| {
                step += 1;
                if 10 * step > 9 * steps {
                    (loss, losses) = (loss + value / people.len() as f64, losses + 1.0);
                }
                progress::check()
            })?;
            for (person, lora) in people.iter().zip(loras) {
                let split = if person.number <= train { "train" } else { "held-out" };
                self.keep(out, person, lora, split, loss / losses, stamp, &manifest)
                    .with_context(|| format!("person {}", person.number))?;
                bar.inc(1);
            }
            Ok(())
        })?;
        bar.finish_and_clear();
        Ok(done.len() + left.len())
    }

    /// Writes one person's files, and then the row that makes them count.
    #[allow(clippy::too_many_arguments)]
    pub fn keep(
        &self,
        out: &Path,
        person: &Person,
        mut lora: Lora,
        split: &str,
        loss: f64,
        stamp: &str,
        manifest: &Mutex<File>,
    ) -> Result<()> {
        let id = format!("person-{:06}", person.number);
        let row = Row {
            lora: format!("loras/{id}.safetensors"),
            embeddings: format!("embeddings/{id}.safetensors"),
            split: split.into(),
            person: (person.seed, person.number),
            loss,
            settings: stamp.into(),
            id,
        };
        for layer in lora.layers.values() {
            ensure!(
                layer.up.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite(),
                "the LoRA holds NaN or infinity"
            );
        }
        lora.metadata.insert("ss_network_module".into(), "networks.lora".into());
        lora.metadata.insert("ss_network_dim".into(), self.settings.recipe.rank.to_string());
        lora.metadata.insert("ss_network_alpha".into(), self.settings.recipe.alpha.to_string());
        lora.metadata.insert(crate::lora::TRIGGER_PHRASE.into(), "person".into());
        let references = self.references(person)?;
        let embeddings = self.embed(&references, &row.id)?;
        references[0].save(&out.join(format!("portraits/{}.png", row.id)), None)?;
        file::write(&out.join(&row.lora), &lora, Format::Kohya, &self.layout)?;
        files::write_whole(&out.join(&row.embeddings), &safetensors::serialize(&embeddings, None)?)?;
        let line = serde_json::to_string(&row)? + "\n";
        let mut manifest = manifest.lock().expect("no thread panics while it writes a row");
        manifest.write_all(line.as_bytes())?;
        Ok(manifest.sync_data()?)
    }

    /// Plain photos of a person, in scenes that no LoRA is trained on.
    pub fn references(&self, person: &Person) -> Result<Vec<Image>> {
        let Images { size, references, seed, .. } = self.settings.images;
        (0..references.max(1)).map(|i| image(person, &reference_scene(seed, i), size)).collect()
    }

    /// `face` (references, 512) and `image` (references, D).
    pub fn embed(&self, references: &[Image], id: &str) -> Result<BTreeMap<String, Tensor>> {
        let (mut face, mut image) = (Vec::new(), Vec::new());
        for reference in references {
            let found = self.faces.search(reference)?;
            // An image in which no face is found says nothing; the others stand for the person.
            if let Some(first) = found.faces.first() {
                face.push(self.faces.embed(reference, first)?);
                image.push(self.image_encoder.embed(reference, first)?);
            }
        }
        ensure!(!face.is_empty(), "no face was found in any reference image of `{id}`");
        let tensor = |rows: Vec<Vec<f32>>| Tensor::new(rows, &Device::Cpu);
        Ok([("face".to_string(), tensor(face)?), ("image".to_string(), tensor(image)?)].into())
    }
}

/// Scene `i` of the list that all people share, most of them photos.
pub fn scene(seed: u64, i: u64) -> Scene {
    let scene = Scene::draw(seed, i);
    // Three scenes of four are photos: there a person is best seen.
    if i.is_multiple_of(4) { scene } else { Scene { style: synthetic::Style::Photo, ..scene } }
}

/// The scene of reference image `i`: a plain photo from any side.
pub fn reference_scene(seed: u64, i: u64) -> Scene {
    Scene::draw(seed ^ 0x4ef, i).plain()
}

/// A painted image.
pub fn image(person: &Person, scene: &Scene, size: usize) -> Result<Image> {
    let rgb = synthetic::paint(person, scene, size, 1);
    Ok(Image { width: size, height: size, rgb })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::clip::ImageOutput;

    #[test]
    fn the_config_decides_what_the_image_encoder_is_shown() {
        let text = std::fs::read_to_string("configs/dataset-tiny.toml").unwrap();
        let plain: Settings = toml::from_str(&text).unwrap();
        let blanked = format!("{text}\n[image_input]\noutput = \"penultimate\"\nblank_background = true\n");
        let blanked: Settings = toml::from_str(&blanked).unwrap();
        assert_eq!(plain.image_input, ImageInput::default());
        let wanted = ImageInput { output: ImageOutput::Penultimate, blank_background: true };
        assert_eq!(blanked.image_input, wanted);
        // Datasets that were begun before there was a choice go on; another choice is another dataset.
        assert!(!toml::to_string(&plain).unwrap().contains("image_input"));
        let base = ModelId { name: "base".into(), sha256: "00".into() };
        assert_ne!(stamp(&plain, &base).unwrap(), stamp(&blanked, &base).unwrap());
        assert_eq!(toml::from_str::<Settings>(&toml::to_string(&blanked).unwrap()).unwrap(), blanked);
    }
}
