//! Training data of mixer and transformer: the embeddings of each photo and the target x_0 of its person.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::seq::SliceRandom;
use serde_json::json;

use crate::dataset::latents::{CHUNK, LatentFile};
use crate::dataset::lora_dataset::LoraDataset;
use crate::diffusion::noise;
use crate::failure::Failure;
use crate::hypernet::mixer::MixerKind;
use crate::hypernet::prior::Prior;
use crate::hypernet::ridge::{CrossFit, Ridge};
use crate::hypernet::row_source::RowSource;
use crate::hypernet::scaler::StandardScaler;
use crate::hypernet::{DenoiserStats, LoraCodec};
use crate::recipes::dit::config::DitTrainConfig;

/// One row per photo (R, …) of the training people. Embeddings are kept in CPU memory (8 KB per photo), latents in a
/// file; batches are returned on the device of the networks.
pub struct LatentTrainingSet {
    /// Standardisation, scale, prior and spread.
    pub stats: DenoiserStats,
    /// ScaledRows face embeddings (R, F).
    pub face: Tensor,
    /// ScaledRows image embeddings (R, I).
    pub image: Tensor,
    /// The Gaussian of each photo (R); empty without a prior.
    pub clusters: Vec<u32>,
    /// The person of each photo.
    owners: Vec<usize>,
    latents: LatentFile,
    /// The linear guess, on the CPU; fitted as a baseline even if the hypernetwork does not store it.
    pub fit: CrossFit,
    /// [`CrossFit::without_fold`] on the device of the networks.
    without_fold: Vec<Ridge>,
    device: Device,
    folds: usize,
    linear_guess: bool,
    kind: MixerKind,
    /// The photos of each person who is trained on.
    pub training: Vec<Vec<u32>>,
    /// The photos of each validation person; empty without validation.
    pub validation: Vec<Vec<u32>>,
}

impl LatentTrainingSet {
    /// Encodes the LoRAs into `folder`/latents.safetensors, fits the linear guess and takes the statistics.
    pub fn prepare(
        config: &DitTrainConfig,
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
            face: StandardScaler::fit_whole(&train.faces)?,
            image: StandardScaler::fit_whole(&train.images)?,
            scale: 1.0,
            prior: None,
            spread: Some(spread(&latents, people)?),
        };
        let references = train.references();
        let (training, validation) = split_people(config, references)?;
        let (face, image) = (stats.face.apply(&train.faces)?, stats.image.apply(&train.images)?);
        let (kind, folds) = (config.mixer, config.folds);
        let owners = train.owners.clone();
        // The photos of a person must not be in different folds: the guess would have seen the target.
        let of_fold = |fold: usize| -> Vec<u32> {
            (0..owners.len() as u32).filter(|row| owners[*row as usize] % folds == fold).collect()
        };
        let rows_of_folds: Vec<Vec<u32>> = (0..folds).map(of_fold).collect();
        let fit = Ridge::cross_fit(folds, &config.penalties, |fold, i| {
            let Some(rows) = rows_of_folds[fold].chunks(ROWS).nth(i) else { return Ok(None) };
            let index = Tensor::new(rows, &Device::Cpu)?;
            let x = kind.seen(&face.index_select(&index, 0)?, &image.index_select(&index, 0)?)?;
            let people: Vec<usize> = rows.iter().map(|row| owners[*row as usize]).collect();
            Ok(Some((x, latents.rows(&people)?)))
        })?;
        let device = codec.device().clone();
        let without_fold = fit.without_fold.iter().map(|ridge| ridge.to_device(&device));
        let without_fold = without_fold.collect::<candle_core::Result<_>>()?;
        let mut data = Self {
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
            linear_guess: config.linear_guess,
            kind,
            training,
            validation,
        };
        data.stats.scale = data.unit_power()?;
        if let Some(prior) = &config.prior {
            let prior = Prior::fit(prior, &train.faces, data.all(), config.seed)
                .map_err(|error| Failure::Usage(format!("the prior: {error:#}")))?;
            data.clusters = prior.choose(&train.faces)?.to_vec1()?;
            data.stats.prior = Some(prior);
        }
        Ok(data)
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

    /// ScaledRows embeddings (B, F) and (B, I) of `rows`.
    pub fn embeddings(&self, rows: &[u32]) -> Result<(Tensor, Tensor)> {
        let index = Tensor::new(rows, &Device::Cpu)?;
        let of = |x: &Tensor| x.index_select(&index, 0)?.to_device(&self.device);
        Ok((of(&self.face)?, of(&self.image)?))
    }

    /// The linear guess (B, L) of `rows`, fitted without their own fold; zero where the config has none.
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

    /// x_0 of all photos, in chunks.
    fn all(&self) -> impl Iterator<Item = Result<Tensor>> {
        let rows: Vec<u32> = (0..self.owners.len() as u32).collect();
        let starts = (0..rows.len()).step_by(ROWS);
        starts.map(move |from| self.x0(&rows[from..rows.len().min(from + ROWS)]))
    }

    /// [`crate::hypernet::scaler::unit_power`] of x_0, in chunks.
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

/// Photos per chunk.
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

/// Splits the people into those to train on and those for validation.
fn split_people(config: &DitTrainConfig, references: References) -> Result<(References, References)> {
    let people = references.len();
    let validation_count = match &config.validation {
        Some(validation) => ((people as f64 * validation.share).round() as usize).max(1),
        None => 0,
    };
    let batch = config.plan.batch;
    if people < validation_count + 2 * batch {
        return Err(Failure::Usage(format!(
            "{} people to learn from are too few for batches of {batch}; take a `batch` of {} at most, or build a \
             larger dataset",
            people.saturating_sub(validation_count),
            people.saturating_sub(validation_count) / 2
        ))
        .into());
    }
    let mut order: Vec<usize> = (0..people).collect();
    // Stream 1, independent of the random numbers of the first step.
    order.shuffle(&mut noise::generator(config.seed ^ 0x7a11, 1));
    let mut in_validation = vec![false; people];
    order[..validation_count].iter().for_each(|person| in_validation[*person] = true);
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (photos, validates) in references.into_iter().zip(in_validation) {
        if validates { validation.push(photos) } else { training.push(photos) }
    }
    Ok((training, validation))
}
