//! Mixture of face and image features (MIF): what the diffusion transformer is told about a person.
//!
//! Wu et al. 2024 (arXiv 2408.06740): F = S_img · MLP(E_img) + S_face · MLP(E_face), with
//! (S_img, S_face) = softmax(f([E_img; E_face])) and f linear. Embeddings are standardised first.
//!
//! Ours on top: a learned vector that stands for "nobody in particular", for guidance.

use candle_core::{D, Module, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::layers::{Activation, Linear};

/// Sizes of the mixer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixerConfig {
    /// Width of the face embedding.
    pub face: usize,
    /// Width of the image embedding.
    pub image: usize,
    /// D: width of the condition, equal to that of the transformer.
    pub width: usize,
}

/// The mixer.
#[derive(Clone, Debug)]
pub struct Mixer {
    image: [Linear; 2],
    face: [Linear; 2],
    gate: Linear,
    /// (D): the condition of a dropped person.
    nobody: Tensor,
}

/// A condition and how it came about.
#[derive(Clone, Debug)]
pub struct Mixed {
    /// F (B, D)
    pub condition: Tensor,
    /// (B, 2): S_img and S_face. A gate at 0 or 1 for everybody has collapsed; worth a look.
    pub gates: Tensor,
}

impl Mixer {
    /// A mixer with two-layer MLPs.
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let MixerConfig { face, image, width } = *config;
        let mlp = |input, vb: VarBuilder| -> Result<[Linear; 2]> {
            Ok([Linear::new(input, width, vb.pp(0))?, Linear::new(width, width, vb.pp(1))?])
        };
        let init = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Self {
            image: mlp(image, vb.pp("image"))?,
            face: mlp(face, vb.pp("face"))?,
            gate: Linear::new(image + face, 2, vb.pp("gate"))?,
            nobody: vb.get_with_hints(width, "nobody", init)?,
        })
    }

    /// `face` (B, F), `image` (B, I) → F (B, D) and the gates.
    pub fn forward(&self, face: &Tensor, image: &Tensor) -> Result<Mixed> {
        let logits = self.gate.forward(&Tensor::cat(&[image, face], 1)?)?;
        // The composite softmax: candle's fused one stops gradients.
        let gates = candle_nn::ops::softmax(&logits, D::Minus1)?; // (B, 2)
        let from_image = mlp(&self.image, image)?.broadcast_mul(&gates.narrow(1, 0, 1)?)?;
        let from_face = mlp(&self.face, face)?.broadcast_mul(&gates.narrow(1, 1, 1)?)?;
        Ok(Mixed { condition: (from_image + from_face)?, gates })
    }

    /// The condition of nobody in particular, for `count` samples (B, D).
    pub fn nobody(&self, count: usize) -> Result<Tensor> {
        self.nobody.unsqueeze(0)?.broadcast_as((count, self.nobody.elem_count()))
    }

    /// Replaces the conditions of dropped samples by nobody. `condition` (B, D), `keep` (B) of ones and zeros.
    pub fn drop(&self, condition: &Tensor, keep: &Tensor) -> Result<Tensor> {
        let keep = keep.unsqueeze(1)?; // (B, 1)
        let nobody = self.nobody(condition.dim(0)?)?.broadcast_mul(&(1.0 - &keep)?)?;
        condition.broadcast_mul(&keep)? + nobody
    }
}

/// linear → SiLU → linear
fn mlp(layers: &[Linear; 2], x: &Tensor) -> Result<Tensor> {
    layers[1].forward(&Activation::Silu.apply(&layers[0].forward(x)?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::weights::Trainable;

    #[test]
    fn gates_sum_to_one_and_dropping_gives_nobody() {
        let config = MixerConfig { face: 6, image: 4, width: 8 };
        let mixer = Mixer::new(&config, Trainable::new(3).builder(&Device::Cpu)).unwrap();
        let face = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().reshape((2, 6)).unwrap();
        let image = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
        let mixed = mixer.forward(&face, &image).unwrap();
        for sum in mixed.gates.sum(1).unwrap().to_vec1::<f32>().unwrap() {
            assert!((sum - 1.0).abs() < 1e-6);
        }
        let keep = Tensor::new(&[1f32, 0.], &Device::Cpu).unwrap();
        let dropped = mixer.drop(&mixed.condition, &keep).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(dropped[0], mixed.condition.to_vec2::<f32>().unwrap()[0]);
        assert_eq!(dropped[1], mixer.nobody(1).unwrap().to_vec2::<f32>().unwrap()[0]);
        assert_ne!(dropped[1], mixed.condition.to_vec2::<f32>().unwrap()[1]);
    }
}
