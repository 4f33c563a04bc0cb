//! The images and captions that one LoRA is learnt from, as the networks take them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use sha2::{Digest, Sha256};

use crate::diffusion::noise;
use crate::failure::Failure;
use crate::identity::FaceEncoder;
use crate::image::{Image, is_skipped, note_skipped};
use crate::layers::compute_dtype;
use crate::progress;
use crate::recipes::dreambooth::augment::{self, Cut};
use crate::recipes::dreambooth::config::{Crop, Images, Latents, Settings, SizeConditioning};
use crate::recipes::dreambooth::data_order;
use crate::recipes::dreambooth::loss::Captions;
use crate::recipes::dreambooth::training_folder::TrainingFolder;
use crate::sdxl::pipeline::Sizes;
use crate::sdxl::text::{TextConditioning, TextEncoders};
use crate::sdxl::vae::Vae;

/// An image and its captions.
pub struct Captioned {
    /// Upright.
    pub image: Image,
    /// One of them is drawn each time; at least one.
    pub captions: Vec<String>,
    /// Times that it comes in an epoch.
    pub repeats: usize,
    /// Trigger and class, where the folder's name says them.
    pub called: Option<String>,
}

/// Reads the images of a training folder (see [`training_folder`](super::training_folder)). Images without a caption
/// get `caption(trigger and class from the folder's name)`. Files that cannot be read are skipped with a warning; a
/// note counts what was found, used and skipped.
///
/// # Errors
/// [`Failure::Unusable`] when no image is left, or a caption is not UTF-8.
pub fn read_images(folder: &Path, caption: impl Fn(Option<&str>) -> String) -> Result<Vec<Captioned>> {
    let found = TrainingFolder::read(folder)?;
    let mut read = Vec::new();
    for entry in &found.images {
        progress::check()?;
        let concept = entry.concept.as_ref();
        let captions = match &entry.captions[..] {
            [] => vec![caption(concept.map(|concept| concept.called.as_str()))],
            lines => lines.to_vec(),
        };
        match Image::open(&entry.path) {
            Ok(image) => {
                let repeats = concept.map_or(1, |concept| concept.repeats);
                let called = concept.map(|concept| concept.called.clone());
                read.push(Captioned { image, captions, repeats, called });
            }
            Err(error) => progress::warn(format_args!("left out: {error:#}")),
        }
    }
    let unreadable = found.images.len() - read.len();
    if read.is_empty() {
        let why = match unreadable {
            0 => "there is no image in this folder".to_string(),
            n => format!("none of its {n} images can be read"),
        };
        return Err(Failure::unusable(folder, why));
    }
    for table in &found.tables {
        progress::warn(format_args!(
            "captions in `{}` are not read; save them as metadata.jsonl, or as a text file beside each image",
            table.display()
        ));
    }
    progress::note(format_args!("{}: {}", folder.display(), found.summary(unreadable)));
    Ok(read)
}

/// Warns of what makes a poor LoRA but is allowed: few images, and images without a face.
pub fn warn_of_poor_images(name: &str, images: &[Captioned], faces: &FaceEncoder) -> Result<()> {
    if images.len() < 3 {
        let count = images.len();
        progress::warn(format_args!(
            "{name}: only {count} {}; the LoRA will learn them by heart",
            if count == 1 { "image" } else { "images" }
        ));
    }
    let mut without = 0;
    for Captioned { image, .. } in images {
        progress::check()?;
        without += usize::from(faces.search(image)?.faces.is_empty());
    }
    if without > 0 {
        progress::warn(format_args!("{name}: no face is found in {without} of {} images", images.len()));
    }
    Ok(())
}

/// The parts of a model that turn images and captions into what the UNet takes.
pub struct Encoders {
    /// Images to latents.
    pub vae: Vae,
    /// Captions to conditioning.
    pub text: TextEncoders,
    /// Where the UNet computes.
    pub device: Device,
}

/// One person's images, or those of the class.
pub struct ImageDataset {
    /// Images of an epoch by number, with their repeats.
    epoch: Vec<usize>,
    shown: Vec<Shown>,
    captions: Captions,
    /// The captions themselves.
    texts: Vec<String>,
    /// For views that are drawn anew each time.
    vae: Option<Vae>,
    how: Images,
    seed: u64,
    device: Device,
    /// Trigger and class, where a folder's name says them.
    pub called: Option<String>,
    /// SHA-256 of pixels and captions.
    pub sha256: String,
}

/// One image.
struct Shown {
    /// Where views are drawn anew.
    image: Option<Image>,
    /// Encoded beforehand: as it is, and mirrored where flips are wanted.
    encoded: Vec<(Moments, Sizes)>,
    /// Width and height that it is shown in.
    size: [usize; 2],
    /// Only images of one group share a pass.
    group: usize,
    /// Places in the captions; one is drawn each time.
    captions: Vec<usize>,
}

/// Mean and deviation of the VAE's distribution, (1, C, h, w) in its own scale.
#[derive(Clone)]
struct Moments {
    mean: Tensor,
    deviation: Tensor,
}

