//! Recognition: an aligned face → a unit vector whose cosine with another's tells whether both are one person.
//!
//! Two networks that were trained apart: MobileFaceNet (Chen et al. 2018, 512 numbers) is the condition of the
//! hypernetwork; SFace (Zhong et al. 2021, OpenCV Zoo `face_recognition_sface_2021dec`, 128 numbers) only judges,
//! so that what is drawn is never judged by what drew it.

use anyhow::Result;

use super::align::{SIDE, align};
use super::detect::Face;
use super::onnx::Network;
use crate::picture::Picture;

/// A face recogniser.
pub struct Recogniser {
    network: Network,
    /// What is taken from a byte, and what the rest is divided by, before it enters the network.
    shift_and_scale: (f32, f32),
}

impl Recogniser {
    /// MobileFaceNet: 512 numbers, the condition of the hypernetwork.
    pub fn mobilefacenet() -> Result<Self> {
        let bytes = include_bytes!("../assets/face/mobilefacenet512.onnx");
        let network = Network::embedded("mobilefacenet512", bytes, &["output"])?;
        Ok(Self { network, shift_and_scale: (127.5, 127.5) })
    }

    /// SFace: 128 numbers, the judge in evaluation. Its weights are the zoo's int8 blocks
    /// (`scripts/pack_sface.py`); its normalisation is part of the graph.
    pub fn sface() -> Result<Self> {
        let bytes = include_bytes!("../assets/face/sface.onnx");
        let network = Network::embedded("sface-2021dec", bytes, &["fc1"])?;
        Ok(Self { network, shift_and_scale: (0.0, 1.0) })
    }

    /// The network, for its name and checksum.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The unit vector of a face in `picture`.
    pub fn embed(&self, picture: &Picture, face: &Face) -> Result<Vec<f32>> {
        self.embed_aligned(&align(picture, &face.points, SIDE))
    }

    /// The unit vector of an aligned face of 112×112 pixels.
    pub fn embed_aligned(&self, face: &Picture) -> Result<Vec<f32>> {
        let (shift, scale) = self.shift_and_scale;
        let plane =
            |c: usize| face.rgb.iter().skip(c).step_by(3).map(|&value| (f32::from(value) - shift) / scale);
        let input: Vec<f32> = plane(0).chain(plane(1)).chain(plane(2)).collect();
        let mut embedding = self.network.run([1, 3, SIDE, SIDE], &input)?.swap_remove(0);
        let length = embedding.iter().map(|value| value * value).sum::<f32>().sqrt();
        embedding.iter_mut().for_each(|value| *value /= length.max(f32::MIN_POSITIVE));
        Ok(embedding)
    }
}

/// The cosine of two vectors, −1 to 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)) as f32
}
