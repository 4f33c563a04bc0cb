//! What mixer and transformer learn from: embeddings of photos, and what the transformer should answer for each.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::seq::SliceRandom;
use serde_json::json;

use crate::commands::train_dit::Recipe;
use crate::dataset::latents::{CHUNK, LatentFile};
use crate::dataset::lora_dataset::LoraDataset;
use crate::diffusion::noise;
use crate::failure::Failure;
use crate::hypernet::mixer::MixerKind;
use crate::hypernet::prior::Prior;
use crate::hypernet::ridge::{CrossFit, Ridge};
use crate::hypernet::rows::Rows;
use crate::hypernet::stats::Standardise;
use crate::hypernet::{DenoiserStats, LoraCodec};

/// A row a photo (R, …) of the people to learn from. Embeddings are in the CPU's memory (8 KB a photo), latents in a
/// file; what is asked for batch by batch is given on the device of the networks.
pub struct Lessons {
    /// Standardisation, scale, prior and spread.
    pub stats: DenoiserStats,
    /// Standardised embeddings (R, F) and (R, I).
    pub face: Tensor,
    pub image: Tensor,
    /// The Gaussian of each photo (R); empty without a prior.
    pub clusters: Vec<u32>,
    /// The person of each photo.
    owners: Vec<usize>,
    latents: LatentFile,
    /// The linear guess, on the CPU; also made where it is not stored, as a baseline.
    pub fit: CrossFit,
    /// [`CrossFit::without_fold`] where the networks are.
    without_fold: Vec<Ridge>,
    device: Device,
    folds: usize,
    linear_guess: bool,
    kind: MixerKind,
    /// The photos of each person who is learnt from.
    pub learnt: Vec<Vec<u32>>,
    /// Those of the people kept apart to stop in time; none unless the recipe asks.
    pub validation: Vec<Vec<u32>>,
}

impl Lessons {
    /// Encodes the LoRAs into `folder`/latents.safetensors, fits the linear guess and takes the statistics.
    pub fn prepare(
        recipe: &Recipe,
        codec: &LoraCodec,
        lae: &str,
        set: &LoraDataset,
        folder: &std::path::Path,
    ) -> Result<Self> {
        let train = &set.train;
        let people = train.people();
        let source = json!({ "dataset": set.settings_hash, "people": people, "lae": lae });
        let shape = [people, codec.lae.config().latent()];
        let latents =
            LatentFile::open_or_make(&folder.join("latents.safetensors"), &source, shape, |from, count| {
                codec.encode(&train.vectors.batch(&(from..from + count).collect::<Vec<_>>())?)
            })?;
        let stats = DenoiserStats {
            face: Standardise::fit_whole(&train.faces)?,
            image: Standardise::fit_whole(&train.images)?,
            scale: 1.0,
            prior: None,
            spread: Some(spread(&latents, people)?),
        };
        let references = train.references();
        let (learnt, validation) = part(recipe, references)?;
        let (face, image) = (stats.face.apply(&train.faces)?, stats.image.apply(&train.images)?);
        let (kind, folds) = (recipe.mixer, recipe.folds);
        let owners = train.owners.clone();
        // The photos of one person are alike: in another fold they would give the answer away.
        let of_fold = |fold: usize| -> Vec<u32> {
            (0..owners.len() as u32).filter(|row| owners[*row as usize] % folds == fold).collect()
        };
        let rows_of_folds: Vec<Vec<u32>> = (0..folds).map(of_fold).collect();
        let fit = Ridge::cross_fit(folds, &recipe.penalties, |fold, i| {
            let Some(rows) = rows_of_folds[fold].chunks(ROWS).nth(i) else { return Ok(None) };
            let index = Tensor::new(rows, &Device::Cpu)?;
            let x = kind.seen(&face.index_select(&index, 0)?, &image.index_select(&index, 0)?)?;
            let people: Vec<usize> = rows.iter().map(|row| owners[*row as usize]).collect();
            Ok(Some((x, latents.rows(&people)?)))
        })?;
        let device = codec.device().clone();
        let without_fold = fit.without_fold.iter().map(|ridge| ridge.to_device(&device));
        let without_fold = without_fold.collect::<candle_core::Result<_>>()?;
        let mut lessons = Self {
            stats,
            face,
            image,
            clusters: Vec::new(),
            owners,
            latents,
            fit,
            without_fold,
            device,
            folds,
            linear_guess: recipe.linear_guess,
            kind,
            learnt,
            validation,
        };
        lessons.stats.scale = lessons.unit_power()?;
        if let Some(config) = &recipe.prior {
            let prior = Prior::fit(config, &train.faces, lessons.all(), recipe.seed)
                .map_err(|error| Failure::Usage(format!("the prior: {error:#}")))?;
            lessons.clusters = prior.choose(&train.faces)?.to_vec1()?;
            lessons.stats.prior = Some(prior);
        }
        Ok(lessons)
    }

    /// L
    pub fn width(&self) -> usize {
        self.latents.width()
    }

    /// Where the networks are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The people of `rows`.
    pub fn people(&self, rows: &[u32]) -> Vec<usize> {
        rows.iter().map(|row| self.owners[*row as usize]).collect()
    }

