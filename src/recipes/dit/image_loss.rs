//! The functional loss of `train-dit`: the base model's diffusion loss on images of a person, with the LoRA decoded from
//! the predicted latent attached.

use anyhow::Result;
use candle_core::Tensor;
use rand_chacha::ChaCha8Rng;

use crate::hypernet::LoraCodec;
use crate::recipes::dit::config::FunctionalLossConfig;
use crate::recipes::dreambooth::functional_loss::FunctionalLoss;

/// Decodes latents and computes the diffusion loss of their LoRAs.
pub struct ImageLoss<'a> {
    /// Weight and number of people and images.
    pub how: &'a FunctionalLossConfig,
    /// Decodes the latents.
    pub codec: &'a LoraCodec,
    /// The base model and the images of the dataset.
    pub functional_loss: FunctionalLoss,
}

impl ImageLoss<'_> {
    /// The mean loss (scalar) of latents z (K, L) of the K people `people` of the dataset.
    pub fn loss(&self, z: &Tensor, people: &[usize], rng: &mut ChaCha8Rng) -> Result<Tensor> {
        let vectors = self.codec.decode(z)?;
        self.functional_loss.loss(&self.codec.layout, &vectors, people, self.how.images, rng)
    }
}
