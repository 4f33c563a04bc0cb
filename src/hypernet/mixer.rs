//! Mixture of face and image features (MIF): the condition of the diffusion transformer.
//!
//! Wu et al. 2024 (arXiv 2408.06740): F = S_img · MLP(E_img) + S_face · MLP(E_face), with
//! (S_img, S_face) = softmax(f([E_img; E_face])) and f linear. Embeddings are standardised first.
//!
//! Our additions: a learned null condition for classifier-free guidance, and three mixers without a gate as baselines
//! ([`MixerKind`]).

use candle_core::{D, Module, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::layers::{Activation, Linear};

/// How the two embeddings become one condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MixerKind {
    /// A mixture of two experts with a soft gate, the paper's.
    #[default]
    Moe,
    /// MLP(E_face); ignores the image embedding.
    FaceOnly,
    /// MLP(E_img); ignores the face embedding.
    ImageOnly,
    /// MLP([E_img; E_face]) without a gate.
    Concat,
}

impl MixerKind {
    /// Whether the condition depends on the face embedding.
    pub fn sees_face(self) -> bool {
        self != Self::ImageOnly
    }

    /// Whether the condition depends on the image embedding.
    pub fn sees_image(self) -> bool {
        self != Self::FaceOnly
    }

    /// [E_face; E_img] (B, …) without the embedding that this kind ignores, for baselines on the same input.
    pub fn seen(self, face: &Tensor, image: &Tensor) -> Result<Tensor> {
        match self {
            Self::FaceOnly => Ok(face.clone()),
            Self::ImageOnly => Ok(image.clone()),
            Self::Moe | Self::Concat => Tensor::cat(&[face, image], D::Minus1),
        }
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Sizes of the mixer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixerConfig {
    /// How the embeddings are put together.
    #[serde(default, skip_serializing_if = "MixerKind::is_default")]
    pub kind: MixerKind,
    /// Width of the face embedding.
    pub face: usize,
    /// Width of the image embedding.
    pub image: usize,
    /// D: width of the condition, equal to that of the transformer.
    pub width: usize,
}

impl MixerConfig {
    /// Number of values that the mixer reads: the width of [`MixerKind::seen`].
    pub fn input(&self) -> usize {
        let width = |sees: bool, width: usize| if sees { width } else { 0 };
        width(self.kind.sees_face(), self.face) + width(self.kind.sees_image(), self.image)
    }
}

/// The mixer.
#[derive(Clone, Debug)]
pub struct Mixer {
    net: Net,
    /// (D): replaces the condition when it is dropped.
    null_condition: Tensor,
}

#[derive(Clone, Debug)]
enum Net {
    Moe { image: Mlp, face: Mlp, gate: Linear },
    FaceOnly(Mlp),
    ImageOnly(Mlp),
    Concat(Mlp),
}

/// A condition and how it came about.
#[derive(Clone, Debug)]
pub struct Mixed {
    /// F (B, D)
    pub condition: Tensor,
    /// (B, 2): S_img and S_face, where there is a gate. At 0 or 1 for all people it has collapsed.
    pub gates: Option<Tensor>,
}

/// Gate values over people: how much of the condition comes from the face, and how much that differs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GateFigures {
    /// Mean of S_face; that of S_img is what is missing to 1.
    pub face: f64,
    /// Standard deviation of S_face.
    pub spread: f64,
}

impl GateFigures {
    /// Of `gates` (B, 2).
    pub fn of(gates: &Tensor) -> Result<Self> {
        let face: Vec<f32> = gates.narrow(1, 1, 1)?.flatten_all()?.to_vec1()?;
        let count = face.len().max(1) as f64;
        let mean = face.iter().map(|gate| f64::from(*gate)).sum::<f64>() / count;
        let variance = face.iter().map(|gate| (f64::from(*gate) - mean).powi(2)).sum::<f64>() / count;
        Ok(Self { face: mean, spread: variance.sqrt() })
    }
}

impl Mixer {
    /// A mixer with two-layer MLPs.
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let MixerConfig { kind, face, image, width } = *config;
        let mlp = |input, name: &str| Mlp::new(input, width, vb.pp(name));
        let net = match kind {
            MixerKind::Moe => Net::Moe {
                image: mlp(image, "image")?,
                face: mlp(face, "face")?,
                gate: Linear::new(image + face, 2, vb.pp("gate"))?,
            },
            MixerKind::FaceOnly => Net::FaceOnly(mlp(face, "face")?),
            MixerKind::ImageOnly => Net::ImageOnly(mlp(image, "image")?),
            MixerKind::Concat => Net::Concat(mlp(image + face, "both")?),
        };
        let init = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Self { net, null_condition: vb.get_with_hints(width, "null_condition", init)? })
    }

    /// `face` (B, F), `image` (B, I) → F (B, D) and the gates.
    pub fn forward(&self, face: &Tensor, image: &Tensor) -> Result<Mixed> {
        let together = || Tensor::cat(&[image, face], 1);
        let condition = match &self.net {
            Net::Moe { image: image_mlp, face: face_mlp, gate } => {
                // The composite softmax: candle's fused one stops gradients.
                let gates = candle_nn::ops::softmax(&gate.forward(&together()?)?, D::Minus1)?; // (B, 2)
                let from_image = image_mlp.forward(image)?.broadcast_mul(&gates.narrow(1, 0, 1)?)?;
                let from_face = face_mlp.forward(face)?.broadcast_mul(&gates.narrow(1, 1, 1)?)?;
                return Ok(Mixed { condition: (from_image + from_face)?, gates: Some(gates) });
            }
            Net::FaceOnly(mlp) => mlp.forward(face)?,
            Net::ImageOnly(mlp) => mlp.forward(image)?,
            Net::Concat(mlp) => mlp.forward(&together()?)?,
        };
        Ok(Mixed { condition, gates: None })
    }

    /// The learned null condition for `count` samples (B, D).
    pub fn null_condition(&self, count: usize) -> Result<Tensor> {
        self.null_condition.unsqueeze(0)?.broadcast_as((count, self.null_condition.elem_count()))
    }

    /// Replaces the conditions of dropped samples by the null condition. `condition` (B, D), `keep` (B) of ones and zeros.
    pub fn drop(&self, condition: &Tensor, keep: &Tensor) -> Result<Tensor> {
        let keep = keep.unsqueeze(1)?; // (B, 1)
        let null = self.null_condition(condition.dim(0)?)?.broadcast_mul(&(1.0 - &keep)?)?;
        condition.broadcast_mul(&keep)? + null
    }
}