    /// Standardised embeddings (B, F) and (B, I) of `rows`.
    pub fn embeddings(&self, rows: &[u32]) -> Result<(Tensor, Tensor)> {
        let index = Tensor::new(rows, &Device::Cpu)?;
        let of = |x: &Tensor| x.index_select(&index, 0)?.to_device(&self.device);
        Ok((of(&self.face)?, of(&self.image)?))
    }

    /// What the transformer adds to: the linear guess of `rows` without their own fold, or zero (B, L).
    pub fn guess(&self, rows: &[u32]) -> Result<Tensor> {
        if !self.linear_guess {
            return Ok(Tensor::zeros((rows.len(), self.width()), candle_core::DType::F32, &self.device)?);
        }
        let (face, image) = self.embeddings(rows)?;
        let x = self.kind.seen(&face, &image)?;
        let mut place = vec![0u32; rows.len()];
        let (mut guesses, mut done) = (Vec::new(), 0);
        for fold in 0..self.folds {
            let own: Vec<u32> = (0..rows.len() as u32)
                .filter(|at| self.owners[rows[*at as usize] as usize] % self.folds == fold)
                .collect();
            if own.is_empty() {
                continue;
            }
            own.iter().zip(done..).for_each(|(at, to)| place[*at as usize] = to);
            done += own.len() as u32;
            let x = x.index_select(&Tensor::new(own, &self.device)?, 0)?;
            guesses.push(self.without_fold[fold].forward(&x)?);
        }
        Ok(Tensor::cat(&guesses, 0)?.index_select(&Tensor::new(place, &self.device)?, 0)?)
    }

    /// x_0 of `rows` (B, L): (z − guess) · scale.
    pub fn x0(&self, rows: &[u32]) -> Result<Tensor> {
        let z = self.latents.rows(&self.people(rows))?.to_device(&self.device)?;
        Ok(((z - self.guess(rows)?)? * self.stats.scale)?)
    }

    /// x_0 of all photos, part after part.
    fn all(&self) -> impl Iterator<Item = Result<Tensor>> {
        let rows: Vec<u32> = (0..self.owners.len() as u32).collect();
        let starts = (0..rows.len()).step_by(ROWS);
        starts.map(move |from| self.x0(&rows[from..rows.len().min(from + ROWS)]))
    }

    /// [`crate::hypernet::stats::unit_power`], part after part.
    fn unit_power(&self) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for x0 in self.all() {
            let x0 = x0?;
            sum += f64::from(x0.sqr()?.sum_all()?.to_scalar::<f32>()?);
            count += x0.elem_count();
        }
        anyhow::ensure!(sum.is_finite() && sum > 0.0, "the latents are all zero or not finite");
        Ok((count as f64 / sum).sqrt())
    }
}

/// Photos that are looked at together.
const ROWS: usize = 256;

/// Deviation of each value over people (L).
fn spread(latents: &LatentFile, people: usize) -> Result<Tensor> {
    let width = latents.width();
    let (mut sums, mut squares) = (vec![0f64; width], vec![0f64; width]);
    for from in (0..people).step_by(CHUNK) {
        let chunk: Vec<usize> = (from..people.min(from + CHUNK)).collect();
        for row in latents.rows(&chunk)?.to_vec2::<f32>()? {
            for (value, (sum, square)) in row.iter().zip(sums.iter_mut().zip(&mut squares)) {
                *sum += f64::from(*value);
                *square += f64::from(*value).powi(2);
            }
        }
    }
    let n = people as f64;
    let deviation = |(sum, square): (&f64, &f64)| ((square / n - (sum / n).powi(2)).max(0.0)).sqrt() as f32;
    let spread: Vec<f32> = sums.iter().zip(&squares).map(deviation).collect();
    Ok(Tensor::from_vec(spread, width, &Device::Cpu)?)
}

/// The rows of each person's reference photos.
type References = Vec<Vec<u32>>;

/// People to learn from, and people kept apart where the recipe asks for it.
fn part(recipe: &Recipe, references: References) -> Result<(References, References)> {
    let people = references.len();
    let apart = match &recipe.validation {
        Some(validation) => ((people as f64 * validation.share).round() as usize).max(1),
        None => 0,
    };
    let batch = recipe.plan.batch;
    if people < apart + 2 * batch {
        return Err(Failure::Usage(format!(
            "{} people to learn from are too few for batches of {batch}; take a `batch` of {} at most, or build a \
             larger dataset",
            people.saturating_sub(apart),
            people.saturating_sub(apart) / 2
        ))
        .into());
    }
    let mut order: Vec<usize> = (0..people).collect();
    // Stream 1, so that the choice shares nothing with the first step's draws.
    order.shuffle(&mut noise::generator(recipe.seed ^ 0x7a11, 1));
    let mut kept = vec![false; people];
    order[..apart].iter().for_each(|person| kept[*person] = true);
    let (mut learnt, mut validation) = (Vec::new(), Vec::new());
    for (photos, kept) in references.into_iter().zip(kept) {
        if kept { validation.push(photos) } else { learnt.push(photos) }
    }
    Ok((learnt, validation))
}