impl ImageDataset {
    /// Encodes what can be encoded beforehand: captions unless text encoders train, latents unless crops or colours
    /// are random.
    pub fn new(
        images: Vec<Captioned>,
        settings: &Settings,
        side: usize,
        encoders: &Encoders,
    ) -> Result<Self> {
        let how = settings.images.clone();
        let factor = encoders.vae.config().factor();
        let sizes = match how.crop {
            Crop::Buckets => augment::buckets(side, (side / 16).next_multiple_of(factor)),
            _ => vec![[side, side]],
        };
        let mut hash = Sha256::new();
        let mut texts: Vec<String> = Vec::new();
        let mut repeats = Vec::new();
        let mut called = None;
        let mut shown = Vec::new();
        let anew = how.crop == Crop::Random || how.colour > 0.0;
        for Captioned { image, captions, repeats: times, called: named } in images {
            called = called.or(named);
            progress::check()?;
            hash.update((image.width as u64).to_le_bytes());
            hash.update(&image.rgb);
            captions.iter().for_each(|caption| hash.update(caption));
            if times != 1 {
                hash.update((times as u64).to_le_bytes());
            }
            repeats.push(times);
            let group = augment::nearest_bucket(&sizes, [image.width, image.height]);
            let size = sizes[group];
            let place = |caption: String| {
                texts.iter().position(|known| *known == caption).unwrap_or_else(|| {
                    texts.push(caption);
                    texts.len() - 1
                })
            };
            let captions = captions.into_iter().map(place).collect();
            let mut encoded = Vec::new();
            if !anew {
                let cut = augment::cut(&image, size, [0.5, 0.5]);
                encoded.push((
                    moments(&encoders.vae, &cut.image, &encoders.device)?,
                    size_conditioning(&how, &cut),
                ));
                if how.flip {
                    let cut = cut.mirrored();
                    encoded.push((
                        moments(&encoders.vae, &cut.image, &encoders.device)?,
                        size_conditioning(&how, &cut),
                    ));
                }
            }
            shown.push(Shown { image: anew.then_some(image), encoded, size, group, captions });
        }
        let prompts: Vec<&str> = texts.iter().map(String::as_str).collect();
        for caption in &prompts {
            if let Some(end) = encoders.text.cut(caption)? {
                progress::warn(format_args!("a caption is too long; its end is cut off: `{end}`"));
            }
        }
        let encoded = if settings.lora.text_encoders {
            let (one, two) = encoders.text.tokens(&prompts)?;
            Captions::Tokens(one, two)
        } else {
            Captions::Encoded(encoders.text.encode_prompts(&prompts)?)
        };
        Ok(Self {
            shown,
            captions: encoded,
            texts,
            epoch: epoch(&repeats),
            called,
            vae: anew.then(|| encoders.vae.clone()),
            how,
            seed: settings.seed,
            device: encoders.device.clone(),
            sha256: hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// How many images there are; never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.shown.len()
    }

    /// Width, height and number of images of each size that is trained on.
    pub fn sizes(&self) -> std::collections::BTreeMap<[usize; 2], usize> {
        let mut sizes = std::collections::BTreeMap::new();
        self.shown.iter().for_each(|shown| *sizes.entry(shown.size).or_default() += 1);
        sizes
    }

    /// How many images have each caption.
    pub fn caption_counts(&self) -> std::collections::BTreeMap<&str, usize> {
        let mut counts = std::collections::BTreeMap::new();
        for place in self.shown.iter().flat_map(|shown| &shown.captions) {
            *counts.entry(self.texts[*place].as_str()).or_default() += 1;
        }
        counts
    }

    /// The images of pass `pass` (numbers), `batch` of them.
    pub fn choose(&self, pass: u64, batch: usize) -> Vec<usize> {
        let groups: Vec<usize> = self.epoch.iter().map(|image| self.shown[*image].group).collect();
        let places = data_order::shuffled_epoch_indices_by_group(self.seed, pass, batch, &groups);
        places.into_iter().map(|place| self.epoch[place]).collect()
    }

    /// Their latents (n, C, h, w), scaled as the UNet wants them, and their sizes and crops (n, 6).
    pub fn latents(&self, chosen: &[usize], pass: u64, vae: &Scaling) -> Result<(Tensor, Tensor)> {
        let (mut latents, mut time_ids) = (Vec::new(), Vec::new());
        for (i, &image) in chosen.iter().enumerate() {
            // One stream a sample: 4096 is more than any batch.
            let mut rng = noise::generator(self.seed ^ 0xa46, pass * 4096 + i as u64);
            let (moments, sizes) = self.view(&self.shown[image], &mut rng)?;
            let z = match self.how.latents {
                Latents::Mean => moments.mean,
                Latents::Sample => {
                    let unit = crate::train::normal(&mut rng, moments.mean.shape(), moments.mean.device())?;
                    (&moments.mean + (unit * &moments.deviation)?)?
                }
            };
            latents.push(vae.to_latents(&z)?);
            time_ids.push(sizes.time_ids(1, &self.device)?);
        }
        Ok((Tensor::cat(&latents, 0)?, Tensor::cat(&time_ids, 0)?))
    }

    /// One look at an image.
    fn view(&self, shown: &Shown, rng: &mut impl Rng) -> Result<(Moments, Sizes)> {
        let mirrored = self.how.flip && rng.random::<bool>();
        let (Some(image), Some(vae)) = (&shown.image, &self.vae) else {
            return Ok(shown.encoded[usize::from(mirrored)].clone());
        };
        let place = if self.how.crop == Crop::Random { [rng.random(), rng.random()] } else { [0.5, 0.5] };
        let mut cut = augment::cut(image, shown.size, place);
        if mirrored {
            cut = cut.mirrored();
        }
        if self.how.colour > 0.0 {
            cut.image = augment::jitter_colour(&cut.image, self.how.colour, rng);
        }
        Ok((moments(vae, &cut.image, &self.device)?, size_conditioning(&self.how, &cut)))
    }

    /// A caption of each of `chosen` in pass `pass`.
    pub fn captions(&self, chosen: &[usize], pass: u64) -> Result<Captions> {
        let draw = |(i, image): (usize, &usize)| match &self.shown[*image].captions[..] {
            [one] => *one as u32,
            several => {
                let mut rng = noise::generator(self.seed ^ 0xca97, pass * 4096 + i as u64);
                several[rng.random_range(0..several.len())] as u32
            }
        };
        let index: Vec<u32> = chosen.iter().enumerate().map(draw).collect();
        let index = Tensor::new(index, &self.device)?;
        Ok(match &self.captions {
            Captions::Encoded(text) => Captions::Encoded(TextConditioning {
                context: text.context.index_select(&index, 0)?,
                pooled: text.pooled.index_select(&index, 0)?,
            }),
            Captions::Tokens(one, two) => {
                Captions::Tokens(one.index_select(&index, 0)?, two.index_select(&index, 0)?)
            }
        })
    }
}

/// The images of an epoch: each as often as its repeats say, relative to the others'.
fn epoch(repeats: &[usize]) -> Vec<usize> {
    fn gcd(a: usize, b: usize) -> usize {
        if b == 0 { a } else { gcd(b, a % b) }
    }
    let divisor = repeats.iter().copied().fold(0, gcd).max(1);
    repeats.iter().enumerate().flat_map(|(image, times)| vec![image; times / divisor]).collect()
}

/// The linear map from a VAE's latents to the diffusion model's, without the VAE itself.
#[derive(Clone)]
pub struct Scaling {
    /// Per channel, (1, C, 1, 1).
    shift: Tensor,
    factor: Tensor,
}

impl Scaling {
    /// That of `vae`.
    pub fn of(vae: &Vae, device: &Device) -> Result<Self> {
        let channels = vae.config().latent_channels;
        let at = |value: f32| vae.to_latents(&Tensor::full(value, (1, channels, 1, 1), device)?);
        let shift = at(0.0)?;
        Ok(Self { factor: (at(1.0)? - &shift)?, shift })
    }

    fn to_latents(&self, z: &Tensor) -> Result<Tensor> {
        Ok(z.broadcast_mul(&self.factor)?.broadcast_add(&self.shift)?)
    }
}

fn moments(vae: &Vae, image: &Image, device: &Device) -> Result<Moments> {
    let dtype = compute_dtype(vae.dtype(), device);
    let (mean, log_variance) = vae.encode(&image.to_tensor(device)?.unsqueeze(0)?.to_dtype(dtype)?)?;
    let deviation = (log_variance.to_dtype(DType::F32)? * 0.5)?.exp()?;
    Ok(Moments { mean: mean.to_dtype(DType::F32)?, deviation })
}

fn size_conditioning(how: &Images, cut: &Cut) -> Sizes {
    let target = [cut.image.width, cut.image.height];
    match how.sizes {
        SizeConditioning::Image => Sizes { original: cut.original, crop: cut.crop, target },
        SizeConditioning::Target => Sizes::of(target[0], target[1]),
    }
}

/// The folders in `folder`, a person each, sorted by name.
///
/// # Errors
/// [`Failure::Unusable`] when there is none.
pub fn people_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|error| Failure::unusable(folder, error))?;
    let mut people = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Failure::unusable(folder, error))?;
        if is_skipped(&entry.file_name()) {
            note_skipped(&entry.path());
        } else if entry.path().is_dir() {
            people.push(entry.path());
        }
    }
    if people.is_empty() {
        return Err(Failure::unusable(folder, "there is no folder in it; each person's images lie in one"));
    }
    people.sort();
    Ok(people)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_count_relative_to_each_other() {
        assert_eq!(epoch(&[10, 10]), [0, 1]);
        assert_eq!(epoch(&[10, 20, 1]).len(), 31);
        assert_eq!(epoch(&[2, 4]), [0, 1, 1]);
    }
}
