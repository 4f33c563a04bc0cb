//! LoRA ↔ latent: vector layout, standardisation and autoencoder together.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::config::{Config, FORMAT};
use super::lae::{Lae, LaeConfig};
use super::row_source::RowSource;
use super::scaler::StandardScaler;
use super::tensors::{Weights, write_tensors};
use crate::lora::Lora;
use crate::lora::canonical::{Canonical, Form};
use crate::lora::layout::LoraLayout;
use crate::weights::frozen;
use crate::weights::model_folder::{ModelFiles, save_json};
use crate::weights::model_id::ModelId;

/// A trained autoencoder with what its vectors mean. `train-lae` writes one, a hypernetwork contains one.
#[derive(Clone, Debug)]
pub struct LoraCodec {
    /// The base model that the LoRAs are for.
    pub base: ModelId,
    /// Which modules the vector holds, in order.
    pub layout: LoraLayout,
    /// The form that a LoRA's factors are brought to before they become a vector.
    pub form: Form,
    /// Of vectors (B, P).
    pub standardise: StandardScaler,
    /// The network.
    pub lae: Lae,
    weights: Weights,
}

/// What the vectors of an autoencoder mean.
#[derive(Clone, Debug)]
pub struct VectorSpace {
    /// The base model that the LoRAs are for.
    pub base: ModelId,
    /// Which modules a vector holds, in order.
    pub layout: LoraLayout,
    /// The form that a LoRA's factors are brought to before they become a vector.
    pub form: Form,
    /// Mean and scale of the vectors.
    pub standardise: StandardScaler,
}

impl LoraCodec {
    /// Puts a trained autoencoder together on `device`; `weights` are those of `Lae::new(config, …)` by name.
    pub fn new(
        space: VectorSpace,
        config: &LaeConfig,
        weights: BTreeMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let VectorSpace { base, layout, form, standardise } = space;
        let named: HashMap<String, Tensor> = weights.clone().into_iter().collect();
        let lae = Lae::new(config, frozen(named, DType::F32, device))?;
        let standardise = standardise.to_device(device)?;
        let codec = Self { base, layout, form, standardise, lae, weights: Weights::Held(weights) };
        codec.check()?;
        Ok(codec)
    }

    /// Reads `config.json`, `lae.safetensors` and `stats.safetensors`. The files may change afterwards.
    pub fn open(files: &ModelFiles, device: &Device) -> Result<Self> {
        let codec = Self::from_config(&Config::read(files)?, files, device)?;
        Ok(Self { weights: Weights::Held(codec.weights.by_name("lae")?), ..codec })
    }

    pub(super) fn from_config(config: &Config, files: &ModelFiles, device: &Device) -> Result<Self> {
        let dtype = files.narrow_dtype("lae", "basis", device);
        let lae = files.load("", "lae", dtype, device, |vb| Lae::new(&config.lae, vb))?;
        let stats = files.tensors("", "stats")?;
        let standardise = StandardScaler::load(&stats, "vector", device)
            .map_err(|error| files.unusable("stats.safetensors", format!("{error:#}")))?;
        let layout = with_shared_down(&config.layout, &stats)
            .map_err(|error| files.unusable("stats.safetensors", format!("{error:#}")))?;
        let form = form(config.canonical, &layout, &stats)
            .map_err(|error| files.unusable("stats.safetensors", format!("{error:#}")))?;
        let (base, weights) = (config.base.clone(), Weights::In(files.clone()));
        let codec = Self { base, layout, form, standardise, lae, weights };
        codec.check().map_err(|error| files.unusable("config.json", format!("{error:#}")))?;
        Ok(codec)
    }

    fn check(&self) -> Result<()> {
        let (layout, stats, lae) =
            (self.layout.parameters(), self.standardise.width(), self.lae.config().input());
        ensure!(
            layout == lae && stats == lae,
            "the autoencoder is for vectors of {lae} values, the layout has {layout}, the statistics {stats}"
        );
        Ok(())
    }