/// linear → SiLU → linear
#[derive(Clone, Debug)]
struct Mlp([Linear; 2]);

impl Mlp {
    fn new(input: usize, width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self([Linear::new(input, width, vb.pp(0))?, Linear::new(width, width, vb.pp(1))?]))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0[1].forward(&Activation::Silu.apply(&self.0[0].forward(x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::weights::Trainable;

    fn mixer(kind: MixerKind) -> Mixer {
        let config = MixerConfig { kind, face: 6, image: 4, width: 8 };
        Mixer::new(&config, Trainable::new(3).builder(&Device::Cpu)).unwrap()
    }

    fn people() -> (Tensor, Tensor) {
        let face = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().reshape((2, 6)).unwrap();
        (face, Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap())
    }

    #[test]
    fn gates_sum_to_one_and_dropping_gives_the_null_condition() {
        let mixer = mixer(MixerKind::Moe);
        let (face, image) = people();
        let mixed = mixer.forward(&face, &image).unwrap();
        let gates = mixed.gates.unwrap();
        for sum in gates.sum(1).unwrap().to_vec1::<f32>().unwrap() {
            assert!((sum - 1.0).abs() < 1e-6);
        }
        let figures = GateFigures::of(&gates).unwrap();
        assert!(figures.face > 0.0 && figures.face < 1.0 && figures.spread > 0.0);
        let keep = Tensor::new(&[1f32, 0.], &Device::Cpu).unwrap();
        let dropped = mixer.drop(&mixed.condition, &keep).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(dropped[0], mixed.condition.to_vec2::<f32>().unwrap()[0]);
        assert_eq!(dropped[1], mixer.null_condition(1).unwrap().to_vec2::<f32>().unwrap()[0]);
        assert_ne!(dropped[1], mixed.condition.to_vec2::<f32>().unwrap()[1]);
    }

    #[test]
    fn a_mixer_depends_on_what_its_kind_sees_and_on_nothing_else() {
        let (face, image) = people();
        for kind in [MixerKind::Moe, MixerKind::FaceOnly, MixerKind::ImageOnly, MixerKind::Concat] {
            let mixer = mixer(kind);
            let values = |face: &Tensor, image: &Tensor| {
                mixer.forward(face, image).unwrap().condition.to_vec2::<f32>().unwrap()
            };
            let now = values(&face, &image);
            assert_eq!(values(&(&face * 0.5).unwrap(), &image) != now, kind.sees_face(), "{kind:?}");
            assert_eq!(values(&face, &(&image * 0.5).unwrap()) != now, kind.sees_image(), "{kind:?}");
            assert_eq!(mixer.forward(&face, &image).unwrap().gates.is_some(), kind == MixerKind::Moe);
            let config = MixerConfig { kind, face: 6, image: 4, width: 8 };
            assert_eq!(kind.seen(&face, &image).unwrap().dims(), [2, config.input()]);
        }
    }
}