    /// Writes a folder that [`LoraCodec::open`] reads; weights are stored as `dtype`.
    pub fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        self.save_weights(folder, dtype)?;
        write_tensors(&folder.join("stats.safetensors"), self.stats()?, DType::F32)?;
        // Last, so that a folder with a config is complete.
        save_json(&folder.join("config.json"), &serde_json::to_value(self.config())?)
    }

    pub(super) fn save_weights(&self, folder: &Path, dtype: DType) -> Result<()> {
        write_tensors(&folder.join("lae.safetensors"), self.weights.by_name("lae")?, dtype)
    }

    pub(super) fn stats(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut stats: BTreeMap<String, Tensor> = self.standardise.tensors("vector")?.into_iter().collect();
        let down = self.layout.shared_tensors();
        stats.extend(down.iter().map(|(module, down)| (format!("{DOWN}{module}"), down.clone())));
        if let Some(reference) = self.form.reference() {
            let reference = self.layout.to_vector(&reference)?;
            stats.insert(REFERENCE.into(), Tensor::new(reference, &Device::Cpu)?);
        }
        Ok(stats)
    }

    pub(super) fn config(&self) -> Config {
        Config {
            format: FORMAT,
            base: self.base.clone(),
            layout: self.layout.clone(),
            canonical: self.form.kind(),
            lae: self.lae.config().clone(),
            denoiser: None,
        }
    }

    /// Where the network computes.
    pub fn device(&self) -> &Device {
        self.standardise.mean().device()
    }

    /// A LoRA as the vector (1, P) that [`LoraCodec::encode`] reads, in canonical form.
    ///
    /// # Errors
    /// A LoRA of another layout.
    pub fn vector(&self, lora: &Lora) -> Result<Tensor> {
        let vector = self.layout.to_vector(&self.form.apply(lora)?)?;
        Ok(Tensor::from_vec(vector, (1, self.layout.parameters()), &Device::Cpu)?)
    }

    /// LoRA vectors (B, P) of any device → z (B, L).
    pub fn encode(&self, vectors: &Tensor) -> Result<Tensor> {
        Ok(self.lae.encode(&self.standardise.apply(&vectors.to_device(self.device())?)?)?)
    }

    /// All LoRA vectors of a dataset, read a few at a time → z (M, L).
    pub fn encode_all(&self, vectors: &dyn RowSource) -> Result<Tensor> {
        let mut latents = Vec::new();
        vectors.each(&mut |_, batch| {
            latents.push(self.encode(batch)?);
            Ok(())
        })?;
        Ok(Tensor::cat(&latents, 0)?)
    }

    /// z (B, L) → LoRA vectors (B, P).
    pub fn decode(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.standardise.undo(&self.lae.decode(z)?)?)
    }

    /// One latent z (1, L) → the LoRA.
    ///
    /// # Errors
    /// Values that are not finite: better no file than one that gives black images.
    pub fn lora(&self, z: &Tensor) -> Result<Lora> {
        let vector = self.decode(z)?.squeeze(0)?.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
        ensure!(
            vector.iter().all(|x| x.is_finite()),
            "the hypernetwork made a LoRA with values that are not finite; its weights are damaged"
        );
        Ok(self.layout.from_vector(&vector)?)
    }

    /// The mean of all LoRAs that it was trained on: the prediction without a condition.
    pub fn mean_lora(&self) -> Result<Lora> {
        Ok(self.layout.from_vector(&self.standardise.mean().to_device(&Device::Cpu)?.to_vec1::<f32>()?)?)
    }
}

/// Before the names of shared `A`s in `stats.safetensors`.
const DOWN: &str = "down.";

/// The name of the LoRA that others are turned to, as a vector.
const REFERENCE: &str = "reference";

fn form(kind: Canonical, layout: &LoraLayout, stats: &HashMap<String, Tensor>) -> Result<Form> {
    let reference = match kind {
        Canonical::None | Canonical::Svd => Lora::default(),
        Canonical::Procrustes => {
            let reference =
                stats.get(REFERENCE).with_context(|| format!("tensor `{REFERENCE}` is missing"))?;
            layout.from_vector(&reference.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)?
        }
    };
    Ok(Form::restored(kind, reference))
}

/// The layout with its shared `A`s, where it has them.
fn with_shared_down(layout: &LoraLayout, stats: &HashMap<String, Tensor>) -> Result<LoraLayout> {
    if !layout.shared_down {
        return Ok(layout.clone());
    }
    let down = stats.iter().filter_map(|(name, down)| Some((name.strip_prefix(DOWN)?.into(), down.clone())));
    Ok(layout.clone().with_shared_down(down.collect())?)
}

/// Lengths of the tensors in a vector: each gets a scale of its own in [`StandardScaler::fit`].
pub fn blocks(layout: &LoraLayout) -> Vec<usize> {
    layout.segments().iter().map(|segment| segment.range.len()).collect()
}
